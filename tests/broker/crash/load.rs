//! A producer at work: so many transactions per second, with a wait for each result.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use dtc::{Client, Outcome, Transaction, TransactionResult};
use serde_json::json;
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{Instant, MissedTickBehavior, interval},
};

use super::{PATIENCE, System, until};

/// What to submit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) services: &'static [&'static str],
    pub(super) total: usize,
    pub(super) per_second: u32,
    pub(super) timeout: Option<Duration>,
}

/// A running producer.
pub(super) struct Load<'a> {
    system: &'a System,
    total: usize,
    ended: Arc<AtomicUsize>,
    sent: Arc<AtomicUsize>,
    task: JoinHandle<Vec<TimedResult>>,
}

/// The result of one transaction.
#[derive(Debug)]
pub(super) struct TimedResult {
    pub(super) id: String,
    sent_at: Instant,
    told_at: Instant,
    pub(super) answer: TransactionResult,
}

/// All results.
#[derive(Debug)]
pub(super) struct Results(pub(super) Vec<TimedResult>);

impl<'a> Load<'a> {
    /// Starts; the ids are `<prefix>-<number>`.
    pub(super) fn start(system: &'a System, prefix: &'static str, plan: Plan) -> Self {
        let (ended, sent) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let client = system.client();
        let task = system.runtime.spawn(produce(
            client,
            prefix,
            plan,
            Arc::clone(&sent),
            Arc::clone(&ended),
        ));
        Self { system, total: plan.total, ended, sent, task }
    }

    /// Waits until so many have ended.
    #[track_caller]
    pub(super) fn wait_for(&self, number: usize) {
        let what = format!("{number} of {} have ended", self.total);
        until(&what, || self.ended.load(Ordering::Relaxed) >= number);
    }

    /// How many were sent and have not ended.
    pub(super) fn in_flight(&self) -> usize {
        self.sent.load(Ordering::Relaxed).saturating_sub(self.ended.load(Ordering::Relaxed))
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed) >= self.total
    }

    /// Waits until all have ended.
    #[track_caller]
    pub(super) fn results(self) -> Results {
        let Self { system, total, task, .. } = self;
        let told = system.runtime.block_on(task).expect("a transaction has no answer");
        assert_eq!(told.len(), total);
        Results(told)
    }
}

async fn produce(
    client: Client,
    prefix: &'static str,
    plan: Plan,
    sent: Arc<AtomicUsize>,
    ended: Arc<AtomicUsize>,
) -> Vec<TimedResult> {
    let mut ticks = interval(Duration::from_secs(1) / plan.per_second);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut waiting = JoinSet::new();
    for number in 0..plan.total {
        ticks.tick().await;
        let (client, ended) = (client.clone(), Arc::clone(&ended));
        sent.fetch_add(1, Ordering::Relaxed);
        waiting.spawn(async move {
            let id = format!("{prefix}-{number}");
            let services = plan.services.iter().copied();
            let mut transaction = Transaction::new(id.clone(), services, json!({"number": number}));
            if let Some(timeout) = plan.timeout {
                transaction = transaction.timeout(timeout);
            }
            let sent_at = Instant::now();
            let answer = client.submit_and_wait(transaction, PATIENCE).await.unwrap();
            ended.fetch_add(1, Ordering::Relaxed);
            TimedResult { id, sent_at, told_at: Instant::now(), answer }
        });
    }
    let told = waiting.join_all().await;
    client.close().await;
    told
}

impl Results {
    /// The ids of those that committed.
    pub(super) fn committed(&self) -> BTreeSet<String> {
        let committed = self.0.iter().filter(|it| it.answer.outcome == Outcome::Committed);
        committed.map(|it| it.id.clone()).collect()
    }

    /// How many there are of each kind of result, by reason.
    pub(super) fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for TimedResult { answer, .. } in &self.0 {
            let reason = answer.reason.as_ref();
            let word = reason.map_or_else(|| answer.outcome.to_string(), |it| it.code.to_string());
            *counts.entry(word).or_default() += 1;
        }
        counts
    }

    /// How long each took, the shortest first.
    pub(super) fn latencies(&self) -> Vec<Duration> {
        let mut all: Vec<_> = self.0.iter().map(|it| it.told_at - it.sent_at).collect();
        all.sort_unstable();
        all
    }

    /// How long after `moment` the transactions ended that were in flight then, the shortest first.
    pub(super) fn in_flight_at(&self, moment: Instant) -> Vec<Duration> {
        let in_flight = self.0.iter().filter(|it| it.sent_at < moment && it.told_at > moment);
        let mut after: Vec<_> = in_flight.map(|it| it.told_at - moment).collect();
        after.sort_unstable();
        after
    }
}

/// A percentile of `sorted`.
pub(super) fn percentile(sorted: &[Duration], of_hundred: usize) -> Duration {
    let rank = (sorted.len() * of_hundred).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}
