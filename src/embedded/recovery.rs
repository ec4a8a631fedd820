//! What is to be done when a journal was opened again, before its process may end.
//!
//! Every service that has a store is asked what it holds in doubt. When they have answered, or
//! should have, what was in flight is requested again, and of each branch in doubt it is asked what
//! became of it, so many at a time; it is done with when its service has said so.
//!
//! A branch may have been prepared for a request that was not on the disk yet when the machine went
//! down. Nobody has decided that, nor will unless it is requested once more: then it goes on where
//! it was. When nobody has by the time that no more requests come, or for long, it is aborted.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    journal::file::UnfinishedTransaction,
    protocol::{
        ids::{RequestHash, TransactionId, TransactionKey},
        participant::InDoubt,
        time::Time,
    },
};

/// How many branches are asked about at once.
const ASKED_MAX: usize = 256;

/// How often a service may fail to end a branch before that is left for the next start.
const FAILURES_MAX: u32 = 4;

/// The pause after the first failure; it doubles with each.
const PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Recovery {
    /// Whose stores have not been heard of; `None`: that is over.
    unheard: Option<BTreeSet<usize>>,
    unfinished: Vec<UnfinishedTransaction>,
    /// What is to be asked about.
    doubts: BTreeMap<(usize, TransactionKey), Vec<InDoubt>>,
    asked: BTreeMap<(usize, TransactionKey), InquiredBranch>,
    /// How many a service has failed to end.
    n_failed: usize,
    /// What may be requested once more, by its id.
    deferred: BTreeMap<TransactionId, Vec<(usize, InDoubt)>>,
    deferred_until: Time,
    patience: Duration,
    /// When to go on without what is still missing.
    until: Time,
}

/// A branch of which it was asked what became of it.
struct InquiredBranch {
    doubt: InDoubt,
    failures: u32,
    /// When to ask again.
    again_at: Option<Time>,
}

/// What is to be done next.
pub(super) enum Step {
    /// Wait.
    Wait,
    /// Request these again. `silent`: whose stores were not heard of.
    Request { unfinished: Vec<UnfinishedTransaction>, silent: BTreeSet<usize> },
    /// Ask what became of this branch.
    Ask(usize, InDoubt),
    /// The same of one that was deferred, and that nobody has requested.
    GiveUp(usize, InDoubt),
    /// Nothing more; so many branches are left in doubt.
    End { n_left: usize },
}

impl Recovery {
    pub(super) fn new(
        now: Time,
        patience: Duration,
        unfinished: Vec<UnfinishedTransaction>,
        with_stores: BTreeSet<usize>,
    ) -> Self {
        Self {
            unheard: Some(with_stores),
            unfinished,
            doubts: BTreeMap::new(),
            asked: BTreeMap::new(),
            n_failed: 0,
            deferred: BTreeMap::new(),
            deferred_until: now + patience,
            patience,
            until: now + patience,
        }
    }

    /// Whether stores are still being looked through.
    pub(super) fn is_looking(&self) -> bool {
        self.unheard.is_some()
    }

    /// When the next step may be due though nothing has happened. `is_idle`: whether nothing but
    /// this is under way.
    pub(super) fn next_deadline(&self, is_idle: bool) -> Option<Time> {
        let gives_up = self.is_looking() || is_idle;
        let may_give_up = !self.deferred.is_empty() && self.asked.len() < ASKED_MAX;
        let deferred = may_give_up.then_some(self.deferred_until);
        let again = self.asked.values().filter_map(|asked| asked.again_at);
        gives_up.then_some(self.until).into_iter().chain(deferred).chain(again).min()
    }

    /// What the store of a member holds that this process has not made.
    pub(super) fn heard(&mut self, member: usize, held: impl Iterator<Item = InDoubt>) {
        if let Some(unheard) = &mut self.unheard
            && unheard.remove(&member)
        {
            for it in held {
                self.doubts.entry((member, it.key.clone())).or_default().push(it);
            }
        }
    }

    /// Puts a branch off that may be requested once more.
    pub(super) fn defer(&mut self, member: usize, doubt: InDoubt) {
        self.asked.remove(&(member, doubt.key.clone()));
        self.deferred.entry(doubt.key.id.clone()).or_default().push((member, doubt));
    }

    /// What was prepared under this id, for a request of this content, is requested once more: since
    /// when it is in flight.
    pub(super) fn adopt(&mut self, id: &TransactionId, request_hash: RequestHash) -> Option<Time> {
        let is_same = |doubt: &InDoubt| doubt.request_hash == request_hash;
        let doubts = self.deferred.get(id)?.iter().map(|(_, doubt)| doubt);
        let latest = doubts.filter(|it| is_same(it)).map(|it| it.key.requested_at).max()?;
        for (member, doubt) in self.deferred.remove(id)? {
            if is_same(&doubt) && doubt.key.requested_at == latest {
                self.asked.insert((member, doubt.key.clone()), InquiredBranch::new(doubt));
            } else {
                self.deferred.entry(id.clone()).or_default().push((member, doubt));
            }
        }
        Some(latest)
    }

    /// No more requests come.
    pub(super) fn requests_ended(&mut self) {
        self.deferred_until = Time::EPOCH;
    }

    /// A member has ended what it held of a transaction, or nobody waits for that any more. Whatever
    /// was still to be asked about that has its answer.
    pub(super) fn done(&mut self, now: Time, member: usize, key: &TransactionKey) {
        let name = (member, key.clone());
        if self.asked.remove(&name).is_some() {
            self.until = now + self.patience;
        }
        self.doubts.remove(&name);
        if let Some(deferred) = self.deferred.get_mut(&key.id) {
            deferred.retain(|(of, doubt)| (*of, &doubt.key) != (member, key));
            if deferred.is_empty() {
                self.deferred.remove(&key.id);
            }
        }
    }

    /// Nobody will say what became of the branch that was asked about last.
    pub(super) fn leave(&mut self, now: Time, member: usize, key: &TransactionKey) {
        if self.asked.remove(&(member, key.clone())).is_some() {
            self.until = now + self.patience;
        }
    }

    /// Whether a member was found to hold something of a transaction, and hasn't ended that.
    pub(super) fn awaits(&self, member: usize, key: &TransactionKey) -> bool {
        let name = (member, key.clone());
        self.asked.contains_key(&name) || self.doubts.contains_key(&name)
    }

    /// A member has failed to do that, and nobody else will tell it again.
    pub(super) fn failed(&mut self, now: Time, member: usize, key: &TransactionKey) {
        let name = (member, key.clone());
        let Some(asked) = self.asked.get_mut(&name) else { return };
        self.until = now + self.patience;
        asked.failures += 1;
        if asked.failures < FAILURES_MAX {
            asked.again_at = Some(now + PAUSE * (1 << (asked.failures - 1)));
        } else {
            self.asked.remove(&name);
            self.n_failed += 1;
        }
    }

    /// `is_idle`: whether nothing but this is under way.
    pub(super) fn step(&mut self, now: Time, is_idle: bool) -> Step {
        let is_late = now >= self.until;
        if let Some(unheard) = self.unheard.take_if(|unheard| unheard.is_empty() || is_late) {
            self.until = now + self.patience;
            let unfinished = std::mem::take(&mut self.unfinished);
            return Step::Request { unfinished, silent: unheard };
        }
        if self.is_looking() {
            return Step::Wait;
        }
        let is_due = |asked: &InquiredBranch| asked.again_at.is_some_and(|at| at <= now);
        let mut asked = self.asked.iter_mut().map(|((member, _), asked)| (*member, asked));
        if let Some((member, asked)) = asked.find(|(_, asked)| is_due(asked)) {
            asked.again_at = None;
            return Step::Ask(member, asked.doubt.clone());
        }
        if self.asked.len() < ASKED_MAX
            && let Some((member, doubt)) = self.next_doubt()
        {
            self.ask(now, member, &doubt);
            return Step::Ask(member, doubt);
        }
        let is_given_up = now >= self.deferred_until && self.asked.len() < ASKED_MAX;
        if let Some(mut entry) = self.deferred.first_entry().filter(|_| is_given_up) {
            let next = entry.get_mut().pop();
            if entry.get().is_empty() {
                entry.remove();
            }
            if let Some((member, doubt)) = next {
                self.ask(now, member, &doubt);
                return Step::GiveUp(member, doubt);
            }
        }
        let n_deferred: usize = self.deferred.values().map(Vec::len).sum();
        let n_doubts: usize = self.doubts.values().map(Vec::len).sum();
        let n_left = self.asked.len() + n_doubts + n_deferred;
        if n_left == 0 || is_late && is_idle && n_deferred == 0 {
            Step::End { n_left: n_left + self.n_failed }
        } else {
            Step::Wait
        }
    }

    fn next_doubt(&mut self) -> Option<(usize, InDoubt)> {
        let mut entry = self.doubts.first_entry()?;
        let member = entry.key().0;
        let next = entry.get_mut().pop();
        if entry.get().is_empty() {
            entry.remove();
        }
        next.map(|doubt| (member, doubt))
    }

    fn ask(&mut self, now: Time, member: usize, doubt: &InDoubt) {
        self.until = now + self.patience;
        self.asked.insert((member, doubt.key.clone()), InquiredBranch::new(doubt.clone()));
    }
}

impl InquiredBranch {
    fn new(doubt: InDoubt) -> Self {
        Self { doubt, failures: 0, again_at: None }
    }
}
