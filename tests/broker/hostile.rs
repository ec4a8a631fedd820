//! Messages whose bytes a broker accepts, and a client library can't parse.
//!
//! A consumer that gets one survives, sets it aside with a reason, and handles the others.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::time::Duration;

use dtc::clock::Clock;

use crate::{
    bare::{Bare, Properties, header_called, nested_arrays, nested_tables},
    processes::Process,
    stand::{BOTH, ProxiedPlace, ProxiedSystem, READY, WITHIN},
};

/// The unreadable part of a message.
struct Poison {
    name: &'static str,
    change: fn(&mut Properties),
    /// Whether it makes a message with a readable body rejected.
    is_rejected_by_itself: bool,
}

const POISONS: [Poison; 7] = [
    Poison {
        name: "3,000 nested tables",
        change: |it| it.headers = Some(nested_tables(3000)),
        is_rejected_by_itself: true,
    },
    Poison {
        name: "3,000 nested arrays",
        change: |it| it.headers = Some(nested_arrays(3000)),
        is_rejected_by_itself: true,
    },
    // Fully nested in each other they would keep RabbitMQ 4.3 busy for seconds, and the link would
    // be given up.
    Poison {
        name: "nested tables as large as a frame may be",
        change: |it| it.headers = Some(nested_tables(3000).repeat(6)),
        is_rejected_by_itself: true,
    },
    Poison {
        name: "a header's name",
        change: |it| it.headers = Some(header_called(b"x-\xff")),
        is_rejected_by_itself: false,
    },
    Poison {
        name: "the content type",
        change: |it| it.content_type = Some(b"application/\xff".to_vec()),
        is_rejected_by_itself: false,
    },
    Poison {
        name: "the type",
        change: |it| it.kind = Some(b"dtc.\xff.v1".to_vec()),
        is_rejected_by_itself: false,
    },
    Poison {
        name: "the message id",
        change: |it| it.message_id = Some(b"\xff\xfe".to_vec()),
        is_rejected_by_itself: false,
    },
];

/// A message that is correct except for its poison.
struct Place {
    exchange: &'static str,
    key: &'static [u8],
    kind: &'static str,
    body: &'static str,
}

#[test]
fn requests_that_cannot_be_read_are_set_aside_and_no_worker_ends() {
    const REQUEST: &str = r#"{"id":"ID","involved_services":["payments"],"data":{}}"#;
    are_set_aside(
        "dtc worker",
        |stand| &stand.worker,
        &Place { exchange: "requests", key: b"request", kind: "dtc.request.v1", body: REQUEST },
    );
}

#[test]
fn inquiries_that_cannot_be_read_are_set_aside_and_no_worker_ends() {
    const INQUIRY: &str = r#"[{"id":"ID","requested_at":1700000000000,"service":"payments",
        "instance":"i1","branch":"i1-1","deadline":1700000000000}]"#;
    are_set_aside(
        "dtc worker",
        |stand| &stand.worker,
        &Place { exchange: "replies", key: b"any.payments", kind: "dtc.inquiry.v1", body: INQUIRY },
    );
}

#[test]
fn votes_that_cannot_be_read_are_set_aside_and_no_worker_ends() {
    const VOTE: &str = r#"[{"id":"ID","requested_at":1700000000000,"service":"payments",
        "instance":"i1","vote":"refused","free":1}]"#;
    are_set_aside(
        "dtc worker",
        |stand| &stand.worker,
        &Place { exchange: "replies", key: b"w1.payments", kind: "dtc.vote.v1", body: VOTE },
    );
}

#[test]
fn commits_that_cannot_be_read_are_set_aside_and_no_instance_ends() {
    const FINISH: &str = r#"[{"id":"ID","requested_at":1700000000000,"outcome":"ABORTED"}]"#;
    are_set_aside(
        "dtc service payments",
        |stand| &stand.payments,
        &Place { exchange: "finish", key: b"all.payments", kind: "dtc.finish.v1", body: FINISH },
    );
}

#[test]
fn prepares_that_cannot_be_read_are_set_aside_and_no_instance_ends() {
    const PREPARE: &str = r#"[{"id":"ID","requested_at":1700000000000,
        "request_hash":"000102030405060708090a0b0c0d0e0f","data":{},"deadline":1700000000000}]"#;
    are_set_aside(
        "dtc service payments",
        |stand| &stand.payments,
        &Place { exchange: "prepare", key: b"w1.payments", kind: "dtc.prepare.v1", body: PREPARE },
    );
}

#[test]
fn an_inquiry_under_a_routing_key_that_cannot_be_read_is_set_aside() {
    let stand = ProxiedSystem::new();
    let mut bare = Bare::connect(&stand.site.place.url);
    let properties = Properties { kind: Some(b"dtc.inquiry.v1".to_vec()), ..Properties::default() };
    let connections = stand.site.proxy.connections("dtc worker");
    bare.publish(&stand.site.name("replies"), b"any.\xff", &properties, b"[\"poison\"]");
    is_set_aside(&stand, &stand.worker, "poison");
    goes_on(&stand, "dtc worker", connections);
}

/// Otherwise no worker could ever read past a record that ends it.
#[test]
fn a_record_in_the_journal_that_cannot_be_read_is_skipped_by_every_worker() {
    let stand = ProxiedSystem::new();
    let mut bare = Bare::connect(&stand.site.place.url);
    let connections = stand.site.proxy.connections("dtc worker");
    for poison in &POISONS {
        let mut properties = properties("dtc.decision.v1");
        (poison.change)(&mut properties);
        bare.publish("", stand.site.name("journal").as_bytes(), &properties, b"[]");
        lives(&stand.worker, poison.name);
        stand.commits(&BOTH);
    }
    goes_on(&stand, "dtc worker", connections);
    // A worker that starts now reads all of it.
    let mut command = stand.site.world.dtc(&["worker", "--name", "w2"]);
    let other = Process::start("w2", &mut command);
    other.wait_for_line(READY, WITHIN);
}

#[test]
fn results_that_cannot_be_read_do_not_end_a_producer() {
    let stand = ProxiedSystem::new();
    let results = stand.site.name("results/");
    let targets = stand.site.proxy.targets("dtc worker w1 (publish)");
    let key = targets.iter().find_map(|it| it.strip_prefix(&results)).expect("a result was sent");
    let mut bare = Bare::connect(&stand.site.place.url);
    let connections = stand.site.proxy.connections("dtc submit");
    for poison in &POISONS {
        let mut properties = properties("dtc.result.v1");
        (poison.change)(&mut properties);
        bare.publish(&stand.site.name("results"), key.as_bytes(), &properties, b"[]");
        stand.commits(&BOTH);
    }
    goes_on(&stand, "dtc submit", connections);
}

/// The base of all tests here.
#[test]
fn a_broker_accepts_all_these_messages() {
    let site = ProxiedPlace::new();
    let mut bare = Bare::connect(&site.place.url);
    for poison in &POISONS {
        let mut properties = properties("dtc.request.v1");
        (poison.change)(&mut properties);
        bare.publish(&site.name("requests"), b"request", &properties, poison.name.as_bytes());
    }
    site.direct.until_holds(&site.name("requests"), POISONS.len());
}

fn properties(kind: &str) -> Properties {
    Properties {
        content_type: Some(b"application/json".to_vec()),
        timestamp: Some(Clock::start().now().as_millis() / 1000),
        reply_to: Some(b"w1".to_vec()),
        kind: Some(kind.as_bytes().to_vec()),
        ..Properties::default()
    }
}

fn are_set_aside(name: &str, of: fn(&ProxiedSystem) -> &Process, place: &Place) {
    let stand = ProxiedSystem::new();
    let mut bare = Bare::connect(&stand.site.place.url);
    let connections = stand.site.proxy.connections(name);
    for (number, poison) in POISONS.iter().enumerate() {
        let mut properties = properties(place.kind);
        (poison.change)(&mut properties);
        let id = format!("poison-{number}");
        // A text with wrong encoding may still be understood.
        let body = match poison.is_rejected_by_itself {
            true => place.body.replace("ID", &id),
            false => format!("[\"{id}\"]"),
        };
        println!("{}: {}", place.kind, poison.name);
        bare.publish(&stand.site.name(place.exchange), place.key, &properties, body.as_bytes());
        is_set_aside(&stand, of(&stand), &id);
        stand.commits(&BOTH);
    }
    goes_on(&stand, name, connections);
}

/// The message with `id` in its body is set aside, and `process` survives.
#[track_caller]
fn is_set_aside(stand: &ProxiedSystem, process: &Process, id: &str) {
    let reason = stand.site.direct.rejected(&stand.site.name("rejected"), id, WITHIN);
    lives(process, id);
    let reason = reason.unwrap_or_else(|| panic!("{id} is not set aside"));
    println!("{id}: {reason}");
    assert!(!reason.is_empty());
}

#[track_caller]
fn lives(process: &Process, what: &str) {
    let has_ended = process.stderr.wait_for_end(Duration::ZERO);
    assert!(!has_ended, "{what}: the process has ended:\n{}", process.stderr.text());
}

/// Everything is served, on the same connections, except that one may have been lost.
#[track_caller]
fn goes_on(stand: &ProxiedSystem, name: &str, connections: usize) {
    stand.commits(&BOTH);
    let now = stand.site.proxy.connections(name);
    assert!(now <= connections + 2, "{connections} connections of `{name}`, and then {now}");
}
