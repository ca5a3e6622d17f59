//! Messages in the forms in which others write them.

use serde_json::Value;

use crate::text::Message;

/// A list of `{role, content}` (or `{from, value}`), or garak's `{turns: […]}`; never empty.
pub(crate) fn messages(value: &Value) -> Option<Vec<Message>> {
    let list = value.as_array().or_else(|| value.get("turns")?.as_array())?;
    if list.is_empty() { None } else { list.iter().map(message).collect() }
}

/// `{role, content}`, or ShareGPT's `{from, value}`.
pub(crate) fn message(value: &Value) -> Option<Message> {
    let role = value.get("role").or_else(|| value.get("from"))?.as_str()?;
    let content = content(value.get("content").or_else(|| value.get("value"))?)?;
    let role = match role {
        "human" => "user",
        "gpt" => "assistant",
        other => other,
    };
    Some(Message { role: role.to_string(), content })
}

/// A text; `{text}`; or a list of parts that are all text.
pub(crate) fn content(value: &Value) -> Option<String> {
    if let Some(text) = value.as_str().or_else(|| value.get("text")?.as_str()) {
        return Some(text.to_string());
    }
    let parts = value.as_array()?;
    parts.iter().map(|part| part.as_str().or_else(|| part.get("text")?.as_str())).collect()
}

/// A transcript as in HH-RLHF: turns after `\n\nHuman:` and `\n\nAssistant:`.
pub(crate) fn transcript(text: &str) -> Option<Vec<Message>> {
    const MARKS: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant")];
    let next = |text: &str| {
        let found = MARKS.iter().filter_map(|(mark, role)| Some((text.find(mark)?, *mark, *role)));
        found.min_by_key(|(at, ..)| *at)
    };
    let whole = format!("\n\n{}", text.trim_start());
    let mut rest = whole.as_str();
    let mut turns = Vec::new();
    if next(rest)?.0 != 0 {
        return None; // text before the first mark
    }
    while let Some((at, mark, role)) = next(rest) {
        rest = &rest[at + mark.len()..];
        let end = next(rest).map_or(rest.len(), |(at, ..)| at);
        turns.push(Message { role: role.to_string(), content: rest[..end].trim().to_string() });
    }
    Some(turns)
}
