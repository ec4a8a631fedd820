//! Commands that are started while the broker has an alarm, and so reads no publishes.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    broker::Broker,
    processes::{LIMIT, Process, World},
    proxy::{Action, Frames, Proxy, Scope},
    stand::WITHIN,
};

/// How long a process without work to finish may take to end on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(5);

/// The reason that RabbitMQ reports.
const REASON: &str = "low on memory";

/// A broker whose memory is used up, and one system that was declared before.
struct Alarmed {
    world: World,
    services: std::path::PathBuf,
    broker: Broker,
}

impl Alarmed {
    fn new() -> Self {
        let broker = Broker::start();
        let world = World::at(broker.place());
        let services =
            world.file("services.json", &json!([{"name": "payments", "max_concurrency": 5}]));
        world.apply_topology(Some(&services));
        broker.control(&["set_vm_memory_high_watermark", "0.00001"]);
        Self { world, services, broker }
    }

    fn transactions() -> Value {
        json!([{"id": "t1", "involved_services": ["payments"], "data": {}}])
    }
}

/// It ends in time, with an error that gives the reason.
fn ends_and_names_the_alarm(process: &mut Process) {
    let status = process.wait(WITHIN);
    assert!(!status.success(), "{status}");
    names_the_alarm(process);
}

fn names_the_alarm(process: &Process) {
    let said = process.stderr.text();
    assert!(said.contains(REASON), "the alarm is not named: {said}");
}

#[test]
fn applying_a_topology_ends_and_names_the_alarm() {
    let alarmed = Alarmed::new();
    for wait in ["0s", "3s"] {
        let mut command = alarmed.world.dtc_at_broker(&["topology", "apply"]);
        command.args(["--namespace", "other", "--wait", wait]);
        let mut process = Process::start("apply", command.arg("--services").arg(&alarmed.services));
        ends_and_names_the_alarm(&mut process);
    }
    drop(alarmed.broker);
}

#[test]
fn a_run_at_a_broker_ends_and_names_the_alarm() {
    let alarmed = Alarmed::new();
    let mut process = run(&alarmed);
    // It has as long as it takes until it gives up by itself.
    ends_and_names_the_alarm(&mut process);
    drop(alarmed.broker);
}

#[test]
fn a_signal_ends_a_run_at_a_broker_during_an_alarm() {
    let mut alarmed = Alarmed::new();
    let proxy = Proxy::to(&alarmed.world.place.url);
    alarmed.world.place.url = proxy.url(&alarmed.world.place.url);
    let published = proxy.rule(Frames::publishes(), Scope::All, Action::Count);
    let mut process = run(&alarmed);
    // The broker reports the alarm only to a connection that publishes: by then the topology is
    // declared.
    published.wait_for(1);
    process.terminate();
    let status = process.wait(AT_ONCE);
    println!("{status}: {}", process.stderr.text());
    drop(alarmed.broker);
}

fn run(alarmed: &Alarmed) -> Process {
    let transactions = alarmed.world.file("transactions.json", &Alarmed::transactions());
    let mut command = alarmed.world.dtc_at_broker(&["run"]);
    command.arg("--services").arg(&alarmed.services).arg("--transactions").arg(transactions);
    Process::start("run", &mut command)
}

#[test]
fn a_worker_that_starts_during_an_alarm_names_it_and_serves_when_it_is_over() {
    let alarmed = Alarmed::new();
    let worker = |name| Process::start(name, &mut alarmed.world.dtc(&["worker", "--name", name]));
    let mut told_to_stop = worker("w1");
    let stays = worker("w2");
    for worker in [&told_to_stop, &stays] {
        let line = worker.stderr.wait_for(REASON, WITHIN);
        println!("{}", line.expect("the alarm is named"));
    }
    told_to_stop.terminate();
    told_to_stop.wait(AT_ONCE);
    alarmed.broker.control(&["set_vm_memory_high_watermark", "0.6"]);
    stays.wait_for_line("ready", WITHIN);
}

#[test]
fn a_submit_that_is_not_answered_in_time_names_the_alarm() {
    let alarmed = Alarmed::new();
    let flags = ["--wait", "--timeout", "5s"];
    let mut process = alarmed.world.submit_given(&Alarmed::transactions(), &flags);
    ends_and_names_the_alarm(&mut process);
    drop(alarmed.broker);
}

/// After the first signal it waits for what it has sent, and after the second one no longer.
#[test]
fn a_signal_ends_a_submit_during_an_alarm() {
    let alarmed = Alarmed::new();
    let flags = ["--wait", "--timeout", "60s"];
    let mut process = alarmed.world.submit_given(&Alarmed::transactions(), &flags);
    assert!(process.stderr.wait_for(REASON, LIMIT).is_some(), "the alarm is named");
    process.terminate();
    process.wait_for_line("interrupted", LIMIT);
    process.terminate();
    process.wait(AT_ONCE);
    drop(alarmed.broker);
}
