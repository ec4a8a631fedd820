//! Setting aside messages that can't be read.
//!
//! The message goes unchanged to the queue of rejected messages; headers give the reason, and where
//! it came from.

use std::fmt;

use lapin::{
    message::Delivery,
    types::{AMQPValue, FieldTable, ShortString},
};

use crate::transport::amqp::{frames::UNREADABLE, names::Names, publisher::OutgoingMessage};

/// To how many characters a reason is cut.
const REASON_MAX: usize = 1024;

/// `delivery`, which came from `queue`, as a message to the queue of rejected messages.
pub fn rejected(names: &Names, queue: &str, delivery: &Delivery, reason: &str) -> OutgoingMessage {
    let mut headers = FieldTable::default();
    put(&mut headers, "reason", reason);
    put(&mut headers, "queue", queue);
    put(&mut headers, "exchange", delivery.exchange.as_str());
    put(&mut headers, "routing_key", delivery.routing_key.as_str());
    if let Some(kind) = delivery.properties.kind() {
        put(&mut headers, "type", kind.as_str());
    }
    if let Some(encoding) = delivery.properties.content_encoding() {
        put(&mut headers, "content_encoding", encoding.as_str());
    }
    OutgoingMessage {
        body: delivery.data.clone(),
        message_id: delivery.properties.message_id().clone(),
        timestamp: *delivery.properties.timestamp(),
        ..set_aside(names, headers)
    }
}

/// A request that is valid but can't be served, as a message to the queue of rejected messages:
/// `body` as it is sent, and the reason.
pub fn rejected_request(
    names: &Names,
    body: Vec<u8>,
    requested_at_seconds: u64,
    reason: &str,
) -> OutgoingMessage {
    let mut headers = FieldTable::default();
    put(&mut headers, "reason", reason);
    put(&mut headers, "queue", names.requests().as_str());
    OutgoingMessage { body, timestamp: Some(requested_at_seconds), ..set_aside(names, headers) }
}

/// Why the headers of `delivery` could not be read. Such a message is set aside whatever else it
/// contains: what its sender meant by its headers is unknown.
pub fn unreadable(delivery: &Delivery) -> Option<String> {
    let headers = delivery.properties.headers().as_ref()?;
    let why = headers.inner().get(UNREADABLE)?.as_long_string();
    let why = why.map(|why| shown(why.to_string().trim_end())).unwrap_or_default();
    Some(format!("the message is unreadable: {why}"))
}

/// The reason for a body that can't be decoded, by `error`; it mentions the message's content
/// encoding, if it has one.
pub fn undecodable(delivery: &Delivery, error: &dyn fmt::Display) -> String {
    const PLAIN: [&str; 4] = ["", "utf-8", "utf8", "identity"];
    let encoding = delivery.properties.content_encoding().as_ref().map_or("", |it| it.as_str());
    if PLAIN.iter().any(|plain| encoding.eq_ignore_ascii_case(plain)) {
        return error.to_string();
    }
    let encoding = shown(encoding);
    format!("content encoding `{encoding}` is not known: a body must be plain JSON; {error}")
}

/// A sender's text, short and on one line, for a reason.
pub fn shown(text: &str) -> String {
    const CHARS_MAX: usize = 64;
    text.chars().take(CHARS_MAX).flat_map(char::escape_debug).collect()
}

fn set_aside(names: &Names, headers: FieldTable) -> OutgoingMessage {
    OutgoingMessage {
        key: names.rejected(),
        persistent: true,
        mandatory: true,
        headers: Some(headers),
        ..OutgoingMessage::default()
    }
}

fn put(headers: &mut FieldTable, name: &'static str, value: &str) {
    let value: String = value.chars().take(REASON_MAX).collect();
    headers.insert(ShortString::from(name), AMQPValue::LongString(value.into()));
}
