//! Queues that are deleted and declared again while they are consumed, before the consumer's
//! channel is notified: the channel is suspended, as it may be when it is busy.

use dtc::protocol::ids::ServiceName;
use lapin::{
    Connection, ConnectionProperties,
    options::{QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::json;

use super::{
    System,
    ledger::assert_services_hold,
    load::{Load, Plan},
};
use crate::{
    broker::{Broker, place},
    processes::{LIMIT, Process, World},
};

/// Suspends the channels that consume `queue`, by their process ids in the node, until they are
/// resumed.
fn hold_up(broker: &Broker, system: &System, queue: &str) {
    let (_, vhost) = system.world.place.url.rsplit_once('/').unwrap();
    let vhost = vhost.replace("%2f", "/");
    broker.control(&[
        "eval",
        &format!(
            "[_ | _] = Held = [proplists:get_value(channel_pid, It) \
             || It <- rabbit_amqqueue:consumers_all(<<\"{vhost}\">>), \
             element(4, proplists:get_value(queue_name, It)) =:= <<\"{queue}\">>], \
             [ok = sys:suspend(It) || It <- Held], persistent_term:put(held, Held)."
        ),
    ]);
}

fn let_go(broker: &Broker) {
    broker.control(&["eval", "[ok = sys:resume(It) || It <- persistent_term:get(held)]."]);
}

#[test]
fn an_instance_whose_queue_is_replaced_while_its_channel_is_busy_takes_prepares_again() {
    let broker = Broker::start();
    let prepares =
        |max_wait: u32| json!({"name": "payments", "max_concurrency": 2, "max_wait_ms": max_wait});
    let system = System::new(broker.place(), json!([prepares(60_000)]));
    let worker = system.worker("w1", &[]);
    let instance = system.instance("payments", "payments", &[]);
    let name = ServiceName::parse("payments").unwrap();

    hold_up(&broker, &system, system.names.prepare_of(&name).as_str());
    let services = system.world.file("replaced.json", &json!([prepares(50_000)]));
    let mut replacing = system.world.dtc(&["topology", "apply", "--replace", "payments"]);
    Process::start("replace", replacing.arg("--services").arg(services)).succeeded(LIMIT);
    let_go(&broker);
    // It notices in one of several ways: the broker ends its consumer, the consumer is found to be
    // lost, or was already replaced by one on another channel.
    let plan = Plan { services: &["payments"], total: 10, per_second: 100, timeout: Some(LIMIT) };
    let results = Load::start(&system, "t", plan).results();
    assert_eq!(results.committed().len(), 10, "{:?}", results.counts());
    system.wait_until_nothing_is_prepared();
    assert_services_hold(&system.ledgers(), &results.committed());
    drop((worker, instance));
}

#[test]
fn a_worker_whose_request_queue_is_replaced_while_its_channel_is_busy_takes_requests_again() {
    let broker = Broker::start();
    let payments = json!({"name": "payments", "max_concurrency": 10});
    let system = System::new(broker.place(), json!([payments]));
    let worker = system.worker("w1", &["--max-in-flight", "2"]);
    let _instance = system.instance("payments", "payments", &[]);

    let queue = system.names.requests();
    hold_up(&broker, &system, queue.as_str());
    system.runtime.block_on(declare_anew(&system));
    let_go(&broker);
    let plan = Plan { services: &["payments"], total: 10, per_second: 100, timeout: None };
    let load = Load::start(&system, "t", plan);
    // It consumes on another channel or connection.
    let results = load.results();
    assert_eq!(results.committed().len(), 10, "{:?}", results.counts());
    drop(worker);
}

#[test]
fn an_instance_whose_quorum_queue_is_replaced_takes_prepares_again() {
    let payments = json!({"name": "payments", "max_concurrency": 2});
    let world = World::at(place());
    let services = world.file("services.json", &json!([payments]));
    let mut apply = world.dtc(&["topology", "apply", "--commands", "quorum"]);
    Process::start("apply", apply.arg("--services").arg(&services)).succeeded(LIMIT);
    let _worker = world.worker("w1");
    let _instance = world.service(&services, "payments", Some(&world.path("state")));
    let transaction = json!([{"id": "t1", "involved_services": ["payments"], "data": {}}]);
    let told = world.submit_given(&transaction, &["--wait", "--output", "ndjson"]);
    let told = told.succeeded(LIMIT);
    assert!(told.iter().any(|line| line.contains("COMMITTED")), "{told:?}");
}

/// Deletes the request queue, and declares it again with the same arguments.
async fn declare_anew(system: &System) {
    let url = &system.world.place.url;
    let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let queue = system.names.requests();
    channel.queue_delete(queue.clone(), QueueDeleteOptions::default()).await.unwrap();
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.clone(), durable, arguments).await.unwrap();
    let bind = QueueBindOptions::default();
    let (exchange, key) = (system.names.requests(), "request".into());
    channel.queue_bind(queue, exchange, key, bind, FieldTable::default()).await.unwrap();
    connection.close(200, "done".into()).await.unwrap();
}
