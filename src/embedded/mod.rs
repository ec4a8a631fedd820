//! The embedded coordinator: services and transactions of one process, without a broker.
//!
//! It runs the same two cores as a worker and an instance on a broker, connected in memory. Without a
//! [journal](Embedded::journal), the transactions in flight are lost when the process ends.

mod backend;
mod engine;
mod journal_backed;
mod journal_writer;
mod recovery;
mod report;
#[cfg(test)]
mod restarts;

// The front page's program is an example of the documentation: it is compiled and run as one.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
mod front_page {}

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::mpsc;

pub(crate) use self::report::Concluded;
#[cfg(feature = "cli")]
pub(crate) use self::report::Latencies;
pub use self::report::{CallCounts, Report, ServiceReport};
use self::{
    backend::{FileBackend, MemoryBackend},
    engine::Engine,
    journal_backed::JournalBacked,
    journal_writer::JournalWriter,
};
use crate::{
    clock::Clock,
    journal::{
        faults,
        file::{
            self, JournalError, JournalFileWriter, JournalOptions, OpenedJournal,
            UnfinishedTransaction,
        },
    },
    participant::{self, Callee, EndedCall, Service},
    protocol::{
        coordinator,
        ids::{InstanceId, InvalidName, ServiceName},
        message::TransactionSpec,
        time::Time,
    },
    transaction::{InvalidTransaction, Transaction, TransactionResult},
};

/// A service is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidService {
    /// Its name is invalid.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// It has no slots.
    #[error("the max_concurrency of service `{service}` is 0: must be at least 1")]
    NoSlots {
        /// The service.
        service: ServiceName,
    },
    /// Another service has the same name.
    #[error("duplicate service name `{service}`")]
    DuplicateName {
        /// The name.
        service: ServiceName,
    },
}

/// A run can't begin, or can't continue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A service is invalid.
    #[error("invalid service")]
    Service(#[from] InvalidService),
    /// A transaction is invalid.
    #[error("invalid transaction")]
    Transaction(#[from] InvalidTransaction),
    /// The journal can't be opened, read or written. It contains all transactions that had finished by
    /// then: another run with the same transactions returns their results.
    #[error("the journal can't be used")]
    Journal(#[from] JournalError),
}

/// Runs `transactions` over `services`, and returns the results in the order of the transactions.
///
/// Every transaction ends, whatever the services do: see [`Embedded`] for how long that may take.
///
/// # Errors
///
/// A service or a transaction is invalid. Then no transaction is started.
///
/// ```
/// use dtc::{Outcome, Service, Transaction, run};
/// use serde_json::json;
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), dtc::RunError> {
/// let services = [Service::new("ServiceA", 2), Service::new("ServiceB", 1)];
/// let transactions = [
///     Transaction::new("TX1", ["ServiceA", "ServiceB"], json!({"amount": 100})),
///     Transaction::new("TX2", ["ServiceA"], json!({"item": "Widget"})),
/// ];
///
/// let results = run(services, transactions).await?;
///
/// let ended: Vec<_> = results.iter().map(|result| (result.id.as_str(), result.outcome)).collect();
/// assert_eq!(ended, [("TX1", Outcome::Committed), ("TX2", Outcome::Committed)]);
/// # Ok(())
/// # }
/// ```
pub async fn run(
    services: impl IntoIterator<Item = Service>,
    transactions: impl IntoIterator<Item = Transaction>,
) -> Result<Vec<TransactionResult>, RunError> {
    Embedded::new(services)?.run(transactions).await
}

/// Longer settings are cut to a hundred years, which is as good as for ever: with more, the time of a
/// deadline could overflow.
const LONGEST: Duration = Duration::from_secs(36_500 * 24 * 60 * 60);

/// The settings of an embedded coordinator.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) coordinator: coordinator::Settings,
    pub(crate) instance: InstanceId,
    pub(crate) inquire_after: Duration,
    pub(crate) counts_attempts: bool,
}

/// The settings of one service for the engine.
#[derive(Debug, Clone)]
struct MemberSettings {
    name: ServiceName,
    max_concurrency: u32,
    max_wait: Duration,
    has_store: bool,
}

/// A coordinator in one process, and its services.
///
/// A transaction may wait for its first slot for any time. From its first prepare on, all services must
/// vote within [`prepare_timeout`](Embedded::prepare_timeout). A commit that fails is called again three
/// times, with growing pauses, and then parked: see [`TransactionResult::unresolved`].
#[derive(Debug)]
pub struct Embedded {
    services: Vec<(ServiceName, Service)>,
    settings: Settings,
    journal: Option<JournalLocation>,
    retention: Duration,
}

/// A journal that is kept in a file.
#[derive(Debug)]
enum JournalLocation {
    At(PathBuf),
    #[cfg(feature = "cli")]
    Opened(Box<OpenedJournal>),
}

impl Embedded {
    /// Creates a coordinator for these services.
    ///
    /// # Errors
    ///
    /// A service has an invalid name, the name of another one, or no slots.
    pub fn new(services: impl IntoIterator<Item = Service>) -> Result<Self, InvalidService> {
        let mut names = BTreeSet::new();
        let mut checked = Vec::new();
        for service in services {
            let name = ServiceName::parse(&service.name)?;
            if service.max_concurrency == 0 {
                return Err(InvalidService::NoSlots { service: name });
            }
            if !names.insert(name.clone()) {
                return Err(InvalidService::DuplicateName { service: name });
            }
            checked.push((name, service));
        }
        let coordinator = coordinator::Settings {
            // One process has one clock.
            clock_margin: Duration::ZERO,
            window: Duration::MAX,
            records_max: 1024,
            // A request is made now, so no record of it can be older than those in view.
            digests_max: 0,
            waiting_max: 65_536,
            ..coordinator::Settings::new(engine::worker_id())
        };
        let settings = Settings {
            coordinator,
            instance: engine::instance_id(),
            inquire_after: Duration::from_secs(10),
            counts_attempts: false,
        };
        Ok(Self { services: checked, settings, journal: None, retention: Self::RETENTION })
    }

    /// The default of [`journal_retention`](Self::journal_retention): 7 days.
    pub const RETENTION: Duration = Duration::from_secs(7 * 24 * 60 * 60);

    /// Sets how many transactions may be in progress at once: at least 1. Further ones wait. Default:
    /// 256.
    #[must_use]
    pub fn max_in_flight(mut self, max: usize) -> Self {
        self.settings.coordinator.in_flight_max = max.max(1);
        self
    }

    /// Sets the time limit for the prepares of a transaction that has no timeout of its own. Default:
    /// 5 s.
    #[must_use]
    pub fn prepare_timeout(mut self, timeout: Duration) -> Self {
        self.settings.coordinator.prepare_timeout = timeout.min(LONGEST);
        self
    }

    /// Sets the time limit of a commit or abort, after which it has failed. Default: 5 s.
    #[must_use]
    pub fn finish_timeout(mut self, timeout: Duration) -> Self {
        self.settings.coordinator.finish_timeout = timeout.min(LONGEST);
        self
    }

    /// Keeps the journal in a file, so that a run survives its process. The file is created if it doesn't
    /// exist. Only one process can have it open at a time.
    ///
    /// A run with a journal of an earlier run, however that one ended, does the following first:
    ///
    /// * It finishes every transaction that was decided and not finished, even if the new run doesn't
    ///   contain it. It starts every transaction again that was started and not decided, unless a service
    ///   still holds it.
    /// * A transaction that had finished has the same result again, and no service is called for it. It
    ///   is recognised by its id; a transaction with other content is aborted with `id_reused`.
    /// * It asks every [durable](crate::DurableParticipant) service what it holds in doubt, and commits or
    ///   aborts that.
    ///
    /// So services should be [durable](Service::from_durable), with a store that outlives the process. Of
    /// a service without a store, such as one of closures, nobody knows after a crash what it holds. Its
    /// commit or abort is called again for each decision that was not finished, and must be able to repeat
    /// what it has already done; its prepare is called again for a transaction that was not decided. If
    /// what it had prepared was lost with the process, its commit should fail: then the transaction is
    /// [unresolved](TransactionResult::unresolved), and each start tries the commit again. An abort that
    /// fails is also tried again: when the service inquires, and at each start.
    ///
    /// The journal and the services' stores belong together: with an older copy of either, or with
    /// another journal, the outcome of what is in doubt is unknown. What a service holds from another
    /// journal is left alone, with an error in the log.
    #[must_use]
    pub fn journal(mut self, path: impl Into<PathBuf>) -> Self {
        self.journal = Some(JournalLocation::At(path.into()));
        self
    }

    /// Sets how long the journal keeps the result of a transaction. After that, its id may be used again.
    /// Default: [7 days](Self::RETENTION).
    #[must_use]
    pub fn journal_retention(mut self, retention: Duration) -> Self {
        self.retention = retention.min(LONGEST);
        self
    }

    /// Keeps the journal in a file that is already open.
    #[cfg(feature = "cli")]
    pub(crate) fn with_journal(mut self, opened: OpenedJournal) -> Self {
        self.journal = Some(JournalLocation::Opened(Box::new(opened)));
        self
    }

    /// Counts the calls for each transaction.
    #[cfg(feature = "cli")]
    pub(crate) fn counting_attempts(mut self) -> Self {
        self.settings.counts_attempts = true;
        self
    }

    /// Runs `transactions`, and returns the results in their order.
    ///
    /// If the future is dropped, no service is called any more. With a journal, the next run continues
    /// from there.
    ///
    /// # Errors
    ///
    /// A transaction is invalid: then none is started. Or the journal can't be used.
    pub async fn run(
        self,
        transactions: impl IntoIterator<Item = Transaction>,
    ) -> Result<Vec<TransactionResult>, RunError> {
        let mut places = std::collections::BTreeMap::new();
        let mut specs = Vec::new();
        for (place, transaction) in transactions.into_iter().enumerate() {
            let spec = transaction.check()?;
            if places.insert(spec.id.clone(), place).is_some() {
                return Err(InvalidTransaction::DuplicateId { id: spec.id }.into());
            }
            specs.push(spec);
        }
        let mut results: Vec<Option<TransactionResult>> = vec![None; specs.len()];
        let (intake, requests) = mpsc::channel(1);
        let (concluded, mut conclusions) = mpsc::channel(1);
        let submit = async move { drop(intake.send(specs).await) };
        let collect = async {
            while let Some(batch) = conclusions.recv().await {
                for Concluded { answer, .. } in batch {
                    let Some(&place) = places.get(&answer.id) else { continue };
                    results[place] = Some(TransactionResult::of(answer));
                }
            }
        };
        let stop = std::future::pending();
        let (_, served, ()) = tokio::join!(submit, self.serve(requests, concluded, stop), collect);
        served?;
        Ok(results.into_iter().flatten().collect())
    }

    /// Takes batches of requests until there are no more, or `stop` ends, and sends batches of results.
    /// While results can't be sent, it takes no requests.
    ///
    /// # Errors
    ///
    /// The journal can't be used any more. No result was sent that isn't in it.
    pub(crate) async fn serve(
        mut self,
        mut requests: mpsc::Receiver<Vec<TransactionSpec>>,
        concluded: mpsc::Sender<Vec<Concluded>>,
        stop: impl Future<Output = ()>,
    ) -> Result<Report, JournalError> {
        // The times of this process are compared with no others.
        let mut clock = Clock::steady();
        let (mut writer, mut kept) = (None, None);
        if let Some(opened) = self.open_journal(clock.now()).await? {
            clock = clock.not_before(opened.latest);
            let (started, journal) = self.take_over(opened)?;
            (writer, kept) = (Some(started), Some(journal));
        }
        let unfinished = kept.as_ref().map(|(_, unfinished): &(_, Vec<_>)| unfinished.as_slice());
        let (members, participants) = self.members(unfinished);
        let (now, settings) = (clock.now(), self.settings.clone());
        let mut engine = match kept {
            None => Engine::new(now, settings, members, MemoryBackend::default()),
            Some((entries, unfinished)) => {
                let backend = FileBackend::new(now, &settings, &members, entries, unfinished);
                Engine::new(now, settings, members, backend)
            }
        };
        let finish_timeout = self.settings.coordinator.finish_timeout;
        let mut calls = participant::Calls::new(clock, finish_timeout);
        let mut backlog = Vec::new().into_iter();
        let mut report = Report::new();
        let mut open = true;
        let mut stopped = false;
        let mut began_at = None;
        let mut over_since: Option<Time> = None;
        let mut stop = std::pin::pin!(stop);
        loop {
            let now = clock.read();
            engine.wake(now.time);
            if !open && backlog.len() == 0 {
                engine.requests_ended();
            }
            while engine.room() > 0
                && let Some(spec) = backlog.next()
            {
                began_at.get_or_insert(now.elapsed);
                engine.submit(now, spec);
            }
            make_calls(&mut engine, &mut writer, &mut calls, &participants, clock)?;
            let ended = engine.take_concluded();
            if !ended.is_empty() {
                ended.iter().for_each(|concluded| report.count(concluded));
                report.took = clock.read().elapsed.saturating_sub(began_at.unwrap_or_default());
                if concluded.send(ended).await.is_err() {
                    // The receiver of the results is gone.
                    open = false;
                    backlog = Vec::new().into_iter();
                    engine.drain();
                }
                continue;
            }
            // An abort that has ended makes room though no result comes of it.
            if backlog.len() > 0 && engine.room() > 0 {
                continue;
            }
            // A prepare that has exceeded its time limit may still run, and is aborted after it.
            let is_over = !open && backlog.len() == 0 && engine.is_idle() && calls.is_idle();
            if is_over && !calls.is_reading() {
                break;
            }
            // An outcome may wait for what a store holds. A store that fails is read again and again.
            over_since = over_since.or(Some(now.time)).filter(|_| is_over);
            let gives_up_at = over_since.map(|since| since + finish_timeout);
            if gives_up_at.is_some_and(|at| at <= now.time) {
                tracing::error!(
                    "a store has not said in {finish_timeout:?} what it holds of a transaction that has \
                     ended: if it holds a branch, that stays in doubt until the next run with this journal"
                );
                break;
            }
            let next_deadline = engine.next_deadline().into_iter().chain(gives_up_at).min();
            let wants_more = open && backlog.len() == 0 && engine.room() > 0;
            tokio::select! {
                biased;
                // Also after the last request: some transactions may not have started yet.
                () = &mut stop, if !stopped => {
                    stopped = true;
                    open = false;
                    backlog = Vec::new().into_iter();
                    requests.close();
                    engine.drain();
                }
                n_safe = progress(&mut writer) => engine.safe(n_safe?),
                ended = calls.next() => take_in(&mut engine, &mut calls, ended),
                batch = requests.recv(), if wants_more => match batch {
                    Some(batch) => backlog = batch.into_iter(),
                    None => open = false,
                },
                () = sleep_until(next_deadline, clock) => {}
            }
        }
        if let Some(writer) = writer {
            close(writer, clock.now()).await?;
        }
        report.services = engine.reports();
        Ok(report)
    }

    /// Opens the journal, if it is kept in a file.
    async fn open_journal(&mut self, now: Time) -> Result<Option<OpenedJournal>, JournalError> {
        let path = match self.journal.take() {
            None => return Ok(None),
            #[cfg(feature = "cli")]
            Some(JournalLocation::Opened(opened)) => return Ok(Some(*opened)),
            Some(JournalLocation::At(path)) => path,
        };
        let options = JournalOptions { now, retention: self.retention };
        let of = path.clone();
        let opened = tokio::task::spawn_blocking(move || file::open(&of, &options)).await;
        // The task is not aborted and doesn't panic. If it did, the journal would not be open.
        let failed =
            |error: tokio::task::JoinError| JournalError::Open { path, source: error.into() };
        opened.unwrap_or_else(|error| Err(failed(error))).map(Some)
    }

    /// Continues with an opened journal: takes its ids, and the unfinished transactions in it.
    fn take_over(
        &mut self,
        opened: OpenedJournal,
    ) -> Result<(JournalFileWriter, (JournalWriter, Vec<UnfinishedTransaction>)), JournalError>
    {
        let OpenedJournal { unfinished, endings, tail, own, worker, .. } = opened;
        let entries = JournalWriter::new(own, worker.clone(), endings, &unfinished, tail.end());
        self.settings.instance = opened.instance;
        let coordinator = &mut self.settings.coordinator;
        coordinator.worker = worker;
        // `requested_at` is in whole seconds, so many requests are older than the decisions in view.
        coordinator.digests_max = 262_144;
        // An append succeeds or is an error, so the coordinator needn't repeat it.
        coordinator.append_timeout = Duration::from_secs(24 * 60 * 60);
        Ok((JournalFileWriter::start(tail)?, (entries, unfinished)))
    }

    fn members(
        &self,
        unfinished: Option<&[UnfinishedTransaction]>,
    ) -> (Vec<MemberSettings>, Vec<Callee>) {
        let member = |(number, (name, service)): (usize, &(ServiceName, Service))| {
            let mut participant = service.clone().participant();
            if let Some(unfinished) = unfinished.filter(|_| !participant.has_store()) {
                participant = Arc::new(JournalBacked::new(participant, name, unfinished));
            }
            let settings = MemberSettings {
                name: name.clone(),
                max_concurrency: service.max_concurrency,
                max_wait: service.max_wait.min(LONGEST),
                has_store: participant.has_store(),
            };
            (settings, Callee { number, service: Some(name.clone()), code: participant })
        };
        self.services.iter().enumerate().map(member).unzip()
    }
}

/// Makes the calls that the engine asks for, and those that follow from calls that end at once. Entries
/// are written to the journal before the calls that follow from them.
fn make_calls(
    engine: &mut Engine,
    writer: &mut Option<JournalFileWriter>,
    calls: &mut participant::Calls,
    participants: &[Callee],
    clock: Clock,
) -> Result<(), JournalError> {
    loop {
        engine.settle(clock.read());
        if let Some(failure) = engine.take_failure() {
            return Err(failure);
        }
        if let (Some(writer), Some(batch)) = (&mut *writer, engine.take_batch()) {
            writer.write(&batch)?;
        }
        let wanted = engine.take_calls();
        if wanted.is_empty() {
            return Ok(());
        }
        for (member, call) in wanted {
            faults::point();
            if let Some(EndedCall { participant, event }) = calls.start(&participants[member], call)
            {
                engine.call_ended(participant, event);
            }
        }
    }
}

/// Handles a call that has ended, and all others that have ended by now.
fn take_in(engine: &mut Engine, calls: &mut participant::Calls, ended: EndedCall) {
    let mut next = Some(ended);
    while let Some(EndedCall { participant, event }) = next {
        engine.call_ended(participant, event);
        next = calls.try_next();
    }
}

/// Waits until more of the journal is on disk; for ever if it is in memory only.
async fn progress(writer: &mut Option<JournalFileWriter>) -> Result<u64, JournalError> {
    match writer {
        Some(writer) => writer.progress().await,
        None => std::future::pending().await,
    }
}

/// Closes the journal, on another thread, since that waits for the disk.
async fn close(writer: JournalFileWriter, now: Time) -> Result<(), JournalError> {
    match tokio::task::spawn_blocking(move || writer.close(now)).await {
        Ok(closed) => closed,
        // The task is not aborted and doesn't panic. The next start can read a journal that was not
        // closed.
        Err(_) => Ok(()),
    }
}

async fn sleep_until(moment: Option<Time>, clock: Clock) {
    match moment {
        Some(moment) => tokio::time::sleep_until(clock.instant_of(moment)).await,
        None => std::future::pending().await,
    }
}
