//! Where an engine keeps its journal: in memory, or also in a file.
//!
//! The engine does what the coordinator asks for. The backend knows when a decision counts, what the
//! journal says about a request, and what earlier processes have left.

use std::sync::Arc;

use crate::{
    embedded::{
        MemberSettings, Settings,
        journal_writer::{Earlier, JournalWriter, Maker, answer_of},
        recovery::{Recovery, Step},
    },
    journal::{
        file::{EntryBatch, JournalError, UnfinishedTransaction},
        memory::MemoryJournal,
    },
    participant::spans,
    protocol::{
        ids::{InstanceId, ServiceName, TransactionKey},
        message::{Answer, Decision, Inquiry, Outcome, Request, TransactionSpec},
        participant::InDoubt,
        time::Time,
    },
};

/// A journal, and what depends on where it is kept. The methods with a default are only for a journal
/// that outlives its process.
pub(super) trait Backend: Send {
    /// Appends a decision that the coordinator proposes, and returns it if it counts at once.
    fn append(
        &mut self,
        decision: Arc<Decision>,
        is_worked_on: bool,
        is_in_flight: &dyn Fn(&TransactionKey) -> bool,
    ) -> Option<Arc<Decision>>;

    /// The decisions that count and are still needed, in order.
    fn history(&self) -> Vec<Arc<Decision>>;

    /// A transaction has ended with this result.
    fn conclude(&mut self, now: Time, key: &TransactionKey, answer: &Answer);

    // ---- Writing -----------------------------------------------------------------------------

    /// The entries that are to be written now.
    fn take_batch(&mut self) -> Option<EntryBatch> {
        None
    }

    /// The error that makes the journal unusable.
    fn take_failure(&mut self) -> Option<JournalError> {
        None
    }

    /// The first `_n_safe` entries are on disk; returns the decisions that count by that.
    fn safe(&mut self, _n_safe: u64) -> Vec<Arc<Decision>> {
        Vec::new()
    }

    // ---- The steps of a transaction ----------------------------------------------------------

    /// Decides what to do with a transaction that is submitted now.
    fn admit(&mut self, now: Time, _spec: &TransactionSpec) -> Admission {
        Admission::Request { requested_at: now, deliveries: 1 }
    }

    /// A request is passed to the coordinator.
    fn take_in(&mut self, _request: &Request) {}

    /// The first prepare of a transaction is sent.
    fn begin(&mut self, _key: &TransactionKey) {}

    /// A service may hold less of a transaction than before.
    fn look_again(&mut self, _key: &TransactionKey) {}

    /// Notes the aborted transactions that are finished at every service. `is_over`: whether the
    /// coordinator is done with one; a service that still holds it will inquire, and the journal must be
    /// able to answer.
    fn note_aborted(
        &mut self,
        _now: Time,
        _is_over: &dyn Fn(&TransactionKey) -> bool,
        _is_held_at: &dyn Fn(usize, &TransactionKey) -> bool,
    ) {
    }

    // ---- What earlier processes have left ----------------------------------------------------

    /// Whether the services' stores are still being read; until then, no requests are taken.
    fn is_looking(&self) -> bool {
        false
    }

    /// Whether nothing is left to do.
    fn is_idle(&self) -> bool {
        true
    }

    /// When the next task is due if no event comes before. `is_idle`: whether nothing else is in progress.
    fn next_deadline(&self, _is_idle: bool) -> Option<Time> {
        None
    }

    /// The next task.
    fn next_task(&mut self, _now: Time, _is_idle: bool) -> Option<Task> {
        None
    }

    /// There are no more requests: transactions that were not requested once more are aborted.
    fn requests_ended(&mut self) {}

    /// The store of a member holds these branches.
    fn store_scanned(&mut self, _member: usize, _held: &[InDoubt]) {}

    /// Looks up a branch that a service inquires about and that the coordinator has not in view.
    fn look_up(&mut self, _inquiry: &Inquiry) -> LookUp {
        LookUp::Nothing
    }

    /// The inquiry of a task can't be answered.
    fn leave(&mut self, _now: Time, _member: usize, _key: &TransactionKey) {}

    /// A member has finished what it held of a transaction.
    fn done(&mut self, _now: Time, _member: usize, _key: &TransactionKey) {}

    /// A member has failed to finish a transaction, and the coordinator will not try again.
    fn failed(&mut self, _now: Time, _member: usize, _key: &TransactionKey) {}
}

/// What to do with a submitted transaction.
pub(super) enum Admission {
    /// Pass it to the coordinator, with this time and count of deliveries.
    Request { requested_at: Time, deliveries: u32 },
    /// Answer it: it has already ended.
    Over(Answer),
    /// Reject it: another transaction has its id.
    Another(TransactionKey),
    /// Nothing: the journal has failed.
    Unknown,
}

/// A task for what earlier processes have left.
pub(super) enum Task {
    /// Request these again, each with its count of deliveries.
    Request(Vec<(Request, u32)>),
    /// Make an inquiry about a branch of this member.
    Ask(usize, Inquiry),
}

/// What a journal knows about a branch that the coordinator has not in view.
pub(super) enum LookUp {
    /// Nothing more than the coordinator will find out itself.
    Nothing,
    /// Its decision, which the coordinator must read again.
    Decided(Arc<Decision>),
    /// It is undecided, and no process is left that could decide it.
    Undecided,
    /// Its outcome is unknown in this process.
    Unknown,
}

/// The journal in memory: a decision counts at once, and there are no earlier processes.
#[derive(Default)]
pub(super) struct MemoryBackend(MemoryJournal);

impl Backend for MemoryBackend {
    fn append(
        &mut self,
        decision: Arc<Decision>,
        _is_worked_on: bool,
        is_in_flight: &dyn Fn(&TransactionKey) -> bool,
    ) -> Option<Arc<Decision>> {
        self.0.append(Arc::clone(&decision), is_in_flight);
        Some(decision)
    }

    fn history(&self) -> Vec<Arc<Decision>> {
        self.0.replay()
    }

    fn conclude(&mut self, _now: Time, key: &TransactionKey, _answer: &Answer) {
        self.0.release(key);
    }
}

/// The journal in a file: a decision counts when it is on disk.
pub(super) struct FileBackend {
    /// The decisions that count and are not finished.
    journal: MemoryJournal,
    writer: JournalWriter,
    /// `None` when nothing is left to do for earlier processes.
    recovery: Option<Recovery>,
    /// The instance id of this process.
    own: InstanceId,
    members: Vec<ServiceName>,
}

impl FileBackend {
    pub(super) fn new(
        now: Time,
        settings: &Settings,
        members: &[MemberSettings],
        writer: JournalWriter,
        unfinished: Vec<UnfinishedTransaction>,
    ) -> Self {
        let mut journal = MemoryJournal::default();
        for decision in unfinished.iter().filter_map(|it| it.decision.as_ref()) {
            journal.append(Arc::clone(decision), |_| true);
        }
        let with_stores = members.iter().enumerate().filter(|(_, member)| member.has_store);
        let with_stores = with_stores.map(|(number, _)| number).collect();
        let patience = 4 * settings.coordinator.finish_timeout;
        Self {
            journal,
            writer,
            recovery: Some(Recovery::new(now, patience, unfinished, with_stores)),
            own: settings.instance.clone(),
            members: members.iter().map(|member| member.name.clone()).collect(),
        }
    }

    /// Whether an earlier process has started the transaction and its outcome is unknown, so that it may
    /// be requested once more.
    fn may_be_requested(&mut self, doubt: &InDoubt) -> bool {
        let writer = &mut self.writer;
        !writer.is_open(&doubt.key)
            && matches!(writer.maker_of(&doubt.branch), Maker::Earlier)
            && writer.ending_of(&doubt.key).is_none()
            && !writer.has_failed()
    }

    /// A request that an earlier process has started, with its count of deliveries.
    fn again(&self, unfinished: UnfinishedTransaction) -> (Request, u32) {
        let UnfinishedTransaction { request, begun_by, .. } = unfinished;
        (request, self.writer.deliveries_of(&begun_by))
    }

    fn inquiry(&self, member: usize, doubt: InDoubt) -> Inquiry {
        let InDoubt { key, request_hash, branch, deadline } = doubt;
        let (service, instance) = (self.members[member].clone(), self.own.clone());
        Inquiry { key, request_hash, service, instance, branch, deadline }
    }
}

impl Backend for FileBackend {
    fn append(
        &mut self,
        decision: Arc<Decision>,
        is_worked_on: bool,
        _is_in_flight: &dyn Fn(&TransactionKey) -> bool,
    ) -> Option<Arc<Decision>> {
        if is_worked_on {
            self.writer.propose(decision);
        } else {
            self.writer.propose_to_asker(decision);
        }
        None
    }

    fn history(&self) -> Vec<Arc<Decision>> {
        self.journal.replay()
    }

    fn conclude(&mut self, now: Time, key: &TransactionKey, answer: &Answer) {
        match answer.outcome {
            Outcome::Committed => {
                self.writer.finish(key, &answer.unresolved);
                self.journal.release(key);
                // Recovery doesn't wait for parked commits.
                for service in &answer.unresolved {
                    if let Some(member) = self.members.iter().position(|it| it == service) {
                        self.done(now, member, key);
                    }
                }
            }
            // The result of an abort is out before the services have aborted.
            Outcome::Aborted => self.writer.aborted(key),
        }
    }

    fn take_batch(&mut self) -> Option<EntryBatch> {
        self.writer.take_batch()
    }

    fn take_failure(&mut self) -> Option<JournalError> {
        self.writer.take_failure()
    }

    fn safe(&mut self, n_safe: u64) -> Vec<Arc<Decision>> {
        let Self { journal, writer, .. } = self;
        let decided = writer.safe(n_safe);
        for decision in &decided {
            journal.append(Arc::clone(decision), |key| writer.is_open(key));
        }
        decided
    }

    fn admit(&mut self, now: Time, spec: &TransactionSpec) -> Admission {
        // In whole seconds, as on the wire and in every store.
        let requested_at = Time::from_millis(now.as_millis() / 1000 * 1000);
        match self.writer.earlier(spec) {
            Earlier::Nothing if self.writer.has_failed() => Admission::Unknown,
            Earlier::Nothing => {
                let recovery = self.recovery.as_mut();
                match recovery.and_then(|it| it.adopt(&spec.id, spec.request_hash)) {
                    None => Admission::Request { requested_at, deliveries: 1 },
                    // Its request was lost, but not what was prepared for it.
                    Some(requested_at) => {
                        let key = TransactionKey { id: spec.id.clone(), requested_at };
                        self.writer.inherit(&key, spec.request_hash);
                        Admission::Request { requested_at, deliveries: 2 }
                    }
                }
            }
            Earlier::InFlight(requested_at) => Admission::Request { requested_at, deliveries: 1 },
            Earlier::Over(finished) => Admission::Over(answer_of(&finished)),
            Earlier::Another(key) => Admission::Another(key),
        }
    }

    fn take_in(&mut self, request: &Request) {
        self.writer.take_in(request);
    }

    fn begin(&mut self, key: &TransactionKey) {
        self.writer.begin(key);
    }

    fn look_again(&mut self, key: &TransactionKey) {
        self.writer.look_again(key);
    }

    fn note_aborted(
        &mut self,
        now: Time,
        is_over: &dyn Fn(&TransactionKey) -> bool,
        is_held_at: &dyn Fn(usize, &TransactionKey) -> bool,
    ) {
        for key in self.writer.take_aborted(is_over) {
            let mut is_held = false;
            for member in 0..self.members.len() {
                if is_held_at(member, &key) {
                    is_held = true;
                } else if let Some(recovery) = &mut self.recovery
                    && recovery.awaits(member, &key)
                {
                    // Only its store holds it, so no other inquiry will come soon.
                    is_held = true;
                    recovery.failed(now, member, &key);
                }
            }
            if is_held {
                self.writer.keep_untold(key);
            } else {
                self.writer.finish(&key, &[]);
                self.journal.release(&key);
            }
        }
    }

    fn is_looking(&self) -> bool {
        self.recovery.as_ref().is_some_and(Recovery::is_looking)
    }

    fn is_idle(&self) -> bool {
        self.recovery.is_none()
    }

    fn next_deadline(&self, is_idle: bool) -> Option<Time> {
        self.recovery.as_ref().and_then(|it| it.next_deadline(is_idle))
    }

    fn next_task(&mut self, now: Time, is_idle: bool) -> Option<Task> {
        loop {
            match self.recovery.as_mut()?.step(now, is_idle) {
                Step::Wait => return None,
                Step::Request { unfinished, silent } => {
                    for member in silent {
                        let service = &self.members[member];
                        tracing::error!(
                            %service,
                            "the service did not say in time what it holds in doubt; continuing \
                             without that: the next start asks it again"
                        );
                    }
                    let requests = unfinished.into_iter().map(|it| self.again(it));
                    return Some(Task::Request(requests.collect()));
                }
                Step::Ask(member, doubt) if self.may_be_requested(&doubt) => {
                    self.recovery.as_mut()?.defer(member, doubt);
                }
                Step::Ask(member, doubt) | Step::GiveUp(member, doubt) => {
                    return Some(Task::Ask(member, self.inquiry(member, doubt)));
                }
                Step::End { n_left } => {
                    if n_left > 0 {
                        tracing::error!(
                            branches = n_left,
                            "some branches stay in doubt: fix what the errors say, and run again with \
                             this journal"
                        );
                    }
                    self.recovery = None;
                }
            }
        }
    }

    fn requests_ended(&mut self) {
        if let Some(recovery) = &mut self.recovery {
            recovery.requests_ended();
        }
    }

    fn store_scanned(&mut self, member: usize, held: &[InDoubt]) {
        if let Some(recovery) = &mut self.recovery {
            // This process knows its own branches.
            let of_others = held.iter().filter(|doubt| *doubt.branch.instance() != self.own);
            recovery.store_scanned(member, of_others.cloned());
        }
    }

    fn look_up(&mut self, inquiry: &Inquiry) -> LookUp {
        let Inquiry { key, service, branch, .. } = inquiry;
        // Unfinished decisions stay in the journal's view, however many were made since.
        if self.writer.decision_of(key).is_some() {
            return LookUp::Nothing;
        }
        let maker = self.writer.maker_of(branch);
        let ending = match maker {
            Maker::Own => self.writer.own_ending_of(key),
            Maker::Earlier => self.writer.ending_of(key),
            Maker::Stranger => None,
        };
        match (ending, maker) {
            (Some(decision), _) => {
                // It counted as finished but is not, so it must be finished again.
                let _entered = spans::finish(Some(service), key).entered();
                tracing::warn!(
                    %branch,
                    "a service holds a branch that had been finished; it is finished again (was the \
                     store restored from a copy?)"
                );
                LookUp::Decided(decision)
            }
            (None, Maker::Own | Maker::Earlier) if self.writer.has_failed() => LookUp::Unknown,
            // The process that started it has ended, and no other process has this journal: if it is
            // undecided now, it stays so.
            (None, Maker::Earlier) => LookUp::Undecided,
            (None, Maker::Own) => {
                let _entered = spans::finish(Some(service), key).entered();
                tracing::error!(
                    %branch,
                    "a branch stays in doubt: its transaction was finished too long ago for this \
                     process to remember; run again with this journal to finish it"
                );
                LookUp::Unknown
            }
            (None, Maker::Stranger) => {
                let _entered = spans::finish(Some(service), key).entered();
                tracing::error!(
                    %branch,
                    "a branch stays in doubt: it was prepared under another journal, which alone knows \
                     its outcome. Run with that journal to finish it; if it is lost, find out from the \
                     transaction's other services how it ended, and commit or undo the branch in the \
                     store of this service"
                );
                LookUp::Unknown
            }
        }
    }

    fn leave(&mut self, now: Time, member: usize, key: &TransactionKey) {
        if let Some(recovery) = &mut self.recovery {
            recovery.leave(now, member, key);
        }
    }

    fn done(&mut self, now: Time, member: usize, key: &TransactionKey) {
        if let Some(recovery) = &mut self.recovery {
            recovery.done(now, member, key);
        }
    }

    fn failed(&mut self, now: Time, member: usize, key: &TransactionKey) {
        if let Some(recovery) = &mut self.recovery {
            recovery.failed(now, member, key);
        }
    }
}
