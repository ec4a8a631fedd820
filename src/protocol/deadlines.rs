//! When each transaction must be looked at again.

use std::{collections::BTreeSet, time::Duration};

use crate::protocol::{ids::TransactionKey, time::Time};

/// The moments at which to wake transactions, soonest first.
///
/// A transaction has at most one entry, and keeps its moment in a field `due: Option<Time>`. An entry may
/// be early: when a transaction is woken, it checks what is due, and sets its next entry.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Deadlines(BTreeSet<(Time, TransactionKey)>);

impl Deadlines {
    /// The soonest moment.
    pub(crate) fn next(&self) -> Option<Time> {
        self.0.first().map(|(at, _)| *at)
    }

    /// Makes sure that `key` is woken at `at` or before. `due`: the moment of its entry.
    pub(crate) fn wake_by(&mut self, key: &TransactionKey, due: &mut Option<Time>, at: Time) {
        if due.is_some_and(|due| due <= at) {
            return;
        }
        self.disarm(key, due);
        self.0.insert((at, key.clone()));
        *due = Some(at);
    }

    /// Removes the entry of `key`, if it has one.
    pub(crate) fn disarm(&mut self, key: &TransactionKey, due: &mut Option<Time>) {
        if let Some(at) = due.take() {
            self.0.remove(&(at, key.clone()));
        }
    }

    /// The clock was set back: moves all entries back `by` the same. The owners do the same with their
    /// `due`.
    pub(crate) fn put_back(&mut self, by: Duration) {
        self.0 = std::mem::take(&mut self.0).into_iter().map(|(at, key)| (at - by, key)).collect();
    }

    /// Removes all entries that are due at `now`, and returns their keys, soonest first.
    pub(crate) fn take_due(&mut self, now: Time) -> Vec<TransactionKey> {
        let mut due = Vec::new();
        while let Some((at, _)) = self.0.first()
            && *at <= now
        {
            due.extend(self.0.pop_first().map(|(_, key)| key));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::Deadlines;
    use crate::protocol::{
        ids::{TransactionId, TransactionKey},
        time::Time,
    };

    fn key(id: &str) -> TransactionKey {
        TransactionKey { id: TransactionId::parse(id).unwrap(), requested_at: Time::EPOCH }
    }

    fn at(millis: u64) -> Time {
        Time::from_millis(millis)
    }

    #[test]
    fn the_earlier_of_two_moments_stays() {
        let (mut deadlines, mut due) = (Deadlines::default(), None);
        deadlines.wake_by(&key("t1"), &mut due, at(5));
        deadlines.wake_by(&key("t1"), &mut due, at(9));
        assert_eq!((deadlines.next(), due), (Some(at(5)), Some(at(5))));
        deadlines.wake_by(&key("t1"), &mut due, at(3));
        assert_eq!((deadlines.next(), due), (Some(at(3)), Some(at(3))));
        assert_eq!(deadlines.take_due(at(100)), [key("t1")]);
        assert_eq!(deadlines.next(), None, "it has one entry only");
    }

    #[test]
    fn what_is_due_comes_soonest_first_and_what_is_not_stays() {
        let mut deadlines = Deadlines::default();
        for (id, millis) in [("late", 8), ("soon", 2), ("due", 5)] {
            deadlines.wake_by(&key(id), &mut None, at(millis));
        }
        assert_eq!(deadlines.take_due(at(5)), [key("soon"), key("due")]);
        assert_eq!(deadlines.next(), Some(at(8)));
    }

    #[test]
    fn disarmed_is_never_due() {
        let (mut deadlines, mut due) = (Deadlines::default(), None);
        deadlines.wake_by(&key("t1"), &mut due, at(5));
        deadlines.disarm(&key("t1"), &mut due);
        deadlines.disarm(&key("t1"), &mut due);
        assert_eq!((deadlines.take_due(at(100)), due), (Vec::new(), None));
    }
}
