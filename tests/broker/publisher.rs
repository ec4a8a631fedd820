//! Publishing without confirms, and with short waits.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{sync::Arc, time::Duration};

use dtc::transport::amqp::{
    connection::{Broker as Address, close},
    pool::ChannelPool,
    publisher::{OutgoingMessage, Publisher, PublisherError},
};
use lapin::{
    Channel, Connection, ConnectionProperties,
    options::{BasicGetOptions, QueueDeclareOptions},
    types::{FieldTable, ShortString},
};

use crate::{
    broker::{Place, place},
    proxy::{Frames, Proxy},
};

const LIMIT: Duration = Duration::from_secs(60);

/// An exclusive queue, and its channel.
async fn queue(place: &Place) -> (Channel, ShortString) {
    let connection = Connection::connect(&place.url, ConnectionProperties::default()).await;
    let channel = connection.unwrap().create_channel().await.unwrap();
    let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare("".into(), options, FieldTable::default()).await;
    (channel, declared.unwrap().name().clone())
}

fn address(place: &Place) -> Address {
    Address::new(place.url.parse().unwrap(), "test")
}

fn large(key: &ShortString) -> OutgoingMessage {
    OutgoingMessage {
        key: key.clone(),
        body: vec![b'x'; 1024 * 1024],
        ..OutgoingMessage::default()
    }
}

/// Like a producer that asks again whenever it listens on another queue: it waits for none of its
/// publishes long enough to detect that the broker is silent.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_confirms_nothing_is_given_up_even_if_every_wait_is_short() {
    let place = place();
    let (_channel, queue) = queue(&place).await;
    let proxy = Proxy::to(&place.url);
    let broker = Address::new(proxy.url(&place.url).parse().unwrap(), "test");
    let channels = ChannelPool::new(broker, 1);
    let message = || OutgoingMessage { key: queue.clone(), ..OutgoingMessage::default() };
    channels.publish(message()).await.unwrap();
    let stopped = proxy.stop(Frames::confirms());
    for _ in 0..30 {
        let publishing = channels.publish(message());
        if let Ok(Ok(())) = tokio::time::timeout(Duration::from_secs(1), publishing).await {
            assert!(stopped.count() > 0, "nothing was stopped");
            return;
        }
    }
    panic!("the broker was silent on one connection, and no other was made");
}

#[tokio::test]
async fn the_last_publish_is_written_before_the_connection_closes() {
    // So few that no write is watched.
    const COUNT: usize = 20;
    let place = place();
    let (channel, queue) = queue(&place).await;
    let connection = Arc::new(address(&place).connect("test").await.unwrap());
    let mut publisher = Publisher::unconfirmed(&connection, "a test").await.unwrap();
    for number in 0..COUNT {
        publisher.publish(large(&queue), number);
    }
    tokio::time::timeout(LIMIT, publisher.finish()).await.expect("it is written");
    close(&connection).await;
    let mut arrived = 0;
    while channel
        .basic_get(queue.clone(), BasicGetOptions { no_ack: true })
        .await
        .unwrap()
        .is_some()
    {
        arrived += 1;
    }
    assert_eq!(arrived, COUNT);
}

#[tokio::test]
async fn a_publish_on_a_closed_channel_is_reported_lost_at_once() {
    let place = place();
    let link = address(&place).connect_pair().await.unwrap();
    let mut publisher = Publisher::unconfirmed(&link.publishing, "a test").await.unwrap();
    let nowhere = || OutgoingMessage {
        exchange: "dtc-no-such-exchange".into(),
        ..OutgoingMessage::default()
    };
    assert!(publisher.is_open());
    publisher.publish(nowhere(), 1);
    while publisher.is_open() {
        tokio::task::yield_now().await;
    }
    publisher.publish(nowhere(), 2);
    let lost = tokio::time::timeout(LIMIT, publisher.next()).await.unwrap();
    assert!(matches!(lost, Err(PublisherError::Channel { .. })), "{lost:?}");
    link.close().await;
}
