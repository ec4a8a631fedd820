//! What a worker keeps from one link to the next.

use std::time::Duration;

use crate::{
    clock::Clock,
    protocol::coordinator::Coordinator,
    worker::{
        Tally, anomalies::Undecidable, clocks::Clocks, namesakes::Namesakes,
        pack_buffer::PackBuffer, packs::PacksUnusable, suspects::Tries,
    },
};

/// What outlives a link.
#[derive(Debug)]
pub(super) struct WorkerState {
    pub(super) coordinator: Coordinator,
    pub(super) clock: Clock,
    /// What is known of others' clocks.
    pub(super) clocks: Clocks,
    /// What is known of others under this worker's name.
    pub(super) namesakes: Namesakes,
    pub(super) last_read: Option<LastRead>,
    /// How long the broker has to begin a consumer of the journal.
    pub(super) begin_max: Duration,
    /// What was read of requests that workers may die of.
    pub(super) tries: Tries,
    /// Which inquiries were said to be undecidable.
    pub(super) undecidable: Undecidable,
    /// What was read of the journal and is in no pack.
    pub(super) pack_buffer: PackBuffer,
    /// Why packs can't be used, if that was logged.
    pub(super) packs_unusable: Option<PacksUnusable>,
    pub(super) tally: Tally,
}

/// What is known of the last message read from the journal.
#[derive(Clone, Copy, Debug)]
pub(super) struct LastRead {
    pub(super) offset: u64,
    pub(super) digest: u64,
}
