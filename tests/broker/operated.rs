//! What may happen to a worker in normal operation.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]
#![allow(clippy::disallowed_methods, reason = "how long a process takes to end")]

use std::{
    fs,
    io::{self, BufRead, BufReader, PipeReader},
    process::{Child, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use dtc::clock::Clock;
use lapin::BasicProperties;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use crate::{
    broker::place,
    processes::{LIMIT, Process, World},
    stand::{BOTH, ProxiedPlace, ProxiedSystem, READY},
};

/// Their log lines fill a pipe several times.
const MALFORMED: usize = 2000;

/// Their log lines are more than may wait to be read.
const TOO_MANY: usize = 6000;

/// A worker whose log goes into a pipe, which is closed when this is dropped.
struct Logging(Child);

impl Logging {
    /// Its log, and the worker.
    fn worker(site: &ProxiedPlace) -> (PipeReader, Self) {
        let (log, writing) = io::pipe().unwrap();
        let mut command = site.world.dtc(&["worker", "--name", "w1"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(writing);
        (log, Self(command.spawn().unwrap()))
    }

    fn ends_when_told(mut self) {
        kill(Pid::from_raw(self.0.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
        let began = Instant::now();
        while self.0.try_wait().unwrap().is_none() {
            assert!(began.elapsed() < LIMIT, "it doesn't end in {LIMIT:?}");
            thread::yield_now();
        }
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Logging {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[track_caller]
fn until(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < LIMIT, "not {what} within {LIMIT:?}");
        thread::yield_now();
    }
}

fn malformed(site: &ProxiedPlace, count: usize) {
    for _ in 0..count {
        site.direct.publish(&site.name("requests"), "request", BasicProperties::default(), "{}");
    }
}

/// The worker wrote its log in the loop that does the work: it stood still, and didn't handle
/// SIGTERM.
#[test]
fn a_worker_whose_log_nobody_reads_continues_and_stops_on_a_signal() {
    let site = ProxiedPlace::new();
    let services = BOTH.map(|name| site.service(name));
    let (log, worker) = Logging::worker(&site);
    malformed(&site, MALFORMED);
    site.direct.until_holds(&site.name("rejected"), MALFORMED);
    let producer = site.producer();
    let answer = producer.answered(&producer.submit(&BOTH), LIMIT);
    assert_eq!(answer["status"], "COMMITTED", "{answer}");
    worker.ends_when_told();
    drop((log, producer, services));
}

#[test]
fn a_log_that_is_read_late_says_how_many_lines_were_dropped() {
    let site = ProxiedPlace::new();
    let (log, worker) = Logging::worker(&site);
    malformed(&site, TOO_MANY);
    site.direct.until_holds(&site.name("rejected"), TOO_MANY);
    let (telling, told) = mpsc::channel();
    let reading = thread::spawn(move || {
        let lines = BufReader::new(log).lines().map(Result::unwrap);
        lines.filter(|line| line.contains("are lost")).for_each(|line| drop(telling.send(line)));
    });
    let began = Instant::now();
    let line = loop {
        malformed(&site, 1);
        if let Ok(line) = told.recv_timeout(Duration::from_millis(100)) {
            break line;
        }
        assert!(began.elapsed() < LIMIT, "nobody is told");
    };
    println!("{line}");
    assert!(line.ends_with(" lines of the log are lost: nobody read them"), "{line}");
    worker.ends_when_told();
    reading.join().unwrap();
}

/// Each of them ended a worker at once, and left what it had begun to others.
#[test]
fn a_worker_ignores_signals_without_meaning_and_drains_on_those_that_end_it() {
    let mut stand = ProxiedSystem::new();
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGALRM] {
        stand.worker.signal(signal);
        stand.worker.wait_for_line(&format!("{signal} is ignored"), LIMIT);
    }
    stand.commits(&BOTH);
    stand.worker.signal(Signal::SIGQUIT);
    stand.worker.exited(0, Duration::from_secs(60));
    assert!(stand.worker.stderr.text().contains("stopped"), "{}", stand.worker.stderr.text());
}

/// A class name, which client libraries put into `type`, led to no answer.
#[test]
fn a_request_of_a_foreign_type_is_answered_as_invalid() {
    let stand = ProxiedSystem::new();
    let (direct, results) = (&stand.site.direct, stand.site.name("results"));
    let queue = stand.site.name("told");
    direct.open_queue(&queue, &results, "tk.*");
    let properties = BasicProperties::default()
        .with_type("OrderPlaced, Shop.Api".into())
        .with_timestamp(1_700_000_000);
    let body = r#"{"id":"foreign","involved_services":["stock"],"data":{},"reply":"tk"}"#;
    direct.publish(&stand.site.name("requests"), "request", properties, body);
    let told = direct.next_of(&queue, "foreign", LIMIT).expect("it is answered");
    println!("{told}");
    assert!(told.contains("ABORTED") && told.contains("invalid"), "{told}");
    assert!(told.contains("OrderPlaced, Shop.Api"), "{told}");
}

/// Workers used 60 s, whatever was configured.
#[test]
fn a_request_from_a_clock_that_is_ahead_by_less_than_the_margin_is_served() {
    let site = ProxiedPlace::new();
    let wide = |words: &[&str]| {
        let mut command = site.world.dtc(words);
        Process::start(words[0], command.env("DTC__TOPOLOGY__CLOCK_MARGIN", "10min"))
    };
    // How far back a new journal is complete depends on the margin, too.
    let file = site.services.to_str().unwrap();
    wide(&["topology", "delete", "--services", file, "--yes"]).succeeded(LIMIT);
    wide(&["topology", "apply", "--services", file]).succeeded(LIMIT);
    let services = BOTH.map(|name| site.service(name));
    let worker = wide(&["worker", "--name", "w1"]);
    worker.wait_for_line(READY, LIMIT);
    let (queue, results) = (site.name("told"), site.name("results"));
    site.direct.open_queue(&queue, &results, "tk.*");
    let ahead = Clock::start().now() + Duration::from_secs(180);
    let properties = BasicProperties::default().with_timestamp(ahead.as_millis() / 1000);
    let body = r#"{"id":"ahead","involved_services":["stock"],"data":{},"reply":"tk"}"#;
    site.direct.publish(&site.name("requests"), "request", properties, body);
    let told = site.direct.next_of(&queue, "ahead", LIMIT).expect("it is answered");
    assert!(told.contains("COMMITTED"), "{told}");
    drop((worker, services));
}

/// A line that is too large for any message ended the run with everything in flight, and committed
/// transactions were not printed.
#[test]
fn a_line_too_large_for_a_message_loses_no_results_of_earlier_lines() {
    const GOOD: usize = 20;
    let service = json!([{"name": "stock", "max_concurrency": 20, "prepare": {"latency_ms": 600}}]);
    let site = ProxiedPlace::of(place(), service);
    let running = (site.service("stock"), site.worker(&[]));
    let line = |id: &str, services: &[String]| {
        format!("{}\n", json!({"id": id, "involved_services": services, "data": {}}))
    };
    let mut lines: String =
        (0..GOOD).map(|number| line(&format!("t-{number}"), &["stock".to_owned()])).collect();
    let many: Vec<_> = (0..1001).map(|number| format!("s{number}")).collect();
    lines += &line("bad", &many);
    let mut command = site.world.dtc(&["submit", "-", "--wait", "--output", "ndjson"]);
    let mut submit = Process::start_given("submit", &mut command, lines);
    submit.exited(65, LIMIT);
    assert_eq!(submit.stdout.all().len(), GOOD, "{}", submit.stderr.text());
    let said = submit.stderr.text();
    assert!(said.contains(&format!("{GOOD} committed")) && said.contains("1000"), "{said}");
    drop(running);
}

/// Others had already been begun when that was found.
#[test]
fn an_array_with_a_transaction_too_large_for_a_message_sends_nothing() {
    let world = World::at(place());
    let services = world.file("services.json", &json!([{"name": "stock", "max_concurrency": 5}]));
    let large = json!({"x": "y".repeat(255 * 1024)});
    let transactions = world.file(
        "transactions.json",
        &json!([{"id": "small", "involved_services": ["stock"], "data": {}},
                {"id": "large", "involved_services": ["stock"], "data": large}]),
    );
    let mut command = world.dtc_at_broker(&["run"]);
    command.arg("--services").arg(services).arg("--transactions").arg(transactions);
    let mut run = Process::start("run", &mut command);
    run.exited(65, LIMIT);
    let said = run.stderr.text();
    assert!(said.contains("large") && said.contains("261120"), "{said}");
    assert_eq!(run.stdout.text(), "");
}

/// Nobody noticed, and each took the other's records for its own when it compared clocks.
#[test]
fn two_workers_with_one_name_are_reported() {
    let site = ProxiedPlace::new();
    let services = BOTH.map(|name| site.service(name));
    let twins = [(); 2].map(|()| site.world.worker("twin"));
    let transactions: Vec<_> = (0..200)
        .map(|number| json!({"id": format!("t{number}"), "involved_services": BOTH, "data": {}}))
        .collect();
    site.world.submit_given(&json!(transactions), &["--wait"]).succeeded(LIMIT);
    for twin in &twins {
        let line = twin.wait_for_line("writes to the journal under this worker's name", LIMIT);
        assert!(line.contains("WARN") && line.contains("worker=twin"), "{line}");
    }
    drop(services);
}

/// Its ready file stayed while every transaction was aborted.
#[test]
fn an_instance_is_not_ready_while_its_store_accepts_no_writes() {
    let site = ProxiedPlace::new();
    let (state, ready) = (site.world.path("state"), site.world.path("ready"));
    let mut command = site.world.dtc(&["service", "--name", "stock"]);
    command.arg("--services").arg(&site.services);
    command.arg("--state").arg(&state).arg("--ready-file").arg(&ready);
    let (stock, worker) = (Process::start("stock", &mut command), site.world.worker("w1"));
    until("ready", || ready.exists());
    let outcome = |id: &str| {
        let transactions = json!([{"id": id, "involved_services": ["stock"], "data": {}}]);
        let submit = site.world.submit_given(&transactions, &["--wait", "--detail"]);
        submit.succeeded(LIMIT).concat()
    };
    // Its directory for writing is no longer a directory.
    let writing = state.join("stock/writing");
    fs::remove_dir(&writing).unwrap();
    fs::write(&writing, "").unwrap();
    for id in ["t1", "t2", "t3"] {
        let told = outcome(id);
        assert!(told.contains("ABORTED") && told.contains("failed"), "{told}");
    }
    let line = stock.wait_for_line("not ready until one succeeds", LIMIT);
    assert!(line.contains("WARN") && line.contains("Not a directory"), "{line}");
    until("not ready", || !ready.exists());

    fs::remove_file(&writing).unwrap();
    fs::create_dir(&writing).unwrap();
    let told = outcome("t4");
    assert!(told.contains("COMMITTED"), "{told}");
    stock.wait_for_line("prepares succeed again", LIMIT);
    until("ready again", || ready.exists());
    drop(worker);
}

/// Its services.json said that all instances share one cap, but each of them had its own slots: the
/// queue was declared from an older services.json, and nothing reported that.
#[test]
fn an_instance_whose_services_json_differs_from_its_queue_logs_it() {
    let site = ProxiedPlace::new();
    let newer = json!([
        {"name": "stock", "max_concurrency": 8, "max_wait_ms": 500, "cap": "service"},
    ]);
    let newer = site.world.file("newer.json", &newer);
    let instance =
        |services| site.world.service(services, "stock", Some(&site.world.path("state")));
    let (same, another) = (instance(&site.services), instance(&newer));
    for told in [
        r#"field="max_wait_ms" services_json="500" queue="10000""#,
        r#"field="cap" services_json="service" queue="instance""#,
    ] {
        let line = another.wait_for_line(told, LIMIT);
        assert!(line.contains("was made from another services.json"), "{line}");
    }
    drop(another);
    // The instance with the same services.json as the queue was served all the time, and logged
    // nothing about it.
    assert!(!same.stderr.all().iter().any(|line| line.contains("another services.json")));
}

/// It logged `ready` like the one that had all the work.
#[test]
fn an_instance_that_stands_by_says_so_and_says_when_it_takes_over() {
    let stock = json!([{"name": "stock", "max_concurrency": 2, "cap": "service"}]);
    let site = ProxiedPlace::of(place(), stock);
    let mut active = site.service("stock");
    let ready = site.world.path("ready");
    let mut command = site.world.dtc(&["service", "--name", "stock"]);
    command.arg("--services").arg(&site.services);
    command.arg("--state").arg(site.world.path("state")).arg("--ready-file").arg(&ready);
    let standby = Process::start("standby", &mut command);
    println!("{}", standby.wait_for_line("ready, and standing by", LIMIT));
    until("the standby is ready", || ready.exists());
    let (worker, producer) = (site.worker(&[]), site.producer());
    let commits = || {
        let answer = producer.answered(&producer.submit(&["stock"]), LIMIT);
        assert_eq!(answer["status"], "COMMITTED", "{answer}");
    };
    commits();
    active.kill9();
    commits();
    println!("{}", standby.wait_for_line("has taken over", LIMIT));
    assert!(active.stderr.all().iter().all(|line| !line.contains("standing by")));
    drop(worker);
}

/// The message was only the broker's own: `NOT_FOUND - no queue 'dtc.journal' in vhost '/'`.
#[test]
fn status_without_a_journal_names_the_command_that_creates_it() {
    let site = ProxiedPlace::new();
    let mut command = site.world.dtc_at_broker(&["status", "TX1", "--namespace", "nobodys"]);
    let mut status = Process::start("status", &mut command);
    status.exited(78, LIMIT);
    status.wait_for_line(
        "there is no stream `nobodys.journal`: run `dtc topology apply`, or give the broker and the \
         namespace that were given there",
        LIMIT,
    );
}

/// An instance logged `not connected`, as if there were no broker, and then that "something of the
/// topology" was missing.
#[test]
fn a_service_without_its_topology_names_what_is_missing_and_serves_once_it_is_applied() {
    let site = ProxiedPlace::new();
    let queue = site.name("finish.stock");
    site.direct.delete_queue(&queue);
    let instance = site.start_service("stock");
    for expected in [
        format!(
            "queue `{queue}` does not exist yet: the broker is starting, or `dtc topology apply`"
        ),
        format!("queue `{queue}` does not exist: run `dtc topology apply` for this service"),
    ] {
        println!("{}", instance.wait_for_line(&expected, LIMIT));
    }
    site.world.apply_topology(Some(&site.services));
    instance.wait_for_line(READY, LIMIT);
}

/// Its instances asked every few seconds, for as long as they ran, and no log had a line.
#[test]
fn a_prepared_transaction_that_the_journal_does_not_reach_back_to_is_logged_once() {
    let site = ProxiedPlace::new();
    let worker = site.worker(&[]);
    let asked = |id: &str| {
        let body = json!([{
            "id": id, "requested_at": 1_700_000_000, "request_hash": "0".repeat(32),
            "service": "stock", "instance": "i1", "branch": "i1.1", "deadline": 1_700_000_005_000_u64,
        }]);
        let properties = BasicProperties::default().with_type("dtc.inquiry.v1".into());
        let (replies, body) = (site.name("replies"), body.to_string());
        site.direct.publish(&replies, "any.stock", properties, &body);
    };
    let told = |id: &str| format!("transaction={id}@1700000000000 service=stock");
    for id in ["left", "left", "left-too"] {
        asked(id);
        let line = worker.wait_for_line(&told(id), LIMIT);
        assert!(line.contains("ERROR") && line.contains("outcome can't be determined"), "{line}");
    }
    let lines = worker.stderr.all();
    assert_eq!(lines.iter().filter(|line| line.contains(&told("left"))).count(), 1, "{lines:#?}");
}
