//! Losing and reading the journal.

use std::sync::Arc;

use dtc::{
    Transaction,
    transport::amqp::{
        connection::Broker,
        stream::{Scan, StreamStart},
    },
};
use futures_util::future::join_all;
use serde_json::json;

use crate::{
    broker::place,
    system::{Served, Setup},
    watched::{LIMIT, RecordedService},
};

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_host_is_skipped() {
    let url = place().url;
    let address = format!("amqp://127.0.0.1:9,{url},amqp://127.0.0.1:9").parse().unwrap();
    let broker = Broker::new(address, "test");
    // Each begins with a random host.
    for _ in 0..10 {
        let connection = broker.connect("test").await.unwrap();
        connection.close(200, "done".into()).await.unwrap();
    }
}

/// After an empty stream, the next one is read on the same connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_survives_reading_empty_streams() {
    let system = Setup::new([]).start().await;
    let stream = system.names.unresolved();
    let mut connections = Vec::new();
    for _ in 0..20 {
        connections.push(Arc::new(system.broker.connect("test").await.unwrap()));
    }
    for round in 0..3_u64 {
        let reading = connections.iter().flat_map(|connection| vec![connection; 40]);
        let reading = reading.zip(0_u64..).map(|(connection, number)| {
            let (connection, stream) = (Arc::clone(connection), stream.clone());
            tokio::spawn(async move {
                let mut scan = Scan::open(&connection, stream, StreamStart::First).await.unwrap();
                assert!(scan.next().await.unwrap().is_none());
                // It is closed at another moment each time.
                for _ in 0..number * (round + 1) {
                    std::hint::spin_loop();
                }
                scan.close().await;
            })
        });
        for read in join_all(reading).await {
            read.unwrap();
        }
        assert!(connections.iter().all(|it| it.status().connected()), "in round {round}");
    }
    system.stop().await;
}

/// With a lost journal, its decisions are lost. A request that is repeated then, or that may have
/// been decided before, is parked; nobody gets a guessed outcome.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_detects_a_lost_journal_and_guesses_nothing() {
    let watched = RecordedService::willing();
    let system = Setup::new([Served::new("payments", 2, &watched)]).start().await;
    let before = system.run("before", &["payments"], json!({})).await;
    assert_eq!(before.outcome.as_str(), "COMMITTED");

    system.raw.delete_queue(&system.names.journal()).await;
    system.apply_topology().await;
    let mut unresolved = system.raw.read(&system.names.unresolved()).await;
    let waiting = tokio::spawn({
        let client = system.another_client();
        let transaction = Transaction::new("after", ["payments"], json!({}));
        async move { client.submit_and_wait(transaction, LIMIT * 4).await }
    });

    let parked = unresolved.items("dtc.parked.v1").await;
    assert_eq!(parked[0]["id"], "after");
    assert!(!waiting.is_finished());
    waiting.abort();
    system.stop_whatever_happened().await;
}
