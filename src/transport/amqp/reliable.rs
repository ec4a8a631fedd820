//! Publishing what must not be lost: until the broker has confirmed it.
//!
//! What the broker refuses, returns or doesn't confirm is published again, after pauses that grow. A
//! queue that can't take it holds up what waits for that message, and nothing else.

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
    publisher::{LaneLost, Outgoing, Published, Publisher},
};

/// The first pause before something is published again, and the longest.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// How often it is logged, at the most, that something is published again.
const SAID_EVERY: Duration = Duration::from_secs(10);

/// A lane for what must not be lost. `T` is what follows when a message is safe.
#[derive(Debug)]
pub struct ReliablePublisher<T> {
    lane: Publisher<Pending<T>>,
    /// What is to be published again, and when: in no order, and few.
    again: VecDeque<(Instant, Pending<T>)>,
    said_at: Option<Instant>,
}

#[derive(Debug)]
struct Pending<T> {
    message: Outgoing,
    then: T,
    backoff: Backoff,
}

impl<T: Send + 'static> ReliablePublisher<T> {
    /// A new channel of `connection`. `what` is published on it, as a log line would say.
    ///
    /// # Errors
    ///
    /// The connection gives none.
    pub async fn open(
        connection: &Arc<BrokerConnection>,
        what: impl Into<Arc<str>>,
    ) -> Result<Self, AskError> {
        let lane = Publisher::open(connection, what).await?;
        Ok(Self { lane, again: VecDeque::new(), said_at: None })
    }

    /// Publishes `message` until it is safe. One that is not `mandatory` counts as safe where no queue
    /// takes it.
    pub fn publish(&mut self, message: Outgoing, then: T) {
        self.write(Pending { message, then, backoff: Backoff::new(PAUSE_FIRST, PAUSE_MAX) });
    }

    fn write(&mut self, pending: Pending<T>) {
        self.lane.publish(pending.message.clone(), pending);
    }

    /// What follows from the next message that is safe; waits for ever if none is on its way.
    ///
    /// # Errors
    ///
    /// Nothing can be published any more.
    pub async fn next(&mut self) -> Result<T, LaneLost> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The same, if one is safe by now.
    pub fn ready(&mut self) -> Option<Result<T, LaneLost>> {
        self.next().now_or_never()
    }

    /// [`ReliablePublisher::next`], for those who wait for several.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<T, LaneLost>> {
        while let Poll::Ready(answered) = self.lane.poll_next(cx) {
            let (pending, published) = answered?;
            if let Some(then) = self.published(pending, &published) {
                return Poll::Ready(Ok(then));
            }
        }
        Poll::Pending
    }

    /// What follows, if the message is safe; else it is published again.
    fn published(&mut self, mut pending: Pending<T>, published: &Published) -> Option<T> {
        let fate = match published {
            Published::Confirmed => return Some(pending.then),
            Published::Unroutable => "no queue takes it; has `dtc topology apply` been run?",
            Published::Refused => "its queue is full, or the queue's node is down",
            Published::Unconfirmed(_) | Published::Lost(_) => "the broker did not confirm it",
        };
        let now = Instant::now();
        if self.said_at.is_none_or(|at| now - at >= SAID_EVERY) {
            self.said_at = Some(now);
            let Outgoing { exchange, key, .. } = &pending.message;
            tracing::error!(
                %exchange, %key, waiting = self.again.len() + 1,
                "a message that must not be lost is not safe yet, and is published again: {fate}"
            );
        }
        let at = now + pending.backoff.pause();
        self.again.push_back((at, pending));
        None
    }

    /// Publishes again what it is time for.
    pub fn flush(&mut self, now: Instant) {
        for _ in 0..self.again.len() {
            match self.again.pop_front() {
                Some((at, pending)) if at <= now => self.write(pending),
                Some(later) => self.again.push_back(later),
                None => {}
            }
        }
    }

    /// When to call [`ReliablePublisher::flush`], if nothing happens before.
    pub fn wake_at(&self) -> Option<Instant> {
        self.again.iter().map(|(at, _)| *at).min()
    }

    /// Whether everything is safe.
    pub fn is_idle(&self) -> bool {
        self.again.is_empty() && self.lane.outstanding() == 0
    }

    /// How many messages are on their way.
    pub fn outstanding(&self) -> usize {
        self.lane.outstanding()
    }

    /// Whether its channel stands, as far as is known.
    pub fn is_open(&self) -> bool {
        self.lane.is_open()
    }

    /// Waits until nothing is on its way.
    pub async fn finish(&mut self) {
        self.lane.finish().await;
    }
}
