//! What is wrong with a configuration: which key, with which value, from where, and by which rule.

use std::fmt;

/// Where a value comes from; the later ones hide the earlier ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The file that is compiled in.
    Default,
    /// A file, by the name it was given.
    File(String),
    /// A variable of the environment.
    Variable(String),
    /// A flag of the command line.
    Flag(String),
    /// A file that holds nothing but the value.
    SecretFile {
        /// The file.
        path: String,
        /// Where that file is named.
        named_by: Box<Self>,
    },
}

impl Source {
    /// Whether whoever typed the command can mend it.
    pub fn is_flag(&self) -> bool {
        match self {
            Self::Flag(_) => true,
            Self::SecretFile { .. } | Self::Default | Self::File(_) | Self::Variable(_) => false,
        }
    }
}

impl fmt::Display for Source {
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

/// One thing that is wrong.
///
/// ```text
/// `worker.drain` is `soon` (from DTC__WORKER__DRAIN): must be a whole number with a unit: ms, s, min, h or d
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// The key, with its sections.
    pub key: String,
    /// The value as it was said; `None` where it may be a secret, or where there is none.
    pub value: Option<String>,
    /// Who said so.
    pub source: Source,
    /// What should have been: lower case, without a full stop.
    pub rule: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.key.is_empty() {
            write!(f, "`{}`", one_line(&self.key))?;
            if let Some(value) = &self.value {
                write!(f, " is `{}`", one_line(value))?;
            }
            f.write_str(" ")?;
        }
        write!(f, "(from {}): {}", self.source, self.rule)
    }
}

/// What others have written, as something that can't disturb a terminal.
fn one_line(text: &str) -> String {
    const CHARS_MAX: usize = 128;
    let shown = text.chars().take(CHARS_MAX).collect::<String>().escape_debug().to_string();
    let shown = shown.replace("\\\"", "\"").replace("\\'", "'");
    if text.chars().count() > CHARS_MAX { shown + "…" } else { shown }
}

/// All that is wrong with a configuration: never nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Complaints(pub Vec<Complaint>);

impl fmt::Display for Complaints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<_> = self.0.iter().map(Complaint::to_string).collect();
        f.write_str(&lines.join("\n"))
    }
}
