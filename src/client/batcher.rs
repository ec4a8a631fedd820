//! Publishes requests: those that are ready at the same time share a message.
//!
//! At most [`ON_THE_WAY_MAX`] messages are on their way, or more if they are small by setting. Requests that
//! come meanwhile are gathered, and when the broker has answered one of the messages, the next one takes what
//! is ready. So a request that comes alone leaves at once, and none waits for company. If each request has a
//! message of its own, nothing is gathered and there is no limit.
//!
//! A call that has ended takes its request back, unless the request has left.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lapin::types::ShortString;
use tokio::sync::oneshot;

use crate::{
    protocol::{ids::TransactionKey, request_messages::REQUESTS_MAX},
    transport::amqp::{
        names::Names,
        pool::{ChannelPool, PublishError},
        publisher::OutgoingMessage,
    },
    wire::message::{Kind, RequestBody},
};

const REQUEST_KEY: &str = "request";

/// How many messages of the largest size may be on their way. With one, the broker would be idle while its
/// answer travels.
const ON_THE_WAY_MAX: usize = 2;

/// A request as it is published, each time the same.
#[derive(Clone, Debug)]
pub(super) struct EncodedRequest {
    /// In whole seconds: the timestamp of its message, which all requests of a message share.
    pub(super) key: TransactionKey,
    pub(super) body: Arc<[u8]>,
}

/// Publishes the requests of a client. Clones share what is gathered.
#[derive(Clone, Debug)]
pub(super) struct RequestBatcher {
    channels: ChannelPool,
    exchange: ShortString,
    /// How many requests may share a message.
    batch_max: usize,
    on_the_way_max: usize,
    gathered: Arc<Mutex<Gathered>>,
}

/// Requests that have not left, in the order in which they came.
#[derive(Debug, Default)]
struct Gathered {
    waiting: Vec<WaitingRequest>,
    on_the_way: usize,
}

#[derive(Debug)]
struct WaitingRequest {
    request: EncodedRequest,
    published: oneshot::Sender<Result<(), PublishError>>,
}

/// Requests that share a message.
#[derive(Debug)]
struct RequestBatch {
    requests: Vec<WaitingRequest>,
    body: RequestBody,
}

/// The right to have one message on its way.
#[derive(Debug)]
struct Lane {
    gathered: Arc<Mutex<Gathered>>,
    is_closed: bool,
}

impl RequestBatcher {
    /// `batch_max`: how many requests may share a message, at least 1.
    pub(super) fn new(channels: ChannelPool, names: &Names, batch_max: usize) -> Self {
        let on_the_way_max = on_the_way_max(batch_max);
        let (exchange, gathered) = (names.requests(), Arc::default());
        Self { channels, exchange, batch_max, on_the_way_max, gathered }
    }

    /// Publishes a request, and waits for the broker's confirm.
    ///
    /// # Errors
    ///
    /// The broker may not have it. The caller decides whether to publish it again.
    pub(super) async fn publish(&self, request: EncodedRequest) -> Result<(), PublishError> {
        let (published, answered) = oneshot::channel();
        let lane = {
            let mut gathered = lock(&self.gathered);
            gathered.waiting.push(WaitingRequest { request, published });
            (gathered.on_the_way < self.on_the_way_max).then(|| {
                gathered.on_the_way += 1;
                Lane { gathered: Arc::clone(&self.gathered), is_closed: false }
            })
        };
        if let Some(lane) = lane {
            tokio::spawn(self.clone().publish_gathered(lane));
        }
        // The sender is lost only with the runtime that was to publish the message.
        answered.await.unwrap_or(Err(PublishError::Closed))
    }

    /// Publishes one message after another, until nothing is gathered.
    async fn publish_gathered(self, mut lane: Lane) {
        while let Some(RequestBatch { requests, body }) = lane.next(self.batch_max) {
            let result = self.channels.publish(self.message(&requests, body)).await;
            for WaitingRequest { published, .. } in requests {
                // An error means that the call has ended.
                let _ = published.send(result.clone());
            }
        }
    }

    fn message(&self, requests: &[WaitingRequest], body: RequestBody) -> OutgoingMessage {
        let alone = match requests {
            [only] => Some(only.request.key.id.as_str().into()),
            [] | [_, _, ..] => None,
        };
        OutgoingMessage {
            exchange: self.exchange.clone(),
            key: REQUEST_KEY.into(),
            message_type: Kind::Request.as_type(),
            body: body.into_bytes(),
            persistent: true,
            mandatory: true,
            message_id: alone,
            timestamp: requests.first().map(|it| it.request.key.requested_at.as_millis() / 1000),
            ..OutgoingMessage::default()
        }
    }
}

/// How many messages of up to `batch_max` requests may be on their way.
fn on_the_way_max(batch_max: usize) -> usize {
    match batch_max {
        0 | 1 => usize::MAX,
        several => ON_THE_WAY_MAX.max(ON_THE_WAY_MAX * REQUESTS_MAX / several),
    }
}

impl Lane {
    /// The request that has waited longest, and those that can share its message. If there is none, the
    /// lane is closed under the same lock, so that the next request opens one.
    fn next(&mut self, batch_max: usize) -> Option<RequestBatch> {
        let mut gathered = lock(&self.gathered);
        gathered.waiting.retain(|it| !it.published.is_closed());
        let oldest = gathered.waiting.first().map(|it| it.request.key.requested_at);
        let Some(requested_at) = oldest else {
            gathered.on_the_way -= 1;
            self.is_closed = true;
            return None;
        };
        let mut body = RequestBody::new();
        let joins = |it: &mut WaitingRequest| {
            body.len() < batch_max
                && it.request.key.requested_at == requested_at
                && body.push(&it.request.body).is_ok()
        };
        let requests = gathered.waiting.extract_if(.., joins).collect();
        Some(RequestBatch { requests, body })
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if !self.is_closed {
            lock(&self.gathered).on_the_way -= 1;
        }
    }
}

fn lock(gathered: &Mutex<Gathered>) -> MutexGuard<'_, Gathered> {
    gathered.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::oneshot;

    use super::{EncodedRequest, Lane, RequestBatch, WaitingRequest, lock, on_the_way_max};
    use crate::{
        protocol::{
            ids::{TransactionId, TransactionKey},
            request_messages::REQUESTS_MAX,
            time::Time,
        },
        transport::amqp::pool::PublishError,
        wire::message::{BODY_MAX, REQUEST_MAX},
    };

    type Published = oneshot::Receiver<Result<(), PublishError>>;

    fn lane() -> Lane {
        let lane = Lane { gathered: Arc::default(), is_closed: false };
        lock(&lane.gathered).on_the_way = 1;
        lane
    }

    fn gather(lane: &Lane, id: &str, seconds: u64, size: usize) -> Published {
        let (published, answered) = oneshot::channel();
        let id = TransactionId::parse(id).unwrap();
        let key = TransactionKey { id, requested_at: Time::from_millis(seconds * 1000) };
        let request = EncodedRequest { key, body: vec![b'1'; size].into() };
        lock(&lane.gathered).waiting.push(WaitingRequest { request, published });
        answered
    }

    fn ids(batch: Option<RequestBatch>) -> Vec<String> {
        let requests = batch.into_iter().flat_map(|it| it.requests);
        requests.map(|it| it.request.key.id.as_str().to_owned()).collect()
    }

    #[test]
    fn requests_of_one_second_share_a_message_in_the_order_in_which_they_came() {
        let mut lane = lane();
        let times = [("a", 1), ("b", 2), ("c", 1), ("d", 2)];
        let _calls = times.map(|(id, seconds)| gather(&lane, id, seconds, 10));
        assert_eq!(ids(lane.next(64)), ["a", "c"]);
        assert_eq!(ids(lane.next(64)), ["b", "d"]);
        assert!(lane.next(64).is_none());
        assert_eq!(lock(&lane.gathered).on_the_way, 0, "the next request opens a lane");
    }

    #[test]
    fn a_message_has_no_more_requests_and_bytes_than_workers_take() {
        let mut lane = lane();
        let _small: Vec<_> = (0..100).map(|n| gather(&lane, &format!("t{n}"), 1, 10)).collect();
        let batches = [lane.next(usize::MAX), lane.next(usize::MAX)].map(|it| ids(it).len());
        assert_eq!(batches, [REQUESTS_MAX, 100 - REQUESTS_MAX]);
        let _large: Vec<_> = ["a", "b", "c"].map(|id| gather(&lane, id, 1, REQUEST_MAX)).into();
        let batch = lane.next(64).unwrap();
        assert!(batch.body.into_bytes().len() <= BODY_MAX);
        assert_eq!(batch.requests.len(), 1);
        assert_eq!(ids(lane.next(64)), ["b"]);
    }

    #[test]
    fn at_most_the_set_number_of_requests_share_a_message() {
        let mut lane = lane();
        let _calls = ["a", "b", "c"].map(|id| gather(&lane, id, 1, 10));
        assert_eq!(ids(lane.next(1)), ["a"]);
        assert_eq!(ids(lane.next(2)), ["b", "c"]);
    }

    /// With two messages of one request each on their way, 256 callers got 400 transactions a second.
    #[test]
    fn the_smaller_messages_are_the_more_may_be_on_their_way() {
        assert_eq!([64, 16, 2, 1].map(on_the_way_max), [2, 8, 64, usize::MAX]);
    }

    #[test]
    fn a_call_that_has_ended_takes_its_request_back() {
        let mut lane = lane();
        let calls = ["a", "b"].map(|id| gather(&lane, id, 1, 10));
        let [ended, _waits] = calls;
        drop(ended);
        assert_eq!(ids(lane.next(64)), ["b"]);
    }

    #[test]
    fn a_lane_that_is_dropped_with_its_runtime_makes_room_for_another() {
        let lane = lane();
        let gathered = Arc::clone(&lane.gathered);
        drop(lane);
        assert_eq!(lock(&gathered).on_the_way, 0);
    }
}
