//! Lets the fuzzer, `tests/fuzz`, call the functions that decode a worker's deliveries. They are not a
//! public interface.

use std::sync::Arc;

use lapin::message::Delivery as Message;

use crate::{
    protocol::{
        coordinator::Event,
        message::{Decision, Delivery},
    },
    wire::message::{DecodedRequests, JournalBegun},
    worker::{inbound, journal},
};

/// The events in a message from the queue of replies or of inquiries, and what is wrong with it.
pub fn reply(message: &Message, delivery: Option<Delivery>) -> (Vec<Event>, Vec<String>) {
    let inbound::Intake { events, complaints, prepares_max: _ } = inbound::reply(message, delivery);
    (events, complaints)
}

/// The requests in a message from the queue of requests, and how often it was delivered.
pub fn requests(message: &Message) -> (DecodedRequests<'_>, u32) {
    (inbound::requests(message), inbound::deliveries(message))
}

/// The content of a message of the journal. `None`: it is not from a stream.
pub fn record(message: &Message) -> Option<(u64, Vec<Arc<Decision>>, Option<JournalBegun>)> {
    let record = journal::Record::of(message).ok()?;
    Some((record.offset, record.decisions, record.begun))
}
