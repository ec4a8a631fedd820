//! A worker, two services and a producer, as processes, which reach their broker through a
//! [`Proxy`].
//!
//! They run long before anything is stopped on their connections, and nothing restarts them: they
//! must recover by themselves.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    fs,
    io::Write,
    path::PathBuf,
    process::ChildStdin,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use dtc::transport::amqp::names::{Names, Namespace};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    broker::{Leftovers, Place, place},
    crash::{leftovers, until},
    direct::Direct,
    processes::{LIMIT, Process, World},
    proxy::{ActiveRule, Proxy},
};

/// How long a system may stand still, whatever fails to arrive.
pub(crate) const WITHIN: Duration = Duration::from_secs(15);

/// How often one more transaction is submitted while none commits.
const ANOTHER_AFTER: Duration = Duration::from_secs(1);

/// What a process logs when it serves.
pub(crate) const READY: &str = "ready";

/// The two services.
pub(crate) const BOTH: [&str; 2] = ["payments", "stock"];

/// A system behind a proxy. Processes end before the proxy does, or they would log errors.
pub(crate) struct ProxiedSystem {
    producer: Producer,
    pub(crate) worker: Process,
    pub(crate) payments: Process,
    pub(crate) stock: Process,
    pub(crate) site: ProxiedPlace,
}

/// The place of a system.
pub(crate) struct ProxiedPlace {
    pub(crate) proxy: Proxy,
    /// Everything through the proxy.
    pub(crate) world: World,
    /// The same place, without the proxy.
    pub(crate) place: Place,
    pub(crate) direct: Direct,
    pub(crate) services: PathBuf,
    _leftovers: Leftovers,
}

impl ProxiedPlace {
    /// The topology of both services, and no processes.
    pub(crate) fn new() -> Self {
        let service = |name| json!({"name": name, "max_concurrency": 8, "max_wait_ms": 10_000});
        Self::of(place(), json!([service("payments"), service("stock")]))
    }

    /// The same with services that do one thing at a time.
    pub(crate) fn narrow() -> Self {
        let service = |name| json!({"name": name, "max_concurrency": 1, "max_wait_ms": 10_000});
        Self::of(place(), json!([service("payments"), service("stock")]))
    }

    /// The same with these services, at `place`.
    pub(crate) fn of(place: Place, specs: Value) -> Self {
        let proxy = Proxy::to(&place.url);
        let names = Names::new(Namespace::parse(&place.namespace).unwrap());
        let leftovers = leftovers(&place, &names, &specs);
        let mut behind = place.clone();
        behind.url = proxy.url(&place.url);
        let world = World::at(behind);
        let services = world.file("services.json", &specs);
        world.apply_topology(Some(&services));
        let direct = Direct::to(&place);
        Self { proxy, world, place, direct, services, _leftovers: leftovers }
    }

    /// `dtc worker` named `w1`, just started.
    pub(crate) fn start_worker(&self, flags: &[&str]) -> Process {
        Process::start("w1", self.world.dtc(&["worker", "--name", "w1"]).args(flags))
    }

    /// `dtc worker` named `w1`, serving.
    pub(crate) fn worker(&self, flags: &[&str]) -> Process {
        let worker = self.start_worker(flags);
        worker.wait_for_line(READY, LIMIT);
        worker
    }

    /// An instance of a service, just started.
    pub(crate) fn start_service(&self, name: &str) -> Process {
        let mut command = self.world.dtc(&["service", "--name", name]);
        command.arg("--services").arg(&self.services).arg("--state").arg(self.world.path("state"));
        Process::start(name, &mut command)
    }

    /// An instance of a service, serving.
    pub(crate) fn service(&self, name: &str) -> Process {
        let service = self.start_service(name);
        service.wait_for_line(READY, LIMIT);
        service
    }

    /// A producer that submits transactions one by one.
    pub(crate) fn producer(&self) -> Producer {
        let flags = ["submit", "-", "--wait", "--output", "ndjson", "--detail", "--timeout", "60s"];
        let (process, stdin) = Process::start_fed("producer", &mut self.world.dtc(&flags));
        Producer { process, stdin, number: AtomicUsize::new(0) }
    }

    /// A queue's full name, from its name after the namespace.
    pub(crate) fn name(&self, rest: &str) -> String {
        format!("{}.{rest}", self.place.namespace)
    }

    /// How often `service` has committed transaction `id`.
    fn commits_of(&self, service: &str, id: &str) -> usize {
        let path = self.world.path("state").join(service).join("committed.log");
        let lines = fs::read_to_string(path).unwrap_or_default();
        lines.lines().filter(|line| line.split_whitespace().next() == Some(id)).count()
    }

    /// Waits until these services have committed transaction `id`, and asserts that they have done
    /// so once.
    #[track_caller]
    pub(crate) fn is_committed_once(&self, id: &str, services: &[&str]) {
        for service in services {
            until("the service commits", || self.commits_of(service, id) > 0);
            assert_eq!(self.commits_of(service, id), 1, "{service} {id}");
        }
    }
}

impl ProxiedSystem {
    /// Everything serving; one transaction has committed.
    pub(crate) fn new() -> Self {
        Self::at(ProxiedPlace::new(), &[])
    }

    /// The same at `site`, with these flags for the worker.
    pub(crate) fn at(site: ProxiedPlace, worker: &[&str]) -> Self {
        let services = BOTH.map(|name| site.service(name));
        let (worker, producer) = (site.worker(worker), site.producer());
        let stand = Self::of(site, worker, services, producer);
        stand.commits(&BOTH);
        stand
    }

    /// What runs at `site`.
    pub(crate) fn of(
        site: ProxiedPlace,
        worker: Process,
        services: [Process; 2],
        producer: Producer,
    ) -> Self {
        let [payments, stock] = services;
        Self { producer, worker, payments, stock, site }
    }

    /// Submits one transaction over `services`, which must be committed.
    #[track_caller]
    pub(crate) fn commits(&self, services: &[&str]) -> Value {
        let answer = self.producer.answered(&self.producer.submit(services), LIMIT);
        assert_eq!(answer["status"], "COMMITTED", "{answer}");
        answer
    }

    /// Submits one transaction over `services`; its id.
    pub(crate) fn submit(&self, services: &[&str]) -> String {
        self.producer.submit(services)
    }

    /// The result of transaction `id`, within `limit`.
    #[track_caller]
    pub(crate) fn answered(&self, id: &str, limit: Duration) -> Value {
        self.producer.answered(id, limit)
    }

    /// The result of transaction `id`, if there is one within `limit`.
    pub(crate) fn answer(&self, id: &str, limit: Duration) -> Option<Value> {
        self.producer.answer(id, limit)
    }

    /// How many lines each process has logged so far.
    pub(crate) fn marked(&self) -> Mark {
        let [worker, stock, producer] = [&self.worker, &self.stock, &self.producer.process]
            .map(|process| process.stderr.count());
        let answers = self.producer.process.stdout.count();
        Mark { at: Instant::now(), worker, stock, producer, answers }
    }

    /// What `stopped` counts was stopped at `mark`. One transaction over `services` runs into that
    /// and must end in time; one that is submitted afterwards must commit in time.
    #[track_caller]
    pub(crate) fn commits_again(&self, mark: &Mark, stopped: &ActiveRule, services: &[&str]) {
        let first = self.producer.submit(services);
        assert!(stopped.has_come(1, WITHIN), "nothing was stopped");
        let answers = &self.producer.process.stdout;
        let mut later = Vec::new();
        let committed = loop {
            later.push(self.producer.submit(services));
            // Results may be in any order, and earlier ones were of the first transaction.
            let again_at = Instant::now() + ANOTHER_AFTER.min(mark.left());
            let mut from = mark.answers;
            let mut committed = None;
            while committed.is_none()
                && let pause = again_at.saturating_duration_since(Instant::now())
                && let Some((number, line)) = answers.wait_for_from(from, "COMMITTED", pause)
            {
                let answer: Value = serde_json::from_str(&line).unwrap();
                committed = later.iter().find(|id| answer["id"] == **id);
                from = number + 1;
            }
            if let Some(committed) = committed {
                break committed;
            }
            assert!(
                !mark.left().is_zero(),
                "none of {} later transactions is committed {WITHIN:?} after the stop; answered: {:#?}",
                later.len(),
                &answers.all()[mark.answers..],
            );
        };
        println!("{committed} is committed {:.1?} after the stop", mark.at.elapsed());
        let first = self.answered(&first, mark.left());
        println!("the first one: {first}");
        self.site.is_committed_once(committed, services);
    }

    /// The worker logs, at `mark` or later, which wait has ended, and for how long nothing had
    /// arrived.
    #[track_caller]
    pub(crate) fn worker_says(&self, mark: &Mark, thing: &str) {
        says(&self.worker, mark.worker, mark, thing);
    }

    /// The same for the service `stock`.
    #[track_caller]
    pub(crate) fn stock_says(&self, mark: &Mark, thing: &str) {
        says(&self.stock, mark.stock, mark, thing);
    }

    /// The same for the producer.
    #[track_caller]
    pub(crate) fn producer_says(&self, mark: &Mark, thing: &str) {
        says(&self.producer.process, mark.producer, mark, thing);
    }
}

/// A moment, and how much every process had logged by then.
pub(crate) struct Mark {
    at: Instant,
    worker: usize,
    stock: usize,
    producer: usize,
    answers: usize,
}

impl Mark {
    /// How much time is left until everything must work again.
    pub(crate) fn left(&self) -> Duration {
        WITHIN.saturating_sub(self.at.elapsed())
    }
}

/// `process` logs, from line number `first` on, which wait has ended, and how long it lasted.
#[track_caller]
pub(crate) fn says(process: &Process, first: usize, mark: &Mark, thing: &str) {
    let mut from = first;
    while let Some((number, line)) = process.stderr.wait_for_from(from, "WARN", mark.left()) {
        if is_end_of_a_wait(&line, thing) {
            println!("{line}");
            return;
        }
        from = number + 1;
    }
    let said = process.stderr.all()[first..].join("\n");
    panic!("no line says that a wait for `{thing}` has ended, and how long it was:\n{said}");
}

/// Whether `line` names `thing`, and says `for 10.0 s` or `within 10 s`.
pub(crate) fn is_end_of_a_wait(line: &str, thing: &str) -> bool {
    let says_how_long = ["for ", "within "].iter().any(|word| {
        line.match_indices(word).any(|(at, word)| {
            let rest = &line[at + word.len()..];
            let number = rest.find(|it: char| !it.is_ascii_digit() && it != '.');
            number.is_some_and(|end| {
                let unit = rest[end..].trim_start();
                end > 0 && (unit.starts_with("s") || unit.starts_with("ms"))
            })
        })
    });
    line.contains(thing) && says_how_long
}

/// A producer that runs as long as it lives.
pub(crate) struct Producer {
    process: Process,
    stdin: ChildStdin,
    number: AtomicUsize,
}

impl Producer {
    /// Submits one transaction over `services`; its id.
    pub(crate) fn submit(&self, services: &[&str]) -> String {
        let id = format!("t-{}", self.number.fetch_add(1, Ordering::Relaxed));
        let transaction = json!({"id": id, "involved_services": services, "data": {}});
        writeln!(&self.stdin, "{transaction}").unwrap();
        id
    }

    /// The result of transaction `id`, within `limit`.
    #[track_caller]
    pub(crate) fn answered(&self, id: &str, limit: Duration) -> Value {
        self.answer(id, limit).unwrap_or_else(|| panic!("{id} is not answered within {limit:.1?}"))
    }

    /// The result of transaction `id`, if there is one within `limit`.
    pub(crate) fn answer(&self, id: &str, limit: Duration) -> Option<Value> {
        let said = self.process.stdout.wait_for(&format!("\"{id}\""), limit)?;
        Some(serde_json::from_str(&said).unwrap())
    }
}
