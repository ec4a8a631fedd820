//! What an engine writes to its journal file, and what it knows from there.
//!
//! A transaction is in the file from its first prepare on: who was killed before that has asked
//! nobody for anything. Its decision counts when it is on the disk, and it is over when nothing is
//! left to be told to anyone.
//!
//! What is held here is what is in flight, and what the processes before this one have left.

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

/// In whose process a branch was made.
pub(super) enum Maker {
    /// In this one.
    Own,
    /// In one that had this journal open before.
    Earlier,
    /// In one that didn't, as far as this journal says.
    Stranger,
}

/// What the journal says of a transaction that is asked for.
pub(super) enum Earlier {
    /// Nothing.
    Nothing,
    /// It is in flight since then.
    InFlight(Time),
    /// It is over.
    Over(Finished),
    /// Another one has its id: what is asked for has other content.
    Another(TransactionKey),
}

/// Gathers what is to be written, and tells what the file says.
pub(super) struct JournalWriter {
    own: Incarnation,
    worker: WorkerId,
    endings: FinishedIndex,
    batch: EntryBatch,
    n_written: u64,
    /// Where the next entry will stand.
    end: u64,
    /// Where the first one will that was not handed out to be written.
    end_written: u64,
    /// The decisions that are not known to be on the disk, each with how many entries are when it
    /// is.
    awaited: VecDeque<(u64, Arc<Decision>)>,
    /// What no service was asked for yet.
    waiting: BTreeMap<TransactionKey, Request>,
    /// What is in the file and not over.
    open: BTreeMap<TransactionKey, Open>,
    /// What earlier processes have begun and this one ends.
    inherited: BTreeMap<TransactionId, Inherited>,
    /// What is aborted, and may not have been told to everyone yet.
    aborting: Vec<TransactionKey>,
    /// Of that: what a service holds though it has been told for long enough. It will ask.
    untold: BTreeSet<TransactionKey>,
    failure: Option<JournalError>,
}

#[derive(Default)]
struct Open {
    is_proposed: bool,
    /// Whether nobody has requested it: it was decided for who asked, and nobody else is told.
    is_only_asked_about: bool,
    /// Its outcome, once that is on the disk.
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

    /// What is to be written now, before anything else is asked of this.
    pub(super) fn take_batch(&mut self) -> Option<EntryBatch> {
        self.end_written = self.end;
        (!self.batch.is_empty()).then(|| std::mem::take(&mut self.batch))
    }

    /// Why it can't go on.
    pub(super) fn take_failure(&mut self) -> Option<JournalError> {
        self.failure.take()
    }

    /// What `found` has found; a failure ends everything.
    fn unless_failed<T>(&mut self, found: Result<Option<T>, JournalError>) -> Option<T> {
        found.unwrap_or_else(|failure| {
            self.failure.get_or_insert(failure);
            None
        })
    }

    /// What the journal says of a transaction that is asked for.
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

    /// What earlier processes have begun, and isn't in the file, is requested once more.
    pub(super) fn inherit(&mut self, key: &TransactionKey, request_hash: RequestHash) {
        self.inherited.insert(key.id.clone(), Inherited::of(key, request_hash));
    }

    /// How a transaction of an earlier process has ended, there or in this one, if that is known.
    pub(super) fn ending_of(&mut self, key: &TransactionKey) -> Option<Arc<Decision>> {
        let inherited = self.inherited.get(&key.id).and_then(|it| it.ended.as_ref());
        if let Some(finished) = inherited.filter(|it| it.decision.key == *key) {
            return Some(Arc::clone(&finished.decision));
        }
        let found = self.endings.find(&key.id);
        let found = self.unless_failed(found).map(|finished| finished.decision);
        found.filter(|decision| decision.key == *key)
    }

    /// How a transaction has ended that this process has begun and finished, if that is known.
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

    /// How often a request that `begun_by` has begun has been delivered by now: once for each time
    /// that the journal was opened since.
    pub(super) fn deliveries_of(&self, begun_by: &WorkerId) -> u32 {
        let begun_by = Incarnation::parse(begun_by.as_str());
        let n_since = begun_by.map_or(1, |it| self.own.number.saturating_sub(it.number).max(1));
        u32::try_from(n_since).unwrap_or(u32::MAX).saturating_add(1)
    }

    /// Takes in a request: what is in the file already is not written again.
    pub(super) fn take_in(&mut self, request: &Request) {
        if !self.open.contains_key(&request.key) {
            self.waiting.insert(request.key.clone(), request.clone());
        }
    }

    /// A service is asked to prepare it.
    pub(super) fn begin(&mut self, key: &TransactionKey) {
        let Some(request) = self.waiting.remove(key) else { return };
        self.open.insert(key.clone(), Open::default());
        let worker = self.worker.clone();
        self.write(&Entry::Begun(Begun { request, worker }));
    }

    /// Proposes to abort what a service has asked about and nobody works on.
    pub(super) fn propose_to_asker(&mut self, decision: Arc<Decision>) {
        if !self.open.contains_key(&decision.key) {
            let open = Open { is_only_asked_about: true, ..Open::default() };
            self.open.insert(decision.key.clone(), open);
            self.aborting.push(decision.key.clone());
        }
        self.propose(decision);
    }

    /// Proposes an outcome. One proposal is enough: this journal loses none.
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

    /// The first `n_safe` entries are on the disk: what is decided by that.
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

    /// Whether it is in the file and not over.
    pub(super) fn is_open(&self, key: &TransactionKey) -> bool {
        self.open.contains_key(key)
    }

    /// The outcome of what is in the file and not over, once that is on the disk.
    pub(super) fn decision_of(&self, key: &TransactionKey) -> Option<&Arc<Decision>> {
        self.open.get(key)?.decision.as_ref()
    }

    /// It is aborted: over, when everyone has been told.
    pub(super) fn aborted(&mut self, key: &TransactionKey) {
        self.waiting.remove(key);
        self.aborting.push(key.clone());
    }

    /// What is aborted, that is on the disk, and isn't worked on any more.
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

    /// It is aborted and isn't worked on any more, and a service still holds it.
    pub(super) fn keep_untold(&mut self, key: TransactionKey) {
        self.untold.insert(key);
    }

    /// A service has ended something about it: it may be over now.
    pub(super) fn look_again(&mut self, key: &TransactionKey) {
        self.aborting.extend(self.untold.take(key));
    }

    /// It is over, but for these services.
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

/// What is told of a transaction that was over before.
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
