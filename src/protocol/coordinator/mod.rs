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

mod event;
mod flow;
mod transaction;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

pub use self::{
    event::{Anomaly, Effect, Event},
    transaction::Phase,
};
use self::{flow::Flow, transaction::Transaction};
use crate::protocol::{
    deadlines::Deadlines,
    ids::{InstanceId, RequestHash, ServiceName, StoreId, TransactionKey, WorkerId},
    jitter::jitter,
    journal::{JournalView, Recall},
    keymap::KeyMap,
    message::{
        Ballot, Command, Decision, Delivery, Destination, Done, Finish, Inquiry, Outcome, Reason,
        ReasonCode, Request, Vote,
    },
    time::Time,
};

/// What a worker knows of a service that is its own.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Slots {
    /// How many it has.
    pub max_concurrency: u32,
    /// How long a prepare may wait for one.
    pub max_wait: Duration,
}

/// How patient a worker is, and how much it takes on.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Settings {
    /// Whose records these are.
    pub worker: WorkerId,
    /// How long the prepares of a transaction may take, unless its request says otherwise.
    pub prepare_timeout: Duration,
    /// How long to wait for the answer to a commit before it is sent again, and how long to go on
    /// telling of an abort.
    pub finish_timeout: Duration,
    /// How long to wait for a holder's vote after a take-over.
    pub query_timeout: Duration,
    /// How long to wait for a record to be read back before it is appended again.
    pub append_timeout: Duration,
    /// How often a failed commit is tried again.
    pub commit_retries: u32,
    /// The pause before the first repetition; it doubles with each.
    pub backoff_first: Duration,
    /// The longest pause.
    pub backoff_max: Duration,
    /// How often a result that can't be delivered is published again. After that it counts as
    /// unclaimed.
    pub result_retries: u32,
    /// How far any two clocks of the system may differ.
    pub clock_margin: Duration,
    /// How long a decision stays in view.
    pub window: Duration,
    /// How many decisions stay in view at most, at some 600 bytes each.
    pub records_max: usize,
    /// Of how many decisions that have gone out of view digests are kept, at 11 bytes each: of what
    /// was requested since the first of these was made, only what has a digest is looked for
    /// further back.
    pub digests_max: usize,
    /// How many transactions are worked on at once.
    pub in_flight_max: usize,
    /// How many more may wait for slots; half as many for services that can't be reached, or that
    /// nobody serves.
    pub waiting_max: usize,
    /// A request delivered more often than this is aborted. A driver that tries such requests apart
    /// from others tells of no more deliveries than this, until it gives one up.
    pub deliveries_max: u32,
    /// How many inquiries about transactions of other workers are looked into at once.
    pub inquiries_max: usize,
    /// From how many services on those are forgotten that were not heard of for a minute.
    pub services_max: usize,
    /// The services that no other worker uses. Of these it knows what is free without being told,
    /// and their slots can be taken in any order.
    pub own_services: BTreeMap<ServiceName, Slots>,
    /// What the jitter of this worker's pauses starts from.
    pub seed: u64,
}

impl Settings {
    /// The defaults, for this worker.
    pub fn new(worker: WorkerId) -> Self {
        Self {
            worker,
            prepare_timeout: Duration::from_secs(5),
            finish_timeout: Duration::from_secs(5),
            query_timeout: Duration::from_millis(100),
            append_timeout: Duration::from_secs(5),
            commit_retries: 3,
            backoff_first: Duration::from_millis(100),
            backoff_max: Duration::from_secs(10),
            result_retries: 7,
            clock_margin: Duration::from_secs(60),
            window: Duration::from_secs(15 * 60),
            records_max: 200_000,
            digests_max: 8_000_000,
            in_flight_max: 256,
            waiting_max: 4096,
            deliveries_max: 20,
            inquiries_max: 4096,
            services_max: 4096,
            own_services: BTreeMap::new(),
            seed: 0,
        }
    }
}

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

/// An inquiry about a transaction that this worker doesn't work on.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Inquest {
    request_hash: RequestHash,
    askers: BTreeSet<(ServiceName, InstanceId)>,
    deadline: Time,
    /// When to propose again; `None`: it is being looked up.
    propose_at: Option<Time>,
    due: Option<Time>,
}

/// The look further back in the journal: one at a time serves all who wait for it.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
struct History {
    /// Whom the look under way serves; it has begun early enough for all of them.
    serving: BTreeSet<TransactionKey>,
    /// The first record it has found of each.
    found: BTreeMap<TransactionKey, Arc<Decision>>,
    /// The first record of each that was in view since it began: the view may forget it meanwhile.
    in_view: BTreeMap<TransactionKey, Arc<Decision>>,
    /// Whom the next one serves.
    next: BTreeSet<TransactionKey>,
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

    // ---- Requests ----------------------------------------------------------------------------

    fn request_received(
        &mut self,
        now: Time,
        request: Request,
        delivery: Delivery,
        deliveries: u32,
        effects: &mut Vec<Effect>,
    ) {
        if self.draining {
            return effects.push(Effect::Release(delivery));
        }
        let Settings { clock_margin, deliveries_max, .. } = self.shared.settings;
        if request.key.requested_at > now + clock_margin {
            return reject(request, delivery, ReasonCode::Invalid, effects);
        }
        let key = request.key.clone();
        let in_flight = self.same_id_in_flight(&key);
        if in_flight.as_ref() == Some(&key) {
            return self.attach(now, &key, request, (delivery, deliveries), effects);
        }
        let (recall, earlier) = self.view.recall_or_namesake(&key, clock_margin);
        // What has an outcome of its own, or may have one, is no retry of another's.
        if recall == Recall::Absent
            && let Some(earlier) = in_flight
        {
            // What others have done for the earlier one they did for its own requests.
            return self.attach(now, &earlier, request, (delivery, 1), effects);
        }
        let decided = match &recall {
            Recall::Found(first) => Some(first),
            Recall::Absent | Recall::OutOfSight => earlier.as_ref(),
        };
        if decided.is_some_and(|first| first.request_hash != request.request_hash) {
            return reject(request, delivery, ReasonCode::IdReused, effects);
        }
        let transaction = Transaction::new(request, delivery, deliveries, deliveries_max);
        self.transactions.insert(&key, Box::new(transaction));
        match (recall, earlier) {
            (Recall::Found(first), _) => {
                self.with(now, &key, effects, |it, cx| it.adopt(&first, cx));
            }
            (Recall::Absent, Some(earlier)) => {
                self.with(now, &key, effects, |it, cx| it.answer_as(&earlier, cx));
            }
            (Recall::Absent, None) => self.with(now, &key, effects, Transaction::start),
            (Recall::OutOfSight, _) => self.look_further_back(&key, effects),
        }
    }

    /// The transaction in flight under this id: this very one, or else one that this is a careless
    /// retry of.
    fn same_id_in_flight(&self, key: &TransactionKey) -> Option<TransactionKey> {
        let mut times = self.transactions.of_id(&key.id).map(|(requested_at, _)| requested_at);
        let first = times.next()?;
        let exact = first == key.requested_at || times.any(|at| at == key.requested_at);
        let requested_at = if exact { key.requested_at } else { first };
        Some(TransactionKey { id: key.id.clone(), requested_at })
    }

    fn attach(
        &mut self,
        now: Time,
        to: &TransactionKey,
        request: Request,
        (delivery, deliveries): (Delivery, u32),
        effects: &mut Vec<Effect>,
    ) {
        self.with(now, to, effects, |it, cx| {
            if it.request().request_hash == request.request_hash {
                cx.effects.push(Effect::Report(Anomaly::DuplicateRequest(request.key)));
                it.attach(delivery, deliveries, cx);
            } else {
                reject(request, delivery, ReasonCode::IdReused, cx.effects);
            }
        });
    }

    // ---- The journal -------------------------------------------------------------------------

    fn records_read(
        &mut self,
        now: Time,
        offset: u64,
        decisions: Vec<Arc<Decision>>,
        effects: &mut Vec<Effect>,
    ) {
        if offset > self.view.next_offset() {
            effects.push(Effect::Report(Anomaly::JournalGap(offset)));
            self.view.attach(offset, now + Duration::from_millis(1));
            self.recall_undecided(now, effects);
        }
        for first in self.view.read(now, offset, decisions) {
            self.first_read(now, &first, effects);
        }
    }

    fn first_read(&mut self, now: Time, first: &Arc<Decision>, effects: &mut Vec<Effect>) {
        self.history.seen(first);
        // Until it has been looked up, an earlier record may be the outcome.
        let is_looked_up = |it: &Inquest| it.propose_at.is_some();
        if self.inquests.get(&first.key).is_some_and(is_looked_up) {
            self.answer_inquest(now, first, effects);
        }
        self.with(now, &first.key, effects, |it, cx| {
            if it.is_undecided() && it.phase() != Phase::Recalling {
                it.adopt(first, cx);
            }
        });
    }

    /// Records are lost: what was not seen to be decided may have been.
    fn recall_undecided(&mut self, now: Time, effects: &mut Vec<Effect>) {
        let is_undecided = |it: &Transaction| it.is_undecided() && it.phase() != Phase::Recalling;
        let mut keys = self.transactions.keys();
        keys.retain(|key| self.transactions.get(key).is_some_and(|it| is_undecided(it)));
        // A look under way ends before the gap, and the view begins after it.
        self.history.next.extend(self.history.serving.iter().cloned());
        for key in keys {
            self.with(now, &key, effects, Transaction::recall_again);
            self.look_further_back(&key, effects);
        }
        // Who has asked will ask again.
        self.inquests.clear();
        self.shared.inquest_deadlines = Deadlines::default();
    }

    fn look_further_back(&mut self, key: &TransactionKey, effects: &mut Vec<Effect>) {
        self.history.next.insert(key.clone());
        self.begin_look(effects);
    }

    fn begin_look(&mut self, effects: &mut Vec<Effect>) {
        if !self.history.serving.is_empty() {
            return;
        }
        let Some(earliest) = self.history.next.iter().map(|key| key.requested_at).min() else {
            return;
        };
        self.history.serving = std::mem::take(&mut self.history.next);
        let seen = |key| Some((TransactionKey::clone(key), self.view.earliest_seen(key)?.clone()));
        self.history.in_view = self.history.serving.iter().filter_map(seen).collect();
        let from = earliest - self.shared.settings.clock_margin;
        effects.push(Effect::ReadHistory { from, until: self.view.oldest_offset() });
    }

    fn history_ended(&mut self, now: Time, reaches: Option<Time>, effects: &mut Vec<Effect>) {
        let found = std::mem::take(&mut self.history.found);
        let in_view = std::mem::take(&mut self.history.in_view);
        let margin = self.shared.settings.clock_margin;
        for key in std::mem::take(&mut self.history.serving) {
            if self.history.next.contains(&key) {
                continue;
            }
            let first = found.get(&key).or_else(|| in_view.get(&key)).cloned();
            let is_complete = reaches.is_some_and(|reaches| reaches <= key.requested_at - margin);
            self.recalled(now, &key, first.filter(|_| is_complete), is_complete, effects);
        }
        self.begin_look(effects);
    }

    fn recalled(
        &mut self,
        now: Time,
        key: &TransactionKey,
        first: Option<Arc<Decision>>,
        is_complete: bool,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(inquest) = self.inquests.get(key).filter(|it| it.propose_at.is_none()) {
            let is_due = inquest.deadline < now;
            match &first {
                Some(first) => self.answer_inquest(now, first, effects),
                None if is_complete && is_due => self.propose_abort(now, key, effects),
                None => drop(self.drop_inquest(key)),
            }
        }
        self.with(now, key, effects, |it, cx| match first {
            _ if it.phase() != Phase::Recalling => {}
            Some(first) => it.adopt(&first, cx),
            None if is_complete => it.start(cx),
            None => it.park(cx),
        });
    }

    // ---- Services ----------------------------------------------------------------------------

    fn service_found(&mut self, now: Time, service: &ServiceName, effects: &mut Vec<Effect>) {
        let Some(flow) = self.shared.flows.get_mut(service) else { return };
        if flow.found() {
            effects.push(Effect::Report(Anomaly::ServiceAvailable(service.clone())));
        }
        if flow.served() {
            effects.push(Effect::Report(Anomaly::ServiceServed(service.clone())));
        }
        self.try_all_anew(now, service, effects);
    }

    /// The service exists, and nobody serves it. Who waits for it does so from now on with a
    /// deadline, and only so many.
    fn service_unserved(&mut self, now: Time, service: &ServiceName, effects: &mut Vec<Effect>) {
        let Some(flow) = self.shared.flows.get_mut(service) else { return };
        if flow.is_found() && flow.is_unserved() {
            return;
        }
        if flow.found() {
            effects.push(Effect::Report(Anomaly::ServiceAvailable(service.clone())));
        }
        if flow.unserved() {
            effects.push(Effect::Report(Anomaly::ServiceUnserved(service.clone())));
        }
        self.try_all_anew(now, service, effects);
    }

    /// What those who wait for the service go by is another now.
    fn try_all_anew(&mut self, now: Time, service: &ServiceName, effects: &mut Vec<Effect>) {
        let Some(flow) = self.shared.flows.get_mut(service) else { return };
        let waiters: Vec<_> = flow.dequeue_all().collect();
        for key in waiters {
            self.with(now, &key, effects, |it, cx| it.dequeued(service, cx));
        }
    }

    fn service_missing(&mut self, now: Time, service: &ServiceName, effects: &mut Vec<Effect>) {
        let Some(mut flow) = self.shared.flows.remove(service) else { return };
        for key in flow.dequeue_all() {
            self.with(now, &key, effects, |it, cx| it.service_missing(service, cx));
        }
    }

    /// The service can't be reached; `refused`: its queue has refused a prepare. Who waits for it
    /// does so from now on with a deadline, and only so many.
    fn service_unavailable(
        &mut self,
        now: Time,
        service: &ServiceName,
        refused: bool,
        effects: &mut Vec<Effect>,
    ) {
        let Some(flow) = self.shared.flows.get_mut(service) else { return };
        if flow.is_found() {
            let Settings { backoff_first, .. } = self.shared.settings;
            let after = if refused { flow.refused(backoff_first) } else { Duration::ZERO };
            effects.push(Effect::FindService { service: service.clone(), after });
        }
        if !refused {
            flow.unreached();
        }
        if flow.is_unavailable() {
            return;
        }
        if flow.unavailable() {
            effects.push(Effect::Report(Anomaly::ServiceUnavailable(service.clone())));
        }
        self.try_all_anew(now, service, effects);
    }

    /// The service is gone since it was found.
    fn prepare_unroutable(
        &mut self,
        now: Time,
        key: &TransactionKey,
        service: &ServiceName,
        effects: &mut Vec<Effect>,
    ) {
        self.with(now, key, effects, |it, cx| it.service_missing(service, cx));
        // One that is not found is being looked for already.
        if let Some(flow) = self.shared.flows.get_mut(service).filter(|flow| flow.is_found()) {
            flow.lost();
            let service = service.clone();
            effects.push(Effect::FindService { service, after: Duration::ZERO });
        }
    }

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

    fn hint(&mut self, now: Time, service: &ServiceName, instance: &InstanceId, free: u32) {
        let Shared { flows, touched, .. } = &mut self.shared;
        let Some(flow) = flows.get_mut(service) else { return };
        flow.reported(now, instance, free);
        if flow.has_waiters() {
            touched.insert(service.clone());
        }
    }

    /// All instances of a service should share one store.
    fn compare_stores(
        &mut self,
        now: Time,
        service: &ServiceName,
        instance: &InstanceId,
        store: Option<&StoreId>,
        effects: &mut Vec<Effect>,
    ) {
        let (Some(flow), Some(store)) = (self.shared.flows.get_mut(service), store) else { return };
        if let Some(before) = flow.named_store(now, instance, store) {
            let (service, now) = (service.clone(), (instance.clone(), store.clone()));
            effects.push(Effect::Report(Anomaly::StoresDiffer { service, before, now }));
        }
    }

    /// What the service reported with what was just handled.
    fn learn(&mut self, service: &ServiceName) {
        if let Some(flow) = self.shared.flows.get_mut(service) {
            flow.learn();
        }
    }

    // ---- Inquiries ---------------------------------------------------------------------------

    fn inquiry_received(&mut self, now: Time, inquiry: Inquiry, effects: &mut Vec<Effect>) {
        let key = inquiry.key.clone();
        if let Some(it) = self.transactions.get(&key) {
            let is_ours = it.request().request_hash == inquiry.request_hash;
            return self.with(now, &key, effects, |it, cx| match it.is_undecided() {
                // It holds something. Whether that is prepared, or what a failed prepare has left,
                // only its vote can say.
                true if is_ours => it.query(&inquiry.service, inquiry.instance, cx),
                true => {}
                false => it.answer_inquiry(inquiry, cx),
            });
        }
        let cx = &mut Context { now, shared: &mut self.shared, effects };
        let margin = cx.settings().clock_margin;
        // Nobody can hold it yet. A record of it, made before those who look for one begin to read,
        // would be missed by them.
        let is_ahead = key.requested_at > now + margin;
        match self.view.recall(&key, margin) {
            Recall::Found(first) => cx.tell(&first, &inquiry.service, inquiry.instance),
            Recall::Absent | Recall::OutOfSight if is_ahead => {}
            Recall::Absent if now <= inquiry.deadline => {}
            Recall::Absent => {
                if self.open_inquest(inquiry, effects) {
                    self.propose_abort(now, &key, effects);
                }
            }
            Recall::OutOfSight => {
                if self.open_inquest(inquiry, effects) {
                    self.look_further_back(&key, effects);
                }
            }
        }
    }

    /// Whether this is the first that is asked about the transaction.
    fn open_inquest(&mut self, inquiry: Inquiry, effects: &mut Vec<Effect>) -> bool {
        let asker = (inquiry.service, inquiry.instance);
        if let Some(inquest) = self.inquests.get_mut(&inquiry.key) {
            // What few instances hold one transaction is bounded by its services; a flood is not.
            if inquest.askers.len() < self.shared.settings.inquiries_max {
                inquest.askers.insert(asker);
            }
            return false;
        }
        if self.inquests.len() >= self.shared.settings.inquiries_max {
            effects.push(Effect::Report(Anomaly::InquiryDropped(inquiry.key)));
            return false;
        }
        let inquest = Inquest {
            request_hash: inquiry.request_hash,
            askers: BTreeSet::from([asker]),
            deadline: inquiry.deadline,
            propose_at: None,
            due: None,
        };
        self.inquests.insert(inquiry.key, inquest);
        true
    }

    /// Asking is deciding: a transaction past its deadline that nobody has decided is aborted.
    fn propose_abort(&mut self, now: Time, key: &TransactionKey, effects: &mut Vec<Effect>) {
        let Some(inquest) = self.inquests.get_mut(key) else { return };
        let Shared { settings, inquest_deadlines, .. } = &mut self.shared;
        let at = now + settings.append_timeout;
        inquest.propose_at = Some(at);
        inquest_deadlines.wake_by(key, &mut inquest.due, at);
        effects.push(Effect::Append(Decision {
            key: key.clone(),
            request_hash: inquest.request_hash,
            outcome: Outcome::Aborted,
            branches: Vec::new(),
            reason: Some(Reason { code: ReasonCode::Deadline, service: None, message: None }),
            decided_at: now,
            worker: settings.worker.clone(),
        }));
    }

    fn answer_inquest(&mut self, now: Time, first: &Decision, effects: &mut Vec<Effect>) {
        let Some(inquest) = self.drop_inquest(&first.key) else { return };
        let cx = &mut Context { now, shared: &mut self.shared, effects };
        for (service, instance) in inquest.askers {
            cx.tell(first, &service, instance);
        }
    }

    fn drop_inquest(&mut self, key: &TransactionKey) -> Option<Inquest> {
        let mut inquest = self.inquests.remove(key)?;
        self.shared.inquest_deadlines.disarm(key, &mut inquest.due);
        Some(inquest)
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

    /// Lets those go on who waited for what has become free.
    fn serve_waiters(&mut self, now: Time, effects: &mut Vec<Effect>) {
        if self.shared.gated && self.shared.active < self.shared.settings.in_flight_max {
            self.shared.gated = false;
            let waiting = self.shared.flows.iter().filter(|(_, flow)| flow.has_waiters());
            let services: Vec<_> = waiting.map(|(service, _)| service.clone()).collect();
            self.shared.touched.extend(services);
        }
        while let Some(service) = self.shared.touched.pop_first() {
            while let Some(key) = self.next_waiter(now, &service) {
                self.with(now, &key, effects, |it, cx| it.dequeued(&service, cx));
            }
        }
    }

    fn next_waiter(&mut self, now: Time, service: &ServiceName) -> Option<TransactionKey> {
        let may_begin = self.shared.active < self.shared.settings.in_flight_max;
        let flow = self.shared.flows.get_mut(service).filter(|flow| flow.is_found())?;
        if !flow.admits(now, flow.has_begun_waiters()) {
            if let (Some(at), Some(first)) = (flow.to_be_tried_at(now), flow.first_waiter())
                && let Some(it) = self.transactions.get_mut(first)
            {
                it.wake_by(at, &mut self.shared.deadlines);
            }
            return None;
        }
        let next = flow.dequeue(may_begin);
        if next.is_none() && flow.has_waiters() {
            self.shared.gated = true;
        }
        next
    }
}

impl History {
    fn seen(&mut self, decision: &Arc<Decision>) {
        if self.serving.contains(&decision.key) {
            self.in_view.entry(decision.key.clone()).or_insert_with(|| Arc::clone(decision));
        }
    }

    fn read(&mut self, decision: Arc<Decision>) {
        if self.serving.contains(&decision.key) {
            self.found.entry(decision.key.clone()).or_insert(decision);
        }
    }
}

impl Context<'_> {
    fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    fn is_at_capacity(&self) -> bool {
        self.shared.active >= self.shared.settings.in_flight_max
    }

    /// Whether as many wait for services that can't be reached, or that nobody serves, as may: with
    /// more, requests that need none of these would soon not be taken in.
    fn is_full_of_stranded(&self) -> bool {
        let out_of_reach = self.shared.flows.values().filter(|flow| flow.is_out_of_reach());
        let waiters: usize = out_of_reach.map(Flow::waiters).sum();
        waiters >= (self.shared.settings.waiting_max / 2).max(1)
    }

    /// What is known of `service`, if it is remembered.
    fn known_flow(&mut self, service: &ServiceName) -> Option<&mut Flow> {
        self.shared.flows.get_mut(service)
    }

    /// Something was sent to `service` and not answered in time: perhaps nobody serves it.
    fn check(&mut self, service: &ServiceName) {
        let is_of_use = |flow: &&Flow| flow.is_found() && !flow.is_unserved() && !flow.is_own();
        if self.shared.flows.get(service).filter(is_of_use).is_some() {
            self.effects.push(Effect::CheckService(service.clone()));
        }
    }

    /// What is known of `service`; it is looked for if it is new.
    fn flow(&mut self, service: &ServiceName) -> &mut Flow {
        let Shared { flows, settings, .. } = &mut *self.shared;
        if flows.len() >= settings.services_max && !flows.contains_key(service) {
            let now = self.now;
            flows.retain(|_, flow| !flow.is_stale(now));
        }
        flows.entry(service.clone()).or_insert_with(|| {
            let (service, after) = (service.clone(), Duration::ZERO);
            let own = settings.own_services.get(&service);
            self.effects.push(Effect::FindService { service, after });
            Flow::new(own)
        })
    }

    /// Tells the flow of `service` something that may let waiters go on.
    fn relieve(&mut self, service: &ServiceName, tell: impl FnOnce(&mut Flow)) {
        let Some(flow) = self.shared.flows.get_mut(service) else { return };
        tell(flow);
        if flow.has_waiters() {
            self.shared.touched.insert(service.clone());
        }
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
