//! What whoever runs a worker does to it without meaning any harm.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::time::Duration;

use lapin::BasicProperties;
use nix::sys::signal::Signal;

use crate::{
    processes::LIMIT,
    stand::{BOTH, Stand},
};

/// Each of them ended a worker at once, and whatever it had begun was left to others.
#[test]
fn a_signal_that_asks_for_nothing_ends_no_worker_and_one_that_asks_for_the_end_drains() {
    let mut stand = Stand::new();
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGALRM] {
        stand.worker.signal(signal);
        stand.worker.wait_for_line(&format!("{signal} is ignored"), LIMIT);
    }
    stand.commits(&BOTH);
    stand.worker.signal(Signal::SIGQUIT);
    stand.worker.exited(0, Duration::from_secs(60));
    assert!(stand.worker.stderr.text().contains("stopped"), "{}", stand.worker.stderr.text());
}

/// The name of a class, as client libraries put it into `type`, got no answer.
#[test]
fn a_request_of_a_foreign_type_is_answered_as_invalid() {
    let stand = Stand::new();
    let (direct, results) = (&stand.site.direct, stand.site.name("results"));
    let queue = stand.site.name("told");
    direct.open_queue(&queue, &results, "tk.*");
    let properties = BasicProperties::default()
        .with_type("OrderPlaced, Shop.Api".into())
        .with_timestamp(1_700_000_000);
    let body = r#"{"id":"foreign","involved_services":["stock"],"data":{},"reply":"tk"}"#;
    direct.publish(&stand.site.name("requests"), "request", properties, body);
    let told = direct.next_of(&queue, "foreign", LIMIT).expect("it is answered");
    println!("{told}");
    assert!(told.contains("ABORTED") && told.contains("invalid"), "{told}");
    assert!(told.contains("OrderPlaced, Shop.Api"), "{told}");
}
