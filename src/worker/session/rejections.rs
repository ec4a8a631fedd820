//! Rejects messages: sets them aside with the reason, and answers the producer of a request.

use lapin::message::Delivery as Message;
use tracing::field::display;

use crate::{
    protocol::{
        ids::{ServiceName, TransactionKey},
        message::{Answer, Delivery, Outcome, Reason, ReasonCode, Request, TransactionSpec},
    },
    transport::amqp::{
        names,
        rejected::{rejected, rejected_request},
    },
    wire::message::{RequestMalformed, encode_request},
    worker::{
        outbox::{OnConfirm, Unacked},
        session::Session,
    },
};

impl Session<'_> {
    /// A message that can't be understood, or not as a whole.
    pub(super) fn set_aside(
        &mut self,
        queue: &str,
        message: &Message,
        reason: &str,
        then: OnConfirm,
    ) {
        self.state.stats.rejected += 1;
        // What a service sends has its name in the routing key.
        let service = names::parts(message.routing_key.as_str());
        let service = service.and_then(|(_, service)| ServiceName::parse(service).ok());
        let service = service.as_ref().map(display);
        tracing::warn!(service, queue, reason, "a message is rejected");
        let rejected = rejected(&self.settings.names, queue, message, reason);
        self.outbox.durable(rejected, then);
    }

    /// A request that can't be understood.
    pub(super) fn set_request_aside(
        &mut self,
        message: &Message,
        malformed: &RequestMalformed,
        delivery: Delivery,
    ) {
        self.state.stats.rejected += 1;
        let (queue, reason) = (self.settings.names.requests(), malformed.reason.as_str());
        let key = malformed.id.clone().zip(malformed.requested_at);
        let key = key.map(|(id, requested_at)| TransactionKey { id, requested_at });
        let transaction = key.as_ref().map(display);
        tracing::warn!(transaction, %queue, reason, "a message is rejected");
        let rejected = rejected(&self.settings.names, queue.as_str(), message, reason);
        let then = self.telling_producer_of(malformed, Unacked::Request(delivery));
        self.outbox.durable(rejected, then);
    }

    /// Publishes a result for the request, if its id could be read.
    fn telling_producer_of(&self, malformed: &RequestMalformed, unacked: Unacked) -> OnConfirm {
        let Some(id) = malformed.id.clone() else { return OnConfirm::Ack(unacked) };
        let now = self.state.clock.now();
        let answer = Answer {
            id,
            requested_at: malformed.requested_at.unwrap_or(now),
            outcome: Outcome::Aborted,
            reason: Some(Reason::because(ReasonCode::Invalid, malformed.reason.as_str())),
            unresolved: Vec::new(),
            decided_at: now,
        };
        let result = self.outbox.result(malformed.reply.as_ref(), &answer);
        OnConfirm::Answer(Box::new(result), unacked)
    }

    /// A request that was understood, and that the coordinator has rejected.
    pub(super) fn reject_request(&mut self, request: &Request, delivery: Delivery, reason: Reason) {
        let text = reason.message.as_deref().unwrap_or(reason.code.as_str());
        let text = format!("{}: {text}", reason.code);
        self.state.stats.rejected += 1;
        tracing::warn!(transaction = %request.key, reason = text, "a request is rejected");
        let spec = TransactionSpec {
            id: request.key.id.clone(),
            services: request.services.clone(),
            data: request.data.clone(),
            request_hash: request.request_hash,
            timeout: request.timeout,
        };
        let body = encode_request(&spec, request.reply.as_ref()).unwrap_or_default();
        let seconds = request.key.requested_at.as_millis() / 1000;
        let rejected = rejected_request(&self.settings.names, body, seconds, &text);
        let answer = Answer {
            id: request.key.id.clone(),
            requested_at: request.key.requested_at,
            outcome: Outcome::Aborted,
            reason: Some(reason),
            unresolved: Vec::new(),
            decided_at: self.state.clock.now(),
        };
        let result = self.outbox.result(request.reply.as_ref(), &answer);
        let then = OnConfirm::Answer(Box::new(result), Unacked::Request(delivery));
        self.outbox.durable(rejected, then);
    }
}
