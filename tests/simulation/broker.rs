//! The modelled broker: queues, routes, credit and expiry, as measured on RabbitMQ.
//!
//! It does not model order: messages overtake each other freely. Only the journal keeps its order,
//! and each worker's reader reads in it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use dtc::protocol::{
    coordinator,
    ids::{RequestHash, ServiceName, TransactionId, TransactionKey, WorkerId},
    message::{
        self, Answer, Decision, Delivery, Destination, Done, Inquiry, Outcome, Parked, ParkedCause,
        Prepare, Vote,
    },
    participant,
    request_messages::{MessageNumber, Settlement},
    time::Time,
};

use crate::{
    checkers::{parked::ParkedCommits, read_back, result, stored_before_voted},
    driver::{AppendLane, DriverBug},
    rng::Rng,
    rules::Kind,
    service::{Service, Slot},
    world::{Life, ScheduledEvent, WorkerInput, World, tell},
};

/// How long publishes to the queue of a dead instance are confirmed and lost.
const DYING_QUEUE: Duration = Duration::from_millis(30);

/// The queues that belong to no service.
pub(crate) struct Broker {
    pub(crate) is_up: bool,
    requests: VecDeque<QueuedRequests>,
    unacked: BTreeMap<MessageNumber, Unacked>,
    /// The request of each delivery.
    pub(crate) delivered: BTreeMap<Delivery, usize>,
    inquiries: VecDeque<WorkerMessage>,
    n_deliveries: u64,
}

/// The requests of one message.
pub(crate) type QueuedRequests = Vec<usize>;

struct Unacked {
    requests: QueuedRequests,
    worker: usize,
}

/// A message to a worker that may reach another one.
#[derive(Clone, Debug)]
pub(crate) enum WorkerMessage {
    Vote(Vote),
    Done(Done),
    Inquiry(Inquiry),
    /// A prepare that found no slot.
    Returned(TransactionKey, ServiceName),
}

/// A command in transit, and its sender.
#[derive(Clone, Debug)]
pub(crate) struct Command {
    pub(crate) from: WorkerId,
    pub(crate) command: message::Command,
}

#[derive(Clone, Debug)]
pub(crate) struct QueuedPrepare {
    pub(crate) from: WorkerId,
    pub(crate) prepare: Prepare,
    pub(crate) expires_at: Time,
    pub(crate) redelivered: bool,
}

/// The stream of decisions: messages of several records, or of none.
pub(crate) struct Journal {
    /// When each message was complete, and what it holds.
    messages: Vec<(Time, Vec<Arc<Decision>>)>,
    /// How many messages can't grow any more: they have been read, or are known to exist.
    sealed: u64,
    /// Decides which records share a message: a separate source, so that a seed's schedule doesn't
    /// depend on it.
    rng: Rng,
    first: BTreeMap<TransactionKey, Arc<Decision>>,
    /// The journal has every record made at this time or later.
    complete_from: Time,
}

impl Default for Broker {
    fn default() -> Self {
        Self {
            is_up: true,
            requests: VecDeque::new(),
            unacked: BTreeMap::new(),
            delivered: BTreeMap::new(),
            inquiries: VecDeque::new(),
            n_deliveries: 0,
        }
    }
}

impl Broker {
    fn next_delivery(&mut self) -> u64 {
        self.n_deliveries += 1;
        self.n_deliveries
    }

    pub(crate) fn what_is_left(&self) -> Vec<String> {
        let mut left = Vec::new();
        if !self.requests.is_empty() || !self.unacked.is_empty() {
            let (ready, unacked) = (self.requests.len(), self.unacked.len());
            left.push(format!("{ready} requests are queued and {unacked} unacked"));
        }
        if !self.inquiries.is_empty() {
            left.push(format!("nobody takes {:?}", self.inquiries));
        }
        left
    }
}

impl WorkerMessage {
    pub(crate) fn into_event(self) -> coordinator::Event {
        match self {
            Self::Vote(vote) => coordinator::Event::VoteReceived(vote),
            Self::Done(done) => coordinator::Event::DoneReceived { done, delivery: None },
            Self::Inquiry(inquiry) => coordinator::Event::InquiryReceived(inquiry),
            Self::Returned(key, service) => coordinator::Event::PrepareReturned { key, service },
        }
    }
}

impl Journal {
    /// Declared at `from`: its first record distinguishes it from a journal that was lost.
    pub(crate) fn new(from: Time, rng: Rng) -> Self {
        let marker = Decision {
            key: TransactionKey {
                id: TransactionId::parse("journal").expect("a valid id"),
                requested_at: Time::EPOCH,
            },
            request_hash: RequestHash([0; 16]),
            outcome: Outcome::Aborted,
            branches: Vec::new(),
            reason: None,
            decided_at: from,
            worker: WorkerId::parse("topology").expect("a valid id"),
        };
        Self {
            messages: vec![(from, vec![Arc::new(marker)])],
            sealed: 1,
            rng,
            first: BTreeMap::new(),
            complete_from: from,
        }
    }

    /// The offset that the next message will have.
    pub(crate) fn end(&self) -> u64 {
        self.messages.len() as u64
    }

    /// The message at `offset`, which can't grow any more.
    pub(crate) fn get(&mut self, offset: u64) -> Option<Vec<Arc<Decision>>> {
        let index = usize::try_from(offset).ok()?;
        let (_, decisions) = self.messages.get(index)?;
        self.sealed = self.sealed.max(offset + 1);
        Some(decisions.clone())
    }

    /// Where it ends now: later records have that offset or a higher one.
    pub(crate) fn seal(&mut self) -> u64 {
        self.sealed = self.end();
        self.sealed
    }

    /// Appends a record: to the last message if that can still grow, or in a new one. Sometimes a
    /// marker follows.
    pub(crate) fn append(&mut self, now: Time, decision: Arc<Decision>) {
        self.first.entry(decision.key.clone()).or_insert_with(|| Arc::clone(&decision));
        let grows = self.sealed < self.end() && self.rng.chance(800);
        match self.messages.last_mut().filter(|_| grows) {
            Some((at, decisions)) => {
                *at = now;
                decisions.push(decision);
            }
            None => self.messages.push((now, vec![decision])),
        }
        if self.rng.chance(50) {
            self.messages.push((now, Vec::new()));
        }
    }

    /// How many messages hold several records, and how many none.
    pub(crate) fn shared_and_empty(&self) -> (usize, usize) {
        let lengths = self.messages.iter().map(|(_, decisions)| decisions.len());
        let shared = lengths.clone().filter(|len| *len > 1).count();
        (shared, lengths.filter(|len| *len == 0).count())
    }

    pub(crate) fn first(&self, key: &TransactionKey) -> Option<&Arc<Decision>> {
        self.first.get(key)
    }

    pub(crate) fn firsts(&self) -> impl Iterator<Item = &Arc<Decision>> {
        self.first.values()
    }

    /// Where to start in order to read everything made at `since` or later, if clocks differ by at
    /// most `margin`; and from when on that is really everything.
    pub(crate) fn reaching(&self, since: Time, margin: Duration) -> (u64, Time) {
        let skipped = self.messages.partition_point(|(at, _)| *at < since - margin);
        (skipped as u64, since.max(self.complete_from))
    }
}

impl World {
    // ---- What a worker asks for --------------------------------------------------------------

    pub(crate) fn perform_for_worker(&mut self, worker: usize, effect: coordinator::Effect) {
        use coordinator::Effect;
        let life = self.workers[worker].life;
        // Its connection is gone without its knowledge: much of what it still publishes is lost.
        let is_cut = !self.workers[worker].is_connected;
        let is_stuck = self.workers[worker].is_stuck;
        let is_lost = !self.broker.is_up || is_stuck || is_cut && self.rng.chance(500);
        match effect {
            Effect::FindService { .. } if is_lost => {}
            Effect::FindService { service, after } if after.is_zero() => {
                self.find_service(worker, service);
            }
            Effect::FindService { service, after } => {
                let looks = ScheduledEvent::LooksAgain { worker, life, service };
                self.after(after.as_millis() as u64, looks);
            }
            Effect::CheckService(service) => {
                if !is_lost {
                    self.look_whether_served(worker, &service);
                }
            }
            Effect::SendPrepare { service, prepare, .. } => {
                if !is_lost {
                    self.send_prepare(worker, service, &prepare);
                }
            }
            Effect::Send { service, to, command } => {
                self.check_command(worker, &service, &to, &command);
                if !is_lost {
                    self.send_command(worker, service, to, command);
                }
            }
            Effect::Append(decision) => {
                if !is_lost {
                    self.append_by(worker, decision);
                }
            }
            Effect::ReadHistory { from, until } => {
                let wait = self.rng.pick(&[1, 3, 60]);
                let input = WorkerInput::History { from, until };
                self.after(wait, ScheduledEvent::ToWorker { worker, life, input });
            }
            Effect::Publish { key, delivery, answer } => {
                self.check_answer(worker, &answer);
                if is_lost {
                    return;
                }
                let arrivals = self.rules.carry(&mut self.rng);
                if arrivals[0].is_none() {
                    let event = coordinator::Event::ResultFailed { key, delivery };
                    return self.deliver_to_worker(worker, life, event);
                }
                for millis in arrivals.into_iter().flatten() {
                    let (key, answer) = (key.clone(), answer.clone());
                    let stored =
                        ScheduledEvent::ResultStored { worker, life, key, delivery, answer };
                    self.after(millis, stored);
                }
            }
            Effect::Ack(delivery) => {
                if let Some(message) = self.broker.delivered.get(&delivery).copied() {
                    self.check_ack(message);
                    let it = &self.messages[message];
                    let id = &it.request.key.id;
                    let is_unclaimed =
                        self.unclaimed_ids.contains(id) && !self.parked_ids.contains(id);
                    if is_unclaimed && it.answers.is_empty() && !it.is_asked_again {
                        self.ask_again(message, 200);
                    }
                }
                self.settle_request(worker, delivery, Settlement::Acknowledge);
            }
            Effect::Release(delivery) => {
                self.settle_request(worker, delivery, Settlement::Requeue);
            }
            Effect::Reject { delivery, reason, .. } => {
                let is_through = self.is_unacked_at(worker, MessageNumber::of(delivery));
                if let Some(message) = self.broker.delivered.get(&delivery)
                    && is_through
                {
                    self.messages[*message].rejected = Some(reason);
                }
                self.settle_request(worker, delivery, Settlement::Acknowledge);
            }
            Effect::Park(parked) => {
                if is_lost {
                    return;
                }
                for millis in self.rules.carry(&mut self.rng).into_iter().flatten() {
                    let parked = parked.clone();
                    self.after(millis, ScheduledEvent::ParkStored { worker, life, parked });
                }
            }
            Effect::Settle { key, service, .. } => self.parked.settled(&key, &service),
            Effect::Report(coordinator::Anomaly::ResultUnclaimed { key, .. }) => {
                self.unclaimed_ids.insert(key.id);
            }
            Effect::Report(_) => {}
        }
    }

    fn check_command(
        &mut self,
        worker: usize,
        service: &ServiceName,
        to: &Destination,
        command: &message::Command,
    ) {
        let key = match command {
            message::Command::Query(_) => return,
            message::Command::Cancel(key) => key,
            message::Command::Finish(finish) => {
                if finish.parked && *to == Destination::AnyInstance {
                    self.parked.queued(&finish.key, service);
                }
                &finish.key
            }
        };
        let first = self.journal.first(key).map(|first| &**first);
        let checked = read_back::sending(command, service, first, |key| self.has_read(worker, key));
        self.check("read_back", checked);
    }

    fn check_answer(&mut self, worker: usize, answer: &Answer) {
        let key = TransactionKey { id: answer.id.clone(), requested_at: answer.requested_at };
        let checked = result::told(answer, self.journal.first(&key).map(|first| &**first));
        self.check("result", checked);
        let checked = read_back::publishing(&key, |key| self.has_read(worker, key));
        self.check("read_back", checked);
        let checked = self.parked.told(answer);
        self.check("parked", checked);
    }

    fn send_prepare(&mut self, worker: usize, name: ServiceName, prepare: &Prepare) {
        let life = self.workers[worker].life;
        if self.bound_service(&name).is_none() {
            let key = prepare.key.clone();
            let event = coordinator::Event::PrepareUnroutable { key, service: name };
            return self.confirm(worker, life, &event);
        }
        let service = self.services.iter().position(|service| service.plan.name == name);
        let Some(service) = service else { return };
        if self.services[service].is_unreachable(self.now) {
            let event =
                coordinator::Event::PrepareRefused { key: prepare.key.clone(), service: name };
            self.confirm(worker, life, &event);
            // It may have arrived all the same.
            if self.rng.chance(600) {
                return;
            }
        }
        let from = self.workers[worker].id.clone();
        for millis in self.rules.carry(&mut self.rng).into_iter().flatten() {
            let prepare = QueuedPrepare {
                from: from.clone(),
                prepare: prepare.clone(),
                expires_at: Time::EPOCH,
                redelivered: false,
            };
            self.after(millis, ScheduledEvent::PrepareQueued { service, prepare });
        }
    }

    fn send_command(
        &mut self,
        worker: usize,
        name: ServiceName,
        to: Destination,
        command: message::Command,
    ) {
        let service = self.services.iter().position(|service| service.plan.name == name);
        let Some(service) = service else { return };
        let from = self.workers[worker].id.clone();
        let arrivals = match to {
            Destination::AnyInstance => self.rules.carry_safely(&mut self.rng),
            Destination::Instance(_) | Destination::AllInstances => self.rules.carry(&mut self.rng),
        };
        for millis in arrivals.into_iter().flatten() {
            let command = Command { from: from.clone(), command: command.clone() };
            self.after(millis, ScheduledEvent::CommandRouted { service, to: to.clone(), command });
        }
    }

    pub(crate) fn store_result(
        &mut self,
        worker: usize,
        life: Life,
        key: TransactionKey,
        delivery: Delivery,
        answer: Answer,
    ) {
        if !self.broker.is_up {
            return;
        }
        tell!(self, "results: {answer:?}");
        let message = self.broker.delivered.get(&delivery).copied();
        let token = message.map_or(self.producer.token, |message| self.messages[message].token);
        if self.refuses_result(token) {
            let event = coordinator::Event::ResultFailed { key, delivery };
            return self.confirm(worker, life, &event);
        }
        if let Some(message) = message {
            self.messages[message].answers.push(answer);
        }
        let event = if self.rules.loses_confirm(&mut self.rng) {
            coordinator::Event::ResultFailed { key, delivery }
        } else {
            coordinator::Event::ResultConfirmed { key, delivery }
        };
        self.confirm(worker, life, &event);
    }

    pub(crate) fn store_parked(&mut self, worker: usize, life: Life, parked: Parked) {
        if !self.broker.is_up {
            return;
        }
        tell!(self, "unresolved: {parked:?}");
        let service = match parked.cause {
            ParkedCause::Uncommitted { service, .. } => {
                self.parked.listed(&parked.key, &service);
                Some(service)
            }
            ParkedCause::Undecidable(_) => {
                let began = parked.key.requested_at - self.plan.clock_margin;
                let reaches = self.journal.complete_from <= began;
                let was_lost = self.rules.counts[Kind::LostHistory as usize] > 0;
                let checked = ParkedCommits::undecidable(&parked.key, reaches, was_lost);
                self.check("parked", checked);
                self.parked_ids.insert(parked.key.id.clone());
                None
            }
        };
        if !self.rules.loses_confirm(&mut self.rng) {
            let event = coordinator::Event::ParkConfirmed { key: parked.key, service };
            self.confirm(worker, life, &event);
        }
    }

    pub(crate) fn deliver_to_worker(
        &mut self,
        worker: usize,
        life: Life,
        event: coordinator::Event,
    ) {
        let wait = self.rules.deliver(&mut self.rng);
        let input = WorkerInput::Event(event);
        self.after(wait, ScheduledEvent::ToWorker { worker, life, input });
    }

    /// Reports the confirm of a publish. A transport that publishes again reports it twice.
    fn confirm(&mut self, worker: usize, life: Life, event: &coordinator::Event) {
        for millis in self.rules.carry_safely(&mut self.rng).into_iter().flatten() {
            let input = WorkerInput::Event(event.clone());
            self.after(millis, ScheduledEvent::ToWorker { worker, life, input });
        }
    }

    fn is_unacked_at(&self, worker: usize, number: MessageNumber) -> bool {
        let unacked = self.broker.unacked.get(&number);
        let is_through = self.broker.is_up && !self.workers[worker].is_stuck;
        is_through && unacked.is_some_and(|unacked| unacked.worker == worker)
    }

    // ---- Requests and inquiries --------------------------------------------------------------

    pub(crate) fn publish_requests(&mut self, requests: QueuedRequests) {
        if !self.broker.is_up {
            return self.after(40, ScheduledEvent::Publish(requests));
        }
        self.broker.requests.push_back(requests);
        self.serve_requests();
    }

    /// A worker settles a request; with the last of a message it settles the message.
    pub(crate) fn settle_request(
        &mut self,
        worker: usize,
        delivery: Delivery,
        settlement: Settlement,
    ) {
        let settled = match settlement {
            Settlement::Acknowledge if self.has(DriverBug::AcksMessageWithFirstRequest) => {
                Some((MessageNumber::of(delivery), settlement))
            }
            Settlement::Acknowledge | Settlement::Requeue => {
                self.workers[worker].taken.settle(delivery, settlement)
            }
        };
        let Some((number, settlement)) = settled else { return };
        if !self.is_unacked_at(worker, number) {
            return;
        }
        let Some(Unacked { requests, .. }) = self.broker.unacked.remove(&number) else { return };
        match settlement {
            Settlement::Acknowledge => self.check_message_ack(&requests),
            Settlement::Requeue => {
                if !self.plan.release_counts {
                    requests.iter().for_each(|&it| self.messages[it].deliveries -= 1);
                }
                self.broker.requests.push_front(requests);
            }
        }
        self.serve_requests();
    }

    pub(crate) fn serve_requests(&mut self) {
        while self.broker.is_up && !self.broker.requests.is_empty() {
            let mut takers = [0; 8];
            let mut n_takers = 0;
            for (worker, node) in self.workers.iter().enumerate() {
                let unacked = self.broker.unacked.values();
                let is_taker = node.is_connected
                    && node.is_serving
                    && !node.is_draining
                    && unacked.filter(|it| it.worker == worker).count() < self.plan.prefetch;
                if is_taker {
                    takers[n_takers] = worker;
                    n_takers += 1;
                }
            }
            if n_takers == 0 {
                return;
            }
            let worker = self.rng.pick(&takers[..n_takers]);
            let Some(requests) = self.broker.requests.pop_front() else { return };
            requests.iter().for_each(|&it| self.messages[it].deliveries += 1);
            let deliveries = requests.iter().map(|&it| self.messages[it].deliveries).max();
            let deliveries = deliveries.unwrap_or_default();
            let number = MessageNumber::new(self.broker.next_delivery());
            let unacked = Unacked { requests: requests.clone(), worker };
            self.broker.unacked.insert(number, unacked);
            let life = self.workers[worker].life;
            let input = WorkerInput::Requests { number, requests, deliveries };
            let wait = self.rules.deliver(&mut self.rng);
            self.after(wait, ScheduledEvent::ToWorker { worker, life, input });
        }
    }

    /// The broker gives up a worker's connection: its unacked messages are delivered again.
    pub(crate) fn drop_worker(&mut self, worker: usize) {
        self.workers[worker].is_cut_unnoticed |= self.workers[worker].is_connected;
        self.workers[worker].is_connected = false;
        self.workers[worker].is_serving = false;
        self.workers[worker].is_stuck = false;
        self.workers[worker].lane = AppendLane::default();
        for brought in std::mem::take(&mut self.workers[worker].undelivered) {
            self.share(brought);
        }
        let unacked = self.broker.unacked.iter().filter(|(_, it)| it.worker == worker);
        let numbers: Vec<_> = unacked.map(|(number, _)| *number).collect();
        for number in numbers.into_iter().rev() {
            if let Some(unacked) = self.broker.unacked.remove(&number) {
                self.broker.requests.push_front(unacked.requests);
            }
        }
        self.serve_requests();
    }

    /// To a worker's own queue; if it has none, to any worker.
    pub(crate) fn route_reply(&mut self, to: Option<WorkerId>, brought: WorkerMessage) {
        if !self.broker.is_up {
            return;
        }
        let node = self
            .workers
            .iter()
            .position(|node| node.is_connected && to.as_ref().is_some_and(|to| node.id == *to));
        match node {
            Some(worker) => {
                if let WorkerMessage::Returned(_, service) = &brought {
                    self.look_whether_served(worker, service);
                }
                let life = self.workers[worker].life;
                self.deliver_to_worker(worker, life, brought.into_event());
            }
            None => self.share(brought),
        }
    }

    /// Into the queue that all workers share.
    pub(crate) fn share(&mut self, brought: WorkerMessage) {
        self.broker.inquiries.push_back(brought);
        self.serve_inquiries();
    }

    pub(crate) fn serve_inquiries(&mut self) {
        while self.broker.is_up && !self.broker.inquiries.is_empty() {
            let mut takers = [0; 8];
            let mut n_takers = 0;
            for (worker, node) in self.workers.iter().enumerate() {
                if node.is_connected && node.is_serving {
                    takers[n_takers] = worker;
                    n_takers += 1;
                }
            }
            if n_takers == 0 {
                return;
            }
            let worker = self.rng.pick(&takers[..n_takers]);
            let Some(brought) = self.broker.inquiries.pop_front() else { return };
            let life = self.workers[worker].life;
            let wait = self.rules.deliver(&mut self.rng);
            let input = WorkerInput::Shared(brought);
            self.after(wait, ScheduledEvent::ToWorker { worker, life, input });
        }
    }

    // ---- Prepare queues ----------------------------------------------------------------------

    /// The service of that name, if it has a prepare queue.
    pub(crate) fn bound_service(&self, name: &ServiceName) -> Option<&Service> {
        let service = self.services.iter().find(|service| service.plan.name == *name)?;
        let is_removed = service.plan.removed_at.is_some_and(|at| at <= self.now);
        let is_unbound = service.unbound_until.is_some_and(|until| self.now < until);
        (!is_removed && !is_unbound).then_some(service)
    }

    pub(crate) fn queue_prepare(&mut self, service: usize, mut prepare: QueuedPrepare) {
        if !self.broker.is_up {
            return;
        }
        let max_wait = self.services[service].plan.max_wait;
        prepare.expires_at = self.now + Duration::from_millis(max_wait);
        self.services[service].queue.push_back(prepare);
        self.serve_prepares(service);
    }

    /// Delivers as far as there is credit, and returns what has expired at the head.
    pub(crate) fn serve_prepares(&mut self, service: usize) {
        if !self.broker.is_up || self.services[service].is_unreachable(self.now) {
            return;
        }
        loop {
            let Some(head) = self.services[service].queue.front() else { return };
            let expires_at = head.expires_at;
            let with_credit = self.instance_with_credit(service);
            let is_expired = match with_credit {
                Some(_) => self.now > expires_at,
                None => self.now >= expires_at,
            };
            if !is_expired && with_credit.is_none() {
                let due = &mut self.services[service].head_due;
                if *due != Some(expires_at) {
                    *due = Some(expires_at);
                    self.at(expires_at, ScheduledEvent::HeadExpires { service });
                }
                return;
            }
            let Some(head) = self.services[service].queue.pop_front() else { return };
            match with_credit {
                Some(instance) if !is_expired => self.deliver_prepare(service, instance, head),
                Some(_) | None => self.return_prepare(service, head),
            }
        }
    }

    fn instance_with_credit(&mut self, service: usize) -> Option<usize> {
        let mut takers = [0; 8];
        let mut n_takers = 0;
        let Self { instances, services, .. } = self;
        let slots = &services[service].slots;
        for (instance, node) in instances.iter().enumerate() {
            let taken = || slots.values().filter(|slot| slot.instance == instance).count();
            if node.service == service
                && node.is_connected
                && taken() < services[service].plan.cap as usize
            {
                takers[n_takers] = instance;
                n_takers += 1;
            }
        }
        (n_takers > 0).then(|| self.rng.pick(&takers[..n_takers]))
    }

    fn deliver_prepare(&mut self, service: usize, instance: usize, prepare: QueuedPrepare) {
        let delivery = self.broker.next_delivery();
        let event = participant::Event::PrepareReceived {
            worker: prepare.from.clone(),
            delivery: Delivery(delivery),
            redelivered: prepare.redelivered,
            prepare: prepare.prepare.clone(),
        };
        let slot = Slot { instance, prepare };
        self.services[service].slots.insert(delivery, slot);
        self.deliver_to_instance(instance, event);
    }

    /// Through the dead-letter exchange, back to its worker.
    fn return_prepare(&mut self, service: usize, prepare: QueuedPrepare) {
        let name = self.services[service].plan.name.clone();
        tell!(self, "broker: {name} has no slot for {}", prepare.prepare.key);
        let brought = WorkerMessage::Returned(prepare.prepare.key, name);
        self.after(1, ScheduledEvent::ReplyRouted { to: Some(prepare.from), brought });
    }

    fn deliver_to_instance(&mut self, instance: usize, event: participant::Event) {
        let life = self.instances[instance].life;
        let wait = self.rules.deliver(&mut self.rng);
        self.after(wait, ScheduledEvent::ToInstance { instance, life, event });
    }

    /// The broker gives up an instance's connection: its unacked messages are delivered again, or
    /// returned if they have expired.
    pub(crate) fn drop_instance(&mut self, instance: usize) {
        self.instances[instance].is_connected = false;
        self.instances[instance].is_stuck = false;
        self.instances[instance].queue_dies_at = Some(self.now + DYING_QUEUE);
        let service = self.instances[instance].service;
        let slots = self.services[service].slots.iter();
        let held: Vec<_> = slots
            .filter(|(_, slot)| slot.instance == instance)
            .map(|(delivery, _)| *delivery)
            .collect();
        for delivery in held.into_iter().rev() {
            if let Some(slot) = self.services[service].slots.remove(&delivery) {
                let prepare = QueuedPrepare { redelivered: true, ..slot.prepare };
                if prepare.expires_at <= self.now {
                    self.return_prepare(service, prepare);
                } else {
                    self.services[service].queue.push_front(prepare);
                }
            }
        }
        let unacked = self.services[service].durable_unacked.iter();
        let held: Vec<_> = unacked
            .filter(|(_, (_, taker))| *taker == instance)
            .map(|(delivery, _)| *delivery)
            .collect();
        for delivery in held.into_iter().rev() {
            if let Some((command, _)) = self.services[service].durable_unacked.remove(&delivery) {
                self.services[service].durable.push_front(command);
            }
        }
        self.serve_prepares(service);
        self.serve_durable(service);
    }

    pub(crate) fn forget_what_is_not_persistent(&mut self) {
        for service in &mut self.services {
            service.queue.clear();
            service.slots.clear();
        }
    }

    pub(crate) fn serve_everybody(&mut self) {
        self.serve_requests();
        self.serve_inquiries();
        for service in 0..self.services.len() {
            self.serve_prepares(service);
            self.serve_durable(service);
        }
    }

    // ---- Finish queues -----------------------------------------------------------------------

    pub(crate) fn route_command(&mut self, service: usize, to: Destination, command: Command) {
        if !self.broker.is_up {
            return;
        }
        if self.services[service].finish_refused_until.is_some_and(|until| self.now < until) {
            // A message that must arrive is published again.
            if to == Destination::AnyInstance {
                self.after(200, ScheduledEvent::CommandRouted { service, to, command });
            }
            return;
        }
        let mut is_bound = self.stale_queues.iter().any(|(id, of)| {
            *of == service
                && match &to {
                    Destination::Instance(to) => to == id,
                    Destination::AllInstances => true,
                    Destination::AnyInstance => false,
                }
        });
        for instance in 0..self.instances.len() {
            let node = &self.instances[instance];
            let is_meant = node.service == service
                && match &to {
                    Destination::Instance(id) => node.id == *id,
                    Destination::AllInstances => true,
                    Destination::AnyInstance => false,
                };
            if is_meant && node.is_connected {
                is_bound = true;
                self.deliver_command(instance, command.clone(), None);
            } else if is_meant && node.queue_dies_at.is_some_and(|at| self.now < at) {
                // Confirmed, and lost with the queue.
                is_bound = true;
            }
        }
        if !is_bound {
            self.services[service].durable.push_back(command);
            self.serve_durable(service);
        }
    }

    pub(crate) fn serve_durable(&mut self, service: usize) {
        while self.broker.is_up && !self.services[service].durable.is_empty() {
            let mut takers = [0; 8];
            let mut n_takers = 0;
            for (instance, node) in self.instances.iter().enumerate() {
                if node.service == service && node.is_connected {
                    takers[n_takers] = instance;
                    n_takers += 1;
                }
            }
            if n_takers == 0 {
                return;
            }
            let instance = self.rng.pick(&takers[..n_takers]);
            let Some(command) = self.services[service].durable.pop_front() else { return };
            let delivery = self.broker.next_delivery();
            let is_finish = matches!(command.command, message::Command::Finish(_));
            self.deliver_command(
                instance,
                command.clone(),
                is_finish.then_some(Delivery(delivery)),
            );
            if is_finish {
                let unacked = &mut self.services[service].durable_unacked;
                unacked.insert(delivery, (command, instance));
            }
        }
    }

    fn deliver_command(&mut self, instance: usize, command: Command, delivery: Option<Delivery>) {
        let worker = command.from;
        let event = match command.command {
            message::Command::Query(query) => participant::Event::QueryReceived { worker, query },
            message::Command::Cancel(key) => participant::Event::CancelReceived(key),
            message::Command::Finish(finish) => {
                participant::Event::FinishReceived { worker, finish, delivery }
            }
        };
        self.deliver_to_instance(instance, event);
    }

    // ---- What an instance asks for -----------------------------------------------------------

    pub(crate) fn perform_for_instance(&mut self, instance: usize, effect: participant::Effect) {
        use participant::Effect;
        match effect {
            Effect::CallPrepare { key, branch, request_hash, deadline, .. } => {
                self.call_prepare(instance, key, branch, request_hash, deadline);
            }
            Effect::CallCommit { key, branch } => self.call_commit(instance, key, branch),
            Effect::CallAbort { key, branch } => self.call_abort(instance, key, branch),
            Effect::ReadStore(key) => self.read_store(instance, Some(key)),
            Effect::LookUpCommit { key, branch } => self.look_up_commit(instance, key, branch),
            Effect::ScanStore => self.read_store(instance, None),
            Effect::Vote { to, vote } => {
                let store = &self.services[self.instances[instance].service].store;
                let checked = stored_before_voted::voting(&vote, |it| store.has_stored(it));
                self.check("stored_before_voted", checked);
                self.reply(instance, Some(to), WorkerMessage::Vote(vote));
            }
            Effect::Done { to, done, ack } => {
                self.reply(instance, Some(to), WorkerMessage::Done(done));
                if let Some(delivery) = ack {
                    self.ack_for_instance(instance, delivery);
                }
            }
            Effect::Inquire(inquiry) => self.reply(instance, None, WorkerMessage::Inquiry(inquiry)),
            Effect::Ack(delivery) => self.ack_for_instance(instance, delivery),
        }
    }

    fn reply(&mut self, instance: usize, to: Option<WorkerId>, brought: WorkerMessage) {
        let is_cut = !self.instances[instance].is_connected;
        let is_stuck = self.instances[instance].is_stuck;
        if !self.broker.is_up || is_stuck || is_cut && self.rng.chance(500) {
            return;
        }
        for millis in self.rules.carry(&mut self.rng).into_iter().flatten() {
            let (to, brought) = (to.clone(), brought.clone());
            self.after(millis, ScheduledEvent::ReplyRouted { to, brought });
        }
    }

    fn ack_for_instance(&mut self, instance: usize, delivery: Delivery) {
        if !self.broker.is_up || self.instances[instance].is_stuck {
            return;
        }
        let service = self.instances[instance].service;
        let own = &mut self.services[service];
        if own.slots.get(&delivery.0).is_some_and(|slot| slot.instance == instance) {
            own.slots.remove(&delivery.0);
            self.serve_prepares(service);
        } else if own.durable_unacked.get(&delivery.0).is_some_and(|(_, taker)| *taker == instance)
        {
            own.durable_unacked.remove(&delivery.0);
        }
    }
}
