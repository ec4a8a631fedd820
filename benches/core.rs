//! The speed of the protocol alone: without services' code, clock, or I/O.
//!
//! `cargo bench --bench core`; the figure that counts is elements (transactions) per second.
//!
//! It is the core of the embedded mode: 1,024 records in view, requests created beforehand and not
//! timed, the allocator of the `dtc` command. A larger view costs more, since it doesn't stay in
//! the cache: the last benchmark has 1,000,000 records in view, and prints what reading them takes.

#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a benchmark may fail here")]
#![allow(clippy::print_stdout, reason = "a benchmark says what it has measured")]
#![allow(clippy::wildcard_enum_match_arm, reason = "what it does not need, it only consumes")]

use std::{collections::VecDeque, hint::black_box, sync::Arc, time::Duration};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dtc::protocol::{
    coordinator::{self, Coordinator},
    ids::{Branch, InstanceId, RequestHash, ServiceName, TransactionId, TransactionKey, WorkerId},
    message::{
        AnswerAt, Command, Decision, Delivery, Destination, Done, Outcome, Payload, Request, Vote,
        VoteKind,
    },
    participant::{self, Instance, Verdict},
    time::Time,
};

/// As in the `dtc` command.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH: u64 = 2_000;

/// How many transactions are in flight at once.
const IN_FLIGHT: u64 = 256;

struct World {
    now: Time,
    coordinator: Coordinator,
    effects: Vec<coordinator::Effect>,
    worker: WorkerId,
    instance: InstanceId,
    branch: Branch,
    services: Arc<[ServiceName]>,
    payload: Payload,
    records_read: u64,
    next: u64,
}

impl World {
    fn new() -> Self {
        Self::of_size(1024, 0)
    }

    fn of_size(records_max: usize, digests_max: usize) -> Self {
        let worker = WorkerId::parse("w").expect("a name");
        let mut settings = coordinator::Settings::new(worker.clone());
        settings.records_max = records_max;
        settings.digests_max = digests_max;
        settings.clock_margin = Duration::ZERO;
        let mut coordinator = Coordinator::new(settings);
        let now = Time::from_millis(2_000_000_000);
        let attached = coordinator::Event::JournalAttached { next: 0, since: Time::EPOCH };
        coordinator.handle(now, attached, &mut Vec::new());
        let instance = InstanceId::parse("i").expect("a name");
        let names = ["payments", "stock"].map(|name| ServiceName::parse(name).expect("a name"));
        Self {
            now,
            coordinator,
            effects: Vec::new(),
            worker,
            branch: Branch::of(&instance, 1),
            instance,
            services: Arc::new(names),
            payload: Payload::new(r#"{"amount":100}"#),
            records_read: 0,
            next: 0,
        }
    }

    /// Requests as a transport delivers them, already parsed.
    fn requests(&mut self) -> VecDeque<coordinator::Event> {
        (0..BATCH).map(|_| self.request()).collect()
    }

    fn request(&mut self) -> coordinator::Event {
        self.next += 1;
        let id = TransactionId::parse(&format!("tx-{}", self.next)).expect("a name");
        let request = Request {
            key: TransactionKey { id, requested_at: Time::EPOCH },
            request_hash: RequestHash([7; 16]),
            services: Arc::clone(&self.services),
            data: self.payload.clone(),
            timeout: None,
            answer_at: AnswerAt::Applied,
            reply: None,
        };
        let delivery = Delivery(self.next);
        coordinator::Event::RequestReceived { request, delivery, deliveries: 1 }
    }

    /// Runs the coordinator for one batch, with immediate answers of the services.
    fn run_coordinator(&mut self, mut requests: VecDeque<coordinator::Event>) -> u64 {
        let mut acked = 0;
        let mut begun = 0;
        let mut events = VecDeque::new();
        while acked < BATCH {
            self.now = self.now + Duration::from_millis(1);
            while begun - acked < IN_FLIGHT
                && let Some(request) = requests.pop_front()
            {
                begun += 1;
                events.push_back(asked_at(self.now, request));
            }
            while let Some(event) = events.pop_front() {
                self.coordinator.handle(self.now, event, &mut self.effects);
                for effect in self.effects.drain(..) {
                    match effect {
                        coordinator::Effect::Ack(_) => acked += 1,
                        coordinator::Effect::FindService { service, .. } => {
                            events.push_back(coordinator::Event::ServiceFound(service));
                        }
                        coordinator::Effect::Append(decision) => {
                            let offset = self.records_read;
                            self.records_read += 1;
                            let decisions = vec![Arc::new(decision)];
                            events.push_back(coordinator::Event::RecordsRead { offset, decisions });
                        }
                        coordinator::Effect::Publish { key, delivery, .. } => {
                            events.push_back(coordinator::Event::ResultConfirmed { key, delivery });
                        }
                        coordinator::Effect::SendPrepare { service, prepare, .. } => {
                            events.push_back(coordinator::Event::VoteReceived(Vote {
                                key: prepare.key,
                                request_hash: prepare.request_hash,
                                service,
                                instance: self.instance.clone(),
                                store: None,
                                kind: VoteKind::Prepared { branch: self.branch.clone() },
                                free: 1000,
                            }));
                        }
                        coordinator::Effect::Send { service, command, .. } => {
                            let Command::Finish(finish) = command else { continue };
                            let done = Done {
                                key: finish.key,
                                service,
                                instance: self.instance.clone(),
                                store: None,
                                applied: Ok(()),
                                parked: false,
                                free: 1000,
                            };
                            let delivery = None;
                            events.push_back(coordinator::Event::DoneReceived { done, delivery });
                        }
                        other => {
                            black_box(other);
                        }
                    }
                }
            }
        }
        acked
    }

    /// Both sides: the coordinator and one instance of each service.
    fn run_system(
        &mut self,
        instances: &mut [Instance; 2],
        mut requests: VecDeque<coordinator::Event>,
    ) -> u64 {
        let mut acked = 0;
        let mut begun = 0;
        let mut events = VecDeque::new();
        let mut commands = VecDeque::new();
        let mut ended = Vec::new();
        let mut said = Vec::new();
        while acked < BATCH {
            self.now = self.now + Duration::from_millis(1);
            while begun - acked < IN_FLIGHT
                && let Some(request) = requests.pop_front()
            {
                begun += 1;
                events.push_back(asked_at(self.now, request));
            }
            loop {
                if let Some(event) = events.pop_front() {
                    self.coordinator.handle(self.now, event, &mut self.effects);
                } else if let Some((member, event)) = commands.pop_front() {
                    let instance: &mut Instance = &mut instances[usize::from(member)];
                    instance.handle(self.now, event, &mut said);
                    for effect in said.drain(..) {
                        match effect {
                            participant::Effect::CallPrepare { key, branch, .. } => {
                                let verdict = Verdict::Prepared;
                                ended.push(participant::Event::PrepareEnded {
                                    key,
                                    branch,
                                    verdict,
                                });
                            }
                            participant::Effect::CallCommit { key, branch } => {
                                let applied = Ok(());
                                ended.push(participant::Event::FinishEnded {
                                    key,
                                    branch,
                                    applied,
                                });
                            }
                            participant::Effect::Vote { vote, .. } => {
                                events.push_back(coordinator::Event::VoteReceived(vote));
                            }
                            participant::Effect::Done { done, .. } => {
                                let delivery = None;
                                let event = coordinator::Event::DoneReceived { done, delivery };
                                events.push_back(event);
                            }
                            other => {
                                black_box(other);
                            }
                        }
                    }
                    commands.extend(ended.drain(..).map(|event| (member, event)));
                } else {
                    break;
                }
                for effect in self.effects.drain(..) {
                    match effect {
                        coordinator::Effect::Ack(_) => acked += 1,
                        coordinator::Effect::FindService { service, .. } => {
                            events.push_back(coordinator::Event::ServiceFound(service));
                        }
                        coordinator::Effect::Append(decision) => {
                            let offset = self.records_read;
                            self.records_read += 1;
                            let decisions = vec![Arc::new(decision)];
                            events.push_back(coordinator::Event::RecordsRead { offset, decisions });
                        }
                        coordinator::Effect::Publish { key, delivery, .. } => {
                            events.push_back(coordinator::Event::ResultConfirmed { key, delivery });
                        }
                        coordinator::Effect::SendPrepare { service, prepare, .. } => {
                            let event = participant::Event::PrepareReceived {
                                worker: self.worker.clone(),
                                delivery: Delivery(1),
                                redelivered: false,
                                prepare,
                            };
                            commands.push_back((service == self.services[1], event));
                        }
                        coordinator::Effect::Send { service, to, command } => {
                            debug_assert!(to != Destination::AnyInstance);
                            let Command::Finish(finish) = command else { continue };
                            let event = participant::Event::FinishReceived {
                                worker: self.worker.clone(),
                                finish,
                                delivery: None,
                            };
                            commands.push_back((service == self.services[1], event));
                        }
                        other => {
                            black_box(other);
                        }
                    }
                }
            }
        }
        acked
    }
}

fn core(c: &mut Criterion) {
    let mut group = c.benchmark_group("core");
    group.throughput(Throughput::Elements(BATCH));
    group.sample_size(20);
    let mut world = World::new();
    group.bench_function("coordinator, two services", |b| {
        b.iter_custom(|iterations| {
            let run = |_| {
                let batch = world.requests();
                timed(|| world.run_coordinator(batch))
            };
            (0..iterations).map(run).sum()
        });
    });
    let mut world = World::new();
    let mut instances = world.services.iter().map(|service| {
        let settings = participant::Settings::new(service.clone(), world.instance.clone(), 1000);
        let settings = participant::Settings { remembered_max: 1024, ..settings };
        Instance::new(world.now, settings)
    });
    let mut instances = [instances.next().expect("two"), instances.next().expect("two")];
    group.bench_function("coordinator and both services", |b| {
        b.iter_custom(|iterations| {
            let run = |_| {
                let batch = world.requests();
                timed(|| world.run_system(&mut instances, batch))
            };
            (0..iterations).map(run).sum()
        });
    });
    group.finish();
}

/// How many records a busy worker on a broker has in view.
const MANY: usize = 1_000_000;

/// A worker that has read a long journal.
fn large(c: &mut Criterion) {
    let mut group = c.benchmark_group("core");
    group.throughput(Throughput::Elements(BATCH));
    group.sample_size(20);
    let mut world = World::of_size(MANY, 8_000_000);
    world.read_many();
    group.bench_function("coordinator, 1,000,000 records in view", |b| {
        b.iter_custom(|iterations| {
            let run = |_| {
                let batch = world.requests();
                timed(|| world.run_coordinator(batch))
            };
            (0..iterations).map(run).sum()
        });
    });
    group.finish();
}

impl World {
    fn read_many(&mut self) {
        let record = |number: usize| Decision {
            key: TransactionKey {
                id: TransactionId::parse(&format!("old-{number}")).expect("a name"),
                requested_at: Time::from_millis(1_999_999_000),
            },
            request_hash: RequestHash([7; 16]),
            outcome: Outcome::Committed,
            branches: self.services.iter().map(|it| (it.clone(), self.branch.clone())).collect(),
            reason: None,
            decided_at: self.now,
            worker: self.worker.clone(),
        };
        let (mut took, before) = (Duration::ZERO, resident_bytes());
        for first in (0..MANY).step_by(100) {
            let decisions = (first..first + 100).map(|number| Arc::new(record(number))).collect();
            let offset = self.records_read;
            self.records_read += 1;
            let event = coordinator::Event::RecordsRead { offset, decisions };
            took += timed(|| {
                self.coordinator.handle(self.now, event, &mut self.effects);
                1
            });
        }
        assert_eq!(self.coordinator.view().len(), MANY);
        let each = (resident_bytes() - before) / MANY as u64;
        println!("{MANY} records in messages of 100: read in {took:.1?}, {each} bytes each");
    }
}

/// The process's resident memory.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|it| it.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

fn asked_at(now: Time, mut event: coordinator::Event) -> coordinator::Event {
    if let coordinator::Event::RequestReceived { request, .. } = &mut event {
        request.key.requested_at = now;
    }
    event
}

#[expect(clippy::disallowed_methods, reason = "a benchmark looks at the clock")]
fn timed(run: impl FnOnce() -> u64) -> Duration {
    let began = std::time::Instant::now();
    black_box(run());
    began.elapsed()
}

criterion_group!(benches, core, large);
criterion_main!(benches);
