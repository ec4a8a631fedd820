//! What an instance remembers of transactions that are over.

use std::collections::VecDeque;

use crate::protocol::{
    ids::{Branch, RequestHash, TransactionKey},
    keymap::KeyMap,
    message::{Finish, Outcome, Reason},
};

/// How a transaction ended at this instance.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum PastOutcome {
    /// The outcome came and was applied. `applied`: the branch that it named, unless it is unknown whether
    /// that one is committed.
    Finished { outcome: Outcome, applied: Option<Branch> },
    /// There was nothing to commit for the request with this digest.
    ReadOnly(RequestHash),
    /// The service has refused.
    Refused(Reason),
    /// The prepare was cancelled before it started.
    Cancelled,
}

impl PastOutcome {
    pub(super) fn finished(finish: &Finish, is_applied: bool) -> Self {
        let applied = finish.branch.clone().filter(|_| is_applied);
        Self::Finished { outcome: finish.outcome, applied }
    }
}

/// The last transactions, at most `max`. At worst, a forgotten one costs a needless call of the service's
/// code, since a decision names the branch that it commits.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Memory {
    max: usize,
    of: KeyMap<PastOutcome>,
    order: VecDeque<TransactionKey>,
}

impl Memory {
    pub(super) fn new(max: usize) -> Self {
        Self { max, of: KeyMap::new(), order: VecDeque::new() }
    }

    pub(super) fn of(&self, key: &TransactionKey) -> Option<&PastOutcome> {
        self.of.get(key)
    }

    /// Whether another transaction of this id is remembered.
    pub(super) fn has_namesake(&self, key: &TransactionKey) -> bool {
        has_namesake(&self.of, key)
    }

    pub(super) fn remember(&mut self, key: &TransactionKey, what: PastOutcome) {
        if let Some(known) = self.of.get_mut(key) {
            *known = what;
            return;
        }
        // The oldest is removed first: a queue with one more than the maximum takes twice the memory.
        while self.order.len() >= self.max {
            let Some(oldest) = self.order.pop_front() else { return };
            self.of.remove(&oldest);
        }
        self.of.insert(key, what);
        self.order.push_back(key.clone());
    }
}

/// Whether `map` has a key with the same id as `key` and another `requested_at`.
pub(super) fn has_namesake<T>(map: &KeyMap<T>, key: &TransactionKey) -> bool {
    map.of_id(&key.id).any(|(requested_at, _)| requested_at != key.requested_at)
}

#[cfg(test)]
mod tests {
    use super::{Memory, PastOutcome};
    use crate::protocol::{
        ids::{TransactionId, TransactionKey},
        message::Outcome,
        time::Time,
    };

    fn key(id: &str, requested_at: u64) -> TransactionKey {
        let requested_at = Time::from_millis(requested_at);
        TransactionKey { id: TransactionId::parse(id).unwrap(), requested_at }
    }

    #[test]
    fn the_oldest_is_forgotten_first() {
        let mut memory = Memory::new(2);
        for id in ["t1", "t2", "t3"] {
            memory.remember(&key(id, 0), PastOutcome::Cancelled);
        }
        assert_eq!(memory.of(&key("t1", 0)), None);
        assert!(memory.of(&key("t2", 0)).is_some() && memory.of(&key("t3", 0)).is_some());
    }

    #[test]
    fn a_full_memory_has_room_for_no_more_than_it_remembers() {
        for max in [0, 1, 64] {
            let mut memory = Memory::new(max);
            for number in 0..1000 {
                memory.remember(&key(&format!("t{number}"), 0), PastOutcome::Cancelled);
            }
            assert_eq!((memory.order.len(), memory.of.len()), (max, max));
            assert!(memory.order.capacity() <= max.max(4), "{}", memory.order.capacity());
        }
    }

    #[test]
    fn what_is_remembered_again_takes_no_second_place() {
        let mut memory = Memory::new(2);
        let finished = PastOutcome::Finished { outcome: Outcome::Aborted, applied: None };
        memory.remember(&key("t1", 0), PastOutcome::Cancelled);
        memory.remember(&key("t1", 0), finished.clone());
        memory.remember(&key("t2", 0), PastOutcome::Cancelled);
        assert_eq!(memory.of(&key("t1", 0)), Some(&finished));
        assert!(memory.of(&key("t2", 0)).is_some());
    }

    #[test]
    fn a_namesake_has_the_same_id_and_another_moment() {
        let mut memory = Memory::new(9);
        memory.remember(&key("t1", 5), PastOutcome::Cancelled);
        memory.remember(&key("t10", 5), PastOutcome::Cancelled);
        assert!(!memory.has_namesake(&key("t1", 5)));
        assert!(memory.has_namesake(&key("t1", 4)) && memory.has_namesake(&key("t1", 6)));
        assert!(!memory.has_namesake(&key("t", 5)) && !memory.has_namesake(&key("t100", 5)));
    }
}
