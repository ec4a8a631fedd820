//! `dtc bench`: the speed of `dtc` on this machine, beside a yardstick on the same broker.
//!
//! Workers and services are separate processes, running `dtc worker` and `dtc service`, so that the
//! cost of each can be measured; the producers run in this process. Everything is declared in a
//! temporary namespace, and deleted at the end.

mod backlog;
mod embedded;
mod load;
mod machine;
mod plot;
mod raw_echo;
mod report;
mod system;
mod times;
mod yardstick;

use std::{
    fs,
    io::{self, Write as _},
    path::PathBuf,
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use futures_util::FutureExt as _;
use indicatif::ProgressBar;
use serde_json::Value;
use tokio::time::Instant;
use tracing_subscriber::filter::LevelFilter;

use self::{
    load::Load,
    report::{Backlog, BenchReport, ByGroup, Conditions, Point, ProcessGroup, Yardstick, mib, ms},
    system::{BenchNamespace, BenchPlan, BenchProcess},
};
use crate::{
    cli::{
        Exit, Failure,
        broker::{self, ConfigArgument, UrlArgument, exit_of, flag},
        pipeline, progress, signals, tell,
    },
    embedded::Latencies,
    protocol::{message::Outcome, request_messages::REQUESTS_MAX},
    transport::amqp::{topology::PrepareQueueKind, traffic::Traffic},
};

/// One process can't produce more load than this.
const IN_FLIGHT_MAX: usize = 16_384;

/// The default of a worker's `max_in_flight`.
const IN_FLIGHT_DEFAULT: usize = 256;

/// How many echo RPCs are in flight.
const ECHO_IN_FLIGHT: usize = 256;

/// How long a load runs before it is measured.
const WARM_UP: Duration = Duration::from_secs(1);

/// How long to measure an echo RPC that is alone: its time varies little.
const ALONE_MAX: Duration = Duration::from_secs(2);

/// Measure throughput and latency, on RabbitMQ or in one process.
///
/// It first measures a yardstick with the same client library: echo RPCs per second through one
/// durable queue (a persistent request of 200 bytes, confirmed, and a consumer that replies), and
/// plain messages per second through one. It measures the same echo RPCs over a raw socket, without
/// a client library, unless the broker requires TLS. Then it measures transactions with two services that do
/// nothing, in a closed loop, at each of the given loads. It repeats both for several rounds, and
/// prints medians and spreads.
///
/// It starts workers and services as separate processes, in a temporary namespace that it deletes
/// at the end. It measures the CPU time of the broker if that runs on this machine and its process
/// may be read.
#[derive(Debug, Args)]
#[command(about = "Measure throughput and latency, on RabbitMQ or in one process")]
pub(super) struct BenchArguments {
    #[command(flatten)]
    config: ConfigArgument,
    #[command(flatten)]
    url: UrlArgument,
    /// Measure the embedded coordinator of one process instead, without a broker
    #[arg(long, conflicts_with_all = ["url", "workers", "commands", "backlog", "times"])]
    embedded: bool,
    /// Loads to measure: how many transactions the producers have in flight
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = in_flight)]
    #[arg(default_values_t = [1, 16, 64, 256, 1024])]
    in_flight: Vec<usize>,
    /// How many transactions the producers may put in a message: each load is measured with each number
    /// [default: 1,64]
    #[arg(long, value_name = "N,…", value_delimiter = ',', conflicts_with = "embedded")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=REQUESTS_MAX as u64))]
    batch_max: Vec<u64>,
    /// How long to measure each load in each round, in seconds, after a warm-up
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// How many rounds to measure
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: u64,
    /// How many worker processes to start
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    workers: u64,
    /// Size of the data of a transaction, in bytes
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(2..=200_000))]
    data_bytes: u64,
    /// Kind of the queues for prepares: auto, classic or quorum [default: auto]
    #[arg(long, value_name = "KIND")]
    commands: Option<String>,
    /// Also measure how fast a worker drains a backlog of so many requests, for each number, and
    /// its memory
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    backlog: Vec<u64>,
    /// Also measure how long a worker takes to start and to drain, and a takeover from a killed one
    #[arg(long)]
    times: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    /// Draw throughput and latency over load into this file, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

fn in_flight(text: &str) -> Result<usize, String> {
    let number = text.trim().parse().ok().filter(|number| (1..=IN_FLIGHT_MAX).contains(number));
    number.ok_or_else(|| format!("must be a whole number from 1 to {IN_FLIGHT_MAX}"))
}

pub(super) fn run(arguments: &BenchArguments) -> Result<Exit, Failure> {
    let level = progress::log_level(LevelFilter::ERROR);
    let level = level.map_err(|error| Failure::new(Exit::Usage, error))?;
    let plan = if arguments.embedded { None } else { Some(plan(arguments)?) };
    // Before anything runs, so that no measurement is made in vain.
    if let Some(path) = &arguments.plot {
        fs::write(path, "")
            .with_context(|| format!("failed to create `{}`", path.display()))
            .map_err(|error| Failure::new(Exit::Usage, error))?;
    }
    let (runtime, interrupt) = pipeline::runtime()?;
    let _logging = progress::log_above(&ProgressBar::hidden(), level);
    let _held = interrupt.subscribe();
    let stop = signals::first_signal(&interrupt);
    let measured = runtime.block_on(async {
        match plan {
            None => measure_embedded(arguments, stop).await,
            Some(plan) => measure_brokered(arguments, plan, stop).await,
        }
    })?;
    let Some(report) = measured else { return Ok(Exit::Interrupted) };
    if let Some(path) = &arguments.plot {
        fs::write(path, plot::svg(&report))
            .with_context(|| format!("failed to write `{}`", path.display()))
            .map_err(incomplete)?;
    }
    print(&if arguments.json { report.json() } else { report.to_string() })?;
    Ok(if report.is_whole() { Exit::Done } else { Exit::Incomplete })
}

fn plan(arguments: &BenchArguments) -> Result<BenchPlan, Failure> {
    let flags = [
        arguments.url.flag(),
        flag("topology.commands", "--commands", arguments.commands.as_ref()),
    ];
    let config = arguments.config.load(flags)?;
    Ok(BenchPlan {
        broker: broker::broker(&config, "dtc bench"),
        config: arguments.config.file().map(Into::into),
        url: arguments.url.secret().map(Into::into),
        settings: config.topology.settings,
    })
}

fn incomplete(error: impl Into<anyhow::Error>) -> Failure {
    Failure::new(Exit::Incomplete, error)
}

fn print(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => Ok(()),
        Err(error) => Err(incomplete(anyhow::Error::new(error).context("failed to print"))),
    }
}

impl BenchArguments {
    fn duration(&self) -> Duration {
        Duration::from_secs(self.seconds)
    }

    fn data(&self) -> usize {
        usize::try_from(self.data_bytes).unwrap_or(usize::MAX)
    }

    /// How many transactions may share a message; 0: there are no messages.
    fn batches(&self) -> Vec<usize> {
        match &*self.batch_max {
            _ if self.embedded => vec![0],
            [] => vec![1, REQUESTS_MAX],
            batches => batches.iter().map(|&it| usize::try_from(it).unwrap_or(1)).collect(),
        }
    }

    /// Each backlog, with each number of transactions in a message.
    fn backlogs(&self) -> Vec<Backlog> {
        let batches = self.batches();
        let backlog = |requests, batch_max| Backlog { requests, batch_max, ..Backlog::default() };
        let of = |&requests: &u64| batches.iter().map(move |&batch| backlog(requests, batch));
        self.backlog.iter().flat_map(of).collect()
    }

    /// Each load, with each number of transactions that may share a message.
    fn points(&self) -> Vec<Point> {
        let batches = self.batches();
        let combine = |&in_flight: &usize| batches.iter().map(move |&batch| (in_flight, batch));
        let mut points: Vec<_> = self.in_flight.iter().flat_map(combine).collect();
        points.sort_unstable();
        points.dedup();
        let point = |(in_flight, batch_max)| Point { in_flight, batch_max, ..Point::default() };
        points.into_iter().map(point).collect()
    }

    /// An empty report.
    fn report(&self) -> BenchReport {
        BenchReport {
            setting: Conditions {
                cores: machine::cores(),
                processor: machine::processor(),
                workers: self.workers,
                seconds: self.seconds,
                rounds: self.rounds,
                data_bytes: self.data(),
                ..Conditions::default()
            },
            load: self.points(),
            ..BenchReport::default()
        }
    }
}

/// `None`: a signal stopped it.
async fn measure_embedded(
    arguments: &BenchArguments,
    stop: impl Future<Output = ()>,
) -> Result<Option<BenchReport>, Failure> {
    let mut report = arguments.report();
    let measuring = async {
        for round in 1..=arguments.rounds {
            for point in &mut report.load {
                tell(&format!("round {round}: {} in flight\n", point.in_flight));
                embedded::measure(point, arguments.duration(), arguments.data()).await?;
            }
        }
        anyhow::Ok(())
    };
    let measured = tokio::select! {
        measured = measuring => Some(measured),
        () = stop => None,
    };
    measured.transpose().map_err(incomplete).map(|measured| measured.map(|()| report))
}

/// `None`: a signal stopped it.
async fn measure_brokered(
    arguments: &BenchArguments,
    plan: BenchPlan,
    stop: impl Future<Output = ()>,
) -> Result<Option<BenchReport>, Failure> {
    let host = plan.broker.address.first_host();
    let mut report = arguments.report();
    report.setting.broker = Some(plan.broker.address.to_string());
    report.setting.version = host.as_ref().and_then(|(host, port)| machine::version(host, *port));
    report.setting.prepare_queues = match plan.settings.commands {
        PrepareQueueKind::Classic => "classic",
        PrepareQueueKind::Quorum => "quorum",
    };
    let broker_pid = host.and_then(|(host, port)| machine::listener(&host, port));
    // An unreachable broker is reported as by every other command.
    let connection = plan.broker.connect("bench").await;
    let connection = connection.map_err(|error| Failure::new(exit_of(&error), error))?;
    crate::transport::amqp::connection::close(&connection).await;

    // One namespace for the loads, and one for each measurement that earlier traffic would slow
    // down.
    let count = arguments.backlogs().len() + 2;
    let (mut namespaces, stop) = (Vec::new(), stop.shared());
    let made = make(count, &plan, &mut namespaces, &stop).await;
    let measuring = async {
        made?;
        let [namespace, for_times, for_backlogs @ ..] = namespaces.as_slice() else {
            return Ok(());
        };
        let bench = Bench { arguments, namespace, for_times, for_backlogs, broker_pid };
        bench.measure(&mut report).await
    };
    let measured = tokio::select! {
        biased;
        () = stop.clone() => None,
        measured = measuring => Some(measured),
    };
    for namespace in namespaces {
        if let Err(error) = namespace.leave().await {
            tell(&format!("{error:#}\n"));
        }
    }
    measured.transpose().map_err(incomplete).map(|measured| measured.map(|()| report))
}

/// Creates so many namespaces, or fewer if `stop` ends first.
async fn make(
    count: usize,
    plan: &BenchPlan,
    namespaces: &mut Vec<BenchNamespace>,
    stop: &(impl Future<Output = ()> + Clone),
) -> anyhow::Result<()> {
    while namespaces.len() < count
        && let Some(namespace) = BenchNamespace::make(plan.clone(), stop.clone()).await?
    {
        namespaces.push(namespace);
    }
    Ok(())
}

/// All measurements on a broker.
struct Bench<'a> {
    arguments: &'a BenchArguments,
    namespace: &'a BenchNamespace,
    for_times: &'a BenchNamespace,
    for_backlogs: &'a [BenchNamespace],
    broker_pid: Option<u32>,
}

impl Bench<'_> {
    async fn measure(&self, report: &mut BenchReport) -> anyhow::Result<()> {
        let mut yardstick = Yardstick { echo_in_flight: ECHO_IN_FLIGHT, ..Yardstick::default() };
        for round in 1..=self.arguments.rounds {
            tell(&format!("round {round}: the yardstick\n"));
            let echo = self.yardstick(&mut yardstick).await?;
            for point in &mut report.load {
                let Point { in_flight, batch_max, .. } = *point;
                tell(&format!("round {round}: {in_flight} in flight, {batch_max} in a message\n"));
                self.load(point, echo).await?;
            }
        }
        report.yardstick = Some(yardstick);
        let data = self.arguments.data();
        if self.arguments.times {
            tell("times\n");
            report.times = Some(times::measure(self.for_times, data).await?);
        }
        let echo = report.yardstick.as_ref().and_then(|it| it.echo.median());
        for (backlog, namespace) in self.arguments.backlogs().into_iter().zip(self.for_backlogs) {
            let Backlog { requests, batch_max, .. } = backlog;
            tell(&format!("a backlog of {requests}, {batch_max} in a message\n"));
            let duration = self.arguments.duration();
            let draining = backlog::measure(namespace, backlog, IN_FLIGHT_DEFAULT, data, duration);
            let mut drained = draining.await?;
            drained.per_echo =
                drained.per_second.median().zip(echo).map(|(rate, echo)| rate / echo);
            report.backlog.push(drained);
        }
        Ok(())
    }

    /// Measures the yardstick for one round.
    async fn yardstick(&self, yardstick: &mut Yardstick) -> anyhow::Result<EchoRates> {
        let (namespace, duration) = (self.namespace, self.arguments.duration());
        let before = self.cpu(&[], &[]);
        let echoed = yardstick::echo(namespace, ECHO_IN_FLIGHT, duration).await?;
        yardstick.echo.add(echoed.per_second);
        self.add_cpu_of_echoes(&mut yardstick.cpu, &before, echoed.all);
        let before = self.cpu(&[], &[]);
        let raw = raw_echo::echo(namespace, ECHO_IN_FLIGHT, duration).await?;
        if let Some(raw) = &raw {
            yardstick.raw_echo.add(raw.per_second);
            self.add_cpu_of_echoes(&mut yardstick.raw_cpu, &before, raw.all);
        }
        let alone = yardstick::echo(namespace, 1, duration.min(ALONE_MAX)).await?;
        yardstick.echo_alone.add(ms(alone.latencies.percentile(50.0)));
        yardstick.raw.add(yardstick::raw(namespace, duration).await?);
        for (kind, hop) in &mut yardstick.hops {
            let latencies = yardstick::hop(namespace, *kind, duration.min(ALONE_MAX)).await?;
            hop.add(ms(latencies.percentile(50.0)));
        }
        Ok(EchoRates { library: echoed.per_second, raw: raw.map(|it| it.per_second) })
    }

    /// Adds the CPU time of each of so many echo RPCs, in microseconds.
    fn add_cpu_of_echoes(&self, cpu: &mut ByGroup, before: &Cpu, count: u64) {
        for (who, used) in used_since(before, &self.cpu(&[], &[])) {
            cpu.add(who, used.map(|it| it.as_secs_f64() * 1e6 / count as f64));
        }
    }

    /// Measures one load for one round.
    async fn load(&self, point: &mut Point, echo: EchoRates) -> anyhow::Result<()> {
        let namespace = self.namespace;
        let services = namespace.services().await?;
        let mut workers = Vec::new();
        for _ in 0..self.arguments.workers {
            workers.push(namespace.worker(point.in_flight.max(IN_FLIGHT_DEFAULT)).await?);
        }
        let traffic = Traffic::so_far();
        let data = self.arguments.data();
        let mut load = {
            let (broker, names) = (namespace.broker(), &namespace.names);
            Load::start(broker, names, point.in_flight, point.batch_max, data)
        };
        let window = tokio::select! {
            window = self.window(&workers, &services) => window,
            error = load.failed() => return Err(error),
        };
        let samples = load.stop().await?;
        let traffic = Traffic::so_far().published - traffic.published;

        let mut latencies = Latencies::new();
        let is_in = |at: Instant| at >= window.begins_at && at < window.ends_at;
        let counted = samples.iter().filter(|it| is_in(it.ended));
        let counted = counted.inspect(|it| latencies.record(it.ended - it.began)).count() as f64;
        let per_second = counted / (window.ends_at - window.begins_at).as_secs_f64();
        point.per_second.add(per_second);
        point.per_echo.add(per_second / echo.library);
        point.per_raw_echo.add_known(echo.raw.map(|raw| per_second / raw));
        point.p50.add(ms(latencies.percentile(50.0)));
        point.p99.add(ms(latencies.percentile(99.0)));
        point.aborted += samples.iter().filter(|it| it.outcome == Outcome::Aborted).count() as u64;
        for (who, cpu) in window.cpu {
            point.cpu.add(who, cpu.map(|it| it.as_secs_f64() * 1e6 / counted));
        }
        for (who, bytes) in window.resident {
            point.resident.add(who, bytes.map(mib));
        }
        // The number of sent messages is known only for all transactions together.
        let all = samples.len() as f64;
        let by_workers = stop(workers).await?;
        let by_services = stop(services).await?;
        for (who, messages) in [
            (ProcessGroup::Workers, by_workers),
            (ProcessGroup::Services, by_services),
            (ProcessGroup::Producers, traffic),
        ] {
            point.published.add(who, Some(messages as f64 / all));
        }
        point.messages.add((by_workers + by_services + traffic) as f64 / all);
        Ok(())
    }

    /// Waits for the end of the warm-up, and then as long as is measured.
    async fn window(&self, workers: &[BenchProcess], services: &[BenchProcess]) -> Window {
        tokio::time::sleep(WARM_UP).await;
        let (begins_at, before) = (Instant::now(), self.cpu(workers, services));
        tokio::time::sleep(self.arguments.duration()).await;
        let (ends_at, after) = (Instant::now(), self.cpu(workers, services));
        let resident = self.each(workers, services, machine::resident);
        Window { begins_at, ends_at, cpu: used_since(&before, &after), resident }
    }

    fn cpu(&self, workers: &[BenchProcess], services: &[BenchProcess]) -> Cpu {
        self.each(workers, services, machine::cpu)
    }

    /// A value for each group of processes, if it is known for all of them.
    fn each<T: std::iter::Sum<T>>(
        &self,
        workers: &[BenchProcess],
        services: &[BenchProcess],
        of: impl Fn(u32) -> Option<T>,
    ) -> Vec<(ProcessGroup, Option<T>)> {
        let all = |processes: &[BenchProcess]| processes.iter().map(|it| of(it.pid)).sum();
        vec![
            (ProcessGroup::Broker, self.broker_pid.and_then(&of)),
            (ProcessGroup::Workers, all(workers)),
            (ProcessGroup::Services, all(services)),
            (ProcessGroup::Producers, of(std::process::id())),
        ]
    }
}

/// Echo RPCs per second of one round.
#[derive(Clone, Copy, Debug)]
struct EchoRates {
    library: f64,
    /// `None`: not measured.
    raw: Option<f64>,
}

type Cpu = Vec<(ProcessGroup, Option<Duration>)>;

fn used_since(before: &Cpu, after: &Cpu) -> Cpu {
    let used = before.iter().zip(after).map(|((who, before), (_, after))| {
        (*who, after.zip(*before).map(|(after, before)| after.saturating_sub(before)))
    });
    used.collect()
}

/// The time in which transactions are counted.
struct Window {
    begins_at: Instant,
    ends_at: Instant,
    cpu: Cpu,
    resident: Vec<(ProcessGroup, Option<u64>)>,
}

/// Stops the processes, and returns how many messages they have published.
async fn stop(processes: Vec<BenchProcess>) -> anyhow::Result<u64> {
    let mut published = 0;
    for process in processes {
        let report = process.stop().await?;
        published += report.get("published").and_then(Value::as_u64).unwrap_or_default();
    }
    Ok(published)
}
