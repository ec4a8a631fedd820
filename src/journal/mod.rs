//! The journal of one process: an append-only log of decisions.
//!
//! * [`memory`]: for as long as the process lives.
//! * [`file`](mod@file): so that the process can be started again as if nothing had happened.
//!
//! The journal that workers share is a stream of RabbitMQ, which the worker reads and writes. What
//! all of them say is the same, and `protocol::journal` is what a coordinator has seen of it.

pub(crate) mod faults;
pub mod file;
pub mod memory;
