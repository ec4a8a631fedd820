//! The link of a process to the broker: two connections, and the events of both.
//!
//! There are two, since the broker stops reading from publishing connections when it runs out of
//! memory or disk, and acknowledgements must still reach it. Both are to the same node: with two
//! nodes, failures would be twice as likely.
//!
//! **An alarm ends.** The broker reports when it stops taking messages, and when it resumes. If it
//! fails to report the latter, a new connection shows it.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{
    FutureExt, Stream, StreamExt,
    future::{self, BoxFuture},
    stream,
};
use tokio::time::{Instant, sleep, timeout};

use crate::transport::amqp::{
    connection::{Broker, BrokerConnection, ConnectionError, PublishChannel, close},
    error::Disposition,
    publisher::{OutgoingMessage, PublishOutcome, publish_within},
};

/// After how long an alarm is logged, and checked on a new connection.
const CHECK_AFTER: Duration = Duration::from_secs(5);

/// How long a broker without an alarm may take for a message that no queue takes.
const TAKE_MAX: Duration = Duration::from_secs(3);

/// Two connections to one node of a broker: the link of a process that publishes and consumes.
#[derive(Debug)]
pub struct ConnectionPair {
    /// For publishing only.
    pub publishing: Arc<BrokerConnection>,
    /// For everything else.
    pub consuming: Arc<BrokerConnection>,
}

impl Broker {
    /// Connects twice to one host: first to a random one, and each time to the next one.
    ///
    /// # Errors
    ///
    /// No host accepts the connections. A refusal is reported in preference to other failures,
    /// since retrying doesn't help.
    pub async fn connect_pair(&self) -> Result<ConnectionPair, ConnectionError> {
        let is_final = |error: &ConnectionError| error.disposition() == Disposition::GiveUp;
        self.connect_pair_with(|pair| future::ready(Ok(pair)), is_final).await
    }

    /// Connects twice to one host, and runs `open` on the connections. If a host has not succeeded
    /// after a moment, the next one is tried in parallel: a node that is cut off from the others
    /// accepts connections, but declares nothing.
    ///
    /// # Errors
    ///
    /// No host succeeds. A failure that `is_final` is reported in preference to others.
    pub async fn connect_pair_with<T, E, F>(
        &self,
        open: impl Fn(ConnectionPair) -> F + Sync,
        is_final: impl Fn(&E) -> bool,
    ) -> Result<T, E>
    where
        T: Send,
        E: From<ConnectionError> + Send,
        F: Future<Output = Result<T, E>> + Send,
    {
        let open = &open;
        let open_at = |host| {
            async move {
                let publishing = self.connect_to(host, "publish");
                let consuming = self.connect_to(host, "consume");
                let (publishing, consuming) = future::try_join(publishing, consuming).await?;
                open(ConnectionPair { publishing: publishing.into(), consuming: consuming.into() })
                    .await
            }
            .boxed()
        };
        self.first_that(open_at, is_final).await
    }

    /// Whether the broker takes messages, checked on a new connection.
    async fn takes_messages(&self) -> bool {
        let Ok(connection) = self.connect("alarm").await else { return false };
        let taken = match PublishChannel::open(&connection).await {
            Ok(channel) => is_read(channel).await,
            Err(_) => false,
        };
        close(&connection).await;
        taken
    }
}

impl ConnectionPair {
    /// Whether both connections are up, as far as is known.
    pub fn is_up(&self) -> bool {
        self.publishing.status().connected() && self.consuming.status().connected()
    }

    /// Watches both connections, which are to `broker`. There may be only one monitor.
    pub fn watch(&self, broker: Broker) -> ConnectionMonitor {
        let events = stream::select(events(&self.publishing), events(&self.consuming));
        let mut monitor = ConnectionMonitor { broker, events: Box::pin(events), blocked: None };
        if self.publishing.status().blocked() {
            monitor.on_event(RawEvent::Blocked("an alarm from before".to_owned()));
        }
        monitor
    }

    /// Closes both connections. If the broker doesn't receive that, it will notice their end.
    pub async fn close(self) {
        future::join(close(&self.consuming), close(&self.publishing)).await;
    }
}

/// Whether the broker reads publishes on `channel`. During an alarm it still reads the first
/// message on a connection, and stops only after it.
async fn is_read(channel: PublishChannel) -> bool {
    for _ in 0..2 {
        let message = OutgoingMessage { key: "dtc-nowhere".into(), ..OutgoingMessage::default() };
        match publish_within(channel.clone(), message, TAKE_MAX).await {
            PublishOutcome::Unconfirmed(_) => return false,
            PublishOutcome::Confirmed | PublishOutcome::Unroutable | PublishOutcome::Refused => {}
            // A refusal shows that it was read.
            PublishOutcome::Lost(_) => return true,
        }
    }
    true
}

/// Something that happened to a [`ConnectionPair`].
#[derive(Debug)]
pub enum ConnectionEvent {
    /// The broker has stopped reading publishes.
    Blocked,
    /// It reads them again.
    Unblocked,
    /// One of the two connections is gone.
    Lost(lapin::Error),
    /// The broker takes messages again but has not reported it: both connections are useless.
    Stale,
    /// The broker has closed a channel of one of the connections, for this reason. The owners of
    /// channels must find out whose it was.
    ChannelLost(lapin::Error),
}

/// Watches both connections, and logs alarms.
pub struct ConnectionMonitor {
    broker: Broker,
    events: Pin<Box<dyn Stream<Item = RawEvent> + Send>>,
    blocked: Option<ActiveAlarm>,
}

/// An alarm of the broker.
struct ActiveAlarm {
    since: Instant,
    reason: String,
    /// The check whether the broker takes messages after all.
    checking: BoxFuture<'static, bool>,
}

enum RawEvent {
    Blocked(String),
    Unblocked,
    Lost(lapin::Error),
    ChannelLost(lapin::Error),
}

impl ConnectionMonitor {
    /// Whether the broker has an alarm.
    pub fn is_blocked(&self) -> bool {
        self.blocked.is_some()
    }

    /// The next change; waits for ever if there is none.
    pub async fn next(&mut self) -> ConnectionEvent {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// [`ConnectionMonitor::next`] as a poll function, for callers that wait for several things.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<ConnectionEvent> {
        if let Poll::Ready(Some(event)) = self.events.poll_next_unpin(cx) {
            return Poll::Ready(self.on_event(event));
        }
        while let Some(blocked) = &mut self.blocked {
            let Poll::Ready(is_over) = blocked.checking.poll_unpin(cx) else { break };
            if let Some(change) = self.on_check(is_over) {
                return Poll::Ready(change);
            }
        }
        Poll::Pending
    }

    fn on_event(&mut self, event: RawEvent) -> ConnectionEvent {
        match event {
            RawEvent::Blocked(reason) => {
                tracing::warn!(reason, "the broker takes no messages for now");
                let checking = self.check_later();
                self.blocked = Some(ActiveAlarm { since: Instant::now(), reason, checking });
                ConnectionEvent::Blocked
            }
            RawEvent::Unblocked => {
                let since = self.blocked.take().map(|blocked| blocked.since);
                let seconds = since.unwrap_or_else(Instant::now).elapsed().as_secs();
                tracing::info!(seconds, "the broker takes messages again");
                ConnectionEvent::Unblocked
            }
            RawEvent::Lost(error) => ConnectionEvent::Lost(error),
            RawEvent::ChannelLost(error) => ConnectionEvent::ChannelLost(error),
        }
    }

    fn on_check(&mut self, is_over: bool) -> Option<ConnectionEvent> {
        let blocked = self.blocked.take()?;
        let (since, reason) = (blocked.since, blocked.reason);
        let seconds = since.elapsed().as_secs();
        if is_over {
            tracing::warn!(
                reason,
                seconds,
                "the broker takes messages again and has not told this connection; connecting again"
            );
            return Some(ConnectionEvent::Stale);
        }
        tracing::warn!(reason, seconds, "the broker takes no messages yet");
        let checking = self.check_later();
        self.blocked = Some(ActiveAlarm { since, reason, checking });
        None
    }

    fn check_later(&self) -> BoxFuture<'static, bool> {
        let broker = self.broker.clone();
        async move {
            sleep(CHECK_AFTER).await;
            timeout(CHECK_AFTER, broker.takes_messages()).await.unwrap_or(false)
        }
        .boxed()
    }
}

impl std::fmt::Debug for ConnectionMonitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectionMonitor")
            .field("is_blocked", &self.is_blocked())
            .finish_non_exhaustive()
    }
}

/// The events of one connection. Consumers are notified when their channel ends. But a publish
/// without a confirm fails only at the broker, which then closes its channel: without these events
/// that would go unnoticed until the next publish.
fn events(connection: &BrokerConnection) -> impl Stream<Item = RawEvent> + Send + Unpin + 'static {
    let status = connection.status().clone();
    connection.events_listener().filter_map(move |event| {
        future::ready(match event {
            lapin::Event::ConnectionBlocked(reason) => Some(RawEvent::Blocked(reason)),
            lapin::Event::ConnectionUnblocked => Some(RawEvent::Unblocked),
            lapin::Event::Error(error) if status.connected() => Some(RawEvent::ChannelLost(error)),
            lapin::Event::Error(error) => Some(RawEvent::Lost(error)),
            lapin::Event::Connected | lapin::Event::SendFlow(_) | _ => None,
        })
    })
}
