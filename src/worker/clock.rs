//! The one clock of a process.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use crate::protocol::time::Time;

/// Tells the time: the machine's wall clock when it was made, and from then on steadily forward,
/// whatever happens to the wall clock.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    started_at: Time,
    started: Instant,
}

impl Clock {
    /// A clock set by the machine's wall clock.
    #[expect(clippy::disallowed_methods, reason = "this is the one clock that all others ask")]
    pub fn start() -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let millis = u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX);
        Self { started_at: Time::from_millis(millis), started: Instant::now() }
    }

    /// The moment it is now.
    pub fn now(&self) -> Time {
        self.started_at + self.started.elapsed()
    }

    /// How long this clock has been running, finer than [`Clock::now`] tells.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// When to be woken for `moment`.
    pub fn instant_of(&self, moment: Time) -> Instant {
        self.started + moment.since(self.started_at)
    }
}
