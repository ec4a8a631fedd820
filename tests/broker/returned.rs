//! Returned messages, among others that are not returned.
//!
//! The proxy delays the worker's confirms and combines many in one frame, as a broker may at any
//! time: then the worker must find out which message was returned.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::collections::BTreeMap;

use lapin::BasicProperties;
use serde_json::json;

use crate::{
    broker::place,
    processes::LIMIT,
    proxy::{Action, Frames, Scope},
    stand::{ProxiedPlace, ProxiedSystem},
};

const PUBLISH: &str = "dtc worker w1 (publish)";

fn site() -> ProxiedPlace {
    // A mistake about `payments` would show before it votes.
    let payments = json!({"name": "payments", "max_concurrency": 60, "max_wait_ms": 10_000,
        "prepare": {"latency_ms": [300, 300]}});
    let stock = json!({"name": "stock", "max_concurrency": 60, "max_wait_ms": 10_000});
    let site = ProxiedPlace::of(place(), json!([payments, stock]));
    site.proxy.rule(Frames::confirms().on(PUBLISH), Scope::All, Action::Gather);
    site
}

#[test]
fn only_the_service_whose_queue_is_gone_is_unknown() {
    const COUNT: usize = 60;
    let stand = ProxiedSystem::at(site(), &[]);
    let of = |services: &[&str]| stand.submit(services);
    let warm: Vec<_> = (0..COUNT).flat_map(|_| [of(&["payments"]), of(&["stock"])]).collect();
    warm.iter().for_each(|id| drop(stand.answered(id, LIMIT)));

    // The worker believes that `stock` exists, with free slots.
    stand.site.direct.delete_queue(&stand.site.name("prepare.stock"));
    let ids: Vec<_> = (0..COUNT).map(|_| (of(&["payments"]), of(&["stock"]))).collect();
    let mut ends: BTreeMap<(&str, String), usize> = BTreeMap::new();
    for (payments, stock) in &ids {
        for (service, id) in [("payments", payments), ("stock", stock)] {
            let answer = stand.answered(id, LIMIT);
            let end = format!("{} {}", answer["status"], answer["reason"]["code"]);
            *ends.entry((service, end)).or_default() += 1;
        }
    }
    println!("{ends:#?}");
    let committed = ends.get(&("payments", r#""COMMITTED" null"#.to_owned()));
    assert_eq!(committed, Some(&COUNT), "{ends:#?}");
    let unknown = ends.get(&("stock", r#""ABORTED" "unknown_service""#.to_owned()));
    assert_eq!(unknown, Some(&COUNT), "{ends:#?}");
}

#[test]
fn a_rejected_request_is_stored_once_even_if_nobody_takes_its_result() {
    const COUNT: usize = 500;
    let site = site();
    for number in 0..COUNT {
        // Without a timestamp.
        let properties = BasicProperties::default().with_type("dtc.request.v1".into());
        let body = json!({"id": format!("bad-{number}"), "involved_services": ["a"], "data": {}});
        site.direct.publish(&site.name("requests"), "request", properties, &body.to_string());
    }
    let mut worker = site.worker(&[]);
    site.direct.until_holds(&site.name("rejected"), COUNT);
    worker.terminate();
    worker.exited(0, LIMIT);
    let mut times: BTreeMap<String, usize> = BTreeMap::new();
    for body in site.direct.take_all(&site.name("rejected")) {
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        *times.entry(body["id"].to_string()).or_default() += 1;
    }
    let more_than_once: Vec<_> = times.iter().filter(|(_, times)| **times > 1).collect();
    assert_eq!((times.len(), more_than_once), (COUNT, vec![]));
    let said = worker.stderr.text();
    assert!(!said.contains("ERROR"), "{said}");
}
