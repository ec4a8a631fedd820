//! Access for the fuzzer, `tests/fuzz`, to the code that reads an instance's deliveries. It is not a
//! public interface.

use lapin::message::Delivery as Message;

use crate::{
    participant::inbound::{self, SourceQueue},
    protocol::{message::Delivery, participant::Event},
};

/// The queue from which a message was delivered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FuzzedQueue {
    /// The service's prepares.
    Prepares,
    /// The instance's own.
    Own,
    /// The service's durable queue.
    Shared,
}

/// The events of a message, and what is wrong with it. Items that are acknowledged later have the id
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
    let events = items.into_iter().filter_map(|item| {
        let delivery = item.is_held(source).then_some(delivery);
        item.into_event(delivery)
    });
    (events.collect(), bad)
}
