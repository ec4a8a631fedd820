//! A service without a free slot.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::time::Duration;

use dtc::{Outcome, ReasonCode, Transaction};
use serde_json::json;
use tokio::time::Instant;

use crate::{
    system::{Served, Setup, System, figures, run},
    watched::{Ending, Function, Gate, LIMIT, RecordedService},
};

/// A service whose commit of `holder` waits at the gate.
fn held_at(gate: &Gate) -> RecordedService {
    let gate = gate.clone();
    RecordedService::new(move |asked| {
        let gate = gate.clone();
        async move {
            if asked.id == "holder" && asked.what == Function::Commit {
                gate.pass().await;
            }
            Ending::Done
        }
    })
}

/// `open` has many slots, and the only one of `tight` is taken until the gate opens.
struct Full {
    system: System,
    gate: Gate,
    open: RecordedService,
    tight: RecordedService,
    holder: tokio::task::JoinHandle<Outcome>,
}

async fn full(max_wait: Duration) -> Full {
    let gate = Gate::shut();
    let (open, tight) = (RecordedService::willing(), held_at(&gate));
    let mut full = Served::new("tight", 1, &tight);
    full.max_wait = max_wait;
    // By its name, it is asked first of those that may be contended.
    let services = [Served::new("open", 10, &open), full];
    let system = Setup::new(services).alone().start().await;
    let client = system.client.clone();
    let holder = Transaction::new("holder", ["tight"], json!({}));
    let holder = tokio::spawn(async move { run(&client, holder).await.outcome });
    tight.until("the holder commits", |book| book.n_calls(Function::Commit) == 1).await;
    Full { system, gate, open, tight, holder }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_max_wait_of_zero_no_slot_is_reported_at_once() {
    const COUNT: usize = 200;
    let Full { system, gate, open, tight, holder } = full(Duration::ZERO).await;
    let (mut latencies, mut of_others) = (Vec::new(), Vec::new());
    for number in 0..COUNT {
        let began = Instant::now();
        let answer = system.run(&format!("t{number}"), &["open", "tight"], json!({})).await;
        latencies.push(began.elapsed());
        let reason = answer.reason.expect("a reason");
        assert_eq!((answer.outcome, reason.code), (Outcome::Aborted, ReasonCode::NoSlot));
        assert_eq!(reason.message, None, "it is served, and busy");
        assert_eq!(reason.service.unwrap().as_str(), "tight");
        // Other users of the machine slow this down as well.
        let began = Instant::now();
        let answer = system.run(&format!("o{number}"), &["open"], json!({})).await;
        of_others.push(began.elapsed());
        assert_eq!(answer.outcome, Outcome::Committed, "{answer:?}");
    }
    let (median, p99) = figures(latencies);
    let (other, _) = figures(of_others);
    println!(
        "no_slot after {median:.1} ms in the median, p99 {p99:.1} ms; others are committed after \
         {other:.1} ms"
    );
    gate.open();
    assert_eq!(holder.await.unwrap(), Outcome::Committed);
    system.stop().await;

    // The full service was not called, and services that had prepared got one outcome.
    assert_eq!(tight.book().calls.len(), 2, "the holder's");
    let book = open.book();
    let (prepares, aborts) = (book.n_calls(Function::Prepare), book.n_calls(Function::Abort));
    println!("meanwhile the other service prepared {prepares} times, and aborted {aborts} times");
    assert_eq!((prepares, book.n_calls(Function::Commit)), (aborts + COUNT, COUNT));
    // As many steps as a commit: any real wait takes longer than a few of these.
    assert!(median < 5.0 * other, "{median} ms, and {other} ms for a commit");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_max_wait_a_prepare_waits_for_a_slot() {
    let Full { system, gate, open, tight, holder } = full(Duration::from_secs(60)).await;
    let client = system.client.clone();
    let began = Instant::now();
    let waiting = Transaction::new("t", ["open", "tight"], json!({}));
    let waiting = tokio::spawn(async move { run(&client, waiting).await });
    let queue = system.names.prepare_of(&"tight".parse().unwrap());
    system.raw.until(&queue, |(waiting, _)| waiting == 1).await;
    println!("its prepare waits after {:.1?}", began.elapsed());
    gate.open();
    let answer = waiting.await.unwrap();
    println!("it has {} after {:.1?}", answer.outcome, began.elapsed());
    assert_eq!(answer.outcome, Outcome::Committed, "{answer:?}");
    assert_eq!(holder.await.unwrap(), Outcome::Committed);
    system.stop().await;
    assert_eq!(open.book().whats_of("t"), [Function::Prepare, Function::Commit]);
    assert_eq!(tight.book().whats_of("t"), [Function::Prepare, Function::Commit]);
    assert_eq!(tight.book().most_held, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wait_for_a_slot_ends_after_max_wait() {
    let max_wait = Duration::from_secs(1);
    let Full { system, gate, open, tight, holder } = full(max_wait).await;
    let began = Instant::now();
    let answer = system.run("t", &["open", "tight"], json!({})).await;
    let took = began.elapsed();
    println!("{:?} after {took:.1?}", answer.reason.as_ref().map(|reason| reason.code));
    let reason = answer.reason.expect("a reason");
    assert_eq!((reason.code, reason.message), (ReasonCode::NoSlot, None), "it is served, and busy");
    assert!(took >= max_wait && took < LIMIT);
    gate.open();
    assert_eq!(holder.await.unwrap(), Outcome::Committed);
    system.stop().await;
    assert_eq!(tight.book().whats_of("t"), []);
    assert_eq!(open.book().n_calls(Function::Commit), 0);
}
