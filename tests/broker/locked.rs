//! An instance whose former connection still exists for the broker, with its exclusive queue: its
//! machine was cut off, or the broker's node is down.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::time::Duration;

use dtc::transport::amqp::connection::Broker as AmqpBroker;
use futures_util::FutureExt as _;
use lapin::{
    options::{BasicConsumeOptions, QueueDeclareOptions},
    types::{FieldTable, ShortString},
};
use serde_json::json;
use tokio::time::Instant;

use crate::{
    broker::{Broker, place},
    crash::until,
    processes::LIMIT,
    proxy::{Action, CANCEL, Frames, Scope},
    stand::{BOTH, ProxiedPlace, ProxiedSystem, READY},
};

/// "At once", on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(5);

const STOCK: &str = "dtc service stock";

#[test]
fn an_instance_whose_old_queue_still_exists_serves_at_once_through_a_new_one() {
    let stand = ProxiedSystem::new();
    let said = stand.stock.stderr.count();
    stand.site.proxy.sever(STOCK);
    let ready = stand.stock.stderr.wait_for_from(said, READY, AT_ONCE);
    ready.expect("it serves again");
    // The broker delivers every other prepare to the old connection, which it considers alive.
    let ids = [(); 4].map(|()| stand.submit(&BOTH));
    let until = Instant::now() + AT_ONCE;
    let is_committed = |id: &&String| {
        let left = until.saturating_duration_since(Instant::now()) / 4;
        stand.answer(id, left).is_some_and(|it| {
            (&it["status"], &it["unresolved"]) == (&json!("COMMITTED"), &json!([]))
        })
    };
    let id = ids.iter().find(is_committed).expect("one of them reaches the new connection");
    stand.site.is_committed_once(id, &BOTH);
}

#[test]
fn a_commit_reaches_an_instance_whose_old_queue_still_exists() {
    // `stock` has prepared long before `payments` has.
    let payments = json!({"name": "payments", "max_concurrency": 8, "max_wait_ms": 10_000,
        "prepare": {"latency_ms": [3000, 3000]}});
    let stock = json!({"name": "stock", "max_concurrency": 8, "max_wait_ms": 10_000});
    let stand = ProxiedSystem::at(ProxiedPlace::of(place(), json!([payments, stock])), &[]);
    let prepared = stand.site.world.path("state/stock/prepared");
    let replies = Frames::publishes().on(STOCK).about(&stand.site.name("replies/"));
    let votes = stand.site.proxy.rule(replies, Scope::Existing, Action::Count);
    let id = stand.submit(&BOTH);
    let is_prepared = || std::fs::read_dir(&prepared).is_ok_and(|it| it.count() > 0);
    until("`stock` prepares", is_prepared);
    // If a vote is lost with the link, the transaction ends at its deadline.
    votes.wait_for(1);
    let said = stand.stock.stderr.count();
    stand.site.proxy.sever(STOCK);
    let answer = stand.answered(&id, Duration::from_secs(12));
    println!("{answer}");
    assert_eq!((&answer["status"], &answer["unresolved"]), (&json!("COMMITTED"), &json!([])));
    stand.site.is_committed_once(&id, &BOTH);
    let ready = stand.stock.stderr.wait_for_from(said, READY, AT_ONCE);
    ready.expect("it serves again");
}

/// When a host was tried in parallel to a slow one and not used, the broker kept its connection and
/// consumer: an instance's commands were delivered to both, and 170 of them stayed unacknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_dropped_while_a_consumer_starts_is_closed() {
    let place = place();
    let broker = AmqpBroker::new(place.url.parse().unwrap(), "test");
    let other = broker.connect("another").await.unwrap();
    let queue = ShortString::from(format!("{}.let-go", place.namespace));
    {
        let connection = broker.connect("let go").await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(queue.clone(), exclusive, FieldTable::default()).await.unwrap();
        let options = BasicConsumeOptions::default();
        let beginning =
            channel.basic_consume(queue.clone(), "".into(), options, FieldTable::default());
        assert!(beginning.now_or_never().is_none(), "it is begun before the broker has answered");
    }
    let end = Instant::now() + LIMIT;
    loop {
        let channel = other.create_channel().await.unwrap();
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let looked = channel.queue_declare(queue.clone(), passive, FieldTable::default()).await;
        let said = looked.unwrap_err().to_string();
        if said.contains("NOT_FOUND") {
            break;
        }
        assert!(said.contains("RESOURCE_LOCKED"), "{said}");
        assert!(Instant::now() < end, "the connection is still there: {said}");
    }
}

/// Nodes that lost each other delete the exclusive queues of the other side, and don't end their
/// consumers. A producer noticed that by missing results, up to 6 s later.
#[test]
fn a_results_queue_that_the_broker_has_lost_is_replaced_at_once() {
    let broker = Broker::start();
    let service = |name| json!({"name": name, "max_concurrency": 8, "max_wait_ms": 10_000});
    let site = ProxiedPlace::of(broker.place(), json!([service("payments"), service("stock")]));
    let stand = ProxiedSystem::at(site, &[]);
    let cancelled = stand.site.proxy.stop(Frames::answers(CANCEL).on("dtc submit"));
    let prefix = stand.site.name("results.");
    let declared = broker.declared_at(&stand.site.place);
    let queue = declared.iter().find(|it| it.starts_with(&prefix)).expect("a queue for results");
    let (_, vhost) = stand.site.place.url.rsplit_once('/').unwrap();
    broker.control(&["delete_queue", queue, "--vhost", vhost]);
    cancelled.wait_for(1);
    // A probe is sent within 1 s, and would be waited for for 4 s if its coming back woke nobody.
    let answer = stand.answered(&stand.submit(&BOTH), Duration::from_secs(3));
    assert_eq!(answer["status"], "COMMITTED", "{answer}");
}
