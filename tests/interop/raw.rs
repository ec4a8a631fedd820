//! A worker played by hand, which may send commands that no worker of ours would.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::time::Duration;

use dtc::clock::Clock;
use futures_util::StreamExt;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, QueueBindOptions,
        QueueDeclareOptions,
    },
    types::{FieldTable, ShortString},
};
use serde_json::{Value, json};
use tokio::{runtime::Runtime, time::timeout};

use crate::{System, processes::LIMIT};

/// The player's name as a worker.
const WORKER: &str = "player";

/// A digest of something.
pub(crate) const HASH: &str = "000102030405060708090a0b0c0d0e0f";

/// The player, with its queue.
pub(crate) struct PlayedWorker {
    runtime: Runtime,
    channel: Channel,
    replies: Consumer,
    prepare: ShortString,
    finish: ShortString,
    /// When all its transactions were requested: after the journal began, or nobody decides them.
    requested_at: u64,
    _connection: Connection,
}

impl PlayedWorker {
    pub(crate) fn new(system: &System) -> Self {
        let runtime = Runtime::new().unwrap();
        let (names, url) = (&system.names, &system.world.place.url);
        let (connection, channel, replies) = runtime.block_on(async {
            let connection = Connection::connect(url, ConnectionProperties::default());
            let connection = connection.await.unwrap();
            let channel = connection.create_channel().await.unwrap();
            let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
            let queue = format!("{}.replies.{WORKER}", names.namespace());
            let queue = ShortString::from(queue);
            let none = FieldTable::default;
            channel.queue_declare(queue.clone(), exclusive, none()).await.unwrap();
            let key = format!("{WORKER}.*").into();
            let options = QueueBindOptions::default();
            channel.queue_bind(queue.clone(), names.replies(), key, options, none()).await.unwrap();
            let options = BasicConsumeOptions::default();
            let replies = channel.basic_consume(queue, "".into(), options, none()).await.unwrap();
            (connection, channel, replies)
        });
        let (prepare, finish) = (names.prepare(), names.finish());
        let requested_at = since_epoch().as_secs();
        Self { runtime, channel, replies, prepare, finish, requested_at, _connection: connection }
    }

    fn publish(&self, exchange: &ShortString, key: &str, kind: &str, items: &[Value]) {
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_type(format!("dtc.{kind}.v1").into())
            .with_reply_to(WORKER.into());
        let body = json!(items).to_string();
        self.runtime.block_on(async {
            let options = BasicPublishOptions::default();
            let (exchange, key) = (exchange.clone(), key.into());
            self.channel
                .basic_publish(exchange, key, options, body.as_bytes(), properties)
                .await
                .unwrap();
        });
    }

    /// A prepare for `books`, whose deadline is this far ahead.
    pub(crate) fn prepares(&self, id: &str, request_hash: &str, ahead: Duration) {
        self.prepares_together(&[id], request_hash, ahead);
    }

    /// The same for several, in one message.
    pub(crate) fn prepares_together(&self, ids: &[&str], request_hash: &str, ahead: Duration) {
        let deadline = u64::try_from((since_epoch() + ahead).as_millis()).unwrap();
        let prepare = |id: &&str| {
            json!({"id": id, "requested_at": self.requested_at, "request_hash": request_hash,
                "data": {}, "deadline": deadline, "repeated": false})
        };
        let prepares: Vec<_> = ids.iter().map(prepare).collect();
        self.publish(&self.prepare, &format!("{WORKER}.books"), "prepare", &prepares);
    }

    /// A command for all instances of `books`.
    pub(crate) fn tells(&self, kind: &str, id: &str, more: Value) {
        let mut item = json!({"id": id, "requested_at": self.requested_at});
        let Value::Object(more) = more else { panic!("{more}") };
        item.as_object_mut().unwrap().extend(more);
        self.publish(&self.finish, "all.books", kind, &[item]);
    }

    /// The next answer, which must be of this kind.
    #[track_caller]
    pub(crate) fn hears(&mut self, kind: &str) -> Value {
        let (said, item) = self.hears_any();
        assert_eq!(said, kind, "{item}");
        item
    }

    /// The next answer, and its kind.
    #[track_caller]
    pub(crate) fn hears_any(&mut self) -> (String, Value) {
        let delivery = self.runtime.block_on(async {
            let next = timeout(LIMIT, self.replies.next()).await.expect("an answer in time");
            let delivery = next.expect("the queue is there").unwrap();
            delivery.ack(BasicAckOptions::default()).await.unwrap();
            delivery
        });
        let items: Value = serde_json::from_slice(&delivery.data).unwrap();
        let said = delivery.properties.kind().as_ref().unwrap().as_str();
        let kind = said.strip_prefix("dtc.").and_then(|kind| kind.strip_suffix(".v1")).unwrap();
        assert_eq!(items.as_array().unwrap().len(), 1, "{items}");
        (kind.to_owned(), items[0].clone())
    }

    /// How many messages wait in `queue`.
    pub(crate) fn waiting_in(&self, queue: ShortString) -> u32 {
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let declared = self.channel.queue_declare(queue, options, FieldTable::default());
        self.runtime.block_on(declared).unwrap().message_count()
    }
}

fn since_epoch() -> Duration {
    Duration::from_millis(Clock::start().now().as_millis())
}
