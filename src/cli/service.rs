//! `dtc service`: one instance of a simulated service, until a signal stops it.

use std::{convert::Infallible, io::Read as _, path::PathBuf};

use anyhow::{Context as _, anyhow};
use clap::Args;
use indicatif::ProgressBar;
use serde_json::json;
use tokio::sync::watch;
use tracing_subscriber::filter::LevelFilter;

use crate::{
    cli::{
        Exit, Failure,
        broker::{self, BrokerArguments, flag},
        input::{bad_data, name, open},
        pipeline, progress,
        ready_file::ReadyFile,
        report_file::ReportFile,
        signals, stalls,
    },
    input::services::{self, ServiceSpec},
    participant::{
        error::ServeError,
        serve,
        settings::{self, ServeSettings},
        spans,
    },
    protocol::ids::ServiceName,
    simulated::{service::Simulated, store::SimulatedStore},
    transport::amqp::{
        connection::{Broker, close},
        names::Names,
        topology::{
            self, ServiceTopology,
            check::{self, ServiceMismatch},
        },
        traffic::Traffic,
    },
};

/// Serve a simulated service on RabbitMQ; any number of instances share its work.
///
/// services.json has the same form as for `dtc run`. Start one process for each instance of each
/// service. It waits until the broker can be reached and `dtc topology apply` has declared the
/// queues.
///
/// --state DIR holds the state that all instances of the service share: what a killed instance had
/// prepared, another one finishes. Without it, an instance keeps its state in memory, and no other
/// one can serve beside it. The sub-directory with the service's name has committed.log and
/// aborted.log (a line for each branch: id, requested_at, branch, milliseconds, instance),
/// calls.log, and prepared/ with a file for each branch in doubt. Nothing is synced to the disk:
/// the state survives kill -9, but not a power cut.
///
/// On SIGTERM or Ctrl-C the instance takes no more prepares, waits for the outcomes of what it has
/// prepared, for up to --drain, and exits with 0. It does not wait for parked commits: it logs
/// them, and the next instance continues them. On a second signal it exits at once.
#[derive(Debug, Args)]
#[command(about = "Serve a simulated service on RabbitMQ; any number of instances share its work")]
pub(super) struct ServiceArguments {
    #[command(flatten)]
    broker: BrokerArguments,
    /// The services: a file, or - for stdin
    #[arg(long, value_name = "FILE")]
    services: PathBuf,
    /// The service to serve
    #[arg(long, value_name = "NAME")]
    name: ServiceName,
    /// First part of the instance's id; the rest is new in each process
    ///
    /// [env: DTC__SERVICE__INSTANCE]
    #[arg(long, value_name = "ID")]
    instance: Option<String>,
    /// Keep the state of the service in this directory [default: in memory, until the process ends]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Declare this service's queues, for experiments; otherwise `dtc topology apply` declares
    /// everything
    #[arg(long)]
    declare: bool,
    /// Seed of the simulation: the same seed gives the same refusals and failures
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// How long to wait for an outcome before asking the workers for it [default: 10s]
    ///
    /// [env: DTC__SERVICE__INQUIRE_AFTER]
    #[arg(long, value_name = "DURATION")]
    inquire_after: Option<String>,
    /// How long to wait for outcomes after a signal to stop [default: 25s]
    ///
    /// [env: DTC__SERVICE__DRAIN]
    #[arg(long, value_name = "DURATION")]
    drain: Option<String>,
    /// A file that exists as long as the instance serves or stands by, for health checks
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// Write counts of published and delivered messages to this file at the end, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

pub(super) fn run(arguments: &ServiceArguments) -> Result<Exit, Failure> {
    let level = progress::log_level(LevelFilter::INFO);
    let level = level.map_err(|error| Failure::new(Exit::Usage, error))?;
    let spec = spec(arguments)?;
    let (mut settings, declared) = settings(arguments, &spec)?;
    let report = ReportFile::create(arguments.report.as_deref())?;
    let _logging = progress::log_above(&ProgressBar::hidden(), level);
    let _entered = spans::serve(&settings.service, &settings.instance).entered();
    let (runtime, interrupt) = pipeline::daemon_runtime()?;

    let store = match &arguments.state {
        Some(directory) => SimulatedStore::open(directory, &spec.name, &settings.instance)
            .map_err(|error| Failure::new(Exit::BadConfiguration, error))?,
        None => {
            tracing::warn!(
                "without --state, what the service holds is in this process alone: it ends with it, \
                 no other instance can finish it, and none can serve beside this one; give all \
                 instances of a service one --state"
            );
            settings.only_instance = true;
            SimulatedStore::in_memory()
        }
    };
    let participant = Simulated::new(&spec, arguments.seed).with_store(store);
    tracing::info!(
        broker = %settings.broker.address, namespace = %settings.names.namespace(), "starting"
    );
    stalls::watch(&runtime);
    let stop = signals::first_signal(&interrupt);
    let file = ReadyFile::at(arguments.ready_file.as_deref(), &runtime)?;
    settings.readiness = file.readiness();
    let comparing = compare(
        settings.broker.clone(),
        settings.names.clone(),
        (ServiceTopology::from(&spec), declared),
        settings.readiness.subscribe(),
    );
    let ended = runtime.block_on(async {
        tokio::select! {
            biased;
            ended = serve::serve_in_span(participant, settings, stop) => ended,
            never = comparing => match never {},
        }
    });
    file.end(&runtime);
    ended.map_err(failure)?;
    tracing::info!("stopped");
    let Traffic { published, delivered } = Traffic::so_far();
    report.write(&json!({"published": published, "delivered": delivered}))?;
    Ok(Exit::Done)
}

/// The settings of the instance, and those with which queues are declared.
fn settings(
    arguments: &ServiceArguments,
    spec: &ServiceSpec,
) -> Result<(ServeSettings, topology::Settings), Failure> {
    let config = arguments.broker.load([
        flag("service.instance", "--instance", arguments.instance.as_ref()),
        flag("service.inquire_after", "--inquire-after", arguments.inquire_after.as_ref()),
        flag("service.drain", "--drain", arguments.drain.as_ref()),
    ])?;
    let instance = settings::new_instance(config.service.instance.as_ref());
    let broker = broker::broker(&config, format!("dtc service {} {instance}", spec.name));
    let names = broker::names(&config);
    let settings = ServeSettings {
        instance,
        cap: spec.cap,
        inquire_after: config.service.inquire_after,
        drain: config.service.drain,
        declare: arguments.declare.then_some(spec.max_wait),
        ..ServeSettings::new(broker, names, spec.name.clone(), spec.max_concurrency)
    };
    Ok((settings, config.topology.settings))
}

/// Logs, whenever the instance begins to serve, each way in which its prepare queue differs from
/// its services.json. The queue's arguments apply, and it was declared from another services.json.
///
/// If they can't be compared, the instance serves all the same: its user may lack the permission to
/// declare, for example.
async fn compare(
    broker: Broker,
    names: Names,
    (service, declared): (ServiceTopology, topology::Settings),
    mut serving: watch::Receiver<bool>,
) -> Infallible {
    while serving.wait_for(|serves| *serves).await.is_ok() {
        match check_queue(&broker, &names, &service, &declared).await {
            Ok(faults) => faults.iter().for_each(|ServiceMismatch { field, wanted, found }| {
                tracing::warn!(
                    field, services_json = wanted, queue = found,
                    "the queue was made from another services.json than this instance has, and what \
                     the queue says holds: give all instances the services.json that was applied, or \
                     run `dtc topology apply --replace` for this service with the new one"
                );
            }),
            Err(error) => {
                tracing::debug!("not known whether the queue is as services.json says: {error:#}");
            }
        }
        if serving.wait_for(|serves| !*serves).await.is_err() {
            break;
        }
    }
    std::future::pending().await
}

async fn check_queue(
    broker: &Broker,
    names: &Names,
    service: &ServiceTopology,
    declared: &topology::Settings,
) -> anyhow::Result<Vec<ServiceMismatch>> {
    let connection = broker.connect("services.json").await?;
    let mismatches = check::service_mismatches(&connection, names, service, declared).await;
    close(&connection).await;
    Ok(mismatches?)
}

/// The service to serve.
fn spec(arguments: &ServiceArguments) -> Result<ServiceSpec, Failure> {
    let (path, mut text) = (&arguments.services, Vec::new());
    open(path)?
        .read_to_end(&mut text)
        .with_context(|| format!("failed to read `{}`", path.display()))
        .map_err(|error| Failure::new(Exit::BadData, error))?;
    let file = name(path);
    let specs = services::read(&file, &text).map_err(bad_data)?;
    let named: Vec<_> = specs.iter().map(|spec| spec.name.to_string()).collect();
    let spec = specs.into_iter().find(|spec| spec.name == arguments.name);
    spec.ok_or_else(|| {
        let (name, named) = (&arguments.name, named.join("`, `"));
        Failure::new(Exit::Usage, anyhow!("{file} has no service `{name}`; there are `{named}`"))
    })
}

fn failure(error: ServeError) -> Failure {
    match &error {
        ServeError::OtherStore { .. } => Failure::new(
            Exit::BadConfiguration,
            anyhow!(
                "{error} (--state names the store; without it, an instance has one of its own, in \
                 memory)"
            ),
        ),
        ServeError::Invalid(_) | ServeError::Mismatch { .. } => {
            Failure::new(Exit::BadConfiguration, error)
        }
        ServeError::Refused { .. } => Failure::new(Exit::Refused, error),
    }
}
