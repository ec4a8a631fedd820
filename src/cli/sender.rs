//! Sends transactions through a client, many at a time, and waits for each.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use indicatif::ProgressBar;
use tokio::{sync::mpsc, time::Instant};

use crate::{
    cli::{Exit, Failure, moment, output, stages::Stop},
    client::{Client, SubmitError, WaitError},
    clock::Clock,
    embedded::{Concluded, Report},
    error::Chain,
    input::transactions::Transactions,
    protocol::{
        ids::{ServiceName, TransactionKey},
        message::TransactionSpec,
        time::Time,
    },
    wire::result::Attempts,
};

/// How many of those that failed are named.
const NAMED_MAX: usize = 10;

/// What sends transactions, and waits until they are confirmed or answered.
pub(super) struct Sender {
    pub(super) client: Client,
    /// Whether results are waited for.
    pub(super) waits: bool,
    /// How many requests may be without a confirm, or without a result where that is waited for.
    pub(super) in_flight_max: usize,
    /// How long each may take until then.
    pub(super) timeout: Duration,
    /// The moment of all requests; `None`: when each is sent.
    pub(super) requested_at: Option<Time>,
    pub(super) clock: Clock,
    pub(super) bar: ProgressBar,
    /// What was called for a transaction, where that is known here.
    pub(super) attempts: Option<Arc<AttemptsOf>>,
    /// How long what was sent is waited for after a stop, if less than the rest of its time.
    pub(super) drain: Option<Duration>,
}

/// What became of a transaction: a result where it was waited for.
type Sending = BoxFuture<'static, (TransactionKey, Result<Option<Concluded>, WaitError>)>;

/// Tells what was called for a transaction that has ended.
pub(super) type AttemptsOf =
    dyn Fn(&TransactionKey) -> BTreeMap<ServiceName, Attempts> + Send + Sync;

/// What became of all.
pub(super) struct Sent {
    n_begun: u64,
    n_ended: u64,
    pub(super) report: Report,
    /// Those that failed first.
    failed: Vec<TransactionKey>,
    pub(super) n_failed: u64,
    /// Those that were first answered as an earlier request: which it was.
    recalled: Vec<TransactionKey>,
    n_recalled: u64,
    /// What the broker did with the first that failed, where that is known.
    cause: Option<String>,
    /// Whether what was sent was not waited for to its end.
    pub(super) is_given_up: bool,
    /// Why no more was sent.
    pub(super) fatal: Option<Failure>,
}

impl Sender {
    /// Sends what comes until there is no more, or `stop` is over, or there is no use in it.
    pub(super) async fn serve(
        self,
        mut requests: mpsc::Receiver<Vec<TransactionSpec>>,
        concluded: mpsc::Sender<Vec<Concluded>>,
        mut stop: Stop,
    ) -> Sent {
        let mut sent = Sent::new();
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
                    // No more is sent, and what was sent is waited for, as where a line is no JSON.
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
                    // Where nobody wants the results any more, nobody waits for them.
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

/// What is checked as a whole is sent as a whole: nothing in it may be too large for a message.
pub(super) fn check_sizes<R>(
    client: &Client,
    transactions: &Transactions<R>,
) -> Result<(), Failure> {
    let Transactions::Array(specs) = transactions else { return Ok(()) };
    let checked = specs.iter().try_for_each(|spec| client.check(spec));
    checked.map_err(|error| Failure::new(Exit::BadData, error))
}

/// Is over at `moment`, if there is one.
async fn reached(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

impl Sent {
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

    /// Takes in what became of one; its result, if it has one.
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
                let cause = source.map(|source| Chain(&source).to_string());
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

    /// Takes in that `key` was answered as what was requested at `requested_at`.
    fn recall(&mut self, key: &TransactionKey, requested_at: Time) {
        // Whoever asks, asks for a second.
        if requested_at.as_millis() / 1000 == key.requested_at.as_millis() / 1000 {
            return;
        }
        self.n_recalled += 1;
        if self.recalled.len() < NAMED_MAX {
            self.recalled.push(TransactionKey { id: key.id.clone(), requested_at });
        }
    }

    /// What became of them, as it is shown to a person.
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

    /// Which results are those of earlier requests; empty if none is. They look like new ones, and say
    /// what was true then: that no instance serves a service, for example.
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

    /// What was not confirmed, or not answered; empty if nothing is.
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

/// How to end where going on is of no use.
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

    use super::Sent;
    use crate::{
        embedded::Concluded,
        protocol::{
            ids::{TransactionId, TransactionKey},
            message::{Answer, Outcome},
            time::Time,
        },
    };

    fn answered(sent: &mut Sent, asked: u64, answered: u64) {
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

    /// Who had forgotten a service, started it and submitted the file again, was told once more that no
    /// instance serves it, as if it were so.
    #[test]
    fn a_result_of_an_earlier_request_is_said_to_be_one() {
        let mut sent = Sent::new();
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
