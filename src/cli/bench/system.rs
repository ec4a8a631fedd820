//! The measured system: workers and services as separate processes.
//!
//! A shell starts each process, and ends it when this process is gone, however it ended. They work
//! in a namespace that is deleted at the end with everything in it.

use std::{
    collections::BTreeMap,
    env, fs, io,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use lapin::types::ShortString;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, ChildStdin, Command},
    time::Instant,
};

use crate::{
    clock::Clock,
    protocol::{
        ids::ServiceName,
        message::{Cap, MAX_WAIT},
    },
    transport::amqp::{
        connection::{Broker, close},
        names::{Names, Namespace},
        topology::{
            self, Queue, QueueKind, ServiceTopology, Topology,
            apply::{ApplyOptions, apply_until},
            delete::delete,
        },
        unique,
    },
};

/// The services of every transaction.
pub(super) const SERVICES: [&str; 2] = ["payments", "stock"];

/// How many slots each has: more than any load needs.
pub(super) const SLOTS: u32 = 32_768;

/// How long a process may take to serve, or to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often to check whether a process serves.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Runs the rest of the line, prints its process id, and ends it when the other end of the standard
/// input is closed.
const GUARD: &str =
    r#""$@" </dev/null >/dev/null & echo "$!"; exec >/dev/null; read -r _; kill "$!"; wait "$!""#;

/// How to start processes.
#[derive(Clone, Debug)]
pub(super) struct BenchPlan {
    pub(super) broker: Broker,
    /// Their configuration: passed on by `--config`, and `--broker` by the environment, where other
    /// users don't see it.
    pub(super) config: Option<PathBuf>,
    pub(super) url: Option<String>,
    pub(super) settings: topology::Settings,
}

/// A temporary namespace, and a directory for files.
#[derive(Debug)]
pub(super) struct BenchNamespace {
    plan: BenchPlan,
    pub(super) names: Names,
    /// Everything in the namespace, for deleting it at the end.
    topology: Topology,
    directory: PathBuf,
    left: StoppingProcesses,
}

/// Processes that got a signal to stop and have not been waited for.
type StoppingProcesses = Arc<Mutex<Vec<Child>>>;

impl BenchNamespace {
    /// Declares everything. `None`: `stop` ended first, and nothing is left.
    pub(super) async fn make(
        plan: BenchPlan,
        stop: impl Future<Output = ()>,
    ) -> anyhow::Result<Option<Self>> {
        let name = unique::name('b');
        let names = Names::new(Namespace::parse(&format!("dtc-bench-{name}"))?);
        let services: Vec<_> = SERVICES
            .into_iter()
            .map(|name| {
                let name = ServiceName::parse(name)?;
                Ok(ServiceTopology { name, max_wait: MAX_WAIT, cap: Cap::Instance })
            })
            .collect::<anyhow::Result<_>>()?;
        let settings = plan.settings;
        let now = Clock::start().now();
        let options = ApplyOptions { settings, now, clock_margin: Duration::from_secs(60) };
        let mut topology = Topology::of(&names, &services, &settings);
        topology.queues.push(Queue {
            name: yardstick_of(&names),
            kind: QueueKind::Classic,
            arguments: BTreeMap::new(),
        });
        let directory = env::temp_dir().join(format!("dtc-bench-{name}"));
        let made = fs::create_dir(&directory);
        made.with_context(|| format!("failed to make `{}`", directory.display()))?;
        let namespace =
            Self { plan, names, topology, directory, left: StoppingProcesses::default() };
        let specs: Vec<_> =
            SERVICES.iter().map(|name| json!({"name": name, "max_concurrency": SLOTS})).collect();
        let file = namespace.file("services.json");
        fs::write(&file, Value::from(specs).to_string())
            .with_context(|| format!("failed to write `{}`", file.display()))?;
        let broker = namespace.plan.broker.clone();
        let names = namespace.names.clone();
        match apply_until(stop, &broker, &names, &services, &options).await {
            Ok(Some(_)) => Ok(Some(namespace)),
            Ok(None) => namespace.leave().await.map(|()| None),
            Err(error) => {
                let left = namespace.leave().await;
                let error = anyhow::Error::new(error);
                Err(match left {
                    Ok(()) => error,
                    Err(left) => error.context(format!("{left:#}")),
                })
            }
        }
    }

    pub(super) fn broker(&self) -> &Broker {
        &self.plan.broker
    }

    /// The queue of the yardstick.
    pub(super) fn yardstick(&self) -> ShortString {
        yardstick_of(&self.names)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Deletes everything, and waits for the processes.
    pub(super) async fn leave(self) -> anyhow::Result<()> {
        let deleted = self.delete().await;
        // Processes whose queues are gone soon end.
        let ended = self.ended().await;
        let _ = fs::remove_dir_all(&self.directory);
        deleted.and(ended)
    }

    async fn delete(&self) -> anyhow::Result<()> {
        let namespace = || format!("namespace `{}` is still there", self.names.namespace());
        let connection = self.plan.broker.connect("cleanup").await.with_context(namespace)?;
        let deleted = delete(&connection, &self.topology).await;
        close(&connection).await;
        deleted.with_context(namespace)
    }

    async fn ended(&self) -> anyhow::Result<()> {
        let left = std::mem::take(&mut *self.left.lock().unwrap_or_else(PoisonError::into_inner));
        let until = Instant::now() + PATIENCE;
        for mut shell in left {
            if tokio::time::timeout_at(until, shell.wait()).await.is_err() {
                bail!("a process did not end within {PATIENCE:?}");
            }
        }
        Ok(())
    }

    /// Starts `dtc` with these arguments, and returns when it serves.
    async fn start(&self, arguments: &[&str]) -> anyhow::Result<BenchProcess> {
        let name = unique::name('p');
        let (ready, report) = (self.file(&format!("{name}.ready")), format!("{name}.json"));
        let (report, log) = (self.file(&report), self.file(&format!("{name}.log")));
        let binary = env::current_exe().context("failed to find this program's file")?;
        let mut command = Command::new("sh");
        command.arg("-c").arg(GUARD).arg("sh").arg(&binary).args(arguments);
        command.arg("--namespace").arg(self.names.namespace().to_string());
        command.arg("--ready-file").arg(&ready).arg("--report").arg(&report);
        if let Some(config) = &self.plan.config {
            command.arg("--config").arg(config);
        }
        if let Some(url) = &self.plan.url {
            command.env("DTC__BROKER__URL", url).env_remove("DTC__BROKER__URL_FILE");
        }
        let stderr = fs::File::create(&log).context("failed to make a log")?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr);
        // Ctrl-C at a terminal is meant for this process, which then stops the others.
        #[cfg(unix)]
        command.process_group(0);
        let began = Instant::now();
        let mut shell = command.spawn().context("failed to start a process")?;
        let stdout = shell.stdout.take().ok_or_else(|| anyhow!("a process has no output"))?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).await.context("failed to start a process")?;
        let pid = line.trim().parse().context("a process has no number")?;
        let guard = shell.stdin.take();
        let (shell, left) = (Some(shell), Arc::clone(&self.left));
        let started_in = Duration::ZERO;
        let mut process = BenchProcess { pid, shell, guard, report, log, started_in, left };
        while !ready.exists() {
            if began.elapsed() > PATIENCE || !process.is_there() {
                bail!(
                    "`dtc {}` did not begin to serve:\n{}",
                    arguments.join(" "),
                    process.stderr_text()
                );
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        process.started_in = began.elapsed();
        Ok(process)
    }

    /// Starts one more worker, under a new name: a configured name could be used only once.
    pub(super) async fn worker(&self, max_in_flight: usize) -> anyhow::Result<BenchProcess> {
        let (name, max_in_flight) = (unique::name('w'), max_in_flight.to_string());
        self.start(&["worker", "--name", &name, "--max-in-flight", &max_in_flight]).await
    }

    /// Starts an instance of each service.
    pub(super) async fn services(&self) -> anyhow::Result<Vec<BenchProcess>> {
        let file = self.file("services.json");
        let file = file.to_str().ok_or_else(|| anyhow!("the temporary directory is no text"))?;
        let mut services = Vec::new();
        for name in SERVICES {
            services.push(self.start(&["service", "--services", file, "--name", name]).await?);
        }
        Ok(services)
    }
}

/// One worker, or one instance of a service.
#[derive(Debug)]
pub(super) struct BenchProcess {
    pub(super) pid: u32,
    /// `None` once it has ended.
    shell: Option<Child>,
    guard: Option<ChildStdin>,
    report: PathBuf,
    log: PathBuf,
    /// From its start until it served.
    pub(super) started_in: Duration,
    left: StoppingProcesses,
}

impl BenchProcess {
    fn is_there(&self) -> bool {
        // If it can't be found out, only the time-out applies.
        !Path::new("/proc/self").exists() || process_path(self.pid).exists()
    }

    fn stderr_text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Stops it, waits for its end, and returns its report.
    pub(super) async fn stop(mut self) -> anyhow::Result<Value> {
        drop(self.guard.take());
        let status = self.ended().await?;
        if !status.success() {
            bail!("a process ended with {status}:\n{}", self.stderr_text());
        }
        let report = fs::read(&self.report).context("a process has left no report")?;
        serde_json::from_slice(&report).context("a process has left a report that is none")
    }

    /// Kills it without waiting.
    pub(super) async fn kill(mut self) -> anyhow::Result<()> {
        let mut kill = Command::new("sh");
        kill.arg("-c").arg(r#"kill -9 "$1""#).arg("sh").arg(self.pid.to_string());
        let killed = kill.status().await.context("failed to kill a process")?;
        drop(self.guard.take());
        if !killed.success() {
            bail!("failed to kill a process: {killed}");
        }
        Ok(())
    }

    async fn ended(&mut self) -> anyhow::Result<ExitStatus> {
        let shell = self.shell.as_mut().context("a process has ended before")?;
        let ended: Result<io::Result<_>, _> = tokio::time::timeout(PATIENCE, shell.wait()).await;
        let Ok(status) = ended else {
            bail!("a process did not end within {PATIENCE:?}:\n{}", self.stderr_text());
        };
        self.shell = None;
        status.context("failed to wait for a process")
    }
}

impl Drop for BenchProcess {
    /// Stops it; [`BenchNamespace::leave`] waits for it.
    fn drop(&mut self) {
        drop(self.guard.take());
        self.left.lock().unwrap_or_else(PoisonError::into_inner).extend(self.shell.take());
    }
}

fn yardstick_of(names: &Names) -> ShortString {
    format!("{}.yardstick", names.namespace()).into()
}

fn process_path(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}
