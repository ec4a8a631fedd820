//! Frames that lapin could not parse, from a peer that writes them by hand: the broker passes them
//! on, and no consumer is harmed.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use dtc::{
    Pem, Tls,
    transport::amqp::{
        connection::{Broker as Address, BrokerConnection, close},
        frames::UNREADABLE,
    },
};
use futures_util::{StreamExt, future::join_all};
use lapin::{
    BasicProperties, Channel, Confirmation, Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicPublishOptions,
        ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
};

use crate::{
    broker::{Broker, Place, Secured, place},
    certificates::Authority,
};

const LIMIT: Duration = Duration::from_secs(60);
/// RabbitMQ's default.
const FRAME_MAX: usize = 131_072;

/// A connection with one channel and confirms, whose frames are written by hand.
struct Raw(TcpStream);

impl Raw {
    fn connect(place: &Place) -> Self {
        let (authority, vhost) = place.url["amqp://".len()..].rsplit_once('/').unwrap();
        let (user, address) = authority.rsplit_once('@').unwrap();
        let (user, password) = user.split_once(':').unwrap();
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut raw = Self(stream);
        raw.0.write_all(b"AMQP\0\0\x09\x01").unwrap();
        raw.answer([0, 10, 0, 10]);
        let plain = format!("\0{user}\0{password}");
        let start_ok =
            [&long(b"")[..], &short(b"PLAIN"), &long(plain.as_bytes()), &short(b"en_US")];
        raw.method(0, &[0, 10, 0, 11], &start_ok.concat());
        raw.answer([0, 10, 0, 30]);
        let frame_max = u32::try_from(FRAME_MAX).unwrap().to_be_bytes();
        raw.method(0, &[0, 10, 0, 31], &[&[0, 9][..], &frame_max, &[0, 0]].concat());
        let vhost = if vhost == "%2f" { "/" } else { vhost };
        raw.method(0, &[0, 10, 0, 40], &[&short(vhost.as_bytes())[..], &[0, 0]].concat());
        raw.answer([0, 10, 0, 41]);
        raw.method(1, &[0, 20, 0, 10], &[0]);
        raw.answer([0, 20, 0, 11]);
        raw.method(1, &[0, 85, 0, 10], &[0]);
        raw.answer([0, 85, 0, 11]);
        raw
    }

    /// Publishes a message with these properties to `amq.topic`, and waits until the broker has it.
    fn publish(&mut self, key: &[u8], (flags, properties): &(u16, Vec<u8>)) {
        let publish = [&[0, 0][..], &short(b"amq.topic"), &short(key), &[0]].concat();
        self.method(1, &[0, 60, 0, 40], &publish);
        let size = 5_u64.to_be_bytes();
        let header = [&[0, 60, 0, 0][..], &size, &flags.to_be_bytes(), properties].concat();
        self.frame(2, 1, &header);
        self.frame(3, 1, b"hello");
        self.answer([0, 60, 0, 80]);
    }

    fn method(&mut self, channel: u16, id: &[u8; 4], arguments: &[u8]) {
        self.frame(1, channel, &[id, arguments].concat());
    }

    fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let frame = [&[kind], &channel.to_be_bytes()[..], &size, payload, &[0xCE]].concat();
        assert!(frame.len() <= FRAME_MAX, "{}", frame.len());
        self.0.write_all(&frame).unwrap();
    }

    /// Reads up to the next method, which must be this one.
    fn answer(&mut self, id: [u8; 4]) {
        loop {
            let mut head = [0; 7];
            self.0.read_exact(&mut head).unwrap();
            let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
            let mut payload = vec![0; usize::try_from(size).unwrap() + 1];
            self.0.read_exact(&mut payload).unwrap();
            if head[0] == 1 {
                let said = String::from_utf8_lossy(&payload);
                assert_eq!(payload[..4], id, "the broker said {said:?}");
                return;
            }
        }
    }
}

fn short(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text].concat()
}

fn long(text: &[u8]) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes(), text].concat()
}

/// Properties with the id `m1` and headers that have so many levels of these kinds in turn.
fn nested(levels: usize, kinds: &[u8]) -> (u16, Vec<u8>) {
    let kind_of = |level: usize| kinds[level % kinds.len()];
    let mut inner = Vec::new();
    for level in (0..levels - 1).rev() {
        let name: &[u8] = if level == 0 || kind_of(level - 1) == b'F' { b"\x01n" } else { b"" };
        inner = [name, &[kind_of(level)], &long(&inner)].concat();
    }
    (1 << 13 | 1 << 7, [long(&inner), short(b"m1")].concat())
}

/// Everything that is sent to `amq.topic`.
async fn consume(channel: &Channel, queue_type: &str) -> Consumer {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(queue_type.into()));
    // A quorum queue can't be exclusive; only this test uses its virtual host.
    let is_quorum = queue_type == "quorum";
    let options = QueueDeclareOptions {
        durable: is_quorum,
        exclusive: !is_quorum,
        ..QueueDeclareOptions::default()
    };
    let queue = ShortString::from(format!("frames-{queue_type}"));
    channel.queue_declare(queue.clone(), options, arguments).await.unwrap();
    let (exchange, all) = ("amq.topic".into(), "#".into());
    let nothing = FieldTable::default;
    channel
        .queue_bind(queue.clone(), exchange, all, QueueBindOptions::default(), nothing())
        .await
        .unwrap();
    channel
        .basic_consume(queue, "".into(), BasicConsumeOptions::default(), nothing())
        .await
        .unwrap()
}

async fn next(consumer: &mut Consumer) -> Delivery {
    let delivery = tokio::time::timeout(LIMIT, consumer.next()).await.expect("it is delivered");
    let delivery = delivery.unwrap().unwrap();
    assert_eq!(delivery.data, b"hello");
    delivery
}

fn why(delivery: &Delivery) -> Option<String> {
    let marker = delivery.properties.headers().as_ref()?.inner().get(UNREADABLE)?;
    Some(marker.as_long_string()?.to_string())
}

/// One of our consumers gets everything that a peer may send, on one connection.
async fn is_read(address: &Address, place: &Place) {
    let connection = address.connect("test").await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let mut consumer = consume(&channel, "classic").await;
    let mut peer = Raw::connect(place);
    for kinds in [&b"F"[..], b"A", b"FA", b"AF"] {
        peer.publish(b"k", &nested(64, kinds));
        let delivery = next(&mut consumer).await;
        assert_eq!(why(&delivery), None);
        for levels in [65, 3000, 18_000] {
            peer.publish(b"k", &nested(levels, kinds));
            let delivery = next(&mut consumer).await;
            assert!(why(&delivery).unwrap().contains("more than 64 levels"), "{delivery:?}");
            assert_eq!(delivery.properties.message_id(), &Some("m1".into()));
        }
    }
    peer.publish(b"k.\xFF", &(1 << 15 | 1 << 5, [short(b"\xFFa"), short(b"t")].concat()));
    let delivery = next(&mut consumer).await;
    assert_eq!(delivery.routing_key.as_str(), "k.?");
    assert_eq!(delivery.properties.content_type(), &Some("?a".into()));
    peer.publish(b"k", &(1 << 13, long(b"\x03n\xC3sV")));
    let delivery = next(&mut consumer).await;
    assert!(connection.status().connected());
    let headers = delivery.properties.headers().clone().unwrap();
    assert!(headers.inner().contains_key("n?s"), "{headers:?}");
    close(&connection).await;
}

#[tokio::test]
async fn messages_that_lapin_could_not_parse_are_read_without_tls() {
    let broker = Broker::start();
    let place = broker.place();
    is_read(&wide(&place), &place).await;
}

#[tokio::test]
async fn messages_that_lapin_could_not_parse_are_read_over_tls() {
    let ours = Authority::new("ours");
    let own = ours.signs("broker", &["localhost"]);
    let broker = Broker::start_secured(Secured {
        certificate: &own.certificate,
        key: &own.key,
        clients_of: None,
    });
    let place = broker.place();
    let (_, vhost) = place.url.rsplit_once('/').unwrap();
    let url = format!(
        "amqps://guest:guest@localhost:{}/{vhost}?frame_max={FRAME_MAX}",
        broker.secure_port()
    );
    let tls = Tls::new().ca(Pem::Text(ours.certificate().to_owned()));
    is_read(&Address::new(url.parse().unwrap(), "test").with_tls(tls), &place).await;
}

#[tokio::test]
async fn a_content_header_that_the_broker_enlarged_beyond_a_frame_is_read() {
    let broker = Broker::start();
    let place = broker.place();
    let connection = wide(&place).connect("test").await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let mut consumer = consume(&channel, "quorum").await;
    // As large as a frame may be: the broker counts deliveries in another header.
    let empty = long(b"\x01tS\0\0\0\0").len() + 7 + 12 + 2 + 1;
    let text = [&b"\x01tS"[..], &long(&vec![b'x'; FRAME_MAX - empty])].concat();
    Raw::connect(&place).publish(b"k", &(1 << 13, long(&text)));
    let delivery = next(&mut consumer).await;
    assert_eq!(why(&delivery), None);
    delivery.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await.unwrap();
    let delivery = next(&mut consumer).await;
    assert!(why(&delivery).unwrap().contains("larger than a frame"), "{delivery:?}");
    delivery.ack(BasicAckOptions::default()).await.unwrap();
    close(&connection).await;
}

/// The broker doesn't split a content header: a smaller frame size doesn't keep it away, and lapin
/// would have parsed it before checking its size.
#[tokio::test]
async fn a_content_header_larger_than_the_negotiated_frame_size_is_read() {
    let place = place();
    let url = format!("{}?frame_max=8192", place.url);
    let connection = Address::new(url.parse().unwrap(), "test").connect("test").await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let mut consumer = consume(&channel, "classic").await;
    Raw::connect(&place).publish(b"k", &nested(3000, b"F"));
    let delivery = next(&mut consumer).await;
    assert!(why(&delivery).unwrap().contains("larger than a frame"), "{delivery:?}");
    close(&connection).await;
}

#[tokio::test]
async fn a_returned_message_is_identified_when_it_is_confirmed() {
    const COUNT: usize = 200;
    let place = place();
    let connection = address(&place).connect("test").await.unwrap();
    let (one, other) = (publishing(&connection).await, publishing(&connection).await);
    let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    let queue = one.queue_declare("".into(), options, FieldTable::default()).await.unwrap();
    let publish = async |number: usize| {
        let channel = if number.is_multiple_of(2) { &one } else { &other };
        let is_there = number.is_multiple_of(3);
        let key = if is_there { queue.name().clone() } else { "dtc-no-such-queue".into() };
        // Ids are unique within a channel.
        let id = format!("m{}", number / 2);
        let properties = BasicProperties::default().with_message_id(id.as_str().into());
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let confirm =
            channel.basic_publish("".into(), key, options, b"hello", properties).await.unwrap();
        let confirmation = confirm.await.unwrap();
        assert!(matches!(confirmation, Confirmation::Ack(_)), "{confirmation:?}");
        let came_back = connection.returns().take(channel.id(), &id);
        assert_eq!(came_back, !is_there, "{number}");
        assert!(!connection.returns().take(channel.id(), &id));
    };
    tokio::time::timeout(LIMIT, join_all((0..COUNT).map(publish))).await.expect("confirms");
    close(&connection).await;
}

async fn publishing(connection: &BrokerConnection) -> Channel {
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    channel
}

/// The broker, with frames as large as the peer's.
fn wide(place: &Place) -> Address {
    Address::new(format!("{}?frame_max={FRAME_MAX}", place.url).parse().unwrap(), "test")
}

fn address(place: &Place) -> Address {
    Address::new(place.url.parse().unwrap(), "test")
}
