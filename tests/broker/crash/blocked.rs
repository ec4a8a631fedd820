//! A broker that runs out of memory, and recovers.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use super::{
    System,
    ledger::{assert_none_called_again, assert_services_hold},
    load::{Load, Plan},
};
use crate::{broker::Broker, processes::LIMIT};

/// More than can be completed before `rabbitmqctl` has started on a busy machine.
const TRANSACTIONS: usize = 1200;

#[test]
fn during_an_alarm_everything_waits_and_nothing_fails() {
    let broker = Broker::start();
    let service = |name| {
        json!({"name": name, "max_concurrency": 50, "max_wait_ms": 60_000,
        "prepare": {"latency_ms": [10, 50]}, "commit": {"latency_ms": [10, 50]}})
    };
    let system = System::new(broker.place(), json!([service("payments"), service("stock")]));
    let instances = ["payments", "stock"].map(|it| system.instance(it, it, &[]));
    let worker = system.worker("w1", &[]);
    let timeout = Some(Duration::from_secs(120));
    let plan =
        Plan { services: &["payments", "stock"], total: TRANSACTIONS, per_second: 60, timeout };
    let load = Load::start(&system, "t", plan);
    load.wait_for(60);
    broker.control(&["set_vm_memory_high_watermark", "0.00001"]);
    let blocked = Instant::now();
    println!("{}", worker.wait_for_line("the broker takes no messages for now", LIMIT));
    // Earlier publishes are answered, and then everything waits.
    worker.wait_for_line("the broker takes no messages yet", LIMIT);
    let stalled = load.in_flight();
    broker.control(&["set_vm_memory_high_watermark", "0.6"]);
    worker.wait_for_line("the broker takes messages again", LIMIT);
    let waited = blocked.elapsed();
    let results = load.results();
    system.wait_until_nothing_is_prepared();
    println!("blocked for {waited:.1?}, with {stalled} in flight; {:?}", results.counts());
    assert!(stalled > 0, "it was blocked under load");
    let ledgers = system.ledgers();
    assert_services_hold(&ledgers, &results.committed());
    assert_none_called_again(&ledgers);
    assert_eq!(results.committed().len(), TRANSACTIONS, "{:?}", results.counts());
    drop((instances, worker));
}
