//! The exclusive queue of one connection, on which a worker, an instance or a producer receives
//! messages.
//!
//! **Its name is new with every connection.** The broker may not have noticed yet that the previous
//! connection is gone, or the previous queue's node may be down; then the old queue still exists,
//! locked and bound, and its name can't be declared. A message that is also routed to the old queue
//! is lost or nacked there, but still reaches the new one through the new one's own bindings.
//!
//! **It proves that the link is alive.** From time to time a probe is published to it on the link's
//! other connection. If it doesn't arrive, the broker no longer reads from the one connection or no
//! longer delivers on the other, and the link is useless. No other wait could detect that: an empty
//! queue looks the same, and a publish without a confirm looks as if it had arrived. If the probe
//! is returned, the broker has lost the queue: nodes that lost each other delete the exclusive
//! queues of the other side, and the queue's own node doesn't end its consumer then.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{Future, FutureExt};
use lapin::{
    message::Delivery,
    options::{QueueBindOptions, QueueDeclareOptions},
    types::{FieldTable, ShortString},
};
use tokio::time::{Instant, Sleep, sleep};

use crate::transport::amqp::{
    bounded::{ANSWER_MAX, AskError, STALL_MIN, answer},
    connection::BrokerConnection,
    consumer::{ConsumerError, QueueConsumer},
    publisher::{OutgoingMessage, PublishOutcome, Publisher},
    unique,
};

/// The pause before the next probe is sent.
const PROBE_AFTER: Duration = Duration::from_secs(1);

/// How long a probe may take to arrive, and once more as long if other messages arrive meanwhile,
/// which it may have to wait behind.
const PROBE_MAX: Duration = Duration::from_secs(4);

/// The `type` property of a probe. Only this module sees probes.
const PROBE: &str = "dtc.probe.v1";

/// A binding of the queue: an exchange and a routing key.
#[derive(Clone, Debug)]
pub struct ExchangeBinding {
    /// The exchange.
    pub exchange: ShortString,
    /// The routing key, with wildcards.
    pub key: ShortString,
}

/// An exclusive queue could not be opened.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ExclusiveQueueError {
    /// The connection gives no channel.
    #[error("failed to open a channel")]
    Channel(#[source] AskError),
    /// The queue can't be declared or consumed.
    #[error("failed to use queue `{queue}`")]
    Queue {
        /// The queue.
        queue: ShortString,
        /// The cause.
        #[source]
        source: AskError,
    },
    /// The queue can't be bound to the exchange.
    #[error("failed to bind queue `{queue}` to exchange `{exchange}`")]
    Exchange {
        /// The queue.
        queue: ShortString,
        /// The exchange.
        exchange: ShortString,
        /// The cause.
        #[source]
        source: AskError,
    },
}

impl ExclusiveQueueError {
    /// The failed request.
    pub fn source_error(&self) -> &AskError {
        match self {
            Self::Channel(source) | Self::Queue { source, .. } | Self::Exchange { source, .. } => {
                source
            }
        }
    }
}

/// An exclusive queue and its consumer.
#[derive(Debug)]
pub struct ExclusiveQueue {
    consumer: QueueConsumer,
    probe: Option<LinkProbe>,
}

impl ExclusiveQueue {
    /// Declares a queue on `connection`, named `stem` with a unique part; binds it, and consumes it
    /// with at most `prefetch` unacknowledged deliveries.
    ///
    /// # Errors
    ///
    /// The broker refuses a step, or does not answer.
    pub async fn open(
        connection: &BrokerConnection,
        stem: impl fmt::Display,
        bindings: &[ExchangeBinding],
        prefetch: u16,
    ) -> Result<Self, ExclusiveQueueError> {
        let queue = ShortString::from(format!("{stem}.{}", unique::name('q')));
        let channel = answer(ANSWER_MAX, connection.create_channel()).await;
        let channel = channel.map_err(ExclusiveQueueError::Channel)?;
        let failed = |source| ExclusiveQueueError::Queue { queue: queue.clone(), source };
        let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        let declaring = channel.queue_declare(queue.clone(), options, FieldTable::default());
        answer(ANSWER_MAX, declaring).await.map_err(failed)?;
        for ExchangeBinding { exchange, key } in bindings {
            let binding = channel.queue_bind(
                queue.clone(),
                exchange.clone(),
                key.clone(),
                QueueBindOptions::default(),
                FieldTable::default(),
            );
            answer(ANSWER_MAX, binding).await.map_err(|source| ExclusiveQueueError::Exchange {
                queue: queue.clone(),
                exchange: exchange.clone(),
                source,
            })?;
        }
        let consumer =
            QueueConsumer::on_channel(channel, queue.clone(), prefetch, FieldTable::default())
                .await;
        Ok(Self { consumer: consumer.map_err(failed)?.with_lazy_acks(), probe: None })
    }

    /// Checks by probes that publishes on `publishing` still arrive here, as long as `is_needed`.
    ///
    /// # Errors
    ///
    /// `publishing` gives no channel.
    pub async fn with_link_probe(
        self,
        publishing: &Arc<BrokerConnection>,
        is_needed: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Result<Self, AskError> {
        let queue = self.consumer.queue().clone();
        let probe = LinkProbe::new(publishing, queue, Box::new(is_needed)).await?;
        Ok(Self { probe: Some(probe), ..self })
    }

    /// Its name.
    pub fn name(&self) -> &ShortString {
        self.consumer.queue()
    }

    /// The next delivery. Acknowledge it by [`ExclusiveQueue::ack`].
    ///
    /// # Errors
    ///
    /// There will be no more: the connection is gone, or useless.
    pub async fn next(&mut self) -> Result<Delivery, ConsumerError> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The next delivery, if it has arrived already.
    pub fn try_next(&mut self) -> Option<Result<Delivery, ConsumerError>> {
        self.next().now_or_never()
    }

    /// [`ExclusiveQueue::next`] as a poll function, for callers that wait for several things.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Delivery, ConsumerError>> {
        loop {
            match self.consumer.poll_next(cx) {
                Poll::Ready(Ok(delivery)) => {
                    let is_probe = is_probe(&delivery);
                    if let Some(probe) = &mut self.probe {
                        probe.received(is_probe);
                    }
                    if !is_probe {
                        return Poll::Ready(Ok(delivery));
                    }
                    self.consumer.ack_now(delivery.delivery_tag);
                }
                Poll::Ready(Err(closed)) => return Poll::Ready(Err(closed)),
                Poll::Pending => break,
            }
        }
        let Some(probe) = &mut self.probe else { return Poll::Pending };
        if !probe.publisher.is_open() {
            tracing::debug!(queue = %probe.queue, "the link is not probed: the broker refuses it");
            self.probe = None;
            return Poll::Pending;
        }
        probe.poll(cx).map(Err)
    }

    /// Acknowledges the delivery.
    pub fn ack(&mut self, tag: u64) {
        self.consumer.ack(tag);
    }

    /// Sends the acknowledgements to the broker.
    pub fn flush(&mut self) {
        self.consumer.flush();
    }
}

fn is_probe(delivery: &Delivery) -> bool {
    delivery.properties.kind().as_ref().is_some_and(|kind| kind.as_str() == PROBE)
}

/// Checks that a link is alive.
struct LinkProbe {
    publishing: Arc<BrokerConnection>,
    publisher: Publisher<()>,
    queue: ShortString,
    is_needed: Box<dyn Fn() -> bool + Send + Sync>,
    /// Whether a message has arrived since the probe was sent.
    has_received: bool,
    /// Since when a probe is on its way.
    sent_at: Option<Instant>,
    /// Whether its time limit was extended.
    is_extended: bool,
    timer: Pin<Box<Sleep>>,
}

impl LinkProbe {
    async fn new(
        publishing: &Arc<BrokerConnection>,
        queue: ShortString,
        is_needed: Box<dyn Fn() -> bool + Send + Sync>,
    ) -> Result<Self, AskError> {
        Ok(Self {
            publisher: Publisher::open(publishing, "probes").await?,
            publishing: Arc::clone(publishing),
            queue,
            is_needed,
            has_received: false,
            sent_at: None,
            is_extended: false,
            timer: Box::pin(sleep(PROBE_AFTER)),
        })
    }

    /// A message has arrived.
    fn received(&mut self, is_probe: bool) {
        self.has_received = true;
        if is_probe && self.sent_at.take().is_some() {
            self.wait(PROBE_AFTER);
        }
    }

    /// Ready when the link is useless.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ConsumerError> {
        loop {
            // Others watch the probe's channel. A probe that was just sent is polled too: otherwise its
            // return would wake nobody.
            while let Poll::Ready(Ok(((), published))) = self.publisher.poll_next(cx) {
                if matches!(published, PublishOutcome::Unroutable) {
                    return Poll::Ready(ConsumerError::Unknown { queue: self.queue.to_string() });
                }
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let is_late = self.timer.deadline().elapsed() >= STALL_MIN;
            // A broker with an alarm reads no publishes, and has reported that.
            let is_blocked = self.publishing.status().blocked();
            match self.sent_at {
                None if is_blocked || !(self.is_needed)() => self.wait(PROBE_AFTER),
                None => self.send(),
                Some(_) if is_blocked => {
                    self.sent_at = None;
                    self.wait(PROBE_AFTER);
                }
                Some(_) if is_late || (self.has_received && !self.is_extended) => {
                    self.is_extended = true;
                    self.wait(PROBE_MAX);
                }
                Some(sent_at) => {
                    let (queue, silent_for) = (self.queue.to_string(), sent_at.elapsed());
                    return Poll::Ready(ConsumerError::Silent { queue, silent_for });
                }
            }
        }
    }

    fn send(&mut self) {
        let message = OutgoingMessage {
            key: self.queue.clone(),
            message_type: PROBE,
            expires_after: Some(PROBE_MAX * 2),
            mandatory: true,
            ..OutgoingMessage::default()
        };
        self.publisher.publish(message, ());
        (self.sent_at, self.has_received, self.is_extended) = (Some(Instant::now()), false, false);
        self.wait(PROBE_MAX);
    }

    fn wait(&mut self, pause: Duration) {
        self.timer.as_mut().reset(Instant::now() + pause);
    }
}

impl fmt::Debug for LinkProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LinkProbe").field("queue", &self.queue).finish_non_exhaustive()
    }
}
