//! Malformed messages.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{collections::BTreeMap, time::Duration};

use dtc::{Outcome, ReasonCode, Transaction, clock::Clock};
use lapin::BasicProperties;
use serde_json::json;

use crate::{
    system::{Served, Setup, System, header, run},
    watched::{Function, RecordedService},
};

const REQUEST: &str = r#"{"id":"bad","involved_services":["a"],"data":{}}"#;

/// What to publish, and what the reason for its rejection must contain.
struct Bad {
    exchange: String,
    key: String,
    properties: BasicProperties,
    body: Vec<u8>,
    because: &'static str,
}

fn typed(kind: &str) -> BasicProperties {
    BasicProperties::default().with_type(kind.into())
}

fn seconds() -> u64 {
    Clock::start().now().as_millis() / 1000
}

/// What is wrong in every queue of a system: bodies, and types.
fn wrong(exchange: &str, key: &str, kind: &str) -> Vec<Bad> {
    let bad = |properties: BasicProperties, body: &[u8], because| Bad {
        exchange: exchange.to_owned(),
        key: key.to_owned(),
        properties: properties.with_reply_to("w1".into()).with_timestamp(seconds()),
        body: body.to_vec(),
        because,
    };
    vec![
        bad(typed(kind), b"\x00\xff\xfe", ""),
        bad(typed(kind), b"", ""),
        bad(typed(kind), br#"{"id":"t""#, ""),
        bad(typed(kind), b"17", ""),
        bad(typed(kind), br#"[{"id":17}]"#, ""),
        bad(typed(kind), &[b' '; 300 * 1024], "bytes"),
        bad(typed("dtc.result.v1"), b"[]", "type"),
        bad(typed("dtc.nonsense.v9"), b"[]", "type"),
    ]
}

/// The same for every queue that takes messages.
fn everywhere(system: &System) -> BTreeMap<String, Vec<Bad>> {
    let names = &system.names;
    let service = "a".parse().unwrap();
    let places = [
        (names.requests(), names.requests(), "request", "dtc.request.v1"),
        (names.replies_of(&"w1".parse().unwrap()), names.replies(), "w1.a", "dtc.vote.v1"),
        (names.inquiries(), names.replies(), "any.a", "dtc.inquiry.v1"),
        (names.prepare_of(&service), names.prepare(), "w1.a", "dtc.prepare.v1"),
        (names.finish_any_of(&service), names.finish_any(), "any.a", "dtc.finish.v1"),
        (
            format!("{}.", names.finish_any_of(&service)).into(),
            names.finish(),
            "all.a",
            "dtc.query.v1",
        ),
    ];
    let places = places.into_iter();
    let wrong = places.map(|(queue, exchange, key, kind)| {
        (queue.to_string(), wrong(exchange.as_str(), key, kind))
    });
    wrong.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_in_any_queue_is_set_aside_and_stops_nothing() {
    let a = RecordedService::willing();
    let system = Setup::new([Served::new("a", 2, &a)]).start().await;
    let mut rejected = system.raw.read(&system.names.rejected()).await;
    for (queue, wrong) in everywhere(&system) {
        let count = wrong.len();
        for bad in wrong {
            system.raw.publish(&bad.exchange, &bad.key, bad.properties, &bad.body).await;
            let set_aside = rejected.next().await;
            let (from, reason) = (header(&set_aside, "queue"), header(&set_aside, "reason"));
            assert!(from.starts_with(&queue), "{from} {queue}");
            assert!(reason.contains(bad.because) && !reason.is_empty(), "{queue}: {reason}");
            assert_eq!(set_aside.data.len(), bad.body.len(), "{queue}: {reason}");
        }
        println!("{queue}: {count} of {count} set aside with a reason");
    }
    // A command to all instances must be well-formed, too.
    let answer = system.run("t", &["a"], json!({})).await;
    assert_eq!(answer.outcome, Outcome::Committed, "{answer:?}");
    system.stop().await;
    assert_eq!(a.book().whats_of("t"), [Function::Prepare, Function::Commit]);
    assert_eq!(a.book().calls.len(), 2, "nothing was made of the garbage");
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_in_the_journal_is_skipped() {
    let a = RecordedService::willing();
    let system = Setup::new([Served::new("a", 2, &a)]).workers(2).start().await;
    let journal = system.names.journal();
    let garbage: [(&str, &[u8]); 6] = [
        ("dtc.decision.v1", b"\x00\xff\xfe"),
        ("dtc.decision.v1", b""),
        ("dtc.decision.v1", br#"[{"id":17}]"#),
        ("dtc.decision.v1", br#"{"id":"t"}"#),
        ("dtc.vote.v1", b"[]"),
        ("nonsense", b"nonsense"),
    ];
    for (number, (kind, body)) in garbage.iter().enumerate() {
        system.raw.publish("", journal.as_str(), typed(kind), body).await;
        let answer = system.run(&format!("t{number}"), &["a"], json!({})).await;
        assert_eq!(answer.outcome, Outcome::Committed, "{answer:?}");
    }
    println!("{} messages of garbage in the journal, all skipped", garbage.len());
    let stats = system.stop().await;
    assert_eq!(stats.iter().map(|it| it.committed).sum::<u64>(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn request_that_cannot_be_served_is_rejected_and_its_producer_gets_a_result() {
    let a = RecordedService::willing();
    let system = Setup::new([Served::new("a", 2, &a)]).start().await;
    let mut rejected = system.raw.read(&system.names.rejected()).await;
    let exchange = system.names.requests();
    let huge = format!(
        r#"{{"id":"bad","involved_services":["a"],"data":{{"x":"{}"}}}}"#,
        "x".repeat(300_000)
    );
    let request = || typed("dtc.request.v1").with_timestamp(seconds());
    for (properties, body, because) in [
        (typed("dtc.request.v1"), REQUEST, "timestamp"),
        (request(), huge.as_str(), "bytes"),
        (request(), r#"{"id":"bad","involved_services":[],"data":{}}"#, "involved_services"),
        (request(), r#"{"id":"bad","involved_services":["a"],"data":[]}"#, "data"),
        (request(), r#"{"id":"b a d","involved_services":["a"],"data":{}}"#, "id"),
        (typed("dtc.vote.v1").with_timestamp(seconds()), REQUEST, "dtc.vote.v1"),
    ] {
        system.raw.publish(exchange.as_str(), "request", properties, body.as_bytes()).await;
        let set_aside = rejected.next().await;
        let reason = header(&set_aside, "reason");
        println!("set aside: {}", reason.chars().take(100).collect::<String>());
        assert!(reason.contains(because), "{because}: {reason}");
        assert_eq!(set_aside.data, body.as_bytes());
    }

    let ahead = Clock::start().now() + Duration::from_secs(120);
    let early = Transaction::new("early", ["a"], json!({})).requested_at(ahead);
    let answer = run(&system.client, early).await;
    let reason = answer.reason.expect("a reason");
    println!("two minutes ahead: {} {:?}", reason.code, reason.message);
    assert_eq!((answer.outcome, reason.code), (Outcome::Aborted, ReasonCode::Invalid));
    let set_aside = rejected.next().await;
    assert!(header(&set_aside, "reason").contains("invalid"));

    let answer = system.run("good", &["a"], json!({})).await;
    assert_eq!(answer.outcome, Outcome::Committed, "{answer:?}");
    let stats = system.stop().await;
    assert_eq!((stats[0].rejected, stats[0].committed), (7, 1));
    assert_eq!(a.book().calls.len(), 2);
}
