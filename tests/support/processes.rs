//! The `dtc` binary as the processes of a system: workers, services, producers.
//!
//! A [`Process`] is killed when it is dropped, and then prints its output if its test has failed.
//! Waits are woken by output, and always have a limit.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]
#![allow(clippy::print_stdout, reason = "a test that fails shows what its processes printed")]
#![allow(dead_code, reason = "each target uses a part of it")]

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::TempDir;

use crate::{broker::Place, lines::Lines};

/// How long a process may take for something that should be immediate, on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// What a process logs when it serves.
const READY: &str = "ready";

/// One system: a place at the broker, a directory for its files, and its processes.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) place: Place,
    /// Variables that every process here gets.
    pub(crate) variables: Vec<(&'static str, String)>,
    directory: TempDir,
}

impl World {
    /// A system at `place`, with nothing declared yet.
    pub(crate) fn at(place: Place) -> Self {
        let directory = tempfile::Builder::new().prefix("dtc-world-").tempdir().unwrap();
        Self { place, variables: Vec::new(), directory }
    }

    /// A path in the world's directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file into the world's directory, and returns its path.
    pub(crate) fn file(&self, name: &str, content: &Value) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content.to_string()).unwrap();
        path
    }

    /// `dtc topology apply` for these services; returns when everything is declared.
    pub(crate) fn apply_topology(&self, services: Option<&Path>) {
        let mut command = self.dtc(&["topology", "apply"]);
        if let Some(path) = services {
            command.arg("--services").arg(path);
        }
        Process::start("topology apply", &mut command).succeeded(LIMIT);
    }

    /// `dtc worker`, serving.
    pub(crate) fn worker(&self, name: &str) -> Process {
        let process = Process::start(name, self.dtc(&["worker"]).args(["--name", name]));
        process.wait_for_line(READY, LIMIT);
        process
    }

    /// An instance of `dtc service`, serving; instances with the same `state` are one service.
    pub(crate) fn service(&self, services: &Path, name: &str, state: Option<&Path>) -> Process {
        let mut command = self.dtc(&["service"]);
        command.arg("--services").arg(services).args(["--name", name]);
        if let Some(path) = state {
            command.arg("--state").arg(path);
        }
        let process = Process::start(name, &mut command);
        process.wait_for_line(READY, LIMIT);
        process
    }

    /// `dtc submit` of a file, with further flags such as `--wait`.
    pub(crate) fn submit(&self, transactions: &Path, flags: &[&str]) -> Process {
        Process::start("submit", self.dtc(&["submit"]).arg(transactions).args(flags))
    }

    /// `dtc submit -`, with `transactions` on its stdin.
    pub(crate) fn submit_given(&self, transactions: &Value, flags: &[&str]) -> Process {
        let mut command = self.dtc(&["submit", "-"]);
        Process::start_given("submit", command.args(flags), transactions.to_string())
    }

    /// `dtc` with these words and the broker's address; for commands that have no method here.
    pub(crate) fn dtc(&self, words: &[&str]) -> Command {
        let mut command = self.dtc_at_broker(words);
        command.args(["--namespace", &self.place.namespace]);
        command
    }

    /// The same for a command with its own namespace.
    pub(crate) fn dtc_at_broker(&self, words: &[&str]) -> Command {
        let mut command = dtc();
        command.args(words).args(["--broker", &self.place.url]);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command.current_dir(self.directory.path());
        command
    }
}

/// The binary, in an environment without any variable that it reads.
fn dtc() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dtc"));
    command.env_clear().env("PATH", "/usr/bin:/bin").env("DTC_LOG", "info");
    command
}

/// A process of the binary, and its output.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    pub(crate) stdout: Lines,
    pub(crate) stderr: Lines,
}

impl Process {
    /// Starts `command`; `name` is its name in printed output.
    pub(crate) fn start(name: &str, command: &mut Command) -> Self {
        command.stdin(Stdio::null());
        Self::spawn(name, command)
    }

    /// Starts `command`, which reads `input`.
    pub(crate) fn start_given(name: &str, command: &mut Command, input: String) -> Self {
        command.stdin(Stdio::piped());
        let mut process = Self::spawn(name, command);
        let mut stdin = process.child.stdin.take().unwrap();
        // A process that has read enough may close the pipe.
        thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
        process
    }

    /// Starts `command`, which reads what is written to the pipe.
    pub(crate) fn start_fed(name: &str, command: &mut Command) -> (Self, ChildStdin) {
        command.stdin(Stdio::piped());
        let mut process = Self::spawn(name, command);
        let stdin = process.child.stdin.take().unwrap();
        (process, stdin)
    }

    fn spawn(name: &str, command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = Lines::of(child.stdout.take().unwrap());
        let stderr = Lines::of(child.stderr.take().unwrap());
        Self { name: name.to_owned(), child, stdout, stderr }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The first line on stderr that contains `pattern`, printed before or from now on.
    #[track_caller]
    pub(crate) fn wait_for_line(&self, pattern: &str, limit: Duration) -> String {
        let line = self.stderr.wait_for(pattern, limit);
        line.unwrap_or_else(|| panic!("{} doesn't say `{pattern}` in {limit:?}", self.name))
    }

    /// How it ended.
    #[track_caller]
    pub(crate) fn wait(&mut self, limit: Duration) -> ExitStatus {
        // Its pipes end with it; it starts no processes that could hold them.
        let ended = self.stdout.wait_for_end(limit) && self.stderr.wait_for_end(limit);
        assert!(ended, "{} doesn't end in {limit:?}", self.name);
        self.child.wait().unwrap()
    }

    /// Asserts how it ends.
    #[track_caller]
    pub(crate) fn exited(&mut self, code: i32, limit: Duration) {
        let status = self.wait(limit);
        assert_eq!(status.code(), Some(code), "{}: {status}", self.name);
    }

    /// Asserts that it succeeds, and returns its stdout.
    #[track_caller]
    pub(crate) fn succeeded(mut self, limit: Duration) -> Vec<String> {
        self.exited(0, limit);
        self.stdout.all()
    }

    /// Kills it, as a power cut would; returns when it is gone.
    pub(crate) fn kill9(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Freezes it.
    pub(crate) fn stop(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Wakes it from [`Self::stop`].
    pub(crate) fn cont(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Sends SIGTERM, as an operator does.
    pub(crate) fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(id, signal).unwrap();
    }

    /// How much memory it has, in bytes.
    pub(crate) fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
    }

    /// Its CPU time, in user and kernel mode.
    pub(crate) fn computed(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap();
        // The name, in parentheses, may contain anything; utime and stime are the 14th and 15th
        // field.
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let ticks = fields.split_whitespace().skip(11).take(2);
        let ticks: u64 = ticks.map(|field| field.parse::<u64>().unwrap()).sum();
        // Linux reports these in hundredths of a second, whatever it counts internally.
        Duration::from_millis(ticks * 10)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        if thread::panicking() {
            self.stdout.wait_for_end(LIMIT);
            self.stderr.wait_for_end(LIMIT);
            println!("--- {}, stdout:\n{}", self.name, self.stdout.text());
            println!("--- {}, stderr:\n{}", self.name, self.stderr.text());
        }
    }
}
