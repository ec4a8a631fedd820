//! The one clock of a process.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use crate::protocol::time::Time;

/// Tells the time: the machine's wall clock when it was made, and from then on steadily forward,
/// whatever happens to the wall clock.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    started_at: Time,
    since_epoch: Duration,
    started: Instant,
}

/// What a [`Clock`] shows.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    /// The moment.
    pub time: Time,
    /// How long the clock has been running.
    pub elapsed: Duration,
}

impl Clock {
    /// A clock set by the machine's wall clock.
    #[expect(clippy::disallowed_methods, reason = "this is the one clock that all others ask")]
    pub fn start() -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let millis = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
        let started_at = Time::from_millis(millis);
        Self { started_at, since_epoch, started: Instant::now() }
    }

    /// The same clock, put forward to `moment` if it shows an earlier one.
    #[must_use]
    pub fn not_before(self, moment: Time) -> Self {
        Self { started_at: self.started_at.max(moment), ..self }
    }

    /// How long the epoch is past, as finely as the machine tells.
    pub fn since_epoch(&self) -> Duration {
        self.since_epoch + self.started.elapsed()
    }

    /// The moment it is now.
    pub fn now(&self) -> Time {
        self.read().time
    }

    /// The moment it is now, and finer than [`Time`] tells.
    pub fn read(&self) -> Reading {
        let elapsed = self.started.elapsed();
        Reading { time: self.started_at + elapsed, elapsed }
    }

    /// When to be woken for `moment`.
    pub fn instant_of(&self, moment: Time) -> Instant {
        self.started + moment.since(self.started_at)
    }
}
