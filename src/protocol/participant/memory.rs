//! What an instance remembers of transactions that it no longer holds.

use std::collections::VecDeque;

use crate::protocol::{
    ids::{Branch, TransactionKey},
    keymap::KeyMap,
    message::{Outcome, Reason},
};

/// How a transaction left this instance.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum Remembered {
    /// The outcome was heard and applied; `applied`: the branch it named.
    Finished { outcome: Outcome, applied: Option<Branch> },
    /// There was nothing to commit.
    ReadOnly,
    /// The answer was no.
    Refused(Reason),
    /// The prepare was withdrawn before it was started.
    Cancelled,
}

/// The last so many transactions. To forget one costs a needless call of the service's code at
/// worst, since a decision names what it commits.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Memory {
    max: usize,
    of: KeyMap<Remembered>,
    order: VecDeque<TransactionKey>,
}

impl Memory {
    pub(super) fn new(max: usize) -> Self {
        Self { max, of: KeyMap::new(), order: VecDeque::new() }
    }

    pub(super) fn of(&self, key: &TransactionKey) -> Option<&Remembered> {
        self.of.get(key)
    }

    /// Whether another transaction of this id is remembered.
    pub(super) fn has_namesake(&self, key: &TransactionKey) -> bool {
        has_namesake(&self.of, key)
    }

    pub(super) fn remember(&mut self, key: &TransactionKey, what: Remembered) {
        if self.of.insert(key, what).is_some() {
            return;
        }
        self.order.push_back(key.clone());
        while self.order.len() > self.max {
            if let Some(oldest) = self.order.pop_front() {
                self.of.remove(&oldest);
            }
        }
    }
}

/// Whether `map` has a key with the same id as `key` and another `requested_at`.
pub(super) fn has_namesake<T>(map: &KeyMap<T>, key: &TransactionKey) -> bool {
    map.of_id(&key.id).any(|(requested_at, _)| requested_at != key.requested_at)
}
