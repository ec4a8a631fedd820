//! `dtc worker`: one coordinator, until it is told to stop.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use indicatif::ProgressBar;
use tracing_subscriber::filter::LevelFilter;

use crate::{
    cli::{
        Exit, Failure,
        broker::BrokerArguments,
        duration,
        limits::{at_least_one, workers_name},
        progress,
        ready::ReadyFile,
        signals, stages,
    },
    protocol::ids::WorkerId,
    transport::amqp::unique,
    worker::{self, Settings, WorkerError},
};

/// Coordinate transactions on RabbitMQ; any number of workers share the load.
///
/// A worker keeps nothing that a crash could lose: start and stop as many as you like. It waits for
/// a broker that is not there, and for the exchanges and queues that `dtc topology apply` makes.
///
/// SIGTERM or Ctrl-C: takes no more requests, finishes those it has begun for up to --drain, hands
/// back the rest, and ends with 0. Once more: stops at once; nothing is lost by that either.
#[derive(Debug, Args)]
#[command(about = "Coordinate transactions on RabbitMQ; any number of workers share the load")]
pub(super) struct WorkerArguments {
    #[command(flatten)]
    broker: BrokerArguments,
    /// What the worker is called; no other may have the name [default: a new one]
    #[arg(long, value_name = "ID", value_parser = workers_name, env = "DTC__WORKER__NAME")]
    name: Option<WorkerId>,
    /// How many transactions may be worked on at once; more wait for slots
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = at_least_one::<u16>)]
    #[arg(allow_negative_numbers = true, env = "DTC__WORKER__MAX_IN_FLIGHT")]
    max_in_flight: u16,
    /// How long the prepares of a transaction may take that has no timeout_ms of its own
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = duration::parse)]
    #[arg(env = "DTC__WORKER__PREPARE_TIMEOUT")]
    prepare_timeout: Duration,
    /// How long to finish what has begun when told to stop
    #[arg(long, value_name = "DURATION", default_value = "25s", value_parser = duration::parse)]
    #[arg(env = "DTC__WORKER__DRAIN")]
    drain: Duration,
    /// How long a decision is remembered, to recognise a request that comes again
    #[arg(long, value_name = "DURATION", default_value = "15min", value_parser = duration::parse)]
    #[arg(env = "DTC__WORKER__WINDOW")]
    window: Duration,
    /// A file that is there as long as the worker takes requests, for whoever asks for its health
    #[arg(long, value_name = "FILE", env = "DTC__WORKER__READY_FILE")]
    ready_file: Option<PathBuf>,
}

pub(super) fn run(arguments: &WorkerArguments) -> Result<Exit, Failure> {
    let level = progress::log_level(LevelFilter::INFO);
    let level = level.map_err(|error| Failure::new(Exit::Usage, error))?;
    let mut settings = settings(arguments)?;
    let (runtime, interrupt) = stages::runtime()?;
    progress::log_above(&ProgressBar::hidden(), level);

    let name = settings.coordinator.worker.clone();
    let max_in_flight = settings.coordinator.in_flight_max;
    tracing::info!(
        worker = %name, broker = %settings.broker.address,
        namespace = %settings.names.namespace(), max_in_flight, "starting"
    );
    let stop = signals::heard(&interrupt);
    let ready = || tracing::info!(worker = %name, "ready");
    let file = ReadyFile::at(arguments.ready_file.as_deref(), &runtime)?;
    settings.serving = file.serving();
    let ended = runtime.block_on(worker::run(settings, stop, ready));
    file.end(&runtime);
    let tally = ended.map_err(failure)?;
    tracing::info!(
        taken = tally.taken,
        committed = tally.committed,
        aborted = tally.aborted,
        rejected = tally.rejected,
        parked = tally.parked,
        unclaimed = tally.unclaimed,
        connections_lost = tally.lost,
        "stopped"
    );
    Ok(Exit::Done)
}

fn settings(arguments: &WorkerArguments) -> Result<Settings, Failure> {
    let name = match &arguments.name {
        Some(name) => name.clone(),
        None => WorkerId::parse(&unique::name('w'))
            .map_err(|error| Failure::new(Exit::Incomplete, error))?,
    };
    let broker = arguments.broker.broker(format!("dtc worker {name}"))?;
    let mut settings = Settings::new(broker, arguments.broker.names(), name);
    settings.drain = arguments.drain;
    settings.coordinator.in_flight_max = arguments.max_in_flight.into();
    settings.coordinator.prepare_timeout = arguments.prepare_timeout;
    settings.coordinator.window = arguments.window;
    settings.coordinator.seed = unique::number();
    Ok(settings)
}

fn failure(error: WorkerError) -> Failure {
    match &error {
        WorkerError::Refused(_) | WorkerError::NotPermitted(_) => {
            Failure::new(Exit::Refused, error)
        }
    }
}
