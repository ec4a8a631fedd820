//! Why the work over a link can't go on.

use crate::{
    clock::ClockStep,
    transport::amqp::{
        bounded::AskError, consumer::ConsumerError, error::is_not_found,
        exclusive_queue::ExclusiveQueueError, publisher::PublisherError,
    },
    worker::{clocks::Off, follower::FollowError, journal::ReadError},
};

/// The work over a link can't go on.
#[derive(Debug, thiserror::Error)]
pub(in crate::worker) enum SessionError {
    #[error("failed to open {what}")]
    Open {
        what: &'static str,
        #[source]
        source: AskError,
    },
    #[error("failed to open the queue for replies")]
    Replies(#[source] Box<ExclusiveQueueError>),
    #[error("lost a queue")]
    Closed(#[source] ConsumerError),
    #[error(transparent)]
    Journal(#[from] FollowError),
    #[error(transparent)]
    Lane(#[from] PublisherError),
    #[error("lost the connection")]
    Lost(#[source] lapin::Error),
    #[error("the broker takes messages again, but did not unblock this connection after an alarm")]
    Stale,
    #[error("this worker's clock is {0}")]
    ClockOff(Off),
    #[error("this worker's clock still doesn't fit that of the broker")]
    ClockStillOff,
    #[error("{}", describe(*.0))]
    ClockSet(ClockStep),
}

/// What has happened to the clock.
pub(super) fn describe(step: ClockStep) -> String {
    match step {
        ClockStep::Back(by) => format!("the clock was set back by {:.1} s", by.as_secs_f64()),
        ClockStep::Forward(by) => {
            let by = by.as_secs_f64();
            format!("the clock was set forward by {by:.1} s, or the machine was suspended")
        }
    }
}

impl SessionError {
    /// Whether something that `dtc topology apply` makes is not there.
    pub(in crate::worker) fn is_missing(&self) -> bool {
        matches!(self, Self::Journal(FollowError::Read(ReadError::Missing(_))))
            || self.broker_error().is_some_and(is_not_found)
    }

    /// What the broker said, if it was the broker.
    pub(in crate::worker) fn broker_error(&self) -> Option<&lapin::Error> {
        match self {
            Self::Lost(source) => Some(source),
            Self::Open { source, .. } => source.broker(),
            Self::Replies(error) => error.source_error().broker(),
            Self::Lane(error) => error.broker(),
            Self::Closed(closed) | Self::Journal(FollowError::Closed(closed)) => closed.broker(),
            Self::Journal(FollowError::Read(error)) => error.broker(),
            Self::Journal(FollowError::OtherJournal)
            | Self::Stale
            | Self::ClockOff(_)
            | Self::ClockStillOff
            | Self::ClockSet(_) => None,
        }
    }
}

/// An error of opening `what`.
pub(super) fn opening(what: &'static str) -> impl FnOnce(AskError) -> SessionError {
    move |source| SessionError::Open { what, source }
}
