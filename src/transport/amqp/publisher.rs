//! Publishing with confirms.
//!
//! A publish is written at once and confirmed later; meanwhile others are written. Every publish is
//! answered exactly once, by what [`Publisher::next`] gives, with the ticket it was given: unless it is
//! on a channel without confirms, for what nobody misses.

use std::{
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::{Future, FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection,
    options::BasicPublishOptions,
    types::{FieldTable, ShortString},
};

use crate::transport::amqp::{connection::confirming_channel, traffic};

/// A message on its way out.
#[derive(Clone, Debug, Default)]
pub struct Outgoing {
    /// The exchange it goes to; empty: straight to the queue that `key` names.
    pub exchange: ShortString,
    /// The routing key.
    pub key: ShortString,
    /// The `type` property: `dtc.<kind>.v1`.
    pub message_type: &'static str,
    /// The body.
    pub body: Vec<u8>,
    /// Whether it must survive a restart of the broker.
    pub persistent: bool,
    /// Whether it is worth telling apart that no queue took it.
    pub mandatory: bool,
    /// To whom an answer goes: the first part of its routing key.
    pub reply_to: Option<ShortString>,
    /// What tells one message from another.
    pub message_id: Option<ShortString>,
    /// Seconds since the epoch.
    pub timestamp: Option<u64>,
    /// When the broker may throw it away.
    pub expires_after: Option<Duration>,
    /// Headers.
    pub headers: Option<FieldTable>,
}

impl Outgoing {
    fn properties(&mut self) -> BasicProperties {
        let mut properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_delivery_mode(if self.persistent { 2 } else { 1 });
        if !self.message_type.is_empty() {
            properties = properties.with_type(self.message_type.into());
        }
        if let Some(reply_to) = self.reply_to.take() {
            properties = properties.with_reply_to(reply_to);
        }
        if let Some(message_id) = self.message_id.take() {
            properties = properties.with_message_id(message_id);
        }
        if let Some(timestamp) = self.timestamp {
            properties = properties.with_timestamp(timestamp);
        }
        if let Some(after) = self.expires_after {
            properties = properties.with_expiration(after.as_millis().to_string().into());
        }
        if let Some(headers) = self.headers.take() {
            properties = properties.with_headers(headers);
        }
        properties
    }
}

/// What became of a publish.
#[derive(Clone, Debug)]
pub enum Published {
    /// It is with every queue that it should be with; if it is persistent, safely.
    Confirmed,
    /// No queue took it.
    Unroutable,
    /// A queue didn't take it now: it is full, or its node is in trouble.
    Refused,
    /// The connection or the channel is gone. It may have arrived or not.
    Lost(lapin::Error),
}

/// Publishes one message on `channel`; on one without confirms it counts as confirmed when it is
/// written. It is on its way when the future is first polled.
pub async fn publish(channel: Channel, mut message: Outgoing) -> Published {
    let options = BasicPublishOptions { mandatory: message.mandatory, immediate: false };
    let properties = message.properties();
    let Outgoing { exchange, key, body, .. } = message;
    traffic::published();
    let written = channel.basic_publish(exchange, key, options, &body, properties).await;
    drop(body);
    let confirmed = match written {
        Ok(confirm) => confirm.await,
        Err(error) => Err(error),
    };
    match confirmed {
        // A message that comes back is acknowledged all the same.
        Ok(Confirmation::Ack(Some(_))) => Published::Unroutable,
        Ok(Confirmation::Ack(None) | Confirmation::NotRequested) => Published::Confirmed,
        Ok(Confirmation::Nack(_)) => Published::Refused,
        Err(error) => Published::Lost(error),
    }
}

/// A channel to publish on, and what is on its way.
pub struct Publisher<T> {
    channel: Channel,
    on_their_way: FuturesUnordered<Publishing<T>>,
    confirms: Confirms,
    /// The last one, if nobody watches it.
    unwatched: Option<Publishing<T>>,
}

type Publishing<T> = BoxFuture<'static, (T, Published)>;

/// Whether publishes are confirmed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Confirms {
    All,
    /// Not by the broker. What is written is known of one in so many, and with it of all before it.
    Written {
        unwatched: u32,
    },
}

/// How many unconfirmed publishes there are for each that is watched until it is written: enough to
/// spare a wake-up for most, and few enough to tell how many are on their way.
const UNWATCHED_MAX: u32 = 32;

impl<T: Send + 'static> Publisher<T> {
    /// A new channel of `connection`.
    pub async fn open(connection: &Connection) -> Result<Self, lapin::Error> {
        let channel = confirming_channel(connection).await?;
        Ok(Self::on(channel, Confirms::All))
    }

    /// The same without confirms, for what nobody misses: what is written counts as confirmed, and
    /// most of it is not told of by [`Publisher::next`]. That it is refused shows by the end of the
    /// channel: see [`Publisher::is_open`].
    pub async fn unconfirmed(connection: &Connection) -> Result<Self, lapin::Error> {
        let channel = connection.create_channel().await?;
        Ok(Self::on(channel, Confirms::Written { unwatched: 0 }))
    }

    fn on(channel: Channel, confirms: Confirms) -> Self {
        Self { channel, on_their_way: FuturesUnordered::new(), confirms, unwatched: None }
    }

    /// Whether its channel stands, as far as is known.
    pub fn is_open(&self) -> bool {
        self.channel.status().connected()
    }

    /// Writes `message` behind those that were written before.
    pub fn publish(&mut self, message: Outgoing, ticket: T) {
        let publishing = publish(self.channel.clone(), message);
        let mut publishing = publishing.map(|published| (ticket, published)).boxed();
        // The first poll writes it; waiting for it to be written would put one message behind the
        // other.
        let started = Pin::new(&mut publishing).poll(&mut Context::from_waker(Waker::noop()));
        let publishing = match started {
            Poll::Ready(ended) => std::future::ready(ended).boxed(),
            Poll::Pending => publishing,
        };
        self.unwatched = None;
        if let Confirms::Written { unwatched } = &mut self.confirms {
            *unwatched = (*unwatched + 1) % UNWATCHED_MAX;
            // Whoever waits for nothing is told of nothing: it is written all the same. Not on a
            // channel that is gone.
            if *unwatched > 0 && self.channel.status().connected() {
                self.unwatched = Some(publishing);
                return;
            }
        }
        self.on_their_way.push(publishing);
    }

    /// What became of one of those on their way; waits for ever if none is.
    pub async fn next(&mut self) -> (T, Published) {
        match self.on_their_way.next().await {
            Some(ended) => ended,
            None => std::future::pending().await,
        }
    }

    /// The same, if it is known by now.
    pub fn ready(&mut self) -> Option<(T, Published)> {
        self.on_their_way.next().now_or_never().flatten()
    }

    /// Waits for the end of everything that is on its way, and drops what became of it. Whoever
    /// closes the connection waits for this first: lapin writes the goodbye before all that is
    /// still to be published.
    pub async fn finish(&mut self) {
        if let Some(unwatched) = &mut self.unwatched {
            unwatched.await;
        }
        self.unwatched = None;
        while self.on_their_way.next().await.is_some() {}
    }

    /// How many are on their way; of unconfirmed ones, how many may be, give or take those since the
    /// last that is watched.
    pub fn outstanding(&self) -> usize {
        let watched = self.on_their_way.len();
        match self.confirms {
            Confirms::All => watched,
            Confirms::Written { .. } => watched.saturating_mul(UNWATCHED_MAX as usize),
        }
    }
}

impl<T> std::fmt::Debug for Publisher<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher").field("outstanding", &self.on_their_way.len()).finish()
    }
}
