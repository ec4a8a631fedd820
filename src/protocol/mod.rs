//! The commit protocol as pure state machines: events in, effects out.
//!
//! Nothing here reads a clock, draws a random number, logs, or does I/O; equal states given equal events
//! produce equal effects. So the worker, the embedded coordinator, the simulator and the model checker
//! all run this code, and what the last two show holds for the first two.
//!
//! ```text
//! producer          worker                 journal        payments                stock
//!   | request  ------>|                       |               |                      |
//!   |                 |-- prepare ----------------------------->|  (takes a slot)     |
//!   |                 |-- prepare ---------------------------------------------------->| (takes a slot)
//!   |                 |<------------------------- prepared -----|                      |
//!   |                 |<------------------------------------------------ prepared -----|
//!   |                 |-- COMMITTED ---------->|               |                      |
//!   |                 |<-- (read back) --------|               |                      |
//!   |                 |-- commit ------------------------------>|                      |
//!   |                 |-- commit ----------------------------------------------------->|
//!   |                 |<------------------------- done ---------|  (slot is free)      |
//!   |                 |<------------------------------------------------ done ---------|
//!   |<-- result ------|   then, and only then, the request is acked
//! ```
//!
//! * [`coordinator`]: the worker's side. Requests, votes and journal records in; commands, proposed
//!   decisions and results out.
//! * [`participant`]: the service's side. Commands in; calls of the service's code, votes and
//!   inquiries out.
//! * [`journal_view`]: what a reader of the journal may conclude from it.
//! * [`request_messages`]: when a message that holds several requests is acknowledged.
//!
//! **Invariant:** the first decision for a transaction in the journal is its outcome, and no process acts
//! on a decision that was not read back. Nothing else is needed for agreement: no locks, leases, epochs
//! or leaders.
//!
//! **Invariant:** a worker proposes `COMMITTED` only when every involved service has voted that it is
//! prepared, or that it has nothing to commit. The decision names the branch of each service that is
//! prepared.
//!
//! **Invariant:** state is plain data, and bounded by the settings.

pub mod coordinator;
mod deadlines;
mod evicted_digests;
pub mod ids;
mod jitter;
pub mod journal_view;
mod keymap;
pub mod message;
pub mod participant;
pub mod request_messages;
pub mod time;
