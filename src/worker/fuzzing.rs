//! Lets the fuzzer, `tests/fuzz`, call the functions that decode a worker's deliveries. They are not a
//! public interface.

use std::sync::Arc;

use lapin::message::Delivery as Message;

use crate::{
    protocol::{
        coordinator::Event,
        message::{Decision, Delivery},
    },
    wire::message::{JournalBegun, RequestMalformed},
    worker::{inbound, journal},
};

/// The events in a message from the queue of replies or of inquiries, and what is wrong with it.
pub fn reply(message: &Message, delivery: Option<Delivery>) -> (Vec<Event>, Vec<String>) {
    let inbound::Intake { events, complaints, prepares_max: _ } = inbound::reply(message, delivery);
    (events, complaints)
}

/// What a message from the queue of requests says.
///
/// # Errors
///
/// It can't be understood.
pub fn request(message: &Message, delivery: Delivery) -> Result<Event, RequestMalformed> {
    let deliveries = inbound::deliveries(message);
    let received = |request| Event::RequestReceived { request, delivery, deliveries };
    inbound::request(message).map(received)
}

/// The content of a message of the journal. `None`: it is not from a stream.
pub fn record(message: &Message) -> Option<(u64, Vec<Arc<Decision>>, Option<JournalBegun>)> {
    let record = journal::Record::of(message).ok()?;
    Some((record.offset, record.decisions, record.begun))
}
