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
const SAID_EVERY: Duration = Duration::from_secs(10);

/// A publisher for messages that must not be lost. `T` is what follows when a message is safe.
#[derive(Debug)]
pub struct ReliablePublisher<T> {
    lane: Publisher<PendingPublish<T>>,
    /// The messages to publish again, and when: unordered, and few.
    again: VecDeque<(Instant, PendingPublish<T>)>,
    said_at: Option<Instant>,
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
        let lane = Publisher::open(connection, what).await?;
        Ok(Self { lane, again: VecDeque::new(), said_at: None })
    }

    /// Publishes `message` until it is safe. If it is not `mandatory`, it counts as safe even if no
    /// queue takes it.
    pub fn publish(&mut self, message: OutgoingMessage, then: T) {
        self.write(PendingPublish { message, then, backoff: Backoff::new(PAUSE_FIRST, PAUSE_MAX) });
    }

    fn write(&mut self, pending: PendingPublish<T>) {
        self.lane.publish(pending.message.clone(), pending);
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
        while let Poll::Ready(answered) = self.lane.poll_next(cx) {
            let (pending, published) = answered?;
            if let Some(then) = self.published(pending, &published) {
                return Poll::Ready(Ok(then));
            }
        }
        Poll::Pending
    }

    /// What follows, if the message is safe; otherwise it will be published again.
    fn published(
        &mut self,
        mut pending: PendingPublish<T>,
        published: &PublishOutcome,
    ) -> Option<T> {
        let fate = match published {
            PublishOutcome::Confirmed => return Some(pending.then),
            PublishOutcome::Unroutable => "no queue takes it; has `dtc topology apply` been run?",
            PublishOutcome::Refused => "its queue is full, or the queue's node is down",
            PublishOutcome::Unconfirmed(_) | PublishOutcome::Lost(_) => {
                "the broker did not confirm it"
            }
        };
        let now = Instant::now();
        if self.said_at.is_none_or(|at| now - at >= SAID_EVERY) {
            self.said_at = Some(now);
            let OutgoingMessage { exchange, key, .. } = &pending.message;
            tracing::error!(
                %exchange, %key, waiting = self.again.len() + 1,
                "a message that must not be lost is not safe yet, and is published again: {fate}"
            );
        }
        let at = now + pending.backoff.pause();
        self.again.push_back((at, pending));
        None
    }

    /// Publishes again the messages whose pause is over.
    pub fn flush(&mut self, now: Instant) {
        for _ in 0..self.again.len() {
            match self.again.pop_front() {
                Some((at, pending)) if at <= now => self.write(pending),
                Some(later) => self.again.push_back(later),
                None => {}
            }
        }
    }

    /// When to call [`ReliablePublisher::flush`] at the latest.
    pub fn wake_at(&self) -> Option<Instant> {
        self.again.iter().map(|(at, _)| *at).min()
    }

    /// Whether everything is safe.
    pub fn is_idle(&self) -> bool {
        self.again.is_empty() && self.lane.outstanding() == 0
    }

    /// How many messages are unconfirmed.
    pub fn outstanding(&self) -> usize {
        self.lane.outstanding()
    }

    /// Whether its channel is open, as far as is known.
    pub fn is_open(&self) -> bool {
        self.lane.is_open()
    }

    /// Waits until every publish has its result.
    pub async fn finish(&mut self) {
        self.lane.finish().await;
    }
}
