//! A soak: a whole system under a steady load for a long time; its memory must stay flat.
//!
//! ```text
//! cargo test --profile optimised --test soak -- --minutes N [--rate N] [--table FILE]
//!
//!   --minutes N    how long; without it only the soak's own verdicts are checked
//!   --rate N       how many transactions a second (200)
//!   --table FILE   where the table is written
//! ```
//!
//! `DTC_TEST_RABBITMQ`: the root of a file system whose RabbitMQ is run instead of the machine's.
//!
//! One RabbitMQ node, two workers, three services and a producer, each a separate process. None of
//! them outlives this process, in whatever way that ends. Sixteen times, the broker closes all
//! connections, as an operator does. An hour at 200 transactions per second
//! takes 1.5 GB of the directory for temporary files, most of it for the services' logs of their
//! calls.

#![allow(clippy::disallowed_methods, reason = "a test measures how long things take")]

#[path = "../support/broker.rs"]
mod broker;
mod fleet;
mod ledger;
#[path = "../support/lines.rs"]
mod lines;
mod load;
mod memory;
mod signals;
mod soak;
mod table;
mod table_tests;

use std::{
    env, fmt,
    io::{self, Write},
    panic,
    path::PathBuf,
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context, Result, ensure};

use crate::soak::{Ended, Plan};

/// The default number of transactions per second.
const RATE: u32 = 200;
/// The exit code after a signal.
const INTERRUPTED: u8 = 130;
/// The exit code of a failed test target.
const FAILED: u8 = 101;

/// The command line.
#[derive(Debug, Default)]
struct Options {
    minutes: Option<u32>,
    rate: Option<u32>,
    table: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let ended = Options::parse(&arguments).and_then(|wanted| match wanted.minutes {
        Some(minutes) => soaked(minutes, &wanted),
        None => Ok(ExitCode::from(if checked() { 0 } else { FAILED })),
    });
    ended.unwrap_or_else(|error| {
        tell(format_args!("{error:#}"));
        ExitCode::from(FAILED)
    })
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self> {
        let mut wanted = Self::default();
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().with_context(|| format!("{argument} of what?"));
            match argument.as_str() {
                "--minutes" => wanted.minutes = Some(number(argument, value()?)?),
                "--rate" => wanted.rate = Some(number(argument, value()?)?),
                "--table" => wanted.table = Some(value()?.into()),
                // Flags that other test targets take.
                _ => {}
            }
        }
        Ok(wanted)
    }
}

fn number(flag: &str, text: &str) -> Result<u32> {
    let number = text.parse().with_context(|| format!("{flag} wants a number, not `{text}`"))?;
    ensure!(number > 0, "{flag} wants a number above 0");
    Ok(number)
}

/// Tests that the verdicts detect what they must.
fn checked() -> bool {
    let mut failed = 0;
    let all = table_tests::ALL.iter().chain(ledger::CHECKS);
    let count = all.clone().count();
    tell(format_args!("\nrunning {count} tests"));
    for (name, check) in all {
        let good = panic::catch_unwind(check).is_ok();
        tell(format_args!("test {name} ... {}", if good { "ok" } else { "FAILED" }));
        failed += usize::from(!good);
    }
    closing(count - failed, failed);
    failed == 0
}

/// The soak itself.
fn soaked(minutes: u32, wanted: &Options) -> Result<ExitCode> {
    let began = Instant::now();
    let plan = Plan::new(minutes, wanted.rate.unwrap_or(RATE));
    let report = match soak::soak(&plan)? {
        Ended::Interrupted(signal) => {
            tell(format_args!("{signal} after {:.0?}: no verdict", began.elapsed()));
            return Ok(ExitCode::from(INTERRUPTED));
        }
        Ended::Over(report) => report,
    };
    let text = report.text();
    tell(format_args!("\n{text}"));
    if let Some(path) = &wanted.table {
        std::fs::write(path, text)
            .with_context(|| format!("{} can't be written", path.display()))?;
    }
    let checks = report.checks();
    let mut failed = 0;
    for check in &checks {
        let word = if check.problems.is_empty() { "ok" } else { "FAILED" };
        tell(format_args!("test {} ... {word}", check.name));
        check.problems.iter().for_each(|problem| tell(format_args!("    * {problem}")));
        failed += usize::from(!check.problems.is_empty());
    }
    closing(checks.len() - failed, failed);
    tell(format_args!("in {:.0?}", began.elapsed()));
    Ok(ExitCode::from(if failed == 0 { 0 } else { FAILED }))
}

/// The summary line, as every test target prints it.
fn closing(passed: usize, failed: usize) {
    let word = if failed == 0 { "ok" } else { "FAILED" };
    tell(format_args!(
        "\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered \
         out"
    ));
}

/// Prints a line. If Ctrl-C has ended its reader, the exit code stays the same.
fn tell(line: fmt::Arguments<'_>) {
    let mut stdout = io::stdout();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}
