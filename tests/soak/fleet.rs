//! The processes of the system under test: the real `dtc`, each in its own process group, so that
//! Ctrl-C reaches only this process; the kernel kills them when this process ends.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;
use tempfile::TempDir;

use crate::{
    broker::Place,
    lines::Lines,
    load::SERVICES,
    memory::{self, Sample},
};

/// How long a process may take to serve, or a command to end, on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a producer waits for a result.
const ANSWERED_IN: &str = "120s";
/// How many of the last lines of a log are shown.
const SHOWN: usize = 5;
/// The share of prepares that `shipping` refuses.
const REFUSED: f64 = 0.01;

/// All processes of a system, and the directory of their files.
pub(crate) struct Fleet {
    place: Place,
    directory: TempDir,
    processes: Vec<Process>,
}

/// A process of it.
pub(crate) struct Process {
    /// Its name in the table.
    pub(crate) name: String,
    /// Whether its memory must stay flat.
    pub(crate) must_be_flat: bool,
    child: Child,
    stderr: Lines,
}

impl Fleet {
    /// A fleet without processes. Its topology is declared at `place`.
    pub(crate) fn at(place: Place) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("dtc-soak-").tempdir()?;
        let services = SERVICES.map(|name| {
            let refuse_rate = if name == "shipping" { REFUSED } else { 0.0 };
            json!({
                "name": name,
                "max_concurrency": 20,
                "max_wait_ms": 5000,
                "prepare": { "latency_ms": 2, "refuse_rate": refuse_rate },
                "commit": { "latency_ms": 1 },
            })
        });
        fs::write(directory.path().join("services.json"), json!(services).to_string())?;
        let fleet = Self { place, directory, processes: Vec::new() };
        let mut apply = fleet.dtc(&["topology", "apply", "--services", "services.json"]);
        apply.stdout(Stdio::null());
        let mut apply = fleet.spawn("topology apply", false, &mut apply)?;
        ensure!(apply.stderr.wait_for_end(LIMIT), "{} doesn't end", apply.name);
        let status = apply.child.wait()?;
        ensure!(status.success(), "{} ended with {status}:\n{}", apply.name, apply.says());
        Ok(fleet)
    }

    /// Starts a worker that remembers decisions for that long.
    pub(crate) fn worker(&mut self, name: &str, window: Duration) -> Result<()> {
        let window = format!("{}s", window.as_secs());
        let command = self.dtc(&["worker", "--name", name, "--window", &window]);
        self.serve(format!("worker {name}"), command)
    }

    /// Starts an instance of a service; the instances of one share its state.
    pub(crate) fn instance(&mut self, service: &str, number: usize) -> Result<()> {
        let words = ["service", "--services", "services.json", "--name", service];
        let mut command = self.dtc(&words);
        command.args(["--state", "state"]);
        self.serve(format!("{service} {number}"), command)
    }

    fn serve(&mut self, name: String, mut command: Command) -> Result<()> {
        let process = self.spawn(&name, true, command.stdout(Stdio::null()))?;
        let is_ready = process.stderr.wait_for("ready", LIMIT).is_some();
        ensure!(is_ready, "{name} doesn't serve within {LIMIT:?}:\n{}", process.says());
        self.processes.push(process);
        Ok(())
    }

    /// Starts a producer that submits its input, and prints a line for each result.
    pub(crate) fn producer(&mut self) -> Result<(ChildStdin, ChildStdout)> {
        let words = ["submit", "--wait", "--output", "ndjson", "--detail"];
        let mut command = self.dtc(&words);
        command.args(["--timeout", ANSWERED_IN, "-"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = self.spawn("producer", false, &mut command)?;
        let stdin = process.child.stdin.take().context("a pipe")?;
        let stdout = process.child.stdout.take().context("a pipe")?;
        self.processes.push(process);
        Ok((stdin, stdout))
    }

    fn dtc(&self, words: &[&str]) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_dtc")]).args(words);
        command.args(["--broker", &self.place.url, "--namespace", &self.place.namespace]);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("DTC_LOG", "info");
        command.current_dir(self.directory.path()).stdin(Stdio::null()).process_group(0);
        command
    }

    fn spawn(&self, name: &str, must_be_flat: bool, command: &mut Command) -> Result<Process> {
        let child = command.stderr(Stdio::piped()).spawn();
        let mut child = child.with_context(|| format!("{name} can't be started"))?;
        let stderr = Lines::of(child.stderr.take().context("a pipe")?);
        Ok(Process { name: name.to_owned(), must_be_flat, child, stderr })
    }

    /// The processes, in the order in which they were started.
    pub(crate) fn processes(&self) -> &[Process] {
        &self.processes
    }

    /// The state of the services.
    pub(crate) fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// The processes that have ended unasked.
    pub(crate) fn died(&mut self) -> Vec<String> {
        let ended = self.processes.iter_mut().filter_map(|process| {
            let status = process.child.try_wait().ok().flatten()?;
            Some(format!("{} ended with {status}:\n{}", process.name, process.says()))
        });
        ended.collect()
    }

    /// Asks all processes to end, the workers first; returns which did not, or with an error.
    pub(crate) fn end(&mut self) -> Vec<String> {
        let mut complaints = Vec::new();
        for process in &mut self.processes {
            // It may have ended: the producer ends with its input.
            if let Ok(None) = process.child.try_wait() {
                process.signal(Signal::SIGTERM);
            }
            if !process.stderr.wait_for_end(LIMIT) {
                complaints.push(format!("{} doesn't end:\n{}", process.name, process.says()));
                continue;
            }
            match process.child.wait() {
                Ok(status) if status.success() => {}
                Ok(status) => complaints.push(format!(
                    "{} ended with {status}:\n{}",
                    process.name,
                    process.says()
                )),
                Err(error) => complaints.push(format!("{}: {error}", process.name)),
            }
        }
        complaints
    }
}

impl Process {
    /// How much memory it has; `None` if it has ended.
    pub(crate) fn memory(&self, at: Duration) -> Option<Sample> {
        memory::sample(self.child.id(), at)
    }

    fn signal(&self, signal: Signal) {
        if let Ok(id) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(id), signal);
        }
    }

    /// The last lines of its log.
    fn says(&self) -> String {
        let lines = self.stderr.all();
        lines[lines.len().saturating_sub(SHOWN)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
