//! The commit protocol as pure state machines: events in, effects out.
//!
//! Nothing here reads a clock, draws a random number, logs, or talks to anyone; equal states given
//! equal events produce equal effects. So the worker, the embedded coordinator, the simulator and
//! the model checker all run this code, and what the last two prove holds for the first two.
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
//! * [`journal`]: what a reader of the journal may conclude from it.
//!
//! **Invariant:** the first decision for a transaction in the journal is its outcome, and nobody
//! acts on a decision that was not read back. That is the whole of the agreement: there are no
//! locks, leases, epochs or leaders.
//!
//! **Invariant:** `COMMITTED` is proposed only when every involved service has voted that it is
//! prepared, or that it has nothing to commit; and names the branch of each that is prepared.
//!
//! **Invariant:** state is plain data, and bounded by the settings.

pub mod coordinator;
mod deadlines;
mod evicted_digests;
pub mod ids;
mod jitter;
pub mod journal;
mod keymap;
pub mod message;
pub mod participant;
pub mod time;
