//! What an instance could not apply and no worker waits for any more: said once when that begins,
//! and once when it ends, however often it is tried in between.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    participant::spans,
    protocol::{
        ids::TransactionKey,
        participant::{Event, Instance},
    },
};

/// How many are named when the instance stops.
const NAMED_MAX: usize = 10;

/// The transactions whose outcome this instance holds and could not apply. No more than it holds.
#[derive(Debug, Default)]
pub(super) struct ParkedLog {
    tries: BTreeMap<TransactionKey, Tries>,
}

#[derive(Debug)]
struct Tries {
    failures: u64,
    /// What the service's code said last.
    error: Arc<str>,
    /// Whether it was said that it is parked.
    is_told: bool,
}

/// Something that may have changed what is parked.
#[derive(Debug)]
pub(super) struct Tried {
    key: TransactionKey,
    failed: Option<Failure>,
}

#[derive(Debug)]
enum Failure {
    /// The service's code says this.
    Code(Arc<str>),
    /// The store does not know this branch.
    Unknown(String),
}

impl ParkedLog {
    /// What `event` may change, to be said when the core has handled it.
    pub(super) fn before(&self, event: &Event) -> Option<Tried> {
        let failed = if let Event::FinishEnded { applied: Err(error), .. } = event {
            Some(Failure::Code(Arc::clone(error)))
        } else if let Event::CommitLookedUp { branch, is_known: false, .. } = event {
            Some(Failure::Unknown(branch.to_string()))
        } else if self.tries.is_empty() {
            return None;
        } else {
            None
        };
        let key = event.key()?;
        (failed.is_some() || self.tries.contains_key(key))
            .then(|| Tried { key: key.clone(), failed })
    }

    /// Says what has changed. `every`: the pause between two tries.
    pub(super) fn after(&mut self, tried: Tried, instance: &Instance, every: Duration) {
        let Tried { key, failed } = tried;
        let _entered = spans::finish(None, &key).entered();
        let is_held = instance.stage_of(&key).is_some();
        let unknown = match failed {
            Some(Failure::Code(error)) => {
                tracing::debug!(%error, "an outcome was not applied");
                self.failed(&key, is_held, error);
                None
            }
            Some(Failure::Unknown(branch)) => {
                let is_told = self.tries.get(&key).is_some_and(|tries| tries.is_told);
                self.failed(&key, is_held, format!("branch {branch} is unknown").into());
                Some(branch).filter(|_| !is_told)
            }
            None => None,
        };
        if let Some(branch) = &unknown {
            tracing::error!(
                branch,
                "told to commit a branch that this instance's store has neither prepared nor \
                 committed, so nothing is committed here: all instances of a service must share \
                 one store; give this instance the store of the one that made the branch"
            );
        }
        if !is_held {
            if let Some(Tries { failures, .. }) =
                self.tries.remove(&key).filter(|tries| tries.is_told)
            {
                tracing::info!(
                    failures,
                    "a parked outcome is applied, by this instance or another"
                );
            }
            return;
        }
        let Some(tries) = self.tries.get_mut(&key) else { return };
        if tries.is_told || !instance.is_parked(&key) {
            return;
        }
        tries.is_told = true;
        if unknown.is_none() {
            let error = &tries.error;
            tracing::warn!(
                %error,
                "an outcome is parked: the service's code has failed to apply it, and no worker \
                 waits for it any more; it is tried every {every:?} until it succeeds, here or at \
                 another instance; mend what the error says"
            );
        }
    }

    /// It was tried, and the instance goes on holding it or not.
    fn failed(&mut self, key: &TransactionKey, is_held: bool, error: Arc<str>) {
        if let Some(tries) = self.tries.get_mut(key) {
            tries.failures = tries.failures.saturating_add(1);
            tries.error = error;
        } else if is_held {
            self.tries.insert(key.clone(), Tries { failures: 1, error, is_told: false });
        }
    }

    /// What is left to whoever comes next.
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
