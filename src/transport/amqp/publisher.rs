//! Publishing with confirms, each with a time limit.
//!
//! A message is written at once and confirmed later; meanwhile others are written.
//! [`Publisher::next`] reports each publish exactly once, with its ticket; except on a channel
//! without confirms, which is for messages that may be lost.
//!
//! **A missing confirm.** A queue whose node is out of reach delays the confirms of its own
//! messages only; a broker that has stopped reading from the connection, or that has lost a
//! confirm, answers nothing at all. So a publish that is not confirmed within [`CONFIRM_MAX`] is
//! given up alone while others are confirmed. If none is, the publisher opens another channel; and
//! if the connection gives none, the publisher is [lost](PublisherError). If a lost confirm would
//! hold up everything else, a publisher [starts with a shorter
//! limit](Publisher::with_growing_limit), and doubles it each time that the next channel confirms
//! nothing either.
//!
//! **A returned message.** The broker returns a message that no queue takes just before it confirms
//! it. lapin attaches returned messages, in the order of their arrival, to whichever confirm it
//! completes next; so a message is identified by its id, as it was seen on the connection.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::{Future, FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use lapin::{
    BasicProperties, Confirmation,
    options::BasicPublishOptions,
    types::{FieldTable, ShortString},
};
use tokio::time::{Instant, Sleep, sleep, timeout};

use crate::transport::amqp::{
    bounded::{ANSWER_MAX, AskError, STALL_MIN, answer},
    connection::{BrokerConnection, PublishChannel},
    traffic,
};

/// How long a publish may be unconfirmed. A cluster needs 10 s to elect a leader if it considers a
/// node lost after the shortest sensible `net_ticktime` of 10 s.
pub const CONFIRM_MAX: Duration = Duration::from_secs(10);

/// How many publishes may be given up on one channel whose confirms may still arrive.
const ABANDONED_MAX: usize = 4096;

/// A message to publish.
#[derive(Clone, Debug, Default)]
pub struct OutgoingMessage {
    /// The exchange; empty: directly to the queue that `key` names.
    pub exchange: ShortString,
    /// The routing key.
    pub key: ShortString,
    /// The `type` property: `dtc.<kind>.v1`.
    pub message_type: &'static str,
    /// The body.
    pub body: Vec<u8>,
    /// Whether it must survive a restart of the broker.
    pub persistent: bool,
    /// Whether the broker must return it if no queue takes it.
    pub mandatory: bool,
    /// The first part of the routing key for an answer.
    pub reply_to: Option<ShortString>,
    /// The message's id.
    pub message_id: Option<ShortString>,
    /// Who publishes it; a broker refuses what names another user than its connection's.
    pub user_id: Option<ShortString>,
    /// In seconds since the epoch.
    pub timestamp: Option<u64>,
    /// After how long the broker may drop it.
    pub expires_after: Option<Duration>,
    /// Headers.
    pub headers: Option<FieldTable>,
}

impl OutgoingMessage {
    /// Its id on its channel, by which it is recognised if it is returned.
    fn ensure_id(&mut self) -> ShortString {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let next = || ShortString::from(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        self.message_id.get_or_insert_with(next).clone()
    }

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
        if let Some(user_id) = self.user_id.take() {
            properties = properties.with_user_id(user_id);
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

/// The result of a publish.
#[derive(Clone, Debug)]
pub enum PublishOutcome {
    /// Every queue that it was routed to has it; if it is persistent, safely.
    Confirmed,
    /// No queue took it.
    Unroutable,
    /// A queue refused it for now: it is full, or its node is down.
    Refused,
    /// The broker has not confirmed it for that long. It may have arrived or not.
    Unconfirmed(Duration),
    /// The connection or the channel is gone. It may have arrived or not.
    Lost(lapin::Error),
}

/// Publishes one message on `channel`; without confirms it counts as confirmed when it is written.
/// It is written when the future is first polled. The caller must bound the wait for its confirm:
/// see [`publish_within`].
pub async fn publish(channel: PublishChannel, mut message: OutgoingMessage) -> PublishOutcome {
    let options = BasicPublishOptions { mandatory: message.mandatory, immediate: false };
    let id = message.mandatory.then(|| message.ensure_id());
    let properties = message.properties();
    let OutgoingMessage { exchange, key, body, .. } = message;
    traffic::published();
    let written = channel.basic_publish(exchange, key, options, &body, properties).await;
    drop(body);
    let confirmed = match written {
        Ok(confirm) => confirm.await,
        Err(error) => Err(error),
    };
    match confirmed {
        // A returned message is confirmed too.
        Ok(Confirmation::Ack(_)) => match id.is_some_and(|id| channel.was_returned(&id)) {
            true => PublishOutcome::Unroutable,
            false => PublishOutcome::Confirmed,
        },
        Ok(Confirmation::NotRequested) => PublishOutcome::Confirmed,
        Ok(Confirmation::Nack(_)) => PublishOutcome::Refused,
        Err(error) => PublishOutcome::Lost(error),
    }
}

/// Publishes one message on `channel`, and waits at most `limit` for its confirm. Don't use a
/// channel again on which a confirm was missing.
pub async fn publish_within(
    channel: PublishChannel,
    message: OutgoingMessage,
    limit: Duration,
) -> PublishOutcome {
    match timeout(limit, publish(channel, message)).await {
        Ok(published) => published,
        Err(_) => PublishOutcome::Unconfirmed(limit),
    }
}

/// A publisher can't be used any more.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PublisherError {
    /// Its channel or its connection is gone. Unconfirmed messages may have arrived or not.
    #[error("lost the channel for {what}")]
    Channel {
        /// What the publisher is for.
        what: Arc<str>,
        /// The cause.
        #[source]
        source: lapin::Error,
    },
    /// Nothing that was published on it was confirmed, and no other channel can be opened.
    #[error("the broker has answered nothing on the channel for {what} for {:.1} s", silent_for.as_secs_f64())]
    Silent {
        /// What the publisher is for.
        what: Arc<str>,
        /// How long nothing was confirmed.
        silent_for: Duration,
        /// Why no other channel can be opened.
        #[source]
        source: AskError,
    },
}

impl PublisherError {
    /// The broker's reason, if it gave one.
    pub fn broker(&self) -> Option<&lapin::Error> {
        match self {
            Self::Channel { source, .. } => Some(source),
            Self::Silent { source, .. } => source.broker(),
        }
    }
}

/// A channel to publish on, and the unconfirmed messages.
///
/// If nothing is confirmed any more it opens another channel by itself, and reports the unconfirmed
/// messages as [`PublishOutcome::Unconfirmed`].
pub struct Publisher<T> {
    what: Arc<str>,
    /// How long a confirm may take: at first, at present, and at most.
    limit_first: Duration,
    limit: Duration,
    limit_max: Duration,
    connection: Arc<BrokerConnection>,
    channel: PublishChannel,
    confirms: Confirms,
    in_flight: FuturesUnordered<Publishing>,
    /// The last one, if it is not watched.
    unwatched: Option<Publishing>,
    /// The unconfirmed publishes, in order; `None`: confirmed, or given up. The first has number
    /// `first`.
    waiting: VecDeque<Option<UnconfirmedPublish<T>>>,
    first: u64,
    /// How many of them are not yet confirmed.
    outstanding: usize,
    /// Given-up publishes whose tickets have yet to be returned.
    given_up: VecDeque<(T, Duration)>,
    /// How many were given up on this channel, and may still be confirmed.
    abandoned: usize,
    /// When a publish was last confirmed.
    answered_at: Instant,
    /// When the oldest publish reaches its time limit. It is set again when it has fired.
    timer: Pin<Box<Sleep>>,
    renewal: Option<ChannelRenewal<T>>,
}

type Publishing = BoxFuture<'static, (u64, PublishOutcome)>;

struct UnconfirmedPublish<T> {
    ticket: T,
    since: Instant,
}

/// Another channel is being opened.
struct ChannelRenewal<T> {
    opening: BoxFuture<'static, Result<PublishChannel, AskError>>,
    silent_for: Duration,
    /// The messages published meanwhile.
    backlog: Vec<(OutgoingMessage, T)>,
}

/// Whether publishes are confirmed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Confirms {
    All,
    /// Not by the broker. Only one in so many writes is watched, and it stands for all before it.
    Written {
        unwatched: u32,
    },
}

impl Confirms {
    async fn open_channel(self, connection: &BrokerConnection) -> Result<PublishChannel, AskError> {
        match self {
            Self::All => PublishChannel::open(connection).await,
            Self::Written { .. } => PublishChannel::unconfirmed(connection).await,
        }
    }
}

/// How many unconfirmed publishes there are for each one whose write is watched: enough to save
/// most wake-ups, and few enough to know how many are waiting to be written.
const UNWATCHED_MAX: u32 = 32;

impl<T: Send + 'static> Publisher<T> {
    /// Opens a channel with confirms on `connection`. `what` describes its messages in log lines.
    ///
    /// # Errors
    ///
    /// The connection gives no channel, or not in time.
    pub async fn open(
        connection: &Arc<BrokerConnection>,
        what: impl Into<Arc<str>>,
    ) -> Result<Self, AskError> {
        Self::open_with(connection, what.into(), Confirms::All).await
    }

    /// The same without confirms, for messages that may be lost: a message counts as confirmed when
    /// it is written, and [`Publisher::next`] does not report most of them. If the broker refuses
    /// one, it closes the channel: see [`Publisher::is_open`].
    ///
    /// # Errors
    ///
    /// The connection gives no channel, or not in time.
    pub async fn unconfirmed(
        connection: &Arc<BrokerConnection>,
        what: impl Into<Arc<str>>,
    ) -> Result<Self, AskError> {
        Self::open_with(connection, what.into(), Confirms::Written { unwatched: 0 }).await
    }

    async fn open_with(
        connection: &Arc<BrokerConnection>,
        what: Arc<str>,
        confirms: Confirms,
    ) -> Result<Self, AskError> {
        Ok(Self {
            what,
            limit_first: CONFIRM_MAX,
            limit: CONFIRM_MAX,
            limit_max: CONFIRM_MAX,
            connection: Arc::clone(connection),
            channel: confirms.open_channel(connection).await?,
            confirms,
            in_flight: FuturesUnordered::new(),
            unwatched: None,
            waiting: VecDeque::new(),
            first: 0,
            outstanding: 0,
            given_up: VecDeque::new(),
            abandoned: 0,
            answered_at: Instant::now(),
            timer: Box::pin(sleep(CONFIRM_MAX)),
            renewal: None,
        })
    }

    /// The same, with `limit` as the time limit of a confirm.
    #[must_use]
    pub fn with_limit(self, limit: Duration) -> Self {
        let timer = Box::pin(sleep(limit));
        Self { limit_first: limit, limit, limit_max: limit, timer, ..self }
    }

    /// The same, with `limit` as the first time limit of a confirm; it is doubled for the next
    /// channel if nothing was confirmed on the previous one, up to `limit_max`.
    #[must_use]
    pub fn with_growing_limit(self, limit: Duration, limit_max: Duration) -> Self {
        Self { limit_max, ..self.with_limit(limit) }
    }

    /// Whether its channel is open, as far as is known.
    pub fn is_open(&self) -> bool {
        self.channel.status().connected()
    }

    /// Publishes `message` after all earlier ones.
    pub fn publish(&mut self, message: OutgoingMessage, ticket: T) {
        if let Some(renewal) = &mut self.renewal {
            return renewal.backlog.push((message, ticket));
        }
        let number = self.first + self.waiting.len() as u64;
        let publishing = publish(self.channel.clone(), message);
        let mut publishing = publishing.map(move |published| (number, published)).boxed();
        // The first poll writes it; waiting until it is written would delay the next message.
        let started = Pin::new(&mut publishing).poll(&mut Context::from_waker(Waker::noop()));
        let publishing = match started {
            Poll::Ready(ended) => std::future::ready(ended).boxed(),
            Poll::Pending => publishing,
        };
        self.unwatched = None;
        if let Confirms::Written { unwatched } = &mut self.confirms {
            *unwatched = (*unwatched + 1) % UNWATCHED_MAX;
            // A message without a watcher is written all the same, but not on a closed channel.
            if *unwatched > 0 && self.channel.status().connected() {
                self.unwatched = Some(publishing);
                return;
            }
        }
        self.waiting.push_back(Some(UnconfirmedPublish { ticket, since: Instant::now() }));
        self.outstanding += 1;
        self.in_flight.push(publishing);
    }

    /// The result of one unconfirmed publish; waits for ever if there is none.
    ///
    /// # Errors
    ///
    /// The publisher can't be used any more, and reports nothing more.
    pub async fn next(&mut self) -> Result<(T, PublishOutcome), PublisherError> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The same, if a result is known already.
    pub fn try_next(&mut self) -> Option<Result<(T, PublishOutcome), PublisherError>> {
        self.next().now_or_never()
    }

    /// [`Publisher::next`] as a poll function, for callers that wait for several things.
    pub fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(T, PublishOutcome), PublisherError>> {
        loop {
            if let Some((ticket, silent_for)) = self.given_up.pop_front() {
                return Poll::Ready(Ok((ticket, PublishOutcome::Unconfirmed(silent_for))));
            }
            while let Poll::Ready(Some((number, published))) = self.in_flight.poll_next_unpin(cx) {
                if let PublishOutcome::Lost(source) = published {
                    return Poll::Ready(Err(PublisherError::Channel {
                        what: Arc::clone(&self.what),
                        source,
                    }));
                }
                if let Some(ticket) = self.on_answer(number) {
                    return Poll::Ready(Ok((ticket, published)));
                }
            }
            if let Some(renewal) = &mut self.renewal {
                let Poll::Ready(opened) = renewal.opening.poll_unpin(cx) else {
                    return Poll::Pending;
                };
                self.on_renewal(opened).map_or(Ok(()), Err)?;
                continue;
            }
            if self.waiting.is_empty() || self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.expire();
        }
    }

    /// Publish `number` has its result; `None`: it had been given up.
    fn on_answer(&mut self, number: u64) -> Option<T> {
        self.answered_at = Instant::now();
        self.limit = self.limit_first;
        let index = usize::try_from(number.checked_sub(self.first)?).ok()?;
        let Some(waiting) = self.waiting.get_mut(index).and_then(Option::take) else {
            self.abandoned = self.abandoned.saturating_sub(1);
            return None;
        };
        self.outstanding -= 1;
        self.drop_answered();
        Some(waiting.ticket)
    }

    fn drop_answered(&mut self) {
        while let Some(None) = self.waiting.front() {
            self.waiting.pop_front();
            self.first += 1;
        }
    }

    /// The timer has fired: gives up the oldest publish if it has waited too long, and all of them
    /// if none was confirmed since.
    fn expire(&mut self) {
        let now = Instant::now();
        let is_late = self.timer.deadline().elapsed() >= STALL_MIN;
        if is_late || self.connection.status().blocked() {
            // The broker has reported an alarm, and will read when that ends. Or this process did
            // not run, and has yet to see what has arrived.
            self.waiting.iter_mut().flatten().for_each(|waiting| waiting.since = now);
        }
        while let Some(Some(oldest)) = self.waiting.front() {
            let silent_for = now.saturating_duration_since(oldest.since);
            if silent_for < self.limit {
                return self.timer.as_mut().reset(oldest.since + self.limit);
            }
            if self.answered_at <= oldest.since || self.abandoned >= ABANDONED_MAX {
                return self.renew(silent_for);
            }
            if let Some(oldest) = self.waiting.front_mut().and_then(Option::take) {
                tracing::debug!(what = &*self.what, "a publish was not confirmed in time");
                self.given_up.push_back((oldest.ticket, silent_for));
                self.outstanding -= 1;
                self.abandoned += 1;
            }
            self.drop_answered();
        }
        self.timer.as_mut().reset(now + self.limit);
    }

    /// Gives up all unconfirmed publishes, and opens another channel.
    fn renew(&mut self, silent_for: Duration) {
        let (what, outstanding) = (&*self.what, self.outstanding);
        if self.limit > self.limit_first {
            // That has been logged.
            tracing::debug!(what, outstanding, "nothing is confirmed on this channel either");
        } else {
            tracing::warn!(
                outstanding,
                "the broker has confirmed nothing on the channel for {what} for {:.1} s; opening \
                 another one",
                silent_for.as_secs_f64()
            );
        }
        let waiting = std::mem::take(&mut self.waiting).into_iter().flatten();
        self.given_up.extend(waiting.map(|waiting| (waiting.ticket, silent_for)));
        (self.outstanding, self.abandoned, self.first) = (0, 0, 0);
        self.in_flight = FuturesUnordered::new();
        self.unwatched = None;
        let (old, connection, confirms) =
            (self.channel.clone(), Arc::clone(&self.connection), self.confirms);
        let opening = async move {
            let opened = confirms.open_channel(&connection).await;
            // Nobody waits for its remaining confirms.
            if opened.is_ok() {
                let closing = async move { old.close(200, "done".into()).await };
                tokio::spawn(async move { answer(ANSWER_MAX, closing).await });
            }
            opened
        };
        let opening = opening.boxed();
        self.renewal = Some(ChannelRenewal { opening, silent_for, backlog: Vec::new() });
    }

    fn on_renewal(&mut self, opened: Result<PublishChannel, AskError>) -> Option<PublisherError> {
        let ChannelRenewal { silent_for, backlog, .. } = self.renewal.take()?;
        match opened {
            Ok(channel) => self.channel = channel,
            Err(source) => {
                let silent_for = silent_for + ANSWER_MAX;
                return Some(PublisherError::Silent {
                    what: Arc::clone(&self.what),
                    silent_for,
                    source,
                });
            }
        }
        self.answered_at = Instant::now();
        self.limit = (self.limit * 2).min(self.limit_max);
        self.timer.as_mut().reset(self.answered_at + self.limit);
        for (message, ticket) in backlog {
            self.publish(message, ticket);
        }
        None
    }

    /// Waits until every publish has its result, and drops the results. Call it before closing the
    /// connection: lapin sends the close before messages that are still to be written.
    pub async fn finish(&mut self) {
        if let Some(unwatched) = &mut self.unwatched {
            unwatched.await;
        }
        self.unwatched = None;
        while self.in_flight.next().await.is_some() {}
    }

    /// How many publishes are unconfirmed; without confirms, how many may be unwritten, except for
    /// those since the last watched one.
    pub fn outstanding(&self) -> usize {
        let backlog = self.renewal.as_ref().map_or(0, |renewal| renewal.backlog.len());
        let waiting = self.outstanding + self.given_up.len() + backlog;
        match self.confirms {
            Confirms::All => waiting,
            Confirms::Written { .. } => waiting.saturating_mul(UNWATCHED_MAX as usize),
        }
    }
}

impl<T> std::fmt::Debug for Publisher<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = f.debug_struct("Publisher");
        debug.field("what", &self.what).field("outstanding", &self.outstanding);
        debug.finish_non_exhaustive()
    }
}
