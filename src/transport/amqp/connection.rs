//! Connecting and reconnecting.
//!
//! A [`Broker`] holds the addresses and settings, but no connection. Its users connect by
//! [`Broker::connect_pair`], work until the link is lost, and reconnect after the pause of a
//! [`Backoff`]. lapin's own recovery stays off: it would continue consumers as if nothing had
//! happened, and acknowledge deliveries that the broker has requeued.

use std::{
    collections::VecDeque,
    io,
    ops::Deref,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_rs::{TokioRuntime, traits::Reactor};
use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use futures_util::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, FutureExt, StreamExt,
    future::{BoxFuture, Either},
    stream::FuturesUnordered,
};
use lapin::{
    AsyncTcpStream, Channel, Connection, ConnectionProperties, ErrorKind,
    options::{ConfirmSelectOptions, QueueDeclareOptions},
    types::{FieldTable, ShortString},
    uri::{AMQPScheme, AMQPUri},
};
use rustls_connector::RustlsConnector;
use tokio::time::{Instant, timeout_at};

use crate::transport::amqp::{
    address::{Address, is_external, public},
    bounded::{ANSWER_MAX, AskError, answer, write_now},
    error::{Disposition, is_not_found, is_refusal},
    frames::{FRAME_MAX, FrameFilter, ReturnedMessages},
    screened_stream::{ScreenedStream, TokioTcpStream, screening_runtime},
    tls::{Tls, TlsError},
    unique,
};

/// How long a host has before the next one is tried in parallel.
const NEXT_HOST_AFTER: Duration = Duration::from_secs(2);

/// How many times failed hosts are tried again while another one is silent.
const RETRIES_MAX: u32 = 4;

/// How long one address may take to respond at all. A lost packet is sent again once by then; with
/// the system's own retries, an address that has become reachable is tried again only seconds
/// later.
const REACH_MAX: Duration = Duration::from_secs(2);

/// How long a broker that has closed a connection may take to give the reason on another one.
const REASON_MAX: Duration = Duration::from_secs(1);

/// Where and how to connect.
#[derive(Clone, Debug)]
pub struct Broker {
    /// The hosts of one cluster, all equivalent.
    pub address: Address,
    /// The connections' name, as the broker lists it.
    pub name: String,
    /// The interval of heartbeats in both directions. A peer that is silent for two intervals is
    /// given up.
    pub heartbeat: Duration,
    /// How long connecting to one host may take.
    pub connect_timeout: Duration,
    /// The CAs to trust, and the client certificate, for hosts whose URL begins with `amqps://`.
    pub tls: Tls,
    /// The host to begin with.
    rotation: Rotation,
}

/// Rotates through the hosts, so that a host that accepts connections but doesn't work, such as a
/// node that is cut off from the others, is tried again only after the others.
#[derive(Debug)]
struct Rotation(AtomicUsize);

impl Rotation {
    /// The index of the next of so many hosts.
    fn next(&self, hosts: usize) -> usize {
        self.0.fetch_add(1, Ordering::Relaxed) % hosts.max(1)
    }
}

impl Default for Rotation {
    /// Begins at a random host, so that processes that start together spread over the hosts.
    fn default() -> Self {
        Self(AtomicUsize::new((unique::number() >> 32) as usize))
    }
}

/// Each clone rotates independently: with a shared counter, two alternating clones would each see
/// only every other host.
impl Clone for Rotation {
    fn clone(&self) -> Self {
        Self::default()
    }
}

/// A connection, and the messages that were returned on it.
#[derive(Debug)]
pub struct BrokerConnection {
    connection: Connection,
    returns: ReturnedMessages,
}

impl BrokerConnection {
    /// The messages that were returned since no queue took them.
    pub fn returns(&self) -> &ReturnedMessages {
        &self.returns
    }
}

/// The connection ends with its last owner, whatever is in progress on its channels. lapin closes a
/// connection when the last handle of a channel is dropped; but if a consumer is being started at
/// that moment, lapin keeps a handle itself, and the broker continues to deliver to a consumer
/// without an owner.
impl Drop for BrokerConnection {
    fn drop(&mut self) {
        if self.connection.status().connected() {
            write_now(self.connection.close(200, "done".into()));
        }
    }
}

impl Deref for BrokerConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

/// No host accepted the connection. The error is that of the last host, or of one that refused.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The broker refuses this user, or this virtual host.
    #[error("refused by the broker at {host}")]
    Refused {
        /// The host.
        host: String,
        /// Its answer.
        #[source]
        source: lapin::Error,
    },
    /// Nothing answers there, or not as a broker would.
    #[error("failed to connect to the broker at {host}")]
    Unavailable {
        /// The host.
        host: String,
        /// The cause.
        #[source]
        source: lapin::Error,
    },
    /// The host accepts only TLS.
    #[error("the broker at {host} requires TLS: its URL must begin with amqps://")]
    WantsTls {
        /// The host.
        host: String,
    },
    /// The broker's certificate is not trusted, or the broker doesn't trust ours.
    #[error("no secure connection to the broker at {host}")]
    Insecure {
        /// The host.
        host: String,
        /// The cause.
        #[source]
        source: TlsError,
    },
    /// Connecting took too long.
    #[error("the broker at {host} did not answer within {} ms", limit.as_millis())]
    Silent {
        /// The host.
        host: String,
        /// The time limit.
        limit: Duration,
    },
}

impl ConnectionError {
    /// Whether to try again.
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Refused { .. } | Self::WantsTls { .. } => Disposition::GiveUp,
            Self::Insecure { source, .. } => source.disposition(),
            Self::Unavailable { .. } | Self::Silent { .. } => Disposition::Retry,
        }
    }
}

impl Broker {
    /// The default interval of heartbeats.
    pub const HEARTBEAT: Duration = Duration::from_secs(10);

    /// The default of how long one host may take to accept a connection.
    pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

    /// The broker at `address`, for connections named `name`; with the default heartbeat of 10 s,
    /// and 10 s to connect.
    pub fn new(address: Address, name: impl Into<String>) -> Self {
        Self {
            address,
            name: name.into(),
            heartbeat: Self::HEARTBEAT,
            connect_timeout: Self::CONNECT_TIMEOUT,
            tls: Tls::default(),
            rotation: Rotation::default(),
        }
    }

    /// The same, with `tls` for hosts whose URL begins with `amqps://`.
    #[must_use]
    pub fn with_tls(mut self, tls: Tls) -> Self {
        self.tls = tls;
        self
    }

    /// Connects to one of the hosts: first to a random one, and each time to the next one.
    ///
    /// # Errors
    ///
    /// No host accepts the connection. A refusal is reported in preference to other failures, since
    /// retrying doesn't help.
    pub async fn connect(&self, purpose: &str) -> Result<BrokerConnection, ConnectionError> {
        let is_final = |error: &ConnectionError| error.disposition() == Disposition::GiveUp;
        self.first_that(|host| self.connect_to(host, purpose).boxed(), is_final).await
    }

    /// Connects to one of the hosts and runs `open` on the connection, like
    /// [`Broker::connect_pair_with`].
    ///
    /// # Errors
    ///
    /// No host succeeds. A failure that `is_final` is reported in preference to others.
    pub async fn connect_with<T, E, F>(
        &self,
        purpose: &str,
        open: impl Fn(Arc<BrokerConnection>) -> F + Sync,
        is_final: impl Fn(&E) -> bool,
    ) -> Result<T, E>
    where
        T: Send,
        E: From<ConnectionError> + Send,
        F: Future<Output = Result<T, E>> + Send,
    {
        let open = &open;
        let open_at = |host| {
            async move { open(Arc::new(self.connect_to(host, purpose).await?)).await }.boxed()
        };
        self.first_that(open_at, is_final).await
    }

    /// The result of the first host on which all of `open` succeeds. If a host has not succeeded
    /// after [`NEXT_HOST_AFTER`], the next one is tried in parallel: it may not answer at all, or
    /// accept connections but not work, such as a node that is cut off from the others. While one
    /// host is still silent, failed ones are tried again.
    pub(super) async fn first_that<'a, T, E: From<ConnectionError>>(
        &'a self,
        open: impl Fn(&'a AMQPUri) -> BoxFuture<'a, Result<T, E>>,
        is_final: impl Fn(&E) -> bool,
    ) -> Result<T, E> {
        let hosts = self.address.hosts();
        let first = self.rotation.next(hosts.len());
        let in_turn = hosts.iter().cycle().skip(first).take(hosts.len());
        // When to try each host.
        let mut untried: VecDeque<_> = in_turn.map(|host| (Instant::now(), host)).collect();
        let mut retries_left = RETRIES_MAX;
        let mut trying = FuturesUnordered::new();
        let mut failed: Option<E> = None;
        loop {
            let now = Instant::now();
            let is_due = untried.front().is_some_and(|(from, _)| *from <= now);
            let tried = is_due.then(|| untried.pop_front()).flatten().map(|(_, host)| host);
            match tried {
                Some(host) => trying.push(open(host).map(move |opened| (host, opened))),
                None if trying.is_empty() => break,
                None => {}
            }
            let next = untried.front().map(|(from, _)| (*from).max(now + NEXT_HOST_AFTER));
            let ended = match next {
                Some(next) => timeout_at(next, trying.next()).await,
                None => Ok(trying.next().await),
            };
            match ended {
                Ok(Some((_, Ok(opened)))) => return Ok(opened),
                Ok(Some((host, Err(error)))) => {
                    failed = match is_final(&error) {
                        true => Some(error),
                        false => failed.filter(&is_final).or(Some(error)),
                    };
                    if retries_left > 0 {
                        retries_left -= 1;
                        untried.push_back((Instant::now() + NEXT_HOST_AFTER, host));
                    }
                }
                Ok(None) => {}
                Err(_) => {
                    if let Some(host) = tried {
                        tracing::warn!(
                            host = public(host),
                            "the broker has not let this process begin its work within {} s; trying \
                             the next host as well",
                            NEXT_HOST_AFTER.as_secs()
                        );
                    }
                }
            }
        }
        Err(failed.unwrap_or_else(|| {
            let (host, limit) = (self.address.to_string(), Duration::ZERO);
            ConnectionError::Silent { host, limit }.into()
        }))
    }

    /// Connects to one host.
    pub(super) async fn connect_to(
        &self,
        uri: &AMQPUri,
        purpose: &str,
    ) -> Result<BrokerConnection, ConnectionError> {
        let mut uri = uri.clone();
        let host = public(&uri);
        let seconds = self.heartbeat.as_secs().clamp(1, u64::from(u16::MAX));
        uri.query.heartbeat = Some(u16::try_from(seconds).unwrap_or(u16::MAX));
        let properties = ConnectionProperties::default()
            .with_connection_name(format!("{} ({purpose})", self.name).into());
        let connecting = self.open(uri, properties);
        match tokio::time::timeout(self.connect_timeout, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(HostFailure::Tls(source))) => Err(ConnectionError::Insecure { host, source }),
            Ok(Err(HostFailure::Amqp(source))) if is_refusal(&source) => {
                Err(ConnectionError::Refused { host, source })
            }
            Ok(Err(HostFailure::Plain)) => Err(ConnectionError::WantsTls { host }),
            Ok(Err(HostFailure::Amqp(source))) => {
                Err(ConnectionError::Unavailable { host, source })
            }
            Err(_) => Err(ConnectionError::Silent { host, limit: self.connect_timeout }),
        }
    }

    /// `dtc` opens the stream itself, for two reasons: lapin would always trust the system's CAs
    /// too, and read all of them for each connection; and the stream is screened. To lapin, which is
    /// compiled without TLS, it is a plain stream.
    async fn open(
        &self,
        mut uri: AMQPUri,
        properties: ConnectionProperties,
    ) -> Result<BrokerConnection, HostFailure> {
        let runtime = TokioRuntime::tokio_current();
        let returns = ReturnedMessages::default();
        // Limits what lapin must parse, whatever the broker allows.
        let frame_max = *uri.query.frame_max.get_or_insert(FRAME_MAX);
        let filter = FrameFilter::new(frame_max, returns.clone());
        let (host, port) = (uri.authority.host.clone(), uri.authority.port);
        let is_external = is_external(&uri);
        let secure = match uri.scheme {
            AMQPScheme::AMQP => None,
            AMQPScheme::AMQPS => Some((
                self.connector().await?,
                self.tls.expected_name(&host).map_err(HostFailure::Tls)?,
            )),
        };
        let reach = async || {
            let stream = reach(&runtime, &host, port).await?;
            match &secure {
                Some((connector, name)) => {
                    connector.connect_async(name, stream).await.map(Either::Right)
                }
                None => Ok(Either::Left(stream)),
            }
        };
        let stream = reach().await.map_err(|error| self.host_failure(error))?;
        let screened = Mutex::new(Some(ScreenedStream::new(stream, filter)));
        let hand_over = async move |_, _| {
            let stream = screened.lock().unwrap_or_else(PoisonError::into_inner).take();
            let stream = stream.map(AsyncTcpStream::Plain);
            stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected).into())
        };
        let opened = Connection::connector(uri, screening_runtime(), hand_over, properties).await;
        let error = match opened {
            Ok(connection) => return Ok(BrokerConnection { connection, returns }),
            Err(error) => error,
        };
        let (ErrorKind::IOError(_) | ErrorKind::ParsingError(_)) = error.kind() else {
            return Err(HostFailure::Amqp(error));
        };
        if let ErrorKind::IOError(error) = error.kind()
            && let Some(error) = TlsError::of(error, &self.tls)
        {
            return Err(HostFailure::Tls(error));
        }
        let asking = async {
            let mut stream = reach().await.ok()?;
            match &secure {
                Some(_) => self.objection(&mut stream).await.map(HostFailure::Tls),
                None => wants_tls(&mut stream).await.then_some(HostFailure::Plain),
            }
        };
        let why = tokio::time::timeout(REASON_MAX, asking).await.ok().flatten();
        Err(why.unwrap_or(match is_external {
            true => HostFailure::Tls(TlsError::NoUser),
            false => HostFailure::Amqp(error),
        }))
    }

    /// Reads the broker's objection after the handshake: with TLS 1.3 the broker verifies the
    /// client certificate only when the handshake is over for the client. If the client sent
    /// anything meanwhile, the broker would reset the connection and its alert would be lost; so
    /// this only reads.
    async fn objection(&self, stream: &mut (impl AsyncRead + Unpin)) -> Option<TlsError> {
        let error = stream.read(&mut [0]).await.err()?;
        TlsError::of(&error, &self.tls)
    }

    fn host_failure(&self, error: io::Error) -> HostFailure {
        match TlsError::of(&error, &self.tls) {
            Some(error) => HostFailure::Tls(error),
            None => HostFailure::Amqp(error.into()),
        }
    }

    /// This reads files.
    async fn connector(&self) -> Result<RustlsConnector, HostFailure> {
        let tls = self.tls.clone();
        match tokio::task::spawn_blocking(move || tls.connector()).await {
            Ok(connector) => connector.map_err(HostFailure::Tls),
            Err(error) => Err(HostFailure::Amqp(io::Error::other(error).into())),
        }
    }
}

/// Why one host did not accept the connection.
enum HostFailure {
    Tls(TlsError),
    /// It requires TLS.
    Plain,
    Amqp(lapin::Error),
}

/// Connects to the first address of `host` that answers.
async fn reach(runtime: &TokioRuntime, host: &str, port: u16) -> io::Result<TokioTcpStream> {
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in tokio::net::lookup_host((host, port)).await? {
        let connecting = runtime.tcp_connect_addr(address);
        match tokio::time::timeout(REACH_MAX, connecting).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => failed = error,
            Err(_) => {
                let error = format!("{address} did not answer within {} s", REACH_MAX.as_secs());
                failed = io::Error::new(io::ErrorKind::TimedOut, error);
            }
        }
    }
    Err(failed)
}

/// Whether the peer answers a plaintext AMQP header with a TLS alert. A plain AMQP broker waits for
/// the rest of the header; with more bytes than a TLS record's head, a TLS broker would reset the
/// connection.
async fn wants_tls(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> bool {
    const ALERT: u8 = 21;
    let mut answer = [0];
    stream.write_all(b"AMQP\0").await.is_ok()
        && stream.read_exact(&mut answer).await.is_ok()
        && answer == [ALERT]
}

/// Closes a connection, waiting only briefly for the answer.
pub async fn close(connection: &Connection) {
    let closing = connection.close(200, "done".into());
    let _ = tokio::time::timeout(Duration::from_secs(2), closing).await;
}

/// A channel to publish on, which knows the messages that were returned on it.
#[derive(Clone, Debug)]
pub struct PublishChannel {
    channel: Channel,
    returns: ReturnedMessages,
}

impl PublishChannel {
    /// Opens a channel with confirms on `connection`.
    ///
    /// # Errors
    ///
    /// The connection gives no channel, or not in time.
    pub async fn open(connection: &BrokerConnection) -> Result<Self, AskError> {
        let it = Self::unconfirmed(connection).await?;
        let selecting = it.channel.confirm_select(ConfirmSelectOptions::default());
        answer(ANSWER_MAX, selecting).await?;
        Ok(it)
    }

    /// Opens a channel without confirms.
    ///
    /// # Errors
    ///
    /// The connection gives no channel, or not in time.
    pub async fn unconfirmed(connection: &BrokerConnection) -> Result<Self, AskError> {
        let channel = answer(ANSWER_MAX, connection.create_channel()).await?;
        Ok(Self { channel, returns: connection.returns().clone() })
    }

    /// Whether the message with this id was returned on this channel. It reports each return once.
    pub(super) fn was_returned(&self, message_id: &ShortString) -> bool {
        self.returns.take(self.channel.id(), message_id.as_str())
    }
}

impl Deref for PublishChannel {
    type Target = Channel;
    fn deref(&self) -> &Channel {
        &self.channel
    }
}

/// A queue's counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueCounts {
    /// How many messages are ready in it.
    pub messages: u32,
    /// How many consumers it has.
    pub consumers: u32,
}

/// The counts of `queue`; `None`: the queue doesn't exist. If its node is down, that is an error.
pub async fn counts(
    connection: &Connection,
    queue: ShortString,
) -> Result<Option<QueueCounts>, lapin::Error> {
    // The broker closes the channel if the queue doesn't exist.
    let channel = connection.create_channel().await?;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    match channel.queue_declare(queue, options, FieldTable::default()).await {
        Ok(queue) => {
            let (messages, consumers) = (queue.message_count(), queue.consumer_count());
            channel.close(200, "done".into()).await?;
            Ok(Some(QueueCounts { messages, consumers }))
        }
        Err(error) if is_not_found(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Growing pauses between attempts, so that the many clients of one broker don't all reconnect at
/// once.
#[derive(Debug)]
pub struct Backoff {
    pauses: ExponentialBackoff,
    max: Duration,
}

impl Backoff {
    /// Pauses from `first` up to `max`, each randomly between half and all of its current length.
    pub fn new(first: Duration, max: Duration) -> Self {
        // The jitter adds up to the whole pause.
        let builder = ExponentialBuilder::new()
            .with_min_delay(first / 2)
            .with_max_delay(max / 2)
            .with_jitter()
            .without_max_times();
        Self { pauses: builder.build(), max }
    }

    /// The pause before the next attempt.
    pub fn pause(&mut self) -> Duration {
        self.pauses.next().unwrap_or(self.max)
    }
}

impl Default for Backoff {
    /// From 100 ms up to 5 s.
    fn default() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_secs(5))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        sync::atomic::AtomicUsize,
        time::Duration,
    };

    use super::{Backoff, Broker, Rotation};
    use crate::error::ErrorChain;

    /// As if all hosts had been cut off, and one of them had accepted the connection but sends
    /// nothing more.
    #[tokio::test]
    async fn a_host_that_failed_is_tried_again_while_another_one_is_silent() {
        let [failing, silent] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let url = |at: &TcpListener| format!("amqp://{}", at.local_addr().unwrap());
        let address = format!("{},{}", url(&failing), url(&silent)).parse().unwrap();
        let rotation = Rotation(AtomicUsize::new(0));
        let broker = Broker { rotation, ..Broker::new(address, "test") };
        let connecting = tokio::spawn(async move { broker.connect("test").await });
        let [failing, silent] = [failing, silent].map(|listener| {
            listener.set_nonblocking(true).unwrap();
            tokio::net::TcpListener::from_std(listener).unwrap()
        });
        let trying = async {
            // There are two connections: the second one is to find out what is wrong.
            for _ in 0..2 {
                drop(failing.accept().await.unwrap());
            }
            let waiting = silent.accept().await.unwrap();
            drop(failing.accept().await.unwrap());
            waiting
        };
        let tried = tokio::time::timeout(Duration::from_secs(9), trying).await;
        assert!(tried.is_ok(), "it is not tried again");
        connecting.abort();
    }

    /// A machine whose listen queue is full answers nothing, like one that is cut off.
    #[tokio::test]
    async fn an_address_that_answers_nothing_is_given_up_before_the_system_would() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let connect = |_| TcpStream::connect_timeout(&address, Duration::from_millis(300)).ok();
        let waiting: Vec<_> = (0..10_000).map_while(connect).collect();
        assert!(waiting.len() < 10_000, "the listener has room for all of them");
        let broker = Broker::new(format!("amqp://{address}").parse().unwrap(), "test");
        let error = broker.connect("test").await.unwrap_err();
        let text = ErrorChain(&error).to_string();
        assert!(text.ends_with(&format!("{address} did not answer within 2 s")), "{text}");
    }

    #[test]
    fn pauses_grow_to_their_bound_and_are_never_shorter_than_half() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        for bound in [100, 200, 400, 800, 1000, 1000] {
            let pause = backoff.pause();
            let bound = Duration::from_millis(bound);
            let rounded = Duration::from_micros(1);
            assert!(pause >= bound / 2 && pause <= bound + rounded, "{pause:?} of {bound:?}");
        }
    }
}
