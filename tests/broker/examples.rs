//! The programs in `examples` do what their headers say.
//!
//! `tests/run` builds them before it runs this: `cargo build --profile optimised --examples`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{fs, path::Path, process::Command};

use dtc::{
    TransactionKey,
    transport::amqp::names::{Names, Namespace},
};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::{
    broker::{Leftovers, place},
    crash::{leftovers, until},
    processes::{LIMIT, Process, World},
};

/// A place with the topology, and no processes.
struct Scene {
    world: World,
    _leftovers: Leftovers,
}

impl Scene {
    fn new() -> Self {
        let place = place();
        let names = Names::new(Namespace::parse(&place.namespace).unwrap());
        let services = json!([{"name": "payments"}, {"name": "stock"}]);
        let leftovers = leftovers(&place, &names, &services);
        let world = World::at(place);
        world.apply_topology(None);
        Self { world, _leftovers: leftovers }
    }

    /// An example, with the broker's address set as its comment says.
    fn example(&self, name: &str, arguments: &[&str]) -> Process {
        let mut command = example(name);
        command.args(arguments).current_dir(self.world.path(""));
        command.env("DTC__BROKER__URL", &self.world.place.url);
        command.env("DTC__BROKER__NAMESPACE", &self.world.place.namespace);
        Process::start(name, &mut command)
    }

    fn worker(&self) -> Process {
        let worker = self.example("worker", &[]);
        says(&worker, "ready");
        worker
    }

    fn service(&self, name: &str) -> Process {
        let service = self.example("service", &[name]);
        says(&service, &format!("{name} serves"));
        service
    }

    /// The lines in the store of `service`.
    fn stored(&self, service: &str) -> Vec<String> {
        let text = fs::read_to_string(self.world.path(&format!("{service}.store")));
        text.unwrap_or_default().lines().map(str::to_owned).collect()
    }
}

/// An example, in an empty environment.
fn example(name: &str) -> Command {
    let directory = Path::new(env!("CARGO_BIN_EXE_dtc")).parent().unwrap().join("examples");
    let path = directory.join(name);
    assert!(
        path.exists(),
        "build {} first: `cargo build --examples`, this profile",
        path.display()
    );
    let mut command = Command::new(path);
    command.env_clear();
    command
}

/// Waits until `process` prints `line` on stdout.
#[track_caller]
fn says(process: &Process, line: &str) {
    assert!(process.stdout.wait_for(line, LIMIT).is_some(), "`{line}` is not said in {LIMIT:?}");
}

#[test]
fn the_example_of_one_process_commits_an_order_and_aborts_one_that_costs_too_much() {
    let printed = Process::start("embedded", &mut example("embedded")).succeeded(LIMIT);
    let told = ["order-1: COMMITTED", "order-2: ABORTED, refused by payments"];
    assert_eq!(printed, [&told[..], &["70 left in the account"]].concat());
}

#[test]
fn the_examples_of_a_producer_a_worker_and_two_services_commit_an_order() {
    let scene = Scene::new();
    let mut worker = scene.worker();
    let services = ["payments", "stock"].map(|name| scene.service(name));
    let printed = scene.example("producer", &[]).succeeded(LIMIT);
    let [told] = &printed[..] else { panic!("one line, not {printed:?}") };
    assert!(told.starts_with("order-") && told.ends_with(": COMMITTED"), "{told}");

    // Requested again under its key, it is not executed again.
    let stored = scene.stored("payments");
    let key: TransactionKey = stored[0].split(' ').nth(1).unwrap().parse().unwrap();
    assert_eq!(scene.example("producer", &[&key.to_string()]).succeeded(LIMIT), [told.as_str()]);
    assert_eq!(scene.stored("payments"), stored);

    for process in &services {
        process.signal(Signal::SIGINT);
    }
    for mut process in services {
        process.exited(0, LIMIT);
    }
    worker.signal(Signal::SIGINT);
    worker.exited(0, LIMIT);
    says(&worker, "2 committed, 0 aborted");
}

#[test]
fn the_example_of_a_service_killed_with_a_prepared_order_reports_and_commits_it() {
    let scene = Scene::new();
    let _worker = scene.worker();
    let (mut payments, stock) = (scene.service("payments"), scene.service("stock"));
    // It is suspended, so that nothing is decided while the other one is killed.
    stock.stop();
    let order = json!({
        "id": "order-1", "involved_services": ["payments", "stock"], "data": {"amount": 100},
        "timeout_ms": 60_000,
    });
    let producer = scene.world.submit_given(&json!([order]), &["--wait", "--timeout", "60s"]);
    until("payments has prepared", || scene.stored("payments").len() == 1);
    payments.kill9();

    let payments = scene.example("service", &["payments"]);
    let line = payments.stdout.wait_for("in doubt", LIMIT).unwrap();
    assert!(line.starts_with("payments has 900 left, and is in doubt about order-1@"), "{line}");
    stock.cont();
    let told = producer.succeeded(LIMIT);
    assert!(told.iter().any(|line| line.contains("COMMITTED")), "{told:?}");
    until("both have committed", || {
        ["payments", "stock"].iter().all(|name| {
            let stored = scene.stored(name);
            stored.len() == 2 && stored[1].starts_with("committed ")
        })
    });
}
