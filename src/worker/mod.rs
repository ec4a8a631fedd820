//! The worker: drives a coordinator on a broker.
//!
//! A worker keeps nothing that a crash could lose. Any number of workers share the queue of requests,
//! without configuration among them, and all read the same journal.
//!
//! * `builder`: sets up a worker in a program.
//! * `session`: the work over one link to the broker.
//! * `state`: the state that outlives a link.
//! * `journal`, `follower`, `appender`: read the stream of decisions, follow its end, append to it.
//! * `packs`, `packer`, `pack_buffer`: copies of the journal, many of its messages in one.
//! * `request_consumers`, `inbound`, `saturation`: the messages that come in, and how many are taken.
//! * `suspects`: requests that may be what workers crash on.
//! * `outbox`, `prepare_batcher`, `parking`: the messages that go out.
//! * `searches`: looks for services, and for instances of them.
//! * `clocks`: compares this worker's clock with others.
//! * `namesakes`: detects another worker with the same name.
//! * `anomalies`: logs what is unusual.

mod anomalies;
mod appender;
mod builder;
mod clocks;
mod follower;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod inbound;
mod journal;
mod namesakes;
mod outbox;
mod pack_buffer;
mod packer;
mod packs;
mod parking;
mod prepare_batcher;
mod request_consumers;
mod saturation;
mod searches;
mod session;
mod state;
mod suspects;

use std::time::Duration;

use futures_util::FutureExt;
use tracing::{Instrument as _, Span};

pub use self::builder::{Worker, WorkerBuilder};
use self::{
    anomalies::Undecidable,
    clocks::Clocks,
    namesakes::Namesakes,
    pack_buffer::PackBuffer,
    session::{Session, SessionError, StopReason, open_replies},
    state::WorkerState,
    suspects::Tries,
};
use crate::{
    clock::Clock,
    error::ErrorChain,
    protocol::{
        coordinator::{self, Coordinator, Event},
        ids::WorkerId,
        message::{Answer, Outcome},
    },
    readiness::Readiness,
    setting::InvalidSetting,
    transport::amqp::{
        bounded::ANSWER_MAX,
        connection::{Broker, ConnectionError},
        error::{BrokerError, Disposition, is_refusal},
        names::Names,
        supervisor::Supervisor,
    },
};

/// The settings of a worker.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The broker.
    pub broker: Broker,
    /// The names of its exchanges and queues.
    pub names: Names,
    /// Time-outs and limits; and the worker's id, which no other worker may have.
    pub coordinator: coordinator::Settings,
    /// How long the worker may continue to finish transactions after it was asked to stop.
    pub drain: Duration,
    /// Shows whether the worker takes requests.
    pub readiness: Readiness,
}

impl Settings {
    /// The default of `drain`.
    const DRAIN: Duration = Duration::from_secs(25);

    /// The defaults, for the worker called `worker`.
    pub fn new(broker: Broker, names: Names, worker: WorkerId) -> Self {
        let coordinator = coordinator::Settings::new(worker);
        let (drain, readiness) = (Self::DRAIN, Readiness::new());
        Self { broker, names, coordinator, drain, readiness }
    }

    fn worker(&self) -> &WorkerId {
        &self.coordinator.worker
    }

    fn requests_prefetch(&self) -> u16 {
        u16::try_from(self.coordinator.in_flight_max).unwrap_or(u16::MAX).max(1)
    }

    fn waiting_prefetch(&self) -> u16 {
        u16::try_from(self.coordinator.waiting_max).unwrap_or(u16::MAX).max(1)
    }
}

/// What a worker has done, in numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct WorkerStats {
    /// Requests taken, repeated deliveries included.
    pub taken: u64,
    /// Results of committed transactions.
    pub committed: u64,
    /// Results of aborted transactions.
    pub aborted: u64,
    /// Messages rejected.
    pub rejected: u64,
    /// Records written for an operator: parked commits, and parked transactions.
    pub parked: u64,
    /// Results that no queue took.
    pub unclaimed: u64,
    /// How often the connection was lost.
    pub lost: u64,
}

impl WorkerStats {
    fn count(&mut self, answer: &Answer) {
        match answer.outcome {
            Outcome::Committed => self.committed += 1,
            Outcome::Aborted => self.aborted += 1,
        }
    }
}

/// A worker can't run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// A setting is invalid.
    #[error("invalid worker")]
    Invalid(#[from] InvalidSetting),
    /// The broker refuses the connection.
    #[error("the broker refuses this worker")]
    Refused(#[source] BrokerError),
    /// The broker refuses an operation that every worker needs.
    #[error("the broker does not permit what a worker does")]
    NotPermitted(#[source] BrokerError),
}

/// Runs a worker until `stop` completes, and then finishes the transactions that it has begun. While
/// the broker can't be reached, the worker connects again and again.
///
/// # Errors
///
/// The broker refuses the worker, which has not worked before.
pub async fn run(
    settings: Settings,
    stop: impl Future<Output = ()>,
) -> Result<WorkerStats, WorkerError> {
    let span = span(settings.worker());
    run_in_span(settings, stop).instrument(span).await
}

/// The span of all that a worker logs. Its level is ERROR, so that a line of any level has the worker's
/// name.
pub(crate) fn span(worker: &WorkerId) -> Span {
    tracing::error_span!("work", %worker)
}

/// [`run`] for a caller that is in the worker's [`span`].
pub(crate) async fn run_in_span(
    settings: Settings,
    stop: impl Future<Output = ()>,
) -> Result<WorkerStats, WorkerError> {
    let _held = settings.readiness.while_held();
    let stop = Box::pin(stop).shared();
    let coordinator = Coordinator::new(settings.coordinator.clone());
    let clock = Clock::start();
    let clocks = Clocks::new(settings.worker().clone(), settings.coordinator.clock_margin);
    let stats = WorkerStats::default();
    let namesakes = Namesakes::default();
    let mut state = WorkerState {
        coordinator,
        clock,
        clocks,
        namesakes,
        last_read: None,
        begin_max: ANSWER_MAX,
        tries: Tries::default(),
        undecidable: Undecidable::default(),
        pack_buffer: PackBuffer::default(),
        packs_unusable: None,
        stats,
    };
    let mut supervisor = Supervisor::default();
    loop {
        let failure = tokio::select! {
            opened = open(&settings, &mut state) => match opened {
                Ok(session) => {
                    supervisor.opened();
                    tracing::info!("ready");
                    session.tell_ready();
                    let ran = session.run(stop.clone()).await;
                    settings.readiness.set(false);
                    match ran {
                        Ok(end) => return Ok(ended(&end, &state)),
                        Err(error) => LinkFailure::Session(error),
                    }
                }
                Err(failure) => failure,
            },
            () = stop.clone() => return Ok(state.stats),
        };
        if !supervisor.has_worked()
            && let Some(error) = failure.refusal()
        {
            return Err(error);
        }
        failure.log(&settings, &mut supervisor);
        if failure.is_of_clock() {
            // A wrong clock has chosen where to begin to read: begin again.
            state.last_read = None;
        } else {
            state.stats.lost += u64::from(supervisor.has_worked());
        }
        state.coordinator.handle(state.clock.now(), Event::Disconnected, &mut Vec::new());
        tokio::select! {
            () = tokio::time::sleep(supervisor.pause()) => {}
            () = stop.clone() => return Ok(state.stats),
        }
    }
}

async fn open<'a>(
    settings: &'a Settings,
    state: &'a mut WorkerState,
) -> Result<Session<'a>, LinkFailure> {
    let replies = |link| async move {
        let replies = open_replies(settings, &link).await?;
        Ok((link, replies))
    };
    let is_final = |failure: &LinkFailure| failure.refusal().is_some();
    let (link, replies) = settings.broker.connect_pair_with(replies, is_final).await?;
    Session::open(settings, state, link, replies).await.map_err(LinkFailure::Session)
}

fn ended(reason: &StopReason, state: &WorkerState) -> WorkerStats {
    match reason {
        StopReason::Drained => tracing::info!("drained: no request is left"),
        StopReason::DrainTimedOut => tracing::warn!(
            in_flight = state.coordinator.len(),
            "the time to drain is over: other workers get the requests in flight"
        ),
        StopReason::WithoutJournal => tracing::warn!(
            in_flight = state.coordinator.len(),
            "stopping while the journal is gone: other workers get the requests in flight"
        ),
    }
    state.stats
}

/// An error that retrying won't resolve.
fn final_error(cause: impl std::error::Error + Send + Sync + 'static) -> BrokerError {
    BrokerError::new(cause, Disposition::GiveUp)
}

/// Why there is no link.
enum LinkFailure {
    Connect(ConnectionError),
    Session(SessionError),
}

impl From<ConnectionError> for LinkFailure {
    fn from(error: ConnectionError) -> Self {
        Self::Connect(error)
    }
}

impl From<SessionError> for LinkFailure {
    fn from(error: SessionError) -> Self {
        Self::Session(error)
    }
}

impl LinkFailure {
    /// The error to return from a worker that has not worked before, if retrying won't help.
    fn refusal(&self) -> Option<WorkerError> {
        match self {
            Self::Connect(error) => (error.disposition() == Disposition::GiveUp)
                .then(|| WorkerError::Refused(final_error(error.clone()))),
            Self::Session(error) => error
                .broker_error()
                .filter(|error| is_refusal(error))
                .map(|error| WorkerError::NotPermitted(final_error(error.clone()))),
        }
    }

    /// Whether the worker gave up the link because its clock is wrong, or was set.
    fn is_of_clock(&self) -> bool {
        matches!(
            self,
            Self::Session(
                SessionError::ClockOff(_) | SessionError::ClockStillOff | SessionError::ClockSet(_)
            )
        )
    }

    fn log(&self, settings: &Settings, supervisor: &mut Supervisor) {
        match self {
            Self::Session(error @ SessionError::ClockOff(_)) => {
                tracing::error!(
                    error = %ErrorChain(error), margin = ?settings.coordinator.clock_margin,
                    "not ready until the clocks fit: with this clock the worker would reject requests \
                     as made in the future, or write such records. Correct the clock of this machine \
                     (`timedatectl` shows whether it is synchronised), or of those that are named"
                );
            }
            Self::Session(error @ SessionError::ClockStillOff) => {
                tracing::debug!(error = %ErrorChain(error), "not ready; comparing the clocks again");
            }
            Self::Session(error @ SessionError::ClockSet(_)) => {
                tracing::warn!(error = %ErrorChain(error), "starting again with the new time");
            }
            Self::Connect(error) => {
                tracing::warn!(error = %ErrorChain(error), "not connected to the broker; trying again");
            }
            Self::Session(error) if error.is_missing() => {
                let namespace = settings.names.namespace();
                match supervisor.is_missing_for_good() {
                    true => tracing::error!(
                        error = %ErrorChain(error), %namespace,
                        "the topology is missing: run `dtc topology apply`; trying again"
                    ),
                    false => tracing::warn!(
                        error = %ErrorChain(error), %namespace,
                        "a part of the topology is missing, as while a broker starts; trying again"
                    ),
                }
            }
            Self::Session(error) => {
                tracing::warn!(error = %ErrorChain(error), "lost the link to the broker; connecting again");
            }
        }
    }
}
