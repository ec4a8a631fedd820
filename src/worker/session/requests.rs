//! Takes in messages of requests. A message may hold several: each goes to the coordinator for itself, as
//! far as the coordinator has room, and the others wait here.
//!
//! The broker counts deliveries of messages. If a request crashes workers, so do the others of its message,
//! as far as anyone can count. So a message that was delivered more than [`TOGETHER_MAX`] times is replaced
//! by one message for each request; then only the one that crashes workers becomes a suspect. The broker
//! counts the deliveries of the new messages from the beginning, so these say that their requests were
//! delivered before: a worker may have begun them.

use lapin::{
    message::Delivery as Message,
    types::{AMQPValue, FieldTable},
};

use crate::{
    protocol::{coordinator::Event, message::Delivery, request_messages::MessageNumber},
    transport::amqp::{names::REPEATED, publisher::OutgoingMessage},
    wire::message::{DecodedRequests, Kind},
    worker::{
        inbound,
        outbox::{OnConfirm, Unacked},
        session::Session,
        state::WorkerState,
        suspects::{Suspect, SuspectStep, Try},
    },
};

/// A message of several requests that was delivered more often is replaced.
const TOGETHER_MAX: u32 = 3;

impl Session<'_> {
    /// Whether the coordinator takes another request. While it drains, it gives back all that comes.
    pub(super) fn has_room(&self) -> bool {
        self.drain_until.is_some() || self.state.coordinator.room() > 0
    }

    pub(super) fn requests_received(&mut self, number: MessageNumber, message: Message) {
        let DecodedRequests { items, fault } = inbound::requests(&message);
        if let Some(reason) = fault {
            let delivery = self.requests.open_message(number, 1).next();
            return self.set_requests_aside(&message, &reason, &items, delivery);
        }
        let is_draining = self.drain_until.is_some();
        // All have the timestamp of the message.
        let requested_at =
            items.iter().find_map(|it| Some(it.read.as_ref().ok()?.key.requested_at));
        if let Some(requested_at) = requested_at {
            let is_future = self.state.clocks.request(self.state.clock.read(), requested_at);
            if is_future && !is_draining && self.is_clock_in_doubt() {
                drop(items);
                return self.doubtful.push((number, message));
            }
        }
        let deliveries = inbound::deliveries(&message);
        let is_replaced = items.len() > 1 && deliveries > TOGETHER_MAX && !is_draining;
        if is_replaced {
            tracing::warn!(
                deliveries,
                requests = items.len(),
                "a message of several requests was delivered so often that one of them may be what \
                 crashes workers; replacing it by one message for each request"
            );
        }
        for (delivery, item) in self.requests.open_message(number, items.len()).zip(items) {
            match item.read {
                Err(malformed) => {
                    self.set_request_aside(&message, item.text, &malformed, delivery);
                }
                Ok(_) if is_replaced => self.publish_apart(&message, item.text, delivery),
                Ok(request) => self.take_in(Suspect { request, delivery, deliveries }),
            }
        }
    }

    /// Publishes a request of `message` in a message of its own.
    fn publish_apart(&mut self, message: &Message, text: &str, delivery: Delivery) {
        let mut headers = FieldTable::default();
        headers.insert(REPEATED.into(), AMQPValue::Boolean(true));
        for (name, value) in message.properties.headers().iter().flat_map(|it| it.inner()) {
            // The others are the broker's.
            if !name.as_str().starts_with("x-") {
                headers.insert(name.clone(), value.clone());
            }
        }
        let apart = OutgoingMessage {
            key: self.settings.names.requests(),
            message_type: Kind::Request.as_type(),
            body: text.as_bytes().to_vec(),
            persistent: true,
            mandatory: true,
            timestamp: *message.properties.timestamp(),
            headers: Some(headers),
            ..OutgoingMessage::default()
        };
        self.outbox.durable(apart, OnConfirm::Ack(Unacked::Request(delivery)));
    }

    fn take_in(&mut self, it: Suspect) {
        self.state.stats.taken += 1;
        self.unsettled.reply_of.insert(it.delivery, it.request.reply.clone());
        if self.backlog.is_empty() && self.has_room() {
            self.sift(it);
        } else {
            self.backlog.push_back(it);
        }
    }

    /// Passes requests that wait here to the coordinator, as far as it has room.
    pub(super) fn take_backlog(&mut self) {
        while self.has_room()
            && let Some(next) = self.backlog.pop_front()
        {
            self.sift(next);
        }
    }

    fn sift(&mut self, it: Suspect) {
        // While it drains, the coordinator gives back all that comes.
        let sifted = match self.drain_until {
            Some(_) => Some(it),
            None => self.suspects.sift(it, &self.state.tries),
        };
        if let Some(request) = sifted {
            self.dispatch_request(request);
        }
    }

    pub(super) fn dispatch_request(&mut self, it: Suspect) {
        let Suspect { request, delivery, deliveries } = it;
        self.dispatch(Event::RequestReceived { request, delivery, deliveries });
    }

    /// Tries the next suspect, if it is its turn.
    pub(super) fn try_suspects(&mut self) {
        // While the broker takes no messages, no try can be recorded.
        while !self.watch.is_blocked() && self.drain_until.is_none() {
            let WorkerState { coordinator, tries, .. } = &*self.state;
            let now = tokio::time::Instant::now();
            let next = self.suspects.next(tries, now, |key| coordinator.phase_of(key));
            match next {
                Some(SuspectStep::Record(it @ Try { begins: true, .. })) => {
                    let then = OnConfirm::Try(it.key.clone());
                    self.outbox.write_down(&it, then);
                }
                Some(SuspectStep::Record(it)) => self.outbox.write_down(&it, OnConfirm::Nothing),
                Some(SuspectStep::Dispatch(given_up)) => self.dispatch_request(given_up),
                None => return,
            }
        }
    }

    /// Gives requests that the coordinator doesn't have to other workers.
    pub(super) fn give_back_requests(&mut self) {
        for (number, _) in std::mem::take(&mut self.doubtful) {
            self.requests.requeue_message(number);
        }
        let waiting = std::mem::take(&mut self.backlog).into_iter().map(|it| it.delivery);
        for delivery in self.suspects.give_back().chain(waiting) {
            self.unsettled.reply_of.remove(&delivery);
            self.requests.requeue(delivery);
        }
    }
}
