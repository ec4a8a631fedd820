//! Reading a stream from somewhere to its end, without waiting for more.
//!
//! A stream has no end: whoever reads on waits for what comes next. So the last message is looked
//! for first, by a second consumer on the same channel, and then everything is read up to it. That
//! second consumer also tells of streams in which there is nothing at all to be read.
//!
//! Reading takes nothing from anyone.

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

/// How many messages may be unacknowledged; and how many are acknowledged at once.
const PREFETCH: u16 = 1000;
const ACK_EVERY: u64 = 250;

/// How long a stream that the broker believes to be empty may take to prove that it isn't. The
/// broker's counts lag by some seconds; a message that is there comes within milliseconds.
const EMPTY_AFTER: Duration = Duration::from_secs(1);

/// How long the first message may take from a moment on, if there is one: it comes within milliseconds,
/// but for a broker that has much else to do.
const FIRST_AFTER: Duration = Duration::from_millis(500);

/// How long any other stream may take until its next message is there.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where to begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum From {
    /// With the oldest message that there is.
    First,
    /// With the chunk of messages that was written at this moment, in seconds since the Unix epoch,
    /// or the next one.
    Moment(u64),
}

/// A stream can't be read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ScanError {
    /// The broker doesn't let us, or the connection is gone.
    #[error("failed to read the stream `{stream}`")]
    Broker {
        /// The stream.
        stream: String,
        /// Why.
        #[source]
        source: AskError,
    },
    /// The broker has ended it: the stream is gone, or its leader.
    #[error("the broker has cancelled the consumer of the stream `{stream}`")]
    Cancelled {
        /// The stream.
        stream: String,
    },
    /// Nothing more comes, though there is something.
    #[error("no message of the stream `{stream}` arrived within {} s", PATIENCE.as_secs())]
    Silent {
        /// The stream.
        stream: String,
    },
}

/// The reading of one stream.
#[derive(Debug)]
pub struct Scan {
    stream: ShortString,
    channel: Channel,
    consumer: Consumer,
    /// The offset of the last message; `None`: nothing is left to be read.
    last: Option<u64>,
    /// The first message, when it came before anyone asked.
    early: Option<Delivery>,
    unacknowledged: u64,
}

impl ScanError {
    /// Whether it may be otherwise soon, without anybody's doing.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Broker { source, .. } => source.may_pass(),
            Self::Cancelled { .. } | Self::Silent { .. } => true,
        }
    }
}

impl Scan {
    /// Looks for the end of `stream`, and begins to read at `from`.
    pub async fn open(
        connection: &Connection,
        stream: ShortString,
        from: From,
    ) -> Result<Self, ScanError> {
        let broker = |source| ScanError::Broker { stream: stream.to_string(), source };
        let channel = answer(ANSWER_MAX, connection.create_channel()).await.map_err(broker)?;
        let patience = match count(&channel, &stream).await.map_err(broker)? {
            0 => EMPTY_AFTER,
            _ => PATIENCE,
        };
        let limiting = channel.basic_qos(PREFETCH, BasicQosOptions::default());
        answer(ANSWER_MAX, limiting).await.map_err(broker)?;
        let start = match from {
            From::First => AMQPValue::LongString("first".into()),
            From::Moment(seconds) => AMQPValue::Timestamp(seconds),
        };
        let consumer = consume(&channel, &stream, start).await.map_err(broker)?;
        let end = AMQPValue::LongString("last".into());
        let mut tail = consume(&channel, &stream, end).await.map_err(broker)?;
        let (last, early, unacknowledged) = (None, None, 0);
        let mut scan = Self { stream, channel, consumer, last, early, unacknowledged };
        let first = match tokio::time::timeout(patience, tail.next()).await {
            Ok(first) => Some(first),
            Err(_) if patience == EMPTY_AFTER => {
                // It may be this process that had no time.
                scan.fence().await?;
                tail.next().now_or_never()
            }
            Err(_) => return Err(scan.silent()),
        };
        let Some(first) = first else {
            scan.cancel(&tail).await?;
            return Ok(scan);
        };
        scan.last = offset(&scan.delivered(first)?);
        scan.find_last(&mut tail).await?;
        if from != From::First {
            scan.find_first().await?;
        }
        Ok(scan)
    }

    /// What the broker has for the consumers of a channel it sends in one go, before it does
    /// anything else that is asked of that channel. So after the answer to a further question all of
    /// it is here, and what isn't here isn't there.
    async fn find_last(&mut self, tail: &mut Consumer) -> Result<(), ScanError> {
        loop {
            self.fence().await?;
            let mut n_more = 0_u16;
            let mut tag = 0;
            while let Some(next) = tail.next().now_or_never() {
                let delivery = self.delivered(next)?;
                self.last = self.last.max(offset(&delivery));
                tag = delivery.delivery_tag;
                n_more = n_more.saturating_add(1);
            }
            // It was all that may be sent without being acknowledged: there may be more.
            if n_more < PREFETCH - 1 {
                break;
            }
            let only_this = BasicAckOptions { multiple: false };
            let acknowledging = self.channel.basic_ack(tag, only_this);
            answer(ANSWER_MAX, acknowledging).await.map_err(|error| self.broker(error))?;
        }
        self.cancel(tail).await
    }

    /// A consumer that is dropped while it is active is cancelled by lapin sooner or later. If that
    /// comes after the end of its channel, the broker ends the whole connection.
    async fn cancel(&self, tail: &Consumer) -> Result<(), ScanError> {
        let cancelling = self.channel.basic_cancel(tail.tag(), BasicCancelOptions::default());
        let cancelled = answer(ANSWER_MAX, cancelling).await;
        cancelled.map_err(|error| self.broker(error))
    }

    /// Whether there is anything at all from where it began. The stream's own process tells the channel
    /// of the first chunk, so that may come after the answer to a further question.
    async fn find_first(&mut self) -> Result<(), ScanError> {
        match tokio::time::timeout(FIRST_AFTER, self.consumer.next()).await {
            Ok(next) => self.early = Some(self.delivered(next)?),
            Err(_) => self.last = None,
        }
        Ok(())
    }

    async fn fence(&self) -> Result<(), ScanError> {
        let answered = count(&self.channel, &self.stream).await;
        answered.map(drop).map_err(|error| self.broker(error))
    }

    /// The next message with its offset; `None`: that was the last one.
    pub async fn next(&mut self) -> Result<Option<(u64, Delivery)>, ScanError> {
        let Some(last) = self.last else { return Ok(None) };
        let delivery = match self.early.take() {
            Some(early) => early,
            None => {
                let next = tokio::time::timeout(PATIENCE, self.consumer.next()).await;
                self.delivered(next.map_err(|_| self.silent())?)?
            }
        };
        // A message without an offset is none of a stream.
        let offset = offset(&delivery).unwrap_or(u64::MAX);
        if offset >= last {
            self.last = None;
        }
        if offset > last {
            return Ok(None);
        }
        self.acknowledge(delivery.delivery_tag).await?;
        Ok(Some((offset, delivery)))
    }

    /// The broker sends on when it hears that what it has sent was taken.
    async fn acknowledge(&mut self, tag: u64) -> Result<(), ScanError> {
        self.unacknowledged += 1;
        if self.unacknowledged < ACK_EVERY {
            return Ok(());
        }
        self.unacknowledged = 0;
        let up_to_this = BasicAckOptions { multiple: true };
        let acknowledged = answer(ANSWER_MAX, self.channel.basic_ack(tag, up_to_this)).await;
        acknowledged.map_err(|error| self.broker(error))
    }

    /// Reads no more.
    pub async fn close(self) {
        close_channel(&self.channel).await;
    }

    fn delivered(
        &self,
        next: Option<Result<Delivery, lapin::Error>>,
    ) -> Result<Delivery, ScanError> {
        match next {
            Some(delivery) => delivery.map_err(|error| self.broker(error.into())),
            None => Err(ScanError::Cancelled { stream: self.stream.to_string() }),
        }
    }

    fn broker(&self, source: AskError) -> ScanError {
        ScanError::Broker { stream: self.stream.to_string(), source }
    }

    fn silent(&self) -> ScanError {
        ScanError::Silent { stream: self.stream.to_string() }
    }
}

/// How many messages the broker believes to be in the stream.
async fn count(channel: &Channel, stream: &ShortString) -> Result<u32, AskError> {
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let asked = channel.queue_declare(stream.clone(), passive, FieldTable::default());
    Ok(answer(ANSWER_MAX, asked).await?.message_count())
}

async fn consume(
    channel: &Channel,
    stream: &ShortString,
    start: AMQPValue,
) -> Result<Consumer, AskError> {
    let mut arguments = FieldTable::default();
    arguments.insert("x-stream-offset".into(), start);
    let options = BasicConsumeOptions::default();
    let consuming = channel.basic_consume(stream.clone(), "".into(), options, arguments);
    answer(STREAM_MAX, consuming).await
}

fn offset(delivery: &Delivery) -> Option<u64> {
    let headers = delivery.properties.headers().as_ref()?;
    let offset = headers.inner().get("x-stream-offset")?.as_long_long_int()?;
    u64::try_from(offset).ok()
}
