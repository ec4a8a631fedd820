//! One thing at a broker that isn't as the topology says, and how it is told.

use std::{fmt, time::Duration};

use crate::transport::amqp::topology::age;

/// One thing that isn't as it should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// What.
    pub subject: Subject,
    /// In which way.
    pub fault: Fault,
}

/// What a finding is about.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Subject {
    /// An exchange, by its name.
    Exchange(String),
    /// A queue, by its name.
    Queue(String),
}

/// What is wrong with it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It doesn't exist.
    Missing,
    /// It was declared with something else.
    Differs(Difference),
    /// The broker has it, but doesn't say what is different: these are its words.
    Refused(String),
    /// The journal doesn't begin with its first record, but with this; nothing that it says can be
    /// believed to be complete.
    NotBegun(String),
    /// It stands in for a queue whose replacement was not finished.
    LeftOver,
    /// It is there, or may be, and can't be asked or used now, for this reason.
    Unavailable(String),
}

/// Each on a line of its own.
pub(super) fn listed(findings: &[Finding]) -> String {
    let lines: Vec<_> = findings.iter().map(Finding::to_string).collect();
    lines.join("\n")
}

/// A property that has another value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// Its name: an argument's, or `durable`, `type` and the like.
    pub argument: String,
    /// What it should be; `None`: it should not be there.
    pub wanted: Option<String>,
    /// What it is; `None`: it isn't there.
    pub found: Option<String>,
    /// The broker's word for the kind of value it is.
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

    /// What the broker says when it refuses a declaration:
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
        let told = |value: Option<String>| match argument {
            "x-max-age" => value.map(|value| age_of(&value)),
            _ => value,
        };
        let (wanted, found) = (told(wanted), told(found));
        Some(Self { argument: argument.to_owned(), wanted, found, found_type })
    }
}

/// An age as it is declared. Some versions tell of it in milliseconds.
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

    /// Whether it is there, but another.
    pub(super) fn is_mismatch(&self) -> bool {
        match self.fault {
            Fault::Differs(_) | Fault::Refused(_) | Fault::LeftOver => true,
            Fault::Missing | Fault::NotBegun(_) | Fault::Unavailable(_) => false,
        }
    }

    /// Whether nothing more can be said of it now.
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

    /// What it is called.
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
