//! What an instance has while it is connected: its queues, and who waits for what.
//!
//! **Invariant:** a delivery is acknowledged only on the channel that it came by. Its number means
//! nothing to the next session.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use lapin::{
    Channel, Connection,
    message::Delivery as Message,
    options::{QueueBindOptions, QueueDeclareOptions},
    types::{FieldTable, ShortString},
};
use tokio::{
    runtime::Handle,
    time::{Instant, timeout_at},
};

use crate::{
    clock::Clock,
    participant::{
        error::OpenError,
        inbound::{Source, Told, read},
        outbox::Parcel,
        settings::ServeSettings,
    },
    protocol::{
        message::{Cap, Delivery},
        participant::Event,
    },
    transport::amqp::{
        connection::{Link, LinkEvent},
        consumer::{Closed, Inbox, Turn},
        error::is_refusal,
        names::{ALL, Names, key},
        publisher::{Outgoing, Published, Publisher},
        rejected::rejected,
        topology::{
            self, ServiceTopology,
            apply::{Options, apply_services},
        },
    },
};

/// How many messages of an instance's own queue are on their way to it at a time.
const OWN_PREFETCH: u16 = 1024;
/// How many messages of the service's durable queue one instance has in hand: a commit that fails
/// for good keeps its place there.
const SHARED_PREFETCH: u16 = 256;
/// How many messages may be on their way to the broker, as far as they are counted, before no more
/// are taken from it.
const OUTSTANDING_MAX: usize = 4096;
/// How many messages of each queue are taken between two flushes.
const BATCH_MAX: usize = 1024;
/// The pause before something is published again that the broker did not take.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);

/// What a session is made of.
struct Opened {
    lanes: Lanes,
    own: Inbox,
    shared: Inbox,
    prepares: Option<Inbox>,
}

/// What an instance publishes on.
#[derive(Debug)]
pub(super) struct Lanes {
    /// For what must arrive.
    lasting: Publisher<Ticket>,
    /// For what may be lost, since whoever waits for it asks again: nobody waits for its confirm.
    passing: Publisher<Ticket>,
    /// Whether the broker is known to take what is said. Until then everything is confirmed.
    are_tried: bool,
}

impl Lanes {
    async fn open(connection: &Connection) -> Result<Self, lapin::Error> {
        Ok(Self {
            lasting: Publisher::open(connection).await?,
            passing: Publisher::unconfirmed(connection).await?,
            are_tried: false,
        })
    }

    fn are_open(&self) -> bool {
        self.lasting.is_open() && self.passing.is_open()
    }

    /// What may be lost. The first of it has to show that it is not refused.
    fn pass(&mut self, message: Outgoing) {
        let lane = if self.are_tried { &mut self.passing } else { &mut self.lasting };
        lane.publish(message, Ticket::MayBeLost);
    }

    /// How many messages are on their way.
    fn outstanding(&self) -> usize {
        self.lasting.outstanding() + self.passing.outstanding()
    }

    /// Waits until nothing is on its way.
    async fn finish(&mut self) {
        self.lasting.finish().await;
        self.passing.finish().await;
    }

    /// What became of one of them.
    pub(super) async fn next(&mut self) -> (Ticket, Published) {
        tokio::select! {
            it = self.lasting.next() => it,
            it = self.passing.next() => it,
        }
    }

    /// The same, if it is known by now.
    pub(super) fn ready(&mut self) -> Option<(Ticket, Published)> {
        self.lasting.ready().or_else(|| self.passing.ready())
    }
}

/// One connection's worth of service.
pub(super) struct Session {
    pub(super) link: Link,
    pub(super) lanes: Lanes,
    /// `None`: it was opened to hear the rest, and takes no prepares.
    pub(super) prepares: Option<Inbox>,
    /// Whether prepares are looked at.
    pub(super) takes_prepares: bool,
    pub(super) own: Inbox,
    pub(super) shared: Inbox,
    names: Names,
    /// Where the deliveries came from that the core has not yet acknowledged.
    origins: BTreeMap<Delivery, Origin>,
    /// How many items of a message are not dealt with yet, where that is more than one.
    undone: BTreeMap<Origin, usize>,
    /// What the broker did not take, and when to publish it again.
    refused: VecDeque<(Instant, Outgoing, Ticket)>,
    pub(super) opened_at: Instant,
}

/// A message, by the tag it has on the channel of its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Origin {
    source: Source,
    tag: u64,
}

/// What follows when a message is with the broker.
#[derive(Debug)]
pub(super) enum Ticket {
    /// Nothing: if it doesn't arrive, whoever waits for it asks again.
    MayBeLost,
    /// These may be acknowledged. Kept with the message, to publish it again.
    Owed(Outgoing, Vec<Delivery>),
    /// This one is among the rejected.
    Rejected(Outgoing, Source, u64),
}

/// The session is over: everything will be delivered again, to whomever.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("a connection is lost")]
    Connection(#[source] lapin::Error),
    #[error("the channel for publishing is lost")]
    Publishing(#[source] lapin::Error),
    #[error("nothing more can be consumed")]
    Consuming(#[source] Closed),
}

impl Lost {
    /// What the broker says against what was published, if that is why.
    pub(super) fn refusal(self) -> Result<lapin::Error, Self> {
        match self {
            Self::Publishing(error) if is_refusal(&error) => Ok(error),
            Self::Publishing(_) | Self::Connection(_) | Self::Consuming(_) => Err(self),
        }
    }
}

impl Session {
    /// Takes its place on `link`: the instance's own queue first, so that it hears of outcomes
    /// before it takes what they will be about.
    pub(super) async fn open(
        link: Link,
        settings: &ServeSettings,
        takes_prepares: bool,
    ) -> Result<Self, OpenError> {
        match Self::open_on(&link, settings, takes_prepares).await {
            Ok(Opened { lanes, own, shared, prepares }) => Ok(Self {
                link,
                lanes,
                prepares,
                takes_prepares,
                own,
                shared,
                names: settings.names.clone(),
                origins: BTreeMap::new(),
                undone: BTreeMap::new(),
                refused: VecDeque::new(),
                opened_at: Instant::now(),
            }),
            Err(error) => {
                link.close().await;
                Err(error)
            }
        }
    }

    async fn open_on(
        link: &Link,
        settings: &ServeSettings,
        takes_prepares: bool,
    ) -> Result<Opened, OpenError> {
        let ServeSettings { names, service, .. } = settings;
        let at = |what: &ShortString| {
            let name = what.to_string();
            move |source| OpenError::Queue { name, source }
        };
        if let Some(max_wait) = settings.declare {
            declare(settings, max_wait).await?;
        }
        let lanes = Lanes::open(&link.publishing).await.map_err(OpenError::Channel)?;
        let own = open_own(&link.consuming, settings).await?;
        let own = own.watched(&link.consuming, Turn::Equal);
        let consuming = &link.consuming;
        let name = names.finish_any_of(service);
        let shared =
            Inbox::open(consuming, name.clone(), SHARED_PREFETCH, FieldTable::default()).await;
        let shared = shared.map_err(at(&name))?.watched(consuming, Turn::Equal);
        if !takes_prepares {
            return Ok(Opened { lanes, own, shared, prepares: None });
        }
        let name = names.prepare_of(service);
        let prefetch = u16::try_from(settings.max_concurrency).unwrap_or(u16::MAX);
        let prepares = Inbox::open_to_end(consuming, name.clone(), prefetch).await;
        let turn = match settings.cap {
            Cap::Instance => Turn::Equal,
            Cap::Service => Turn::Single,
        };
        let prepares = prepares.map_err(at(&name))?.watched(consuming, turn);
        Ok(Opened { lanes, own, shared, prepares: Some(prepares) })
    }

    /// Whether as much is on its way to the broker as may be.
    pub(super) fn has_room(&self) -> bool {
        self.lanes.outstanding() < OUTSTANDING_MAX
    }

    // ---- What comes in -----------------------------------------------------------------------

    /// What became of the connections.
    pub(super) fn hear(&self, event: LinkEvent) -> Result<(), Lost> {
        match event {
            LinkEvent::Lost(error) => return Err(Lost::Connection(error)),
            LinkEvent::ChannelLost(error) if !self.lanes.are_open() => {
                return Err(Lost::Publishing(error));
            }
            LinkEvent::ChannelLost(_) => {}
            LinkEvent::Blocked(reason) => {
                tracing::warn!(reason, "the broker takes nothing more for the time being");
            }
            LinkEvent::Unblocked => tracing::info!("the broker takes messages again"),
        }
        Ok(())
    }

    /// Takes in a message; what it says is added to `events`.
    pub(super) fn take(
        &mut self,
        source: Source,
        message: Result<Message, Closed>,
        numbers: &mut Numbers,
        events: &mut VecDeque<Event>,
    ) -> Result<(), Lost> {
        let message = message.map_err(Lost::Consuming)?;
        let origin = Origin { source, tag: message.delivery_tag };
        let content = read(source, &message);
        let mut undone = 0_usize;
        for told in content.items {
            let delivery = told.is_held(source).then(|| numbers.next());
            if let Some(delivery) = delivery {
                undone += 1;
                self.origins.insert(delivery, origin);
            }
            events.extend(Told::into_event(told, delivery));
        }
        if let Some(reason) = content.bad {
            undone += 1;
            self.reject(origin, &message, &reason);
        }
        match undone {
            0 => self.acknowledge(origin),
            1 => {}
            more => {
                self.undone.insert(origin, more);
            }
        }
        Ok(())
    }

    /// Takes in all that is there, up to a bound.
    pub(super) fn take_ready(
        &mut self,
        numbers: &mut Numbers,
        events: &mut VecDeque<Event>,
    ) -> Result<(), Lost> {
        for source in [Source::Own, Source::Shared, Source::Prepares] {
            for _ in 0..BATCH_MAX {
                if !self.has_room() {
                    return Ok(());
                }
                let inbox = match source {
                    Source::Own => Some(&mut self.own),
                    Source::Shared => Some(&mut self.shared),
                    Source::Prepares => self.prepares.as_mut().filter(|_| self.takes_prepares),
                };
                let Some(message) = inbox.and_then(Inbox::ready) else { break };
                self.take(source, message, numbers, events)?;
            }
        }
        Ok(())
    }

    /// Puts a message among the rejected ones; it is acknowledged when it is safe there.
    fn reject(&mut self, origin: Origin, message: &Message, reason: &str) {
        let queue = self.inbox(origin.source).map(|inbox| inbox.queue().to_string());
        let queue = queue.unwrap_or_default();
        tracing::warn!(queue, reason, "a message is rejected");
        let outgoing = rejected(&self.names, &queue, message, reason);
        let ticket = Ticket::Rejected(outgoing.clone(), origin.source, origin.tag);
        self.lanes.lasting.publish(outgoing, ticket);
    }

    // ---- What goes out -----------------------------------------------------------------------

    /// Publishes, and acknowledges later what is owed to it.
    pub(super) fn publish(&mut self, parcel: Parcel) {
        let Parcel { message, owed, must_arrive } = parcel;
        if must_arrive {
            self.lanes.lasting.publish(message.clone(), Ticket::Owed(message, owed));
        } else {
            self.lanes.pass(message);
        }
    }

    /// A publish has ended.
    pub(super) fn published(&mut self, ticket: Ticket, published: Published) -> Result<(), Lost> {
        let is_safe = match published {
            Published::Lost(error) => return Err(Lost::Publishing(error)),
            Published::Confirmed => true,
            Published::Unroutable | Published::Refused => false,
        };
        let is_unroutable = matches!(published, Published::Unroutable);
        match ticket {
            Ticket::MayBeLost if is_safe => self.lanes.are_tried = true,
            Ticket::MayBeLost => tracing::debug!("a message did not arrive; it will be asked for"),
            Ticket::Owed(_, owed) if is_safe => {
                owed.into_iter().for_each(|delivery| self.ack(delivery));
            }
            Ticket::Rejected(_, source, tag) if is_safe => self.dealt_with(Origin { source, tag }),
            // It would come again and again, and there is nowhere to put it.
            Ticket::Rejected(outgoing, source, tag) if is_unroutable => {
                tracing::error!(queue = %outgoing.key, "a rejected message is lost: no such queue");
                self.dealt_with(Origin { source, tag });
            }
            Ticket::Owed(ref outgoing, _) | Ticket::Rejected(ref outgoing, _, _) => {
                tracing::warn!(exchange = %outgoing.exchange, key = %outgoing.key, is_unroutable,
                    "the broker did not take a message that must arrive; it is published again");
                let again = outgoing.clone();
                self.refused.push_back((Instant::now() + REFUSED_PAUSE, again, ticket));
            }
        }
        Ok(())
    }

    /// When there is something to be said again.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        self.refused.front().map(|(at, _, _)| *at)
    }

    /// Publishes again what the broker did not take, if it is time.
    pub(super) fn publish_again(&mut self) {
        let now = Instant::now();
        while self.refused.front().is_some_and(|(at, _, _)| *at <= now) {
            if let Some((_, outgoing, ticket)) = self.refused.pop_front() {
                self.lanes.lasting.publish(outgoing, ticket);
            }
        }
    }

    /// Whether nothing is on its way that must arrive.
    pub(super) fn is_quiet(&self) -> bool {
        self.lanes.lasting.outstanding() == 0 && self.refused.is_empty()
    }

    /// Whether the broker has taken anything of what was said.
    pub(super) fn was_heard(&self) -> bool {
        self.lanes.are_tried
    }

    /// The core is done with a delivery. One from an earlier session will come again.
    pub(super) fn ack(&mut self, delivery: Delivery) {
        if let Some(origin) = self.origins.remove(&delivery) {
            self.dealt_with(origin);
        }
    }

    /// One item of a message is dealt with; the last one settles the message.
    fn dealt_with(&mut self, origin: Origin) {
        match self.undone.get_mut(&origin) {
            Some(undone) if *undone > 1 => *undone -= 1,
            Some(_) | None => {
                self.undone.remove(&origin);
                self.acknowledge(origin);
            }
        }
    }

    fn acknowledge(&mut self, Origin { source, tag }: Origin) {
        if let Some(inbox) = self.inbox_mut(source) {
            inbox.ack(tag);
        }
    }

    /// Tells the broker of all that was acknowledged.
    pub(super) fn flush_acks(&mut self) {
        self.own.flush();
        self.shared.flush();
        if let Some(prepares) = &mut self.prepares {
            prepares.flush();
        }
    }

    fn inbox(&self, source: Source) -> Option<&Inbox> {
        match source {
            Source::Own => Some(&self.own),
            Source::Shared => Some(&self.shared),
            Source::Prepares => self.prepares.as_ref(),
        }
    }

    fn inbox_mut(&mut self, source: Source) -> Option<&mut Inbox> {
        match source {
            Source::Own => Some(&mut self.own),
            Source::Shared => Some(&mut self.shared),
            Source::Prepares => self.prepares.as_mut(),
        }
    }

    // ---- The end -----------------------------------------------------------------------------

    /// Takes no more prepares. Those that were delivered and not looked at go to other instances:
    /// at once, unless all share one cap. Then whoever works next would exceed it as long as
    /// anything is held here, and they go when this session ends.
    pub(super) async fn stop_prepares(&mut self, cap: Cap) -> Result<(), Lost> {
        self.takes_prepares = false;
        let Some(prepares) = self.prepares.as_mut().filter(|_| cap == Cap::Instance) else {
            return Ok(());
        };
        let cancelled = prepares.cancel().await;
        cancelled.map_err(|source| {
            let queue = prepares.queue().to_string();
            Lost::Consuming(Closed::Lost { queue, source })
        })?;
        while let Some(Ok(message)) = prepares.ready() {
            prepares.requeue(message.delivery_tag);
        }
        Ok(())
    }

    /// Waits until all that was said is with the broker, but no longer than `until`; and then gives
    /// everything back.
    pub(super) async fn finish(mut self, until: Instant) {
        let _ = timeout_at(until, self.lanes.finish()).await;
        self.close().await;
    }

    /// Gives everything back.
    pub(super) async fn close(self) {
        self.link.close().await;
    }
}

/// Declares what the service needs to be reached and to answer.
async fn declare(settings: &ServeSettings, max_wait: Duration) -> Result<(), OpenError> {
    let ServeSettings { broker, names, service, cap, .. } = settings.clone();
    let service = ServiceTopology { name: service, max_wait, cap };
    let options = Options {
        settings: topology::Settings {
            commands: topology::Commands::at(&broker.address),
            ..topology::Settings::default()
        },
        now: Clock::start().now(),
        // That of the journal, which is none of a service's business.
        clock_margin: Duration::ZERO,
    };
    let runtime = Handle::current();
    // On a thread of its own, since what compares can't be sent between threads.
    let applied = tokio::task::spawn_blocking(move || {
        let applied = runtime.block_on(apply_services(&broker, &names, &[service], &options));
        applied.map_err(Box::new)
    });
    let Ok(applied) = applied.await else { return Ok(()) };
    for created in applied.map_err(OpenError::Declare)?.created {
        tracing::info!("declared {created}");
    }
    Ok(())
}

/// Declares the instance's own queue, and consumes it.
async fn open_own(consuming: &Connection, settings: &ServeSettings) -> Result<Inbox, OpenError> {
    let ServeSettings { names, service, instance, .. } = settings;
    let queue = names.finish_of(service, instance);
    let exchange = names.finish();
    let name = queue.to_string();
    let at_queue = |source| OpenError::Queue { name: name.clone(), source };
    let channel: Channel = consuming.create_channel().await.map_err(OpenError::Channel)?;
    let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(queue.clone(), options, FieldTable::default()).await;
    declared.map_err(at_queue)?;
    for to in [instance.as_str(), ALL] {
        let key = key(to, service);
        let bound = channel.queue_bind(
            queue.clone(),
            exchange.clone(),
            key,
            QueueBindOptions::default(),
            FieldTable::default(),
        );
        let name = exchange.to_string();
        bound.await.map_err(|source| OpenError::Exchange { name, source })?;
    }
    let inbox = Inbox::on(channel, queue, OWN_PREFETCH, FieldTable::default()).await;
    inbox.map(Inbox::lazy).map_err(at_queue)
}

/// Numbers for deliveries: none is given twice, whatever the connection.
#[derive(Debug, Default)]
pub(super) struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> Delivery {
        self.0 += 1;
        Delivery(self.0)
    }
}
