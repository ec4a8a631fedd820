//! The parts of a schedule: drawn from its seed before it runs.

use std::{sync::Arc, time::Duration};

use dtc::protocol::{
    coordinator,
    ids::{RequestHash, ServiceName, TransactionId, TransactionKey, WorkerId},
    message::{AnswerAt, Payload, Request},
    time::Time,
};

use crate::{
    rng::Rng,
    rules::{Fault, Kind},
};

/// When every schedule begins.
pub(crate) const START: Time = Time::from_millis(1_000_000_000);

/// Everything that is decided before a schedule runs.
pub(crate) struct Plan {
    pub(crate) workers: Vec<WorkerPlan>,
    pub(crate) services: Vec<ServicePlan>,
    /// Requests in the order in which they are published: when, and what.
    pub(crate) requests: Vec<(Time, Request)>,
    /// Who asks for what: the services of each content.
    pub(crate) contents: Vec<(RequestHash, Arc<[ServiceName]>)>,
    pub(crate) faults: Vec<(Time, Fault)>,
    pub(crate) heal_at: Time,
    /// When the journal was set up.
    pub(crate) journal_from: Time,
    pub(crate) clock_margin: Duration,
    pub(crate) chaos: Chaos,
    /// How many unacked requests a worker may have.
    pub(crate) prefetch: usize,
    /// Whether a returned request counts as delivered.
    pub(crate) release_counts: bool,
    /// Whether drivers detect that a service has no instances.
    pub(crate) tells_unserved: bool,
    /// Decides which requests share a message; `None`: none do.
    pub(crate) batching: Option<Rng>,
}

/// How often a message meets a mishap, per thousand.
#[derive(Clone, Copy, Default)]
pub(crate) struct Chaos {
    pub(crate) lose: u64,
    pub(crate) double: u64,
    pub(crate) delay: u64,
    /// Missing confirms.
    pub(crate) unconfirm: u64,
    /// Failed looks further back.
    pub(crate) forget: u64,
}

pub(crate) struct WorkerPlan {
    pub(crate) settings: coordinator::Settings,
    /// How far its clock is ahead, in milliseconds.
    pub(crate) skew: i64,
}

pub(crate) struct ServicePlan {
    pub(crate) name: ServiceName,
    pub(crate) max_wait: u64,
    pub(crate) cap: u32,
    /// The clock of each instance, in milliseconds ahead.
    pub(crate) instances: Vec<i64>,
    pub(crate) conduct: Conduct,
    /// Nothing of it is stored: its one instance remembers everything, and never dies.
    pub(crate) in_memory: bool,
    pub(crate) inquire_after: Duration,
    pub(crate) scan_every: Duration,
    pub(crate) remembered_max: usize,
    pub(crate) visitors_max: usize,
    /// When its queue is deleted; its instances, if any, stay.
    pub(crate) removed_at: Option<Time>,
}

/// How a service's code behaves, per thousand.
#[derive(Clone, Copy, Default)]
pub(crate) struct Conduct {
    pub(crate) refuse: u64,
    pub(crate) fail: u64,
    pub(crate) read_only: u64,
    pub(crate) hang: u64,
    pub(crate) commit_fails: u64,
    pub(crate) commit_fails_for_good: u64,
    pub(crate) abort_fails: u64,
    /// The longest call, in milliseconds.
    pub(crate) latency_max: u64,
}

impl Plan {
    pub(crate) fn draw(seed: u64) -> Self {
        let rng = &mut Rng::new(seed);
        let margin = rng.pick(&[10, 50, 500]);
        let is_thorny = rng.chance(100);
        let services = services(rng, margin);
        let mut workers = workers(rng, margin);
        // From a separate source, so that a seed's schedule doesn't depend on it.
        let digests_max = Rng::new(!seed.rotate_left(17)).pick(&[0, 2, 8, 1_000]);
        for worker in &mut workers {
            worker.settings.digests_max = digests_max;
        }
        if is_thorny {
            for worker in &mut workers {
                worker.settings.window = Duration::from_millis(300);
                worker.settings.records_max = 3;
            }
        }
        let journal_from = START - Duration::from_millis(rng.pick(&[1_000, 20_000, 20_000]));
        let (mut requests, contents) = requests(rng, &services, margin, journal_from, is_thorny);
        // The other seeds have the schedules that they had before a message could hold several requests,
        // and a result could go out early.
        let mut of_requests =
            matches!(seed % 7, 1 | 3 | 5 | 6).then(|| Rng::new(seed.rotate_left(41)));
        for (_, request) in &mut requests {
            if of_requests.as_mut().is_some_and(|rng| rng.chance(300)) {
                request.answer_at = AnswerAt::Decided;
            }
        }
        let chaos = match rng.below(8) {
            _ if is_thorny => {
                Chaos { lose: 100, double: 350, delay: 300, unconfirm: 350, forget: 250 }
            }
            0 => Chaos { lose: 60, double: 60, delay: 60, unconfirm: 60, forget: 30 },
            1 => Chaos { lose: 150, double: 20, delay: 20, unconfirm: 150, forget: 0 },
            2 => Chaos { lose: 40, double: 250, delay: 150, unconfirm: 40, forget: 20 },
            _ => Chaos::default(),
        };
        let mut faults = faults(rng, &workers, &services, is_thorny);
        faults.extend(cluster_faults(seed, &workers, &services));
        let last = faults.iter().map(|(at, _)| *at).max().unwrap_or(START);
        Self {
            workers,
            services,
            requests,
            contents,
            faults,
            heal_at: last.max(START + Duration::from_millis(1_000))
                + Duration::from_millis(rng.between(500, 8_000)),
            journal_from,
            clock_margin: Duration::from_millis(margin),
            chaos,
            prefetch: rng.pick(&[1, 3, 10]),
            release_counts: rng.chance(500),
            // Not for the seeds that found something before drivers could.
            tells_unserved: seed % 5 == 3,
            batching: of_requests,
        }
    }
}

fn skew(rng: &mut Rng, margin: u64) -> i64 {
    let half = margin / 2;
    rng.between(0, half) as i64 - (half / 2) as i64
}

fn millis(rng: &mut Rng, choices: &[u64]) -> Duration {
    Duration::from_millis(rng.pick(choices))
}

fn workers(rng: &mut Rng, margin: u64) -> Vec<WorkerPlan> {
    let n_workers = rng.pick(&[2, 2, 3]);
    let name = WorkerId::parse("w").expect("a valid name");
    let template = coordinator::Settings {
        prepare_timeout: millis(rng, &[150, 600, 2_000]),
        finish_timeout: millis(rng, &[100, 500, 2_000]),
        query_timeout: millis(rng, &[10, 100]),
        append_timeout: millis(rng, &[50, 300, 1_000]),
        commit_retries: rng.pick(&[0, 1, 3]),
        backoff_first: millis(rng, &[10, 100]),
        backoff_max: millis(rng, &[200, 2_000]),
        clock_margin: Duration::from_millis(margin),
        window: millis(rng, &[300, 2_000, 60_000]),
        records_max: rng.pick(&[3, 1_000_000, 1_000_000]),
        in_flight_max: rng.pick(&[1, 2, 4, 256]),
        waiting_max: rng.pick(&[1, 4, 4096]),
        deliveries_max: rng.pick(&[2, 20, 20]),
        inquiries_max: rng.pick(&[1, 4096, 4096]),
        services_max: rng.pick(&[4, 4096, 4096]),
        ..coordinator::Settings::new(name)
    };
    (0..n_workers)
        .map(|index| WorkerPlan {
            settings: coordinator::Settings {
                seed: index,
                window: if rng.chance(200) {
                    millis(rng, &[300, 2_000, 60_000])
                } else {
                    template.window
                },
                ..template.clone()
            },
            skew: skew(rng, margin),
        })
        .collect()
}

fn services(rng: &mut Rng, margin: u64) -> Vec<ServicePlan> {
    let n_services = rng.between(2, 4);
    let mut services: Vec<_> = (0..n_services)
        .map(|index| {
            let in_memory = rng.chance(60);
            let n_instances = if in_memory { 1 } else { rng.pick(&[1, 1, 2, 2, 3]) };
            let mut conduct =
                Conduct { latency_max: rng.pick(&[2, 20, 100]), ..Conduct::default() };
            if rng.chance(400) {
                conduct.refuse = rng.pick(&[0, 0, 60, 200]);
                conduct.fail = rng.pick(&[0, 0, 60, 200]);
                conduct.read_only = rng.pick(&[0, 60, 300]);
                conduct.hang = rng.pick(&[0, 0, 60]);
            }
            if rng.chance(350) {
                conduct.commit_fails = rng.pick(&[100, 400]);
                conduct.commit_fails_for_good = rng.pick(&[0, 0, 100, 300]);
                conduct.abort_fails = rng.pick(&[0, 200]);
            }
            ServicePlan {
                name: name(&format!("s{index}")),
                max_wait: rng.pick(&[0, 5, 60, 400, 1_000]),
                cap: rng.pick(&[1, 1, 2, 5]),
                instances: (0..n_instances).map(|_| skew(rng, margin)).collect(),
                conduct,
                in_memory,
                inquire_after: millis(rng, &[100, 600, 3_000]),
                scan_every: millis(rng, &[200, 1_000, 5_000]),
                remembered_max: rng.pick(&[1, 3, 65_536, 65_536]),
                visitors_max: rng.pick(&[1, 4096, 4096]),
                removed_at: None,
            }
        })
        .collect();
    if rng.chance(200) {
        // Declared, but nobody consumes; later not even declared.
        services.push(ServicePlan {
            name: name("deserted"),
            max_wait: rng.pick(&[0, 60]),
            cap: 1,
            instances: Vec::new(),
            conduct: Conduct::default(),
            in_memory: false,
            inquire_after: Duration::ZERO,
            scan_every: Duration::ZERO,
            remembered_max: 0,
            visitors_max: 0,
            removed_at: Some(START + millis(rng, &[20, 60, 200, 1_000])),
        });
    }
    services
}

fn name(text: &str) -> ServiceName {
    ServiceName::parse(text).expect("a valid name")
}

type Requests = Vec<(Time, Request)>;
type Contents = Vec<(RequestHash, Arc<[ServiceName]>)>;

fn requests(
    rng: &mut Rng,
    services: &[ServicePlan],
    margin: u64,
    journal_from: Time,
    is_thorny: bool,
) -> (Requests, Contents) {
    let mut requests = Vec::new();
    let mut contents = Vec::new();
    let n_transactions = rng.between(5, 9);
    let spread = rng.pick(&[1, 100, 1_500]);
    for index in 0..n_transactions {
        let involved = involved(rng, services);
        let request_hash = RequestHash([index as u8 + 1; 16]);
        contents.push((request_hash, Arc::clone(&involved)));
        let at = START + Duration::from_millis(rng.below(spread + 1));
        let requested_at = match rng.below(40) {
            // It has waited for long.
            0..=3 => at - Duration::from_millis(rng.between(1, 5_000)),
            // By a wrong clock.
            4 => at + Duration::from_millis(3 * margin + 1),
            // Before the journal began.
            5 => journal_from - Duration::from_millis(rng.below(1_000)),
            _ => at + Duration::from_millis(rng.below(margin / 2)),
        };
        let id = TransactionId::parse(&format!("t{index}")).expect("a valid id");
        let request = Request {
            key: TransactionKey { id, requested_at },
            request_hash,
            services: involved,
            data: Payload::new("{}"),
            timeout: rng.chance(100).then(|| millis(rng, &[20, 100, 1_000])),
            answer_at: AnswerAt::default(),
            reply: None,
        };
        requests.push((at, request.clone()));
        if rng.chance(250) {
            let later = at + millis(rng, &[0, 3, 50, 700, 4_000]);
            requests.push((later, request.clone()));
        }
        if rng.chance(if is_thorny { 800 } else { 180 }) {
            // A retry under a new timestamp: the same id and content.
            let after = millis(rng, &[1, 40, 400, 3_000]);
            let key = TransactionKey { requested_at: requested_at + after, ..request.key.clone() };
            requests.push((at + after, Request { key: key.clone(), ..request.clone() }));
            let n_doubles = if is_thorny { 4 } else { rng.below(2) };
            for _ in 0..n_doubles {
                let later = at + after + millis(rng, &[0, 3, 50, 700, 4_000]);
                requests.push((later, Request { key: key.clone(), ..request.clone() }));
            }
        }
        if rng.chance(120) {
            // Other content under an existing name.
            let request_hash = RequestHash([index as u8 + 101; 16]);
            let others = if rng.chance(500) {
                self::involved(rng, services)
            } else {
                Arc::clone(&request.services)
            };
            contents.push((request_hash, Arc::clone(&others)));
            let other_time = rng.chance(300);
            let after = millis(rng, &[0, 1, 10, 300, 3_000]);
            let mut key = request.key.clone();
            if other_time {
                key.requested_at = key.requested_at + after + Duration::from_millis(1);
            }
            requests.push((at + after, Request { key, request_hash, services: others, ..request }));
        }
    }
    requests.sort_by_key(|(at, _)| *at);
    (requests, contents)
}

fn involved(rng: &mut Rng, services: &[ServicePlan]) -> Arc<[ServiceName]> {
    let n_involved = rng.between(1, services.len().min(3) as u64) as usize;
    let mut involved = Vec::new();
    while involved.len() < n_involved {
        let service = services[rng.index(services.len())].name.clone();
        if !involved.contains(&service) {
            involved.push(service);
        }
    }
    if rng.chance(40) {
        involved.push(name("nobody"));
    }
    involved.sort();
    involved.into()
}

fn faults(
    rng: &mut Rng,
    workers: &[WorkerPlan],
    services: &[ServicePlan],
    is_thorny: bool,
) -> Vec<(Time, Fault)> {
    let n_faults = if is_thorny { 12 } else { rng.between(3, 8) };
    let spread = rng.pick(&[30, 300, 2_500]);
    let n_instances: usize = services.iter().map(|service| service.instances.len()).sum();
    (0..n_faults)
        .map(|_| {
            let at = START + Duration::from_millis(rng.below(spread + 1));
            let worker = rng.index(workers.len());
            let instance = rng.index(n_instances);
            let after = rng.pick(&[0, 1, 2, 5, 20]);
            let after = rng.below(after + 1) as u32;
            let down = rng.pick(&[1, 30, 400, 2_000]);
            let kinds: &[Kind] = if is_thorny { &THORNS } else { &KINDS };
            let fault = match rng.pick(kinds) {
                Kind::WorkerCrash => Fault::WorkerCrash { worker, after, down },
                Kind::WorkerFreeze => {
                    let notice = rng.chance(600).then(|| rng.between(1, down));
                    Fault::WorkerFreeze { worker, length: down, notice }
                }
                Kind::WorkerCutOff => Fault::WorkerCutOff { worker },
                Kind::WorkerDrain => Fault::WorkerDrain { worker },
                Kind::InstanceDeath => Fault::InstanceDeath { instance, after, down },
                Kind::InstanceCutOff => Fault::InstanceCutOff { instance },
                Kind::BrokerRestart => Fault::BrokerRestart { down },
                Kind::JournalGap => Fault::JournalGap { worker, records: rng.between(1, 3) },
                Kind::ServiceUnbound => {
                    Fault::ServiceUnbound { service: rng.index(services.len()), down }
                }
                kind @ (Kind::LostMessage
                | Kind::DoubledMessage
                | Kind::LateMessage
                | Kind::LostConfirm
                | Kind::LostHistory
                | Kind::LostAppendConfirm) => Fault::Mishap { kind, after },
                Kind::ReaderStuck
                | Kind::WorkerLinkStuck
                | Kind::InstanceLinkStuck
                | Kind::QueueStaysBound
                | Kind::ServiceUnreachable
                | Kind::FinishUnreachable
                | Kind::ResultsUnreachable
                | Kind::ResultsQueueLost => unreachable!("drawn by cluster_faults"),
            };
            (at, fault)
        })
        .collect()
}

/// The behaviour of a cluster whose nodes are lost and come back: in every second schedule. From a
/// separate source, so that the rest of a seed's schedule doesn't depend on it.
fn cluster_faults(
    seed: u64,
    workers: &[WorkerPlan],
    services: &[ServicePlan],
) -> Vec<(Time, Fault)> {
    let rng = &mut Rng::new(seed.rotate_left(29) ^ 0xc1);
    if rng.chance(500) {
        return Vec::new();
    }
    let n_instances: usize = services.iter().map(|service| service.instances.len()).sum();
    let spread = rng.pick(&[30, 300, 2_500]);
    (0..rng.between(1, 4))
        .map(|_| {
            let at = START + Duration::from_millis(rng.below(spread + 1));
            let (worker, instance) = (rng.index(workers.len()), rng.index(n_instances));
            let service = rng.index(services.len());
            let down = rng.pick(&[30, 400, 2_000, 8_000]);
            let fault = match rng.below(9) {
                0 => Fault::Mishap { kind: Kind::LostAppendConfirm, after: rng.below(4) as u32 },
                1 => Fault::ReaderStuck { worker },
                2 => Fault::WorkerLinkStuck { worker },
                3 => Fault::InstanceLinkStuck { instance },
                4 => Fault::QueueStaysBound { instance },
                5 => Fault::ServiceUnreachable { service, down },
                6 => Fault::FinishUnreachable { service, down },
                7 => Fault::ResultsUnreachable { down },
                _ => Fault::ResultsQueueLost,
            };
            (at, fault)
        })
        .collect()
}

/// The faults of a thorny schedule: late, duplicate and lost messages to workers that forget
/// quickly, producers that repeat requests, and queues that vanish. Crashes would end the scenario.
const THORNS: [Kind; 6] = [
    Kind::ServiceUnbound,
    Kind::ServiceUnbound,
    Kind::LostHistory,
    Kind::JournalGap,
    Kind::JournalGap,
    Kind::WorkerFreeze,
];

/// Crashes are more valuable than mishaps; a restart of the broker ends many scenarios at once.
const KINDS: [Kind; 30] = [
    Kind::WorkerCrash,
    Kind::WorkerCrash,
    Kind::WorkerCrash,
    Kind::WorkerCrash,
    Kind::WorkerCrash,
    Kind::WorkerFreeze,
    Kind::WorkerFreeze,
    Kind::WorkerFreeze,
    Kind::WorkerCutOff,
    Kind::WorkerCutOff,
    Kind::WorkerDrain,
    Kind::InstanceDeath,
    Kind::InstanceDeath,
    Kind::InstanceDeath,
    Kind::InstanceCutOff,
    Kind::InstanceCutOff,
    Kind::BrokerRestart,
    Kind::LostMessage,
    Kind::LostMessage,
    Kind::LostMessage,
    Kind::DoubledMessage,
    Kind::DoubledMessage,
    Kind::LateMessage,
    Kind::LateMessage,
    Kind::LostConfirm,
    Kind::LostConfirm,
    Kind::JournalGap,
    Kind::ServiceUnbound,
    Kind::ServiceUnbound,
    Kind::LostHistory,
];
