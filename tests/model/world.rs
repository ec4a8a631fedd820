//! The world around the state machines, as plain data: the request queue, the network, the journal,
//! the services' stores; and every step that it can take.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use dtc::protocol::{
    coordinator::{self, Effect, Event},
    ids::{Branch, InstanceId, RequestHash, ServiceName, TransactionKey, WorkerId},
    message::{
        self, Command, Decision, Delivery, Destination, Finish, Inquiry, Outcome, ParkedCause,
        Prepare, Vote, VoteKind,
    },
    participant::{self, InDoubt, Verdict},
    request_messages::{MessageNumber, REQUESTS_MAX, RequestMessages, Settlement},
    time::Time,
};

use crate::{
    bugs::{Member, Worker},
    hashed::Hashed,
    properties::Breach,
    scenario::{Answer, Faults, START, Scenario, service_name},
};

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct World {
    pub workers: Vec<WorkerSlot>,
    pub members: Vec<MemberSlot>,
    /// One for each service.
    pub stores: Vec<Hashed<Store>>,
    /// The messages in transit: any of them may arrive next. In the order of their hashes, so that
    /// equal worlds are equal.
    pub net: Vec<Hashed<Message>>,
    pub journal: Vec<Hashed<Record>>,
    /// The first record that retention has kept.
    pub kept_from: usize,
    pub requests: Vec<Queued>,
    pub told: Hashed<Observations>,
    pub left: Faults,
    pub breaches: u16,
}

/// A place for a worker: every worker in this place has the same name. (Under a new name it would
/// receive less: messages to its predecessor would reach any worker.)
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct WorkerSlot {
    pub core: Option<Hashed<Worker>>,
    pub now: Time,
    /// The offset of the record that the transport brings it next.
    pub reads_next: usize,
    /// The offsets of the records that it has received, as bits.
    pub has_read: u32,
    /// The messages of several requests that it has taken.
    pub taken: RequestMessages,
}

/// A place for an instance of a service.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct MemberSlot {
    pub service: usize,
    pub id: InstanceId,
    pub lives: u8,
    pub core: Hashed<Member>,
    pub now: Time,
    /// What was delivered to it and is not acked, by the delivery's number.
    pub unacked: BTreeMap<u64, Hashed<Message>>,
}

/// The shared state of one service's instances.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Store {
    pub prepared: BTreeMap<(TransactionKey, Branch), Held>,
    pub executed: BTreeSet<(TransactionKey, Branch)>,
    pub undone: BTreeSet<(TransactionKey, Branch)>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Held {
    pub request_hash: RequestHash,
    pub deadline: Time,
    /// Whether the service's code reported it as prepared.
    pub is_sound: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Record {
    pub decision: Arc<Decision>,
    /// Whether the worker that made it was only asked.
    pub by_inquiry: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Queued {
    pub state: QueueState,
    pub deliveries: u8,
    /// The worker that took it first.
    pub first_taker: Option<usize>,
    /// The results that its producer got.
    pub results: Vec<ProducerResult>,
    /// Whether an answer (or its substitute) is durable.
    pub is_answered: bool,
}

/// A result. It names its transaction by its `requested_at`: the answer to a retry under a new
/// timestamp may be about an earlier one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ProducerResult {
    pub requested_at: Time,
    pub outcome: Outcome,
    pub worker: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum QueueState {
    Ready,
    With(usize),
    Acked,
    Rejected,
}

/// Messages that only the properties look at.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Observations {
    /// To which request a service voted prepared, and under which branch; `None`: read only.
    pub votes: BTreeSet<(TransactionKey, RequestHash, ServiceName, Option<Branch>)>,
    /// `None`: the transaction itself.
    pub parked: BTreeSet<(TransactionKey, Option<ServiceName>)>,
    pub settled: BTreeSet<(TransactionKey, ServiceName)>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Message {
    /// To a worker; if it is gone, to any worker.
    ToWorker { worker: usize, event: Event },
    /// To any worker.
    Inquiry { inquiry: Inquiry, sent_at: Time },
    /// To an instance: it is lost if the instance dies.
    ToMember { member: usize, event: participant::Event },
    /// In the service's prepare queue.
    Prepare { service: usize, worker: usize, prepare: Prepare, redelivered: bool },
    /// In the service's durable queue.
    Finish { service: usize, worker: usize, finish: Finish },
    /// To the journal.
    Append(Record),
    /// The result of a look back that a worker waits for: the records from `kept_from` on that lie
    /// before `until`. The journal was read when the worker asked: reading it later finds the same
    /// or, after retention, less; and a later request would find that.
    History { worker: usize, kept_from: usize, until: u64, from: Time },
    /// The service's code, running.
    Call { member: usize, call: Call },
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Call {
    Prepare { key: TransactionKey, branch: Branch, held: Held },
    Commit { key: TransactionKey, branch: Branch },
}

#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    Take { request: usize, worker: usize },
    Redeliver { request: usize, worker: usize },
    Read { worker: usize },
    Deliver { message: Hashed<Message>, to: usize, stays: bool },
    ConfirmLost { message: Hashed<Message> },
    Return { message: Hashed<Message> },
    PrepareEnds { message: Hashed<Message>, answer: Answer },
    CommitEnds { message: Hashed<Message>, succeeds: bool },
    WorkerDeadline { worker: usize },
    MemberDeadline { member: usize },
    Crash { worker: usize },
    Start { worker: usize },
    DisconnectWorker { worker: usize },
    DisconnectMember { member: usize },
    RestartMember { member: usize },
    Truncate,
}

impl World {
    pub fn new(scenario: &Scenario) -> Self {
        let mut world = Self {
            workers: Vec::new(),
            members: Vec::new(),
            stores: Vec::new(),
            net: Vec::new(),
            journal: Vec::new(),
            kept_from: 0,
            requests: Vec::new(),
            told: Hashed::new(Observations::default()),
            left: scenario.faults,
            breaches: 0,
        };
        for _ in &scenario.requests {
            world.requests.push(Queued {
                state: QueueState::Ready,
                deliveries: 0,
                first_taker: None,
                results: Vec::new(),
                is_answered: false,
            });
        }
        for worker in 0..2 {
            let taken = RequestMessages::default();
            let slot = WorkerSlot { core: None, now: START, reads_next: 0, has_read: 0, taken };
            world.workers.push(slot);
            if worker == 0 || !scenario.second_is_late {
                world.start_worker(scenario, worker);
            }
        }
        if scenario.plenty {
            world.warm_up(scenario);
        }
        for (index, service) in scenario.services.iter().enumerate() {
            world.stores.push(Hashed::new(Store::default()));
            for number in 0..service.instances {
                let id = instance_id(service.name, number, 1);
                let core = Member::new(START, service.settings(id.clone()), scenario.bug);
                world.members.push(MemberSlot {
                    service: index,
                    id,
                    lives: 1,
                    core: Hashed::new(core),
                    now: START,
                    unacked: BTreeMap::new(),
                });
                let member = world.members.len() - 1;
                world.look_through_store(scenario, member);
            }
        }
        world
    }

    // ---- What can happen ---------------------------------------------------------------------

    pub fn actions(&self, scenario: &Scenario, actions: &mut Vec<Action>) {
        self.request_actions(scenario, actions);
        let mut last = None;
        for message in &self.net {
            if last != Some(message.hash()) {
                self.message_actions(scenario, message, actions);
            }
            last = Some(message.hash());
        }
        for (worker, slot) in self.workers.iter().enumerate() {
            let Some(core) = &slot.core else {
                actions.push(Action::Start { worker });
                continue;
            };
            if slot.reads_next.max(self.kept_from) < self.journal.len() {
                actions.push(Action::Read { worker });
            }
            if self.left.worker_timeouts > 0 && core.core().next_deadline().is_some() {
                actions.push(Action::WorkerDeadline { worker });
            }
            if self.left.crashes > 0 {
                actions.push(Action::Crash { worker });
            }
            if self.left.worker_disconnects > 0 {
                actions.push(Action::DisconnectWorker { worker });
            }
        }
        for (member, slot) in self.members.iter().enumerate() {
            if self.left.member_timeouts > 0 && slot.core.core().next_deadline().is_some() {
                actions.push(Action::MemberDeadline { member });
            }
            if self.left.restarts > 0 {
                actions.push(Action::RestartMember { member });
            }
            if self.left.member_disconnects > 0 && !slot.unacked.is_empty() {
                actions.push(Action::DisconnectMember { member });
            }
        }
        if self.left.truncations > 0 && self.kept_from < self.journal.len() {
            actions.push(Action::Truncate);
        }
    }

    fn request_actions(&self, scenario: &Scenario, actions: &mut Vec<Action>) {
        let workers_are_alike = !scenario.second_is_late
            && self.left.crashes == scenario.faults.crashes
            && self.left.worker_disconnects == scenario.faults.worker_disconnects
            && self.requests.iter().all(|queued| queued.first_taker.is_none());
        let n_messages = if scenario.one_message { 1 } else { self.requests.len() };
        for (request, queued) in self.requests.iter().enumerate().take(n_messages) {
            for (worker, slot) in self.workers.iter().enumerate() {
                let Some(core) = &slot.core else { continue };
                if core.core().room() == 0 || (workers_are_alike && worker > 0) {
                    continue;
                }
                match queued.state {
                    QueueState::Ready => actions.push(Action::Take { request, worker }),
                    QueueState::With(holder) if holder != worker && self.left.redeliveries > 0 => {
                        actions.push(Action::Redeliver { request, worker });
                    }
                    QueueState::With(_) | QueueState::Acked | QueueState::Rejected => {}
                }
            }
        }
    }

    fn message_actions(
        &self,
        scenario: &Scenario,
        message: &Hashed<Message>,
        actions: &mut Vec<Action>,
    ) {
        let deliver = |to| Action::Deliver { message: message.clone(), to, stays: false };
        let may_double = match &**message {
            Message::Call { member, call } => {
                let message = message.clone();
                match call {
                    Call::Prepare { .. } => {
                        let service = &scenario.services[self.members[*member].service];
                        actions.extend(service.verdicts.iter().map(|answer| Action::PrepareEnds {
                            message: message.clone(),
                            answer: *answer,
                        }));
                    }
                    Call::Commit { .. } => {
                        if self.left.commit_failures > 0 {
                            let message = message.clone();
                            actions.push(Action::CommitEnds { message, succeeds: false });
                        }
                        actions.push(Action::CommitEnds { message, succeeds: true });
                    }
                }
                return;
            }
            Message::ToWorker { event: Event::ResultConfirmed { .. }, .. } => {
                if self.left.lost_confirms > 0 {
                    actions.push(Action::ConfirmLost { message: message.clone() });
                }
                false
            }
            Message::Prepare { .. } => {
                if self.left.returns > 0 {
                    actions.push(Action::Return { message: message.clone() });
                }
                true
            }
            Message::ToMember { event: participant::Event::StoreRead { .. }, .. }
            | Message::History { .. } => false,
            Message::ToWorker { .. }
            | Message::Inquiry { .. }
            | Message::ToMember { .. }
            | Message::Finish { .. }
            | Message::Append(_) => true,
        };
        let targets = self.targets(scenario, message);
        actions.extend(targets.iter().map(|to| deliver(*to)));
        if may_double && self.left.duplicates > 0 {
            let stays = |to| Action::Deliver { message: message.clone(), to, stays: true };
            actions.extend(targets.into_iter().map(stays));
        }
    }

    /// The processes that a message can reach.
    fn targets(&self, scenario: &Scenario, message: &Message) -> Vec<usize> {
        let running = |worker: &usize| self.workers[*worker].core.is_some();
        match message {
            Message::ToWorker { worker, .. } if running(worker) => vec![*worker],
            Message::ToWorker { .. } | Message::Inquiry { .. } => {
                (0..self.workers.len()).filter(running).collect()
            }
            Message::ToMember { member, .. } => vec![*member],
            Message::Prepare { service, .. } => {
                let cap = scenario.services[*service].cap as usize;
                let has_slot = |slot: &MemberSlot| {
                    let is_slot =
                        |held: &&Hashed<Message>| matches!(***held, Message::Prepare { .. });
                    slot.service == *service && slot.unacked.values().filter(is_slot).count() < cap
                };
                (0..self.members.len()).filter(|member| has_slot(&self.members[*member])).collect()
            }
            Message::Finish { service, .. } => {
                let serves = |member: &usize| self.members[*member].service == *service;
                (0..self.members.len()).filter(serves).collect()
            }
            Message::Append(_) => vec![0],
            Message::History { worker, .. } => vec![*worker],
            Message::Call { .. } => Vec::new(),
        }
    }

    // ---- What it does ------------------------------------------------------------------------

    pub fn step(&mut self, scenario: &Scenario, action: &Action) {
        match action {
            Action::Take { request, worker } => self.take(scenario, *request, *worker),
            Action::Redeliver { request, worker } => {
                self.left.redeliveries -= 1;
                self.take(scenario, *request, *worker);
            }
            Action::Read { worker } => self.read(scenario, *worker),
            Action::Deliver { message, to, stays } => {
                match stays {
                    true => self.left.duplicates -= 1,
                    false => self.remove(message),
                }
                self.deliver(scenario, message, *to);
            }
            Action::ConfirmLost { message } => {
                self.left.lost_confirms -= 1;
                self.remove(message);
                if let Message::ToWorker {
                    worker,
                    event: Event::ResultConfirmed { key, delivery },
                } = &**message
                {
                    let failed = Event::ResultFailed { key: key.clone(), delivery: *delivery };
                    self.tell_worker(scenario, *worker, failed);
                }
            }
            Action::Return { message } => {
                self.left.returns -= 1;
                self.remove(message);
                if let Message::Prepare { service, worker, prepare, .. } = &**message {
                    let service = service_name(scenario.services[*service].name);
                    let event = Event::PrepareReturned { key: prepare.key.clone(), service };
                    self.send(Message::ToWorker { worker: *worker, event });
                }
            }
            Action::PrepareEnds { message, answer } => {
                self.remove(message);
                if let Message::Call { member, call: Call::Prepare { key, branch, held } } =
                    &**message
                {
                    let ended = self.end_prepare(*member, key, branch, held, *answer);
                    self.tell_member(scenario, *member, ended);
                }
            }
            Action::CommitEnds { message, succeeds } => {
                self.remove(message);
                if let Message::Call { member, call: Call::Commit { key, branch } } = &**message {
                    let ended = if *succeeds {
                        self.end_commit(*member, key, branch)
                    } else {
                        self.left.commit_failures -= 1;
                        participant::Event::FinishEnded {
                            key: key.clone(),
                            branch: branch.clone(),
                            applied: Err("no".into()),
                        }
                    };
                    self.tell_member(scenario, *member, ended);
                }
            }
            Action::WorkerDeadline { worker } => {
                self.left.worker_timeouts -= 1;
                let slot = &mut self.workers[*worker];
                let due = slot.core.as_ref().and_then(|core| core.core().next_deadline());
                slot.now = slot.now.max(due.unwrap_or(slot.now));
                self.tell_worker(scenario, *worker, Event::DeadlineReached);
            }
            Action::MemberDeadline { member } => {
                self.left.member_timeouts -= 1;
                let slot = &mut self.members[*member];
                let due = slot.core.core().next_deadline();
                slot.now = slot.now.max(due.unwrap_or(slot.now));
                self.tell_member(scenario, *member, participant::Event::DeadlineReached);
            }
            Action::Crash { worker } => {
                self.left.crashes -= 1;
                self.crash(*worker);
            }
            Action::Start { worker } => self.start_worker(scenario, *worker),
            Action::DisconnectWorker { worker } => {
                self.left.worker_disconnects -= 1;
                self.lose_connection_of_worker(*worker);
                self.tell_worker(scenario, *worker, Event::Disconnected);
                let slot = &mut self.workers[*worker];
                let end = self.journal.len() as u64;
                if let Some(core) = &mut slot.core {
                    let wanted = core.core().next_offset();
                    slot.reads_next = core.change(|core| core.reads_from(wanted, end)) as usize;
                }
            }
            Action::DisconnectMember { member } => {
                self.left.member_disconnects -= 1;
                self.return_unacked(*member);
                self.tell_member(scenario, *member, participant::Event::Disconnected);
            }
            Action::RestartMember { member } => {
                self.left.restarts -= 1;
                self.restart_member(scenario, *member);
            }
            Action::Truncate => {
                self.left.truncations -= 1;
                self.kept_from = self.journal.len();
            }
        }
        self.forget_idle_dones(scenario);
    }

    /// Drops the dones that nobody will ever wait for: a worker that doesn't work on the
    /// transaction, and will not get it, ignores them. (It has already learned about free slots
    /// from them.)
    fn forget_idle_dones(&mut self, scenario: &Scenario) {
        let mut net = std::mem::take(&mut self.net);
        net.retain(|message| match &**message {
            Message::ToWorker { worker, event: Event::DoneReceived { done, .. } } => {
                let core = self.workers[*worker].core.as_ref();
                core.is_none_or(|core| core.core().phase_of(&done.key).is_some())
                    || (done.parked && done.applied.is_ok())
                    || self.may_be_given(scenario, &done.key)
            }
            _ => true,
        });
        self.net = net;
    }

    /// Whether a worker that doesn't work on a transaction may get it.
    fn may_be_given(&self, scenario: &Scenario, key: &TransactionKey) -> bool {
        let left = &self.left;
        let may_return = left.redeliveries + left.crashes + left.worker_disconnects > 0;
        let mut queued = self.requests.iter().zip(&scenario.requests);
        queued.any(|(queued, request)| match queued.state {
            _ if request.key.id != key.id => false,
            QueueState::Ready => true,
            QueueState::With(_) => may_return,
            QueueState::Acked | QueueState::Rejected => false,
        })
    }

    fn take(&mut self, scenario: &Scenario, request: usize, worker: usize) {
        if scenario.one_message {
            return self.take_all(scenario, worker);
        }
        let queued = &mut self.requests[request];
        queued.state = QueueState::With(worker);
        queued.deliveries += 1;
        queued.first_taker.get_or_insert(worker);
        let event = Event::RequestReceived {
            request: scenario.requests[request].clone(),
            delivery: delivery_of(request, queued.deliveries),
            deliveries: queued.deliveries.into(),
        };
        self.tell_worker(scenario, worker, event);
    }

    /// Takes the message of all requests.
    fn take_all(&mut self, scenario: &Scenario, worker: usize) {
        let deliveries = self.requests[0].deliveries + 1;
        for queued in &mut self.requests {
            queued.state = QueueState::With(worker);
            queued.deliveries = deliveries;
            queued.first_taker.get_or_insert(worker);
        }
        let number = MessageNumber::new(deliveries.into());
        let taken: Vec<_> = self.workers[worker].taken.take(number, self.requests.len()).collect();
        for (delivery, request) in taken.into_iter().zip(&scenario.requests) {
            let request = request.clone();
            let event = Event::RequestReceived { request, delivery, deliveries: deliveries.into() };
            self.tell_worker(scenario, worker, event);
        }
    }

    fn read(&mut self, scenario: &Scenario, worker: usize) {
        let offset = self.workers[worker].reads_next.max(self.kept_from);
        if let Some(record) = self.journal.get(offset) {
            self.workers[worker].reads_next = offset + 1;
            let decisions = vec![Arc::clone(&record.decision)];
            let event = Event::RecordsRead { offset: offset as u64, decisions };
            self.tell_worker(scenario, worker, event);
        }
    }

    fn deliver(&mut self, scenario: &Scenario, message: &Hashed<Message>, to: usize) {
        match &**message {
            Message::ToWorker { event, .. } => self.tell_worker(scenario, to, event.clone()),
            Message::Inquiry { inquiry, sent_at } => {
                // No clock is so far behind that it shows less than when this was sent.
                let now = &mut self.workers[to].now;
                *now = (*now).max(*sent_at);
                self.tell_worker(scenario, to, Event::InquiryReceived(inquiry.clone()));
            }
            Message::ToMember { event, .. } => self.tell_member(scenario, to, event.clone()),
            Message::Prepare { worker, prepare, redelivered, .. } => {
                let event = participant::Event::PrepareReceived {
                    worker: worker_id(*worker),
                    delivery: self.hold_unacked(to, message),
                    redelivered: *redelivered,
                    prepare: prepare.clone(),
                };
                self.tell_member(scenario, to, event);
            }
            Message::Finish { worker, finish, .. } => {
                let event = participant::Event::FinishReceived {
                    worker: worker_id(*worker),
                    finish: finish.clone(),
                    delivery: Some(self.hold_unacked(to, message)),
                };
                self.tell_member(scenario, to, event);
            }
            Message::Append(record) => self.journal.push(Hashed::new(record.clone())),
            Message::History { worker, kept_from, until, from } => {
                for offset in *kept_from..self.journal.len().min(*until as usize) {
                    self.workers[*worker].has_read |= 1 << offset;
                    let decision = Arc::clone(&self.journal[offset].decision);
                    self.tell_worker(scenario, *worker, Event::HistoryRead(decision));
                }
                let reaches = (*kept_from == 0).then_some(*from);
                self.tell_worker(scenario, *worker, Event::HistoryEnded { reaches });
            }
            Message::Call { .. } => {}
        }
    }

    fn hold_unacked(&mut self, member: usize, message: &Hashed<Message>) -> Delivery {
        let unacked = &mut self.members[member].unacked;
        // The lowest free number: numbers have no meaning, so worlds need not differ in them.
        let number = (0..).find(|number| !unacked.contains_key(number)).unwrap();
        unacked.insert(number, message.clone());
        Delivery(number)
    }

    fn send(&mut self, message: Message) {
        let message = Hashed::new(message);
        let at = self.net.partition_point(|other| other.hash() < message.hash());
        self.net.insert(at, message);
    }

    fn remove(&mut self, message: &Hashed<Message>) {
        let at = self.net.iter().position(|other| other.hash() == message.hash());
        self.net.remove(at.unwrap());
    }

    /// A number that is the same for this world in every run.
    pub fn sample(&self) -> u64 {
        let cores = self.workers.iter().filter_map(|slot| slot.core.as_ref().map(Hashed::hash));
        let members = self.members.iter().map(|slot| slot.core.hash());
        cores.chain(members).chain(self.net.iter().map(Hashed::hash)).fold(0, u64::wrapping_add)
    }

    pub fn breach(&mut self, breach: Breach) {
        self.breaches |= 1 << breach as u16;
    }

    // ---- Workers -----------------------------------------------------------------------------

    fn start_worker(&mut self, scenario: &Scenario, worker: usize) {
        let mut core = Worker::new(scenario.worker_settings(worker), scenario.bug);
        let slot = &mut self.workers[worker];
        slot.has_read = 0;
        let (next, since) = match scenario.attach_at_end {
            true => (self.journal.len(), slot.now),
            false if self.kept_from > 0 => (self.kept_from, slot.now),
            false => (0, Time::EPOCH),
        };
        let next = core.reads_from(next as u64, self.journal.len() as u64) as usize;
        slot.core = Some(Hashed::new(core));
        slot.reads_next = next;
        let attached = Event::JournalAttached { next: next as u64, since };
        self.tell_worker(scenario, worker, attached);
        // A worker replays the existing records before it serves.
        for _ in next..self.journal.len() {
            self.read(scenario, worker);
        }
    }

    fn crash(&mut self, worker: usize) {
        self.workers[worker].core = None;
        self.lose_connection_of_worker(worker);
    }

    /// Its requests are delivered again; messages that only its connection could bring are lost.
    fn lose_connection_of_worker(&mut self, worker: usize) {
        self.workers[worker].taken = RequestMessages::default();
        for queued in &mut self.requests {
            if queued.state == QueueState::With(worker) {
                queued.state = QueueState::Ready;
            }
        }
        self.net.retain(|message| match &**message {
            Message::ToWorker { worker: to, .. } | Message::History { worker: to, .. } => {
                *to != worker
            }
            Message::Inquiry { .. }
            | Message::ToMember { .. }
            | Message::Prepare { .. }
            | Message::Finish { .. }
            | Message::Append(_)
            | Message::Call { .. } => true,
        });
    }

    /// Makes both workers know of plenty of free slots, by a transaction in which all services are
    /// read only.
    fn warm_up(&mut self, scenario: &Scenario) {
        let names: Vec<_> = scenario.services.iter().map(|service| service.name).collect();
        let warm_up = crate::scenario::request("warm", &names);
        for worker in 0..self.workers.len() {
            let slot = &mut self.workers[worker];
            let Some(core) = &mut slot.core else { continue };
            let now = slot.now;
            let delivery = Delivery(u64::MAX);
            let mut events = VecDeque::from([Event::RequestReceived {
                request: warm_up.clone(),
                delivery,
                deliveries: 1,
            }]);
            while let Some(event) = events.pop_front() {
                let mut effects = Vec::new();
                core.change(|core| core.handle(now, event, &mut effects));
                for effect in effects {
                    match effect {
                        Effect::FindService { service, .. } => {
                            events.push_back(Event::ServiceFound(service));
                        }
                        Effect::SendPrepare { service, prepare, .. } => {
                            let instance = instance_id(service.as_str(), 0, 1);
                            events.push_back(Event::VoteReceived(Vote {
                                key: prepare.key,
                                request_hash: prepare.request_hash,
                                service,
                                instance,
                                store: None,
                                kind: VoteKind::ReadOnly,
                                free: free(scenario),
                            }));
                        }
                        Effect::Append(decision) => {
                            if self.journal.is_empty() {
                                let decision = Arc::new(decision);
                                self.journal
                                    .push(Hashed::new(Record { decision, by_inquiry: false }));
                            }
                            slot.reads_next = 1;
                            let decisions = vec![Arc::clone(&self.journal[0].decision)];
                            events.push_back(Event::RecordsRead { offset: 0, decisions });
                        }
                        Effect::Publish { key, delivery, .. } => {
                            events.push_back(Event::ResultConfirmed { key, delivery });
                        }
                        _ => {}
                    }
                }
            }
            assert!(core.core().is_empty(), "the warm-up ends");
            slot.has_read = 1;
        }
    }

    fn tell_worker(&mut self, scenario: &Scenario, worker: usize, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            match &event {
                Event::RecordsRead { offset, .. } => self.workers[worker].has_read |= 1 << offset,
                Event::ResultConfirmed { delivery, .. } => {
                    self.requests[request_of(scenario, *delivery)].is_answered = true;
                }
                Event::ParkConfirmed { key, service: None } => {
                    for (queued, request) in self.requests.iter_mut().zip(&scenario.requests) {
                        queued.is_answered |= request.key.id == key.id;
                    }
                }
                _ => {}
            }
            let slot = &mut self.workers[worker];
            let Some(core) = &mut slot.core else { return };
            let mut effects = Vec::new();
            core.change(|core| core.handle(slot.now, event, &mut effects));
            for effect in effects {
                events.extend(self.perform(scenario, worker, effect));
            }
        }
    }

    /// Performs an effect of a worker. Immediate answers are returned.
    fn perform(&mut self, scenario: &Scenario, worker: usize, effect: Effect) -> Option<Event> {
        match effect {
            Effect::FindService { service, .. } => {
                let exists = scenario.services.iter().any(|it| it.name == service.as_str());
                return Some(match exists {
                    true => Event::ServiceFound(service),
                    false => Event::ServiceMissing(service),
                });
            }
            Effect::SendPrepare { service, prepare, .. } => {
                let service = self.service_of(scenario, &service);
                self.send(Message::Prepare { service, worker, prepare, redelivered: false });
            }
            Effect::Send { service, to, command } => {
                self.command(scenario, worker, &service, to, command);
            }
            Effect::Append(decision) => {
                let core = self.workers[worker].core.as_ref();
                let works_on =
                    core.is_some_and(|core| core.core().phase_of(&decision.key).is_some());
                let record = Record { decision: Arc::new(decision), by_inquiry: !works_on };
                self.send(Message::Append(record));
            }
            Effect::ReadHistory { from, until } => {
                let kept_from = self.kept_from;
                self.send(Message::History { worker, kept_from, until, from });
            }
            Effect::Publish { key, delivery, answer } => {
                self.publish(scenario, worker, delivery, &answer);
                let event = Event::ResultConfirmed { key, delivery };
                if !scenario.slow_confirms {
                    return Some(event);
                }
                self.send(Message::ToWorker { worker, event });
            }
            Effect::Ack(delivery) => self.settle(scenario, worker, delivery, QueueState::Acked),
            Effect::Release(delivery) => {
                self.settle(scenario, worker, delivery, QueueState::Ready);
            }
            Effect::Reject { delivery, .. } => {
                self.settle(scenario, worker, delivery, QueueState::Rejected);
            }
            Effect::Park(parked) => {
                let service = match parked.cause {
                    ParkedCause::Uncommitted { service, .. } => Some(service),
                    ParkedCause::Undecidable(_) => None,
                };
                let entry = (parked.key.clone(), service.clone());
                self.told.change(|told| told.parked.insert(entry));
                let event = Event::ParkConfirmed { key: parked.key, service };
                self.send(Message::ToWorker { worker, event });
            }
            Effect::Settle { key, service, .. } => {
                self.told.change(|told| told.settled.insert((key, service)));
            }
            Effect::CheckService(_) | Effect::Report(_) => {}
        }
        None
    }

    fn service_of(&self, scenario: &Scenario, name: &ServiceName) -> usize {
        scenario.services.iter().position(|it| it.name == name.as_str()).unwrap()
    }

    fn command(
        &mut self,
        scenario: &Scenario,
        worker: usize,
        service: &ServiceName,
        to: Destination,
        command: Command,
    ) {
        let index = self.service_of(scenario, service);
        let event = match command {
            Command::Query(query) => {
                participant::Event::QueryReceived { worker: worker_id(worker), query }
            }
            Command::Cancel(key) => {
                if self.first_read_by(worker, &key).is_none() {
                    self.breach(Breach::Early);
                }
                participant::Event::CancelReceived(key)
            }
            Command::Finish(finish) => {
                let follows = self.first_read_by(worker, &finish.key).is_some_and(|first| {
                    let named = first.branch_of(service);
                    let is_named =
                        finish.outcome == Outcome::Aborted || finish.branch.as_ref() == named;
                    first.outcome == finish.outcome && is_named
                });
                if !follows {
                    self.breach(Breach::Early);
                }
                if to == Destination::AnyInstance {
                    return self.send(Message::Finish { service: index, worker, finish });
                }
                participant::Event::FinishReceived {
                    worker: worker_id(worker),
                    finish,
                    delivery: None,
                }
            }
        };
        let mut is_routed = false;
        for member in 0..self.members.len() {
            let slot = &self.members[member];
            let is_meant = match &to {
                Destination::Instance(id) => slot.id == *id,
                Destination::AllInstances | Destination::AnyInstance => true,
            };
            if slot.service == index && is_meant {
                is_routed = true;
                self.send(Message::ToMember { member, event: event.clone() });
            }
        }
        // A message for an instance that is gone goes to the durable queue.
        if let (false, participant::Event::FinishReceived { finish, .. }) = (is_routed, event) {
            self.send(Message::Finish { service: index, worker, finish });
        }
    }

    fn publish(
        &mut self,
        scenario: &Scenario,
        worker: usize,
        delivery: Delivery,
        answer: &message::Answer,
    ) {
        let key = TransactionKey { id: answer.id.clone(), requested_at: answer.requested_at };
        let first = self.first_read_by(worker, &key).map(|first| first.outcome);
        if first.is_none() {
            self.breach(Breach::Early);
        }
        let results = &mut self.requests[request_of(scenario, delivery)].results;
        let is_the_same = |result: &ProducerResult| {
            result.requested_at != answer.requested_at || result.outcome == answer.outcome
        };
        let stays = results.iter().all(is_the_same);
        let result =
            ProducerResult { requested_at: answer.requested_at, outcome: answer.outcome, worker };
        if !results.contains(&result) {
            results.push(result);
            results.sort_unstable();
        }
        if !stays || self.first_of(&key).is_none_or(|first| first.outcome != answer.outcome) {
            self.breach(Breach::Result);
        }
    }

    fn settle(
        &mut self,
        scenario: &Scenario,
        worker: usize,
        delivery: Delivery,
        state: QueueState,
    ) {
        let request = request_of(scenario, delivery);
        let queued = &mut self.requests[request];
        let is_answered = queued.is_answered || state != QueueState::Acked;
        if scenario.one_message {
            queued.is_answered |= state == QueueState::Rejected;
            self.settle_in_message(scenario, worker, delivery, state);
            if !is_answered {
                self.breach(Breach::Ack);
            }
            return;
        }
        let is_current = delivery == delivery_of(request, queued.deliveries);
        if is_current && queued.state == QueueState::With(worker) {
            queued.state = state;
        }
        if !is_answered {
            self.breach(Breach::Ack);
        }
    }

    /// Settles a request of the message of all requests, and with the last one the message.
    fn settle_in_message(
        &mut self,
        scenario: &Scenario,
        worker: usize,
        delivery: Delivery,
        state: QueueState,
    ) {
        let settlement = match state {
            QueueState::Ready => Settlement::Requeue,
            QueueState::With(_) | QueueState::Acked | QueueState::Rejected => {
                Settlement::Acknowledge
            }
        };
        let settled = match settlement {
            Settlement::Acknowledge if scenario.acks_with_first => {
                Some((MessageNumber::of(delivery), settlement))
            }
            Settlement::Acknowledge | Settlement::Requeue => {
                self.workers[worker].taken.settle(delivery, settlement)
            }
        };
        let Some((number, settlement)) = settled else { return };
        let is_current = |it: &Queued| {
            number.get() == u64::from(it.deliveries) && it.state == QueueState::With(worker)
        };
        if !self.requests.iter().all(is_current) {
            return;
        }
        let (state, is_safe) = match settlement {
            Settlement::Acknowledge => {
                (QueueState::Acked, self.requests.iter().all(|it| it.is_answered))
            }
            Settlement::Requeue => (QueueState::Ready, true),
        };
        self.requests.iter_mut().for_each(|it| it.state = state);
        if !is_safe {
            self.breach(Breach::Ack);
        }
    }

    /// The outcome of a transaction: its first record, retained or not.
    pub fn first_of(&self, key: &TransactionKey) -> Option<&Arc<Decision>> {
        self.journal.iter().map(|record| &record.decision).find(|decision| decision.key == *key)
    }

    fn first_read_by(&self, worker: usize, key: &TransactionKey) -> Option<&Arc<Decision>> {
        let offset = self.journal.iter().position(|record| record.decision.key == *key)?;
        let has_read = self.workers[worker].has_read & (1 << offset) != 0;
        has_read.then(|| &self.journal[offset].decision)
    }

    // ---- Instances ---------------------------------------------------------------------------

    fn restart_member(&mut self, scenario: &Scenario, member: usize) {
        self.return_unacked(member);
        self.net.retain(|message| match &**message {
            Message::ToMember { member: to, .. } | Message::Call { member: to, .. } => {
                *to != member
            }
            _ => true,
        });
        let number = self.members[..member]
            .iter()
            .filter(|slot| slot.service == self.members[member].service)
            .count();
        let slot = &mut self.members[member];
        let service = &scenario.services[slot.service];
        slot.lives += 1;
        slot.id = instance_id(service.name, number, slot.lives);
        let core = Member::new(slot.now, service.settings(slot.id.clone()), scenario.bug);
        slot.core = Hashed::new(core);
        self.look_through_store(scenario, member);
    }

    /// Unacked deliveries are delivered again, to any instance.
    fn return_unacked(&mut self, member: usize) {
        for message in std::mem::take(&mut self.members[member].unacked).into_values() {
            self.send(match Message::clone(&message) {
                Message::Prepare { service, worker, prepare, .. } => {
                    Message::Prepare { service, worker, prepare, redelivered: true }
                }
                other => other,
            });
        }
    }

    /// An instance that starts looks through its store at once.
    fn look_through_store(&mut self, scenario: &Scenario, member: usize) {
        let slot = &self.members[member];
        if slot.core.core().next_deadline().is_some_and(|at| at <= slot.now) {
            self.tell_member(scenario, member, participant::Event::DeadlineReached);
        }
    }

    fn tell_member(&mut self, scenario: &Scenario, member: usize, event: participant::Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let slot = &mut self.members[member];
            let mut effects = Vec::new();
            slot.core.change(|core| core.handle(slot.now, event, &mut effects));
            for effect in effects {
                events.extend(self.perform_for_member(scenario, member, effect));
            }
        }
        let slot = &self.members[member];
        let cap = scenario.services[slot.service].cap;
        let of_its_own = |branch: &Branch| *branch.instance() == slot.id;
        let held = self.stores[slot.service].prepared.keys();
        let held = held.filter(|(_, branch)| of_its_own(branch)).count();
        if slot.core.core().slots_used() > cap || held > cap as usize {
            self.breach(Breach::Cap);
        }
    }

    /// Performs an effect of an instance. Immediate answers are returned.
    fn perform_for_member(
        &mut self,
        scenario: &Scenario,
        member: usize,
        effect: participant::Effect,
    ) -> Option<participant::Event> {
        use participant::{Effect, Event};
        let service = self.members[member].service;
        match effect {
            Effect::CallPrepare { key, branch, request_hash, deadline, .. } => {
                let held = Held { request_hash, deadline, is_sound: true };
                let verdicts = scenario.services[service].verdicts;
                if let (false, [answer]) = (scenario.slow_services, verdicts) {
                    return Some(self.end_prepare(member, &key, &branch, &held, *answer));
                }
                self.send(Message::Call { member, call: Call::Prepare { key, branch, held } });
            }
            Effect::CallCommit { key, branch } => {
                if !scenario.slow_services && scenario.faults.commit_failures == 0 {
                    return Some(self.end_commit(member, &key, &branch));
                }
                self.send(Message::Call { member, call: Call::Commit { key, branch } });
            }
            Effect::CallAbort { key, branch } => {
                let entry = (key.clone(), branch.clone());
                if self.stores[service].executed.contains(&entry) {
                    self.breach(Breach::Disagreement);
                }
                self.stores[service].change(|store| {
                    if store.prepared.remove(&entry).is_some() {
                        store.undone.insert(entry);
                    }
                });
                return Some(Event::FinishEnded { key, branch, applied: Ok(()) });
            }
            Effect::ReadStore(key) => {
                let mut held = self.in_doubt(service);
                held.retain(|it| it.key == key);
                let event = Event::StoreRead { key, held };
                if !scenario.slow_services {
                    return Some(event);
                }
                self.send(Message::ToMember { member, event });
            }
            Effect::LookUpCommit { key, branch } => {
                let is_known =
                    self.stores[service].executed.contains(&(key.clone(), branch.clone()));
                return Some(Event::CommitLookedUp { key, branch, is_known });
            }
            Effect::ScanStore => return Some(Event::StoreScanned(self.in_doubt(service))),
            Effect::Vote { to, vote } => {
                let said = match &vote.kind {
                    VoteKind::Prepared { branch } => Some(Some(branch.clone())),
                    VoteKind::ReadOnly => Some(None),
                    VoteKind::Refused(_) | VoteKind::Failed { .. } | VoteKind::Finished(_) => None,
                };
                if let Some(said) = said {
                    let service = vote.service.clone();
                    let entry = (vote.key.clone(), vote.request_hash, service, said);
                    self.told.change(|told| told.votes.insert(entry));
                }
                let vote = Vote { free: free(scenario), ..vote };
                let event = coordinator::Event::VoteReceived(vote);
                self.send(Message::ToWorker { worker: worker_of(&to), event });
            }
            Effect::Done { to, mut done, ack } => {
                done.free = free(scenario);
                if let Some(delivery) = ack {
                    self.members[member].unacked.remove(&delivery.0);
                }
                let event = coordinator::Event::DoneReceived { done, delivery: None };
                self.send(Message::ToWorker { worker: worker_of(&to), event });
            }
            Effect::Inquire(inquiry) => {
                let sent_at = self.members[member].now;
                self.send(Message::Inquiry { inquiry, sent_at });
            }
            Effect::Ack(delivery) => {
                self.members[member].unacked.remove(&delivery.0);
            }
        }
        None
    }

    fn in_doubt(&self, service: usize) -> Vec<InDoubt> {
        let prepared = self.stores[service].prepared.iter();
        let in_doubt = |((key, branch), held): (&(TransactionKey, Branch), &Held)| InDoubt {
            key: key.clone(),
            request_hash: held.request_hash,
            branch: branch.clone(),
            deadline: held.deadline,
        };
        prepared.map(in_doubt).collect()
    }

    fn end_prepare(
        &mut self,
        member: usize,
        key: &TransactionKey,
        branch: &Branch,
        held: &Held,
        answer: Answer,
    ) -> participant::Event {
        let (stores, verdict) = match answer {
            Answer::Prepared => (true, Verdict::Prepared),
            Answer::ReadOnly => (false, Verdict::ReadOnly),
            Answer::Refused => (false, Verdict::Refused(None)),
            Answer::FailedEmpty => (false, Verdict::Failed("no".into())),
            Answer::FailedHolding => (true, Verdict::Failed("no".into())),
        };
        if stores {
            let held = Held { is_sound: answer == Answer::Prepared, ..held.clone() };
            let entry = (key.clone(), branch.clone());
            let service = self.members[member].service;
            self.stores[service].change(|store| store.prepared.insert(entry, held));
        }
        participant::Event::PrepareEnded { key: key.clone(), branch: branch.clone(), verdict }
    }

    /// A branch that is committed already is left alone; one that is neither prepared nor
    /// committed can't be committed.
    fn end_commit(
        &mut self,
        member: usize,
        key: &TransactionKey,
        branch: &Branch,
    ) -> participant::Event {
        let entry = (key.clone(), branch.clone());
        let service = self.members[member].service;
        if self.stores[service].prepared.contains_key(&entry) {
            self.stores[service].change(|store| {
                store.prepared.remove(&entry);
                store.executed.insert(entry);
            });
        } else if !self.stores[service].executed.contains(&entry) {
            self.breach(Breach::Disagreement);
        }
        participant::Event::FinishEnded {
            key: key.clone(),
            branch: branch.clone(),
            applied: Ok(()),
        }
    }
}

fn free(scenario: &Scenario) -> u32 {
    if scenario.plenty { 9 } else { 0 }
}

fn worker_id(worker: usize) -> WorkerId {
    WorkerId::parse(&format!("w{worker}")).unwrap()
}

fn worker_of(id: &WorkerId) -> usize {
    id.as_str()[1..].parse().unwrap()
}

fn instance_id(service: &str, number: usize, life: u8) -> InstanceId {
    InstanceId::parse(&format!("{service}{number}-{life}")).unwrap()
}

/// A delivery is named by its request and by how often that was delivered, so that an ack for an
/// earlier delivery settles nothing.
fn delivery_of(request: usize, deliveries: u8) -> Delivery {
    Delivery(request as u64 * 256 + u64::from(deliveries))
}

fn request_of(scenario: &Scenario, delivery: Delivery) -> usize {
    if scenario.one_message {
        return (delivery.0 % REQUESTS_MAX as u64) as usize;
    }
    (delivery.0 / 256) as usize
}
