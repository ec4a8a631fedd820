//! `dtc` as its users see it: the built binary, its output, its errors, its exit codes.
//!
//! Every wait is for something: a line of output, or the end of the process.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]
#![allow(clippy::disallowed_methods, reason = "the clock bounds a hang, it decides nothing")]
#![allow(missing_docs, reason = "a test's name says it")]

mod behaviours;
mod config;
mod forms;
mod help;
mod input;
mod journal;
#[path = "../support/pages.rs"]
mod pages;
mod readme;
mod signals;
mod streams;
mod topology;
mod world;
