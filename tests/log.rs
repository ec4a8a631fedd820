//! The spans of the log, as a program sees them that uses the library and sets a subscriber.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

#[path = "support/lines.rs"]
mod lines;

use std::{
    io,
    sync::{LazyLock, Mutex},
    time::Duration,
};

use dtc::{
    BoxError, DurableParticipant, Finish, InDoubt, Participant, Prepare, Service, StoreId,
    Transaction, TransactionKey, Verdict, run,
};
use serde_json::json;
use tokio::sync::oneshot;
use tracing::Level;

use crate::lines::Lines;

/// Longer than any line takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What all tests of this process log. A closure that blocks runs on a thread of its own, so the
/// subscriber must be that of all threads.
static LOG: LazyLock<Lines> = LazyLock::new(|| {
    let (read, write) = io::pipe().unwrap();
    tracing_subscriber::fmt()
        .with_max_level(Level::INFO)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .with_writer(Mutex::new(write))
        .init();
    Lines::of(read)
});

fn line_with(pattern: &str) -> String {
    LOG.wait_for(pattern, PATIENCE).unwrap_or_else(|| panic!("{pattern}: {}", LOG.text()))
}

#[track_caller]
fn assert_contains(line: &str, parts: &[&str]) {
    assert!(parts.iter().all(|part| line.contains(part)), "{line}");
}

#[tokio::test]
async fn lines_of_a_services_code_name_its_service_and_the_transaction() {
    LazyLock::force(&LOG);
    let services = [
        Service::new("blocking", 1)
            .prepare(|_, _| {
                tracing::info!("reserving");
                Ok(true)
            })
            .commit(|_| {
                tracing::info!("booking");
                Ok(())
            }),
        Service::new("asynchronous", 1).prepare_async(|_, _| async {
            tokio::task::yield_now().await;
            tracing::info!("checking");
            Ok(true)
        }),
    ];
    let transaction = Transaction::new("t1", ["blocking", "asynchronous"], json!({}));
    run(services, [transaction]).await.unwrap();
    let expected = [
        ("reserving", "prepare{service=blocking transaction=t1@"),
        ("booking", "commit{service=blocking transaction=t1@"),
        ("checking", "prepare{service=asynchronous transaction=t1@"),
    ];
    for (message, span) in expected {
        assert_contains(&line_with(message), &[span, &format!("}}: {message}")]);
    }
}

#[tokio::test]
async fn lines_about_a_parked_commit_name_its_service_and_the_transaction() {
    LazyLock::force(&LOG);
    let broken = Service::new("broken", 1).commit(|_| Err("no paper".into()));
    run([broken], [Transaction::new("t2", ["broken"], json!({}))]).await.unwrap();
    let line = line_with("parked: the transaction is committed");
    assert_contains(&line, &["ERROR", "{service=broken transaction=t2@", "no paper"]);
}

/// A service that can't tell what its store is called at first.
struct Forgetful(Mutex<u32>);

impl Participant for Forgetful {
    async fn prepare(&self, _: Prepare) -> Result<Verdict, BoxError> {
        Ok(Verdict::ReadOnly)
    }

    async fn commit(&self, _: Finish) -> Result<(), BoxError> {
        Ok(())
    }
}

impl DurableParticipant for Forgetful {
    async fn in_doubt(&self, _: Option<TransactionKey>) -> Result<Vec<InDoubt>, BoxError> {
        Ok(Vec::new())
    }

    async fn store_id(&self) -> Result<Option<StoreId>, BoxError> {
        tracing::info!("looking for the id");
        let mut calls = self.0.lock().unwrap();
        *calls += 1;
        if *calls == 1 { Err("no database yet".into()) } else { Ok(None) }
    }
}

/// An instance that waits for its broker has no log but its own, and several may share one process.
#[tokio::test]
async fn every_line_of_an_instance_names_its_service_and_itself() {
    LazyLock::force(&LOG);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = dtc::service("amqp://127.0.0.1:1", "payments", Forgetful(Mutex::new(0)))
        .instance("blue")
        .serve_until(async { stopped.await.unwrap_or(()) });
    let serving = tokio::spawn(serving);
    for message in ["looking for the id", "no database yet", "not connected"] {
        let line = tokio::task::spawn_blocking(move || line_with(message)).await.unwrap();
        assert_contains(&line, &["serve{service=payments instance=blue-"]);
        assert_eq!(line.matches("payments").count(), 1, "no field twice: {line}");
    }
    stop.send(()).unwrap();
    serving.await.unwrap().unwrap();
}
