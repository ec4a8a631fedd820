//! Observing messages at the broker by the test's own consumer, which takes nothing from others.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dtc::{
    clock::Clock,
    protocol::message::Decision,
    wire::message::{Kind, decode},
};
use futures_util::StreamExt;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicNackOptions,
        BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions, QueueBindOptions,
        QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
};
use serde_json::Value;

use super::System;

/// All messages seen.
pub(super) struct Watch {
    seen: Arc<Mutex<Vec<Delivery>>>,
    /// Its connection.
    _connection: Connection,
}

impl Watch {
    /// The journal, from its first record on.
    pub(super) fn journal(system: &System) -> Self {
        Self::stream(system, system.names.journal())
    }

    /// A stream, from its first message on.
    pub(super) fn stream(system: &System, stream: ShortString) -> Self {
        system.runtime.block_on(async {
            let (connection, channel) = connect(system).await;
            let mut arguments = FieldTable::default();
            arguments.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
            Self::of(connection, channel, stream, arguments).await
        })
    }

    /// Every prepare, and every command to all instances of a service.
    pub(super) fn commands(system: &System) -> Self {
        system.runtime.block_on(async {
            let (connection, channel) = connect(system).await;
            let options = QueueDeclareOptions { exclusive: true, ..Default::default() };
            let declared = channel.queue_declare("".into(), options, FieldTable::default()).await;
            let queue = declared.unwrap().name().clone();
            for (exchange, key) in [(system.names.prepare(), "#"), (system.names.finish(), "all.*")]
            {
                let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
                let bound =
                    channel.queue_bind(queue.clone(), exchange, key.into(), options, arguments);
                bound.await.unwrap();
            }
            Self::of(connection, channel, queue, FieldTable::default()).await
        })
    }

    async fn of(
        connection: Connection,
        channel: Channel,
        queue: ShortString,
        arguments: FieldTable,
    ) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let options = BasicConsumeOptions::default();
        let consumer = channel.basic_consume(queue, "".into(), options, arguments).await;
        let (mut consumer, kept) = (consumer.unwrap(), Arc::clone(&seen));
        tokio::spawn(async move {
            while let Some(Ok(delivery)) = consumer.next().await {
                delivery.acker.ack(BasicAckOptions::default()).await.unwrap();
                lock(&kept).push(delivery);
            }
            drop(channel);
        });
        Self { seen, _connection: connection }
    }

    /// The decisions about `id` so far, in the journal's order.
    pub(super) fn decisions(&self, id: &str) -> Vec<Decision> {
        let is_decision = |it: &&Delivery| kind_of(it) == Some(Kind::Decision);
        let seen = lock(&self.seen);
        let items = seen.iter().filter(is_decision).flat_map(|it| decode(&it.data).unwrap());
        items.map(Result::unwrap).filter(|it: &Decision| it.key.id.as_str() == id).collect()
    }

    /// The messages so far.
    pub(super) fn seen(&self) -> MutexGuard<'_, Vec<Delivery>> {
        lock(&self.seen)
    }

    /// Whether `worker` has asked a service to prepare transaction `id`, or whether it holds it.
    pub(super) fn has_asked(&self, worker: &str, id: &str) -> bool {
        let id = format!("\"id\":\"{id}\"");
        let is_its = |it: &Delivery| {
            matches!(kind_of(it), Some(Kind::Prepare | Kind::Query))
                && String::from_utf8_lossy(&it.data).contains(&id)
                && it.properties.reply_to().as_ref().is_some_and(|to| to.as_str() == worker)
        };
        lock(&self.seen).iter().any(is_its)
    }
}

fn kind_of(delivery: &Delivery) -> Option<Kind> {
    delivery.properties.kind().as_ref().and_then(|text| Kind::parse_type(text.as_str()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A channel on a new connection.
async fn connect(system: &System) -> (Connection, Channel) {
    let url = &system.world.place.url;
    let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.basic_qos(1000, BasicQosOptions::default()).await.unwrap();
    (connection, channel)
}

/// Takes the next message out of `queue` and puts it back, like a user who inspects it.
pub(super) fn look_into(system: &System, queue: &ShortString, times: usize) {
    system.runtime.block_on(async {
        let (connection, channel) = connect(system).await;
        for _ in 0..times {
            let getting = channel.basic_get(queue.clone(), BasicGetOptions::default());
            let message = getting.await.unwrap().expect("a message in the queue");
            let back = BasicNackOptions { requeue: true, ..Default::default() };
            message.acker.nack(back).await.unwrap();
        }
        connection.close(200, "".into()).await.unwrap();
    });
}

/// How many messages are ready in `queue`, without those that are unacknowledged.
pub(super) fn waiting_in(system: &System, queue: ShortString) -> u32 {
    system.runtime.block_on(async {
        let (connection, channel) = connect(system).await;
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let declared = channel.queue_declare(queue, options, FieldTable::default()).await.unwrap();
        let count = declared.message_count();
        connection.close(200, "".into()).await.unwrap();
        count
    })
}

/// Publishes a message with this body as a producer does, now, and waits for the confirm.
pub(super) fn publish_request(system: &System, body: &Value) {
    system.runtime.block_on(async {
        let (connection, channel) = connect(system).await;
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let properties = BasicProperties::default()
            .with_type(Kind::Request.as_type().into())
            .with_delivery_mode(2)
            .with_timestamp(Clock::start().now().as_millis() / 1000);
        let (exchange, options) = (system.names.requests(), BasicPublishOptions::default());
        let body = body.to_string();
        let publishing =
            channel.basic_publish(exchange, "request".into(), options, body.as_bytes(), properties);
        assert!(publishing.await.unwrap().await.unwrap().is_ack());
        connection.close(200, "".into()).await.unwrap();
    });
}

/// Deletes a queue with its messages.
pub(super) fn delete(system: &System, queue: ShortString) {
    system.runtime.block_on(async {
        let (connection, channel) = connect(system).await;
        channel.queue_delete(queue, QueueDeleteOptions::default()).await.unwrap();
        connection.close(200, "".into()).await.unwrap();
    });
}
