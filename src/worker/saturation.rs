//! When a worker takes more requests than it works on, so that those that wait for a full service
//! don't keep out others.

use std::time::Duration;

use tokio::time::Instant;

/// How long most of what is in flight must have been waiting for slots before more requests are
/// taken: longer than a worker needs to learn of its services' slots when it starts.
const SATURATED_FOR: Duration = Duration::from_millis(250);

/// How long nothing must have been waiting before fewer are taken again. The broker takes back what
/// is on its way to a consumer that ends, and that is then looked into as if it had been begun.
const IDLE_FOR: Duration = Duration::from_secs(2);

/// Since when most of what is in flight waits for slots, or nothing does.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Saturation {
    saturated_since: Option<Instant>,
    idle_since: Option<Instant>,
}

/// How many consumers of requests there should be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wanted {
    /// As there are.
    Same,
    /// One more.
    More,
    /// The first alone.
    One,
}

impl Saturation {
    /// So many transactions wait, of so many that may be in flight; there are `consumers` of requests.
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

    /// When to look again though nothing happens.
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
    fn more_are_taken_once_most_have_waited_for_a_while_and_fewer_once_none_has() {
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
