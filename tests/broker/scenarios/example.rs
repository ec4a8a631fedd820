//! The smallest system.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use dtc::{Outcome, Transaction};
use serde_json::json;
use tokio::time::Instant;

use crate::{
    system::{Served, Setup, run},
    watched::{Function, RecordedService},
};

#[tokio::test(flavor = "multi_thread")]
async fn two_transactions_over_two_services_commit() {
    let (a, b) = (RecordedService::willing(), RecordedService::willing());
    let services = [Served::new("ServiceA", 2, &a), Served::new("ServiceB", 1, &b)];
    let system = Setup::new(services).start().await;

    let began = Instant::now();
    let one = Transaction::new("TX1", ["ServiceA", "ServiceB"], json!({"amount": 100}));
    let two = Transaction::new("TX2", ["ServiceA"], json!({"amount": 50}));
    let (one, two) = tokio::join!(run(&system.client, one), run(&system.client, two));
    println!("both answered within {:.1?}", began.elapsed());

    for answer in [&one, &two] {
        assert_eq!(answer.outcome, Outcome::Committed, "{answer:?}");
        assert_eq!((&answer.reason, answer.unresolved.len()), (&None, 0), "{answer:?}");
    }
    let stats = system.stop().await;
    assert_eq!((stats[0].taken, stats[0].committed, stats[0].rejected), (2, 2, 0));
    for (watched, ids) in [(&a, &["TX1", "TX2"][..]), (&b, &["TX1"])] {
        let book = watched.book();
        for id in ids {
            assert_eq!(book.whats_of(id), [Function::Prepare, Function::Commit], "{id}");
        }
        assert_eq!((book.calls.len(), book.committed.len()), (2 * ids.len(), ids.len()));
    }
}
