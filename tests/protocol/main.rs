//! The protocol as stories: golden traces of one worker or one instance, and random scenarios of
//! whole little systems against a simple oracle.
//!
//! A trace (`traces/*.txt`) has what is done above each `----` and everything that came of it
//! below, so an effect that nobody expected shows. `UPDATE_TRACES=1 cargo test --test protocol`
//! writes the lower halves anew; commit what it wrote only if you understand it and want it.
//!
//! This is not where interleavings are searched: `tests/model` and `tests/simulation` do that.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

mod instance;
mod oracle;
mod room;
mod strays;
mod system;
mod traces;
mod view;
mod words;
mod workers;
