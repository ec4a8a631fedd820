//! The worker's side of the protocol: [`Event`]s in, [`Effect`]s out.
//!
//! A request is looked up in the journal; if it is undecided the services are asked for their
//! votes; an outcome is proposed; and only when the *first* record of the transaction has been read
//! back does anyone hear of it.
//!
//! ```text
//! Recalling ──> Waiting ──> Preparing ──> Deciding ──> Committing ──> Answering ──> (forgotten)
//!     │  │          ^           ^             └──────> Aborting ──────────────────> (forgotten)
//!     │  └─────> Querying ──────┘
//!     └────────> Parking ─────────────────────────────────────────────────────────> (forgotten)
//! ```
//!
//! Any phase before `Deciding` may be cut short by a decision of another worker's.
//!
//! **Invariant:** no commit, abort, cancel or result leaves before the outcome was read back.
//!
//! **Invariant:** nothing that a crash may lose is needed again: a request that comes once more is
//! treated like a new one.
//!
//! The rooms: `requests`, what becomes of a request when it comes; `transaction`, each one that is
//! worked on; `history`, what is read of the journal and looked up further back in it; `inquiries`,
//! about transactions of other workers; `services`, who may go on when one is found or has a free
//! slot; `admission`, what is known of one service's slots.
//!
//! **Nothing that one producer or service lacks holds this worker's capacity without a bound.** A
//! result that can't be delivered is published again with a growing pause, and after
//! [`Settings::result_retries`] repetitions it counts as unclaimed: the request is acknowledged, and
//! its producer can ask again with the same key. A transaction that waits for a service that can't
//! be reached is aborted (`unavailable`) when its prepare timeout is over; until then it doesn't
//! count as in flight unless it holds something elsewhere. One that waits for a service that nobody
//! serves is too (`no_slot`, and a message says why), and only one at a time has its prepare there.

mod admission;
mod event;
mod history;
mod inquiries;
mod requests;
mod services;
mod settings;
mod transaction;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use self::{
    admission::ServiceLoad, history::HistorySearch, inquiries::Inquiries,
    transaction::CoordinatedTransaction,
};
pub use self::{
    event::{Anomaly, Effect, Event},
    settings::{Settings, Slots},
    transaction::Phase,
};
use crate::protocol::{
    deadlines::Deadlines,
    ids::{InstanceId, ServiceName, TransactionKey},
    jitter::jitter,
    journal::{JournalView, Recall},
    keymap::KeyMap,
    message::{
        Command, Decision, Delivery, Destination, Done, Finish, Reason, ReasonCode, Request, Vote,
        VoteKind,
    },
    time::Time,
};

/// One worker: every transaction it works on, what it knows of the services, and its view of the
/// journal.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Coordinator {
    work: Work,
    shared: SharedState,
}

/// The work of a worker, by kind. It is apart from [`SharedState`] so that a [`CoordinatorContext`]
/// can lend that to whichever of these handles an event.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Work {
    view: JournalView,
    /// Boxed: a map moves its values about.
    transactions: KeyMap<Box<CoordinatedTransaction>>,
    inquiries: Inquiries,
    history: HistorySearch,
}

/// What all transactions of a worker share.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct SharedState {
    settings: Settings,
    loads: BTreeMap<ServiceName, ServiceLoad>,
    deadlines: Deadlines,
    /// Transactions that have begun.
    active: usize,
    /// Whether one that could have begun was kept back because too many have.
    was_at_capacity: bool,
    /// Services at which a slot, or the right to ask for one, may have become free.
    dirty_services: BTreeSet<ServiceName>,
    draining: bool,
}

/// What the handling of an event may use, besides what the event is about: the moment, what all
/// transactions share, and the list to which whatever must be done is appended.
struct CoordinatorContext<'a> {
    now: Time,
    shared: &'a mut SharedState,
    effects: &'a mut Vec<Effect>,
}

impl Coordinator {
    /// A worker with nothing to do, that has read nothing.
    pub fn new(settings: Settings) -> Self {
        let view = JournalView::new(settings.records_max, settings.window)
            .with_digests(settings.digests_max);
        Self { work: Work::new(view), shared: SharedState::new(settings) }
    }

    /// Takes in one event and appends what must now be done, in order, to `effects`.
    pub fn handle(&mut self, now: Time, event: Event, effects: &mut Vec<Effect>) {
        let cx = &mut CoordinatorContext { now, shared: &mut self.shared, effects };
        self.work.handle(event, cx);
        self.work.serve_waiters(cx);
    }

    /// The next moment at which [`Event::DeadlineReached`] should be delivered, if there is one.
    pub fn next_deadline(&self) -> Option<Time> {
        let inquiries = self.work.inquiries.next_deadline();
        self.shared.deadlines.next().into_iter().chain(inquiries).min()
    }

    /// How many more requests it can take now.
    pub fn room(&self) -> usize {
        let Settings { in_flight_max, waiting_max, .. } = self.shared.settings;
        if self.shared.draining {
            return 0;
        }
        let begin = in_flight_max.saturating_sub(self.shared.active);
        begin.min((in_flight_max + waiting_max).saturating_sub(self.work.transactions.len()))
    }

    /// How many transactions it has not finished, begun or not.
    pub fn len(&self) -> usize {
        self.work.transactions.len()
    }

    /// How many of these wait for a slot before they begin.
    pub fn waiting(&self) -> usize {
        self.work.transactions.len() - self.shared.active
    }

    /// Whether it has nothing to do.
    pub fn is_empty(&self) -> bool {
        self.work.transactions.is_empty()
    }

    /// Where a transaction stands, if it is worked on here.
    pub fn phase_of(&self, key: &TransactionKey) -> Option<Phase> {
        self.work.transactions.get(key).map(|it| it.phase())
    }

    /// The offset from which to read the journal on after a break.
    pub fn next_offset(&self) -> u64 {
        self.work.view.next_offset()
    }

    /// What this worker has read of the journal.
    pub fn view(&self) -> &JournalView {
        &self.work.view
    }
}

impl SharedState {
    fn new(settings: Settings) -> Self {
        Self {
            settings,
            loads: BTreeMap::new(),
            deadlines: Deadlines::default(),
            active: 0,
            was_at_capacity: false,
            dirty_services: BTreeSet::new(),
            draining: false,
        }
    }
}

impl Work {
    fn new(view: JournalView) -> Self {
        Self {
            view,
            transactions: KeyMap::new(),
            inquiries: Inquiries::default(),
            history: HistorySearch::default(),
        }
    }

    fn handle(&mut self, event: Event, cx: &mut CoordinatorContext<'_>) {
        match event {
            Event::JournalAttached { next, since } => self.view.attach(next, since),
            Event::RecordsRead { offset, decisions } => self.records_read(offset, decisions, cx),
            Event::HistoryRead(decision) => self.history.read(decision),
            Event::HistoryEnded { reaches } => self.history_ended(reaches, cx),
            Event::RequestReceived { request, delivery, deliveries } => {
                self.request_received(request, delivery, deliveries, cx);
            }
            Event::ServiceFound(service) => self.service_found(&service, cx),
            Event::ServiceMissing(service) => self.service_missing(&service, cx),
            Event::ServiceUnavailable(service) => self.service_unavailable(&service, false, cx),
            Event::ServiceUnserved(service) => self.service_unserved(&service, cx),
            Event::VoteReceived(vote) => self.vote_received(vote, cx),
            Event::PrepareReturned { key, service } => {
                self.with(&key, cx, |it, cx| it.prepare_returned(&service, cx));
            }
            Event::PrepareUnroutable { key, service } => {
                self.prepare_unroutable(&key, &service, cx);
            }
            Event::PrepareRefused { key, service } => {
                self.service_unavailable(&service, true, cx);
                self.with(&key, cx, |it, cx| it.prepare_refused(&service, cx));
            }
            Event::DoneReceived { done, delivery } => self.done_received(done, delivery, cx),
            Event::InquiryReceived(inquiry) => self.inquiry_received(inquiry, cx),
            Event::ResultConfirmed { key, delivery } => {
                self.with(&key, cx, |it, cx| it.result_confirmed(delivery, cx));
            }
            Event::ResultFailed { key, delivery } => {
                self.with(&key, cx, |it, cx| it.result_failed(delivery, cx));
            }
            Event::ParkConfirmed { key, service } => {
                self.with(&key, cx, |it, cx| it.park_confirmed(service.as_ref(), cx));
            }
            Event::DeadlineReached => self.deadline_reached(cx),
            Event::Disconnected => self.disconnected(cx),
            Event::DrainRequested => self.drain(cx),
        }
    }

    /// Lets a transaction handle an event, and forgets it if that was the last it had to do.
    fn with(
        &mut self,
        key: &TransactionKey,
        cx: &mut CoordinatorContext<'_>,
        handle: impl FnOnce(&mut CoordinatedTransaction, &mut CoordinatorContext<'_>),
    ) {
        let Some(transaction) = self.transactions.get_mut(key) else { return };
        handle(transaction, cx);
        if transaction.is_finished() {
            transaction.withdraw(cx);
            self.forget(key, cx);
        }
    }

    fn forget(&mut self, key: &TransactionKey, cx: &mut CoordinatorContext<'_>) {
        let Some(mut transaction) = self.transactions.remove(key) else { return };
        cx.shared.deadlines.disarm(key, &mut transaction.due);
        if transaction.has_begun() {
            cx.shared.active -= 1;
        }
    }

    // ---- Votes and dones ---------------------------------------------------------------------

    fn vote_received(&mut self, vote: Vote, cx: &mut CoordinatorContext<'_>) {
        cx.reported(&vote.service, &vote.instance, vote.free, vote.store.as_ref());
        let (key, service) = (vote.key.clone(), vote.service.clone());
        let mut vote = Some(vote);
        self.with(&key, cx, |it, cx| {
            let Some(vote) = vote.take() else { return };
            if it.request().request_hash == vote.request_hash {
                it.record_vote(vote, cx);
            } else {
                let late = Anomaly::LateVote(vote.key, vote.service);
                cx.effects.push(Effect::Report(late));
            }
        });
        if let Some(vote) = vote {
            self.late_vote(vote, cx);
        }
        cx.learn(&service);
    }

    /// A vote for a transaction that isn't worked on here. If it is decided, the instance that voted
    /// hears how it ended; if not, the instance will inquire.
    fn late_vote(&self, vote: Vote, cx: &mut CoordinatorContext<'_>) {
        let holds = matches!(vote.kind, VoteKind::Prepared { .. } | VoteKind::Failed { .. });
        let margin = cx.settings().clock_margin;
        if let (true, Recall::Found(first)) = (holds, self.view.recall(&vote.key, margin)) {
            cx.tell(&first, &vote.service, vote.instance);
        }
        cx.effects.push(Effect::Report(Anomaly::LateVote(vote.key, vote.service)));
    }

    fn done_received(
        &mut self,
        done: Done,
        delivery: Option<Delivery>,
        cx: &mut CoordinatorContext<'_>,
    ) {
        cx.reported(&done.service, &done.instance, done.free, done.store.as_ref());
        self.with(&done.key, cx, |it, cx| it.record_done(&done, delivery, cx));
        cx.learn(&done.service);
        if done.parked && done.applied.is_ok() {
            let Done { key, service, .. } = done;
            cx.effects.push(Effect::Settle { key, service, ack: delivery, was_parked: true });
        }
    }

    // ---- Time, and the ends of things --------------------------------------------------------

    fn deadline_reached(&mut self, cx: &mut CoordinatorContext<'_>) {
        // What is armed meanwhile waits for the next time, even if it is due at once.
        for key in cx.shared.deadlines.take_due(cx.now) {
            self.with(&key, cx, |it, cx| {
                it.due = None;
                it.wake(cx);
            });
        }
        self.inquiries.deadline_reached(cx);
    }

    /// All that was delivered will be delivered again, so all that came of it is forgotten.
    fn disconnected(&mut self, cx: &mut CoordinatorContext<'_>) {
        let view = std::mem::replace(&mut self.view, JournalView::new(0, Duration::ZERO));
        *self = Self::new(view);
        let SharedState { settings, draining, .. } = &*cx.shared;
        *cx.shared = SharedState { draining: *draining, ..SharedState::new(settings.clone()) };
    }

    fn drain(&mut self, cx: &mut CoordinatorContext<'_>) {
        cx.shared.draining = true;
        let transactions = &self.transactions;
        let is_leaving =
            |key: &TransactionKey| transactions.get(key).is_some_and(|it| it.is_not_begun());
        cx.shared.loads.values_mut().for_each(|load| load.remove_all(is_leaving));
        for key in self.transactions.keys() {
            let mut released = false;
            self.with(&key, cx, |it, cx| released = it.release_if_not_begun(cx));
            if released {
                self.forget(&key, cx);
            }
        }
    }
}

impl CoordinatorContext<'_> {
    fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    fn wake(&mut self, key: &TransactionKey, due: &mut Option<Time>, at: Time) {
        self.shared.deadlines.wake_by(key, due, at);
    }

    /// Tells an instance how a transaction ended.
    fn tell(&mut self, decision: &Decision, service: &ServiceName, instance: InstanceId) {
        let finish = Finish {
            key: decision.key.clone(),
            outcome: decision.outcome,
            branch: decision.branch_of(service).cloned(),
            parked: false,
        };
        self.effects.push(Effect::Send {
            service: service.clone(),
            to: Destination::Instance(instance),
            command: Command::Finish(finish),
        });
    }

    fn backoff(&self, key: &TransactionKey, failures: u32) -> Duration {
        let settings = self.settings();
        let pause = transaction::backoff(settings.backoff_first, settings.backoff_max, failures);
        pause - self.jitter(key, pause / 4)
    }

    fn jitter(&self, key: &TransactionKey, bound: Duration) -> Duration {
        jitter(self.settings().seed, self.now, key, bound)
    }

    fn reject(&mut self, request: Request, delivery: Delivery, code: ReasonCode) {
        let message = match code {
            ReasonCode::IdReused => "another request has this id",
            ReasonCode::Invalid => "requested_at lies further ahead than clocks may differ",
            ReasonCode::Refused
            | ReasonCode::Failed
            | ReasonCode::NoSlot
            | ReasonCode::UnknownService
            | ReasonCode::Deadline
            | ReasonCode::Unavailable
            | ReasonCode::Cancelled => code.as_str(),
        };
        let reason = Reason::because(code, message);
        self.effects.push(Effect::Reject { request, delivery, reason });
    }
}
