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

use self::{admission::Flow, history::History, inquiries::Inquest, transaction::Transaction};
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
        Ballot, Command, Decision, Delivery, Destination, Done, Finish, Reason, ReasonCode,
        Request, Vote,
    },
    time::Time,
};

/// One worker: every transaction it works on, what it knows of the services, and its view of the
/// journal.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Coordinator {
    view: JournalView,
    /// Boxed: a map moves its values about.
    transactions: KeyMap<Box<Transaction>>,
    inquests: BTreeMap<TransactionKey, Inquest>,
    history: History,
    shared: Shared,
    draining: bool,
}

/// What all transactions of a worker share.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Shared {
    settings: Settings,
    flows: BTreeMap<ServiceName, Flow>,
    deadlines: Deadlines,
    inquest_deadlines: Deadlines,
    /// Transactions that have begun.
    active: usize,
    /// Whether one that could have begun was kept back because too many have.
    gated: bool,
    /// Services at which a slot, or the right to ask for one, may have become free.
    touched: BTreeSet<ServiceName>,
}

/// What a transaction may use while it handles an event.
struct Context<'a> {
    now: Time,
    shared: &'a mut Shared,
    effects: &'a mut Vec<Effect>,
}

impl Coordinator {
    /// A worker with nothing to do, that has read nothing.
    pub fn new(settings: Settings) -> Self {
        Self {
            view: JournalView::new(settings.records_max, settings.window)
                .with_digests(settings.digests_max),
            transactions: KeyMap::new(),
            inquests: BTreeMap::new(),
            history: History::default(),
            shared: Shared {
                settings,
                flows: BTreeMap::new(),
                deadlines: Deadlines::default(),
                inquest_deadlines: Deadlines::default(),
                active: 0,
                gated: false,
                touched: BTreeSet::new(),
            },
            draining: false,
        }
    }

    /// Takes in one event and appends what must now be done, in order, to `effects`.
    pub fn handle(&mut self, now: Time, event: Event, effects: &mut Vec<Effect>) {
        match event {
            Event::JournalAttached { next, since } => self.view.attach(next, since),
            Event::RecordsRead { offset, decisions } => {
                self.records_read(now, offset, decisions, effects);
            }
            Event::HistoryRead(decision) => self.history.read(decision),
            Event::HistoryEnded { reaches } => self.history_ended(now, reaches, effects),
            Event::RequestReceived { request, delivery, deliveries } => {
                self.request_received(now, request, delivery, deliveries, effects);
            }
            Event::ServiceFound(service) => self.service_found(now, &service, effects),
            Event::ServiceMissing(service) => self.service_missing(now, &service, effects),
            Event::ServiceUnavailable(service) => {
                self.service_unavailable(now, &service, false, effects);
            }
            Event::ServiceUnserved(service) => self.service_unserved(now, &service, effects),
            Event::VoteReceived(vote) => self.vote_received(now, vote, effects),
            Event::PrepareReturned { key, service } => {
                self.with(now, &key, effects, |it, cx| it.prepare_returned(&service, cx));
            }
            Event::PrepareUnroutable { key, service } => {
                self.prepare_unroutable(now, &key, &service, effects);
            }
            Event::PrepareRefused { key, service } => {
                self.service_unavailable(now, &service, true, effects);
                self.with(now, &key, effects, |it, cx| it.prepare_refused(&service, cx));
            }
            Event::DoneReceived { done, delivery } => {
                self.done_received(now, done, delivery, effects);
            }
            Event::InquiryReceived(inquiry) => self.inquiry_received(now, inquiry, effects),
            Event::ResultConfirmed { key, delivery } => {
                self.with(now, &key, effects, |it, cx| it.result_confirmed(delivery, cx));
            }
            Event::ResultFailed { key, delivery } => {
                self.with(now, &key, effects, |it, cx| it.result_failed(delivery, cx));
            }
            Event::ParkConfirmed { key, service } => {
                self.with(now, &key, effects, |it, cx| it.park_confirmed(service.as_ref(), cx));
            }
            Event::DeadlineReached => self.deadline_reached(now, effects),
            Event::Disconnected => self.disconnected(),
            Event::DrainRequested => self.drain(now, effects),
        }
        self.serve_waiters(now, effects);
    }

    /// The next moment at which [`Event::DeadlineReached`] should be delivered, if there is one.
    pub fn next_deadline(&self) -> Option<Time> {
        let shared = &self.shared;
        shared.deadlines.next().into_iter().chain(shared.inquest_deadlines.next()).min()
    }

    /// How many more requests it can take now.
    pub fn room(&self) -> usize {
        let Settings { in_flight_max, waiting_max, .. } = self.shared.settings;
        if self.draining {
            return 0;
        }
        let begin = in_flight_max.saturating_sub(self.shared.active);
        begin.min((in_flight_max + waiting_max).saturating_sub(self.transactions.len()))
    }

    /// How many transactions it has not finished, begun or not.
    pub fn len(&self) -> usize {
        self.transactions.len()
    }

    /// How many of these wait for a slot before they begin.
    pub fn waiting(&self) -> usize {
        self.transactions.len() - self.shared.active
    }

    /// Whether it has nothing to do.
    pub fn is_empty(&self) -> bool {
        self.transactions.is_empty()
    }

    /// Where a transaction stands, if it is worked on here.
    pub fn phase_of(&self, key: &TransactionKey) -> Option<Phase> {
        self.transactions.get(key).map(|it| it.phase())
    }

    /// The offset from which to read the journal on after a break.
    pub fn next_offset(&self) -> u64 {
        self.view.next_offset()
    }

    /// What this worker has read of the journal.
    pub fn view(&self) -> &JournalView {
        &self.view
    }

    /// Lets a transaction handle an event, and forgets it if that was the last it had to do.
    fn with(
        &mut self,
        now: Time,
        key: &TransactionKey,
        effects: &mut Vec<Effect>,
        handle: impl FnOnce(&mut Transaction, &mut Context<'_>),
    ) {
        let Some(transaction) = self.transactions.get_mut(key) else { return };
        let cx = &mut Context { now, shared: &mut self.shared, effects };
        handle(transaction, cx);
        if transaction.is_finished() {
            transaction.withdraw(cx);
            self.forget(key);
        }
    }

    fn forget(&mut self, key: &TransactionKey) {
        let Some(mut transaction) = self.transactions.remove(key) else { return };
        self.shared.deadlines.disarm(key, &mut transaction.due);
        if transaction.has_begun() {
            self.shared.active -= 1;
        }
    }

    // ---- Votes and dones -------------------------------------------------------------------------

    fn vote_received(&mut self, now: Time, vote: Vote, effects: &mut Vec<Effect>) {
        self.hint(now, &vote.service, &vote.instance, vote.free);
        self.compare_stores(now, &vote.service, &vote.instance, vote.store.as_ref(), effects);
        let (key, service) = (vote.key.clone(), vote.service.clone());
        let mut vote = Some(vote);
        self.with(now, &key, effects, |it, cx| {
            let Some(vote) = vote.take() else { return };
            if it.request().request_hash == vote.request_hash {
                it.record_vote(vote, cx);
            } else {
                let late = Anomaly::LateVote(vote.key, vote.service);
                cx.effects.push(Effect::Report(late));
            }
        });
        if let Some(vote) = vote {
            self.late_vote(now, vote, effects);
        }
        self.learn(&service);
    }

    /// A vote for a transaction that isn't worked on here: whoever voted for a decided one is told
    /// how it ended. Who voted for another will inquire.
    fn late_vote(&mut self, now: Time, vote: Vote, effects: &mut Vec<Effect>) {
        let cx = &mut Context { now, shared: &mut self.shared, effects };
        let holds = matches!(vote.ballot, Ballot::Prepared { .. } | Ballot::Failed { .. });
        let margin = cx.settings().clock_margin;
        if let (true, Recall::Found(first)) = (holds, self.view.recall(&vote.key, margin)) {
            cx.tell(&first, &vote.service, vote.instance);
        }
        cx.effects.push(Effect::Report(Anomaly::LateVote(vote.key, vote.service)));
    }

    fn done_received(
        &mut self,
        now: Time,
        done: Done,
        delivery: Option<Delivery>,
        effects: &mut Vec<Effect>,
    ) {
        self.hint(now, &done.service, &done.instance, done.free);
        self.compare_stores(now, &done.service, &done.instance, done.store.as_ref(), effects);
        self.with(now, &done.key, effects, |it, cx| it.record_done(&done, delivery, cx));
        self.learn(&done.service);
        if done.parked && done.applied.is_ok() {
            let Done { key, service, .. } = done;
            effects.push(Effect::Settle { key, service, ack: delivery, was_parked: true });
        }
    }

    // ---- Time, and the ends of things --------------------------------------------------------

    fn deadline_reached(&mut self, now: Time, effects: &mut Vec<Effect>) {
        // What is armed meanwhile waits for the next time, even if it is due at once.
        for key in self.shared.deadlines.take_due(now) {
            self.with(now, &key, effects, |it, cx| {
                it.due = None;
                it.wake(cx);
            });
        }
        for key in self.shared.inquest_deadlines.take_due(now) {
            if let Some(inquest) = self.inquests.get_mut(&key) {
                inquest.due = None;
                self.propose_abort(now, &key, effects);
            }
        }
    }

    /// All that was delivered will be delivered again, so all that came of it is forgotten.
    fn disconnected(&mut self) {
        let settings = self.shared.settings.clone();
        let view = std::mem::replace(&mut self.view, JournalView::new(0, Duration::ZERO));
        let draining = self.draining;
        *self = Self { view, draining, ..Self::new(settings) };
    }

    fn drain(&mut self, now: Time, effects: &mut Vec<Effect>) {
        self.draining = true;
        let transactions = &self.transactions;
        let is_leaving =
            |key: &TransactionKey| transactions.get(key).is_some_and(|it| it.is_unbegun());
        self.shared.flows.values_mut().for_each(|flow| flow.remove_all(is_leaving));
        let keys = self.transactions.keys();
        for key in keys {
            let mut released = false;
            self.with(now, &key, effects, |it, cx| released = it.release_unbegun(cx));
            if released {
                self.forget(&key);
            }
        }
    }
}

impl Context<'_> {
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
}

fn reject(request: Request, delivery: Delivery, code: ReasonCode, effects: &mut Vec<Effect>) {
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
    effects.push(Effect::Reject { request, delivery, reason: Reason::because(code, message) });
}
