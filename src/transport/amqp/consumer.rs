//! Consuming, and acknowledging in as few frames as possible.

use std::{
    collections::BTreeSet,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture};
use lapin::{
    Channel,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
};
use tokio::time::{Instant, Sleep, sleep};

use crate::transport::amqp::{
    bounded::{ANSWER_MAX, AskError, answer, write_now},
    connection::{BrokerConnection, QueueCounts, counts},
    error::is_precondition_failed,
    traffic,
};

/// How long a consumer with lazy acknowledgements may delay one: far less than the broker's
/// consumer timeout.
const LAZY_FOR: Duration = Duration::from_secs(1);

/// After how long without a delivery to ask the broker whether it still knows the consumer.
const PROBE_EVERY: Duration = Duration::from_secs(5);

/// After how long without a delivery an idle consumer is replaced by a new one.
const RENEW_AFTER: Duration = Duration::from_secs(6);

/// How soon the broker delivers again what it believed to have delivered to the previous one.
const REQUEUED_WITHIN: Duration = Duration::from_secs(1);

/// How long to wait before asking again after a bad answer, which may have been temporary.
const PROBE_AGAIN_AFTER: Duration = Duration::from_secs(3);

/// Why there are no more deliveries.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConsumerError {
    /// The broker has ended the consumer: the queue or its leader is gone.
    #[error("the broker has cancelled the consumer of `{queue}`")]
    Cancelled {
        /// The queue.
        queue: String,
    },
    /// The broker has not ended the consumer but gives it nothing: the queue is gone, or was
    /// declared again.
    #[error(
        "the broker has forgotten the consumer of `{queue}`: nothing came for {:.1} s",
        silent_for.as_secs_f64()
    )]
    Forgotten {
        /// The queue.
        queue: String,
        /// How long nothing has arrived.
        silent_for: Duration,
    },
    /// The probe that was published to the queue did not arrive.
    #[error(
        "the broker has delivered nothing of `{queue}` for {:.1} s, though something is in it",
        silent_for.as_secs_f64()
    )]
    Silent {
        /// The queue.
        queue: String,
        /// How long nothing has arrived.
        silent_for: Duration,
    },
    /// The probe that was published to the queue was returned.
    #[error("the broker does not know `{queue}` any more, and has not ended its consumer")]
    Unknown {
        /// The queue.
        queue: String,
    },
    /// The channel or the connection is gone.
    #[error("the channel that consumed `{queue}` is lost")]
    Lost {
        /// The queue.
        queue: String,
        /// The cause.
        #[source]
        source: lapin::Error,
    },
}

impl ConsumerError {
    /// The broker's reason, if it gave one.
    pub fn broker(&self) -> Option<&lapin::Error> {
        match self {
            Self::Lost { source, .. } => Some(source),
            Self::Cancelled { .. }
            | Self::Forgotten { .. }
            | Self::Silent { .. }
            | Self::Unknown { .. } => None,
        }
    }
}

/// A consumer with its own channel.
#[derive(Debug)]
pub struct QueueConsumer {
    queue: ShortString,
    channel: Channel,
    consumer: lapin::Consumer,
    tags: SettledTags,
    prefetch: u16,
    arguments: FieldTable,
    lazy: Option<LazyAcks>,
    probe: Option<LivenessProbe>,
    renewal: Option<ConsumerRenewal>,
}

/// Acknowledgements that wait for more.
#[derive(Debug)]
struct LazyAcks {
    /// Until when they wait, if there are any.
    is_waiting: bool,
    until: Pin<Box<Sleep>>,
}

impl LazyAcks {
    /// Notes that some are waiting; returns whether they have waited long enough.
    fn is_due(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.is_waiting {
            self.is_waiting = true;
            self.until.as_mut().reset(Instant::now() + LAZY_FOR);
        }
        self.until.as_mut().poll(cx).is_ready()
    }
}

impl QueueConsumer {
    /// Consumes `queue` on a new channel of `connection`, with at most `prefetch` unacknowledged
    /// deliveries.
    pub async fn open(
        connection: &BrokerConnection,
        queue: ShortString,
        prefetch: u16,
        arguments: FieldTable,
    ) -> Result<Self, AskError> {
        Self::open_within(ANSWER_MAX, connection, queue, prefetch, arguments).await
    }

    /// The same, with another time limit for the broker to start the consumer.
    pub async fn open_within(
        limit: Duration,
        connection: &BrokerConnection,
        queue: ShortString,
        prefetch: u16,
        arguments: FieldTable,
    ) -> Result<Self, AskError> {
        let channel = answer(ANSWER_MAX, connection.create_channel()).await?;
        Self::start_within(limit, channel, queue, prefetch, arguments).await
    }

    /// The same for a durable queue that may be declared again while it is consumed. When the
    /// process of a classic queue ends, the broker would move its consumers to any queue that then
    /// has the name; if that is a new queue, they get nothing. The argument makes the broker end
    /// them instead. Quorum queues refuse that argument: see
    /// [`QueueConsumer::with_liveness_probe`].
    pub async fn open_durable(
        connection: &BrokerConnection,
        queue: ShortString,
        prefetch: u16,
    ) -> Result<Self, AskError> {
        let mut arguments = FieldTable::default();
        arguments.insert("x-cancel-on-ha-failover".into(), AMQPValue::Boolean(true));
        match Self::open(connection, queue.clone(), prefetch, arguments).await {
            Err(AskError::Broker(error)) if is_precondition_failed(&error) => {
                Self::open(connection, queue, prefetch, FieldTable::default()).await
            }
            opened => opened,
        }
    }

    /// The same on a channel without other consumers.
    pub async fn on_channel(
        channel: Channel,
        queue: ShortString,
        prefetch: u16,
        arguments: FieldTable,
    ) -> Result<Self, AskError> {
        Self::start_within(ANSWER_MAX, channel, queue, prefetch, arguments).await
    }

    async fn start_within(
        limit: Duration,
        channel: Channel,
        queue: ShortString,
        prefetch: u16,
        arguments: FieldTable,
    ) -> Result<Self, AskError> {
        let started = Self::consume(limit, &channel, &queue, prefetch, &arguments).await;
        let consumer = started.inspect_err(|error| {
            // If the broker starts the consumer too late, it would deliver messages that nobody
            // takes.
            if error.is_silent() {
                let channel = channel.clone();
                tokio::spawn(async move { channel.close(200, "done".into()).await });
            }
        })?;
        Ok(Self {
            consumer,
            queue,
            channel,
            tags: SettledTags::default(),
            prefetch,
            arguments,
            lazy: None,
            probe: None,
            renewal: None,
        })
    }

    async fn consume(
        limit: Duration,
        channel: &Channel,
        queue: &ShortString,
        prefetch: u16,
        arguments: &FieldTable,
    ) -> Result<lapin::Consumer, AskError> {
        answer(ANSWER_MAX, channel.basic_qos(prefetch, BasicQosOptions::default())).await?;
        let options = BasicConsumeOptions::default();
        let consuming = channel.basic_consume(queue.clone(), "".into(), options, arguments.clone());
        answer(limit, consuming).await
    }

    /// Acknowledges only from time to time, for exclusive queues and streams: there only the broker
    /// needs acknowledgements, in order to send more than the prefetch. They are flushed while the
    /// next delivery is awaited.
    #[must_use]
    pub fn with_lazy_acks(self) -> Self {
        let lazy = LazyAcks { is_waiting: false, until: Box::pin(sleep(Duration::ZERO)) };
        Self { lazy: Some(lazy), ..self }
    }

    /// While nothing arrives, asks the broker from time to time whether it still has this consumer,
    /// and moves to another channel after a while. `connection` is the consumer's. Not for streams.
    #[must_use]
    pub fn with_liveness_probe(
        self,
        connection: &Arc<BrokerConnection>,
        mode: ConsumerMode,
    ) -> Self {
        let probe = LivenessProbe::new(Arc::clone(connection), self.queue.clone(), mode);
        // A single active consumer would lose its turn.
        let renewal =
            (mode == ConsumerMode::Competing).then(|| ConsumerRenewal::new(Arc::clone(connection)));
        Self { probe: Some(probe), renewal, ..self }
    }

    /// The queue.
    pub fn queue(&self) -> &ShortString {
        &self.queue
    }

    /// The next delivery. Settle each one, by [`QueueConsumer::ack`] or [`QueueConsumer::requeue`].
    ///
    /// # Errors
    ///
    /// There will be no more deliveries; the broker delivers unsettled ones again, to any consumer.
    pub async fn next(&mut self) -> Result<Delivery, ConsumerError> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Makes the first check of the liveness probe at once.
    #[must_use]
    pub fn checked_at_once(mut self) -> Self {
        if let Some(probe) = &mut self.probe {
            probe.due.as_mut().reset(Instant::now());
        }
        self
    }

    /// How many consumers the queue had when the liveness probe last checked, this one included.
    pub fn consumers(&self) -> Option<u32> {
        self.probe.as_ref()?.consumers
    }

    /// [`QueueConsumer::next`] as a poll function, for callers that wait for several things.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Delivery, ConsumerError>> {
        let next = loop {
            if let Poll::Ready(next) = self.consumer.poll_next_unpin(cx) {
                break next;
            }
            // A new consumer is polled at once.
            if !self.poll_renewal(cx) {
                return self.poll_timers(cx).map(Err);
            }
        };
        Poll::Ready(match next {
            Some(Ok(delivery)) => {
                traffic::delivered();
                self.tags.last = self.tags.last.max(delivery.delivery_tag);
                if let Some(probe) = &mut self.probe {
                    probe.has_delivered = true;
                }
                if let Some(renewal) = &mut self.renewal {
                    renewal.delivered(&self.queue, delivery.redelivered);
                }
                Ok(delivery)
            }
            Some(Err(source)) => Err(ConsumerError::Lost { queue: self.queue.to_string(), source }),
            None => Err(ConsumerError::Cancelled { queue: self.queue.to_string() }),
        })
    }

    /// Whether a new consumer has replaced this one.
    fn poll_renewal(&mut self, cx: &mut Context<'_>) -> bool {
        let is_idle = self.tags.outstanding() == 0;
        let Some(renewal) = &mut self.renewal else { return false };
        let (queue, arguments) = (&self.queue, &self.arguments);
        let opened = renewal.poll(cx, is_idle, queue, self.prefetch, arguments);
        let Some(OpenedConsumer { channel, consumer }) = opened else { return false };
        renewal.renewed_at = Some(Instant::now());
        let old = OpenedConsumer {
            channel: std::mem::replace(&mut self.channel, channel),
            consumer: std::mem::replace(&mut self.consumer, consumer),
        };
        self.tags = SettledTags::default();
        old.discard();
        true
    }

    /// The work to do while nothing arrives.
    fn poll_timers(&mut self, cx: &mut Context<'_>) -> Poll<ConsumerError> {
        if let Some(lazy) = &mut self.lazy
            && !self.tags.unknown.is_empty()
            && (self.tags.unknown.len() >= lazy_acks_max(self.prefetch) || lazy.is_due(cx))
        {
            self.flush_all();
        }
        let has_room = self.tags.outstanding() < u64::from(self.prefetch);
        match &mut self.probe {
            Some(probe) => probe.poll(cx, has_room),
            None => Poll::Pending,
        }
    }

    /// The next delivery, if it has arrived already.
    pub fn try_next(&mut self) -> Option<Result<Delivery, ConsumerError>> {
        self.next().now_or_never()
    }

    /// Acknowledges the delivery; [`QueueConsumer::flush`] sends that to the broker.
    pub fn ack(&mut self, tag: u64) {
        self.tags.settle(tag);
    }

    /// Acknowledges the delivery, and sends that and all earlier acknowledgements at once.
    pub fn ack_now(&mut self, tag: u64) {
        self.ack(tag);
        self.flush_all();
    }

    /// Returns the delivery to the queue, at once.
    pub fn requeue(&mut self, tag: u64) {
        self.tags.mark_requeued(tag);
        write_now(
            self.channel.basic_nack(tag, BasicNackOptions { requeue: true, multiple: false }),
        );
    }

    /// Sends the acknowledgements to the broker. With lazy acknowledgements, a few are sent only
    /// while nothing arrives.
    pub fn flush(&mut self) {
        if self.lazy.is_none() || self.tags.unknown.len() >= lazy_acks_max(self.prefetch) {
            self.flush_all();
        }
    }

    fn flush_all(&mut self) {
        if let Some(lazy) = &mut self.lazy {
            lazy.is_waiting = false;
        }
        for (tag, multiple) in self.tags.flush() {
            write_now(self.channel.basic_ack(tag, BasicAckOptions { multiple }));
        }
    }

    /// Stops consuming. Deliveries that it holds stay valid; those that were already sent may still
    /// arrive.
    pub async fn cancel(&mut self) -> Result<(), AskError> {
        (self.probe, self.renewal) = (None, None);
        let options = BasicCancelOptions::default();
        answer(ANSWER_MAX, self.channel.basic_cancel(self.consumer.tag(), options)).await
    }

    /// Closes the channel, which returns all unsettled deliveries to the queue.
    pub async fn close(self) {
        let _ = answer(ANSWER_MAX, self.channel.close(200, "done".into())).await;
    }
}

/// A new consumer that replaces one that gets nothing and holds nothing.
///
/// The broker may believe that it has delivered a message which never arrived, for example if it
/// was on its way between two nodes that lost each other. It requeues the message when the channel
/// is closed. No request shows this: such a message counts neither as ready nor as lost.
struct ConsumerRenewal {
    connection: Arc<BrokerConnection>,
    due: Pin<Box<Sleep>>,
    /// When the last delivery arrived, or the consumer was started.
    delivered_at: Instant,
    opening: Option<BoxFuture<'static, Result<OpenedConsumer, AskError>>>,
    /// When opening it began.
    opening_since: Instant,
    /// When the new consumer replaced the previous one, if nothing has arrived since.
    renewed_at: Option<Instant>,
}

/// A channel, and its only consumer.
struct OpenedConsumer {
    channel: Channel,
    consumer: lapin::Consumer,
}

impl OpenedConsumer {
    /// Gives up what the broker has delivered to it, without waiting.
    fn discard(self) {
        let Self { channel, consumer } = self;
        tokio::spawn(async move {
            // In this order: lapin cancels a consumer when it is dropped, and the broker closes a
            // connection that names a channel which it has closed.
            let options = BasicCancelOptions::default();
            let cancelled = answer(ANSWER_MAX, channel.basic_cancel(consumer.tag(), options)).await;
            if cancelled.is_ok() {
                let _ = answer(ANSWER_MAX, channel.close(200, "done".into())).await;
            }
            drop(consumer);
        });
    }
}

impl ConsumerRenewal {
    fn new(connection: Arc<BrokerConnection>) -> Self {
        let due = Box::pin(sleep(RENEW_AFTER));
        Self {
            connection,
            due,
            delivered_at: Instant::now(),
            opening: None,
            opening_since: Instant::now(),
            renewed_at: None,
        }
    }

    /// The new consumer that replaces the present one, when there is one. `is_idle`: the present
    /// one holds nothing.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        is_idle: bool,
        queue: &ShortString,
        prefetch: u16,
        arguments: &FieldTable,
    ) -> Option<OpenedConsumer> {
        loop {
            if let Some(opening) = &mut self.opening {
                let Poll::Ready(opened) = opening.poll_unpin(cx) else { return None };
                self.opening = None;
                let has_delivered = self.delivered_at > self.opening_since;
                self.delivered_at = Instant::now();
                match opened {
                    Ok(opened) if is_idle && !has_delivered => return Some(opened),
                    // A delivery did arrive at the old one.
                    Ok(opened) => opened.discard(),
                    Err(error) => tracing::debug!(%queue, %error, "no other consumer is to be had"),
                }
            }
            if self.due.as_mut().poll(cx).is_pending() {
                return None;
            }
            let now = Instant::now();
            if !is_idle {
                self.delivered_at = now;
            }
            let due_at = self.delivered_at + RENEW_AFTER;
            if due_at > now {
                self.due.as_mut().reset(due_at);
            } else {
                self.opening_since = now;
                let connection = Arc::clone(&self.connection);
                let (queue, arguments) = (queue.clone(), arguments.clone());
                let opening = async move {
                    let opened =
                        QueueConsumer::open(&connection, queue, prefetch, arguments).await?;
                    let QueueConsumer { channel, consumer, .. } = opened;
                    Ok(OpenedConsumer { channel, consumer })
                };
                self.opening = Some(opening.boxed());
            }
        }
    }

    /// A delivery has arrived.
    fn delivered(&mut self, queue: &ShortString, redelivered: bool) {
        self.delivered_at = Instant::now();
        if self.renewed_at.take_if(|at| at.elapsed() >= REQUEUED_WITHIN).is_some() || !redelivered {
            return;
        }
        if self.renewed_at.take().is_some() {
            tracing::warn!(
                "the broker had delivered a message of `{queue}` that did not arrive; it came by \
                 another channel after nothing had come for {:.1} s",
                RENEW_AFTER.as_secs_f64()
            );
        }
    }
}

impl std::fmt::Debug for ConsumerRenewal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConsumerRenewal")
            .field("delivered_at", &self.delivered_at)
            .finish_non_exhaustive()
    }
}

/// Up to how many lazy acknowledgements wait for more.
fn lazy_acks_max(prefetch: u16) -> usize {
    usize::from(prefetch / 4).max(1)
}

/// When a consumer gets messages from its queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConsumerMode {
    /// Whenever it has room, in turn with the others.
    Competing,
    /// When it is the single active consumer.
    SingleActive,
}

/// Detects whether the broker still delivers to a consumer. If a quorum queue is deleted and
/// declared again before the channel is notified, the broker still counts its consumers; but what
/// it sends them never arrives, and waits until the channel is closed.
///
/// This can be detected only in part: the broker reports how many consumers a queue has, but not
/// whose they are, and how many messages are ready, but not how many are on their way. So the probe
/// misses a lost consumer that may still be sent more than there is, or that competes with others
/// which take everything. It detects it when more messages arrive than that.
struct LivenessProbe {
    connection: Arc<BrokerConnection>,
    queue: ShortString,
    mode: ConsumerMode,
    /// When to check next.
    due: Pin<Box<Sleep>>,
    /// Whether a delivery arrived since the last check.
    has_delivered: bool,
    /// When a delivery was last known to have arrived.
    delivered_at: Instant,
    /// Whether the last check was bad.
    is_suspicious: bool,
    /// How many consumers the queue had at the last check that counted any.
    consumers: Option<u32>,
    probing: Option<BoxFuture<'static, Result<Option<QueueCounts>, AskError>>>,
}

impl LivenessProbe {
    fn new(connection: Arc<BrokerConnection>, queue: ShortString, mode: ConsumerMode) -> Self {
        Self {
            connection,
            queue,
            mode,
            due: Box::pin(sleep(PROBE_EVERY)),
            has_delivered: false,
            delivered_at: Instant::now(),
            is_suspicious: false,
            consumers: None,
            probing: None,
        }
    }

    /// Ready when the consumer is lost. `has_room`: the broker may deliver more to it.
    fn poll(&mut self, cx: &mut Context<'_>, has_room: bool) -> Poll<ConsumerError> {
        loop {
            if let Some(probing) = &mut self.probing {
                let Poll::Ready(found) = probing.poll_unpin(cx) else { return Poll::Pending };
                self.probing = None;
                if self.is_forgotten(found.as_ref(), has_room) {
                    let (queue, silent_for) = (self.queue.to_string(), self.delivered_at.elapsed());
                    return Poll::Ready(ConsumerError::Forgotten { queue, silent_for });
                }
                let pause = if self.is_suspicious { PROBE_AGAIN_AFTER } else { PROBE_EVERY };
                self.due.as_mut().reset(Instant::now() + pause);
            }
            if self.due.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if std::mem::take(&mut self.has_delivered) {
                self.delivered_at = Instant::now();
                self.is_suspicious = false;
                self.due.as_mut().reset(Instant::now() + PROBE_EVERY);
            } else {
                let (connection, queue) = (Arc::clone(&self.connection), self.queue.clone());
                let probing = async move { answer(ANSWER_MAX, counts(&connection, queue)).await };
                self.probing = Some(probing.boxed());
            }
        }
    }

    /// The result of a check. The broker reports a queue that has no leader at the moment as empty
    /// and without consumers, and a message that has just arrived is not yet delivered: so a check
    /// must be bad twice, except if the queue doesn't exist.
    fn is_forgotten(
        &mut self,
        found: Result<&Option<QueueCounts>, &AskError>,
        has_room: bool,
    ) -> bool {
        let was_suspicious = std::mem::take(&mut self.is_suspicious);
        // Others watch the connection.
        let Ok(found) = found else { return false };
        let Some(QueueCounts { messages, consumers }) = found else { return true };
        let is_passed_over = *messages > 0 && has_room && self.mode == ConsumerMode::Competing;
        self.consumers = Some(*consumers).filter(|count| *count > 0).or(self.consumers);
        self.is_suspicious = !self.has_delivered && (*consumers == 0 || is_passed_over);
        was_suspicious && self.is_suspicious
    }
}

impl std::fmt::Debug for LivenessProbe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LivenessProbe").field("queue", &self.queue).finish_non_exhaustive()
    }
}

/// The settled delivery tags of a channel, which count from 1.
#[derive(Debug, Default)]
struct SettledTags {
    /// All tags up to here are settled, and the broker knows.
    floor: u64,
    /// Tags above the floor that are settled, and whether the broker knows.
    known: BTreeSet<u64>,
    unknown: BTreeSet<u64>,
    /// The last delivered tag.
    last: u64,
}

impl SettledTags {
    fn settle(&mut self, tag: u64) {
        if tag > self.floor && !self.known.contains(&tag) {
            self.unknown.insert(tag);
        }
    }

    /// The broker already knows that this one is settled, by a requeue.
    fn mark_requeued(&mut self, tag: u64) {
        self.unknown.remove(&tag);
        if tag > self.floor {
            self.known.insert(tag);
        }
    }

    /// How many unsettled deliveries the broker counts.
    fn outstanding(&self) -> u64 {
        self.last.saturating_sub(self.floor).saturating_sub(self.known.len() as u64)
    }

    /// The acknowledgements to send now: (tag, whether it includes all earlier ones).
    fn flush(&mut self) -> Vec<(u64, bool)> {
        let mut acks = Vec::new();
        let mut last_unknown = None;
        let mut count = 0_u32;
        loop {
            let next = self.floor + 1;
            if self.unknown.remove(&next) {
                last_unknown = Some(next);
                count += 1;
            } else if !self.known.remove(&next) {
                break;
            }
            self.floor = next;
        }
        // Name only tags that the broker still counts as unsettled, otherwise it closes the
        // channel.
        acks.extend(last_unknown.map(|tag| (tag, count > 1)));
        for tag in std::mem::take(&mut self.unknown) {
            acks.push((tag, false));
            self.known.insert(tag);
        }
        acks
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::{Just, Strategy, any, prop, prop_assert, prop_assert_eq, proptest};

    use super::SettledTags;

    #[test]
    fn a_run_from_the_start_is_one_frame() {
        let mut tags = SettledTags::default();
        (1..=5).for_each(|tag| tags.settle(tag));
        assert_eq!(tags.flush(), [(5, true)]);
        assert_eq!(tags.flush(), []);
    }

    #[test]
    fn an_unsettled_delivery_does_not_delay_later_acknowledgements() {
        let mut tags = SettledTags::default();
        (2..=4).for_each(|tag| tags.settle(tag));
        assert_eq!(tags.flush(), [(2, false), (3, false), (4, false)]);
        tags.settle(1);
        assert_eq!(tags.flush(), [(1, false)]);
        tags.settle(5);
        assert_eq!(tags.flush(), [(5, false)]);
    }

    #[test]
    fn a_requeued_delivery_is_not_acknowledged() {
        let mut tags = SettledTags::default();
        tags.settle(1);
        tags.mark_requeued(2);
        tags.settle(3);
        assert_eq!(tags.flush(), [(3, true)]);
    }

    /// The broker's side: it closes the channel for a tag that it doesn't count as unsettled.
    fn acknowledge(outstanding: &mut BTreeSet<u64>, tag: u64, multiple: bool) -> bool {
        let known = outstanding.contains(&tag);
        outstanding.retain(|&it| it != tag && !(multiple && it < tag));
        known
    }

    proptest! {
        #[test]
        fn each_settled_tag_is_acknowledged_once_and_no_other(
            order in (1..40_u64).prop_flat_map(|n| Just((1..=n).collect::<Vec<_>>()).prop_shuffle()),
            flushes in prop::collection::vec(any::<bool>(), 40),
            requeued in prop::collection::vec(any::<bool>(), 40),
        ) {
            let mut tags = SettledTags::default();
            let mut outstanding: BTreeSet<u64> = order.iter().copied().collect();
            let mut settled = BTreeSet::new();
            for (index, &tag) in order.iter().enumerate() {
                settled.insert(tag);
                if requeued[index] {
                    tags.mark_requeued(tag);
                    outstanding.remove(&tag);
                } else {
                    tags.settle(tag);
                }
                if flushes[index] {
                    for (tag, multiple) in tags.flush() {
                        prop_assert!(acknowledge(&mut outstanding, tag, multiple));
                    }
                    prop_assert!(outstanding.is_disjoint(&settled));
                    prop_assert_eq!(outstanding.len() + settled.len(), order.len());
                }
            }
        }
    }
}
