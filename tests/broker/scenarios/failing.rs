//! Services that are missing, refuse, fail, hang, or can't commit.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::time::Duration;

use dtc::{Outcome, ReasonCode, Transaction};
use serde_json::json;
use tokio::time::Instant;

use crate::{
    system::{Served, Setup, run},
    watched::{Ended, Ending, Function, Gate, RecordedService},
};

/// A service whose prepares end like this.
fn preparing(ending: Ending) -> RecordedService {
    RecordedService::new(move |asked| {
        std::future::ready(if asked.what == Function::Prepare { ending } else { Ending::Done })
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_service_calls_no_one() {
    let (before, after) = (RecordedService::willing(), RecordedService::willing());
    let services = [Served::new("before", 1, &before), Served::new("zafter", 1, &after)];
    let system = Setup::new(services).start().await;
    for number in 0..2 {
        let began = Instant::now();
        let id = format!("t{number}");
        let answer = system.run(&id, &["before", "nowhere", "zafter"], json!({})).await;
        println!("told after {:.1?}: {:?}", began.elapsed(), answer.reason);
        let reason = answer.reason.expect("a reason");
        assert_eq!((answer.outcome, reason.code), (Outcome::Aborted, ReasonCode::UnknownService));
        assert_eq!(reason.service.unwrap().as_str(), "nowhere");
    }
    system.stop().await;
    assert_eq!((before.book().calls.len(), after.book().calls.len()), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_unknown_services_at_once_delay_no_other_transaction() {
    const COUNT: usize = 500;
    let a = RecordedService::willing();
    let system = Setup::new([Served::new("a", 4, &a)]).workers(2).start().await;
    let began = Instant::now();
    let transactions = (0..2 * COUNT).map(|number| {
        let service = if number % 2 == 0 { "a".to_owned() } else { format!("nowhere{number}") };
        Transaction::new(format!("t{number}"), [service], json!({}))
    });
    let answers = system.run_all(transactions.collect()).await;
    println!("{COUNT} known and {COUNT} unknown ones answered in {:.1?}", began.elapsed());
    for (number, answer) in answers.iter().enumerate() {
        let code = answer.reason.as_ref().map(|reason| reason.code);
        let expected = (number % 2 != 0).then_some(ReasonCode::UnknownService);
        assert_eq!(code, expected, "{answer:?}");
    }
    system.stop().await;
    assert_eq!(a.book().committed.len(), COUNT);
}

/// A publish to a missing exchange closes its channel.
#[tokio::test(flavor = "multi_thread")]
async fn worker_continues_when_a_deleted_exchange_is_declared_again() {
    let a = RecordedService::willing();
    let system = Setup::new([Served::new("a", 1, &a)]).start().await;
    assert_eq!(system.run("before", &["a"], json!({})).await.outcome, Outcome::Committed);
    system.raw.delete_exchange(&system.names.prepare()).await;
    let client = system.client.clone();
    let answer = Transaction::new("t", ["a"], json!({}));
    let answer = tokio::spawn(async move { run(&client, answer).await });
    // It gives up its link, and reconnects.
    system.raw.until(&system.names.requests(), |(_, consumers)| consumers == 0).await;
    system.apply_topology().await;
    let answer = answer.await.unwrap();
    assert_eq!(answer.outcome, Outcome::Committed, "{answer:?}");
    let stats = system.stop_whatever_happened().await;
    println!("{} links were lost meanwhile", stats[0].lost);
    assert!(stats[0].lost > 0);
    assert_eq!(a.book().whats_of("t"), [Function::Prepare, Function::Commit]);
    a.book().assert_nothing_is_held();
}

#[tokio::test(flavor = "multi_thread")]
async fn refusal_aborts_what_is_prepared_and_calls_no_other_service() {
    let (a, b, c) =
        (RecordedService::willing(), preparing(Ending::Refused), RecordedService::willing());
    // One slot each, so that they are asked one after the other.
    let services =
        [("a", &a), ("b", &b), ("c", &c)].map(|(name, watched)| Served::new(name, 1, watched));
    let system = Setup::new(services).start().await;
    let answer = system.run("t", &["a", "b", "c"], json!({})).await;
    println!("{}: {:?}", answer.outcome, answer.reason);
    let reason = answer.reason.expect("a reason");
    assert_eq!((answer.outcome, reason.code), (Outcome::Aborted, ReasonCode::Refused));
    assert_eq!(reason.service.unwrap().as_str(), "b");
    system.stop().await;
    assert_eq!(a.book().whats_of("t"), [Function::Prepare, Function::Abort]);
    assert_eq!(b.book().whats_of("t"), [Function::Prepare]);
    assert_eq!(c.book().whats_of("t"), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn prepare_that_panics_has_failed_and_is_undone_once() {
    let (a, b) = (RecordedService::willing(), preparing(Ending::Panic));
    let services = [Served::new("a", 1, &a), Served::new("b", 1, &b)];
    let system = Setup::new(services).start().await;
    let answer = system.run("t", &["a", "b"], json!({})).await;
    println!("{}: {:?}", answer.outcome, answer.reason);
    assert_eq!(answer.reason.expect("a reason").code, ReasonCode::Failed);
    // The slot that the panic had is free again.
    let answer = system.run("t2", &["b"], json!({})).await;
    assert_eq!(answer.reason.expect("a reason").code, ReasonCode::Failed);
    system.stop().await;
    assert_eq!(a.book().whats_of("t"), [Function::Prepare, Function::Abort]);
    assert_eq!(b.book().whats_of("t"), [Function::Prepare, Function::Abort]);
}

#[tokio::test(flavor = "multi_thread")]
async fn prepare_that_hangs_ends_at_its_deadline_and_is_undone_once() {
    let a = RecordedService::willing();
    let b = RecordedService::new(|asked| async move {
        if asked.what == Function::Prepare {
            std::future::pending::<()>().await;
        }
        Ending::Done
    });
    let services = [Served::new("a", 1, &a), Served::new("b", 1, &b)];
    let system = Setup::new(services).start().await;
    let began = Instant::now();
    let transaction = Transaction::new("t", ["a", "b"], json!({})).timeout(Duration::from_secs(5));
    let answer = run(&system.client, transaction).await;
    println!("{} after {:.1?}: {:?}", answer.outcome, began.elapsed(), answer.reason);
    let code = answer.reason.expect("a reason").code;
    assert!(matches!(code, ReasonCode::Failed | ReasonCode::Deadline), "{code}");
    system.stop().await;
    assert_eq!(a.book().whats_of("t"), [Function::Prepare, Function::Abort]);
    assert_eq!(b.book().whats_of("t"), [Function::Prepare, Function::Abort]);
    assert_eq!(b.book().calls[0].ended.unwrap().1, Ended::Dropped);
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_that_fails_twice_and_then_succeeds_is_committed() {
    let a = RecordedService::willing();
    let b = RecordedService::new(|asked| {
        let fails = asked.what == Function::Commit && asked.attempt <= 2;
        std::future::ready(if fails { Ending::Error } else { Ending::Done })
    });
    let services = [Served::new("a", 1, &a), Served::new("b", 1, &b)];
    let system = Setup::new(services).start().await;
    let began = Instant::now();
    let answer = system.run("t", &["a", "b"], json!({})).await;
    println!("{} after {:.1?}: {:?}", answer.outcome, began.elapsed(), answer.unresolved);
    assert_eq!((answer.outcome, answer.unresolved.len()), (Outcome::Committed, 0));
    let stats = system.stop().await;
    assert_eq!(stats[0].parked, 0);
    assert_eq!(a.book().whats_of("t"), [Function::Prepare, Function::Commit]);
    assert_eq!(
        b.book().whats_of("t"),
        [Function::Prepare, Function::Commit, Function::Commit, Function::Commit]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn commit_that_fails_for_good_is_parked_and_settled_when_the_service_recovers() {
    let (a, c) = (RecordedService::willing(), RecordedService::willing());
    let recovered = Gate::shut();
    let has_recovered = recovered.clone();
    let others = [a.clone(), c.clone()];
    let b = RecordedService::new(move |asked| {
        let fails = asked.what == Function::Commit && !has_recovered.is_open();
        let others = if asked.attempt == 2 { others.to_vec() } else { vec![] };
        async move {
            // If this failure delayed them, the test would wait for ever.
            for other in others {
                other.until("it has committed", |book| book.committed.len() == 1).await;
            }
            if fails { Ending::Error } else { Ending::Done }
        }
    });
    let services =
        [("a", &a), ("b", &b), ("c", &c)].map(|(name, watched)| Served::new(name, 2, watched));
    let system = Setup::new(services).start().await;
    let mut unresolved = system.raw.read(&system.names.unresolved()).await;

    let began = Instant::now();
    let answer = system.run("t", &["a", "b", "c"], json!({})).await;
    println!(
        "{} after {:.1?}, unresolved: {:?}",
        answer.outcome,
        began.elapsed(),
        answer.unresolved
    );
    assert_eq!(answer.outcome, Outcome::Committed);
    let named: Vec<_> = answer.unresolved.iter().map(|service| service.as_str()).collect();
    assert_eq!(named, ["b"]);
    for watched in [&a, &c] {
        assert_eq!(watched.book().whats_of("t"), [Function::Prepare, Function::Commit]);
    }
    // The first try, and three more.
    let before_parked = b.book().whats_of("t").len();
    assert!(before_parked >= 5, "{:?}", b.book().whats_of("t"));
    let parked = unresolved.items("dtc.parked.v1").await;
    assert_eq!((parked.len(), &parked[0]["id"]), (1, &json!("t")));
    assert_eq!(
        (&parked[0]["service"], &parked[0]["error"]),
        (&json!("b"), &json!("as the script says"))
    );

    // The parked commit keeps its slot, and keeps nobody else from theirs.
    let other = system.run("t2", &["a", "c"], json!({})).await;
    assert_eq!(other.outcome, Outcome::Committed);

    recovered.open();
    let began = Instant::now();
    let settled = unresolved.items("dtc.settled.v1").await;
    println!("settled {:.1?} after the service recovered: {settled:?}", began.elapsed());
    assert_eq!((&settled[0]["id"], &settled[0]["service"]), (&json!("t"), &json!("b")));
    let stats = system.stop().await;
    assert_eq!((stats[0].parked, stats[0].committed), (1, 2));
    let book = b.book();
    assert_eq!(book.committed.len(), 1);
    println!("b's commit was called {} times", book.n_calls(Function::Commit));
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only_service_gets_no_commit() {
    let (a, b) = (RecordedService::willing(), preparing(Ending::ReadOnly));
    let services = [Served::new("a", 1, &a), Served::new("b", 1, &b)];
    let system = Setup::new(services).start().await;
    for number in 0..3 {
        let answer = system.run(&format!("t{number}"), &["a", "b"], json!({})).await;
        assert_eq!(answer.outcome, Outcome::Committed, "{answer:?}");
    }
    let answer = system.run("alone", &["b"], json!({})).await;
    assert_eq!(answer.outcome, Outcome::Committed, "{answer:?}");
    system.stop().await;
    println!("read only: {} calls, all prepares", b.book().calls.len());
    assert_eq!((a.book().calls.len(), b.book().calls.len()), (6, 4));
    assert_eq!(b.book().n_calls(Function::Prepare), 4);
}
