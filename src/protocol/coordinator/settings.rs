//! The settings of a coordinator: time-outs and limits.

use std::{collections::BTreeMap, time::Duration};

use crate::protocol::ids::{ServiceName, WorkerId};

/// The slots of a service that no other worker uses.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Slots {
    /// How many slots it has.
    pub max_concurrency: u32,
    /// How long a prepare may wait for a slot.
    pub max_wait: Duration,
}

/// The settings of a coordinator.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Settings {
    /// The worker's id, which its records name.
    pub worker: WorkerId,
    /// How long the prepares of a transaction may take, unless its request says otherwise.
    pub prepare_timeout: Duration,
    /// How long to wait for the answer to a commit before it is sent again; and how long to repeat an abort
    /// that is not answered.
    pub finish_timeout: Duration,
    /// How long to wait for a holder's vote after a take-over.
    pub query_timeout: Duration,
    /// How long to wait for a record to be read back before it is appended again.
    pub append_timeout: Duration,
    /// How often to retry a failed commit.
    pub commit_retries: u32,
    /// The pause before the first retry; it doubles with each.
    pub backoff_first: Duration,
    /// The longest pause.
    pub backoff_max: Duration,
    /// How often to publish a result again that can't be delivered. After that it counts as unclaimed.
    pub result_retries: u32,
    /// How far any two clocks of the system may differ.
    pub clock_margin: Duration,
    /// How long a decision stays in view.
    pub window: Duration,
    /// How many decisions stay in view at most, at some 600 bytes each.
    pub records_max: usize,
    /// How many digests of evicted decisions to keep, at 11 bytes each. A request that is newer than the
    /// oldest digest is searched for in older parts of the journal only if its digest is there.
    pub digests_max: usize,
    /// How many transactions may be in flight.
    pub in_flight_max: usize,
    /// How many more may wait for slots. Only half as many may wait for services that can't be reached or
    /// have no instance.
    pub waiting_max: usize,
    /// A request that was delivered more often is aborted. A driver that tries such requests one by one
    /// passes no higher number, until it gives one up.
    pub deliveries_max: u32,
    /// How many inquiries about transactions of other workers may be pending.
    pub inquiries_max: usize,
    /// If more services are known, those that were silent for a minute are forgotten.
    pub services_max: usize,
    /// The services that no other worker uses. The coordinator knows their free slots without reports, and
    /// may take their slots in any order.
    pub own_services: BTreeMap<ServiceName, Slots>,
    /// The seed of the jitter in this worker's pauses.
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
