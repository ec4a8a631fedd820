//! Wrong clocks, and clocks that are set while processes run.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use dtc::{
    clock::Clock,
    protocol::{
        ids::{RequestHash, TransactionId, TransactionKey, WorkerId},
        message::{Decision, Outcome},
        time::Time,
    },
    transport::amqp::publisher::{OutgoingMessage, PublishOutcome, Publisher},
    wire::message::{Items, Kind},
};
use serde_json::{Value, json};

use super::{
    READY, System,
    load::{Load, Plan},
    until,
};
use crate::{
    broker::place,
    processes::{LIMIT, Process},
};

const NOT_READY: &str = "not ready until the clocks fit";
const FITS_AGAIN: &str = "this worker's clock fits that of the broker again";

/// A machine's clock, as its processes see it.
struct Machine {
    library: PathBuf,
    offset: PathBuf,
}

impl Machine {
    /// A machine whose clock is so many seconds ahead.
    fn ahead_by(system: &System, name: &str, seconds: i64) -> Self {
        let library = system.world.path(&format!("{name}.so"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/clock.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", "-o"]).args([&library, &source]);
        // There is a linker, since Rust needs one.
        assert!(compiler.status().unwrap().success(), "{compiler:?}");
        let machine = Self { library, offset: system.world.path(&format!("{name}.offset")) };
        machine.set(seconds);
        machine
    }

    fn set(&self, seconds: i64) {
        // A process that reads it meanwhile finds either the old or the new file.
        let written = self.offset.with_extension("written");
        fs::write(&written, seconds.to_string()).unwrap();
        fs::rename(written, &self.offset).unwrap();
    }

    fn start(&self, name: &str, command: &mut Command) -> Process {
        let command = command.env("LD_PRELOAD", &self.library).env("CLOCK_OFFSET", &self.offset);
        Process::start(name, command)
    }

    fn worker(&self, system: &System, name: &str) -> Process {
        let mut command = system.world.dtc(&["worker", "--name", name]);
        self.start(name, command.arg("--ready-file").arg(ready_file(system, name)))
    }

    fn instance(&self, system: &System, name: &str) -> Process {
        let mut command = system.world.dtc(&["service", "--name", name, "--instance", name]);
        command.arg("--services").arg(&system.services).arg("--state").arg(system.state());
        let process = self.start(name, &mut command);
        process.wait_for_line(READY, LIMIT);
        process
    }
}

fn ready_file(system: &System, worker: &str) -> PathBuf {
    system.world.path(&format!("{worker}.ready"))
}

fn payments() -> Value {
    json!([{"name": "payments", "max_concurrency": 50}])
}

fn load<'a>(system: &'a System, prefix: &'static str, total: usize) -> Load<'a> {
    // Less than the clocks differ here.
    let timeout = Some(Duration::from_secs(20));
    let plan = Plan { services: &["payments"], total, per_second: 100, timeout };
    Load::start(system, prefix, plan)
}

fn n_errors(process: &Process) -> usize {
    process.stderr.text().lines().filter(|line| line.contains("ERROR")).count()
}

/// Writes a record of `worker` from a time that is `ahead`.
fn write_record(system: &System, worker: &str, ahead: Duration) {
    let decided_at = Clock::start().now() + ahead;
    let requested_at = Time::from_millis(decided_at.as_millis() / 1000 * 1000);
    let record = Decision {
        key: TransactionKey {
            id: TransactionId::parse(&format!("by-{worker}")).unwrap(),
            requested_at,
        },
        request_hash: RequestHash([7; 16]),
        outcome: Outcome::Aborted,
        branches: Vec::new(),
        reason: None,
        decided_at,
        worker: WorkerId::parse(worker).unwrap(),
    };
    let mut items = Items::new();
    items.push(&record).unwrap();
    let message = OutgoingMessage {
        key: system.names.journal(),
        message_type: Kind::Decision.as_type(),
        body: items.into_body(),
        persistent: true,
        mandatory: true,
        ..OutgoingMessage::default()
    };
    system.runtime.block_on(async {
        let connection = Arc::new(system.address().connect("publish").await.unwrap());
        let mut publisher = Publisher::open(&connection, "decisions").await.unwrap();
        publisher.publish(message, ());
        let ((), published) = publisher.next().await.unwrap();
        assert!(matches!(published, PublishOutcome::Confirmed), "{published:?}");
        connection.close(200, "".into()).await.unwrap();
    });
}

#[test]
fn the_only_worker_rejects_nothing_while_its_clock_is_behind_and_is_not_ready_until_it_fits() {
    let system = System::new(place(), payments());
    let _instance = system.instance("payments", "payments", &[]);
    let machine = Machine::ahead_by(&system, "w1", -90);
    let worker = machine.worker(&system, "w1");
    worker.wait_for_line(READY, LIMIT);
    let load = load(&system, "t", 20);
    let said = worker.wait_for_line(NOT_READY, LIMIT);
    let why = "this worker's clock is behind the clock of producers, of the broker by ";
    assert!(said.contains("ERROR") && said.contains(why), "{said}");
    until("the ready file is gone", || !ready_file(&system, "w1").exists());
    machine.set(0);
    worker.wait_for_line(FITS_AGAIN, LIMIT);
    until("the ready file is there", || ready_file(&system, "w1").exists());
    assert_eq!(load.results().committed().len(), 20);
    assert_eq!(n_errors(&worker), 1);
}

#[test]
fn a_worker_whose_clock_is_behind_the_journals_newest_records_does_not_begin() {
    let system = System::new(place(), payments());
    let _instance = system.instance("payments", "payments", &[]);
    write_record(&system, "w0", Duration::ZERO);
    let machine = Machine::ahead_by(&system, "w1", -90);
    let worker = machine.worker(&system, "w1");
    let said = worker.wait_for_line(NOT_READY, LIMIT);
    let why = "this worker's clock is behind the clock of worker w0, of the broker by ";
    assert!(said.contains("ERROR") && said.contains(why), "{said}");
    assert!(!ready_file(&system, "w1").exists());
    machine.set(0);
    worker.wait_for_line(FITS_AGAIN, LIMIT);
    worker.wait_for_line(READY, LIMIT);
    assert_eq!(load(&system, "t", 1).results().committed().len(), 1);
    assert_eq!(n_errors(&worker), 1);
}

#[test]
fn a_worker_whose_clock_is_ahead_leaves_the_work_to_those_whose_clocks_fit() {
    let system = System::new(place(), payments());
    let _instance = system.instance("payments", "payments", &[]);
    let right = Machine::ahead_by(&system, "w1", 0).worker(&system, "w1");
    let machine = Machine::ahead_by(&system, "w2", 90);
    let wrong = machine.worker(&system, "w2");
    right.wait_for_line(READY, LIMIT);
    wrong.wait_for_line(READY, LIMIT);
    assert_eq!(load(&system, "t", 200).results().committed().len(), 200);
    let said = wrong.wait_for_line(NOT_READY, LIMIT);
    let why = "this worker's clock is ahead of the clock of worker w1, of the broker by ";
    assert!(said.contains(why), "{said}");
    assert!(ready_file(&system, "w1").exists());
    assert_eq!(n_errors(&right), 0);
    machine.set(0);
    wrong.wait_for_line(FITS_AGAIN, LIMIT);
}

#[test]
fn a_worker_whose_clock_is_an_hour_ahead_logs_that_and_does_not_blame_the_journal() {
    let system = System::new(place(), payments());
    let _instance = system.instance("payments", "payments", &[]);
    let machine = Machine::ahead_by(&system, "w1", 3600);
    let worker = machine.worker(&system, "w1");
    let said = worker.wait_for_line(NOT_READY, LIMIT);
    assert!(said.contains("this worker's clock is ahead of the clock of the broker by "), "{said}");
    machine.set(0);
    worker.wait_for_line(FITS_AGAIN, LIMIT);
    assert_eq!(load(&system, "t", 1).results().committed().len(), 1);
}

#[test]
fn a_worker_that_writes_records_from_the_future_stops_no_other() {
    let system = System::new(place(), payments());
    let _instance = system.instance("payments", "payments", &[]);
    write_record(&system, "w0", Duration::from_secs(90));
    let worker = system.worker("w1", &[]);
    write_record(&system, "w2", Duration::from_secs(90));
    assert_eq!(load(&system, "t", 20).results().committed().len(), 20);
    assert_eq!(n_errors(&worker), 0);
}

#[test]
fn a_process_whose_clock_was_wrong_at_its_start_continues_with_the_right_time() {
    for (worker_ahead, instance_ahead) in
        [(-30, 0), (-600, 0), (0, 30), (0, -600), (600, 0), (0, 3600)]
    {
        println!("worker {worker_ahead} s ahead, instance {instance_ahead} s ahead, set right");
        let system = System::new(place(), payments());
        let at_worker = Machine::ahead_by(&system, "worker", worker_ahead);
        let at_instance = Machine::ahead_by(&system, "instance", instance_ahead);
        let worker = at_worker.worker(&system, "worker");
        let instance = at_instance.instance(&system, "payments");
        worker.wait_for_line(READY, LIMIT);
        at_worker.set(0);
        at_instance.set(0);
        let told = load(&system, "t", 5).results();
        assert_eq!(told.committed().len(), 5, "{told:?}");
        for (process, ahead) in [(&worker, worker_ahead), (&instance, instance_ahead)] {
            match ahead {
                0 => {}
                1.. => drop(process.wait_for_line("the clock was set back", LIMIT)),
                _ => drop(process.wait_for_line("the clock was set forward", LIMIT)),
            }
        }
        assert_eq!(n_errors(&worker) + n_errors(&instance), 0);
    }
}
