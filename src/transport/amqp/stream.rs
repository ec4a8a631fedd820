//! Reading a stream to its present end, without waiting for more.
//!
//! A stream has no end: a consumer waits for the next message. So a second consumer on the same
//! channel first finds the last message, and then everything up to it is read. The second consumer
//! also detects streams without any readable message.
//!
//! Reading removes nothing.

use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use lapin::{
    Channel, Connection, Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions,
        QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
};

use crate::transport::amqp::bounded::{ANSWER_MAX, AskError, STREAM_MAX, answer, close_channel};

/// The argument of a consumer, and the header of a message, that name a place in a stream.
const OFFSET: &str = "x-stream-offset";

/// How many messages may be unacknowledged, and how many are acknowledged at once.
const PREFETCH: u16 = 1000;
const ACK_EVERY: u64 = 250;

/// How long to wait for a message of a stream that the broker counts as empty. The broker's counts
/// lag by some seconds; a message arrives within milliseconds.
const EMPTY_AFTER: Duration = Duration::from_secs(1);

/// How long the first message after the starting time may take, if there is one: it arrives within
/// milliseconds, except from a busy broker.
const FIRST_AFTER: Duration = Duration::from_millis(500);

/// How long the next message of any other stream may take.
const MESSAGE_MAX: Duration = Duration::from_secs(10);

/// Where to start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StreamStart {
    /// At the oldest message.
    First,
    /// At the chunk of messages written at this time, in seconds since the Unix epoch, or at the
    /// next chunk.
    Timestamp(u64),
}

/// A stream can't be read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ScanError {
    /// The broker refuses, or the connection is gone.
    #[error("failed to read the stream `{stream}`")]
    Broker {
        /// The stream.
        stream: String,
        /// The cause.
        #[source]
        source: AskError,
    },
    /// The broker has ended the consumer: the stream or its leader is gone.
    #[error("the broker has cancelled the consumer of the stream `{stream}`")]
    Cancelled {
        /// The stream.
        stream: String,
    },
    /// No message arrives, though there are more.
    #[error("no message of the stream `{stream}` arrived within {} s", MESSAGE_MAX.as_secs())]
    Silent {
        /// The stream.
        stream: String,
    },
}

/// The reader of one stream.
#[derive(Debug)]
pub struct Scan {
    stream: ShortString,
    channel: Channel,
    consumer: Consumer,
    /// The offset of the last message; `None`: there is nothing more to read.
    last: Option<u64>,
    /// The first message, if it arrived before it was requested.
    first_delivery: Option<Delivery>,
    unacknowledged: u64,
}

impl ScanError {
    /// Whether it may succeed soon without any change.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Broker { source, .. } => source.may_pass(),
            Self::Cancelled { .. } | Self::Silent { .. } => true,
        }
    }
}

impl Scan {
    /// Finds the end of `stream`, and starts to read at `start`.
    pub async fn open(
        connection: &Connection,
        stream: ShortString,
        start: StreamStart,
    ) -> Result<Self, ScanError> {
        let failed = |source| ScanError::Broker { stream: stream.to_string(), source };
        let channel = answer(ANSWER_MAX, connection.create_channel()).await.map_err(failed)?;
        let first_max = match count(&channel, &stream).await.map_err(failed)? {
            0 => EMPTY_AFTER,
            _ => MESSAGE_MAX,
        };
        let limiting = channel.basic_qos(PREFETCH, BasicQosOptions::default());
        answer(ANSWER_MAX, limiting).await.map_err(failed)?;
        let start_offset = match start {
            StreamStart::First => AMQPValue::LongString("first".into()),
            StreamStart::Timestamp(seconds) => AMQPValue::Timestamp(seconds),
        };
        let consumer = consume(&channel, &stream, start_offset).await.map_err(failed)?;
        let end = AMQPValue::LongString("last".into());
        let mut tail = consume(&channel, &stream, end).await.map_err(failed)?;
        let (last, first_delivery, unacknowledged) = (None, None, 0);
        let mut scan = Self { stream, channel, consumer, last, first_delivery, unacknowledged };
        let first = match tokio::time::timeout(first_max, tail.next()).await {
            Ok(first) => Some(first),
            Err(_) if first_max == EMPTY_AFTER => {
                // Perhaps this process did not run meanwhile.
                scan.fence().await?;
                tail.next().now_or_never()
            }
            Err(_) => return Err(scan.silence_error()),
        };
        let Some(first) = first else {
            scan.cancel(&tail).await?;
            return Ok(scan);
        };
        scan.last = offset_of(&scan.delivered(first)?);
        scan.find_last(&mut tail).await?;
        if start != StreamStart::First {
            scan.find_first().await?;
        }
        Ok(scan)
    }

    /// The broker sends everything that it has for the consumers of a channel before it handles
    /// another request on that channel. So after the answer to a further request, everything that
    /// exists has arrived.
    async fn find_last(&mut self, tail: &mut Consumer) -> Result<(), ScanError> {
        loop {
            self.fence().await?;
            let mut n_more = 0_u16;
            let mut tag = 0;
            while let Some(next) = tail.next().now_or_never() {
                let delivery = self.delivered(next)?;
                self.last = self.last.max(offset_of(&delivery));
                tag = delivery.delivery_tag;
                n_more = n_more.saturating_add(1);
            }
            // The prefetch is used up: there may be more.
            if n_more < PREFETCH - 1 {
                break;
            }
            let only_this = BasicAckOptions { multiple: false };
            let acknowledging = self.channel.basic_ack(tag, only_this);
            answer(ANSWER_MAX, acknowledging).await.map_err(|error| self.broker_error(error))?;
        }
        self.cancel(tail).await
    }

    /// lapin cancels a consumer that is dropped while it is active, but with a delay. If that comes
    /// after its channel was closed, the broker closes the whole connection.
    async fn cancel(&self, tail: &Consumer) -> Result<(), ScanError> {
        let cancelling = self.channel.basic_cancel(tail.tag(), BasicCancelOptions::default());
        let cancelled = answer(ANSWER_MAX, cancelling).await;
        cancelled.map_err(|error| self.broker_error(error))
    }

    /// Whether there is any message from the start on. The stream's own process sends the first
    /// chunk to the channel, so it may arrive after the answer to a further request.
    async fn find_first(&mut self) -> Result<(), ScanError> {
        match tokio::time::timeout(FIRST_AFTER, self.consumer.next()).await {
            Ok(next) => self.first_delivery = Some(self.delivered(next)?),
            Err(_) => self.last = None,
        }
        Ok(())
    }

    async fn fence(&self) -> Result<(), ScanError> {
        let answered = count(&self.channel, &self.stream).await;
        answered.map(drop).map_err(|error| self.broker_error(error))
    }

    /// The next message with its offset; `None`: there are no more.
    pub async fn next(&mut self) -> Result<Option<(u64, Delivery)>, ScanError> {
        let Some(last) = self.last else { return Ok(None) };
        let delivery = match self.first_delivery.take() {
            Some(first) => first,
            None => {
                let next = tokio::time::timeout(MESSAGE_MAX, self.consumer.next()).await;
                self.delivered(next.map_err(|_| self.silence_error())?)?
            }
        };
        // A message without an offset is not from a stream.
        let offset = offset_of(&delivery).unwrap_or(u64::MAX);
        if offset >= last {
            self.last = None;
        }
        if offset > last {
            return Ok(None);
        }
        self.acknowledge(delivery.delivery_tag).await?;
        Ok(Some((offset, delivery)))
    }

    /// The broker sends more only after it has received acknowledgements.
    async fn acknowledge(&mut self, tag: u64) -> Result<(), ScanError> {
        self.unacknowledged += 1;
        if self.unacknowledged < ACK_EVERY {
            return Ok(());
        }
        self.unacknowledged = 0;
        let up_to_this = BasicAckOptions { multiple: true };
        let acknowledged = answer(ANSWER_MAX, self.channel.basic_ack(tag, up_to_this)).await;
        acknowledged.map_err(|error| self.broker_error(error))
    }

    /// Stops reading.
    pub async fn close(self) {
        close_channel(&self.channel).await;
    }

    fn delivered(
        &self,
        next: Option<Result<Delivery, lapin::Error>>,
    ) -> Result<Delivery, ScanError> {
        match next {
            Some(delivery) => delivery.map_err(|error| self.broker_error(error.into())),
            None => Err(ScanError::Cancelled { stream: self.stream.to_string() }),
        }
    }

    fn broker_error(&self, source: AskError) -> ScanError {
        ScanError::Broker { stream: self.stream.to_string(), source }
    }

    fn silence_error(&self) -> ScanError {
        ScanError::Silent { stream: self.stream.to_string() }
    }
}

/// How many messages the broker counts in the stream.
async fn count(channel: &Channel, stream: &ShortString) -> Result<u32, AskError> {
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let asked = channel.queue_declare(stream.clone(), passive, FieldTable::default());
    Ok(answer(ANSWER_MAX, asked).await?.message_count())
}

async fn consume(
    channel: &Channel,
    stream: &ShortString,
    offset: AMQPValue,
) -> Result<Consumer, AskError> {
    let options = BasicConsumeOptions::default();
    let consuming = channel.basic_consume(stream.clone(), "".into(), options, reading_from(offset));
    answer(STREAM_MAX, consuming).await
}

/// The arguments of a consumer that reads a stream from `offset` on: a number, a timestamp, or
/// `first`, `last` or `next`.
pub fn reading_from(offset: AMQPValue) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert(OFFSET.into(), offset);
    arguments
}

/// The offset of a message that was read from a stream; `None`: it was not.
pub fn offset_of(delivery: &Delivery) -> Option<u64> {
    let headers = delivery.properties.headers().as_ref()?;
    let offset = headers.inner().get(OFFSET)?.as_long_long_int()?;
    u64::try_from(offset).ok()
}
