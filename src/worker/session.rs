//! The life of one link to the broker: everything that is ready is handled, and then everything
//! that follows is written.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt, Stream, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use lapin::{
    Connection,
    message::Delivery as Message,
    options::{QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::{
    clock::Clock,
    error::Chain,
    protocol::{
        coordinator::{Anomaly, Coordinator, Effect, Event},
        ids::{ReplyToken, ServiceName, TransactionKey},
        message::{
            Answer, Delivery, Matter, Outcome, Reason, ReasonCode, Request, TransactionSpec,
        },
    },
    transport::amqp::{
        connection::{Backoff, Link, LinkEvent, counts},
        consumer::{Closed, Inbox, Turn},
        error::is_not_found,
        names,
        publisher::Published,
        rejected::{rejected, rejected_request},
        unique,
    },
    wire::message::{RequestMalformed, Settled, encode_request},
    worker::{
        Settings, Tally, intake,
        journal::{Found, Journal, LookBack, ReadError, Record, Tail},
        outbox::{Held, Meaning, Outbox, Then, Ticket},
        sources::Sources,
    },
};

/// How many happenings are handled before what follows from them is written, at most.
const BATCH_MAX: usize = 1024;

/// How many replies may be delivered and not yet handled.
const REPLIES_PREFETCH: u16 = 2000;

/// The same for inquiries, which all workers share.
const INQUIRIES_PREFETCH: u16 = 200;

/// How long what was said last may take to be with the broker, when all else is done.
const GOODBYE_MAX: Duration = Duration::from_secs(2);

/// How long what was appended to the journal may take to be read back.
const UNREAD_MAX: Duration = Duration::from_secs(5);

/// How long most of what is in flight must have been waiting for slots before more requests are
/// taken: longer than a worker needs to learn of its services' slots when it starts.
const CROWDED_FOR: Duration = Duration::from_millis(250);

/// How long nothing must have been waiting before fewer are taken again. The broker takes back what
/// is on its way to a consumer that ends, and that is then looked into as if it had been begun.
const EASED_FOR: Duration = Duration::from_secs(2);

/// How long to wait before a service is looked for again.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// How the work over a link has ended.
#[derive(Debug)]
pub(super) enum End {
    /// All that was to be finished is.
    Drained,
    /// There was no time to finish all.
    DrainTimedOut,
    /// Nothing could be finished: the journal was not there.
    WithoutJournal,
}

/// The work over a link can't go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("failed to open {what}")]
    Open {
        what: &'static str,
        #[source]
        source: lapin::Error,
    },
    #[error("lost a queue")]
    Closed(#[source] Closed),
    #[error("failed to read the journal")]
    Journal(#[source] ReadError),
    #[error("the journal does not go on where it was left")]
    OtherJournal,
    #[error("lost the connection")]
    Lost(#[source] lapin::Error),
}

impl SessionError {
    /// Whether something that `dtc topology apply` makes is not there.
    pub(super) fn is_missing(&self) -> bool {
        matches!(self, Self::Journal(ReadError::Missing(_)))
            || self.broker_error().is_some_and(is_not_found)
    }

    /// What the broker said, if it was the broker.
    pub(super) fn broker_error(&self) -> Option<&lapin::Error> {
        match self {
            Self::Open { source, .. }
            | Self::Lost(source)
            | Self::Closed(Closed::Lost { source, .. })
            | Self::Journal(
                ReadError::Consume(source) | ReadError::Closed(Closed::Lost { source, .. }),
            ) => Some(source),
            Self::Closed(Closed::Cancelled { .. } | Closed::Forgotten { .. })
            | Self::Journal(_)
            | Self::OtherJournal => None,
        }
    }
}

/// What is known of the last message read from the journal.
#[derive(Clone, Copy, Debug)]
pub(super) struct LastRead {
    pub(super) offset: u64,
    pub(super) digest: u64,
}

/// What outlives a link.
#[derive(Debug)]
pub(super) struct Lasting {
    pub(super) coordinator: Coordinator,
    pub(super) clock: Clock,
    pub(super) last_read: Option<LastRead>,
    pub(super) tally: Tally,
}

enum Happening {
    Journal(Result<Message, Closed>),
    Reply(Result<Message, Closed>),
    Inquiry(Result<Message, Closed>),
    Request(Result<(Delivery, Message), Closed>),
    Published(Ticket, Published),
    LookedFor(ServiceName, Result<bool, lapin::Error>),
    Found(Found),
    Link(LinkEvent),
    Awake,
    StopRequested,
}

/// One link's worth of work.
pub(super) struct Session<'a> {
    settings: &'a Settings,
    lasting: &'a mut Lasting,
    link: Link,
    link_events: Box<dyn Stream<Item = LinkEvent> + Send + Unpin>,
    journal: Journal,
    tail: Tail,
    replies: Inbox,
    inquiries: Inbox,
    requests: Sources,
    outbox: Outbox,
    looked_for: FuturesUnordered<BoxFuture<'static, (ServiceName, Result<bool, lapin::Error>)>>,
    look_backs: JoinSet<()>,
    found: (mpsc::Sender<Found>, mpsc::Receiver<Found>),
    /// Where the results of the requests in hand go.
    reply_of: BTreeMap<Delivery, Option<ReplyToken>>,
    /// Inquiries that are acknowledged when so many records are safe.
    settling: BTreeMap<u64, u32>,
    effects: Vec<Effect>,
    meanings: Vec<Meaning>,
    is_blocked: bool,
    /// The broker has ended the reading of the journal, or seems to have.
    is_cut_off: bool,
    /// Since when something is known to be in the journal and was not read.
    unread_since: Option<Instant>,
    /// What comes now is handed on.
    is_draining: bool,
    /// Since when most of what is in flight waits for slots.
    crowded_since: Option<Instant>,
    /// Since when nothing does.
    eased_since: Option<Instant>,
}

impl<'a> Session<'a> {
    /// Opens everything that is worked with, and reads the journal to its end.
    pub(super) async fn open(
        settings: &'a Settings,
        lasting: &'a mut Lasting,
        link: Link,
    ) -> Result<Self, SessionError> {
        let link_events = Box::new(link.events());
        let names = &settings.names;
        let journal = Journal {
            queue: names.journal(),
            consuming: link.consuming.clone(),
            publishing: link.publishing.clone(),
        };
        let tail = read_journal(&journal, settings, lasting).await?;
        let outbox = Outbox::open(&link.publishing, names.clone(), settings.worker().clone());
        let outbox = outbox.await.map_err(opening("channels to publish on"))?;
        let replies = open_replies(settings, &link.consuming).await;
        let replies = replies.map_err(opening("the queue for replies"))?;
        let inquiries = Inbox::open(
            &link.consuming,
            names.inquiries(),
            INQUIRIES_PREFETCH,
            FieldTable::default(),
        );
        let inquiries = inquiries.await.map_err(opening("the queue of inquiries"))?;
        let inquiries = inquiries.watched(&link.consuming, Turn::Equal);
        let mut requests = Sources::new(names.requests());
        let opening_requests = requests.open(&link.consuming, settings.requests_prefetch());
        opening_requests.await.map_err(opening("the queue of requests"))?;
        Ok(Self {
            settings,
            lasting,
            link,
            link_events,
            journal,
            tail,
            replies,
            inquiries,
            requests,
            outbox,
            looked_for: FuturesUnordered::new(),
            look_backs: JoinSet::new(),
            found: mpsc::channel(64),
            reply_of: BTreeMap::new(),
            settling: BTreeMap::new(),
            effects: Vec::new(),
            meanings: Vec::new(),
            is_blocked: false,
            is_cut_off: false,
            unread_since: None,
            is_draining: false,
            crowded_since: None,
            eased_since: None,
        })
    }

    /// Works until the link is lost, or until `stop` has ended and all that was in flight is
    /// finished, or has had its time.
    pub(super) async fn run(
        mut self,
        mut stop: impl Future<Output = ()> + Unpin,
    ) -> Result<End, SessionError> {
        let mut drain_until = None;
        loop {
            let happening = tokio::select! {
                it = self.next() => it,
                () = &mut stop, if drain_until.is_none() => Happening::StopRequested,
                () = sleep_until(drain_until) => return Ok(self.close(End::DrainTimedOut).await),
            };
            if matches!(happening, Happening::StopRequested) {
                drain_until = Some(Instant::now() + self.settings.drain);
                self.drain().await?;
            } else {
                self.handle(happening)?;
            }
            self.handle_what_is_ready()?;
            self.flush();
            let is_unread = |since: Instant| since.elapsed() >= UNREAD_MAX;
            if self.is_cut_off || self.unread_since.is_some_and(is_unread) {
                // Without the journal nothing that is in flight can be finished.
                tokio::select! {
                    read = self.read_on() => read?,
                    () = &mut stop, if drain_until.is_none() => {
                        return Ok(self.close(End::WithoutJournal).await);
                    }
                    () = sleep_until(drain_until) => {
                        return Ok(self.close(End::DrainTimedOut).await);
                    }
                }
            }
            if drain_until.is_some() {
                if self.lasting.coordinator.is_empty() && self.outbox.is_idle() {
                    return Ok(self.close(End::Drained).await);
                }
            } else {
                self.take_more_or_less().await?;
            }
        }
    }

    /// The next thing that happens.
    async fn next(&mut self) -> Happening {
        if self.is_blocked {
            return self.next_while_blocked().await;
        }
        let has_room = self.is_draining || self.lasting.coordinator.room() > 0;
        let wake_at = self.wake_at();
        tokio::select! {
            it = self.tail.next(), if !self.is_cut_off => Happening::Journal(it),
            (ticket, published) = self.outbox.next() => Happening::Published(ticket, published),
            it = self.replies.next() => Happening::Reply(it),
            it = self.inquiries.next() => Happening::Inquiry(it),
            it = self.requests.next(), if has_room => Happening::Request(it),
            Some((service, found)) = self.looked_for.next() => {
                Happening::LookedFor(service, found)
            }
            Some(it) = self.found.1.recv() => Happening::Found(it),
            Some(it) = self.link_events.next() => Happening::Link(it),
            () = sleep_until(wake_at) => Happening::Awake,
        }
    }

    /// Nothing is sent while the broker takes nothing, so nothing is begun either.
    async fn next_while_blocked(&mut self) -> Happening {
        loop {
            tokio::select! {
                Some(it) = self.link_events.next() => return Happening::Link(it),
                it = self.replies.next() => return Happening::Reply(it),
                () = tokio::time::sleep(Duration::from_secs(5)) => {
                    tracing::warn!("the broker takes no messages yet");
                }
            }
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        let lasting = &self.lasting;
        let deadline = lasting.coordinator.next_deadline();
        let deadline = deadline.map(|at| lasting.clock.instant_of(at));
        let unread = self.unread_since.map(|since| since + UNREAD_MAX);
        let crowded = self.crowded_since.filter(|_| self.requests.taking() == 1);
        let more = crowded.map(|since| since + CROWDED_FOR);
        let wake_at = deadline.into_iter().chain(self.outbox.wake_at()).chain(unread);
        wake_at.chain(more).min()
    }

    /// Whatever else can be handled before anything is written.
    fn handle_what_is_ready(&mut self) -> Result<(), SessionError> {
        for _ in 0..BATCH_MAX {
            let mut idle = true;
            if !self.is_cut_off
                && let Some(it) = self.tail.ready()
            {
                idle = false;
                self.handle(Happening::Journal(it))?;
            }
            if let Some((ticket, published)) = self.outbox.ready() {
                idle = false;
                self.handle(Happening::Published(ticket, published))?;
            }
            if let Some(it) = self.replies.ready() {
                idle = false;
                self.handle(Happening::Reply(it))?;
            }
            if let Some(it) = self.inquiries.ready() {
                idle = false;
                self.handle(Happening::Inquiry(it))?;
            }
            let has_room = self.is_draining || self.lasting.coordinator.room() > 0;
            if has_room
                && !self.is_blocked
                && let Some(it) = self.requests.next().now_or_never()
            {
                idle = false;
                self.handle(Happening::Request(it))?;
            }
            if idle {
                break;
            }
        }
        let now = self.lasting.clock.now();
        if self.lasting.coordinator.next_deadline().is_some_and(|at| at <= now) {
            self.tell(Event::DeadlineReached);
        }
        Ok(())
    }

    fn handle(&mut self, happening: Happening) -> Result<(), SessionError> {
        match happening {
            // The stream's leader has moved, or its replica here is gone.
            Happening::Journal(Err(Closed::Cancelled { .. })) => self.is_cut_off = true,
            Happening::Journal(message) => self.journal_read(&message.map_err(lost)?)?,
            Happening::Reply(message) => {
                let message = message.map_err(lost)?;
                self.reply_received(&message, Held::Reply(message.delivery_tag));
            }
            Happening::Inquiry(message) => {
                let message = message.map_err(lost)?;
                self.reply_received(&message, Held::Inquiry(message.delivery_tag));
            }
            Happening::Request(request) => {
                let (delivery, message) = request.map_err(lost)?;
                self.request_received(delivery, &message);
            }
            Happening::Published(ticket, published) => self.published(ticket, published)?,
            Happening::LookedFor(service, found) => self.looked_for(service, found),
            Happening::Found(found) => self.found(found),
            Happening::Link(event) => self.link_event(event)?,
            Happening::Awake | Happening::StopRequested => {}
        }
        Ok(())
    }

    // ---- What comes in -----------------------------------------------------------------------

    fn journal_read(&mut self, message: &Message) -> Result<(), SessionError> {
        self.unread_since = None;
        let record = self.tail.read(message).map_err(SessionError::Journal)?;
        let event = read_event(self.lasting, record);
        self.tell(event);
        Ok(())
    }

    /// Reads the journal on from the message after the last one: nothing else is worth doing
    /// before that.
    async fn read_on(&mut self) -> Result<(), SessionError> {
        let Some(LastRead { offset, digest }) = self.lasting.last_read else {
            return Err(SessionError::OtherJournal);
        };
        tracing::warn!(offset, "the journal is not read any more; reading it on");
        let mut backoff = Backoff::default();
        while self.link.is_up() {
            match self.journal.resume(offset, digest).await {
                Ok(Some(tail)) => {
                    self.tail = tail;
                    (self.is_cut_off, self.unread_since) = (false, None);
                    return Ok(());
                }
                Ok(None) => return Err(SessionError::OtherJournal),
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "failed to read the journal on");
                    tokio::time::sleep(backoff.pause()).await;
                }
            }
        }
        Err(SessionError::OtherJournal)
    }

    fn reply_received(&mut self, message: &Message, held: Held) {
        let delivery = match held {
            Held::Inquiry(tag) => Some(Delivery(tag)),
            Held::Reply(_) | Held::Request(_) => None,
        };
        let intake = intake::reply(message, delivery);
        if let Some((service, prepares_max)) = intake.prepares_max {
            self.outbox.announced(service, prepares_max, Instant::now());
        }
        for event in intake.events {
            self.tell(event);
        }
        if !intake.complaints.is_empty() {
            let queue = match held {
                Held::Inquiry(_) => self.settings.names.inquiries(),
                Held::Reply(_) | Held::Request(_) => {
                    self.settings.names.replies_of(self.settings.worker())
                }
            };
            let reason = intake.complaints.join("; ");
            return self.reject(queue.as_str(), message, &reason, Then::Ack(held));
        }
        let is_settling = matches!(held, Held::Inquiry(tag) if self.settling.contains_key(&tag));
        if !is_settling {
            self.acknowledge(held);
        }
    }

    fn request_received(&mut self, delivery: Delivery, message: &Message) {
        match intake::request(message) {
            Ok(request) => {
                self.lasting.tally.taken += 1;
                self.reply_of.insert(delivery, request.reply.clone());
                self.tell(intake::request_received(request, message, delivery));
            }
            Err(malformed) => {
                let held = Then::Ack(Held::Request(delivery));
                let queue = self.settings.names.requests();
                let then = self.telling_producer_of(&malformed, held);
                self.reject(queue.as_str(), message, &malformed.reason, then);
            }
        }
    }

    /// Sets a message aside.
    fn reject(&mut self, queue: &str, message: &Message, reason: &str, then: Then) {
        self.lasting.tally.rejected += 1;
        tracing::warn!(queue, reason, "a message is rejected");
        let rejected = rejected(&self.settings.names, queue, message, reason);
        self.outbox.durable(Box::new(rejected), then);
    }

    /// If it is known who sent the request that can't be understood, they are told.
    fn telling_producer_of(&self, malformed: &RequestMalformed, then: Then) -> Then {
        let Some(id) = malformed.id.clone() else { return then };
        let now = self.lasting.clock.now();
        let answer = Answer {
            id,
            requested_at: malformed.requested_at.unwrap_or(now),
            outcome: Outcome::Aborted,
            reason: Some(Reason::because(ReasonCode::Invalid, malformed.reason.as_str())),
            unresolved: Vec::new(),
            decided_at: now,
        };
        let result = self.outbox.result(malformed.reply.as_ref(), &answer);
        Then::Publish(Box::new(result), Box::new(then))
    }

    fn published(&mut self, ticket: Ticket, published: Published) -> Result<(), SessionError> {
        // Its channel is gone, and nothing else would come through.
        if let Published::Lost(error) = published {
            return Err(SessionError::Lost(error));
        }
        let mut meanings = std::mem::take(&mut self.meanings);
        self.outbox.published(ticket, &published, Instant::now(), &mut meanings);
        for meaning in meanings.drain(..) {
            match meaning {
                Meaning::Event(event) => self.tell(event),
                Meaning::Ack(held) => self.safe(held),
            }
        }
        self.meanings = meanings;
        Ok(())
    }

    /// One of the things that `held` waits for is safe.
    fn safe(&mut self, held: Held) {
        if let Held::Inquiry(tag) = held
            && let Some(waiting) = self.settling.get_mut(&tag)
        {
            *waiting -= 1;
            if *waiting > 0 {
                return;
            }
            self.settling.remove(&tag);
        }
        self.acknowledge(held);
    }

    fn acknowledge(&mut self, held: Held) {
        match held {
            Held::Request(delivery) => {
                self.reply_of.remove(&delivery);
                self.requests.ack(delivery);
            }
            Held::Inquiry(tag) => self.inquiries.ack(tag),
            Held::Reply(tag) => self.replies.ack(tag),
        }
    }

    fn looked_for(&mut self, service: ServiceName, found: Result<bool, lapin::Error>) {
        match found {
            Ok(true) => self.tell(Event::ServiceFound(service)),
            Ok(false) => self.tell(Event::ServiceMissing(service)),
            Err(error) => {
                tracing::debug!(%service, error = %Chain(&error), "failed to look for a service");
                self.look_for(service.clone(), LOOK_AGAIN_AFTER);
                self.tell(Event::ServiceUnavailable(service));
            }
        }
    }

    fn found(&mut self, found: Found) {
        match found {
            Found::Decisions(decisions) => {
                decisions.into_iter().for_each(|it| self.tell(Event::HistoryRead(it)));
            }
            Found::Ended { reaches } => self.tell(Event::HistoryEnded { reaches }),
        }
    }

    fn link_event(&mut self, event: LinkEvent) -> Result<(), SessionError> {
        match event {
            LinkEvent::Blocked(reason) => {
                tracing::warn!(reason, "the broker takes no messages for now");
                self.is_blocked = true;
            }
            LinkEvent::Unblocked => {
                tracing::info!("the broker takes messages again");
                self.is_blocked = false;
            }
            LinkEvent::Lost(error) => return Err(SessionError::Lost(error)),
            LinkEvent::ChannelLost(error) if !self.outbox.is_open() => {
                return Err(SessionError::Lost(error));
            }
            LinkEvent::ChannelLost(_) => {}
        }
        Ok(())
    }

    // ---- What goes out -----------------------------------------------------------------------

    /// Lets the coordinator handle an event, and gathers what follows.
    fn tell(&mut self, event: Event) {
        let now = self.lasting.clock.now();
        let mut effects = std::mem::take(&mut self.effects);
        self.lasting.coordinator.handle(now, event, &mut effects);
        effects.drain(..).for_each(|effect| self.perform(effect));
        self.effects = effects;
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::FindService { service, after } => self.look_for(service, after),
            Effect::SendPrepare { service, prepare, spare } => {
                self.outbox.prepare(service, &prepare, spare);
            }
            Effect::Send { service, to, command } => self.outbox.send(service, to, &command),
            Effect::Append(decision) => self.outbox.append(decision),
            Effect::ReadHistory { from, until } => {
                let clock_margin = self.settings.coordinator.clock_margin;
                let look = LookBack { from, until, clock_margin };
                let looking = self.journal.clone().look_back(look, self.found.0.clone());
                self.look_backs.spawn(looking);
            }
            Effect::Publish { key, delivery, answer } => {
                self.lasting.tally.count(&answer);
                let reply = self.reply_of.get(&delivery).cloned().flatten();
                self.outbox.answer(reply, &answer, (key, delivery));
            }
            Effect::Ack(delivery) => self.acknowledge(Held::Request(delivery)),
            Effect::Release(delivery) => {
                self.reply_of.remove(&delivery);
                self.requests.requeue(delivery);
            }
            Effect::Reject { request, delivery, reason } => {
                self.reject_request(&request, delivery, reason);
            }
            Effect::Park(parked) => {
                let service = match &parked.matter {
                    Matter::Uncommitted { service, .. } => Some(service.clone()),
                    Matter::Undecidable(_) => None,
                };
                self.lasting.tally.parked += 1;
                tracing::error!(
                    transaction = %parked.key, service = service.as_ref().map(ServiceName::as_str),
                    "a transaction needs a person: see the unresolved ones"
                );
                let key = parked.key.clone();
                let then = Then::Tell(Event::ParkConfirmed { key, service });
                self.outbox.park(&parked, then);
            }
            Effect::Settle { key, service, ack } => self.settle(key, service, ack),
            Effect::Report(anomaly) => self.report(&anomaly),
        }
    }

    fn report(&mut self, anomaly: &Anomaly) {
        match anomaly {
            Anomaly::ResultUnclaimed { key, attempts } => {
                self.outbox.unclaimed += 1;
                tracing::warn!(transaction = %key, attempts,
                    "the broker did not take a result; its producer can ask again");
            }
            Anomaly::ServiceUnavailable(service) => {
                let queue = self.settings.names.prepare_of(service);
                tracing::warn!(%service, %queue, "a service cannot be reached");
            }
            Anomaly::ServiceAvailable(service) => {
                let queue = self.settings.names.prepare_of(service);
                tracing::info!(%service, %queue, "a service can be reached again");
            }
            Anomaly::DuplicateRequest(_)
            | Anomaly::LateVote(..)
            | Anomaly::PreparedTwice(..)
            | Anomaly::CommitFailed { .. }
            | Anomaly::Unanswered(..)
            | Anomaly::Stalled(..)
            | Anomaly::InquiryDropped(_)
            | Anomaly::JournalGap(_) => tracing::debug!(?anomaly, "reported"),
        }
    }

    /// `ack`: the message of the queue of inquiries that this follows from; it is acknowledged when
    /// all records that follow from it are safe.
    fn settle(&mut self, key: TransactionKey, service: ServiceName, ack: Option<Delivery>) {
        let then = match ack {
            Some(Delivery(tag)) => {
                tracing::info!(transaction = %key, %service, "a parked commit is done");
                *self.settling.entry(tag).or_default() += 1;
                Then::Ack(Held::Inquiry(tag))
            }
            None => {
                // As it is with most requests that are delivered again: whoever had them may have
                // parked something.
                tracing::debug!(transaction = %key, %service, "what may have been parked is done");
                Then::Nothing
            }
        };
        let settled_at = self.lasting.clock.now();
        let worker = self.settings.worker().clone();
        self.outbox.settle(&Settled { key, service, settled_at, worker }, then);
    }

    /// A request that was understood, and can't be served.
    fn reject_request(&mut self, request: &Request, delivery: Delivery, reason: Reason) {
        let text = reason.message.as_deref().unwrap_or(reason.code.as_str());
        let text = format!("{}: {text}", reason.code);
        self.lasting.tally.rejected += 1;
        tracing::warn!(transaction = %request.key, reason = text, "a request is rejected");
        let spec = TransactionSpec {
            id: request.key.id.clone(),
            services: request.services.clone(),
            data: request.data.clone(),
            request_hash: request.request_hash,
            timeout: request.timeout,
        };
        let body = encode_request(&spec, request.reply.as_ref()).unwrap_or_default();
        let seconds = request.key.requested_at.as_millis() / 1000;
        let rejected = rejected_request(&self.settings.names, body, seconds, &text);
        let answer = Answer {
            id: request.key.id.clone(),
            requested_at: request.key.requested_at,
            outcome: Outcome::Aborted,
            reason: Some(reason),
            unresolved: Vec::new(),
            decided_at: self.lasting.clock.now(),
        };
        let result = self.outbox.result(request.reply.as_ref(), &answer);
        let ack = Then::Ack(Held::Request(delivery));
        self.outbox.durable(Box::new(rejected), Then::Publish(Box::new(result), Box::new(ack)));
    }

    fn look_for(&mut self, service: ServiceName, after: Duration) {
        let connection = self.link.consuming.clone();
        let queue = self.settings.names.prepare_of(&service);
        let looking = async move {
            tokio::time::sleep(after).await;
            let found = counts(&connection, queue).await;
            (service, found.map(|found| found.is_some()))
        };
        self.looked_for.push(looking.boxed());
    }

    fn flush(&mut self) {
        self.outbox.flush(Instant::now());
        self.tail.flush();
        self.replies.flush();
        self.inquiries.flush();
        self.requests.flush();
    }

    // ---- More and less work ------------------------------------------------------------------

    /// Requests that wait in the worker for a full service must not keep out others.
    async fn take_more_or_less(&mut self) -> Result<(), SessionError> {
        let waiting = self.lasting.coordinator.waiting();
        let in_flight_max = self.settings.coordinator.in_flight_max;
        let now = Instant::now();
        let since = |holds: bool, before: Option<Instant>| holds.then(|| before.unwrap_or(now));
        self.crowded_since = since(waiting * 2 > in_flight_max, self.crowded_since);
        self.eased_since = since(waiting == 0, self.eased_since);
        let has_lasted = |since: Option<Instant>, long| since.is_some_and(|it| now - it >= long);
        if self.requests.taking() == 1 && has_lasted(self.crowded_since, CROWDED_FOR) {
            let prefetch = self.settings.waiting_prefetch();
            let opening_more = self.requests.open(&self.link.consuming, prefetch);
            opening_more.await.map_err(opening("one more consumer of requests"))?;
        } else if self.requests.taking() > 1 && has_lasted(self.eased_since, EASED_FOR) {
            let cancelling = self.requests.cancel_all_but(1);
            cancelling.await.map_err(opening("the queue of requests"))?;
        }
        Ok(())
    }

    async fn drain(&mut self) -> Result<(), SessionError> {
        tracing::info!(in_flight = self.lasting.coordinator.len(), "draining");
        self.requests.cancel_all_but(0).await.map_err(opening("the queue of requests"))?;
        self.is_draining = true;
        self.tell(Event::DrainRequested);
        Ok(())
    }

    /// Says goodbye: what is left goes to other workers.
    async fn close(mut self, end: End) -> End {
        self.flush();
        self.look_backs.abort_all();
        self.lasting.tally.unclaimed += self.outbox.unclaimed;
        let _ = timeout(GOODBYE_MAX, self.outbox.finish()).await;
        self.link.close().await;
        end
    }
}

/// Reads the journal on, or from the beginning of the window.
async fn read_journal(
    journal: &Journal,
    settings: &Settings,
    lasting: &mut Lasting,
) -> Result<Tail, SessionError> {
    if let Some(LastRead { offset, digest }) = lasting.last_read {
        let resuming = journal.resume(offset, digest).await.map_err(SessionError::Journal)?;
        if let Some(tail) = resuming {
            return Ok(tail);
        }
        tracing::warn!(offset, "the journal does not go on where it was left: it is read anew");
    }
    let started = Instant::now();
    let now = lasting.clock.now();
    let margin = settings.coordinator.clock_margin;
    let from = now - settings.coordinator.window - margin;
    let lasting = Mutex::new(lasting);
    let mut decisions = 0_usize;
    let tail = journal.attach(
        from,
        margin,
        |next, reaches| {
            if reaches.is_none() {
                tracing::warn!(
                    "the journal's beginning is missing: what was requested before now can't be \
                     told, and will be parked"
                );
            }
            // Without a word from the journal only what is still to come is certain.
            let since = reaches.unwrap_or(now + margin);
            let lasting = &mut **lasting.lock().unwrap_or_else(PoisonError::into_inner);
            let event = Event::JournalAttached { next, since };
            lasting.coordinator.handle(now, event, &mut Vec::new());
        },
        |record| {
            decisions += record.decisions.len();
            let lasting = &mut **lasting.lock().unwrap_or_else(PoisonError::into_inner);
            let event = read_event(lasting, record);
            let now = lasting.clock.now();
            // Nobody is being served, so nothing follows.
            lasting.coordinator.handle(now, event, &mut Vec::new());
        },
    );
    let tail = tail.await.map_err(SessionError::Journal)?;
    tracing::info!(
        decisions,
        elapsed_ms = started.elapsed().as_millis() as u64,
        "the journal is read"
    );
    Ok(tail)
}

fn read_event(lasting: &mut Lasting, record: Record) -> Event {
    let Record { offset, decisions, digest, .. } = record;
    lasting.last_read = Some(LastRead { offset, digest });
    Event::RecordsRead { offset, decisions }
}

/// The worker's own queue. Its name is new with every link: the broker may not have noticed yet that
/// the link before is gone, and then keeps the old queue for it.
async fn open_replies(settings: &Settings, connection: &Connection) -> Result<Inbox, lapin::Error> {
    let Settings { names, .. } = settings;
    let channel = connection.create_channel().await?;
    let queue = format!("{}.{}", names.replies_of(settings.worker()), unique::name('l'));
    let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.as_str().into(), options, FieldTable::default()).await?;
    let binding = names::key(settings.worker(), "*");
    let bind = QueueBindOptions::default();
    let arguments = FieldTable::default();
    channel.queue_bind(queue.as_str().into(), names.replies(), binding, bind, arguments).await?;
    let nothing = FieldTable::default();
    Ok(Inbox::on(channel, queue.as_str().into(), REPLIES_PREFETCH, nothing).await?.lazy())
}

fn opening(what: &'static str) -> impl FnOnce(lapin::Error) -> SessionError {
    move |source| SessionError::Open { what, source }
}

fn lost(closed: Closed) -> SessionError {
    SessionError::Closed(closed)
}

async fn sleep_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
