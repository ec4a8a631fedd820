//! Several requests in a message.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::collections::BTreeMap;

use dtc::{
    Outcome, ReasonCode, Transaction, clock::Clock, protocol::message::Answer,
    wire::message::decode,
};
use futures_util::future::join_all;
use lapin::BasicProperties;
use serde_json::json;

use crate::{
    system::{Reading, Served, Setup, System, header, run},
    watched::{Ending, Function, Gate, RecordedService},
};

fn request(id: &str, service: &str) -> String {
    json!({"id": id, "involved_services": [service], "data": {}, "reply": "r1"}).to_string()
}

/// Publishes these requests in one message.
async fn publish(system: &System, requests: &[String]) {
    let seconds = Clock::start().now().as_millis() / 1000;
    let properties =
        BasicProperties::default().with_type("dtc.request.v1".into()).with_timestamp(seconds);
    let body = format!("[{}]", requests.join(","));
    let exchange = system.names.requests();
    system.raw.publish(exchange.as_str(), "request", properties, body.as_bytes()).await;
}

/// The results of so many transactions, by id.
async fn results(copies: &mut Reading, count: usize) -> BTreeMap<String, Answer> {
    let mut results = BTreeMap::new();
    while results.len() < count {
        for answer in decode::<Answer>(&copies.next().await.data).unwrap() {
            let answer = answer.unwrap();
            results.insert(answer.id.to_string(), answer);
        }
    }
    results
}

#[tokio::test(flavor = "multi_thread")]
async fn each_request_of_a_message_has_its_own_result_and_a_malformed_one_is_rejected_alone() {
    let a = RecordedService::willing();
    let system = Setup::new([Served::new("a", 8, &a)]).start().await;
    let mut copies = system.raw.copies(&system.names.results()).await;
    let mut rejected = system.raw.read(&system.names.rejected()).await;
    let bad = r#"{"id":"bad","involved_services":[],"data":{},"reply":"r1"}"#.to_owned();
    publish(&system, &[request("t1", "a"), bad.clone(), request("t2", "a"), request("t3", "b")])
        .await;

    let results = results(&mut copies, 4).await;
    let told = |id: &str| {
        let answer = &results[id];
        (answer.outcome, answer.reason.as_ref().map(|reason| reason.code))
    };
    assert_eq!(told("t1"), (Outcome::Committed, None));
    assert_eq!(told("t2"), (Outcome::Committed, None));
    assert_eq!(told("t3"), (Outcome::Aborted, Some(ReasonCode::UnknownService)));
    assert_eq!(told("bad"), (Outcome::Aborted, Some(ReasonCode::Invalid)));
    let set_aside = rejected.next().await;
    assert_eq!(set_aside.data, bad.as_bytes());
    assert!(header(&set_aside, "reason").contains("$[1].involved_services"));
    let stats = system.stop().await;
    assert_eq!((stats[0].rejected, stats[0].committed), (1, 2));
    assert_eq!(a.book().calls.len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_of_too_many_requests_is_rejected_once_and_all_its_producers_are_told() {
    let a = RecordedService::willing();
    let system = Setup::new([Served::new("a", 8, &a)]).start().await;
    let mut copies = system.raw.copies(&system.names.results()).await;
    let mut rejected = system.raw.read(&system.names.rejected()).await;
    let requests: Vec<_> = (0..65).map(|n| request(&format!("t{n}"), "a")).collect();
    publish(&system, &requests).await;

    let results = results(&mut copies, 65).await;
    for answer in results.values() {
        let reason = answer.reason.as_ref().unwrap();
        assert_eq!((answer.outcome, reason.code), (Outcome::Aborted, ReasonCode::Invalid));
        assert!(reason.message.as_ref().unwrap().contains("must have at most 64"));
    }
    assert!(header(&rejected.next().await, "reason").contains("has 65 requests"));
    let stats = system.stop().await;
    assert_eq!(stats[0].rejected, 1);
    assert!(a.book().calls.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_begins_no_more_requests_of_a_message_than_it_has_room_for() {
    const ROOM: usize = 4;
    let gate = Gate::shut();
    let waits = gate.clone();
    let a = RecordedService::new(move |asked| {
        let gate = waits.clone();
        async move {
            if asked.what == Function::Prepare && asked.id != "warm" {
                gate.pass().await;
            }
            Ending::Done
        }
    });
    let system = Setup::new([Served::new("a", 100, &a)])
        .tune(|settings| settings.coordinator.in_flight_max = ROOM)
        .start()
        .await;
    // After this the worker knows that there are slots in plenty.
    system.run("warm", &["a"], json!({})).await;
    let mut copies = system.raw.copies(&system.names.results()).await;
    let requests: Vec<_> = (0..64).map(|n| request(&format!("t{n}"), "a")).collect();
    publish(&system, &requests).await;
    a.until("it has begun what it may", |book| book.n_calls(Function::Prepare) == 1 + ROOM).await;
    gate.open();
    let results = results(&mut copies, 64).await;
    assert!(results.values().all(|it| it.outcome == Outcome::Committed));
    system.stop().await;
    assert_eq!(a.book().committed.len(), 65);
    assert_eq!(a.book().most_held, ROOM);
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_that_a_client_submits_at_once_share_messages() {
    const COUNT: usize = 500;
    let a = RecordedService::willing();
    let system = Setup::new([Served::new("a", 1000, &a)]).start().await;
    let mut requests = system.raw.copies(&system.names.requests()).await;
    let submit = |n: usize| {
        let client = system.client.clone();
        async move { run(&client, Transaction::new(format!("t{n}"), ["a"], json!({}))).await }
    };
    let answers = join_all((0..COUNT).map(submit)).await;
    assert!(answers.iter().all(|it| it.outcome == Outcome::Committed));
    let (mut messages, mut copied) = (0, 0);
    while copied < COUNT {
        let body: serde_json::Value = serde_json::from_slice(&requests.next().await.data).unwrap();
        copied += body.as_array().map_or(1, Vec::len);
        messages += 1;
    }
    println!("{COUNT} requests in {messages} messages");
    assert_eq!(copied, COUNT);
    assert!(messages < COUNT / 4, "{messages}");
    system.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_with_a_batch_max_of_one_gives_each_request_its_own_message() {
    const COUNT: usize = 50;
    let a = RecordedService::willing();
    let system = Setup::new([Served::new("a", 1000, &a)]).start().await;
    let mut requests = system.raw.copies(&system.names.requests()).await;
    let client = system.client_that(|client| client.batch_max(1));
    let submit = |n: usize| run(&client, Transaction::new(format!("t{n}"), ["a"], json!({})));
    join_all((0..COUNT).map(submit)).await;
    for _ in 0..COUNT {
        assert_eq!(requests.next().await.data.first(), Some(&b'{'));
    }
    client.close().await;
    system.stop().await;
}
