//! Gathers the entries that an engine writes to its journal file, and knows what the file says.
//!
//! A transaction is in the file from its first prepare on: a process that was killed before that has
//! called no service. Its decision counts when it is on disk. It is finished when every service has
//! committed or aborted it.
//!
//! The memory holds only what is in flight, and what earlier processes have left.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use crate::{
    journal::file::{EntryBatch, FinishedIndex, Incarnation, JournalError, UnfinishedTransaction},
    protocol::{
        ids::{Branch, RequestHash, ServiceName, TransactionId, TransactionKey, WorkerId},
        message::{Answer, Decision, Request, TransactionSpec},
        time::Time,
    },
    wire::message::{Begun, Entry, Finished},
};

/// The process that made a branch.
pub(super) enum Maker {
    /// This one.
    Own,
    /// One that had this journal open earlier.
    Earlier,
    /// One that never had this journal open, as far as the journal says.
    Stranger,
}

/// What the journal says about a submitted transaction.
pub(super) enum Earlier {
    /// Nothing.
    Nothing,
    /// It is in flight, with this `requested_at`.
    InFlight(Time),
    /// It is finished.
    Over(Finished),
    /// A transaction with the same id has other content.
    Another(TransactionKey),
}

/// Gathers entries for the file, and knows what it says.
pub(super) struct JournalWriter {
    own: Incarnation,
    worker: WorkerId,
    endings: FinishedIndex,
    batch: EntryBatch,
    n_written: u64,
    /// The offset of the next entry.
    end: u64,
    /// The offset of the first entry that was not taken to be written.
    end_written: u64,
    /// The decisions that may not be on disk, each with its number among the entries.
    awaited: VecDeque<(u64, Arc<Decision>)>,
    /// The requests without a prepare so far.
    waiting: BTreeMap<TransactionKey, Request>,
    /// The transactions in the file that are not finished.
    open: BTreeMap<TransactionKey, Open>,
    /// The transactions that earlier processes have started and this one finishes.
    inherited: BTreeMap<TransactionId, Inherited>,
    /// The aborted transactions that services may still hold.
    aborting: Vec<TransactionKey>,
    /// Those of them that a service holds though the coordinator is done with them. The service will
    /// inquire.
    untold: BTreeSet<TransactionKey>,
    failure: Option<JournalError>,
}

#[derive(Default)]
struct Open {
    is_proposed: bool,
    /// Whether it was decided for an inquiry only, without a request.
    is_only_asked_about: bool,
    /// Its decision, once that is on disk.
    decision: Option<Arc<Decision>>,
}

struct Inherited {
    requested_at: Time,
    request_hash: RequestHash,
    ended: Option<Finished>,
}

impl JournalWriter {
    pub(super) fn new(
        own: Incarnation,
        worker: WorkerId,
        endings: FinishedIndex,
        unfinished: &[UnfinishedTransaction],
        end: u64,
    ) -> Self {
        let (mut open, mut inherited) = (BTreeMap::new(), BTreeMap::new());
        for UnfinishedTransaction {
            request: Request { key, request_hash, .. }, decision, ..
        } in unfinished
        {
            let (is_proposed, decision) = (decision.is_some(), decision.clone());
            open.insert(key.clone(), Open { is_proposed, decision, ..Open::default() });
            inherited.insert(key.id.clone(), Inherited::of(key, *request_hash));
        }
        Self {
            own,
            worker,
            endings,
            batch: EntryBatch::default(),
            n_written: 0,
            end,
            end_written: end,
            awaited: VecDeque::new(),
            waiting: BTreeMap::new(),
            open,
            inherited,
            aborting: Vec::new(),
            untold: BTreeSet::new(),
            failure: None,
        }
    }

    fn write(&mut self, entry: &Entry) {
        self.end += self.batch.push(entry);
        self.n_written += 1;
    }

    /// Takes the entries that are to be written now. Call it before any other method.
    pub(super) fn take_batch(&mut self) -> Option<EntryBatch> {
        self.end_written = self.end;
        (!self.batch.is_empty()).then(|| std::mem::take(&mut self.batch))
    }

    /// The error that makes the journal unusable.
    pub(super) fn take_failure(&mut self) -> Option<JournalError> {
        self.failure.take()
    }

    /// The value that was found, or `None` after a failure, which is kept.
    fn unless_failed<T>(&mut self, found: Result<Option<T>, JournalError>) -> Option<T> {
        found.unwrap_or_else(|failure| {
            self.failure.get_or_insert(failure);
            None
        })
    }

    /// What the journal says about a submitted transaction.
    pub(super) fn earlier(&mut self, spec: &TransactionSpec) -> Earlier {
        if let Some(inherited) = self.inherited.get(&spec.id) {
            let requested_at = inherited.requested_at;
            return match &inherited.ended {
                _ if inherited.request_hash != spec.request_hash => {
                    Earlier::Another(TransactionKey { id: spec.id.clone(), requested_at })
                }
                Some(finished) => Earlier::Over(finished.clone()),
                None => Earlier::InFlight(requested_at),
            };
        }
        let found = self.endings.find(&spec.id);
        match self.unless_failed(found) {
            None => Earlier::Nothing,
            Some(Finished { decision, .. }) if decision.request_hash != spec.request_hash => {
                Earlier::Another(decision.key.clone())
            }
            Some(finished) => Earlier::Over(finished),
        }
    }

    /// A transaction that an earlier process has started, and that isn't in the file, is requested once
    /// more.
    pub(super) fn inherit(&mut self, key: &TransactionKey, request_hash: RequestHash) {
        self.inherited.insert(key.id.clone(), Inherited::of(key, request_hash));
    }

    /// The decision of a finished transaction that an earlier process has started, if it is known.
    pub(super) fn ending_of(&mut self, key: &TransactionKey) -> Option<Arc<Decision>> {
        let inherited = self.inherited.get(&key.id).and_then(|it| it.ended.as_ref());
        if let Some(finished) = inherited.filter(|it| it.decision.key == *key) {
            return Some(Arc::clone(&finished.decision));
        }
        let found = self.endings.find(&key.id);
        let found = self.unless_failed(found).map(|finished| finished.decision);
        found.filter(|decision| decision.key == *key)
    }

    /// The decision of a finished transaction that this process has started, if it is known.
    pub(super) fn own_ending_of(&mut self, key: &TransactionKey) -> Option<Arc<Decision>> {
        let found = self.endings.find_recent(key, self.end_written);
        self.unless_failed(found).map(|finished| finished.decision)
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    pub(super) fn maker_of(&self, branch: &Branch) -> Maker {
        match Incarnation::parse(branch.instance().as_str()) {
            Some(made) if made.journal == self.own.journal && made.number == self.own.number => {
                Maker::Own
            }
            Some(made) if made.journal == self.own.journal && made.number < self.own.number => {
                Maker::Earlier
            }
            Some(_) | None => Maker::Stranger,
        }
    }

    /// The count of deliveries of a request that `begun_by` has started: one for each time that the
    /// journal was opened since.
    pub(super) fn deliveries_of(&self, begun_by: &WorkerId) -> u32 {
        let begun_by = Incarnation::parse(begun_by.as_str());
        let n_since = begun_by.map_or(1, |it| self.own.number.saturating_sub(it.number).max(1));
        u32::try_from(n_since).unwrap_or(u32::MAX).saturating_add(1)
    }

    /// Notes a request, unless it is already in the file.
    pub(super) fn take_in(&mut self, request: &Request) {
        if !self.open.contains_key(&request.key) {
            self.waiting.insert(request.key.clone(), request.clone());
        }
    }

    /// Writes the request of a transaction, before its first prepare.
    pub(super) fn begin(&mut self, key: &TransactionKey) {
        let Some(request) = self.waiting.remove(key) else { return };
        self.open.insert(key.clone(), Open::default());
        let worker = self.worker.clone();
        self.write(&Entry::Begun(Begun { request, worker }));
    }

    /// Proposes a decision for an inquiry about a transaction that is not in progress.
    pub(super) fn propose_to_asker(&mut self, decision: Arc<Decision>) {
        if !self.open.contains_key(&decision.key) {
            let open = Open { is_only_asked_about: true, ..Open::default() };
            self.open.insert(decision.key.clone(), open);
            self.aborting.push(decision.key.clone());
        }
        self.propose(decision);
    }

    /// Writes a decision. Only the first one for a transaction is written: this journal loses none.
    pub(super) fn propose(&mut self, decision: Arc<Decision>) {
        self.waiting.remove(&decision.key);
        let open = self.open.entry(decision.key.clone()).or_default();
        if open.is_proposed {
            return;
        }
        open.is_proposed = true;
        self.write(&Entry::Decided(Arc::clone(&decision)));
        self.awaited.push_back((self.n_written, decision));
    }

    /// The first `n_safe` entries are on disk; returns the decisions that count by that.
    pub(super) fn safe(&mut self, n_safe: u64) -> Vec<Arc<Decision>> {
        let mut decided = Vec::new();
        while self.awaited.front().is_some_and(|(n, _)| *n <= n_safe)
            && let Some((_, decision)) = self.awaited.pop_front()
        {
            if let Some(open) = self.open.get_mut(&decision.key) {
                open.decision.get_or_insert_with(|| Arc::clone(&decision));
            }
            decided.push(decision);
        }
        decided
    }

    /// Whether the transaction is in the file and not finished.
    pub(super) fn is_open(&self, key: &TransactionKey) -> bool {
        self.open.contains_key(key)
    }

    /// The decision of an unfinished transaction, once that is on disk.
    pub(super) fn decision_of(&self, key: &TransactionKey) -> Option<&Arc<Decision>> {
        self.open.get(key)?.decision.as_ref()
    }

    /// The transaction is aborted; it is finished when every service has aborted it.
    pub(super) fn aborted(&mut self, key: &TransactionKey) {
        self.waiting.remove(key);
        self.aborting.push(key.clone());
    }

    /// Takes the aborted transactions whose decision is on disk and with which the coordinator is done.
    pub(super) fn take_aborted(
        &mut self,
        mut is_over: impl FnMut(&TransactionKey) -> bool,
    ) -> Vec<TransactionKey> {
        let open = &self.open;
        let is_safe = |open: &Open| open.decision.is_some();
        let aborted =
            self.aborting.extract_if(.., |key| open.get(key).is_none_or(is_safe) && is_over(key));
        aborted.collect()
    }

    /// Keeps an aborted transaction that a service still holds.
    pub(super) fn keep_untold(&mut self, key: TransactionKey) {
        self.untold.insert(key);
    }

    /// A service may hold less of the transaction than before, so it may be finished now.
    pub(super) fn look_again(&mut self, key: &TransactionKey) {
        self.aborting.extend(self.untold.take(key));
    }

    /// Writes that the transaction is finished, except at the `unresolved` services.
    pub(super) fn finish(&mut self, key: &TransactionKey, unresolved: &[ServiceName]) {
        self.waiting.remove(key);
        let Some(open) = self.open.get(key) else { return };
        let Some(decision) = open.decision.clone() else { return };
        let is_only_asked_about = open.is_only_asked_about;
        self.open.remove(key);
        if is_only_asked_about {
            return;
        }
        let finished = Finished { decision, unresolved: unresolved.to_vec() };
        if let Some(inherited) = self.inherited.get_mut(&key.id)
            && inherited.requested_at == key.requested_at
        {
            inherited.ended = Some(finished.clone());
        }
        self.endings.note(&key.id, self.end);
        self.write(&Entry::Finished(finished));
    }
}

impl Inherited {
    fn of(key: &TransactionKey, request_hash: RequestHash) -> Self {
        Self { requested_at: key.requested_at, request_hash, ended: None }
    }
}

/// The answer for a transaction that was already finished.
pub(super) fn answer_of(finished: &Finished) -> Answer {
    let Finished { decision, unresolved } = finished;
    Answer {
        id: decision.key.id.clone(),
        requested_at: decision.key.requested_at,
        outcome: decision.outcome,
        reason: decision.reason.clone(),
        unresolved: unresolved.clone(),
        decided_at: decision.decided_at,
    }
}
