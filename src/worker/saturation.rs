//! Decides when a worker takes more requests than it works on, so that requests that wait for a full
//! service don't keep out others.

use std::time::Duration;

use tokio::time::Instant;

/// How long most transactions must have waited for slots before the worker takes more requests: longer than
/// it needs to learn of its services' slots when it starts.
const SATURATED_FOR: Duration = Duration::from_millis(250);

/// How long no transaction must have waited before the worker takes fewer requests again. When a consumer
/// ends, the broker requeues what is on its way to it, and workers treat such requests as if another worker
/// had begun them.
const IDLE_FOR: Duration = Duration::from_secs(2);

/// Since when most transactions have waited for slots, or none has.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Saturation {
    saturated_since: Option<Instant>,
    idle_since: Option<Instant>,
}

/// How many consumers of requests there should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wanted {
    /// As many as there are.
    Same,
    /// One more.
    More,
    /// Only the first one.
    One,
}

impl Saturation {
    /// `waiting`: how many transactions wait for slots. `consumers`: how many consumers of requests there
    /// are.
    pub(super) fn observe(
        &mut self,
        waiting: usize,
        in_flight_max: usize,
        consumers: usize,
        now: Instant,
    ) -> Wanted {
        let since = |holds: bool, before: Option<Instant>| holds.then(|| before.unwrap_or(now));
        self.saturated_since = since(waiting * 2 > in_flight_max, self.saturated_since);
        self.idle_since = since(waiting == 0, self.idle_since);
        let has_lasted = |since: Option<Instant>, long| since.is_some_and(|it| now - it >= long);
        if consumers == 1 && has_lasted(self.saturated_since, SATURATED_FOR) {
            Wanted::More
        } else if consumers > 1 && has_lasted(self.idle_since, IDLE_FOR) {
            Wanted::One
        } else {
            Wanted::Same
        }
    }

    /// When to observe again even if nothing happens.
    pub(super) fn wake_at(&self, consumers: usize) -> Option<Instant> {
        let saturated = self.saturated_since.filter(|_| consumers == 1);
        saturated.map(|since| since + SATURATED_FOR)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::{IDLE_FOR, SATURATED_FOR, Saturation, Wanted};

    #[test]
    fn more_requests_are_taken_once_most_have_waited_for_a_while_and_fewer_once_none_has() {
        let mut saturation = Saturation::default();
        let start = Instant::now();
        assert_eq!(saturation.observe(129, 256, 1, start), Wanted::Same);
        assert_eq!(saturation.wake_at(1), Some(start + SATURATED_FOR));
        assert_eq!(saturation.observe(129, 256, 1, start + SATURATED_FOR), Wanted::More);
        let later = start + Duration::from_secs(10);
        assert_eq!(saturation.observe(0, 256, 2, later), Wanted::Same);
        assert_eq!(saturation.observe(1, 256, 2, later + IDLE_FOR), Wanted::Same, "one waits");
        assert_eq!(saturation.observe(0, 256, 2, later + IDLE_FOR), Wanted::Same);
        assert_eq!(saturation.observe(0, 256, 2, later + IDLE_FOR * 2), Wanted::One);
    }
}
