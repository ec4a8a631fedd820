//! The transport of one process: queues in memory.
//!
//! It keeps the promises of a broker for as long as the process lives: a request that is not acked
//! is delivered again when the coordinator is started anew.

mod prepares;
mod requests;

pub use self::{
    prepares::{PrepareQueue, Returned},
    requests::RequestQueue,
};
