//! A tokenizer's patterns are written for Oniguruma, which the Python package runs, in Ruby's dialect. What that reads differently
//! from the engine here: `^` and `$` hold at every line, and the option `m` lets a dot match a line feed.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A part of a tokenizer (normaliser, pre-tokeniser, decoder) with its patterns translated; `None` where there is nothing to
/// translate. Fails on a pattern that matches everywhere since it is empty.
pub(super) fn translated<T: Serialize + DeserializeOwned>(part: Option<&T>) -> Result<Option<T>, String> {
    let Some(part) = part else { return Ok(None) };
    let mut value = serde_json::to_value(part).map_err(|error| error.to_string())?;
    if !translate_all(&mut value)? {
        return Ok(None);
    }
    serde_json::from_value(value).map(Some).map_err(|error| error.to_string())
}

/// Says whether anything changed.
fn translate_all(value: &mut Value) -> Result<bool, String> {
    let mut changed = false;
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(pattern) if key == "Regex" || key == "String" => {
                        if pattern.is_empty() {
                            return Err("an empty pattern".to_string());
                        }
                        let translated = if key == "Regex" { translate(pattern) } else { pattern.clone() };
                        changed |= translated != *pattern;
                        *pattern = translated;
                    }
                    other => changed |= translate_all(other)?,
                }
            }
        }
        Value::Array(list) => {
            for value in list {
                changed |= translate_all(value)?;
            }
        }
        _ => {}
    }
    Ok(changed)
}

fn translate(pattern: &str) -> String {
    let mut out = String::with_capacity(pattern.len());
    // How many brackets of a class are open: there, both signs mean themselves or negate.
    let (mut class, mut rest) = (0, pattern);
    while let Some(first) = rest.chars().next() {
        let mut taken = first.len_utf8();
        match first {
            '\\' => {
                taken += rest[1..].chars().next().map_or(0, char::len_utf8);
                out.push_str(&rest[..taken]);
            }
            '[' => {
                class += 1;
                out.push(first);
            }
            ']' if class > 0 => {
                class -= 1;
                out.push(first);
            }
            // After the last line feed of a text no line begins. Atomic: where both ways hold, trying the other one finds nothing new, but
            // doubles the work with every `^`.
            '^' if class == 0 => out.push_str(r"(?>\A|(?m:^)(?!\z))"),
            '$' if class == 0 => out.push_str("(?m:$)"),
            '(' if class == 0 && rest.starts_with("(?") => {
                let options = rest[2..].find(|c: char| !matches!(c, 'i' | 'm' | 'x' | '-')).unwrap_or(0);
                taken = 2 + options;
                let ends = rest[taken..].starts_with([')', ':']);
                out.push_str(&if ends { rest[..taken].replace('m', "s") } else { rest[..taken].to_string() });
            }
            _ => out.push(first),
        }
        rest = &rest[taken..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_ruby_reads_differently_is_translated() {
        let line = r"(?>\A|(?m:^)(?!\z))";
        for (pattern, expected) in [
            (r"\s+(?!\S)|[^\r\n\p{L}]?\p{L}+", r"\s+(?!\S)|[^\r\n\p{L}]?\p{L}+".to_string()),
            ("^ +", format!("{line} +")),
            (" +$", " +(?m:$)".to_string()),
            (r"\^\$[$^][a[^b$]^]", r"\^\$[$^][a[^b$]^]".to_string()),
            ("(?m).(?im-x:.)(?i:a)(?<=m)(?=m)", "(?s).(?is-x:.)(?i:a)(?<=m)(?=m)".to_string()),
            ("é^\\", format!("é{line}\\")),
            ("(?", "(?".to_string()),
        ] {
            assert_eq!(translate(pattern), expected, "{pattern}");
        }
    }
}
