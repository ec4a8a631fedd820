//! Repeated lookups of whether queues exist and have consumers, without exhausting a connection's
//! channels.
//!
//! AMQP answers this by a passive declaration, and closes the channel if the queue doesn't exist.
//! lapin never reuses the number of such a channel, so a connection can take only so many of these
//! answers: lookups have their own connection, which is replaced before its channels are used up. A
//! negative answer is cached for a moment, so that a producer that keeps requesting a service which
//! does not exist doesn't cause a lookup for each request.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use lapin::types::ShortString;
use tokio::{
    sync::{Mutex as AsyncMutex, Semaphore},
    time::Instant,
};

use crate::transport::amqp::{
    bounded::{ANSWER_MAX, AskError, answer},
    connection::{Broker, BrokerConnection, ConnectionError, close, counts},
};

/// How long a negative answer is cached.
const MISSING_TTL: Duration = Duration::from_secs(1);

/// For how many queues negative answers are cached.
const MISSING_MAX: usize = 4096;

/// How many channels of a connection may be used up before it is replaced: a small part of a
/// connection's default number, but enough to make reconnecting rare.
const USED_UP_MAX: u32 = 128;

/// How many lookups may be in progress at once.
const LOOKUPS_MAX: usize = 16;

/// The result of a lookup.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum QueueExistence {
    /// The queue exists, and can be used.
    Found {
        /// How many consumers it has.
        consumers: u32,
    },
    /// The queue doesn't exist.
    Missing,
    /// It may exist, but can't be used now, for this reason.
    Unavailable(String),
}

/// Looks up queues at a broker. Clones share a connection, which is opened at the first lookup.
#[derive(Clone, Debug)]
pub struct QueueLookup {
    shared: Arc<LookupState>,
}

#[derive(Debug)]
struct LookupState {
    broker: Broker,
    connection: AsyncMutex<Option<Arc<LookupConnection>>>,
    permits: Semaphore,
    missing: Mutex<BTreeMap<ShortString, Instant>>,
}

/// A connection, and how many of its channels are used up.
#[derive(Debug)]
struct LookupConnection {
    connection: BrokerConnection,
    used_up: AtomicU32,
}

impl LookupConnection {
    fn is_usable(&self) -> bool {
        self.connection.status().connected() && self.used_up.load(Ordering::Relaxed) < USED_UP_MAX
    }

    fn use_up(&self) {
        self.used_up.fetch_add(1, Ordering::Relaxed);
    }

    /// Marks it as unusable.
    fn discard(&self) {
        self.used_up.store(USED_UP_MAX, Ordering::Relaxed);
    }
}

impl QueueLookup {
    /// Looks up queues at `broker`.
    pub fn new(broker: Broker) -> Self {
        let shared = LookupState {
            broker,
            connection: AsyncMutex::default(),
            permits: Semaphore::new(LOOKUPS_MAX),
            missing: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Whether `queue` exists, and how many consumers it has.
    ///
    /// # Errors
    ///
    /// There is no connection.
    pub async fn find(&self, queue: &ShortString) -> Result<QueueExistence, ConnectionError> {
        // The semaphore is never closed.
        let _permit = self.shared.permits.acquire().await;
        if self.shared.is_known_missing(queue) {
            return Ok(QueueExistence::Missing);
        }
        let connection = self.shared.connected().await?;
        Ok(match answer(ANSWER_MAX, counts(&connection.connection, queue.clone())).await {
            Ok(Some(counts)) => QueueExistence::Found { consumers: counts.consumers },
            Ok(None) => {
                connection.use_up();
                self.shared.remember_missing(queue);
                QueueExistence::Missing
            }
            Err(error) => {
                match &error {
                    // The channel or the connection is gone; the next lookup will notice the
                    // latter.
                    AskError::Broker(_) => connection.use_up(),
                    // Perhaps the connection is the cause.
                    AskError::Silent { .. } | AskError::Blocked { .. } => connection.discard(),
                }
                QueueExistence::Unavailable(error.to_string())
            }
        })
    }

    /// Closes the connection, if there is one.
    pub async fn close(&self) {
        let connection = self.shared.connection.lock().await.take();
        if let Some(connection) = connection {
            close(&connection.connection).await;
        }
    }
}

impl LookupState {
    /// A usable connection. Other lookups wait while it is opened.
    async fn connected(&self) -> Result<Arc<LookupConnection>, ConnectionError> {
        let mut current = self.connection.lock().await;
        if let Some(connection) = current.as_ref().filter(|connection| connection.is_usable()) {
            return Ok(Arc::clone(connection));
        }
        // Lookups in progress on the old one end first: it is closed when the last of them drops
        // it.
        let connection = self.broker.connect("look").await?;
        let connection = Arc::new(LookupConnection { connection, used_up: AtomicU32::new(0) });
        *current = Some(Arc::clone(&connection));
        Ok(connection)
    }

    fn is_known_missing(&self, queue: &ShortString) -> bool {
        let now = Instant::now();
        let mut missing = self.missing();
        missing.retain(|_, at| now - *at < MISSING_TTL);
        missing.contains_key(queue)
    }

    fn remember_missing(&self, queue: &ShortString) {
        let mut missing = self.missing();
        if missing.len() < MISSING_MAX {
            missing.insert(queue.clone(), Instant::now());
        }
    }

    fn missing(&self) -> MutexGuard<'_, BTreeMap<ShortString, Instant>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
