//! A result that came when the transaction was decided, and processes that die before it is applied.

use std::time::Duration;

use dtc::{AnswerAt, Transaction};
use serde_json::json;
use tokio::time::Instant;

use super::{PATIENCE, System, ledger::assert_services_hold};
use crate::broker::place;

/// How long a commit takes: longer than it takes to kill two processes.
const COMMIT: Duration = Duration::from_secs(3);

#[test]
fn a_commit_answered_at_the_decision_is_applied_though_worker_and_instance_die_before() {
    let slow = json!({"name": "payments", "max_concurrency": 3,
        "commit": {"latency_ms": COMMIT.as_millis() as u64}});
    let system = System::new(place(), json!([slow]));
    let mut instance = system.instance("payments", "one", &[]);
    let mut worker = system.worker("w1", &[]);
    let client = system.client();
    let order = Transaction::new("t", ["payments"], json!({})).answer_at(AnswerAt::Decided);
    let result = system.runtime.block_on(client.submit_and_wait(order, PATIENCE)).unwrap();
    assert!(result.is_committed(), "{result:?}");
    worker.kill9();
    instance.kill9();
    assert!(system.ledger("payments").committed.is_empty(), "it takes {COMMIT:?}");

    let began = Instant::now();
    let _worker = system.worker("w2", &[]);
    let _instance = system.instance("payments", "two", &[]);
    system.wait_until_nothing_is_prepared();
    println!("committed {:.1?} after the restart", began.elapsed());
    assert_services_hold(&system.ledgers(), &["t".to_owned()].into());
}
