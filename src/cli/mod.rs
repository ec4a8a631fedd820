//! The `dtc` command: its sub-commands, exit codes and messages.
//!
//! Exit codes of every command: 0 done, whatever the outcomes; 1 not everything could be done; 2
//! wrong usage; 65 bad data; 69 broker unavailable; 77 refused by the broker; 78 bad configuration;
//! 130 interrupted.

mod bench;
mod broker;
mod config;
mod escape;
mod input;
mod log_format;
mod moment;
mod output;
mod pipeline;
mod progress;
mod ready_file;
mod report_file;
mod run;
mod run_on_broker;
mod sender;
mod service;
mod signals;
mod stalls;
mod status;
mod submit;
mod topology;
mod worker;

use std::{
    fmt,
    io::{self, Write as _},
    process::ExitCode,
    sync::mpsc,
    thread,
    time::Duration,
};

use clap::{Parser, Subcommand};

use crate::error::ErrorChain;

/// How long an ending process waits for its last message to be read from stderr.
const PRINT_MAX: Duration = Duration::from_secs(1);

/// Commits a transaction at every service involved, or at none.
#[derive(Debug, Parser)]
#[command(name = "dtc", version = env!("DTC_VERSION"))]
#[command(arg_required_else_help = true, max_term_width = 100)]
#[command(
    after_help = "Exit codes: 0 done, whatever the outcomes; 1 not everything could be done; \
                        2 wrong usage; 65 bad data; 69 broker unavailable; \
                        77 refused by the broker; 78 bad configuration; 130 interrupted.\n\
                        Durations: a whole number with a unit: ms, s, min, h or d, as in 90s.\n\
                        Logging: DTC_LOG=error|warn|info|debug|trace|off, to stderr (default: info \
                        for worker and service, else error)."
)]
struct CommandLine {
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    Run(run::RunArguments),
    Worker(worker::WorkerArguments),
    Service(service::ServiceArguments),
    Submit(submit::SubmitArguments),
    Status(status::StatusArguments),
    Topology(topology::TopologyArguments),
    Config(config::ConfigArguments),
    Bench(bench::BenchArguments),
}

/// The exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    Done,
    Incomplete,
    Usage,
    BadData,
    Unavailable,
    Refused,
    BadConfiguration,
    Interrupted,
}

impl Exit {
    const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Incomplete => 1,
            Self::Usage => 2,
            Self::BadData => 65,
            Self::Unavailable => 69,
            Self::Refused => 77,
            Self::BadConfiguration => 78,
            Self::Interrupted => 130,
        }
    }
}

/// An error, and the exit code that it leads to.
#[derive(Debug)]
struct Failure {
    exit: Exit,
    error: anyhow::Error,
}

impl Failure {
    fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", ErrorChain(self.error.as_ref()))
    }
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let arguments = CommandLine::parse();
    let is_daemon = matches!(arguments.command, CliCommand::Worker(_) | CliCommand::Service(_));
    let ended = match arguments.command {
        CliCommand::Run(arguments) => run::run(&arguments),
        CliCommand::Worker(arguments) => worker::run(&arguments),
        CliCommand::Topology(arguments) => topology::run(&arguments),
        CliCommand::Config(arguments) => config::run(&arguments),
        CliCommand::Bench(arguments) => bench::run(&arguments),
        CliCommand::Service(arguments) => service::run(&arguments),
        CliCommand::Status(arguments) => status::run(&arguments),
        CliCommand::Submit(arguments) => submit::run(&arguments),
    };
    let exit = ended.unwrap_or_else(|failure| {
        let message = format!("{failure}\n");
        if is_daemon {
            tell_in_passing(message)
        } else {
            tell(&message)
        }
        failure.exit
    });
    ExitCode::from(exit.code())
}

/// Prints to stderr. An error is ignored: there is nobody to report it to.
fn tell(text: &str) {
    let _ = io::stderr().write_all(escape::lines(text).as_bytes());
}

/// The same for a daemon, which must end even if nobody reads its stderr.
fn tell_in_passing(text: String) {
    let (sender, printed) = mpsc::channel();
    thread::spawn(move || {
        tell(&text);
        let _ = sender.send(());
    });
    let _ = printed.recv_timeout(PRINT_MAX);
}
