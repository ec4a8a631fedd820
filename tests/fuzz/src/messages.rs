//! Messages of several requests: a model of which of them are settled.
//!
//! Each two bytes are a step. The first byte is the number of a message, of which there are few; the second
//! one takes the message with so many requests, or settles one of its requests.

use std::collections::{BTreeMap, BTreeSet};

use dtc::protocol::{
    message::Delivery,
    request_messages::{MessageNumber, REQUESTS_MAX, RequestMessages, Settlement},
};

/// What is known of a message: the requests that are not settled, and whether one was released.
#[derive(Default)]
struct Message {
    unsettled: BTreeSet<Delivery>,
    is_released: bool,
}

/// A message is settled once: with the last of its requests, and as the requests were.
pub fn messages(input: &[u8]) {
    let mut messages = RequestMessages::default();
    let mut known: BTreeMap<MessageNumber, Message> = BTreeMap::new();
    let mut named: BTreeMap<MessageNumber, Vec<Delivery>> = BTreeMap::new();
    for step in input.chunks_exact(2) {
        let number = MessageNumber::new(u64::from(step[0] % 8));
        let choice = usize::from(step[1]);
        let Some(taken) = named.get(&number).filter(|_| step[0] < 192) else {
            // A worker takes no two messages under one number.
            if known.contains_key(&number) {
                continue;
            }
            let n_requests = choice % REQUESTS_MAX + 1;
            let taken: Vec<_> = messages.take(number, n_requests).collect();
            assert_eq!(taken.len(), n_requests);
            assert!(taken.iter().all(|it| MessageNumber::of(*it) == number));
            let unsettled: BTreeSet<_> = taken.iter().copied().collect();
            assert_eq!(unsettled.len(), n_requests, "each has a delivery of its own");
            known.insert(number, Message { unsettled, is_released: false });
            named.insert(number, taken);
            continue;
        };
        let delivery = taken[choice % taken.len()];
        let settlement =
            if step[0] & 8 == 0 { Settlement::Acknowledge } else { Settlement::Requeue };
        let settled = messages.settle(delivery, settlement);
        let expected = known.get_mut(&number).and_then(|message| {
            if !message.unsettled.remove(&delivery) {
                return None;
            }
            message.is_released |= settlement == Settlement::Requeue;
            let whole = match message.is_released {
                true => Settlement::Requeue,
                false => Settlement::Acknowledge,
            };
            message.unsettled.is_empty().then_some((number, whole))
        });
        assert_eq!(settled, expected);
        if settled.is_some() {
            known.remove(&number);
        }
    }
}
