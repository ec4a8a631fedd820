//! Whether prepares succeed at all: an instance whose store is full, or whose database is gone, is
//! connected and yet of no use, and nobody would see it.

use std::sync::Arc;

use crate::protocol::participant::{Event, Verdict};

/// So many prepares that have failed one after the other are no accident.
const FAILED_MAX: u32 = 3;

/// What the last prepares came to.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// How many of them have failed, since one has not.
    failed: u32,
}

/// What is to be said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Change {
    /// They fail, the last one with this error.
    Fails(Arc<str>),
    /// One has not failed.
    Works,
}

impl Health {
    /// Takes in what has happened; tells whether that changes anything.
    pub(super) fn see(&mut self, event: &Event) -> Option<Change> {
        let Event::PrepareEnded { verdict, .. } = event else { return None };
        if let Verdict::Failed(error) = verdict {
            self.failed = self.failed.saturating_add(1);
            return (self.failed == FAILED_MAX).then(|| Change::Fails(Arc::clone(error)));
        }
        let failed = std::mem::take(&mut self.failed);
        (failed >= FAILED_MAX).then_some(Change::Works)
    }

    /// Whether the next prepare may well succeed.
    pub(super) fn is_good(&self) -> bool {
        self.failed < FAILED_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::{Change, Health};
    use crate::protocol::{
        ids::{Branch, TransactionId, TransactionKey},
        participant::{Event, Verdict},
        time::Time,
    };

    fn ended(verdict: Verdict) -> Event {
        let key =
            TransactionKey { id: TransactionId::parse("t1").unwrap(), requested_at: Time::EPOCH };
        Event::PrepareEnded { key, branch: Branch::parse("b1.1").unwrap(), verdict }
    }

    fn failed() -> Event {
        ended(Verdict::Failed("the disk is full".into()))
    }

    #[test]
    fn three_prepares_that_fail_one_after_the_other_are_said_once_and_one_that_does_not_ends_it() {
        let mut health = Health::default();
        assert_eq!([health.see(&failed()), health.see(&failed())], [None, None]);
        assert!(health.is_good());
        assert_eq!(health.see(&failed()), Some(Change::Fails("the disk is full".into())));
        assert_eq!(health.see(&failed()), None);
        assert!(!health.is_good());
        assert_eq!(health.see(&ended(Verdict::Refused(None))), Some(Change::Works));
        assert!(health.is_good());
    }

    #[test]
    fn failures_among_others_say_nothing() {
        let mut health = Health::default();
        for _ in 0..10 {
            let seen = [failed(), failed(), ended(Verdict::Prepared)].map(|it| health.see(&it));
            assert_eq!(seen, [None, None, None]);
        }
        assert!(health.is_good());
    }
}
