//! Rejects messages: sets them aside with the reason, and answers the producer of a request.

use lapin::message::Delivery as Message;
use tracing::field::display;

use crate::{
    protocol::{
        ids::{ReplyToken, ServiceName, TransactionId, TransactionKey},
        message::{Answer, Delivery, Outcome, Reason, ReasonCode, Request, TransactionSpec},
        time::Time,
    },
    transport::amqp::{
        names,
        rejected::{rejected, rejected_request},
    },
    wire::message::{RequestItem, RequestMalformed, encode_request},
    worker::{
        outbox::{OnConfirm, Unacked},
        session::Session,
    },
};

/// What is known of a request that is rejected.
struct RejectedRequest {
    id: Option<TransactionId>,
    requested_at: Option<Time>,
    reply: Option<ReplyToken>,
}

impl RejectedRequest {
    fn of(read: &Result<Request, RequestMalformed>) -> Self {
        match read {
            Ok(Request { key, reply, .. }) => Self {
                id: Some(key.id.clone()),
                requested_at: Some(key.requested_at),
                reply: reply.clone(),
            },
            Err(malformed) => Self::malformed(malformed),
        }
    }

    fn malformed(malformed: &RequestMalformed) -> Self {
        let RequestMalformed { reason: _, id, requested_at, reply } = malformed.clone();
        Self { id, requested_at, reply }
    }

    fn key(&self) -> Option<TransactionKey> {
        let (id, requested_at) = (self.id.clone()?, self.requested_at?);
        Some(TransactionKey { id, requested_at })
    }
}

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

    /// A message of requests none of which can be served. The producers of those that can be read get
    /// results.
    pub(super) fn set_requests_aside(
        &mut self,
        message: &Message,
        reason: &str,
        items: &[RequestItem<'_>],
        delivery: Option<Delivery>,
    ) {
        let Some(delivery) = delivery else { return };
        let read = items.iter().map(|item| RejectedRequest::of(&item.read));
        let read: Vec<_> = read.collect();
        let alone = match &*read {
            [only] => only.key(),
            [] | [_, _, ..] => None,
        };
        self.tell_rejected(alone.as_ref(), reason);
        let queue = self.settings.names.requests();
        let rejected = rejected(&self.settings.names, queue.as_str(), message, reason);
        let then = self.telling_producers(read, reason, delivery);
        self.outbox.durable(rejected, then);
    }

    /// A request that can't be understood, among others in its message.
    pub(super) fn set_request_aside(
        &mut self,
        message: &Message,
        text: &str,
        malformed: &RequestMalformed,
        delivery: Delivery,
    ) {
        let read = RejectedRequest::malformed(malformed);
        self.tell_rejected(read.key().as_ref(), &malformed.reason);
        let seconds = message.properties.timestamp().unwrap_or_default();
        let (names, body) = (&self.settings.names, text.as_bytes().to_vec());
        let rejected = rejected_request(names, body, seconds, &malformed.reason);
        let then = self.telling_producers(vec![read], &malformed.reason, delivery);
        self.outbox.durable(rejected, then);
    }

    fn tell_rejected(&mut self, key: Option<&TransactionKey>, reason: &str) {
        self.state.stats.rejected += 1;
        let (transaction, queue) = (key.map(display), self.settings.names.requests());
        tracing::warn!(transaction, %queue, reason, "a message is rejected");
    }

    /// Publishes a result for each request whose id could be read.
    fn telling_producers(
        &self,
        requests: Vec<RejectedRequest>,
        reason: &str,
        delivery: Delivery,
    ) -> OnConfirm {
        let now = self.state.clock.now();
        let reason = Reason::because(ReasonCode::Invalid, reason);
        let answers = requests.into_iter().filter_map(|it| {
            let answer = Answer {
                id: it.id?,
                requested_at: it.requested_at.unwrap_or(now),
                outcome: Outcome::Aborted,
                reason: Some(reason.clone()),
                unresolved: Vec::new(),
                decided_at: now,
            };
            Some((it.reply, answer))
        });
        let results = self.outbox.results_of(answers);
        OnConfirm::Answer(results, Unacked::Request(delivery))
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
            answer_at: request.answer_at,
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
        let results = self.outbox.results_of([(request.reply.clone(), answer)]);
        let then = OnConfirm::Answer(results, Unacked::Request(delivery));
        self.outbox.durable(rejected, then);
    }
}
