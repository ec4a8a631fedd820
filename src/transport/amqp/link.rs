//! The two connections of one that publishes and consumes, and what happens to them.
//!
//! They are two, since the broker stops reading from connections that publish when it runs out of
//! memory or disk, and what is consumed must still be acknowledged. Both are with the same node: two
//! nodes would be twice as likely to be in trouble.
//!
//! **An alarm has an end.** The broker says when it takes no messages, and when it does again. Should
//! it not say so, that shows on a fresh connection.

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
    connection::{Broker, BrokerConnection, ConnectError, PublishChannel, close},
    error::Disposition,
    publisher::{Outgoing, Published, publish_within},
};

/// How long a broker has taken no messages when it is tried whether that is so, and logged.
const CHECK_AFTER: Duration = Duration::from_secs(5);

/// How long a broker without an alarm may take for a message that nobody wants.
const TAKEN_WITHIN: Duration = Duration::from_secs(3);

/// Two connections to a broker.
#[derive(Debug)]
pub struct Link {
    /// For publishing only.
    pub publishing: Arc<BrokerConnection>,
    /// For everything else.
    pub consuming: Arc<BrokerConnection>,
}

impl Broker {
    /// Connects twice to one host: to any at first, and to the next one each time.
    ///
    /// # Errors
    ///
    /// None of the hosts lets us in. If one refuses us, its refusal is reported: waiting doesn't help.
    pub async fn link(&self) -> Result<Link, ConnectError> {
        let is_final = |error: &ConnectError| error.disposition() == Disposition::GiveUp;
        self.link_with(|link| future::ready(Ok(link)), is_final).await
    }

    /// Connects twice to one host, and opens there what `open` says. A host that does not do that
    /// within a moment is not waited for before the next is tried as well: a node that is cut off from
    /// the others lets us in, and declares nothing.
    ///
    /// # Errors
    ///
    /// None of the hosts does that. The failure of one that `is_final` is reported before others.
    pub async fn link_with<T, E, F>(
        &self,
        open: impl Fn(Link) -> F + Sync,
        is_final: impl Fn(&E) -> bool,
    ) -> Result<T, E>
    where
        T: Send,
        E: From<ConnectError> + Send,
        F: Future<Output = Result<T, E>> + Send,
    {
        let open = &open;
        let open_at = |host| {
            async move {
                let publishing = self.connect_to(host, "publish");
                let consuming = self.connect_to(host, "consume");
                let (publishing, consuming) = future::try_join(publishing, consuming).await?;
                open(Link { publishing: publishing.into(), consuming: consuming.into() }).await
            }
            .boxed()
        };
        self.first_that(open_at, is_final).await
    }

    /// Whether the broker takes what is published, on a connection of its own.
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

impl Link {
    /// Whether both connections stand, as far as is known.
    pub fn is_up(&self) -> bool {
        self.publishing.status().connected() && self.consuming.status().connected()
    }

    /// Watches both connections, which are to `broker`, from now on. For one watcher only.
    pub fn watch(&self, broker: Broker) -> LinkWatch {
        let events = stream::select(events(&self.publishing), events(&self.consuming));
        let mut watch = LinkWatch { broker, events: Box::pin(events), blocked: None };
        if self.publishing.status().blocked() {
            watch.hear(LinkEvent::Blocked("an alarm from before".to_owned()));
        }
        watch
    }

    /// Says goodbye. A broker that doesn't hear it will notice.
    pub async fn close(self) {
        future::join(close(&self.consuming), close(&self.publishing)).await;
    }
}

/// Whether the broker reads what is published on `channel`. Of a connection that has not published yet
/// it reads the first message also during an alarm, and only then no more.
async fn is_read(channel: PublishChannel) -> bool {
    for _ in 0..2 {
        let message = Outgoing { key: "dtc-nowhere".into(), ..Outgoing::default() };
        match publish_within(channel.clone(), message, TAKEN_WITHIN).await {
            Published::Unconfirmed(_) => return false,
            Published::Confirmed | Published::Unroutable | Published::Refused => {}
            // That it is refused says that it was read.
            Published::Lost(_) => return true,
        }
    }
    true
}

/// What happens to a [`Link`].
#[derive(Debug)]
pub enum LinkChange {
    /// The broker reads no more of what is published.
    Blocked,
    /// It does again.
    Unblocked,
    /// One of the two connections is gone.
    Lost(lapin::Error),
    /// The broker takes messages again and has not said so: the link is of no use.
    Stale,
    /// The broker has ended a channel of one of them, for this reason. Whose it was is for those to
    /// find out who have channels.
    ChannelLost(lapin::Error),
}

/// Hears what happens to a link, and logs what it hears of alarms.
pub struct LinkWatch {
    broker: Broker,
    events: Pin<Box<dyn Stream<Item = LinkEvent> + Send>>,
    blocked: Option<Blocked>,
}

/// The broker takes no messages.
struct Blocked {
    since: Instant,
    reason: String,
    /// Whether it does after all.
    checking: BoxFuture<'static, bool>,
}

enum LinkEvent {
    Blocked(String),
    Unblocked,
    Lost(lapin::Error),
    ChannelLost(lapin::Error),
}

impl LinkWatch {
    /// Whether the broker takes no messages.
    pub fn is_blocked(&self) -> bool {
        self.blocked.is_some()
    }

    /// What happens next; waits for ever if nothing does.
    pub async fn next(&mut self) -> LinkChange {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// [`LinkWatch::next`], for those who wait for several things.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<LinkChange> {
        if let Poll::Ready(Some(event)) = self.events.poll_next_unpin(cx) {
            return Poll::Ready(self.hear(event));
        }
        while let Some(blocked) = &mut self.blocked {
            let Poll::Ready(is_over) = blocked.checking.poll_unpin(cx) else { break };
            if let Some(change) = self.checked(is_over) {
                return Poll::Ready(change);
            }
        }
        Poll::Pending
    }

    fn hear(&mut self, event: LinkEvent) -> LinkChange {
        match event {
            LinkEvent::Blocked(reason) => {
                tracing::warn!(reason, "the broker takes no messages for now");
                let checking = self.check_later();
                self.blocked = Some(Blocked { since: Instant::now(), reason, checking });
                LinkChange::Blocked
            }
            LinkEvent::Unblocked => {
                let since = self.blocked.take().map(|blocked| blocked.since);
                let seconds = since.unwrap_or_else(Instant::now).elapsed().as_secs();
                tracing::info!(seconds, "the broker takes messages again");
                LinkChange::Unblocked
            }
            LinkEvent::Lost(error) => LinkChange::Lost(error),
            LinkEvent::ChannelLost(error) => LinkChange::ChannelLost(error),
        }
    }

    fn checked(&mut self, is_over: bool) -> Option<LinkChange> {
        let blocked = self.blocked.take()?;
        let (since, reason) = (blocked.since, blocked.reason);
        let seconds = since.elapsed().as_secs();
        if is_over {
            tracing::warn!(
                reason,
                seconds,
                "the broker takes messages again and has not told this connection; connecting again"
            );
            return Some(LinkChange::Stale);
        }
        tracing::warn!(reason, seconds, "the broker takes no messages yet");
        let checking = self.check_later();
        self.blocked = Some(Blocked { since, reason, checking });
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

impl std::fmt::Debug for LinkWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinkWatch").field("is_blocked", &self.is_blocked()).finish_non_exhaustive()
    }
}

/// What happens to one connection. Its consumers tell of the end of theirs. But what is published
/// without a confirm fails only when it is with the broker, and then the channel is gone that it was
/// written to: of that nobody would hear before the next publish.
fn events(connection: &BrokerConnection) -> impl Stream<Item = LinkEvent> + Send + Unpin + 'static {
    let status = connection.status().clone();
    connection.events_listener().filter_map(move |event| {
        future::ready(match event {
            lapin::Event::ConnectionBlocked(reason) => Some(LinkEvent::Blocked(reason)),
            lapin::Event::ConnectionUnblocked => Some(LinkEvent::Unblocked),
            lapin::Event::Error(error) if status.connected() => Some(LinkEvent::ChannelLost(error)),
            lapin::Event::Error(error) => Some(LinkEvent::Lost(error)),
            lapin::Event::Connected | lapin::Event::SendFlow(_) | _ => None,
        })
    })
}
