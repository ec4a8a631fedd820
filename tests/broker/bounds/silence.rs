//! Connections on which nothing arrives any more.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    proxy::{Frames, Side},
    stand::{BOTH, ProxiedSystem},
};

#[test]
fn a_worker_whose_connections_fall_silent_connects_again() {
    falls_silent("dtc worker w1", |stand, mark| stand.worker_says(mark, ""));
}

#[test]
fn a_worker_whose_publishing_connection_falls_silent_connects_again() {
    falls_silent("dtc worker w1 (publish)", |stand, mark| stand.worker_says(mark, ""));
}

#[test]
fn a_worker_whose_consuming_connection_falls_silent_connects_again() {
    falls_silent("dtc worker w1 (consume)", |stand, mark| stand.worker_says(mark, ""));
}

#[test]
fn a_service_whose_connections_fall_silent_connects_again() {
    falls_silent("dtc service stock", |stand, mark| stand.stock_says(mark, ""));
}

#[test]
fn a_producer_whose_connections_fall_silent_connects_again() {
    falls_silent("dtc submit", |stand, mark| stand.producer_says(mark, ""));
}

/// The broker sends nothing more, but receives everything.
fn falls_silent(name: &str, says: impl Fn(&ProxiedSystem, &crate::stand::Mark)) {
    let stand = ProxiedSystem::new();
    let mark = stand.marked();
    let stopped = stand.site.proxy.stop(Frames::all(Side::Broker).on(name));
    stand.commits_again(&mark, &stopped, &BOTH);
    says(&stand, &mark);
}

/// No packet passes in either direction. The broker considers the old connections alive, and goes
/// on delivering to them up to their prefetch.
#[test]
fn a_system_reconnects_when_packets_of_all_its_connections_are_dropped() {
    let stand = ProxiedSystem::new();
    let mark = stand.marked();
    let connections = stand.site.proxy.connections("");
    stand.site.proxy.black_hole("");
    stand.worker_says(&mark, "");
    stand.stock_says(&mark, "");
    let began = Instant::now();
    // The broker considers the old connections alive, so it still delivers messages to them, up to
    // their prefetch. Many messages soon exceed that.
    let is_any_committed = || {
        let ids: Vec<_> = (0..20).map(|_| stand.submit(&BOTH)).collect();
        let until = Instant::now() + Duration::from_secs(6);
        ids.iter().any(|id| {
            let answer = stand.answer(id, until.saturating_duration_since(Instant::now()));
            answer.is_some_and(|it| it["status"] == "COMMITTED")
        })
    };
    while !is_any_committed() {
        assert!(began.elapsed() < Duration::from_secs(90), "nothing is committed");
    }
    println!("{connections} connections, and then {}", stand.site.proxy.connections(""));
}

/// Missing heartbeats alone are no reason to give up a connection on which everything else arrives.
#[test]
fn a_broker_that_sends_everything_but_heartbeats_counts_as_alive() {
    let stand = ProxiedSystem::new();
    let proxy = &stand.site.proxy;
    let connections = proxy.connections("dtc worker");
    proxy.stop(Frames::heartbeats(Side::Broker).on("dtc worker"));
    // More than the two intervals of 10 s after which a silent peer is given up.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(25) {
        stand.commits(&BOTH);
    }
    assert_eq!(proxy.connections("dtc worker"), connections);
}
