//! The state that is left after a failure midway: real processes, killed, frozen and cut off.
//!
//! Each test starts the binary's workers and services on its own node or on a shared one, runs
//! transactions, injects its fault, and then reads what the services hold from the directories that
//! their instances share: see [`ledger`].

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

mod anew;
mod blocked;
mod clocks;
mod decided;
mod drain;
mod frozen;
mod instances;
mod ledger;
mod load;
mod long_journal;
mod packed;
mod poison;
mod producers;
mod proxy;
mod refused;
mod restarts;
mod silenced;
mod stream;
mod workers;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use dtc::{
    Client,
    protocol::ids::ServiceName,
    transport::amqp::{
        connection::Broker as Address,
        names::{Names, Namespace},
    },
};
use serde_json::Value;
use tokio::{runtime::Runtime, time::Instant};

use self::ledger::Ledger;
use crate::{
    broker::{Leftovers, Place},
    processes::{LIMIT, Process, World},
};

/// How long a transaction may take on a busy machine, including all faults.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often to check for something that is not notified.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Waits until `holds`, for [`LIMIT`] at most.
#[track_caller]
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The services of one system, their broker, and their state.
struct System {
    world: World,
    services: PathBuf,
    specs: Value,
    names: Names,
    runtime: Runtime,
    _leftovers: Leftovers,
}

impl System {
    /// A system at `place` with these services; everything is declared, and nothing runs.
    fn new(place: Place, specs: Value) -> Self {
        let names = Names::new(Namespace::parse(&place.namespace).unwrap());
        let leftovers = leftovers(&place, &names, &specs);
        let world = World::at(place);
        let services = world.file("services.json", &specs);
        world.apply_topology(Some(&services));
        let runtime = Runtime::new().unwrap();
        Self { world, services, specs, names, runtime, _leftovers: leftovers }
    }

    /// `dtc worker`, just started.
    fn start_worker(&self, name: &str, flags: &[&str]) -> Process {
        let mut command = self.world.dtc(&["worker", "--name", name]);
        Process::start(name, command.args(flags))
    }

    /// `dtc worker`, serving.
    fn worker(&self, name: &str, flags: &[&str]) -> Process {
        let process = self.start_worker(name, flags);
        process.wait_for_line(READY, LIMIT);
        process
    }

    /// `dtc worker`, serving, which reaches its broker through another port.
    fn worker_by(&self, port: u16, name: &str) -> Process {
        let mut place = self.world.place.clone();
        place.url = at_port(&place.url, port);
        let mut command = World::at(place).dtc(&["worker", "--name", name]);
        let process = Process::start(name, command.current_dir("/"));
        process.wait_for_line(READY, LIMIT);
        process
    }

    /// An instance of a service whose id begins with `label`, serving.
    fn instance(&self, service: &str, label: &str, flags: &[&str]) -> Process {
        let mut command = self.world.dtc(&["service", "--name", service, "--instance", label]);
        command.arg("--services").arg(&self.services).arg("--state").arg(self.state());
        let process = Process::start(label, command.args(flags));
        process.wait_for_line(READY, LIMIT);
        process
    }

    fn state(&self) -> PathBuf {
        self.world.path("state")
    }

    /// The state of `service`.
    fn ledger(&self, service: &str) -> Ledger {
        Ledger::read(&self.state().join(service))
    }

    /// The state of every service.
    fn ledgers(&self) -> Vec<Ledger> {
        let specs = self.specs.as_array().unwrap();
        specs.iter().map(|spec| self.ledger(spec["name"].as_str().unwrap())).collect()
    }

    /// Waits until no service holds anything as prepared any more.
    #[track_caller]
    fn wait_until_nothing_is_prepared(&self) {
        until("nothing is left prepared", || {
            self.ledgers().iter().all(|ledger| ledger.prepared.is_empty())
        });
    }

    fn address(&self) -> Address {
        Address::new(self.world.place.url.parse().unwrap(), "test")
    }

    fn client(&self) -> Client {
        let place = &self.world.place;
        let client = Client::builder(&place.url).namespace(&place.namespace);
        client.publish_timeout(PATIENCE).connect_lazy().unwrap()
    }
}

/// The address `url`, with another port on this machine.
fn at_port(url: &str, port: u16) -> String {
    let (before, host_and_path) = url.rsplit_once('@').unwrap();
    let (_, path) = host_and_path.split_once('/').unwrap();
    format!("{before}@127.0.0.1:{port}/{path}")
}

/// The port of `url`.
fn port_of(url: &str) -> u16 {
    let (_, host_and_path) = url.rsplit_once('@').unwrap();
    let (host, _) = host_and_path.split_once('/').unwrap();
    host.rsplit_once(':').map_or(5672, |(_, port)| port.parse().unwrap())
}

/// What a process logs when it serves.
const READY: &str = "ready";

/// The topology of these services.
pub(crate) fn leftovers(place: &Place, names: &Names, specs: &Value) -> Leftovers {
    let (mut queues, mut exchanges) = (Vec::new(), Vec::new());
    for name in [
        names.requests(),
        names.journal(),
        names.packed_journal(),
        names.inquiries(),
        names.unresolved(),
        names.audit(),
        names.rejected(),
    ] {
        queues.push(name.to_string());
    }
    for spec in specs.as_array().unwrap() {
        let service = ServiceName::parse(spec["name"].as_str().unwrap()).unwrap();
        queues.push(names.prepare_of(&service).to_string());
        queues.push(names.finish_any_of(&service).to_string());
    }
    for name in [
        names.requests(),
        names.prepare(),
        names.replies(),
        names.finish(),
        names.finish_any(),
        names.results(),
        names.inquiries(),
    ] {
        exchanges.push(name.to_string());
    }
    place.leaves(queues, exchanges)
}

/// A file's content; empty if it doesn't exist.
fn text_of(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
