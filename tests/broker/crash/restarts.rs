//! A broker that is restarted under load.

use serde_json::json;
use tokio::time::Instant;

use super::{
    System,
    ledger::assert_services_hold,
    load::{Load, Plan, percentile},
};
use crate::broker::Broker;

#[test]
fn the_broker_is_restarted_under_load_and_nothing_is_lost() {
    survives(Broker::terminate);
}

#[test]
fn the_broker_is_killed_under_load_and_nothing_is_lost() {
    survives(Broker::kill);
}

#[track_caller]
fn survives(end: fn(&Broker)) {
    let broker = Broker::start();
    let service = |name| {
        json!({"name": name, "max_concurrency": 50, "max_wait_ms": 20_000,
        "prepare": {"latency_ms": [10, 50]}, "commit": {"latency_ms": [10, 50]}})
    };
    let system = System::new(broker.place(), json!([service("payments"), service("stock")]));
    let names = &system.names;
    let of_services = ["payments", "stock"].map(|it| names.finish_any_of(&it.parse().unwrap()));
    let quorum_queues = [names.requests(), names.inquiries(), names.rejected()];
    let quorum_queues: Vec<_> = quorum_queues.iter().chain(&of_services).collect();
    broker.until_kept(&quorum_queues.iter().map(|it| it.as_str()).collect::<Vec<_>>());
    let instances = ["payments", "stock"].map(|service| {
        ["a", "b"].map(|label| system.instance(service, &format!("{service}-{label}"), &[]))
    });
    let workers = ["w1", "w2"].map(|name| system.worker(name, &[]));

    let plan = Plan { services: &["payments", "stock"], total: 600, per_second: 60, timeout: None };
    let load = Load::start(&system, "t", plan);
    load.wait_for(100);
    end(&broker);
    let gone = Instant::now();
    assert!(!load.has_ended(), "the broker goes under load");
    broker.start_again();
    let back = Instant::now();
    let results = load.results();
    system.wait_until_nothing_is_prepared();

    let after = results.in_flight_at(back);
    let (p50, p99) = (percentile(&after, 50), percentile(&after, 99));
    println!(
        "gone for {:.1?}; {} in flight when it was back ended after: median {p50:.1?}, \
        p99 {p99:.1?}; {:?}",
        back - gone,
        after.len(),
        results.counts()
    );
    let ledgers = system.ledgers();
    assert_services_hold(&ledgers, &results.committed());
    // Processes that are cut off together may get an outcome together; that is idempotent, and
    // should be rare.
    let again: usize = ledgers.iter().map(|ledger| ledger.called_again().len()).sum();
    println!("called again after an answer: {again} transactions");
    assert!(results.committed().len() > 300, "{:?}", results.counts());
    drop((instances, workers));
}
