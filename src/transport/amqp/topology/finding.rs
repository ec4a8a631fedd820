//! A difference between a broker and the topology, and its text.

use std::{fmt, time::Duration};

use crate::transport::amqp::topology::age;

/// One object that is not as it should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// The object.
    pub subject: Subject,
    /// The fault.
    pub fault: Fault,
}

/// The object that a finding is about.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Subject {
    /// An exchange, by its name.
    Exchange(String),
    /// A queue, by its name.
    Queue(String),
}

/// How an object differs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It doesn't exist.
    Missing,
    /// It was declared with other values.
    Differs(Difference),
    /// It differs, but the broker doesn't say in what: these are its words.
    Refused(String),
    /// The journal doesn't begin with its first record, but with this; so it can't be known from
    /// when on it is complete.
    NotBegun(String),
    /// It stands in for a queue whose replacement was interrupted.
    LeftOver,
    /// It exists, or may exist, but can't be checked or used now, for this reason.
    Unavailable(String),
}

/// All findings, each on its own line.
pub(super) fn listed(findings: &[Finding]) -> String {
    let lines: Vec<_> = findings.iter().map(Finding::to_string).collect();
    lines.join("\n")
}

/// A property with another value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// Its name: that of an argument, or `durable`, `type` and the like.
    pub argument: String,
    /// The value wanted; `None`: it should not be set.
    pub wanted: Option<String>,
    /// The value found; `None`: it is not set.
    pub found: Option<String>,
    /// The broker's name for the type of the value.
    pub(super) found_type: Option<String>,
}

impl Difference {
    pub(super) fn new(argument: &str, wanted: Option<&str>, found: Option<&str>) -> Self {
        Self {
            argument: argument.to_owned(),
            wanted: wanted.map(str::to_owned),
            found: found.map(str::to_owned),
            found_type: None,
        }
    }

    /// Parses the broker's refusal of a declaration:
    ///
    /// ```text
    /// PRECONDITION_FAILED - inequivalent arg 'x-message-ttl' for queue 'q' in vhost '/': received
    /// the value '5' of type 'long' but current is the value '4' of type 'long'
    /// … inequivalent arg 'x-max-length' for …: received none but current is the value '4' of …
    /// … inequivalent arg 'durable' for …: received 'true' but current is 'false'
    /// ```
    pub(in crate::transport::amqp) fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.split_once("inequivalent arg '")?;
        let (argument, rest) = rest.split_once("' for ")?;
        let (_, rest) = rest.split_once("received ")?;
        let (wanted, found) = rest.split_once(" but current is ")?;
        let ((wanted, _), (found, found_type)) = (value(wanted), value(found));
        let readable = |value: Option<String>| match argument {
            "x-max-age" => value.map(|value| age_of(&value)),
            _ => value,
        };
        let (wanted, found) = (readable(wanted), readable(found));
        Some(Self { argument: argument.to_owned(), wanted, found, found_type })
    }
}

/// An age as it is declared. Some versions report it in milliseconds.
fn age_of(text: &str) -> String {
    text.parse().map_or_else(|_| text.to_owned(), |millis| age(Duration::from_millis(millis)))
}

/// A value in the broker's words, and its type.
fn value(text: &str) -> (Option<String>, Option<String>) {
    let text = text.trim();
    if text == "none" || text == "undefined" {
        return (None, None);
    }
    let text = text.strip_prefix("the value ").unwrap_or(text);
    let (text, kind) = match text.rsplit_once(" of type ") {
        Some((text, kind)) => (text, Some(unquoted(kind).to_owned())),
        None => (text, None),
    };
    (Some(unquoted(text).to_owned()), kind)
}

fn unquoted(text: &str) -> &str {
    text.strip_prefix('\'').and_then(|text| text.strip_suffix('\'')).unwrap_or(text)
}

impl Finding {
    pub(super) fn missing(subject: Subject) -> Self {
        Self { subject, fault: Fault::Missing }
    }

    /// Whether it exists, but differs.
    pub(super) fn is_mismatch(&self) -> bool {
        match self.fault {
            Fault::Differs(_) | Fault::Refused(_) | Fault::LeftOver => true,
            Fault::Missing | Fault::NotBegun(_) | Fault::Unavailable(_) => false,
        }
    }

    /// Whether it could not be compared.
    pub(super) fn is_unavailable(&self) -> bool {
        matches!(self.fault, Fault::Unavailable(_))
    }
}

impl Subject {
    /// `exchange` or `queue`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Exchange(_) => "exchange",
            Self::Queue(_) => "queue",
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::Exchange(name) | Self::Queue(name) => name,
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} `{}`", self.kind(), self.name())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.subject)?;
        match &self.fault {
            Fault::Missing => f.write_str("missing"),
            Fault::Differs(Difference { argument, wanted, found, .. }) => {
                let wanted = wanted.as_deref().unwrap_or("none");
                let found = found.as_deref().unwrap_or("none");
                write!(f, "{argument}: wanted {wanted}, found {found}")
            }
            Fault::Refused(text) => write!(f, "the broker refuses it: {text}"),
            Fault::NotBegun(found) => {
                write!(f, "wanted journal-begun as its first record, found {found}")
            }
            Fault::LeftOver => f.write_str("left by a replacement that was not finished"),
            Fault::Unavailable(why) => write!(f, "unavailable: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Difference;

    #[track_caller]
    fn reads(text: &str, argument: &str, wanted: Option<&str>, found: Option<&str>) {
        let text = format!("PRECONDITION_FAILED - inequivalent arg {text}");
        let mut difference = Difference::parse(&text).unwrap();
        difference.found_type = None;
        assert_eq!(difference, Difference::new(argument, wanted, found));
    }

    #[test]
    fn each_wording_of_a_refusal_is_read() {
        reads(
            "'x-message-ttl' for queue 'q' in vhost '/': received the value '5' of type 'long' \
             but current is the value '4' of type 'signedint'",
            "x-message-ttl",
            Some("5"),
            Some("4"),
        );
        reads(
            "'x-max-length' for queue 'q' in vhost '/': received none but current is the value \
             '4' of type 'long'",
            "x-max-length",
            None,
            Some("4"),
        );
        reads(
            "'durable' for queue 'q' in vhost '/': received 'true' but current is 'false'",
            "durable",
            Some("true"),
            Some("false"),
        );
        reads(
            "'x-message-ttl' for queue 'q' in vhost '/': received '5' but current is '4'",
            "x-message-ttl",
            Some("5"),
            Some("4"),
        );
        reads(
            "'x-max-age' for queue 'q' in vhost '/': received '604800000' but current is \
             '86400000'",
            "x-max-age",
            Some("7D"),
            Some("1D"),
        );
    }

    #[test]
    fn another_refusal_is_no_difference() {
        assert!(Difference::parse("PRECONDITION_FAILED - invalid arg 'x' for queue 'q'").is_none());
    }
}
