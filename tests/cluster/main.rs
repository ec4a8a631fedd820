//! A cluster of three RabbitMQ nodes, faults that are injected into it, and what must hold all the
//! same.
//!
//! ```text
//! cargo test --profile optimised --test cluster -- [FLAG...] [NAME...]
//!
//!   NAME              a scenario whose name contains this; all if none is given
//!   --exact           the name is the whole one
//!   --selected        the few scenarios that stand for all
//!   --campaign RUNS   all scenarios again and again, so many runs in all; a failure ends nothing
//!   --table FILE      where a campaign writes its table
//!   --list            only the names
//! ```
//!
//! * `DTC_TEST_CLUSTER_RABBITMQ`: the root of a file system with RabbitMQ 4.x; it is not changed.
//! * `DTC_TEST_CLUSTER_QUIET`: how many seconds after healing everything must be answered (30).
//!
//! Everything runs in separate namespaces, which this process creates by running itself in them:
//! when this process ends, in whatever way, the kernel ends everything in them, with their mounts
//! and networks. So several of these can run at once. Where such namespaces can't be created, each
//! scenario is skipped, by name and with the reason.

#![allow(clippy::print_stdout, reason = "a test tells what it has seen")]
#![allow(clippy::disallowed_methods, reason = "a test measures how long things take")]

mod journal;
mod network;
mod nodes;
mod oracle;
mod oracle_tests;
mod play;
mod scenarios;
mod switch;
mod system;
mod table;
mod watchers;

use std::{
    env,
    ffi::OsString,
    fs, panic,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::{
    network::Network,
    nodes::Nodes,
    play::{Stage, Verdict},
    scenarios::{SCENARIOS, Scenario},
    table::Table,
};

/// The chroot with RabbitMQ.
const CHROOT: &str = "DTC_TEST_CLUSTER_RABBITMQ";
/// How long after healing something may still be in progress, in seconds.
const QUIET: &str = "DTC_TEST_CLUSTER_QUIET";
const QUIET_DEFAULT: u64 = 30;
/// The arguments with which this program runs itself in its namespaces: to check whether they can
/// be created, and to run scenarios.
const PROBE: &str = "--inside-probe";
const PLAY: &str = "--inside-play";

/// The command line.
#[derive(Debug, Default)]
struct Options {
    names: Vec<String>,
    exact: bool,
    selected: bool,
    list: bool,
    campaign: Option<usize>,
    table: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let first = arguments.first().map(String::as_str);
    let ended = match first {
        Some(PROBE) => probe().map(|()| true),
        Some(PLAY) => Options::parse(&arguments[1..]).and_then(|wanted| play(&wanted)),
        _ => Options::parse(&arguments).and_then(|wanted| outside(&wanted, &arguments)),
    };
    match ended {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(101),
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::from(101)
        }
    }
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self> {
        let mut wanted = Self::default();
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().with_context(|| format!("{argument} of what?"));
            match argument.as_str() {
                "--list" => wanted.list = true,
                "--exact" => wanted.exact = true,
                "--selected" => wanted.selected = true,
                "--campaign" => {
                    let runs = value()?.parse().context("--campaign wants a number of runs")?;
                    wanted.campaign = Some(runs);
                }
                "--table" => wanted.table = Some(value()?.into()),
                // Flags that other test targets take.
                flag if flag.starts_with("--") => {}
                name => wanted.names.push(name.to_owned()),
            }
        }
        Ok(wanted)
    }

    fn scenarios(&self) -> Vec<&'static Scenario> {
        SCENARIOS.iter().filter(|scenario| self.wants(scenario)).collect()
    }

    fn wants(&self, scenario: &Scenario) -> bool {
        let is_named = |name: &String| {
            if self.exact { scenario.name == name } else { scenario.name.contains(name.as_str()) }
        };
        (self.names.is_empty() || self.names.iter().any(is_named))
            && (!self.selected || scenario.is_selected)
    }
}

/// In the caller's namespaces: checks whether others can be created, and runs the scenarios there.
fn outside(wanted: &Options, arguments: &[String]) -> Result<bool> {
    let scenarios = wanted.scenarios();
    if wanted.list {
        scenarios.iter().for_each(|scenario| println!("{}: test", scenario.name));
        return Ok(true);
    }
    if scenarios.is_empty() {
        println!("\nrunning 0 tests");
        closing(0, 0, 0);
        return Ok(true);
    }
    if let Err(error) = possible() {
        println!("\nrunning {} tests", scenarios.len());
        for scenario in &scenarios {
            println!("test {} ... ignored, {error:#}", scenario.name);
        }
        println!("\nno scenario of the cluster was run: {error:#}");
        closing(0, 0, scenarios.len());
        return Ok(true);
    }
    let arguments = [PLAY.to_owned()].into_iter().chain(arguments.iter().cloned());
    let status = inside(arguments.map(OsString::from)).status().context("it can't be run")?;
    // A signal may have ended the namespaces, which is no success.
    Ok(status.success())
}

/// Checks that there is a RabbitMQ, and that the namespaces can be created.
fn possible() -> Result<()> {
    let chroot = env::var_os(CHROOT).with_context(|| format!("{CHROOT} isn't set"))?;
    let server = Path::new(&chroot).join("usr/lib/rabbitmq/bin/rabbitmq-server");
    anyhow::ensure!(server.exists(), "there is no {}", server.display());
    let tried = inside([OsString::from(PROBE)]).stdin(Stdio::null()).output();
    let output = tried.context("`setpriv` and `unshare` are wanted")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    let complaint = complaint.trim().replace('\n', "; ");
    anyhow::ensure!(output.status.success(), "namespaces can't be had here: {complaint}");
    Ok(())
}

/// This program, with these arguments, in namespaces that end with this process.
fn inside(arguments: impl IntoIterator<Item = OsString>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare"]);
    if !nix::unistd::Uid::effective().is_root() {
        command.arg("--map-root-user");
    }
    // When the first process of a namespace ends, all others in it end. Orphans in it become
    // children of that process, and stay zombies unless it waits for all, as a shell does.
    command.args(["--mount", "--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]);
    command.args(["sh", "-c", r#""$@" & wait "$!""#, "sh"]);
    command.arg(env::current_exe().unwrap_or_default()).args(arguments);
    command
}

/// Does everything that may be forbidden, and nothing else.
fn probe() -> Result<()> {
    let scratch = scratch()?;
    let chroot = PathBuf::from(env::var_os(CHROOT).context("a chroot")?);
    let network = Network::start()?;
    let nodes = Nodes::mount(&chroot, &scratch)?;
    nodes.try_out(&network)
}

/// A directory that is removed when this process ends.
fn scratch() -> Result<PathBuf> {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cluster-scratch");
    nodes::scratch(&directory)?;
    Ok(directory)
}

/// In separate namespaces: runs the chosen scenarios.
fn play(wanted: &Options) -> Result<bool> {
    let started = Instant::now();
    let quiet = env::var(QUIET).ok().and_then(|seconds| seconds.parse().ok());
    let scratch = scratch()?;
    let chroot = PathBuf::from(env::var_os(CHROOT).context("a chroot")?);
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cluster");
    fs::create_dir_all(&kept)?;
    let network = Network::start()?;
    let nodes = Nodes::mount(&chroot, &scratch)?;
    let quiet_within = Duration::from_secs(quiet.unwrap_or(QUIET_DEFAULT));
    let mut stage = Stage { network, nodes, scratch, kept, quiet_within };
    stage.form()?;
    println!("three nodes of RabbitMQ {} after {:.0?}", stage.version()?, started.elapsed());

    let scenarios = wanted.scenarios();
    let runs = wanted.campaign.unwrap_or(scenarios.len());
    let (mut passed, mut failed) = (0, Vec::new());
    if wanted.campaign.is_none() && wanted.names.is_empty() {
        let mut tell = |name: &str, good: bool| {
            println!("test {name} ... {}", if good { "ok" } else { "FAILED" });
            if good { passed += 1 } else { failed.push(name.to_owned()) }
        };
        for (name, check) in oracle_tests::ALL {
            tell(name, panic::catch_unwind(check).is_ok());
        }
        let network = stage.check_network();
        if let Err(error) = &network {
            println!("{error:#}");
        }
        tell("network::links_are_cut_delayed_and_healed", network.is_ok());
    }
    println!("\nrunning {runs} runs of {} scenarios", scenarios.len());
    let mut table = Table::default();
    for (number, scenario) in (1..=runs).zip(scenarios.iter().cycle()) {
        println!("\n{number}: {}", scenario.name);
        let began = Instant::now();
        let verdict = stage.play(scenario, number);
        tell(&verdict);
        let good = verdict.is_good();
        let word = if good { "ok" } else { "FAILED" };
        println!("test {} ... {word} ({:.0?})", scenario.name, began.elapsed());
        table.add(scenario.name, verdict);
        if let Some(path) = &wanted.table {
            let text = table.text(&stage.version()?);
            fs::write(path, text)
                .with_context(|| format!("{} can't be written", path.display()))?;
        }
        if good { passed += 1 } else { failed.push(scenario.name.to_owned()) }
    }
    println!("\n{}", table.text(&stage.version()?));
    failed.iter().for_each(|name| println!("failed: {name}"));
    closing(passed, failed.len(), 0);
    println!("in {:.0?}", started.elapsed());
    Ok(failed.is_empty())
}

/// The summary line, as every test target prints it.
fn closing(passed: usize, failed: usize, ignored: usize) {
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; \
         0 filtered out"
    );
}

fn tell(verdict: &Verdict) {
    let (times, quiet_after) = (&verdict.times, verdict.quiet_after);
    let seconds = |time: Option<Duration>| {
        time.map_or_else(|| "never".to_owned(), |time| format!("{:.1} s", time.as_secs_f64()))
    };
    println!(
        "    first new commit {} after the fault, {} after healing; longest gap {:.1} s; quiet {}",
        seconds(times.first_after_fault),
        seconds(times.first_after_healing),
        times.longest_gap.as_secs_f64(),
        seconds(quiet_after),
    );
    println!(
        "    {} submitted, {} committed, aborted: {}",
        times.submitted,
        times.committed,
        table::reasons(&times.aborted)
    );
    println!("    verdict: {}", verdict.word());
    verdict.problems().chain(&verdict.late).for_each(|it| println!("    * {it}"));
    verdict.broker.iter().for_each(|it| println!("    * the broker: {it}"));
}
