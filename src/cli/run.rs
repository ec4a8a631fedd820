//! `dtc run`: transactions over simulated services, in this process.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    io::{self, BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use clap::Args;
use indicatif::ProgressBar;
use tokio::{
    runtime::Runtime,
    sync::{mpsc, watch},
};
use tracing_subscriber::filter::LevelFilter;

use crate::{
    cli::{
        Exit, Failure,
        output::{self, Form, Printer},
        progress, signals,
    },
    embedded::{Concluded, Embedded, Report},
    participant::{Service, simulated::Simulated},
    protocol::ids::TransactionId,
    wire::{
        complaint::Complaints,
        services::{self, ServiceSpec},
        transactions::{Lines, TransactionSpec, Transactions},
    },
};

/// How many transactions travel from thread to thread in one piece, at most.
const BATCH_MAX: usize = 512;

/// How many transactions of a stream may be in flight, or wait for those before them, when results
/// are printed in order.
const AHEAD_MAX: usize = 1_000_000;

/// What is said when the first signal is heard.
const HEARD: &str = "interrupted: what has begun is finished; once more to stop at once\n";

/// Run transactions across simulated services in this process; nothing else is needed.
///
/// services.json: [{"name","max_concurrency","max_wait_ms"?,"cap"?,"prepare"?,"commit"?,"abort"?}];
/// the last three are objects of "latency_ms" (a number, or two: from, to), "refuse_rate",
/// "error_rate", "panic_rate", "hang_rate" (0 to 1), "fail_first" (so many attempts of each
/// transaction fail), "fail_for" (ids that always fail) and "read_only".
///
/// transactions.json: [{"id","involved_services","data","timeout_ms"?}], checked whole before
/// anything runs; or the same objects one a line (NDJSON), checked and run as they come.
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
    output: Option<Form>,
    /// Print reason, unresolved services, calls and duration of each transaction
    #[arg(long)]
    detail: bool,
    /// How many transactions may be worked on at once; more wait for slots
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = at_least_one)]
    #[arg(allow_negative_numbers = true)]
    max_in_flight: usize,
    /// How long the prepares of a transaction may take that has no timeout_ms of its own
    #[arg(long, value_name = "N", default_value_t = 5000, value_parser = within_a_day)]
    #[arg(allow_negative_numbers = true)]
    timeout_ms: u64,
    /// What the simulated services draw from: the same seed, the same refusals and failures
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = any_number)]
    #[arg(allow_negative_numbers = true)]
    seed: u64,
    /// Where to write what the summary says, as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| *number >= 1);
    number.ok_or_else(|| format!("must be a whole number from 1 to {}", usize::MAX))
}

fn within_a_day(text: &str) -> Result<u64, String> {
    const DAY_MS: u64 = 24 * 60 * 60 * 1000;
    let number = text.parse().ok().filter(|number| (1..=DAY_MS).contains(number));
    number.ok_or_else(|| format!("must be a whole number from 1 to {DAY_MS}"))
}

fn any_number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("must be a whole number from 0 to {}", u64::MAX))
}

pub(super) fn run(arguments: &RunArguments) -> Result<Exit, Failure> {
    let log_level = progress::log_level(LevelFilter::ERROR)
        .map_err(|error| Failure::new(Exit::Usage, error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("failed to start the runtime")
        .map_err(|error| Failure::new(Exit::Incomplete, error))?;
    // Before anything is read: what is read may be a terminal, or a pipe that never ends.
    let interrupt = signals::watch(&runtime)
        .context("failed to listen for signals")
        .map_err(|error| Failure::new(Exit::Incomplete, error))?;
    let (services, transactions) = read_input(arguments)?;
    // Before anything runs: what can't be written afterwards must not have been run for nothing.
    let report_file = arguments.report.as_deref().map(create).transpose()?;

    let total = match &transactions {
        Transactions::Array(specs) => u64::try_from(specs.len()).ok(),
        Transactions::Lines(_) => None,
    };
    let bar = progress::bar(total);
    progress::log_above(&bar, log_level);
    let ran = run_all(arguments, services, transactions, &bar, &runtime, &interrupt);
    bar.finish_and_clear();
    let Ran { report, bad_line, interrupted, printed } = ran?;

    if let Some((file, path)) = report_file {
        let mut file = BufWriter::new(file);
        let written =
            writeln!(file, "{:#}", output::report_json(&report)).and_then(|()| file.flush());
        written
            .with_context(|| format!("failed to write the report to `{}`", path.display()))
            .map_err(|error| Failure::new(Exit::Incomplete, error))?;
    }
    super::tell(&output::summary(&report));
    if let Some(complaints) = bad_line {
        return Err(Failure::new(Exit::BadData, complaints));
    }
    if interrupted {
        return Ok(Exit::Interrupted);
    }
    match printed {
        Ok(()) => Ok(Exit::Done),
        // Whoever was reading has had enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Incomplete),
        Err(error) => {
            let error = anyhow::Error::new(error).context("failed to print the results");
            Err(Failure::new(Exit::Incomplete, error))
        }
    }
}

// ---- Input -----------------------------------------------------------------------------------

type Source = BufReader<Box<dyn Read + Send>>;

/// Reads both files, and complains of both at once.
fn read_input(
    arguments: &RunArguments,
) -> Result<(Vec<ServiceSpec>, Transactions<Source>), Failure> {
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

fn bad_data(complaints: Complaints) -> Failure {
    Failure::new(Exit::BadData, complaints)
}

fn is_stdin(path: &Path) -> bool {
    path == Path::new("-")
}

/// What a file is called in complaints.
fn name(path: &Path) -> String {
    if is_stdin(path) { "stdin".to_owned() } else { path.display().to_string() }
}

fn open(path: &Path) -> Result<Source, Failure> {
    if is_stdin(path) {
        return Ok(BufReader::with_capacity(1 << 16, Box::new(io::stdin())));
    }
    let opened = File::open(path).with_context(|| format!("failed to open `{}`", path.display()));
    let file = opened.map_err(|error| Failure::new(Exit::BadData, error))?;
    if file.metadata().is_ok_and(|it| it.is_dir()) {
        let error = anyhow!("failed to open `{}`: it is a directory", path.display());
        return Err(Failure::new(Exit::BadData, error));
    }
    Ok(BufReader::with_capacity(1 << 16, Box::new(file)))
}

fn create(path: &Path) -> Result<(File, &Path), Failure> {
    let created =
        File::create(path).with_context(|| format!("failed to create `{}`", path.display()));
    created.map(|file| (file, path)).map_err(|error| Failure::new(Exit::Usage, error))
}

// ---- The run ---------------------------------------------------------------------------------

/// What came of a run.
struct Ran {
    report: Report,
    /// What ended the stream of transactions early.
    bad_line: Option<Complaints>,
    interrupted: bool,
    printed: io::Result<()>,
}

fn run_all(
    arguments: &RunArguments,
    services: Vec<ServiceSpec>,
    transactions: Transactions<Source>,
    bar: &ProgressBar,
    runtime: &Runtime,
    interrupt: &watch::Sender<bool>,
) -> Result<Ran, Failure> {
    let simulated = services.into_iter().map(|spec| {
        let participant = Simulated::new(&spec, arguments.seed);
        Service::from_participant(spec.name.as_str(), spec.max_concurrency, participant)
            .max_wait(spec.max_wait)
    });
    let mut embedded = Embedded::new(simulated)
        .map_err(|error| Failure::new(Exit::BadData, error))?
        .max_in_flight(arguments.max_in_flight)
        .prepare_timeout(Duration::from_millis(arguments.timeout_ms));
    if arguments.detail {
        embedded = embedded.counting_attempts();
    }
    let form = arguments.output.unwrap_or(match &transactions {
        Transactions::Array(_) => Form::Json,
        Transactions::Lines(_) => Form::Ndjson,
    });
    let (intake, requests) = mpsc::channel(4);
    let (concluded, conclusions) = mpsc::channel(4);
    let interrupted = interrupt.subscribe();
    let order = form.is_ordered().then(Arc::<Order>::default);
    let feeder = {
        let order = order.clone();
        thread::spawn(move || feed(transactions, &intake, order.as_deref()))
    };
    let printer = {
        let printer = Printer::new(BufWriter::new(io::stdout()), form, arguments.detail);
        let bar = bar.clone();
        thread::spawn(move || {
            let printed = print(printer, conclusions, order.as_deref(), &bar);
            order.iter().for_each(|order| order.end());
            printed
        })
    };
    let report = runtime.block_on(async {
        let mut interrupted = interrupted.clone();
        let stop = async move {
            // Without anyone to interrupt there is nothing to wait for.
            if interrupted.wait_for(|interrupted| *interrupted).await.is_err() {
                std::future::pending::<()>().await;
            }
            bar.suspend(|| super::tell(HEARD));
        };
        embedded.serve(requests, concluded, stop).await
    });
    let interrupted = *interrupted.borrow();
    let printed = printer.join().unwrap_or_else(|_| Err(io::Error::other("the printer panicked")));
    // A feeder that waits for a terminal, or a pipe, may wait for ever.
    let bad_line = if (interrupted || printed.is_err()) && !feeder.is_finished() {
        None
    } else {
        feeder.join().ok().and_then(Result::err)
    };
    Ok(Ran { report, bad_line, interrupted, printed })
}

/// The order in which results are to be printed: the ids that were handed over and not printed.
#[derive(Default)]
struct Order {
    awaited: Mutex<Awaited>,
    has_room: Condvar,
}

#[derive(Default)]
struct Awaited {
    ids: VecDeque<TransactionId>,
    /// Nothing is printed any more.
    is_over: bool,
}

impl Order {
    fn lock(&self) -> MutexGuard<'_, Awaited> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no more than [`AHEAD_MAX`] are awaited.
    fn await_all(&self, batch: &[TransactionSpec]) {
        let is_full = |awaited: &mut Awaited| !awaited.is_over && awaited.ids.len() >= AHEAD_MAX;
        let awaited = self.has_room.wait_while(self.lock(), is_full);
        let mut awaited = awaited.unwrap_or_else(PoisonError::into_inner);
        awaited.ids.extend(batch.iter().map(|spec| spec.id.clone()));
    }

    /// Takes those out that `early` has and no other is before.
    fn take_next(&self, early: &mut BTreeMap<TransactionId, Concluded>) -> Vec<Concluded> {
        let mut awaited = self.lock();
        let mut next = Vec::new();
        while let Some(concluded) = awaited.ids.front().and_then(|id| early.remove(id)) {
            awaited.ids.pop_front();
            next.push(concluded);
        }
        self.has_room.notify_one();
        next
    }

    /// Takes out what `early` has, in order: the others have no result.
    fn take_rest(&self, early: &mut BTreeMap<TransactionId, Concluded>) -> Vec<Concluded> {
        let ids = std::mem::take(&mut self.lock().ids);
        ids.into_iter().filter_map(|id| early.remove(&id)).collect()
    }

    fn end(&self) {
        self.lock().is_over = true;
        self.has_room.notify_one();
    }
}

/// Hands the transactions over, in batches that are as large as the other side is slow.
fn feed(
    transactions: Transactions<Source>,
    intake: &mpsc::Sender<Vec<TransactionSpec>>,
    order: Option<&Order>,
) -> Result<(), Complaints> {
    match transactions {
        Transactions::Array(specs) => {
            let mut specs = specs.into_iter().peekable();
            while specs.peek().is_some() {
                let batch: Vec<_> = specs.by_ref().take(BATCH_MAX).collect();
                if !hand_over(batch, intake, order) {
                    break;
                }
            }
            Ok(())
        }
        Transactions::Lines(lines) => feed_lines(lines, intake, order),
    }
}

fn feed_lines(
    mut lines: Lines<Source>,
    intake: &mpsc::Sender<Vec<TransactionSpec>>,
    order: Option<&Order>,
) -> Result<(), Complaints> {
    let mut batch = Vec::new();
    let mut ended = Ok(());
    while let Some(line) = lines.next() {
        match line {
            Ok(spec) => batch.push(spec),
            Err(complaints) => {
                ended = Err(complaints);
                break;
            }
        }
        // Nobody may wait for a line that has been read while the next one has yet to be written.
        let may_block = !lines.reader().buffer().contains(&b'\n');
        if (batch.len() >= BATCH_MAX || may_block)
            && !hand_over(std::mem::take(&mut batch), intake, order)
        {
            return Ok(());
        }
    }
    hand_over(batch, intake, order);
    ended
}

/// Whether there is still somebody to hand it to.
fn hand_over(
    batch: Vec<TransactionSpec>,
    intake: &mpsc::Sender<Vec<TransactionSpec>>,
    order: Option<&Order>,
) -> bool {
    if let Some(order) = order {
        order.await_all(&batch);
    }
    intake.blocking_send(batch).is_ok()
}

/// Prints what has ended until nothing more comes. If that fails the rest is thrown away.
fn print(
    mut printer: Printer<BufWriter<io::Stdout>>,
    mut conclusions: mpsc::Receiver<Vec<Concluded>>,
    order: Option<&Order>,
    bar: &ProgressBar,
) -> io::Result<()> {
    let mut early = BTreeMap::new();
    while let Some(mut batch) = conclusions.blocking_recv() {
        bar.inc(u64::try_from(batch.len()).unwrap_or(0));
        if let Some(order) = order {
            early.extend(batch.into_iter().map(|it| (it.answer.id.clone(), it)));
            batch = order.take_next(&mut early);
        }
        batch.iter().try_for_each(|concluded| printer.print(concluded))?;
        printer.flush()?;
    }
    if let Some(order) = order {
        order.take_rest(&mut early).iter().try_for_each(|concluded| printer.print(concluded))?;
    }
    printer.finish()
}
