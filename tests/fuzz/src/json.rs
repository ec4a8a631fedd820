//! Texts as `serde_json` reads them.

use serde_json::Value;

/// Without the byte order mark that some editors write.
pub fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(text)
}

/// The value of `text`, if it is JSON and not nested deeper than `serde_json` reads.
pub fn value(text: &[u8]) -> Option<Value> {
    serde_json::from_slice(text).ok()
}

/// How deep `text`, which is JSON, is nested.
pub fn depth(value: &Value) -> usize {
    match value {
        Value::Array(elements) => 1 + elements.iter().map(depth).max().unwrap_or_default(),
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or_default(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => 0,
    }
}

/// `text` with white space wherever it is allowed, which doesn't change its meaning.
pub fn spaced(text: &str) -> String {
    let mut spaced = String::with_capacity(text.len() * 2);
    let (mut is_string, mut is_escaped) = (false, false);
    for character in text.chars() {
        let stands_alone = !is_string && matches!(character, '{' | '}' | '[' | ']' | ':' | ',');
        if stands_alone {
            spaced.push_str(" \t");
        }
        spaced.push(character);
        if stands_alone {
            spaced.push_str("\r\n ");
        }
        is_string ^= character == '"' && !is_escaped;
        is_escaped = is_string && character == '\\' && !is_escaped;
    }
    spaced
}
