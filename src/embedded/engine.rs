//! Connects both sides of the protocol in one process: a coordinator, one instance of each service, and
//! the queues between them.
//!
//! It performs the effects of the cores, except those that take time: it hands out the calls of the
//! services' code, and receives their results.

use std::{
    collections::{BTreeMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use crate::{
    anomalies,
    clock::ClockReading,
    embedded::{
        MemberSettings, Settings,
        backend::{Admission, Backend, LookUp, Task},
        report::{CallCounts, Concluded, ServiceReport},
    },
    journal::file::{EntryBatch, JournalError},
    participant::spans,
    protocol::{
        coordinator::{self, Coordinator},
        ids::{InstanceId, ServiceName, TransactionKey, WorkerId},
        message::{
            Answer, AnswerAt, Command, Decision, Delivery, Destination, Inquiry, Outcome, Parked,
            ParkedCause, Prepare, Reason, ReasonCode, Request, TransactionSpec,
        },
        participant::{self, Instance},
        time::Time,
    },
    transport::embedded::{MemoryPrepareQueue, MemoryRequestQueue},
    wire::result::Attempts,
};

pub(crate) struct Engine {
    settings: Settings,
    worker: WorkerId,
    coordinator: Coordinator,
    members: Vec<Member>,
    numbers: BTreeMap<ServiceName, usize>,
    backend: Box<dyn Backend>,
    /// What was appended and not read back yet: the journal's next message.
    appended: Vec<Arc<Decision>>,
    /// The number of journal messages that the coordinator has read: the offset of the next one.
    messages_read: u64,
    requests: MemoryRequestQueue,
    /// The requests in flight.
    in_flight: BTreeMap<TransactionKey, InFlight>,
    for_worker: VecDeque<coordinator::Event>,
    for_members: VecDeque<(usize, participant::Event)>,
    effects: Vec<coordinator::Effect>,
    member_effects: Vec<participant::Effect>,
    calls: Vec<(usize, participant::Effect)>,
    concluded: Vec<Concluded>,
    /// The transactions that have ended, but for which calls may still be made.
    lingering: Vec<TransactionKey>,
    /// The number of commands that were sent to any instance.
    to_any_instance: u64,
}

struct InFlight {
    /// When it was submitted.
    since: Duration,
    /// The calls for it, if they are counted.
    attempts: BTreeMap<ServiceName, Attempts>,
    /// The answer, and the latency.
    ended: Option<(Answer, Duration)>,
}

impl InFlight {
    fn into_concluded(self) -> Option<Concluded> {
        let (answer, took) = self.ended?;
        Some(Concluded { answer, attempts: self.attempts, took })
    }
}

/// One service: its queue, its instance, and the numbers for its report.
struct Member {
    name: ServiceName,
    instance: Instance,
    queue: MemoryPrepareQueue,
    max_concurrency: u32,
    calls: CallCounts,
    max_in_use: u32,
}

impl Engine {
    pub(crate) fn new(
        now: Time,
        mut settings: Settings,
        services: impl IntoIterator<Item = MemberSettings>,
        backend: impl Backend + 'static,
    ) -> Self {
        let worker = settings.coordinator.worker.clone();
        let mut members = Vec::new();
        let mut numbers = BTreeMap::new();
        for MemberSettings { name, max_concurrency, max_wait, has_store } in services {
            let instance = settings.instance.clone();
            let instance_settings = participant::Settings {
                has_store,
                // A prepare is repeated only while its request is in flight.
                remembered_max: 1024,
                inquire_after: settings.inquire_after,
                retry_parked_every: settings.coordinator.backoff_max,
                ..participant::Settings::new(name.clone(), instance, max_concurrency)
            };
            let slots = coordinator::Slots { max_concurrency, max_wait };
            settings.coordinator.own_services.insert(name.clone(), slots);
            numbers.insert(name.clone(), members.len());
            members.push(Member {
                name,
                instance: Instance::new(now, instance_settings),
                queue: MemoryPrepareQueue::new(max_concurrency, max_wait),
                max_concurrency,
                calls: CallCounts::default(),
                max_in_use: 0,
            });
        }
        let mut engine = Self {
            coordinator: Coordinator::new(settings.coordinator.clone()),
            settings,
            worker,
            members,
            numbers,
            appended: backend.history(),
            backend: Box::new(backend),
            messages_read: 0,
            requests: MemoryRequestQueue::default(),
            in_flight: BTreeMap::new(),
            for_worker: VecDeque::new(),
            for_members: VecDeque::new(),
            effects: Vec::new(),
            member_effects: Vec::new(),
            calls: Vec::new(),
            concluded: Vec::new(),
            lingering: Vec::new(),
            to_any_instance: 0,
        };
        engine.attach_journal();
        engine
    }

    /// How many more requests the engine can take now.
    pub(crate) fn room(&self) -> usize {
        if self.backend.is_looking() { 0 } else { self.coordinator.room() }
    }

    /// Whether nothing is in flight.
    pub(crate) fn is_idle(&self) -> bool {
        self.coordinator.is_empty() && self.backend.is_idle()
    }

    /// Submits a transaction. Its `requested_at` is now, unless the journal has another.
    pub(crate) fn submit(&mut self, now: ClockReading, spec: TransactionSpec) {
        let (requested_at, deliveries) = match self.backend.admit(now.time, &spec) {
            Admission::Request { requested_at, deliveries } => (requested_at, deliveries),
            Admission::Over(answer) => return self.concluded.push(Concluded::at_once(answer)),
            Admission::Another(key) => {
                let answer = rejected(now.time, &key, id_reused());
                return self.concluded.push(Concluded::at_once(answer));
            }
            Admission::Unknown => return,
        };
        let request = Request {
            key: TransactionKey { id: spec.id, requested_at },
            request_hash: spec.request_hash,
            services: spec.services,
            data: spec.data,
            timeout: spec.timeout,
            answer_at: AnswerAt::Applied,
            reply: None,
        };
        self.backend.take_in(&request);
        let delivery = self.requests.deliver(&request);
        let in_flight = InFlight { since: now.elapsed, attempts: BTreeMap::new(), ended: None };
        self.in_flight.insert(request.key.clone(), in_flight);
        self.for_worker.push_back(coordinator::Event::RequestReceived {
            request,
            delivery,
            deliveries,
        });
        self.settle(now);
    }

    /// A call of a service's code has ended.
    pub(crate) fn call_ended(&mut self, member: usize, event: participant::Event) {
        if let participant::Event::StoreScanned(held) = &event {
            self.backend.store_scanned(member, held);
        }
        self.for_members.push_back((member, event));
    }

    /// Takes no more requests, and releases those that have not started.
    pub(crate) fn drain(&mut self) {
        self.for_worker.push_back(coordinator::Event::DrainRequested);
    }

    /// Takes the calls that are to be made.
    pub(crate) fn take_calls(&mut self) -> Vec<(usize, participant::Effect)> {
        std::mem::take(&mut self.calls)
    }

    /// Takes the transactions that have ended. If calls are counted, a transaction is returned only when
    /// no more calls follow: an abort has its result before the services have aborted.
    pub(crate) fn take_concluded(&mut self) -> Vec<Concluded> {
        let mut concluded = std::mem::take(&mut self.concluded);
        if !self.settings.counts_attempts {
            return concluded;
        }
        let coordinator = &self.coordinator;
        let is_over = |key: &mut TransactionKey| coordinator.phase_of(key).is_none();
        let over = self.lingering.extract_if(.., is_over);
        let ended = over.filter_map(|key| self.in_flight.remove(&key));
        concluded.extend(ended.filter_map(InFlight::into_concluded));
        concluded
    }

    /// Takes the entries that are to be written to the journal's file now.
    pub(crate) fn take_batch(&mut self) -> Option<EntryBatch> {
        self.backend.take_batch()
    }

    /// Takes the error that makes the journal unusable.
    pub(crate) fn take_failure(&mut self) -> Option<JournalError> {
        self.backend.take_failure()
    }

    /// The first `n_safe` entries are on disk.
    pub(crate) fn safe(&mut self, n_safe: u64) {
        self.appended.extend(self.backend.safe(n_safe));
    }

    /// When to call [`Engine::wake`] if no event comes before.
    pub(crate) fn next_deadline(&self) -> Option<Time> {
        let members = self.members.iter().flat_map(|member| {
            member.instance.next_deadline().into_iter().chain(member.queue.next_expiry())
        });
        let task = self.backend.next_deadline(self.coordinator.is_empty());
        members.chain(self.coordinator.next_deadline()).chain(task).min()
    }

    /// The reports of the services, in the order in which they were given.
    pub(crate) fn reports(&self) -> Vec<ServiceReport> {
        let report = |member: &Member| ServiceReport {
            name: member.name.clone(),
            calls: member.calls,
            max_in_use: member.max_in_use,
            max_concurrency: member.max_concurrency,
            longest_wait: Some(member.queue.longest_wait()),
        };
        self.members.iter().map(report).collect()
    }

    /// Handles all events, and those that follow from them, until there are none.
    pub(crate) fn settle(&mut self, now: ClockReading) {
        loop {
            if let Some(event) = self.for_worker.pop_front() {
                self.handle(now, event);
            } else if !self.appended.is_empty() {
                self.read_back();
            } else if let Some((member, event)) = self.for_members.pop_front() {
                self.handle_at_member(now.time, member, event);
            } else if !self.recover(now.time) {
                return self.note_aborted(now.time);
            }
        }
    }

    /// Adds the events of all deadlines that are reached.
    pub(crate) fn wake(&mut self, now: Time) {
        if self.coordinator.next_deadline().is_some_and(|at| at <= now) {
            self.for_worker.push_back(coordinator::Event::DeadlineReached);
        }
        for (number, member) in self.members.iter_mut().enumerate() {
            if member.instance.next_deadline().is_some_and(|at| at <= now) {
                self.for_members.push_back((number, participant::Event::DeadlineReached));
            }
            while let Some(returned) = member.queue.expire(now) {
                let service = member.name.clone();
                let event = coordinator::Event::PrepareReturned { key: returned.0, service };
                self.for_worker.push_back(event);
            }
        }
    }

    // ---- The coordinator's side --------------------------------------------------------------

    fn handle(&mut self, now: ClockReading, event: coordinator::Event) {
        let mut effects = std::mem::take(&mut self.effects);
        let coordinator = &mut self.coordinator;
        let handled =
            catch_unwind(AssertUnwindSafe(|| coordinator.handle(now.time, event, &mut effects)));
        if handled.is_err() {
            tracing::error!(
                "the coordinator has panicked, which is a bug of `dtc`; a new one continues from the \
                 journal; please report this with the panic's message"
            );
            effects.clear();
            self.restart_coordinator();
        }
        for effect in effects.drain(..) {
            self.perform(now, effect);
        }
        self.effects = effects;
    }

    /// Replaces the coordinator by a new one, as after a crash: it has only the journal and the requests
    /// that were not acknowledged.
    pub(crate) fn restart_coordinator(&mut self) {
        self.coordinator = Coordinator::new(self.settings.coordinator.clone());
        self.for_worker.clear();
        self.attach_journal();
        self.appended = self.backend.history();
        self.read_back();
        for (delivery, request, deliveries) in self.requests.redeliver() {
            let event = coordinator::Event::RequestReceived { request, delivery, deliveries };
            self.for_worker.push_back(event);
        }
    }

    fn attach_journal(&mut self) {
        self.messages_read = 0;
        // The journal begins with the process, so it is complete.
        let event = coordinator::Event::JournalAttached { next: 0, since: Time::EPOCH };
        self.for_worker.push_back(event);
    }

    fn read_back(&mut self) {
        let offset = self.messages_read;
        self.messages_read += 1;
        let decisions = std::mem::take(&mut self.appended);
        self.for_worker.push_back(coordinator::Event::RecordsRead { offset, decisions });
    }

    fn perform(&mut self, now: ClockReading, effect: coordinator::Effect) {
        use coordinator::{Effect, Event};
        match effect {
            Effect::FindService { service, .. } => {
                self.for_worker.push_back(if self.numbers.contains_key(&service) {
                    Event::ServiceFound(service)
                } else {
                    Event::ServiceMissing(service)
                })
            }
            Effect::SendPrepare { service, prepare, .. } => {
                self.send_prepare(now.time, service, prepare);
            }
            Effect::Send { service, to, command } => self.send(&service, &to, command),
            Effect::Append(decision) => {
                let is_worked_on = self.coordinator.phase_of(&decision.key).is_some();
                let is_in_flight = |key: &TransactionKey| self.in_flight.contains_key(key);
                let decision = Arc::new(decision);
                let decided = self.backend.append(decision, is_worked_on, &is_in_flight);
                self.appended.extend(decided);
            }
            Effect::ReadHistory { .. } => {
                for decision in self.backend.history() {
                    self.for_worker.push_back(Event::HistoryRead(decision));
                }
                self.for_worker.push_back(Event::HistoryEnded { reaches: Some(Time::EPOCH) });
            }
            Effect::Publish { key, delivery, answer } => {
                self.conclude(now, &key, answer);
                self.for_worker.push_back(Event::ResultConfirmed { key, delivery });
            }
            Effect::Ack(delivery) | Effect::Release(delivery) => self.requests.ack(delivery),
            Effect::Reject { request, delivery, reason } => {
                self.requests.ack(delivery);
                self.reject(now, &request, reason);
            }
            Effect::Park(parked) => self.park(&parked),
            Effect::Settle { key, service, .. } => {
                let _entered = spans::finish(Some(&service), &key).entered();
                tracing::info!("a parked commit was applied");
            }
            // Every service is in this process.
            Effect::CheckService(_) => {}
            Effect::Report(anomaly) => anomalies::log(&anomaly),
        }
    }

    fn send_prepare(&mut self, now: Time, service: ServiceName, prepare: Prepare) {
        let Some(&number) = self.numbers.get(&service) else {
            let event = coordinator::Event::PrepareUnroutable { key: prepare.key, service };
            return self.for_worker.push_back(event);
        };
        self.backend.begin(&prepare.key);
        self.members[number].queue.publish(now, prepare);
        self.deliver(now, number);
    }

    fn send(&mut self, service: &ServiceName, to: &Destination, command: Command) {
        let Some(&number) = self.numbers.get(service) else { return };
        let worker = self.worker.clone();
        let event = match command {
            Command::Query(query) => participant::Event::QueryReceived { worker, query },
            Command::Cancel(key) => participant::Event::CancelReceived(key),
            Command::Finish(finish) => {
                let delivery = (*to == Destination::AnyInstance).then(|| self.next_delivery());
                participant::Event::FinishReceived { worker, finish, delivery }
            }
        };
        self.for_members.push_back((number, event));
    }

    /// An id for a command to any instance. There is no durable queue here: the instance keeps the
    /// command until it is applied.
    fn next_delivery(&mut self) -> Delivery {
        self.to_any_instance += 1;
        Delivery(self.to_any_instance)
    }

    /// Delivers prepares to free slots, and returns those that may not wait for one.
    fn deliver(&mut self, now: Time, number: usize) {
        let member = &mut self.members[number];
        while let Some((delivery, prepare)) = member.queue.deliver(now) {
            let worker = self.worker.clone();
            let event = participant::Event::PrepareReceived {
                worker,
                delivery,
                redelivered: false,
                prepare,
            };
            self.for_members.push_back((number, event));
        }
        while let Some(returned) = member.queue.expire(now) {
            let service = member.name.clone();
            let event = coordinator::Event::PrepareReturned { key: returned.0, service };
            self.for_worker.push_back(event);
        }
    }

    fn conclude(&mut self, now: ClockReading, key: &TransactionKey, answer: Answer) {
        self.backend.conclude(now.time, key, &answer);
        let Some(in_flight) = self.in_flight.get_mut(key) else { return };
        let took = now.elapsed.saturating_sub(in_flight.since);
        in_flight.ended = Some((answer, took));
        if self.settings.counts_attempts {
            self.lingering.push(key.clone());
        } else {
            let ended = self.in_flight.remove(key);
            self.concluded.extend(ended.and_then(InFlight::into_concluded));
        }
    }

    fn reject(&mut self, now: ClockReading, request: &Request, reason: Reason) {
        let answer = rejected(now.time, &request.key, reason);
        self.conclude(now, &request.key, answer);
    }

    // ---- What earlier processes have left ----------------------------------------------------

    /// Performs the next task of recovery; returns whether there was one.
    fn recover(&mut self, now: Time) -> bool {
        match self.backend.next_task(now, self.coordinator.is_empty()) {
            None => return false,
            Some(Task::Request(requests)) => {
                for (request, deliveries) in requests {
                    let delivery = self.requests.deliver(&request);
                    let event =
                        coordinator::Event::RequestReceived { request, delivery, deliveries };
                    self.for_worker.push_back(event);
                }
            }
            Some(Task::Ask(number, inquiry)) => {
                let key = inquiry.key.clone();
                if !self.inquire(inquiry) {
                    self.backend.leave(now, number, &key);
                }
            }
        }
        true
    }

    /// There are no more requests: recovery aborts what was not requested once more.
    pub(crate) fn requests_ended(&mut self) {
        self.backend.requests_ended();
    }

    /// Handles the inquiry of an instance; returns whether it will be answered.
    fn inquire(&mut self, mut inquiry: Inquiry) -> bool {
        let key = &inquiry.key;
        let is_seen = self.coordinator.phase_of(key).is_some()
            || self.coordinator.view().earliest_seen(key).is_some();
        let found = if is_seen { LookUp::Nothing } else { self.backend.look_up(&inquiry) };
        match found {
            LookUp::Nothing => {}
            LookUp::Decided(decision) => {
                self.appended.push(decision);
                self.read_back();
            }
            LookUp::Undecided => inquiry.deadline = Time::EPOCH,
            LookUp::Unknown => return false,
        }
        self.for_worker.push_back(coordinator::Event::InquiryReceived(inquiry));
        true
    }

    /// Notes the aborted transactions that are finished.
    fn note_aborted(&mut self, now: Time) {
        let (coordinator, members) = (&self.coordinator, &self.members);
        let is_over = |key: &TransactionKey| coordinator.phase_of(key).is_none();
        let is_held_at =
            |number: usize, key: &TransactionKey| members[number].instance.stage_of(key).is_some();
        self.backend.note_aborted(now, &is_over, &is_held_at);
    }

    fn park(&mut self, parked: &Parked) {
        let key = &parked.key;
        let service = match &parked.cause {
            ParkedCause::Uncommitted { service, error, .. } => {
                let error = error.as_deref().unwrap_or("no answer");
                let _entered = spans::finish(Some(service), key).entered();
                tracing::error!(
                    error,
                    "commit parked: the transaction is committed, but this service has not applied it; \
                     it is tried again: fix what the error says"
                );
                Some(service.clone())
            }
            ParkedCause::Undecidable(_) => {
                let _entered = spans::finish(None, key).entered();
                tracing::error!(
                    "transaction parked: the journal doesn't reach back to where it began, so its outcome \
                     can't be determined; find out from its services how it ended, and end it in their \
                     stores"
                );
                None
            }
        };
        let key = key.clone();
        self.for_worker.push_back(coordinator::Event::ParkConfirmed { key, service });
    }

    // ---- The services' side ------------------------------------------------------------------

    fn handle_at_member(&mut self, now: Time, number: usize, event: participant::Event) {
        if let Some(key) = ended(&event) {
            self.backend.look_again(key);
        }
        let mut effects = std::mem::take(&mut self.member_effects);
        let member = &mut self.members[number];
        member.instance.handle(now, event, &mut effects);
        member.max_in_use = member.max_in_use.max(member.instance.slots_used());
        for effect in effects.drain(..) {
            self.perform_for_member(now, number, effect);
        }
        self.member_effects = effects;
    }

    fn perform_for_member(&mut self, now: Time, number: usize, effect: participant::Effect) {
        use participant::Effect;
        match effect {
            Effect::CallPrepare { .. } | Effect::CallCommit { .. } | Effect::CallAbort { .. } => {
                self.count(number, &effect);
                self.calls.push((number, effect));
            }
            Effect::ReadStore(_) | Effect::LookUpCommit { .. } | Effect::ScanStore => {
                self.calls.push((number, effect));
            }
            Effect::Vote { vote, .. } => {
                self.for_worker.push_back(coordinator::Event::VoteReceived(vote));
            }
            Effect::Done { done, .. } => {
                match &done.applied {
                    Ok(()) => self.backend.done(now, number, &done.key),
                    // The coordinator tries again.
                    Err(_) if self.coordinator.phase_of(&done.key).is_some() => {}
                    Err(_) => self.backend.failed(now, number, &done.key),
                }
                let event = coordinator::Event::DoneReceived { done, delivery: None };
                self.for_worker.push_back(event);
            }
            Effect::Inquire(inquiry) => {
                self.inquire(inquiry);
            }
            Effect::Ack(_) => {
                self.members[number].queue.ack();
                self.deliver(now, number);
            }
        }
    }

    fn count(&mut self, number: usize, effect: &participant::Effect) {
        use participant::Effect;
        let member = &mut self.members[number];
        let mut once = Attempts::default();
        let key = match effect {
            Effect::CallPrepare { key, .. } => {
                once.prepare = 1;
                key
            }
            Effect::CallCommit { key, .. } => {
                once.commit = 1;
                key
            }
            Effect::CallAbort { key, .. } => {
                once.abort = 1;
                key
            }
            Effect::ReadStore(_)
            | Effect::LookUpCommit { .. }
            | Effect::ScanStore
            | Effect::Vote { .. }
            | Effect::Done { .. }
            | Effect::Inquire(_)
            | Effect::Ack(_) => return,
        };
        member.calls.prepare += u64::from(once.prepare);
        member.calls.commit += u64::from(once.commit);
        member.calls.abort += u64::from(once.abort);
        if self.settings.counts_attempts
            && let Some(in_flight) = self.in_flight.get_mut(key)
        {
            let calls = in_flight.attempts.entry(member.name.clone()).or_default();
            calls.prepare += once.prepare;
            calls.commit += once.commit;
            calls.abort += once.abort;
        }
    }
}

/// The id of the one instance that each service has in this process.
pub(crate) fn instance_id() -> InstanceId {
    #[expect(clippy::expect_used, reason = "a constant that the tests parse")]
    InstanceId::parse("embedded").expect("a valid instance id")
}

/// The id of the one worker of this process.
pub(crate) fn worker_id() -> WorkerId {
    #[expect(clippy::expect_used, reason = "a constant that the tests parse")]
    WorkerId::parse("embedded").expect("a valid worker id")
}

/// The transaction of which a service may hold less after this event.
fn ended(event: &participant::Event) -> Option<&TransactionKey> {
    use participant::Event;
    match event {
        Event::PrepareEnded { key, .. }
        | Event::FinishEnded { key, applied: Ok(()), .. }
        | Event::StoreRead { key, .. }
        | Event::CommitLookedUp { key, .. } => Some(key),
        // The store still holds it.
        Event::FinishEnded { applied: Err(_), .. } => None,
        Event::PrepareReceived { .. }
        | Event::QueryReceived { .. }
        | Event::CancelReceived(_)
        | Event::FinishReceived { .. }
        | Event::StoreScanned(_)
        | Event::DeadlineReached
        | Event::Disconnected
        | Event::DrainRequested => None,
    }
}

fn id_reused() -> Reason {
    Reason::because(ReasonCode::IdReused, "another request has this id")
}

/// The answer to a rejected request.
fn rejected(now: Time, key: &TransactionKey, reason: Reason) -> Answer {
    Answer {
        id: key.id.clone(),
        requested_at: key.requested_at,
        outcome: Outcome::Aborted,
        reason: Some(reason),
        unresolved: Vec::new(),
        decided_at: now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        embedded::{Embedded, Transaction, backend::MemoryBackend},
        participant::{Service, Verdict},
        protocol::participant::Effect,
    };
    use serde_json::json;

    const NOW: Time = Time::from_millis(1_000_000);

    fn at(time: Time) -> ClockReading {
        ClockReading { time, elapsed: Duration::ZERO }
    }

    /// Two services of three slots, and twelve transactions over both or one of them.
    fn engine() -> Engine {
        let services = [Service::new("A", 3), Service::new("B", 3)];
        let settings = Embedded::new(services).unwrap().settings;
        let member = |name| MemberSettings {
            name: ServiceName::parse(name).unwrap(),
            max_concurrency: 3,
            max_wait: Duration::from_secs(1),
            has_store: false,
        };
        let members = ["A", "B"].map(member);
        let mut engine = Engine::new(NOW, settings, members, MemoryBackend::default());
        engine.settle(at(NOW));
        for n in 0..12 {
            let services: &[&str] = [&["A", "B"][..], &["A"], &["B"]][n % 3];
            let transaction =
                Transaction::new(format!("t{n}"), services.iter().copied(), json!({}));
            let spec = transaction.check().unwrap();
            engine.submit(at(NOW), spec);
        }
        engine
    }

    /// How often each call was made for each transaction, and its outcome at the service.
    type Ledger = BTreeMap<(usize, TransactionKey), (CallCounts, Option<Outcome>)>;

    /// Makes a call; the service `refused_at` refuses t3.
    fn make(
        engine: &mut Engine,
        ledger: &mut Ledger,
        (number, call): (usize, Effect),
        refused_at: Option<usize>,
    ) {
        let (key, event) = match call {
            Effect::CallPrepare { key, branch, .. } => {
                let is_refused = refused_at == Some(number) && key.id.as_str().ends_with('3');
                let verdict = if is_refused { Verdict::Refused(None) } else { Verdict::Prepared };
                ledger.entry((number, key.clone())).or_default().0.prepare += 1;
                (key.clone(), participant::Event::PrepareEnded { key, branch, verdict })
            }
            Effect::CallCommit { key, branch } => {
                let entry = ledger.entry((number, key.clone())).or_default();
                entry.0.commit += 1;
                entry.1 = Some(Outcome::Committed);
                (key.clone(), participant::Event::FinishEnded { key, branch, applied: Ok(()) })
            }
            Effect::CallAbort { key, branch } => {
                let entry = ledger.entry((number, key.clone())).or_default();
                entry.0.abort += 1;
                entry.1 = Some(Outcome::Aborted);
                (key.clone(), participant::Event::FinishEnded { key, branch, applied: Ok(()) })
            }
            Effect::ReadStore(_)
            | Effect::LookUpCommit { .. }
            | Effect::ScanStore
            | Effect::Vote { .. }
            | Effect::Done { .. }
            | Effect::Inquire(_)
            | Effect::Ack(_) => panic!("not a call of these services"),
        };
        assert!(ledger.contains_key(&(number, key)));
        engine.call_ended(number, event);
    }

    /// Runs all twelve; the coordinator is replaced before every step in `crashes`.
    fn run_with_crashes(crashes: &[usize]) {
        let mut engine = engine();
        let mut ledger = Ledger::new();
        let mut calls = VecDeque::new();
        let mut answers = BTreeMap::new();
        let mut now = NOW;
        for step in 0.. {
            assert!(step < 1000, "it does not end");
            if crashes.contains(&step) {
                engine.restart_coordinator();
            }
            engine.settle(at(now));
            calls.extend(engine.take_calls());
            for Concluded { answer, .. } in engine.take_concluded() {
                let twice = answers.insert(answer.id.to_string(), answer.outcome);
                assert_eq!(twice, None, "one result each");
            }
            if let Some(call) = calls.pop_front() {
                make(&mut engine, &mut ledger, call, Some(1));
            } else if engine.is_idle() {
                break;
            } else if let Some(next) = engine.next_deadline() {
                now = now.max(next);
                engine.wake(now);
            }
        }
        assert_eq!(answers.len(), 12);
        for ((_, key), (calls, held)) in &ledger {
            let outcome = answers[key.id.as_str()];
            assert!(calls.prepare == 1 && calls.commit + calls.abort <= 1, "{key:?}: {calls:?}");
            assert!(held.is_none_or(|held| held == outcome), "{key:?}");
            assert!(held.is_some() || outcome == Outcome::Aborted, "{key:?}");
        }
        let aborted = answers.iter().filter(|(_, outcome)| **outcome == Outcome::Aborted);
        assert_eq!(aborted.map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["t3"]);
        assert!(engine.members.iter().all(|member| member.instance.slots_used() == 0));
    }

    #[test]
    fn a_coordinator_restarted_at_any_step_ends_every_transaction_once() {
        for crash in 0..80 {
            run_with_crashes(&[crash]);
        }
    }

    #[test]
    fn a_coordinator_restarted_again_and_again_ends_every_transaction_once() {
        for first in 0..40 {
            run_with_crashes(&[first, first + 1, first + 7, first + 8, first + 20]);
        }
    }
}
