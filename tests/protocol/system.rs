//! A small whole system in one process: one worker, services with one or two instances that share a
//! store, and a network that loses nothing and keeps no order.
//!
//! Time passes only while nothing is in transit, so every deadline that is reached was waited for
//! in vain.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use dtc::protocol::{
    coordinator::{self, Coordinator},
    ids::{Branch, RequestHash, ServiceName, TransactionKey, WorkerId},
    message::{
        Answer, AnswerAt, Command, Decision, Delivery, Destination, Outcome, ParkedCause, Payload,
        Prepare, Request,
    },
    participant::{self, InDoubt, Instance, Verdict},
    time::Time,
};

use crate::words::{BEGINNING, instance, key, service};

/// How a service's code behaves for one transaction.
#[derive(Clone, Debug)]
pub(crate) struct Behaviour {
    pub(crate) verdict: Verdict,
    /// How many attempts to commit fail before one succeeds.
    pub(crate) failing_commits: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) max_concurrency: u32,
    pub(crate) has_store: bool,
    pub(crate) instances: usize,
    /// Its behaviour for each transaction, in the order of [`Scenario::transactions`].
    pub(crate) behaviour: Vec<Behaviour>,
}

/// What is run. Services are called `s0`, `s1`, …; a transaction may also name unknown ones.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) services: Vec<Service>,
    /// The services of each transaction.
    pub(crate) transactions: Vec<BTreeSet<usize>>,
    /// Transactions whose request is published once more.
    pub(crate) doubled: Vec<usize>,
    pub(crate) in_flight_max: usize,
    /// Determines what arrives next.
    pub(crate) order: u64,
}

/// How often a service's code was called for one transaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Calls {
    pub(crate) prepare: u32,
    pub(crate) commit: u32,
    pub(crate) abort: u32,
}

/// A message in transit.
enum InTransit {
    ToWorker(coordinator::Event),
    ToInstance(usize, usize, participant::Event),
    /// The worker reads one more message of the journal.
    Reading,
}

struct Site {
    name: ServiceName,
    behaviour: Service,
    instances: Vec<Instance>,
    queue: VecDeque<Prepare>,
    /// Unacked prepares, by instance.
    slots: Vec<BTreeSet<Delivery>>,
    store: BTreeSet<InDoubt>,
    committed: BTreeSet<Branch>,
}

pub(crate) struct System {
    scenario: Scenario,
    pub(crate) now: Time,
    random: u64,
    worker: Coordinator,
    sites: Vec<Site>,
    parcels: Vec<InTransit>,
    deliveries: u64,
    pub(crate) journal: Vec<Decision>,
    /// How many records the worker has read.
    read: usize,
    /// How many messages they were.
    messages_read: u64,
    pub(crate) calls: BTreeMap<(usize, usize), Calls>,
    pub(crate) answers: Vec<(usize, Answer)>,
    pub(crate) settled: Vec<(usize, usize)>,
    pub(crate) parked: Vec<(usize, usize)>,
    unacked: BTreeSet<Delivery>,
    confirmed: BTreeSet<Delivery>,
}

impl System {
    pub(crate) fn new(scenario: Scenario) -> Self {
        let worker = WorkerId::parse("w1").unwrap();
        let settings = coordinator::Settings {
            in_flight_max: scenario.in_flight_max,
            ..coordinator::Settings::new(worker)
        };
        let sites = scenario.services.iter().enumerate().map(|(index, it)| {
            let name = service(&format!("s{index}"));
            let start = |number| {
                let id = instance(&format!("s{index}-{number}"));
                let settings = participant::Settings {
                    has_store: it.has_store,
                    remembers_commits: it.has_store,
                    ..participant::Settings::new(name.clone(), id, it.max_concurrency)
                };
                Instance::new(BEGINNING, settings)
            };
            Site {
                instances: (0..it.instances).map(start).collect(),
                slots: vec![BTreeSet::new(); it.instances],
                behaviour: it.clone(),
                queue: VecDeque::new(),
                store: BTreeSet::new(),
                committed: BTreeSet::new(),
                name,
            }
        });
        Self {
            now: BEGINNING,
            random: scenario.order | 1,
            worker: Coordinator::new(settings),
            sites: sites.collect(),
            parcels: Vec::new(),
            deliveries: 0,
            journal: Vec::new(),
            read: 0,
            messages_read: 0,
            calls: BTreeMap::new(),
            answers: Vec::new(),
            settled: Vec::new(),
            parked: Vec::new(),
            unacked: BTreeSet::new(),
            confirmed: BTreeSet::new(),
            scenario,
        }
    }

    /// Runs until nothing is in transit and nobody waits for anything.
    pub(crate) fn run(&mut self) {
        let since = BEGINNING - Duration::from_secs(3600);
        self.tell_worker(coordinator::Event::JournalAttached { next: 0, since });
        let requested = 0..self.scenario.transactions.len();
        for transaction in requested.chain(self.scenario.doubled.clone()) {
            self.deliveries += 1;
            let delivery = Delivery(self.deliveries);
            self.unacked.insert(delivery);
            let request = self.request(transaction);
            let event = coordinator::Event::RequestReceived { request, delivery, deliveries: 1 };
            self.parcels.push(InTransit::ToWorker(event));
        }
        for step in 0.. {
            assert!(step < 100_000, "it goes round and round");
            self.fill_slots();
            match self.take_parcel() {
                Some(InTransit::ToWorker(event)) => self.tell_worker(event),
                Some(InTransit::ToInstance(site, instance, event)) => {
                    self.tell_instance(site, instance, event);
                }
                Some(InTransit::Reading) => {
                    // All records are in one message; a later reader finds a marker.
                    let decisions =
                        self.journal[self.read..].iter().cloned().map(Arc::new).collect();
                    self.read = self.journal.len();
                    let offset = self.messages_read;
                    self.messages_read += 1;
                    self.tell_worker(coordinator::Event::RecordsRead { offset, decisions });
                }
                None if self.is_at_rest() => break,
                None => self.pass_time(),
            }
        }
        assert!(self.unacked.is_empty(), "every request is acked");
        for site in &self.sites {
            assert!(site.store.is_empty(), "{} holds nothing", site.name);
            assert!(site.slots.iter().all(BTreeSet::is_empty), "{}'s slots are free", site.name);
            assert!(site.instances.iter().all(|it| it.slots_used() == 0));
        }
    }

    fn request(&self, transaction: usize) -> Request {
        let of = |index: &usize| service(&format!("s{index}"));
        Request {
            key: key_of(transaction),
            request_hash: RequestHash([7; 16]),
            services: self.scenario.transactions[transaction].iter().map(of).collect(),
            data: Payload::new("{}"),
            timeout: Some(Duration::from_secs(100_000)),
            answer_at: AnswerAt::default(),
            reply: None,
        }
    }

    fn is_at_rest(&self) -> bool {
        let is_idle = |site: &Site| site.slots.iter().all(BTreeSet::is_empty);
        // A parked commit that an inquiry has led to is settled when it is next tried.
        let is_settled = self.settled.len() == self.parked.len();
        self.worker.is_empty()
            && self.sites.iter().all(is_idle)
            && self.store_is_empty()
            && is_settled
    }

    fn store_is_empty(&self) -> bool {
        self.sites.iter().all(|site| site.store.is_empty())
    }

    fn take_parcel(&mut self) -> Option<InTransit> {
        if self.parcels.is_empty() {
            return None;
        }
        // xorshift64: any sequence that visits all orders will do.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let pick = usize::try_from(self.random % 1_000_003).unwrap() % self.parcels.len();
        Some(self.parcels.swap_remove(pick))
    }

    fn pass_time(&mut self) {
        let instances = self.sites.iter().flat_map(|site| &site.instances);
        let due = instances.filter_map(Instance::next_deadline);
        let next = due.chain(self.worker.next_deadline()).min();
        self.now = self.now.max(next.expect("somebody waits for something"));
        assert!(self.now < BEGINNING + Duration::from_secs(50_000), "nobody ran into a deadline");
        self.tell_worker(coordinator::Event::DeadlineReached);
        for site in 0..self.sites.len() {
            for instance in 0..self.sites[site].instances.len() {
                self.tell_instance(site, instance, participant::Event::DeadlineReached);
            }
        }
    }

    /// Acts as the broker: an instance gets no more unacked prepares than it has slots.
    fn fill_slots(&mut self) {
        for (index, site) in self.sites.iter_mut().enumerate() {
            let cap = usize::try_from(site.behaviour.max_concurrency).unwrap();
            for (number, slots) in site.slots.iter_mut().enumerate() {
                while slots.len() < cap
                    && let Some(prepare) = site.queue.pop_front()
                {
                    self.deliveries += 1;
                    let delivery = Delivery(self.deliveries);
                    slots.insert(delivery);
                    let worker = WorkerId::parse("w1").unwrap();
                    self.parcels.push(InTransit::ToInstance(
                        index,
                        number,
                        participant::Event::PrepareReceived {
                            worker,
                            delivery,
                            redelivered: false,
                            prepare,
                        },
                    ));
                }
            }
        }
    }

    // ---- The worker --------------------------------------------------------------------------

    fn tell_worker(&mut self, event: coordinator::Event) {
        let mut effects = Vec::new();
        self.worker.handle(self.now, event, &mut effects);
        for effect in effects {
            self.perform(effect);
        }
    }

    fn perform(&mut self, effect: coordinator::Effect) {
        use coordinator::{Effect, Event};
        let back = match effect {
            Effect::FindService { service, .. } => match self.site_of(&service) {
                Some(_) => Event::ServiceFound(service),
                None => Event::ServiceMissing(service),
            },
            Effect::SendPrepare { service, prepare, .. } => {
                let index = self.site_of(&service).expect("only what exists is sent to");
                // The queue keeps its order, but messages on their way to it don't.
                let ahead = self.random.is_multiple_of(2);
                let queue = &mut self.sites[index].queue;
                return if ahead { queue.push_front(prepare) } else { queue.push_back(prepare) };
            }
            Effect::Send { service, to, command } => return self.send(&service, &to, command),
            Effect::Append(decision) => {
                self.journal.push(decision);
                return self.parcels.push(InTransit::Reading);
            }
            Effect::Publish { key, delivery, answer } => {
                self.answers.push((index_of(&key), answer));
                self.confirmed.insert(delivery);
                Event::ResultConfirmed { key, delivery }
            }
            Effect::Ack(delivery) => {
                assert!(self.confirmed.contains(&delivery), "acked only after its result");
                assert!(self.unacked.remove(&delivery), "acked once");
                return;
            }
            Effect::Park(parked) => {
                let ParkedCause::Uncommitted { service, .. } = parked.cause else {
                    panic!("every outcome can be told");
                };
                self.parked.push((index_of(&parked.key), self.site_of(&service).unwrap()));
                Event::ParkConfirmed { key: parked.key, service: Some(service) }
            }
            Effect::Settle { key, service, .. } => {
                return self.settled.push((index_of(&key), self.site_of(&service).unwrap()));
            }
            Effect::CheckService(_) | Effect::Report(_) => return,
            Effect::ReadHistory { .. } | Effect::Release(_) | Effect::Reject { .. } => {
                panic!("{effect:?} has no cause")
            }
        };
        self.parcels.push(InTransit::ToWorker(back));
    }

    fn site_of(&self, name: &ServiceName) -> Option<usize> {
        self.sites.iter().position(|site| site.name == *name)
    }

    fn send(&mut self, name: &ServiceName, to: &Destination, command: Command) {
        let index = self.site_of(name).expect("only what exists is sent to");
        let id_of = |number: usize| instance(&format!("{name}-{number}"));
        let numbers = 0..self.sites[index].instances.len();
        let receivers: Vec<usize> = match to {
            Destination::Instance(id) => numbers.filter(|it| id_of(*it) == *id).collect(),
            Destination::AllInstances => numbers.collect(),
            Destination::AnyInstance => vec![numbers.len() - 1],
        };
        for number in receivers {
            let worker = WorkerId::parse("w1").unwrap();
            let event = match command.clone() {
                Command::Query(query) => participant::Event::QueryReceived { worker, query },
                Command::Cancel(key) => participant::Event::CancelReceived(key),
                Command::Finish(finish) => {
                    self.deliveries += 1;
                    let by_queue = *to == Destination::AnyInstance;
                    let delivery = by_queue.then_some(Delivery(self.deliveries));
                    participant::Event::FinishReceived { worker, finish, delivery }
                }
            };
            self.parcels.push(InTransit::ToInstance(index, number, event));
        }
    }

    // ---- The instances -----------------------------------------------------------------------

    fn tell_instance(&mut self, site: usize, number: usize, event: participant::Event) {
        let mut effects = Vec::new();
        self.sites[site].instances[number].handle(self.now, event, &mut effects);
        let used = self.sites[site].instances[number].slots_used();
        assert!(used <= self.sites[site].behaviour.max_concurrency, "the cap holds");
        for effect in effects {
            self.perform_at(site, number, effect);
        }
    }

    fn perform_at(&mut self, site: usize, number: usize, effect: participant::Effect) {
        use participant::{Effect, Event};
        let back = match effect {
            Effect::CallPrepare { key, branch, request_hash, deadline, .. } => {
                let transaction = index_of(&key);
                self.calls.entry((transaction, site)).or_default().prepare += 1;
                let verdict = self.sites[site].behaviour.behaviour[transaction].verdict.clone();
                if matches!(verdict, Verdict::Prepared | Verdict::Failed(_)) {
                    let (key, branch) = (key.clone(), branch.clone());
                    self.sites[site].store.insert(InDoubt { key, request_hash, branch, deadline });
                }
                Event::PrepareEnded { key, branch, verdict }
            }
            Effect::CallCommit { key, branch } => {
                let transaction = index_of(&key);
                let calls = self.calls.entry((transaction, site)).or_default();
                calls.commit += 1;
                let fails = self.sites[site].behaviour.behaviour[transaction].failing_commits;
                let applied = if calls.commit > fails {
                    let is_held = self.unstore(site, &key, &branch);
                    let committed = &mut self.sites[site].committed;
                    // An instance whose commit failed may not know that another one's succeeded.
                    assert!(is_held || committed.contains(&branch), "what commits was prepared");
                    committed.insert(branch.clone());
                    Ok(())
                } else {
                    Err("disk full".into())
                };
                Event::FinishEnded { key, branch, applied }
            }
            Effect::CallAbort { key, branch } => {
                self.calls.entry((index_of(&key), site)).or_default().abort += 1;
                assert!(self.unstore(site, &key, &branch), "what is undone was prepared");
                Event::FinishEnded { key, branch, applied: Ok(()) }
            }
            Effect::ReadStore(key) => {
                let held = self.sites[site].store.iter().filter(|it| it.key == key);
                Event::StoreRead { held: held.cloned().collect(), key }
            }
            Effect::LookUpCommit { key, branch } => {
                let is_known = self.sites[site].committed.contains(&branch);
                assert!(is_known, "nobody is told to commit what was never prepared");
                Event::CommitLookedUp { key, branch, is_known }
            }
            Effect::ScanStore => {
                Event::StoreScanned(self.sites[site].store.iter().cloned().collect())
            }
            Effect::Vote { vote, .. } => {
                return self.post_to_worker(coordinator::Event::VoteReceived(vote));
            }
            Effect::Done { done, .. } => {
                let event = coordinator::Event::DoneReceived { done, delivery: None };
                return self.post_to_worker(event);
            }
            Effect::Inquire(inquiry) => {
                return self.post_to_worker(coordinator::Event::InquiryReceived(inquiry));
            }
            Effect::Ack(delivery) => {
                self.sites[site].slots[number].remove(&delivery);
                return;
            }
        };
        self.parcels.push(InTransit::ToInstance(site, number, back));
    }

    fn post_to_worker(&mut self, event: coordinator::Event) {
        self.parcels.push(InTransit::ToWorker(event));
    }

    fn unstore(&mut self, site: usize, key: &TransactionKey, branch: &Branch) -> bool {
        let store = &mut self.sites[site].store;
        let held = store.iter().find(|it| it.key == *key && it.branch == *branch).cloned();
        held.is_some_and(|held| store.remove(&held))
    }

    /// Whether the journal says that `transaction` is committed.
    pub(crate) fn is_committed(&self, transaction: usize) -> bool {
        let first = self.journal.iter().find(|it| it.key == key_of(transaction)).unwrap();
        first.outcome == Outcome::Committed
    }
}

fn key_of(transaction: usize) -> TransactionKey {
    key(&format!("t{transaction}"))
}

fn index_of(key: &TransactionKey) -> usize {
    key.id.as_str()[1..].parse().unwrap()
}
