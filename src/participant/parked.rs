//! Logs the outcomes that an instance could not apply and that no worker waits for any more: once when
//! an outcome is parked, and once when it is applied, however often it is retried in between.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    participant::spans,
    protocol::{
        ids::TransactionKey,
        participant::{Event, Instance},
    },
};

/// How many parked transactions a stopping instance names.
const NAMED_MAX: usize = 10;

/// The transactions that this instance holds and whose outcome it could not apply.
#[derive(Debug, Default)]
pub(super) struct ParkedLog {
    tries: BTreeMap<TransactionKey, CommitAttempts>,
}

#[derive(Debug)]
struct CommitAttempts {
    failures: u64,
    /// The last error of the service's code.
    error: Arc<str>,
    /// Whether it was logged as parked.
    is_logged: bool,
}

/// An event that may change which outcomes are parked.
#[derive(Debug)]
pub(super) struct Tried {
    key: TransactionKey,
    failed: Option<CommitFailure>,
}

#[derive(Debug)]
enum CommitFailure {
    /// The error of the service's code.
    Code(Arc<str>),
    /// The branch, which the store does not know.
    Unknown(String),
}

impl ParkedLog {
    /// What `event` may change. Pass it to [`after`](Self::after) when the core has handled the event.
    pub(super) fn before(&self, event: &Event) -> Option<Tried> {
        let failed = if let Event::FinishEnded { applied: Err(error), .. } = event {
            Some(CommitFailure::Code(Arc::clone(error)))
        } else if let Event::CommitLookedUp { branch, is_known: false, .. } = event {
            Some(CommitFailure::Unknown(branch.to_string()))
        } else if self.tries.is_empty() {
            return None;
        } else {
            None
        };
        let key = event.key()?;
        (failed.is_some() || self.tries.contains_key(key))
            .then(|| Tried { key: key.clone(), failed })
    }

    /// Logs what has changed. `every`: the pause between two attempts.
    pub(super) fn after(&mut self, tried: Tried, instance: &Instance, every: Duration) {
        let Tried { key, failed } = tried;
        let _entered = spans::finish(None, &key).entered();
        let is_held = instance.stage_of(&key).is_some();
        let unknown = match failed {
            Some(CommitFailure::Code(error)) => {
                tracing::debug!(%error, "an outcome was not applied");
                self.failed(&key, is_held, error);
                None
            }
            Some(CommitFailure::Unknown(branch)) => {
                let is_logged = self.tries.get(&key).is_some_and(|tries| tries.is_logged);
                self.failed(&key, is_held, format!("branch {branch} is unknown").into());
                Some(branch).filter(|_| !is_logged)
            }
            None => None,
        };
        if let Some(branch) = &unknown {
            tracing::error!(
                branch,
                "a worker commits a branch that this instance's store has neither prepared nor \
                 committed; nothing is committed here. All instances of a service must share one \
                 store: give this instance the store of the one that prepared the branch"
            );
        }
        if !is_held {
            if let Some(CommitAttempts { failures, .. }) =
                self.tries.remove(&key).filter(|tries| tries.is_logged)
            {
                tracing::info!(
                    failures,
                    "a parked outcome is applied, by this instance or another"
                );
            }
            return;
        }
        let Some(tries) = self.tries.get_mut(&key) else { return };
        if tries.is_logged || !instance.is_parked(&key) {
            return;
        }
        tries.is_logged = true;
        if unknown.is_none() {
            let error = &tries.error;
            tracing::error!(
                %error,
                "an outcome is parked: the service's code has failed to apply it, and no worker \
                 waits for it any more. It is tried again every {every:?}, here and at other \
                 instances, until one succeeds: fix what the error says"
            );
        }
    }

    /// Counts a failed attempt. `is_held`: whether the instance still holds the transaction.
    fn failed(&mut self, key: &TransactionKey, is_held: bool, error: Arc<str>) {
        if let Some(tries) = self.tries.get_mut(key) {
            tries.failures = tries.failures.saturating_add(1);
            tries.error = error;
        } else if is_held {
            self.tries.insert(key.clone(), CommitAttempts { failures: 1, error, is_logged: false });
        }
    }

    /// Names the parked transactions that a stopping instance leaves to others.
    pub(super) fn left(&self, instance: &Instance) -> Option<String> {
        let mut parked = self.tries.keys().filter(|key| instance.is_parked(key));
        let named: Vec<_> = parked.by_ref().take(NAMED_MAX).map(ToString::to_string).collect();
        let more = match parked.count() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        (!named.is_empty()).then(|| format!("{}{more}", named.join(", ")))
    }
}
