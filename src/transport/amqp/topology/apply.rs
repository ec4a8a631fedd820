//! Making a broker have what the topology says.
//!
//! Everything is compared first: where something is another than it should be, nothing is declared.
//! Otherwise all of it is declared, whether it is there or not, so that any number of applies, also
//! at once, end in the same.

use std::{
    future,
    pin::{Pin, pin},
    time::Duration,
};

use lapin::{
    Channel,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};

use crate::{
    protocol::time::Time,
    transport::amqp::{
        bounded::{ANSWER_MAX, AskError, DECLARE_MAX, answer},
        connection::{Backoff, Broker, BrokerConnection, ConnectError, close},
        error::Disposition,
        names::Names,
        publisher::Published,
        topology::{
            Binding, Exchange, Queue, ServiceTopology, Settings, Topology,
            begin::{self, Beginning},
            check::{self, CheckError},
            finding::{Fault, Finding, Subject, listed},
            probe, table,
        },
    },
};

/// How to apply.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What the queues depend on.
    pub settings: Settings,
    /// The moment it is.
    pub now: Time,
    /// How much the clocks of the system may differ.
    pub clock_margin: Duration,
}

/// What an apply did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Applied {
    /// What wasn't there before, in the order of the topology.
    pub created: Vec<Subject>,
    /// The journal's first record, if this apply wrote it.
    pub begun: Option<Begun>,
    /// The queues that are out of reach: they were neither compared nor declared nor bound.
    pub unavailable: Vec<Finding>,
}

/// The first record of a journal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Begun {
    /// Nothing of the journal is missing from then on.
    pub complete_since: Time,
    /// Whether the journal was lost under a system that lives: what was requested up to then, and
    /// [`Options::clock_margin`] longer, is handed to a person instead of being decided.
    pub was_lost: bool,
}

/// The topology was not applied, or not as a whole.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TopologyError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The connection gives no channel.
    #[error("failed to open a channel")]
    Open(#[source] AskError),
    /// The broker could not be asked what it has.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// Something is there, but another. Nothing was declared.
    #[error("{}", listed(.0))]
    Mismatch(Vec<Finding>),
    /// Without these nothing can be declared, and they are out of reach.
    #[error("{}", listed(.0))]
    Unavailable(Vec<Finding>),
    /// An exchange or queue was not declared; those before it were.
    #[error("failed to declare {subject}")]
    Declare {
        /// Which.
        subject: Subject,
        /// Why.
        #[source]
        source: AskError,
    },
    /// A queue was not bound; what comes before it was declared.
    #[error("failed to bind queue `{queue}` to exchange `{exchange}`")]
    Bind {
        /// The queue.
        queue: String,
        /// The exchange.
        exchange: String,
        /// Why.
        #[source]
        source: AskError,
    },
    /// The first record of the journal could be neither found nor written.
    #[error("failed to begin the journal `{journal}`")]
    Begin {
        /// The journal.
        journal: String,
        /// Why.
        #[source]
        source: AskError,
    },
    /// The broker didn't take the first record of the journal.
    #[error("the broker did not take the first record of the journal `{journal}`")]
    NotTaken {
        /// The journal.
        journal: String,
    },
}

impl TopologyError {
    /// Whether to try again.
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Connect(error) => error.disposition(),
            Self::Check(error) => error.disposition(),
            Self::Mismatch(_) => Disposition::GiveUp,
            Self::Open(source)
            | Self::Declare { source, .. }
            | Self::Bind { source, .. }
            | Self::Begin { source, .. } => source.disposition(),
            Self::Unavailable(_) | Self::NotTaken { .. } => Disposition::Retry,
        }
    }
}

/// How often an apply begins again because the journal that somebody else just declares wasn't
/// there yet.
const ATTEMPTS: usize = 6;

/// Makes the broker have everything that `services` and all else of one system need.
///
/// # Errors
///
/// It hasn't. [`TopologyError::Mismatch`] lists everything that is another than it should be.
pub async fn apply(
    broker: &Broker,
    names: &Names,
    services: &[ServiceTopology],
    options: &Options,
) -> Result<Applied, TopologyError> {
    let topology = Topology::of(names, services, &options.settings);
    apply_topology(broker, names, &topology, options).await
}

/// Makes the broker have what `services` need to be reached and to answer, for development: the
/// rest is left to [`apply`].
///
/// # Errors
///
/// As for [`apply`].
pub async fn apply_services(
    broker: &Broker,
    names: &Names,
    services: &[ServiceTopology],
    options: &Options,
) -> Result<Applied, TopologyError> {
    let topology = Topology::of_services(names, services, &options.settings);
    apply_topology(broker, names, &topology, options).await
}

/// Makes the broker have what `topology` says.
///
/// # Errors
///
/// As for [`apply`].
pub async fn apply_topology(
    broker: &Broker,
    names: &Names,
    topology: &Topology,
    options: &Options,
) -> Result<Applied, TopologyError> {
    let applied = attempts(pin!(future::pending()), broker, names, topology, options).await?;
    // Nobody stops it.
    Ok(applied.unwrap_or_default())
}

/// [`apply`] until `stop` is over. `None`: it was, and then the broker does nothing more of it: what
/// was made can be deleted.
///
/// # Errors
///
/// As for [`apply`].
#[cfg(feature = "cli")]
pub(crate) async fn apply_until(
    stop: impl Future<Output = ()>,
    broker: &Broker,
    names: &Names,
    services: &[ServiceTopology],
    options: &Options,
) -> Result<Option<Applied>, TopologyError> {
    let topology = Topology::of(names, services, &options.settings);
    attempts(pin!(stop), broker, names, &topology, options).await
}

async fn attempts(
    mut stop: Pin<&mut impl Future<Output = ()>>,
    broker: &Broker,
    names: &Names,
    topology: &Topology,
    options: &Options,
) -> Result<Option<Applied>, TopologyError> {
    let mut applied = Applied::default();
    let mut backoff = Backoff::default();
    for attempt in 1.. {
        let connection = tokio::select! {
            biased;
            () = &mut stop => return Ok(None),
            connected = broker.connect("topology") => connected?,
        };
        let ended = tokio::select! {
            biased;
            () = &mut stop => None,
            ended = apply_on(&connection, names, topology, options, &mut applied) => Some(ended),
        };
        // The broker answers this when it has done all that was asked before. One that takes no messages
        // would not hear it, and has done all but take the message.
        if !connection.status().blocked() {
            close(&connection).await;
        }
        match ended {
            None => break,
            Some(Ok(())) => return Ok(Some(applied)),
            // A stream that is being declared has its name before it can be written to or read, and
            // who tries loses the connection.
            Some(Err(TopologyError::Begin { source: AskError::Broker(_), .. }))
                if attempt < ATTEMPTS => {}
            Some(Err(error)) => return Err(error),
        }
        tokio::select! {
            biased;
            () = &mut stop => break,
            () = tokio::time::sleep(backoff.pause()) => {}
        }
    }
    Ok(None)
}

/// One attempt; what it makes is added to `applied`.
async fn apply_on(
    connection: &BrokerConnection,
    names: &Names,
    topology: &Topology,
    options: &Options,
    applied: &mut Applied,
) -> Result<(), TopologyError> {
    let findings = check::compare(connection, topology).await?;
    let (unavailable, findings): (Vec<_>, Vec<_>) =
        findings.into_iter().partition(Finding::is_unavailable);
    let (mismatches, missing): (Vec<_>, Vec<_>) =
        findings.into_iter().partition(Finding::is_mismatch);
    if !mismatches.is_empty() {
        return Err(TopologyError::Mismatch(mismatches));
    }
    let is_needed = |subject: &Subject| match subject {
        Subject::Exchange(_) => true,
        Subject::Queue(name) => name == names.journal().as_str(),
    };
    if unavailable.iter().any(|finding| is_needed(&finding.subject)) {
        return Err(TopologyError::Unavailable(unavailable));
    }
    let missing: Vec<_> = missing.into_iter().map(|finding| finding.subject).collect();
    let topology = topology.without(&unavailable);
    let mut declarer = Declarer::on(connection).await?;
    let (journal, queues) = topology.journal_and_others(names);
    if let Some(journal) = journal {
        declarer.queue(journal).await?;
        let is_new = missing.contains(&Subject::Queue(journal.name.to_string()));
        let begun = begin_journal(connection, names, options, is_new).await?;
        applied.begun = applied.begun.or(begun);
    }
    declare_others(&mut declarer, &topology, &queues).await?;
    applied.created.extend(missing);
    applied.unavailable = unavailable;
    Ok(())
}

/// Alternate exchanges come with their queues before those that fall back on them.
async fn declare_others(
    declarer: &mut Declarer,
    topology: &Topology,
    queues: &[&Queue],
) -> Result<(), TopologyError> {
    let alternates: Vec<_> =
        topology.exchanges.iter().filter_map(|exchange| exchange.alternate.as_ref()).collect();
    for first in [true, false] {
        for exchange in &topology.exchanges {
            if alternates.contains(&&exchange.name) == first {
                declarer.exchange(exchange).await?;
            }
        }
        for queue in queues.iter().filter(|_| first) {
            declarer.queue(queue).await?;
        }
        for binding in &topology.bindings {
            if alternates.contains(&&binding.exchange) == first {
                declarer.binding(binding).await?;
            }
        }
    }
    Ok(())
}

impl Topology {
    /// The same without the queues in `unavailable`, and without their bindings: the broker would
    /// refuse them, or declare another queue in place of the one that it can't reach.
    fn without(&self, unavailable: &[Finding]) -> Self {
        let is_there = |queue: &str| {
            !unavailable
                .iter()
                .any(|finding| matches!(&finding.subject, Subject::Queue(name) if name == queue))
        };
        let mut topology = self.clone();
        topology.queues.retain(|queue| is_there(queue.name.as_str()));
        topology.bindings.retain(|binding| is_there(binding.queue.as_str()));
        topology
    }

    fn journal_and_others(&self, names: &Names) -> (Option<&Queue>, Vec<&Queue>) {
        let (mut journal, others): (Vec<_>, Vec<_>) =
            self.queues.iter().partition(|queue| queue.name == names.journal());
        (journal.pop(), others)
    }
}

/// Writes the first record of the journal unless it is there.
///
/// Two that find it empty both write one; the first counts, and as each is written before any queue
/// is declared that tells of a living system, the first of a new system's is that of a new system.
async fn begin_journal(
    connection: &BrokerConnection,
    names: &Names,
    options: &Options,
    is_new: bool,
) -> Result<Option<Begun>, TopologyError> {
    let failed = |source| TopologyError::Begin { journal: names.journal().to_string(), source };
    let beginning = if is_new {
        Beginning::Empty
    } else {
        begin::beginning(connection, names).await.map_err(failed)?
    };
    let was_lost = match beginning {
        Beginning::Begun | Beginning::CutOff => return Ok(None),
        Beginning::Empty => begin::has_lived(connection, names).await.map_err(failed)?,
        // Somebody was at work before it was begun.
        Beginning::Other(_) => true,
    };
    let complete_since = begin::complete_since(options.now, options.clock_margin, was_lost);
    match begin::begin(connection, names, complete_since).await.map_err(failed)? {
        Published::Confirmed => Ok(Some(Begun { complete_since, was_lost })),
        Published::Lost(source) => Err(failed(source.into())),
        Published::Unconfirmed(limit) => Err(failed(AskError::Silent { limit })),
        Published::Refused | Published::Unroutable => {
            Err(TopologyError::NotTaken { journal: names.journal().to_string() })
        }
    }
}

/// Declares one after the other.
pub(super) struct Declarer {
    channel: Channel,
}

impl Declarer {
    pub(super) async fn on(connection: &BrokerConnection) -> Result<Self, TopologyError> {
        let channel = answer(ANSWER_MAX, connection.create_channel()).await;
        Ok(Self { channel: channel.map_err(TopologyError::Open)? })
    }

    pub(super) async fn exchange(&mut self, exchange: &Exchange) -> Result<(), TopologyError> {
        let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let (name, kind) = (exchange.name.clone(), exchange.kind.into());
        let arguments = table(&exchange.arguments());
        let declaring = self.channel.exchange_declare(name, kind, options, arguments);
        let declared = answer(DECLARE_MAX, declaring).await;
        declared.map_err(|source| refused(Subject::Exchange(exchange.name.to_string()), source))
    }

    pub(super) async fn queue(&mut self, queue: &Queue) -> Result<(), TopologyError> {
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let arguments = table(&queue.all_arguments());
        let declaring = self.channel.queue_declare(queue.name.clone(), options, arguments);
        let declared = answer(DECLARE_MAX, declaring).await;
        declared.map(drop).map_err(|source| refused(Subject::Queue(queue.name.to_string()), source))
    }

    pub(super) async fn binding(&mut self, binding: &Binding) -> Result<(), TopologyError> {
        let Binding { exchange, queue, key } = binding.clone();
        let options = QueueBindOptions::default();
        let bound = self.channel.queue_bind(queue, exchange, key, options, FieldTable::default());
        answer(ANSWER_MAX, bound).await.map_err(|source| TopologyError::Bind {
            queue: binding.queue.to_string(),
            exchange: binding.exchange.to_string(),
            source,
        })
    }
}

/// A refused declaration: somebody may have declared it otherwise since it was looked at.
fn refused(subject: Subject, source: AskError) -> TopologyError {
    match source.broker().and_then(probe::fault_of) {
        Some(fault @ Fault::Differs(_)) => {
            TopologyError::Mismatch(vec![Finding { subject, fault }])
        }
        Some(
            Fault::Missing
            | Fault::Refused(_)
            | Fault::NotBegun(_)
            | Fault::LeftOver
            | Fault::Unavailable(_),
        )
        | None => TopologyError::Declare { subject, source },
    }
}
