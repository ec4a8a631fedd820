//! Connecting, and connecting again.
//!
//! A [`Broker`] says whom to connect to and how; it holds no connection. Whoever works on one
//! connects by [`Broker::link`], works until that is lost, and connects again, pausing for a
//! [`Backoff`] in between. lapin's own recovery stays off: it would deliver again on streams that
//! are believed to go on, and acknowledge what is no longer held.

use std::{fmt, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt, future, stream};
use lapin::{
    Channel, Connection, ConnectionProperties, ErrorKind,
    options::ConfirmSelectOptions,
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
    uri::AMQPUri,
};

use crate::transport::amqp::{
    address::{Address, public},
    unique,
};

/// Whom to connect to, and how.
#[derive(Clone, Debug)]
pub struct Broker {
    /// Where it is: the hosts of one cluster, each as good as the others.
    pub address: Address,
    /// What the connections are called, for those who look at the broker's list of them.
    pub name: String,
    /// How often both sides show that they are alive. A peer that is silent for twice as long is
    /// given up.
    pub heartbeat: Duration,
    /// How long one host may take to let us in.
    pub connect_timeout: Duration,
}

/// What follows from a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disposition {
    /// It may be gone the next time.
    Retry,
    /// It will be the same until a person changes something.
    GiveUp,
}

/// No host let us in. It tells of the one that was tried last, or of the one that refused us.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    /// The broker refuses this user, or this virtual host.
    #[error("refused by the broker at {host}")]
    Refused {
        /// Which host.
        host: String,
        /// What it said.
        #[source]
        source: lapin::Error,
    },
    /// Nobody answers there, or not as a broker should.
    #[error("failed to connect to the broker at {host}")]
    Unavailable {
        /// Which host.
        host: String,
        /// What went wrong.
        #[source]
        source: lapin::Error,
    },
    /// It takes too long.
    #[error("the broker at {host} did not answer within {} ms", limit.as_millis())]
    Silent {
        /// Which host.
        host: String,
        /// How long it had.
        limit: Duration,
    },
}

impl ConnectError {
    /// Whether to try again.
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Refused { .. } => Disposition::GiveUp,
            Self::Unavailable { .. } | Self::Silent { .. } => Disposition::Retry,
        }
    }
}

/// Whether the broker said no to who we are or what we want, rather than failing at it.
pub fn is_refusal(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED)
        || *error.kind() == AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)
}

/// Whether the broker has ended a channel for it, and left the connection alone.
fn is_of_a_channel(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    matches!(error.kind(), AMQPErrorKind::Soft(_))
}

/// Whether the broker said that something doesn't exist.
pub fn is_not_found(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND)
}

impl Broker {
    /// The broker at `address`, for connections called `name`; with the default heartbeat of 10 s,
    /// and 10 s to connect.
    pub fn new(address: Address, name: impl Into<String>) -> Self {
        Self {
            address,
            name: name.into(),
            heartbeat: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
        }
    }

    /// Tries every host once, beginning with any.
    ///
    /// # Errors
    ///
    /// None let us in. If one refused us, that is what is said: waiting won't help.
    pub async fn connect(&self, purpose: &str) -> Result<Connection, ConnectError> {
        let hosts = self.address.hosts();
        let first = (unique::number() % hosts.len().max(1) as u64) as usize;
        let mut failed = None;
        for uri in hosts.iter().cycle().skip(first).take(hosts.len()) {
            match self.connect_to(uri, purpose).await {
                Ok(connection) => return Ok(connection),
                Err(refused @ ConnectError::Refused { .. }) => failed = Some(refused),
                Err(error) => failed = failed.filter(is_final).or(Some(error)),
            }
        }
        Err(failed.unwrap_or_else(|| ConnectError::Silent {
            host: self.address.to_string(),
            limit: Duration::ZERO,
        }))
    }

    async fn connect_to(&self, uri: &AMQPUri, purpose: &str) -> Result<Connection, ConnectError> {
        let mut uri = uri.clone();
        let host = public(&uri);
        let seconds = self.heartbeat.as_secs().clamp(1, u64::from(u16::MAX));
        uri.query.heartbeat = Some(u16::try_from(seconds).unwrap_or(u16::MAX));
        let properties = ConnectionProperties::default()
            .with_connection_name(format!("{} ({purpose})", self.name).into());
        let connecting = Connection::connect_uri(uri, properties);
        match tokio::time::timeout(self.connect_timeout, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(source)) if is_refusal(&source) => Err(ConnectError::Refused { host, source }),
            Ok(Err(source)) => Err(ConnectError::Unavailable { host, source }),
            Err(_) => Err(ConnectError::Silent { host, limit: self.connect_timeout }),
        }
    }

    /// Two connections: when the broker runs out of memory or disk it stops reading from those that
    /// publish, and what is consumed must still be acknowledged.
    pub async fn link(&self) -> Result<Link, ConnectError> {
        let (publishing, consuming) =
            future::try_join(self.connect("publish"), self.connect("consume")).await?;
        Ok(Link { publishing: Arc::new(publishing), consuming: Arc::new(consuming) })
    }
}

fn is_final(error: &ConnectError) -> bool {
    error.disposition() == Disposition::GiveUp
}

/// The two connections of one who publishes and consumes.
#[derive(Debug)]
pub struct Link {
    /// For publishing only.
    pub publishing: Arc<Connection>,
    /// For everything else.
    pub consuming: Arc<Connection>,
}

/// What happens to a [`Link`].
#[derive(Debug)]
pub enum LinkEvent {
    /// The broker reads no more of what is published, for this reason.
    Blocked(String),
    /// It does again.
    Unblocked,
    /// One of the two connections is gone.
    Lost(lapin::Error),
}

impl Link {
    /// What happens from now on.
    pub fn events(&self) -> impl Stream<Item = LinkEvent> + Send + Unpin + 'static {
        let both =
            stream::select(self.publishing.events_listener(), self.consuming.events_listener());
        both.filter_map(|event| {
            future::ready(match event {
                lapin::Event::ConnectionBlocked(reason) => Some(LinkEvent::Blocked(reason)),
                lapin::Event::ConnectionUnblocked => Some(LinkEvent::Unblocked),
                // The end of one channel is heard by those who use it: a question for a queue that
                // isn't there ends its channel, and nothing else.
                lapin::Event::Error(error) if is_of_a_channel(&error) => None,
                lapin::Event::Error(error) => Some(LinkEvent::Lost(error)),
                lapin::Event::Connected | lapin::Event::SendFlow(_) | _ => None,
            })
        })
    }

    /// Whether both connections stand, as far as is known.
    pub fn is_up(&self) -> bool {
        self.publishing.status().connected() && self.consuming.status().connected()
    }

    /// Says goodbye. A broker that doesn't hear it will notice.
    pub async fn close(self) {
        for connection in [self.consuming, self.publishing] {
            close(&connection).await;
        }
    }
}

/// Closes a connection, and doesn't wait long for the answer.
pub async fn close(connection: &Connection) {
    let closing = connection.close(200, "done".into());
    let _ = tokio::time::timeout(Duration::from_secs(2), closing).await;
}

/// A channel whose publishes are confirmed.
pub async fn confirming_channel(connection: &Connection) -> Result<Channel, lapin::Error> {
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok(channel)
}

/// Growing pauses between tries, so that many who lost the same broker don't all come back at once.
#[derive(Clone, Debug)]
pub struct Backoff {
    next: Duration,
    max: Duration,
}

impl Backoff {
    /// Pauses from `first` up to `max`; each is between half of and all it could be.
    pub fn new(first: Duration, max: Duration) -> Self {
        Self { next: first, max }
    }

    /// How long to pause before the next try.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.max);
        let share = (unique::number() >> 11) as f64 / (1_u64 << 53) as f64;
        pause.mul_f64(0.5 + share / 2.0)
    }
}

impl Default for Backoff {
    /// From 100 ms up to 5 s.
    fn default() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_secs(5))
    }
}

/// An error with all that caused it, each said once.
pub struct Chain<'a>(pub &'a dyn std::error::Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        f.write_str(&said)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Some errors below say what caused them as part of what they say themselves.
            if !said.ends_with(&text) {
                write!(f, ": {text}")?;
            }
            said = text;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Backoff;

    #[test]
    fn pauses_grow_to_their_bound_and_are_never_shorter_than_half() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        for bound in [100, 200, 400, 800, 1000, 1000] {
            let pause = backoff.pause();
            let bound = Duration::from_millis(bound);
            assert!(pause >= bound / 2 && pause <= bound, "{pause:?} of {bound:?}");
        }
    }
}
