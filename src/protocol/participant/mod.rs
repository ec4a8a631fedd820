//! The service's side of the protocol: [`Event`]s in, [`Effect`]s out.
//!
//! One instance of one service. It calls the service's code no more often than needed, keeps what is
//! prepared until the outcome comes, and never decides by itself: if no outcome comes, it inquires.
//!
//! ```text
//!            ┌─> Recalling ─┐                       ┌──> (refused, read only: forgotten)
//! prepare ───┴──────────────┴──> Preparing ─────────┼──> Prepared ──┐
//!                                                   └──> Failed ────┴─> Finishing ──> (remembered)
//! ```
//!
//! The rooms: `transaction`, each transaction of this instance, and how it is prepared, looked up in the
//! store and finished; `memory`, how the last transactions ended; `scan`, the scans of the whole store.
//!
//! **Invariant:** no more than `max_concurrency` transactions hold a slot here.
//!
//! **Invariant:** at most one call into the service's code is in progress per transaction.

mod event;
mod memory;
mod scan;
mod settings;
mod transaction;

use std::{collections::VecDeque, sync::Arc, time::Duration};

pub use self::{
    event::{Effect, Event, InDoubt, Verdict},
    settings::Settings,
    transaction::TransactionStage,
};
use self::{
    memory::Memory,
    scan::StoreScans,
    transaction::{AfterEvent, Finisher, HeldTransaction},
};
use crate::protocol::{
    deadlines::Deadlines,
    ids::{RequestHash, TransactionKey, WorkerId},
    jitter::jitter,
    keymap::KeyMap,
    message::{Delivery, Done, Inquiry, Prepare, Reason, ReasonCode, Vote, VoteKind},
    time::Time,
};

/// One instance of a service.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Instance {
    holdings: Holdings,
    resources: Resources,
}

/// The transactions and scans of an instance. They are separate from [`Resources`], so that an
/// [`InstanceContext`] can lend the resources to the part that handles an event.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Holdings {
    /// Boxed, since a map moves its values.
    transactions: KeyMap<Box<HeldTransaction>>,
    scans: StoreScans,
}

/// The state that all transactions of an instance share.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Resources {
    settings: Settings,
    slots_used: u32,
    /// Delivered prepares that can't be handled yet.
    waiting: VecDeque<DeliveredPrepare>,
    memory: Memory,
    deadlines: Deadlines,
    /// How many branches the instance has made.
    branches: u64,
    draining: bool,
}

/// A prepare from the service's queue.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct DeliveredPrepare {
    worker: WorkerId,
    delivery: Delivery,
    redelivered: bool,
    prepare: Prepare,
}

/// What a handler of an event may use, besides its own part: the moment, the shared state, and the list of
/// effects.
struct InstanceContext<'a> {
    now: Time,
    resources: &'a mut Resources,
    effects: &'a mut Vec<Effect>,
}

impl Instance {
    /// An instance that has just started. If it has a store, it scans the store at once.
    pub fn new(now: Time, settings: Settings) -> Self {
        Self {
            holdings: Holdings {
                transactions: KeyMap::new(),
                scans: StoreScans::new(settings.has_store.then_some(now)),
            },
            resources: Resources {
                slots_used: 0,
                waiting: VecDeque::new(),
                memory: Memory::new(settings.remembered_max),
                deadlines: Deadlines::default(),
                branches: 0,
                draining: false,
                settings,
            },
        }
    }

    /// Handles an event, and appends what must be done now, in order, to `effects`.
    pub fn handle(&mut self, now: Time, event: Event, effects: &mut Vec<Effect>) {
        let cx = &mut InstanceContext { now, resources: &mut self.resources, effects };
        self.holdings.handle(event, cx);
    }

    /// The clock was set back: moves all deadlines back `by` the same, or they would come that much later.
    pub fn clock_set_back(&mut self, by: Duration) {
        self.resources.deadlines.put_back(by);
        self.holdings.transactions.for_each(|it| it.clock_set_back(by));
        self.holdings.scans.clock_set_back(by);
    }

    /// When to deliver the next [`Event::DeadlineReached`], if there is a deadline.
    pub fn next_deadline(&self) -> Option<Time> {
        let scan = self.holdings.scans.next_deadline();
        self.resources.deadlines.next().into_iter().chain(scan).min()
    }

    /// The stage of a transaction, if this instance has it.
    pub fn stage_of(&self, key: &TransactionKey) -> Option<TransactionStage> {
        self.holdings.transactions.get(key).map(|it| it.stage())
    }

    /// How many transactions hold a slot.
    pub fn slots_used(&self) -> u32 {
        self.resources.slots_used
    }

    /// Whether the outcome of a transaction is known, and this instance could not apply it. No worker waits
    /// for it any more. The instance tries again from time to time, and any instance with the same store can
    /// apply it as well.
    pub fn is_parked(&self, key: &TransactionKey) -> bool {
        self.holdings.transactions.get(key).is_some_and(|it| it.is_stuck())
    }

    /// How many of the transactions that hold a slot are parked.
    pub fn slots_parked(&self) -> u32 {
        let all = self.holdings.transactions.values();
        let parked = all.filter(|it| it.has_slot() && it.is_stuck()).count();
        u32::try_from(parked).unwrap_or(u32::MAX)
    }
}

impl Holdings {
    fn handle(&mut self, event: Event, cx: &mut InstanceContext<'_>) {
        match event {
            Event::PrepareReceived { worker, delivery, redelivered, prepare } => {
                let delivered = DeliveredPrepare { worker, delivery, redelivered, prepare };
                self.prepare_received(delivered, cx);
            }
            Event::QueryReceived { worker, query } => self.query_received(worker, query, cx),
            Event::CancelReceived(key) => self.cancel_received(&key, cx),
            Event::FinishReceived { worker, finish, delivery } => {
                self.finish_received(Finisher { worker, finish, delivery }, cx);
            }
            Event::PrepareEnded { key, branch, verdict } => {
                self.with(&key, cx, |it, cx| it.prepare_ended(branch, verdict, cx));
            }
            Event::FinishEnded { key, branch, applied } => {
                self.with(&key, cx, |it, cx| it.finish_ended(branch, applied, cx));
            }
            Event::StoreRead { key, held } => self.store_read(&key, held, cx),
            Event::CommitLookedUp { key, branch, is_known } => {
                self.with(&key, cx, |it, cx| it.commit_looked_up(&branch, is_known, cx));
            }
            Event::StoreScanned(held) => self.store_scanned(held, cx),
            Event::DeadlineReached => self.deadline_reached(cx),
            Event::Disconnected => self.disconnected(cx),
            Event::DrainRequested => cx.resources.draining = true,
        }
    }

    /// Lets a transaction handle an event. Removes it if it is over, and handles waiting prepares if it has
    /// freed something.
    fn with(
        &mut self,
        key: &TransactionKey,
        cx: &mut InstanceContext<'_>,
        handle: impl FnOnce(&mut HeldTransaction, &mut InstanceContext<'_>) -> AfterEvent,
    ) {
        let Some(transaction) = self.transactions.get_mut(key) else { return };
        match handle(transaction, cx) {
            AfterEvent::Held => {}
            AfterEvent::Yielded => self.admit_waiting(cx),
            AfterEvent::Over => {
                self.forget(key, cx);
                self.admit_waiting(cx);
            }
        }
    }

    fn forget(&mut self, key: &TransactionKey, cx: &mut InstanceContext<'_>) {
        if let Some(mut transaction) = self.transactions.remove(key) {
            transaction.disarm(cx);
            transaction.free_slot(cx);
        }
    }

    /// A slot is free, or a transaction is gone: handles the waiting prepares again.
    fn admit_waiting(&mut self, cx: &mut InstanceContext<'_>) {
        for it in std::mem::take(&mut cx.resources.waiting) {
            self.prepare_received(it, cx);
        }
    }

    fn deadline_reached(&mut self, cx: &mut InstanceContext<'_>) {
        self.scans.begin_if_due(cx);
        for key in cx.resources.deadlines.take_due(cx.now) {
            self.with(&key, cx, HeldTransaction::wake);
        }
    }

    /// The broker will deliver all messages again. Prepared transactions stay, and so do their slots.
    fn disconnected(&mut self, cx: &mut InstanceContext<'_>) {
        cx.resources.waiting.clear();
        self.transactions.for_each(|it| it.disconnected());
    }
}

impl InstanceContext<'_> {
    fn settings(&self) -> &Settings {
        &self.resources.settings
    }

    /// Slots that are not held, and that no delivered prepare will take.
    fn free(&self) -> u32 {
        let Resources { settings, slots_used, waiting, .. } = &*self.resources;
        let waiting = u32::try_from(waiting.len()).unwrap_or(u32::MAX);
        settings.max_concurrency.saturating_sub(slots_used.saturating_add(waiting))
    }

    fn vote(
        &mut self,
        to: WorkerId,
        key: &TransactionKey,
        request_hash: RequestHash,
        kind: VoteKind,
    ) {
        let Settings { service, instance, store, .. } = self.settings();
        let vote = Vote {
            key: key.clone(),
            request_hash,
            service: service.clone(),
            instance: instance.clone(),
            store: store.clone(),
            kind,
            free: self.free(),
        };
        self.effects.push(Effect::Vote { to, vote });
    }

    fn refused(&self, code: ReasonCode) -> VoteKind {
        VoteKind::Refused(Reason::at(&self.settings().service, code))
    }

    fn done(&mut self, finisher: Finisher, applied: Result<(), Arc<str>>) {
        let Settings { service, instance, store, .. } = self.settings();
        let done = Done {
            key: finisher.finish.key,
            service: service.clone(),
            instance: instance.clone(),
            store: store.clone(),
            applied,
            parked: finisher.finish.parked,
            free: self.free(),
        };
        self.effects.push(Effect::Done { to: finisher.worker, done, ack: finisher.delivery });
    }

    fn inquire(&mut self, it: InDoubt) {
        let InDoubt { key, request_hash, branch, deadline } = it;
        let Settings { service, instance, .. } = self.settings();
        let (service, instance) = (service.clone(), instance.clone());
        let inquiry = Inquiry { key, request_hash, service, instance, branch, deadline };
        self.effects.push(Effect::Inquire(inquiry));
    }

    fn jitter(&self, key: &TransactionKey, bound: Duration) -> Duration {
        jitter(self.settings().seed, self.now, key, bound)
    }
}
