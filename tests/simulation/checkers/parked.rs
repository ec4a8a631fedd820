//! Every service that a result calls unresolved is recorded as parked, its commit waits in the
//! service's durable queue, and the done that follows settles it. A parked record without such a
//! command, because its worker died first, is settled by the worker that commits it. No transaction
//! is parked that could be decided.

use std::collections::BTreeSet;

use dtc::protocol::{
    ids::{ServiceName, TransactionKey},
    message::Answer,
};

use super::Checked;

type Commit = (TransactionKey, ServiceName);

/// The history of every parked commit.
#[derive(Default)]
pub(crate) struct ParkedCommits {
    listed: BTreeSet<Commit>,
    queued: BTreeSet<Commit>,
    applied: BTreeSet<Commit>,
    settled: BTreeSet<Commit>,
}

impl ParkedCommits {
    pub(crate) fn listed(&mut self, key: &TransactionKey, service: &ServiceName) {
        self.listed.insert((key.clone(), service.clone()));
    }

    /// A whole transaction is parked; `reaches`: whether the journal goes back to where it began;
    /// `was_lost`: whether a look further back has failed.
    pub(crate) fn undecidable(key: &TransactionKey, reaches: bool, was_lost: bool) -> Checked {
        if reaches && !was_lost {
            return Err(format!("{key} is parked, and the journal could have told its outcome"));
        }
        Ok(())
    }

    pub(crate) fn queued(&mut self, key: &TransactionKey, service: &ServiceName) {
        self.queued.insert((key.clone(), service.clone()));
    }

    /// A worker has received the done and lived to report it.
    pub(crate) fn applied(&mut self, key: &TransactionKey, service: &ServiceName) {
        self.applied.insert((key.clone(), service.clone()));
    }

    pub(crate) fn settled(&mut self, key: &TransactionKey, service: &ServiceName) {
        self.settled.insert((key.clone(), service.clone()));
    }

    pub(crate) fn n_listed(&self) -> usize {
        self.listed.len()
    }

    pub(crate) fn n_settled(&self) -> usize {
        self.settled.len()
    }

    /// A worker publishes a result.
    pub(crate) fn told(&self, answer: &Answer) -> Checked {
        for service in &answer.unresolved {
            let key = TransactionKey { id: answer.id.clone(), requested_at: answer.requested_at };
            let commit = (key, service.clone());
            if !self.listed.contains(&commit) || !self.queued.contains(&commit) {
                return Err(format!("{commit:?} is told as unresolved and not listed and queued"));
            }
        }
        Ok(())
    }

    /// At the end. `is_excused`: the whole transaction was parked.
    pub(crate) fn ended(&self, is_excused: impl Fn(&TransactionKey) -> bool) -> Checked {
        if let Some(commit) = self.applied.difference(&self.settled).next() {
            return Err(format!("{commit:?} was applied and is still listed"));
        }
        let mut forgotten = self.listed.difference(&self.settled);
        match forgotten.find(|commit| !self.queued.contains(commit) && !is_excused(&commit.0)) {
            Some(commit) => Err(format!("{commit:?} is listed, and nothing will settle it")),
            None => Ok(()),
        }
    }
}
