//! Whether prepares succeed at all: an instance whose store is full, or whose database is down, is
//! connected but useless, and must not count as ready.

use std::sync::Arc;

use crate::protocol::participant::{Event, Verdict};

/// After how many failed prepares in a row an instance is not ready.
const FAILED_MAX: u32 = 3;

/// How the last prepares ended.
#[derive(Debug, Default)]
pub(super) struct Health {
    /// How many have failed since the last one that did not.
    failed: u32,
}

/// A change of an instance's health.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Change {
    /// Prepares fail, the last one with this error.
    Fails(Arc<str>),
    /// A prepare did not fail.
    Works,
}

impl Health {
    /// Handles an event; returns the change that it causes, if any.
    pub(super) fn see(&mut self, event: &Event) -> Option<Change> {
        let Event::PrepareEnded { verdict, .. } = event else { return None };
        if let Verdict::Failed(error) = verdict {
            self.failed = self.failed.saturating_add(1);
            return (self.failed == FAILED_MAX).then(|| Change::Fails(Arc::clone(error)));
        }
        let failed = std::mem::take(&mut self.failed);
        (failed >= FAILED_MAX).then_some(Change::Works)
    }

    /// Whether prepares succeed, as far as is known.
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
    fn three_failed_prepares_in_a_row_are_reported_once_until_one_succeeds() {
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
    fn failed_prepares_between_successful_ones_are_not_reported() {
        let mut health = Health::default();
        for _ in 0..10 {
            let seen = [failed(), failed(), ended(Verdict::Prepared)].map(|it| health.see(&it));
            assert_eq!(seen, [None, None, None]);
        }
        assert!(health.is_good());
    }
}
