//! Protocol bugs, chosen at run time, as wrappers around the unmodified cores: they show that the
//! checks of the model and of the simulator can fail.
//!
//! A bug changes events on their way in or effects on their way out, and may keep a little state.
//! It never changes a core. Without a bug a wrapper passes everything through.

#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "a bug concerns few events and effects, and lets the others pass"
)]
#![allow(dead_code, reason = "each test target that includes this file uses what it needs")]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use dtc::protocol::{
    coordinator::{self, Coordinator},
    ids::{Branch, RequestHash, ServiceName, TransactionKey, WorkerId},
    message::{
        Answer, Command, Decision, Delivery, Destination, Finish, Outcome, ReasonCode, Vote,
        VoteKind,
    },
    participant::{self, Instance, Verdict},
    time::Time,
};

/// A protocol bug.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) enum Bug {
    /// A worker acks the request when it sends the result, not when the result is confirmed.
    AckBeforeResult,
    /// A worker acks a request that it is working on already, before there is a result.
    AckDuplicateAtOnce,
    /// A worker takes its own proposal for the outcome without reading it back.
    ActOnSentDecision,
    /// A worker publishes the result together with its proposal.
    PublishWithProposal,
    /// A worker tells the producer what it proposed last, not what it read back.
    AnswerWithOwnProposal,
    /// A worker uses the last record of a transaction instead of the first.
    LastRecordWins,
    /// A worker proposes to commit without naming a branch.
    CommitWithoutBranches,
    /// A worker proposes to commit when the deadline passes without a refusal.
    MissingVoteIsYes,
    /// A worker takes a refusal for a service that has nothing to commit.
    RefusalIsReadOnly,
    /// A worker gives up a commit that failed by aborting it.
    AbortAfterFailedCommit,
    /// A worker that starts reads the journal from its end and claims to have read it all.
    AttachAtNext,
    /// A worker trusts a view, or a look further back, that starts too late.
    TrustLateView,
    /// A worker reads the journal on from its end after a break, as if nothing lay in between.
    SkipAfterReconnect,
    /// A worker counts an offset for each record, though a message is one offset.
    OffsetPerRecord,
    /// A worker treats everything outside its view as absent, even what it has a digest of.
    NeverLookBack,
    /// A worker that looks further back leaves out the last message before its view: one that is
    /// forgotten in part.
    LookTooShort,
    /// A worker answers an inquiry with an abort, without asking the journal.
    PresumeAbort,
    /// A worker counts votes for a request with other content.
    VoteForOtherContent,
    /// A worker that doesn't read its proposal back never proposes again.
    ProposeOnce,
    /// A worker that commits what may be parked settles it only if it got the parked command.
    SettleOnlyWhatIsQueued,
    /// A worker parks a commit without leaving the command in the service's durable queue.
    ForgetParkedCommand,
    /// An instance votes prepared though its store was never asked to write anything.
    VoteWithoutStoring,
    /// An instance commits whatever it holds, whichever branch the commit names.
    CommitWhateverIsHeld,
    /// An instance forgets what it has finished, refused or got a cancel for.
    DropTombstone,
    /// A cancel makes an instance undo what it has prepared.
    CancelUndoesPrepared,
    /// An instance frees the slot when it votes.
    FreeSlotAtVote,
    /// An instance without an outcome for long aborts instead of inquiring.
    DecideAlone,
    /// An instance never inquires about what it holds.
    NeverInquire,
    /// An instance that votes again names another branch.
    FreshBranchInEveryVote,
    /// An instance never searches its store for earlier branches.
    NeverScanStore,
}

impl Bug {
    /// All of them.
    pub(crate) const ALL: [Self; 30] = [
        Self::AckBeforeResult,
        Self::AckDuplicateAtOnce,
        Self::ActOnSentDecision,
        Self::PublishWithProposal,
        Self::AnswerWithOwnProposal,
        Self::LastRecordWins,
        Self::CommitWithoutBranches,
        Self::MissingVoteIsYes,
        Self::RefusalIsReadOnly,
        Self::AbortAfterFailedCommit,
        Self::AttachAtNext,
        Self::TrustLateView,
        Self::SkipAfterReconnect,
        Self::OffsetPerRecord,
        Self::NeverLookBack,
        Self::LookTooShort,
        Self::PresumeAbort,
        Self::VoteForOtherContent,
        Self::ProposeOnce,
        Self::SettleOnlyWhatIsQueued,
        Self::ForgetParkedCommand,
        Self::VoteWithoutStoring,
        Self::CommitWhateverIsHeld,
        Self::DropTombstone,
        Self::CancelUndoesPrepared,
        Self::FreeSlotAtVote,
        Self::DecideAlone,
        Self::NeverInquire,
        Self::FreshBranchInEveryVote,
        Self::NeverScanStore,
    ];
}

/// A coordinator, with or without a bug.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Worker {
    core: Coordinator,
    bug: Option<Bug>,
    is_attached: bool,
    /// Records that were skipped unnoticed: the core counts offsets without them.
    skipped: u64,
    /// How far the core's offsets are ahead of the journal's; wraps.
    surplus: u64,
    /// The requests in progress.
    requests: BTreeMap<TransactionKey, (RequestHash, BTreeSet<Delivery>)>,
    proposed: BTreeMap<TransactionKey, Outcome>,
    latest: BTreeMap<TransactionKey, Decision>,
    votes: BTreeMap<TransactionKey, BTreeMap<ServiceName, Branch>>,
    history: Vec<Arc<Decision>>,
    /// Whether the present event is the done of a parked command.
    is_queued: bool,
}

impl Worker {
    /// A worker with nothing to do, that has read nothing.
    pub(crate) fn new(settings: coordinator::Settings, bug: Option<Bug>) -> Self {
        Self {
            core: Coordinator::new(settings),
            bug,
            is_attached: false,
            skipped: 0,
            surplus: 0,
            requests: BTreeMap::new(),
            proposed: BTreeMap::new(),
            latest: BTreeMap::new(),
            votes: BTreeMap::new(),
            history: Vec::new(),
            is_queued: false,
        }
    }

    /// The core inside.
    pub(crate) fn core(&self) -> &Coordinator {
        &self.core
    }

    /// The offset at which the transport starts to read for it, at its start or after a break,
    /// where `wanted` would be right and the journal ends before `end`.
    ///
    /// A world that doesn't call this can't show [`Bug::AttachAtNext`] and
    /// [`Bug::SkipAfterReconnect`].
    pub(crate) fn reads_from(&mut self, wanted: u64, end: u64) -> u64 {
        let wanted = wanted + self.skipped;
        self.surplus = 0;
        match self.bug {
            Some(Bug::AttachAtNext) if !self.is_attached => end,
            Some(Bug::SkipAfterReconnect) if self.is_attached => {
                self.skipped += end.saturating_sub(wanted);
                end
            }
            _ => wanted,
        }
    }

    /// Takes in one event and appends what must now be done, in order, to `effects`.
    pub(crate) fn handle(
        &mut self,
        now: Time,
        event: coordinator::Event,
        effects: &mut Vec<coordinator::Effect>,
    ) {
        let Some(bug) = self.bug else { return self.core.handle(now, event, effects) };
        let mut pending = VecDeque::new();
        self.let_in(bug, event, &mut pending, effects);
        while let Some(mut event) = pending.pop_front() {
            if let coordinator::Event::RecordsRead { offset, .. } = &mut event
                && bug == Bug::ActOnSentDecision
                && *offset == SENT
            {
                *offset = self.core.next_offset();
            }
            let mut wanted = Vec::new();
            self.core.handle(now, event, &mut wanted);
            for effect in wanted {
                self.let_out(bug, effect, &mut pending, effects);
            }
        }
    }

    fn let_in(
        &mut self,
        bug: Bug,
        event: coordinator::Event,
        pending: &mut VecDeque<coordinator::Event>,
        effects: &mut Vec<coordinator::Effect>,
    ) {
        use coordinator::{Effect, Event};
        self.take_note(bug, &event);
        match (bug, event) {
            (Bug::AttachAtNext | Bug::TrustLateView, Event::JournalAttached { next, .. }) => {
                pending.push_back(Event::JournalAttached { next, since: Time::EPOCH });
            }
            (Bug::TrustLateView, Event::HistoryEnded { .. }) => {
                pending.push_back(Event::HistoryEnded { reaches: Some(Time::EPOCH) });
            }
            (Bug::SkipAfterReconnect, Event::RecordsRead { offset, decisions }) => {
                let offset = offset - self.skipped;
                pending.push_back(Event::RecordsRead { offset, decisions });
            }
            (Bug::OffsetPerRecord, Event::RecordsRead { offset, decisions }) => {
                let counted = offset.wrapping_add(self.surplus);
                self.surplus = self.surplus.wrapping_add(decisions.len() as u64).wrapping_sub(1);
                pending.extend((counted..).zip(decisions).map(|(offset, decision)| {
                    Event::RecordsRead { offset, decisions: vec![decision] }
                }));
            }
            (Bug::LastRecordWins, Event::HistoryRead(decision)) => self.history.push(decision),
            (Bug::LastRecordWins, ended @ Event::HistoryEnded { .. }) => {
                let records = std::mem::take(&mut self.history);
                pending.extend(records.into_iter().rev().map(Event::HistoryRead));
                pending.push_back(ended);
            }
            (Bug::RefusalIsReadOnly, Event::VoteReceived(vote)) => {
                let kind = match vote.kind {
                    VoteKind::Refused(_) => VoteKind::ReadOnly,
                    other => other,
                };
                pending.push_back(Event::VoteReceived(Vote { kind, ..vote }));
            }
            (Bug::VoteForOtherContent, Event::VoteReceived(mut vote)) => {
                if let Some((request_hash, _)) = self.requests.get(&vote.key) {
                    vote.request_hash = *request_hash;
                }
                pending.push_back(Event::VoteReceived(vote));
            }
            (Bug::AckDuplicateAtOnce, Event::RequestReceived { request, delivery, deliveries }) => {
                if self.core.phase_of(&request.key).is_some() {
                    effects.push(Effect::Ack(delivery));
                }
                pending.push_back(Event::RequestReceived { request, delivery, deliveries });
            }
            (Bug::PresumeAbort, Event::InquiryReceived(inquiry))
                if self.core.phase_of(&inquiry.key).is_none() =>
            {
                let finish = abort(inquiry.key, inquiry.branch);
                let to = Destination::Instance(inquiry.instance);
                let command = Command::Finish(finish);
                effects.push(Effect::Send { service: inquiry.service, to, command });
            }
            (Bug::AbortAfterFailedCommit, Event::DoneReceived { done, delivery }) => {
                let branches = self.latest.get(&done.key);
                let branch = branches.and_then(|it| it.branch_of(&done.service)).cloned();
                if let (Err(_), Some(branch)) = (&done.applied, branch) {
                    let service = done.service.clone();
                    let to = Destination::Instance(done.instance.clone());
                    let command = Command::Finish(abort(done.key.clone(), branch));
                    effects.push(Effect::Send { service, to, command });
                }
                pending.push_back(Event::DoneReceived { done, delivery });
            }
            (_, event) => pending.push_back(event),
        }
    }

    /// Keeps what the bug will need: a worker without that bug keeps nothing, so that the model
    /// sees equal states as equal.
    fn take_note(&mut self, bug: Bug, event: &coordinator::Event) {
        use coordinator::Event;
        match (bug, event) {
            (Bug::AttachAtNext | Bug::SkipAfterReconnect, Event::JournalAttached { .. }) => {
                self.is_attached = true;
            }
            (
                Bug::PublishWithProposal | Bug::VoteForOtherContent,
                Event::RequestReceived { request, delivery, .. },
            ) => {
                let asked = || (request.request_hash, BTreeSet::new());
                let entry = self.requests.entry(request.key.clone());
                entry.or_insert_with(asked).1.insert(*delivery);
            }
            (Bug::SettleOnlyWhatIsQueued, event) => {
                self.is_queued = matches!(event, Event::DoneReceived { done, .. } if done.parked);
            }
            (Bug::PublishWithProposal, Event::Disconnected) => self.requests.clear(),
            (
                Bug::LastRecordWins | Bug::AbortAfterFailedCommit,
                Event::RecordsRead { decisions, .. },
            ) => {
                let latest = decisions.iter().map(|it| (it.key.clone(), Decision::clone(it)));
                self.latest.extend(latest);
            }
            (Bug::MissingVoteIsYes, Event::VoteReceived(vote)) => {
                if let VoteKind::Prepared { branch } = &vote.kind {
                    let votes = self.votes.entry(vote.key.clone()).or_default();
                    votes.insert(vote.service.clone(), branch.clone());
                }
            }
            _ => {}
        }
    }

    fn let_out(
        &mut self,
        bug: Bug,
        effect: coordinator::Effect,
        pending: &mut VecDeque<coordinator::Event>,
        effects: &mut Vec<coordinator::Effect>,
    ) {
        use coordinator::{Effect, Event};
        match (bug, effect) {
            (Bug::AckBeforeResult, Effect::Publish { key, delivery, answer }) => {
                effects.push(Effect::Ack(delivery));
                effects.push(Effect::Publish { key, delivery, answer });
            }
            (Bug::ActOnSentDecision, Effect::Append(decision)) => {
                effects.push(Effect::Append(decision.clone()));
                let decisions = vec![Arc::new(decision)];
                pending.push_back(Event::RecordsRead { offset: SENT, decisions });
            }
            (Bug::SettleOnlyWhatIsQueued, Effect::Settle { .. }) if !self.is_queued => {}
            (Bug::NeverLookBack, Effect::ReadHistory { from, .. }) => {
                pending.push_back(Event::HistoryEnded { reaches: Some(from) });
            }
            (Bug::LookTooShort, Effect::ReadHistory { from, until }) => {
                effects.push(Effect::ReadHistory { from, until: until.saturating_sub(1) });
            }
            (Bug::PublishWithProposal, Effect::Append(decision)) => {
                effects.push(Effect::Append(decision.clone()));
                let deliveries = self.requests.get(&decision.key).map(|(_, them)| them.clone());
                for delivery in deliveries.into_iter().flatten() {
                    let (key, answer) = (decision.key.clone(), answer(&decision));
                    effects.push(Effect::Publish { key, delivery, answer });
                }
            }
            (Bug::AnswerWithOwnProposal, Effect::Append(decision)) => {
                self.proposed.insert(decision.key.clone(), decision.outcome);
                effects.push(Effect::Append(decision));
            }
            (Bug::AnswerWithOwnProposal, Effect::Publish { key, delivery, answer }) => {
                let outcome = self.proposed.get(&key).copied().unwrap_or(answer.outcome);
                let answer = Answer { outcome, ..answer };
                effects.push(Effect::Publish { key, delivery, answer });
            }
            (Bug::LastRecordWins, effect) => effects.push(self.by_the_latest(effect)),
            (Bug::CommitWithoutBranches, Effect::Append(decision)) => {
                effects.push(Effect::Append(Decision { branches: Vec::new(), ..decision }));
            }
            (Bug::MissingVoteIsYes, Effect::Append(decision)) => {
                let is_late =
                    |reason: &dtc::protocol::message::Reason| reason.code == ReasonCode::Deadline;
                let branches = self.votes.get(&decision.key);
                effects.push(Effect::Append(match branches {
                    Some(branches) if decision.reason.as_ref().is_some_and(is_late) => Decision {
                        outcome: Outcome::Committed,
                        branches: branches.clone().into_iter().collect(),
                        reason: None,
                        ..decision
                    },
                    _ => decision,
                }));
            }
            (Bug::ProposeOnce, Effect::Append(decision)) => {
                if self.proposed.insert(decision.key.clone(), decision.outcome).is_none() {
                    effects.push(Effect::Append(decision));
                }
            }
            (
                Bug::ForgetParkedCommand,
                Effect::Send { to: Destination::AnyInstance, command: Command::Finish(_), .. },
            ) => {}
            (_, effect) => effects.push(effect),
        }
    }

    fn by_the_latest(&self, effect: coordinator::Effect) -> coordinator::Effect {
        use coordinator::Effect;
        match effect {
            Effect::Send { service, to, command: Command::Finish(mut finish) } => {
                if let Some(latest) = self.latest.get(&finish.key) {
                    finish.outcome = latest.outcome;
                    finish.branch = latest.branch_of(&service).cloned().or(finish.branch);
                }
                Effect::Send { service, to, command: Command::Finish(finish) }
            }
            Effect::Publish { key, delivery, mut answer } => {
                if let Some(latest) = self.latest.get(&key) {
                    answer.outcome = latest.outcome;
                }
                Effect::Publish { key, delivery, answer }
            }
            other => other,
        }
    }
}

/// Stands for the offset of a record that was sent but not read back.
const SENT: u64 = u64::MAX;

fn answer(decision: &Decision) -> Answer {
    Answer {
        id: decision.key.id.clone(),
        requested_at: decision.key.requested_at,
        outcome: decision.outcome,
        reason: decision.reason.clone(),
        unresolved: Vec::new(),
        decided_at: decision.decided_at,
    }
}

fn abort(key: TransactionKey, branch: Branch) -> Finish {
    Finish { key, outcome: Outcome::Aborted, branch: Some(branch), parked: false }
}

/// An instance of a service, with or without a bug.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Member {
    core: Instance,
    bug: Option<Bug>,
    /// The branches that it has voted prepared, and the workers.
    held: BTreeMap<TransactionKey, (Branch, WorkerId)>,
    slots: BTreeMap<TransactionKey, Delivery>,
    freed: BTreeSet<Delivery>,
}

impl Member {
    /// An instance that has just started.
    pub(crate) fn new(now: Time, mut settings: participant::Settings, bug: Option<Bug>) -> Self {
        match bug {
            Some(Bug::DropTombstone) => settings.remembered_max = 0,
            // Otherwise the core would enforce the cap by itself.
            Some(Bug::FreeSlotAtVote) => settings.max_concurrency = 1_000_000,
            _ => {}
        }
        Self {
            core: Instance::new(now, settings),
            bug,
            held: BTreeMap::new(),
            slots: BTreeMap::new(),
            freed: BTreeSet::new(),
        }
    }

    /// The core inside.
    pub(crate) fn core(&self) -> &Instance {
        &self.core
    }

    /// Takes in one event and appends what must now be done, in order, to `effects`.
    pub(crate) fn handle(
        &mut self,
        now: Time,
        event: participant::Event,
        effects: &mut Vec<participant::Effect>,
    ) {
        let Some(bug) = self.bug else { return self.core.handle(now, event, effects) };
        let mut pending = VecDeque::from([self.let_in(bug, event)]);
        while let Some(event) = pending.pop_front() {
            let mut wanted = Vec::new();
            self.core.handle(now, event, &mut wanted);
            for effect in wanted {
                self.let_out(bug, effect, &mut pending, effects);
            }
        }
    }

    fn let_in(&mut self, bug: Bug, event: participant::Event) -> participant::Event {
        use participant::Event;
        match (bug, event) {
            (Bug::CommitWhateverIsHeld, Event::FinishReceived { worker, mut finish, delivery }) => {
                if let (Outcome::Committed, Some((held, _))) =
                    (finish.outcome, self.held.get(&finish.key))
                {
                    finish.branch = Some(held.clone());
                }
                Event::FinishReceived { worker, finish, delivery }
            }
            (Bug::CancelUndoesPrepared, Event::CancelReceived(key)) => match self.held.get(&key) {
                Some((branch, worker)) => Event::FinishReceived {
                    worker: worker.clone(),
                    finish: abort(key, branch.clone()),
                    delivery: None,
                },
                None => Event::CancelReceived(key),
            },
            (
                Bug::FreeSlotAtVote,
                Event::PrepareReceived { worker, delivery, redelivered, prepare },
            ) => {
                self.slots.insert(prepare.key.clone(), delivery);
                Event::PrepareReceived { worker, delivery, redelivered, prepare }
            }
            (_, event) => event,
        }
    }

    fn let_out(
        &mut self,
        bug: Bug,
        effect: participant::Effect,
        pending: &mut VecDeque<participant::Event>,
        effects: &mut Vec<participant::Effect>,
    ) {
        use participant::{Effect, Event};
        match (bug, effect) {
            (Bug::VoteWithoutStoring, Effect::CallPrepare { key, branch, .. }) => {
                let verdict = Verdict::Prepared;
                pending.push_back(Event::PrepareEnded { key, branch, verdict });
            }
            (
                Bug::CommitWhateverIsHeld | Bug::CancelUndoesPrepared | Bug::DecideAlone,
                Effect::Vote { to, vote },
            ) => {
                match &vote.kind {
                    VoteKind::Prepared { branch } => {
                        self.held.insert(vote.key.clone(), (branch.clone(), to.clone()));
                    }
                    VoteKind::Finished(_) => drop(self.held.remove(&vote.key)),
                    _ => {}
                }
                effects.push(Effect::Vote { to, vote });
            }
            (
                Bug::CommitWhateverIsHeld | Bug::CancelUndoesPrepared,
                Effect::Done { to, done, ack },
            ) => {
                if done.applied.is_ok() {
                    self.held.remove(&done.key);
                }
                effects.push(Effect::Done { to, done, ack });
            }
            (Bug::FreeSlotAtVote, Effect::Vote { to, vote }) => {
                let is_prepared = matches!(vote.kind, VoteKind::Prepared { .. });
                let slot = self.slots.get(&vote.key).filter(|_| is_prepared).copied();
                effects.push(Effect::Vote { to, vote });
                effects.extend(slot.filter(|slot| self.freed.insert(*slot)).map(Effect::Ack));
            }
            (Bug::FreeSlotAtVote, Effect::Ack(delivery)) => {
                if !self.freed.remove(&delivery) {
                    effects.push(Effect::Ack(delivery));
                }
            }
            (Bug::DecideAlone, Effect::Inquire(inquiry)) => {
                // The worker doesn't matter.
                if let Some((_, worker)) = self.held.get(&inquiry.key) {
                    let worker = worker.clone();
                    let finish = abort(inquiry.key, inquiry.branch);
                    pending.push_back(Event::FinishReceived { worker, finish, delivery: None });
                }
            }
            (Bug::NeverInquire, Effect::Inquire(_)) => {}
            (Bug::FreshBranchInEveryVote, Effect::Vote { to, mut vote }) => {
                if let VoteKind::Prepared { branch } = &mut vote.kind {
                    match self.held.get(&vote.key) {
                        Some((held, _)) if held == branch => {
                            let again = format!("{branch}0");
                            *branch = Branch::parse(&again).unwrap_or_else(|_| branch.clone());
                        }
                        _ => {
                            let first = (branch.clone(), to.clone());
                            self.held.insert(vote.key.clone(), first);
                        }
                    }
                }
                effects.push(Effect::Vote { to, vote });
            }
            (Bug::NeverScanStore, Effect::ScanStore) => {}
            (_, effect) => effects.push(effect),
        }
    }
}
