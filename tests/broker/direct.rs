//! What a test does at the broker directly, past the proxy.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::time::Duration;

use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    message::BasicGetMessage,
    options::{
        BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueBindOptions,
        QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};
use tokio::{
    runtime::Runtime,
    time::{Instant, timeout},
};

use crate::{broker::Place, processes::LIMIT};

/// How often to check a queue: the broker doesn't notify of arrivals.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The test's own connection, and a runtime to wait for it.
pub(crate) struct Direct {
    runtime: Runtime,
    channel: Channel,
    _connection: Connection,
}

impl Direct {
    pub(crate) fn to(place: &Place) -> Self {
        let runtime = Runtime::new().unwrap();
        let (connection, channel) = runtime.block_on(async {
            let properties = ConnectionProperties::default();
            let connection = Connection::connect(&place.url, properties).await.unwrap();
            let channel = connection.create_channel().await.unwrap();
            channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
            (connection, channel)
        });
        Self { runtime, channel, _connection: connection }
    }

    /// Publishes to a queue that must exist.
    pub(crate) fn publish(&self, exchange: &str, key: &str, with: BasicProperties, body: &str) {
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let confirmed = self.runtime.block_on(async {
            let (exchange, key) = (exchange.into(), key.into());
            let sent = self.channel.basic_publish(exchange, key, options, body.as_bytes(), with);
            timeout(LIMIT, sent.await.unwrap()).await.unwrap().unwrap()
        });
        assert!(matches!(confirmed, Confirmation::Ack(None)), "{exchange} {key}: {confirmed:?}");
    }

    /// Deletes a queue with its messages.
    pub(crate) fn delete_queue(&self, queue: &str) {
        let deleting = self.channel.queue_delete(queue.into(), QueueDeleteOptions::default());
        self.runtime.block_on(async { deleting.await.unwrap() });
    }

    /// Declares an empty stream.
    pub(crate) fn declare_stream(&self, name: &str) {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("stream".into()));
        let options = QueueDeclareOptions { durable: true, ..Default::default() };
        let declaring = self.channel.queue_declare(name.into(), options, arguments);
        self.runtime.block_on(async { declaring.await.unwrap() });
    }

    /// Unbinds `queue` from `exchange` under `key`.
    pub(crate) fn unbind(&self, queue: &str, exchange: &str, key: &str) {
        let (exchange, key, nothing) = (exchange.into(), key.into(), FieldTable::default());
        let unbinding = self.channel.queue_unbind(queue.into(), exchange, key, nothing);
        self.runtime.block_on(async { unbinding.await.unwrap() });
    }

    /// A queue bound to `exchange` that takes every message.
    pub(crate) fn open_queue(&self, name: &str, exchange: &str, key: &str) {
        self.queue(name, exchange, key, FieldTable::default());
    }

    /// A queue bound to `exchange` that is full, and refuses every message.
    pub(crate) fn full_queue(&self, name: &str, exchange: &str, key: &str) {
        let mut arguments = FieldTable::default();
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
        arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
        self.queue(name, exchange, key, arguments);
        let options = BasicPublishOptions::default();
        self.runtime.block_on(async {
            loop {
                let properties = BasicProperties::default();
                let (to, key) = ("".into(), name.into());
                let sent = self.channel.basic_publish(to, key, options, b"full", properties);
                let confirmed = timeout(LIMIT, sent.await.unwrap()).await.unwrap().unwrap();
                if matches!(confirmed, Confirmation::Nack(_)) {
                    break;
                }
            }
        });
    }

    fn queue(&self, name: &str, exchange: &str, key: &str, arguments: FieldTable) {
        let options = QueueDeclareOptions { exclusive: true, ..Default::default() };
        self.runtime.block_on(async {
            self.channel.queue_declare(name.into(), options, arguments).await.unwrap();
            let (bind, nothing) = (QueueBindOptions::default(), FieldTable::default());
            let binding =
                self.channel.queue_bind(name.into(), exchange.into(), key.into(), bind, nothing);
            binding.await.unwrap();
        });
    }

    /// Waits until so many messages are in `queue`.
    #[track_caller]
    pub(crate) fn until_holds(&self, queue: &str, count: usize) {
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        crate::crash::until("as much is in the queue", || {
            let asking = self.channel.queue_declare(queue.into(), options, FieldTable::default());
            let found = self.runtime.block_on(async { asking.await.unwrap() });
            found.message_count() as usize >= count
        });
    }

    /// Takes the bodies of all messages in `queue`.
    pub(crate) fn take_all(&self, queue: &str) -> Vec<String> {
        std::iter::from_fn(|| self.get(queue)).map(|it| body(&it)).collect()
    }

    /// The body of the next message in `queue` with `text` in it; earlier ones are dropped.
    pub(crate) fn next_of(&self, queue: &str, text: &str, limit: Duration) -> Option<String> {
        self.find(queue, text, limit).map(|it| body(&it))
    }

    /// Why the message with `text` in its body was rejected into `queue`, if that happens within
    /// `limit`.
    pub(crate) fn rejected(&self, queue: &str, text: &str, limit: Duration) -> Option<String> {
        let found = self.find(queue, text, limit)?;
        let headers = found.properties.headers().as_ref()?;
        match headers.inner().get("reason") {
            Some(AMQPValue::LongString(reason)) => {
                Some(String::from_utf8_lossy(reason.as_bytes()).into_owned())
            }
            other => panic!("{other:?}"),
        }
    }

    fn find(&self, queue: &str, text: &str, limit: Duration) -> Option<BasicGetMessage> {
        let began = Instant::now();
        loop {
            match self.get(queue) {
                Some(message) if body(&message).contains(text) => return Some(message),
                Some(_) => {}
                None if began.elapsed() > limit => return None,
                None => std::thread::sleep(LOOK_EVERY),
            }
        }
    }

    fn get(&self, queue: &str) -> Option<BasicGetMessage> {
        let getting = self.channel.basic_get(queue.into(), BasicGetOptions { no_ack: true });
        self.runtime.block_on(async { getting.await.unwrap() })
    }
}

fn body(message: &BasicGetMessage) -> String {
    String::from_utf8_lossy(&message.data).into_owned()
}
