//! A service and a producer in Python, and a producer in Node.js, in one system with workers and a service of
//! this crate.
//!
//! `books` is Python's, `payments` the binary's. They are asked in this order while they may be
//! contended. At the end, what each holds is read from its own storage.
//!
//! `DTC_TEST_PYTHON` is a Python with pika, and `DTC_TEST_NODE_MODULES` a directory with amqplib; by default
//! those that tests/run has installed.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]
#![allow(clippy::print_stdout, reason = "a test prints what it has measured")]

#[path = "../support/broker.rs"]
mod broker;
#[path = "../support/lines.rs"]
mod lines;
#[path = "../support/processes.rs"]
mod processes;
mod raw;
mod scenarios;
mod told;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use dtc::{
    protocol::ids::ServiceName,
    transport::amqp::names::{Names, Namespace},
};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    broker::{Leftovers, place},
    processes::{LIMIT, Process, World},
};

/// How often to check for something that is not notified.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Waits until `holds`, for [`LIMIT`] at most.
#[track_caller]
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        thread::sleep(LOOK_EVERY);
    }
}

/// The storage of Python's service.
#[derive(Debug)]
struct Books {
    prepared: Vec<Value>,
    committed: Vec<String>,
    /// Instance, what, id.
    calls: Vec<[String; 3]>,
}

impl Books {
    /// The calls for a transaction, in order.
    fn whats_of(&self, id: &str) -> Vec<&str> {
        self.calls.iter().filter(|call| call[2] == id).map(|call| call[1].as_str()).collect()
    }
}

/// One system at the shared broker, without processes.
struct System {
    world: World,
    names: Names,
    services: PathBuf,
    cap: u32,
    _leftovers: Leftovers,
}

impl System {
    /// `books` has `cap` slots, and a prepare waits for one as long as given; `payments` has many,
    /// and is slow to prepare.
    fn new(cap: u32, max_wait_ms: u32, payments_latency_ms: u32) -> Self {
        let place = place();
        let names = Names::new(Namespace::parse(&place.namespace).unwrap());
        let leftovers = leftovers(&place, &names);
        let world = World::at(place);
        let services = world.file(
            "services.json",
            &json!([
                {"name": "books", "max_concurrency": cap, "max_wait_ms": max_wait_ms},
                {"name": "payments", "max_concurrency": 100, "max_wait_ms": 60_000,
                    "prepare": {"latency_ms": payments_latency_ms}},
            ]),
        );
        world.apply_topology(Some(&services));
        Self { world, names, services, cap, _leftovers: leftovers }
    }

    fn payments(&self) -> Process {
        self.world.service(&self.services, "payments", Some(&self.state()))
    }

    /// An instance of Python's service, serving; its id begins with `label`.
    fn books(&self, label: &str) -> Process {
        let mut command = self.service();
        command.args(["--label", label, "--inquire-after", "5"]);
        command.args(["--max-concurrency", &self.cap.to_string()]);
        let process = Process::start(label, &mut command);
        process.wait_for_line("ready", LIMIT);
        process
    }

    fn service(&self) -> Command {
        let mut command = self.python("service.py");
        command.args(["--name", "books", "--state"]).arg(self.state());
        command
    }

    /// Runs Python's producer with `transactions`.
    fn produce(&self, transactions: &Value) -> Process {
        let mut command = self.python("producer.py");
        Process::start_given("producer", &mut command, transactions.to_string())
    }

    /// The results of these, by id, as the producer in Node.js gets them.
    #[track_caller]
    fn run_by_node(&self, transactions: &Value) -> BTreeMap<String, Value> {
        let mut command = Command::new("node");
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/producer.mjs"));
        command.arg(node_modules());
        command.args(["--broker", &self.world.place.url]);
        command.args(["--namespace", &self.world.place.namespace]);
        results(Process::start_given("producer", &mut command, transactions.to_string()))
    }

    /// The results of these, by id.
    #[track_caller]
    fn run(&self, transactions: &Value) -> BTreeMap<String, Value> {
        results(self.produce(transactions))
    }

    fn python(&self, script: &str) -> Command {
        let mut command = Command::new(python());
        command
            .arg("-u")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop").join(script));
        command.args(["--broker", &self.world.place.url]);
        command.args(["--namespace", &self.world.place.namespace]);
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        command
    }

    fn state(&self) -> PathBuf {
        self.world.path("state")
    }

    /// A gate: a file that a call waits for, and its name in a transaction's data.
    fn gate(&self, name: &str) -> (PathBuf, Value) {
        let path = self.world.path(name);
        let text = json!(path.to_str().unwrap());
        (path, text)
    }

    /// What Python's service holds.
    fn held_by_books(&self) -> Books {
        let shown = Process::start("show", self.service().arg("--show")).succeeded(LIMIT);
        let shown: Value = serde_json::from_str(&shown[0]).unwrap();
        let rows = |name: &str| shown[name].as_array().unwrap().clone();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        Books {
            prepared: rows("prepared"),
            committed: rows("committed").iter().map(|row| text(&row[0])).collect(),
            calls: rows("calls").iter().map(|row| [0, 1, 2].map(|at| text(&row[at]))).collect(),
        }
    }

    /// The ids that the binary's service has committed, in order.
    fn committed_by_payments(&self) -> Vec<String> {
        let log = fs::read_to_string(self.state().join("payments/committed.log"));
        let first = |line: &str| line.split_whitespace().next().unwrap().to_owned();
        let mut ids: Vec<_> = log.unwrap_or_default().lines().map(first).collect();
        ids.sort();
        ids
    }

    /// Asserts that both services come to hold these, once each, and nothing in doubt.
    #[track_caller]
    fn both_hold(&self, committed: &[&str]) -> Books {
        until("nothing is left prepared", || {
            let prepared = fs::read_dir(self.state().join("payments/prepared"));
            prepared.into_iter().flatten().count() == 0 && self.held_by_books().prepared.is_empty()
        });
        let books = self.held_by_books();
        assert_eq!(books.committed, committed, "{books:?}");
        assert_eq!(self.committed_by_payments(), committed);
        books
    }
}

/// The results of a producer, by id.
#[track_caller]
fn results(producer: Process) -> BTreeMap<String, Value> {
    let lines = producer.succeeded(LIMIT);
    let results = lines.iter().map(|line| serde_json::from_str::<Value>(line).unwrap());
    results.map(|result| (result["id"].as_str().unwrap().to_owned(), result)).collect()
}

/// A transaction over both services; its data tells `books` how to behave.
fn order(id: &str, books: &Value) -> Value {
    json!({"id": id, "involved_services": ["books", "payments"], "timeout_ms": 60_000,
        "data": {"amount": 100, "books": books}})
}

fn python() -> PathBuf {
    installed("DTC_TEST_PYTHON", "python-pika-1.3.2/bin/python")
}

fn node_modules() -> PathBuf {
    installed("DTC_TEST_NODE_MODULES", "node-amqplib-2.3.1/node_modules")
}

/// What the variable names, or else what tests/run has installed.
fn installed(variable: &str, name: &str) -> PathBuf {
    if let Some(path) = env::var_os(variable) {
        return path.into();
    }
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.unwrap_or_else(|| Path::new(&env::var_os("HOME").unwrap()).join(".cache"));
    let path = cache.join("dtc").join(name);
    assert!(path.exists(), "there is no {}: tests/run installs it", path.display());
    path
}

fn leftovers(place: &broker::Place, names: &Names) -> Leftovers {
    let mut queues = vec![
        names.requests(),
        names.journal(),
        names.packed_journal(),
        names.inquiries(),
        names.unresolved(),
        names.audit(),
        names.rejected(),
    ];
    for service in ["books", "payments"].map(|name| ServiceName::parse(name).unwrap()) {
        queues.extend([names.prepare_of(&service), names.finish_any_of(&service)]);
    }
    let exchanges = [
        names.requests(),
        names.prepare(),
        names.replies(),
        names.finish(),
        names.finish_any(),
        names.results(),
        names.inquiries(),
    ];
    let texts =
        |names: &[lapin::types::ShortString]| names.iter().map(|it| it.to_string()).collect();
    place.leaves(texts(&queues), texts(&exchanges))
}
