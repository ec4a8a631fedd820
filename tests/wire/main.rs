//! The files of `dtc run`, as their reader may find them: any bytes, any good file, and good files
//! with one thing broken.

#![allow(clippy::unwrap_used, reason = "a test may fail here")]
#![allow(missing_docs, reason = "a test's name says it")]

mod message;
mod services;
mod transactions;

use dtc::complaint::{Complaint, Complaints, Location, TextLocation};
use proptest::prelude::{Strategy, any, prop, prop_oneof};
use serde_json::{Map, Value, json};

/// JSON objects of every kind.
fn object() -> impl Strategy<Value = Map<String, Value>> {
    let leaf = prop_oneof![
        any::<Option<bool>>().prop_map(|it| json!(it)),
        any::<i64>().prop_map(|it| json!(it)),
        any::<f64>().prop_map(|it| json!(it)),
        ".{0,5}".prop_map(|it| json!(it)),
    ];
    let value = leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(|it| json!(it)),
            prop::collection::btree_map(".{0,5}", inner, 0..4).prop_map(|it| json!(it)),
        ]
    });
    prop::collection::btree_map("[a-z]{1,3}", value, 0..4).prop_map(|it| it.into_iter().collect())
}

/// Damage to a file: some bytes are changed, and its end is missing.
#[derive(Clone, Debug)]
struct Damage {
    changes: Vec<(prop::sample::Index, u8)>,
    missing: prop::sample::Index,
}

impl Damage {
    fn to(&self, text: &str) -> Vec<u8> {
        let mut text = text.as_bytes().to_vec();
        for (index, byte) in &self.changes {
            let index = index.index(text.len());
            text[index] = *byte;
        }
        text.truncate(text.len() - self.missing.index(text.len()) / 2);
        text
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let changes = prop::collection::vec(any::<(prop::sample::Index, u8)>(), 0..4);
    (changes, any::<prop::sample::Index>())
        .prop_map(|(changes, missing)| Damage { changes, missing })
}

/// The only complaint, and the path it is about.
fn only(complaints: &Complaints) -> (&Complaint, &str) {
    let [complaint] = complaints.listed() else { panic!("more than one:\n{complaints}") };
    let Location::Text { at: TextLocation::Path(path) | TextLocation::Line { path, .. }, .. } =
        &complaint.location
    else {
        panic!("no path:\n{complaint}")
    };
    (complaint, path)
}

/// Asserts that there are complaints, each on one line with the file's name.
fn assert_readable(complaints: &Complaints, file: &str) {
    assert!(!complaints.listed().is_empty());
    for line in complaints.to_string().lines() {
        assert!(line.starts_with(file) || line.starts_with("and "), "{line:?}");
        assert!(!line.contains(char::is_control), "{line:?}");
    }
}
