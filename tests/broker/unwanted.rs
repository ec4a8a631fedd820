//! A producer whose results queue takes no results, and never will.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use dtc::clock::Clock;
use lapin::BasicProperties;
use serde_json::json;
use tokio::time::Instant;

use crate::{
    proxy::{Action, Frames, Scope},
    stand::{BOTH, ProxiedSystem, WITHIN},
};

const COUNT: u64 = 20;

#[test]
fn results_that_are_always_refused_are_given_up_and_delay_no_others() {
    let stand = ProxiedSystem::new();
    let direct = &stand.site.direct;
    let (requests, results) = (stand.site.name("requests"), stand.site.name("results"));
    direct.full_queue("full", &results, "tk.*");
    let proxy = &stand.site.proxy;
    let acknowledged =
        proxy.rule(Frames::acks().on("dtc worker w1").about(&requests), Scope::All, Action::Count);
    let published = proxy.rule(
        Frames::publishes().on("dtc worker w1").about(&format!("{results}/tk.")),
        Scope::All,
        Action::Count,
    );
    let now = Clock::start().now().as_millis() / 1000;
    let request = |number: u64| {
        let properties = BasicProperties::default()
            .with_type("dtc.request.v1".into())
            .with_timestamp(now)
            .with_delivery_mode(2);
        let body = json!({"id": format!("unwanted-{number}"), "involved_services": BOTH,
            "data": {}, "reply": "tk"});
        direct.publish(&requests, "request", properties, &body.to_string());
    };
    request(0);
    assert!(
        acknowledged.has_come(1, WITHIN),
        "the request is in hand, {} publishes later",
        published.count()
    );
    println!("{} publishes for one result that is refused", published.count());
    assert!(published.count() <= 30, "{} publishes for one result", published.count());

    // Many of them, and others beside them.
    let alone = took(&stand);
    let before = published.count();
    (1..=COUNT).for_each(request);
    // Results share messages, so there may be fewer messages than results.
    published.wait_for(before + 1);
    let beside = took(&stand);
    println!(
        "{COUNT} transactions took {alone:.1?} alone, and {beside:.1?} beside {COUNT} refused"
    );
    assert!(beside < alone * 3 + std::time::Duration::from_secs(1), "{alone:?} {beside:?}");
    stand.site.is_committed_once("unwanted-0", &BOTH);

    // The producer makes room, and requests the same again.
    direct.delete_queue("full");
    direct.open_queue("roomy", &results, "tk.*");
    request(0);
    let answer = direct.next_of("roomy", "unwanted-0", WITHIN).expect("it is answered");
    assert!(answer.contains("COMMITTED"), "{answer}");
    stand.site.is_committed_once("unwanted-0", &BOTH);
}

fn took(stand: &ProxiedSystem) -> std::time::Duration {
    let began = Instant::now();
    for _ in 0..COUNT {
        stand.commits(&BOTH);
    }
    began.elapsed()
}
