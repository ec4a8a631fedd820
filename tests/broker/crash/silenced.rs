//! Processes without the permission to answer, or without an exchange to answer to.

use lapin::{Connection, ConnectionProperties, options::ExchangeDeleteOptions, types::ShortString};
use serde_json::json;

use super::{READY, System};
use crate::{
    broker::{Broker, place},
    processes::{LIMIT, Process, World},
};

fn transaction(id: &str) -> serde_json::Value {
    json!([{"id": id, "involved_services": ["payments"], "data": {}, "timeout_ms": 1000}])
}

fn system(place: crate::broker::Place) -> System {
    System::new(place, json!([{"name": "payments", "max_concurrency": 1}]))
}

#[test]
fn a_service_without_permission_to_answer_ends_and_names_the_refusal() {
    let broker = Broker::start();
    let system = system(broker.place());
    let (_, vhost) = system.world.place.url.rsplit_once('/').unwrap();
    let replies = system.names.replies();
    let all_but = format!("^(?!{}$).*", replies.as_str().replace('.', "\\."));
    let vhost_name = vhost.replace("%2f", "/");
    broker.control(&["add_user", "mute", "mute"]);
    broker.control(&["set_permissions", "-p", &vhost_name, "mute", ".*", &all_but, ".*"]);
    let mut place = system.world.place.clone();
    place.url = format!("amqp://mute:mute@127.0.0.1:{}/{vhost}", broker.port());
    let _worker = system.worker("w1", &[]);
    let mut service = World::at(place).service(&system.services, "payments", Some(&system.state()));

    let _ = system.world.submit_given(&transaction("t1"), &["--wait"]).wait(LIMIT);
    service.exited(77, LIMIT);
    let said = service.stderr.text();
    println!("{}", said.lines().last().unwrap_or_default());
    assert!(said.contains(replies.as_str()) && said.contains("ACCESS_REFUSED"), "{said}");
}

#[test]
fn an_instance_reports_a_missing_exchange_at_its_first_answer() {
    let system = system(place());
    let _worker = system.worker("w1", &[]);
    let instance = system.instance("payments", "payments", &[]);
    commits(&system, "t1");
    delete_exchange(&system, system.names.replies());
    let _ = system.world.submit_given(&transaction("t2"), &["--wait"]).wait(LIMIT);
    comes_again(&system, &instance, system.names.replies().as_str());
}

#[test]
fn a_worker_reports_a_missing_exchange_at_its_first_command() {
    let system = system(place());
    let worker = system.worker("w1", &[]);
    let _instance = system.instance("payments", "payments", &[]);
    commits(&system, "t1");
    delete_exchange(&system, system.names.finish());
    let waiting = system.world.submit_given(&transaction("t2"), &["--wait"]);
    comes_again(&system, &worker, system.names.finish().as_str());
    drop(waiting);
}

fn commits(system: &System, id: &str) {
    let told = system.world.submit_given(&transaction(id), &["--wait", "--output", "ndjson"]);
    let told = told.succeeded(LIMIT);
    assert!(told.iter().any(|line| line.contains("COMMITTED")), "{told:?}");
}

/// It logs why it reconnects, and then serves again.
fn comes_again(system: &System, process: &Process, exchange: &str) {
    let (lost, line) = process.stderr.wait_for_from(0, "NOT_FOUND", LIMIT).expect("it says so");
    println!("{line}");
    assert!(line.contains(exchange), "{line}");
    system.world.apply_topology(Some(&system.services));
    process.stderr.wait_for_from(lost, READY, LIMIT).expect("it serves again");
}

fn delete_exchange(system: &System, exchange: ShortString) {
    system.runtime.block_on(async {
        let url = &system.world.place.url;
        let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.exchange_delete(exchange, ExchangeDeleteOptions::default()).await.unwrap();
        connection.close(200, "done".into()).await.unwrap();
    });
}
