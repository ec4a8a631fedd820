//! Workers that are frozen while others go on.

use std::time::Duration;

use dtc::protocol::message::Outcome;
use serde_json::json;
use tokio::time::Instant;

use super::{
    READY, System,
    ledger::{assert_none_called_again, assert_services_hold},
    load::{Load, Plan},
    proxy::Proxy,
    stream::Watch,
    until,
};
use crate::{broker::place, processes::LIMIT};

/// Its record is on its way when it is frozen, and reaches the journal only after the services have
/// asked another worker, which had to abort.
#[test]
fn a_worker_frozen_after_its_last_vote_obeys_the_decision_that_others_made() {
    let service = |name| json!({"name": name, "max_concurrency": 10});
    let system = System::new(place(), json!([service("payments"), service("stock")]));
    let flags = ["--inquire-after", "500ms"];
    let instances = ["payments", "stock"].map(|it| system.instance(it, it, &flags));
    let journal = Watch::journal(&system);
    let proxy = Proxy::start(&system);
    let frozen = system.worker_by(proxy.port, "frozen");

    proxy.hold_next_record();
    let timeout = Some(Duration::from_secs(5));
    let plan = Plan { services: &["payments", "stock"], total: 1, per_second: 100, timeout };
    let load = Load::start(&system, "t", plan);
    proxy.wait_for_record();
    frozen.stop();
    let stopped = Instant::now();
    assert_eq!(journal.decisions("t-0"), []);
    assert!(system.ledgers().iter().all(|ledger| ledger.prepared.len() == 1));

    let other = system.worker("other", &[]);
    until("another worker decides", || journal.decisions("t-0").len() == 1);
    until("the services abort", || system.ledgers().iter().all(|ledger| ledger.aborted.len() == 1));
    frozen.cont();
    proxy.let_go();
    let slept = stopped.elapsed();
    until("the other decision arrives", || journal.decisions("t-0").len() > 1);
    let results = load.results();

    let decisions = journal.decisions("t-0");
    let said = decisions.iter().map(|it| (it.worker.as_str(), it.outcome));
    let mut said: Vec<_> = said.collect();
    // After 5 s or longer, it considers its record lost, and proposes the same once more.
    said.dedup();
    println!("frozen for {slept:.1?}; in the journal: {said:?}; told: {:?}", results.counts());
    assert_eq!(said, [("other", Outcome::Aborted), ("frozen", Outcome::Committed)]);
    assert_eq!(results.0[0].answer.outcome, Outcome::Aborted);
    let more = Plan { total: 20, timeout: None, ..plan };
    let committed = Load::start(&system, "later", more).results().committed();
    assert_eq!(committed.len(), 20, "both workers go on");
    system.wait_until_nothing_is_prepared();
    let ledgers = system.ledgers();
    assert_services_hold(&ledgers, &committed);
    assert_none_called_again(&ledgers);
    drop((instances, other));
}

#[test]
fn others_finish_the_transactions_of_a_frozen_worker_and_it_continues_when_it_wakes() {
    let service = |name| {
        json!({"name": name, "max_concurrency": 100, "max_wait_ms": 20_000,
        "prepare": {"latency_ms": [20, 80]}, "commit": {"latency_ms": [20, 80]}})
    };
    let system = System::new(place(), json!([service("payments"), service("stock")]));
    let instances = ["payments", "stock"].map(|it| system.instance(it, it, &[]));
    let frozen = system.worker("frozen", &["--heartbeat", "1s"]);
    let other = system.worker("other", &[]);
    let timeout = Some(LIMIT);
    let plan = Plan { services: &["payments", "stock"], total: 400, per_second: 80, timeout };
    let load = Load::start(&system, "t", plan);
    load.wait_for(100);
    frozen.stop();
    let stopped = Instant::now();
    let results = load.results();
    let last = results.in_flight_at(stopped).last().copied();
    let lines = frozen.stderr.count();
    frozen.cont();
    let again = frozen.stderr.wait_for_from(lines, READY, LIMIT);
    assert!(again.is_some(), "it connects again");

    let more = Load::start(&system, "later", Plan { total: 100, ..plan }).results();
    system.wait_until_nothing_is_prepared();
    let committed = &results.committed() | &more.committed();
    println!(
        "frozen with the broker's patience of 2 to 3 s: what was in flight ended after {last:.1?}; \
         {:?}, and when it was awake {:?}",
        results.counts(),
        more.counts()
    );
    let ledgers = system.ledgers();
    assert_services_hold(&ledgers, &committed);
    assert_none_called_again(&ledgers);
    assert_eq!(committed.len(), 500);
    drop((instances, other));
}
