//! What an operator may set: who an instance is, and how patient.

use std::time::Duration;

use crate::protocol::ids::{InstanceId, ServiceName, StoreId};

/// Who an instance is, and how patient.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Settings {
    /// The service.
    pub service: ServiceName,
    /// This instance of it. A new process takes a new one, since its branches are counted from
    /// here.
    pub instance: InstanceId,
    /// How many transactions may hold a slot at once.
    pub max_concurrency: u32,
    /// Whether the service can tell what its store holds. Without it this instance's memory is all
    /// there is.
    pub has_store: bool,
    /// Whether the service can tell what its store has committed. Then a commit of a branch that the
    /// store does not know is an error; else it is taken for one that was committed before.
    pub remembers_commits: bool,
    /// What the store is called, if it has a name.
    pub store: Option<StoreId>,
    /// How long to wait for the outcome before asking, and again between asking.
    pub inquire_after: Duration,
    /// How long between two looks through the whole store.
    pub scan_every: Duration,
    /// The pause before a parked commit is tried again.
    pub retry_parked_every: Duration,
    /// How many finished transactions are remembered.
    pub remembered_max: usize,
    /// How many transactions that hold no slot are looked into at once, not counting what comes by
    /// the service's durable queue.
    pub visitors_max: usize,
    /// What the jitter of this instance's pauses starts from.
    pub seed: u64,
}

impl Settings {
    /// The defaults, for this instance.
    pub fn new(service: ServiceName, instance: InstanceId, max_concurrency: u32) -> Self {
        Self {
            service,
            instance,
            max_concurrency,
            has_store: false,
            remembers_commits: false,
            store: None,
            inquire_after: Duration::from_secs(10),
            scan_every: Duration::from_secs(30),
            retry_parked_every: Duration::from_secs(10),
            remembered_max: 65_536,
            visitors_max: 4096,
            seed: 0,
        }
    }
}
