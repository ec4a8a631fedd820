//! Deliveries: properties, headers and routing keys along with a body.
//!
//! The input is lines, and after an empty one the body:
//!
//! ```text
//! key w1.stock
//! type dtc.vote.v1
//! reply_to w1
//! timestamp 1700000000
//! id m-1
//! redelivered
//! header x-delivery-count i64 5
//!
//! [{"id":"TX1",…}]
//! ```

use dtc::protocol::message::{Done, Finish, Inquiry, Prepare, Query, Vote};
use dtc::{
    participant::fuzzing::{FuzzedQueue, command},
    protocol::{coordinator, message::Delivery, participant},
    wire::message::{BODY_MAX, Cancel, DecodedRequests, Item, Kind, RequestMalformed, decode},
    worker::fuzzing::{record, reply, requests},
};
use lapin::{
    BasicProperties,
    message::Delivery as Message,
    types::{AMQPValue, DecimalValue, FieldArray, FieldTable, LongString, ShortString},
};

use crate::complaints::is_one_line;

/// How much all that is wrong with one message may come to.
const COMPLAINTS_MAX: usize = 64 * 1024;

const NUMBER: Delivery = Delivery(7);

/// A message, read as it would be from each queue.
pub fn headers(input: &[u8]) {
    let message = message(input);
    let kind = message.properties.kind().as_ref().and_then(|it| Kind::parse_type(it.as_str()));
    is_read_as_a_reply(&message, kind);
    is_read_as_a_request(&message, kind);
    for queue in [FuzzedQueue::Prepares, FuzzedQueue::Own, FuzzedQueue::Shared] {
        is_read_as_a_command(queue, &message, kind);
    }
    is_read_as_a_record(&message, kind);
}

fn is_read_as_a_reply(message: &Message, kind: Option<Kind>) {
    let (events, complaints) = reply(message, Some(NUMBER));
    let again = reply(message, Some(NUMBER));
    assert_eq!((&events, &complaints), (&again.0, &again.1), "read twice");
    are_bounded(&complaints);
    let key = message.routing_key.as_str();
    let about = key.split_once('.').map(|(_, about)| about);
    let items = match kind {
        Some(Kind::Vote) => n_items::<Vote>(message),
        Some(Kind::Done) => n_items::<Done>(message),
        Some(Kind::Inquiry) => n_items::<Inquiry>(message),
        Some(Kind::Prepare) => n_items::<Prepare>(message),
        _ => None,
    };
    // Nothing is lost without a word.
    assert!(!complaints.is_empty() || items == Some(events.len()), "{events:?}");
    assert!(events.len() <= items.unwrap_or_default());
    for event in events {
        let (is_of_its_kind, service) = match event {
            coordinator::Event::VoteReceived(vote) => (kind == Some(Kind::Vote), vote.service),
            coordinator::Event::DoneReceived { done, delivery } => {
                assert_eq!(delivery, Some(NUMBER));
                (kind == Some(Kind::Done), done.service)
            }
            coordinator::Event::InquiryReceived(inquiry) => {
                (kind == Some(Kind::Inquiry), inquiry.service)
            }
            coordinator::Event::PrepareReturned { service, .. } => {
                (kind == Some(Kind::Prepare), service)
            }
            other => panic!("{other:?} is no reply"),
        };
        assert!(is_of_its_kind && Some(service.as_str()) == about, "{service} by {key}");
    }
}

fn is_read_as_a_request(message: &Message, kind: Option<Kind>) {
    let (DecodedRequests { items, fault }, deliveries) = requests(message);
    let (again, _) = requests(message);
    assert_eq!((&items, &fault), (&again.items, &again.fault), "read twice");
    assert!(deliveries > u32::from(message.redelivered), "{deliveries}");
    if let Some(reason) = fault {
        assert!((1..=2048).contains(&reason.len()), "{reason}");
        return is_one_line(&reason);
    }
    assert!(kind == Some(Kind::Request) || message.properties.kind().is_none());
    assert!(message.data.len() <= BODY_MAX && !items.is_empty());
    for item in items {
        match item.read {
            Ok(request) => {
                let seconds = request.key.requested_at.as_millis() / 1000;
                assert_eq!(Some(seconds), *message.properties.timestamp());
            }
            Err(RequestMalformed { reason, .. }) => {
                assert!((1..=1024).contains(&reason.len()), "{reason}");
                is_one_line(&reason);
            }
        }
    }
}

fn is_read_as_a_command(queue: FuzzedQueue, message: &Message, kind: Option<Kind>) {
    let (events, bad) = command(queue, message, NUMBER);
    assert_eq!((&events, &bad), (&command(queue, message, NUMBER).0, &bad), "read twice");
    are_bounded(bad.as_slice());
    let items = match (queue, kind) {
        (FuzzedQueue::Prepares, Some(Kind::Prepare)) => {
            n_items::<Prepare>(message).filter(|n| *n == 1)
        }
        (FuzzedQueue::Own | FuzzedQueue::Shared, Some(Kind::Query)) => n_items::<Query>(message),
        (FuzzedQueue::Own | FuzzedQueue::Shared, Some(Kind::Cancel)) => n_items::<Cancel>(message),
        (FuzzedQueue::Own | FuzzedQueue::Shared, Some(Kind::Finish)) => n_items::<Finish>(message),
        _ => None,
    };
    assert!(bad.is_some() || items == Some(events.len()), "{events:?}");
    assert!(events.len() <= items.unwrap_or_default());
    let worker = message.properties.reply_to().as_ref().map(ShortString::as_str);
    for event in events {
        match event {
            participant::Event::PrepareReceived { worker: to, delivery, redelivered, .. } => {
                assert_eq!((Some(to.as_str()), delivery), (worker, NUMBER));
                assert!(queue == FuzzedQueue::Prepares && redelivered == message.redelivered);
            }
            participant::Event::QueryReceived { worker: to, .. } => {
                assert!(queue != FuzzedQueue::Prepares && Some(to.as_str()) == worker);
            }
            participant::Event::CancelReceived(_) => assert_ne!(queue, FuzzedQueue::Prepares),
            participant::Event::FinishReceived { worker: to, delivery, .. } => {
                assert_eq!(Some(to.as_str()), worker);
                assert_eq!(delivery, (queue == FuzzedQueue::Shared).then_some(NUMBER));
            }
            other => panic!("{other:?} is no command"),
        }
    }
}

fn is_read_as_a_record(message: &Message, kind: Option<Kind>) {
    let read = record(message);
    assert_eq!(read, record(message), "read twice");
    let headers = message.properties.headers().as_ref();
    let offset = match headers.and_then(|it| it.inner().get("x-stream-offset")) {
        Some(AMQPValue::LongLongInt(offset)) => u64::try_from(*offset).ok(),
        _ => None,
    };
    assert_eq!(read.as_ref().map(|(offset, ..)| *offset), offset);
    let Some((_, decisions, begun)) = read else { return };
    assert!(decisions.is_empty() || kind == Some(Kind::Decision));
    assert!(begun.is_none() || kind == Some(Kind::JournalBegun));
}

/// How many items the body has, good and bad.
fn n_items<T: Item>(message: &Message) -> Option<usize> {
    decode::<T>(&message.data).ok().map(|items| items.len())
}

fn are_bounded(complaints: &[String]) {
    let size: usize = complaints.iter().map(String::len).sum();
    assert!(size <= COMPLAINTS_MAX, "{size} bytes, {} complaints", complaints.len());
    assert!(complaints.iter().all(|it| !it.is_empty()));
}

fn message(input: &[u8]) -> Message {
    let mut message = Message::mock(1, "e".into(), "".into(), false, Vec::new());
    let mut properties = BasicProperties::default();
    let mut headers = FieldTable::default();
    let mut rest = input;
    while !rest.is_empty() {
        let end = rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
        let (line, after) = rest.split_at(end);
        rest = after.get(1..).unwrap_or_default();
        if line.is_empty() {
            break;
        }
        let line = String::from_utf8_lossy(line);
        let (word, value) = line.split_once(' ').unwrap_or((&line, ""));
        match word {
            "key" => message.routing_key = short(value),
            "type" => properties = properties.with_type(short(value)),
            "reply_to" => properties = properties.with_reply_to(short(value)),
            "id" => properties = properties.with_message_id(short(value)),
            "redelivered" => message.redelivered = true,
            "timestamp" => {
                properties = properties.with_timestamp(value.parse().unwrap_or_default());
            }
            "header" => {
                let (name, value) = value.split_once(' ').unwrap_or((value, ""));
                headers.insert(short(name), header(value));
            }
            _ => {}
        }
    }
    if !headers.inner().is_empty() {
        properties = properties.with_headers(headers);
    }
    message.properties = properties;
    message.data = rest.to_vec();
    message
}

/// As much as AMQP has room for.
fn short(text: &str) -> ShortString {
    let end = (0..=text.len().min(255)).rev().find(|end| text.is_char_boundary(*end));
    text[..end.unwrap_or(0)].into()
}

fn header(text: &str) -> AMQPValue {
    let (kind, value) = text.split_once(' ').unwrap_or((text, ""));
    let number = value.parse::<i128>().unwrap_or_default();
    match kind {
        "bool" => AMQPValue::Boolean(number != 0),
        "i8" => AMQPValue::ShortShortInt(number as i8),
        "u8" => AMQPValue::ShortShortUInt(number as u8),
        "i16" => AMQPValue::ShortInt(number as i16),
        "u16" => AMQPValue::ShortUInt(number as u16),
        "i32" => AMQPValue::LongInt(number as i32),
        "u32" => AMQPValue::LongUInt(number as u32),
        "i64" => AMQPValue::LongLongInt(number as i64),
        "f32" => AMQPValue::Float(number as f32),
        "f64" => AMQPValue::Double(number as f64),
        "decimal" => AMQPValue::DecimalValue(DecimalValue { scale: 1, value: number as u32 }),
        "short" => AMQPValue::ShortString(short(value)),
        "long" => AMQPValue::LongString(LongString::from(value.as_bytes())),
        "time" => AMQPValue::Timestamp(number as u64),
        "bytes" => AMQPValue::ByteArray(value.as_bytes().into()),
        "list" => AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::Void])),
        "table" => AMQPValue::FieldTable(FieldTable::default()),
        _ => AMQPValue::Void,
    }
}
