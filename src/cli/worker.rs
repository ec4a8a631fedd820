//! `dtc worker`: one worker, until a signal stops it.

use std::path::PathBuf;

use clap::Args;
use indicatif::ProgressBar;
use serde_json::json;
use tracing_subscriber::filter::LevelFilter;

use crate::{
    cli::{
        Exit, Failure,
        broker::{self, BrokerArguments, flag},
        pipeline, progress,
        ready_file::ReadyFile,
        report_file::ReportFile,
        signals, stalls,
    },
    protocol::ids::WorkerId,
    transport::amqp::{traffic::Traffic, unique},
    worker::{self, Settings, WorkerError},
};

/// Coordinate transactions on RabbitMQ; any number of workers share the load.
///
/// A worker keeps nothing that a crash could lose: start and stop as many as you like. It waits
/// until the broker can be reached and `dtc topology apply` has declared the exchanges and queues.
///
/// On SIGTERM or Ctrl-C the worker takes no more requests, finishes those it has begun, for up to
/// --drain, returns the rest to the queue, and exits with 0. On a second signal it exits at once;
/// that loses nothing either.
#[derive(Debug, Args)]
#[command(about = "Coordinate transactions on RabbitMQ; any number of workers share the load")]
pub(super) struct WorkerArguments {
    #[command(flatten)]
    broker: BrokerArguments,
    /// Name of the worker, which no other worker may have [default: a new name]
    ///
    /// [env: DTC__WORKER__NAME]
    #[arg(long, value_name = "ID")]
    name: Option<String>,
    /// How many transactions to work on at once, not counting those that wait for a slot [default:
    /// 256]
    ///
    /// [env: DTC__WORKER__MAX_IN_FLIGHT]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max_in_flight: Option<String>,
    /// How long the prepares of a transaction without timeout_ms may take [default: 5s]
    ///
    /// [env: DTC__WORKER__PREPARE_TIMEOUT]
    #[arg(long, value_name = "DURATION")]
    prepare_timeout: Option<String>,
    /// How long to finish begun transactions after a signal to stop [default: 25s]
    ///
    /// [env: DTC__WORKER__DRAIN]
    #[arg(long, value_name = "DURATION")]
    drain: Option<String>,
    /// How long to remember a decision, in order to recognise a repeated request; at most the last
    /// 200,000 are remembered [default: 15min]
    ///
    /// [env: DTC__WORKER__WINDOW]
    #[arg(long, value_name = "DURATION")]
    window: Option<String>,
    /// A file that exists as long as the worker takes requests, for health checks
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// Write counts of transactions and messages to this file at the end, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

pub(super) fn run(arguments: &WorkerArguments) -> Result<Exit, Failure> {
    let level = progress::log_level(LevelFilter::INFO);
    let level = level.map_err(|error| Failure::new(Exit::Usage, error))?;
    let mut settings = settings(arguments)?;
    let report = ReportFile::create(arguments.report.as_deref())?;
    let _logging = progress::log_above(&ProgressBar::hidden(), level);
    let _in_span = worker::span(&settings.coordinator.worker).entered();
    let (runtime, interrupt) = pipeline::daemon_runtime()?;

    let max_in_flight = settings.coordinator.in_flight_max;
    tracing::info!(
        broker = %settings.broker.address, namespace = %settings.names.namespace(), max_in_flight,
        "starting"
    );
    stalls::watch(&runtime);
    let stop = signals::first_signal(&interrupt);
    let file = ReadyFile::at(arguments.ready_file.as_deref(), &runtime)?;
    settings.readiness = file.readiness();
    let ended = runtime.block_on(worker::run_in_span(settings, stop));
    file.end(&runtime);
    let stats = ended.map_err(failure)?;
    tracing::info!(
        taken = stats.taken,
        committed = stats.committed,
        aborted = stats.aborted,
        rejected = stats.rejected,
        parked = stats.parked,
        unclaimed = stats.unclaimed,
        connections_lost = stats.lost,
        "stopped"
    );
    let Traffic { published, delivered } = Traffic::so_far();
    report.write(&json!({
        "taken": stats.taken,
        "committed": stats.committed,
        "aborted": stats.aborted,
        "rejected": stats.rejected,
        "parked": stats.parked,
        "unclaimed": stats.unclaimed,
        "connections_lost": stats.lost,
        "published": published,
        "delivered": delivered,
    }))?;
    Ok(Exit::Done)
}

fn settings(arguments: &WorkerArguments) -> Result<Settings, Failure> {
    let config = arguments.broker.load([
        flag("worker.name", "--name", arguments.name.as_ref()),
        flag("worker.max_in_flight", "--max-in-flight", arguments.max_in_flight.as_ref()),
        flag("worker.prepare_timeout", "--prepare-timeout", arguments.prepare_timeout.as_ref()),
        flag("worker.drain", "--drain", arguments.drain.as_ref()),
        flag("worker.window", "--window", arguments.window.as_ref()),
    ])?;
    let name = match &config.worker.name {
        Some(name) => name.clone(),
        None => WorkerId::parse(&unique::name('w'))
            .map_err(|error| Failure::new(Exit::Incomplete, error))?,
    };
    let broker = broker::broker(&config, format!("dtc worker {name}"));
    let mut settings = Settings::new(broker, broker::names(&config), name);
    settings.drain = config.worker.drain;
    settings.coordinator.in_flight_max = config.worker.max_in_flight.into();
    settings.coordinator.prepare_timeout = config.worker.prepare_timeout;
    settings.coordinator.window = config.worker.window;
    settings.coordinator.clock_margin = config.topology.clock_margin;
    settings.coordinator.seed = unique::number();
    Ok(settings)
}

fn failure(error: WorkerError) -> Failure {
    match &error {
        WorkerError::Invalid(_) => Failure::new(Exit::BadConfiguration, error),
        WorkerError::Refused(_) | WorkerError::NotPermitted(_) => {
            Failure::new(Exit::Refused, error)
        }
    }
}
