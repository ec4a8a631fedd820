//! Channels that many share: for those who publish now and then, from wherever they are.
//!
//! The pool's channels are all on one connection, which is made when it is first needed and again
//! when it is lost. A channel is taken from the pool only for as long as it takes to write a
//! message; its confirm is awaited apart, so that a few channels serve any number of publishers.

use std::sync::{Arc, Mutex as StdMutex, PoisonError};

use deadpool::managed::{Manager, Metrics, Pool, PoolError, RecycleError, RecycleResult};
use futures_util::StreamExt as _;
use lapin::{Channel, Connection, Event, types::ShortString};
use tokio::sync::Mutex;

use crate::transport::amqp::{
    bounded::{ANSWER_MAX, AskError, answer},
    connection::{Broker, ConnectError, QueueCounts, close, confirming_channel, counts},
    publisher::{Outgoing, Published, publish},
};

/// Channels with confirms, on one connection to a broker.
#[derive(Clone, Debug)]
pub struct Channels {
    pool: Pool<Opener>,
}

/// A message could not be handed to the broker.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PublishError {
    /// No connection.
    #[error("no connection to publish on")]
    Connect(#[source] ConnectError),
    /// The connection gives no channel.
    #[error("failed to open a channel to publish on")]
    Open(#[source] AskError),
    /// The connection was lost before the broker had confirmed it: it may have arrived or not.
    #[error("the connection was lost before the broker confirmed the message")]
    Unconfirmed(#[source] lapin::Error),
    /// The queue is full, or its node is in trouble.
    #[error("the broker did not take the message")]
    Refused,
    /// Nothing is bound to the exchange for it.
    #[error("no queue takes messages from exchange `{exchange}` with key `{key}`")]
    Unroutable {
        /// The exchange.
        exchange: String,
        /// The routing key.
        key: String,
    },
    /// The broker reads nothing that is published: it has an alarm.
    #[error("the broker takes no messages: {reason}")]
    Blocked {
        /// The alarm, in the broker's words.
        reason: String,
    },
    /// The pool is closed.
    #[error("the channels are closed")]
    Closed,
}

impl Channels {
    /// At most `channels_max` channels at `broker`.
    pub fn new(broker: Broker, channels_max: usize) -> Self {
        let opener = Opener { broker, connection: Mutex::new(None), alarm: Arc::default() };
        let pool = Pool::builder(opener).max_size(channels_max.max(1)).build();
        // Without time-outs there is nothing that a builder could refuse.
        Self { pool: pool.unwrap_or_else(|_| unreachable!("no time-outs are set")) }
    }

    /// Connects, if there is no connection yet.
    ///
    /// # Errors
    ///
    /// There is none to be had.
    pub async fn open(&self) -> Result<(), PublishError> {
        self.channel().await.map(drop)
    }

    /// Publishes, and waits until the broker has it.
    ///
    /// # Errors
    ///
    /// It is not known to be with the broker. Publishing it again is the caller's decision.
    pub async fn publish(&self, message: Outgoing) -> Result<(), PublishError> {
        let (exchange, key) = (message.exchange.clone(), message.key.clone());
        match publish(self.channel().await?, message).await {
            Published::Confirmed => Ok(()),
            Published::Refused => Err(PublishError::Refused),
            Published::Lost(source) => Err(PublishError::Unconfirmed(source)),
            Published::Unroutable => Err(PublishError::Unroutable {
                exchange: exchange.to_string(),
                key: key.to_string(),
            }),
        }
    }

    /// Why the broker reads nothing that is published now, if it has said so.
    pub fn blocked(&self) -> Option<PublishError> {
        let reason = lock(&self.pool.manager().alarm).clone();
        reason.map(|reason| PublishError::Blocked { reason })
    }

    /// What the broker tells of `queue`; `None`: there is no such queue.
    ///
    /// # Errors
    ///
    /// It could not be asked.
    pub async fn counts(&self, queue: ShortString) -> Result<Option<QueueCounts>, PublishError> {
        self.open().await?;
        let connection = self.pool.manager().connection.lock().await;
        let Some(connection) = connection.as_ref() else { return Err(PublishError::Closed) };
        answer(ANSWER_MAX, counts(connection, queue)).await.map_err(PublishError::Open)
    }

    /// One of the channels; others may be using it too.
    async fn channel(&self) -> Result<Channel, PublishError> {
        match self.pool.get().await {
            Ok(pooled) => Ok(Channel::clone(&pooled)),
            Err(PoolError::Backend(error)) => Err(error),
            Err(
                PoolError::Closed
                | PoolError::NoRuntimeSpecified
                | PoolError::Timeout(_)
                | PoolError::PostCreateHook(_),
            ) => Err(PublishError::Closed),
        }
    }

    /// Closes the connection. Whoever publishes afterwards hears [`PublishError::Closed`].
    pub async fn close(&self) {
        self.pool.close();
        if let Some(connection) = self.pool.manager().connection.lock().await.take() {
            close(&connection).await;
        }
    }
}

/// Opens channels, on a connection that it makes when there is none.
#[derive(Debug)]
struct Opener {
    broker: Broker,
    connection: Mutex<Option<Connection>>,
    alarm: Arc<StdMutex<Option<String>>>,
}

impl Opener {
    async fn connect(&self) -> Result<Connection, PublishError> {
        let connection = self.broker.connect("publish").await.map_err(PublishError::Connect)?;
        let (mut events, alarm) = (Box::pin(connection.events_listener()), self.alarm.clone());
        *lock(&alarm) = None;
        // It ends with the connection.
        tokio::spawn(async move {
            while let Some(event) = events.next().await {
                match event {
                    Event::ConnectionBlocked(reason) => {
                        tracing::warn!(reason, "the broker takes no messages for now");
                        *lock(&alarm) = Some(reason);
                    }
                    Event::ConnectionUnblocked => *lock(&alarm) = None,
                    Event::Connected | Event::SendFlow(_) | Event::Error(_) | _ => {}
                }
            }
        });
        Ok(connection)
    }
}

fn lock(alarm: &StdMutex<Option<String>>) -> std::sync::MutexGuard<'_, Option<String>> {
    alarm.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Manager for Opener {
    type Type = Channel;
    type Error = PublishError;

    async fn create(&self) -> Result<Channel, PublishError> {
        let mut connection = self.connection.lock().await;
        let standing = connection.take().filter(|it| it.status().connected());
        let standing = match standing {
            Some(standing) => standing,
            None => self.connect().await?,
        };
        let opened = answer(ANSWER_MAX, confirming_channel(&standing)).await;
        // One that answers nothing is not asked again.
        if !opened.as_ref().is_err_and(AskError::is_silent) {
            *connection = Some(standing);
        }
        opened.map_err(PublishError::Open)
    }

    async fn recycle(&self, channel: &mut Channel, _: &Metrics) -> RecycleResult<PublishError> {
        if channel.status().connected() {
            return Ok(());
        }
        Err(RecycleError::message("the channel is closed"))
    }
}
