//! Reads the journal at each node, as the replica of that node has it.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result};
use futures_util::StreamExt;
use lapin::{
    Connection, ConnectionProperties,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::Value;
use tokio::time::timeout;

use crate::network::address;

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(10);
/// How long to wait for more at the end of a stream.
const QUIET: Duration = Duration::from_millis(1500);
/// How many records may be unacknowledged.
const PREFETCH: u16 = 1000;

/// A record of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) offset: i64,
    pub(crate) kind: String,
    pub(crate) body: Vec<u8>,
}

/// A decision in the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) id: String,
    pub(crate) requested_at: i64,
    pub(crate) outcome: String,
    /// The branch of each service that voted `prepared`.
    pub(crate) branches: BTreeMap<String, String>,
}

/// All records of a stream at a node.
pub(crate) fn read(node: &str, stream: &str) -> Result<Vec<Entry>> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(1).enable_all().build().context("no runtime")?;
    let read = runtime.block_on(consume(node, stream));
    runtime.shutdown_background();
    read.with_context(|| format!("{stream} at {node}"))
}

async fn consume(node: &str, stream: &str) -> Result<Vec<Entry>> {
    let url = format!("amqp://{}", address(node));
    let connecting = Connection::connect(&url, ConnectionProperties::default());
    let connection = timeout(ANSWER, connecting).await.context("no connection in time")??;
    let channel = timeout(ANSWER, connection.create_channel()).await.context("no channel")??;
    timeout(ANSWER, channel.basic_qos(PREFETCH, BasicQosOptions::default())).await??;
    let mut arguments = FieldTable::default();
    arguments.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
    let options = BasicConsumeOptions::default();
    let consuming = channel.basic_consume(stream.into(), "oracle".into(), options, arguments);
    let mut consumer = timeout(ANSWER, consuming).await.context("nobody lets us consume")??;
    let mut entries = Vec::new();
    let mut wait = ANSWER;
    while let Ok(delivery) = timeout(wait, consumer.next()).await {
        let delivery = delivery.context("the consumer ended")??;
        let headers = delivery.properties.headers().as_ref();
        let offset = headers.and_then(|headers| headers.inner().get("x-stream-offset"));
        let offset = match offset {
            Some(AMQPValue::LongLongInt(offset)) => *offset,
            other => anyhow::bail!("a record without an offset: {other:?}"),
        };
        let kind = delivery.properties.kind().as_ref().map(ToString::to_string);
        channel.basic_ack(delivery.delivery_tag, BasicAckOptions::default()).await?;
        entries.push(Entry { offset, kind: kind.unwrap_or_default(), body: delivery.data });
        wait = QUIET;
    }
    drop(timeout(ANSWER, connection.close(200, "".into())).await);
    Ok(entries)
}

/// The decisions among the records, in their order.
pub(crate) fn decisions(entries: &[Entry]) -> Vec<Decision> {
    let records = entries.iter().filter(|entry| entry.kind == "dtc.decision.v1");
    let items = records.filter_map(|entry| serde_json::from_slice::<Vec<Value>>(&entry.body).ok());
    items.flatten().filter_map(|item| decision(&item)).collect()
}

fn decision(item: &Value) -> Option<Decision> {
    let branches = item["branches"].as_object().into_iter().flatten();
    let branches = branches
        .filter_map(|(service, branch)| Some((service.clone(), branch.as_str()?.to_owned())));
    Some(Decision {
        id: item["id"].as_str()?.to_owned(),
        requested_at: item["requested_at"].as_i64()?,
        outcome: item["outcome"].as_str()?.to_owned(),
        branches: branches.collect(),
    })
}
