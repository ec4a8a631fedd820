//! A door for the fuzzer, `tests/fuzz`, to what reads an instance's deliveries. Nobody else is
//! promised anything of it.

use lapin::message::Delivery as Message;

use crate::{
    participant::inbound::{self, SourceQueue},
    protocol::{message::Delivery, participant::Event},
};

/// The queues that a message may come by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FuzzedQueue {
    /// The service's prepares.
    Prepares,
    /// The instance's own.
    Own,
    /// The service's durable queue.
    Shared,
}

/// What a message says, and what is wrong with it. What is dealt with later has the number
/// `delivery`.
pub fn command(
    queue: FuzzedQueue,
    message: &Message,
    delivery: Delivery,
) -> (Vec<Event>, Option<String>) {
    let source = match queue {
        FuzzedQueue::Prepares => SourceQueue::Prepares,
        FuzzedQueue::Own => SourceQueue::Own,
        FuzzedQueue::Shared => SourceQueue::Shared,
    };
    let inbound::DecodedMessage { items, bad } = inbound::read(source, message);
    let events = items.into_iter().filter_map(|told| {
        let delivery = told.is_held(source).then_some(delivery);
        told.into_event(delivery)
    });
    (events.collect(), bad)
}
