//! Errors in what was read: the place, the value and the rule.
//!
//! A file, a message or a configuration is checked to its end, and all complaints about it are made
//! at once.

use std::{fmt, sync::Arc};

/// One error in a file, a message or a configuration.
///
/// ```text
/// services.json: $[0].max_concurrency is 0: must be a whole number from 1 to 4294967295
/// transactions.ndjson:17: $.id is "a b": must match [A-Za-z0-9._:-]{1,128}
/// transactions.json:3:14: not JSON: found `}` where a value should be
/// `worker.drain` is `soon` (from DTC__WORKER__DRAIN): must be a whole number with a unit: ms, s, min, h or d
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Complaint {
    /// Where it is.
    pub location: Location,
    /// The offending value. In a text: as it is written there, shortened to one line of at most 64
    /// characters. `None` if there is no value to show, as in a text that is not JSON, or if it may
    /// be a secret.
    pub value: Option<String>,
    /// The rule that it breaks: lower case, without a full stop.
    pub rule: String,
}

/// The place of an error.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Location {
    /// In a file, or in a message.
    Text {
        /// The name of the file, as the caller gave it, or the kind of the message.
        name: Arc<str>,
        /// The place in it.
        at: TextLocation,
    },
    /// In a configuration.
    Key {
        /// The key, with its sections; empty if the whole source is meant.
        key: String,
        /// The source of its value.
        source: ValueSource,
    },
}

/// A place in a text.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TextLocation {
    /// A value in a JSON text, by its path: `$[3].max_concurrency`.
    Path(String),
    /// A value in a file of lines, by its line and its path within the line.
    Line {
        /// The line, from 1.
        line: u64,
        /// The path within the line: `$.id`.
        path: String,
    },
    /// A character: where the text is no longer JSON, or not text at all.
    Position(Position),
}

/// A position in a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Position {
    /// The line, from 1.
    pub line: u64,
    /// The column in characters, from 1.
    pub column: u64,
}

impl Position {
    /// The first character of a file.
    pub const START: Self = Self { line: 1, column: 1 };

    /// The position after `text`, if that begins here.
    pub(crate) fn after(self, text: &str) -> Self {
        let newlines = text.bytes().filter(|byte| *byte == b'\n').count() as u64;
        let last_line = text.rsplit('\n').next().unwrap_or_default().chars().count() as u64;
        let column = if newlines == 0 { self.column } else { 1 };
        Self { line: self.line + newlines, column: column + last_line }
    }
}

/// The source of a configuration value; later ones override earlier ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ValueSource {
    /// The file that is compiled in.
    Default,
    /// A file, by the path that was given.
    File(String),
    /// An environment variable.
    Variable(String),
    /// A flag of the command line.
    Flag(String),
    /// A file that holds only this value.
    SecretFile {
        /// The file.
        path: String,
        /// The source that names the file.
        named_by: Box<Self>,
    },
}

impl ValueSource {
    /// Whether it is a flag of the command line.
    pub fn is_flag(&self) -> bool {
        match self {
            Self::Flag(_) => true,
            Self::SecretFile { .. } | Self::Default | Self::File(_) | Self::Variable(_) => false,
        }
    }
}

impl fmt::Display for ValueSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => f.write_str(&one_line(path)),
            Self::Variable(name) | Self::Flag(name) => f.write_str(&one_line(name)),
            Self::SecretFile { path, named_by } => {
                write!(f, "{}, named by {named_by}", one_line(path))
            }
        }
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.location {
            Location::Text { name, at } => {
                write!(f, "{name}{at}")?;
                if let Some(value) = &self.value {
                    write!(f, " is {value}")?;
                }
            }
            Location::Key { key, source } => {
                if !key.is_empty() {
                    write!(f, "`{}`", one_line(key))?;
                    if let Some(value) = &self.value {
                        write!(f, " is `{}`", one_line(value))?;
                    }
                    f.write_str(" ")?;
                }
                write!(f, "(from {source})")?;
            }
        }
        write!(f, ": {}", self.rule)
    }
}

impl fmt::Display for TextLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, ": {path}"),
            Self::Line { line, path } => write!(f, ":{line}: {path}"),
            Self::Position(Position { line, column }) => write!(f, ":{line}:{column}"),
        }
    }
}

/// Foreign text made safe to print on a terminal: on one line, without control characters.
fn one_line(text: &str) -> String {
    const CHARS_MAX: usize = 128;
    let shown = text.chars().take(CHARS_MAX).collect::<String>().escape_debug().to_string();
    let shown = shown.replace("\\\"", "\"").replace("\\'", "'");
    if text.chars().count() > CHARS_MAX { shown + "…" } else { shown }
}

/// All errors in a file, a message, a configuration, or one line of a stream: at least one.
///
/// Displayed one per line, without a newline at the end. Of a text, the first
/// [`Complaints::LISTED_MAX`] are listed and the rest are counted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Complaints {
    listed: Vec<Complaint>,
    unlisted: usize,
}

impl Complaints {
    /// More complaints than these are only counted: a reader has enough to do with these.
    pub const LISTED_MAX: usize = 100;

    /// From a list that isn't empty.
    pub(crate) fn all(listed: Vec<Complaint>) -> Self {
        Self { listed, unlisted: 0 }
    }

    /// The complaints that are listed, in the order in which they were found.
    pub fn listed(&self) -> &[Complaint] {
        &self.listed
    }

    /// How many more there are.
    pub fn unlisted(&self) -> usize {
        self.unlisted
    }
}

impl From<Complaint> for Complaints {
    fn from(complaint: Complaint) -> Self {
        Self::all(vec![complaint])
    }
}

impl fmt::Display for Complaints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, complaint) in self.listed.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{complaint}")?;
        }
        if self.unlisted > 0 {
            write!(f, "\nand {} more", self.unlisted)?;
        }
        Ok(())
    }
}

impl std::error::Error for Complaints {}

/// Complaints that are being collected; there may be none.
#[derive(Debug, Default)]
pub(crate) struct ComplaintCollector {
    listed: Vec<Complaint>,
    unlisted: usize,
}

impl ComplaintCollector {
    pub(crate) fn add(&mut self, complaint: Complaint) {
        if self.listed.len() < Complaints::LISTED_MAX {
            self.listed.push(complaint);
        } else {
            self.unlisted += 1;
        }
    }

    /// The value that was read, if there were no complaints.
    pub(crate) fn or<T>(self, read: Option<T>) -> Result<T, Complaints> {
        let Self { listed, unlisted } = self;
        match read {
            Some(read) if listed.is_empty() => Ok(read),
            Some(_) | None => Err(Complaints { listed, unlisted }),
        }
    }
}

/// `text` on one line, cut after 64 characters.
pub(crate) fn shortened(text: &str) -> String {
    const MAX: usize = 64;
    let mut characters = text.chars().map(|it| if it.is_control() { ' ' } else { it });
    let mut short: String = characters.by_ref().take(MAX - 1).collect();
    match (characters.next(), characters.next()) {
        (Some(last), None) => short.push(last),
        (Some(_), Some(_)) => short.push('…'),
        (None, _) => {}
    }
    short
}

#[cfg(test)]
mod tests {
    use super::{
        Complaint, ComplaintCollector, Location, Position, TextLocation, ValueSource, shortened,
    };

    #[test]
    fn each_kind_of_place_has_its_form() {
        let complaint = |at, value: Option<&str>| {
            let location = Location::Text { name: "f.json".into(), at };
            let rule = "must be good".to_owned();
            Complaint { location, value: value.map(str::to_owned), rule }.to_string()
        };
        assert_eq!(
            complaint(TextLocation::Path("$[0].a".to_owned()), Some("0")),
            "f.json: $[0].a is 0: must be good"
        );
        assert_eq!(
            complaint(TextLocation::Line { line: 17, path: "$.id".to_owned() }, Some("\"\"")),
            "f.json:17: $.id is \"\": must be good"
        );
        assert_eq!(
            complaint(TextLocation::Position(Position { line: 3, column: 14 }), None),
            "f.json:3:14: must be good"
        );
    }

    #[test]
    fn a_complaint_about_a_key_names_its_source() {
        let complaint = |key: &str, value: Option<&str>| {
            let source = ValueSource::Variable("DTC__A__B".to_owned());
            let location = Location::Key { key: key.to_owned(), source };
            let rule = "must be good".to_owned();
            Complaint { location, value: value.map(str::to_owned), rule }.to_string()
        };
        assert_eq!(
            complaint("a.b", Some("x\ny")),
            "`a.b` is `x\\ny` (from DTC__A__B): must be good"
        );
        assert_eq!(complaint("a.b", None), "`a.b` (from DTC__A__B): must be good");
        assert_eq!(complaint("", None), "(from DTC__A__B): must be good");
    }

    #[test]
    fn a_hundred_complaints_are_listed_and_the_rest_counted() {
        let mut collected = ComplaintCollector::default();
        for index in 0..250 {
            collected.add(Complaint {
                location: Location::Text {
                    name: "f".into(),
                    at: TextLocation::Path(format!("$[{index}]")),
                },
                value: None,
                rule: "no".to_owned(),
            });
        }
        let text = collected.or(Some(())).unwrap_err().to_string();
        assert_eq!(text.lines().count(), 101);
        assert_eq!(text.lines().nth(99), Some("f: $[99]: no"));
        assert_eq!(text.lines().last(), Some("and 150 more"));
    }

    #[test]
    fn a_value_is_shown_on_one_line_of_64_characters() {
        assert_eq!(shortened("[1,\n\t2]"), "[1,  2]");
        assert_eq!(shortened(&"é".repeat(64)), "é".repeat(64));
        assert_eq!(shortened(&"é".repeat(65)), format!("{}…", "é".repeat(63)));
    }

    #[test]
    fn a_position_counts_lines_and_characters() {
        let at = |text| Position { line: 5, column: 3 }.after(text);
        assert_eq!(at(""), Position { line: 5, column: 3 });
        assert_eq!(at("é€"), Position { line: 5, column: 5 });
        assert_eq!(at("x\nyz"), Position { line: 6, column: 3 });
    }
}
