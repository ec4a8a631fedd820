//! The parts of a world, and how often which fault may happen to it.

use std::{sync::Arc, time::Duration};

use dtc::protocol::{
    coordinator, ids,
    message::{AnswerAt, Payload, Request},
    participant,
    time::Time,
};

use crate::{bugs::Bug, properties::Milestone};

/// The initial time of every clock.
pub const START: Time = Time::from_millis(100);

/// Only deadlines matter, and the checker chooses which comes first, so the pauses are as short as
/// they can be and still differ: then worlds that differ only in how long something took are the
/// same world. None is long enough to be scattered by jitter.
const PREPARE_TIMEOUT: Duration = Duration::from_millis(2);
const INQUIRE_AFTER: Duration = Duration::from_millis(3);

/// One configuration of the model.
#[derive(Clone)]
pub struct Scenario {
    pub name: &'static str,
    pub services: Vec<Service>,
    /// The initial content of the request queue. A request published twice is in it twice.
    pub requests: Vec<Request>,
    /// Whether all requests are in one message; if not, each has its own.
    pub one_message: bool,
    /// A bug: a worker acknowledges a message when the first of its requests is settled.
    pub acks_with_first: bool,
    pub faults: Faults,
    /// Whether the second worker starts later.
    pub second_is_late: bool,
    /// Whether a worker that starts attaches the journal at its end and looks back for the rest.
    pub attach_at_end: bool,
    /// Whether both workers know of free slots in plenty: then prepares go out in parallel.
    pub plenty: bool,
    /// Whether the service's code and its store take time, during which other things happen.
    pub slow_services: bool,
    /// Whether the confirmation of a result takes time.
    pub slow_confirms: bool,
    pub records_max: usize,
    pub digests_max: usize,
    pub commit_retries: u32,
    pub deliveries_max: u32,
    /// Out of how many worlds one is tried for whether everything ends.
    pub healed_one_in: u64,
    pub bug: Option<Bug>,
    /// What must be reached somewhere.
    pub reaches: &'static [Milestone],
}

/// How often each fault may happen. A lost message needs no limit: nothing forces a message to be
/// delivered, so every world in which one is lost is among those in which it is still in transit. A
/// frozen worker needs none for the same reason.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Faults {
    /// A message is delivered and stays in transit.
    pub duplicates: u8,
    /// A worker reaches a deadline.
    pub worker_timeouts: u8,
    /// An instance reaches a deadline.
    pub member_timeouts: u8,
    /// A worker dies; its requests are delivered again.
    pub crashes: u8,
    /// The broker gives up a worker that still lives: its request goes to another one as well.
    pub redeliveries: u8,
    /// A worker finds its connection lost.
    pub worker_disconnects: u8,
    /// An instance dies, and a new one starts.
    pub restarts: u8,
    /// An instance finds its connection lost.
    pub member_disconnects: u8,
    /// The service's code fails to commit.
    pub commit_failures: u8,
    /// A prepare is returned, as if there were no slot.
    pub returns: u8,
    /// The broker does not confirm a result.
    pub lost_confirms: u8,
    /// Retention drops all records that the journal holds.
    pub truncations: u8,
}

impl Faults {
    pub const NONE: Self = Self {
        duplicates: 0,
        worker_timeouts: 0,
        member_timeouts: 0,
        crashes: 0,
        redeliveries: 0,
        worker_disconnects: 0,
        restarts: 0,
        member_disconnects: 0,
        commit_failures: 0,
        returns: 0,
        lost_confirms: 0,
        truncations: 0,
    };
}

#[derive(Clone)]
pub struct Service {
    pub name: &'static str,
    pub instances: usize,
    pub cap: u32,
    pub has_store: bool,
    pub remembered_max: usize,
    /// What the service's code may answer to a prepare.
    pub verdicts: &'static [Answer],
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Answer {
    Prepared,
    ReadOnly,
    Refused,
    /// Failed before it stored anything.
    FailedEmpty,
    /// Failed after it had stored it.
    FailedHolding,
}

impl Service {
    pub fn named(name: &'static str) -> Self {
        Self {
            name,
            instances: 1,
            cap: 1,
            has_store: false,
            remembered_max: 8,
            verdicts: &[Answer::Prepared],
        }
    }

    pub fn with_store(self) -> Self {
        Self { has_store: true, ..self }
    }

    pub fn instances(self, instances: usize) -> Self {
        Self { instances, ..self }
    }

    pub fn answering(self, verdicts: &'static [Answer]) -> Self {
        Self { verdicts, ..self }
    }

    pub fn settings(&self, instance: ids::InstanceId) -> participant::Settings {
        let service = service_name(self.name);
        participant::Settings {
            has_store: self.has_store,
            inquire_after: INQUIRE_AFTER,
            scan_every: Duration::from_millis(3),
            retry_parked_every: Duration::from_millis(1),
            remembered_max: self.remembered_max,
            ..participant::Settings::new(service, instance, self.cap)
        }
    }
}

impl Scenario {
    /// Two workers, these services and requests, and no faults.
    pub fn new(name: &'static str, services: Vec<Service>, requests: Vec<Request>) -> Self {
        Self {
            name,
            services,
            requests,
            one_message: false,
            acks_with_first: false,
            faults: Faults::NONE,
            second_is_late: false,
            attach_at_end: false,
            plenty: false,
            slow_services: false,
            slow_confirms: false,
            records_max: 8,
            digests_max: 0,
            commit_retries: 1,
            deliveries_max: 20,
            healed_one_in: 256,
            bug: None,
            reaches: &[],
        }
    }

    pub fn worker_settings(&self, worker: usize) -> coordinator::Settings {
        let worker = ids::WorkerId::parse(&format!("w{worker}")).unwrap();
        coordinator::Settings {
            prepare_timeout: PREPARE_TIMEOUT,
            finish_timeout: Duration::from_millis(4),
            query_timeout: Duration::from_millis(1),
            append_timeout: Duration::from_millis(2),
            commit_retries: self.commit_retries,
            backoff_first: Duration::from_millis(1),
            backoff_max: Duration::from_millis(1),
            clock_margin: Duration::ZERO,
            window: Duration::from_secs(3600),
            records_max: self.records_max,
            digests_max: self.digests_max,
            deliveries_max: self.deliveries_max,
            ..coordinator::Settings::new(worker)
        }
    }
}

pub fn service_name(name: &str) -> ids::ServiceName {
    ids::ServiceName::parse(name).unwrap()
}

/// A request for transaction `id` over `services`, published before the first clock shows
/// [`START`].
pub fn request(id: &str, services: &[&str]) -> Request {
    request_at(id, 50, services)
}

pub fn request_at(id: &str, requested_at: u64, services: &[&str]) -> Request {
    Request {
        key: ids::TransactionKey {
            id: ids::TransactionId::parse(id).unwrap(),
            requested_at: Time::from_millis(requested_at),
        },
        request_hash: ids::RequestHash([1; 16]),
        services: services.iter().copied().map(service_name).collect::<Arc<[_]>>(),
        data: Payload::new("{}"),
        timeout: None,
        answer_at: AnswerAt::default(),
        reply: None,
    }
}

/// The same transaction with other content.
pub fn with_other_content(request: Request) -> Request {
    Request { request_hash: ids::RequestHash([2; 16]), ..request }
}
