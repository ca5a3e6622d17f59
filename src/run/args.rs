//! Values that several commands take, parsed where they enter.

use std::ffi::OsString;

use crate::model::pretrained::ModelSpec;

/// Reads `DIR` or `DIR+ADAPTER`.
pub(crate) fn model(text: &str) -> Result<ModelSpec, String> {
    text.parse()
}

/// The words without `--flag VALUE` and `--flag=VALUE`, and the last such value.
pub(crate) fn strip(words: Vec<OsString>, flag: &str) -> (Vec<OsString>, Option<OsString>) {
    let (mut kept, mut value, mut rest) = (Vec::new(), None, words.into_iter());
    while let Some(word) = rest.next() {
        let joined = word.to_str().and_then(|word| word.strip_prefix(flag)?.strip_prefix('='));
        match joined {
            Some(joined) => value = Some(joined.into()),
            None if word == flag => value = rest.next().or(value),
            None => kept.push(word),
        }
    }
    (kept, value)
}

/// Reads a whole number of a range.
pub(crate) fn whole<T: TryFrom<u64>>(low: u64, high: u64) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| {
        let number = text.parse().ok().filter(|n| (low..=high).contains(n)).and_then(|n: u64| n.try_into().ok());
        number.ok_or_else(|| format!("expected a whole number from {low} to {high}"))
    }
}

/// Reads a rate or a probability, 0 to 1.
pub(crate) fn share(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("expected a number from 0 to 1, found {text:?}"))?;
    if (0.0..=1.0).contains(&value) { Ok(value) } else { Err(format!("expected a number from 0 to 1, found {value}")) }
}

/// Reads a learning rate.
pub(crate) fn rate(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("expected a number from 1e-9 to 1, found {text:?}"))?;
    if (1e-9..=1.0).contains(&value) {
        Ok(value)
    } else {
        Err(format!("expected a number from 1e-9 to 1, found {value}"))
    }
}

/// Reads `NAME=VALUE,…`: a setting of a repair and what it is to be in turn.
pub(crate) fn sweep(text: &str) -> Result<(String, Vec<toml::Value>), String> {
    let wrong = || format!("expected NAME=VALUE,… with a setting of a repair, found {text:?}");
    let (name, values) = text.split_once('=').ok_or_else(wrong)?;
    let value = |text: &str| {
        let read = toml::from_str::<toml::Table>(&format!("x = {text}")).ok().and_then(|mut table| table.remove("x"));
        read.unwrap_or_else(|| text.into())
    };
    let values: Vec<toml::Value> = values.split(',').filter(|text| !text.is_empty()).map(value).collect();
    if values.is_empty() { Err(wrong()) } else { Ok((name.replace('-', "_"), values)) }
}

/// Reads a finite number that is not negative.
pub(crate) fn positive_or_zero(text: &str) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| format!("expected a number, found {text:?}"))?;
    if value.is_finite() && value >= 0.0 {
        Ok(value)
    } else {
        Err(format!("expected a number from 0 up, found {value}"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn a_model_may_carry_an_adapter() {
        let spec =
            |dir: &str, adapter: Option<&str>| Ok(ModelSpec { dir: dir.into(), adapter: adapter.map(PathBuf::from) });
        assert_eq!(model("models/a"), spec("models/a", None));
        assert_eq!(model("models/a+runs/x/policy"), spec("models/a", Some("runs/x/policy")));
        for wrong in ["", "+", "a+", "+b"] {
            assert!(model(wrong).is_err(), "{wrong:?}");
        }
        let folder = tempfile::tempdir().unwrap();
        let plus = folder.path().join("c+d");
        std::fs::create_dir(&plus).unwrap();
        assert_eq!(model(plus.to_str().unwrap()), spec(plus.to_str().unwrap(), None));
    }

    #[test]
    fn a_flag_is_taken_out_with_its_value() {
        let strip = |line: &str| strip(line.split(' ').map(OsString::from).collect(), "--out");
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert_eq!(strip("demo --out a --quick"), (words("demo --quick"), Some("a".into())));
        assert_eq!(strip("demo --out=a=b --output c"), (words("demo --output c"), Some("a=b".into())));
        assert_eq!(strip("demo --out"), (words("demo"), None));
    }

    #[test]
    fn whole_numbers_lie_in_their_range() {
        assert_eq!((whole(1, 9)("1"), whole::<u64>(1, 9)("9")), (Ok(1usize), Ok(9)));
        for wrong in ["NaN", "inf", "-1", "0", "10", "1e308", "1.5", "", "18446744073709551616"] {
            let error = whole::<usize>(1, 9)(wrong).unwrap_err();
            assert!(error.contains("from 1 to 9"), "{wrong}: {error}");
        }
    }

    #[test]
    fn shares_lie_between_0_and_1() {
        assert_eq!(share("0.5"), Ok(0.5));
        for wrong in ["NaN", "-0.1", "1.1", "half", "inf", "1e308", "-1"] {
            assert!(share(wrong).is_err(), "{wrong}");
        }
        assert!(positive_or_zero("-1").is_err() && positive_or_zero("inf").is_err() && positive_or_zero("0").is_ok());
    }
}
