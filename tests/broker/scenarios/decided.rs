//! Results that come when a transaction is decided.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use dtc::{AnswerAt, Outcome, Transaction};
use serde_json::json;

use crate::{
    system::{Served, Setup, run},
    watched::{Ending, Function, Gate, RecordedService},
};

/// A service whose commits wait at the gate.
fn held_at(gate: &Gate) -> RecordedService {
    let gate = gate.clone();
    RecordedService::new(move |asked| {
        let gate = gate.clone();
        async move {
            if asked.what == Function::Commit {
                gate.pass().await;
            }
            Ending::Done
        }
    })
}

fn order(id: &str, answer_at: AnswerAt) -> Transaction {
    Transaction::new(id, ["a", "b"], json!({})).answer_at(answer_at)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_at_the_decision_does_not_wait_for_a_service_that_commits() {
    let gate = Gate::shut();
    let (a, b) = (RecordedService::willing(), held_at(&gate));
    let system = Setup::new([Served::new("a", 4, &a), Served::new("b", 4, &b)]).start().await;
    // The other one waits.
    let (client, later) = (system.client.clone(), order("later", AnswerAt::Applied));
    let later = tokio::spawn(async move { run(&client, later).await });
    let early = run(&system.client, order("early", AnswerAt::Decided)).await;
    assert_eq!((early.outcome, &*early.unresolved), (Outcome::Committed, &[][..]));
    assert!(b.book().committed.is_empty() && !later.is_finished());
    gate.open();
    assert_eq!(later.await.unwrap().outcome, Outcome::Committed);
    system.stop().await;
    assert_eq!(b.book().committed.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_abort_is_answered_at_the_decision_whatever_was_asked_for() {
    let a = RecordedService::new(|_| async { Ending::Refused });
    let b = RecordedService::willing();
    let system = Setup::new([Served::new("a", 4, &a), Served::new("b", 4, &b)]).start().await;
    for answer_at in [AnswerAt::Applied, AnswerAt::Decided] {
        let result = run(&system.client, order(answer_at.as_str(), answer_at)).await;
        assert_eq!(result.outcome, Outcome::Aborted);
    }
    system.stop().await;
}
