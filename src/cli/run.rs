//! `dtc run`: transactions over simulated services, in this process.

use std::{
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use clap::Args;
use tracing_subscriber::filter::LevelFilter;

use crate::{
    cli::{
        Exit, Failure,
        broker::OptionalBroker,
        input::{InputReader, bad_data, is_stdin, name, open},
        output::{self, ResultDetail, ResultForm},
        pipeline::{self, Pipeline, RunOutput},
        progress,
        report_file::ReportFile,
        run_on_broker::{self, RunPlan},
    },
    clock::Clock,
    config::duration,
    embedded::{Embedded, Report},
    input::{
        services::{self, ServiceSpec},
        transactions::Transactions,
    },
    journal::{
        faults,
        file::{self, JournalError, JournalOptions, OpenedJournal},
    },
    json::check::DAY_MS,
    participant::Service,
    simulated::{service::Simulated, store::SimulatedStore},
    transport::amqp::connection::Broker,
};

/// The message at the first signal.
const INTERRUPTED: &str = "interrupted: what has begun is finished; once more to stop at once\n";

/// Run transactions across simulated services in this process, without a broker.
///
/// With --broker the messages go through RabbitMQ; worker, services and producer stay in this
/// process.
///
/// With --journal and --state a run survives its process. When it is started again with the same
/// two, after any end, kill -9 included, it finishes every decided transaction, even one that is
/// not in --transactions any more. For a finished transaction it prints the result again and calls
/// no service. It acts on a decision only once that is synced to the disk. The state of the
/// services survives the process, but not a power cut: nothing in --state is synced.
///
/// services.json: [{"name","max_concurrency","max_wait_ms"?,"cap"?,"prepare"?,"commit"?,"abort"?}];
/// the last three are objects of "latency_ms" (a number, or two: from, to), "refuse_rate",
/// "error_rate", "panic_rate", "hang_rate" (0 to 1), "fail_first" (how many attempts of each
/// transaction fail), "fail_for" (ids that always fail) and "read_only".
///
/// transactions.json: [{"id","involved_services","data","timeout_ms"?,"answer"?}], checked as a whole
/// before any transaction starts; or the same objects, one per line (NDJSON), checked and run as
/// they arrive.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
#[command(about = "Run transactions across simulated services in this process")]
pub(super) struct RunArguments {
    /// The services: a file, or - for stdin
    #[arg(long, value_name = "FILE")]
    services: PathBuf,
    /// The transactions: a file, or - for stdin
    #[arg(long, value_name = "FILE")]
    transactions: PathBuf,
    /// How to print the results [default: json; ndjson if the transactions are NDJSON]
    #[arg(long, value_name = "FORM", value_enum)]
    output: Option<ResultForm>,
    /// Also print the reason, unresolved services, calls and duration of each transaction
    #[arg(long)]
    detail: bool,
    /// How many transactions to work on at once, not counting those that wait for a slot
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = at_least_one)]
    #[arg(allow_negative_numbers = true)]
    max_in_flight: usize,
    /// How long the prepares of a transaction without timeout_ms may take, in milliseconds
    #[arg(long, value_name = "N", default_value_t = 5000, value_parser = within_a_day)]
    #[arg(allow_negative_numbers = true)]
    timeout_ms: u64,
    /// Seed of the simulated services: the same seed gives the same refusals and failures
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = any_number)]
    #[arg(allow_negative_numbers = true)]
    seed: u64,
    /// Write the summary to this file, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Keep the journal in this file; it is created if it does not exist, and one process at a time
    /// can open it
    #[arg(long, value_name = "FILE", requires = "state", conflicts_with = "url")]
    journal: Option<PathBuf>,
    /// Keep the state of the services in this directory, as `dtc service` does; --journal and
    /// --state need each other
    #[arg(long, value_name = "DIR", requires = "journal")]
    state: Option<PathBuf>,
    /// How long the journal keeps the outcome of a transaction; after that its id can be used again
    #[arg(long, value_name = "DURATION", default_value = "7d", value_parser = duration::parse)]
    #[arg(requires = "journal")]
    retention: Duration,
    #[command(flatten)]
    broker: OptionalBroker,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| *number >= 1);
    number.ok_or_else(|| format!("must be a whole number from 1 to {}", usize::MAX))
}

fn within_a_day(text: &str) -> Result<u64, String> {
    let number = text.parse().ok().filter(|number| (1..=u64::from(DAY_MS)).contains(number));
    number.ok_or_else(|| format!("must be a whole number from 1 to {DAY_MS}"))
}

fn any_number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("must be a whole number from 0 to {}", u64::MAX))
}

pub(super) fn run(arguments: &RunArguments) -> Result<Exit, Failure> {
    let log_level = progress::log_level(LevelFilter::ERROR)
        .map_err(|error| Failure::new(Exit::Usage, error))?;
    let broker = arguments.broker.broker("dtc run")?;
    let (runtime, interrupt) = pipeline::runtime()?;
    let (services, transactions) = read_input(arguments)?;
    let report_file = ReportFile::create(arguments.report.as_deref())?;

    let bar = progress::bar(pipeline::total(&transactions));
    let _logging = progress::log_above(&bar, log_level);
    let form = arguments.output.unwrap_or_else(|| ResultForm::like(&transactions));
    let pipeline =
        Pipeline { bar: &bar, runtime: &runtime, interrupt: &interrupt, interrupted: INTERRUPTED };
    let ran = match broker {
        None => run_embedded(arguments, services, transactions, form, &pipeline),
        Some(broker) => run_on_broker(arguments, broker, services, transactions, form, &pipeline),
    };
    bar.finish_and_clear();
    let RunOutput { done: report, ended } = ran?;

    report_file.write(&output::report_json(&report))?;
    super::tell(&output::summary(&report));
    ended.exit()
}

// ---- Input -----------------------------------------------------------------------------------

/// Reads both files, and reports the errors of both at once.
fn read_input(
    arguments: &RunArguments,
) -> Result<(Vec<ServiceSpec>, Transactions<InputReader>), Failure> {
    if is_stdin(&arguments.services) && is_stdin(&arguments.transactions) {
        let error = anyhow!("--services and --transactions can't both be stdin");
        return Err(Failure::new(Exit::Usage, error));
    }
    let mut text = Vec::new();
    let services = open(&arguments.services).and_then(|mut source| {
        let read = source.read_to_end(&mut text);
        read.with_context(|| format!("failed to read `{}`", arguments.services.display()))
            .map_err(|error| Failure::new(Exit::BadData, error))
    });
    let services =
        services.and_then(|_| services::read(&name(&arguments.services), &text).map_err(bad_data));
    let transactions = open(&arguments.transactions).and_then(|source| {
        Transactions::open(&name(&arguments.transactions), source).map_err(bad_data)
    });
    match (services, transactions) {
        (Ok(services), Ok(transactions)) => Ok((services, transactions)),
        (Err(failure), Ok(_)) | (Ok(_), Err(failure)) => Err(failure),
        (Err(first), Err(second)) => Err(Failure::new(Exit::BadData, anyhow!("{first}\n{second}"))),
    }
}

// ---- The run ---------------------------------------------------------------------------------

fn run_embedded(
    arguments: &RunArguments,
    services: Vec<ServiceSpec>,
    transactions: Transactions<InputReader>,
    form: ResultForm,
    pipeline: &Pipeline<'_>,
) -> Result<RunOutput<Report>, Failure> {
    let opened =
        arguments.journal.as_deref().map(|path| open_journal(path, arguments)).transpose()?;
    let mut simulated = Vec::with_capacity(services.len());
    for spec in services {
        let participant = Simulated::new(&spec, arguments.seed);
        let (name, max_concurrency) = (spec.name.as_str(), spec.max_concurrency);
        let service = match (&arguments.state, &opened) {
            (Some(directory), Some(opened)) => {
                let store = SimulatedStore::open(directory, &spec.name, &opened.instance)
                    .map_err(|error| Failure::new(Exit::BadConfiguration, error))?;
                Service::from_durable(name, max_concurrency, participant.with_store(store))
            }
            (Some(_) | None, _) => Service::from_participant(name, max_concurrency, participant),
        };
        simulated.push(service.max_wait(spec.max_wait));
    }
    let mut embedded = Embedded::new(simulated)
        .map_err(|error| Failure::new(Exit::BadData, error))?
        .max_in_flight(arguments.max_in_flight)
        .prepare_timeout(Duration::from_millis(arguments.timeout_ms));
    if let Some(opened) = opened {
        embedded = embedded.with_journal(opened);
    }
    if arguments.detail {
        embedded = embedded.counting_attempts();
    }
    let printing = Some((form, detail(arguments)));
    let RunOutput { done, ended } =
        pipeline.run(transactions, printing, |requests, concluded, stop| {
            embedded.serve(requests, concluded, stop)
        });
    done.map(|done| RunOutput { done, ended }).map_err(unusable)
}

/// Opens the journal, and prints what it has found there that an operator should know.
fn open_journal(path: &Path, arguments: &RunArguments) -> Result<OpenedJournal, Failure> {
    faults::arm();
    let options = JournalOptions { now: Clock::start().now(), retention: arguments.retention };
    let opened = file::open(path, &options).map_err(unusable)?;
    let name = path.display();
    if opened.n_torn > 0 {
        let n_torn = opened.n_torn;
        super::tell(&format!("{name}: truncated a torn tail of {n_torn} bytes\n"));
    }
    let decided = opened.unfinished.iter().filter(|it| it.decision.is_some()).count();
    if !opened.unfinished.is_empty() {
        let undecided = opened.unfinished.len() - decided;
        super::tell(&format!("{name}: to be finished: {decided} decided, {undecided} undecided\n"));
    }
    Ok(opened)
}

/// The failure for a journal that can't be used.
fn unusable(error: JournalError) -> Failure {
    let exit = match &error {
        JournalError::NoJournal { .. }
        | JournalError::Newer { .. }
        | JournalError::Corrupt { .. } => Exit::BadData,
        JournalError::Open { .. } | JournalError::NoFile { .. } | JournalError::InUse { .. } => {
            Exit::BadConfiguration
        }
        JournalError::Read { .. }
        | JournalError::Write { .. }
        | JournalError::Sync { .. }
        | JournalError::Thread { .. } => Exit::Incomplete,
    };
    Failure::new(exit, error)
}

fn run_on_broker(
    arguments: &RunArguments,
    broker: Broker,
    services: Vec<ServiceSpec>,
    transactions: Transactions<InputReader>,
    form: ResultForm,
    pipeline: &Pipeline<'_>,
) -> Result<RunOutput<Report>, Failure> {
    let plan = RunPlan {
        broker,
        names: arguments.broker.names(),
        services,
        services_file: arguments.services.clone(),
        seed: arguments.seed,
        max_in_flight: arguments.max_in_flight,
        prepare_timeout: Duration::from_millis(arguments.timeout_ms),
        counts_attempts: arguments.detail,
    };
    run_on_broker::run(plan, transactions, (form, detail(arguments)), pipeline)
}

fn detail(arguments: &RunArguments) -> ResultDetail {
    if arguments.detail { ResultDetail::Calls } else { ResultDetail::Brief }
}
