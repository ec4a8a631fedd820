//! The properties of every complaint: it gives the place and the rule, on one line, and complaints
//! are neither more nor longer than somebody would read.

use dtc::{
    complaint::{Complaint, Complaints, Location, Position, TextLocation},
    wire::message::{BODY_MAX, Malformed},
};

/// A path has a step for each of at most 108 levels, none longer than a shortened name.
const PATH_MAX: usize = 108 * 260;

/// Complaints about a body of `size` bytes, or an item in it.
pub fn are_good_about_a_body(malformed: &Malformed, size: usize, kind: &str) {
    match malformed {
        Malformed::TooLarge { size: found } => {
            assert!(*found == size && size > BODY_MAX, "{size}: {malformed}");
        }
        Malformed::Invalid(complaints) => are_good(complaints, kind),
    }
}

/// Complaints about what is called `file`.
pub fn are_good(complaints: &Complaints, file: &str) {
    let (listed, unlisted) = (complaints.listed(), complaints.unlisted());
    assert!((1..=Complaints::LISTED_MAX).contains(&listed.len()), "{}", listed.len());
    assert!(unlisted == 0 || listed.len() == Complaints::LISTED_MAX);
    listed.iter().for_each(|complaint| is_good(complaint, file));
    let text = complaints.to_string();
    assert_eq!(text.lines().count(), listed.len() + usize::from(unlisted > 0), "{text}");
}

fn is_good(complaint: &Complaint, file: &str) {
    let Complaint { location, value, rule } = complaint;
    let Location::Text { name, at } = location else { panic!("{complaint}") };
    assert_eq!(&**name, file);
    match at {
        TextLocation::Path(path) => is_path(path),
        TextLocation::Line { line, path } => {
            assert!(*line >= 1);
            is_path(path);
        }
        TextLocation::Position(Position { line, column }) => assert!(*line >= 1 && *column >= 1),
    }
    if let Some(value) = value {
        assert!(value.chars().count() <= 64, "{complaint}");
        is_one_line(value);
    }
    is_rule(rule);
}

fn is_path(path: &str) {
    assert!(path.starts_with('$') && path.len() <= PATH_MAX, "{path}");
    is_one_line(path);
}

/// Lower case, without a full stop.
fn is_rule(rule: &str) {
    assert!((1..=300).contains(&rule.len()), "{rule}");
    let begins_well = rule.starts_with(|it: char| it.is_lowercase()) || rule.starts_with("not ");
    assert!(begins_well && !rule.ends_with('.'), "{rule}");
    is_one_line(rule);
}

/// Text that doesn't disturb a terminal, or a reader of lines.
pub fn is_one_line(text: &str) {
    assert!(!text.chars().any(char::is_control), "{text:?}");
}
