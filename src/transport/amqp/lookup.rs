//! Whether queues exist, and whether anybody takes from them, asked over and over without using
//! anything up.
//!
//! AMQP tells it by a passive declaration, and closes the channel where there is no such queue. lapin
//! never gives the number of such a channel out again, so a connection can take only so many of
//! these answers: the questions have a connection of their own, and get another one before it is used
//! up. An answer that there is none holds for a moment: a producer that keeps on asking for a service
//! that does not exist causes no question for each request.

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
    connection::{Broker, BrokerConnection, ConnectError, close, counts},
};

/// How long it holds that there is no such queue.
const MISSING_FOR: Duration = Duration::from_secs(1);

/// Of how many queues it is remembered that they are missing.
const REMEMBERED_MAX: usize = 4096;

/// How many channels of a connection may be used up before it is replaced: a small part of those that
/// a connection has by default, and many enough to make connecting again cheap.
const REFUSALS_MAX: u32 = 128;

/// How many questions are on their way at once.
const QUESTIONS_MAX: usize = 16;

/// What is known of a queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Existence {
    /// It exists, and can be used.
    Found {
        /// How many take from it.
        consumers: u32,
    },
    /// There is no such queue.
    Missing,
    /// It may exist, and can't be used now: for this reason.
    Unavailable(String),
}

/// Asks the broker for queues. Clones share a connection, which is made when it is first needed.
#[derive(Clone, Debug)]
pub struct Lookups {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    broker: Broker,
    connection: AsyncMutex<Option<Arc<Asked>>>,
    turns: Semaphore,
    missing: Mutex<BTreeMap<ShortString, Instant>>,
}

/// A connection, and how many of its channels are used up.
#[derive(Debug)]
struct Asked {
    connection: BrokerConnection,
    used_up: AtomicU32,
}

impl Asked {
    fn is_of_use(&self) -> bool {
        self.connection.status().connected() && self.used_up.load(Ordering::Relaxed) < REFUSALS_MAX
    }

    fn use_up(&self) {
        self.used_up.fetch_add(1, Ordering::Relaxed);
    }

    /// It isn't to be used again.
    fn discard(&self) {
        self.used_up.store(REFUSALS_MAX, Ordering::Relaxed);
    }
}

impl Lookups {
    /// At `broker`.
    pub fn new(broker: Broker) -> Self {
        let shared = Shared {
            broker,
            connection: AsyncMutex::default(),
            turns: Semaphore::new(QUESTIONS_MAX),
            missing: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Whether `queue` exists, and how many take from it.
    ///
    /// # Errors
    ///
    /// There is no connection to ask on.
    pub async fn find(&self, queue: &ShortString) -> Result<Existence, ConnectError> {
        // It is never closed.
        let _turn = self.shared.turns.acquire().await;
        if self.shared.is_known_missing(queue) {
            return Ok(Existence::Missing);
        }
        let asked = self.shared.connected().await?;
        Ok(match answer(ANSWER_MAX, counts(&asked.connection, queue.clone())).await {
            Ok(Some(counts)) => Existence::Found { consumers: counts.consumers },
            Ok(None) => {
                asked.use_up();
                self.shared.remember_missing(queue);
                Existence::Missing
            }
            Err(error) => {
                match &error {
                    // The channel is gone, or the connection, which is told when it is asked next.
                    AskError::Broker(_) => asked.use_up(),
                    // Perhaps it is the connection that gives no answers.
                    AskError::Silent { .. } | AskError::Blocked { .. } => asked.discard(),
                }
                Existence::Unavailable(error.to_string())
            }
        })
    }

    /// Says goodbye, if there is a connection.
    pub async fn close(&self) {
        let connection = self.shared.connection.lock().await.take();
        if let Some(asked) = connection {
            close(&asked.connection).await;
        }
    }
}

impl Shared {
    /// A connection that is of use. Others that ask wait while it is made.
    async fn connected(&self) -> Result<Arc<Asked>, ConnectError> {
        let mut standing = self.connection.lock().await;
        if let Some(asked) = standing.as_ref().filter(|asked| asked.is_of_use()) {
            return Ok(Arc::clone(asked));
        }
        // Questions that are on their way by the old one are answered before it goes: it is closed
        // when the last of them lets go of it.
        let connection = self.broker.connect("look").await?;
        let asked = Arc::new(Asked { connection, used_up: AtomicU32::new(0) });
        *standing = Some(Arc::clone(&asked));
        Ok(asked)
    }

    fn is_known_missing(&self, queue: &ShortString) -> bool {
        let now = Instant::now();
        let mut missing = self.missing();
        missing.retain(|_, at| now - *at < MISSING_FOR);
        missing.contains_key(queue)
    }

    fn remember_missing(&self, queue: &ShortString) {
        let mut missing = self.missing();
        if missing.len() < REMEMBERED_MAX {
            missing.insert(queue.clone(), Instant::now());
        }
    }

    fn missing(&self) -> MutexGuard<'_, BTreeMap<ShortString, Instant>> {
        self.missing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
