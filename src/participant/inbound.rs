//! Turns the messages of workers into events of the core.
//!
//! The valid items of a message become events. If anything in it is invalid, there is also a reason to
//! reject it.

use lapin::message::Delivery as Message;

use crate::{
    protocol::{
        ids::WorkerId,
        message::{Delivery, Finish, Prepare, Query},
        participant::Event,
    },
    transport::amqp::rejected::{shown, undecodable, unreadable},
    wire::message::{Cancel, Item, Kind, decode, split_items},
};

/// The queue from which a message was delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum SourceQueue {
    /// The queue of the service's prepares: an unacknowledged one is a slot.
    Prepares,
    /// This instance's own queue, which is deleted with its connection.
    Own,
    /// The service's durable queue of finishes, which all instances consume.
    Shared,
}

/// The content of a message.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct DecodedMessage {
    pub(super) items: Vec<Inbound>,
    /// Why the message, or some of its items, must be rejected.
    pub(super) bad: Option<String>,
}

/// One item of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Inbound {
    Prepare { worker: WorkerId, redelivered: bool, prepare: Prepare },
    Query { worker: WorkerId, query: Query },
    Cancel(Cancel),
    Finish { worker: WorkerId, finish: Finish },
}

impl Inbound {
    /// The event for the core. `delivery`: what to acknowledge when the core is done with it, if that is
    /// later.
    pub(super) fn into_event(self, delivery: Option<Delivery>) -> Option<Event> {
        match self {
            Self::Prepare { worker, redelivered, prepare } => delivery
                .map(|delivery| Event::PrepareReceived { worker, delivery, redelivered, prepare }),
            Self::Query { worker, query } => Some(Event::QueryReceived { worker, query }),
            Self::Cancel(Cancel(key)) => Some(Event::CancelReceived(key)),
            Self::Finish { worker, finish } => {
                Some(Event::FinishReceived { worker, finish, delivery })
            }
        }
    }

    /// Whether its message is acknowledged only when the core is done with it.
    pub(super) fn is_held(&self, source: SourceQueue) -> bool {
        match self {
            Self::Prepare { .. } => true,
            Self::Finish { .. } => source == SourceQueue::Shared,
            Self::Query { .. } | Self::Cancel(_) => false,
        }
    }
}

/// Reads `message`, which was delivered from `source`.
pub(super) fn read(source: SourceQueue, message: &Message) -> DecodedMessage {
    if let Some(reason) = unreadable(message) {
        return bad(reason);
    }
    let kind = message.properties.kind().as_ref().map(|kind| kind.as_str());
    let known = kind.and_then(Kind::parse_type);
    let worker = || worker_of(message);
    match (source, known) {
        (SourceQueue::Prepares, Some(Kind::Prepare)) => read_prepares(message),
        (SourceQueue::Own | SourceQueue::Shared, Some(Kind::Query)) => {
            read_items(message, worker(), |worker, query| Inbound::Query { worker, query })
        }
        (SourceQueue::Own | SourceQueue::Shared, Some(Kind::Finish)) => {
            read_items(message, worker(), |worker, finish| Inbound::Finish { worker, finish })
        }
        // Nobody waits for an answer to a cancel.
        (SourceQueue::Own | SourceQueue::Shared, Some(Kind::Cancel)) => {
            read_items(message, Ok(()), |(), cancel| Inbound::Cancel(cancel))
        }
        (SourceQueue::Prepares | SourceQueue::Own | SourceQueue::Shared, _) => {
            let kind =
                kind.map_or_else(|| "missing".to_owned(), |kind| format!("`{}`", shown(kind)));
            bad(format!("the property `type` is {kind}: this queue takes no such messages"))
        }
    }
}

fn bad(reason: String) -> DecodedMessage {
    DecodedMessage { items: Vec::new(), bad: Some(reason) }
}

/// Reads a message of prepares. Each prepare, and the message itself, takes a slot, so an empty message
/// is invalid.
fn read_prepares(message: &Message) -> DecodedMessage {
    let redelivered = message.redelivered;
    let read = read_items(message, worker_of(message), |worker, prepare| Inbound::Prepare {
        worker,
        redelivered,
        prepare,
    });
    match read.items.is_empty() && read.bad.is_none() {
        true => bad("has no items: a prepare has at least one".to_owned()),
        false => read,
    }
}

fn read_items<T: Item, W: Clone>(
    message: &Message,
    worker: Result<W, String>,
    into_inbound: impl Fn(W, T) -> Inbound,
) -> DecodedMessage {
    let (worker, items) = match (worker, decode::<T>(&message.data)) {
        (Ok(worker), Ok(items)) => (worker, items),
        (Err(reason), Ok(_)) => return bad(reason),
        (_, Err(malformed)) => return bad(undecodable(message, &malformed)),
    };
    let (items, complaints) = split_items(items, |item| Ok(into_inbound(worker.clone(), item)));
    DecodedMessage { items, bad: (!complaints.is_empty()).then(|| complaints.join("\n")) }
}

/// The worker that waits for the answer.
fn worker_of(message: &Message) -> Result<WorkerId, String> {
    match message.properties.reply_to() {
        Some(worker) => WorkerId::parse(worker.as_str())
            .map_err(|error| format!("the property `reply_to`: {error}")),
        None => Err("the property `reply_to` is missing: must be the worker's id".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use lapin::{
        BasicProperties,
        message::Delivery as Message,
        types::{AMQPValue, FieldTable},
    };

    use super::{DecodedMessage, Inbound, SourceQueue, read};
    use crate::transport::amqp::frames::UNREADABLE;

    const QUERY: &str =
        r#"{"id":"t1","requested_at":1,"request_hash":"000102030405060708090a0b0c0d0e0f"}"#;
    const PREPARE: &str = r#"{"id":"t1","requested_at":1,"data":{},"deadline":5000,"repeated":false,
        "request_hash":"000102030405060708090a0b0c0d0e0f"}"#;

    fn message(kind: &'static str, body: String) -> Message {
        let mut message = Message::mock(1, "e".into(), "k".into(), false, body.into_bytes());
        message.properties =
            BasicProperties::default().with_type(kind.into()).with_reply_to("w1".into());
        message
    }

    fn reason(read: &DecodedMessage) -> &str {
        read.bad.as_deref().unwrap_or_default()
    }

    #[test]
    fn valid_items_count_although_others_are_invalid() {
        let body = format!(r#"[{QUERY},{{"id":"t 2"}},{QUERY}]"#);
        let read = read(SourceQueue::Own, &message("dtc.query.v1", body));
        assert_eq!(read.items.len(), 2);
        assert!(matches!(read.items[0], Inbound::Query { .. }));
        assert!(reason(&read).contains("$[1]"), "{read:?}");
    }

    #[test]
    fn a_message_with_unreadable_headers_is_rejected_whatever_its_body_says() {
        for (source, kind, body) in [
            (SourceQueue::Prepares, "dtc.prepare.v1", PREPARE),
            (SourceQueue::Own, "dtc.query.v1", QUERY),
            (SourceQueue::Shared, "dtc.query.v1", QUERY),
        ] {
            let mut message = message(kind, format!("[{body}]"));
            assert_eq!(read(source, &message).items.len(), 1);
            let mut headers = FieldTable::default();
            headers.insert(UNREADABLE.into(), AMQPValue::LongString("too deep".into()));
            message.properties = message.properties.with_headers(headers);
            let read = read(source, &message);
            assert!(read.items.is_empty() && reason(&read).ends_with(": too deep"), "{read:?}");
        }
    }

    #[test]
    fn the_type_of_a_rejected_message_is_quoted_on_one_line() {
        let read = read(SourceQueue::Own, &message("a\n\u{1b}", "[]".to_owned()));
        assert!(reason(&read).contains(r"`a\n\u{1b}`"), "{read:?}");
    }

    #[test]
    fn after_ten_invalid_items_the_rest_are_counted() {
        let body = format!("[{}{QUERY}]", "5,".repeat(100_000));
        let read = read(SourceQueue::Own, &message("dtc.query.v1", body));
        assert_eq!(read.items.len(), 1);
        assert_eq!(reason(&read).lines().count(), 11);
        assert!(reason(&read).ends_with("\nand 99990 more items"), "{read:?}");
    }

    #[test]
    fn a_prepare_message_has_at_least_one_item() {
        let one = read(SourceQueue::Prepares, &message("dtc.prepare.v1", format!("[{PREPARE}]")));
        assert_eq!((one.items.len(), &one.bad), (1, &None));
        let two = read(
            SourceQueue::Prepares,
            &message("dtc.prepare.v1", format!("[{PREPARE},{PREPARE}]")),
        );
        assert_eq!((two.items.len(), &two.bad), (2, &None));
        let none = read(SourceQueue::Prepares, &message("dtc.prepare.v1", "[]".to_owned()));
        assert!(reason(&none).contains("has no items"), "{none:?}");
    }

    #[test]
    fn a_message_of_a_kind_that_its_queue_does_not_take_is_rejected() {
        for (source, kind) in [
            (SourceQueue::Prepares, "dtc.finish.v1"),
            (SourceQueue::Own, "dtc.prepare.v1"),
            (SourceQueue::Shared, "dtc.vote.v1"),
            (SourceQueue::Own, "dtc.query.v2"),
        ] {
            let read = read(source, &message(kind, format!("[{QUERY}]")));
            assert!(read.items.is_empty() && reason(&read).contains(kind), "{read:?}");
        }
    }

    #[test]
    fn a_query_without_a_worker_to_answer_is_rejected() {
        for reply_to in [None, Some("a.b"), Some("")] {
            let mut message = message("dtc.query.v1", format!("[{QUERY}]"));
            message.properties = BasicProperties::default().with_type("dtc.query.v1".into());
            if let Some(reply_to) = reply_to {
                message.properties = message.properties.with_reply_to(reply_to.into());
            }
            let read = read(SourceQueue::Own, &message);
            assert!(read.items.is_empty() && reason(&read).contains("`reply_to`"), "{read:?}");
        }
    }
}
