//! A JSON parser that keeps what a checker needs to know.
//!
//! `serde_json` ignores the first of two fields with the same name, turns the number
//! 12345678901234567890123 into 1.2345678901234568e22, and can't tell where in the text a value
//! was. Here every value keeps its text, every field is kept, and numbers are never converted. The
//! same texts count as JSON; only the nesting is limited more tightly. Crates that keep as much, such
//! as json-syntax, copy each string and number into a tree of their own; this parser borrows, since
//! every message passes through it.

pub(crate) mod check;

use std::borrow::Cow;

/// Deeper nesting is refused. `serde_json` reads 127 levels, and a value that is read here is
/// wrapped in others before a service reads it with `serde_json`.
pub(crate) const DEPTH_MAX: usize = 100;

/// How deep [`parse_wrapped`] reads: [`DEPTH_MAX`], and the levels that messages add.
const WRAPPED_DEPTH_MAX: usize = DEPTH_MAX + 8;

/// A JSON value with the text it was parsed from.
#[derive(Debug)]
pub(crate) struct Value<'a> {
    pub(crate) text: &'a str,
    pub(crate) kind: ValueKind<'a>,
}

#[derive(Debug)]
pub(crate) enum ValueKind<'a> {
    Null,
    Bool(bool),
    /// A number, as it is written.
    Number,
    String(Cow<'a, str>),
    Array(Vec<Value<'a>>),
    /// The fields in the order of their names (by code point), possibly with duplicates.
    Object(Vec<(Cow<'a, str>, Value<'a>)>),
}

/// Why a text is not JSON.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct SyntaxError {
    /// How many bytes precede the offending character.
    pub(crate) at: usize,
    /// What is wrong.
    pub(crate) message: String,
}

/// Parses `text`, which is a whole `what` (for error messages: `file`, `line` or `body`).
pub(crate) fn parse<'a>(text: &'a str, what: &'static str) -> Result<Value<'a>, SyntaxError> {
    parse_nested(text, what, DEPTH_MAX)
}

/// Parses `text`, an array of values that [`parse`] would accept.
pub(crate) fn parse_array<'a>(text: &'a str, what: &'static str) -> Result<Value<'a>, SyntaxError> {
    parse_nested(text, what, DEPTH_MAX + 1)
}

/// Parses `text`, in which a value that [`parse`] has accepted is wrapped in one of our messages.
pub(crate) fn parse_wrapped<'a>(
    text: &'a str,
    what: &'static str,
) -> Result<Value<'a>, SyntaxError> {
    parse_nested(text, what, WRAPPED_DEPTH_MAX)
}

fn parse_nested<'a>(
    text: &'a str,
    what: &'static str,
    depth_max: usize,
) -> Result<Value<'a>, SyntaxError> {
    let mut reader = Parser { text, at: 0, depth: 0, depth_max, what };
    reader.skip_whitespace();
    let value = reader.value()?;
    reader.skip_whitespace();
    match reader.peek() {
        None => Ok(value),
        Some(_) => Err(reader.expected("nothing more")),
    }
}

struct Parser<'a> {
    text: &'a str,
    /// How many bytes are read: always at a character boundary.
    at: usize,
    depth: usize,
    depth_max: usize,
    what: &'static str,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// The text from byte `start` to the current position.
    fn since(&self, start: usize) -> &'a str {
        self.text.get(start..self.at).unwrap_or_default()
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn skip_whitespace(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.peek() {
            self.at += 1;
        }
    }

    fn error(&self, message: impl Into<String>) -> SyntaxError {
        SyntaxError { at: self.at, message: message.into() }
    }

    fn expected(&self, expected: &str) -> SyntaxError {
        self.error(match self.rest().chars().next() {
            Some(found) => {
                format!("found `{}` where {expected} should be", found.escape_debug())
            }
            None => format!("the {} ends where {expected} should be", self.what),
        })
    }

    fn value(&mut self) -> Result<Value<'a>, SyntaxError> {
        let start = self.at;
        let kind = match self.peek() {
            Some(b'{') => self.nested(Self::object)?,
            Some(b'[') => self.nested(Self::array)?,
            Some(b'"') => ValueKind::String(self.string()?),
            Some(b'-' | b'0'..=b'9') => self.number()?,
            Some(b't') => self.word("true", ValueKind::Bool(true))?,
            Some(b'f') => self.word("false", ValueKind::Bool(false))?,
            Some(b'n') => self.word("null", ValueKind::Null)?,
            Some(_) | None => return Err(self.expected("a value")),
        };
        Ok(Value { text: self.since(start), kind })
    }

    fn word(&mut self, word: &str, kind: ValueKind<'a>) -> Result<ValueKind<'a>, SyntaxError> {
        if !self.rest().starts_with(word) {
            return Err(self.expected("a value"));
        }
        self.at += word.len();
        Ok(kind)
    }

    fn nested(
        &mut self,
        read: fn(&mut Self) -> Result<ValueKind<'a>, SyntaxError>,
    ) -> Result<ValueKind<'a>, SyntaxError> {
        if self.depth == self.depth_max {
            return Err(self.error(format!("nested more than {} deep", self.depth_max)));
        }
        self.depth += 1;
        let kind = read(self)?;
        self.depth -= 1;
        Ok(kind)
    }

    fn array(&mut self) -> Result<ValueKind<'a>, SyntaxError> {
        let mut elements = Vec::new();
        if self.opens_and_closes(b']') {
            return Ok(ValueKind::Array(elements));
        }
        loop {
            elements.push(self.value()?);
            if !self.goes_on(b']', "`,` or `]`")? {
                return Ok(ValueKind::Array(elements));
            }
        }
    }

    fn object(&mut self) -> Result<ValueKind<'a>, SyntaxError> {
        let mut fields = Vec::new();
        if self.opens_and_closes(b'}') {
            return Ok(ValueKind::Object(fields));
        }
        loop {
            let Some(b'"') = self.peek() else { return Err(self.expected("the name of a field")) };
            let name = self.string()?;
            self.skip_whitespace();
            let Some(b':') = self.peek() else { return Err(self.expected("`:`")) };
            self.at += 1;
            self.skip_whitespace();
            fields.push((name, self.value()?));
            if !self.goes_on(b'}', "`,` or `}`")? {
                fields.sort_by(|(a, _), (b, _)| a.cmp(b));
                return Ok(ValueKind::Object(fields));
            }
        }
    }

    /// Reads the opening bracket, and the closing one if nothing is between them.
    fn opens_and_closes(&mut self, close: u8) -> bool {
        self.at += 1;
        self.skip_whitespace();
        let closes = self.peek() == Some(close);
        self.at += usize::from(closes);
        closes
    }

    /// Reads the character after an element; returns whether another element follows.
    fn goes_on(&mut self, close: u8, expected: &str) -> Result<bool, SyntaxError> {
        self.skip_whitespace();
        let goes_on = match self.peek() {
            Some(b',') => true,
            Some(byte) if byte == close => false,
            Some(_) | None => return Err(self.expected(expected)),
        };
        self.at += 1;
        if goes_on {
            self.skip_whitespace();
        }
        Ok(goes_on)
    }

    fn string(&mut self) -> Result<Cow<'a, str>, SyntaxError> {
        let start = self.at;
        let mut escaped = false;
        self.at += 1;
        loop {
            let stops = |byte: &u8| matches!(byte, b'"' | b'\\' | 0..0x20);
            let rest = self.rest().as_bytes();
            self.at += rest.iter().position(stops).unwrap_or(rest.len());
            match self.peek() {
                Some(b'"') => break,
                Some(b'\\') => {
                    escaped = true;
                    self.at += 1;
                    match self.peek() {
                        Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' | b'u') => {}
                        Some(_) | None => return Err(self.expected("the rest of an escape")),
                    }
                    self.at += 1;
                }
                Some(_) => {
                    return Err(self.error("a control character in a string must be escaped"));
                }
                None => return Err(self.expected("the rest of a string")),
            }
        }
        self.at += 1;
        let token = self.since(start);
        if !escaped {
            return Ok(Cow::Borrowed(token.get(1..token.len() - 1).unwrap_or_default()));
        }
        serde_json::from_str(token).map(Cow::Owned).map_err(|_| SyntaxError {
            at: start,
            message: "a `\\u` in this string is not followed by a character's code".to_owned(),
        })
    }

    fn number(&mut self) -> Result<ValueKind<'a>, SyntaxError> {
        let start = self.at;
        self.at += usize::from(self.peek() == Some(b'-'));
        if self.peek() == Some(b'0') {
            self.at += 1;
            if let Some(b'0'..=b'9') = self.peek() {
                self.at = start;
                return Err(self.error("a number must not begin with a needless 0"));
            }
        } else {
            self.digits()?;
        }
        let whole = self.at;
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            self.at += usize::from(matches!(self.peek(), Some(b'+' | b'-')));
            self.digits()?;
        }
        let short = self.at == whole && whole - start < 300;
        if short || self.since(start).parse().is_ok_and(f64::is_finite) {
            return Ok(ValueKind::Number);
        }
        self.at = start;
        Err(self.error("this number is out of range"))
    }

    fn digits(&mut self) -> Result<(), SyntaxError> {
        let Some(b'0'..=b'9') = self.peek() else { return Err(self.expected("a digit")) };
        while let Some(b'0'..=b'9') = self.peek() {
            self.at += 1;
        }
        Ok(())
    }
}

impl Value<'_> {
    /// Appends the value in its canonical form: with sorted fields, without whitespace, and with no
    /// more escapes than needed.
    pub(crate) fn write(&self, out: &mut String) {
        match &self.kind {
            ValueKind::Null | ValueKind::Bool(_) | ValueKind::Number => out.push_str(self.text),
            // It was read from a text without escapes, so it needs none.
            ValueKind::String(Cow::Borrowed(_)) => out.push_str(self.text),
            ValueKind::String(Cow::Owned(string)) => out.push_str(&quoted(string)),
            ValueKind::Array(elements) => {
                out.push('[');
                for (index, element) in elements.iter().enumerate() {
                    out.push_str(if index == 0 { "" } else { "," });
                    element.write(out);
                }
                out.push(']');
            }
            ValueKind::Object(fields) => {
                out.push('{');
                for (index, (name, value)) in fields.iter().enumerate() {
                    out.push_str(if index == 0 { "" } else { "," });
                    match name {
                        Cow::Borrowed(plain) => out.extend(["\"", plain, "\":"]),
                        Cow::Owned(name) => out.extend([&quoted(name), ":"]),
                    }
                    value.write(out);
                }
                out.push('}');
            }
        }
    }
}

/// `string` as a JSON string.
pub(crate) fn quoted(string: &str) -> String {
    serde_json::Value::from(string).to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Strategy, any, prop, prop_oneof, proptest};
    use serde_json::json;

    use super::{DEPTH_MAX, SyntaxError, parse, quoted};

    fn canonical(text: &str) -> String {
        let mut canonical = String::new();
        parse(text, "file").unwrap().write(&mut canonical);
        canonical
    }

    fn error(text: &str) -> (usize, String) {
        let SyntaxError { at, message } = parse(text, "file").unwrap_err();
        (at, message)
    }

    #[test]
    fn a_value_is_written_with_sorted_fields_and_without_whitespace() {
        let text =
            " { \"b\" : [ 1 , -0.50e1 , null ] , \"a\" : { } , \"c\" : [ ] , \"B\" : true } ";
        assert_eq!(canonical(text), r#"{"B":true,"a":{},"b":[1,-0.50e1,null],"c":[]}"#);
    }

    #[test]
    fn a_string_is_written_with_the_escapes_it_needs() {
        let text = r#""\u00e9\ud83d\ude00 \u0041\/\n\u0007\"\\""#;
        assert_eq!(canonical(text), "\"é😀 A/\\n\\u0007\\\"\\\\\"");
    }

    #[test]
    fn a_field_given_twice_is_kept_twice() {
        assert_eq!(canonical(r#"{"a":2,"b":0,"\u0061":1}"#), r#"{"a":2,"a":1,"b":0}"#);
    }

    #[test]
    fn the_text_of_a_value_ends_with_it() {
        let value = parse(" [ 1 ,2 ] ", "file").unwrap();
        assert_eq!(value.text, "[ 1 ,2 ]");
    }

    #[test]
    fn each_mistake_is_named_where_it_stands() {
        for (text, at, message) in [
            ("", 0, "the file ends where a value should be"),
            ("[1,", 3, "the file ends where a value should be"),
            ("[1", 2, "the file ends where `,` or `]` should be"),
            ("[1 2]", 3, "found `2` where `,` or `]` should be"),
            ("[1,]", 3, "found `]` where a value should be"),
            ("{\"a\":1", 6, "the file ends where `,` or `}` should be"),
            ("{\"a\" 1}", 5, "found `1` where `:` should be"),
            ("{a:1}", 1, "found `a` where the name of a field should be"),
            ("{\"a\":1,}", 7, "found `}` where the name of a field should be"),
            ("1 é", 2, "found `é` where nothing more should be"),
            ("tru", 0, "found `t` where a value should be"),
            ("'a'", 0, "found `\\'` where a value should be"),
            ("\u{1b}", 0, "found `\\u{1b}` where a value should be"),
            ("\"a", 2, "the file ends where the rest of a string should be"),
            ("\"a\nb\"", 2, "a control character in a string must be escaped"),
            ("\"a\\", 3, "the file ends where the rest of an escape should be"),
            ("\"a\\x\"", 3, "found `x` where the rest of an escape should be"),
            ("[\"\\ud800\"]", 1, "a `\\u` in this string is not followed by a character's code"),
            ("[\"\\u12\"]", 1, "a `\\u` in this string is not followed by a character's code"),
            ("-", 1, "the file ends where a digit should be"),
            ("1.x", 2, "found `x` where a digit should be"),
            ("1e+", 3, "the file ends where a digit should be"),
            ("[01]", 1, "a number must not begin with a needless 0"),
            ("[1e999]", 1, "this number is out of range"),
        ] {
            assert_eq!(error(text), (at, message.to_owned()), "{text}");
        }
    }

    #[test]
    fn nesting_is_limited() {
        let nested = |depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!(canonical(&nested(DEPTH_MAX)), nested(DEPTH_MAX));
        assert_eq!(error(&nested(DEPTH_MAX + 1)).0, DEPTH_MAX);
        assert_eq!(error(&"[".repeat(1_000_000)).0, DEPTH_MAX);
    }

    fn any_json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            any::<Option<bool>>().prop_map(|it| json!(it)),
            any::<i64>().prop_map(|it| json!(it)),
            any::<u64>().prop_map(|it| json!(it)),
            any::<f64>().prop_map(|it| json!(it)),
            any::<String>().prop_map(|it| json!(it)),
        ];
        leaf.prop_recursive(5, 64, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(|it| json!(it)),
                prop::collection::btree_map(any::<String>(), inner, 0..6).prop_map(|it| json!(it)),
            ]
        })
    }

    /// Bytes that form almost valid JSON.
    fn near_json() -> impl Strategy<Value = String> {
        let token = prop::sample::select(vec![
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            "\"",
            "\\",
            "\"a\"",
            "\"a\":",
            "\\u0041",
            "\\ud83d\\ude00",
            "\\ud83d",
            "\\n",
            "\n",
            " ",
            "\t",
            "\u{7}",
            "-",
            "0",
            "1",
            "10",
            ".",
            "e",
            "E+",
            "1e5",
            "1e999",
            "-0.5",
            "true",
            "false",
            "null",
            "nul",
            "é",
            "/",
        ]);
        prop::collection::vec(token, 0..12).prop_map(|tokens| tokens.concat())
    }

    proptest! {
        #[test]
        fn what_counts_as_json_is_what_serde_json_takes(text in near_json()) {
            let theirs = serde_json::from_str::<serde_json::Value>(&text);
            assert_eq!(parse(&text, "file").is_ok(), theirs.is_ok(), "{theirs:?}");
        }

        #[test]
        fn any_json_is_read_as_serde_json_reads_it(value in any_json()) {
            let plain = value.to_string();
            assert_eq!(canonical(&plain), plain);
            assert_eq!(canonical(&serde_json::to_string_pretty(&value).unwrap()), plain);
        }

        #[test]
        fn a_cut_text_is_an_error_within_it(value in any_json(), cut in any::<prop::sample::Index>()) {
            let text = json!([value]).to_string();
            let cut = text.floor_char_boundary(cut.index(text.len()));
            let error = parse(&text[..cut], "file").unwrap_err();
            assert!(error.at <= cut && text.is_char_boundary(error.at));
        }

        #[test]
        fn any_string_is_quoted_as_json(string in any::<String>()) {
            assert_eq!(canonical(&quoted(&string)), quoted(&string));
        }
    }
}
