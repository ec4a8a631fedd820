//! A broker that starts: it accepts connections before all its queues are available.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use crate::{
    processes::{LIMIT, Process},
    proxy::{Action, CONSUME, Frames, Scope},
    stand::{BOTH, ProxiedSystem, READY},
};

#[test]
fn a_worker_that_reconnects_before_the_journal_is_available_logs_no_error() {
    let stand = ProxiedSystem::new();
    let journal = stand.site.name("journal");
    comes_back(&stand, &stand.worker, "dtc worker w1", &journal);
}

#[test]
fn an_instance_that_reconnects_before_its_queue_is_available_logs_no_error() {
    let stand = ProxiedSystem::new();
    let prepares = stand.site.name("prepare.stock");
    comes_back(&stand, &stand.stock, "dtc service stock", &prepares);
}

/// All connections end; on the first two new ones the queue is missing.
fn comes_back(stand: &ProxiedSystem, process: &Process, name: &str, queue: &str) {
    let before = process.stderr.count();
    let consuming = Frames::questions(CONSUME).on(name).about(queue);
    let refused = stand.site.proxy.rule_for(2, consuming, Scope::All, Action::NotFound);
    stand.site.proxy.cut(name);
    refused.wait_for(2);
    let ready = process.stderr.wait_for_from(before, READY, LIMIT);
    ready.expect("it serves again");
    let said = process.stderr.all()[before..].join("\n");
    println!("{said}");
    assert!(!said.contains("ERROR") && !said.contains("topology apply"), "{said}");
    stand.commits(&BOTH);
}
