//! Why a session ends before the worker stops.

use crate::{
    clock::ClockStep,
    transport::amqp::{
        bounded::AskError, consumer::ConsumerError, error::is_not_found,
        exclusive_queue::ExclusiveQueueError, publisher::PublisherError,
    },
    worker::{clocks::ClockSkew, follower::FollowError, journal::ReadError},
};

/// The session can't continue.
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
    #[error("the broker's alarm is over, but it did not unblock this connection")]
    Stale,
    #[error("this worker's clock is {0}")]
    ClockOff(ClockSkew),
    #[error("this worker's clock still doesn't fit that of the broker")]
    ClockStillOff,
    #[error("{}", describe(*.0))]
    ClockSet(ClockStep),
}

/// A step of the clock, in words.
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
    /// Whether a queue or an exchange of the topology is missing.
    pub(in crate::worker) fn is_missing(&self) -> bool {
        matches!(self, Self::Journal(FollowError::Read(ReadError::Missing(_))))
            || self.broker_error().is_some_and(is_not_found)
    }

    /// The broker's reason, if it gave one.
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
