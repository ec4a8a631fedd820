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
mod scan;
mod settings;
mod transaction;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

pub use self::{
    event::{Effect, Event, InDoubt, Verdict},
    settings::Settings,
    transaction::Stage,
};
use self::{
    memory::Memory,
    transaction::{Finisher, Holding, Slot, Waiting},
};
use crate::protocol::{
    deadlines::Deadlines,
    ids::{Branch, RequestHash, TransactionKey, WorkerId},
    jitter::jitter,
    keymap::KeyMap,
    message::{Ballot, Done, Inquiry, Vote},
    time::Time,
};

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
