//! The state that a worker keeps from one link to the next.

use std::time::Duration;

use crate::{
    clock::Clock,
    protocol::coordinator::Coordinator,
    worker::{
        WorkerStats, anomalies::Undecidable, clocks::Clocks, namesakes::Namesakes,
        pack_buffer::PackBuffer, packs::PacksUnusable, suspects::Tries,
    },
};

/// The state that outlives a link.
#[derive(Debug)]
pub(super) struct WorkerState {
    pub(super) coordinator: Coordinator,
    pub(super) clock: Clock,
    pub(super) clocks: Clocks,
    pub(super) namesakes: Namesakes,
    pub(super) last_read: Option<LastRead>,
    /// How long the broker has to begin a consumer of the journal.
    pub(super) begin_max: Duration,
    pub(super) tries: Tries,
    pub(super) undecidable: Undecidable,
    pub(super) pack_buffer: PackBuffer,
    /// Why packs can't be used, if that was logged.
    pub(super) packs_unusable: Option<PacksUnusable>,
    pub(super) stats: WorkerStats,
}

/// The last message that was read from the journal.
#[derive(Clone, Copy, Debug)]
pub(super) struct LastRead {
    pub(super) offset: u64,
    pub(super) digest: u64,
}
