//! The report of a run.

use std::{collections::BTreeMap, time::Duration};

use hdrhistogram::Histogram;

use crate::{
    protocol::{
        ids::ServiceName,
        message::{Answer, Outcome},
    },
    wire::result::Attempts,
};

/// How often a service's code was called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CallCounts {
    /// Calls of its prepare.
    pub prepare: u64,
    /// Calls of its commit.
    pub commit: u64,
    /// Calls of its abort.
    pub abort: u64,
}

/// A transaction that has ended.
#[derive(Debug)]
pub(crate) struct Concluded {
    pub(crate) answer: Answer,
    #[cfg_attr(not(feature = "cli"), expect(dead_code, reason = "`dtc run` alone shows them"))]
    pub(crate) attempts: BTreeMap<ServiceName, Attempts>,
    pub(crate) took: Duration,
}

impl Concluded {
    /// A transaction for which no service was called.
    pub(super) fn at_once(answer: Answer) -> Self {
        Self { answer, attempts: BTreeMap::new(), took: Duration::ZERO }
    }
}

/// The report of a run.
#[derive(Debug, Clone)]
pub struct Report {
    /// The number of committed transactions.
    pub committed: u64,
    /// The number of aborted transactions.
    pub aborted: u64,
    /// The number of committed transactions with a parked commit.
    pub unresolved: u64,
    /// The time from the first request to the last result.
    pub took: Duration,
    /// The services, in the order in which they were given.
    pub services: Vec<ServiceReport>,
    latencies: Latencies,
    /// The number of aborted transactions by cause.
    causes: BTreeMap<Cause, u64>,
}

/// The reason code of an abort, and the service that caused it.
type Cause = (&'static str, Option<ServiceName>);

/// How many causes are counted by service: a stream may name any number of services that don't exist.
const CAUSES_MAX: usize = 256;

/// The report of one service.
#[derive(Debug, Clone)]
pub struct ServiceReport {
    /// The service.
    pub name: ServiceName,
    /// The calls of its code.
    pub calls: CallCounts,
    /// The maximum number of slots in use at once.
    pub max_in_use: u32,
    /// The number of its slots.
    pub max_concurrency: u32,
    /// The longest time that a prepare has waited for a slot; `None` if that is not measured.
    pub longest_wait: Option<Duration>,
}

impl Report {
    pub(crate) fn new() -> Self {
        Self {
            committed: 0,
            aborted: 0,
            unresolved: 0,
            took: Duration::ZERO,
            services: Vec::new(),
            latencies: Latencies::new(),
            causes: BTreeMap::new(),
        }
    }

    pub(crate) fn count(&mut self, concluded: &Concluded) {
        match concluded.answer.outcome {
            Outcome::Committed => self.committed += 1,
            Outcome::Aborted => self.aborted += 1,
        }
        self.unresolved += u64::from(!concluded.answer.unresolved.is_empty());
        self.latencies.record(concluded.took);
        if let Some(reason) = &concluded.answer.reason {
            let mut cause = (reason.code.as_str(), reason.service.clone());
            if self.causes.len() >= CAUSES_MAX && !self.causes.contains_key(&cause) {
                cause.1 = None;
            }
            *self.causes.entry(cause).or_default() += 1;
        }
    }

    /// The causes of aborts, the most frequent first: the reason code, the service, and the number.
    #[cfg(feature = "cli")]
    pub(crate) fn causes(&self) -> Vec<(&'static str, Option<&ServiceName>, u64)> {
        let causes = self.causes.iter().map(|((word, at), count)| (*word, at.as_ref(), *count));
        let mut causes: Vec<_> = causes.collect();
        causes.sort_by_key(|(.., count)| std::cmp::Reverse(*count));
        causes
    }

    /// Transactions per second.
    pub fn rate(&self) -> f64 {
        let seconds = self.took.as_secs_f64();
        let ended = self.committed + self.aborted;
        if seconds > 0.0 { ended as f64 / seconds } else { 0.0 }
    }

    /// The latency percentile: `percent` of the transactions took at most this long from request to
    /// result; exact to 0.1 %. Zero if there were none.
    pub fn percentile(&self, percent: f64) -> Duration {
        self.latencies.percentile(percent)
    }
}

/// The latencies of transactions, exact to 0.1 %.
#[derive(Debug, Clone)]
pub(crate) struct Latencies(Option<Histogram<u64>>);

impl Latencies {
    pub(crate) fn new() -> Self {
        // A day in microseconds; longer ones count as a day.
        Self(Histogram::new_with_bounds(1, 86_400_000_000, 3).ok())
    }

    pub(crate) fn record(&mut self, took: Duration) {
        if let Some(histogram) = &mut self.0 {
            histogram.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        }
    }

    pub(crate) fn percentile(&self, percent: f64) -> Duration {
        let micros = self.0.as_ref().map_or(0, |histogram| histogram.value_at_percentile(percent));
        Duration::from_micros(micros)
    }
}
