//! The transport of one process: queues in memory.
//!
//! It gives the guarantees of a broker as long as the process lives: a request that is not acked is
//! delivered again when the coordinator is restarted.

mod prepares;
mod requests;

pub use self::{
    prepares::{MemoryPrepareQueue, ReturnedPrepare},
    requests::MemoryRequestQueue,
};
