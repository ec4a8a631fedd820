//! Producers in a closed loop: each submits a transaction, waits for its result, and submits the
//! next.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use serde_json::{Value, json};
use tokio::{task::JoinSet, time::Instant};

use crate::{
    cli::bench::system::SERVICES,
    client::{Client, Settings},
    protocol::message::Outcome,
    transaction::Transaction,
    transport::amqp::{connection::Broker, names::Names, unique},
};

/// The time-out of a transaction.
const TIMEOUT: Duration = Duration::from_secs(60);

/// One transaction that has ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) began: Instant,
    pub(super) ended: Instant,
    pub(super) outcome: Outcome,
}

/// Running producers.
#[derive(Debug)]
pub(super) struct Load {
    client: Client,
    stop: Arc<AtomicBool>,
    producers: JoinSet<anyhow::Result<Vec<Sample>>>,
}

impl Load {
    /// Starts as many producers as transactions should be in flight. `batch_max`: how many of them may
    /// share a message.
    pub(super) fn start(
        broker: &Broker,
        names: &Names,
        in_flight: usize,
        batch_max: usize,
        data: usize,
    ) -> Self {
        let settings = Settings { in_flight_max: in_flight, batch_max, ..Settings::default() };
        let client = Client::with(broker.clone(), names.clone(), settings);
        let stop = Arc::new(AtomicBool::new(false));
        let mut producers = JoinSet::new();
        for _ in 0..in_flight {
            let (client, stop, data) = (client.clone(), Arc::clone(&stop), data_of(data));
            producers.spawn(async move { produce(&client, &stop, &data).await });
        }
        Self { client, stop, producers }
    }

    /// Stops them when what is in flight has ended, and returns every transaction, in no order.
    pub(super) async fn stop(mut self) -> anyhow::Result<Vec<Sample>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut samples = Vec::new();
        while let Some(ended) = self.producers.join_next().await {
            samples.extend(ended.context("a producer has failed")??);
        }
        self.client.close().await;
        Ok(samples)
    }

    /// Ends when a producer has failed, else never.
    pub(super) async fn failed(&mut self) -> anyhow::Error {
        match self.producers.join_next().await {
            Some(Ok(Err(error))) => error,
            Some(Ok(Ok(_))) | None => anyhow!("a producer has ended"),
            Some(Err(error)) => error.into(),
        }
    }
}

async fn produce(client: &Client, stop: &AtomicBool, data: &Value) -> anyhow::Result<Vec<Sample>> {
    let name = unique::name('t');
    let mut samples = Vec::new();
    for number in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let transaction = Transaction::new(format!("{name}-{number}"), SERVICES, data.clone());
        let began = Instant::now();
        let answer = client.submit_and_wait(transaction, TIMEOUT).await?;
        samples.push(Sample { began, ended: Instant::now(), outcome: answer.outcome });
    }
    Ok(samples)
}

/// Data that takes about so many bytes as text.
pub(super) fn data_of(bytes: usize) -> Value {
    const AROUND: usize = r#"{"x":""}"#.len();
    match bytes.checked_sub(AROUND) {
        Some(rest) => json!({"x": "x".repeat(rest)}),
        None => json!({}),
    }
}
