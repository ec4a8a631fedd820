//! A worker that has a long journal to read before it serves.

use std::{ops::Range, sync::Arc};

use dtc::{
    clock::Clock,
    protocol::{
        ids::{
            Branch, InstanceId, RequestHash, ServiceName, TransactionId, TransactionKey, WorkerId,
        },
        message::{Decision, Outcome},
        time::Time,
    },
    transport::amqp::{
        connection::Broker,
        publisher::{OutgoingMessage, PublishOutcome, Publisher},
    },
    wire::message::{Items, Kind},
};
use serde_json::json;
use tokio::time::Instant;

use super::{
    READY, System,
    load::{Load, Plan},
};
use crate::{broker::place, processes::LIMIT};

/// The content of a journal; a tenth of it in a build without optimisation.
pub(super) struct Content {
    /// The numbers of its decisions.
    pub(super) decisions: Range<usize>,
    pub(super) per_message: usize,
    /// How many messages are unconfirmed at a time: so many are at most a chunk of the stream.
    pub(super) outstanding: usize,
}

#[test]
fn a_worker_serves_soon_on_a_journal_of_a_million_decisions() {
    // So many decisions share a message under load.
    serves_soon(Content { decisions: 0..1_000_000, per_message: 200, outstanding: 50 });
}

#[test]
fn a_worker_serves_soon_on_a_journal_of_messages_of_one_decision() {
    // One after the other, as with few transactions in flight: each is a chunk of the stream.
    serves_soon(Content { decisions: 0..20_000, per_message: 1, outstanding: 1 });
}

fn serves_soon(content: Content) {
    let decisions = content.decisions.len() / if cfg!(debug_assertions) { 10 } else { 1 };
    let content = Content { decisions: 0..decisions, ..content };
    let service = |name| json!({"name": name, "max_concurrency": 10});
    let system = System::new(place(), json!([service("payments"), service("stock")]));
    let instances = ["payments", "stock"].map(|it| system.instance(it, it, &[]));
    let begun = Instant::now();
    let bytes = system.runtime.block_on(fill(&system, &content));
    println!("{decisions} decisions, {} MB, written in {:.1?}", bytes >> 20, begun.elapsed());

    let started = Instant::now();
    let worker = system.start_worker("w1", &[]);
    let read = worker.wait_for_line("the journal is read", LIMIT);
    worker.wait_for_line(READY, LIMIT);
    let ready_after = started.elapsed();
    let timeout = Some(LIMIT);
    let plan = Plan { services: &["payments", "stock"], total: 1, per_second: 1, timeout };
    let results = Load::start(&system, "t", plan).results();
    println!(
        "serves after {ready_after:.1?}, {} MB resident: {}; first result after {:.1?}",
        worker.resident() >> 20,
        read.split_once("the journal").map_or("", |(_, said)| said),
        started.elapsed()
    );
    assert_eq!(results.committed().len(), 1);
    assert!(read.contains(&format!("decisions={decisions} ")), "{read}");
    drop(instances);
}

/// Writes the decisions as a worker does; returns how many bytes they have.
pub(super) async fn fill(system: &System, content: &Content) -> usize {
    let &Content { ref decisions, per_message, outstanding } = content;
    let broker = Broker::new(system.world.place.url.parse().unwrap(), "test");
    let connection = Arc::new(broker.connect("publish").await.unwrap());
    let mut publisher = Publisher::open(&connection, "decisions").await.unwrap();
    let now = Clock::start().now();
    let mut bytes = 0;
    for first in decisions.clone().step_by(per_message) {
        let mut items = Items::new();
        (first..first + per_message).for_each(|number| items.push(&decision(number, now)).unwrap());
        bytes += items.size();
        let message = OutgoingMessage {
            key: system.names.journal(),
            message_type: Kind::Decision.as_type(),
            body: items.into_body(),
            persistent: true,
            mandatory: true,
            ..OutgoingMessage::default()
        };
        publisher.publish(message, ());
        while publisher.outstanding() >= outstanding {
            confirmed(&mut publisher).await;
        }
    }
    while publisher.outstanding() > 0 {
        confirmed(&mut publisher).await;
    }
    connection.close(200, "".into()).await.unwrap();
    bytes
}

pub(super) async fn confirmed(publisher: &mut Publisher<()>) {
    let ((), published) = publisher.next().await.unwrap();
    assert!(matches!(published, PublishOutcome::Confirmed), "{published:?}");
}

/// A decision of the last quarter of an hour.
fn decision(number: usize, now: Time) -> Decision {
    let branch = |service: &str| {
        let instance = InstanceId::parse(&format!("{service}-i0123456789ab")).unwrap();
        (ServiceName::parse(service).unwrap(), Branch::of(&instance, number as u64))
    };
    Decision {
        key: TransactionKey {
            id: TransactionId::parse(&format!("order-{number:08}")).unwrap(),
            requested_at: Time::from_millis(now.as_millis() / 1000 * 1000),
        },
        request_hash: RequestHash((number as u128).to_be_bytes()),
        outcome: Outcome::Committed,
        branches: vec![branch("payments"), branch("stock")],
        reason: None,
        decided_at: now,
        worker: WorkerId::parse("w0").unwrap(),
    }
}
