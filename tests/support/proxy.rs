//! A proxy to the broker that understands AMQP 0-9-1 frames, and stops those that a test chooses.
//!
//! A [`Proxy`] listens on a loopback port and connects to a broker. It reads whole frames in both
//! directions, remembers what each channel publishes to and consumes from, and applies its rules to
//! each frame. A rule chooses frames ([`Frames`]), connections ([`Scope`]) and a number, and what
//! happens to them ([`Action`]). Its [`ActiveRule`] counts them, so that a test waits for "a confirm was
//! swallowed" instead of sleeping.
//!
//! Connections are distinguished by the `connection_name` that our clients set, such as `dtc worker
//! w1 (publish)`.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]
#![allow(dead_code, reason = "each target uses a part of it")]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    io::{self, BufReader, BufWriter, Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

/// Kinds of frames.
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;
const FRAME_END: u8 = 0xCE;

/// Methods, as class and method id.
type Method = (u16, u16);
const START_OK: Method = (10, 11);
pub(crate) const CHANNEL_OPEN: Method = (20, 10);
pub(crate) const CHANNEL_OPEN_OK: Method = (20, 11);
const CHANNEL_CLOSE: Method = (20, 40);
const CHANNEL_CLOSE_OK: Method = (20, 41);
pub(crate) const QUEUE_DECLARE: Method = (50, 10);
pub(crate) const QUEUE_DECLARE_OK: Method = (50, 11);
pub(crate) const QUEUE_BIND_OK: Method = (50, 21);
pub(crate) const QOS_OK: Method = (60, 11);
pub(crate) const CONSUME: Method = (60, 20);
pub(crate) const CONSUME_OK: Method = (60, 21);
pub(crate) const CANCEL: Method = (60, 30);
const PUBLISH: Method = (60, 40);
const RETURN: Method = (60, 50);
const DELIVER: Method = (60, 60);
const GET_OK: Method = (60, 71);
const ACK: Method = (60, 80);
const REJECT: Method = (60, 90);
const NACK: Method = (60, 120);
pub(crate) const CONFIRM_SELECT_OK: Method = (85, 11);

/// How often the proxy shows the broker that a severed connection is alive: far more often than
/// needed.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// How long a confirm waits for others to be confirmed by one frame.
const GATHER: Duration = Duration::from_millis(30);

/// How long something may take that should happen at once.
const LIMIT: Duration = Duration::from_secs(60);

/// The sender of a frame.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Side {
    Client,
    Broker,
}

#[derive(Clone, Debug)]
enum Kinds {
    /// These methods, with their content.
    Methods(Vec<Method>),
    Heartbeats,
    /// Every frame.
    All,
}

/// The frames of a rule.
#[derive(Clone, Debug)]
pub(crate) struct Frames {
    from: Side,
    kinds: Kinds,
    about: String,
    connection: String,
}

impl Frames {
    fn methods(from: Side, methods: &[Method]) -> Self {
        Self {
            from,
            kinds: Kinds::Methods(methods.to_vec()),
            about: String::new(),
            connection: String::new(),
        }
    }

    /// The broker's answers to publishes.
    pub(crate) fn confirms() -> Self {
        Self::methods(Side::Broker, &[ACK, NACK])
    }

    /// What the broker delivers.
    pub(crate) fn deliveries() -> Self {
        Self::methods(Side::Broker, &[DELIVER])
    }

    /// The broker's answers of one kind, such as [`CONSUME_OK`].
    pub(crate) fn answers(method: Method) -> Self {
        Self::methods(Side::Broker, &[method])
    }

    /// Clients' requests of one kind, such as [`CONSUME`].
    pub(crate) fn questions(method: Method) -> Self {
        Self::methods(Side::Client, &[method])
    }

    /// What clients publish.
    pub(crate) fn publishes() -> Self {
        Self::methods(Side::Client, &[PUBLISH])
    }

    /// Acknowledgements of clients.
    pub(crate) fn acks() -> Self {
        Self::methods(Side::Client, &[ACK, REJECT, NACK])
    }

    /// The heartbeats of one side.
    pub(crate) fn heartbeats(from: Side) -> Self {
        Self { kinds: Kinds::Heartbeats, ..Self::methods(from, &[]) }
    }

    /// Everything from one side.
    pub(crate) fn all(from: Side) -> Self {
        Self { kinds: Kinds::All, ..Self::methods(from, &[]) }
    }

    /// Only on connections with `name` in their name; with a `*` in it, with each of its parts.
    pub(crate) fn on(self, name: &str) -> Self {
        Self { connection: name.to_owned(), ..self }
    }

    /// Only frames about a queue, or an exchange and key, whose name begins like this: deliveries
    /// and acknowledgements by the consumed queue, deliveries also by `exchange/key`, requests and
    /// answers by their queue, publishes by `exchange/key` (by the queue's name alone through the
    /// default exchange), and confirms by what their channel publishes to.
    pub(crate) fn about(self, name: &str) -> Self {
        Self { about: name.to_owned(), ..self }
    }
}

/// The connections of a rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scope {
    /// Those that exist when it is set.
    Existing,
    /// The channels that exist when it is set, on existing connections.
    Channels,
    /// The one on which such a frame appears first.
    First,
    All,
}

/// What happens to a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    /// It is passed on, and counted.
    Count,
    /// It is dropped.
    Swallow,
    /// The client's request is answered by closing its channel: the queue doesn't exist.
    NotFound,
    /// Confirms are delayed for a moment, and then combined in one frame, as a broker may do.
    Gather,
}

struct Rule {
    frames: Frames,
    reach: Scope,
    /// Connections from this number on are excluded; with [`Scope::First`], all but this one.
    boundary: Option<u64>,
    /// With [`Scope::Channels`], the chosen channels.
    channels: BTreeSet<(u64, u16)>,
    deed: Action,
    /// How many more frames it applies to.
    left: u64,
    count: u64,
}

impl Rule {
    fn reaches(&self, connection: u64, channel: u16) -> bool {
        match (self.reach, self.boundary) {
            (Scope::Channels, _) => self.channels.contains(&(connection, channel)),
            (Scope::Existing, Some(boundary)) => connection < boundary,
            (Scope::First, Some(first)) => connection == first,
            (Scope::Existing | Scope::First, None) | (Scope::All, _) => true,
        }
    }
}

/// An active rule.
#[derive(Clone)]
pub(crate) struct ActiveRule {
    number: u64,
    shared: Arc<Shared>,
}

impl ActiveRule {
    /// How many frames it has applied to so far; content counts with its method.
    pub(crate) fn count(&self) -> u64 {
        self.shared.state().rules.get(&self.number).map_or(0, |rule| rule.count)
    }

    /// Waits until it has applied to so many frames.
    #[track_caller]
    pub(crate) fn wait_for(&self, count: u64) {
        assert!(self.has_come(count, LIMIT), "{} of {count} frames in {LIMIT:?}", self.count());
    }

    /// Whether it has applied to so many frames within `limit`.
    pub(crate) fn has_come(&self, count: u64, limit: Duration) -> bool {
        let number = self.number;
        self.shared.until(limit, |state| state.rules[&number].count >= count)
    }

    /// Ends the rule.
    pub(crate) fn lift(&self) {
        self.shared.state().rules.get_mut(&self.number).unwrap().left = 0;
    }
}

/// A port that leads to the broker.
pub(crate) struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

impl Proxy {
    /// A proxy to the broker at `url`.
    pub(crate) fn to(url: &str) -> Self {
        let broker = port_of(url);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared::default());
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming() {
                if accepting.state().is_over {
                    break;
                }
                let Ok(client) = client else { continue };
                // If the broker is not there, the client sees that.
                if let Ok(broker) = TcpStream::connect((Ipv4Addr::LOCALHOST, broker)) {
                    connect(&accepting, client, broker).unwrap();
                }
            }
        });
        let keeping = Arc::clone(&shared);
        thread::spawn(move || keeping.keep_alive());
        let gathering = Arc::clone(&shared);
        thread::spawn(move || gathering.say_what_was_gathered());
        Self { port, shared }
    }

    /// The same address through the proxy.
    pub(crate) fn url(&self, url: &str) -> String {
        let (before, host_and_path) = url.rsplit_once('@').unwrap();
        let (_, path) = host_and_path.split_once('/').unwrap();
        format!("{before}@127.0.0.1:{}/{path}", self.port)
    }

    /// Sets a rule for these frames.
    pub(crate) fn rule(&self, frames: Frames, reach: Scope, deed: Action) -> ActiveRule {
        self.rule_for(u64::MAX, frames, reach, deed)
    }

    /// The same for the next `count` of them.
    pub(crate) fn rule_for(
        &self,
        count: u64,
        frames: Frames,
        reach: Scope,
        deed: Action,
    ) -> ActiveRule {
        let mut state = self.shared.state();
        let number = state.next_rule;
        state.next_rule += 1;
        let boundary = (reach == Scope::Existing).then_some(state.next_connection);
        let channels = match reach {
            Scope::Channels => state.all_channels(),
            Scope::Existing | Scope::First | Scope::All => BTreeSet::new(),
        };
        let rule = Rule { frames, reach, boundary, channels, deed, left: count, count: 0 };
        state.rules.insert(number, rule);
        ActiveRule { number, shared: Arc::clone(&self.shared) }
    }

    /// Drops these frames on existing connections.
    pub(crate) fn stop(&self, frames: Frames) -> ActiveRule {
        self.rule(frames, Scope::Existing, Action::Swallow)
    }

    /// Drops these frames on existing channels.
    pub(crate) fn stop_channels(&self, frames: Frames) -> ActiveRule {
        self.rule(frames, Scope::Channels, Action::Swallow)
    }

    /// The connections with `name` in their name fall silent in both directions, and neither end
    /// sees the other's end. The proxy shows the broker that the client is alive.
    pub(crate) fn black_hole(&self, name: &str) {
        for connection in self.shared.state().connections_named(name) {
            connection.is_hole = true;
        }
    }

    /// The connections with `name` in their name end for their clients, and not for the broker, to
    /// which the proxy shows that the client is alive.
    pub(crate) fn sever(&self, name: &str) {
        self.black_hole(name);
        for connection in self.shared.state().connections_named(name) {
            connection.client.shutdown();
        }
    }

    /// The connections with `name` in their name end for both.
    pub(crate) fn cut(&self, name: &str) {
        for connection in self.shared.state().connections_named(name) {
            connection.end();
        }
    }

    /// How many connections with `name` in their name there have been.
    pub(crate) fn connections(&self, name: &str) -> usize {
        self.shared.state().connections_named(name).count()
    }

    /// Waits until there have been so many.
    #[track_caller]
    pub(crate) fn wait_for_connections(&self, name: &str, count: usize) {
        let have_come = |state: &mut State| state.connections_named(name).count() >= count;
        assert!(self.shared.until(LIMIT, have_come), "{} are there", self.connections(name));
    }

    /// The destinations of publishes on connections with `name` in their name: `exchange/key`.
    pub(crate) fn targets(&self, name: &str) -> BTreeSet<String> {
        let mut state = self.shared.state();
        let channels = state.connections_named(name).flat_map(|it| it.channels.values());
        channels.flat_map(|it| it.targets.iter().cloned()).collect()
    }

    /// The highest channel number that a connection with `name` in its name has used.
    pub(crate) fn highest_channel(&self, name: &str) -> u16 {
        let mut state = self.shared.state();
        let highest = state.connections_named(name).filter_map(|it| it.channels.keys().next_back());
        highest.copied().max().unwrap_or(0)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.is_over = true;
        state.connections.values_mut().for_each(Connection::end);
        drop(state);
        self.shared.changed.notify_all();
        // This wakes it.
        drop(TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)));
    }
}

/// Whether a connection's name has each part of `pattern` in it.
fn is_named(name: &str, pattern: &str) -> bool {
    pattern.split('*').all(|part| name.contains(part))
}

/// The port of `url`.
fn port_of(url: &str) -> u16 {
    let (_, host_and_path) = url.rsplit_once('@').unwrap();
    let (host, _) = host_and_path.split_once('/').unwrap();
    host.rsplit_once(':').map_or(5672, |(_, port)| port.parse().unwrap())
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    rules: BTreeMap<u64, Rule>,
    next_rule: u64,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    is_over: bool,
}

/// One end of a connection, to be written to.
#[derive(Clone)]
struct End {
    writer: Arc<Mutex<BufWriter<TcpStream>>>,
    /// The same, for shutting it down without waiting for a writer.
    stream: Arc<TcpStream>,
}

impl End {
    fn new(stream: TcpStream) -> io::Result<Self> {
        let writer = BufWriter::new(stream.try_clone()?);
        Ok(Self { writer: Arc::new(Mutex::new(writer)), stream: Arc::new(stream) })
    }

    fn writer(&self) -> MutexGuard<'_, BufWriter<TcpStream>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, bytes: &[u8], is_last: bool) -> io::Result<()> {
        let mut writer = self.writer();
        writer.write_all(bytes)?;
        if is_last { writer.flush() } else { Ok(()) }
    }

    /// Writes one of the proxy's own frames. If the end is gone, it needs none.
    fn say(&self, frame: &Frame) {
        let _ = self.write(&frame.bytes(), true);
    }

    fn shutdown(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

struct Connection {
    name: String,
    client: End,
    broker: End,
    channels: BTreeMap<u16, Channel>,
    /// Nothing passes through, and neither end sees the other's end.
    is_hole: bool,
}

impl Connection {
    fn end(&mut self) {
        self.client.shutdown();
        self.broker.shutdown();
    }
}

#[derive(Default)]
struct Channel {
    /// The destinations of its publishes.
    targets: BTreeSet<String>,
    /// The queues that are consumed, by consumer tag.
    consumed: BTreeMap<String, String>,
    /// The queues whose consumers have no tag yet.
    consuming: VecDeque<String>,
    /// The queue of the last request.
    asked: String,
    /// What happens to the content in transit, for each side.
    content: BTreeMap<Side, bool>,
    /// How many `channel.close-ok` of each side are answers to the proxy.
    own_closes: BTreeMap<Side, u32>,
    /// Confirms that are held back, and up to which tag all were sent.
    gathered: BTreeSet<u64>,
    confirmed: u64,
}

/// What happens to a frame.
enum Fate {
    Pass,
    Swallow,
    /// It is dropped, and both ends see their channel closed.
    CloseChannel(Frame, Frame),
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn until(&self, limit: Duration, mut holds: impl FnMut(&mut State) -> bool) -> bool {
        let waiting = |state: &mut State| !holds(state);
        let waited = self.changed.wait_timeout_while(self.state(), limit, waiting).unwrap();
        !waited.1.timed_out()
    }

    /// Shows the broker that clients are alive which can't show it themselves.
    fn keep_alive(&self) {
        while !self.until(KEEP_ALIVE, |state| state.is_over) {
            let holes: Vec<_> = {
                let state = self.state();
                let holes = state.connections.values().filter(|it| it.is_hole);
                holes.map(|it| it.broker.clone()).collect()
            };
            for broker in holes {
                broker.say(&Frame { kind: HEARTBEAT, channel: 0, payload: Vec::new() });
            }
        }
    }

    fn say_what_was_gathered(&self) {
        while !self.until(GATHER, |state| state.is_over) {
            let mut gathered = Vec::new();
            for connection in self.state().connections.values_mut() {
                for (&number, channel) in &mut connection.channels {
                    let confirm = channel.confirm_of_all(number);
                    gathered.extend(confirm.map(|frame| (connection.client.clone(), frame)));
                }
            }
            gathered.iter().for_each(|(client, frame)| client.say(frame));
        }
    }
}

impl State {
    fn all_channels(&self) -> BTreeSet<(u64, u16)> {
        let connections = self.connections.iter();
        connections
            .flat_map(|(&number, it)| it.channels.keys().map(move |&id| (number, id)))
            .collect()
    }

    fn connections_named<'a>(
        &'a mut self,
        name: &'a str,
    ) -> impl Iterator<Item = &'a mut Connection> {
        self.connections.values_mut().filter(move |it| is_named(&it.name, name))
    }

    fn judge(&mut self, number: u64, from: Side, frame: &Frame) -> Fate {
        let Some(connection) = self.connections.get_mut(&number) else { return Fate::Pass };
        let channel = connection.channels.entry(frame.channel).or_default();
        if frame.kind == HEADER || frame.kind == BODY {
            return match channel.content.get(&from).copied().unwrap_or(true) && !connection.is_hole
            {
                true => Fate::Pass,
                false => Fate::Swallow,
            };
        }
        let about = match frame.method() {
            Some(method) => channel.heard(from, method, &frame.payload[4..]),
            None => Vec::new(),
        };
        if frame.method() == Some(START_OK) {
            connection.name = name_in(&frame.payload);
        }
        if frame.method() == Some(CHANNEL_CLOSE_OK)
            && let Some(own @ 1..) = channel.own_closes.get_mut(&from)
        {
            *own -= 1;
            return Fate::Swallow;
        }
        let is_for = |rule: &&mut Rule| {
            rule.left > 0
                && rule.reaches(number, frame.channel)
                && rule.frames.from == from
                && is_named(&connection.name, &rule.frames.connection)
                && (rule.frames.about.is_empty()
                    || about.iter().any(|it| it.starts_with(&rule.frames.about)))
                && match &rule.frames.kinds {
                    Kinds::All => true,
                    Kinds::Heartbeats => frame.kind == HEARTBEAT,
                    Kinds::Methods(methods) => {
                        frame.method().is_some_and(|method| methods.contains(&method))
                    }
                }
        };
        let mut fate = if connection.is_hole { Fate::Swallow } else { Fate::Pass };
        for rule in self.rules.values_mut().filter_map(|rule| Some(rule).filter(|it| is_for(it))) {
            rule.count += 1;
            rule.left -= 1;
            if rule.reach == Scope::First {
                rule.boundary = Some(number);
            }
            match rule.deed {
                Action::Count => {}
                Action::Swallow => fate = Fate::Swallow,
                Action::NotFound => fate = channel.not_found(frame),
                Action::Gather => {
                    if channel.gather(frame) {
                        fate = Fate::Swallow;
                    }
                }
            }
        }
        channel.content.insert(from, matches!(fate, Fate::Pass));
        fate
    }
}

impl Channel {
    /// Remembers what a method shows about the channel, and returns what it is about.
    fn heard(&mut self, from: Side, method: Method, arguments: &[u8]) -> Vec<String> {
        let mut read = Arguments(arguments);
        match (from, method) {
            (Side::Client, PUBLISH) => {
                read.skip(2);
                let (exchange, key) = (read.short_string(), read.short_string());
                let target = match exchange.is_empty() {
                    true => key,
                    false => format!("{exchange}/{key}"),
                };
                self.targets.insert(target.clone());
                vec![target]
            }
            (Side::Client, QUEUE_DECLARE) => {
                read.skip(2);
                self.asked = read.short_string();
                vec![self.asked.clone()]
            }
            (Side::Client, CONSUME) => {
                read.skip(2);
                self.asked = read.short_string();
                self.consuming.push_back(self.asked.clone());
                vec![self.asked.clone()]
            }
            (Side::Broker, CONSUME_OK) => {
                let queue = self.consuming.pop_front().unwrap_or_default();
                self.consumed.insert(read.short_string(), queue.clone());
                vec![queue]
            }
            (Side::Broker, DELIVER) => {
                let queue = self.consumed.get(&read.short_string()).cloned();
                // The delivery tag, and whether it is delivered again.
                read.skip(9);
                let (exchange, key) = (read.short_string(), read.short_string());
                let target = (!exchange.is_empty()).then(|| format!("{exchange}/{key}"));
                queue.into_iter().chain(target).collect()
            }
            (Side::Client, ACK | NACK | REJECT) => self.consumed.values().cloned().collect(),
            (Side::Broker, ACK | NACK) => self.targets.iter().cloned().collect(),
            (Side::Client, CHANNEL_OPEN) => {
                *self =
                    Self { own_closes: std::mem::take(&mut self.own_closes), ..Self::default() };
                Vec::new()
            }
            _ => vec![self.asked.clone()],
        }
    }

    /// Holds back a confirm; not a negative one.
    fn gather(&mut self, frame: &Frame) -> bool {
        if frame.method() != Some(ACK) {
            return false;
        }
        let tag = u64::from_be_bytes(frame.payload[4..12].try_into().unwrap());
        let is_multiple = frame.payload[12] & 1 == 1;
        let first = if is_multiple { self.confirmed + 1 } else { tag };
        self.gathered.extend(first..=tag);
        true
    }

    /// One frame for all confirms held back.
    fn confirm_of_all(&mut self, channel: u16) -> Option<Frame> {
        let before = self.confirmed;
        while self.gathered.remove(&(self.confirmed + 1)) {
            self.confirmed += 1;
        }
        let mut payload = method(ACK);
        payload.extend(self.confirmed.to_be_bytes());
        payload.push(1);
        (self.confirmed > before).then_some(Frame { kind: METHOD, channel, payload })
    }

    fn not_found(&mut self, frame: &Frame) -> Fate {
        *self.own_closes.entry(Side::Client).or_default() += 1;
        *self.own_closes.entry(Side::Broker).or_default() += 1;
        let close = |code: u16, text: &str, of: Method| {
            let mut payload = method(CHANNEL_CLOSE);
            payload.extend(code.to_be_bytes());
            payload.push(u8::try_from(text.len()).unwrap());
            payload.extend(text.as_bytes());
            payload.extend(method(of));
            Frame { kind: METHOD, channel: frame.channel, payload }
        };
        let text = format!("NOT_FOUND - no queue '{}' in vhost '/'", self.asked);
        let to_client = close(404, &text, frame.method().unwrap_or((0, 0)));
        Fate::CloseChannel(to_client, close(200, "done", (0, 0)))
    }
}

fn method((class, method): Method) -> Vec<u8> {
    [class.to_be_bytes(), method.to_be_bytes()].concat()
}

/// The relevant arguments of a method.
struct Arguments<'a>(&'a [u8]);

impl Arguments<'_> {
    fn skip(&mut self, count: usize) {
        self.0 = self.0.get(count..).unwrap_or_default();
    }

    fn short_string(&mut self) -> String {
        let length = self.0.first().map_or(0, |&length| usize::from(length));
        let bytes = self.0.get(1..=length).unwrap_or_default();
        let text = String::from_utf8_lossy(bytes).into_owned();
        self.skip(1 + length);
        text
    }
}

/// The client's name for its connection, in its `connection.start-ok`.
fn name_in(payload: &[u8]) -> String {
    let key = b"\x0fconnection_nameS";
    let at = payload.windows(key.len()).position(|window| window == key);
    let name = at.and_then(|at| {
        let (length, rest) = payload.get(at + key.len()..)?.split_first_chunk::<4>()?;
        rest.get(..usize::try_from(u32::from_be_bytes(*length)).ok()?)
    });
    String::from_utf8_lossy(name.unwrap_or_default()).into_owned()
}

struct Frame {
    kind: u8,
    channel: u16,
    payload: Vec<u8>,
}

impl Frame {
    fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut head = [0; 7];
        from.read_exact(&mut head)?;
        let [kind, channel @ .., a, b, c, d] = head;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        let mut payload = vec![0; length + 1];
        from.read_exact(&mut payload)?;
        if payload.pop() != Some(FRAME_END) {
            return Err(io::Error::other("a frame without its end"));
        }
        Ok(Self { kind, channel: u16::from_be_bytes(channel), payload })
    }

    fn method(&self) -> Option<Method> {
        let (class, rest) = self.payload.split_first_chunk::<2>()?;
        let (method, _) = rest.split_first_chunk::<2>()?;
        let ids = (u16::from_be_bytes(*class), u16::from_be_bytes(*method));
        (self.kind == METHOD).then_some(ids)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.kind];
        bytes.extend(self.channel.to_be_bytes());
        bytes.extend(u32::try_from(self.payload.len()).unwrap().to_be_bytes());
        bytes.extend(&self.payload);
        bytes.push(FRAME_END);
        bytes
    }
}

/// Connects a client to the broker.
fn connect(shared: &Arc<Shared>, client: TcpStream, broker: TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    broker.set_nodelay(true)?;
    let (mut from_client, from_broker) = (client.try_clone()?, broker.try_clone()?);
    let connection = Connection {
        name: String::new(),
        client: End::new(client)?,
        broker: End::new(broker)?,
        channels: BTreeMap::new(),
        is_hole: false,
    };
    let ends = (connection.client.clone(), connection.broker.clone());
    let mut state = shared.state();
    let number = state.next_connection;
    state.next_connection += 1;
    state.connections.insert(number, connection);
    drop(state);
    let (to_client, to_broker) = ends;
    let upwards = Arc::clone(shared);
    let broker = to_broker.clone();
    let client = to_client.clone();
    thread::spawn(move || {
        // The protocol header, which is no frame.
        let mut greeting = [0; 8];
        let greeted = from_client.read_exact(&mut greeting);
        if greeted.and_then(|()| broker.write(&greeting, true)).is_ok() {
            hand_on(&upwards, number, Side::Client, from_client, [&client, &broker]);
        }
        ended(&upwards, number, &broker);
    });
    let downwards = Arc::clone(shared);
    thread::spawn(move || {
        hand_on(&downwards, number, Side::Broker, from_broker, [&to_client, &to_broker]);
        ended(&downwards, number, &to_client);
    });
    Ok(())
}

/// One end is gone: the other sees that, unless nothing passes through.
fn ended(shared: &Shared, number: u64, other: &End) {
    let is_hole = shared.state().connections.get(&number).is_some_and(|it| it.is_hole);
    if !is_hole {
        other.shutdown();
    }
}

/// Passes on frames from one side, until that ends.
fn hand_on(shared: &Shared, number: u64, from: Side, stream: TcpStream, ends: [&End; 2]) {
    let [client, broker] = ends;
    let other = if from == Side::Client { broker } else { client };
    let mut stream = BufReader::with_capacity(256 * 1024, stream);
    while let Ok(frame) = Frame::read(&mut stream) {
        let fate = shared.state().judge(number, from, &frame);
        shared.changed.notify_all();
        let is_last = stream.buffer().is_empty();
        let written = match fate {
            Fate::Pass => other.write(&frame.bytes(), is_last),
            Fate::Swallow if is_last => other.writer().flush(),
            Fate::Swallow => Ok(()),
            Fate::CloseChannel(to_client, to_broker) => {
                client.say(&to_client);
                broker.say(&to_broker);
                Ok(())
            }
        };
        if written.is_err() {
            break;
        }
    }
}
