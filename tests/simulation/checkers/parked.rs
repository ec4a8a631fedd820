//! Whatever a result calls unresolved is listed for a person, waits in the service's durable queue,
//! and is settled by the done that follows; what is listed and was not left there, because its worker
//! didn't live to, is settled by who commits it; and no transaction is parked that could be decided.

use std::collections::BTreeSet;

use dtc::protocol::{
    ids::{ServiceName, TransactionKey},
    message::Answer,
};

use super::Checked;

type Commit = (TransactionKey, ServiceName);

/// What became of every parked commit.
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

    /// A worker has heard of it and lived to say so.
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

    /// A worker tells a producer.
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

    /// When all is over. `is_excused`: the whole transaction was handed to a person.
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
