//! Requests for services that don't exist.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use serde_json::Value;

use crate::{
    processes::LIMIT,
    stand::{BOTH, ProxiedPlace, ProxiedSystem, WITHIN},
};

/// Far fewer than a connection may have.
const CHANNELS_MAX: u16 = 256;

/// Nothing was requested of `stock` yet.
fn stand() -> ProxiedSystem {
    let site = ProxiedPlace::new();
    let services = BOTH.map(|name| site.service(name));
    let (worker, producer) = (site.worker(&[]), site.producer());
    let stand = ProxiedSystem::of(site, worker, services, producer);
    stand.commits(&["payments"]);
    stand
}

fn is_unknown(answer: &Value) {
    let end = (&answer["status"], &answer["reason"]["code"]);
    assert_eq!(end, (&Value::from("ABORTED"), &Value::from("unknown_service")), "{answer}");
}

#[test]
fn a_service_that_is_misspelt_for_ever_uses_up_no_channels() {
    let stand = stand();
    for number in 0..2100 {
        let id = stand.submit(&["paymnets"]);
        let limit = WITHIN;
        let Some(answer) = stand.answer(&id, limit) else {
            panic!("request {number} for a misspelt service is not answered within {limit:?}");
        };
        is_unknown(&answer);
    }
    let highest = stand.site.proxy.highest_channel("dtc worker w1");
    println!("the worker's highest channel: {highest}");
    stand.commits(&["payments"]);
    stand.commits(&["stock"]);
    assert!(highest < CHANNELS_MAX, "channel {highest} was opened");
    println!("the worker said {} lines", stand.worker.stderr.count());
}

#[test]
fn many_services_that_do_not_exist_are_all_unknown_and_fill_no_log() {
    const COUNT: usize = 2500;
    let stand = stand();
    let before = stand.worker.stderr.count();
    let ids: Vec<_> = (0..COUNT).map(|it| stand.submit(&[&format!("nope-{it}")])).collect();
    for id in &ids {
        let answer = stand.answer(id, LIMIT);
        let lines = stand.worker.stderr.count() - before;
        is_unknown(&answer.unwrap_or_else(|| panic!("{id} is not answered; {lines} lines")));
    }
    let lines = stand.worker.stderr.count() - before;
    println!("the worker said {lines} lines");
    assert!(lines < COUNT / 10, "the worker said {lines} lines");
    let highest = stand.site.proxy.highest_channel("dtc worker w1");
    assert!(highest < CHANNELS_MAX, "channel {highest} was opened");
    stand.commits(&BOTH);
}
