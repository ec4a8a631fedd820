//! Decodes incoming messages into events of the coordinator, and reports what can't be understood.

use lapin::{
    message::Delivery as Message,
    types::{AMQPValue, FieldTable},
};

use crate::{
    protocol::{
        coordinator::Event,
        ids::ServiceName,
        message::{Delivery, Done, Inquiry, Prepare, Vote},
    },
    transport::amqp::{
        names::{self, PREPARES_MAX, REPEATED},
        rejected::{shown, undecodable, unreadable},
    },
    wire::message::{DecodedRequests, Item, Kind, decode, decode_requests, split_items},
};

/// The events in a message, and what is wrong with the rest of it.
#[derive(Debug, Default)]
pub(super) struct Intake {
    pub(super) events: Vec<Event>,
    pub(super) complaints: Vec<String>,
    /// How many prepares the instance that sent this takes in one message.
    pub(super) prepares_max: Option<(ServiceName, u16)>,
}

/// Decodes `message`, from the queue of replies or of inquiries. `delivery`: its name, if it must not be
/// acknowledged before what follows from it is safe.
pub(super) fn reply(message: &Message, delivery: Option<Delivery>) -> Intake {
    let mut inbound = Intake::default();
    if let Some(reason) = unreadable(message) {
        inbound.complaints.push(reason);
        return inbound;
    }
    let key = message.routing_key.as_str();
    let service = names::parts(key).and_then(|(_, service)| ServiceName::parse(service).ok());
    let Some(service) = service else {
        inbound.complaints.push(format!("routing key `{}` must read <to>.<service>", shown(key)));
        return inbound;
    };
    // The broker's permissions decide who may publish with which key, so the key is trusted.
    match kind_of(message) {
        Some(Kind::Vote) => inbound.items(message, |vote: Vote| {
            of(&service, &vote.service).map(|()| Event::VoteReceived(vote))
        }),
        Some(Kind::Done) => inbound.items(message, |done: Done| {
            of(&service, &done.service).map(|()| Event::DoneReceived { done, delivery })
        }),
        Some(Kind::Inquiry) => inbound.items(message, |inquiry: Inquiry| {
            of(&service, &inquiry.service).map(|()| Event::InquiryReceived(inquiry))
        }),
        // The broker found no slot for it in time.
        Some(Kind::Prepare) => inbound.items(message, |prepare: Prepare| {
            Ok(Event::PrepareReturned { key: prepare.key, service: service.clone() })
        }),
        other => inbound.complaints.push(unexpected(message, other)),
    }
    if let Some(Kind::Vote | Kind::Done) = kind_of(message) {
        inbound.prepares_max = Some((service, prepares_max(message)));
    }
    inbound
}

fn prepares_max(message: &Message) -> u16 {
    let headers = message.properties.headers().as_ref();
    let said = headers.and_then(|headers| number(headers, PREPARES_MAX));
    said.and_then(|said| u16::try_from(said).ok()).unwrap_or(1)
}

/// The requests in `message`. If the message is rejected as a whole, they name the producers that get
/// results.
pub(super) fn requests(message: &Message) -> DecodedRequests<'_> {
    let mut requests = decode_requests(&message.data, *message.properties.timestamp());
    let kind = message.properties.kind();
    let fault = match (unreadable(message), requests.fault.take()) {
        (Some(reason), _) => Some(reason),
        // A producer who names no type means requests: nothing else is sent here.
        (None, _) if kind.is_some() && kind_of(message) != Some(Kind::Request) => {
            Some(unexpected(message, kind_of(message)))
        }
        (None, fault) => fault.map(|fault| undecodable(message, &fault)),
    };
    DecodedRequests { fault, ..requests }
}

/// How often the requests of the message were delivered, this time included; those of a message that has
/// replaced another one were delivered before, and that counts as once.
pub(super) fn deliveries(message: &Message) -> u32 {
    let headers = message.properties.headers().as_ref();
    let is_repeated = headers.and_then(|headers| headers.inner().get(REPEATED));
    let before = u32::from(is_repeated == Some(&AMQPValue::Boolean(true)));
    // On a first delivery the header is not the broker's: tools that move messages keep headers.
    if !message.redelivered {
        return before + 1;
    }
    let earlier = headers.and_then(|headers| number(headers, "x-delivery-count"));
    let earlier = earlier.unwrap_or(0).max(1);
    u32::try_from(earlier).unwrap_or(u32::MAX).saturating_add(before + 1)
}

fn number(headers: &FieldTable, name: &str) -> Option<u64> {
    match headers.inner().get(name)? {
        AMQPValue::LongLongInt(number) => u64::try_from(*number).ok(),
        AMQPValue::LongInt(number) => u64::try_from(*number).ok(),
        AMQPValue::LongUInt(number) => Some(u64::from(*number)),
        AMQPValue::ShortInt(number) => u64::try_from(*number).ok(),
        AMQPValue::ShortUInt(number) => Some(u64::from(*number)),
        AMQPValue::ShortShortInt(number) => u64::try_from(*number).ok(),
        AMQPValue::ShortShortUInt(number) => Some(u64::from(*number)),
        AMQPValue::Boolean(_)
        | AMQPValue::Float(_)
        | AMQPValue::Double(_)
        | AMQPValue::DecimalValue(_)
        | AMQPValue::ShortString(_)
        | AMQPValue::LongString(_)
        | AMQPValue::FieldArray(_)
        | AMQPValue::Timestamp(_)
        | AMQPValue::FieldTable(_)
        | AMQPValue::ByteArray(_)
        | AMQPValue::Void => None,
    }
}

fn kind_of(message: &Message) -> Option<Kind> {
    message.properties.kind().as_ref().and_then(|text| Kind::parse_type(text.as_str()))
}

fn unexpected(message: &Message, kind: Option<Kind>) -> String {
    match (kind, message.properties.kind()) {
        (None, None) => "the message must have a type".to_owned(),
        (None, Some(text)) => format!("type `{}` is not known", shown(text.as_str())),
        (Some(kind), _) => format!("a message of type `{}` has no business here", kind.as_type()),
    }
}

fn of(key: &ServiceName, item: &ServiceName) -> Result<(), String> {
    if key == item {
        return Ok(());
    }
    Err(format!("an item of service `{item}` came under the routing key of `{key}`"))
}

impl Intake {
    fn items<T: Item>(&mut self, message: &Message, event: impl Fn(T) -> Result<Event, String>) {
        let items = match decode::<T>(&message.data) {
            Ok(items) => items,
            Err(error) => return self.complaints.push(undecodable(message, &error)),
        };
        (self.events, self.complaints) = split_items(items, event);
    }
}

#[cfg(test)]
mod tests {
    use lapin::{
        BasicProperties,
        message::Delivery as Message,
        types::{AMQPValue, FieldTable},
    };

    use super::{deliveries, reply, requests};
    use crate::{
        transport::amqp::{frames::UNREADABLE, names::REPEATED},
        wire::message::DecodedRequests,
    };

    /// Why `message` is rejected as a whole, and the producers that get results.
    fn rejected(message: &Message) -> (String, Vec<(String, u64, String)>) {
        let DecodedRequests { items, fault } = requests(message);
        let told = items.into_iter().map(|item| {
            let (id, requested_at, reply) = match item.read {
                Ok(it) => (Some(it.key.id), Some(it.key.requested_at), it.reply),
                Err(it) => (it.id, it.requested_at, it.reply),
            };
            let (id, reply) = (id.unwrap().as_str().to_owned(), reply.unwrap().as_str().to_owned());
            (id, requested_at.unwrap().as_millis(), reply)
        });
        (fault.unwrap(), told.collect())
    }

    fn reason(message: &Message) -> String {
        requests(message).fault.unwrap()
    }

    #[test]
    fn why_a_request_is_rejected_takes_a_kibibyte_whatever_its_type_is() {
        let mut message = Message::mock(1, "e".into(), "request".into(), false, Vec::new());
        message.properties = BasicProperties::default().with_type("\u{1}".repeat(255).into());
        let reason = reason(&message);
        assert!(reason.len() <= 1024 && reason.starts_with(r"type `\u{1}\u{1}"), "{reason}");
    }

    #[test]
    fn a_request_of_a_foreign_type_names_the_producer_that_is_to_be_told() {
        const BODY: &str = r#"{"id":"t1","involved_services":["a"],"data":{},"reply":"r1"}"#;
        for kind in ["OrderPlaced, Shop.Api", "dtc.request.v2", "dtc.vote.v1"] {
            let mut message = Message::mock(1, "e".into(), "request".into(), false, BODY.into());
            message.properties =
                BasicProperties::default().with_timestamp(7).with_type(kind.into());
            let (reason, told) = rejected(&message);
            assert!(reason.contains(kind), "{reason}");
            assert_eq!(told, [("t1".to_owned(), 7000, "r1".to_owned())]);
        }
    }

    #[test]
    fn a_count_of_deliveries_that_came_with_the_message_is_not_the_brokers() {
        let mut headers = FieldTable::default();
        headers.insert("x-delivery-count".into(), AMQPValue::LongLongInt(25));
        let properties = BasicProperties::default().with_headers(headers);
        for (redelivered, counted) in [(false, 1), (true, 26)] {
            let mut message =
                Message::mock(1, "e".into(), "request".into(), redelivered, Vec::new());
            message.properties = properties.clone();
            assert_eq!(deliveries(&message), counted);
        }
    }

    #[test]
    fn a_request_that_was_given_a_message_of_its_own_was_delivered_before() {
        let mut headers = FieldTable::default();
        headers.insert(REPEATED.into(), AMQPValue::Boolean(true));
        let properties = BasicProperties::default().with_headers(headers);
        for (redelivered, counted) in [(false, 2), (true, 3)] {
            let mut message =
                Message::mock(1, "e".into(), "request".into(), redelivered, Vec::new());
            message.properties = properties.clone();
            assert_eq!(deliveries(&message), counted);
        }
    }

    #[test]
    fn a_compressed_body_is_rejected_by_the_name_of_its_encoding() {
        let mut message =
            Message::mock(1, "e".into(), "request".into(), false, vec![0x1f, 0x8b, 8, 0]);
        let properties = BasicProperties::default().with_timestamp(7);
        message.properties = properties.clone().with_content_encoding("gzip".into());
        let compressed = reason(&message);
        assert!(
            compressed
                .starts_with("content encoding `gzip` is not known: a body must be plain JSON")
        );
        message.properties = properties.with_content_encoding("UTF-8".into());
        assert!(!reason(&message).contains("encoding"));
    }

    #[test]
    fn a_message_with_unreadable_headers_is_rejected_whatever_its_body_says() {
        const BODY: &str = r#"{"id":"t1","involved_services":["a"],"data":{},"reply":"r1"}"#;
        let mut headers = FieldTable::default();
        headers.insert(UNREADABLE.into(), AMQPValue::LongString("too deep   ".into()));
        let properties = BasicProperties::default().with_timestamp(7).with_headers(headers);
        let mut message = Message::mock(1, "e".into(), "request".into(), false, BODY.into());
        message.properties = properties.clone();
        let (reason, told) = rejected(&message);
        assert_eq!(reason, "the message is unreadable: too deep");
        assert_eq!(told, [("t1".to_owned(), 7000, "r1".to_owned())]);

        const DONE: &str = r#"[{"id":"t1","requested_at":1,"service":"a","instance":"p1",
            "done":true,"free":1}]"#;
        let mut message = Message::mock(1, "e".into(), "w1.a".into(), false, DONE.into());
        message.properties = properties.with_type("dtc.done.v1".into());
        let inbound = reply(&message, None);
        assert_eq!(inbound.events.len(), 0);
        assert_eq!(inbound.complaints, ["the message is unreadable: too deep"]);
    }

    #[test]
    fn many_bad_items_are_counted_and_the_good_ones_among_them_taken() {
        const DONE: &str = r#"{"id":"t1","requested_at":1,"service":"payments","instance":"p1",
            "done":true,"free":1}"#;
        let body = format!("[{}{DONE},{}5]", "5,".repeat(50_000), "5,".repeat(50_000));
        let mut message =
            Message::mock(1, "e".into(), "w1.payments".into(), false, body.into_bytes());
        message.properties = BasicProperties::default().with_type("dtc.done.v1".into());
        let inbound = reply(&message, None);
        assert_eq!(inbound.events.len(), 1);
        assert_eq!(inbound.complaints.len(), 11);
        assert_eq!(inbound.complaints.first().unwrap(), "done: $[0] is 5: must be an object");
        assert_eq!(inbound.complaints.last().unwrap(), "and 99991 more items");
    }
}
