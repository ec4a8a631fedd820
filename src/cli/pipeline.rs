//! The two threads around a run: one reads transactions, the other prints results.
//!
//! The channels between them are bounded, so that neither a large file nor a slow terminal fills
//! the memory.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    io::{self, BufWriter},
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::Context as _;
use indicatif::ProgressBar;
use tokio::{
    runtime::Runtime,
    sync::{mpsc, watch},
};

use crate::{
    cli::{
        Exit, Failure,
        input::InputReader,
        output::{ResultDetail, ResultForm, ResultPrinter},
        signals::{self, Hangup},
    },
    complaint::Complaints,
    embedded::Concluded,
    input::transactions::{TransactionLines, Transactions},
    protocol::{ids::TransactionId, message::TransactionSpec},
};

/// How many transactions go through a channel at once, at most.
const BATCH_MAX: usize = 512;

/// With results in input order: how many transactions of a stream may be in flight or have results
/// that wait for earlier ones.
const AHEAD_MAX: usize = 1_000_000;

/// How many more files a process must be able to open: tokio panics if it can't create the socket
/// pair through which it receives signals.
const FILES_MIN: usize = 8;

/// A runtime, and the sender that reports signals. Call it before reading any input, which may be a
/// terminal, or a pipe that never ends.
pub(super) fn runtime() -> Result<(Runtime, watch::Sender<bool>), Failure> {
    runtime_and(Hangup::Ends)
}

/// The same for a daemon.
pub(super) fn daemon_runtime() -> Result<(Runtime, watch::Sender<bool>), Failure> {
    runtime_and(Hangup::Ignored)
}

fn runtime_and(hangup: Hangup) -> Result<(Runtime, watch::Sender<bool>), Failure> {
    let room: io::Result<Vec<File>> = (0..FILES_MIN).map(|_| File::open("/dev/null")).collect();
    room.with_context(|| format!("failed to open {FILES_MIN} files at once: raise `ulimit -n`"))
        .map_err(|error| Failure::new(Exit::Incomplete, error))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("failed to start the runtime")
        .map_err(|error| Failure::new(Exit::Incomplete, error))?;
    let interrupt = signals::watch(&runtime, hangup)
        .context("failed to listen for signals")
        .map_err(|error| Failure::new(Exit::Incomplete, error))?;
    Ok((runtime, interrupt))
}

/// The number of transactions, if it is known.
pub(super) fn total<R>(transactions: &Transactions<R>) -> Option<u64> {
    match transactions {
        Transactions::Array(specs) => u64::try_from(specs.len()).ok(),
        Transactions::Lines(_) => None,
    }
}

/// What all stages share.
pub(super) struct Pipeline<'a> {
    pub(super) bar: &'a ProgressBar,
    pub(super) runtime: &'a Runtime,
    pub(super) interrupt: &'a watch::Sender<bool>,
    /// The message at the first signal.
    pub(super) interrupted: &'a str,
}

/// Ends at the first signal.
pub(super) type StopSignal = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What a run returns.
pub(super) struct RunOutput<T> {
    /// The result of the middle stage.
    pub(super) done: T,
    pub(super) ended: RunEnd,
}

/// How a run ended.
pub(super) struct RunEnd {
    /// The error that ended the stream of transactions early.
    pub(super) bad_line: Option<Complaints>,
    pub(super) interrupted: bool,
    pub(super) printed: io::Result<()>,
    /// Whether there are transactions without a result.
    pub(super) is_incomplete: bool,
}

impl RunEnd {
    /// The exit code, or the failure.
    pub(super) fn exit(self) -> Result<Exit, Failure> {
        if let Some(complaints) = self.bad_line {
            return Err(Failure::new(Exit::BadData, complaints));
        }
        if self.interrupted {
            return Ok(Exit::Interrupted);
        }
        match self.printed {
            Ok(()) if self.is_incomplete => Ok(Exit::Incomplete),
            Ok(()) => Ok(Exit::Done),
            // The reader closed the pipe: nothing to report.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Incomplete),
            Err(error) => {
                let error = anyhow::Error::new(error).context("failed to print the results");
                Err(Failure::new(Exit::Incomplete, error))
            }
        }
    }
}

impl Pipeline<'_> {
    /// Reads transactions, runs them by `serve`, and prints the results, if that is wanted.
    pub(super) fn run<T, F: Future<Output = T>>(
        &self,
        transactions: Transactions<InputReader>,
        printing: Option<(ResultForm, ResultDetail)>,
        serve: impl FnOnce(
            mpsc::Receiver<Vec<TransactionSpec>>,
            mpsc::Sender<Vec<Concluded>>,
            StopSignal,
        ) -> F,
    ) -> RunOutput<T> {
        let (intake, requests) = mpsc::channel(4);
        let (concluded, conclusions) = mpsc::channel(4);
        let is_ordered = printing.is_some_and(|(form, _)| form.is_ordered());
        let order = is_ordered.then(Arc::<ResultOrder>::default);
        let taker = intake.downgrade();
        let feeder = {
            let order = order.clone();
            thread::spawn(move || feed(transactions, &intake, order.as_deref()))
        };
        let printer = printing.map(|(form, detail)| {
            let printer = ResultPrinter::new(BufWriter::new(io::stdout()), form, detail);
            let bar = self.bar.clone();
            thread::spawn(move || {
                let printed = print(printer, conclusions, order.as_deref(), &bar);
                order.iter().for_each(|order| order.end());
                printed
            })
        });
        let interrupted = self.interrupt.subscribe();
        let done = self.runtime.block_on(serve(requests, concluded, self.stop()));
        let interrupted = *interrupted.borrow();
        let printed = printer.map_or(Ok(()), |printer| {
            printer.join().unwrap_or_else(|_| Err(io::Error::other("the printer panicked")))
        });
        // A feeder that reads from a terminal or a pipe may wait for ever.
        let has_no_reader = taker.upgrade().is_some_and(|intake| intake.is_closed());
        let is_given_up = interrupted || printed.is_err() || has_no_reader;
        let bad_line = if is_given_up && !feeder.is_finished() {
            None
        } else {
            feeder.join().ok().and_then(Result::err)
        };
        RunOutput { done, ended: RunEnd { bad_line, interrupted, printed, is_incomplete: false } }
    }

    fn stop(&self) -> StopSignal {
        let (mut interrupted, bar) = (self.interrupt.subscribe(), self.bar.clone());
        let message = self.interrupted.to_owned();
        Box::pin(async move {
            // Without a sender there will be no signal.
            if interrupted.wait_for(|interrupted| *interrupted).await.is_err() {
                std::future::pending::<()>().await;
            }
            bar.suspend(|| super::tell(&message));
        })
    }
}

/// The input order for results: the ids that were passed on and have not been printed.
#[derive(Default)]
struct ResultOrder {
    awaited: Mutex<AwaitedIds>,
    has_room: Condvar,
}

#[derive(Default)]
struct AwaitedIds {
    ids: VecDeque<TransactionId>,
    /// The printer has ended.
    is_over: bool,
}

impl ResultOrder {
    fn lock(&self) -> MutexGuard<'_, AwaitedIds> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a batch, after waiting until fewer than [`AHEAD_MAX`] ids are awaited.
    fn await_all(&self, batch: &[TransactionSpec]) {
        let is_full = |awaited: &mut AwaitedIds| !awaited.is_over && awaited.ids.len() >= AHEAD_MAX;
        let awaited = self.has_room.wait_while(self.lock(), is_full);
        let mut awaited = awaited.unwrap_or_else(PoisonError::into_inner);
        awaited.ids.extend(batch.iter().map(|spec| spec.id.clone()));
    }

    /// Takes the results out of `early` whose turn it is.
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

    /// Takes the remaining results out of `early`, in order, skipping transactions without one.
    fn take_rest(&self, early: &mut BTreeMap<TransactionId, Concluded>) -> Vec<Concluded> {
        let ids = std::mem::take(&mut self.lock().ids);
        ids.into_iter().filter_map(|id| early.remove(&id)).collect()
    }

    fn end(&self) {
        self.lock().is_over = true;
        self.has_room.notify_one();
    }
}

/// Passes the transactions on, in batches.
fn feed(
    transactions: Transactions<InputReader>,
    intake: &mpsc::Sender<Vec<TransactionSpec>>,
    order: Option<&ResultOrder>,
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
    mut lines: TransactionLines<InputReader>,
    intake: &mpsc::Sender<Vec<TransactionSpec>>,
    order: Option<&ResultOrder>,
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
        // A line that has been read must not wait for the next one to be written.
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

/// Whether the receiver is still there.
fn hand_over(
    batch: Vec<TransactionSpec>,
    intake: &mpsc::Sender<Vec<TransactionSpec>>,
    order: Option<&ResultOrder>,
) -> bool {
    if let Some(order) = order {
        order.await_all(&batch);
    }
    intake.blocking_send(batch).is_ok()
}

/// Prints results until the channel closes. If printing fails, the rest is dropped.
fn print(
    mut printer: ResultPrinter<BufWriter<io::Stdout>>,
    mut conclusions: mpsc::Receiver<Vec<Concluded>>,
    order: Option<&ResultOrder>,
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
