//! The worker: what drives a coordinator on a broker.
//!
//! A worker keeps nothing that a crash could lose. Any number of them share the queue of requests,
//! with no configuration among them; each reads the same journal.
//!
//! * `builder`: how a program sets one up.
//! * `session`: the life of one link to the broker.
//! * `state`: what is kept from one link to the next.
//! * `journal`, `follower`, `appender`: reading the stream of decisions, following its end, writing to
//!   it.
//! * `packs`, `packer`, `pack_buffer`: the same in fewer messages: reading and writing packs.
//! * `request_consumers`, `inbound`, `saturation`: what comes in, and how much of it.
//! * `suspects`: requests that workers may die of.
//! * `outbox`, `prepare_batcher`, `parking`: what goes out.
//! * `searches`: looking for services.
//! * `clocks`: whether this worker's clock fits those of the others.
//! * `namesakes`: whether another worker has this one's name.
//! * `anomalies`: what is said of what is unusual.

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
    session::{End, Session, SessionError, open_replies},
    state::WorkerState,
    suspects::Tries,
};
use crate::{
    clock::Clock,
    error::Chain,
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

/// Who a worker is, and what it works with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The broker.
    pub broker: Broker,
    /// What everything is called there.
    pub names: Names,
    /// How patient it is, and how much it takes on; and its id, which no other worker may have.
    pub coordinator: coordinator::Settings,
    /// How long it may go on finishing what it has begun when it is told to stop.
    pub drain: Duration,
    /// Is told whether the worker takes requests.
    pub readiness: Readiness,
}

impl Settings {
    /// How long it drains, unless that is set.
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

/// What a worker has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Tally {
    /// Requests taken, repeated deliveries included.
    pub taken: u64,
    /// Results told of committed transactions.
    pub committed: u64,
    /// Results told of aborted ones.
    pub aborted: u64,
    /// Messages set aside.
    pub rejected: u64,
    /// Matters handed to a person.
    pub parked: u64,
    /// Results for which nobody has a queue.
    pub unclaimed: u64,
    /// How often the connection was lost.
    pub lost: u64,
}

impl Tally {
    fn count(&mut self, answer: &Answer) {
        match answer.outcome {
            Outcome::Committed => self.committed += 1,
            Outcome::Aborted => self.aborted += 1,
        }
    }
}

/// A worker can't work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// A value that was set can't be used.
    #[error("invalid worker")]
    Invalid(#[from] InvalidSetting),
    /// The broker doesn't let it in.
    #[error("the broker refuses this worker")]
    Refused(#[source] BrokerError),
    /// The broker doesn't let it do what a worker does.
    #[error("the broker does not permit what a worker does")]
    NotPermitted(#[source] BrokerError),
}

/// Works until `stop` has ended, and then finishes what it has begun. A broker that is gone is
/// waited for.
///
/// # Errors
///
/// The broker refuses it, and has never let it work.
pub async fn run(settings: Settings, stop: impl Future<Output = ()>) -> Result<Tally, WorkerError> {
    let span = span(settings.worker());
    run_in_span(settings, stop).instrument(span).await
}

/// The span of all that a worker logs. Its level is ERROR: whatever level is logged, no line lacks the
/// worker's name.
pub(crate) fn span(worker: &WorkerId) -> Span {
    tracing::error_span!("work", %worker)
}

/// [`run`] for a caller that is in the worker's [`span`].
pub(crate) async fn run_in_span(
    settings: Settings,
    stop: impl Future<Output = ()>,
) -> Result<Tally, WorkerError> {
    let _held = settings.readiness.while_held();
    let stop = Box::pin(stop).shared();
    let coordinator = Coordinator::new(settings.coordinator.clone());
    let clock = Clock::start();
    let clocks = Clocks::new(settings.worker().clone(), settings.coordinator.clock_margin);
    let tally = Tally::default();
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
        tally,
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
                        Err(error) => Failure::Session(error),
                    }
                }
                Err(failure) => failure,
            },
            () = stop.clone() => return Ok(state.tally),
        };
        if !supervisor.has_worked()
            && let Some(error) = failure.refusal()
        {
            return Err(error);
        }
        failure.log(&settings, &mut supervisor);
        if failure.is_of_clock() {
            // What was read by a wrong clock is read anew.
            state.last_read = None;
        } else {
            state.tally.lost += u64::from(supervisor.has_worked());
        }
        state.coordinator.handle(state.clock.now(), Event::Disconnected, &mut Vec::new());
        tokio::select! {
            () = tokio::time::sleep(supervisor.pause()) => {}
            () = stop.clone() => return Ok(state.tally),
        }
    }
}

async fn open<'a>(
    settings: &'a Settings,
    state: &'a mut WorkerState,
) -> Result<Session<'a>, Failure> {
    let replies = |link| async move {
        let replies = open_replies(settings, &link).await?;
        Ok((link, replies))
    };
    let is_final = |failure: &Failure| failure.refusal().is_some();
    let (link, replies) = settings.broker.link_with(replies, is_final).await?;
    Session::open(settings, state, link, replies).await.map_err(Failure::Session)
}

fn ended(end: &End, state: &WorkerState) -> Tally {
    match end {
        End::Drained => tracing::info!("drained: nothing is left behind"),
        End::DrainTimedOut => tracing::warn!(
            in_flight = state.coordinator.len(),
            "the time to drain is over: what is in flight goes to other workers"
        ),
        End::WithoutJournal => tracing::warn!(
            in_flight = state.coordinator.len(),
            "stopping while the journal is gone: what is in flight goes to other workers"
        ),
    }
    state.tally
}

/// What waiting won't help against.
fn final_error(cause: impl std::error::Error + Send + Sync + 'static) -> BrokerError {
    BrokerError::new(cause, Disposition::GiveUp)
}

/// Why there is no link, or no longer.
enum Failure {
    Connect(ConnectionError),
    Session(SessionError),
}

impl From<ConnectionError> for Failure {
    fn from(error: ConnectionError) -> Self {
        Self::Connect(error)
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        Self::Session(error)
    }
}

impl Failure {
    /// What this means for a worker that has never worked, if waiting won't help.
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

    /// Whether the link was given up since the clock is off, or was set.
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
                    error = %Chain(error), margin = ?settings.coordinator.clock_margin,
                    "not ready until the clocks fit: this worker would take requests for ones from \
                     the future, or make records that are. Set the clock of this machine \
                     (`timedatectl` shows whether it is kept right), or of those named"
                );
            }
            Self::Session(error @ SessionError::ClockStillOff) => {
                tracing::debug!(error = %Chain(error), "not ready; comparing again");
            }
            Self::Session(error @ SessionError::ClockSet(_)) => {
                tracing::warn!(error = %Chain(error), "starting over by the new time");
            }
            Self::Connect(error) => {
                tracing::warn!(error = %Chain(error), "no broker yet; trying again");
            }
            Self::Session(error) if error.is_missing() => {
                let namespace = settings.names.namespace();
                match supervisor.is_missing_for_good() {
                    true => tracing::error!(
                        error = %Chain(error), %namespace,
                        "the topology is not there: run `dtc topology apply`; trying again"
                    ),
                    false => tracing::warn!(
                        error = %Chain(error), %namespace,
                        "something of the topology is not there, as while a broker starts; trying \
                         again"
                    ),
                }
            }
            Self::Session(error) => {
                tracing::warn!(error = %Chain(error), "the link is lost; connecting again");
            }
        }
    }
}
