//! The journal of one process: an append-only log of decisions.
//!
//! * [`memory`]: lives as long as the process.
//! * [`file`](mod@file): lets the process be restarted without losing anything.
//!
//! The journal that workers share is a stream of RabbitMQ, which the worker reads and writes. All
//! of them hold the same records, and `protocol::journal_view` is the part that a coordinator has seen.

pub(crate) mod faults;
pub mod file;
pub mod memory;
