//! Taking deliveries, and acknowledging them in as few frames as possible.

use std::{
    collections::BTreeSet,
    future::Future,
    pin::pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use lapin::{
    Channel, Connection,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    },
    types::{FieldTable, ShortString},
};
use tokio::time::Instant;

use crate::transport::amqp::traffic;

/// How long a lazy inbox keeps an acknowledgement to itself: far less than the broker's patience.
const LAZY_FOR: Duration = Duration::from_secs(1);

/// Why there are no more deliveries.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Closed {
    /// The broker has ended it: the queue is gone, or its leader.
    #[error("the broker has cancelled the consumer of `{queue}`")]
    Cancelled {
        /// The queue.
        queue: String,
    },
    /// The channel or the connection is gone.
    #[error("the channel that consumed `{queue}` is lost")]
    Lost {
        /// The queue.
        queue: String,
        /// Why.
        #[source]
        source: lapin::Error,
    },
}

/// A consumer with a channel of its own.
#[derive(Debug)]
pub struct Inbox {
    queue: ShortString,
    channel: Channel,
    consumer: lapin::Consumer,
    tags: Tags,
    prefetch: u16,
    lazy: Option<Lazy>,
}

/// Acknowledgements that wait for more of them.
#[derive(Debug, Default)]
struct Lazy {
    /// Since when one is waiting.
    since: Option<Instant>,
}

impl Inbox {
    /// Consumes `queue` on a new channel of `connection`; no more than `prefetch` deliveries are
    /// unacknowledged at a time.
    pub async fn open(
        connection: &Connection,
        queue: ShortString,
        prefetch: u16,
        arguments: FieldTable,
    ) -> Result<Self, lapin::Error> {
        let channel = connection.create_channel().await?;
        Self::on(channel, queue, prefetch, arguments).await
    }

    /// The same on a channel that nobody else consumes on.
    pub async fn on(
        channel: Channel,
        queue: ShortString,
        prefetch: u16,
        arguments: FieldTable,
    ) -> Result<Self, lapin::Error> {
        channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
        let options = BasicConsumeOptions::default();
        let consumer = channel.basic_consume(queue.clone(), "".into(), options, arguments).await?;
        Ok(Self { queue, channel, consumer, tags: Tags::default(), prefetch, lazy: None })
    }

    /// Acknowledges only now and then: where a queue ends with its connection, or is a stream, nobody
    /// waits for it but the broker, before it sends more than the prefetch. Whoever has one flushes
    /// it at [`Inbox::flush_at`].
    #[must_use]
    pub fn lazy(self) -> Self {
        Self { lazy: Some(Lazy::default()), ..self }
    }

    /// The queue it consumes.
    pub fn queue(&self) -> &ShortString {
        &self.queue
    }

    /// The next delivery. Each must be settled, by [`Inbox::ack`] or [`Inbox::requeue`].
    ///
    /// # Errors
    ///
    /// There are no more, and what is unsettled comes again to whomever.
    pub async fn next(&mut self) -> Result<Delivery, Closed> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// [`Inbox::next`], for those who wait for several.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Delivery, Closed>> {
        self.consumer.poll_next_unpin(cx).map(|next| match next {
            Some(Ok(delivery)) => {
                traffic::delivered();
                Ok(delivery)
            }
            Some(Err(source)) => Err(Closed::Lost { queue: self.queue.to_string(), source }),
            None => Err(Closed::Cancelled { queue: self.queue.to_string() }),
        })
    }

    /// The same, if it is there by now.
    pub fn ready(&mut self) -> Option<Result<Delivery, Closed>> {
        self.next().now_or_never()
    }

    /// The delivery is dealt with. [`Inbox::flush`] says so to the broker.
    pub fn ack(&mut self, tag: u64) {
        self.tags.settle(tag);
    }

    /// The delivery is for another. Says so at once.
    pub fn requeue(&mut self, tag: u64) {
        self.tags.told(tag);
        write_now(
            self.channel.basic_nack(tag, BasicNackOptions { requeue: true, multiple: false }),
        );
    }

    /// Tells the broker of what was acknowledged.
    pub fn flush(&mut self) {
        let waiting = self.tags.unknown.len();
        if let Some(lazy) = &mut self.lazy {
            if waiting == 0 {
                return;
            }
            let since = *lazy.since.get_or_insert_with(Instant::now);
            if waiting < usize::from(self.prefetch / 4) && since.elapsed() < LAZY_FOR {
                return;
            }
            lazy.since = None;
        }
        for (tag, multiple) in self.tags.flush() {
            write_now(self.channel.basic_ack(tag, BasicAckOptions { multiple }));
        }
    }

    /// When a lazy inbox is to be flushed at the latest.
    pub fn flush_at(&self) -> Option<Instant> {
        self.lazy.as_ref()?.since.map(|since| since + LAZY_FOR)
    }

    /// Takes no more deliveries; those it has stay its own. What was on its way may still come.
    pub async fn cancel(&self) -> Result<(), lapin::Error> {
        self.channel.basic_cancel(self.consumer.tag(), BasicCancelOptions::default()).await
    }

    /// Gives the channel up, and with it all that is unsettled.
    pub async fn close(self) {
        let _ = self.channel.close(200, "done".into()).await;
    }
}

/// Writes a frame whose fate nobody waits for: if the channel is gone, its consumer says so.
fn write_now(writing: impl Future<Output = Result<(), lapin::Error>>) {
    let _ = pin!(writing).poll(&mut Context::from_waker(Waker::noop()));
}

/// Which delivery tags of a channel are settled: they count from 1.
#[derive(Debug, Default)]
struct Tags {
    /// All up to here are settled, and the broker knows.
    floor: u64,
    /// Settled above the floor; whether the broker knows.
    known: BTreeSet<u64>,
    unknown: BTreeSet<u64>,
}

impl Tags {
    fn settle(&mut self, tag: u64) {
        if tag > self.floor && !self.known.contains(&tag) {
            self.unknown.insert(tag);
        }
    }

    /// Settled by other means than an acknowledgement.
    fn told(&mut self, tag: u64) {
        self.unknown.remove(&tag);
        if tag > self.floor {
            self.known.insert(tag);
        }
    }

    /// What to acknowledge now: (tag, whether all before it are meant too).
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
        // Only what the broker still waits for may be named, else it closes the channel.
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

    use super::Tags;

    #[test]
    fn a_run_from_the_start_is_one_frame() {
        let mut tags = Tags::default();
        (1..=5).for_each(|tag| tags.settle(tag));
        assert_eq!(tags.flush(), [(5, true)]);
        assert_eq!(tags.flush(), []);
    }

    #[test]
    fn one_that_takes_long_does_not_keep_back_those_behind_it() {
        let mut tags = Tags::default();
        (2..=4).for_each(|tag| tags.settle(tag));
        assert_eq!(tags.flush(), [(2, false), (3, false), (4, false)]);
        tags.settle(1);
        assert_eq!(tags.flush(), [(1, false)]);
        tags.settle(5);
        assert_eq!(tags.flush(), [(5, false)]);
    }

    #[test]
    fn what_was_handed_back_is_not_acknowledged() {
        let mut tags = Tags::default();
        tags.settle(1);
        tags.told(2);
        tags.settle(3);
        assert_eq!(tags.flush(), [(3, true)]);
    }

    /// The broker's side: it closes the channel if told of a tag that it doesn't wait for.
    fn acknowledge(outstanding: &mut BTreeSet<u64>, tag: u64, multiple: bool) -> bool {
        let known = outstanding.contains(&tag);
        outstanding.retain(|&it| it != tag && !(multiple && it < tag));
        known
    }

    proptest! {
        #[test]
        fn the_broker_hears_of_each_settled_tag_once_and_of_no_other(
            order in (1..40_u64).prop_flat_map(|n| Just((1..=n).collect::<Vec<_>>()).prop_shuffle()),
            flushes in prop::collection::vec(any::<bool>(), 40),
            handed_back in prop::collection::vec(any::<bool>(), 40),
        ) {
            let mut tags = Tags::default();
            let mut outstanding: BTreeSet<u64> = order.iter().copied().collect();
            let mut settled = BTreeSet::new();
            for (index, &tag) in order.iter().enumerate() {
                settled.insert(tag);
                if handed_back[index] {
                    tags.told(tag);
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
