//! Every result has the outcome of the journal's first record, whenever and however often it is
//! published.

use dtc::protocol::message::{Answer, Decision};

use super::Checked;

/// A worker publishes `answer`; `first`: the first record of the transaction that it names.
pub(crate) fn told(answer: &Answer, first: Option<&Decision>) -> Checked {
    match first {
        Some(first) if first.outcome == answer.outcome => Ok(()),
        _ => Err(format!("{answer:?}; the first record: {first:?}")),
    }
}

/// At the end: all answers to one transaction were the same.
pub(crate) fn ended<'a>(answers: impl Iterator<Item = &'a Answer>) -> Checked {
    let mut outcomes: Vec<_> =
        answers.map(|answer| (&answer.id, answer.requested_at, answer.outcome)).collect();
    outcomes.sort();
    outcomes.dedup();
    match outcomes.windows(2).find(|pair| (pair[0].0, pair[0].1) == (pair[1].0, pair[1].1)) {
        Some(pair) => Err(format!("told as {:?} and as {:?}", pair[0], pair[1])),
        None => Ok(()),
    }
}
