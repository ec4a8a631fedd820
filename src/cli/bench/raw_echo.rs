//! The same echo RPCs over raw sockets: what the broker gives with no client library in the way.
//!
//! This is AMQP 0-9-1 by hand, and no more of it than these RPCs need. The caller and the answerer
//! have a connection each, with a channel to publish on and one to consume on. Each reads what is
//! ready, and writes all that follows from it at once. The queue, the persistence, the confirms, the
//! acknowledgements and the way to count are those of the [yardstick](super::yardstick), so the
//! difference is what the client library takes.
//!
//! **Invariant:** every wait has a bound: connecting has that of any other connection, and a
//! measurement ends on time, whatever the broker does.

use std::{collections::VecDeque, time::Duration};

use anyhow::{Context as _, anyhow, bail};
use lapin::uri::{AMQPScheme, AMQPUri};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};

use crate::{
    cli::bench::{
        system::BenchNamespace,
        yardstick::{BODY, EchoSamples, PREFETCH, WARM_UP, YardstickQueue},
    },
    embedded::Latencies,
    transport::amqp::{address::public, topology::QueueKind, unique},
};

/// The types of frames, and the last byte of each.
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const CONTENT: u8 = 3;
const END: u8 = 0xCE;

/// The frame size that is negotiated: every broker accepts it, and every frame here is smaller.
const FRAME_MAX: u32 = 8192;

/// The channels of a connection. The first one is for the connection itself.
const CONNECTION: u8 = 0;
const CONSUMING: u8 = 1;
const PUBLISHING: u8 = 2;

/// How much is read at once.
const READ_MAX: usize = 1 << 16;

/// How long the broker may take to close a connection.
const CLOSE_MAX: Duration = Duration::from_secs(2);

/// The numbers of a class and of a method in it. The answer to a method has the next number.
type MethodName = (u8, u8);

const START: MethodName = (10, 10);
const START_OK: MethodName = (10, 11);
const TUNE: MethodName = (10, 30);
const TUNE_OK: MethodName = (10, 31);
const OPEN: MethodName = (10, 40);
const CLOSE: MethodName = (10, 50);
const CHANNEL_OPEN: MethodName = (20, 10);
const CHANNEL_CLOSE: MethodName = (20, 40);
const QUEUE_DECLARE: MethodName = (50, 10);
const QOS: MethodName = (60, 10);
const CONSUME: MethodName = (60, 20);
const PUBLISH: MethodName = (60, 40);
const DELIVER: MethodName = (60, 60);
const ACK: MethodName = (60, 80);
const NACK: MethodName = (60, 120);
const CONFIRM_SELECT: MethodName = (85, 10);

const EMPTY_TABLE: [u8; 4] = [0; 4];

/// Echo RPCs with so many in flight, for `duration`. `None`: no host lets such a client in, for
/// instance because it requires TLS.
pub(super) async fn echo(
    namespace: &BenchNamespace,
    in_flight: usize,
    duration: Duration,
) -> anyhow::Result<Option<EchoSamples>> {
    let queue = YardstickQueue::declare(namespace, QueueKind::Classic)
        .await
        .context("failed to declare a queue")?;
    let echoed = match EchoPair::connect(namespace, queue.name.as_str()).await {
        Some(pair) => pair.measure(in_flight, duration).await.map(Some),
        None => Ok(None),
    };
    queue.delete().await;
    echoed.context("failed to measure echo RPCs over a raw socket")
}

/// A caller and an answerer, and the queues that each consumes.
struct EchoPair {
    caller: RawClient,
    answerer: RawClient,
    reply_to: Vec<u8>,
    queue: Vec<u8>,
}

impl EchoPair {
    /// Connects to the first host that lets both in.
    async fn connect(namespace: &BenchNamespace, queue: &str) -> Option<Self> {
        let broker = namespace.broker();
        for uri in broker.address.hosts().iter().filter(|uri| uri.scheme == AMQPScheme::AMQP) {
            let opening = timeout(broker.connect_timeout, Self::open(uri, &broker.name, queue));
            match opening.await.map_err(anyhow::Error::from).flatten() {
                Ok(pair) => return Some(pair),
                Err(error) => {
                    let (host, error) = (public(uri), format!("{error:#}"));
                    tracing::debug!(host, error, "no echo RPCs over a raw socket");
                }
            }
        }
        None
    }

    async fn open(uri: &AMQPUri, name: &str, queue: &str) -> anyhow::Result<Self> {
        const EXCLUSIVE: u8 = 4;
        let reply_to = format!("dtc-bench.{}", unique::name('r'));
        let mut caller = RawClient::open(uri, name).await?;
        caller.ask(PUBLISHING, CONFIRM_SELECT, &[&[0]]).await?;
        let declared: [&[u8]; 4] = [&[0; 2], &short(&reply_to), &[EXCLUSIVE], &EMPTY_TABLE];
        caller.ask(CONSUMING, QUEUE_DECLARE, &declared).await?;
        caller.consume(&reply_to).await?;
        let mut answerer = RawClient::open(uri, name).await?;
        answerer.consume(queue).await?;
        Ok(Self { caller, answerer, reply_to: reply_to.into(), queue: queue.into() })
    }

    async fn measure(self, in_flight: usize, duration: Duration) -> anyhow::Result<EchoSamples> {
        let Self { caller, answerer, reply_to, queue } = self;
        let begins_at = Instant::now() + WARM_UP;
        let ends_at = begins_at + duration;
        let mut answering = JoinSet::new();
        answering.spawn(serve(answerer, ends_at));
        let served = async {
            let ended = answering.join_next().await.context("nobody answers")?;
            ended.map_err(anyhow::Error::from).flatten()
        };
        let called = call(caller, &queue, &reply_to, in_flight, begins_at, ends_at);
        let (mut samples, ()) = tokio::try_join!(called, served)?;
        samples.per_second /= duration.as_secs_f64();
        Ok(samples)
    }
}

/// Sends each message back.
async fn serve(mut client: RawClient, ends_at: Instant) -> anyhow::Result<()> {
    while client.turn(ends_at).await?.is_some() {
        let RawClient { input, output, .. } = &mut client;
        let mut last = None;
        while let Some(arrival) = input.next()? {
            let RawArrival::Delivery(RawDelivery { tag, reply_to, message_id, body }) = arrival
            else {
                bail!("the broker sent {arrival:?} instead of a delivery");
            };
            publish(output, reply_to, None, message_id, body);
            last = Some(tag);
        }
        last.into_iter().for_each(|tag| acknowledge(output, tag));
    }
    client.close().await;
    Ok(())
}

async fn call(
    mut client: RawClient,
    queue: &[u8],
    reply_to: &[u8],
    in_flight: usize,
    begins_at: Instant,
    ends_at: Instant,
) -> anyhow::Result<EchoSamples> {
    let mut calls = RawCalls::default();
    let mut latencies = Latencies::new();
    let (mut to_send, mut unacknowledged) = (in_flight, 0);
    let (mut all, mut counted) = (0_u64, 0_u64);
    loop {
        let now = Instant::now();
        for _ in 0..std::mem::take(&mut to_send) {
            let id = calls.begin(now).to_string();
            publish(&mut client.output, queue, Some(reply_to), id.as_bytes(), &[b'x'; BODY]);
        }
        let Some(now) = client.turn(ends_at).await? else { break };
        let RawClient { input, output, .. } = &mut client;
        while let Some(arrival) = input.next()? {
            let (numbers, half) = match arrival {
                RawArrival::Confirm { tag, is_multiple: true } => (calls.first..=tag, CONFIRMED),
                RawArrival::Confirm { tag, is_multiple: false } => (tag..=tag, CONFIRMED),
                RawArrival::Delivery(reply) => {
                    unacknowledged += 1;
                    if unacknowledged >= PREFETCH / 2 {
                        unacknowledged = 0;
                        acknowledge(output, reply.tag);
                    }
                    let number = reply.number().context("a reply has no number")?;
                    (number..=number, REPLIED)
                }
                RawArrival::Method(NACK) => bail!("the broker did not take a message"),
                RawArrival::Method(_) => bail!("the broker sent {arrival:?} to the caller"),
            };
            for since in numbers.filter_map(|number| calls.half_ended(number, half)) {
                to_send += 1;
                all += 1;
                if now >= begins_at {
                    counted += 1;
                    latencies.record(now - since);
                }
            }
        }
    }
    client.close().await;
    Ok(EchoSamples { per_second: counted as f64, all, latencies })
}

/// The halves of an RPC, as bits.
const CONFIRMED: u8 = 1;
const REPLIED: u8 = 2;

/// The RPCs that wait for a reply or a confirm. Each has the number by which the broker confirms
/// its request.
struct RawCalls {
    /// The number of the first one.
    first: u64,
    /// When each began, and its halves that have ended.
    calls: VecDeque<(Instant, u8)>,
}

impl Default for RawCalls {
    fn default() -> Self {
        Self { first: 1, calls: VecDeque::new() }
    }
}

impl RawCalls {
    fn begin(&mut self, now: Instant) -> u64 {
        self.calls.push_back((now, 0));
        self.first + self.calls.len() as u64 - 1
    }

    /// If that was the other half, when the RPC began.
    fn half_ended(&mut self, number: u64, half: u8) -> Option<Instant> {
        let index = usize::try_from(number.checked_sub(self.first)?).ok()?;
        let (since, ended) = self.calls.get_mut(index).filter(|(_, ended)| ended & half == 0)?;
        *ended |= half;
        let began = (*ended == CONFIRMED | REPLIED).then_some(*since);
        while self.calls.front().is_some_and(|(_, ended)| *ended == CONFIRMED | REPLIED) {
            self.calls.pop_front();
            self.first += 1;
        }
        began
    }
}

/// A connection with its two channels.
struct RawClient {
    stream: TcpStream,
    input: RawInput,
    /// What the next turn writes.
    output: Vec<u8>,
}

impl RawClient {
    async fn open(uri: &AMQPUri, name: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect((uri.authority.host.as_str(), uri.authority.port)).await?;
        stream.set_nodelay(true)?;
        let output = b"AMQP\x00\x00\x09\x01".to_vec();
        let mut client = Self { stream, input: RawInput::default(), output };
        client.wait_for(START).await?;
        let name = long(format!("{name} (raw echo)"));
        let properties = long([&short("connection_name"), &b"S"[..], &name].concat());
        let user = &uri.authority.userinfo;
        let login = long(format!("\0{}\0{}", user.username, user.password));
        let (mechanism, locale) = (short("PLAIN"), short("en_US"));
        client.tell(CONNECTION, START_OK, &[&properties, &mechanism, &login, &locale]);
        client.wait_for(TUNE).await?;
        // Without heartbeats.
        let (channels, heartbeat) = ([0, PUBLISHING], [0; 2]);
        client.tell(CONNECTION, TUNE_OK, &[&channels, &FRAME_MAX.to_be_bytes(), &heartbeat]);
        client.ask(CONNECTION, OPEN, &[&short(&uri.vhost), &[0; 2]]).await?;
        client.ask(CONSUMING, CHANNEL_OPEN, &[&[0]]).await?;
        client.ask(PUBLISHING, CHANNEL_OPEN, &[&[0]]).await?;
        Ok(client)
    }

    async fn consume(&mut self, queue: &str) -> anyhow::Result<()> {
        self.ask(CONSUMING, QOS, &[&[0; 4], &PREFETCH.to_be_bytes(), &[0]]).await?;
        let consumer: [&[u8]; 5] = [&[0; 2], &short(queue), &short("e"), &[0], &EMPTY_TABLE];
        self.ask(CONSUMING, CONSUME, &consumer).await
    }

    fn tell(&mut self, channel: u8, (class, method): MethodName, arguments: &[&[u8]]) {
        let arguments = arguments.concat();
        frame(&mut self.output, METHOD, channel, &[&[0, class, 0, method], &arguments]);
    }

    async fn ask(
        &mut self,
        channel: u8,
        name: MethodName,
        arguments: &[&[u8]],
    ) -> anyhow::Result<()> {
        self.tell(channel, name, arguments);
        self.wait_for((name.0, name.1 + 1)).await
    }

    /// Waits for a method. Deliveries and confirms that come before it are dropped.
    async fn wait_for(&mut self, name: MethodName) -> anyhow::Result<()> {
        loop {
            match self.input.next()? {
                Some(RawArrival::Method(method)) if method == name => return Ok(()),
                Some(RawArrival::Method(method)) => {
                    bail!("the broker sent method {method:?} instead of {name:?}")
                }
                Some(RawArrival::Delivery(_) | RawArrival::Confirm { .. }) => {}
                None => self.exchange().await?,
            }
        }
    }

    /// Writes what is to be written, and then reads what is there.
    async fn exchange(&mut self) -> anyhow::Result<()> {
        self.stream.write_all(&self.output).await?;
        self.output.clear();
        match self.stream.read_buf(self.input.room()).await? {
            0 => Err(anyhow!("the broker closed the connection")),
            _ => Ok(()),
        }
    }

    /// The same up to a moment: returns when it has read, or `None` if that is over.
    async fn turn(&mut self, until: Instant) -> anyhow::Result<Option<Instant>> {
        // The time-out does not interrupt what is always ready.
        timeout_at(until, self.exchange()).await.unwrap_or(Ok(()))?;
        Ok(Some(Instant::now()).filter(|now| *now < until))
    }

    /// Closes the connection, so that the broker doesn't log that it was lost.
    async fn close(mut self) {
        let arguments: [&[u8]; 3] = [&200_u16.to_be_bytes(), &short("done"), &[0; 4]];
        let closing = self.ask(CONNECTION, CLOSE, &arguments);
        let _ = timeout(CLOSE_MAX, closing).await;
    }
}

/// What was read.
#[derive(Default)]
struct RawInput {
    bytes: Vec<u8>,
    /// How many of them have been used.
    used: usize,
}

impl RawInput {
    /// Where more can be read to.
    fn room(&mut self) -> &mut Vec<u8> {
        self.bytes.drain(..self.used);
        self.used = 0;
        self.bytes.reserve(READ_MAX);
        &mut self.bytes
    }

    /// What arrived next, if all of it is there.
    fn next(&mut self) -> anyhow::Result<Option<RawArrival<'_>>> {
        let mut unread = RawBytes(self.bytes.get(self.used..).unwrap_or_default());
        let arrival = unread.arrival()?;
        self.used = self.bytes.len() - unread.0.len();
        Ok(arrival)
    }
}

/// What the broker sends.
#[derive(Debug)]
enum RawArrival<'a> {
    Delivery(RawDelivery<'a>),
    Confirm { tag: u64, is_multiple: bool },
    Method(MethodName),
}

/// A message, with as much of it as an echo needs.
#[derive(Debug)]
struct RawDelivery<'a> {
    tag: u64,
    reply_to: &'a [u8],
    message_id: &'a [u8],
    body: &'a [u8],
}

impl RawDelivery<'_> {
    /// The number of the RPC.
    fn number(&self) -> Option<u64> {
        std::str::from_utf8(self.message_id).ok()?.parse().ok()
    }
}

/// Bytes to read from.
#[derive(Clone, Copy)]
struct RawBytes<'a>(&'a [u8]);

impl<'a> RawBytes<'a> {
    fn take(&mut self, size: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(size).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    /// A number of so many bytes.
    fn number(&mut self, size: u64) -> Option<u64> {
        Some(self.take(size)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn short(&mut self) -> Option<&'a [u8]> {
        let size = self.number(1)?;
        self.take(size)
    }

    /// A frame's payload; `None`: it is not all there.
    fn frame(&mut self, kind: u8) -> anyhow::Result<Option<Self>> {
        let mut rest = *self;
        let Some(&[is, _, _, a, b, c, d]) = rest.take(7) else { return Ok(None) };
        let size = u32::from_be_bytes([a, b, c, d]);
        if is != kind || size > FRAME_MAX {
            bail!("the broker sent a frame of type {is} and {size} bytes");
        }
        let Some(payload) = rest.take(u64::from(size) + 1) else { return Ok(None) };
        let payload =
            payload.strip_suffix(&[END]).context("the broker sent a frame without end")?;
        *self = rest;
        Ok(Some(Self(payload)))
    }

    /// What arrived next; `None`: it is not all there.
    fn arrival(&mut self) -> anyhow::Result<Option<RawArrival<'a>>> {
        const UNREADABLE: &str = "the broker sent a method that can't be read";
        let mut rest = *self;
        let Some(mut method) = rest.frame(METHOD)? else { return Ok(None) };
        let Some(&[_, class, _, number]) = method.take(4) else { bail!(UNREADABLE) };
        let arrival = match (class, number) {
            DELIVER => {
                let Some(header) = rest.frame(HEADER)? else { return Ok(None) };
                let Some(Self(body)) = rest.frame(CONTENT)? else { return Ok(None) };
                method.delivery(header, body).map(RawArrival::Delivery)
            }
            ACK => method
                .number(8)
                .zip(method.number(1))
                .map(|(tag, multiple)| RawArrival::Confirm { tag, is_multiple: multiple == 1 }),
            CLOSE | CHANNEL_CLOSE => {
                let code = method.number(2).unwrap_or_default();
                let reason = String::from_utf8_lossy(method.short().unwrap_or_default());
                bail!("the broker closed the connection with {code} {reason:?}");
            }
            name => Some(RawArrival::Method(name)),
        };
        *self = rest;
        arrival.map(Some).context(UNREADABLE)
    }

    fn delivery(mut self, mut header: Self, body: &'a [u8]) -> Option<RawDelivery<'a>> {
        self.short()?;
        let tag = self.number(8)?;
        let [mut reply_to, mut message_id] = [&[][..]; 2];
        // Class and weight.
        header.take(4)?;
        let is_whole = header.number(8)? == body.len() as u64;
        let flags = header.number(2)?;
        // Each bit stands for a property, from content type to message id.
        for bit in (7..16).rev().filter(|bit| flags >> bit & 1 == 1) {
            let value = match bit {
                13 => {
                    let size = header.number(4)?;
                    header.take(size)
                }
                11 | 12 => header.take(1),
                _ => header.short(),
            };
            match bit {
                9 => reply_to = value?,
                7 => message_id = value?,
                _ => _ = value?,
            }
        }
        is_whole.then_some(RawDelivery { tag, reply_to, message_id, body })
    }
}

/// Text of at most 255 bytes, with its size before it.
fn short(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&[text.len() as u8], text].concat()
}

/// Text of any size.
fn long(text: impl AsRef<[u8]>) -> Vec<u8> {
    let text = text.as_ref();
    [&(text.len() as u32).to_be_bytes(), text].concat()
}

/// Adds a frame.
fn frame(output: &mut Vec<u8>, kind: u8, channel: u8, payload: &[&[u8]]) {
    let size: usize = payload.iter().map(|part| part.len()).sum();
    output.extend_from_slice(&[kind, 0, channel]);
    output.extend_from_slice(&(size as u32).to_be_bytes());
    payload.iter().for_each(|part| output.extend_from_slice(part));
    output.push(END);
}

/// Adds a message. It is persistent if it wants a reply.
fn publish(
    output: &mut Vec<u8>,
    queue: &[u8],
    reply_to: Option<&[u8]>,
    message_id: &[u8],
    body: &[u8],
) {
    let mut add = |kind, payload: &[&[u8]]| frame(output, kind, PUBLISHING, payload);
    let (class, method) = PUBLISH;
    // To the default exchange, whose name is empty; not mandatory.
    add(METHOD, &[&[0, class, 0, method, 0, 0, 0, queue.len() as u8], queue, &[0]]);
    let start: &[u8] = &[0, class, 0, 0];
    let (size, id_size) = ((body.len() as u64).to_be_bytes(), message_id.len() as u8);
    // Two bytes tell which properties there are; the delivery mode is the first of them.
    match reply_to {
        Some(reply_to) => {
            let flags: &[u8] = &[0x12, 0x80, 2, reply_to.len() as u8];
            add(HEADER, &[start, &size, flags, reply_to, &[id_size], message_id]);
        }
        None => add(HEADER, &[start, &size, &[0x10, 0x80, 1, id_size], message_id]),
    }
    add(CONTENT, &[body]);
}

/// Acknowledges every delivery up to this one.
fn acknowledge(output: &mut Vec<u8>, tag: u64) {
    let (class, method) = ACK;
    frame(output, METHOD, CONSUMING, &[&[0, class, 0, method], &tag.to_be_bytes(), &[1]]);
}

#[cfg(test)]
mod tests {
    use amq_protocol::{
        frame::{AMQPFrame, parse_frame},
        protocol::{AMQPClass, basic::AMQPMethod},
        types::ShortString,
    };
    use tokio::time::Instant;

    use super::{
        CONFIRMED, CONSUMING, CONTENT, DELIVER, HEADER, METHOD, REPLIED, RawArrival, RawCalls,
        RawInput, frame, publish,
    };

    /// A delivery with more properties than are needed, in three frames.
    fn delivery() -> Vec<u8> {
        let mut bytes = Vec::new();
        let (class, method) = DELIVER;
        let tag_and_rest = b"\x01e\0\0\0\0\0\0\0\x07\0\0\x01q";
        frame(&mut bytes, METHOD, CONSUMING, &[&[0, class, 0, method], tag_and_rest]);
        let properties = b"\xB2\x80\x01c\0\0\0\x04\x01at\x01\x02\x03r.1\x0242";
        frame(&mut bytes, HEADER, CONSUMING, &[b"\0\x3C\0\0\0\0\0\0\0\0\0\x04", properties]);
        frame(&mut bytes, CONTENT, CONSUMING, &[b"body"]);
        bytes
    }

    #[test]
    fn a_delivery_is_read_when_all_of_it_is_there() {
        let bytes = [delivery(), delivery()].concat();
        let mut input = RawInput::default();
        let mut tags = Vec::new();
        for (index, byte) in bytes.iter().enumerate() {
            input.room().push(*byte);
            if let Some(arrival) = input.next().unwrap() {
                let RawArrival::Delivery(it) = arrival else { panic!("{arrival:?}") };
                assert_eq!(
                    (it.reply_to, it.number(), it.body),
                    (&b"r.1"[..], Some(42), &b"body"[..])
                );
                tags.push((index + 1, it.tag));
            }
        }
        assert_eq!(tags, [(bytes.len() / 2, 7), (bytes.len(), 7)]);
    }

    /// lapin's parser reads it.
    #[test]
    fn a_message_is_published_in_three_frames() {
        for (reply_to, mode) in [(Some(&b"r.1"[..]), 2), (None, 1)] {
            let mut bytes = Vec::new();
            publish(&mut bytes, b"q", reply_to, b"42", b"body");
            let (rest, method) = parse_frame(&bytes[..]).unwrap();
            let AMQPFrame::Method(2, AMQPClass::Basic(AMQPMethod::Publish(it))) = method else {
                panic!("{method:?}")
            };
            assert_eq!(
                (it.exchange.as_str(), it.routing_key.as_str(), it.mandatory),
                ("", "q", false)
            );
            let (rest, header) = parse_frame(rest).unwrap();
            let AMQPFrame::Header(2, header) = header else { panic!("{header:?}") };
            let properties = &header.properties;
            let text = |it: &Option<ShortString>| it.as_ref().map(|it| it.as_str().to_owned());
            assert_eq!(
                (header.body_size, *properties.delivery_mode(), text(properties.message_id())),
                (4, Some(mode), Some("42".to_owned()))
            );
            assert_eq!(text(properties.reply_to()).as_deref(), reply_to.map(|_| "r.1"));
            let (rest, body) = parse_frame(rest).unwrap();
            assert_eq!((rest, body), (&b""[..], AMQPFrame::Body(2, b"body".to_vec())));
        }
    }

    #[test]
    fn bytes_that_are_no_frame_are_an_error() {
        for bytes in [&b"AMQP\0\0\x09\x01"[..], b"\x01\0\0\xFF\0\0\0", b"\x01\0\0\0\0\0\0\0"] {
            let mut input = RawInput::default();
            input.room().extend_from_slice(bytes);
            assert!(input.next().is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn an_rpc_ends_with_its_second_half_and_once() {
        let mut calls = RawCalls::default();
        let now = Instant::now();
        assert_eq!([(); 2].map(|()| calls.begin(now)), [1, 2]);
        for (number, half, has_ended) in [
            (2, REPLIED, false),
            (2, REPLIED, false),
            (2, CONFIRMED, true),
            (2, CONFIRMED, false),
            (1, CONFIRMED, false),
            (3, CONFIRMED, false),
            (1, REPLIED, true),
            (1, REPLIED, false),
        ] {
            assert_eq!(calls.half_ended(number, half).is_some(), has_ended, "{number}, {half}");
        }
        assert_eq!((calls.first, calls.begin(now)), (3, 3));
    }
}
