//! How many messages this process has published and received: the measure of a transaction's cost.

use std::sync::atomic::{AtomicU64, Ordering};

static PUBLISHED: AtomicU64 = AtomicU64::new(0);
static DELIVERED: AtomicU64 = AtomicU64::new(0);

/// The messages that this process has exchanged with brokers, on all connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Traffic {
    /// Messages written, including unconfirmed ones.
    pub published: u64,
    /// Messages received.
    pub delivered: u64,
}

impl Traffic {
    /// The counts so far.
    pub fn so_far() -> Self {
        Self {
            published: PUBLISHED.load(Ordering::Relaxed),
            delivered: DELIVERED.load(Ordering::Relaxed),
        }
    }
}

pub(super) fn published() {
    PUBLISHED.fetch_add(1, Ordering::Relaxed);
}

pub(super) fn delivered() {
    DELIVERED.fetch_add(1, Ordering::Relaxed);
}
