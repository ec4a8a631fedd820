//! The fuzzer: it reads input from outside as `dtc` does, and runs the two state machines of the
//! protocol, while libFuzzer looks for inputs that take new branches.
//!
//! All targets are in one program, which is built and linked once: `DTC_FUZZ` names the one to
//! fuzz. `./run` builds it, and knows where inputs are kept. The source of each target documents
//! what it asserts; with `DTC_FUZZ_TRACE=1` the state machines print what happens.
//!
//! The engine is compiled along from the sources in `libfuzzer-sys`, which takes a C++ compiler and
//! seconds. `cargo fuzz` and `cargo bolero` would do the same after minutes of installing them, the
//! former only with a nightly compiler. What they add is flags: `instrumented` gives the stable
//! compiler those that make it count branches, for the crates that matter. Comparisons aren't traced:
//! what is compared with here are words, and `words.dict` has them.

#![no_main]

mod bodies;
mod complaints;
mod coordinator;
mod files;
mod frames;
mod grown;
mod instance;
mod journal;
mod json;
mod mail;
mod messages;
mod settings;
mod trace;
mod written;

use std::{env, process::exit, sync::OnceLock};

use dtc::{
    protocol::message::{Answer, Decision, Done, Finish, Inquiry, Parked, Prepare, Query, Vote},
    wire::message::{Cancel, JournalBegun, PackedMessage, Settled},
};
use libfuzzer_sys::fuzz_target;

type Target = fn(&[u8]);

/// The targets. A new reader of input needs its target here, and seeds in `corpus`.
const TARGETS: [(&str, Target); 28] = [
    ("request", bodies::request),
    ("requests", bodies::requests),
    ("messages", messages::messages),
    ("vote", bodies::items::<Vote>),
    ("done", bodies::items::<Done>),
    ("decision", bodies::items::<Decision>),
    ("inquiry", bodies::items::<Inquiry>),
    ("headers", mail::headers),
    ("frames", frames::frames),
    ("config", settings::config),
    ("services", files::services),
    ("transactions", files::transactions),
    ("journal", journal::journal),
    ("prepare", bodies::items::<Prepare>),
    ("query", bodies::items::<Query>),
    ("finish", bodies::items::<Finish>),
    ("cancel", bodies::items::<Cancel>),
    ("result", bodies::items::<Answer>),
    ("parked", bodies::items::<Parked>),
    ("settled", bodies::items::<Settled>),
    ("journal-begun", bodies::items::<JournalBegun>),
    ("pack", bodies::items::<PackedMessage>),
    ("address", settings::address),
    ("names", settings::names),
    ("written", written::written),
    ("grown", grown::grown),
    ("coordinator", coordinator::coordinator),
    ("instance", instance::instance),
];

static TARGET: OnceLock<Target> = OnceLock::new();

fuzz_target!(init: choose(), |bytes: &[u8]| {
    if let Some(target) = TARGET.get() {
        target(bytes);
    }
});

/// Chooses the target that `DTC_FUZZ` names; without it, lists all.
fn choose() {
    let Ok(wanted) = env::var("DTC_FUZZ") else {
        TARGETS.iter().for_each(|(name, _)| println!("{name}"));
        exit(0);
    };
    let Some((_, target)) = TARGETS.iter().find(|(name, _)| *name == wanted) else {
        eprintln!("there is no target `{wanted}`");
        exit(2);
    };
    TARGET.get_or_init(|| *target);
}
