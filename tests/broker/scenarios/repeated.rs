//! The same id more than once.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::time::Duration;

use dtc::{Outcome, ReasonCode, Time, Transaction, TransactionResult, clock::Clock};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    system::{Served, Setup, run},
    watched::{Ending, Function, Gate, RecordedService},
};

fn now() -> Time {
    Clock::start().now()
}

fn order(id: &str, requested_at: Time, data: Value) -> Transaction {
    Transaction::new(id, ["a", "b"], data).requested_at(requested_at)
}

fn code(answer: &TransactionResult) -> Option<ReasonCode> {
    answer.reason.as_ref().map(|reason| reason.code)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_of_two_producers_is_executed_once_and_answered_twice() {
    const COUNT: usize = 50;
    let (a, b) = (RecordedService::willing(), RecordedService::willing());
    let services = [Served::new("a", 4, &a), Served::new("b", 4, &b)];
    let system = Setup::new(services).workers(2).start().await;
    let other = system.another_client();
    let mut taken = 0;
    for number in 0..COUNT {
        let transaction = order(&format!("t{number}"), now(), json!({ "number": number }));
        let (one, another) = tokio::join!(
            run(&system.client, transaction.clone()),
            run(&other, transaction.clone())
        );
        assert_eq!(one, another);
        assert_eq!(one.outcome, Outcome::Committed, "{one:?}");
        // And again, after its end.
        assert_eq!(run(&other, transaction).await, one);
        taken += 3;
    }
    other.close().await;
    let stats = system.stop().await;
    let shares: Vec<_> = stats.iter().map(|it| it.taken).collect();
    println!("{COUNT} transactions, requested 3 times each: the workers took {shares:?} requests");
    assert_eq!(shares.iter().sum::<u64>(), taken);
    for watched in [a, b] {
        let book = watched.book();
        println!(
            "{} prepares, {} commits",
            book.n_calls(Function::Prepare),
            book.n_calls(Function::Commit)
        );
        assert_eq!((book.committed.len(), book.calls.len()), (COUNT, 2 * COUNT));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_under_a_new_timestamp_within_the_window_gets_the_same_answer() {
    let (a, b) = (RecordedService::willing(), RecordedService::willing());
    let services = [Served::new("a", 4, &a), Served::new("b", 4, &b)];
    let system = Setup::new(services).workers(2).start().await;
    let first = run(&system.client, order("t", now() - Duration::from_secs(2), json!({}))).await;
    assert_eq!(first.outcome, Outcome::Committed);
    for _ in 0..4 {
        // With another timestamp, so the transaction's key doesn't show who gets the result.
        let again = run(&system.client, order("t", now(), json!({}))).await;
        assert_eq!((again.outcome, &again.reason), (Outcome::Committed, &None));
        println!("answered as decided at {:?}", again.decided_at.as_millis());
        assert_eq!(again.decided_at, first.decided_at);
    }
    system.stop().await;
    assert_eq!((a.book().calls.len(), b.book().calls.len()), (2, 2));
}

/// The window is short, and so is the clock margin, so that it is soon over.
#[tokio::test(flavor = "multi_thread")]
async fn after_the_window_the_journal_answers_and_another_requested_at_is_another_transaction() {
    const WINDOW: Duration = Duration::from_secs(1);
    let (a, b) = (RecordedService::willing(), RecordedService::willing());
    let services = [Served::new("a", 4, &a), Served::new("b", 4, &b)];
    let setup = Setup::new(services).workers(2).tune(|settings| {
        settings.coordinator.window = WINDOW;
        settings.coordinator.clock_margin = WINDOW;
    });
    let mut system = setup.start().await;
    let requested_at = now();
    let first = run(&system.client, order("t", requested_at, json!({}))).await;
    assert_eq!(first.outcome, Outcome::Committed);

    // Time passes, and each worker sees that by what it reads from the journal.
    tokio::time::sleep(4 * WINDOW).await;
    for number in 0..4 {
        let answer = system.run(&format!("later{number}"), &["a"], json!({})).await;
        assert_eq!(answer.outcome, Outcome::Committed, "{answer:?}");
    }
    let began = Instant::now();
    let again = run(&system.client, order("t", requested_at, json!({}))).await;
    println!("the same moment: the same answer from the journal, {:.1?}", began.elapsed());
    assert_eq!(again, first);
    assert_eq!(a.book().whats_of("t"), [Function::Prepare, Function::Commit]);

    // The workers have forgotten it, but the service that has executed it hasn't.
    let other = run(&system.client, order("t", now(), json!({}))).await;
    println!("another moment, the same instances: {} {:?}", other.outcome, code(&other));
    assert_eq!((other.outcome, code(&other)), (Outcome::Aborted, Some(ReasonCode::IdReused)));
    assert_eq!(a.book().whats_of("t"), [Function::Prepare, Function::Commit]);

    system.replace_instances().await;
    tokio::time::sleep(4 * WINDOW).await;
    for number in 0..4 {
        let answer = system.run(&format!("latest{number}"), &["a"], json!({})).await;
        assert_eq!(answer.outcome, Outcome::Committed, "{answer:?}");
    }
    let anew = run(&system.client, order("t", now(), json!({}))).await;
    println!("another moment, new instances: {} {:?}", anew.outcome, code(&anew));
    assert_eq!((anew.outcome, code(&anew)), (Outcome::Committed, None));
    assert_eq!(
        a.book().whats_of("t"),
        [Function::Prepare, Function::Commit, Function::Prepare, Function::Commit]
    );
    system.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_content_under_an_id_is_refused_and_leaves_the_first_alone() {
    let gate = Gate::shut();
    let waits = gate.clone();
    let a = RecordedService::new(move |asked| {
        let gate = waits.clone();
        async move {
            if asked.what == Function::Commit {
                gate.pass().await;
            }
            Ending::Done
        }
    });
    let b = RecordedService::willing();
    let services = [Served::new("a", 4, &a), Served::new("b", 4, &b)];
    let system = Setup::new(services).workers(2).start().await;
    let moment = now() - Duration::from_secs(2);
    let client = system.client.clone();
    let first = order("t", moment, json!({ "amount": 1 }));
    let first = tokio::spawn(async move { run(&client, first).await });
    a.until("the first is being committed", |book| book.n_calls(Function::Commit) == 1).await;

    let other = system.another_client();
    let mut refused = Vec::new();
    // Often enough that both workers are asked: the one that works on it, and the other.
    for moment in [moment, now(), moment, now()] {
        let answer = run(&other, order("t", moment, json!({ "amount": 2 }))).await;
        assert_eq!((answer.outcome, code(&answer)), (Outcome::Aborted, Some(ReasonCode::IdReused)));
        refused.push(answer.requested_at);
    }
    gate.open();
    let first = first.await.unwrap();
    assert_eq!((first.outcome, &first.reason), (Outcome::Committed, &None));
    for moment in [moment, now(), moment, now()] {
        let answer = run(&other, order("t", moment, json!({ "amount": 2 }))).await;
        assert_eq!((answer.outcome, code(&answer)), (Outcome::Aborted, Some(ReasonCode::IdReused)));
        refused.push(answer.requested_at);
    }
    println!("{} requests of other content were told id_reused", refused.len());
    other.close().await;
    let stats = system.stop().await;
    println!(
        "rejected by the workers: {:?}",
        stats.iter().map(|it| it.rejected).collect::<Vec<_>>()
    );
    for watched in [a, b] {
        assert_eq!(watched.book().whats_of("t"), [Function::Prepare, Function::Commit]);
    }
}

/// The first one at the journal, or at a service, decides which of the two is executed, if any.
#[tokio::test(flavor = "multi_thread")]
async fn two_producers_at_once_with_other_content_execute_one_of_them_at_most() {
    const COUNT: usize = 50;
    let (a, b) = (RecordedService::willing(), RecordedService::willing());
    let services = [Served::new("a", 4, &a), Served::new("b", 4, &b)];
    let system = Setup::new(services).workers(2).start().await;
    let other = system.another_client();
    let mut executed = 0;
    for number in 0..COUNT {
        // The same transaction by its key, and for every other one only the same id.
        let moments = [now() - Duration::from_secs((number % 2) as u64), now()];
        let id = format!("t{number}");
        let (one, another) = tokio::join!(
            run(&system.client, order(&id, moments[0], json!({ "amount": 1 }))),
            run(&other, order(&id, moments[1], json!({ "amount": 2 }))),
        );
        let answers = [one, another];
        let told = |outcome| answers.iter().filter(|it| it.outcome == outcome).count();
        let n_committed = told(Outcome::Committed);
        assert!(n_committed <= 1, "{answers:?}");
        for answer in answers.iter().filter(|it| it.outcome == Outcome::Aborted) {
            assert_eq!(code(answer), Some(ReasonCode::IdReused), "{answer:?}");
        }
        for watched in [&a, &b] {
            let book = watched.book();
            let held = book.committed.keys().filter(|key| key.id.as_str() == id).count();
            assert_eq!(held, n_committed, "{answers:?}");
        }
        executed += n_committed;
    }
    println!("of {COUNT} pairs {executed} had one that was executed, the others none");
    other.close().await;
    system.stop_whatever_happened().await;
    for watched in [a, b] {
        watched.book().assert_nothing_is_held();
    }
}

/// If both come to different workers, neither is known to be a retry of the other.
#[tokio::test(flavor = "multi_thread")]
async fn retry_under_a_new_timestamp_at_once_executes_one_of_them_at_most() {
    const COUNT: usize = 50;
    let (a, b) = (RecordedService::willing(), RecordedService::willing());
    let services = [Served::new("a", 4, &a), Served::new("b", 4, &b)];
    let system = Setup::new(services).workers(2).start().await;
    let other = system.another_client();
    let mut endings = std::collections::BTreeMap::<_, usize>::new();
    for number in 0..COUNT {
        let id = format!("t{number}");
        let earlier = now() - Duration::from_secs(1);
        let (one, another) = tokio::join!(
            run(&system.client, order(&id, earlier, json!({}))),
            run(&other, order(&id, now(), json!({}))),
        );
        *endings.entry([one.outcome.as_str(), another.outcome.as_str()]).or_default() += 1;
        let is_committed = [&one, &another].iter().any(|it| it.outcome == Outcome::Committed);
        for watched in [&a, &b] {
            let book = watched.book();
            let held = book.committed.keys().filter(|key| key.id.as_str() == id).count();
            assert_eq!(held, usize::from(is_committed), "{one:?} {another:?}");
        }
    }
    println!("{COUNT} pairs: {endings:?}");
    other.close().await;
    system.stop_whatever_happened().await;
    for watched in [a, b] {
        watched.book().assert_nothing_is_held();
    }
}
