//! Where an engine keeps its journal: in memory, or in a file as well.
//!
//! The engine does what the coordinator asks for. When a decision counts, what is known of a request
//! from before, and what earlier processes have left, are the backend's.

use std::sync::Arc;

use crate::{
    embedded::{
        MemberSettings, Settings,
        journal_writer::{Earlier, JournalWriter, Maker, answer_of},
        recovery::{Recovery, Step},
    },
    journal::{
        file::{Batch, JournalError, Unfinished},
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

/// A journal, and what follows from where it is kept. What has a body here is only for a journal
/// that outlives its process.
pub(super) trait Backend: Send {
    /// Appends what the coordinator proposes: the decision, if it counts at once.
    fn append(
        &mut self,
        decision: Arc<Decision>,
        is_worked_on: bool,
        is_in_flight: &dyn Fn(&TransactionKey) -> bool,
    ) -> Option<Arc<Decision>>;

    /// Every decision that counts and is still needed, in their order.
    fn history(&self) -> Vec<Arc<Decision>>;

    /// A transaction has its result.
    fn conclude(&mut self, now: Time, key: &TransactionKey, answer: &Answer);

    // ---- Writing -----------------------------------------------------------------------------

    /// What is to be written now.
    fn take_batch(&mut self) -> Option<Batch> {
        None
    }

    /// Why the journal can't be used any more.
    fn take_failure(&mut self) -> Option<JournalError> {
        None
    }

    /// So many of the entries that were taken are on the disk: what counts by that.
    fn safe(&mut self, _n_safe: u64) -> Vec<Arc<Decision>> {
        Vec::new()
    }

    // ---- A transaction's way -----------------------------------------------------------------

    /// What becomes of a transaction that is asked for now.
    fn admit(&mut self, now: Time, _spec: &TransactionSpec) -> Admission {
        Admission::Request { requested_at: now, deliveries: 1 }
    }

    /// Takes in a request.
    fn take_in(&mut self, _request: &Request) {}

    /// A service is asked to prepare it.
    fn begin(&mut self, _key: &TransactionKey) {}

    /// A service has ended something about it.
    fn look_again(&mut self, _key: &TransactionKey) {}

    /// Notes the aborts that are over: those of which every service has been told. `is_over` tells
    /// what the coordinator has given up telling; a service that holds it still asks then, and the
    /// journal must know.
    fn note_aborted(
        &mut self,
        _now: Time,
        _is_over: &dyn Fn(&TransactionKey) -> bool,
        _is_held_at: &dyn Fn(usize, &TransactionKey) -> bool,
    ) {
    }

    // ---- What earlier processes have left ----------------------------------------------------

    /// Whether the services' stores are still being read, so that no requests are taken.
    fn is_looking(&self) -> bool {
        false
    }

    /// Whether nothing of it is left to do.
    fn is_idle(&self) -> bool {
        true
    }

    /// When the next task may be due though nothing has happened. `is_idle`: whether nothing else is
    /// under way.
    fn next_deadline(&self, _is_idle: bool) -> Option<Time> {
        None
    }

    /// What is to be done next.
    fn next_task(&mut self, _now: Time, _is_idle: bool) -> Option<Task> {
        None
    }

    /// No more requests come: what was not requested by now is given up.
    fn requests_ended(&mut self) {}

    /// What the store of a member holds.
    fn heard(&mut self, _member: usize, _held: &[InDoubt]) {}

    /// What is known of a branch that a service asks about, and that the coordinator doesn't see.
    fn look_up(&mut self, _inquiry: &Inquiry) -> LookUp {
        LookUp::Nothing
    }

    /// A task to ask can't be done: nobody knows the answer.
    fn leave(&mut self, _now: Time, _member: usize, _key: &TransactionKey) {}

    /// A member has ended what it held of a transaction.
    fn done(&mut self, _now: Time, _member: usize, _key: &TransactionKey) {}

    /// A member has failed to end it, and the coordinator will not tell it again.
    fn failed(&mut self, _now: Time, _member: usize, _key: &TransactionKey) {}
}

/// What becomes of a transaction that is asked for.
pub(super) enum Admission {
    /// It is requested: since then, and by then delivered so often.
    Request { requested_at: Time, deliveries: u32 },
    /// It is over.
    Over(Answer),
    /// Another transaction has its id.
    Another(TransactionKey),
    /// That can't be told: the journal has failed.
    Unknown,
}

/// What is to be done for what earlier processes have left.
pub(super) enum Task {
    /// Request these again; each was delivered so often by then.
    Request(Vec<(Request, u32)>),
    /// Ask what became of a branch of this member.
    Ask(usize, Inquiry),
}

/// What a journal knows of a branch that the coordinator doesn't see.
pub(super) enum LookUp {
    /// Nothing that the coordinator isn't to find out by itself.
    Nothing,
    /// This was decided: the coordinator is to read it again.
    Decided(Arc<Decision>),
    /// It was not decided, and nobody is left who would.
    Undecided,
    /// It can't be told in this process.
    Unknown,
}

/// The journal in memory: a decision counts when it is made, and nothing is known from before.
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

/// The journal in a file: a decision counts when it is on the disk.
pub(super) struct FileBackend {
    /// What counts and is not over.
    journal: MemoryJournal,
    writer: JournalWriter,
    /// `None` when nothing of what earlier processes have left is to be done.
    recovery: Option<Recovery>,
    /// What this process calls its instances.
    own: InstanceId,
    members: Vec<ServiceName>,
}

impl FileBackend {
    pub(super) fn new(
        now: Time,
        settings: &Settings,
        members: &[MemberSettings],
        writer: JournalWriter,
        unfinished: Vec<Unfinished>,
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

    /// Whether an earlier process has begun it and its outcome is not known, so that it may be
    /// requested once more.
    fn may_be_requested(&mut self, doubt: &InDoubt) -> bool {
        let writer = &mut self.writer;
        !writer.is_open(&doubt.key)
            && matches!(writer.maker_of(&doubt.branch), Maker::Earlier)
            && writer.ending_of(&doubt.key).is_none()
            && !writer.has_failed()
    }

    /// The request that an earlier process has begun, with how often it was delivered by now.
    fn again(&self, unfinished: Unfinished) -> (Request, u32) {
        let Unfinished { request, begun_by, .. } = unfinished;
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
                // Nobody waits for what is parked.
                for service in &answer.unresolved {
                    if let Some(member) = self.members.iter().position(|it| it == service) {
                        self.done(now, member, key);
                    }
                }
            }
            // A result is out before the services have heard of an abort.
            Outcome::Aborted => self.writer.aborted(key),
        }
    }

    fn take_batch(&mut self) -> Option<Batch> {
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
        // As on the wire, and in every store.
        let requested_at = Time::from_millis(now.as_millis() / 1000 * 1000);
        match self.writer.earlier(spec) {
            Earlier::Nothing if self.writer.has_failed() => Admission::Unknown,
            Earlier::Nothing => {
                let recovery = self.recovery.as_mut();
                match recovery.and_then(|it| it.adopt(&spec.id, spec.request_hash)) {
                    None => Admission::Request { requested_at, deliveries: 1 },
                    // Its request was lost, and what was prepared for it was not.
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
                    // Only its store holds it: nobody but this will ask again soon.
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
                        tracing::error!(%service, "it doesn't tell what it holds in doubt");
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
                        tracing::error!(n_left, "branches are left in doubt until the next start");
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

    fn heard(&mut self, member: usize, held: &[InDoubt]) {
        if let Some(recovery) = &mut self.recovery {
            // What this process has made, it knows of.
            let of_others = held.iter().filter(|it| *it.branch.instance() != self.own);
            recovery.heard(member, of_others.cloned());
        }
    }

    fn look_up(&mut self, inquiry: &Inquiry) -> LookUp {
        let Inquiry { key, service, branch, .. } = inquiry;
        // What is decided and not over is in the journal, however much was decided since.
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
                // It was over, and isn't: it has to be told again.
                let _entered = spans::finish(Some(service), key).entered();
                tracing::warn!(%branch, "what was finished is in doubt");
                LookUp::Decided(decision)
            }
            (None, Maker::Own | Maker::Earlier) if self.writer.has_failed() => LookUp::Unknown,
            // The process that has begun it has ended, and no other has this journal: if it isn't
            // decided now, it never will be.
            (None, Maker::Earlier) => LookUp::Undecided,
            (None, Maker::Own) => {
                let _entered = spans::finish(Some(service), key).entered();
                tracing::error!(
                    %branch,
                    "left in doubt until the next start: it was finished too long ago"
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
