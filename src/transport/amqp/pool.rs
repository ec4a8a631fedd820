//! Shared channels, for publishes that are rare or come from many tasks.
//!
//! The pool's channels are all on one connection, which is opened at the first use and again after
//! it was lost. A channel is taken from the pool only while a message is written; its confirm is
//! awaited outside, so that a few channels serve any number of publishers.

use std::{
    sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError},
    time::Duration,
};

use deadpool::managed::{Manager, Metrics, Pool, PoolError, RecycleError, RecycleResult};
use futures_util::StreamExt as _;
use lapin::{Event, types::ShortString};
use tokio::{sync::Mutex, time::Instant};

use crate::transport::amqp::{
    bounded::{ANSWER_MAX, AskError, answer},
    connection::{
        Broker, BrokerConnection, ConnectionError, PublishChannel, QueueCounts, close, counts,
    },
    publisher::{OutgoingMessage, PublishOutcome, publish_within},
};

/// How long a confirm may take before the connection is replaced. The publisher of the message must
/// publish it again.
const CONFIRM_MAX: Duration = Duration::from_secs(5);

/// A pool of channels with confirms, on one connection to a broker.
#[derive(Clone, Debug)]
pub struct ChannelPool {
    pool: Pool<ChannelOpener>,
}

/// A message could not be published.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// No connection.
    #[error("no connection to publish on")]
    Connect(#[source] ConnectionError),
    /// The connection gives no channel.
    #[error("failed to open a channel to publish on")]
    Open(#[source] AskError),
    /// The connection was lost before the broker had confirmed the message, which may have arrived
    /// or not.
    #[error("the connection was lost before the broker confirmed the message")]
    Unconfirmed(#[source] lapin::Error),
    /// The broker has not confirmed the message in time; it may have arrived or not.
    #[error("the broker did not confirm the message within {} s", CONFIRM_MAX.as_secs())]
    Silent,
    /// The queue is full, or its node has a problem.
    #[error("the broker did not take the message")]
    Refused,
    /// No queue is bound to the exchange for it.
    #[error("no queue takes messages from exchange `{exchange}` with key `{key}`")]
    Unroutable {
        /// The exchange.
        exchange: String,
        /// The routing key.
        key: String,
    },
    /// The broker reads no publishes: it has an alarm.
    #[error("the broker takes no messages: {reason}")]
    Blocked {
        /// The alarm, in the broker's words.
        reason: String,
    },
    /// The pool is closed.
    #[error("the channels are closed")]
    Closed,
}

impl ChannelPool {
    /// A pool of at most `channels_max` channels at `broker`.
    pub fn new(broker: Broker, channels_max: usize) -> Self {
        let opener = ChannelOpener { broker, connection: Mutex::new(None), alarm: Arc::default() };
        let pool = Pool::builder(opener).max_size(channels_max.max(1)).build();
        // Without time-outs the builder can't fail.
        Self { pool: pool.unwrap_or_else(|_| unreachable!("no time-outs are set")) }
    }

    /// Connects, if there is no connection yet.
    ///
    /// # Errors
    ///
    /// No connection can be opened.
    pub async fn open(&self) -> Result<(), PublishError> {
        match self.channel().await {
            // A new connection may succeed.
            Err(PublishError::Open(error)) if error.is_silent() => {
                tracing::warn!(%error, "no channel to publish on; connecting again");
                self.channel().await.map(drop)
            }
            opened => opened.map(drop),
        }
    }

    /// Publishes a message, and waits for the broker's confirm.
    ///
    /// # Errors
    ///
    /// The broker may not have it. The caller decides whether to publish it again.
    pub async fn publish(&self, message: OutgoingMessage) -> Result<(), PublishError> {
        let (exchange, key) = (message.exchange.clone(), message.key.clone());
        let PooledChannel { channel, connection } = self.channel().await?;
        connection.note_publish(&exchange);
        let published = publish_within(channel, message, CONFIRM_MAX).await;
        if !matches!(published, PublishOutcome::Unconfirmed(_)) {
            connection.note_answer();
        }
        match published {
            PublishOutcome::Confirmed => Ok(()),
            PublishOutcome::Unconfirmed(_) => {
                if let Some(blocked) = self.blocked() {
                    return Err(blocked);
                }
                self.pool.manager().discard(connection, &exchange).await;
                Err(PublishError::Silent)
            }
            PublishOutcome::Refused => Err(PublishError::Refused),
            PublishOutcome::Lost(source) => Err(PublishError::Unconfirmed(source)),
            PublishOutcome::Unroutable => Err(PublishError::Unroutable {
                exchange: exchange.to_string(),
                key: key.to_string(),
            }),
        }
    }

    /// Why the broker reads no publishes, if it has reported an alarm.
    pub fn blocked(&self) -> Option<PublishError> {
        let reason = lock(&self.pool.manager().alarm).clone();
        reason.map(|reason| PublishError::Blocked { reason })
    }

    /// The counts of `queue`; `None`: the queue doesn't exist.
    ///
    /// # Errors
    ///
    /// The broker could not be asked.
    pub async fn counts(&self, queue: ShortString) -> Result<Option<QueueCounts>, PublishError> {
        self.open().await?;
        let connection = self.pool.manager().connection.lock().await.clone();
        let Some(connection) = connection else { return Err(PublishError::Closed) };
        let asking = counts(&connection.connection, queue);
        answer(ANSWER_MAX, asking).await.map_err(PublishError::Open)
    }

    /// One of the channels; others may be using it too.
    async fn channel(&self) -> Result<PooledChannel, PublishError> {
        match self.pool.get().await {
            Ok(pooled) => Ok(PooledChannel::clone(&pooled)),
            Err(PoolError::Backend(error)) => Err(error),
            Err(
                PoolError::Closed
                | PoolError::NoRuntimeSpecified
                | PoolError::Timeout(_)
                | PoolError::PostCreateHook(_),
            ) => Err(PublishError::Closed),
        }
    }

    /// Closes the connection. Later publishes fail with [`PublishError::Closed`].
    pub async fn close(&self) {
        self.pool.close();
        if let Some(connection) = self.pool.manager().connection.lock().await.take() {
            close(&connection.connection).await;
        }
    }
}

/// A channel, and its connection.
#[derive(Clone, Debug)]
struct PooledChannel {
    channel: PublishChannel,
    connection: Arc<PoolConnection>,
}

/// A connection, and whether it answers: the tasks that published on it may have ended before they
/// could notice.
#[derive(Debug)]
struct PoolConnection {
    connection: BrokerConnection,
    /// When the first message was published after the broker's last answer.
    unanswered_since: Arc<StdMutex<Option<Instant>>>,
    /// The exchange of the last one.
    published_to: StdMutex<ShortString>,
}

impl PoolConnection {
    fn note_publish(&self, exchange: &ShortString) {
        lock(&self.unanswered_since).get_or_insert_with(Instant::now);
        lock(&self.published_to).clone_from(exchange);
    }

    fn note_answer(&self) {
        *lock(&self.unanswered_since) = None;
    }

    fn is_silent(&self) -> bool {
        lock(&self.unanswered_since).is_some_and(|since| since.elapsed() >= CONFIRM_MAX)
    }
}

/// Opens channels, on a connection that it opens if there is none.
#[derive(Debug)]
struct ChannelOpener {
    broker: Broker,
    connection: Mutex<Option<Arc<PoolConnection>>>,
    alarm: Arc<StdMutex<Option<String>>>,
}

impl ChannelOpener {
    /// The broker doesn't answer on `silent`: a new connection replaces it.
    async fn discard(&self, silent: Arc<PoolConnection>, exchange: &ShortString) {
        let mut current = self.connection.lock().await;
        if current.take_if(|it| Arc::ptr_eq(it, &silent)).is_some() {
            give_up(silent, exchange.as_str());
        }
    }

    /// Whether the broker has confirmed nothing for a long time, without reporting an alarm.
    fn is_given_up(&self, current: &PoolConnection) -> bool {
        current.is_silent() && lock(&self.alarm).is_none()
    }

    async fn connect(&self) -> Result<PoolConnection, PublishError> {
        let connection = self.broker.connect("publish").await.map_err(PublishError::Connect)?;
        let (mut events, alarm) = (Box::pin(connection.events_listener()), self.alarm.clone());
        *lock(&alarm) = None;
        let unanswered_since = Arc::new(StdMutex::new(None));
        let unanswered = Arc::clone(&unanswered_since);
        // The task ends with the connection.
        tokio::spawn(async move {
            while let Some(event) = events.next().await {
                match event {
                    Event::ConnectionBlocked(reason) => {
                        tracing::warn!(reason, "the broker takes no messages for now");
                        *lock(&alarm) = Some(reason);
                    }
                    Event::ConnectionUnblocked => {
                        (*lock(&alarm), *lock(&unanswered)) = (None, None);
                    }
                    Event::Connected | Event::SendFlow(_) | Event::Error(_) | _ => {}
                }
            }
        });
        Ok(PoolConnection { connection, unanswered_since, published_to: StdMutex::default() })
    }
}

/// Gives up its channels, without waiting for its end.
fn give_up(silent: Arc<PoolConnection>, to: &str) {
    tracing::warn!(
        "the broker has not confirmed what was published to `{to}` for {} s; connecting again",
        CONFIRM_MAX.as_secs()
    );
    tokio::spawn(async move { close(&silent.connection).await });
}

fn lock<T>(mutex: &StdMutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Manager for ChannelOpener {
    type Type = PooledChannel;
    type Error = PublishError;

    async fn create(&self) -> Result<PooledChannel, PublishError> {
        let mut connection = self.connection.lock().await;
        let current = connection.take().filter(|it| it.connection.status().connected());
        let current = match current {
            Some(silent) if self.is_given_up(&silent) => {
                let to = lock(&silent.published_to).clone();
                give_up(silent, to.as_str());
                Arc::new(self.connect().await?)
            }
            Some(current) => current,
            None => Arc::new(self.connect().await?),
        };
        let opened = PublishChannel::open(&current.connection).await;
        // A connection that doesn't answer is not used again.
        if !opened.as_ref().is_err_and(AskError::is_silent) {
            *connection = Some(Arc::clone(&current));
        }
        let channel = opened.map_err(PublishError::Open)?;
        Ok(PooledChannel { channel, connection: current })
    }

    async fn recycle(
        &self,
        pooled: &mut PooledChannel,
        _: &Metrics,
    ) -> RecycleResult<PublishError> {
        if pooled.channel.status().connected() && pooled.connection.connection.status().connected()
        {
            return Ok(());
        }
        Err(RecycleError::message("the channel is closed"))
    }
}
