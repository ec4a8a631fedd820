//! Reading the journal from its stream.
//!
//! A new reader attaches at a moment before its window begins, and finds out since when it misses no
//! record. A reader that was interrupted continues from the offset that it had reached, after it has
//! made sure that the stream is still the same. A *marker*, a message without decisions, shows where the
//! end was: a stream doesn't tell its readers that they have reached the end.
//!
//! **Invariant:** `since` is never earlier than what the stream proves: the moment at which the reader
//! attached, if the stream has older messages; or else the moment that the journal's first record names.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::try_join;
use lapin::{
    message::Delivery,
    types::{AMQPValue, ShortString},
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
        stream::{self, Scan, ScanError, StreamStart},
        unique,
    },
    wire::message::{JournalBegun, Kind, PackedMessage, decode},
    worker::{clocks::ClockComparison, suspects::Try},
};

/// How many unacknowledged messages the broker delivers.
const PREFETCH: u16 = 1000;

/// How many messages to search for the record that tells of the journal's beginning.
const BEGINNING_MAX: u16 = 100;

/// How long to wait for a marker's confirm before the marker is published again.
const MARKED_MAX: Duration = Duration::from_secs(1);

/// How long to wait for a message that is known to be in the stream.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// One message of the journal.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) offset: u64,
    /// Empty in a marker.
    pub(super) decisions: Vec<Arc<Decision>>,
    /// The content of a journal's first record.
    pub(super) begun: Option<JournalBegun>,
    /// A worker's note about a request that may be what workers crash on.
    pub(super) tried: Option<Try>,
    /// Identifies a marker, and an append.
    pub(super) message_id: Option<ShortString>,
    /// Distinguishes it from another message at the same offset of another stream.
    pub(super) digest: u64,
    /// The body, if this is a message of decisions.
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
    #[error("the search for older records was cancelled")]
    Unwanted,
    #[error("the journal is not a stream: its messages have no offset")]
    NoStream,
    #[error("failed to read the journal's last message")]
    Compare(#[source] ScanError),
}

impl ReadError {
    /// The broker's reason, if it gave one.
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

/// A consumer of the journal.
#[derive(Debug)]
pub(super) struct Tail {
    inbox: QueueConsumer,
}

/// Which older part of the journal to read.
#[derive(Clone, Copy, Debug)]
pub(super) struct HistoryRange {
    pub(super) from: Time,
    pub(super) until: u64,
    pub(super) clock_margin: Duration,
}

/// What is read of an older part of the journal.
#[derive(Debug)]
pub(super) enum HistoryItem {
    Decisions(Vec<Arc<Decision>>),
    Ended { reaches: Option<Time> },
}

/// The journal's stream, and the connections to read and to write it on.
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

    /// Decodes a delivery, and acknowledges it.
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
        let offset = stream::offset_of(delivery).ok_or(ReadError::NoStream)?;
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

    /// The record that `copied` is a copy of, as if it was read in the journal.
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

/// The items that can be read. All readers skip the others, so that none acts on what another one
/// doesn't see.
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
    tracing::error!(offset, reason = %why, "skipping a message of the journal that can't be read");
}

fn id_text(message_id: &Option<ShortString>) -> Option<&str> {
    message_id.as_ref().map(ShortString::as_str)
}

/// Includes the id, since all markers have the same body.
pub(super) fn digest(body: &[u8], message_id: Option<&str>) -> u64 {
    let message_id = message_id.unwrap_or_default().bytes();
    crate::protocol::ids::fnv1a(message_id.chain(body.iter().copied()))
}

impl Journal {
    async fn open(&self, from: AMQPValue, prefetch: u16) -> Result<Tail, ReadError> {
        let (limit, queue) = (self.begin_max, self.queue.clone());
        let from = stream::reading_from(from);
        let opening = QueueConsumer::open_within(limit, &self.consuming, queue, prefetch, from);
        // An acknowledgement lets the broker send as many more messages as it acknowledges. If a few
        // were acknowledged at a time, the broker would read the stream a few messages at a time.
        Ok(Tail { inbox: opening.await.map_err(ReadError::Consume)?.with_lazy_acks() })
    }

    /// Continues after the message at `offset`, if that message still has this `digest`.
    pub(super) async fn resume(&self, offset: u64, digest: u64) -> Result<Option<Tail>, ReadError> {
        let Some(mut tail) = self.open_between(offset, offset).await? else { return Ok(None) };
        let first = tail.record().await?;
        if first.offset == offset && first.digest == digest {
            return Ok(Some(tail));
        }
        tail.close().await;
        Ok(None)
    }

    /// Opens the stream at the offset `first`, if there is a message at `last` or after it.
    pub(super) async fn open_between(
        &self,
        first: u64,
        last: u64,
    ) -> Result<Option<Tail>, ReadError> {
        let marker = self.mark().await?;
        let Ok(at) = i64::try_from(first) else { return Ok(None) };
        // In parallel: a broker that misses a node is slow to answer each of them.
        let opening = self.open(AMQPValue::LongLongInt(at), PREFETCH);
        let (reaches, tail) = try_join(self.reaches(last, &marker), opening).await?;
        if reaches {
            return Ok(Some(tail));
        }
        tail.close().await;
        Ok(None)
    }

    /// An offset near the end.
    pub(super) async fn end(&self) -> Result<u64, ReadError> {
        let mut end = self.open(AMQPValue::LongString("last".into()), 1).await?;
        let record = end.record().await?;
        end.close().await;
        Ok(record.offset)
    }

    /// Whether there is a message at `offset` or after it. The broker doesn't say so: a consumer that
    /// asks for an offset beyond the end gets nothing. `marker` is in the journal already.
    async fn reaches(&self, offset: u64, marker: &ShortString) -> Result<bool, ReadError> {
        let mut end = self.open(AMQPValue::LongString("last".into()), PREFETCH).await?;
        let mut record = end.record().await?;
        // The last chunk of the stream may begin before the marker.
        while record.offset < offset && !record.is_marker(marker) {
            record = end.record().await?;
        }
        end.close().await;
        Ok(record.offset >= offset)
    }

    /// Reads from `range.from` up to the message before `range.until`, and sends the records to `found`.
    /// Tries again until that succeeds, or the receiver is dropped.
    pub(super) async fn read_history(self, range: HistoryRange, found: mpsc::Sender<HistoryItem>) {
        let mut backoff = Backoff::default();
        while let Err(error) = self.try_read_history(range, &found).await {
            if found.is_closed() {
                return;
            }
            tracing::warn!(
                error = %ErrorChain(&error),
                "failed to read an older part of the journal; trying again"
            );
            tokio::time::sleep(backoff.pause()).await;
        }
    }

    async fn try_read_history(
        &self,
        range: HistoryRange,
        found: &mpsc::Sender<HistoryItem>,
    ) -> Result<(), ReadError> {
        // So the journal has at least one message to read.
        let marker = self.mark().await?;
        let (mut tail, mut record, reaches) =
            self.open_at(range.from, range.clock_margin, &marker).await?;
        while record.offset < range.until {
            let is_last = record.offset + 1 >= range.until;
            if !record.decisions.is_empty() {
                let decisions = HistoryItem::Decisions(record.decisions);
                found.send(decisions).await.map_err(|_| ReadError::Unwanted)?;
            }
            if is_last {
                break;
            }
            record = tail.record().await?;
        }
        tail.close().await;
        found.send(HistoryItem::Ended { reaches }).await.map_err(|_| ReadError::Unwanted)
    }

    /// Opens the stream before every record that was made at `from` or later. Returns the first message
    /// there, and the moment since which no record is missing, if the stream proves one. `marker` is in
    /// the journal already.
    pub(super) async fn open_at(
        &self,
        from: Time,
        clock_margin: Duration,
        marker: &ShortString,
    ) -> Result<(Tail, Record, Option<Time>), ReadError> {
        // The broker stamps a record when it arrives. By the broker's clock that may be earlier, by up
        // to the margin, than the moment at which the record was made by its worker's clock.
        let seconds = (from - clock_margin).as_millis() / 1000;
        // In parallel: a broker that misses a node is slow to answer each of them.
        let opening = self.open(AMQPValue::Timestamp(seconds), PREFETCH);
        let ((head, begun), mut tail) = try_join(self.beginning(marker), opening).await?;
        let first = tail.record().await?;
        // If an older message is still there, no younger one has expired.
        let is_after_others = first.offset > head;
        let reaches = is_after_others.then_some(from).or_else(|| begun.map(|it| it.complete_since));
        Ok((tail, first, reaches))
    }

    /// The first offset, and the record that tells of the journal's beginning. That is the first
    /// message, unless somebody wrote to the journal before `dtc topology apply` did.
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

    /// Compares `clock` with the broker's clock, which stamps each message: writes a message, and asks
    /// the broker whether it lies after a given moment.
    pub(super) async fn compare(
        &self,
        clock: Clock,
        clock_margin: Duration,
    ) -> Result<ClockComparison, ReadError> {
        let before = clock.now();
        self.mark().await?;
        let after = clock.now();
        let mut tail = self.open(AMQPValue::LongString("last".into()), PREFETCH).await?;
        let end = tail.record().await?.offset;
        tail.close().await;
        if self.has_after((after + clock_margin).as_millis() / 1000 + 1, end).await? {
            return Ok(ClockComparison::Behind);
        }
        match self.has_after((before - clock_margin).as_millis() / 1000, end).await? {
            true => Ok(ClockComparison::Fits),
            false => Ok(ClockComparison::Ahead),
        }
    }

    /// Whether a message up to the offset `end` was written at that second or later, by the broker's
    /// clock. A consumer that asks for a moment in the future gets the next message that is written.
    async fn has_after(&self, second: u64, end: u64) -> Result<bool, ReadError> {
        let opening =
            Scan::open(&self.consuming, self.queue.clone(), StreamStart::Timestamp(second));
        let mut scan = opening.await.map_err(ReadError::Compare)?;
        let first = scan.next().await.map_err(ReadError::Compare)?;
        scan.close().await;
        Ok(first.is_some_and(|(offset, _)| offset <= end))
    }

    /// Gives the broker more time from now on, if it did not answer in time.
    pub(super) fn be_patient(&mut self, error: &ReadError) {
        if matches!(error, ReadError::Consume(AskError::Silent { .. })) {
            self.begin_max = STREAM_MAX;
        }
    }

    /// Writes a marker, and waits for its confirm.
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

    /// Publishes a marker, and again on another channel if it is not confirmed: it may be lost while the
    /// stream's writer moves to another node, and just then workers read the journal again.
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
