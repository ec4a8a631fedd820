//! `dtc submit`: sends transactions to the workers of a system on RabbitMQ.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use tracing_subscriber::filter::LevelFilter;

use crate::{
    cli::{
        Exit, Failure,
        broker::{self, BrokerArguments, exit_of},
        input::{bad_data, name, open},
        output::{ResultDetail, ResultForm},
        pipeline::{self, Pipeline, RunEnd, RunOutput},
        progress,
        sender::{Sender, check_sizes},
    },
    client::{Client, Settings},
    clock::Clock,
    config::duration,
    input::transactions::Transactions,
    protocol::time::Time,
    transport::amqp::pool::PublishError,
};

/// How many requests may be without a confirm or, with `--wait`, without a result.
const UNCONFIRMED_MAX: usize = 1000;
const UNANSWERED_MAX: usize = 4000;

/// The last second of the year 9999.
const SECONDS_MAX: u64 = 253_402_300_799;

/// The message at the first signal.
const INTERRUPTED: &str = "interrupted: what was sent is waited for; once more to stop at once\n";

/// Submit transactions to the workers, through RabbitMQ.
///
/// FILE: [{"id","involved_services","data","timeout_ms"?,"answer"?}], checked as a whole before any
/// request is sent; or the same objects, one per line (NDJSON), checked and sent as they arrive. -
/// for stdin. With "answer":"decided", the result of a commit comes when it is decided, not when
/// every service has applied it.
///
/// An id and the second of the request together identify a transaction. With the same
/// --requested-at, a file that is submitted again names the same transactions and gets the same
/// results. Without it, a repeated id with the same content gets the earlier result only while the
/// workers remember that (15 minutes by default).
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
#[command(about = "Submit transactions to the workers, through RabbitMQ")]
pub(super) struct SubmitArguments {
    /// The transactions: a file, or - for stdin
    #[arg(value_name = "FILE")]
    transactions: PathBuf,
    /// Wait for the results, and print them
    #[arg(long)]
    wait: bool,
    /// How long to wait for a transaction to be confirmed by the broker or, with --wait, for its
    /// result
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration::parse)]
    timeout: Duration,
    /// How to print the results [default: json; ndjson if the transactions are NDJSON]
    #[arg(long, value_name = "FORM", value_enum, requires = "wait")]
    output: Option<ResultForm>,
    /// Also print the reason, unresolved services, times and duration of each transaction
    #[arg(long, requires = "wait")]
    detail: bool,
    /// When the transactions were first requested, in seconds since 1970 (`date +%s`) [default:
    /// now]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    requested_at: Option<u64>,
    #[command(flatten)]
    broker: BrokerArguments,
}

fn seconds(text: &str) -> Result<u64, String> {
    let seconds = text.parse().ok().filter(|seconds| *seconds <= SECONDS_MAX);
    seconds.ok_or_else(|| {
        format!(
            "must be a whole number of seconds since 1970, up to {SECONDS_MAX}, as `date +%s` tells"
        )
    })
}

pub(super) fn run(arguments: &SubmitArguments) -> Result<Exit, Failure> {
    let log_level = progress::log_level(LevelFilter::ERROR)
        .map_err(|error| Failure::new(Exit::Usage, error))?;
    let config = arguments.broker.load([])?;
    let (broker, names) = (broker::broker(&config, "dtc submit"), broker::names(&config));
    let (runtime, interrupt) = pipeline::runtime()?;
    let source = open(&arguments.transactions)?;
    let transactions =
        Transactions::open(&name(&arguments.transactions), source).map_err(bad_data)?;
    let settings = Settings { in_flight_max: UNANSWERED_MAX, ..Settings::default() };
    let client = {
        let _entered = runtime.enter();
        Client::with(broker, names, settings)
    };
    check_sizes(&client, &transactions)?;

    let bar = progress::bar(pipeline::total(&transactions));
    let _logging = progress::log_above(&bar, log_level);
    runtime.block_on(client.open()).map_err(no_connection)?;
    let printing = arguments.wait.then(|| {
        let form = arguments.output.unwrap_or_else(|| ResultForm::like(&transactions));
        (form, if arguments.detail { ResultDetail::Times } else { ResultDetail::Brief })
    });
    let sender = Sender {
        client: client.clone(),
        waits: arguments.wait,
        in_flight_max: if arguments.wait { UNANSWERED_MAX } else { UNCONFIRMED_MAX },
        timeout: arguments.timeout,
        requested_at: arguments.requested_at.map(|seconds| Time::from_millis(seconds * 1000)),
        clock: Clock::start(),
        bar: bar.clone(),
        attempts: None,
        drain: None,
    };
    let pipeline =
        Pipeline { bar: &bar, runtime: &runtime, interrupt: &interrupt, interrupted: INTERRUPTED };
    let ran = pipeline.run(transactions, printing, |requests, concluded, stop| {
        sender.serve(requests, concluded, stop)
    });
    runtime.block_on(client.close());
    bar.finish_and_clear();
    let RunOutput { done: sent, ended } = ran;
    super::tell(&sent.summary(arguments.wait));
    if let Some(failure) = sent.fatal {
        return Err(failure);
    }
    RunEnd { is_incomplete: sent.n_failed > 0, ..ended }.exit()
}

pub(super) fn no_connection(error: PublishError) -> Failure {
    let exit = match &error {
        PublishError::Connect(error) => exit_of(error),
        PublishError::Open(_)
        | PublishError::Unconfirmed(_)
        | PublishError::Refused
        | PublishError::Silent
        | PublishError::Unroutable { .. }
        | PublishError::Blocked { .. }
        | PublishError::Closed => Exit::Unavailable,
    };
    Failure::new(exit, error)
}
