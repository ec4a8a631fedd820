//! The consumers of the queue of requests: one, or two.
//!
//! The first consumer takes as many messages as requests may be in flight. Some of them may wait in the
//! worker for a slot of a full service; if many do, they would keep out others that could be worked
//! on, so a second consumer takes more while that lasts.

use std::{
    collections::BTreeMap,
    sync::Arc,
    task::{Context, Poll},
};

use lapin::{message::Delivery as Message, types::FieldTable, types::ShortString};

use crate::{
    protocol::{
        message::Delivery,
        request_messages::{MessageNumber, RequestMessages, Settlement},
    },
    transport::amqp::{
        bounded::AskError,
        connection::BrokerConnection,
        consumer::{ConsumerError, ConsumerMode, QueueConsumer},
    },
};

/// How many bits of a [`MessageNumber`] tell its source. The others are the broker's delivery tag.
const SOURCE_BITS: u32 = 16;

#[derive(Debug)]
struct RequestConsumer {
    inbox: QueueConsumer,
    /// How many messages are not settled.
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
    messages: RequestMessages,
}

impl RequestConsumers {
    /// None yet.
    pub(super) fn new(queue: ShortString) -> Self {
        let messages = RequestMessages::default();
        Self { queue, sources: BTreeMap::new(), next: 0, messages }
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

    /// The next message, from whichever consumer.
    pub(super) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(MessageNumber, Message), ConsumerError>> {
        for (&number, source) in self.sources.iter_mut().filter(|(_, source)| !source.ended) {
            match source.inbox.poll_next(cx) {
                Poll::Ready(Ok(message)) => {
                    source.held += 1;
                    let tag = message.delivery_tag << SOURCE_BITS;
                    let number = MessageNumber::new(tag | u64::from(number));
                    return Poll::Ready(Ok((number, message)));
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

    /// The deliveries of the requests of a message that holds `n_requests`.
    pub(super) fn open_message(
        &mut self,
        message: MessageNumber,
        n_requests: usize,
    ) -> impl Iterator<Item = Delivery> + use<> {
        self.messages.take(message, n_requests)
    }

    /// The request is dealt with.
    pub(super) fn ack(&mut self, request: Delivery) {
        self.settle(request, Settlement::Acknowledge);
    }

    /// The request is for another worker.
    pub(super) fn requeue(&mut self, request: Delivery) {
        self.settle(request, Settlement::Requeue);
    }

    fn settle(&mut self, request: Delivery, settlement: Settlement) {
        if let Some((message, settlement)) = self.messages.settle(request, settlement) {
            self.settle_message(message, settlement);
        }
    }

    /// A message that was not opened is for another worker.
    pub(super) fn requeue_message(&mut self, message: MessageNumber) {
        self.settle_message(message, Settlement::Requeue);
    }

    fn settle_message(&mut self, message: MessageNumber, settlement: Settlement) {
        let number = (message.get() & ((1 << SOURCE_BITS) - 1)) as u16;
        let Some(source) = self.sources.get_mut(&number) else { return };
        source.held = source.held.saturating_sub(1);
        let tag = message.get() >> SOURCE_BITS;
        match settlement {
            Settlement::Acknowledge => source.inbox.ack(tag),
            Settlement::Requeue => source.inbox.requeue(tag),
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
