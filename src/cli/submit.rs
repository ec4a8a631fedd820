//! `dtc submit`: transactions to the workers of a system on RabbitMQ.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use indicatif::ProgressBar;
use tokio::sync::mpsc;
use tracing_subscriber::filter::LevelFilter;

use crate::{
    cli::{
        Exit, Failure,
        broker::{BrokerArguments, exit_of},
        duration,
        input::{bad_data, name, open},
        output::{self, Detail, Form},
        progress,
        stages::{self, Ran, Stages, Stop},
    },
    client::{Client, ListenError, Settings, SubmitError, WaitError},
    embedded::{Concluded, Report},
    protocol::{ids::TransactionKey, time::Time},
    transport::amqp::pool::PublishError,
    wire::transactions::{TransactionSpec, Transactions},
    worker::clock::Clock,
};

/// How many requests may be without a confirm, or without a result where that is waited for.
const UNCONFIRMED_MAX: usize = 1000;
const UNANSWERED_MAX: usize = 4000;

/// How many of those that failed are named.
const NAMED_MAX: usize = 10;

/// The last second of the year 9999.
const SECONDS_MAX: u64 = 253_402_300_799;

/// What is said when the first signal is heard.
const HEARD: &str = "interrupted: what was sent is waited for; once more to stop at once\n";

/// Submit transactions to the workers, through RabbitMQ.
///
/// FILE: [{"id","involved_services","data","timeout_ms"?}], checked whole before anything is sent;
/// or the same objects one a line (NDJSON), checked and sent as they come. - for stdin.
///
/// A transaction is its id and the second it was requested at. With --requested-at the same file
/// submitted again means the same transactions, and gives the same answers. Without, it is only from
/// the workers' memory of the last minutes that a transaction with the same id and content is
/// answered as the one before.
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
    /// How long a transaction may take until it is confirmed, or with --wait answered
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration::parse)]
    timeout: Duration,
    /// How to print the results [default: json; ndjson if the transactions are NDJSON]
    #[arg(long, value_name = "FORM", value_enum, requires = "wait")]
    output: Option<Form>,
    /// Print reason, unresolved services, moments and duration of each transaction
    #[arg(long, requires = "wait")]
    detail: bool,
    /// When the transactions were first requested, in seconds since 1970 [default: now]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=SECONDS_MAX))]
    requested_at: Option<u64>,
    #[command(flatten)]
    broker: BrokerArguments,
}

pub(super) fn run(arguments: &SubmitArguments) -> Result<Exit, Failure> {
    let log_level = progress::log_level(LevelFilter::ERROR)
        .map_err(|error| Failure::new(Exit::Usage, error))?;
    let broker = arguments.broker.broker("dtc submit")?;
    let (runtime, interrupt) = stages::runtime()?;
    let source = open(&arguments.transactions)?;
    let transactions =
        Transactions::open(&name(&arguments.transactions), source).map_err(bad_data)?;
    let settings = Settings { in_flight_max: UNANSWERED_MAX, ..Settings::default() };
    let client = {
        let _entered = runtime.enter();
        Client::with(broker, arguments.broker.names(), settings)
    };
    check_sizes(&client, &transactions)?;

    let bar = progress::bar(stages::total(&transactions));
    progress::log_above(&bar, log_level);
    runtime.block_on(client.open()).map_err(no_connection)?;
    let printing = arguments.wait.then(|| {
        let form = arguments.output.unwrap_or_else(|| Form::like(&transactions));
        (form, if arguments.detail { Detail::Times } else { Detail::Brief })
    });
    let sender = Sender {
        client: client.clone(),
        waits: arguments.wait,
        timeout: arguments.timeout,
        requested_at: arguments.requested_at.map(|seconds| Time::from_millis(seconds * 1000)),
        clock: Clock::start(),
        bar: bar.clone(),
    };
    let stages = Stages { bar: &bar, runtime: &runtime, interrupt: &interrupt, heard: HEARD };
    let ran = stages.run(transactions, printing, |requests, concluded, stop| {
        sender.serve(requests, concluded, stop)
    });
    runtime.block_on(client.close());
    bar.finish_and_clear();
    let Ran { done: sent, ended } = ran;
    super::tell(&sent.summary(arguments.wait));
    if let Some(failure) = sent.fatal {
        return Err(failure);
    }
    let exit = ended.exit()?;
    Ok(if exit == Exit::Done && sent.n_failed > 0 { Exit::Incomplete } else { exit })
}

/// What is checked as a whole is sent as a whole: nothing in it may be too large for a message.
fn check_sizes<R>(client: &Client, transactions: &Transactions<R>) -> Result<(), Failure> {
    let Transactions::Array(specs) = transactions else { return Ok(()) };
    let checked = specs.iter().try_for_each(|spec| client.check(spec));
    checked.map_err(|error| Failure::new(Exit::BadData, error))
}

fn no_connection(error: PublishError) -> Failure {
    let exit = match &error {
        PublishError::Connect(error) => exit_of(error),
        PublishError::Open(_)
        | PublishError::Unconfirmed(_)
        | PublishError::Refused
        | PublishError::Unroutable { .. }
        | PublishError::Closed => Exit::Unavailable,
    };
    Failure::new(exit, error)
}

/// What sends transactions, and waits until they are confirmed or answered.
struct Sender {
    client: Client,
    waits: bool,
    timeout: Duration,
    requested_at: Option<Time>,
    clock: Clock,
    bar: ProgressBar,
}

/// What became of a transaction: a result where it was waited for.
type Sending = BoxFuture<'static, (TransactionKey, Result<Option<Concluded>, WaitError>)>;

/// What became of all.
struct Sent {
    /// How many were taken in.
    n_begun: u64,
    n_ended: u64,
    report: Report,
    failed: Vec<TransactionKey>,
    n_failed: u64,
    /// Why no more was sent.
    fatal: Option<Failure>,
}

impl Sender {
    /// Sends what comes until there is no more, or `stop` is over, or there is no use in it.
    async fn serve(
        self,
        mut requests: mpsc::Receiver<Vec<TransactionSpec>>,
        concluded: mpsc::Sender<Vec<Concluded>>,
        mut stop: Stop,
    ) -> Sent {
        let in_flight_max = if self.waits { UNANSWERED_MAX } else { UNCONFIRMED_MAX };
        let mut sent = Sent::new();
        let mut in_flight: FuturesUnordered<Sending> = FuturesUnordered::new();
        let mut backlog = Vec::new().into_iter();
        let mut open = true;
        let mut stopped = false;
        let began_at = self.clock.read().elapsed;
        loop {
            while in_flight.len() < in_flight_max
                && let Some(spec) = backlog.next()
            {
                sent.n_begun += 1;
                in_flight.push(self.send(spec));
            }
            if !open && backlog.len() == 0 && in_flight.is_empty() {
                break;
            }
            tokio::select! {
                biased;
                () = &mut stop, if !stopped => {
                    stopped = true;
                    open = false;
                    backlog = Vec::new().into_iter();
                    requests.close();
                }
                Some(ended) = in_flight.next() => {
                    let mut results = sent.take(ended);
                    while let Some(Some(ended)) = in_flight.next().now_or_never() {
                        results.extend(sent.take(ended));
                    }
                    sent.report.took = self.clock.read().elapsed.saturating_sub(began_at);
                    if !self.waits {
                        self.bar.set_position(sent.n_ended);
                    }
                    if sent.fatal.is_some() {
                        break;
                    }
                    // Where nobody wants the results any more, nobody waits for them.
                    if !results.is_empty() && concluded.send(results).await.is_err() {
                        break;
                    }
                }
                batch = requests.recv(), if open && backlog.len() == 0 => match batch {
                    Some(batch) => backlog = batch.into_iter(),
                    None => open = false,
                },
            }
        }
        sent
    }

    fn send(&self, spec: TransactionSpec) -> Sending {
        let Self { client, waits, timeout, requested_at, clock, .. } = self;
        let (client, waits, timeout, clock) = (client.clone(), *waits, *timeout, *clock);
        let requested_at = requested_at.unwrap_or_else(|| client.now());
        Box::pin(async move {
            let began_at = clock.read().elapsed;
            let key = TransactionKey { id: spec.id.clone(), requested_at };
            let ended = if waits {
                let answered = client.hand_over_and_wait(&spec, requested_at, timeout).await;
                answered.map(|answer| {
                    let took = clock.read().elapsed.saturating_sub(began_at);
                    Some(Concluded { answer, attempts: Default::default(), took })
                })
            } else {
                let submitted = client.hand_over(&spec, requested_at, timeout).await;
                submitted.map(|_| None).map_err(WaitError::from)
            };
            (key, ended)
        })
    }
}

impl Sent {
    fn new() -> Self {
        let (report, failed) = (Report::new(), Vec::new());
        Self { n_begun: 0, n_ended: 0, report, failed, n_failed: 0, fatal: None }
    }

    /// Takes in what became of one; its result, if it has one.
    fn take(
        &mut self,
        (key, ended): (TransactionKey, Result<Option<Concluded>, WaitError>),
    ) -> Vec<Concluded> {
        match ended {
            Ok(concluded) => {
                self.n_ended += 1;
                concluded.iter().for_each(|concluded| self.report.count(concluded));
                return concluded.into_iter().collect();
            }
            Err(
                WaitError::Unanswered { .. } | WaitError::Submit(SubmitError::Unconfirmed { .. }),
            ) => {}
            Err(error) => {
                if self.fatal.is_none() {
                    self.fatal = Some(Failure::new(exit_for(&error), error));
                }
            }
        }
        self.n_failed += 1;
        if self.failed.len() < NAMED_MAX {
            self.failed.push(key);
        }
        Vec::new()
    }

    fn summary(&self, waited: bool) -> String {
        let mut text = if waited {
            output::totals(&self.report)
        } else {
            format!("{} submitted\n", self.n_ended)
        };
        let missing = self.n_begun - self.n_ended;
        if missing > 0 {
            let what = if waited { "answered" } else { "confirmed" };
            let named: Vec<_> = self.failed.iter().map(shown).collect();
            let more = if missing > named.len() as u64 { ", …" } else { "" };
            let named = named.join(", ");
            text += &format!("{missing} of {} not {what}: {named}{more}\n", self.n_begun);
        }
        text
    }
}

fn shown(TransactionKey { id, requested_at }: &TransactionKey) -> String {
    format!("{id} (--requested-at {})", requested_at.as_millis() / 1000)
}

/// How to end where going on is of no use.
fn exit_for(error: &WaitError) -> Exit {
    match error {
        WaitError::Submit(SubmitError::Invalid(_)) => Exit::BadData,
        WaitError::Submit(SubmitError::NoTopology { .. })
        | WaitError::Listen(ListenError::NoTopology { .. }) => Exit::BadConfiguration,
        WaitError::Submit(SubmitError::Refused { .. })
        | WaitError::Listen(
            ListenError::Connect(_) | ListenError::Queue { .. } | ListenError::Closed,
        ) => Exit::Refused,
        WaitError::Submit(SubmitError::Unconfirmed { .. }) | WaitError::Unanswered { .. } => {
            Exit::Incomplete
        }
    }
}
