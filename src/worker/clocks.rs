//! Decides whether this worker's clock fits the other clocks of the system.
//!
//! A worker whose clock is behind by more than the margin takes every request for one from the future; a
//! worker whose clock is ahead writes records from the future. A worker can't see that by itself, but it
//! learns of other clocks: of other workers' clocks from their records in the journal, of producers'
//! clocks from their requests, and of the broker's clock by asking.
//!
//! **No other clock decides alone.** Each other worker, all producers together, the broker, and this
//! worker itself have one vote. This clock is wrong only if more votes are against it than for it. So a
//! producer or a worker with a wrong clock stops no other worker. The worker asks the broker only when
//! another vote is against its clock.
//!
//! A message that comes late makes its sender's clock look further behind than it is. So only a message
//! from the future proves anything by itself, and this clock counts as ahead only if the broker agrees.

use std::{collections::BTreeMap, fmt, time::Duration};

use crate::{
    clock::ClockReading,
    protocol::{ids::WorkerId, message::Decision, time::Time},
};

/// For how long a message from another process counts.
const HEARD_FOR: Duration = Duration::from_secs(60);

/// For how long the broker's answer counts.
const TOLD_FOR: Duration = Duration::from_secs(10);

/// How many other workers' clocks to remember.
const WORKERS_MAX: usize = 64;

/// This worker's clock, compared with another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ClockComparison {
    Behind,
    Fits,
    Ahead,
}

/// What another clock showed, according to a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct ClockSample {
    shown: Time,
    /// When the message came, by the monotonic clock.
    at: Duration,
    /// Whether the message may be old.
    is_old: bool,
}

impl ClockSample {
    fn counts(&self, now: ClockReading) -> bool {
        now.elapsed.saturating_sub(self.at) <= HEARD_FOR
    }

    /// What that clock shows now, if the message came without delay.
    fn shows(&self, now: ClockReading) -> Time {
        self.shown + now.elapsed.saturating_sub(self.at)
    }

    fn standing(&self, now: ClockReading, margin: Duration) -> Option<ClockComparison> {
        let shows = self.shows(now);
        if shows > now.time + margin {
            return Some(ClockComparison::Behind);
        }
        match shows + margin < now.time {
            _ if self.is_old => None,
            true => Some(ClockComparison::Ahead),
            false => Some(ClockComparison::Fits),
        }
    }
}

/// How far this worker's clock is off.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct ClockSkew {
    is_behind: bool,
    /// By how much at least.
    by: Duration,
    /// Whose clocks are against it.
    witnesses: Vec<String>,
}

impl fmt::Display for ClockSkew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let which = if self.is_behind { "behind" } else { "ahead of" };
        let by = self.by.as_secs();
        write!(f, "{which} the clock of {} by {by} s or more", self.witnesses.join(", of "))
    }
}

/// What is known of the other clocks.
#[derive(Debug)]
pub(super) struct Clocks {
    worker: WorkerId,
    margin: Duration,
    workers: BTreeMap<WorkerId, ClockSample>,
    /// The latest request that fits, and the latest one from the future.
    fitting: Option<ClockSample>,
    future: Option<ClockSample>,
    /// The broker's answer, if it gave one, and when.
    broker: Option<(Option<ClockComparison>, Duration)>,
    /// Whether this clock was found to be off, and has not fitted the broker's clock since.
    is_off: bool,
}

impl Clocks {
    /// For `worker`. No two clocks of its system may differ by more than `margin`.
    pub(super) fn new(worker: WorkerId, margin: Duration) -> Self {
        Self {
            worker,
            margin,
            workers: BTreeMap::new(),
            fitting: None,
            future: None,
            broker: None,
            is_off: false,
        }
    }

    /// Takes in a record that is older than this process. Its worker counts as another one, even if it
    /// has the same name.
    pub(super) fn past_record(&mut self, now: ClockReading, record: &Decision) {
        // Other old records prove nothing.
        if record.decided_at > now.time + self.margin {
            self.hear_worker(now, record, true);
        }
    }

    /// Takes in a record from the journal's end.
    pub(super) fn record(&mut self, now: ClockReading, record: &Decision) {
        if record.worker != self.worker {
            self.hear_worker(now, record, false);
        }
    }

    fn hear_worker(&mut self, now: ClockReading, record: &Decision, is_old: bool) {
        let heard = ClockSample { shown: record.decided_at, at: now.elapsed, is_old };
        if let Some(known) = self.workers.get_mut(&record.worker) {
            *known = heard;
            return;
        }
        if self.workers.len() >= WORKERS_MAX {
            let oldest = self.workers.iter().min_by_key(|(_, heard)| heard.at);
            if let Some(oldest) = oldest.map(|(worker, _)| worker.clone()) {
                self.workers.remove(&oldest);
            }
        }
        self.workers.insert(record.worker.clone(), heard);
    }

    /// Takes in the timestamp of a request. Returns whether it is from the future.
    pub(super) fn request(&mut self, now: ClockReading, requested_at: Time) -> bool {
        let heard = ClockSample { shown: requested_at, at: now.elapsed, is_old: false };
        match heard.standing(now, self.margin) {
            Some(ClockComparison::Behind) => self.future = Some(heard),
            Some(ClockComparison::Fits) => self.fitting = Some(heard),
            // It has waited in the queue, or is a retry.
            Some(ClockComparison::Ahead) | None => {}
        }
        heard.standing(now, self.margin) == Some(ClockComparison::Behind)
    }

    /// Takes in the broker's answer. `None`: it gave none.
    pub(super) fn broker(&mut self, now: ClockReading, standing: Option<ClockComparison>) {
        self.broker = Some((standing, now.elapsed));
        if standing == Some(ClockComparison::Fits) {
            self.is_off = false;
        }
    }

    /// Whether another clock is against this one, so that the broker should be asked.
    pub(super) fn is_in_doubt(&self, now: ClockReading) -> bool {
        let is_told = self.told(now).is_some();
        let against = |heard: &ClockSample| {
            heard.counts(now)
                && matches!(
                    heard.standing(now, self.margin),
                    Some(ClockComparison::Behind | ClockComparison::Ahead)
                )
        };
        !is_told && (self.workers.values().any(against) || self.future.iter().any(against))
    }

    /// The broker's answer, if it still counts.
    fn told(&self, now: ClockReading) -> Option<Option<ClockComparison>> {
        let (standing, at) = self.broker?;
        (now.elapsed.saturating_sub(at) <= TOLD_FOR).then_some(standing)
    }

    /// Whether this clock was found to be off, and has not fitted the broker's clock since.
    pub(super) fn is_off(&self) -> bool {
        self.is_off
    }

    /// Counts the votes. If this clock is off, it stays off until it fits the broker's.
    pub(super) fn verdict(&mut self, now: ClockReading) -> Option<ClockSkew> {
        let off = self
            .count(now, ClockComparison::Behind)
            .or_else(|| self.count(now, ClockComparison::Ahead));
        self.is_off |= off.is_some();
        off
    }

    /// The broker has delivered nothing of the journal from the moment at which the window begins.
    /// Returns whether that is because the moment is in the future by the broker's clock. Here the
    /// broker's answer decides alone: without the journal the worker can't work in any case.
    pub(super) fn journal_is_silent(&mut self, now: ClockReading) -> Option<ClockSkew> {
        if self.told(now) != Some(Some(ClockComparison::Ahead)) {
            return None;
        }
        self.is_off = true;
        Some(ClockSkew {
            is_behind: false,
            by: self.margin,
            witnesses: vec!["the broker".to_owned()],
        })
    }

    fn count(&self, now: ClockReading, against: ClockComparison) -> Option<ClockSkew> {
        let broker = self.told(now).flatten();
        let (mut n_for, mut by, mut witnesses) = (1, Duration::MAX, Vec::new());
        let heard = self.workers.iter().filter(|(_, heard)| heard.counts(now));
        for (worker, heard) in heard {
            let shows = heard.shows(now);
            match heard.standing(now, self.margin) {
                Some(standing) if standing == against => {
                    by = by.min(shows.since(now.time).max(now.time.since(shows)));
                    witnesses.push(format!("worker {worker}"));
                }
                Some(ClockComparison::Fits) => n_for += 1,
                Some(_) | None => {}
            }
        }
        let fitting = self.fitting.iter().any(|heard| heard.counts(now));
        let future = self.future.filter(|heard| heard.counts(now));
        // If some requests fit and some don't, producers have no vote.
        match future {
            Some(heard) if !fitting && against == ClockComparison::Behind => {
                by = by.min(heard.shows(now).since(now.time));
                witnesses.push("producers".to_owned());
            }
            None if fitting => n_for += 1,
            Some(_) | None => {}
        }
        match broker {
            Some(standing) if standing == against => witnesses.push("the broker".to_owned()),
            _ if against == ClockComparison::Ahead => return None,
            Some(ClockComparison::Fits) => n_for += 1,
            Some(_) | None => {}
        }
        let is_behind = against == ClockComparison::Behind;
        let by = if by == Duration::MAX { self.margin } else { by };
        (witnesses.len() > n_for).then_some(ClockSkew { is_behind, by, witnesses })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{ClockComparison, Clocks, HEARD_FOR, TOLD_FOR};
    use crate::{
        clock::ClockReading,
        protocol::{
            ids::{RequestHash, TransactionId, TransactionKey, WorkerId},
            message::{Decision, Outcome},
            time::Time,
        },
    };

    const NOW: Time = Time::from_millis(1_000_000_000);
    const MARGIN: Duration = Duration::from_secs(60);
    const OFF: Duration = Duration::from_secs(90);

    /// The reading of a correct clock `after` so long.
    fn now(after: Duration) -> ClockReading {
        ClockReading { time: NOW + after, elapsed: after }
    }

    const START: Duration = Duration::ZERO;

    fn clocks() -> Clocks {
        Clocks::new(WorkerId::parse("me").unwrap(), MARGIN)
    }

    fn record(worker: &str, decided_at: Time) -> Decision {
        let id = TransactionId::parse("t1").unwrap();
        Decision {
            key: TransactionKey { id, requested_at: decided_at },
            request_hash: RequestHash([0; 16]),
            outcome: Outcome::Aborted,
            branches: Vec::new(),
            reason: None,
            decided_at,
            worker: WorkerId::parse(worker).unwrap(),
        }
    }

    #[test]
    fn another_worker_and_the_broker_outvote_a_clock_that_is_behind() {
        let mut clocks = clocks();
        assert!(!clocks.is_in_doubt(now(START)));
        clocks.record(now(START), &record("other", NOW + OFF));
        assert!(clocks.is_in_doubt(now(START)));
        assert_eq!(clocks.verdict(now(START)), None, "one against one");
        clocks.broker(now(START), Some(ClockComparison::Behind));
        let off = clocks.verdict(now(START)).unwrap();
        let said = "behind the clock of worker other, of the broker by 90 s or more";
        assert_eq!(off.to_string(), said);
        assert!(clocks.is_off());
    }

    #[test]
    fn producers_and_the_broker_outvote_the_clock_of_the_only_worker() {
        let mut clocks = clocks();
        assert!(clocks.request(now(START), NOW + OFF));
        assert!(clocks.is_in_doubt(now(START)));
        clocks.broker(now(START), Some(ClockComparison::Behind));
        assert!(clocks.verdict(now(START)).is_some());
    }

    #[test]
    fn a_record_from_before_the_start_counts_if_it_is_from_the_future() {
        let mut clocks = clocks();
        clocks.past_record(now(START), &record("other", NOW - OFF * 10));
        assert!(!clocks.is_in_doubt(now(START)), "it was made long ago");
        clocks.past_record(now(START), &record("me", NOW + OFF));
        assert!(clocks.is_in_doubt(now(START)), "an earlier life's");
        clocks.broker(now(START), Some(ClockComparison::Behind));
        assert!(clocks.verdict(now(START)).is_some());
    }

    #[test]
    fn no_clock_decides_alone() {
        let ahead = record("other", NOW + OFF);
        // A wrong producer, or a wrong worker, where the broker's clock fits.
        let mut clocks = clocks();
        clocks.request(now(START), NOW + OFF);
        clocks.broker(now(START), Some(ClockComparison::Fits));
        assert_eq!(clocks.verdict(now(START)), None);
        clocks.record(now(START), &ahead);
        assert_eq!(clocks.verdict(now(START)), None, "a producer and a worker: two against two");

        // Two producers, one with a wrong clock, and a broker that is wrong too.
        let mut clocks = self::clocks();
        clocks.request(now(START), NOW);
        clocks.request(now(START), NOW + OFF);
        clocks.broker(now(START), Some(ClockComparison::Behind));
        assert_eq!(clocks.verdict(now(START)), None);

        // A broker that is wrong, and one worker; the others fit.
        let mut clocks = self::clocks();
        clocks.record(now(START), &ahead);
        clocks.record(now(START), &record("third", NOW));
        clocks.broker(now(START), Some(ClockComparison::Behind));
        assert_eq!(clocks.verdict(now(START)), None);

        // Its own records say nothing new.
        let mut clocks = self::clocks();
        clocks.record(now(START), &record("me", NOW + OFF));
        assert!(!clocks.is_in_doubt(now(START)));
    }

    #[test]
    fn a_clock_counts_as_ahead_only_if_the_broker_agrees() {
        let mut clocks = clocks();
        for worker in ["a", "b", "c"] {
            clocks.record(now(START), &record(worker, NOW - OFF));
        }
        assert!(clocks.is_in_doubt(now(START)));
        clocks.broker(now(START), None);
        assert_eq!(clocks.verdict(now(START)), None);
        clocks.broker(now(START), Some(ClockComparison::Fits));
        assert_eq!(clocks.verdict(now(START)), None);
        clocks.broker(now(START), Some(ClockComparison::Ahead));
        let said = "ahead of the clock of worker a, of worker b, of worker c, of the broker by 90 s \
                    or more";
        assert_eq!(clocks.verdict(now(START)).unwrap().to_string(), said);
    }

    #[test]
    fn the_broker_alone_decides_if_the_journal_delivers_nothing() {
        let mut clocks = clocks();
        assert_eq!(clocks.journal_is_silent(now(START)), None);
        clocks.broker(now(START), Some(ClockComparison::Fits));
        assert_eq!(clocks.journal_is_silent(now(START)), None);
        clocks.broker(now(START), Some(ClockComparison::Ahead));
        assert!(clocks.journal_is_silent(now(START)).is_some() && clocks.is_off());
    }

    #[test]
    fn a_corrected_clock_stays_off_until_the_broker_agrees() {
        let mut clocks = clocks();
        clocks.record(now(START), &record("other", NOW + OFF));
        clocks.broker(now(START), Some(ClockComparison::Behind));
        assert!(clocks.verdict(now(START)).is_some());
        let later = Duration::from_secs(5);
        let right = ClockReading { time: NOW + OFF + later, elapsed: later };
        assert!(clocks.is_off());
        clocks.broker(right, Some(ClockComparison::Fits));
        assert!(!clocks.is_off());
        assert_eq!(clocks.verdict(right), None);
        let much_later = Duration::from_secs(30);
        let right = ClockReading { time: NOW + OFF + much_later, elapsed: much_later };
        assert!(!clocks.is_in_doubt(right));
    }

    #[test]
    fn a_sample_counts_for_a_while_and_the_broker_is_not_asked_again_at_once() {
        let mut clocks = clocks();
        clocks.record(now(START), &record("other", NOW + OFF));
        clocks.broker(now(START), Some(ClockComparison::Fits));
        assert!(!clocks.is_in_doubt(now(TOLD_FOR)));
        let moment = Duration::from_millis(1);
        assert!(clocks.is_in_doubt(now(TOLD_FOR + moment)));
        assert!(!clocks.is_in_doubt(now(HEARD_FOR + moment)));
    }

    #[test]
    fn only_the_newest_samples_of_many_workers_are_remembered() {
        let mut clocks = clocks();
        for number in 0..1000_u64 {
            let at = Duration::from_millis(number);
            clocks.record(now(at), &record(&format!("w{number}"), NOW));
        }
        assert_eq!(clocks.workers.len(), super::WORKERS_MAX);
        assert!(clocks.workers.contains_key(&WorkerId::parse("w999").unwrap()));
    }
}
