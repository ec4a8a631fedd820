//! The service's side of the protocol: [`Event`]s in, [`Effect`]s out.
//!
//! One instance of one service. It calls the service's code no more often than needed, keeps what
//! is prepared until it hears the outcome, and never decides by itself: whoever hears nothing asks.
//!
//! ```text
//!            ┌─> Recalling ─┐                       ┌──> (refused, read only: forgotten)
//! prepare ───┴──────────────┴──> Preparing ─────────┼──> Prepared ──┐
//!                                                   └──> Failed ────┴─> Finishing ──> (remembered)
//! ```
//!
//! **Invariant:** no more than `max_concurrency` transactions hold a slot here.
//!
//! **Invariant:** the service's code runs for one transaction at a time once.

mod event;
mod memory;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

pub use self::event::{Effect, Event, InDoubt, Verdict};
use self::memory::{Memory, Remembered, has_namesake};
use crate::protocol::{
    deadlines::Deadlines,
    ids::{Branch, InstanceId, RequestHash, ServiceName, StoreId, TransactionKey, WorkerId},
    jitter::jitter,
    keymap::KeyMap,
    message::{
        Ballot, Delivery, Done, Finish, Inquiry, Outcome, Prepare, Query, Reason, ReasonCode, Vote,
    },
    time::Time,
};

/// What a worker is told of a commit that this instance's store can't have prepared.
const UNKNOWN_BRANCH: &str = "the instance's store has neither prepared nor committed this branch: \
    do all instances of the service share one store?";

/// Who an instance is, and how patient.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Settings {
    /// The service.
    pub service: ServiceName,
    /// This instance of it. A process that starts anew takes a new one, since its branches are
    /// counted from here.
    pub instance: InstanceId,
    /// How many transactions may hold a slot at once.
    pub max_concurrency: u32,
    /// Whether the service can tell what its store holds. Without it this instance's memory is all
    /// there is.
    pub has_store: bool,
    /// Whether the service can tell what its store has committed. Then a commit of a branch that the
    /// store does not know is an error; else it is taken for one that was committed before.
    pub remembers_commits: bool,
    /// What the store is called, if it has a name.
    pub store: Option<StoreId>,
    /// How long to wait for the outcome before asking, and again between asking.
    pub inquire_after: Duration,
    /// How long between two looks through the whole store.
    pub scan_every: Duration,
    /// The pause before a parked commit is tried again.
    pub retry_parked_every: Duration,
    /// How many finished transactions are remembered.
    pub remembered_max: usize,
    /// How many transactions that hold no slot are looked into at once, not counting what comes by
    /// the service's durable queue.
    pub visitors_max: usize,
    /// What the jitter of this instance's pauses starts from.
    pub seed: u64,
}

impl Settings {
    /// The defaults, for this instance.
    pub fn new(service: ServiceName, instance: InstanceId, max_concurrency: u32) -> Self {
        Self {
            service,
            instance,
            max_concurrency,
            has_store: false,
            remembers_commits: false,
            store: None,
            inquire_after: Duration::from_secs(10),
            scan_every: Duration::from_secs(30),
            retry_parked_every: Duration::from_secs(10),
            remembered_max: 65_536,
            visitors_max: 4096,
            seed: 0,
        }
    }
}

/// Where a transaction stands at this instance.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Stage {
    /// The store is asked what it holds of it.
    Recalling,
    /// The service's prepare runs.
    Preparing,
    /// Stored and voted for: the outcome is awaited.
    Prepared,
    /// The service's prepare failed; something may be stored: the outcome is awaited.
    Failed,
    /// The service's commit or abort runs.
    Finishing,
    /// A parked commit failed and will be tried again.
    BackingOff,
}

impl Stage {
    /// All of them, for coverage tables.
    pub const ALL: [Self; 6] = [
        Self::Recalling,
        Self::Preparing,
        Self::Prepared,
        Self::Failed,
        Self::Finishing,
        Self::BackingOff,
    ];
}

/// Whether a transaction counts against the cap.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Slot {
    /// It doesn't: another instance holds it, or nobody.
    None,
    Held(Delivery),
    /// It does, but the delivery was lost with its connection and may come again.
    Detached,
}

/// A transaction that this instance has to do with.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Holding {
    stage: Stage,
    slot: Slot,
    /// `None`: it is looked into because of a finish, which doesn't say.
    request_hash: Option<RequestHash>,
    deadline: Time,
    /// What this instance's own prepare is, or was found to be, stored under.
    branch: Option<Branch>,
    /// The worker that alone has asked for the vote, and over a connection that still stands: nobody
    /// else tells of the outcome, so no other instance has been told. `None`: others may have
    /// finished it.
    asked_by: Option<WorkerId>,
    /// The prepare that waits for what the store says.
    prepare: Option<Prepare>,
    /// Whether `prepare` came from an instance that is gone: then what it left is ours.
    redelivered: bool,
    why_failed: Option<Arc<str>>,
    /// Who waits for the vote.
    voters: Vec<(WorkerId, RequestHash)>,
    /// Who waits for the outcome to be applied.
    finishers: Vec<Finisher>,
    /// What is still to be called for it; the first is running in [`Stage::Finishing`].
    calls: VecDeque<(Branch, Outcome)>,
    failures: u32,
    /// Whether its commit is parked, as far as this instance can tell: no worker says when to try
    /// again.
    is_parked: bool,
    /// The branch that the store is asked about, since it is to be committed and not held.
    looked_up: Option<Branch>,
    /// Whether the store does not know the branch that is to be committed.
    is_unknown: bool,
    /// When to inquire, or to try again.
    wake_at: Option<Time>,
    due: Option<Time>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Finisher {
    worker: WorkerId,
    finish: Finish,
    delivery: Option<Delivery>,
}

/// A prepare that was delivered and can't be looked at yet.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Waiting {
    worker: WorkerId,
    delivery: Delivery,
    redelivered: bool,
    prepare: Prepare,
}

/// One instance of a service.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Instance {
    settings: Settings,
    /// Boxed: a map moves its values about.
    holdings: KeyMap<Box<Holding>>,
    slots_used: u32,
    waiting: VecDeque<Waiting>,
    memory: Memory,
    deadlines: Deadlines,
    /// What the store was seen to hold that isn't held here, and since when.
    doubted: BTreeMap<(TransactionKey, Branch), Time>,
    scan_at: Option<Time>,
    branches: u64,
    draining: bool,
}

impl Instance {
    /// An instance that has just started. If it has a store it looks through it at once.
    pub fn new(now: Time, settings: Settings) -> Self {
        Self {
            holdings: KeyMap::new(),
            slots_used: 0,
            waiting: VecDeque::new(),
            memory: Memory::new(settings.remembered_max),
            deadlines: Deadlines::default(),
            doubted: BTreeMap::new(),
            scan_at: settings.has_store.then_some(now),
            branches: 0,
            draining: false,
            settings,
        }
    }

    /// Takes in one event and appends what must now be done, in order, to `effects`.
    pub fn handle(&mut self, now: Time, event: Event, effects: &mut Vec<Effect>) {
        match event {
            Event::PrepareReceived { worker, delivery, redelivered, prepare } => {
                let waiting = Waiting { worker, delivery, redelivered, prepare };
                self.prepare_received(now, waiting, effects);
            }
            Event::QueryReceived { worker, query } => self.query_received(worker, query, effects),
            Event::CancelReceived(key) => self.cancel_received(&key),
            Event::FinishReceived { worker, finish, delivery } => {
                self.finish_received(now, Finisher { worker, finish, delivery }, effects);
            }
            Event::PrepareEnded { key, branch, verdict } => {
                self.prepare_ended(now, &key, &branch, verdict, effects);
            }
            Event::FinishEnded { key, branch, applied } => {
                self.finish_ended(now, &key, &branch, applied, effects);
            }
            Event::StoreRead { key, held } => self.store_read(now, &key, held, effects),
            Event::CommitLookedUp { key, branch, is_known } => {
                self.commit_looked_up(now, &key, &branch, is_known, effects);
            }
            Event::StoreScanned(held) => self.store_scanned(now, held, effects),
            Event::DeadlineReached => self.deadline_reached(now, effects),
            Event::Disconnected => self.disconnected(),
            Event::DrainRequested => self.draining = true,
        }
    }

    /// The clock was set back `by` so much: what is to be done after a while is put back with it, or
    /// it would be done that much later.
    pub fn clock_set_back(&mut self, by: Duration) {
        self.deadlines.put_back(by);
        self.holdings.for_each(|holding| {
            holding.due = holding.due.map(|at| at - by);
            holding.wake_at = holding.wake_at.map(|at| at - by);
        });
        self.scan_at = self.scan_at.map(|at| at - by);
        self.doubted.values_mut().for_each(|since| *since = *since - by);
    }

    /// The next moment at which [`Event::DeadlineReached`] should be delivered, if there is one.
    pub fn next_deadline(&self) -> Option<Time> {
        self.deadlines.next().into_iter().chain(self.scan_at).min()
    }

    /// Where a transaction stands, if this instance has to do with it.
    pub fn stage_of(&self, key: &TransactionKey) -> Option<Stage> {
        self.holdings.get(key).map(|holding| holding.stage)
    }

    /// How many transactions hold a slot.
    pub fn slots_used(&self) -> u32 {
        self.slots_used
    }

    /// Whether the outcome of a transaction is known and this instance could not apply it. No worker
    /// waits for it any more; it is tried again now and then, and whoever has the store can do it as
    /// well.
    pub fn is_parked(&self, key: &TransactionKey) -> bool {
        self.holdings.get(key).is_some_and(|it| it.is_stuck())
    }

    /// How many of the transactions that hold a slot are parked.
    pub fn slots_parked(&self) -> u32 {
        let holds = |it: &&Holding| it.slot != Slot::None && it.is_stuck();
        let parked = self.holdings.values().map(|it| &**it).filter(holds).count();
        u32::try_from(parked).unwrap_or(u32::MAX)
    }

    /// Slots that neither are held nor will be taken by what has been delivered.
    fn free(&self) -> u32 {
        let waiting = u32::try_from(self.waiting.len()).unwrap_or(u32::MAX);
        self.settings.max_concurrency.saturating_sub(self.slots_used.saturating_add(waiting))
    }

    // ---- Prepare -----------------------------------------------------------------------------

    fn prepare_received(&mut self, now: Time, it: Waiting, effects: &mut Vec<Effect>) {
        let key = it.prepare.key.clone();
        if self.holdings.contains_key(&key) {
            return self.prepare_again(it, effects);
        }
        // What the store holds is held, however late the prepare is and whatever was cancelled.
        let look = self.settings.has_store && (it.prepare.repeated || it.redelivered);
        let ballot = match look {
            true => self.ballot_from_memory(&it.prepare),
            false => self.ballot_without_code(now, &it.prepare),
        };
        if let Some(ballot) = ballot {
            self.vote(it.worker, &key, it.prepare.request_hash, ballot, effects);
            return effects.push(Effect::Ack(it.delivery));
        }
        if self.slots_used >= self.settings.max_concurrency {
            return self.waiting.push_back(it);
        }
        self.slots_used += 1;
        let mut holding = Holding {
            slot: Slot::Held(it.delivery),
            redelivered: it.redelivered,
            asked_by: (!look).then(|| it.worker.clone()),
            voters: vec![(it.worker, it.prepare.request_hash)],
            ..Holding::visiting(Some(it.prepare.request_hash), it.prepare.deadline)
        };
        if look {
            effects.push(Effect::ReadStore(key.clone()));
            holding.prepare = Some(it.prepare);
        } else {
            self.call_prepare(&mut holding, it.prepare, effects);
        }
        self.holdings.insert(&key, Box::new(holding));
    }

    /// What was said before to this prepare, or came of it.
    fn ballot_from_memory(&self, prepare: &Prepare) -> Option<Ballot> {
        match self.memory.of(&prepare.key)? {
            Remembered::Finished { outcome, .. } => Some(Ballot::Finished(*outcome)),
            Remembered::ReadOnly(seen) if *seen == prepare.request_hash => Some(Ballot::ReadOnly),
            Remembered::ReadOnly(_) => Some(self.refused(ReasonCode::IdReused)),
            Remembered::Refused(reason) => Some(Ballot::Refused(reason.clone())),
            Remembered::Cancelled => None,
        }
    }

    /// What can be said to a prepare without asking the service's code, where nothing is held.
    fn ballot_without_code(&self, now: Time, prepare: &Prepare) -> Option<Ballot> {
        if let Some(ballot) = self.ballot_from_memory(prepare) {
            return Some(ballot);
        }
        let key = &prepare.key;
        if self.memory.of(key).is_some() {
            Some(self.refused(ReasonCode::Cancelled))
        } else if self.memory.has_namesake(key) || has_namesake(&self.holdings, key) {
            Some(self.refused(ReasonCode::IdReused))
        } else if now > prepare.deadline {
            Some(self.refused(ReasonCode::Deadline))
        } else {
            None
        }
    }

    fn refused(&self, code: ReasonCode) -> Ballot {
        Ballot::Refused(Reason::at(&self.settings.service, code))
    }

    /// A prepare of what this instance has to do with already.
    fn prepare_again(&mut self, it: Waiting, effects: &mut Vec<Effect>) {
        let key = it.prepare.key.clone();
        let Some(holding) = self.holdings.get_mut(&key) else { return };
        match holding.slot {
            // It is only being looked into, on behalf of others: that comes first.
            Slot::None => return self.waiting.push_back(it),
            Slot::Detached if holding.is_about(it.prepare.request_hash) => {
                holding.slot = Slot::Held(it.delivery);
            }
            Slot::Detached | Slot::Held(_) => effects.push(Effect::Ack(it.delivery)),
        }
        self.vote_on_held(it.worker, &key, it.prepare.request_hash, effects);
    }

    /// Votes again on what is held, or once it can be told.
    fn vote_on_held(
        &mut self,
        to: WorkerId,
        key: &TransactionKey,
        request_hash: RequestHash,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        if !holding.is_about(request_hash) {
            let reused = Reason::at(&self.settings.service, ReasonCode::IdReused);
            return self.vote(to, key, request_hash, Ballot::Refused(reused), effects);
        }
        holding.asked_by.take_if(|worker| *worker != to);
        match holding.stage {
            Stage::Prepared | Stage::Failed => self.vote_again(to, key, request_hash, effects),
            Stage::Recalling | Stage::Preparing | Stage::Finishing | Stage::BackingOff => {
                if !holding.voters.contains(&(to.clone(), request_hash)) {
                    holding.voters.push((to, request_hash));
                }
            }
        }
    }

    fn call_prepare(&mut self, holding: &mut Holding, prepare: Prepare, effects: &mut Vec<Effect>) {
        self.branches += 1;
        let branch = Branch::of(&self.settings.instance, self.branches);
        holding.stage = Stage::Preparing;
        holding.branch = Some(branch.clone());
        effects.push(Effect::CallPrepare {
            key: prepare.key,
            branch,
            request_hash: prepare.request_hash,
            data: prepare.data,
            deadline: prepare.deadline,
        });
    }

    fn prepare_ended(
        &mut self,
        now: Time,
        key: &TransactionKey,
        branch: &Branch,
        verdict: Verdict,
        effects: &mut Vec<Effect>,
    ) {
        let service = self.settings.service.clone();
        let Some(holding) = self.holdings.get_mut(key) else { return };
        if holding.stage != Stage::Preparing || holding.branch.as_ref() != Some(branch) {
            return;
        }
        let holds_nothing = matches!(verdict, Verdict::ReadOnly | Verdict::Refused(_));
        let commits =
            |it: &Finisher| it.finish.outcome == Outcome::Committed && it.finish.branch.is_some();
        if holds_nothing && self.settings.has_store && holding.finishers.iter().any(commits) {
            // Another run's branch is the one that commits, and whoever holds it may be gone.
            holding.branch = None;
            holding.stage = Stage::Recalling;
            return effects.push(Effect::ReadStore(key.clone()));
        }
        match verdict {
            Verdict::Prepared => holding.stage = Stage::Prepared,
            Verdict::Failed(why) => {
                holding.stage = Stage::Failed;
                holding.why_failed = Some(why);
            }
            Verdict::ReadOnly => {
                let seen = holding.request_hash;
                let remembered = seen.map_or(Remembered::Cancelled, Remembered::ReadOnly);
                return self.nothing_held(now, key, remembered, Ballot::ReadOnly, effects);
            }
            Verdict::Refused(message) => {
                let code = ReasonCode::Refused;
                let reason = Reason { code, service: Some(service), message };
                let ballot = Ballot::Refused(reason.clone());
                return self.nothing_held(now, key, Remembered::Refused(reason), ballot, effects);
            }
        }
        if holding.finishers.is_empty() {
            for (worker, request_hash) in std::mem::take(&mut holding.voters) {
                self.vote_again(worker, key, request_hash, effects);
            }
            self.inquire_later(now, key);
        } else {
            self.apply(now, key, effects);
        }
    }

    /// The transaction is none of this instance's business any more: say so, and free the slot.
    fn nothing_held(
        &mut self,
        now: Time,
        key: &TransactionKey,
        remembered: Remembered,
        ballot: Ballot,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.remove(key) else { return };
        match holding.finishers.first() {
            Some(Finisher { finish, .. }) => {
                let is_applied = self.can_answer_for(finish).is_ok();
                self.memory.remember(key, Remembered::finished(finish, is_applied));
            }
            None => self.memory.remember(key, remembered),
        }
        for (worker, request_hash) in holding.voters {
            self.vote(worker, key, request_hash, ballot.clone(), effects);
        }
        for finisher in holding.finishers {
            let applied = self.can_answer_for(&finisher.finish);
            self.done(finisher, applied, effects);
        }
        if let Slot::Held(delivery) = holding.slot {
            effects.push(Effect::Ack(delivery));
        }
        self.admit_waiting(now, effects);
    }

    // ---- Votes -------------------------------------------------------------------------------

    fn query_received(&mut self, worker: WorkerId, query: Query, effects: &mut Vec<Effect>) {
        let Query { key, request_hash } = query;
        if self.holdings.contains_key(&key) {
            return self.vote_on_held(worker, &key, request_hash, effects);
        }
        let ballot = match self.memory.of(&key) {
            Some(Remembered::Finished { outcome, .. }) => Ballot::Finished(*outcome),
            Some(Remembered::ReadOnly(seen)) if *seen == request_hash => Ballot::ReadOnly,
            Some(Remembered::ReadOnly(_)) => {
                Ballot::Refused(Reason::at(&self.settings.service, ReasonCode::IdReused))
            }
            Some(Remembered::Refused(reason)) => Ballot::Refused(reason.clone()),
            // It holds nothing, but others may.
            Some(Remembered::Cancelled) | None => {
                let mut visiting = Holding::visiting(Some(request_hash), Time::EPOCH);
                visiting.voters.push((worker, request_hash));
                return self.look_up(&key, visiting, effects);
            }
        };
        self.vote(worker, &key, request_hash, ballot, effects);
    }

    /// Asks the store on behalf of somebody who takes no slot here.
    fn look_up(&mut self, key: &TransactionKey, visiting: Holding, effects: &mut Vec<Effect>) {
        let visitors = self.holdings.len().saturating_sub(self.slots_used as usize);
        // Nobody says again what waits in the service's durable queue, and how much of it is
        // delivered at once is the transport's to bound.
        let is_owed = visiting.finishers.iter().any(|finisher| finisher.delivery.is_some());
        if self.settings.has_store && (is_owed || visitors < self.settings.visitors_max) {
            self.holdings.insert(key, Box::new(visiting));
            effects.push(Effect::ReadStore(key.clone()));
        }
    }

    fn vote_again(
        &self,
        to: WorkerId,
        key: &TransactionKey,
        request_hash: RequestHash,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get(key) else { return };
        let Some(branch) = holding.branch.clone() else { return };
        let ballot = match &holding.why_failed {
            None => Ballot::Prepared { branch },
            Some(why) => {
                let service = Some(self.settings.service.clone());
                let message = Some(Arc::clone(why));
                let reason = Reason { code: ReasonCode::Failed, service, message };
                Ballot::Failed { branch, reason }
            }
        };
        self.vote(to, key, request_hash, ballot, effects);
    }

    fn vote(
        &self,
        to: WorkerId,
        key: &TransactionKey,
        request_hash: RequestHash,
        ballot: Ballot,
        effects: &mut Vec<Effect>,
    ) {
        let Settings { service, instance, store, .. } = &self.settings;
        let vote = Vote {
            key: key.clone(),
            request_hash,
            service: service.clone(),
            instance: instance.clone(),
            store: store.clone(),
            ballot,
            free: self.free(),
        };
        effects.push(Effect::Vote { to, vote });
    }

    // ---- Finish and cancel -------------------------------------------------------------------

    /// A cancel never touches what is prepared: it only keeps a prepare from being started.
    fn cancel_received(&mut self, key: &TransactionKey) {
        let has_started =
            self.holdings.get(key).is_some_and(|it| it.slot != Slot::None && it.prepare.is_none());
        if !has_started && self.memory.of(key).is_none() {
            self.memory.remember(key, Remembered::Cancelled);
        }
    }

    fn finish_received(&mut self, now: Time, finisher: Finisher, effects: &mut Vec<Effect>) {
        let key = finisher.finish.key.clone();
        if let Some(holding) = self.holdings.get_mut(&key) {
            let is_parked = finisher.delivery.is_some();
            holding.is_parked |= is_parked;
            holding.finishers.push(finisher);
            return match holding.stage {
                // It has just failed as often as it was to be tried.
                Stage::Prepared | Stage::Failed if is_parked && holding.failures > 0 => {
                    self.try_parked_later(now, &key);
                }
                Stage::Prepared | Stage::Failed | Stage::BackingOff => {
                    self.apply(now, &key, effects)
                }
                Stage::Recalling | Stage::Preparing | Stage::Finishing => {}
            };
        }
        let finish = &finisher.finish;
        // What was finished here may have left something in the store all the same: another
        // instance's branch, or what was stored after its prepare was given up.
        let is_seen_held = self.doubted.keys().any(|(doubted, _)| *doubted == key);
        let is_applied = match self.memory.of(&key) {
            _ if is_seen_held => false,
            Some(Remembered::Finished { applied, .. }) => {
                finish.branch.is_none() || *applied == finish.branch
            }
            Some(Remembered::ReadOnly(_) | Remembered::Refused(_) | Remembered::Cancelled)
            | None => false,
        };
        if is_applied || !self.settings.has_store {
            let applied = self.can_answer_for(finish);
            self.memory.remember(&key, Remembered::finished(finish, applied.is_ok()));
            return self.done(finisher, applied, effects);
        }
        let mut visiting = Holding::visiting(None, Time::EPOCH);
        visiting.is_parked = finisher.delivery.is_some();
        visiting.finishers.push(finisher);
        self.look_up(&key, visiting, effects);
    }

    /// Whether this instance can tell that `finish` is applied, where it holds nothing of the
    /// transaction any more. Without a store it knows only of what it made itself.
    fn can_answer_for(&self, finish: &Finish) -> Result<(), Arc<str>> {
        let own = &self.settings.instance;
        match &finish.branch {
            Some(branch)
                if finish.outcome == Outcome::Committed
                    && !self.settings.has_store
                    && branch.instance() != own =>
            {
                let maker = branch.instance();
                Err(format!("{maker} prepared it, and {own} has no store to find it in").into())
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Does what the outcome means for what this instance holds.
    fn apply(&mut self, now: Time, key: &TransactionKey, effects: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        let Some(Finisher { worker, finish, .. }) = holding.finishers.first() else { return };
        let Some(own) = holding.branch.clone() else { return };
        // What a failed prepare has left is undone whatever the store says.
        let may_be_finished =
            holding.why_failed.is_none() && holding.asked_by.as_ref() != Some(worker);
        if self.settings.has_store && may_be_finished {
            holding.stage = Stage::Recalling;
            return effects.push(Effect::ReadStore(key.clone()));
        }
        let outcome = match finish.outcome {
            Outcome::Committed if finish.branch.as_ref() == Some(&own) => Outcome::Committed,
            // Another branch is the one that commits. Whoever holds it may be gone: what the store
            // says of both comes first.
            Outcome::Committed if self.settings.has_store && finish.branch.is_some() => {
                holding.stage = Stage::Recalling;
                return effects.push(Effect::ReadStore(key.clone()));
            }
            Outcome::Committed | Outcome::Aborted => Outcome::Aborted,
        };
        holding.calls = VecDeque::from([(own, outcome)]);
        self.call_next(now, key, effects);
    }

    fn call_next(&mut self, now: Time, key: &TransactionKey, effects: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        let Some((branch, outcome)) = holding.calls.front().cloned() else {
            return self.applied(now, key, effects);
        };
        holding.stage = Stage::Finishing;
        let key = key.clone();
        effects.push(match outcome {
            Outcome::Committed => Effect::CallCommit { key, branch },
            Outcome::Aborted => Effect::CallAbort { key, branch },
        });
    }

    fn finish_ended(
        &mut self,
        now: Time,
        key: &TransactionKey,
        branch: &Branch,
        applied: Result<(), Arc<str>>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        let is_running = holding.calls.front().is_some_and(|(running, _)| running == branch);
        if holding.stage != Stage::Finishing || !is_running {
            return;
        }
        match applied {
            Ok(()) => {
                holding.calls.pop_front();
                self.call_next(now, key, effects);
            }
            Err(error) => self.not_applied(now, key, &error, effects),
        }
    }

    /// Everything that the outcome means here is done.
    fn applied(&mut self, now: Time, key: &TransactionKey, effects: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.get(key) else { return };
        let Some(outcome) = holding.finishers.first().map(|it| it.finish.outcome) else { return };
        if holding.is_unknown {
            return self.commits_unknown(now, key, effects);
        }
        self.nothing_held(now, key, Remembered::Cancelled, Ballot::Finished(outcome), effects);
    }

    /// The service's code could not do it. Workers are told, and will say when to try again; what
    /// is parked is tried again until it succeeds.
    fn not_applied(
        &mut self,
        now: Time,
        key: &TransactionKey,
        error: &Arc<str>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        let failed = std::mem::take(&mut holding.calls).pop_front().map(|(branch, _)| branch);
        holding.failures = holding.failures.saturating_add(1);
        // When it is told again, others may have been told too: what is parked goes to any instance.
        holding.asked_by = None;
        holding.is_unknown = false;
        let (parked, told): (Vec<_>, Vec<_>) = std::mem::take(&mut holding.finishers)
            .into_iter()
            .partition(|it| it.delivery.is_some());
        let is_parked = !parked.is_empty();
        holding.finishers = parked;
        if is_parked {
            self.try_parked_later(now, key);
        } else if holding.slot == Slot::None {
            // The store still holds it, and the next look through it will ask again.
            self.remove(key);
        } else {
            // What was found in the store is held like an own one: asked about, and tried again.
            holding.branch = holding.branch.take().or(failed);
            holding.stage = match holding.why_failed {
                None => Stage::Prepared,
                Some(_) => Stage::Failed,
            };
            self.inquire_later(now, key);
        }
        for finisher in told {
            self.done(finisher, Err(Arc::clone(error)), effects);
        }
        self.admit_waiting(now, effects);
    }

    /// The store does not know the branch that is to be committed, so this instance can't do it, and
    /// must not say that it is done. It holds nothing of the transaction any more.
    fn commits_unknown(&mut self, now: Time, key: &TransactionKey, effects: &mut Vec<Effect>) {
        let Some(holding) = self.remove(key) else { return };
        if let Some(Finisher { finish, .. }) = holding.finishers.first() {
            let outcome = finish.outcome;
            self.memory.remember(key, Remembered::finished(finish, false));
            for (worker, request_hash) in holding.voters {
                self.vote(worker, key, request_hash, Ballot::Finished(outcome), effects);
            }
        }
        if let Slot::Held(delivery) = holding.slot {
            effects.push(Effect::Ack(delivery));
        }
        let (parked, told): (Vec<_>, Vec<_>) =
            holding.finishers.into_iter().partition(|it| it.delivery.is_some());
        for finisher in told {
            let error = UNKNOWN_BRANCH.into();
            self.done(finisher, Err(error), effects);
        }
        if !parked.is_empty() {
            let mut visiting = Holding::visiting(None, Time::EPOCH);
            visiting.finishers = parked;
            visiting.is_parked = true;
            visiting.failures = holding.failures.saturating_add(1);
            self.holdings.insert(key, Box::new(visiting));
            self.try_parked_later(now, key);
        }
        self.admit_waiting(now, effects);
    }

    fn try_parked_later(&mut self, now: Time, key: &TransactionKey) {
        let Settings { retry_parked_every: pause, seed, .. } = self.settings;
        if let Some(holding) = self.holdings.get_mut(key) {
            holding.stage = Stage::BackingOff;
        }
        self.wake_at(key, now + (pause - jitter(seed, now, key, pause / 4)));
    }

    fn done(&self, finisher: Finisher, applied: Result<(), Arc<str>>, effects: &mut Vec<Effect>) {
        let Settings { service, instance, store, .. } = &self.settings;
        let done = Done {
            key: finisher.finish.key,
            service: service.clone(),
            instance: instance.clone(),
            store: store.clone(),
            applied,
            parked: finisher.finish.parked,
            free: self.free(),
        };
        effects.push(Effect::Done { to: finisher.worker, done, ack: finisher.delivery });
    }

    // ---- The store ---------------------------------------------------------------------------

    fn store_read(
        &mut self,
        now: Time,
        key: &TransactionKey,
        held: Vec<InDoubt>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        if holding.stage != Stage::Recalling {
            return;
        }
        if !holding.finishers.is_empty() {
            return self.apply_to_store(now, key, held, effects);
        }
        let holds_some = !held.is_empty();
        let found = held.into_iter().find(|it| holding.is_about(it.request_hash));
        match (found, holding.prepare.take()) {
            (None, _) if holds_some => {
                let reused = Reason::at(&self.settings.service, ReasonCode::IdReused);
                self.end_visit(now, key, &Ballot::Refused(reused), effects);
            }
            (Some(found), Some(_)) if holding.redelivered => {
                holding.stage = Stage::Prepared;
                holding.branch = Some(found.branch);
                for (worker, request_hash) in std::mem::take(&mut holding.voters) {
                    self.vote_again(worker, key, request_hash, effects);
                }
                self.inquire_later(now, key);
            }
            // Another instance holds it, or held it and is gone: voted on from the store.
            (Some(found), _) => {
                self.end_visit(now, key, &Ballot::Prepared { branch: found.branch }, effects);
            }
            (None, Some(prepare)) => self.prepare_after_look(now, prepare, effects),
            (None, None) => {
                self.remove(key);
                self.admit_waiting(now, effects);
            }
        }
    }

    /// What the store says is all that this instance has to say.
    fn end_visit(
        &mut self,
        now: Time,
        key: &TransactionKey,
        ballot: &Ballot,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.remove(key) else { return };
        for (worker, request_hash) in holding.voters {
            self.vote(worker, key, request_hash, ballot.clone(), effects);
        }
        if let Slot::Held(delivery) = holding.slot {
            effects.push(Effect::Ack(delivery));
        }
        self.admit_waiting(now, effects);
    }

    fn prepare_after_look(&mut self, now: Time, prepare: Prepare, effects: &mut Vec<Effect>) {
        let key = prepare.key.clone();
        let Some(mut holding) = self.holdings.remove(&key) else { return };
        let ballot = self.ballot_without_code(now, &prepare);
        if ballot.is_none() {
            self.call_prepare(&mut holding, prepare, effects);
        }
        self.holdings.insert(&key, holding);
        if let Some(ballot) = ballot {
            let remembered = self.memory.of(&key).cloned();
            let cancelled = remembered.unwrap_or(Remembered::Cancelled);
            self.nothing_held(now, &key, cancelled, ballot, effects);
        }
    }

    /// Does what the outcome means for all that the store holds of the transaction.
    fn apply_to_store(
        &mut self,
        now: Time,
        key: &TransactionKey,
        held: Vec<InDoubt>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        let Some(Finisher { finish, .. }) = holding.finishers.first() else { return };
        let mut branches: BTreeSet<Branch> = held.into_iter().map(|it| it.branch).collect();
        if holding.why_failed.is_some() {
            branches.extend(holding.branch.clone());
        }
        let outcome_of = |branch: &Branch| match finish.outcome {
            Outcome::Committed if finish.branch.as_ref() == Some(branch) => Outcome::Committed,
            Outcome::Committed | Outcome::Aborted => Outcome::Aborted,
        };
        holding.prepare = None;
        holding.is_unknown = false;
        let wanted = finish.branch.clone().filter(|_| finish.outcome == Outcome::Committed);
        let not_seen = wanted.filter(|it| !branches.contains(it));
        holding.calls = branches.into_iter().map(|it| (it.clone(), outcome_of(&it))).collect();
        match not_seen {
            // It was committed before, or this is not the store that it was prepared in.
            Some(branch) if self.settings.remembers_commits => {
                holding.looked_up = Some(branch.clone());
                effects.push(Effect::LookUpCommit { key: key.clone(), branch });
            }
            Some(_) | None => self.call_next(now, key, effects),
        }
    }

    fn commit_looked_up(
        &mut self,
        now: Time,
        key: &TransactionKey,
        branch: &Branch,
        is_known: bool,
        effects: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        let is_awaited = holding.looked_up.take_if(|it| it == branch).is_some();
        if holding.stage != Stage::Recalling || !is_awaited {
            return;
        }
        holding.is_unknown = !is_known;
        self.call_next(now, key, effects);
    }

    fn store_scanned(&mut self, now: Time, held: Vec<InDoubt>, effects: &mut Vec<Effect>) {
        let mut seen = BTreeMap::new();
        for it in held {
            if self.holdings.get(&it.key).is_some_and(|own| own.branch.as_ref() == Some(&it.branch))
            {
                continue;
            }
            let name = (it.key.clone(), it.branch.clone());
            let since = self.doubted.get(&name).copied().unwrap_or(now);
            if now.since(since) < self.settings.inquire_after {
                seen.insert(name, since);
            } else {
                seen.insert(name, now);
                effects.push(self.inquiry(it.key, it.request_hash, it.branch, it.deadline));
            }
        }
        // Who is in doubt is asked about when it is time, and not first at the next round.
        let soonest = seen.values().min().map(|since| *since + self.settings.inquire_after);
        let usual = now + self.settings.scan_every;
        self.scan_at = Some(soonest.map_or(usual, |at| at.min(usual)));
        self.doubted = seen;
    }

    fn inquiry(
        &self,
        key: TransactionKey,
        request_hash: RequestHash,
        branch: Branch,
        deadline: Time,
    ) -> Effect {
        let Settings { service, instance, .. } = self.settings.clone();
        Effect::Inquire(Inquiry { key, request_hash, service, instance, branch, deadline })
    }

    // ---- Time, and the ends of things --------------------------------------------------------

    fn inquire_later(&mut self, now: Time, key: &TransactionKey) {
        let Settings { inquire_after, seed, .. } = self.settings;
        self.wake_at(key, now + inquire_after + jitter(seed, now, key, inquire_after / 4));
    }

    fn wake_at(&mut self, key: &TransactionKey, at: Time) {
        if let Some(holding) = self.holdings.get_mut(key) {
            holding.wake_at = Some(at);
            self.deadlines.wake_by(key, &mut holding.due, at);
        }
    }

    fn deadline_reached(&mut self, now: Time, effects: &mut Vec<Effect>) {
        if self.scan_at.is_some_and(|at| at <= now) {
            self.scan_at = None;
            effects.push(Effect::ScanStore);
        }
        for key in self.deadlines.take_due(now) {
            if let Some(holding) = self.holdings.get_mut(&key) {
                holding.due = None;
                self.wake(now, &key, effects);
            }
        }
    }

    fn wake(&mut self, now: Time, key: &TransactionKey, effects: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.get_mut(key) else { return };
        let Some(at) = holding.wake_at else { return };
        if at > now {
            return self.wake_at(key, at);
        }
        holding.wake_at = None;
        match holding.stage {
            Stage::Prepared | Stage::Failed => {
                let Some(branch) = holding.branch.clone() else { return };
                let (Some(request_hash), deadline) = (holding.request_hash, holding.deadline)
                else {
                    return;
                };
                // Its outcome was told and could not be applied, and since then nobody has said a word:
                // whoever told it has given up.
                holding.is_parked |= holding.failures > 0;
                if self.draining && holding.is_stuck() {
                    return;
                }
                effects.push(self.inquiry(key.clone(), request_hash, branch, deadline));
                self.inquire_later(now, key);
            }
            Stage::BackingOff if self.draining => {}
            Stage::BackingOff if holding.branch.is_some() => self.apply(now, key, effects),
            Stage::BackingOff => {
                holding.stage = Stage::Recalling;
                effects.push(Effect::ReadStore(key.clone()));
            }
            Stage::Recalling | Stage::Preparing | Stage::Finishing => {}
        }
    }

    /// What was delivered will be delivered again. What is prepared stays, and so does its slot.
    fn disconnected(&mut self) {
        self.waiting.clear();
        self.holdings.for_each(|holding| {
            if let Slot::Held(_) = holding.slot {
                holding.slot = Slot::Detached;
            }
            holding.asked_by = None;
            for finisher in &mut holding.finishers {
                finisher.delivery = None;
            }
        });
    }

    fn remove(&mut self, key: &TransactionKey) -> Option<Box<Holding>> {
        let mut holding = self.holdings.remove(key)?;
        self.deadlines.disarm(key, &mut holding.due);
        if holding.slot != Slot::None {
            self.slots_used -= 1;
        }
        Some(holding)
    }

    /// A slot is free, or a transaction gone: look again at what could not be looked at.
    fn admit_waiting(&mut self, now: Time, effects: &mut Vec<Effect>) {
        for it in std::mem::take(&mut self.waiting) {
            self.prepare_received(now, it, effects);
        }
    }
}

impl Holding {
    /// A transaction that is looked into and holds no slot.
    fn visiting(request_hash: Option<RequestHash>, deadline: Time) -> Self {
        Self {
            stage: Stage::Recalling,
            slot: Slot::None,
            request_hash,
            deadline,
            branch: None,
            asked_by: None,
            prepare: None,
            redelivered: false,
            why_failed: None,
            voters: Vec::new(),
            finishers: Vec::new(),
            calls: VecDeque::new(),
            failures: 0,
            is_parked: false,
            looked_up: None,
            is_unknown: false,
            wake_at: None,
            due: None,
        }
    }

    /// Whether it was told, could not be applied, and nobody waits for it any more.
    fn is_stuck(&self) -> bool {
        self.is_parked && self.failures > 0
    }

    /// Whether it is, or may be, for a request with this digest.
    fn is_about(&self, request_hash: RequestHash) -> bool {
        self.request_hash.is_none_or(|own| own == request_hash)
    }
}
