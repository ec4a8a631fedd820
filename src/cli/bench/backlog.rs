//! Measures how fast a worker drains a backlog of requests.

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use futures_util::FutureExt;
use lapin::{
    options::{QueueBindOptions, QueueDeclareOptions},
    types::{FieldTable, ShortString},
};
use tokio::time::Instant;

use crate::{
    cli::bench::{
        load::data_of,
        machine,
        report::{Backlog, mib},
        system::{BenchNamespace, SERVICES},
    },
    clock::Clock,
    protocol::{ids::ReplyToken, message::Answer, message::Outcome},
    transaction::Transaction,
    transport::amqp::{
        consumer::QueueConsumer,
        names::{REQUEST, key},
        publisher::{OutgoingMessage, PublishOutcome, Publisher},
        unique,
    },
    wire::message::{Kind, RequestBody, decode, encode_request},
};

/// How many requests may be without a confirm.
const UNCONFIRMED_MAX: usize = 1024;

/// How many results may be unacknowledged.
const PREFETCH: u16 = 2000;

/// How long to wait for the next result before giving up.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// How often to read the worker's memory.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How often one backlog is drained at most.
const DRAINS_MAX: usize = 15;

/// Drains a backlog, and repeats that until it has taken `duration` in all: one drain
/// of a small backlog is too short to measure.
pub(super) async fn measure(
    namespace: &BenchNamespace,
    mut backlog: Backlog,
    max_in_flight: usize,
    data: usize,
    duration: Duration,
) -> anyhow::Result<Backlog> {
    let Backlog { requests, batch_max, .. } = backlog;
    let mut taken = Duration::ZERO;
    while taken < duration && backlog.per_second.count() < DRAINS_MAX {
        let Drain { took, aborted, memory } =
            drain(namespace, (requests, batch_max), max_in_flight, data).await?;
        taken += took;
        backlog.per_second.add(requests as f64 / took.as_secs_f64());
        backlog.aborted += aborted;
        backlog.resident_middle.add_known(memory.get(memory.len() / 2).copied().map(mib));
        backlog.resident_max.add_known(memory.into_iter().max().map(mib));
    }
    Ok(backlog)
}

/// How one backlog was drained.
struct Drain {
    took: Duration,
    aborted: u64,
    /// The worker's memory, sampled.
    memory: Vec<u64>,
}

/// Publishes so many requests, as many as given in a message, and then starts a worker.
async fn drain(
    namespace: &BenchNamespace,
    (requests, batch_max): (u64, usize),
    max_in_flight: usize,
    data: usize,
) -> anyhow::Result<Drain> {
    let link = namespace.broker().connect_pair().await?;
    let reply = ReplyToken::parse(&unique::name('p'))?;
    let mut results = {
        let channel = link.consuming.create_channel().await?;
        let queue =
            ShortString::from(format!("{}.{}", namespace.names.results_of(&reply), "bench"));
        let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        let nothing = FieldTable::default;
        channel.queue_declare(queue.clone(), exclusive, nothing()).await?;
        let (exchange, bind) = (namespace.names.results(), QueueBindOptions::default());
        channel.queue_bind(queue.clone(), exchange, key(&reply, "*"), bind, nothing()).await?;
        QueueConsumer::on_channel(channel, queue, PREFETCH, nothing()).await?.with_lazy_acks()
    };
    pile_up(
        namespace,
        &mut Publisher::open(&link.publishing, "requests").await?,
        &reply,
        (requests, batch_max),
        data,
    )
    .await
    .context("failed to pile up requests")?;

    let services = namespace.services().await?;
    let worker = namespace.worker(max_in_flight).await?;
    let began = Instant::now();
    let mut memory = Vec::new();
    let (mut ended, mut aborted) = (0, 0);
    let mut look_at = Instant::now();
    while ended < requests {
        let next = tokio::time::timeout(SILENCE_MAX, results.next()).await;
        let mut next = Some(next.map_err(|_| {
            anyhow!("nothing has ended for {SILENCE_MAX:?}, after {ended} of {requests}")
        })?);
        while let Some(message) = next {
            let message = message?;
            for answer in decode::<Answer>(&message.data)? {
                ended += 1;
                aborted += u64::from(answer?.outcome == Outcome::Aborted);
            }
            results.ack(message.delivery_tag);
            next = results.next().now_or_never();
        }
        results.flush();
        if look_at <= Instant::now() {
            memory.extend(machine::resident(worker.pid));
            look_at = Instant::now() + LOOK_EVERY;
        }
    }
    let took = began.elapsed();
    worker.stop().await?;
    for service in services {
        service.stop().await?;
    }
    link.close().await;
    Ok(Drain { took, aborted, memory })
}

async fn pile_up(
    namespace: &BenchNamespace,
    publisher: &mut Publisher<()>,
    reply: &ReplyToken,
    (requests, batch_max): (u64, usize),
    data: usize,
) -> anyhow::Result<()> {
    let (name, data, clock) = (unique::name('t'), data_of(data), Clock::start());
    let mut numbers = (0..requests).peekable();
    while numbers.peek().is_some() {
        let mut body = RequestBody::new();
        while body.len() < batch_max
            && let Some(&number) = numbers.peek()
        {
            let transaction = Transaction::new(format!("{name}-{number}"), SERVICES, data.clone());
            if body.push(&encode_request(&transaction.check()?, Some(reply))?).is_err() {
                break;
            }
            numbers.next();
        }
        let message = OutgoingMessage {
            exchange: namespace.names.requests(),
            key: REQUEST.into(),
            message_type: Kind::Request.as_type(),
            body: body.into_bytes(),
            persistent: true,
            mandatory: true,
            timestamp: Some(clock.now().as_millis() / 1000),
            ..OutgoingMessage::default()
        };
        publisher.publish(message, ());
        while publisher.outstanding() >= UNCONFIRMED_MAX {
            confirmed(publisher.next().await?.1)?;
        }
        while let Some(answered) = publisher.try_next() {
            let ((), published) = answered?;
            confirmed(published)?;
        }
    }
    while publisher.outstanding() > 0 {
        confirmed(publisher.next().await?.1)?;
    }
    Ok(())
}

fn confirmed(published: PublishOutcome) -> anyhow::Result<()> {
    match published {
        PublishOutcome::Confirmed => Ok(()),
        PublishOutcome::Unroutable => Err(anyhow!("no queue takes requests")),
        PublishOutcome::Refused => Err(anyhow!("the broker did not take a request")),
        PublishOutcome::Unconfirmed(_) => {
            Err(anyhow!("the broker did not confirm a request in time"))
        }
        PublishOutcome::Lost(error) => Err(error.into()),
    }
}
