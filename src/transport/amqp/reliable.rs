//! Publishing messages that must not be lost, until the broker has confirmed them.
//!
//! A message that the broker refuses, returns or doesn't confirm is published again, after growing
//! pauses. A queue that can't take messages delays only what depends on them.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::time::Instant;

use crate::transport::amqp::{
    bounded::AskError,
    connection::{Backoff, BrokerConnection},
    publisher::{OutgoingMessage, PublishOutcome, Publisher, PublisherError},
};

/// The first pause before a message is published again, and the longest one.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// How often repeated publishing is logged, at most.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// A publisher for messages that must not be lost. `T` is what follows when a message is safe.
#[derive(Debug)]
pub struct ReliablePublisher<T> {
    publisher: Publisher<PendingPublish<T>>,
    /// The messages to publish again, and when: unordered, and few.
    retries: VecDeque<(Instant, PendingPublish<T>)>,
    logged_at: Option<Instant>,
}

#[derive(Debug)]
struct PendingPublish<T> {
    message: OutgoingMessage,
    then: T,
    backoff: Backoff,
}

impl<T: Send + 'static> ReliablePublisher<T> {
    /// Opens a channel on `connection`. `what` describes its messages in log lines.
    ///
    /// # Errors
    ///
    /// The connection gives no channel.
    pub async fn open(
        connection: &Arc<BrokerConnection>,
        what: impl Into<Arc<str>>,
    ) -> Result<Self, AskError> {
        let publisher = Publisher::open(connection, what).await?;
        Ok(Self { publisher, retries: VecDeque::new(), logged_at: None })
    }

    /// Publishes `message` until it is safe. If it is not `mandatory`, it counts as safe even if no
    /// queue takes it.
    pub fn publish(&mut self, message: OutgoingMessage, then: T) {
        self.try_publish(PendingPublish {
            message,
            then,
            backoff: Backoff::new(PAUSE_FIRST, PAUSE_MAX),
        });
    }

    fn try_publish(&mut self, pending: PendingPublish<T>) {
        self.publisher.publish(pending.message.clone(), pending);
    }

    /// What follows from the next safe message; waits for ever if there is none.
    ///
    /// # Errors
    ///
    /// The publisher can't be used any more.
    pub async fn next(&mut self) -> Result<T, PublisherError> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The same, if a message is safe already.
    pub fn try_next(&mut self) -> Option<Result<T, PublisherError>> {
        self.next().now_or_never()
    }

    /// [`ReliablePublisher::next`] as a poll function, for callers that wait for several things.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<T, PublisherError>> {
        while let Poll::Ready(ended) = self.publisher.poll_next(cx) {
            let (pending, outcome) = ended?;
            if let Some(then) = self.on_outcome(pending, &outcome) {
                return Poll::Ready(Ok(then));
            }
        }
        Poll::Pending
    }

    /// What follows, if the message is safe; otherwise it will be published again.
    fn on_outcome(
        &mut self,
        mut pending: PendingPublish<T>,
        outcome: &PublishOutcome,
    ) -> Option<T> {
        let reason = match outcome {
            PublishOutcome::Confirmed => return Some(pending.then),
            PublishOutcome::Unroutable => "no queue takes it; has `dtc topology apply` been run?",
            PublishOutcome::Refused => "its queue is full, or the queue's node is down",
            PublishOutcome::Unconfirmed(_) | PublishOutcome::Lost(_) => {
                "the broker did not confirm it"
            }
        };
        let now = Instant::now();
        if self.logged_at.is_none_or(|at| now - at >= LOG_EVERY) {
            self.logged_at = Some(now);
            let OutgoingMessage { exchange, key, .. } = &pending.message;
            tracing::error!(
                %exchange, %key, waiting = self.retries.len() + 1,
                "a message that must not be lost is published again: {reason}"
            );
        }
        let at = now + pending.backoff.pause();
        self.retries.push_back((at, pending));
        None
    }

    /// Publishes again the messages whose pause is over.
    pub fn flush(&mut self, now: Instant) {
        for _ in 0..self.retries.len() {
            match self.retries.pop_front() {
                Some((at, pending)) if at <= now => self.try_publish(pending),
                Some(later) => self.retries.push_back(later),
                None => {}
            }
        }
    }

    /// When to call [`ReliablePublisher::flush`] at the latest.
    pub fn wake_at(&self) -> Option<Instant> {
        self.retries.iter().map(|(at, _)| *at).min()
    }

    /// Whether everything is safe.
    pub fn is_idle(&self) -> bool {
        self.retries.is_empty() && self.publisher.outstanding() == 0
    }

    /// How many messages are unconfirmed.
    pub fn outstanding(&self) -> usize {
        self.publisher.outstanding()
    }

    /// Whether its channel is open, as far as is known.
    pub fn is_open(&self) -> bool {
        self.publisher.is_open()
    }

    /// Waits until every publish has its result.
    pub async fn finish(&mut self) {
        self.publisher.finish().await;
    }
}
