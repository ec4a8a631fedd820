//! Checked reading: values from a JSON text, and a complaint for each one that is wrong. A value
//! that can't be read is `None`, and reading continues.

use std::{fmt, ops::RangeInclusive, sync::Arc};

use crate::{
    complaint::{Complaint, ComplaintCollector, Location, Position, TextLocation, shortened},
    json::{self, SyntaxError, Value, ValueKind},
};

/// No time in a file may be longer than a day: a longer one is probably a mistake.
pub(crate) const DAY_MS: u32 = 24 * 60 * 60 * 1000;

/// Some editors write it at the beginning of every file.
pub(crate) const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

pub(crate) fn without_byte_order_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text)
}

/// The path of a value, from the top of its JSON text.
#[derive(Clone, Copy, Debug)]
pub(crate) struct JsonPath<'p> {
    above: Option<&'p Self>,
    step: PathStep<'p>,
}

#[derive(Clone, Copy, Debug)]
enum PathStep<'p> {
    Top,
    Element(usize),
    Field(&'p str),
}

impl<'p> JsonPath<'p> {
    pub(crate) const TOP: JsonPath<'static> = JsonPath { above: None, step: PathStep::Top };

    pub(crate) fn element(&'p self, index: usize) -> Self {
        Self { above: Some(self), step: PathStep::Element(index) }
    }

    pub(crate) fn field(&'p self, name: &'p str) -> Self {
        Self { above: Some(self), step: PathStep::Field(name) }
    }
}

impl fmt::Display for JsonPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(above) = self.above {
            write!(f, "{above}")?;
        }
        match self.step {
            PathStep::Top => f.write_str("$"),
            PathStep::Element(index) => write!(f, "[{index}]"),
            PathStep::Field(name) if is_plain(name) => write!(f, ".{name}"),
            PathStep::Field(name) => write!(f, "[{}]", shortened(&json::quoted(name))),
        }
    }
}

fn is_plain(name: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (1..=64).contains(&name.len()) && name.bytes().all(is_word)
}

/// The check of one JSON text: a file, or a line of one.
#[derive(Debug)]
pub(crate) struct Checker {
    file: Arc<str>,
    /// The line, if the text is one line of a file.
    line: Option<u64>,
    /// Whether unknown fields are ignored.
    is_lenient: bool,
    pub(crate) complaints: ComplaintCollector,
}

impl Checker {
    pub(crate) fn of_file(file: &Arc<str>) -> Self {
        Self {
            file: Arc::clone(file),
            line: None,
            is_lenient: false,
            complaints: ComplaintCollector::default(),
        }
    }

    /// The check of a message, or of one item of it, which complaints call `kind`. Unknown fields
    /// are ignored.
    pub(crate) fn of_message(kind: &Arc<str>) -> Self {
        Self { is_lenient: true, ..Self::of_file(kind) }
    }

    #[cfg(feature = "cli")]
    pub(crate) fn of_line(file: &Arc<str>, line: u64) -> Self {
        Self { line: Some(line), ..Self::of_file(file) }
    }

    /// Complains about `value` at `path`.
    pub(crate) fn complain(
        &mut self,
        path: &JsonPath<'_>,
        value: &Value<'_>,
        rule: impl Into<String>,
    ) {
        let path = path.to_string();
        let at = match self.line {
            None => TextLocation::Path(path),
            Some(line) => TextLocation::Line { line, path },
        };
        self.add(at, Some(shortened(value.text)), rule.into());
    }

    /// Complains about the character at `position`.
    pub(crate) fn complain_at(&mut self, position: Position, rule: impl Into<String>) {
        self.add(TextLocation::Position(position), None, rule.into());
    }

    fn add(&mut self, at: TextLocation, value: Option<String>, rule: String) {
        let location = Location::Text { name: Arc::clone(&self.file), at };
        self.complaints.add(Complaint { location, value, rule });
    }

    /// Parses `text` as a JSON value; it begins at `start` of its file.
    pub(crate) fn json<'a>(&mut self, start: Position, text: &'a [u8]) -> Option<Value<'a>> {
        self.json_by(start, text, json::parse)
    }

    /// [`Checker::json`] with `parse` as the parser.
    pub(crate) fn json_by<'a>(
        &mut self,
        start: Position,
        text: &'a [u8],
        parse: fn(&'a str, &'static str) -> Result<Value<'a>, SyntaxError>,
    ) -> Option<Value<'a>> {
        let what = match self.line {
            Some(_) => "line",
            None if self.is_lenient => "body",
            None => "file",
        };
        let (at, rule) = match str::from_utf8(text) {
            Ok(text) => match parse(text, what) {
                Ok(value) => return Some(value),
                Err(error) => (error.at, format!("not JSON: {}", error.message)),
            },
            Err(error) => (error.valid_up_to(), "not UTF-8".to_owned()),
        };
        let before = text.get(..at).and_then(|before| str::from_utf8(before).ok());
        self.complain_at(start.after(before.unwrap_or_default()), rule);
        None
    }

    /// The values of the `known` fields, in that order. It complains about fields given twice and,
    /// except in a message, about unknown ones.
    pub(crate) fn fields<'v, 'a, const N: usize>(
        &mut self,
        path: &JsonPath<'_>,
        value: &'v Value<'a>,
        known: &[&str; N],
    ) -> Option<[Option<&'v Value<'a>>; N]> {
        let ValueKind::Object(fields) = &value.kind else {
            self.complain(path, value, "must be an object");
            return None;
        };
        let mut found = [const { None }; N];
        for (name, value) in fields {
            let path = path.field(name);
            let slot = known.iter().position(|known| known == name);
            match slot.and_then(|slot| found.get_mut(slot)) {
                Some(slot @ None) => *slot = Some(value),
                Some(Some(_)) => self.complain(&path, value, TWICE),
                None if self.is_lenient => {}
                None => self.complain(&path, value, unknown_field(known)),
            }
        }
        Some(found)
    }

    /// `field`, which must be in `value` under `name`.
    pub(crate) fn required<T>(
        &mut self,
        path: &JsonPath<'_>,
        value: &Value<'_>,
        name: &str,
        field: Option<T>,
    ) -> Option<T> {
        if field.is_none() {
            self.complain(path, value, format!("must have a field `{name}`"));
        }
        field
    }

    /// `value` as text.
    pub(crate) fn string<'v>(
        &mut self,
        path: &JsonPath<'_>,
        value: &'v Value<'_>,
    ) -> Option<&'v str> {
        if let ValueKind::String(string) = &value.kind {
            return Some(string);
        }
        self.complain(path, value, "must be a string");
        None
    }

    /// `value` as a name that `parse` accepts; `rule` describes its characters and length.
    pub(crate) fn name<T, E>(
        &mut self,
        path: &JsonPath<'_>,
        value: &Value<'_>,
        rule: &str,
        parse: fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        let name = parse(self.string(path, value)?).ok();
        if name.is_none() {
            self.complain(path, value, format!("must match {rule}"));
        }
        name
    }

    /// The elements of `value`, which must be `what`.
    pub(crate) fn elements<'v, 'a>(
        &mut self,
        path: &JsonPath<'_>,
        value: &'v Value<'a>,
        what: &str,
    ) -> Option<&'v [Value<'a>]> {
        if let ValueKind::Array(elements) = &value.kind {
            return Some(elements);
        }
        self.complain(path, value, format!("must be {what}"));
        None
    }

    /// `value` as `true` or `false`.
    pub(crate) fn boolean(&mut self, path: &JsonPath<'_>, value: &Value<'_>) -> Option<bool> {
        if let ValueKind::Bool(boolean) = value.kind {
            return Some(boolean);
        }
        self.complain(path, value, "must be true or false");
        None
    }

    /// `value` as a whole number, if it lies in `range`.
    pub(crate) fn whole_number(
        &mut self,
        path: &JsonPath<'_>,
        value: &Value<'_>,
        range: RangeInclusive<u32>,
    ) -> Option<u32> {
        let found = number(value).filter(|number| number.fract() == 0.0).filter(|number| {
            (f64::from(*range.start())..=f64::from(*range.end())).contains(number)
        });
        if found.is_none() {
            let (min, max) = range.into_inner();
            self.complain(path, value, format!("must be a whole number from {min} to {max}"));
        }
        // Exact: it is whole, and lies in a range of `u32`.
        found.map(|number| number as u32)
    }

    #[cfg(feature = "cli")]
    /// `value` as a number, if it lies between 0 and `max`; `rule` says so.
    pub(crate) fn number(
        &mut self,
        path: &JsonPath<'_>,
        value: &Value<'_>,
        max: f64,
        rule: &str,
    ) -> Option<f64> {
        let found = number(value).filter(|number| (0.0..=max).contains(number));
        if found.is_none() {
            self.complain(path, value, rule);
        }
        found
    }

    /// Complains about every field within `value` that is given twice in its object.
    pub(crate) fn refuse_doubles(&mut self, path: &JsonPath<'_>, value: &Value<'_>) {
        match &value.kind {
            ValueKind::Array(elements) => {
                for (index, element) in elements.iter().enumerate() {
                    self.refuse_doubles(&path.element(index), element);
                }
            }
            ValueKind::Object(fields) => {
                let mut before = None;
                for (name, value) in fields {
                    let path = path.field(name);
                    if before == Some(name) {
                        self.complain(&path, value, TWICE);
                    }
                    before = Some(name);
                    self.refuse_doubles(&path, value);
                }
            }
            ValueKind::Null | ValueKind::Bool(_) | ValueKind::Number | ValueKind::String(_) => {}
        }
    }
}

pub(crate) const TWICE: &str = "must be given once in its object";

/// `value` as a number, if it is one.
pub(crate) fn number(value: &Value<'_>) -> Option<f64> {
    match value.kind {
        ValueKind::Number => value.text.parse().ok(),
        ValueKind::Null
        | ValueKind::Bool(_)
        | ValueKind::String(_)
        | ValueKind::Array(_)
        | ValueKind::Object(_) => None,
    }
}

fn unknown_field(known: &[&str]) -> String {
    let known: Vec<String> = known.iter().map(|name| format!("`{name}`")).collect();
    format!("unknown field; there are {}", known.join(", "))
}
