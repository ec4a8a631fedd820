//! The consumers of the queue of requests: one, or two.
//!
//! The first consumer takes as many requests as may be in flight. Some of them may wait in the
//! worker for a slot of a full service; if many do, they would keep out others that could be worked
//! on, so a second consumer takes more while that lasts.

use std::{
    collections::BTreeMap,
    sync::Arc,
    task::{Context, Poll},
};

use lapin::{message::Delivery as Message, types::FieldTable, types::ShortString};

use crate::{
    protocol::message::Delivery,
    transport::amqp::{
        bounded::AskError,
        connection::BrokerConnection,
        consumer::{ConsumerError, ConsumerMode, QueueConsumer},
    },
};

/// How many bits of a [`Delivery`] tell its source.
const SOURCE_BITS: u32 = 16;

#[derive(Debug)]
struct RequestConsumer {
    inbox: QueueConsumer,
    /// Deliveries that are not settled.
    held: usize,
    cancelled: bool,
    /// Whether all its deliveries have come.
    ended: bool,
}

/// The consumers of one queue on one connection.
#[derive(Debug)]
pub(super) struct RequestConsumers {
    queue: ShortString,
    sources: BTreeMap<u16, RequestConsumer>,
    next: u16,
}

impl RequestConsumers {
    /// None yet.
    pub(super) fn new(queue: ShortString) -> Self {
        Self { queue, sources: BTreeMap::new(), next: 0 }
    }

    /// One more consumer.
    pub(super) async fn open(
        &mut self,
        connection: &Arc<BrokerConnection>,
        prefetch: u16,
    ) -> Result<(), AskError> {
        let opening =
            QueueConsumer::open(connection, self.queue.clone(), prefetch, FieldTable::default());
        let inbox = opening.await?.with_liveness_probe(connection, ConsumerMode::Competing);
        let source = RequestConsumer { inbox, held: 0, cancelled: false, ended: false };
        while self.sources.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        self.sources.insert(self.next, source);
        self.next = self.next.wrapping_add(1);
        Ok(())
    }

    /// How many consumers take requests.
    pub(super) fn taking(&self) -> usize {
        self.sources.values().filter(|source| !source.cancelled).count()
    }

    /// Cancels all consumers except the first `keep`.
    pub(super) async fn cancel_all_but(&mut self, keep: usize) -> Result<(), AskError> {
        let taking = self.sources.values_mut().filter(|source| !source.cancelled);
        for source in taking.skip(keep) {
            source.inbox.cancel().await?;
            source.cancelled = true;
        }
        Ok(())
    }

    /// The next request, from whichever consumer.
    pub(super) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(Delivery, Message), ConsumerError>> {
        for (&number, source) in self.sources.iter_mut().filter(|(_, source)| !source.ended) {
            match source.inbox.poll_next(cx) {
                Poll::Ready(Ok(message)) => {
                    source.held += 1;
                    let tag = message.delivery_tag << SOURCE_BITS;
                    return Poll::Ready(Ok((Delivery(tag | u64::from(number)), message)));
                }
                // This worker has cancelled it.
                Poll::Ready(Err(ConsumerError::Cancelled { .. })) if source.cancelled => {
                    source.ended = true;
                }
                Poll::Ready(Err(closed)) => return Poll::Ready(Err(closed)),
                Poll::Pending => {}
            }
        }
        Poll::Pending
    }

    fn of(&mut self, delivery: Delivery) -> Option<(u64, &mut RequestConsumer)> {
        let number = (delivery.0 & ((1 << SOURCE_BITS) - 1)) as u16;
        let source = self.sources.get_mut(&number)?;
        source.held = source.held.saturating_sub(1);
        Some((delivery.0 >> SOURCE_BITS, source))
    }

    /// The request is dealt with.
    pub(super) fn ack(&mut self, delivery: Delivery) {
        if let Some((tag, source)) = self.of(delivery) {
            source.inbox.ack(tag);
        }
    }

    /// The request is for another worker.
    pub(super) fn requeue(&mut self, delivery: Delivery) {
        if let Some((tag, source)) = self.of(delivery) {
            source.inbox.requeue(tag);
        }
    }

    /// Sends the acknowledgements, and drops the consumers that have ended.
    pub(super) fn flush(&mut self) {
        for source in self.sources.values_mut() {
            source.inbox.flush();
        }
        self.sources.retain(|_, source| !source.ended || source.held > 0);
    }
}
