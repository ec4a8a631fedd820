//! Workers that get a signal to stop.

use std::time::Duration;

use dtc::protocol::message::{Outcome, ReasonCode};
use serde_json::json;
use tokio::time::Instant;

use super::{
    System,
    ledger::{assert_none_called_again, assert_services_hold},
    load::{Load, Plan},
    stream::delete,
    until,
};
use crate::{broker::place, processes::LIMIT};

#[test]
fn a_worker_told_to_stop_under_load_finishes_what_it_has_begun() {
    let service = |name| {
        json!({"name": name, "max_concurrency": 100, "max_wait_ms": 60_000,
        "prepare": {"latency_ms": [50, 200]}, "commit": {"latency_ms": [50, 200]}})
    };
    let system = System::new(place(), json!([service("payments"), service("stock")]));
    let instances = ["payments", "stock"].map(|it| system.instance(it, it, &[]));
    let mut leaving = system.worker("leaving", &["--drain", "60s"]);
    let staying = system.worker("staying", &[]);

    let timeout = Some(LIMIT);
    let plan = Plan { services: &["payments", "stock"], total: 500, per_second: 80, timeout };
    let load = Load::start(&system, "t", plan);
    load.wait_for(150);
    leaving.terminate();
    let told = Instant::now();
    let draining = leaving.wait_for_line("draining", LIMIT);
    assert!(!load.has_ended(), "it stops under load");
    leaving.exited(0, LIMIT);
    let took = told.elapsed();
    assert!(leaving.stderr.text().contains("drained: no request is left"));

    let results = load.results();
    system.wait_until_nothing_is_prepared();
    let in_flight = draining.rsplit_once("in_flight=").map_or("?", |(_, number)| number);
    println!("drained {in_flight} in {took:.1?}; {:?}", results.counts());
    assert_eq!(results.committed().len(), 500, "{:?}", results.counts());
    let ledgers = system.ledgers();
    assert_services_hold(&ledgers, &results.committed());
    assert_none_called_again(&ledgers);
    drop((instances, staying));
}

/// A transaction whose prepare never ends.
fn hanging() -> (System, Plan) {
    let hangs = json!({"name": "payments", "max_concurrency": 3, "prepare": {"hang_rate": 1}});
    let system = System::new(place(), json!([hangs]));
    let timeout = Some(Duration::from_secs(10));
    let plan = Plan { services: &["payments"], total: 1, per_second: 100, timeout };
    (system, plan)
}

#[test]
fn a_worker_told_to_stop_twice_stops_at_once_and_others_finish_its_transaction() {
    let (system, plan) = hanging();
    let instance = system.instance("payments", "payments", &[]);
    let mut leaving = system.worker("leaving", &["--drain", "1h"]);
    let load = Load::start(&system, "t", plan);
    until("the prepare hangs", || system.ledger("payments").started("prepare") == 1);
    leaving.terminate();
    leaving.wait_for_line("draining", LIMIT);
    leaving.terminate();
    let told = Instant::now();
    leaving.exited(130, LIMIT);
    println!("stopped {:.1?} after the second signal", told.elapsed());
    ends_with_another_worker(&system, load);
    drop(instance);
}

#[test]
fn a_worker_whose_drain_times_out_returns_the_rest() {
    let (system, plan) = hanging();
    let instance = system.instance("payments", "payments", &[]);
    let mut leaving = system.worker("leaving", &["--drain", "500ms"]);
    let load = Load::start(&system, "t", plan);
    until("the prepare hangs", || system.ledger("payments").started("prepare") == 1);
    leaving.terminate();
    let told = Instant::now();
    leaving.exited(0, LIMIT);
    println!("stopped after {:.1?}", told.elapsed());
    assert!(leaving.stderr.text().contains("the time to drain is over"));
    ends_with_another_worker(&system, load);
    drop(instance);
}

#[track_caller]
fn ends_with_another_worker(system: &System, load: Load<'_>) {
    assert!(!load.has_ended());
    let worker = system.worker("other", &[]);
    let results = load.results();
    let answer = &results.0[0].answer;
    let code = answer.reason.as_ref().map(|it| it.code);
    println!("then told {} because of {code:?}", answer.outcome);
    assert_eq!(answer.outcome, Outcome::Aborted);
    assert!(matches!(code, Some(ReasonCode::Deadline | ReasonCode::Failed)), "{code:?}");
    system.wait_until_nothing_is_prepared();
    let ledgers = system.ledgers();
    assert_services_hold(&ledgers, &results.committed());
    assert_eq!(ledgers[0].started("prepare"), 1);
    drop(worker);
}

/// It waits for the journal to come back, but not after a signal to stop.
#[test]
fn a_worker_without_a_journal_stops_when_it_is_told_to() {
    let system = System::new(place(), json!([{"name": "payments", "max_concurrency": 2}]));
    let instance = system.instance("payments", "payments", &[]);
    let mut worker = system.worker("w1", &[]);
    delete(&system, system.names.journal());
    // If the broker doesn't report that the journal is gone, a missing read-back shows it.
    let plan = Plan { services: &["payments"], total: 1, per_second: 1, timeout: None };
    let _load = Load::start(&system, "t", plan);
    worker.wait_for_line("the broker has ended the journal's consumer", LIMIT);
    worker.terminate();
    worker.exited(0, LIMIT);
    assert!(worker.stderr.text().contains("stopping while the journal is gone"));
    drop(instance);
}
