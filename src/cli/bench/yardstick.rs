//! The yardstick: echo RPCs and plain messages, the least that a client can do with the same
//! broker.
//!
//! Requests are persistent, go through one durable queue and are confirmed; a consumer sends each
//! back as a transient reply, and acknowledges it. The yardstick uses the same publishers and
//! inboxes as the coordinator, so that the comparison shows the coordinator's cost and not the
//! client library's; [`raw_echo`](super::raw_echo) shows that.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context as _;
use lapin::{
    options::{QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable, ShortString},
};
use tokio::{task::JoinSet, time::Instant};

use crate::{
    cli::bench::system::BenchNamespace,
    embedded::Latencies,
    transport::amqp::{
        connection::{Broker, BrokerConnection, close},
        consumer::QueueConsumer,
        publisher::{OutgoingMessage, PublishOutcome, Publisher},
        topology::QueueKind,
        unique,
    },
};

/// The size of a request, in bytes.
pub(super) const BODY: usize = 200;

/// How many deliveries a consumer may hold.
pub(super) const PREFETCH: u16 = 2000;

/// How many plain messages may be without a confirm.
const UNCONFIRMED_MAX: usize = 1024;

/// How long to wait for a message that is alone.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// How long the load runs before it is measured.
pub(super) const WARM_UP: Duration = Duration::from_millis(500);

/// The measurements of echo RPCs.
pub(super) struct EchoSamples {
    pub(super) per_second: f64,
    /// How many there were, including those that were not counted.
    pub(super) all: u64,
    pub(super) latencies: Latencies,
}

/// How long the broker keeps the queue without a consumer, in milliseconds, in case it is never
/// deleted.
const KEPT: i32 = 600_000;

/// A durable queue for one measurement. It is deleted after it, or at the latest with its
/// namespace.
pub(super) struct YardstickQueue {
    connection: BrokerConnection,
    pub(super) name: ShortString,
}

impl YardstickQueue {
    pub(super) async fn declare(
        namespace: &BenchNamespace,
        kind: QueueKind,
    ) -> anyhow::Result<Self> {
        let connection = namespace.broker().connect("bench").await?;
        let name = namespace.yardstick();
        let channel = connection.create_channel().await?;
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.to_string().into()));
        // Streams don't support it.
        if kind != QueueKind::Stream {
            arguments.insert("x-expires".into(), AMQPValue::LongInt(KEPT));
        }
        channel.queue_declare(name.clone(), options, arguments).await?;
        Ok(Self { connection, name })
    }

    pub(super) async fn delete(self) {
        if let Ok(channel) = self.connection.create_channel().await {
            let _ = channel.queue_delete(self.name, QueueDeleteOptions::default()).await;
        }
        close(&self.connection).await;
    }
}

/// Echo RPCs with so many in flight, for `duration`.
pub(super) async fn echo(
    namespace: &BenchNamespace,
    in_flight: usize,
    duration: Duration,
) -> anyhow::Result<EchoSamples> {
    let broker = namespace.broker();
    let queue = YardstickQueue::declare(namespace, QueueKind::Classic)
        .await
        .context("failed to declare a queue")?;
    let mut server = JoinSet::new();
    server.spawn(serve(broker.clone(), queue.name.clone()));
    let echoed = call(broker, &queue.name, in_flight, duration).await;
    server.shutdown().await;
    queue.delete().await;
    echoed.context("failed to measure echo RPCs")
}

/// Sends each message back.
async fn serve(broker: Broker, queue: ShortString) -> anyhow::Result<()> {
    let link = broker.connect_pair().await?;
    let mut inbox =
        QueueConsumer::open(&link.consuming, queue, PREFETCH, FieldTable::default()).await?;
    let mut replies = Publisher::unconfirmed(&link.publishing, "the yardstick").await?;
    let mut next = Some(inbox.next().await);
    loop {
        while let Some(message) = next {
            let message = message?;
            let reply = OutgoingMessage {
                key: message.properties.reply_to().clone().unwrap_or_default(),
                message_id: message.properties.message_id().clone(),
                body: message.data,
                ..OutgoingMessage::default()
            };
            replies.publish(reply, ());
            inbox.ack(message.delivery_tag);
            while replies.try_next().is_some() {}
            next = inbox.try_next();
        }
        inbox.flush();
        next = Some(inbox.next().await);
    }
}

/// An RPC that waits for its reply and its confirm.
struct EchoCall {
    since: Instant,
    /// Whether one of the two has arrived.
    half: bool,
}

async fn call(
    broker: &Broker,
    queue: &ShortString,
    in_flight: usize,
    duration: Duration,
) -> anyhow::Result<EchoSamples> {
    let link = broker.connect_pair().await?;
    let channel = link.consuming.create_channel().await?;
    let reply_to = ShortString::from(format!("dtc-bench.{}", unique::name('r')));
    let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(reply_to.clone(), exclusive, FieldTable::default()).await?;
    let mut replies =
        QueueConsumer::on_channel(channel, reply_to.clone(), PREFETCH, FieldTable::default())
            .await?
            .with_lazy_acks();
    let mut requests = Publisher::open(&link.publishing, "the yardstick").await?;
    let mut calls: BTreeMap<u64, EchoCall> = BTreeMap::new();
    let mut latencies = Latencies::new();
    let (mut number, mut counted) = (0_u64, 0_u64);
    let begins_at = Instant::now() + WARM_UP;
    let ends_at = begins_at + duration;
    let mut send = |calls: &mut BTreeMap<u64, EchoCall>, requests: &mut Publisher<u64>| {
        number += 1;
        let request = OutgoingMessage {
            key: queue.clone(),
            body: vec![b'x'; BODY],
            persistent: true,
            reply_to: Some(reply_to.clone()),
            message_id: Some(number.to_string().into()),
            ..OutgoingMessage::default()
        };
        calls.insert(number, EchoCall { since: Instant::now(), half: false });
        requests.publish(request, number);
    };
    (0..in_flight).for_each(|_| send(&mut calls, &mut requests));
    loop {
        // How many RPCs have got both.
        let mut ended = 0;
        let mut half_ended = |number: u64, calls: &mut BTreeMap<u64, EchoCall>| {
            let now = Instant::now();
            let Some(call) = calls.get_mut(&number) else { return };
            if !std::mem::replace(&mut call.half, true) {
                return;
            }
            if let Some(call) = calls.remove(&number) {
                ended += 1;
                if now >= begins_at && now < ends_at {
                    counted += 1;
                    latencies.record(now - call.since);
                }
            }
        };
        tokio::select! {
            reply = replies.next() => take(&mut replies, reply, |it| half_ended(it, &mut calls))?,
            answered = requests.next() => {
                let (number, published) = answered?;
                confirmed(published)?;
                half_ended(number, &mut calls);
            }
            () = tokio::time::sleep_until(ends_at) => break,
        }
        while let Some(answered) = requests.try_next() {
            let (number, published) = answered?;
            confirmed(published)?;
            half_ended(number, &mut calls);
        }
        while let Some(reply) = replies.try_next() {
            take(&mut replies, reply, |it| half_ended(it, &mut calls))?;
        }
        replies.flush();
        (0..ended).for_each(|_| send(&mut calls, &mut requests));
    }
    link.close().await;
    let all = number - calls.len() as u64;
    Ok(EchoSamples { per_second: counted as f64 / duration.as_secs_f64(), all, latencies })
}

fn take(
    inbox: &mut QueueConsumer,
    reply: Result<lapin::message::Delivery, crate::transport::amqp::consumer::ConsumerError>,
    mut ended: impl FnMut(u64),
) -> anyhow::Result<()> {
    let reply = reply?;
    let number = reply.properties.message_id().as_ref().and_then(|it| it.as_str().parse().ok());
    number.into_iter().for_each(&mut ended);
    inbox.ack(reply.delivery_tag);
    Ok(())
}

fn confirmed(published: PublishOutcome) -> anyhow::Result<()> {
    match published {
        PublishOutcome::Confirmed => Ok(()),
        PublishOutcome::Unroutable => Err(anyhow::anyhow!("the queue is gone")),
        PublishOutcome::Refused => Err(anyhow::anyhow!("the broker did not take a message")),
        PublishOutcome::Unconfirmed(_) => {
            Err(anyhow::anyhow!("the broker did not confirm a message in time"))
        }
        PublishOutcome::Lost(error) => Err(error.into()),
    }
}

/// Persistent messages per second through one durable queue, confirmed and acknowledged.
pub(super) async fn raw(namespace: &BenchNamespace, duration: Duration) -> anyhow::Result<f64> {
    let queue = YardstickQueue::declare(namespace, QueueKind::Classic)
        .await
        .context("failed to declare a queue")?;
    let sent = send(namespace.broker(), &queue.name, duration).await;
    queue.delete().await;
    sent.context("failed to measure plain messages")
}

async fn send(broker: &Broker, queue: &ShortString, duration: Duration) -> anyhow::Result<f64> {
    let link = broker.connect_pair().await?;
    let arguments = FieldTable::default();
    let mut inbox =
        QueueConsumer::open(&link.consuming, queue.clone(), PREFETCH, arguments).await?;
    let mut publisher = Publisher::open(&link.publishing, "the yardstick").await?;
    let begins_at = Instant::now() + WARM_UP;
    let ends_at = begins_at + duration;
    let mut counted = 0_u64;
    loop {
        while publisher.outstanding() < UNCONFIRMED_MAX {
            let message = OutgoingMessage {
                key: queue.clone(),
                body: vec![b'x'; BODY],
                persistent: true,
                ..OutgoingMessage::default()
            };
            publisher.publish(message, ());
        }
        tokio::select! {
            answered = publisher.next() => confirmed(answered?.1)?,
            message = inbox.next() => {
                inbox.ack(message?.delivery_tag);
                counted += u64::from(Instant::now() >= begins_at);
            }
            () = tokio::time::sleep_until(ends_at) => break,
        }
        while let Some(answered) = publisher.try_next() {
            confirmed(answered?.1)?;
        }
        while let Some(message) = inbox.try_next() {
            inbox.ack(message?.delivery_tag);
            counted += u64::from(Instant::now() >= begins_at);
        }
        inbox.flush();
    }
    link.close().await;
    Ok(counted as f64 / duration.as_secs_f64())
}

/// How long a message that is alone takes from its publisher through a queue of this kind to its
/// consumer, published as the coordinator publishes to such queues.
pub(super) async fn hop(
    namespace: &BenchNamespace,
    kind: QueueKind,
    duration: Duration,
) -> anyhow::Result<Latencies> {
    let queue =
        YardstickQueue::declare(namespace, kind).await.context("failed to declare a queue")?;
    let hopped = send_alone(namespace.broker(), &queue.name, kind, duration).await;
    queue.delete().await;
    hopped.context("failed to measure a message that is alone")
}

async fn send_alone(
    broker: &Broker,
    queue: &ShortString,
    kind: QueueKind,
    duration: Duration,
) -> anyhow::Result<Latencies> {
    let link = broker.connect_pair().await?;
    let arguments = FieldTable::default();
    let mut inbox =
        QueueConsumer::open(&link.consuming, queue.clone(), PREFETCH, arguments).await?;
    let persistent = kind != QueueKind::Classic;
    let mut publisher = match persistent {
        true => Publisher::open(&link.publishing, "the yardstick").await?,
        false => Publisher::unconfirmed(&link.publishing, "the yardstick").await?,
    };
    let mut latencies = Latencies::new();
    let begins_at = Instant::now() + WARM_UP;
    let ends_at = begins_at + duration;
    loop {
        let since = Instant::now();
        if since >= ends_at {
            break;
        }
        let message = OutgoingMessage {
            key: queue.clone(),
            body: vec![b'x'; BODY],
            persistent,
            ..OutgoingMessage::default()
        };
        publisher.publish(message, ());
        let message = tokio::time::timeout(SILENCE_MAX, inbox.next()).await;
        let message = message.context("a message did not come")??;
        if since >= begins_at {
            latencies.record(since.elapsed());
        }
        inbox.ack(message.delivery_tag);
        inbox.flush();
        while let Some(answered) = publisher.try_next() {
            confirmed(answered?.1)?;
        }
    }
    link.close().await;
    Ok(latencies)
}
