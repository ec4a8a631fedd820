//! The system under test: the real `dtc` as workers, instances of services and producers.
//!
//! Each process logs into its own file. A producer is fed transactions at a rate, and a [`Record`]
//! has everything that goes in and out, with its time.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{
    network::Network,
    nodes::{tail, until},
};

/// The services, each of which keeps a state that its instances share.
pub(crate) const SERVICES: [&str; 3] = ["payments", "stock", "shipping"];
/// Which services the transactions involve, in turn.
const INVOLVED: [&[&str]; 4] = [
    &["payments", "stock", "shipping"],
    &["payments", "stock"],
    &["shipping"],
    &["stock", "shipping"],
];
/// The message of an instance about a prepare that ran out of time.
pub(crate) const TIMED_OUT: &str = "timed out";
/// How long a transaction's prepares may take.
const PREPARE_MS: u64 = 5000;
/// How long a producer waits for a result: longer than any other wait here.
const ANSWERED_IN: &str = "600s";
/// How long a process may take to be ready.
const READY: Duration = Duration::from_secs(30);
/// How long a command that declares or deletes may take.
const COMMAND: Duration = Duration::from_secs(30);
/// How long a process may take to end after a signal; it drains for 5 s of that.
const END: Duration = Duration::from_secs(15);

/// What was submitted and what was answered, for all producers.
#[derive(Default, Debug)]
pub(crate) struct Record {
    pub(crate) submitted: BTreeMap<String, Submitted>,
    /// In the order of their arrival.
    pub(crate) results: Vec<Answer>,
}

/// A transaction that was submitted.
#[derive(Clone, Debug)]
pub(crate) struct Submitted {
    /// Since the record began.
    pub(crate) at: Duration,
    pub(crate) services: Vec<&'static str>,
}

/// A line printed by a producer.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) at: Duration,
    pub(crate) id: String,
    pub(crate) status: String,
    /// The code of the reason, empty if there is none; [`TIMED_OUT`] for a prepare that ran out of time.
    pub(crate) reason: String,
    /// The services whose commit is parked.
    pub(crate) unresolved: Vec<String>,
}

/// A system in its own namespace.
pub(crate) struct System {
    pub(crate) namespace: String,
    pub(crate) record: Arc<Mutex<Record>>,
    directory: PathBuf,
    processes: Vec<Process>,
    producers: Vec<Producer>,
    begun: Instant,
}

struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    ready: Option<PathBuf>,
}

struct Producer {
    process: Process,
    stop: Arc<AtomicBool>,
    feeding: JoinHandle<()>,
    reading: JoinHandle<()>,
}

impl System {
    /// A system without processes; its files are in `directory`.
    pub(crate) fn new(directory: &Path, namespace: &str) -> Result<Self> {
        fs::create_dir_all(directory.join("state"))?;
        let services = SERVICES.map(|name| {
            json!({
                "name": name,
                "max_concurrency": 20,
                "prepare": { "latency_ms": 2 },
                "commit": { "latency_ms": 1 },
            })
        });
        fs::write(directory.join("services.json"), json!(services).to_string())?;
        Ok(Self {
            namespace: namespace.to_owned(),
            record: Arc::default(),
            directory: directory.to_owned(),
            processes: Vec::new(),
            producers: Vec::new(),
            begun: Instant::now(),
        })
    }

    /// The time since the record began.
    pub(crate) fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// `dtc` at a host, with the broker's address.
    fn dtc(&self, network: &Network, host: &str, urls: &str, words: &[&str]) -> Command {
        let mut command = network.at(host, env!("CARGO_BIN_EXE_dtc"));
        command.args(words).args(["--broker", urls, "--namespace", &self.namespace]);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("DTC_LOG", "info");
        command.stdin(Stdio::null());
        command
    }

    /// Declares what the system needs.
    pub(crate) fn declare(
        &self,
        network: &Network,
        host: &str,
        urls: &str,
        commands: &str,
    ) -> Result<()> {
        let services = self.services();
        let words = ["topology", "apply", "--services", &services, "--commands", commands];
        self.to_its_end("apply", self.dtc(network, host, urls, &words))
    }

    /// Deletes it again.
    pub(crate) fn delete(&self, network: &Network, host: &str, urls: &str) -> Result<()> {
        let services = self.services();
        let words = ["topology", "delete", "--services", &services, "--yes"];
        self.to_its_end("delete", self.dtc(network, host, urls, &words))
    }

    fn services(&self) -> String {
        self.directory.join("services.json").display().to_string()
    }

    fn to_its_end(&self, name: &str, command: Command) -> Result<()> {
        let mut process = self.spawn(name, command)?;
        let Some(status) = process.wait(COMMAND)? else {
            process.kill();
            bail!("topology {name} doesn't end within {COMMAND:?}: {}", process.says(5));
        };
        ensure!(status.success(), "topology {name} ended with {status}: {}", process.says(5));
        Ok(())
    }

    /// Starts a worker.
    pub(crate) fn worker(
        &mut self,
        network: &Network,
        host: &str,
        urls: &str,
        name: &str,
    ) -> Result<()> {
        let ready = self.directory.join(format!("{name}.ready"));
        let mut command = self.dtc(network, host, urls, &["worker", "--drain", "5s"]);
        command.args(["--name", name, "--ready-file"]).arg(&ready);
        command.arg("--report").arg(self.report(name));
        self.serve(name, command, ready)
    }

    /// Starts an instance of a service.
    pub(crate) fn instance(
        &mut self,
        network: &Network,
        host: &str,
        urls: &str,
        service: &str,
        number: usize,
    ) -> Result<()> {
        let name = format!("{service}{number}");
        let ready = self.directory.join(format!("{name}.ready"));
        let services = self.services();
        let words = ["service", "--services", &services, "--name", service, "--drain", "5s"];
        let mut command = self.dtc(network, host, urls, &words);
        command.arg("--state").arg(self.directory.join("state")).arg("--ready-file").arg(&ready);
        self.serve(&name, command, ready)
    }

    fn serve(&mut self, name: &str, command: Command, ready: PathBuf) -> Result<()> {
        let mut process = self.spawn(name, command)?;
        process.ready = Some(ready);
        self.processes.push(process);
        Ok(())
    }

    fn spawn(&self, name: &str, mut command: Command) -> Result<Process> {
        let log = self.directory.join(format!("{name}.log"));
        command.stderr(File::create(&log)?);
        if name == "apply" || name == "delete" {
            command.stdout(Stdio::null());
        }
        let child = command.spawn().with_context(|| format!("{name} can't be started"))?;
        Ok(Process { name: name.to_owned(), child, log, ready: None })
    }

    /// Waits until all workers and instances serve.
    pub(crate) fn wait_until_ready(&mut self) -> Result<()> {
        let is_ready = |process: &Process| process.ready.as_ref().is_none_or(|path| path.exists());
        if until(READY, || Ok(self.processes.iter().all(is_ready)))? {
            return Ok(());
        }
        let late = self.processes.iter().filter(|process| !is_ready(process));
        let late: Vec<_> = late.map(|it| format!("{}: {}", it.name, it.says(3))).collect();
        bail!("not ready within {READY:?}:\n{}", late.join("\n"))
    }

    /// Which workers and instances don't serve now.
    pub(crate) fn not_ready(&self) -> Vec<String> {
        let is_late = |process: &&Process| process.ready.as_ref().is_some_and(|it| !it.exists());
        self.processes.iter().filter(is_late).map(|process| process.name.clone()).collect()
    }

    /// Starts a producer, and feeds it `rate` transactions per second until it is stopped.
    pub(crate) fn producer(
        &mut self,
        network: &Network,
        host: &str,
        urls: &str,
        name: &'static str,
        rate: f64,
    ) -> Result<()> {
        let words =
            ["submit", "--wait", "--timeout", ANSWERED_IN, "--output", "ndjson", "--detail", "-"];
        let mut command = self.dtc(network, host, urls, &words);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = self.spawn(name, command)?;
        let mut stdin = process.child.stdin.take().context("a pipe")?;
        let stdout = process.child.stdout.take().context("a pipe")?;
        let stop = Arc::new(AtomicBool::new(false));
        let (record, stopping, begun) = (Arc::clone(&self.record), Arc::clone(&stop), self.begun);
        let feeding = thread::spawn(move || {
            let started = Instant::now();
            for number in 0_u32.. {
                let due = Duration::from_secs_f64(f64::from(number) / rate);
                thread::sleep(due.saturating_sub(started.elapsed()));
                if stopping.load(Ordering::Relaxed) {
                    return;
                }
                let services = INVOLVED[number as usize % INVOLVED.len()];
                let id = format!("{name}-{number}");
                let transaction = json!({
                    "id": id,
                    "involved_services": services,
                    "data": { "n": number },
                    "timeout_ms": PREPARE_MS,
                });
                let at = begun.elapsed();
                // `died` detects a producer that has ended.
                if writeln!(stdin, "{transaction}").is_err() {
                    return;
                }
                let submitted = Submitted { at, services: services.to_vec() };
                locked(&record).submitted.insert(id, submitted);
            }
        });
        let record = Arc::clone(&self.record);
        let reading = thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(answer) = answer(&line, begun.elapsed()) {
                    locked(&record).results.push(answer);
                }
            }
        });
        self.producers.push(Producer { process, stop, feeding, reading });
        Ok(())
    }

    /// Stops submitting.
    pub(crate) fn stop_producing(&self) {
        for producer in &self.producers {
            producer.stop.store(true, Ordering::Relaxed);
        }
    }

    /// How many transactions wait for their results.
    pub(crate) fn unanswered(&self) -> usize {
        let record = locked(&self.record);
        record.submitted.len().saturating_sub(record.results.len())
    }

    /// How many results came so far.
    pub(crate) fn answered(&self) -> usize {
        locked(&self.record).results.len()
    }

    /// How many branches the services hold prepared.
    pub(crate) fn prepared(&self) -> usize {
        let count = |service: &&str| {
            let held = fs::read_dir(self.directory.join("state").join(service).join("prepared"));
            held.map_or(0, |entries| entries.count())
        };
        SERVICES.iter().map(count).sum()
    }

    /// The branches that a service has committed, according to its own log.
    pub(crate) fn committed(&self, service: &str) -> String {
        let path = self.directory.join("state").join(service).join("committed.log");
        fs::read_to_string(path).unwrap_or_default()
    }

    /// The processes that have ended unasked.
    pub(crate) fn died(&mut self) -> Vec<String> {
        let mut died = Vec::new();
        for process in &mut self.processes {
            if let Ok(Some(status)) = process.child.try_wait() {
                died.push(format!("{} ({status}): {}", process.name, process.says(3)));
            }
        }
        for Producer { process, stop, .. } in &mut self.producers {
            if let Ok(Some(status)) = process.child.try_wait()
                && !(status.success() && stop.load(Ordering::Relaxed))
            {
                died.push(format!("{} ({status}): {}", process.name, process.says(3)));
            }
        }
        died
    }

    /// Asks all processes to end; returns which did not, or with an error. Those are killed.
    pub(crate) fn end(&mut self) -> Vec<String> {
        let mut complaints = Vec::new();
        for process in &self.processes {
            process.signal(Signal::SIGTERM);
        }
        let producers = self.producers.drain(..);
        let (mut ending, threads): (Vec<_>, Vec<_>) =
            producers.map(|it| (it.process, [it.feeding, it.reading])).unzip();
        ending.append(&mut self.processes);
        let started = Instant::now();
        for mut process in ending {
            match process.wait(END.saturating_sub(started.elapsed())) {
                Ok(Some(status)) if status.success() => {}
                Ok(Some(status)) => {
                    complaints.push(format!(
                        "{} ended with {status}: {}",
                        process.name,
                        process.says(2)
                    ));
                }
                Ok(None) | Err(_) => {
                    complaints.push(format!("{} doesn't end: {}", process.name, process.says(2)));
                    process.kill();
                }
            }
        }
        for thread in threads.into_iter().flatten() {
            drop(thread.join());
        }
        complaints
    }

    /// How many results all ended workers published, by their reports.
    pub(crate) fn results_published(&self) -> u64 {
        let reports = (1..).map(|number| self.report(&format!("w{number}")));
        let reports = reports.map_while(|path| fs::read_to_string(path).ok());
        let reports = reports.filter_map(|text| serde_json::from_str::<Value>(&text).ok());
        let count = |report: &Value, name: &str| report[name].as_u64().unwrap_or(0);
        reports.map(|report| count(&report, "committed") + count(&report, "aborted")).sum()
    }

    fn report(&self, worker: &str) -> PathBuf {
        self.directory.join(format!("{worker}.report"))
    }

    /// The last lines of every log, including those of processes that have ended.
    pub(crate) fn logs(&self, count: usize) -> Vec<(String, String)> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten();
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let mut logs: Vec<_> = paths
            .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
            .filter_map(|path| {
                let name = path.file_stem()?.to_str()?.to_owned();
                Some((name, tail(&fs::read_to_string(&path).ok()?, count)))
            })
            .collect();
        logs.sort_unstable();
        logs
    }

    /// Where the files are.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }
}

impl Drop for System {
    fn drop(&mut self) {
        for process in &mut self.processes {
            process.kill();
        }
        for producer in &mut self.producers {
            producer.process.kill();
        }
    }
}

impl Process {
    /// How it ended, if it did in time.
    fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let mut ended = None;
        until(limit, || {
            ended = self.child.try_wait()?;
            Ok(ended.is_some())
        })?;
        Ok(ended)
    }

    fn signal(&self, signal: Signal) {
        if let Ok(id) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(id), signal);
        }
    }

    fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }

    /// The last lines of its log.
    fn says(&self, count: usize) -> String {
        tail(&fs::read_to_string(&self.log).unwrap_or_default(), count)
    }
}

pub(crate) fn locked(record: &Mutex<Record>) -> MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Parses a line printed by a producer.
fn answer(line: &str, at: Duration) -> Option<Answer> {
    let value: Value = serde_json::from_str(line).ok()?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let unresolved = value["unresolved"].as_array().map_or_else(Vec::new, Vec::clone);
    Some(Answer {
        at,
        id: text(&value["id"]),
        status: text(&value["status"]),
        reason: match text(&value["reason"]["message"]).as_str() {
            TIMED_OUT => TIMED_OUT.to_owned(),
            _ => text(&value["reason"]["code"]),
        },
        unresolved: unresolved.iter().map(text).collect(),
    })
}
