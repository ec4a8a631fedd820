//! The transport of one process: queues and a journal in memory.
//!
//! It keeps the promises of a broker for as long as the process lives, and not longer: a request
//! that is not acked is delivered again when the coordinator is started anew, and the journal keeps
//! its decision until then.

mod journal;
mod prepares;
mod requests;

pub use self::{
    journal::MemoryJournal,
    prepares::{PrepareQueue, Returned},
    requests::RequestQueue,
};
