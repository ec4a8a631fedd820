//! What goes out: gathered while events are handled, then written, all that is for one destination
//! in as few messages as it fits into.
//!
//! What may be lost is published and forgotten: the protocol says it again. What must not be lost
//! is published until it is confirmed.

use std::{collections::BTreeMap, time::Duration};

use lapin::{Connection, types::ShortString};
use tokio::time::Instant;

use crate::{
    protocol::{
        coordinator::Event,
        ids::{ReplyToken, ServiceName, TransactionKey, WorkerId},
        message::{Answer, Command, Decision, Delivery, Destination, Outcome, Parked, Prepare},
    },
    transport::amqp::{
        names::{self, ALL, ANY, NO_REPLY, Names},
        publisher::{Outgoing, Published, Publisher},
    },
    wire::message::{Full, Item, Items, Kind, Settled},
    worker::together::{Prepares, Together},
};

/// How long to wait before something is published again that must not be lost.
const PUBLISH_AGAIN_AFTER: Duration = Duration::from_millis(500);

/// A delivery that is acknowledged when what follows from it is safe.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Held {
    /// A request.
    Request(Delivery),
    /// A message from the queue of inquiries.
    Inquiry(u64),
    /// A message from the worker's own queue.
    Reply(u64),
}

/// What is to be done when something is safe with the broker.
#[derive(Clone, Debug)]
pub(super) enum Then {
    /// Tell the coordinator.
    Tell(Event),
    /// Acknowledge what it follows from.
    Ack(Held),
    /// Publish another, and then go on.
    Publish(Box<Outgoing>, Box<Self>),
    /// Nothing.
    Nothing,
}

/// What a publish is, for when its confirm comes.
#[derive(Debug)]
pub(super) enum Ticket {
    /// It may be lost.
    Expendable,
    Prepares {
        keys: Vec<TransactionKey>,
        service: ServiceName,
    },
    Append(Vec<Decision>),
    Results(Vec<(TransactionKey, Delivery)>),
    /// It must not be lost.
    Durable(Box<Outgoing>, Then),
}

/// What a confirm means.
#[derive(Debug)]
pub(super) enum Meaning {
    Event(Event),
    Ack(Held),
}

/// The destination of items that travel together.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct To {
    service: ServiceName,
    destination: Destination,
    kind: Kind,
}

/// Results that travel together.
#[derive(Debug, Default)]
struct Results {
    items: Items,
    answered: Vec<(TransactionKey, Delivery)>,
}

/// Everything on its way out over one link.
pub(super) struct Outbox {
    names: Names,
    worker: WorkerId,
    prepares: Publisher<Ticket>,
    /// What an instance is told. What gets lost is said again until it is answered, so nobody waits
    /// for its confirm.
    commands: Publisher<Ticket>,
    journal: Publisher<Ticket>,
    results: Publisher<Ticket>,
    gathered: BTreeMap<To, Items>,
    together: Together,
    answers: BTreeMap<(Option<ReplyToken>, Outcome), Results>,
    /// Decisions that wait for the append before them.
    decisions: Vec<Decision>,
    /// One append is outstanding; all that is ready by its end goes into the next.
    is_appending: bool,
    append_after: Option<Instant>,
    /// What is published again, and when.
    again: Vec<(Instant, Box<Outgoing>, Then)>,
    /// Results that nobody takes.
    pub(super) unclaimed: u64,
}

impl Outbox {
    pub(super) async fn open(
        connection: &Connection,
        names: Names,
        worker: WorkerId,
    ) -> Result<Self, lapin::Error> {
        Ok(Self {
            names,
            worker,
            prepares: Publisher::open(connection).await?,
            commands: Publisher::unconfirmed(connection).await?,
            journal: Publisher::open(connection).await?,
            results: Publisher::open(connection).await?,
            gathered: BTreeMap::new(),
            together: Together::default(),
            answers: BTreeMap::new(),
            decisions: Vec::new(),
            is_appending: false,
            append_after: None,
            again: Vec::new(),
            unclaimed: 0,
        })
    }

    // ---- Gathering ---------------------------------------------------------------------------

    /// An instance takes so many prepares in one message.
    pub(super) fn announced(&mut self, service: ServiceName, prepares_max: u16, now: Instant) {
        self.together.announced(service, prepares_max, now);
    }

    /// A prepare for a service that has so many slots free, as far as is known.
    pub(super) fn prepare(&mut self, service: ServiceName, prepare: &Prepare, spare: u32) {
        if let Some(prepares) = self.together.add(&service, prepare, spare) {
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

    pub(super) fn append(&mut self, decision: Decision) {
        self.decisions.push(decision);
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

    /// The message that tells a producer of `answer`, by itself.
    pub(super) fn result(&self, reply: Option<&ReplyToken>, answer: &Answer) -> Outgoing {
        self.result_message(reply, answer.outcome, body_of(answer))
    }

    pub(super) fn park(&mut self, parked: &Parked, then: Then) {
        let message = self.unresolved(Kind::Parked, body_of(parked));
        self.durable(Box::new(message), then);
    }

    pub(super) fn settle(&mut self, settled: &Settled, then: Then) {
        let message = self.unresolved(Kind::Settled, body_of(settled));
        self.durable(Box::new(message), then);
    }

    fn unresolved(&self, kind: Kind, body: Vec<u8>) -> Outgoing {
        Outgoing {
            key: self.names.unresolved(),
            message_type: kind.as_type(),
            body,
            persistent: true,
            mandatory: true,
            ..Outgoing::default()
        }
    }

    /// Publishes `message` until it is confirmed, and then does what follows.
    pub(super) fn durable(&mut self, message: Box<Outgoing>, then: Then) {
        let ticket = Ticket::Durable(message.clone(), then);
        self.results.publish(*message, ticket);
    }

    // ---- Writing -----------------------------------------------------------------------------

    /// Writes what was gathered.
    pub(super) fn flush(&mut self, now: Instant) {
        for (service, prepares) in self.together.take() {
            self.write_prepares(service, prepares);
        }
        for (to, items) in std::mem::take(&mut self.gathered) {
            self.write_commands(&to, items);
        }
        for (key, results) in std::mem::take(&mut self.answers) {
            self.write_results(&key, results);
        }
        if !self.is_appending && self.append_after.is_none_or(|at| at <= now) {
            self.write_decisions();
        }
        let (due, later) = std::mem::take(&mut self.again).into_iter().partition(|it| it.0 <= now);
        self.again = later;
        for (_, message, then) in due {
            self.durable(message, then);
        }
    }

    fn write_prepares(&mut self, service: ServiceName, Prepares { items, keys }: Prepares) {
        let message = Outgoing {
            exchange: self.names.prepare(),
            key: names::key(&self.worker, &service),
            message_type: Kind::Prepare.as_type(),
            body: items.into_body(),
            mandatory: true,
            reply_to: Some(self.reply_to()),
            ..Outgoing::default()
        };
        self.prepares.publish(message, Ticket::Prepares { keys, service });
    }

    fn write_commands(&mut self, to: &To, items: Items) {
        let To { service, destination, kind } = to;
        let (exchange, key, stays) = match destination {
            Destination::Instance(instance) => {
                (self.names.finish(), names::key(instance, service), false)
            }
            Destination::AllInstances => (self.names.finish(), names::key(ALL, service), false),
            Destination::AnyInstance => (self.names.finish_any(), names::key(ANY, service), true),
        };
        let message = Outgoing {
            exchange,
            key,
            message_type: kind.as_type(),
            body: items.into_body(),
            persistent: stays,
            mandatory: stays,
            reply_to: Some(self.reply_to()),
            ..Outgoing::default()
        };
        let lane = if stays { &mut self.prepares } else { &mut self.commands };
        lane.publish(message, Ticket::Expendable);
    }

    fn write_results(&mut self, key: &(Option<ReplyToken>, Outcome), results: Results) {
        let (reply, outcome) = key;
        let message = self.result_message(reply.as_ref(), *outcome, results.items.into_body());
        self.results.publish(message, Ticket::Results(results.answered));
    }

    fn result_message(
        &self,
        reply: Option<&ReplyToken>,
        outcome: Outcome,
        body: Vec<u8>,
    ) -> Outgoing {
        let reply = reply.map_or(NO_REPLY, ReplyToken::as_str);
        Outgoing {
            exchange: self.names.results(),
            key: names::key(reply, outcome),
            message_type: Kind::Result.as_type(),
            body,
            persistent: true,
            mandatory: true,
            ..Outgoing::default()
        }
    }

    fn write_decisions(&mut self) {
        let mut items = Items::new();
        let full = self.decisions.iter().position(|decision| items.push(decision).is_err());
        let rest = self.decisions.split_off(full.unwrap_or(self.decisions.len()));
        let batch = std::mem::replace(&mut self.decisions, rest);
        if batch.is_empty() {
            return;
        }
        let message = Outgoing {
            key: self.names.journal(),
            message_type: Kind::Decision.as_type(),
            body: items.into_body(),
            persistent: true,
            mandatory: true,
            ..Outgoing::default()
        };
        self.is_appending = true;
        self.append_after = None;
        self.journal.publish(message, Ticket::Append(batch));
    }

    fn reply_to(&self) -> ShortString {
        self.worker.as_str().into()
    }

    // ---- Confirms ----------------------------------------------------------------------------

    /// The next of what is on its way of which something is known.
    pub(super) async fn next(&mut self) -> (Ticket, Published) {
        tokio::select! {
            it = self.journal.next() => it,
            it = self.results.next() => it,
            it = self.prepares.next() => it,
            it = self.commands.next() => it,
        }
    }

    /// The same, if there is one now.
    pub(super) fn ready(&mut self) -> Option<(Ticket, Published)> {
        let lanes = [&mut self.journal, &mut self.results, &mut self.prepares, &mut self.commands];
        lanes.into_iter().find_map(Publisher::ready)
    }

    /// Whether all that is published on stands, as far as is known.
    pub(super) fn is_open(&self) -> bool {
        [&self.journal, &self.results, &self.prepares, &self.commands]
            .into_iter()
            .all(Publisher::is_open)
    }

    /// Waits until nothing is on its way.
    pub(super) async fn finish(&mut self) {
        for lane in [&mut self.journal, &mut self.results, &mut self.prepares, &mut self.commands] {
            lane.finish().await;
        }
    }

    /// When something is to be published again.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let again = self.again.iter().map(|(at, ..)| *at);
        again.chain(self.append_after.filter(|_| !self.decisions.is_empty())).min()
    }

    /// Whether nothing is on its way that must not be lost.
    pub(super) fn is_idle(&self) -> bool {
        self.again.is_empty()
            && self.decisions.is_empty()
            && self.answers.is_empty()
            && self.journal.outstanding() == 0
            && self.results.outstanding() == 0
    }

    /// What follows from the fate of a publish.
    pub(super) fn published(
        &mut self,
        ticket: Ticket,
        published: &Published,
        now: Instant,
        meanings: &mut Vec<Meaning>,
    ) {
        let is_safe = matches!(published, Published::Confirmed);
        let is_unroutable = matches!(published, Published::Unroutable);
        match ticket {
            Ticket::Expendable if is_safe => {}
            Ticket::Expendable => tracing::debug!(fate = ?published, "a command was not taken"),
            // Whether it arrived shows: the deadline runs.
            Ticket::Prepares { .. } if is_safe => {}
            Ticket::Prepares { keys, service } => {
                meanings.extend(keys.into_iter().map(|key| {
                    let service = service.clone();
                    Meaning::Event(match is_unroutable {
                        true => Event::PrepareUnroutable { key, service },
                        false => Event::PrepareRefused { key, service },
                    })
                }));
            }
            Ticket::Append(batch) => {
                self.is_appending = false;
                if !is_safe {
                    tracing::warn!(fate = ?published, "the journal did not take an append");
                    self.append_after = Some(now + PUBLISH_AGAIN_AFTER);
                    self.decisions.splice(..0, batch);
                }
            }
            Ticket::Results(answered) => {
                if is_unroutable {
                    self.unclaimed += answered.len() as u64;
                }
                meanings.extend(answered.into_iter().map(|(key, delivery)| {
                    Meaning::Event(if is_safe || is_unroutable {
                        Event::ResultConfirmed { key, delivery }
                    } else {
                        Event::ResultFailed { key, delivery }
                    })
                }));
            }
            Ticket::Durable(message, then) => {
                // A result that nobody takes is no failure; a missing queue of ours is.
                if is_safe || (is_unroutable && message.exchange == self.names.results()) {
                    return self.follow(then, meanings);
                }
                tracing::error!(
                    queue = %message.key, fate = ?published,
                    "what must not be lost was not taken, and will be published again"
                );
                self.again.push((now + PUBLISH_AGAIN_AFTER, message, then));
            }
        }
    }

    fn follow(&mut self, then: Then, meanings: &mut Vec<Meaning>) {
        match then {
            Then::Tell(event) => meanings.push(Meaning::Event(event)),
            Then::Ack(held) => meanings.push(Meaning::Ack(held)),
            Then::Publish(message, then) => self.durable(message, *then),
            Then::Nothing => {}
        }
    }
}

/// The body of one item, which always fits.
fn body_of<T: Item>(item: &T) -> Vec<u8> {
    let mut items = Items::new();
    let fits: Result<(), Full> = items.push(item);
    debug_assert!(fits.is_ok(), "one item fits");
    items.into_body()
}
