//! Reading the journal from its stream.
//!
//! A reader that has nothing yet attaches at a moment before its window begins, and finds out from
//! when on it misses nothing; one that was cut off goes on from the offset it had reached, after
//! making sure that it is still the same stream. A *marker*, a message of no decisions, shows where
//! the end was: a stream doesn't say by itself that there is no more.
//!
//! **Invariant:** `since` is never said to be earlier than what the stream itself vouches for: the
//! moment at which it was attached to, if something lies before that; or what its first record
//! says.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::try_join;
use lapin::{
    message::Delivery,
    types::{AMQPValue, FieldTable, ShortString},
};
use tokio::{sync::mpsc, time::timeout};

use crate::{
    clock::Clock,
    error::ErrorChain,
    protocol::{message::Decision, time::Time},
    transport::amqp::{
        bounded::{ANSWER_MAX, AskError, STREAM_MAX, answer},
        connection::{Backoff, BrokerConnection, PublishChannel},
        consumer::{ConsumerError, QueueConsumer},
        publisher::{CONFIRM_MAX, OutgoingMessage, PublishOutcome, publish_within},
        stream::{Scan, ScanError, StreamStart},
        unique,
    },
    wire::message::{JournalBegun, Kind, PackedMessage, decode},
    worker::{clocks::Standing, suspects::Try},
};

/// How many messages are on their way to a reader.
const PREFETCH: u16 = 1000;

/// Among how many messages a journal's word about its beginning is looked for.
const BEGINNING_MAX: u16 = 100;

/// How long a marker may be unconfirmed before it is published again.
const MARKED_MAX: Duration = Duration::from_secs(1);

/// How long a stream may show nothing though something is known to be there.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// One message of the journal.
#[derive(Debug)]
pub(super) struct Record {
    /// Its place.
    pub(super) offset: u64,
    /// What it decides; nothing, if it is a marker.
    pub(super) decisions: Vec<Arc<Decision>>,
    /// Whether it is the first of its journal, and what it says.
    pub(super) begun: Option<JournalBegun>,
    /// What a worker has written down about a request that workers may die of.
    pub(super) tried: Option<Try>,
    /// What tells a marker from others.
    pub(super) message_id: Option<ShortString>,
    /// What tells it from another message at the same place of another stream.
    pub(super) digest: u64,
    /// Its body, if it is a message of decisions.
    pub(super) body: Option<Arc<str>>,
}

/// The journal can't be read now.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("failed to consume the journal")]
    Consume(#[source] AskError),
    #[error("failed to write to the journal")]
    Mark(#[source] AskError),
    #[error(
        "the journal has taken nothing for {} s: too few of its replicas are up \
         (`rabbitmq-streams stream_status {queue}` shows them; where all nodes are up and that lasts, \
         `rabbitmq-streams restart_stream {queue}` starts them)",
        CONFIRM_MAX.as_secs()
    )]
    Unwritable { queue: ShortString },
    #[error("failed to continue reading the journal")]
    Closed(#[source] ConsumerError),
    #[error("there is no queue `{0}`")]
    Missing(ShortString),
    #[error("the broker refuses a marker for the journal")]
    MarkerRefused,
    #[error(
        "the broker has delivered nothing of the journal for {} s, though something is in it",
        SILENCE_MAX.as_secs()
    )]
    Silent,
    #[error("nobody waits for what is read")]
    Unwanted,
    #[error("the journal is no stream: its messages have no offset")]
    NoStream,
    #[error("failed to look for what was written last")]
    Compare(#[source] ScanError),
}

impl ReadError {
    /// What the broker said, if it said why.
    pub(super) fn broker(&self) -> Option<&lapin::Error> {
        match self {
            Self::Consume(source) | Self::Mark(source) => source.broker(),
            Self::Closed(closed) => closed.broker(),
            Self::Missing(_)
            | Self::Unwritable { .. }
            | Self::MarkerRefused
            | Self::Silent
            | Self::Unwanted
            | Self::NoStream
            | Self::Compare(_) => None,
        }
    }
}

/// A stream that is read from now on.
#[derive(Debug)]
pub(super) struct Tail {
    inbox: QueueConsumer,
}

/// Where a look further back begins and ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct LookBack {
    pub(super) from: Time,
    pub(super) until: u64,
    pub(super) clock_margin: Duration,
}

/// What a look further back finds.
#[derive(Debug)]
pub(super) enum LookBackEvent {
    Decisions(Vec<Arc<Decision>>),
    Ended { reaches: Option<Time> },
}

/// A stream, and the connection to read it on.
#[derive(Clone, Debug)]
pub(super) struct Journal {
    pub(super) queue: ShortString,
    pub(super) consuming: Arc<BrokerConnection>,
    pub(super) publishing: Arc<BrokerConnection>,
    /// How long the broker has to begin a consumer.
    pub(super) begin_max: Duration,
}

impl Tail {
    pub(super) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Delivery, ConsumerError>> {
        self.inbox.poll_next(cx)
    }

    /// What a delivery says. It needs no other acknowledgement.
    pub(super) fn read(&mut self, delivery: &Delivery) -> Result<Record, ReadError> {
        self.inbox.ack(delivery.delivery_tag);
        Record::of(delivery)
    }

    pub(super) fn flush(&mut self) {
        self.inbox.flush();
    }

    /// The next message.
    pub(super) async fn record(&mut self) -> Result<Record, ReadError> {
        let delivery = match self.inbox.try_next() {
            Some(delivery) => delivery,
            None => timeout(SILENCE_MAX, self.inbox.next()).await.map_err(|_| ReadError::Silent)?,
        };
        let record = self.read(&delivery.map_err(ReadError::Closed)?);
        self.inbox.flush();
        record
    }

    pub(super) async fn close(self) {
        self.inbox.close().await;
    }
}

impl Record {
    pub(super) fn of(delivery: &Delivery) -> Result<Self, ReadError> {
        let properties = &delivery.properties;
        let offset = properties.headers().as_ref().and_then(|headers| {
            match headers.inner().get("x-stream-offset") {
                Some(AMQPValue::LongLongInt(offset)) => u64::try_from(*offset).ok(),
                Some(_) | None => None,
            }
        });
        let offset = offset.ok_or(ReadError::NoStream)?;
        let kind = properties.kind().as_ref().and_then(|text| Kind::parse_type(text.as_str()));
        let mut record = Self {
            offset,
            decisions: Vec::new(),
            begun: None,
            tried: None,
            message_id: properties.message_id().clone(),
            digest: digest(&delivery.data, id_text(properties.message_id())),
            body: None,
        };
        if kind == Some(Kind::Decision) {
            record.decisions = items::<Decision>(offset, &delivery.data).map(Arc::new).collect();
            record.tried = properties.headers().as_ref().and_then(Try::of);
            record.body = std::str::from_utf8(&delivery.data).ok().map(Arc::from);
        } else if kind == Some(Kind::JournalBegun) {
            record.begun = items::<JournalBegun>(offset, &delivery.data).next();
        } else {
            unreadable(offset, &"its type is not that of a decision");
        }
        Ok(record)
    }

    /// What the message says of which `copied` is a copy: as if it was read in the journal.
    pub(super) fn copied(copied: PackedMessage) -> Self {
        let PackedMessage { offset, message_id, tried, body } = copied;
        let message_id = message_id.and_then(|id| ShortString::try_new(&*id).ok());
        Self {
            offset,
            decisions: items::<Decision>(offset, body.as_bytes()).map(Arc::new).collect(),
            begun: None,
            tried: tried.map(|(key, begins)| Try { key, begins }),
            digest: digest(body.as_bytes(), id_text(&message_id)),
            message_id,
            body: Some(body),
        }
    }

    pub(super) fn is_marker(&self, marker: &ShortString) -> bool {
        self.message_id.as_ref() == Some(marker)
    }
}

/// What can be read of a message. What can't is skipped by every reader alike, so that none acts on
/// what another doesn't see.
fn items<T: crate::wire::message::Item>(offset: u64, body: &[u8]) -> impl Iterator<Item = T> {
    let items = decode::<T>(body).unwrap_or_else(|error| {
        unreadable(offset, &error);
        Vec::new()
    });
    items.into_iter().filter_map(move |item| match item {
        Ok(item) => Some(item),
        Err(error) => {
            unreadable(offset, &error);
            None
        }
    })
}

fn unreadable(offset: u64, why: &dyn std::fmt::Display) {
    tracing::error!(offset, reason = %why, "a message in the journal can't be read and is skipped");
}

fn id_text(message_id: &Option<ShortString>) -> Option<&str> {
    message_id.as_ref().map(ShortString::as_str)
}

/// The id counts: all markers have the same body.
pub(super) fn digest(body: &[u8], message_id: Option<&str>) -> u64 {
    let message_id = message_id.unwrap_or_default().bytes();
    crate::protocol::ids::fnv1a(message_id.chain(body.iter().copied()))
}

impl Journal {
    async fn open(&self, from: AMQPValue, prefetch: u16) -> Result<Tail, ReadError> {
        let mut arguments = FieldTable::default();
        arguments.insert("x-stream-offset".into(), from);
        let (limit, queue) = (self.begin_max, self.queue.clone());
        let opening =
            QueueConsumer::open_within(limit, &self.consuming, queue, prefetch, arguments);
        // Each acknowledgement lets the broker send as many more as it speaks of. Told of every few,
        // as they are read, it would go through the stream a few at a time.
        Ok(Tail { inbox: opening.await.map_err(ReadError::Consume)?.with_lazy_acks() })
    }

    /// Goes on after the message at `offset`, if that is still the one with this `digest`.
    pub(super) async fn resume(&self, offset: u64, digest: u64) -> Result<Option<Tail>, ReadError> {
        let Some(mut tail) = self.open_between(offset, offset).await? else { return Ok(None) };
        let first = tail.record().await?;
        if first.offset == offset && first.digest == digest {
            return Ok(Some(tail));
        }
        tail.close().await;
        Ok(None)
    }

    /// Opens the stream at the offset `first`, if there is a message at `last` or behind it.
    pub(super) async fn open_between(
        &self,
        first: u64,
        last: u64,
    ) -> Result<Option<Tail>, ReadError> {
        let marker = self.mark().await?;
        let Ok(at) = i64::try_from(first) else { return Ok(None) };
        // At once: a broker that misses a node takes its time for each.
        let opening = self.open(AMQPValue::LongLongInt(at), PREFETCH);
        let (reaches, tail) = try_join(self.reaches(last, &marker), opening).await?;
        if reaches {
            return Ok(Some(tail));
        }
        tail.close().await;
        Ok(None)
    }

    /// About where the end is.
    pub(super) async fn end(&self) -> Result<u64, ReadError> {
        let mut end = self.open(AMQPValue::LongString("last".into()), 1).await?;
        let record = end.record().await?;
        end.close().await;
        Ok(record.offset)
    }

    /// Whether there is a message at `offset`, or behind it: whoever asks for one that is not there
    /// yet hears nothing. `marker` was written before.
    async fn reaches(&self, offset: u64, marker: &ShortString) -> Result<bool, ReadError> {
        let mut end = self.open(AMQPValue::LongString("last".into()), PREFETCH).await?;
        let mut record = end.record().await?;
        // What is last was written together, and may begin before the marker.
        while record.offset < offset && !record.is_marker(marker) {
            record = end.record().await?;
        }
        end.close().await;
        Ok(record.offset >= offset)
    }

    /// Reads from `look.from` up to the message before `look.until`, and tells `found`; until that
    /// succeeds, or nobody listens.
    pub(super) async fn look_back(self, look: LookBack, found: mpsc::Sender<LookBackEvent>) {
        let mut backoff = Backoff::default();
        while let Err(error) = self.try_look_back(look, &found).await {
            if found.is_closed() {
                return;
            }
            tracing::warn!(error = %ErrorChain(&error), "failed to look further back in the journal");
            tokio::time::sleep(backoff.pause()).await;
        }
    }

    async fn try_look_back(
        &self,
        look: LookBack,
        found: &mpsc::Sender<LookBackEvent>,
    ) -> Result<(), ReadError> {
        // At least one message is there to be read, then.
        let marker = self.mark().await?;
        let (mut tail, mut record, reaches) =
            self.open_at(look.from, look.clock_margin, &marker).await?;
        while record.offset < look.until {
            let is_last = record.offset + 1 >= look.until;
            if !record.decisions.is_empty() {
                let decisions = LookBackEvent::Decisions(record.decisions);
                found.send(decisions).await.map_err(|_| ReadError::Unwanted)?;
            }
            if is_last {
                break;
            }
            record = tail.record().await?;
        }
        tail.close().await;
        found.send(LookBackEvent::Ended { reaches }).await.map_err(|_| ReadError::Unwanted)
    }

    /// Opens the stream where every record made at `from` or later lies behind: its first message,
    /// and from when on nothing is missing, if anything can be vouched for. `marker` was written
    /// before.
    pub(super) async fn open_at(
        &self,
        from: Time,
        clock_margin: Duration,
        marker: &ShortString,
    ) -> Result<(Tail, Record, Option<Time>), ReadError> {
        // The broker's clock says when a record arrived, which by that of its worker may be as much
        // as the margin earlier than it was made.
        let seconds = (from - clock_margin).as_millis() / 1000;
        // At once: a broker that misses a node takes its time for each.
        let opening = self.open(AMQPValue::Timestamp(seconds), PREFETCH);
        let ((head, begun), mut tail) = try_join(self.beginning(marker), opening).await?;
        let first = tail.record().await?;
        // Where something older is still there, nothing younger is gone.
        let is_after_others = first.offset > head;
        let reaches = is_after_others.then_some(from).or_else(|| begun.map(|it| it.complete_since));
        Ok((tail, first, reaches))
    }

    /// The first offset that is there, and what the journal says of its own beginning. That is its
    /// first message, unless somebody wrote to it before `dtc topology apply` did.
    async fn beginning(
        &self,
        marker: &ShortString,
    ) -> Result<(u64, Option<JournalBegun>), ReadError> {
        let mut head = self.open(AMQPValue::LongString("first".into()), BEGINNING_MAX).await?;
        let mut record = head.record().await?;
        let first = record.offset;
        for _ in 1..BEGINNING_MAX {
            if first > 0 || record.begun.is_some() || record.is_marker(marker) {
                break;
            }
            record = head.record().await?;
        }
        head.close().await;
        Ok((first, record.begun))
    }

    /// How `clock` stands to that of the broker, which stamps what is written: by whether what was
    /// written just now lies behind a moment.
    pub(super) async fn compare(
        &self,
        clock: Clock,
        clock_margin: Duration,
    ) -> Result<Standing, ReadError> {
        let before = clock.now();
        self.mark().await?;
        let after = clock.now();
        let mut tail = self.open(AMQPValue::LongString("last".into()), PREFETCH).await?;
        let end = tail.record().await?.offset;
        tail.close().await;
        if self.has_after((after + clock_margin).as_millis() / 1000 + 1, end).await? {
            return Ok(Standing::Behind);
        }
        match self.has_after((before - clock_margin).as_millis() / 1000, end).await? {
            true => Ok(Standing::Fits),
            false => Ok(Standing::Ahead),
        }
    }

    /// Whether anything up to the offset `end` was written at that second or later, by the broker's
    /// clock. Whoever asks for a moment that is still to come is given what is written next.
    async fn has_after(&self, second: u64, end: u64) -> Result<bool, ReadError> {
        let opening =
            Scan::open(&self.consuming, self.queue.clone(), StreamStart::Timestamp(second));
        let mut scan = opening.await.map_err(ReadError::Compare)?;
        let first = scan.next().await.map_err(ReadError::Compare)?;
        scan.close().await;
        Ok(first.is_some_and(|(offset, _)| offset <= end))
    }

    /// Gives the broker longer from now on, if that is what it lacked.
    pub(super) fn be_patient(&mut self, error: &ReadError) {
        if matches!(error, ReadError::Consume(AskError::Silent { .. })) {
            self.begin_max = STREAM_MAX;
        }
    }

    /// Writes a marker, and waits until it is there.
    pub(super) async fn mark(&self) -> Result<ShortString, ReadError> {
        let marker = ShortString::from(unique::name('m'));
        let message = self.message(b"[]".into(), Some(marker.clone()));
        match self.publish_marker(&message).await? {
            PublishOutcome::Confirmed => Ok(marker),
            PublishOutcome::Unroutable => Err(ReadError::Missing(self.queue.clone())),
            PublishOutcome::Refused => Err(ReadError::MarkerRefused),
            PublishOutcome::Unconfirmed(_) if self.publishing.status().blocked() => {
                let reason = "it has run low on memory or disk".to_owned();
                Err(ReadError::Mark(AskError::Blocked { reason }))
            }
            PublishOutcome::Unconfirmed(_) => {
                Err(ReadError::Unwritable { queue: self.queue.clone() })
            }
            PublishOutcome::Lost(error) => Err(ReadError::Mark(AskError::Broker(error))),
        }
    }

    /// Publishes a marker, by one channel after the other: it may be lost while the stream's writer
    /// moves, which is when the journal is read anew.
    async fn publish_marker(&self, message: &OutgoingMessage) -> Result<PublishOutcome, ReadError> {
        let mut left = CONFIRM_MAX;
        loop {
            let channel = PublishChannel::open(&self.publishing).await.map_err(ReadError::Mark)?;
            let published = publish_within(channel.clone(), message.clone(), MARKED_MAX).await;
            tokio::spawn(
                async move { answer(ANSWER_MAX, channel.close(200, "done".into())).await },
            );
            left = left.saturating_sub(MARKED_MAX);
            if !matches!(published, PublishOutcome::Unconfirmed(_)) {
                return Ok(published);
            }
            if left.is_zero() || self.publishing.status().blocked() {
                return Ok(PublishOutcome::Unconfirmed(CONFIRM_MAX));
            }
        }
    }

    /// A message of decisions.
    pub(super) fn message(
        &self,
        body: Vec<u8>,
        message_id: Option<ShortString>,
    ) -> OutgoingMessage {
        OutgoingMessage {
            key: self.queue.clone(),
            message_type: Kind::Decision.as_type(),
            body,
            persistent: true,
            mandatory: true,
            message_id,
            ..OutgoingMessage::default()
        }
    }
}
