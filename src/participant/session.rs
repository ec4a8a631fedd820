//! One session of an instance: its queues while it is connected, and its unacknowledged deliveries.
//!
//! **Invariant:** a delivery is acknowledged only on the channel that it came by. Its tag is
//! meaningless in the next session.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use lapin::{
    message::Delivery as Message,
    types::{FieldTable, ShortString},
};
use tokio::{
    runtime::Handle,
    time::{Instant, timeout_at},
};
use tracing::{Instrument as _, Span};

use crate::{
    clock::Clock,
    error::ErrorChain,
    participant::{
        error::OpenError,
        inbound::{Inbound, SourceQueue, read},
        outbox::OutboundMessage,
        settings::ServeSettings,
    },
    protocol::{
        ids::StoreId,
        message::{Cap, Delivery},
        participant::Event,
    },
    transport::amqp::{
        agreed_value::{AgreedValue, AgreedValueError},
        bounded::{ANSWER_MAX, AskError, answer},
        connection::{BrokerConnection, QueueCounts, counts},
        connection_pair::{ConnectionEvent, ConnectionMonitor, ConnectionPair},
        consumer::{ConsumerError, ConsumerMode, QueueConsumer},
        error::{is_not_found, is_out_of_reach, is_refusal},
        exclusive_queue::{ExchangeBinding, ExclusiveQueue, ExclusiveQueueError},
        names::{ALL, Names, key},
        publisher::{OutgoingMessage, PublishOutcome, Publisher, PublisherError},
        rejected::rejected,
        reliable::ReliablePublisher,
        topology::{
            self, ServiceTopology,
            apply::{ApplyOptions, apply_services},
        },
    },
};

/// The prefetch of an instance's own queue.
const OWN_PREFETCH: u16 = 1024;
/// The prefetch of the service's durable queue: a commit that keeps failing stays unacknowledged.
const SHARED_PREFETCH: u16 = 256;
/// With so many unconfirmed messages, the session receives no more.
const OUTSTANDING_MAX: usize = 4096;
/// The pause before the next attempt to consume a queue that can't be reached.
const OPEN_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// How many inputs to handle between two flushes.
const BATCH_MAX: usize = 1024;

/// The instance's part in the agreement on the store, which holds as long as this exists.
type Kept = Option<Box<dyn Send + Sync>>;

/// The parts of an open session.
struct SessionParts {
    agreed: Kept,
    publishers: Publishers,
    shared: QueueConsumer,
    prepares: Option<OpenedPrepares>,
}

/// The consumer of a service's prepares.
struct OpenedPrepares {
    inbox: QueueConsumer,
    /// Whether another instance was given the prepares when this one began to consume.
    stands_by: bool,
}

/// The publishers of a session.
#[derive(Debug)]
struct Publishers {
    /// For messages that must arrive.
    reliable: ReliablePublisher<ConfirmAction>,
    /// For messages that may be lost, since the workers that wait for them ask again. They are not
    /// confirmed.
    passing: Publisher<()>,
    /// Whether the broker has accepted a message. Until then, all messages are confirmed.
    are_tried: bool,
}

impl Publishers {
    async fn open(publishing: &Arc<BrokerConnection>, names: &Names) -> Result<Self, AskError> {
        let votes = format!("votes and dones to `{}`", names.replies());
        Ok(Self {
            reliable: ReliablePublisher::open(publishing, "messages that must not be lost").await?,
            passing: Publisher::unconfirmed(publishing, votes).await?,
            are_tried: false,
        })
    }

    fn are_open(&self) -> bool {
        self.reliable.is_open() && self.passing.is_open()
    }

    /// Publishes a message that may be lost. The first one is confirmed, to detect a refusal.
    fn pass(&mut self, message: OutgoingMessage) {
        match self.are_tried {
            true => self.passing.publish(message, ()),
            false => self.reliable.publish(message, ConfirmAction::Nothing),
        }
    }

    /// How many messages are not confirmed or not written yet.
    fn outstanding(&self) -> usize {
        self.reliable.outstanding() + self.passing.outstanding()
    }

    /// Waits until no message is outstanding.
    async fn finish(&mut self) {
        self.reliable.finish().await;
        self.passing.finish().await;
    }

    /// What to do after the next message that the broker has confirmed.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<ConfirmAction, PublisherError>> {
        if let Poll::Ready(safe) = self.reliable.poll_next(cx) {
            self.are_tried |= safe.is_ok();
            return Poll::Ready(safe);
        }
        while let Poll::Ready(written) = self.passing.poll_next(cx) {
            let ((), published) = written?;
            if !matches!(published, PublishOutcome::Confirmed) {
                tracing::debug!("a message was not written; its worker will ask for it");
            }
        }
        Poll::Pending
    }
}

/// The work of an instance over one link.
pub(super) struct InstanceSession {
    /// As long as this exists, no instance begins to serve with another store.
    _agreed: Kept,
    link: ConnectionPair,
    watch: ConnectionMonitor,
    publishers: Publishers,
    /// `None`: the session was opened for outcomes only, or the queue can't be reached.
    prepares: Option<QueueConsumer>,
    /// Opens the queue of prepares, if it could not be reached.
    opening_prepares: Option<BoxFuture<'static, Result<OpenedPrepares, AskError>>>,
    /// Whether another instance receives the prepares, as far as is known.
    stands_by: bool,
    prepare_queue: PrepareQueue,
    /// Whether prepares are handled.
    takes_prepares: bool,
    own: ExclusiveQueue,
    shared: QueueConsumer,
    names: Names,
    /// The messages of the deliveries that the core has not yet acknowledged.
    origins: BTreeMap<Delivery, Origin>,
    /// For messages with several unfinished items: how many there are.
    unfinished: BTreeMap<Origin, usize>,
}

/// A message, identified by its queue and its delivery tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Origin {
    source: SourceQueue,
    tag: u64,
}

/// What to do when the broker has confirmed a message.
#[derive(Debug)]
enum ConfirmAction {
    /// Nothing.
    Nothing,
    /// Acknowledge these.
    Ack(Vec<Delivery>),
    /// Acknowledge this one, which was rejected.
    Rejected(Origin),
}

/// An input of the session.
#[expect(clippy::large_enum_variant, reason = "each is handled at once, and never stored")]
enum InstanceInput {
    Message(SourceQueue, Message),
    Confirmed(ConfirmAction),
    Link(ConnectionEvent),
}

/// The session is over: the broker delivers everything unacknowledged again, to any instance.
#[derive(Debug, thiserror::Error)]
pub(super) enum InstanceSessionError {
    #[error("a connection is lost")]
    Connection(#[source] lapin::Error),
    #[error(transparent)]
    Publishing(PublisherError),
    #[error("the channel for publishing is lost")]
    Channel(#[source] lapin::Error),
    #[error("nothing more can be consumed")]
    Consuming(#[source] ConsumerError),
    #[error("failed to cancel the consumer of `{queue}`")]
    Cancel {
        queue: String,
        #[source]
        source: AskError,
    },
    #[error("the broker takes messages again, but did not unblock this connection after an alarm")]
    Stale,
}

impl InstanceSessionError {
    /// The broker's refusal of a message, if that has ended the session.
    pub(super) fn refusal(self) -> Result<lapin::Error, Self> {
        let refusal = match &self {
            Self::Publishing(lost) => lost.broker(),
            Self::Channel(error) => Some(error),
            Self::Connection(_) | Self::Consuming(_) | Self::Cancel { .. } | Self::Stale => None,
        };
        match refusal.filter(|error| is_refusal(error)).cloned() {
            Some(error) => Ok(error),
            None => Err(self),
        }
    }
}

impl InstanceSession {
    /// Opens a session on `link`, on which the instance's own queue is open: outcomes must arrive before
    /// prepares do. `store`: the id of the store, and whether the instance has served before.
    pub(super) async fn open(
        link: ConnectionPair,
        own: ExclusiveQueue,
        settings: &ServeSettings,
        store: (Option<&StoreId>, bool),
        takes_prepares: bool,
    ) -> Result<Self, OpenError> {
        let watch = link.watch(settings.broker.clone());
        let prepare_queue = PrepareQueue::of(settings, &link);
        let prepares = takes_prepares.then_some(&prepare_queue);
        match Self::open_on(&link, settings, store, prepares).await {
            Ok(SessionParts { agreed, publishers, shared, prepares }) => Ok(Self {
                _agreed: agreed,
                link,
                watch,
                publishers,
                opening_prepares: (takes_prepares && prepares.is_none())
                    .then(|| prepare_queue.open_later()),
                stands_by: prepares.as_ref().is_some_and(|prepares| prepares.stands_by),
                prepares: prepares.map(|prepares| prepares.inbox),
                prepare_queue,
                takes_prepares,
                own,
                shared,
                names: settings.names.clone(),
                origins: BTreeMap::new(),
                unfinished: BTreeMap::new(),
            }),
            Err(error) => {
                // Closing may take long on a broken connection.
                tokio::spawn(link.close());
                Err(error)
            }
        }
    }

    async fn open_on(
        link: &ConnectionPair,
        settings: &ServeSettings,
        (store, has_served): (Option<&StoreId>, bool),
        prepare_queue: Option<&PrepareQueue>,
    ) -> Result<SessionParts, OpenError> {
        let ServeSettings { names, service, .. } = settings;
        let at = |what: &ShortString| {
            let name = what.to_string();
            move |source| OpenError::Queue { name, source }
        };
        let publishers =
            Publishers::open(&link.publishing, names).await.map_err(OpenError::Channel)?;
        let agreed = agree_on_store(link, settings, store, has_served).await?;
        let consuming = &link.consuming;
        let name = names.finish_any_of(service);
        let shared =
            QueueConsumer::open(consuming, name.clone(), SHARED_PREFETCH, FieldTable::default())
                .await;
        let shared =
            shared.map_err(at(&name))?.with_liveness_probe(consuming, ConsumerMode::Competing);
        let Some(prepare_queue) = prepare_queue else {
            return Ok(SessionParts { agreed, publishers, shared, prepares: None });
        };
        let prepares = match prepare_queue.open().await {
            Ok(prepares) => Some(prepares),
            // The outcomes of prepared transactions must arrive nevertheless.
            Err(error) if is_unavailable(&error) || (has_served && is_missing(&error)) => {
                tracing::warn!(
                    queue = %prepare_queue.name, %error,
                    "the prepare queue can't be consumed; until it can, this instance only applies \
                     outcomes; trying again"
                );
                None
            }
            Err(error) => return Err(at(&prepare_queue.name)(error)),
        };
        Ok(SessionParts { agreed, publishers, shared, prepares })
    }

    /// Whether transactions would go through.
    pub(super) fn is_ready(&self) -> bool {
        !self.watch.is_blocked() && (self.prepares.is_some() || !self.takes_prepares)
    }

    /// Logs what the instance does from now on.
    pub(super) fn log_ready(&self, max_concurrency: u32) {
        if !self.takes_prepares {
            tracing::info!("connected again, to receive the outcomes of what is prepared");
        } else if self.prepares.is_none() {
            // Why not was logged, and that it is ready will be.
        } else if self.stands_by {
            tracing::info!(
                max_concurrency,
                "ready, and standing by: another instance takes the prepares of this service, and \
                 this one takes over when that one ends"
            );
        } else {
            tracing::info!(max_concurrency, "ready");
        }
    }

    /// Whether more messages may be published.
    fn has_room(&self) -> bool {
        self.publishers.outstanding() < OUTSTANDING_MAX
    }

    // ---- Receiving ---------------------------------------------------------------------------

    /// Waits for an input, and handles all that are ready, up to a bound. Their events are added to
    /// `events`.
    ///
    /// # Errors
    ///
    /// The session is over.
    pub(super) async fn take(
        &mut self,
        delivery_ids: &mut DeliveryIds,
        events: &mut VecDeque<Event>,
    ) -> Result<(), InstanceSessionError> {
        let first = std::future::poll_fn(|cx| self.poll_input(cx)).await;
        self.handle(first?, delivery_ids, events)?;
        for _ in 0..BATCH_MAX {
            let ready = self.poll_input(&mut Context::from_waker(Waker::noop()));
            let Poll::Ready(input) = ready else { break };
            self.handle(input?, delivery_ids, events)?;
        }
        Ok(())
    }

    fn poll_input(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<InstanceInput, InstanceSessionError>> {
        if let Poll::Ready(change) = self.watch.poll_next(cx) {
            return Poll::Ready(Ok(InstanceInput::Link(change)));
        }
        if let Poll::Ready(safe) = self.publishers.poll_next(cx) {
            return Poll::Ready(
                safe.map(InstanceInput::Confirmed).map_err(InstanceSessionError::Publishing),
            );
        }
        if !self.has_room() {
            return Poll::Pending;
        }
        self.poll_opening(cx);
        for source in [SourceQueue::Own, SourceQueue::Shared, SourceQueue::Prepares] {
            let message = match source {
                SourceQueue::Own => self.own.poll_next(cx),
                SourceQueue::Shared => self.shared.poll_next(cx),
                SourceQueue::Prepares => match self.prepares.as_mut() {
                    // While the broker takes no messages, no vote could be sent.
                    Some(prepares) if self.takes_prepares && !self.watch.is_blocked() => {
                        prepares.poll_next(cx)
                    }
                    Some(_) | None => Poll::Pending,
                },
            };
            if let Poll::Ready(message) = message {
                if source == SourceQueue::Prepares && std::mem::take(&mut self.stands_by) {
                    tracing::info!("this instance has taken over: it receives the prepares now");
                }
                let message = message.map_err(InstanceSessionError::Consuming);
                return Poll::Ready(message.map(|message| InstanceInput::Message(source, message)));
            }
        }
        Poll::Pending
    }

    /// Consumes prepares as soon as their queue can be reached.
    fn poll_opening(&mut self, cx: &mut Context<'_>) {
        while let Some(opening) = &mut self.opening_prepares {
            let Poll::Ready(opened) = opening.poll_unpin(cx) else { return };
            self.opening_prepares = match opened {
                Ok(OpenedPrepares { inbox, stands_by }) => {
                    let queue = &self.prepare_queue.name;
                    tracing::info!(%queue, "the prepare queue is consumed: ready");
                    (self.prepares, self.stands_by) = (Some(inbox), stands_by);
                    None
                }
                Err(error) => {
                    let queue = &self.prepare_queue.name;
                    tracing::warn!(
                        %queue, %error, "the prepare queue still can't be consumed; trying again"
                    );
                    Some(self.prepare_queue.open_later())
                }
            };
        }
    }

    fn handle(
        &mut self,
        input: InstanceInput,
        delivery_ids: &mut DeliveryIds,
        events: &mut VecDeque<Event>,
    ) -> Result<(), InstanceSessionError> {
        match input {
            InstanceInput::Message(source, message) => {
                self.received(source, &message, delivery_ids, events)
            }
            InstanceInput::Confirmed(ConfirmAction::Nothing) => {}
            InstanceInput::Confirmed(ConfirmAction::Ack(owed)) => {
                owed.into_iter().for_each(|delivery| self.ack(delivery));
            }
            InstanceInput::Confirmed(ConfirmAction::Rejected(origin)) => self.item_done(origin),
            InstanceInput::Link(change) => self.link_changed(change)?,
        }
        Ok(())
    }

    fn link_changed(&self, change: ConnectionEvent) -> Result<(), InstanceSessionError> {
        match change {
            ConnectionEvent::Blocked | ConnectionEvent::Unblocked => Ok(()),
            ConnectionEvent::Lost(error) => Err(InstanceSessionError::Connection(error)),
            ConnectionEvent::Stale => Err(InstanceSessionError::Stale),
            ConnectionEvent::ChannelLost(error) if !self.publishers.are_open() => {
                Err(InstanceSessionError::Channel(error))
            }
            ConnectionEvent::ChannelLost(_) => Ok(()),
        }
    }

    /// Handles a message; its events are added to `events`.
    fn received(
        &mut self,
        source: SourceQueue,
        message: &Message,
        delivery_ids: &mut DeliveryIds,
        events: &mut VecDeque<Event>,
    ) {
        let origin = Origin { source, tag: message.delivery_tag };
        let content = read(source, message);
        let mut unfinished = 0_usize;
        for item in content.items {
            let delivery = item.is_held(source).then(|| delivery_ids.next());
            if let Some(delivery) = delivery {
                unfinished += 1;
                self.origins.insert(delivery, origin);
            }
            events.extend(Inbound::into_event(item, delivery));
        }
        if let Some(reason) = content.bad {
            unfinished += 1;
            self.reject(origin, message, &reason);
        }
        match unfinished {
            0 => self.acknowledge(origin),
            1 => {}
            more => {
                self.unfinished.insert(origin, more);
            }
        }
    }

    /// Publishes a message to the rejected ones, and acknowledges it when the broker has confirmed that.
    fn reject(&mut self, origin: Origin, message: &Message, reason: &str) {
        let queue = match origin.source {
            SourceQueue::Own => Some(self.own.name()),
            SourceQueue::Shared => Some(self.shared.queue()),
            SourceQueue::Prepares => self.prepares.as_ref().map(QueueConsumer::queue),
        };
        let queue = queue.map(ShortString::to_string).unwrap_or_default();
        tracing::warn!(queue, reason, "a message is rejected");
        let outgoing = rejected(&self.names, &queue, message, reason);
        self.publishers.reliable.publish(outgoing, ConfirmAction::Rejected(origin));
    }

    // ---- Publishing --------------------------------------------------------------------------

    /// Publishes a message, and later acknowledges what is owed to it.
    pub(super) fn publish(&mut self, outbound: OutboundMessage) {
        let OutboundMessage { message, owed, must_arrive } = outbound;
        if must_arrive {
            self.publishers.reliable.publish(message, ConfirmAction::Ack(owed));
        } else {
            self.publishers.pass(message);
        }
    }

    /// When to publish a message again.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        self.publishers.reliable.wake_at()
    }

    /// Publishes messages again that the broker did not take, if it is time, and sends all
    /// acknowledgements.
    pub(super) fn flush(&mut self) {
        self.publishers.reliable.flush(Instant::now());
        self.own.flush();
        self.shared.flush();
        if let Some(prepares) = &mut self.prepares {
            prepares.flush();
        }
    }

    /// Whether all messages that must arrive are confirmed.
    pub(super) fn is_quiet(&self) -> bool {
        self.publishers.reliable.is_idle()
    }

    /// Whether the broker has accepted a message.
    pub(super) fn was_heard(&self) -> bool {
        self.publishers.are_tried
    }

    /// Acknowledges a delivery, with which the core is done. One of an earlier session is delivered
    /// again.
    pub(super) fn ack(&mut self, delivery: Delivery) {
        if let Some(origin) = self.origins.remove(&delivery) {
            self.item_done(origin);
        }
    }

    /// Notes that one item of a message is done; the last one acknowledges the message.
    fn item_done(&mut self, origin: Origin) {
        match self.unfinished.get_mut(&origin) {
            Some(unfinished) if *unfinished > 1 => *unfinished -= 1,
            Some(_) | None => {
                self.unfinished.remove(&origin);
                self.acknowledge(origin);
            }
        }
    }

    fn acknowledge(&mut self, Origin { source, tag }: Origin) {
        match source {
            SourceQueue::Own => self.own.ack(tag),
            SourceQueue::Shared => self.shared.ack(tag),
            SourceQueue::Prepares => {
                if let Some(prepares) = &mut self.prepares {
                    prepares.ack(tag);
                }
            }
        }
    }

    // ---- The end -----------------------------------------------------------------------------

    /// Takes no more prepares. Those that were delivered and not handled go to other instances at once.
    /// But if all instances share one cap, they go when this session ends: until then, the next
    /// instance would exceed the cap.
    pub(super) async fn stop_prepares(&mut self, cap: Cap) -> Result<(), InstanceSessionError> {
        (self.takes_prepares, self.opening_prepares) = (false, None);
        let Some(prepares) = self.prepares.as_mut().filter(|_| cap == Cap::Instance) else {
            return Ok(());
        };
        let cancelled = prepares.cancel().await;
        cancelled.map_err(|source| {
            let queue = prepares.queue().to_string();
            InstanceSessionError::Cancel { queue, source }
        })?;
        while let Some(Ok(message)) = prepares.try_next() {
            prepares.requeue(message.delivery_tag);
        }
        Ok(())
    }

    /// Waits until the broker has confirmed all messages, but no longer than `until`; then closes the
    /// session.
    pub(super) async fn finish(mut self, until: Instant) {
        let _ = timeout_at(until, self.publishers.finish()).await;
        self.close().await;
    }

    /// Closes the session: the broker delivers everything unacknowledged again.
    pub(super) async fn close(self) {
        self.link.close().await;
    }
}

/// The queue of a service's prepares, and how to consume it.
struct PrepareQueue {
    consuming: Arc<BrokerConnection>,
    name: ShortString,
    prefetch: u16,
    turn: ConsumerMode,
}

impl PrepareQueue {
    fn of(settings: &ServeSettings, link: &ConnectionPair) -> Self {
        Self {
            consuming: Arc::clone(&link.consuming),
            name: settings.names.prepare_of(&settings.service),
            prefetch: u16::try_from(settings.max_concurrency).unwrap_or(u16::MAX),
            turn: match settings.cap {
                Cap::Instance => ConsumerMode::Competing,
                Cap::Service => ConsumerMode::SingleActive,
            },
        }
    }

    async fn open(&self) -> Result<OpenedPrepares, AskError> {
        let stands_by = self.turn == ConsumerMode::SingleActive && self.has_consumer().await;
        let opening =
            QueueConsumer::open_durable(&self.consuming, self.name.clone(), self.prefetch);
        let inbox = opening.await?.with_liveness_probe(&self.consuming, self.turn);
        Ok(OpenedPrepares { inbox, stands_by })
    }

    /// Whether another instance consumes the queue. The broker doesn't say which of the consumers is
    /// the active one, but it is the first; of two that begin at the same moment, neither may see
    /// the other.
    async fn has_consumer(&self) -> bool {
        let counted = answer(ANSWER_MAX, counts(&self.consuming, self.name.clone())).await;
        matches!(counted, Ok(Some(QueueCounts { consumers: 1.., .. })))
    }

    fn open_later(&self) -> BoxFuture<'static, Result<OpenedPrepares, AskError>> {
        let Self { consuming, name, prefetch, turn } = self;
        let again = Self {
            consuming: Arc::clone(consuming),
            name: name.clone(),
            prefetch: *prefetch,
            turn: *turn,
        };
        async move {
            tokio::time::sleep(OPEN_AGAIN_AFTER).await;
            again.open().await
        }
        .boxed()
    }
}

/// Whether a queue exists, as far as is known, but can't be consumed for now.
fn is_unavailable(error: &AskError) -> bool {
    error.is_silent() || error.broker().is_some_and(is_out_of_reach)
}

/// Whether the broker reports that the queue doesn't exist.
fn is_missing(error: &AskError) -> bool {
    error.broker().is_some_and(is_not_found)
}

/// Declares the queues and exchanges that the service uses.
pub(super) async fn declare(settings: &ServeSettings, max_wait: Duration) -> Result<(), OpenError> {
    let ServeSettings { broker, names, service, cap, .. } = settings.clone();
    let service = ServiceTopology { name: service, max_wait, cap };
    let options = ApplyOptions {
        settings: topology::Settings {
            commands: topology::PrepareQueueKind::at(&broker.address),
            ..topology::Settings::default()
        },
        now: Clock::start().now(),
        // Only the journal needs it, which is not declared here.
        clock_margin: Duration::ZERO,
    };
    let (runtime, span) = (Handle::current(), Span::current());
    // On another thread, since this future is not `Send`.
    let applied = tokio::task::spawn_blocking(move || {
        let services = [service];
        let applying = apply_services(&broker, &names, &services, &options);
        let applied = runtime.block_on(applying.instrument(span));
        applied.map_err(Box::new)
    });
    let Ok(applied) = applied.await else { return Ok(()) };
    for created in applied.map_err(OpenError::Declare)?.created {
        tracing::info!("declared {created}");
    }
    Ok(())
}

/// Agrees with the other instances on the store that all of them have. An instance whose store has no
/// id takes part only if it must be the only one.
///
/// If the broker can't tell, the instance serves: one that has another store logs an error when it is
/// to commit a branch that its store doesn't know. An instance that has served before doesn't wait
/// for the agreement, and serves even if others have begun with another store meanwhile.
async fn agree_on_store(
    link: &ConnectionPair,
    settings: &ServeSettings,
    store: Option<&StoreId>,
    has_served: bool,
) -> Result<Kept, OpenError> {
    let own = match store {
        Some(store) => store.to_string(),
        // No store id contains a colon.
        None if settings.only_instance => format!("in-memory:{}", settings.instance),
        None => return Ok(None),
    };
    let queue = settings.names.store_of(&settings.service);
    let (connection, word) = (Arc::clone(&link.consuming), own.clone());
    let agreeing = async move {
        match AgreedValue::on(&connection, &queue, &word).await {
            Ok(agreed) => Ok(Some(agreed)),
            Err(AgreedValueError::Differs { other, .. }) => Err(other),
            Err(error @ AgreedValueError::Unknown { .. }) => {
                tracing::warn!(
                    error = %ErrorChain(&error),
                    "serving without knowing whether all instances of this service share one store"
                );
                Ok(None)
            }
        }
    };
    if !has_served {
        let agreed = agreeing.await.map_err(|other| OpenError::OtherStore { own, other })?;
        return Ok(agreed.map(|agreed| Box::new(agreed) as _));
    }
    let agreeing = async move {
        agreeing.await.unwrap_or_else(|other| {
            tracing::error!(
                store = own,
                other_store = other,
                "other instances of this service have begun to serve with another store while this \
                 one was not connected; all of them must share one: stop those with the wrong one"
            );
            None
        })
    };
    Ok(Some(Box::new(tokio::spawn(agreeing.in_current_span()))))
}

/// Opens the instance's own queue. It is the first thing that is opened, and shows that the node works;
/// later, the probes through it show that the link is alive.
pub(super) async fn open_own(
    link: &ConnectionPair,
    settings: &ServeSettings,
) -> Result<ExclusiveQueue, OpenError> {
    let ServeSettings { names, service, instance, .. } = settings;
    let bound = |to: &str| ExchangeBinding { exchange: names.finish(), key: key(to, service) };
    let bindings = [bound(instance.as_str()), bound(ALL)];
    let stem = names.finish_of(service, instance);
    let own = ExclusiveQueue::open(&link.consuming, stem, &bindings, OWN_PREFETCH).await;
    let own = own.map_err(|error| match error {
        ExclusiveQueueError::Channel(source) => OpenError::Channel(source),
        ExclusiveQueueError::Queue { queue, source } => {
            OpenError::Queue { name: queue.to_string(), source }
        }
        ExclusiveQueueError::Exchange { exchange, source, .. } => {
            OpenError::Exchange { name: exchange.to_string(), source }
        }
    })?;
    own.with_link_probe(&link.publishing, || true).await.map_err(OpenError::Channel)
}

/// Makes ids for deliveries, which are unique across connections.
#[derive(Debug, Default)]
pub(super) struct DeliveryIds(u64);

impl DeliveryIds {
    fn next(&mut self) -> Delivery {
        self.0 += 1;
        Delivery(self.0)
    }
}
