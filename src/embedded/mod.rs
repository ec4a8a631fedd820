//! The coordinator of one process, with nothing to install: services as values, transactions in,
//! results out.
//!
//! It runs the same two cores as a worker and a service on a broker, wired to each other in memory.
//! Without a [journal](Embedded::journal) it does not survive its process: what was in flight when
//! that ends is lost.

mod backend;
mod engine;
mod journal_writer;
mod recovery;
mod remembered;
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
pub use self::report::{Calls, Report, ServiceReport};
use self::{
    backend::{FileBackend, MemoryBackend},
    engine::Engine,
    journal_writer::JournalWriter,
    remembered::Remembered,
};
use crate::{
    clock::Clock,
    journal::{
        faults,
        file::{self, JournalError, Opened, Options, Unfinished, Writer},
    },
    participant::{self, Callee, Ended, Service},
    protocol::{
        coordinator,
        ids::{InstanceId, InvalidName, ServiceName},
        message::TransactionSpec,
        time::Time,
    },
    transaction::{InvalidTransaction, Transaction, TransactionResult},
};

/// A service that can't be used as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidService {
    /// Its name is not one.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// It has no slot.
    #[error("the max_concurrency of service `{service}` is 0: must be at least 1")]
    NoSlots {
        /// Which.
        service: ServiceName,
    },
    /// Another service has its name.
    #[error("service `{service}` is there twice")]
    DuplicateName {
        /// Which.
        service: ServiceName,
    },
}

/// A run that can't begin, or can't go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// A service can't be used as it is.
    #[error("invalid service")]
    Service(#[from] InvalidService),
    /// A transaction can't be run as it is.
    #[error("invalid transaction")]
    Transaction(#[from] InvalidTransaction),
    /// The journal can't be used, or not any more. What has ended until then is in it: a run with
    /// the same transactions gives their results.
    #[error("the journal can't be used")]
    Journal(#[from] JournalError),
}

/// Runs `transactions` over `services`, and gives the results in the order of the transactions.
///
/// Each ends, whatever the services do: see [`Embedded`] for how long that may take.
///
/// # Errors
///
/// A service or a transaction can't be used as it is: then nothing is begun.
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
/// let told: Vec<_> = results.iter().map(|result| (result.id.as_str(), result.outcome)).collect();
/// assert_eq!(told, [("TX1", Outcome::Committed), ("TX2", Outcome::Committed)]);
/// # Ok(())
/// # }
/// ```
pub async fn run(
    services: impl IntoIterator<Item = Service>,
    transactions: impl IntoIterator<Item = Transaction>,
) -> Result<Vec<TransactionResult>, RunError> {
    Embedded::new(services)?.run(transactions).await
}

/// What is set to be longer is as good as for ever: a hundred years. More may exceed what a moment can
/// be.
const LONGEST: Duration = Duration::from_secs(36_500 * 24 * 60 * 60);

/// The settings of a coordinator in one process.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) coordinator: coordinator::Settings,
    pub(crate) instance: InstanceId,
    pub(crate) inquire_after: Duration,
    pub(crate) counts_attempts: bool,
}

/// What an engine is told of one service.
#[derive(Debug, Clone)]
struct MemberSettings {
    name: ServiceName,
    max_concurrency: u32,
    max_wait: Duration,
    has_store: bool,
}

/// A coordinator in one process, and its services.
///
/// A transaction that waits for a slot waits as long as it takes; from its first prepare on it has
/// [`prepare_timeout`](Embedded::prepare_timeout) to collect its votes. A commit that fails is
/// called again three times, with growing pauses, and then parked: see
/// [`TransactionResult::unresolved`].
#[derive(Debug)]
pub struct Embedded {
    services: Vec<(ServiceName, Service)>,
    settings: Settings,
    journal: Option<Journal>,
    retention: Duration,
}

/// Where the journal is kept, if not only in memory.
#[derive(Debug)]
enum Journal {
    At(PathBuf),
    #[cfg(feature = "cli")]
    Opened(Box<Opened>),
}

impl Embedded {
    /// A coordinator for these services.
    ///
    /// # Errors
    ///
    /// A service has no name that is one, or the name of another, or no slot.
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
            // A request's own time is now, and whoever is in flight is in view.
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

    /// How long a journal tells how a transaction has ended, unless told otherwise: 7 days.
    pub const RETENTION: Duration = Duration::from_secs(7 * 24 * 60 * 60);

    /// How many transactions may be worked on at once: at least 1, by default 256. More wait.
    #[must_use]
    pub fn max_in_flight(mut self, max: usize) -> Self {
        self.settings.coordinator.in_flight_max = max.max(1);
        self
    }

    /// How long the prepares of a transaction may take that doesn't say so itself: by default 5 s.
    #[must_use]
    pub fn prepare_timeout(mut self, timeout: Duration) -> Self {
        self.settings.coordinator.prepare_timeout = timeout.min(LONGEST);
        self
    }

    /// How long one commit or abort may take before it counts as failed: by default 5 s.
    #[must_use]
    pub fn finish_timeout(mut self, timeout: Duration) -> Self {
        self.settings.coordinator.finish_timeout = timeout.min(LONGEST);
        self
    }

    /// Keeps the journal in a file, so that a run survives its process. The file is made if it isn't
    /// there; one process at a time has it open.
    ///
    /// Started again with the same journal, after whatever end:
    ///
    /// * What was decided and not finished is finished, also if it isn't among the transactions of
    ///   this run. What was begun and not decided is begun again, unless a service still holds it.
    /// * A transaction that was finished before is answered as it was then, and nobody is called.
    ///   It is known by its id: with other content, that is `id_reused`.
    /// * Every [durable](crate::DurableParticipant) service is asked what it holds in doubt, and told
    ///   what became of that.
    ///
    /// So services should be [durable](Service::from_durable): their store outlives the process.
    /// Of one that has none, as those of closures, nobody can tell after a crash what it holds. The
    /// journal tells it again what was decided and not finished: its commit and its abort must bear
    /// that for what they have done already. What was not decided it is asked to prepare again. Where
    /// what it had prepared is gone with the process, let its commit fail: then it is
    /// [unresolved](TransactionResult::unresolved), and tried again at each start. An abort that fails
    /// is tried again as well: when its service asks, and at each start.
    ///
    /// The journal and the services' stores belong together: with an older copy of either, or with
    /// another journal, nobody knows what became of what is in doubt. What a service holds from
    /// another journal is left alone, with an error in the log.
    #[must_use]
    pub fn journal(mut self, path: impl Into<PathBuf>) -> Self {
        self.journal = Some(Journal::At(path.into()));
        self
    }

    /// How long the journal tells how a transaction has ended: by default [7 days](Self::RETENTION).
    /// After that its id is free again.
    #[must_use]
    pub fn journal_retention(mut self, retention: Duration) -> Self {
        self.retention = retention.min(LONGEST);
        self
    }

    /// Keeps the journal in a file that is open already.
    #[cfg(feature = "cli")]
    pub(crate) fn with_journal(mut self, opened: Opened) -> Self {
        self.journal = Some(Journal::Opened(Box::new(opened)));
        self
    }

    /// Counts the calls made for each transaction.
    #[cfg(feature = "cli")]
    pub(crate) fn counting_attempts(mut self) -> Self {
        self.settings.counts_attempts = true;
        self
    }

    /// Runs `transactions`, and gives the results in their order.
    ///
    /// When the future is dropped, nothing more is called. With a journal, the next run goes on where
    /// this one was.
    ///
    /// # Errors
    ///
    /// A transaction can't be run as it is: then none is begun. Or the journal can't be used.
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

    /// Takes in batches of requests until there are no more, or `stop` is over, and hands out what
    /// has ended. When a batch can't be handed out, no more requests are taken in until it can.
    ///
    /// # Errors
    ///
    /// The journal can't be used any more. Nobody was told of what isn't in it.
    pub(crate) async fn serve(
        mut self,
        mut requests: mpsc::Receiver<Vec<TransactionSpec>>,
        concluded: mpsc::Sender<Vec<Concluded>>,
        stop: impl Future<Output = ()>,
    ) -> Result<Report, JournalError> {
        // Nobody else's moments are compared with those of this process.
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
        let mut calls = participant::Calls::new(clock, self.settings.coordinator.finish_timeout);
        let mut backlog = Vec::new().into_iter();
        let mut report = Report::new();
        let mut open = true;
        let mut stopped = false;
        let mut began_at = None;
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
                    // Nobody wants the results any more.
                    open = false;
                    backlog = Vec::new().into_iter();
                    engine.drain();
                }
                continue;
            }
            // A prepare that was given up may still run: its service is told to abort after it.
            if !open && backlog.len() == 0 && engine.is_idle() && calls.is_idle() {
                break;
            }
            let next_deadline = engine.next_deadline();
            let wants_more = open && backlog.len() == 0 && engine.room() > 0;
            tokio::select! {
                biased;
                // With the last request taken in there is still what has not begun.
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

    /// Opens the journal, if it is to be kept in a file.
    async fn open_journal(&mut self, now: Time) -> Result<Option<Opened>, JournalError> {
        let path = match self.journal.take() {
            None => return Ok(None),
            #[cfg(feature = "cli")]
            Some(Journal::Opened(opened)) => return Ok(Some(*opened)),
            Some(Journal::At(path)) => path,
        };
        let options = Options { now, retention: self.retention };
        let of = path.clone();
        let opened = tokio::task::spawn_blocking(move || file::open(&of, &options)).await;
        // It is neither aborted nor does it panic; if it did, it was not opened.
        let failed =
            |error: tokio::task::JoinError| JournalError::Open { path, source: error.into() };
        opened.unwrap_or_else(|error| Err(failed(error))).map(Some)
    }

    /// Goes on with a journal: as the process that has opened it, with what it says.
    fn take_over(
        &mut self,
        opened: Opened,
    ) -> Result<(Writer, (JournalWriter, Vec<Unfinished>)), JournalError> {
        let Opened { unfinished, endings, tail, own, worker, .. } = opened;
        let entries = JournalWriter::new(own, worker.clone(), endings, &unfinished, tail.end());
        self.settings.instance = opened.instance;
        let coordinator = &mut self.settings.coordinator;
        coordinator.worker = worker;
        // Moments are told in seconds, so many requests are older than the decisions in view.
        coordinator.digests_max = 262_144;
        // A record is safe, or it is an error: none is lost.
        coordinator.append_timeout = Duration::from_secs(24 * 60 * 60);
        Ok((Writer::start(tail)?, (entries, unfinished)))
    }

    fn members(&self, unfinished: Option<&[Unfinished]>) -> (Vec<MemberSettings>, Vec<Callee>) {
        let member = |(number, (name, service)): (usize, &(ServiceName, Service))| {
            let mut participant = service.clone().participant();
            if let Some(unfinished) = unfinished.filter(|_| !participant.has_store()) {
                participant = Arc::new(Remembered::new(participant, name, unfinished));
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

/// Makes the calls that are asked for, and those that come of the ones that are over at once. What
/// they come of is written before them.
fn make_calls(
    engine: &mut Engine,
    writer: &mut Option<Writer>,
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
            if let Some(Ended { participant, event }) = calls.start(&participants[member], call) {
                engine.call_ended(participant, event);
            }
        }
    }
}

/// Takes in a call that has ended, and all others that have by now.
fn take_in(engine: &mut Engine, calls: &mut participant::Calls, ended: Ended) {
    let mut next = Some(ended);
    while let Some(Ended { participant, event }) = next {
        engine.call_ended(participant, event);
        next = calls.try_next();
    }
}

/// Waits until more of the journal is on the disk; for ever, if it isn't kept there.
async fn progress(writer: &mut Option<Writer>) -> Result<u64, JournalError> {
    match writer {
        Some(writer) => writer.progress().await,
        None => std::future::pending().await,
    }
}

/// Ends the journal in order. It waits for the disk, so it does that elsewhere.
async fn close(writer: Writer, now: Time) -> Result<(), JournalError> {
    match tokio::task::spawn_blocking(move || writer.close(now)).await {
        Ok(closed) => closed,
        // It is neither aborted nor does it panic; what is not closed is read again.
        Err(_) => Ok(()),
    }
}

async fn sleep_until(moment: Option<Time>, clock: Clock) {
    match moment {
        Some(moment) => tokio::time::sleep_until(clock.instant_of(moment)).await,
        None => std::future::pending().await,
    }
}
