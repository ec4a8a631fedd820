//! Submits transactions through a client, many at a time, and waits for each.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use indicatif::ProgressBar;
use tokio::{sync::mpsc, time::Instant};

use crate::{
    cli::{Exit, Failure, moment, output, pipeline::StopSignal},
    client::{Client, SubmitError, WaitError},
    clock::Clock,
    embedded::{Concluded, Report},
    error::ErrorChain,
    input::transactions::Transactions,
    protocol::{
        ids::{ServiceName, TransactionKey},
        message::TransactionSpec,
        time::Time,
    },
    wire::result::Attempts,
};

/// How many of the failed transactions are named.
const NAMED_MAX: usize = 10;

/// Submits transactions, and waits until they are confirmed or answered.
pub(super) struct Sender {
    pub(super) client: Client,
    /// Whether to wait for results.
    pub(super) waits: bool,
    /// How many requests may be without a confirm or, if `waits`, without a result.
    pub(super) in_flight_max: usize,
    /// How long each may take to be confirmed or answered.
    pub(super) timeout: Duration,
    /// The `requested_at` of all requests; `None`: the time at which each is sent.
    pub(super) requested_at: Option<Time>,
    pub(super) clock: Clock,
    pub(super) bar: ProgressBar,
    /// The calls that services got for a transaction, if they are known here.
    pub(super) attempts: Option<Arc<AttemptsOf>>,
    /// How long to wait for sent requests after a stop, if that is less than their time-out.
    pub(super) drain: Option<Duration>,
}

/// The result of a transaction, if the sender waits for it; `None` if it is only confirmed.
type Sending = BoxFuture<'static, (TransactionKey, Result<Option<Concluded>, WaitError>)>;

/// Returns the calls that services got for a transaction that has ended.
pub(super) type AttemptsOf =
    dyn Fn(&TransactionKey) -> BTreeMap<ServiceName, Attempts> + Send + Sync;

/// The results of all transactions.
pub(super) struct SubmitReport {
    n_begun: u64,
    n_ended: u64,
    pub(super) report: Report,
    /// The first ones that failed.
    failed: Vec<TransactionKey>,
    pub(super) n_failed: u64,
    /// The first ones that got the result of an earlier request, under that request's key.
    recalled: Vec<TransactionKey>,
    n_recalled: u64,
    /// The broker's answer to the first one that failed, if it is known.
    cause: Option<String>,
    /// Whether the sender gave up waiting for requests that it had sent.
    pub(super) is_given_up: bool,
    /// Why no more was sent.
    pub(super) fatal: Option<Failure>,
}

impl Sender {
    /// Sends requests until there are no more, or `stop` ends, or sending can't succeed.
    pub(super) async fn serve(
        self,
        mut requests: mpsc::Receiver<Vec<TransactionSpec>>,
        concluded: mpsc::Sender<Vec<Concluded>>,
        mut stop: StopSignal,
    ) -> SubmitReport {
        let mut sent = SubmitReport::new();
        let mut in_flight: FuturesUnordered<Sending> = FuturesUnordered::new();
        let mut backlog = Vec::new().into_iter();
        let mut open = true;
        let mut unsendable = None;
        let mut stopped = false;
        let mut drained_by = None;
        let began_at = self.clock.read().elapsed;
        loop {
            while in_flight.len() < self.in_flight_max
                && let Some(spec) = backlog.next()
            {
                if let Err(error) = self.client.check(&spec) {
                    // Sends no more, and waits for what was sent, as after a line that isn't JSON.
                    unsendable = Some(Failure::new(Exit::BadData, error));
                    open = false;
                    backlog = Vec::new().into_iter();
                    requests.close();
                    break;
                }
                sent.n_begun += 1;
                in_flight.push(self.send(spec));
            }
            if !open && backlog.len() == 0 && in_flight.is_empty() {
                break;
            }
            tokio::select! {
                biased;
                () = &mut stop, if !stopped => {
                    stopped = true;
                    drained_by = self.drain.map(|drain| Instant::now() + drain);
                    open = false;
                    backlog = Vec::new().into_iter();
                    requests.close();
                }
                Some(ended) = in_flight.next() => {
                    let mut results = sent.take(ended);
                    while let Some(Some(ended)) = in_flight.next().now_or_never() {
                        results.extend(sent.take(ended));
                    }
                    sent.report.took = self.clock.read().elapsed.saturating_sub(began_at);
                    if !self.waits {
                        self.bar.set_position(sent.n_ended);
                    }
                    if sent.fatal.is_some() {
                        break;
                    }
                    // If nobody reads the results any more, it doesn't wait for them.
                    if !results.is_empty() && concluded.send(results).await.is_err() {
                        break;
                    }
                }
                () = reached(drained_by) => {
                    sent.is_given_up = true;
                    break;
                }
                batch = requests.recv(), if open && backlog.len() == 0 => match batch {
                    Some(batch) => backlog = batch.into_iter(),
                    None => open = false,
                },
            }
        }
        sent.fatal = sent.fatal.or(unsendable);
        sent
    }

    fn send(&self, spec: TransactionSpec) -> Sending {
        let Self { client, waits, timeout, clock, attempts, .. } = self;
        let (client, waits, timeout, clock) = (client.clone(), *waits, *timeout, *clock);
        let attempts = attempts.clone();
        let requested_at = self.requested_at.unwrap_or_else(|| client.now());
        Box::pin(async move {
            let began_at = clock.read().elapsed;
            let key = TransactionKey { id: spec.id.clone(), requested_at };
            let ended = if waits {
                let answered = client.hand_over_and_wait(&spec, requested_at, timeout).await;
                answered.map(|answer| {
                    let took = clock.read().elapsed.saturating_sub(began_at);
                    let attempts = attempts.map(|of| of(&key)).unwrap_or_default();
                    Some(Concluded { answer, attempts, took })
                })
            } else {
                let submitted = client.hand_over(&spec, requested_at, timeout).await;
                submitted.map(|_| None).map_err(WaitError::from)
            };
            (key, ended)
        })
    }
}

/// A file that is checked as a whole must also fit as a whole: no transaction in it may be too
/// large for a message.
pub(super) fn check_sizes<R>(
    client: &Client,
    transactions: &Transactions<R>,
) -> Result<(), Failure> {
    let Transactions::Array(specs) = transactions else { return Ok(()) };
    let checked = specs.iter().try_for_each(|spec| client.check(spec));
    checked.map_err(|error| Failure::new(Exit::BadData, error))
}

/// Ends at `moment`; never if there is none.
async fn reached(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

impl SubmitReport {
    fn new() -> Self {
        Self {
            n_begun: 0,
            n_ended: 0,
            report: Report::new(),
            failed: Vec::new(),
            n_failed: 0,
            recalled: Vec::new(),
            n_recalled: 0,
            cause: None,
            is_given_up: false,
            fatal: None,
        }
    }

    /// Records the outcome of one transaction, and returns its result, if it has one.
    fn take(
        &mut self,
        (key, ended): (TransactionKey, Result<Option<Concluded>, WaitError>),
    ) -> Vec<Concluded> {
        match ended {
            Ok(concluded) => {
                self.n_ended += 1;
                if let Some(concluded) = &concluded {
                    self.report.count(concluded);
                    self.recall(&key, concluded.answer.requested_at);
                }
                return concluded.into_iter().collect();
            }
            Err(
                WaitError::Unanswered { source, .. }
                | WaitError::Submit(SubmitError::Unconfirmed { source, .. }),
            ) => {
                let cause = source.map(|source| ErrorChain(&source).to_string());
                self.cause = self.cause.take().or(cause);
            }
            Err(error) => {
                if self.fatal.is_none() {
                    self.fatal = Some(Failure::new(exit_for(&error), error));
                }
            }
        }
        self.n_failed += 1;
        if self.failed.len() < NAMED_MAX {
            self.failed.push(key);
        }
        Vec::new()
    }

    /// Records that `key` got the result of the request made at `requested_at`.
    fn recall(&mut self, key: &TransactionKey, requested_at: Time) {
        // A request is identified by the second.
        if requested_at.as_millis() / 1000 == key.requested_at.as_millis() / 1000 {
            return;
        }
        self.n_recalled += 1;
        if self.recalled.len() < NAMED_MAX {
            self.recalled.push(TransactionKey { id: key.id.clone(), requested_at });
        }
    }

    /// The summary, as text.
    pub(super) fn summary(&self, waited: bool) -> String {
        let mut text = if waited {
            output::totals(&self.report)
        } else {
            format!("{} submitted\n", self.n_ended)
        };
        text += &self.before();
        text += &self.missing(waited);
        text
    }

    /// The message about results of earlier requests; empty if there are none. They look like new
    /// results, but tell what was true then: that no instance served a service, for example.
    pub(super) fn before(&self) -> String {
        if self.n_recalled == 0 {
            return String::new();
        }
        let named = self.recalled.iter().map(|key| format!("{} of {}", key.id, shown_at(key)));
        let named: Vec<_> = named.collect();
        let more = if self.n_recalled > named.len() as u64 { ", …" } else { "" };
        format!(
            "{} of {} are results of earlier requests with the same id and content, which the \
             workers remember; nobody was called again: {}{more}. To try again, use new ids\n",
            self.n_recalled,
            self.n_ended,
            named.join(", "),
        )
    }

    /// The message about requests that were not confirmed, or not answered; empty if there are
    /// none.
    pub(super) fn missing(&self, waited: bool) -> String {
        let mut text = String::new();
        let missing = self.n_begun - self.n_ended;
        if missing > 0 {
            let what = if waited { "answered" } else { "confirmed" };
            text += &format!("{missing} of {} not {what}", self.n_begun);
            let named: Vec<_> = self.failed.iter().map(shown).collect();
            if !named.is_empty() {
                let more = if missing > named.len() as u64 { ", …" } else { "" };
                text += &format!(": {}{more}", named.join(", "));
            }
            text.push('\n');
            if let Some(cause) = &self.cause {
                text += &format!("{cause}\n");
            }
        }
        text
    }
}

fn shown_at(key: &TransactionKey) -> String {
    moment::shown(key.requested_at)
}

fn shown(TransactionKey { id, requested_at }: &TransactionKey) -> String {
    format!("{id} (--requested-at {})", requested_at.as_millis() / 1000)
}

/// The exit code for an error after which sending more is useless.
fn exit_for(error: &WaitError) -> Exit {
    match error {
        WaitError::Submit(SubmitError::Invalid(_)) => Exit::BadData,
        WaitError::Submit(SubmitError::NoTopology { .. }) | WaitError::NoTopology { .. } => {
            Exit::BadConfiguration
        }
        WaitError::Submit(SubmitError::Refused { .. }) | WaitError::Listen(_) => Exit::Refused,
        WaitError::Submit(SubmitError::Unconfirmed { .. }) | WaitError::Unanswered { .. } => {
            Exit::Incomplete
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::SubmitReport;
    use crate::{
        embedded::Concluded,
        protocol::{
            ids::{TransactionId, TransactionKey},
            message::{Answer, Outcome},
            time::Time,
        },
    };

    fn answered(sent: &mut SubmitReport, asked: u64, answered: u64) {
        let id = TransactionId::parse("TX1").unwrap();
        let key = TransactionKey { id: id.clone(), requested_at: Time::from_millis(asked) };
        let answer = Answer {
            id,
            requested_at: Time::from_millis(answered),
            outcome: Outcome::Aborted,
            reason: None,
            unresolved: Vec::new(),
            decided_at: Time::from_millis(answered),
        };
        let (attempts, took) = (BTreeMap::new(), Duration::ZERO);
        sent.take((key, Ok(Some(Concluded { answer, attempts, took }))));
    }

    /// A user who had forgotten to start a service started it and submitted the file again. The
    /// result again said that no instance serves it, as if that were still so.
    #[test]
    fn a_result_of_an_earlier_request_is_marked_as_such() {
        let mut sent = SubmitReport::new();
        answered(&mut sent, 90_500, 90_000);
        assert_eq!(sent.before(), "", "a request is of a second");
        answered(&mut sent, 90_500, 60_000);
        assert_eq!(
            sent.before(),
            "1 of 2 are results of earlier requests with the same id and content, which the workers \
             remember; nobody was called again: TX1 of 1970-01-01T00:01:00.000Z. To try again, use \
             new ids\n"
        );
    }
}
