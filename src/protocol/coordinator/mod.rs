//! The worker's side of the protocol: [`Event`]s in, [`Effect`]s out.
//!
//! The coordinator looks a request up in the journal. If it is undecided, the coordinator asks the services
//! for their votes, and proposes an outcome. Only when it has read back the *first* record of the
//! transaction does any process learn the outcome.
//!
//! ```text
//! Recalling ──> Waiting ──> Preparing ──> Deciding ──> Committing ──> Answering ──> (forgotten)
//!     │  │          ^           ^             └──────> Aborting ──────────────────> (forgotten)
//!     │  └─────> Querying ──────┘
//!     └────────> Parking ─────────────────────────────────────────────────────────> (forgotten)
//! ```
//!
//! A decision of another worker may end any phase before `Deciding`.
//!
//! **Invariant:** no commit, abort, cancel or result leaves before the outcome was read back.
//!
//! **Invariant:** nothing that a crash may lose is needed again: a request that is delivered again is
//! handled like a new one.
//!
//! The rooms: `requests`, what becomes of a request when it comes; `transaction`, each one that is
//! worked on; `history`, what is read of the journal and looked up further back in it; `inquiries`,
//! about transactions of other workers; `services`, who may go on when one is found or has a free
//! slot; `admission`, what is known of one service's slots.
//!
//! **No producer and no service can hold this worker's capacity without a bound.** A result that can't be
//! delivered is published again with growing pauses. After [`Settings::result_retries`] retries it counts
//! as unclaimed: the request is acknowledged, and its producer can ask again with the same key. A
//! transaction that waits for a service that can't be reached aborts (`unavailable`) when its prepare
//! timeout is over. Until then it doesn't count as in flight, unless it holds a slot of another service. A
//! transaction that waits for a service without instances aborts too (`no_slot`, with a message that says
//! why), and only one transaction at a time has its prepare in that service's queue.

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
    journal_view::{JournalView, Recall},
    keymap::KeyMap,
    message::{
        Command, Decision, Delivery, Destination, Done, Finish, Reason, ReasonCode, Request, Vote,
        VoteKind,
    },
    time::Time,
};

/// The coordinator of one worker: the transactions that it works on, what it knows of the services, and its
/// view of the journal.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Coordinator {
    work: Work,
    shared: SharedState,
}

/// What a coordinator works on, by kind. It is separate from [`SharedState`], so that a
/// [`CoordinatorContext`] can lend the shared state to the part that handles an event.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Work {
    view: JournalView,
    /// Boxed, since a map moves its values.
    transactions: KeyMap<Box<CoordinatedTransaction>>,
    inquiries: Inquiries,
    history: HistorySearch,
}

/// The state that all transactions of a worker share.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct SharedState {
    settings: Settings,
    loads: BTreeMap<ServiceName, ServiceLoad>,
    deadlines: Deadlines,
    /// How many transactions have begun.
    active: usize,
    /// Whether a transaction could not begin because too many have.
    was_at_capacity: bool,
    /// Services whose waiters may have a chance now.
    dirty_services: BTreeSet<ServiceName>,
    /// How many workers share the services.
    workers: u32,
    draining: bool,
}

/// What a handler of an event may use, besides its own part: the moment, the shared state, and the list of
/// effects.
struct CoordinatorContext<'a> {
    now: Time,
    shared: &'a mut SharedState,
    effects: &'a mut Vec<Effect>,
}

impl Coordinator {
    /// A coordinator that has no transactions and has read nothing.
    pub fn new(settings: Settings) -> Self {
        let view = JournalView::new(settings.records_max, settings.window)
            .with_digests(settings.digests_max);
        Self { work: Work::new(view), shared: SharedState::new(settings) }
    }

    /// Handles an event, and appends what must be done now, in order, to `effects`.
    pub fn handle(&mut self, now: Time, event: Event, effects: &mut Vec<Effect>) {
        let cx = &mut CoordinatorContext { now, shared: &mut self.shared, effects };
        self.work.handle(event, cx);
        self.work.serve_waiters(cx);
    }

    /// When to deliver the next [`Event::DeadlineReached`], if there is a deadline.
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

    /// How many unfinished transactions it has, begun or not.
    pub fn len(&self) -> usize {
        self.work.transactions.len()
    }

    /// How many transactions wait for a slot before they begin.
    pub fn waiting(&self) -> usize {
        self.work.transactions.len() - self.shared.active
    }

    /// Whether it has no transactions.
    pub fn is_empty(&self) -> bool {
        self.work.transactions.is_empty()
    }

    /// The phase of a transaction, if this coordinator works on it.
    pub fn phase_of(&self, key: &TransactionKey) -> Option<Phase> {
        self.work.transactions.get(key).map(|it| it.phase())
    }

    /// The offset from which to continue reading the journal after a break.
    pub fn next_offset(&self) -> u64 {
        self.work.view.next_offset()
    }

    /// The view of the journal.
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
            workers: 1,
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
            Event::WorkersCounted(workers) => cx.shared.workers = workers.max(1),
            Event::DeadlineReached => self.deadline_reached(cx),
            Event::Disconnected => self.disconnected(cx),
            Event::DrainRequested => self.drain(cx),
        }
    }

    /// Lets a transaction handle an event, and removes it if it is finished then.
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

    /// A vote for a transaction that this coordinator doesn't work on. If it is decided, the coordinator
    /// sends the outcome to the instance that voted; if not, the instance will inquire.
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
        // Deadlines that are set meanwhile wait for the next event, even if they are due at once.
        for key in cx.shared.deadlines.take_due(cx.now) {
            self.with(&key, cx, |it, cx| {
                it.due = None;
                it.wake(cx);
            });
        }
        self.inquiries.deadline_reached(cx);
    }

    /// The broker will deliver all requests again, so the coordinator drops their transactions.
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

    /// Sends the outcome of a transaction to an instance.
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
