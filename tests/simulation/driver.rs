//! The parts of the drivers between cores and broker on which liveness depends: one append at a
//! time, a time limit for every wait, a new queue name with each link. And how a driver fails
//! without one of these.

use dtc::protocol::{
    coordinator,
    ids::ServiceName,
    message::{Decision, Delivery},
    request_messages::{MessageNumber, Settlement},
};

use crate::{
    bugs::Bug,
    rules::Kind,
    world::{InstanceNode, Life, ScheduledEvent, World, tell},
};

/// How long a confirm of an append may take before the link is opened again. (Real drivers: 5 s.)
const CONFIRM_BOUND: u64 = 3_000;

/// How long reading back an append may take before the reader is opened again.
const READ_BACK_BOUND: u64 = 3_000;

/// How long a link may be silent before it counts as lost: two heartbeats.
const LINK_BOUND: u64 = 3_000;

/// How long a driver waits before it looks up an unreachable service again.
const LOOK_AGAIN: u64 = 100;

/// The same for a service without instances.
const UNSERVED_LOOK_AGAIN: u64 = 1_000;

/// A message of several requests that was delivered more often is replaced by one for each request.
const TOGETHER_MAX: u32 = 3;

/// A driver's bug.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum DriverBug {
    /// A worker waits for the confirm of an append without a time limit.
    NoBoundOnConfirm,
    /// A worker waits without a time limit to read back what it has appended.
    NoBoundOnReadBack,
    /// A worker publishes a result again endlessly, and holds its request meanwhile.
    RepublishForEver,
    /// A client keeps its reply token over a new link, though its old queue is still bound.
    KeepsReplyToken,
    /// An instance declares its queue under the same name with each link.
    SameQueueName,
    /// A worker acknowledges a message when the first of its requests is settled, not the last.
    AcksMessageWithFirstRequest,
}

impl DriverBug {
    pub(crate) const ALL: [Self; 6] = [
        Self::NoBoundOnConfirm,
        Self::NoBoundOnReadBack,
        Self::RepublishForEver,
        Self::KeepsReplyToken,
        Self::SameQueueName,
        Self::AcksMessageWithFirstRequest,
    ];
}

/// A deliberate flaw: in the cores, or in their drivers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flaw {
    Core(Bug),
    Driver(DriverBug),
}

impl Flaw {
    pub(crate) fn core(self) -> Option<Bug> {
        match self {
            Self::Core(bug) => Some(bug),
            Self::Driver(_) => None,
        }
    }

    /// The flaw of that name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        let cores = Bug::ALL.into_iter().map(|it| (format!("{it:?}"), Self::Core(it)));
        let drivers = DriverBug::ALL.into_iter().map(|it| (format!("{it:?}"), Self::Driver(it)));
        cores.chain(drivers).find(|(it, _)| it == name).map(|(_, flaw)| flaw)
    }
}

/// One append is outstanding; everything that is ready at its end goes next.
#[derive(Default)]
pub(crate) struct AppendLane {
    waiting: Vec<Decision>,
    outstanding: Option<u64>,
    number: u64,
}

/// The one producer of a schedule, and its queue of results.
#[derive(Default)]
pub(crate) struct Producer {
    pub(crate) token: u32,
    /// Tokens whose queue stays bound for good, on a lost node.
    dead: Vec<u32>,
    /// Whether it has a link, and a queue on a living node.
    is_away: bool,
}

impl World {
    pub(crate) fn has(&self, bug: DriverBug) -> bool {
        self.flaw == Some(Flaw::Driver(bug))
    }

    // ---- Appends -----------------------------------------------------------------------------

    pub(crate) fn append_by(&mut self, worker: usize, decision: Decision) {
        self.workers[worker].lane.waiting.push(decision);
        self.write_decisions(worker);
    }

    fn write_decisions(&mut self, worker: usize) {
        let node = &mut self.workers[worker];
        let (life, lane) = (node.life, &mut node.lane);
        if lane.outstanding.is_some() || lane.waiting.is_empty() {
            return;
        }
        lane.number += 1;
        let number = lane.number;
        lane.outstanding = Some(number);
        for decision in std::mem::take(&mut lane.waiting) {
            for millis in self.rules.carry(&mut self.rng).into_iter().flatten() {
                self.after(millis, ScheduledEvent::Appended(decision.clone()));
            }
        }
        if !self.rules.loses_append_confirm(&mut self.rng) {
            let wait = self.rng.below(3);
            self.after(wait, ScheduledEvent::AppendConfirmed { worker, life, number });
        }
        if !self.has(DriverBug::NoBoundOnConfirm) {
            self.after(CONFIRM_BOUND, ScheduledEvent::ConfirmIsDue { worker, life, number });
        }
    }

    pub(crate) fn append_confirmed(&mut self, worker: usize, life: Life, number: u64) {
        let node = &mut self.workers[worker];
        let is_current = node.life == life && node.lane.outstanding == Some(number);
        if !is_current || node.is_stuck {
            return;
        }
        if node.is_frozen {
            return self.after(20, ScheduledEvent::AppendConfirmed { worker, life, number });
        }
        node.lane.outstanding = None;
        if !self.has(DriverBug::NoBoundOnReadBack) {
            self.after(READ_BACK_BOUND, ScheduledEvent::ReadBackIsDue { worker, life });
        }
        self.write_decisions(worker);
    }

    pub(crate) fn confirm_is_due(&mut self, worker: usize, life: Life, number: u64) {
        let node = &self.workers[worker];
        if node.life != life || node.lane.outstanding != Some(number) || !node.is_connected {
            return;
        }
        if node.is_frozen {
            return self.after(20, ScheduledEvent::ConfirmIsDue { worker, life, number });
        }
        tell!(self, "{}: no confirm of an append has come", node.id);
        self.cut_worker(worker);
    }

    pub(crate) fn read_back_is_due(&mut self, worker: usize, life: Life) {
        let node = &mut self.workers[worker];
        if node.life != life || !node.is_tail_stuck || node.process.is_none() {
            return;
        }
        if node.is_frozen {
            return self.after(20, ScheduledEvent::ReadBackIsDue { worker, life });
        }
        node.is_tail_stuck = false;
        let id = &self.workers[worker].id;
        tell!(self, "{id}: what was appended is not read back, its reader is made anew");
        self.read_tail(worker);
    }

    // ---- Links -------------------------------------------------------------------------------

    pub(crate) fn worker_link_sticks(&mut self, worker: usize) {
        let node = &mut self.workers[worker];
        if node.is_connected && node.process.is_some() && !node.is_stuck {
            node.is_stuck = true;
            let life = node.life;
            self.rules.count(Kind::WorkerLinkStuck);
            self.after(LINK_BOUND, ScheduledEvent::WorkerLinkIsDue { worker, life });
        }
    }

    pub(crate) fn worker_link_is_due(&mut self, worker: usize, life: Life) {
        let node = &self.workers[worker];
        if node.life != life || !node.is_stuck {
            return;
        }
        if node.is_frozen {
            return self.after(20, ScheduledEvent::WorkerLinkIsDue { worker, life });
        }
        self.cut_worker(worker);
    }

    pub(crate) fn instance_link_sticks(&mut self, instance: usize) {
        let node = &mut self.instances[instance];
        if node.is_connected && node.process.is_some() && !node.is_stuck {
            node.is_stuck = true;
            let life = node.life;
            self.rules.count(Kind::InstanceLinkStuck);
            self.after(LINK_BOUND, ScheduledEvent::InstanceLinkIsDue { instance, life });
        }
    }

    pub(crate) fn instance_link_is_due(&mut self, instance: usize, life: Life) {
        let node = &self.instances[instance];
        if node.life == life && node.is_stuck {
            self.cut_instance(instance);
        }
    }

    // ---- Services ----------------------------------------------------------------------------

    pub(crate) fn find_service(&mut self, worker: usize, service: ServiceName) {
        let life = self.workers[worker].life;
        let event = match self.bound_service(&service) {
            Some(found) if found.is_unreachable(self.now) => {
                let again = ScheduledEvent::LooksAgain { worker, life, service: service.clone() };
                self.after(LOOK_AGAIN, again);
                coordinator::Event::ServiceUnavailable(service)
            }
            Some(_) if self.is_known_unserved(&service) => {
                return self.service_is_unserved(worker, service);
            }
            Some(_) => coordinator::Event::ServiceFound(service),
            None => coordinator::Event::ServiceMissing(service),
        };
        self.deliver_to_worker(worker, life, event);
    }

    /// A prepare was returned: reports first whether the service has instances.
    pub(crate) fn look_whether_served(&mut self, worker: usize, service: &ServiceName) {
        if self.is_known_unserved(service) {
            self.service_is_unserved(worker, service.clone());
        }
    }

    pub(crate) fn look_again_whether_served(&mut self, worker: usize, service: ServiceName) {
        if self.is_known_unserved(&service) {
            self.watch_unserved(worker, service);
        } else {
            self.find_service(worker, service);
        }
    }

    fn service_is_unserved(&mut self, worker: usize, service: ServiceName) {
        let life = self.workers[worker].life;
        let event = coordinator::Event::ServiceUnserved(service.clone());
        self.deliver_to_worker(worker, life, event);
        self.watch_unserved(worker, service);
    }

    fn watch_unserved(&mut self, worker: usize, service: ServiceName) {
        let life = self.workers[worker].life;
        let again = ScheduledEvent::LooksWhetherServed { worker, life, service };
        self.after(UNSERVED_LOOK_AGAIN, again);
    }

    /// Whether the service exists, has no instances, and drivers can detect that.
    fn is_known_unserved(&self, service: &ServiceName) -> bool {
        let takes = |node: &InstanceNode| {
            node.is_connected && self.services[node.service].plan.name == *service
        };
        let is_there =
            self.bound_service(service).is_some_and(|found| !found.is_unreachable(self.now));
        self.plan.tells_unserved && is_there && !self.instances.iter().any(takes)
    }

    // ---- The producer ------------------------------------------------------------------------

    /// The node of its queue is lost for good: the queue stays bound, and refuses every message.
    pub(crate) fn results_queue_is_lost(&mut self) {
        if !self.producer.is_away {
            self.rules.count(Kind::ResultsQueueLost);
            self.producer.dead.push(self.producer.token);
            self.producer.is_away = true;
            self.after(500, ScheduledEvent::ProducerConnects);
        }
    }

    /// It binds a new queue, and requests everything again that has no result.
    pub(crate) fn producer_connects(&mut self) {
        if !self.has(DriverBug::KeepsReplyToken) {
            self.producer.token += 1;
        }
        self.producer.is_away = false;
        for message in 0..self.messages.len() {
            let it = &self.messages[message];
            let is_open = it.answers.is_empty() && it.rejected.is_none() && !it.is_parked;
            if it.deliveries > 0 && is_open && !it.is_asked_again {
                self.ask_again(message, 0);
            }
        }
    }

    pub(crate) fn ask_again(&mut self, message: usize, after: u64) {
        let again = self.messages[message].again(self.producer.token);
        self.messages[message].is_asked_again = true;
        self.after(after, ScheduledEvent::Publish(vec![self.messages.len()]));
        self.messages.push(again);
    }

    // ---- Messages of several requests --------------------------------------------------------

    pub(crate) fn requests_arrive(
        &mut self,
        worker: usize,
        number: MessageNumber,
        requests: &[usize],
        deliveries: u32,
    ) {
        let node = &mut self.workers[worker];
        let life = node.life;
        let taken: Vec<_> = node.taken.take(number, requests.len()).collect();
        let is_replaced = requests.len() > 1 && deliveries > TOGETHER_MAX && !node.is_draining;
        for (delivery, &message) in taken.into_iter().zip(requests) {
            self.broker.delivered.insert(delivery, message);
            if is_replaced {
                let wait = self.rules.deliver(&mut self.rng);
                let apart = ScheduledEvent::PublishedApart { worker, life, delivery, message };
                self.after(wait, apart);
                continue;
            }
            let request = self.messages[message].request.clone();
            let event = coordinator::Event::RequestReceived { request, delivery, deliveries };
            self.workers[worker].backlog.push_back(event);
        }
        self.take_backlog(worker);
    }

    /// A request of a message that was delivered too often reaches the broker in one of its own.
    pub(crate) fn published_apart(
        &mut self,
        worker: usize,
        life: Life,
        delivery: Delivery,
        message: usize,
    ) {
        let node = &self.workers[worker];
        let is_alive = node.life == life && node.process.is_some();
        let is_lost = !is_alive || node.is_stuck || !node.is_connected;
        if is_lost && self.rng.chance(500) {
            return;
        }
        if !self.broker.is_up {
            let again = ScheduledEvent::PublishedApart { worker, life, delivery, message };
            if !is_lost {
                self.after(40, again);
            }
            return;
        }
        // It says that it was delivered before.
        let mut apart = self.messages[message].again(self.messages[message].token);
        apart.deliveries = 1;
        self.messages[message].is_apart = true;
        let index = self.messages.len();
        self.messages.push(apart);
        self.publish_requests(vec![index]);
        if !is_lost {
            self.settle_request(worker, delivery, Settlement::Acknowledge);
        }
    }

    /// Whether the broker refuses the result of a request with this token.
    pub(crate) fn refuses_result(&mut self, token: u32) -> bool {
        if !self.producer.dead.contains(&token) {
            return self.results_refused_until.is_some_and(|until| self.now < until);
        }
        if token == self.producer.token && !self.producer.is_away {
            let seen = "a producer with a link of its own has its results refused for good".into();
            self.check("ended", Err(seen));
        }
        true
    }
}
