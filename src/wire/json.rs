//! A reader of JSON that keeps what a checker has to know.
//!
//! `serde_json` reads an object with a field given twice as if the first weren't there, turns the
//! number 12345678901234567890123 into 1.2345678901234568e22, and can't say where in the text a
//! value stood. Here every value keeps its text, every field is kept, and numbers are never converted.
//! What counts as JSON is the same; only the nesting is limited more tightly.

use std::borrow::Cow;

/// Deeper nesting is refused: `serde_json` reads 127 levels, and what is read here is wrapped in
/// others before it reaches the service that reads it with that.
pub(super) const DEPTH_MAX: usize = 100;

/// A JSON value, and the text it was read from.
#[derive(Debug)]
pub(super) struct Value<'a> {
    pub(super) text: &'a str,
    pub(super) kind: Kind<'a>,
}

#[derive(Debug)]
pub(super) enum Kind<'a> {
    Null,
    Bool(bool),
    /// A number, as its text says.
    Number,
    String(Cow<'a, str>),
    Array(Vec<Value<'a>>),
    /// The fields in the order of their names (by code point), some perhaps twice.
    Object(Vec<(Cow<'a, str>, Value<'a>)>),
}

/// Why a text is not JSON.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SyntaxError {
    /// How many bytes before the offending character.
    pub(super) at: usize,
    /// What is wrong.
    pub(super) message: String,
}

/// Reads `text`, which is a whole `what` (for the messages: `file` or `line`).
pub(super) fn parse<'a>(text: &'a str, what: &'static str) -> Result<Value<'a>, SyntaxError> {
    let mut reader = Reader { text, at: 0, depth: 0, what };
    reader.skip_whitespace();
    let value = reader.value()?;
    reader.skip_whitespace();
    match reader.peek() {
        None => Ok(value),
        Some(_) => Err(reader.expected("nothing more")),
    }
}

struct Reader<'a> {
    text: &'a str,
    /// How many bytes are read: always at the boundary of a character.
    at: usize,
    depth: usize,
    what: &'static str,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// The text from byte `start` up to here.
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
            Some(b'"') => Kind::String(self.string()?),
            Some(b'-' | b'0'..=b'9') => self.number()?,
            Some(b't') => self.word("true", Kind::Bool(true))?,
            Some(b'f') => self.word("false", Kind::Bool(false))?,
            Some(b'n') => self.word("null", Kind::Null)?,
            Some(_) | None => return Err(self.expected("a value")),
        };
        Ok(Value { text: self.since(start), kind })
    }

    fn word(&mut self, word: &str, kind: Kind<'a>) -> Result<Kind<'a>, SyntaxError> {
        if !self.rest().starts_with(word) {
            return Err(self.expected("a value"));
        }
        self.at += word.len();
        Ok(kind)
    }

    fn nested(
        &mut self,
        read: fn(&mut Self) -> Result<Kind<'a>, SyntaxError>,
    ) -> Result<Kind<'a>, SyntaxError> {
        if self.depth == DEPTH_MAX {
            return Err(self.error(format!("nested more than {DEPTH_MAX} deep")));
        }
        self.depth += 1;
        let kind = read(self)?;
        self.depth -= 1;
        Ok(kind)
    }

    fn array(&mut self) -> Result<Kind<'a>, SyntaxError> {
        let mut elements = Vec::new();
        if self.opens_and_closes(b']') {
            return Ok(Kind::Array(elements));
        }
        loop {
            elements.push(self.value()?);
            if !self.goes_on(b']', "`,` or `]`")? {
                return Ok(Kind::Array(elements));
            }
        }
    }

    fn object(&mut self) -> Result<Kind<'a>, SyntaxError> {
        let mut fields = Vec::new();
        if self.opens_and_closes(b'}') {
            return Ok(Kind::Object(fields));
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
                return Ok(Kind::Object(fields));
            }
        }
    }

    /// Reads the bracket that opens, and the one that closes if nothing is between.
    fn opens_and_closes(&mut self, close: u8) -> bool {
        self.at += 1;
        self.skip_whitespace();
        let closes = self.peek() == Some(close);
        self.at += usize::from(closes);
        closes
    }

    /// Reads what stands after an element: whether another one follows.
    fn goes_on(&mut self, close: u8, expected: &str) -> Result<bool, SyntaxError> {
        self.skip_whitespace();
        let goes_on = match self.peek() {
            Some(b',') => true,
            Some(byte) if byte == close => false,
            Some(_) | None => return Err(self.expected(expected)),
        };
        self.at += 1;
        self.skip_whitespace();
        Ok(goes_on)
    }

    fn string(&mut self) -> Result<Cow<'a, str>, SyntaxError> {
        let start = self.at;
        let mut escaped = false;
        self.at += 1;
        loop {
            match self.peek() {
                Some(b'"') => break,
                Some(b'\\') => {
                    escaped = true;
                    self.at += 1;
                    match self.peek() {
                        Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' | b'u') => {}
                        Some(_) | None => return Err(self.expected("the rest of an escape")),
                    }
                }
                Some(0..0x20) => {
                    return Err(self.error("a control character in a string must be escaped"));
                }
                Some(_) => {}
                None => return Err(self.expected("the rest of a string")),
            }
            self.at += 1;
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

    fn number(&mut self) -> Result<Kind<'a>, SyntaxError> {
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
            return Ok(Kind::Number);
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
    /// Appends the value in its canonical form: the fields in order, without whitespace, and with
    /// no more escapes than needed.
    pub(super) fn write(&self, out: &mut String) {
        match &self.kind {
            Kind::Null | Kind::Bool(_) | Kind::Number => out.push_str(self.text),
            Kind::String(string) => write_string(string, out),
            Kind::Array(elements) => {
                out.push('[');
                for (index, element) in elements.iter().enumerate() {
                    out.push_str(if index == 0 { "" } else { "," });
                    element.write(out);
                }
                out.push(']');
            }
            Kind::Object(fields) => {
                out.push('{');
                for (index, (name, value)) in fields.iter().enumerate() {
                    out.push_str(if index == 0 { "" } else { "," });
                    write_string(name, out);
                    out.push(':');
                    value.write(out);
                }
                out.push('}');
            }
        }
    }
}

fn write_string(string: &str, out: &mut String) {
    if string.bytes().any(|byte| matches!(byte, b'"' | b'\\' | 0..0x20)) {
        out.push_str(&quoted(string));
    } else {
        out.push('"');
        out.push_str(string);
        out.push('"');
    }
}

/// `string` as JSON.
pub(super) fn quoted(string: &str) -> String {
    serde_json::Value::from(string).to_string()
}
