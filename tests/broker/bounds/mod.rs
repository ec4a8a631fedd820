//! Every wait for the broker has an end.
//!
//! A system runs behind a proxy, which then stops one kind of answer on the connections that there
//! are, and no other. Within 15 s a transaction that is submitted afterwards must be committed, with
//! nobody started again by hand; and one line in a log must say which wait has ended, and for how
//! long nothing had come.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

mod nothing;
mod producer;
mod service;
mod silence;
mod start;
mod worker;
