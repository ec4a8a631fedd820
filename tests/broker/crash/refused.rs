//! A broker that isn't there yet, or that refuses everyone.

use serde_json::json;

use super::{
    READY, System,
    ledger::assert_services_hold,
    load::{Load, Plan},
};
use crate::{
    broker::{Broker, place},
    processes::{LIMIT, Process, World},
};

const PASSWORD: &str = "s3cret-of-nobody";

#[test]
fn a_refused_process_reports_it_without_the_password() {
    let system = System::new(place(), json!([{"name": "payments", "max_concurrency": 1}]));
    let mut refused = system.world.place.clone();
    let (before, host) = refused.url.rsplit_once('@').unwrap();
    let user = before.rsplit_once(':').unwrap().0;
    refused.url = format!("{user}:{PASSWORD}@{host}");
    let world = World::at(refused);
    let transactions = json!([{"id": "t1", "involved_services": ["payments"], "data": {}}]);
    let (services, transactions) = (&system.services, world.file("t.json", &transactions));
    let (services, transactions) = (services.to_str().unwrap(), transactions.to_str().unwrap());
    for words in [
        &["worker"][..],
        &["service", "--name", "payments", "--services", services, "--state", "state"],
        &["submit", transactions],
        &["submit", transactions, "--wait"],
        &["status", "t1"],
        &["topology", "apply", "--services", services],
        &["topology", "check", "--services", services],
    ] {
        let mut process =
            Process::start(&words.join(" "), world.dtc(words).env("DTC_LOG", "trace"));
        process.exited(77, LIMIT);
        let said = format!("{}{}", process.stdout.text(), process.stderr.text());
        println!("dtc {}: exit 77, {}", words[0], said.lines().last().unwrap_or_default());
        assert!(said.contains("refused"), "{said}");
        assert!(!said.contains(PASSWORD), "dtc {} tells the password", words.join(" "));
    }
}

#[test]
fn a_process_started_before_the_broker_reports_it_and_serves_when_it_is_up() {
    let broker = Broker::start();
    let system = System::new(broker.place(), json!([{"name": "payments", "max_concurrency": 5}]));
    broker.terminate();
    let worker = system.start_worker("w1", &[]);
    let mut command = system.world.dtc(&["service", "--name", "payments"]);
    command.arg("--services").arg(&system.services).arg("--state").arg(system.state());
    let instance = Process::start("payments", &mut command);
    println!("{}", worker.wait_for_line("not connected to the broker", LIMIT));
    println!("{}", instance.wait_for_line("not connected", LIMIT));
    broker.start_again();
    worker.wait_for_line(READY, LIMIT);
    instance.wait_for_line(READY, LIMIT);
    let plan = Plan { services: &["payments"], total: 10, per_second: 100, timeout: Some(LIMIT) };
    let results = Load::start(&system, "t", plan).results();
    assert_eq!(results.committed().len(), 10, "{:?}", results.counts());
    system.wait_until_nothing_is_prepared();
    assert_services_hold(&system.ledgers(), &results.committed());
}
