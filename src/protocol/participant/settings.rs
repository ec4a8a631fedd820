//! The settings of an instance: names, time-outs and limits.

use std::time::Duration;

use crate::protocol::ids::{InstanceId, ServiceName, StoreId};

/// The settings of an instance.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Settings {
    /// The service.
    pub service: ServiceName,
    /// The instance. A new process needs a new id, since branches are numbered from one.
    pub instance: InstanceId,
    /// How many transactions may hold a slot at once.
    pub max_concurrency: u32,
    /// Whether the service can tell what its store holds. Without that, the instance knows only what it
    /// holds itself.
    pub has_store: bool,
    /// Whether the service can tell what its store has committed. Then the commit of a branch that the
    /// store doesn't know is an error; otherwise such a branch counts as committed before.
    pub remembers_commits: bool,
    /// The id of the store, if it has one.
    pub store: Option<StoreId>,
    /// How long to wait for the outcome before inquiring, and between inquiries.
    pub inquire_after: Duration,
    /// The pause between two scans of the whole store.
    pub scan_every: Duration,
    /// The pause before a parked commit is tried again.
    pub retry_parked_every: Duration,
    /// How many finished transactions to remember.
    pub remembered_max: usize,
    /// How many transactions without a slot to look up at once, not counting those whose finish came by the
    /// service's durable queue.
    pub visitors_max: usize,
    /// The seed of the jitter in this instance's pauses.
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
