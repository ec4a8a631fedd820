//! What is to be said of a run when it is over.

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
    /// Nobody was called for it.
    pub(super) fn at_once(answer: Answer) -> Self {
        Self { answer, attempts: BTreeMap::new(), took: Duration::ZERO }
    }
}

/// How a run went.
#[derive(Debug, Clone)]
pub struct Report {
    /// Transactions that committed.
    pub committed: u64,
    /// Transactions that aborted.
    pub aborted: u64,
    /// Committed transactions of which a service's commit is parked.
    pub unresolved: u64,
    /// From the first request to the last result.
    pub took: Duration,
    /// Each service, in the order in which they were given.
    pub services: Vec<ServiceReport>,
    latencies: Latencies,
    /// Why transactions aborted, and how many.
    causes: BTreeMap<Cause, u64>,
}

/// The word for why a transaction aborted, and the service it happened at.
type Cause = (&'static str, Option<ServiceName>);

/// How many causes are told apart by their service: a stream may name any number of services that
/// don't exist.
const CAUSES_MAX: usize = 256;

/// How a run went for one service.
#[derive(Debug, Clone)]
pub struct ServiceReport {
    /// The service.
    pub name: ServiceName,
    /// How often its code was called.
    pub calls: CallCounts,
    /// The most slots that were in use at once.
    pub max_in_use: u32,
    /// The slots it has.
    pub max_concurrency: u32,
    /// The longest time that a prepare has waited for a slot in the service's queue; `None` where
    /// nobody sees how long they wait.
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

    /// Why transactions aborted, the most frequent cause first: its word, the service it happened at,
    /// and how many.
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

    /// The time from taking in a request to its result that `percent` of the transactions kept to;
    /// exact to 0.1 %. Zero if there were none.
    pub fn percentile(&self, percent: f64) -> Duration {
        self.latencies.percentile(percent)
    }
}

/// How long transactions took, exact to 0.1 %.
#[derive(Debug, Clone)]
pub(crate) struct Latencies(Option<Histogram<u64>>);

impl Latencies {
    pub(crate) fn new() -> Self {
        // A day, in microseconds: nothing in flight takes longer.
        Self(Histogram::new_with_bounds(1, 86_400_000_000, 3).ok())
    }

    pub(crate) fn record(&mut self, took: Duration) {
        if let Some(histogram) = &mut self.0 {
            histogram.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        }
    }

    pub(crate) fn percentile(&self, percent: f64) -> Duration {
        let micros = self.0.as_ref().map_or(0, |it| it.value_at_percentile(percent));
        Duration::from_micros(micros)
    }
}
