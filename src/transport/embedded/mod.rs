//! The transport of one process: queues and a journal in memory.
//!
//! It keeps the promises of a broker for as long as the process lives: a request that is not acked
//! is delivered again when the coordinator is started anew, and the journal keeps its decision until
//! then. What is to be kept for longer is written to a [`file`](mod@file).

pub(crate) mod faults;
pub mod file;
mod journal;
mod prepares;
mod requests;

pub use self::{
    journal::MemoryJournal,
    prepares::{PrepareQueue, Returned},
    requests::RequestQueue,
};
