//! When a message of requests is acknowledged: a message may hold several requests, and the broker knows
//! only the message.
//!
//! Each request of a message has a [`Delivery`] of its own, which the coordinator settles. The message is
//! settled with the last of them. If one of them was released, the message returns to the queue: then a
//! worker looks up each of its requests again, like any other.
//!
//! **Invariant:** a message is acknowledged only if every request in it is settled, and none was released.

use std::collections::BTreeMap;

use crate::protocol::message::Delivery;

/// How many requests a message may hold.
pub const REQUESTS_MAX: usize = 64;

/// How many bits of a [`Delivery`] tell which request of its message it is.
const INDEX_BITS: u32 = REQUESTS_MAX.ilog2();

/// How many bits the number of a message may have.
pub const MESSAGE_BITS: u32 = u64::BITS - INDEX_BITS;

/// A worker's number for a message that it has taken: it takes no two under the same number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MessageNumber(u64);

/// What becomes of a request, or of a message.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Settlement {
    /// It must not come again.
    Acknowledge,
    /// It returns to the queue.
    Requeue,
}

/// The messages that a worker has taken, and which of their requests are not settled.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct RequestMessages {
    taken: BTreeMap<MessageNumber, TakenMessage>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct TakenMessage {
    /// A bit for each request that is not settled.
    unsettled: u64,
    /// What becomes of the message, as far as is known.
    settlement: Settlement,
}

impl MessageNumber {
    /// The message with this number, which has at most [`MESSAGE_BITS`] bits.
    pub const fn new(number: u64) -> Self {
        debug_assert!(number >> MESSAGE_BITS == 0, "the number leaves room for an index");
        Self(number)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The message that a request came in.
    pub const fn of(delivery: Delivery) -> Self {
        Self(delivery.0 >> INDEX_BITS)
    }
}

impl RequestMessages {
    /// Notes that a message with `n_requests` requests was taken: at least one, and at most
    /// [`REQUESTS_MAX`]. Returns the deliveries of its requests, in order.
    pub fn take(
        &mut self,
        message: MessageNumber,
        n_requests: usize,
    ) -> impl Iterator<Item = Delivery> + use<> {
        debug_assert!((1..=REQUESTS_MAX).contains(&n_requests), "a message holds 1 to 64 requests");
        let n_requests = n_requests.clamp(1, REQUESTS_MAX) as u32;
        let unsettled = u64::MAX >> (u64::BITS - n_requests);
        self.taken.insert(message, TakenMessage { unsettled, settlement: Settlement::Acknowledge });
        (0..u64::from(n_requests)).map(move |index| Delivery(message.0 << INDEX_BITS | index))
    }

    /// Settles a request. If that settles its message, returns what becomes of the message. A request that
    /// is settled already, or whose message this worker doesn't have, changes nothing.
    pub fn settle(
        &mut self,
        request: Delivery,
        settlement: Settlement,
    ) -> Option<(MessageNumber, Settlement)> {
        let number = MessageNumber::of(request);
        let message = self.taken.get_mut(&number)?;
        let bit = 1_u64 << (request.0 & (REQUESTS_MAX as u64 - 1));
        if message.unsettled & bit == 0 {
            return None;
        }
        message.unsettled &= !bit;
        if settlement == Settlement::Requeue {
            message.settlement = Settlement::Requeue;
        }
        if message.unsettled != 0 {
            return None;
        }
        let settlement = message.settlement;
        self.taken.remove(&number);
        Some((number, settlement))
    }
}

#[cfg(test)]
mod tests {
    use super::{MessageNumber, REQUESTS_MAX, RequestMessages, Settlement};
    use crate::protocol::message::Delivery;

    const SEVEN: MessageNumber = MessageNumber::new(7);

    #[test]
    fn a_message_is_acknowledged_with_the_last_of_its_requests() {
        for n_requests in [1, 2, 63, REQUESTS_MAX] {
            let mut messages = RequestMessages::default();
            let mut requests: Vec<_> = messages.take(SEVEN, n_requests).collect();
            assert_eq!(requests.len(), n_requests);
            assert!(requests.iter().all(|it| MessageNumber::of(*it) == SEVEN));
            let last = requests.remove(n_requests / 2);
            for request in requests {
                assert_eq!(messages.settle(request, Settlement::Acknowledge), None);
            }
            let settled = messages.settle(last, Settlement::Acknowledge);
            assert_eq!(settled, Some((SEVEN, Settlement::Acknowledge)));
            assert_eq!(messages, RequestMessages::default());
        }
    }

    #[test]
    fn a_message_returns_to_the_queue_if_one_of_its_requests_was_released() {
        for released in 0..3 {
            let mut messages = RequestMessages::default();
            let requests: Vec<_> = messages.take(SEVEN, 3).collect();
            let mut settled = None;
            for (index, request) in requests.into_iter().enumerate() {
                assert_eq!(settled, None);
                let how =
                    if index == released { Settlement::Requeue } else { Settlement::Acknowledge };
                settled = messages.settle(request, how);
            }
            assert_eq!(settled, Some((SEVEN, Settlement::Requeue)));
        }
    }

    #[test]
    fn a_request_that_is_settled_twice_counts_once() {
        let mut messages = RequestMessages::default();
        let requests: Vec<_> = messages.take(SEVEN, 2).collect();
        for _ in 0..2 {
            assert_eq!(messages.settle(requests[0], Settlement::Acknowledge), None);
        }
        assert!(messages.settle(requests[1], Settlement::Acknowledge).is_some());
        assert_eq!(messages.settle(requests[1], Settlement::Acknowledge), None);
        assert_eq!(
            messages.settle(Delivery(3), Settlement::Acknowledge),
            None,
            "it has no message"
        );
    }
}
