//! One schedule: workers and instances with the real cores inside, a modelled broker between them,
//! a clock that jumps from one happening to the next, and all checkers.
//!
//! [`broker`](crate::broker) has what the broker does, [`service`](crate::service) what services
//! do; here are the processes, and the events that each gets.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
    sync::Arc,
    time::Duration,
};

use dtc::protocol::{
    coordinator,
    ids::{Branch, InstanceId, ServiceName, TransactionId, TransactionKey, WorkerId},
    message::{
        Answer, Decision, Delivery, Destination, Outcome, Parked, Reason, ReasonCode, Request,
    },
    participant,
    request_messages::{MessageNumber, RequestMessages},
    time::Time,
};

use crate::{
    broker::{Broker, Command, Journal, QueuedPrepare, QueuedRequests, WorkerMessage},
    bugs::{Member, Worker},
    checkers::{
        Checked, Violation, ack_after_result, agreement, cap, ended,
        necessary_calls::NecessaryCalls, parked::ParkedCommits, result, unanimity::Unanimity,
    },
    coverage::Coverage,
    driver::{AppendLane, DriverBug, Flaw, Producer},
    plan::{Plan, START, WorkerPlan},
    rng::Rng,
    rules::{Fault, Kind, Rules, shifted},
    service::{Call, Service},
};

/// How long after healing everything must have come to rest.
const REST_WITHIN: Duration = Duration::from_secs(3 * 60);

/// More happenings than this mean that it never comes to rest.
const STEPS_MAX: u64 = 100_000;

/// How many faults at least take effect in every schedule.
const FAULTS_MIN: u64 = 3;

/// The life of a process, and its connection, for which a message was meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Life {
    pub(crate) incarnation: u32,
    pub(crate) connection: u32,
}

/// A scheduled happening.
#[derive(Debug)]
pub(crate) enum ScheduledEvent {
    /// A producer publishes a message of these requests.
    Publish(QueuedRequests),
    /// A worker publishes a request of a message in one of its own.
    PublishedApart {
        worker: usize,
        life: Life,
        delivery: Delivery,
        message: usize,
    },
    ToWorker {
        worker: usize,
        life: Life,
        input: WorkerInput,
    },
    ToInstance {
        instance: usize,
        life: Life,
        event: participant::Event,
    },
    /// A record reaches the journal.
    Appended(Decision),
    /// A result reaches the broker.
    ResultStored {
        worker: usize,
        life: Life,
        key: TransactionKey,
        delivery: Delivery,
        answer: Answer,
    },
    /// A parked record reaches the broker.
    ParkStored {
        worker: usize,
        life: Life,
        parked: Parked,
    },
    /// A prepare reaches the queue of its service.
    PrepareQueued {
        service: usize,
        prepare: QueuedPrepare,
    },
    /// A command reaches the exchange for one instance, for all, or for any.
    CommandRouted {
        service: usize,
        to: Destination,
        command: Command,
    },
    /// A message to a worker reaches the exchange.
    ReplyRouted {
        to: Option<WorkerId>,
        brought: WorkerMessage,
    },
    /// The head of a prepare queue may have expired.
    HeadExpires {
        service: usize,
    },
    CallEnds {
        instance: usize,
        incarnation: u32,
        call: Call,
    },
    WorkerWakes {
        worker: usize,
        incarnation: u32,
        at: Time,
    },
    InstanceWakes {
        instance: usize,
        incarnation: u32,
        at: Time,
    },
    WorkerStarts {
        worker: usize,
    },
    InstanceStarts {
        instance: usize,
    },
    WorkerThaws {
        worker: usize,
        incarnation: u32,
    },
    /// The broker gives up a connection.
    BrokerDropsWorker {
        worker: usize,
        life: Life,
    },
    WorkerNoticesCut {
        worker: usize,
        life: Life,
    },
    InstanceNoticesCut {
        instance: usize,
        life: Life,
    },
    WorkerConnects {
        worker: usize,
        life: Life,
    },
    InstanceConnects {
        instance: usize,
        life: Life,
    },
    BrokerIsBack,
    AppendConfirmed {
        worker: usize,
        life: Life,
        number: u64,
    },
    ConfirmIsDue {
        worker: usize,
        life: Life,
        number: u64,
    },
    ReadBackIsDue {
        worker: usize,
        life: Life,
    },
    WorkerLinkIsDue {
        worker: usize,
        life: Life,
    },
    InstanceLinkIsDue {
        instance: usize,
        life: Life,
    },
    LooksAgain {
        worker: usize,
        life: Life,
        service: ServiceName,
    },
    LooksWhetherServed {
        worker: usize,
        life: Life,
        service: ServiceName,
    },
    ServiceIsBack {
        service: usize,
    },
    ProducerConnects,
    Goes(Fault),
    Heals,
    RestIsSought,
}

/// An input of a worker.
#[derive(Debug)]
pub(crate) enum WorkerInput {
    /// A message of these requests.
    Requests {
        number: MessageNumber,
        requests: QueuedRequests,
        deliveries: u32,
    },
    Event(coordinator::Event),
    /// From the inquiries queue, which delivers it to another worker if this one is gone.
    Shared(WorkerMessage),
    /// There is more to read in the journal.
    Tail,
    History {
        from: Time,
        until: u64,
    },
}

pub(crate) struct WorkerNode {
    plan: WorkerPlan,
    pub(crate) id: WorkerId,
    pub(crate) life: Life,
    pub(crate) process: Option<Worker>,
    /// As the broker sees it.
    pub(crate) is_connected: bool,
    /// It has replayed its window.
    pub(crate) is_serving: bool,
    is_attached: bool,
    pub(crate) is_frozen: bool,
    /// Nothing passes through its link, and neither side knows.
    pub(crate) is_stuck: bool,
    /// Messages from the shared queue that did not arrive.
    pub(crate) undelivered: Vec<WorkerMessage>,
    /// Its reader gets nothing more.
    pub(crate) is_tail_stuck: bool,
    pub(crate) lane: AppendLane,
    /// The broker has given up its connection without its knowledge.
    pub(crate) is_cut_unnoticed: bool,
    pub(crate) is_draining: bool,
    inbox: VecDeque<(Life, WorkerInput)>,
    reader_next: u64,
    replays_until: u64,
    tail_is_due: bool,
    pub(crate) backlog: VecDeque<coordinator::Event>,
    /// The messages of requests that it has taken.
    pub(crate) taken: RequestMessages,
    seen: BTreeSet<TransactionKey>,
    wakes_at: Option<Time>,
    dies_after: Option<(u32, u64)>,
}

pub(crate) struct InstanceNode {
    pub(crate) service: usize,
    pub(crate) skew: i64,
    pub(crate) id: InstanceId,
    pub(crate) life: Life,
    pub(crate) process: Option<Member>,
    pub(crate) is_connected: bool,
    /// Nothing passes through its link, and neither side knows.
    pub(crate) is_stuck: bool,
    /// Until when the broker considers its queue alive.
    pub(crate) queue_dies_at: Option<Time>,
    pub(crate) working: BTreeSet<TransactionKey>,
    necessary: NecessaryCalls,
    wakes_at: Option<Time>,
    dies_after: Option<(u32, u64)>,
}

/// A request as published, in a message of its own or with others.
pub(crate) struct RequestMessage {
    pub(crate) request: Request,
    pub(crate) deliveries: u32,
    pub(crate) answers: Vec<Answer>,
    pub(crate) rejected: Option<Reason>,
    pub(crate) is_parked: bool,
    /// The reply token of its producer.
    pub(crate) token: u32,
    /// Its producer has no result, and has published it once more.
    pub(crate) is_asked_again: bool,
    /// A worker has published it once more, in a message of its own.
    pub(crate) is_apart: bool,
}

impl RequestMessage {
    fn new(request: Request, token: u32) -> Self {
        Self {
            request,
            deliveries: 0,
            answers: Vec::new(),
            rejected: None,
            is_parked: false,
            token,
            is_asked_again: false,
            is_apart: false,
        }
    }

    /// The same request, published once more.
    pub(crate) fn again(&self, token: u32) -> Self {
        Self::new(self.request.clone(), token)
    }
}

/// The summary of a schedule.
pub(crate) struct Summary {
    pub(crate) violation: Option<Violation>,
    pub(crate) faults: [u64; Kind::ALL.len()],
    pub(crate) coverage: Coverage,
    /// How many transactions and requests had each result.
    pub(crate) endings: BTreeMap<&'static str, u64>,
    pub(crate) steps: u64,
    pub(crate) trace: Vec<String>,
}

pub(crate) struct World {
    pub(crate) now: Time,
    pub(crate) rng: Rng,
    happenings: BinaryHeap<Reverse<(Time, u64, usize)>>,
    slab: Vec<Option<ScheduledEvent>>,
    vacant: Vec<usize>,
    ordinal: u64,
    /// Scheduled happenings other than clocks.
    n_pending: usize,
    pub(crate) workers: Vec<WorkerNode>,
    pub(crate) instances: Vec<InstanceNode>,
    pub(crate) services: Vec<Service>,
    pub(crate) messages: Vec<RequestMessage>,
    pub(crate) broker: Broker,
    pub(crate) journal: Journal,
    pub(crate) rules: Rules,
    pub(crate) plan: Plan,
    pub(crate) flaw: Option<Flaw>,
    pub(crate) producer: Producer,
    pub(crate) results_refused_until: Option<Time>,
    /// Transactions with a result that has counted as unclaimed.
    pub(crate) unclaimed_ids: BTreeSet<TransactionId>,
    /// Queues of lost links, bound for good: their instance, and its service.
    pub(crate) stale_queues: Vec<(InstanceId, usize)>,
    pub(crate) is_healed: bool,
    unanimity: Unanimity,
    pub(crate) parked: ParkedCommits,
    pub(crate) parked_ids: BTreeSet<TransactionId>,
    coverage: Coverage,
    pub(crate) violation: Option<Violation>,
    trace: Option<Vec<String>>,
    steps: u64,
}

/// Prints what happens, if traced.
macro_rules! tell {
    ($world:expr, $($words:tt)*) => {
        if $world.is_traced() {
            let line = format!($($words)*);
            $world.note(line);
        }
    };
}
pub(crate) use tell;

/// Runs the schedule of `seed`, with a `bug` in every core or without; `is_traced`: prints
/// everything.
pub(crate) fn run(seed: u64, flaw: Option<Flaw>, is_traced: bool) -> Summary {
    let mut world = World::new(seed, flaw, is_traced);
    world.run();
    world.into_summary()
}

impl World {
    fn new(seed: u64, flaw: Option<Flaw>, is_traced: bool) -> Self {
        let plan = Plan::draw(seed);
        let mut world = Self {
            now: START,
            rng: Rng::new(!seed),
            happenings: BinaryHeap::new(),
            slab: Vec::new(),
            vacant: Vec::new(),
            ordinal: 0,
            n_pending: 0,
            workers: Vec::new(),
            instances: Vec::new(),
            services: Vec::new(),
            messages: Vec::new(),
            broker: Broker::default(),
            journal: Journal::new(plan.journal_from, Rng::new(seed.rotate_left(32))),
            rules: Rules::new(plan.chaos),
            plan,
            flaw,
            producer: Producer::default(),
            results_refused_until: None,
            unclaimed_ids: BTreeSet::new(),
            stale_queues: Vec::new(),
            is_healed: false,
            unanimity: Unanimity::default(),
            parked: ParkedCommits::default(),
            parked_ids: BTreeSet::new(),
            coverage: Coverage::new(),
            violation: None,
            trace: is_traced.then(Vec::new),
            steps: 0,
        };
        world.populate();
        world
    }

    fn populate(&mut self) {
        for plan in std::mem::take(&mut self.plan.workers) {
            let node = WorkerNode::new(plan);
            let worker = self.workers.len();
            self.workers.push(node);
            self.at(START, ScheduledEvent::WorkerStarts { worker });
        }
        for plan in std::mem::take(&mut self.plan.services) {
            let service = self.services.len();
            for skew in &plan.instances {
                let instance = self.instances.len();
                self.instances.push(InstanceNode::new(service, *skew));
                self.at(START, ScheduledEvent::InstanceStarts { instance });
            }
            self.services.push(Service::new(plan));
        }
        let mut published: Vec<(Time, QueuedRequests)> = Vec::new();
        for (at, request) in std::mem::take(&mut self.plan.requests) {
            let joins = self.plan.batching.as_mut().is_some_and(|rng| rng.chance(500));
            let message = self.messages.len();
            match published.last_mut().filter(|_| joins) {
                Some((last, requests)) => {
                    *last = at;
                    requests.push(message);
                }
                None => published.push((at, vec![message])),
            }
            self.messages.push(RequestMessage::new(request, 0));
        }
        for (at, requests) in published {
            self.at(at, ScheduledEvent::Publish(requests));
        }
        for (at, fault) in std::mem::take(&mut self.plan.faults) {
            self.at(at, ScheduledEvent::Goes(fault));
        }
        self.at(self.plan.heal_at, ScheduledEvent::Heals);
    }

    fn run(&mut self) {
        while self.violation.is_none()
            && let Some(Reverse((at, _, index))) = self.happenings.pop()
        {
            let Some(happening) = self.slab[index].take() else { continue };
            self.vacant.push(index);
            self.now = at;
            self.steps += 1;
            if happening.is_pending() {
                self.n_pending -= 1;
            }
            if self.steps > STEPS_MAX {
                let left = self.what_is_left(true);
                self.check("ended", Err(format!("it never comes to rest; {}", left.join("; "))));
            }
            if matches!(happening, ScheduledEvent::RestIsSought) {
                if self.seek_rest() {
                    return;
                }
                continue;
            }
            self.happen(happening);
        }
    }

    fn into_summary(mut self) -> Summary {
        let mut endings = BTreeMap::new();
        for first in self.journal.firsts() {
            let word = match (first.outcome, first.reason.as_ref().map(|reason| reason.code)) {
                (Outcome::Committed, _) => "transactions committed",
                (Outcome::Aborted, Some(code)) => abort_word(code),
                (Outcome::Aborted, None) => "transactions aborted: heard",
            };
            *endings.entry(word).or_default() += 1;
        }
        for message in &self.messages {
            let word = match (&message.rejected, message.is_parked) {
                (None, false) => "requests answered",
                (None, true) => "requests parked",
                (Some(reason), _) if reason.code == ReasonCode::IdReused => {
                    "requests rejected: id_reused"
                }
                (Some(_), _) => "requests rejected: invalid",
            };
            *endings.entry(word).or_default() += 1;
        }
        *endings.entry("commits parked").or_default() += self.parked.n_listed() as u64;
        *endings.entry("commits settled").or_default() += self.parked.n_settled() as u64;
        let (shared, empty) = self.journal.shared_and_empty();
        *endings.entry("journal messages with several records").or_default() += shared as u64;
        *endings.entry("journal messages without a record").or_default() += empty as u64;
        Summary {
            violation: self.violation,
            faults: self.rules.counts,
            coverage: self.coverage,
            endings,
            steps: self.steps,
            trace: self.trace.take().unwrap_or_default(),
        }
    }

    // ---- Time and the trace ------------------------------------------------------------------

    pub(crate) fn at(&mut self, at: Time, happening: ScheduledEvent) {
        if happening.is_pending() {
            self.n_pending += 1;
        }
        let index = self.vacant.pop().unwrap_or_else(|| {
            self.slab.push(None);
            self.slab.len() - 1
        });
        self.slab[index] = Some(happening);
        self.happenings.push(Reverse((at.max(self.now), self.ordinal, index)));
        self.ordinal += 1;
    }

    pub(crate) fn after(&mut self, millis: u64, happening: ScheduledEvent) {
        self.at(self.now + Duration::from_millis(millis), happening);
    }

    pub(crate) fn is_traced(&self) -> bool {
        self.trace.is_some()
    }

    pub(crate) fn note(&mut self, line: String) {
        let at = self.now.since(START).as_millis();
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{at:>7} {line}"));
        }
    }

    pub(crate) fn check(&mut self, property: &'static str, checked: Checked) {
        if let Err(seen) = checked
            && self.violation.is_none()
        {
            tell!(self, "VIOLATION of {property}: {seen}");
            self.violation = Some(Violation { property, seen });
        }
    }

    // ---- What happens ------------------------------------------------------------------------

    fn happen(&mut self, happening: ScheduledEvent) {
        match happening {
            ScheduledEvent::Publish(requests) => {
                for &message in &requests {
                    tell!(self, "producer: {:?}", self.messages[message].request);
                }
                self.publish_requests(requests);
            }
            ScheduledEvent::PublishedApart { worker, life, delivery, message } => {
                self.published_apart(worker, life, delivery, message);
            }
            ScheduledEvent::ToWorker { worker, life, input } => {
                self.reach_worker(worker, life, input)
            }
            ScheduledEvent::ToInstance { instance, life, event } => {
                let node = &self.instances[instance];
                if node.life == life && node.process.is_some() && !node.is_stuck {
                    self.tell_instance(instance, event);
                }
            }
            ScheduledEvent::Appended(decision) => self.append(decision),
            ScheduledEvent::ResultStored { worker, life, key, delivery, answer } => {
                self.store_result(worker, life, key, delivery, answer);
            }
            ScheduledEvent::ParkStored { worker, life, parked } => {
                self.store_parked(worker, life, parked)
            }
            ScheduledEvent::PrepareQueued { service, prepare } => {
                self.queue_prepare(service, prepare)
            }
            ScheduledEvent::CommandRouted { service, to, command } => {
                self.route_command(service, to, command);
            }
            ScheduledEvent::ReplyRouted { to, brought } => self.route_reply(to, brought),
            ScheduledEvent::HeadExpires { service } => self.serve_prepares(service),
            ScheduledEvent::CallEnds { instance, incarnation, call } => {
                self.end_call(instance, incarnation, call);
            }
            ScheduledEvent::WorkerWakes { worker, incarnation, at } => {
                let node = &mut self.workers[worker];
                if node.life.incarnation == incarnation && node.wakes_at == Some(at) {
                    node.wakes_at = None;
                    let input = WorkerInput::Event(coordinator::Event::DeadlineReached);
                    let life = node.life;
                    self.reach_worker(worker, life, input);
                }
            }
            ScheduledEvent::InstanceWakes { instance, incarnation, at } => {
                let node = &mut self.instances[instance];
                if node.life.incarnation == incarnation && node.wakes_at == Some(at) {
                    node.wakes_at = None;
                    if node.process.is_some() {
                        self.tell_instance(instance, participant::Event::DeadlineReached);
                    }
                }
            }
            ScheduledEvent::WorkerStarts { worker } => self.start_worker(worker),
            ScheduledEvent::InstanceStarts { instance } => self.start_instance(instance),
            ScheduledEvent::WorkerThaws { worker, incarnation } => self.thaw(worker, incarnation),
            ScheduledEvent::BrokerDropsWorker { worker, life } => {
                if self.workers[worker].life == life && self.workers[worker].is_connected {
                    tell!(
                        self,
                        "broker: {} is silent, its connection is given up",
                        self.workers[worker].id
                    );
                    self.drop_worker(worker);
                    if !self.workers[worker].is_frozen {
                        self.at(self.now, ScheduledEvent::WorkerNoticesCut { worker, life });
                    }
                }
            }
            ScheduledEvent::WorkerNoticesCut { worker, life } => {
                self.worker_notices_cut(worker, life)
            }
            ScheduledEvent::InstanceNoticesCut { instance, life } => {
                self.instance_notices_cut(instance, life);
            }
            ScheduledEvent::WorkerConnects { worker, life } => {
                if self.workers[worker].life == life && self.workers[worker].process.is_some() {
                    self.connect_worker(worker);
                }
            }
            ScheduledEvent::InstanceConnects { instance, life } => {
                if self.instances[instance].life == life
                    && self.instances[instance].process.is_some()
                {
                    self.connect_instance(instance);
                }
            }
            ScheduledEvent::BrokerIsBack => {
                tell!(self, "broker: is back");
                self.broker.is_up = true;
                self.serve_everybody();
            }
            ScheduledEvent::AppendConfirmed { worker, life, number } => {
                self.append_confirmed(worker, life, number);
            }
            ScheduledEvent::ConfirmIsDue { worker, life, number } => {
                self.confirm_is_due(worker, life, number);
            }
            ScheduledEvent::ReadBackIsDue { worker, life } => self.read_back_is_due(worker, life),
            ScheduledEvent::WorkerLinkIsDue { worker, life } => {
                self.worker_link_is_due(worker, life)
            }
            ScheduledEvent::InstanceLinkIsDue { instance, life } => {
                self.instance_link_is_due(instance, life);
            }
            ScheduledEvent::LooksAgain { worker, life, service } => {
                let node = &self.workers[worker];
                if node.life == life && node.process.is_some() && !node.is_stuck {
                    self.find_service(worker, service);
                }
            }
            ScheduledEvent::LooksWhetherServed { worker, life, service } => {
                let node = &self.workers[worker];
                if node.life == life && node.process.is_some() && !node.is_stuck {
                    self.look_again_whether_served(worker, service);
                }
            }
            ScheduledEvent::ServiceIsBack { service } => self.serve_prepares(service),
            ScheduledEvent::ProducerConnects => self.producer_connects(),
            ScheduledEvent::Goes(fault) => self.go(fault),
            ScheduledEvent::Heals => self.heal(),
            ScheduledEvent::RestIsSought => {}
        }
    }

    // ---- Workers -----------------------------------------------------------------------------

    fn start_worker(&mut self, worker: usize) {
        let bug = self.flaw.and_then(Flaw::core);
        let retries = self.has(DriverBug::RepublishForEver).then_some(u32::MAX);
        let node = &mut self.workers[worker];
        if node.process.is_some() {
            return;
        }
        node.life.incarnation += 1;
        node.life.connection += 1;
        let text = format!("w{worker}-{}", node.life.incarnation);
        node.id = WorkerId::parse(&text).expect("a valid id");
        let mut settings =
            coordinator::Settings { worker: node.id.clone(), ..node.plan.settings.clone() };
        settings.result_retries = retries.unwrap_or(settings.result_retries);
        node.process = Some(Worker::new(settings, bug));
        node.is_attached = false;
        node.is_draining = false;
        node.is_frozen = false;
        node.is_stuck = false;
        node.lane = AppendLane::default();
        node.is_cut_unnoticed = false;
        node.inbox.clear();
        node.backlog.clear();
        node.seen.clear();
        node.wakes_at = None;
        node.dies_after = None;
        node.tail_is_due = false;
        tell!(self, "{text}: starts");
        self.connect_worker(worker);
    }

    fn connect_worker(&mut self, worker: usize) {
        let life = self.workers[worker].life;
        if !self.broker.is_up || self.workers[worker].is_frozen {
            return self.after(20, ScheduledEvent::WorkerConnects { worker, life });
        }
        let node = &mut self.workers[worker];
        node.is_connected = true;
        node.is_serving = false;
        node.is_tail_stuck = false;
        node.lane = AppendLane::default();
        let end = self.journal.seal();
        let Some(process) = &mut node.process else { return };
        if node.is_attached {
            let wanted = process.core().next_offset();
            node.reader_next = process.reads_from(wanted, end);
            node.replays_until = end;
        } else {
            let clock = shifted(self.now, node.plan.skew);
            let settings = &node.plan.settings;
            let since = clock - settings.window;
            let (offset, complete_from) = self.journal.reaching(since, settings.clock_margin);
            let next = process.reads_from(offset, end);
            node.reader_next = next;
            node.replays_until = end;
            node.is_attached = true;
            let event = coordinator::Event::JournalAttached { next, since: complete_from };
            self.tell_worker(worker, event);
            let workers = u32::try_from(self.workers.len()).unwrap_or(u32::MAX);
            self.tell_worker(worker, coordinator::Event::WorkersCounted(workers));
        }
        self.read_tail(worker);
        self.serve_inquiries();
    }

    /// An input arrives at a worker: it is handled, kept in its inbox while it is frozen, or
    /// dropped.
    fn reach_worker(&mut self, worker: usize, life: Life, input: WorkerInput) {
        let node = &mut self.workers[worker];
        if node.process.is_none() || node.life != life {
            if let WorkerInput::Shared(brought) = input {
                self.share(brought);
            }
            return;
        }
        if node.is_frozen {
            return node.inbox.push_back((life, input));
        }
        let is_clock = matches!(&input, WorkerInput::Event(coordinator::Event::DeadlineReached));
        if node.is_stuck && !is_clock {
            if let WorkerInput::Shared(brought) = input {
                node.undelivered.push(brought);
            }
            return;
        }
        match input {
            WorkerInput::Requests { number, requests, deliveries } => {
                self.requests_arrive(worker, number, &requests, deliveries);
            }
            WorkerInput::Event(event) => self.tell_worker(worker, event),
            WorkerInput::Shared(brought) => self.tell_worker(worker, brought.into_event()),
            WorkerInput::Tail => self.read_tail(worker),
            WorkerInput::History { from, until } => self.read_history(worker, from, until),
        }
    }

    pub(crate) fn take_backlog(&mut self, worker: usize) {
        loop {
            let node = &mut self.workers[worker];
            let Some(process) = &node.process else { return };
            if process.core().room() == 0 && !node.is_draining {
                return;
            }
            let Some(event) = node.backlog.pop_front() else { return };
            self.tell_worker_only(worker, event);
        }
    }

    pub(crate) fn read_tail(&mut self, worker: usize) {
        self.workers[worker].tail_is_due = false;
        if self.workers[worker].is_tail_stuck {
            return;
        }
        let life = self.workers[worker].life;
        loop {
            let node = &mut self.workers[worker];
            if node.life != life || !node.is_attached || node.process.is_none() {
                return;
            }
            let Some(decisions) = self.journal.get(node.reader_next) else { break };
            let offset = node.reader_next;
            node.reader_next += 1;
            node.seen.extend(decisions.iter().map(|decision| decision.key.clone()));
            self.tell_worker(worker, coordinator::Event::RecordsRead { offset, decisions });
        }
        let node = &mut self.workers[worker];
        if node.is_connected && !node.is_serving && node.reader_next >= node.replays_until {
            node.is_serving = true;
            self.serve_requests();
        }
    }

    fn read_history(&mut self, worker: usize, from: Time, until: u64) {
        let life = self.workers[worker].life;
        let margin = self.plan.clock_margin;
        let (start, complete_from) = self.journal.reaching(from, margin);
        for offset in start..until.min(self.journal.end()) {
            let node = &self.workers[worker];
            if node.life != life || node.process.is_none() {
                return;
            }
            for decision in self.journal.get(offset).into_iter().flatten() {
                self.workers[worker].seen.insert(decision.key.clone());
                self.tell_worker(worker, coordinator::Event::HistoryRead(decision));
            }
        }
        if self.workers[worker].life == life && self.workers[worker].process.is_some() {
            let is_lost = self.rules.loses_history(&mut self.rng);
            let reaches = (!is_lost).then_some(complete_from);
            self.tell_worker(worker, coordinator::Event::HistoryEnded { reaches });
        }
    }

    /// Gives a worker an event, and then what has waited for room.
    fn tell_worker(&mut self, worker: usize, event: coordinator::Event) {
        self.tell_worker_only(worker, event);
        if !self.workers[worker].backlog.is_empty() {
            self.take_backlog(worker);
        }
    }

    fn tell_worker_only(&mut self, worker: usize, event: coordinator::Event) {
        if self.violation.is_some() {
            return;
        }
        tell!(self, "{} <- {event:?}", self.workers[worker].id);
        let node = &mut self.workers[worker];
        let Some(process) = &mut node.process else { return };
        for key in event.keys() {
            self.coverage.worker(process.core().phase_of(key), event.label());
        }
        let settles = if let coordinator::Event::DoneReceived { done, .. } = &event
            && done.parked
            && done.applied.is_ok()
        {
            Some((done.key.clone(), done.service.clone()))
        } else {
            None
        };
        let mut effects = Vec::new();
        process.handle(shifted(self.now, node.plan.skew), event, &mut effects);
        let life = node.life;
        for effect in effects {
            if let Some((after, down)) = self.workers[worker].dies_after {
                if after == 0 {
                    self.rules.count(Kind::WorkerCrash);
                    return self.kill_worker(worker, down);
                }
                self.workers[worker].dies_after = Some((after - 1, down));
            }
            tell!(self, "{} -> {effect:?}", self.workers[worker].id);
            self.perform_for_worker(worker, effect);
        }
        if let Some((key, service)) = settles {
            self.parked.applied(&key, &service);
        }
        if self.workers[worker].life != life {
            return;
        }
        self.arm_worker(worker);
        let node = &self.workers[worker];
        let is_done = node.process.as_ref().is_some_and(|process| process.core().is_empty());
        if node.is_draining && is_done && node.backlog.is_empty() {
            tell!(self, "{}: drained", node.id);
            self.kill_worker(worker, 50);
        }
    }

    fn arm_worker(&mut self, worker: usize) {
        let node = &mut self.workers[worker];
        let next = node.process.as_ref().and_then(|process| process.core().next_deadline());
        let Some(at) = next.map(|at| shifted(at, -node.plan.skew).max(self.now)) else { return };
        if node.wakes_at.is_none_or(|armed| armed > at) {
            node.wakes_at = Some(at);
            let incarnation = node.life.incarnation;
            self.at(at, ScheduledEvent::WorkerWakes { worker, incarnation, at });
        }
    }

    fn kill_worker(&mut self, worker: usize, down: u64) {
        tell!(self, "{}: dies", self.workers[worker].id);
        self.workers[worker].process = None;
        self.workers[worker].backlog.clear();
        // What it had taken from the shared queue and not handled is returned.
        for (_, input) in std::mem::take(&mut self.workers[worker].inbox) {
            if let WorkerInput::Shared(brought) = input {
                self.share(brought);
            }
        }
        self.drop_worker(worker);
        self.after(down, ScheduledEvent::WorkerStarts { worker });
    }

    fn thaw(&mut self, worker: usize, incarnation: u32) {
        let node = &mut self.workers[worker];
        if node.life.incarnation != incarnation || !node.is_frozen {
            return;
        }
        node.is_frozen = false;
        let life = node.life;
        tell!(self, "{}: thaws", self.workers[worker].id);
        // It doesn't know yet that it was given up: what it does meanwhile reaches the broker.
        let wakes = WorkerInput::Event(coordinator::Event::DeadlineReached);
        let mut inbox = std::mem::take(&mut self.workers[worker].inbox);
        let place = self.rng.index(inbox.len() + 1);
        inbox.insert(place, (life, wakes));
        for (life, input) in inbox {
            self.reach_worker(worker, life, input);
        }
        if self.workers[worker].is_cut_unnoticed {
            let wait = self.rng.below(30);
            self.after(wait, ScheduledEvent::WorkerNoticesCut { worker, life });
        }
    }

    fn worker_notices_cut(&mut self, worker: usize, life: Life) {
        let node = &mut self.workers[worker];
        let is_news = node.life == life && node.is_cut_unnoticed && !node.is_frozen;
        if !is_news || node.process.is_none() {
            return;
        }
        node.is_cut_unnoticed = false;
        node.backlog.clear();
        self.tell_worker(worker, coordinator::Event::Disconnected);
        let node = &mut self.workers[worker];
        if node.life != life || node.process.is_none() {
            return;
        }
        node.life.connection += 1;
        node.tail_is_due = false;
        let life = node.life;
        let wait = self.rng.pick(&[0, 5, 50, 500]);
        self.after(wait, ScheduledEvent::WorkerConnects { worker, life });
    }

    // ---- Instances ---------------------------------------------------------------------------

    fn start_instance(&mut self, instance: usize) {
        let bug = self.flaw.and_then(Flaw::core);
        let node = &mut self.instances[instance];
        if node.process.is_some() {
            return;
        }
        node.life.incarnation += 1;
        node.life.connection += 1;
        let service = &self.services[node.service];
        let text = format!("{}-{instance}-{}", service.plan.name, node.life.incarnation);
        node.id = InstanceId::parse(&text).expect("a valid id");
        let settings = participant::Settings {
            has_store: !service.plan.in_memory,
            remembers_commits: !service.plan.in_memory,
            inquire_after: service.plan.inquire_after,
            scan_every: service.plan.scan_every,
            retry_parked_every: Duration::from_secs(1),
            remembered_max: service.plan.remembered_max,
            visitors_max: service.plan.visitors_max,
            seed: instance as u64,
            ..participant::Settings::new(
                service.plan.name.clone(),
                node.id.clone(),
                service.plan.cap,
            )
        };
        let clock = shifted(self.now, node.skew);
        node.process = Some(Member::new(clock, settings, bug));
        node.working.clear();
        node.necessary = NecessaryCalls::default();
        node.wakes_at = None;
        node.dies_after = None;
        tell!(self, "{text}: starts");
        self.arm_instance(instance);
        self.connect_instance(instance);
    }

    fn connect_instance(&mut self, instance: usize) {
        let life = self.instances[instance].life;
        let name = &self.instances[instance].id;
        let is_locked = self.has(DriverBug::SameQueueName)
            && self.stale_queues.iter().any(|(id, _)| id == name);
        if !self.broker.is_up || is_locked {
            return self.after(20, ScheduledEvent::InstanceConnects { instance, life });
        }
        self.instances[instance].is_connected = true;
        self.instances[instance].queue_dies_at = None;
        let service = self.instances[instance].service;
        self.serve_prepares(service);
        self.serve_durable(service);
    }

    pub(crate) fn tell_instance(&mut self, instance: usize, event: participant::Event) {
        if self.violation.is_some() {
            return;
        }
        tell!(self, "{} <- {event:?}", self.instances[instance].id);
        let remembers_all =
            self.services[self.instances[instance].service].plan.remembered_max > 100;
        let node = &mut self.instances[instance];
        let Some(process) = &mut node.process else { return };
        if let Some(key) = event.key() {
            let stage = process.core().stage_of(key);
            self.coverage.instance(stage, event.label());
            node.necessary.told(&event, stage.is_some());
        }
        let mut effects = Vec::new();
        process.handle(shifted(self.now, node.skew), event, &mut effects);
        let slots = process.core().slots_used();
        let life = node.life;
        for effect in effects {
            if let Some((after, down)) = self.instances[instance].dies_after {
                if after == 0 {
                    self.rules.count(Kind::InstanceDeath);
                    return self.kill_instance(instance, down);
                }
                self.instances[instance].dies_after = Some((after - 1, down));
            }
            tell!(self, "{} -> {effect:?}", self.instances[instance].id);
            let checked = self.instances[instance].necessary.does(&effect);
            if remembers_all {
                self.check("necessary_calls", checked);
            }
            if let participant::Effect::Vote { vote, .. } = &effect {
                self.unanimity.voted(vote);
            }
            self.perform_for_instance(instance, effect);
        }
        if self.instances[instance].life != life {
            return;
        }
        let node = &self.instances[instance];
        let checked = cap::kept(node.working.len(), slots, self.services[node.service].plan.cap);
        self.check("cap", checked);
        self.arm_instance(instance);
    }

    fn arm_instance(&mut self, instance: usize) {
        let node = &mut self.instances[instance];
        let next = node.process.as_ref().and_then(|process| process.core().next_deadline());
        let Some(at) = next.map(|at| shifted(at, -node.skew).max(self.now)) else { return };
        if node.wakes_at.is_none_or(|armed| armed > at) {
            node.wakes_at = Some(at);
            let incarnation = node.life.incarnation;
            self.at(at, ScheduledEvent::InstanceWakes { instance, incarnation, at });
        }
    }

    fn kill_instance(&mut self, instance: usize, down: u64) {
        tell!(self, "{}: dies", self.instances[instance].id);
        self.instances[instance].process = None;
        self.instances[instance].working.clear();
        self.drop_instance(instance);
        self.after(down, ScheduledEvent::InstanceStarts { instance });
    }

    fn instance_notices_cut(&mut self, instance: usize, life: Life) {
        let node = &mut self.instances[instance];
        if node.life != life || node.process.is_none() {
            return;
        }
        self.tell_instance(instance, participant::Event::Disconnected);
        let node = &mut self.instances[instance];
        if node.life != life || node.process.is_none() {
            return;
        }
        node.life.connection += 1;
        let life = node.life;
        let wait = self.rng.pick(&[0, 5, 50, 500]);
        self.after(wait, ScheduledEvent::InstanceConnects { instance, life });
    }

    // ---- Faults ------------------------------------------------------------------------------

    fn go(&mut self, fault: Fault) {
        if self.is_healed {
            return;
        }
        tell!(self, "FAULT {fault:?}");
        match fault {
            Fault::WorkerCrash { worker, after, down } => {
                if self.workers[worker].process.is_some() {
                    self.workers[worker].dies_after = Some((after, down));
                }
            }
            Fault::WorkerFreeze { worker, length, notice } => {
                let node = &mut self.workers[worker];
                if node.process.is_none() || node.is_frozen {
                    return;
                }
                node.is_frozen = true;
                let life = node.life;
                self.rules.count(Kind::WorkerFreeze);
                let incarnation = life.incarnation;
                self.after(length, ScheduledEvent::WorkerThaws { worker, incarnation });
                if let Some(notice) = notice {
                    self.after(notice, ScheduledEvent::BrokerDropsWorker { worker, life });
                }
            }
            Fault::WorkerCutOff { worker } => {
                if self.workers[worker].is_connected && self.workers[worker].process.is_some() {
                    self.rules.count(Kind::WorkerCutOff);
                    self.cut_worker(worker);
                }
            }
            Fault::WorkerDrain { worker } => {
                let node = &mut self.workers[worker];
                if node.process.is_some() && !node.is_frozen && !node.is_draining {
                    node.is_draining = true;
                    self.rules.count(Kind::WorkerDrain);
                    self.tell_worker(worker, coordinator::Event::DrainRequested);
                }
            }
            Fault::InstanceDeath { instance, after, down } => {
                let node = &mut self.instances[instance];
                if node.process.is_some() && !self.services[node.service].plan.in_memory {
                    node.dies_after = Some((after, down));
                }
            }
            Fault::InstanceCutOff { instance } => {
                let node = &self.instances[instance];
                if node.process.is_some() && node.is_connected {
                    self.rules.count(Kind::InstanceCutOff);
                    self.cut_instance(instance);
                }
            }
            Fault::BrokerRestart { down } => {
                if self.broker.is_up {
                    self.rules.count(Kind::BrokerRestart);
                    self.restart_broker(down);
                }
            }
            Fault::JournalGap { worker, records } => {
                if self.workers[worker].process.is_some() {
                    self.rules.count(Kind::JournalGap);
                    self.workers[worker].reader_next += records;
                }
            }
            Fault::ServiceUnbound { service, down } => {
                self.rules.count(Kind::ServiceUnbound);
                let until = self.now + Duration::from_millis(down);
                self.services[service].unbound_until = Some(until);
            }
            Fault::ReaderStuck { worker } => {
                let node = &mut self.workers[worker];
                if node.process.is_some() && node.is_serving && !node.is_tail_stuck {
                    node.is_tail_stuck = true;
                    self.rules.count(Kind::ReaderStuck);
                }
            }
            Fault::WorkerLinkStuck { worker } => self.worker_link_sticks(worker),
            Fault::InstanceLinkStuck { instance } => self.instance_link_sticks(instance),
            Fault::QueueStaysBound { instance } => {
                let node = &self.instances[instance];
                if node.process.is_some() && node.is_connected {
                    self.rules.count(Kind::QueueStaysBound);
                    let stale = (node.id.clone(), node.service);
                    self.stale_queues.push(stale);
                    self.cut_instance(instance);
                }
            }
            Fault::ServiceUnreachable { service, down } => {
                self.rules.count(Kind::ServiceUnreachable);
                let until = self.now + Duration::from_millis(down);
                self.services[service].unreachable_until = Some(until);
                self.at(until, ScheduledEvent::ServiceIsBack { service });
            }
            Fault::FinishUnreachable { service, down } => {
                self.rules.count(Kind::FinishUnreachable);
                let until = self.now + Duration::from_millis(down);
                self.services[service].finish_refused_until = Some(until);
            }
            Fault::ResultsUnreachable { down } => {
                self.rules.count(Kind::ResultsUnreachable);
                self.results_refused_until = Some(self.now + Duration::from_millis(down));
            }
            Fault::ResultsQueueLost => self.results_queue_is_lost(),
            Fault::Mishap { kind, after } => self.rules.arm(kind, after),
        }
    }

    pub(crate) fn cut_worker(&mut self, worker: usize) {
        let life = self.workers[worker].life;
        self.drop_worker(worker);
        let wait = self.rng.below(10);
        self.after(wait, ScheduledEvent::WorkerNoticesCut { worker, life });
    }

    pub(crate) fn cut_instance(&mut self, instance: usize) {
        let life = self.instances[instance].life;
        self.drop_instance(instance);
        let wait = self.rng.below(10);
        self.after(wait, ScheduledEvent::InstanceNoticesCut { instance, life });
    }

    fn restart_broker(&mut self, down: u64) {
        self.broker.is_up = false;
        for worker in 0..self.workers.len() {
            if self.workers[worker].is_connected {
                self.cut_worker(worker);
            }
        }
        for instance in 0..self.instances.len() {
            if self.instances[instance].is_connected {
                self.cut_instance(instance);
            }
        }
        self.forget_what_is_not_persistent();
        self.after(down, ScheduledEvent::BrokerIsBack);
    }

    /// A crash that waits for an effect, or a mishap that waits for a message, may never happen:
    /// for each such fault a process ends here.
    fn make_up_for_faults(&mut self) {
        for worker in 0..self.workers.len() {
            if self.rules.n_faults() < FAULTS_MIN && self.workers[worker].process.is_some() {
                self.rules.count(Kind::WorkerCrash);
                self.kill_worker(worker, 0);
            }
        }
        for instance in 0..self.instances.len() {
            let node = &self.instances[instance];
            let may_die = node.process.is_some() && !self.services[node.service].plan.in_memory;
            if self.rules.n_faults() < FAULTS_MIN && may_die {
                self.rules.count(Kind::InstanceDeath);
                self.kill_instance(instance, 0);
            }
        }
        if self.rules.n_faults() < FAULTS_MIN && self.broker.is_up {
            self.rules.count(Kind::BrokerRestart);
            self.restart_broker(0);
        }
    }

    /// Ends all faults, and restarts all processes.
    fn heal(&mut self) {
        self.make_up_for_faults();
        tell!(self, "HEALED");
        self.is_healed = true;
        self.rules.heal();
        if !self.broker.is_up {
            self.happen(ScheduledEvent::BrokerIsBack);
        }
        for worker in 0..self.workers.len() {
            self.workers[worker].dies_after = None;
            if self.workers[worker].is_frozen {
                let incarnation = self.workers[worker].life.incarnation;
                self.thaw(worker, incarnation);
            }
            self.start_worker(worker);
        }
        for instance in 0..self.instances.len() {
            self.instances[instance].dies_after = None;
            self.start_instance(instance);
        }
        self.results_refused_until = None;
        for service in &mut self.services {
            service.heal();
        }
        for service in 0..self.services.len() {
            self.serve_prepares(service);
        }
        self.at(self.now, ScheduledEvent::RestIsSought);
    }

    /// Whether everything has ended.
    fn seek_rest(&mut self) -> bool {
        let is_late = self.now > self.plan.heal_at + REST_WITHIN || self.steps > STEPS_MAX;
        if self.n_pending > 0 && !is_late {
            self.after(25, ScheduledEvent::RestIsSought);
            return false;
        }
        let left = self.what_is_left(is_late);
        if !left.is_empty() && !is_late {
            self.after(25, ScheduledEvent::RestIsSought);
            return false;
        }
        self.check("ended", ended::ended(&left));
        self.check_the_end();
        true
    }

    /// Everything that must be gone at the end; only the first of it unless `all` is wanted.
    fn what_is_left(&self, all: bool) -> Vec<String> {
        let mut left = Vec::new();
        for (index, node) in self.workers.iter().enumerate() {
            let Some(process) = &node.process else {
                left.push(format!("worker {index} is down"));
                continue;
            };
            if !process.core().is_empty() || process.core().next_deadline().is_some() {
                let n_open = process.core().len();
                left.push(format!("{} has {n_open} transactions in mind", node.id));
            }
        }
        for node in &self.instances {
            let slots = node.process.as_ref().map_or(0, |process| process.core().slots_used());
            if slots > 0 || !node.working.is_empty() {
                left.push(format!("{} has {slots} slots taken, {:?}", node.id, node.working));
            }
        }
        if !all && !left.is_empty() {
            return left;
        }
        left.extend(self.broker.what_is_left());
        for service in &self.services {
            left.extend(service.what_is_left());
        }
        for (index, message) in self.messages.iter().enumerate() {
            let is_ended = !message.answers.is_empty()
                || message.rejected.is_some()
                || message.is_parked
                || message.is_asked_again
                || message.is_apart;
            if !is_ended {
                left.push(format!("request {index} ({}) has no end", message.request.key));
            }
        }
        left
    }

    fn check_the_end(&mut self) {
        let firsts: Vec<_> = self.journal.firsts().cloned().collect();
        for first in firsts {
            for index in 0..self.services.len() {
                let service = &self.services[index];
                let committed = service.store.committed(&first.key);
                let checked = agreement::ended(&first, &service.plan.name, committed);
                self.check("agreement", checked);
            }
        }
        let checked = result::ended(self.messages.iter().flat_map(|message| &message.answers));
        self.check("result", checked);
        // Under a key with two contents the request that was decided may be rejected when it is
        // repeated, and then nobody finishes what was parked for it.
        let is_excused = |key: &TransactionKey| {
            let mut messages = self.messages.iter();
            let is_rejected = messages.any(|it| it.request.key == *key && it.rejected.is_some());
            is_rejected || self.parked_ids.contains(&key.id)
        };
        let checked = self.parked.ended(is_excused);
        self.check("parked", checked);
    }

    // ---- For the broker ----------------------------------------------------------------------

    pub(crate) fn is_instance_alive(&self, instance: usize) -> bool {
        self.instances[instance].process.is_some()
    }

    /// A record is new in the journal: its readers will get it soon.
    fn append(&mut self, decision: Decision) {
        if !self.broker.is_up {
            return;
        }
        tell!(self, "journal, about to be {}: {decision:?}", self.journal.end());
        let decision = Arc::new(decision);
        if self.journal.first(&decision.key).is_none() {
            let services =
                self.plan.contents.iter().find(|(hash, _)| *hash == decision.request_hash);
            let services = services.map(|(_, services)| Arc::clone(services)).unwrap_or_default();
            let is_held = |service: &ServiceName, branch: &Branch| {
                let named = self.services.iter().find(|it| it.plan.name == *service);
                named.is_some_and(|it| it.store.holds(&decision.key, branch))
            };
            let checked = self.unanimity.decided(&decision, &services, is_held);
            self.check("unanimity", checked);
        }
        self.journal.append(self.now, decision);
        for worker in 0..self.workers.len() {
            let node = &mut self.workers[worker];
            if node.is_connected && !node.tail_is_due {
                node.tail_is_due = true;
                let life = node.life;
                let wait = self.rng.below(3);
                self.after(
                    wait,
                    ScheduledEvent::ToWorker { worker, life, input: WorkerInput::Tail },
                );
            }
        }
    }

    pub(crate) fn has_read(&self, worker: usize, key: &TransactionKey) -> bool {
        self.workers[worker].seen.contains(key)
    }

    /// A message is acknowledged: it doesn't come again, so none of its requests may need that.
    pub(crate) fn check_message_ack(&mut self, requests: &[usize]) {
        for &message in requests {
            let RequestMessage { request, answers, rejected, is_parked, is_apart, .. } =
                &self.messages[message];
            let (key, id) = (&request.key, &request.key.id);
            let may_go = !answers.is_empty()
                || rejected.is_some()
                || *is_apart
                || self.unclaimed_ids.contains(id);
            let is_parked = *is_parked || self.parked_ids.contains(id);
            let checked = ack_after_result::acked(key, may_go, is_parked);
            self.check("ack_after_result", checked);
        }
    }

    pub(crate) fn check_ack(&mut self, message: usize) {
        let RequestMessage { request, answers, rejected, is_parked, .. } = &self.messages[message];
        let is_answered = !answers.is_empty() || rejected.is_some();
        let is_parked = *is_parked || self.parked_ids.contains(&request.key.id);
        let may_go = is_answered || self.unclaimed_ids.contains(&request.key.id);
        let checked = ack_after_result::acked(&request.key, may_go, is_parked);
        self.check("ack_after_result", checked);
        self.messages[message].is_parked |= is_parked && !is_answered;
    }
}

impl ScheduledEvent {
    /// Whether it is more than a clock.
    const fn is_pending(&self) -> bool {
        !matches!(
            self,
            Self::WorkerWakes { .. }
                | Self::InstanceWakes { .. }
                | Self::RestIsSought
                | Self::HeadExpires { .. }
                | Self::ConfirmIsDue { .. }
                | Self::ReadBackIsDue { .. }
                | Self::LooksAgain { .. }
                | Self::LooksWhetherServed { .. }
                | Self::ServiceIsBack { .. }
                | Self::Goes(_)
        )
    }
}

impl WorkerNode {
    fn new(plan: WorkerPlan) -> Self {
        Self {
            id: plan.settings.worker.clone(),
            plan,
            life: Life { incarnation: 0, connection: 0 },
            process: None,
            is_connected: false,
            is_serving: false,
            is_attached: false,
            is_frozen: false,
            is_stuck: false,
            undelivered: Vec::new(),
            is_tail_stuck: false,
            lane: AppendLane::default(),
            is_cut_unnoticed: false,
            is_draining: false,
            inbox: VecDeque::new(),
            reader_next: 0,
            replays_until: 0,
            tail_is_due: false,
            backlog: VecDeque::new(),
            taken: RequestMessages::default(),
            seen: BTreeSet::new(),
            wakes_at: None,
            dies_after: None,
        }
    }
}

impl InstanceNode {
    fn new(service: usize, skew: i64) -> Self {
        Self {
            service,
            skew,
            id: InstanceId::parse("unborn").expect("a valid id"),
            life: Life { incarnation: 0, connection: 0 },
            process: None,
            is_connected: false,
            is_stuck: false,
            queue_dies_at: None,
            working: BTreeSet::new(),
            necessary: NecessaryCalls::default(),
            wakes_at: None,
            dies_after: None,
        }
    }
}

fn abort_word(code: ReasonCode) -> &'static str {
    match code {
        ReasonCode::Refused => "transactions aborted: refused",
        ReasonCode::Failed => "transactions aborted: failed",
        ReasonCode::NoSlot => "transactions aborted: no_slot",
        ReasonCode::UnknownService => "transactions aborted: unknown_service",
        ReasonCode::Deadline => "transactions aborted: deadline",
        ReasonCode::Unavailable => "transactions aborted: unavailable",
        ReasonCode::Cancelled => "transactions aborted: cancelled",
        ReasonCode::Invalid => "transactions aborted: invalid",
        ReasonCode::IdReused => "transactions aborted: id_reused",
        _ => unreachable!("`{code}` is new, and has no words here"),
    }
}
