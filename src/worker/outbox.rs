//! Publishes what the worker sends. Items are gathered while the session handles inputs, and then
//! published, all items for one destination in as few messages as possible.
//!
//! A message that may be lost is published once: if it is lost, the protocol sends it again. A message
//! that must not be lost is published until it is confirmed.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use lapin::types::ShortString;
use tokio::time::Instant;

use crate::{
    protocol::{
        coordinator::Event,
        ids::{ReplyToken, ServiceName, TransactionKey, WorkerId},
        message::{
            Answer, Command, Delivery, Destination, Finish, Outcome, Parked, ParkedCause, Prepare,
        },
    },
    transport::amqp::{
        bounded::AskError,
        connection::BrokerConnection,
        names::{self, ALL, ANY, NO_REPLY, Names},
        publisher::{OutgoingMessage, PublishOutcome, Publisher, PublisherError},
        reliable::ReliablePublisher,
        unique,
    },
    wire::message::{BodyFull, Item, Items, Kind, Settled},
    worker::{
        parking::{Parking, ParkingStep},
        prepare_batcher::{PrepareBatcher, Prepares},
        suspects::Try,
    },
};

/// How long the confirm of a result may take. A producer's queue that takes no results must not hold up
/// other producers.
const RESULT_CONFIRM_MAX: Duration = Duration::from_secs(4);

/// After results under one reply token have failed for this long, each further one is published only
/// once: the producer's queue is probably gone.
const UNREACHABLE_AFTER: Duration = Duration::from_secs(8);

/// For how many reply tokens it is remembered that results fail.
const UNREACHABLE_MAX: usize = 1024;

/// A delivery that is acknowledged when the messages that follow from it are safe.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Unacked {
    /// A request.
    Request(Delivery),
    /// A message from the queue of inquiries.
    Inquiry(u64),
    /// A message from the worker's own queue.
    Reply(u64),
}

/// What to do when the broker has confirmed a message.
#[derive(Clone, Debug)]
pub(super) enum OnConfirm {
    /// Pass an event to the coordinator.
    Tell(Event),
    /// Acknowledge the delivery that the message follows from.
    Ack(Unacked),
    /// Publish these results of rejected requests, one after another, and then acknowledge the delivery, even
    /// if the broker doesn't take a result: the producer can ask again.
    Answer(VecDeque<OutgoingMessage>, Unacked),
    /// Write the record of a parked commit, whose command is safe now.
    Record(Box<Parked>),
    /// Try this suspect.
    Try(TransactionKey),
    Nothing,
}

/// What the session has to do after the broker's answer to a publish.
#[derive(Debug)]
pub(super) enum OutboxEvent {
    /// Pass it to the coordinator.
    Event(Event),
    /// One of the messages that this delivery waits for is safe.
    Safe(Unacked),
    /// The try of this suspect is recorded.
    MayTry(TransactionKey),
}

/// What a message of prepares was about.
#[derive(Debug)]
struct PublishedPrepares {
    keys: Vec<TransactionKey>,
    service: ServiceName,
}

/// What a message of results was about.
#[derive(Debug)]
enum Answered {
    /// Results of transactions.
    Of { reply: Option<ReplyToken>, requests: Vec<(TransactionKey, Delivery)> },
    /// Results of rejected requests; `rest` is to be published next.
    SetAside { rest: VecDeque<OutgoingMessage>, unacked: Unacked },
}

/// The destination of items that share a message.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct To {
    service: ServiceName,
    destination: Destination,
    kind: Kind,
}

/// Results that share a message.
#[derive(Debug, Default)]
struct ResultBatch {
    items: Items,
    answered: Vec<(TransactionKey, Delivery)>,
}

/// All messages that go out over one link, except appends and packs.
pub(super) struct Outbox {
    names: Names,
    worker: WorkerId,
    prepares: Publisher<PublishedPrepares>,
    /// Commands to instances. A command is sent again until it is answered, so it needs no confirm.
    commands: Publisher<()>,
    results: Publisher<Answered>,
    /// Messages that must not be lost.
    durable: ReliablePublisher<OnConfirm>,
    parking: Parking,
    gathered: BTreeMap<To, Items>,
    prepare_batcher: PrepareBatcher,
    answers: BTreeMap<(Option<ReplyToken>, Outcome), ResultBatch>,
    /// Reply tokens under which results fail, and since when.
    unreachable: BTreeMap<Option<ReplyToken>, Instant>,
    events: VecDeque<OutboxEvent>,
    /// How many results no queue took.
    pub(super) unclaimed: u64,
}

impl Outbox {
    pub(super) async fn open(
        publishing: &Arc<BrokerConnection>,
        names: Names,
        worker: WorkerId,
    ) -> Result<Self, AskError> {
        let results = Publisher::open(publishing, format!("results to `{}`", names.results()));
        let prepares = format!("prepares to `{}`", names.prepare());
        let commands = format!("commands to `{}`", names.finish());
        Ok(Self {
            results: results.await?.with_limit(RESULT_CONFIRM_MAX),
            worker,
            prepares: Publisher::open(publishing, prepares).await?,
            commands: Publisher::unconfirmed(publishing, commands).await?,
            durable: ReliablePublisher::open(publishing, "what must not be lost").await?,
            names,
            parking: Parking::default(),
            gathered: BTreeMap::new(),
            prepare_batcher: PrepareBatcher::default(),
            answers: BTreeMap::new(),
            unreachable: BTreeMap::new(),
            events: VecDeque::new(),
            unclaimed: 0,
        })
    }

    // ---- Gathering ---------------------------------------------------------------------------

    /// An instance has said how many prepares it takes in one message.
    pub(super) fn announced(&mut self, service: ServiceName, prepares_max: u16, now: Instant) {
        self.prepare_batcher.announced(service, prepares_max, now);
    }

    /// Gathers a prepare. `spare`: how many slots of the service are free, as far as is known.
    pub(super) fn prepare(&mut self, service: ServiceName, prepare: &Prepare, spare: u32) {
        if let Some(prepares) = self.prepare_batcher.add(&service, prepare, spare) {
            self.write_prepares(service, prepares);
        }
    }

    pub(super) fn send(&mut self, service: ServiceName, to: Destination, command: &Command) {
        let to = To { service, destination: to, kind: Kind::of(command) };
        let items = self.gathered.entry(to.clone()).or_default();
        if items.push_command(command).is_ok() {
            return;
        }
        let full = std::mem::take(items);
        let _ = items.push_command(command);
        self.write_commands(&to, full);
    }

    pub(super) fn answer(
        &mut self,
        reply: Option<ReplyToken>,
        answer: &Answer,
        of: (TransactionKey, Delivery),
    ) {
        let key = (reply, answer.outcome);
        let results = self.answers.entry(key.clone()).or_default();
        if results.items.push(answer).is_ok() {
            return results.answered.push(of);
        }
        let full = std::mem::take(results);
        let _ = results.items.push(answer);
        results.answered.push(of);
        self.write_results(&key, full);
    }

    /// Messages with these results: those under one reply token in as few as possible.
    pub(super) fn results_of(
        &self,
        answers: impl IntoIterator<Item = (Option<ReplyToken>, Answer)>,
    ) -> VecDeque<OutgoingMessage> {
        let mut messages = VecDeque::new();
        let mut gathered: BTreeMap<(Option<ReplyToken>, Outcome), Items> = BTreeMap::new();
        for (reply, answer) in answers {
            let items = gathered.entry((reply.clone(), answer.outcome)).or_default();
            if items.push(&answer).is_err() {
                let full = std::mem::take(items);
                let _ = items.push(&answer);
                messages.push_back(self.result_message(
                    reply.as_ref(),
                    answer.outcome,
                    full.into_body(),
                ));
            }
        }
        messages.extend(gathered.into_iter().map(|((reply, outcome), items)| {
            self.result_message(reply.as_ref(), outcome, items.into_body())
        }));
        messages
    }

    /// Publishes the next result of rejected requests; after the last one their delivery may be
    /// acknowledged.
    fn answer_rejected(&mut self, mut results: VecDeque<OutgoingMessage>, unacked: Unacked) {
        match results.pop_front() {
            Some(next) => self.results.publish(next, Answered::SetAside { rest: results, unacked }),
            None => self.events.push_back(OutboxEvent::Safe(unacked)),
        }
    }

    /// Writes a record for operators. The command of a parked commit goes to the durable queue of its
    /// service first, and is not sent again when the record is safe.
    pub(super) fn park(&mut self, parked: Parked) {
        let ParkedCause::Uncommitted { service, branch, .. } = &parked.cause else {
            return self.record(&parked);
        };
        match self.parking.asked(&parked.key, service) {
            ParkingStep::Queue => {
                let finish = Finish {
                    key: parked.key.clone(),
                    outcome: Outcome::Committed,
                    branch: Some(branch.clone()),
                    parked: true,
                };
                let to = To {
                    service: service.clone(),
                    destination: Destination::AnyInstance,
                    kind: Kind::Finish,
                };
                let command = self.command(&to, body_of(&finish));
                self.durable(command, OnConfirm::Record(Box::new(parked)));
            }
            ParkingStep::Record => self.record(&parked),
            ParkingStep::Wait => {}
        }
    }

    fn record(&mut self, parked: &Parked) {
        let message = self.unresolved(Kind::Parked, body_of(parked));
        let (key, service) = (parked.key.clone(), parked.service().cloned());
        self.durable(message, OnConfirm::Tell(Event::ParkConfirmed { key, service }));
    }

    pub(super) fn settle(&mut self, settled: &Settled, then: OnConfirm) {
        let message = self.unresolved(Kind::Settled, body_of(settled));
        self.durable(message, then);
    }

    /// Records in the journal that the try of a suspect begins or is over.
    pub(super) fn write_down(&mut self, it: &Try, then: OnConfirm) {
        let message = OutgoingMessage {
            key: self.names.journal(),
            message_type: Kind::Decision.as_type(),
            body: Items::new().into_body(),
            persistent: true,
            mandatory: true,
            // If the record is published again, it has the same id.
            message_id: Some(unique::name('t').into()),
            headers: Some(it.headers()),
            ..OutgoingMessage::default()
        };
        self.durable(message, then);
    }

    fn unresolved(&self, kind: Kind, body: Vec<u8>) -> OutgoingMessage {
        OutgoingMessage {
            key: self.names.unresolved(),
            message_type: kind.as_type(),
            body,
            persistent: true,
            mandatory: true,
            ..OutgoingMessage::default()
        }
    }

    /// Publishes `message` until it is confirmed, and then does `then`.
    pub(super) fn durable(&mut self, message: OutgoingMessage, then: OnConfirm) {
        self.durable.publish(message, then);
    }

    // ---- Writing -----------------------------------------------------------------------------

    /// Publishes what was gathered.
    pub(super) fn flush(&mut self, now: Instant) {
        for (service, prepares) in self.prepare_batcher.take() {
            self.write_prepares(service, prepares);
        }
        for (to, items) in std::mem::take(&mut self.gathered) {
            self.write_commands(&to, items);
        }
        for (key, results) in std::mem::take(&mut self.answers) {
            self.write_results(&key, results);
        }
        self.durable.flush(now);
    }

    fn write_prepares(&mut self, service: ServiceName, Prepares { items, keys }: Prepares) {
        let message = OutgoingMessage {
            exchange: self.names.prepare(),
            key: names::key(&self.worker, &service),
            message_type: Kind::Prepare.as_type(),
            body: items.into_body(),
            mandatory: true,
            reply_to: Some(self.reply_to()),
            ..OutgoingMessage::default()
        };
        self.prepares.publish(message, PublishedPrepares { keys, service });
    }

    fn write_commands(&mut self, to: &To, items: Items) {
        self.commands.publish(self.command(to, items.into_body()), ());
    }

    /// A message of commands. One for any instance stays in the service's queue until an instance takes
    /// it.
    fn command(&self, to: &To, body: Vec<u8>) -> OutgoingMessage {
        let To { service, destination, kind } = to;
        let (exchange, key, stays) = match destination {
            Destination::Instance(instance) => {
                (self.names.finish(), names::key(instance, service), false)
            }
            Destination::AllInstances => (self.names.finish(), names::key(ALL, service), false),
            Destination::AnyInstance => (self.names.finish_any(), names::key(ANY, service), true),
        };
        OutgoingMessage {
            exchange,
            key,
            message_type: kind.as_type(),
            body,
            persistent: stays,
            mandatory: stays,
            reply_to: Some(self.reply_to()),
            ..OutgoingMessage::default()
        }
    }

    fn write_results(&mut self, key: &(Option<ReplyToken>, Outcome), results: ResultBatch) {
        let (reply, outcome) = key;
        let message = self.result_message(reply.as_ref(), *outcome, results.items.into_body());
        let answered = Answered::Of { reply: reply.clone(), requests: results.answered };
        self.results.publish(message, answered);
    }

    fn result_message(
        &self,
        reply: Option<&ReplyToken>,
        outcome: Outcome,
        body: Vec<u8>,
    ) -> OutgoingMessage {
        let reply = reply.map_or(NO_REPLY, ReplyToken::as_str);
        OutgoingMessage {
            exchange: self.names.results(),
            key: names::key(reply, outcome),
            message_type: Kind::Result.as_type(),
            body,
            persistent: true,
            mandatory: true,
            ..OutgoingMessage::default()
        }
    }

    fn reply_to(&self) -> ShortString {
        self.worker.as_str().into()
    }

    // ---- Confirms ----------------------------------------------------------------------------

    /// Ready with what follows from the broker's next answer.
    pub(super) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<OutboxEvent, PublisherError>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(Ok(event));
            }
            if let Poll::Ready(answered) = self.results.poll_next(cx) {
                let (answered, published) = answered?;
                self.result_answered(answered, &published);
            } else if let Poll::Ready(answered) = self.prepares.poll_next(cx) {
                let (asked, published) = answered?;
                self.prepares_answered(asked, &published);
            } else if let Poll::Ready(safe) = self.durable.poll_next(cx) {
                self.confirmed(safe?);
            } else if let Poll::Ready(written) = self.commands.poll_next(cx) {
                let ((), published) = written?;
                if !matches!(published, PublishOutcome::Confirmed) {
                    tracing::debug!(outcome = ?published, "failed to write a command");
                }
            } else {
                return Poll::Pending;
            }
        }
    }

    fn prepares_answered(&mut self, asked: PublishedPrepares, published: &PublishOutcome) {
        if matches!(published, PublishOutcome::Confirmed) {
            return;
        }
        let PublishedPrepares { keys, service } = asked;
        // The service's queue is gone, or its node is down. The coordinator looks for the service to find
        // out which.
        self.events.extend(keys.into_iter().map(|key| {
            let service = service.clone();
            OutboxEvent::Event(Event::PrepareRefused { key, service })
        }));
    }

    fn result_answered(&mut self, answered: Answered, published: &PublishOutcome) {
        let (reply, of) = match answered {
            Answered::Of { reply, requests } => (reply, requests),
            Answered::SetAside { rest, unacked } => return self.answer_rejected(rest, unacked),
        };
        let is_done = match published {
            PublishOutcome::Confirmed => {
                self.unreachable.remove(&reply);
                true
            }
            PublishOutcome::Unroutable => {
                self.unreachable.remove(&reply);
                self.unclaimed += of.len() as u64;
                true
            }
            PublishOutcome::Refused | PublishOutcome::Unconfirmed(_) | PublishOutcome::Lost(_) => {
                let is_unreachable = self.is_unreachable(reply);
                self.unclaimed += if is_unreachable { of.len() as u64 } else { 0 };
                is_unreachable
            }
        };
        self.events.extend(of.into_iter().map(|(key, delivery)| {
            OutboxEvent::Event(match is_done {
                true => Event::ResultConfirmed { key, delivery },
                false => Event::ResultFailed { key, delivery },
            })
        }));
    }

    /// A result under `reply` has failed. Returns whether they have been failing for too long.
    fn is_unreachable(&mut self, reply: Option<ReplyToken>) -> bool {
        let now = Instant::now();
        if let Some(since) = self.unreachable.get(&reply) {
            return now - *since >= UNREACHABLE_AFTER;
        }
        let name = reply.as_ref().map_or(NO_REPLY, ReplyToken::as_str);
        tracing::warn!(
            reply = name,
            "the broker does not take results: a queue that is bound for them is full, or its node is \
             down; their producer can ask again"
        );
        if self.unreachable.len() >= UNREACHABLE_MAX {
            let oldest = self.unreachable.iter().min_by_key(|(_, since)| **since);
            if let Some(oldest) = oldest.map(|(reply, _)| reply.clone()) {
                self.unreachable.remove(&oldest);
            }
        }
        self.unreachable.insert(reply, now);
        false
    }

    fn confirmed(&mut self, then: OnConfirm) {
        match then {
            OnConfirm::Tell(event) => {
                if let Event::ParkConfirmed { key, service: Some(service) } = &event {
                    self.parking.recorded(key, service);
                }
                self.events.push_back(OutboxEvent::Event(event));
            }
            OnConfirm::Record(parked) => {
                let next = parked.service().map(|it| self.parking.queued(&parked.key, it));
                if next == Some(ParkingStep::Record) {
                    self.record(&parked);
                }
            }
            OnConfirm::Ack(unacked) => self.events.push_back(OutboxEvent::Safe(unacked)),
            OnConfirm::Try(key) => self.events.push_back(OutboxEvent::MayTry(key)),
            OnConfirm::Answer(results, unacked) => self.answer_rejected(results, unacked),
            OnConfirm::Nothing => {}
        }
    }

    /// Whether all channels are open, as far as is known.
    pub(super) fn is_open(&self) -> bool {
        self.prepares.is_open()
            && self.commands.is_open()
            && self.results.is_open()
            && self.durable.is_open()
    }

    /// Waits until the broker has answered all publishes.
    pub(super) async fn finish(&mut self) {
        self.prepares.finish().await;
        self.commands.finish().await;
        self.results.finish().await;
        self.durable.finish().await;
    }

    /// When to publish a message again.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        self.durable.wake_at()
    }

    /// Whether no message is on its way that must not be lost.
    pub(super) fn is_idle(&self) -> bool {
        self.durable.is_idle()
            && self.answers.is_empty()
            && self.events.is_empty()
            && self.results.outstanding() == 0
    }
}

/// The body of one item, which always fits.
fn body_of<T: Item>(item: &T) -> Vec<u8> {
    let mut items = Items::new();
    let fits: Result<(), BodyFull> = items.push(item);
    debug_assert!(fits.is_ok(), "one item fits");
    items.into_body()
}
