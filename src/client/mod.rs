//! For producers: submits transactions through a broker, and receives their results.
//!
//! * [`Client::submit`] returns when the broker has the request; [`Client::submit_and_wait`] when
//!   the result has arrived.
//! * [`history`]: what the journal says about transactions, read without consuming anything.
//!
//! [`Client`] describes how a producer asks again. If it asks with another `requested_at`, that is
//! another transaction; only workers that still remember the first one recognise it as a retry.
//!
//! **Invariant:** whenever the client publishes a request again, it repeats the request's key.

mod batcher;
mod builder;
pub mod history;
mod results;

// The page's program is an example of the documentation: it is compiled as one.
#[cfg(doctest)]
#[doc = include_str!("../../docs/producers.md")]
mod producers {}

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};

pub use self::builder::{ClientBuilder, ConnectError};
use self::{
    batcher::{EncodedRequest, RequestBatcher},
    results::{ListenError, ListenState, Results},
};
use crate::{
    clock::Clock,
    protocol::{
        ids::{ReplyToken, TransactionKey},
        message::{Answer, TransactionSpec},
        request_messages::REQUESTS_MAX,
        time::Time,
    },
    transaction::{InvalidTransaction, Transaction, TransactionResult},
    transport::amqp::{
        connection::{self, Backoff, Broker},
        error::{BrokerError, Disposition, is_not_found, is_refusal},
        names::Names,
        pool::{ChannelPool, PublishError},
    },
    wire::message::encode_request,
};

/// The number of channels for publishing: enough to keep one connection busy.
const CHANNELS_MAX: usize = 4;

/// How long to wait for a result before the request is published once more; each further wait is twice
/// as long. After a network partition, a broker may hold requests that it never delivers.
const ASK_AGAIN_FIRST: Duration = Duration::from_secs(15);

/// How long to retry a request that was routed to no queue, while the broker doesn't confirm that the
/// queue is missing.
const UNROUTABLE_MAX: Duration = Duration::from_secs(5);

/// The settings of a client.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// The time limit of [`Client::submit`].
    pub(crate) publish_timeout: Duration,
    /// How many calls may wait for results at once. Further calls wait for their turn, which bounds
    /// the memory of the client.
    pub(crate) in_flight_max: usize,
    /// How many requests may share a message.
    pub(crate) batch_max: usize,
}

impl Default for Settings {
    /// 30 s, 1000 transactions, and as many requests in a message as workers take.
    fn default() -> Self {
        let publish_timeout = Duration::from_secs(30);
        Self { publish_timeout, in_flight_max: 1000, batch_max: REQUESTS_MAX }
    }
}

/// A producer's connection to the system: it submits [transactions](Transaction) through the broker and
/// receives their results. It reconnects by itself. Clones share their connections.
///
/// Transactions that are submitted while others are on their way share a message with each other. None
/// waits for company.
///
/// Create and use it within a tokio runtime that has time and IO enabled.
///
/// # Asking again
///
/// A transaction is identified by its id *and* the time at which it was requested: by its
/// [`TransactionKey`]. A producer that doesn't know how a transaction ended submits it again with the
/// [`requested_at`](Transaction::requested_at) of its key. That is the same transaction: it is executed
/// once, and has the same result. Every error names the key under which a transaction was sent. The
/// client stores nothing: a producer that must be able to ask again after a crash stores the key before
/// it submits.
///
/// ```no_run
/// use std::time::Duration;
///
/// use dtc::{Client, Transaction};
/// use serde_json::json;
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let client = Client::builder("amqp://localhost").namespace("shop").connect().await?;
/// let order = Transaction::new("order-17", ["payments", "stock"], json!({"amount": 100}));
/// let result = client.submit_and_wait(order, Duration::from_secs(30)).await?;
/// println!("{}: {}", result.id, result.outcome);
/// client.close().await;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    names: Names,
    settings: Settings,
    clock: Clock,
    channels: ChannelPool,
    batcher: RequestBatcher,
    in_flight: Semaphore,
    results: Results,
    has_worked: HasWorked,
}

/// Whether a broker has ever accepted this client. If so, a refusal is retried: certificates and
/// passwords are changed while clients run, and not everywhere at the same time.
#[derive(Clone, Debug, Default)]
struct HasWorked(Arc<AtomicBool>);

impl HasWorked {
    fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn disposition(&self, error: &connection::ConnectionError) -> Disposition {
        match self.0.load(Ordering::Relaxed) {
            true => Disposition::Retry,
            false => error.disposition(),
        }
    }
}

/// A transaction was not submitted, as far as the client knows.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// The transaction is invalid; nothing was sent.
    #[error("invalid transaction")]
    Invalid(#[from] InvalidTransaction),
    /// No queue receives requests in this namespace: `dtc topology apply` has not been run.
    #[error("no queue receives requests in namespace `{namespace}`: run `dtc topology apply`")]
    NoTopology {
        /// The namespace.
        namespace: String,
    },
    /// The broker refuses this user, or does not permit it to publish requests.
    #[error("the broker refuses transaction `{}`", key.id)]
    Refused {
        /// The transaction.
        key: TransactionKey,
        /// The broker's reason.
        #[source]
        source: BrokerError,
    },
    /// The broker did not confirm the request in time. It may have arrived nevertheless: submit it
    /// again with the same key.
    #[error("the broker did not confirm transaction `{}` within {} ms", key.id, limit.as_millis())]
    Unconfirmed {
        /// The key under which it was sent.
        key: TransactionKey,
        /// The time limit.
        limit: Duration,
        /// Why the last attempt failed; `None` if it was still in progress.
        #[source]
        source: Option<BrokerError>,
    },
}

/// There is no result.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// The transaction was not submitted.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// No exchange takes results in this namespace: `dtc topology apply` has not been run.
    #[error(
        "failed to listen for results: there is no exchange `{exchange}`: run `dtc topology apply`"
    )]
    NoTopology {
        /// The missing exchange.
        exchange: String,
    },
    /// The broker does not permit this user to receive results, or the client was closed.
    #[error("failed to listen for results")]
    Listen(#[source] BrokerError),
    /// The result did not arrive in time. The transaction continues: ask again with the same key.
    #[error("no result of transaction `{}` arrived within {} ms", key.id, limit.as_millis())]
    Unanswered {
        /// The key under which it was sent.
        key: TransactionKey,
        /// The time limit.
        limit: Duration,
        /// Why the last attempt to publish it failed, if the broker never confirmed it.
        #[source]
        source: Option<BrokerError>,
    },
}

impl Client {
    /// Sets up a client of the broker at `url`: `amqp://user:password@host:port/vhost`, or `amqps://` for
    /// TLS. For a cluster, give one such URL for each host, separated by commas.
    pub fn builder(url: impl Into<String>) -> ClientBuilder {
        ClientBuilder::new(url.into())
    }

    /// A client of the system `names` at `broker`. It doesn't connect yet.
    pub(crate) fn with(broker: Broker, names: Names, settings: Settings) -> Self {
        let has_worked = HasWorked::default();
        let channels = ChannelPool::new(broker.clone(), CHANNELS_MAX);
        let shared = Shared {
            clock: Clock::start(),
            batcher: RequestBatcher::new(channels.clone(), &names, settings.batch_max),
            channels,
            in_flight: Semaphore::new(settings.in_flight_max.clamp(1, Semaphore::MAX_PERMITS)),
            results: Results::new(broker, names.clone(), has_worked.clone()),
            has_worked,
            names,
            settings,
        };
        Self { shared: Arc::new(shared) }
    }

    /// Connects now instead of with the first request.
    ///
    /// # Errors
    ///
    /// No connection for publishing could be opened.
    pub(crate) async fn open(&self) -> Result<(), PublishError> {
        self.shared.channels.open().await?;
        self.shared.has_worked.set();
        Ok(())
    }

    /// Publishes `transaction`, and returns its key when the broker has confirmed it.
    ///
    /// Until then it is published again, under the same key, for up to
    /// [`publish_timeout`](ClientBuilder::publish_timeout).
    ///
    /// # Errors
    ///
    /// The broker did not confirm it: see [`SubmitError`].
    pub async fn submit(&self, transaction: Transaction) -> Result<TransactionKey, SubmitError> {
        let requested_at = transaction.moment().unwrap_or_else(|| self.now());
        let spec = transaction.check()?;
        self.hand_over(&spec, requested_at, self.shared.settings.publish_timeout).await
    }

    /// Submits `transaction`, and waits for its result.
    ///
    /// After a lost connection it publishes the transaction again, under the same key.
    ///
    /// # Errors
    ///
    /// No result arrives within `timeout`, or none will: see [`WaitError`].
    pub async fn submit_and_wait(
        &self,
        transaction: Transaction,
        timeout: Duration,
    ) -> Result<TransactionResult, WaitError> {
        let requested_at = transaction.moment().unwrap_or_else(|| self.now());
        let spec = transaction.check().map_err(SubmitError::from)?;
        let answer = self.hand_over_and_wait(&spec, requested_at, timeout).await?;
        Ok(TransactionResult::of(answer))
    }

    /// Closes the connections of this client and its clones. Calls that still wait for results end with
    /// an error, and so do later ones.
    pub async fn close(&self) {
        self.shared.results.close().await;
        self.shared.channels.close().await;
    }

    /// The current time, in whole seconds as in the messages.
    pub(crate) fn now(&self) -> Time {
        let seconds = self.shared.clock.now().as_millis() / 1000;
        Time::from_millis(seconds * 1000)
    }

    /// [`Client::submit`] for a transaction that is already checked.
    pub(crate) async fn hand_over(
        &self,
        spec: &TransactionSpec,
        requested_at: Time,
        limit: Duration,
    ) -> Result<TransactionKey, SubmitError> {
        let request = self.request(spec, requested_at, None)?;
        let mut source = None;
        let published = tokio::time::timeout(limit, self.publish(&request, &mut source)).await;
        match published {
            Ok(published) => published.map(|()| request.key),
            Err(_) => {
                let source = self.shared.channels.blocked().or(source).map(passing);
                Err(SubmitError::Unconfirmed { key: request.key, limit, source })
            }
        }
    }

    /// [`Client::submit_and_wait`] for a transaction that is already checked.
    pub(crate) async fn hand_over_and_wait(
        &self,
        spec: &TransactionSpec,
        requested_at: Time,
        limit: Duration,
    ) -> Result<Answer, WaitError> {
        let key = key_of(spec, requested_at);
        let mut source = None;
        let waiting = tokio::time::timeout(limit, self.wait(spec, requested_at, &mut source)).await;
        match waiting {
            Ok(answered) => answered,
            Err(_) => {
                let source = self.shared.channels.blocked().or(source).map(passing);
                Err(WaitError::Unanswered { key, limit, source })
            }
        }
    }

    async fn wait(
        &self,
        spec: &TransactionSpec,
        requested_at: Time,
        last: &mut Option<PublishError>,
    ) -> Result<Answer, WaitError> {
        // The semaphore is never closed.
        let _turn = self.shared.in_flight.acquire().await;
        let key = key_of(spec, requested_at);
        let mut answer = self.shared.results.expect(&key, spec.request_hash);
        let mut listening = self.shared.results.listen();
        let mut ask_again_after = ASK_AGAIN_FIRST;
        loop {
            // Listen first: a result that is routed to no queue is lost.
            let reply = is_up(&mut listening).await?;
            let request = self.request(spec, requested_at, Some(&reply));
            let request = request.map_err(SubmitError::from)?;
            tokio::select! {
                biased;
                answer = answer.come() => return Ok(answer),
                // The result may have been lost with the queue.
                _ = listening.changed() => {}
                // A broker may lose a request that it has confirmed.
                () = tokio::time::sleep(ask_again_after) => {
                    tracing::debug!(
                        transaction = %key,
                        "no result arrived for {} s; publishing the request again",
                        ask_again_after.as_secs()
                    );
                    ask_again_after *= 2;
                }
                published = self.publish_and_rest(&request, last) => match published {
                    Ok(never) => match never {},
                    Err(error) => return Err(error.into()),
                },
            }
        }
    }

    /// Publishes `request`, and then waits for ever; it ends only with an error.
    async fn publish_and_rest(
        &self,
        request: &EncodedRequest,
        last: &mut Option<PublishError>,
    ) -> Result<Infallible, SubmitError> {
        self.publish(request, last).await?;
        *last = None;
        std::future::pending().await
    }

    /// Publishes `request` until the broker confirms it, or retrying is pointless. `last` is set to
    /// the error of the last attempt.
    async fn publish(
        &self,
        request: &EncodedRequest,
        last: &mut Option<PublishError>,
    ) -> Result<(), SubmitError> {
        let mut backoff = Backoff::default();
        let mut unroutable_until = None;
        loop {
            let Err(error) = self.shared.batcher.publish(request.clone()).await else {
                self.shared.has_worked.set();
                return Ok(());
            };
            let mut action = FailureAction::of(&error, &self.shared.has_worked);
            if let PublishError::Unroutable { .. } = error {
                let until =
                    *unroutable_until.get_or_insert_with(|| Instant::now() + UNROUTABLE_MAX);
                if Instant::now() < until && self.may_be_starting().await {
                    action = FailureAction::Retry;
                }
            }
            match action {
                FailureAction::Retry => {
                    tracing::debug!(
                        transaction = %request.key, %error, "request not confirmed; publishing it again"
                    );
                    *last = Some(error);
                }
                FailureAction::NoTopology => {
                    let namespace = self.shared.names.namespace().to_string();
                    return Err(SubmitError::NoTopology { namespace });
                }
                FailureAction::GiveUp => {
                    let (key, source) =
                        (request.key.clone(), BrokerError::new(error, Disposition::GiveUp));
                    return Err(SubmitError::Refused { key, source });
                }
            }
            tokio::time::sleep(backoff.pause()).await;
        }
    }

    /// Whether the queue of requests may exist although a request was routed to none: a broker that
    /// starts may not know all of its queues yet, or a node is down.
    async fn may_be_starting(&self) -> bool {
        !matches!(self.shared.channels.counts(self.shared.names.requests()).await, Ok(None))
    }

    /// Whether `spec` fits into a message.
    #[cfg(feature = "cli")]
    pub(crate) fn check(&self, spec: &TransactionSpec) -> Result<(), InvalidTransaction> {
        self.request(spec, Time::EPOCH, Some(&results::reply_token())).map(drop)
    }

    fn request(
        &self,
        spec: &TransactionSpec,
        requested_at: Time,
        reply: Option<&ReplyToken>,
    ) -> Result<EncodedRequest, InvalidTransaction> {
        let body = encode_request(spec, reply).map_err(|error| InvalidTransaction::TooLarge {
            id: spec.id.clone(),
            problem: error.to_string(),
        })?;
        Ok(EncodedRequest { key: key_of(spec, requested_at), body: body.into() })
    }
}

/// The key of a transaction as in the messages, in whole seconds.
fn key_of(spec: &TransactionSpec, requested_at: Time) -> TransactionKey {
    let seconds = requested_at.as_millis() / 1000;
    TransactionKey { id: spec.id.clone(), requested_at: Time::from_millis(seconds * 1000) }
}

/// A failure to publish that may not occur again.
fn passing(error: PublishError) -> BrokerError {
    BrokerError::new(error, Disposition::Retry)
}

impl From<ListenError> for WaitError {
    fn from(error: ListenError) -> Self {
        match error {
            ListenError::NoTopology { exchange } => Self::NoTopology { exchange },
            ListenError::Connect(_)
            | ListenError::Queue(_)
            | ListenError::Exchange { .. }
            | ListenError::Closed => {
                let disposition = error.disposition();
                Self::Listen(BrokerError::new(error, disposition))
            }
        }
    }
}

/// What to do after a failed publish.
enum FailureAction {
    Retry,
    NoTopology,
    GiveUp,
}

impl FailureAction {
    fn of(error: &PublishError, has_worked: &HasWorked) -> Self {
        match error {
            PublishError::Unroutable { .. } => Self::NoTopology,
            PublishError::Unconfirmed(source) if is_not_found(source) => Self::NoTopology,
            PublishError::Unconfirmed(source) if is_refusal(source) => Self::GiveUp,
            PublishError::Open(source) => match source.disposition() {
                Disposition::Retry => Self::Retry,
                Disposition::GiveUp => Self::GiveUp,
            },
            PublishError::Connect(source) => match has_worked.disposition(source) {
                Disposition::Retry => Self::Retry,
                Disposition::GiveUp => Self::GiveUp,
            },
            PublishError::Unconfirmed(_)
            | PublishError::Silent
            | PublishError::Refused
            | PublishError::Blocked { .. } => Self::Retry,
            PublishError::Closed => Self::GiveUp,
        }
    }
}

/// The token under which this client receives results, as soon as it does.
async fn is_up(listening: &mut watch::Receiver<ListenState>) -> Result<ReplyToken, ListenError> {
    loop {
        match &*listening.borrow_and_update() {
            ListenState::Up(reply) => return Ok(reply.clone()),
            ListenState::Failed(error) => return Err(error.clone()),
            ListenState::Connecting => {}
        }
        if listening.changed().await.is_err() {
            return Err(ListenError::Closed);
        }
    }
}
