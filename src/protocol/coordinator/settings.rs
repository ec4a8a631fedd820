//! What an operator may set: how patient a worker is, and how much it takes on.

use std::{collections::BTreeMap, time::Duration};

use crate::protocol::ids::{ServiceName, WorkerId};

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
    /// How many digests of decisions that have gone out of view are kept, at 11 bytes each. A
    /// request newer than the oldest of them is looked for further back only if its digest is there.
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
