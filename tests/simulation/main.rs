//! Seeded schedules of whole systems: the real cores, a modelled broker, and every possible fault;
//! then the faults end, and everything must come to its end.
//!
//! * `DTC_SIM_SCHEDULES`: how many schedules the full run has (200,000 when optimized).
//! * `DTC_SIM_SEED`: the seed to start with, and the one that
//!   `the_seed_of_the_environment_is_simulated` runs; with `DTC_SIM_TRACE=1` the latter prints
//!   every line, `DTC_SIM_BUG` gives it a bug.
//! * `DTC_SIM_MINUTES`: a long campaign instead: as many schedules as fit into that time.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    env,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::{Duration, Instant},
};

use crate::{
    bugs::Bug,
    driver::{DriverBug, Flaw},
};

mod broker;
#[path = "../support/bugs.rs"]
mod bugs;
mod campaign;
mod checkers;
mod coverage;
mod driver;
mod plan;
mod rng;
mod rules;
mod service;
mod world;

/// Fewer than this don't reach every pair of state and event.
const FULL: u64 = 200_000;

/// A bug that so many schedules don't show counts as not found.
const SEEDS_PER_BUG: u64 = 20_000;

#[test]
fn whatever_goes_wrong_every_transaction_ends_as_the_journal_decides() {
    let begun = now();
    let usual = if cfg!(debug_assertions) { 2_000 } else { FULL };
    let seed = campaign::number("DTC_SIM_SEED").unwrap_or(0);
    let minutes = campaign::number("DTC_SIM_MINUTES").map(|it| Duration::from_secs(60 * it));
    let schedules = match minutes {
        Some(_) => u64::MAX - seed,
        None => campaign::number("DTC_SIM_SCHEDULES").unwrap_or(usual),
    };
    let goes_on = || minutes.is_none_or(|minutes| begun.elapsed() < minutes);
    let totals = campaign::run(seed..seed + schedules, None, goes_on);
    let took = begun.elapsed();
    campaign::say(&format!("{}took {took:.1?}", totals.report()));
    if let Some((seed, violation)) = &totals.failure {
        panic!("{}", campaign::account(*seed, None, violation));
    }
    if seed == 0 && totals.schedules >= FULL {
        let complaints = totals.coverage.complaints();
        assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    }
}

#[test]
fn every_bug_is_found() {
    let mut missed = Vec::new();
    let mut table = format!("{:<24} {:<20} after seeds", "bug", "checker");
    let cores = Bug::ALL.into_iter().map(|bug| (format!("{bug:?}"), Flaw::Core(bug)));
    let drivers = DriverBug::ALL.into_iter().map(|bug| (format!("{bug:?}"), Flaw::Driver(bug)));
    for (name, flaw) in cores.chain(drivers) {
        let totals = campaign::run(0..SEEDS_PER_BUG, Some(flaw), || true);
        match totals.failure {
            Some((seed, violation)) => {
                table.push_str(&format!("\n{name:<24} {:<20} {}", violation.property, seed + 1));
            }
            None => {
                table.push_str(&format!("\n{name:<24} not found in {SEEDS_PER_BUG}"));
                missed.push(name);
            }
        }
    }
    campaign::say(&table);
    assert!(missed.is_empty(), "not found: {missed:?}");
}

#[test]
fn a_seed_always_gives_the_same_schedule() {
    for seed in 0..50 {
        let hashes = [(); 2].map(|()| {
            let mut hasher = DefaultHasher::new();
            campaign::run_one(seed, None, true).trace.hash(&mut hasher);
            hasher.finish()
        });
        assert_eq!(hashes[0], hashes[1], "seed {seed}");
    }
}

#[test]
fn the_seed_of_the_environment_is_simulated() {
    let Some(seed) = campaign::number("DTC_SIM_SEED") else { return };
    let bug = env::var("DTC_SIM_BUG")
        .ok()
        .map(|name| Flaw::named(&name).unwrap_or_else(|| panic!("no bug is called {name:?}")));
    let summary = campaign::run_one(seed, bug, true);
    if campaign::number("DTC_SIM_TRACE").is_some() {
        campaign::say(&summary.trace.join("\n"));
    }
    if let Some(violation) = &summary.violation {
        panic!("{}", campaign::account(seed, bug, violation));
    }
}

/// Schedules in which an earlier core failed, each named after what must not happen.
macro_rules! found_once {
    ($($name:ident: $seed:literal;)*) => {$(
        #[test]
        fn $name() {
            if let Some(violation) = campaign::run_one($seed, None, false).violation {
                panic!("{}", campaign::account($seed, None, &violation));
            }
        }
    )*};
}

found_once! {
    a_finish_from_the_durable_queue_is_never_dropped: 156;
    an_inquiry_is_no_vote: 284;
    what_was_taken_over_does_not_wait_for_itself: 7;
    a_look_further_back_keeps_what_the_view_forgets: 245;
    a_proposal_ends_the_waiting_for_slots: 49352;
    what_the_store_holds_of_a_finished_transaction_is_undone: 345;
    who_queues_behind_the_unbegun_is_served: 450;
    an_inquiry_waits_for_the_look_further_back: 13211;
    a_prepare_that_meets_a_failing_commit_frees_its_slot: 7504;
    a_request_that_gets_a_message_of_its_own_may_have_begun: 6191;
}

#[expect(clippy::disallowed_methods, reason = "how long the test itself took")]
fn now() -> Instant {
    Instant::now()
}
