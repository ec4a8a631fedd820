//! Helpers of the tests: files, and the binary that runs on them.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Output, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long a process may take to end; after that it counts as hanging, and is killed.
const PATIENCE: Duration = Duration::from_secs(120);

/// The binary, to run in the repository.
pub(crate) fn dtc() -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("dtc"));
    command
        .current_dir(repository())
        .env_remove("DTC_LOG")
        .env_remove("DTC_CONFIG")
        .env_remove("COLUMNS")
        .stdin(Stdio::null());
    command
}

pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The output of `command`, and how it ended.
pub(crate) fn output(command: &mut Command) -> Ended {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let _watchdog = Watchdog::over(&child);
    Ended::of(child)
}

/// The output of `command` with `input` on its stdin, and how it ended.
pub(crate) fn output_given(command: &mut Command, input: &[u8]) -> Ended {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let _watchdog = Watchdog::over(&child);
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // A process that has read enough may close the pipe.
    let writer = thread::spawn(move || drop(stdin.write_all(&input)));
    let ended = Ended::of(child);
    writer.join().unwrap();
    ended
}

/// Kills a process that hangs, so that the test fails instead of hanging too.
struct Watchdog {
    ended: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watchdog {
    fn over(child: &Child) -> Self {
        let id = child.id();
        let (ended, end) = mpsc::channel();
        let watch = move || {
            if end.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                signal(id, "KILL");
            }
        };
        Self { ended: Some(ended), thread: Some(thread::spawn(watch)) }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.ended = None;
        self.thread.take().into_iter().for_each(|thread| drop(thread.join()));
    }
}

/// Sends a signal to a process.
pub(crate) fn signal(id: u32, name: &str) {
    let signal: Signal = format!("SIG{name}").parse().unwrap();
    let process = Pid::from_raw(id.try_into().unwrap());
    kill(process, signal).unwrap_or_else(|error| panic!("{signal} to process {id}: {error}"));
}

/// A process that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    fn of(child: Child) -> Self {
        let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { status, stdout: text(stdout), stderr: text(stderr) }
    }

    /// Asserts how it ended.
    #[track_caller]
    pub(crate) fn exited(self, code: i32) -> Self {
        assert_eq!(
            self.status.code(),
            Some(code),
            "{}\n{}\n{}",
            self.status,
            self.stdout,
            self.stderr
        );
        self
    }

    /// Asserts that it printed nothing on stdout.
    #[track_caller]
    pub(crate) fn silent(self) -> Self {
        assert_eq!(self.stdout, "");
        self
    }

    /// Asserts its whole stderr.
    #[track_caller]
    pub(crate) fn saying(self, stderr: &str) -> Self {
        assert_eq!(self.stderr, stderr);
        self
    }

    /// Asserts that stderr doesn't mention `word`.
    #[track_caller]
    pub(crate) fn saying_nothing_of(self, word: &str) -> Self {
        assert!(!self.stderr.contains(word), "{}", self.stderr);
        self
    }

    /// The results on stdout: one array.
    #[track_caller]
    pub(crate) fn results(&self) -> Vec<Value> {
        serde_json::from_str(&self.stdout).unwrap()
    }

    /// The results on stdout: one per line.
    #[track_caller]
    pub(crate) fn lines(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Each result as `id status`, in the order in which they were printed.
    #[track_caller]
    pub(crate) fn statuses(&self) -> Vec<String> {
        let results = if self.stdout.starts_with('[') { self.results() } else { self.lines() };
        results.iter().map(status).collect()
    }
}

fn status(result: &Value) -> String {
    format!("{} {}", result["id"].as_str().unwrap(), result["status"].as_str().unwrap())
}

/// A directory with the files of one run.
pub(crate) struct World {
    directory: TempDir,
}

impl World {
    /// A world with these services.
    pub(crate) fn new(services: &Value) -> Self {
        let world = Self { directory: TempDir::new().unwrap() };
        world.write("services.json", services.to_string());
        world
    }

    /// A world with these services and transactions.
    pub(crate) fn with(services: &Value, transactions: &Value) -> Self {
        let world = Self::new(services);
        world.write("transactions.json", transactions.to_string());
        world
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.path(name), text).unwrap();
    }

    /// `dtc run` over services.json and `transactions`, in the world's directory, so that
    /// complaints name no directory.
    pub(crate) fn run_over(&self, transactions: &str) -> Command {
        let mut command = dtc();
        command.current_dir(self.directory.path());
        command.args(["run", "--services", "services.json", "--transactions", transactions]);
        command
    }

    /// `dtc run` over services.json and transactions.json.
    pub(crate) fn run(&self) -> Command {
        self.run_over("transactions.json")
    }

    /// Runs with `--detail` and `--report`.
    #[track_caller]
    pub(crate) fn tell_all(&self, arguments: &[&str]) -> RunReport {
        let mut command = self.run();
        command.args(["--detail", "--report", "report.json"]).args(arguments);
        let ended = output(&mut command).exited(0);
        RunReport { results: ended.results(), report: self.report(), stderr: ended.stderr }
    }

    /// The content of report.json.
    #[track_caller]
    pub(crate) fn report(&self) -> Value {
        serde_json::from_slice(&fs::read(self.path("report.json")).unwrap()).unwrap()
    }
}

/// All output of a run.
pub(crate) struct RunReport {
    pub(crate) results: Vec<Value>,
    pub(crate) report: Value,
    pub(crate) stderr: String,
}

impl RunReport {
    /// The calls of a service's prepare, commit and abort.
    #[track_caller]
    pub(crate) fn calls(&self, service: &str) -> [u64; 3] {
        let service = &self.report["services"][service];
        ["prepare_calls", "commit_calls", "abort_calls"].map(|name| service[name].as_u64().unwrap())
    }
}

/// A transaction called `id` over `services`.
pub(crate) fn transaction(id: &str, services: &[&str]) -> Value {
    json!({"id": id, "involved_services": services, "data": {"amount": 100}})
}

/// A process that the test talks to while it runs.
pub(crate) struct LiveProcess {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    stderr: BufReader<ChildStderr>,
    watchdog: Watchdog,
}

impl LiveProcess {
    pub(crate) fn with(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let watchdog = Watchdog::over(&child);
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self { child, stdin, stdout, stderr, watchdog }
    }

    pub(crate) fn say(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().unwrap();
        stdin.write_all(text.as_bytes()).unwrap();
        stdin.flush().unwrap();
    }

    /// Waits for the next line on stdout.
    pub(crate) fn hear(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line
    }

    /// Waits for so many more bytes on stdout.
    pub(crate) fn hear_bytes(&mut self, count: usize) -> String {
        let mut bytes = vec![0; count];
        self.stdout.read_exact(&mut bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    /// Waits for the next line on stderr.
    pub(crate) fn hear_error(&mut self) -> String {
        let mut line = String::new();
        self.stderr.read_line(&mut line).unwrap();
        line
    }

    pub(crate) fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// Closes its stdin.
    pub(crate) fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Waits for its end; returns the output that was not read before. Its stdin stays open.
    pub(crate) fn end(self) -> Ended {
        let Self { child, stdin, mut stdout, stderr, watchdog } = self;
        let mut rest = String::new();
        stdout.read_to_string(&mut rest).unwrap();
        let ended = UnreadProcess { child, stdin, stderr, watchdog }.end();
        Ended { stdout: rest, ..ended }
    }

    /// Stops reading its stdout.
    pub(crate) fn stop_listening(self) -> UnreadProcess {
        let Self { child, stdin, stdout, stderr, watchdog } = self;
        drop(stdout);
        UnreadProcess { child, stdin, stderr, watchdog }
    }

    /// Stops reading its stdout, and waits for its end. Its stdin stays open.
    pub(crate) fn hang_up(self) -> Ended {
        self.stop_listening().end()
    }
}

/// A process whose stdout nobody reads.
pub(crate) struct UnreadProcess {
    child: Child,
    stdin: Option<ChildStdin>,
    stderr: BufReader<ChildStderr>,
    watchdog: Watchdog,
}

impl UnreadProcess {
    pub(crate) fn say(&mut self, text: &str) {
        // It may have ended meanwhile.
        let _ = self.stdin.as_mut().unwrap().write_all(text.as_bytes());
    }

    /// Waits for its end. Its stdin stays open.
    pub(crate) fn end(self) -> Ended {
        let Self { child, stdin, mut stderr, watchdog } = self;
        let mut said = String::new();
        stderr.read_to_string(&mut said).unwrap();
        let ended = Ended::of(child);
        drop((stdin, watchdog));
        Ended { stderr: said, ..ended }
    }
}

/// Asserts that `found` is the content of the golden file `name`; `UPDATE_GOLDEN=1` rewrites it.
#[track_caller]
pub(crate) fn assert_golden(name: &str, found: &str) {
    let path = repository().join("tests/cli/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, found).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap();
    assert_eq!(found, golden, "{name} differs; UPDATE_GOLDEN=1 rewrites it");
}
