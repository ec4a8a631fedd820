//! Every wait for the broker has a time limit.
//!
//! A system runs behind a proxy, which then stops exactly one kind of answer on the existing
//! connections. A transaction that is submitted afterwards must commit within 15 s, without a
//! restart of any process; and a log line must name the wait that has ended, and for how long
//! nothing had arrived.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

mod nothing;
mod producer;
mod service;
mod silence;
mod start;
mod worker;
