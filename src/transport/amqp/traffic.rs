//! How many messages this process has sent and received: what a transaction costs is told in them.

use std::sync::atomic::{AtomicU64, Ordering};

static PUBLISHED: AtomicU64 = AtomicU64::new(0);
static DELIVERED: AtomicU64 = AtomicU64::new(0);

/// What this process has exchanged with brokers, whatever it went by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Traffic {
    /// Messages written, also those that were not confirmed.
    pub published: u64,
    /// Messages received.
    pub delivered: u64,
}

impl Traffic {
    /// Up to now.
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
