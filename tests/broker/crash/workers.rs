//! Workers that are killed.

use serde_json::json;
use tokio::time::Instant;

use super::{
    System,
    ledger::{assert_cap_holds, assert_none_called_again, assert_services_hold},
    load::{Load, Plan, percentile},
};
use crate::{broker::place, processes::LIMIT};

#[test]
fn a_worker_is_killed_under_load_and_the_others_finish_what_it_had() {
    let cap = 40;
    let slow = |name| {
        json!({"name": name, "max_concurrency": cap, "max_wait_ms": 20_000,
        "prepare": {"latency_ms": [20, 80]}, "commit": {"latency_ms": [20, 80]}})
    };
    let system = System::new(place(), json!([slow("payments"), slow("stock")]));
    let instances = ["payments", "stock"].map(|service| {
        ["a", "b"].map(|label| system.instance(service, &format!("{service}-{label}"), &[]))
    });
    let mut workers = ["w1", "w2", "w3"].map(|name| system.worker(name, &[]));

    let services = &["payments", "stock"];
    let plan = Plan { services, total: 900, per_second: 100, timeout: Some(LIMIT) };
    let load = Load::start(&system, "t", plan);
    load.wait_for(300);
    workers[0].kill9();
    let killed = Instant::now();
    assert!(!load.has_ended(), "the worker is killed under load");
    let results = load.results();
    system.wait_until_nothing_is_prepared();

    let after = results.in_flight_at(killed);
    let (half, p99) = (percentile(&after, 50), percentile(&after, 99));
    println!(
        "one of 3 workers killed: {} in flight, ended after: median {half:.1?}, p99 {p99:.1?}",
        after.len()
    );
    let ledgers = system.ledgers();
    let most = assert_cap_holds(&ledgers, cap);
    println!("results {:?}; at most {most} of {cap} slots of an instance in use", results.counts());
    assert_services_hold(&ledgers, &results.committed());
    assert_none_called_again(&ledgers);
    assert!(after.len() >= 3, "something is in flight at any moment");
    // Without a takeover, a transaction would wait for its deadline.
    assert!(p99 < LIMIT / 2, "{p99:?}");
    assert_eq!(results.committed().len(), 900, "{:?}", results.counts());
    drop(instances);
}
