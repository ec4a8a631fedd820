//! Every exchange, queue and binding of one system, as data; and declaring them at a broker.
//!
//! * [`apply`]: declares what is missing, and writes the journal's first record.
//! * [`check`]: reports what is missing or different, without changing anything.
//! * [`replace`]: gives a service queues with other arguments, without losing messages.
//! * [`delete`]: deletes everything.
//! * [`finding`]: one object that is not as it should be.
//!
//! Everything uses AMQP, as an ordinary user, without the management plugin. Policies, permissions
//! and the exclusive queues of instances, workers and producers are not part of the topology. One
//! topology serves every supported version of the broker, so that a cluster can be upgraded without
//! a mismatch; therefore it uses no argument that one of them refuses.
//!
//! **Invariant:** nothing that a message can reach is declared before its next destination: a queue
//! before its binding, an alternate exchange with its queues before the exchange that uses it, the
//! journal with its first record before everything else.

pub mod apply;
pub mod check;
pub mod delete;
pub mod finding;
pub mod replace;

mod begin;
mod probe;

use std::{collections::BTreeMap, fmt, time::Duration};

use lapin::types::{AMQPValue, FieldTable, ShortString};

use crate::{
    protocol::{ids::ServiceName, message::Cap},
    transport::amqp::{
        address::Address,
        names::{Names, REQUEST},
    },
};

/// How often a quorum queue delivers a message before it drops it: practically without limit. By
/// default, some versions drop a message after 20 deliveries, and some take "unlimited" for "never
/// again".
pub const DELIVERY_LIMIT: u64 = 1_000_000;

/// How long a delivery of a quorum queue may be unacknowledged. Preparing a transaction may take a
/// day, and its request is held until it has ended; the broker's default limit is half an hour.
pub const CONSUMER_TIMEOUT: Duration = Duration::from_secs(2 * 24 * 60 * 60);

/// How long the journal keeps records by default.
pub const RETENTION: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// How long the records of parked transactions, and of operators, are kept.
const RECORDS_KEPT: Duration = Duration::from_secs(90 * 24 * 60 * 60);

/// How long packs are kept: longer than workers read back when they start.
const PACKS_KEPT: Duration = Duration::from_secs(2 * 60 * 60);

/// The segment size of such a stream. A stream is trimmed by whole segments, and the default of 500
/// MB would not fill for years with records, nor for hours with packs.
const SEGMENT: u64 = 16_000_000;

/// How long rejected messages are kept.
const REJECTED_KEPT: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Everything that must exist at the broker.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Topology {
    /// All exchanges; alternate exchanges come first.
    pub exchanges: Vec<Exchange>,
    /// All queues; the journal comes first, if it is included.
    pub queues: Vec<Queue>,
    /// All bindings; that of the requests comes last, if it is included.
    pub bindings: Vec<Binding>,
    /// Queues that must not exist: they stand in for others that are being replaced.
    pub stand_ins: Vec<ShortString>,
}

/// A durable exchange.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Exchange {
    /// Its name.
    pub name: ShortString,
    /// How it routes.
    pub kind: ExchangeKind,
    /// The exchange for messages that no queue takes.
    pub alternate: Option<ShortString>,
}

/// How an exchange routes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExchangeKind {
    /// By the routing key.
    Topic,
    /// To all bound queues.
    Fanout,
}

/// A durable queue.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Queue {
    /// Its name.
    pub name: ShortString,
    /// Its kind.
    pub kind: QueueKind,
    /// Its other arguments.
    pub arguments: Arguments,
}

/// The arguments of a queue or an exchange by name, without that of a queue's kind.
pub type Arguments = BTreeMap<String, Argument>;

/// The kind of a queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum QueueKind {
    /// On one node; messages that are not persistent stay in memory.
    Classic,
    /// On several nodes; each message is safe before it is confirmed.
    Quorum,
    /// An append-only log on several nodes.
    Stream,
}

/// The value of an argument.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Argument {
    /// A whole number.
    Number(u64),
    /// A text.
    Text(String),
    /// Yes or no.
    Flag(bool),
}

/// A binding of a queue to an exchange.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Binding {
    /// The exchange.
    pub exchange: ShortString,
    /// The queue.
    pub queue: ShortString,
    /// The routing key, with wildcards. A fanout exchange ignores it.
    pub key: ShortString,
}

/// The settings of a service's queues.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceTopology {
    /// Its name.
    pub name: ServiceName,
    /// How long a prepare waits for a slot; zero: it is returned if none is free.
    pub max_wait: Duration,
    /// Whether each instance has its own slots or all share them.
    pub cap: Cap,
}

/// The settings that all queues share.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// How long the journal keeps records.
    pub retention: Duration,
    /// The kind of prepare queues.
    pub commands: PrepareQueueKind,
}

impl Default for Settings {
    fn default() -> Self {
        Self { retention: RETENTION, commands: PrepareQueueKind::Classic }
    }
}

/// The kind of prepare queues.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PrepareQueueKind {
    /// Classic queues: several times faster. What a broker loses in a restart is sent again.
    #[default]
    Classic,
    /// Quorum queues: the loss of one node of a cluster doesn't stop a service.
    Quorum,
}

impl PrepareQueueKind {
    /// The suitable kind for the broker at `address`. Several hosts are a cluster, on which a
    /// service must not stop when its queue's node is lost.
    pub fn at(address: &Address) -> Self {
        if address.hosts().len() > 1 { Self::Quorum } else { Self::Classic }
    }
}

impl Topology {
    /// Everything that `services` and the rest of one system need.
    pub fn of(names: &Names, services: &[ServiceTopology], settings: &Settings) -> Self {
        let mut topology = Self::of_services(names, services, settings);
        let retention = Argument::Text(age(settings.retention));
        let journal = Queue::stream(names.journal()).with([("x-max-age", retention)]);
        topology.queues.insert(0, journal);
        let kept = u64::try_from(REJECTED_KEPT.as_millis()).unwrap_or(u64::MAX);
        topology.queues.extend([
            Queue::segmented(names.packed_journal(), PACKS_KEPT),
            Queue::segmented(names.unresolved(), RECORDS_KEPT),
            Queue::segmented(names.audit(), RECORDS_KEPT),
            Queue::quorum(names.rejected()).with([("x-message-ttl", Argument::Number(kept))]),
            Queue::quorum(names.requests()),
        ]);
        topology.exchanges.extend([
            Exchange::topic(names.results(), None),
            Exchange::topic(names.requests(), None),
        ]);
        topology.bindings.push(Binding::new(names.requests(), names.requests(), REQUEST));
        topology
    }

    /// What `services` need to be reached and to answer: without journal and requests.
    pub fn of_services(names: &Names, services: &[ServiceTopology], settings: &Settings) -> Self {
        let exchanges = vec![
            Exchange { kind: ExchangeKind::Fanout, ..Exchange::topic(names.inquiries(), None) },
            Exchange::topic(names.finish_any(), None),
            Exchange::topic(names.replies(), Some(names.inquiries())),
            Exchange::topic(names.finish(), Some(names.finish_any())),
            Exchange::topic(names.prepare(), None),
        ];
        let mut queues = vec![Queue::quorum(names.inquiries())];
        let stand_ins = services.iter().map(|service| names.moving(&service.name)).collect();
        let mut bindings = vec![Binding::new(names.inquiries(), names.inquiries(), "#")];
        for service in services {
            let (finish, prepare) = service.queues(names, settings);
            let key = format!("*.{}", service.name);
            bindings.push(Binding::new(names.finish_any(), finish.name.clone(), &key));
            bindings.push(Binding::new(names.prepare(), prepare.name.clone(), &key));
            queues.extend([finish, prepare]);
        }
        Self { exchanges, queues, bindings, stand_ins }
    }
}

impl ServiceTopology {
    /// Its queues for finishes that any instance may apply, and for prepares.
    pub fn queues(&self, names: &Names, settings: &Settings) -> (Queue, Queue) {
        let max_wait = u64::try_from(self.max_wait.as_millis()).unwrap_or(u64::MAX);
        let name = names.prepare_of(&self.name);
        let prepare = match settings.commands {
            PrepareQueueKind::Classic => Queue::classic(name),
            PrepareQueueKind::Quorum => Queue::quorum(name),
        };
        let mut prepare = prepare.with([
            ("x-message-ttl", Argument::Number(max_wait)),
            ("x-dead-letter-exchange", Argument::Text(names.replies().to_string())),
        ]);
        if self.cap == Cap::Service {
            prepare = prepare.with([("x-single-active-consumer", Argument::Flag(true))]);
        }
        (Queue::quorum(names.finish_any_of(&self.name)), prepare)
    }
}

impl Exchange {
    fn topic(name: ShortString, alternate: Option<ShortString>) -> Self {
        Self { name, kind: ExchangeKind::Topic, alternate }
    }

    /// Its arguments.
    pub fn arguments(&self) -> Arguments {
        let alternate = self.alternate.iter();
        let alternate = alternate.map(|name| Argument::Text(name.to_string()));
        alternate.map(|name| ("alternate-exchange".to_owned(), name)).collect()
    }
}

impl Queue {
    fn classic(name: ShortString) -> Self {
        Self { name, kind: QueueKind::Classic, arguments: Arguments::new() }
    }

    fn quorum(name: ShortString) -> Self {
        let timeout = u64::try_from(CONSUMER_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
        let queue = Self { kind: QueueKind::Quorum, ..Self::classic(name) };
        queue.with([
            ("x-delivery-limit", Argument::Number(DELIVERY_LIMIT)),
            ("x-consumer-timeout", Argument::Number(timeout)),
            ("x-queue-leader-locator", Argument::Text("balanced".to_owned())),
        ])
    }

    fn stream(name: ShortString) -> Self {
        let queue = Self { kind: QueueKind::Stream, ..Self::classic(name) };
        queue.with([("x-queue-leader-locator", Argument::Text("balanced".to_owned()))])
    }

    /// A stream in small segments, so that what is older than `kept` is removed soon.
    fn segmented(name: ShortString, kept: Duration) -> Self {
        Self::stream(name).with([
            ("x-max-age", Argument::Text(age(kept))),
            ("x-stream-max-segment-size-bytes", Argument::Number(SEGMENT)),
        ])
    }

    fn with<const N: usize>(mut self, arguments: [(&str, Argument); N]) -> Self {
        let arguments = arguments.into_iter().map(|(name, value)| (name.to_owned(), value));
        self.arguments.extend(arguments);
        self
    }

    /// The argument for the kind. It is always given, since a virtual host may have its own
    /// default.
    pub const KIND: &'static str = "x-queue-type";

    /// All arguments, including the kind.
    pub fn all_arguments(&self) -> Arguments {
        let mut arguments = self.arguments.clone();
        arguments.insert(Self::KIND.to_owned(), Argument::Text(self.kind.to_string()));
        arguments
    }
}

impl Binding {
    fn new(exchange: ShortString, queue: ShortString, key: &str) -> Self {
        Self { exchange, queue, key: key.into() }
    }
}

/// Arguments in AMQP's form.
pub(crate) fn table(arguments: &Arguments) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        let value = match value {
            // No number here is near that limit.
            Argument::Number(number) => {
                AMQPValue::LongLongInt(i64::try_from(*number).unwrap_or(i64::MAX))
            }
            Argument::Text(text) => AMQPValue::LongString(text.as_str().into()),
            Argument::Flag(flag) => AMQPValue::Boolean(*flag),
        };
        table.insert(name.as_str().into(), value);
    }
    table
}

/// A duration in the form that streams take: `7D`, `12h`, `90s`.
pub fn age(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let units = [("D", 24 * 60 * 60), ("h", 60 * 60), ("m", 60)];
    let unit =
        units.into_iter().find(|(_, length)| seconds >= *length && seconds.is_multiple_of(*length));
    let (unit, length) = unit.unwrap_or(("s", 1));
    format!("{}{unit}", seconds / length)
}

impl fmt::Display for Argument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => f.write_str(text),
            Self::Flag(flag) => write!(f, "{flag}"),
        }
    }
}

impl fmt::Display for QueueKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Classic => "classic",
            Self::Quorum => "quorum",
            Self::Stream => "stream",
        })
    }
}

impl fmt::Display for PrepareQueueKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Classic => "classic",
            Self::Quorum => "quorum",
        })
    }
}

impl fmt::Display for ExchangeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Topic => "topic",
            Self::Fanout => "fanout",
        })
    }
}
