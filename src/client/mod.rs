//! For producers: submit transactions through a broker, and hear how they end.
//!
//! * [`Client::submit`] returns when the broker has the request; [`Client::submit_and_wait`] when
//!   the result is there.
//! * [`history`]: what the journal says of transactions, read without taking anything from anyone.
//!
//! # Asking again
//!
//! A transaction is named by its id *and* the moment it was requested at. Whoever has not heard
//! what became of a request asks again with both: then it is the same transaction, executed once,
//! and the answer is the same. Errors say under which [key](TransactionKey) a request went out, for
//! that purpose. Under another moment it is another transaction, of which only the workers' memory
//! of the last minutes knows that it was a retry under a new timestamp.
//!
//! It does not keep anything beyond its process: a producer that must not forget to ask again
//! writes down the key before it submits.
//!
//! **Invariant:** a request that is repeated by the client itself, for whatever reason, repeats its
//! key.

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
use self::results::{ListenError, ListenState, Results};
use crate::{
    clock::Clock,
    protocol::{
        ids::{ReplyToken, TransactionKey},
        message::{Answer, TransactionSpec},
        time::Time,
    },
    transaction::{InvalidTransaction, Transaction, TransactionResult},
    transport::amqp::{
        connection::{self, Backoff, Broker},
        error::{BrokerError, Disposition, is_not_found, is_refusal},
        names::Names,
        pool::{ChannelPool, PublishError},
        publisher::OutgoingMessage,
    },
    wire::message::{Kind, encode_request},
};

/// The routing key of requests.
const REQUEST_KEY: &str = "request";

/// How many channels are published on: enough to keep a connection busy.
const CHANNELS_MAX: usize = 4;

/// How long a result may take before its request is published once more; then twice as long, and so on.
/// A partition was seen to leave requests at the broker that no worker was ever given.
const ASK_AGAIN_FIRST: Duration = Duration::from_secs(15);

/// How long a request may find no queue, where the broker doesn't say that there is none.
const UNROUTABLE_MAX: Duration = Duration::from_secs(5);

/// How a client behaves.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// How long [`Client::submit`] tries to hand a request to the broker.
    pub(crate) publish_timeout: Duration,
    /// How many transactions may be waited for at once. More wait for their turn, so that what a
    /// client holds is bounded.
    pub(crate) in_flight_max: usize,
}

impl Default for Settings {
    /// 30 s, and 1000 transactions.
    fn default() -> Self {
        Self { publish_timeout: Duration::from_secs(30), in_flight_max: 1000 }
    }
}

/// A producer's end of the broker: it hands [transactions](Transaction) to the workers, and brings back
/// how they ended. Whenever the connection is lost it connects again. Clones share their connections.
///
/// It wants a tokio runtime with time and IO enabled, and is made within it.
///
/// # Asking again
///
/// A transaction is named by its id *and* the moment it was requested at: by its [`TransactionKey`].
/// A producer that has not heard what became of a transaction submits it again with the
/// [moment](Transaction::requested_at) of its key. Then it is the same transaction, executed once, and
/// the answer is the same. Errors say under which key a transaction went out, for that purpose. The
/// client keeps nothing beyond its process: a producer that must not forget to ask again writes the
/// key down before it submits.
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
    in_flight: Semaphore,
    results: Results,
    has_worked: HasWorked,
}

/// Whether a broker has ever let this client in. Then it may do so again, whatever it says now:
/// certificates and passwords are changed while clients run, and not all at one moment.
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

/// A request was not handed over, as far as is known.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// It can't be sent as it is.
    #[error("invalid transaction")]
    Invalid(#[from] InvalidTransaction),
    /// Nothing takes requests in this namespace: `dtc topology apply` has yet to be run.
    #[error("nothing takes requests in namespace `{namespace}`: run `dtc topology apply`")]
    NoTopology {
        /// The namespace.
        namespace: String,
    },
    /// The broker refuses this user, or doesn't let it publish requests.
    #[error("the broker refuses transaction `{}`", key.id)]
    Refused {
        /// Which transaction.
        key: TransactionKey,
        /// What it said.
        #[source]
        source: BrokerError,
    },
    /// The broker has not confirmed it in time. It may have arrived all the same: ask again with
    /// the same key.
    #[error("the broker did not confirm transaction `{}` within {} ms", key.id, limit.as_millis())]
    Unconfirmed {
        /// Under which key it was sent.
        key: TransactionKey,
        /// How long it had.
        limit: Duration,
        /// What the last try ended in; `None`: it did not end.
        #[source]
        source: Option<BrokerError>,
    },
}

/// There is no answer.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum WaitError {
    /// The request was not handed over.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// Nothing takes results in this namespace: `dtc topology apply` has yet to be run.
    #[error(
        "failed to listen for results: there is no exchange `{exchange}`: run `dtc topology apply`"
    )]
    NoTopology {
        /// What is missing.
        exchange: String,
    },
    /// The broker doesn't let us listen for results, or the client was closed.
    #[error("failed to listen for results")]
    Listen(#[source] BrokerError),
    /// It takes longer. The transaction goes on: ask again with the same key.
    #[error("transaction `{}` was not answered within {} ms", key.id, limit.as_millis())]
    Unanswered {
        /// Under which key it was sent.
        key: TransactionKey,
        /// How long it had.
        limit: Duration,
        /// What the last try to hand it over ended in, if it was never confirmed.
        #[source]
        source: Option<BrokerError>,
    },
}

impl Client {
    /// A client of the broker at `url`, which is to be connected: `amqp://user:password@host:port/vhost`,
    /// or `amqps://` for TLS; the hosts of one cluster: such URLs, separated by commas.
    pub fn builder(url: impl Into<String>) -> ClientBuilder {
        ClientBuilder::new(url.into())
    }

    /// A client of the system `names` at `broker`. Nothing is connected yet.
    pub(crate) fn with(broker: Broker, names: Names, settings: Settings) -> Self {
        let has_worked = HasWorked::default();
        let shared = Shared {
            clock: Clock::start(),
            channels: ChannelPool::new(broker.clone(), CHANNELS_MAX),
            in_flight: Semaphore::new(settings.in_flight_max.clamp(1, Semaphore::MAX_PERMITS)),
            results: Results::new(broker, names.clone(), has_worked.clone()),
            has_worked,
            names,
            settings,
        };
        Self { shared: Arc::new(shared) }
    }

    /// Connects, rather than when the first request is sent.
    ///
    /// # Errors
    ///
    /// There is no connection to publish on.
    pub(crate) async fn open(&self) -> Result<(), PublishError> {
        self.shared.channels.open().await?;
        self.shared.has_worked.set();
        Ok(())
    }

    /// Hands `transaction` to the broker, and returns when that has it safely.
    ///
    /// What was not confirmed, or not taken, is sent again until
    /// [`publish_timeout`](ClientBuilder::publish_timeout) is over, each time under the same key: it is
    /// the key that is returned.
    ///
    /// # Errors
    ///
    /// It is not known to be with the broker: see [`SubmitError`].
    pub async fn submit(&self, transaction: Transaction) -> Result<TransactionKey, SubmitError> {
        let requested_at = transaction.moment().unwrap_or_else(|| self.now());
        let spec = transaction.check()?;
        self.hand_over(&spec, requested_at, self.shared.settings.publish_timeout).await
    }

    /// Submits `transaction`, and returns with its result.
    ///
    /// It survives lost connections: what is unanswered then is sent again under the same key.
    ///
    /// # Errors
    ///
    /// There is no answer within `timeout`, or there will be none: see [`WaitError`].
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

    /// Says goodbye to the broker, for all clones. What is still waited for is not answered, and what
    /// is submitted from now on is an error.
    pub async fn close(&self) {
        self.shared.results.close().await;
        self.shared.channels.close().await;
    }

    /// The moment it is now, in whole seconds as they travel.
    pub(crate) fn now(&self) -> Time {
        let seconds = self.shared.clock.now().as_millis() / 1000;
        Time::from_millis(seconds * 1000)
    }

    /// [`Client::submit`] for what was checked before.
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

    /// [`Client::submit_and_wait`] for what was checked before.
    pub(crate) async fn hand_over_and_wait(
        &self,
        spec: &TransactionSpec,
        requested_at: Time,
        limit: Duration,
    ) -> Result<Answer, WaitError> {
        let Key { key, .. } = Key::of(spec, requested_at);
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
        // It is never closed.
        let _turn = self.shared.in_flight.acquire().await;
        let Key { key, .. } = Key::of(spec, requested_at);
        let mut answer = self.shared.results.expect(&key, spec.request_hash);
        let mut listening = self.shared.results.listen();
        let mut ask_again_after = ASK_AGAIN_FIRST;
        loop {
            // Before it is published: a result that finds no queue is not sent again.
            let reply = is_up(&mut listening).await?;
            let request = self.request(spec, requested_at, Some(&reply));
            let request = request.map_err(SubmitError::from)?;
            tokio::select! {
                biased;
                answer = answer.come() => return Ok(answer),
                // With the queue gone, the result may have been lost.
                _ = listening.changed() => {}
                // A broker may lose sight of a request that it has confirmed.
                () = tokio::time::sleep(ask_again_after) => {
                    tracing::debug!(
                        transaction = %key,
                        "no result came for {} s; asking again",
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

    /// Ends only if it can't be published.
    async fn publish_and_rest(
        &self,
        request: &RequestMessage,
        last: &mut Option<PublishError>,
    ) -> Result<Infallible, SubmitError> {
        self.publish(request, last).await?;
        *last = None;
        std::future::pending().await
    }

    /// Publishes until that is confirmed, or never will be. `last` is what the last try ended in.
    async fn publish(
        &self,
        request: &RequestMessage,
        last: &mut Option<PublishError>,
    ) -> Result<(), SubmitError> {
        let mut backoff = Backoff::default();
        let mut unroutable_until = None;
        loop {
            let Err(error) = self.shared.channels.publish(request.message.clone()).await else {
                self.shared.has_worked.set();
                return Ok(());
            };
            let mut fate = Fate::of(&error, &self.shared.has_worked);
            if let PublishError::Unroutable { .. } = error {
                let until =
                    *unroutable_until.get_or_insert_with(|| Instant::now() + UNROUTABLE_MAX);
                if Instant::now() < until && self.may_be_starting().await {
                    fate = Fate::Retry;
                }
            }
            match fate {
                Fate::Retry => {
                    tracing::debug!(id = %request.key.id, %error, "request not confirmed: again");
                    *last = Some(error);
                }
                Fate::NoTopology => {
                    let namespace = self.shared.names.namespace().to_string();
                    return Err(SubmitError::NoTopology { namespace });
                }
                Fate::GiveUp => {
                    let (key, source) =
                        (request.key.clone(), BrokerError::new(error, Disposition::GiveUp));
                    return Err(SubmitError::Refused { key, source });
                }
            }
            tokio::time::sleep(backoff.pause()).await;
        }
    }

    /// Whether the queue of requests may be there all the same, when a request finds none: a broker that
    /// starts has not made all of its queues known yet, or a node is down.
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
    ) -> Result<RequestMessage, InvalidTransaction> {
        let body = encode_request(spec, reply).map_err(|error| InvalidTransaction::TooLarge {
            id: spec.id.clone(),
            problem: error.to_string(),
        })?;
        let Key { key, seconds } = Key::of(spec, requested_at);
        let message = OutgoingMessage {
            exchange: self.shared.names.requests(),
            key: REQUEST_KEY.into(),
            message_type: Kind::Request.as_type(),
            body,
            persistent: true,
            mandatory: true,
            message_id: Some(spec.id.as_str().into()),
            timestamp: Some(seconds),
            ..OutgoingMessage::default()
        };
        Ok(RequestMessage { key, message })
    }
}

/// A request as it is sent, as often as it takes.
struct RequestMessage {
    key: TransactionKey,
    message: OutgoingMessage,
}

/// What a transaction is named by, as it travels: in whole seconds.
struct Key {
    key: TransactionKey,
    seconds: u64,
}

impl Key {
    fn of(spec: &TransactionSpec, requested_at: Time) -> Self {
        let seconds = requested_at.as_millis() / 1000;
        let requested_at = Time::from_millis(seconds * 1000);
        Self { key: TransactionKey { id: spec.id.clone(), requested_at }, seconds }
    }
}

/// A failure to publish that the next try may not have.
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

/// What follows from a failed publish.
enum Fate {
    Retry,
    NoTopology,
    GiveUp,
}

impl Fate {
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

/// The token under which results reach us, when they do.
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
