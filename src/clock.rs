//! The one clock of a process.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use crate::protocol::time::Time;

/// Smaller steps of the wall clock are ignored.
const STEP_MIN: Duration = Duration::from_secs(1);

/// How far apart two readings may be to count as simultaneous, and how often to try.
const SIMULTANEOUS: Duration = Duration::from_millis(100);
const READINGS_MAX: u32 = 10;

/// A clock.
///
/// It shows the machine's wall clock at that moment, not what that would have shown if nobody had
/// set it and the machine had never been suspended. So it may go backwards: see
/// [`ClockStepDetector`]. A [`Clock::steady`] one doesn't.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    started_at: Time,
    since_epoch: Duration,
    started: Instant,
    is_steady: bool,
}

/// A reading of a [`Clock`].
#[derive(Debug, Clone, Copy)]
pub struct ClockReading {
    /// The time.
    pub time: Time,
    /// How long the clock has been running, whatever the wall clock has shown since.
    pub elapsed: Duration,
}

impl Clock {
    /// A clock that follows the machine's wall clock.
    pub fn start() -> Self {
        let since_epoch = since_epoch();
        let started_at = time_at(since_epoch);
        Self { started_at, since_epoch, started: Instant::now(), is_steady: false }
    }

    /// A clock that starts from the wall clock's current time and never jumps, whatever happens to
    /// the wall clock: for times that nobody compares with another clock's.
    pub fn steady() -> Self {
        Self { is_steady: true, ..Self::start() }
    }

    /// The same steady clock, advanced to `moment` if it shows an earlier one.
    #[must_use]
    pub fn not_before(self, moment: Time) -> Self {
        Self { started_at: self.started_at.max(moment), ..self }
    }

    /// The time since the epoch, as precisely as the machine has it. It never goes backwards.
    pub fn since_epoch(&self) -> Duration {
        self.since_epoch + self.started.elapsed()
    }

    /// The current time.
    pub fn now(&self) -> Time {
        self.read().time
    }

    /// The current time, and the monotonic time to a higher precision than [`Time`] has.
    pub fn read(&self) -> ClockReading {
        let elapsed = self.started.elapsed();
        let time = if self.is_steady { self.started_at + elapsed } else { time_at(since_epoch()) };
        ClockReading { time, elapsed }
    }

    /// The same, with both parts from the same moment: if the process is frozen between the two
    /// readings, it repeats them.
    fn read_consistently(&self) -> ClockReading {
        let mut reading = self.read();
        for _ in 0..READINGS_MAX {
            if self.started.elapsed().saturating_sub(reading.elapsed) < SIMULTANEOUS {
                break;
            }
            reading = self.read();
        }
        reading
    }

    /// The instant at which `moment` will be reached.
    pub fn instant_of(&self, moment: Time) -> Instant {
        let ClockReading { time, elapsed } = self.read();
        self.started + elapsed + moment.since(time)
    }
}

#[expect(clippy::disallowed_methods, reason = "this is the one clock that all others ask")]
fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn time_at(since_epoch: Duration) -> Time {
    Time::from_millis(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
}

/// A jump of the wall clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockStep {
    /// It was set back by that much.
    Back(Duration),
    /// It was set forward by that much, or the machine was suspended for that long.
    Forward(Duration),
}

/// Detects when the clock is set, or the machine was suspended.
#[derive(Debug, Clone, Copy)]
pub struct ClockStepDetector(ClockReading);

impl ClockStepDetector {
    /// Detects steps of `clock` from now on.
    pub fn of(clock: &Clock) -> Self {
        Self(clock.read_consistently())
    }

    /// Whether `clock` has jumped by a second or more since the last call.
    pub fn check(&mut self, clock: &Clock) -> Option<ClockStep> {
        self.observe(clock.read_consistently())
    }

    fn observe(&mut self, reading: ClockReading) -> Option<ClockStep> {
        let before = std::mem::replace(&mut self.0, reading);
        let expected = before.time + reading.elapsed.saturating_sub(before.elapsed);
        let step = match reading.time < expected {
            true => ClockStep::Back(expected.since(reading.time)),
            false => ClockStep::Forward(reading.time.since(expected)),
        };
        let (ClockStep::Back(by) | ClockStep::Forward(by)) = step;
        (by >= STEP_MIN).then_some(step)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{ClockReading, ClockStep, ClockStepDetector};
    use crate::protocol::time::Time;

    fn shown(time_ms: u64, elapsed_ms: u64) -> ClockReading {
        let (time, elapsed) = (Time::from_millis(time_ms), Duration::from_millis(elapsed_ms));
        ClockReading { time, elapsed }
    }

    #[test]
    fn a_clock_that_was_set_is_noticed_once_and_one_that_drifts_is_not() {
        let mut steps = ClockStepDetector(shown(1_000_000, 0));
        assert_eq!(steps.observe(shown(1_005_000, 5000)), None);
        assert_eq!(steps.observe(shown(1_010_100, 10_000)), None, "it goes a little fast");
        let back = ClockStep::Back(Duration::from_millis(30_100));
        assert_eq!(steps.observe(shown(981_000, 11_000)), Some(back));
        assert_eq!(steps.observe(shown(982_000, 12_000)), None);
        let forward = ClockStep::Forward(Duration::from_secs(600));
        assert_eq!(steps.observe(shown(1_583_000, 13_000)), Some(forward), "suspended");
        assert_eq!(steps.observe(shown(1_584_000, 14_000)), None);
    }
}
