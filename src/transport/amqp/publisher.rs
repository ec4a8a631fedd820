//! Publishing with confirms, each within a bound.
//!
//! A publish is written at once and confirmed later; meanwhile others are written. Every publish is
//! answered exactly once, by what [`Publisher::next`] gives, with the ticket it was given: unless it is
//! on a channel without confirms, for what nobody misses.
//!
//! **A confirm that does not come.** A queue whose node is out of reach delays the confirms of what
//! was published to it, and only those; a broker that has stopped reading from the connection, or
//! that has lost a confirm, answers nothing at all. So a publish that is not confirmed within
//! [`CONFIRM_MAX`] is given up by itself while others are answered. When none is, the lane takes
//! another channel; and if the connection gives none, the lane is [lost](LaneLost). Where a lost confirm
//! holds up everything else, a lane [begins with less](Publisher::impatient), and waits for twice as long
//! each time that the next channel confirms nothing either.
//!
//! **A message that comes back.** The broker returns what no queue takes just before it confirms it.
//! lapin hands returned messages out in the order in which they came, to whichever confirm it
//! completes next; so whose message it was is told by its id, as the connection has seen it come in.

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
    bounded::{ANSWER_MAX, AskError, answer},
    connection::{BrokerConnection, PublishChannel},
    traffic,
};

/// How long a publish may be unconfirmed. A cluster needs 10 s to elect a leader where it takes a
/// node for lost after the shortest sensible `net_ticktime` of 10 s.
pub const CONFIRM_MAX: Duration = Duration::from_secs(10);

/// A timer that is later than this tells that this process has not run, as one that was frozen.
const LATE: Duration = Duration::from_secs(1);

/// How many publishes may have been given up on one channel, whose confirms may still come.
const ABANDONED_MAX: usize = 4096;

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
    /// Who publishes it; a broker refuses what names another user than its connection's.
    pub user_id: Option<ShortString>,
    /// Seconds since the epoch.
    pub timestamp: Option<u64>,
    /// When the broker may throw it away.
    pub expires_after: Option<Duration>,
    /// Headers.
    pub headers: Option<FieldTable>,
}

impl Outgoing {
    /// What tells it from others on its channel, should it come back.
    fn identify(&mut self) -> ShortString {
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

/// What became of a publish.
#[derive(Clone, Debug)]
pub enum Published {
    /// It is with every queue that it should be with; if it is persistent, safely.
    Confirmed,
    /// No queue took it.
    Unroutable,
    /// A queue didn't take it now: it is full, or its node is down.
    Refused,
    /// The broker has said nothing of it for so long. It may have arrived or not.
    Unconfirmed(Duration),
    /// The connection or the channel is gone. It may have arrived or not.
    Lost(lapin::Error),
}

/// Publishes one message on `channel`; on one without confirms it counts as confirmed when it is
/// written. It is on its way when the future is first polled. The wait for its confirm is the caller's
/// to bound: see [`publish_within`].
pub async fn publish(channel: PublishChannel, mut message: Outgoing) -> Published {
    let options = BasicPublishOptions { mandatory: message.mandatory, immediate: false };
    let id = message.mandatory.then(|| message.identify());
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
        // A message that comes back is confirmed all the same.
        Ok(Confirmation::Ack(_)) => match id.is_some_and(|id| channel.was_returned(&id)) {
            true => Published::Unroutable,
            false => Published::Confirmed,
        },
        Ok(Confirmation::NotRequested) => Published::Confirmed,
        Ok(Confirmation::Nack(_)) => Published::Refused,
        Err(error) => Published::Lost(error),
    }
}

/// Publishes one message on `channel`, and waits for its confirm no longer than `limit`. A channel
/// on which a confirm did not come is not to be used again.
pub async fn publish_within(
    channel: PublishChannel,
    message: Outgoing,
    limit: Duration,
) -> Published {
    match timeout(limit, publish(channel, message)).await {
        Ok(published) => published,
        Err(_) => Published::Unconfirmed(limit),
    }
}

/// A lane is of no use any more.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LaneLost {
    /// Its channel, or its connection, is gone. What was on its way may have arrived or not.
    #[error("lost the channel for {what}")]
    Channel {
        /// What the lane is for.
        what: Arc<str>,
        /// Why.
        #[source]
        source: lapin::Error,
    },
    /// Nothing that was published on it was confirmed, and another channel is not to be had.
    #[error("the broker has answered nothing on the channel for {what} for {:.1} s", silent_for.as_secs_f64())]
    Silent {
        /// What the lane is for.
        what: Arc<str>,
        /// How long nothing has come.
        silent_for: Duration,
        /// Why there is no other channel.
        #[source]
        source: AskError,
    },
}

impl LaneLost {
    /// What the broker said, if it said why.
    pub fn broker(&self) -> Option<&lapin::Error> {
        match self {
            Self::Channel { source, .. } => Some(source),
            Self::Silent { source, .. } => source.broker(),
        }
    }
}

/// A channel to publish on, and what is on its way.
///
/// When nothing is confirmed any more it opens another channel by itself, and what was on its way is
/// answered by [`Published::Unconfirmed`].
pub struct Publisher<T> {
    what: Arc<str>,
    /// How long a confirm may take: at first, now, and at most.
    limit_first: Duration,
    limit: Duration,
    limit_max: Duration,
    connection: Arc<BrokerConnection>,
    channel: PublishChannel,
    confirms: Confirms,
    on_their_way: FuturesUnordered<Publishing>,
    /// The last one, if nobody watches it.
    unwatched: Option<Publishing>,
    /// Those on their way, in order; `None`: answered, or given up. The first has number `first`.
    waiting: VecDeque<Option<Waiting<T>>>,
    first: u64,
    /// How many of them wait.
    outstanding: usize,
    /// Those given up whose tickets have yet to be handed back.
    given_up: VecDeque<(T, Duration)>,
    /// How many were given up on this channel, and may still be confirmed.
    abandoned: usize,
    /// When a publish was answered last.
    heard_at: Instant,
    /// When the oldest has waited for long enough. It is set again when it is over.
    timer: Pin<Box<Sleep>>,
    renewal: Option<Renewal<T>>,
}

type Publishing = BoxFuture<'static, (u64, Published)>;

struct Waiting<T> {
    ticket: T,
    since: Instant,
}

/// Another channel is being opened.
struct Renewal<T> {
    opening: BoxFuture<'static, Result<PublishChannel, AskError>>,
    silent_for: Duration,
    /// What was published meanwhile.
    backlog: Vec<(Outgoing, T)>,
}

/// Whether publishes are confirmed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Confirms {
    All,
    /// Not by the broker. What is written is known of one in so many, and with it of all before it.
    Written {
        unwatched: u32,
    },
}

impl Confirms {
    async fn channel(self, connection: &BrokerConnection) -> Result<PublishChannel, AskError> {
        match self {
            Self::All => PublishChannel::open(connection).await,
            Self::Written { .. } => PublishChannel::unconfirmed(connection).await,
        }
    }
}

/// How many unconfirmed publishes there are for each that is watched until it is written: enough to
/// spare a wake-up for most, and few enough to tell how many are on their way.
const UNWATCHED_MAX: u32 = 32;

impl<T: Send + 'static> Publisher<T> {
    /// A new channel of `connection`. `what` is published on it, as a log line would say.
    ///
    /// # Errors
    ///
    /// The connection gives none, or not in time.
    pub async fn open(
        connection: &Arc<BrokerConnection>,
        what: impl Into<Arc<str>>,
    ) -> Result<Self, AskError> {
        Self::on(connection, what.into(), Confirms::All).await
    }

    /// The same without confirms, for what nobody misses: what is written counts as confirmed, and
    /// most of it is not told of by [`Publisher::next`]. That it is refused shows by the end of the
    /// channel: see [`Publisher::is_open`].
    ///
    /// # Errors
    ///
    /// The connection gives none, or not in time.
    pub async fn unconfirmed(
        connection: &Arc<BrokerConnection>,
        what: impl Into<Arc<str>>,
    ) -> Result<Self, AskError> {
        Self::on(connection, what.into(), Confirms::Written { unwatched: 0 }).await
    }

    async fn on(
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
            channel: confirms.channel(connection).await?,
            confirms,
            on_their_way: FuturesUnordered::new(),
            unwatched: None,
            waiting: VecDeque::new(),
            first: 0,
            outstanding: 0,
            given_up: VecDeque::new(),
            abandoned: 0,
            heard_at: Instant::now(),
            timer: Box::pin(sleep(CONFIRM_MAX)),
            renewal: None,
        })
    }

    /// The same, where a confirm may take no longer than `limit`.
    #[must_use]
    pub fn within(self, limit: Duration) -> Self {
        let timer = Box::pin(sleep(limit));
        Self { limit_first: limit, limit, limit_max: limit, timer, ..self }
    }

    /// The same, where a confirm may take no longer than `limit` at first; twice as long on the next
    /// channel if nothing was confirmed on the one before, and so on up to `limit_max`.
    #[must_use]
    pub fn impatient(self, limit: Duration, limit_max: Duration) -> Self {
        Self { limit_max, ..self.within(limit) }
    }

    /// Whether its channel stands, as far as is known.
    pub fn is_open(&self) -> bool {
        self.channel.status().connected()
    }

    /// Writes `message` behind those that were written before.
    pub fn publish(&mut self, message: Outgoing, ticket: T) {
        if let Some(renewal) = &mut self.renewal {
            return renewal.backlog.push((message, ticket));
        }
        let number = self.first + self.waiting.len() as u64;
        let publishing = publish(self.channel.clone(), message);
        let mut publishing = publishing.map(move |published| (number, published)).boxed();
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
        self.waiting.push_back(Some(Waiting { ticket, since: Instant::now() }));
        self.outstanding += 1;
        self.on_their_way.push(publishing);
    }

    /// What became of one of those on their way; waits for ever if none is.
    ///
    /// # Errors
    ///
    /// Nothing can be published any more, and nothing will be answered.
    pub async fn next(&mut self) -> Result<(T, Published), LaneLost> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The same, if it is known by now.
    pub fn ready(&mut self) -> Option<Result<(T, Published), LaneLost>> {
        self.next().now_or_never()
    }

    /// [`Publisher::next`], for those who wait for several.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<(T, Published), LaneLost>> {
        loop {
            if let Some((ticket, silent_for)) = self.given_up.pop_front() {
                return Poll::Ready(Ok((ticket, Published::Unconfirmed(silent_for))));
            }
            while let Poll::Ready(Some((number, published))) = self.on_their_way.poll_next_unpin(cx)
            {
                if let Published::Lost(source) = published {
                    return Poll::Ready(Err(LaneLost::Channel {
                        what: Arc::clone(&self.what),
                        source,
                    }));
                }
                if let Some(ticket) = self.answered(number) {
                    return Poll::Ready(Ok((ticket, published)));
                }
            }
            if let Some(renewal) = &mut self.renewal {
                let Poll::Ready(opened) = renewal.opening.poll_unpin(cx) else {
                    return Poll::Pending;
                };
                self.renewed(opened).map_or(Ok(()), Err)?;
                continue;
            }
            if self.waiting.is_empty() || self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.expire();
        }
    }

    /// Publish `number` is answered; `None`: it had been given up.
    fn answered(&mut self, number: u64) -> Option<T> {
        self.heard_at = Instant::now();
        self.limit = self.limit_first;
        let index = usize::try_from(number.checked_sub(self.first)?).ok()?;
        let Some(waiting) = self.waiting.get_mut(index).and_then(Option::take) else {
            self.abandoned = self.abandoned.saturating_sub(1);
            return None;
        };
        self.outstanding -= 1;
        self.forget_answered();
        Some(waiting.ticket)
    }

    fn forget_answered(&mut self) {
        while let Some(None) = self.waiting.front() {
            self.waiting.pop_front();
            self.first += 1;
        }
    }

    /// The timer is over: gives up the oldest publish if it has waited for too long, and all of them
    /// if none was answered since.
    fn expire(&mut self) {
        let now = Instant::now();
        let is_late = self.timer.deadline().elapsed() >= LATE;
        if is_late || self.connection.status().blocked() {
            // The broker reads nothing, and has said so: it does that when its alarm is over. Or this
            // process has not run, and what has come is yet to be seen.
            self.waiting.iter_mut().flatten().for_each(|waiting| waiting.since = now);
        }
        while let Some(Some(oldest)) = self.waiting.front() {
            let silent_for = now.saturating_duration_since(oldest.since);
            if silent_for < self.limit {
                return self.timer.as_mut().reset(oldest.since + self.limit);
            }
            if self.heard_at <= oldest.since || self.abandoned >= ABANDONED_MAX {
                return self.renew(silent_for);
            }
            if let Some(oldest) = self.waiting.front_mut().and_then(Option::take) {
                tracing::debug!(what = &*self.what, "a publish was not confirmed in time");
                self.given_up.push_back((oldest.ticket, silent_for));
                self.outstanding -= 1;
                self.abandoned += 1;
            }
            self.forget_answered();
        }
        self.timer.as_mut().reset(now + self.limit);
    }

    /// Gives up all that is on its way, and opens another channel.
    fn renew(&mut self, silent_for: Duration) {
        let (what, outstanding) = (&*self.what, self.outstanding);
        if self.limit > self.limit_first {
            // That has been said.
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
        self.on_their_way = FuturesUnordered::new();
        self.unwatched = None;
        let (old, connection, confirms) =
            (self.channel.clone(), Arc::clone(&self.connection), self.confirms);
        let opening = async move {
            let opened = confirms.channel(&connection).await;
            // What is still to be confirmed on it nobody waits for.
            if opened.is_ok() {
                let closing = async move { old.close(200, "done".into()).await };
                tokio::spawn(async move { answer(ANSWER_MAX, closing).await });
            }
            opened
        };
        let opening = opening.boxed();
        self.renewal = Some(Renewal { opening, silent_for, backlog: Vec::new() });
    }

    fn renewed(&mut self, opened: Result<PublishChannel, AskError>) -> Option<LaneLost> {
        let Renewal { silent_for, backlog, .. } = self.renewal.take()?;
        match opened {
            Ok(channel) => self.channel = channel,
            Err(source) => {
                let silent_for = silent_for + ANSWER_MAX;
                return Some(LaneLost::Silent { what: Arc::clone(&self.what), silent_for, source });
            }
        }
        self.heard_at = Instant::now();
        self.limit = (self.limit * 2).min(self.limit_max);
        self.timer.as_mut().reset(self.heard_at + self.limit);
        for (message, ticket) in backlog {
            self.publish(message, ticket);
        }
        None
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
