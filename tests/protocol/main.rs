//! The protocol in examples: golden traces of one worker or one instance, and random scenarios of
//! small whole systems against a simple oracle.
//!
//! A trace (`traces/*.txt`) has inputs above each `----` and all their effects below, so that an
//! unexpected effect shows. `UPDATE_TRACES=1 cargo test --test protocol` rewrites the lower halves;
//! commit the result only if you understand it and want it.
//!
//! It does not search interleavings: `tests/model` and `tests/simulation` do that.

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
