//! Commits that their service can't apply: what is logged, and who retries them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{fs, time::Duration};

use dtc::{
    transport::amqp::stream::{Scan, StreamStart},
    wire::message::Kind,
};
use lapin::{Connection, ConnectionProperties};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::{
    broker::place,
    crash::until,
    processes::{LIMIT, Process},
    proxy::{Action, Frames, Scope},
    stand::{BOTH, Producer, ProxiedPlace, READY},
};

/// What the worker logs when it is settled.
const SETTLED: &str = "a parked commit is settled";

/// A worker, and a service called `stock` whose first transaction is parked.
struct Parked {
    producer: Producer,
    worker: Process,
    stock: Process,
    site: ProxiedPlace,
}

impl Parked {
    /// `commit`: how commits of `stock` behave.
    fn new(commit: Value) -> Self {
        let service = json!([{"name": "stock", "max_concurrency": 2, "commit": commit}]);
        let site = ProxiedPlace::of(place(), service);
        let (stock, worker, producer) = (site.service("stock"), site.worker(&[]), site.producer());
        let answer = producer.answered(&producer.submit(&["stock"]), LIMIT);
        println!("{answer}");
        assert_eq!(
            (&answer["status"], &answer["unresolved"]),
            (&json!("COMMITTED"), &json!(["stock"]))
        );
        Self { producer, worker, stock, site }
    }

    /// Starts one more instance, whose code has no fault.
    fn mended(&self) -> Process {
        let services = json!([{"name": "stock", "max_concurrency": 2}]);
        let services = self.site.world.file("mended.json", &services);
        let mut command = self.site.world.dtc(&["service", "--name", "stock"]);
        command.arg("--services").arg(services).arg("--state").arg(self.site.world.path("state"));
        command.args(["--instance", "mended", "--inquire-after", "200ms"]);
        let mended = Process::start("mended", &mut command);
        mended.wait_for_line(READY, LIMIT);
        mended
    }
}

/// The worker logged that an operator is needed, and nothing when the commit was applied later.
#[test]
fn a_parked_commit_is_logged_as_being_retried_and_as_settled() {
    // The first time, three more for the worker, and one in the background.
    let parked = Parked::new(json!({"fail_first": 5}));
    let said = parked.worker.wait_for_line("ERROR", LIMIT);
    println!("{said}");
    assert!(said.contains("commit parked") && said.contains("keep retrying"), "{said}");
    assert!(said.contains("simulated error") && !said.contains("operator"), "{said}");
    println!("{}", parked.stock.wait_for_line("an outcome is parked", LIMIT));
    println!("{}", parked.worker.wait_for_line(SETTLED, LIMIT));
    println!("{}", parked.stock.wait_for_line("a parked outcome is applied", LIMIT));
    parked.site.is_committed_once("t-0", &["stock"]);
    drop(parked.producer);
}

/// The lines named the transaction alone: which instance had written them was not to be found in a
/// log that several share.
#[test]
fn at_the_default_level_every_line_of_an_instance_names_service_and_instance() {
    let mut parked = Parked::new(json!({"fail_first": 5}));
    parked.stock.wait_for_line("a parked outcome is applied", LIMIT);
    parked.stock.terminate();
    parked.stock.exited(0, LIMIT);
    let lines = parked.stock.stderr.all();
    let is_of_id = |it: char| it.is_ascii_alphanumeric() || it == '-' || it == '_';
    let instance_of = |line: &str| {
        let (_, rest) = line.split_once("instance=").unwrap_or_else(|| panic!("{line}"));
        rest.split(|it| !is_of_id(it)).next().unwrap().to_owned()
    };
    let instance = instance_of(&lines[0]);
    for line in &lines {
        println!("{line}");
        assert_eq!(instance_of(line), instance, "{line}");
        for once in ["service=stock", "instance="] {
            assert_eq!(line.matches(once).count(), 1, "{line}");
        }
    }
    for what in ["an outcome is parked", "a parked outcome is applied"] {
        let line = lines.iter().find(|line| line.contains(what)).expect(what);
        assert_eq!(line.matches("transaction=t-0@").count(), 1, "{line}");
    }
    drop(parked.producer);
}

/// At the default level, the worker logged nothing about it until the commit was parked.
#[test]
fn the_worker_logs_a_warning_for_each_failure_of_a_commit() {
    let parked = Parked::new(json!({"fail_first": 5}));
    parked.worker.wait_for_line("commit parked", LIMIT);
    let lines = parked.worker.stderr.all();
    let warned = lines.iter().filter(|line| line.contains("failed to apply an outcome"));
    let warned: Vec<_> = warned.inspect(|line| println!("{line}")).collect();
    assert_eq!(warned.len(), 4, "the first, and three retries");
    for (line, failures) in warned.iter().zip(1..) {
        assert!(line.contains("WARN") && line.contains("simulated error"), "{line}");
        assert!(line.contains("t-0@") && line.contains("service=stock"), "{line}");
        assert!(line.contains(&format!("failures={failures}")), "{line}");
    }
}

/// It waited for the whole drain, in vain.
#[test]
fn an_instance_that_stops_leaves_parked_commits_to_the_next_one() {
    const LONG_BEFORE_ITS_DRAIN_ENDS: Duration = Duration::from_secs(15);
    let mut parked = Parked::new(json!({"fail_for": ["t-0"]}));
    parked.stock.wait_for_line("an outcome is parked", LIMIT);
    parked.stock.terminate();
    parked.stock.exited(0, LONG_BEFORE_ITS_DRAIN_ENDS);
    let said = parked.stock.stderr.wait_for("stopping though", LIMIT).expect("what it leaves");
    println!("{said}");
    assert!(said.contains("t-0@"), "{said}");
    let mended = parked.mended();
    parked.site.is_committed_once("t-0", &["stock"]);
    println!("{}", parked.worker.wait_for_line(SETTLED, LIMIT));
    drop((parked, mended));
}

/// The instance that had the parked command called its own code for ever, though another one had
/// committed: the commit was never settled, and its slot never freed.
#[test]
fn a_repaired_instance_applies_and_settles_what_a_broken_one_held() {
    let parked = Parked::new(json!({"fail_for": ["t-0"]}));
    parked.stock.wait_for_line("an outcome is parked", LIMIT);
    let mended = parked.mended();
    parked.site.is_committed_once("t-0", &["stock"]);
    println!("{}", parked.worker.wait_for_line(SETTLED, LIMIT));
    println!("{}", parked.stock.wait_for_line("a parked outcome is applied", LIMIT));
    drop((parked, mended));
}

/// How many records of each kind there are in the stream of unresolved transactions.
#[derive(Debug, Default, PartialEq, Eq)]
struct Records {
    parked: usize,
    settled: usize,
}

impl Records {
    fn at(site: &ProxiedPlace) -> Self {
        let (url, stream) = (site.place.url.clone(), site.name("unresolved"));
        Runtime::new().unwrap().block_on(async {
            let connecting = Connection::connect(&url, ConnectionProperties::default());
            let connection = connecting.await.unwrap();
            let mut scan =
                Scan::open(&connection, stream.into(), StreamStart::First).await.unwrap();
            let mut records = Self::default();
            while let Some((_, message)) = scan.next().await.unwrap() {
                let kind = message.properties.kind().as_ref().unwrap();
                match Kind::parse_type(kind.as_str()) {
                    Some(Kind::Parked) => records.parked += 1,
                    Some(Kind::Settled) => records.settled += 1,
                    other => panic!("{other:?}"),
                }
            }
            scan.close().await;
            connection.close(200, "".into()).await.unwrap();
            records
        })
    }
}

fn commits_of(site: &ProxiedPlace, service: &str) -> usize {
    let path = site.world.path("state").join(service).join("committed.log");
    fs::read_to_string(path).unwrap_or_default().lines().count()
}

/// Each request of the killed worker left a `settled` record for each of its services, though
/// nothing was parked; and every reader of the parked ones reads all of these.
#[test]
fn a_worker_killed_with_hundreds_of_requests_leaves_no_false_records_of_parked_commits() {
    const TOTAL: usize = 1500;
    let service = |name| json!({"name": name, "max_concurrency": 20, "max_wait_ms": 60_000});
    let site = ProxiedPlace::of(place(), json!(BOTH.map(service)));
    let services = BOTH.map(|name| site.service(name));
    let lines = (0..TOTAL).map(|number| {
        json!({"id": format!("t-{number}"), "involved_services": BOTH, "data": {}}).to_string()
    });
    let lines = lines.collect::<Vec<_>>().join("\n");
    let flags = ["submit", "-", "--wait", "--output", "ndjson"];
    let producer = Process::start_given("producer", &mut site.world.dtc(&flags), lines);
    let requests = site.name("requests");
    // In messages of up to 64.
    site.direct.until_holds(&requests, 20);

    let mut killed = site.worker(&[]);
    until("some are committed", || commits_of(&site, "stock") >= 100);
    killed.kill9();
    let before = commits_of(&site, "stock");
    assert!(before < TOTAL - 300, "{before} were committed before the worker was killed");
    let mut next = Process::start("w2", &mut site.world.dtc(&["worker", "--name", "w2"]));
    let answers = producer.succeeded(LIMIT);

    let committed = answers.iter().filter(|answer| answer.contains("COMMITTED")).count();
    assert_eq!(committed, TOTAL);
    // What it writes is safe when it has drained.
    next.terminate();
    next.exited(0, LIMIT);
    assert_eq!(Records::at(&site), Records::default());
    drop(services);
}

/// A worker that dies just after it has parked a commit has told nobody: its successor can't know.
/// That the commit was settled used to be recorded for each request that was delivered again.
#[test]
fn a_commit_parked_by_a_worker_that_then_dies_is_settled_once() {
    // The first time, and three more; the next one is the parked command's.
    let service = json!([{"name": "stock", "max_concurrency": 2, "commit": {"fail_first": 4}}]);
    let site = ProxiedPlace::of(place(), service);
    let (stock, mut killed, producer) = (site.service("stock"), site.worker(&[]), site.producer());
    let unresolved = Frames::confirms().on("w1").about(&site.name("unresolved"));
    let parked = site.proxy.rule(unresolved, Scope::All, Action::Swallow);
    let id = producer.submit(&["stock"]);
    parked.wait_for(1);
    killed.kill9();
    assert_eq!(Records::at(&site), Records { parked: 1, settled: 0 });

    let mut next = Process::start("w2", &mut site.world.dtc(&["worker", "--name", "w2"]));
    let answer = producer.answered(&id, LIMIT);
    assert_eq!((&answer["status"], &answer["unresolved"]), (&json!("COMMITTED"), &json!([])));
    println!("{}", next.wait_for_line(SETTLED, LIMIT));
    site.is_committed_once(&id, &["stock"]);
    next.terminate();
    next.exited(0, LIMIT);
    assert_eq!(Records::at(&site), Records { parked: 1, settled: 1 });
    drop((producer, stock));
}

/// A parked command is made safe before it is recorded. If no queue takes it, that must delay
/// neither the record nor the result; and the command was lost.
#[test]
fn a_parked_commit_that_no_queue_takes_delays_no_result_and_arrives_later() {
    let service = json!([{"name": "stock", "max_concurrency": 2, "commit": {"fail_first": 4}}]);
    let site = ProxiedPlace::of(place(), service);
    let (stock, mut worker, producer) = (site.service("stock"), site.worker(&[]), site.producer());
    site.direct.unbind(&site.name("finish.stock"), &site.name("finish.any"), "*.stock");
    let id = producer.submit(&["stock"]);
    println!("{}", worker.wait_for_line("has not taken a parked commit", LIMIT));
    let answer = producer.answered(&id, LIMIT);
    assert_eq!(
        (&answer["status"], &answer["unresolved"]),
        (&json!("COMMITTED"), &json!(["stock"]))
    );
    assert_eq!(Records::at(&site), Records { parked: 1, settled: 0 });

    site.world.apply_topology(Some(&site.services));
    println!("{}", worker.wait_for_line(SETTLED, LIMIT));
    site.is_committed_once(&id, &["stock"]);
    worker.terminate();
    worker.exited(0, LIMIT);
    assert_eq!(Records::at(&site), Records { parked: 1, settled: 1 });
    drop((producer, stock));
}
