//! Declaring the topology at a broker.
//!
//! Everything is compared first: if something differs, nothing is declared. Otherwise everything is
//! declared, whether it exists or not, so that any number of applies, even concurrent ones, have
//! the same result.

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
        connection::{Backoff, Broker, BrokerConnection, ConnectionError, close},
        error::Disposition,
        names::Names,
        publisher::PublishOutcome,
        topology::{
            Binding, Exchange, Queue, ServiceTopology, Settings, Topology,
            begin::{self, JournalBeginning},
            check::{self, CheckError},
            finding::{Fault, Finding, Subject, listed},
            probe, table,
        },
    },
};

/// How to apply.
#[derive(Clone, Copy, Debug)]
pub struct ApplyOptions {
    /// The settings of the queues.
    pub settings: Settings,
    /// The current time.
    pub now: Time,
    /// How much the clocks of the system may differ.
    pub clock_margin: Duration,
}

/// The result of an apply.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ApplyReport {
    /// What did not exist before, in the order of the topology.
    pub created: Vec<Subject>,
    /// The journal's first record, if this apply wrote it.
    pub begun: Option<JournalStart>,
    /// The queues that are out of reach: they were neither compared nor declared nor bound.
    pub unavailable: Vec<Finding>,
}

/// The first record of a journal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JournalStart {
    /// The journal is complete from this time on.
    pub complete_since: Time,
    /// Whether the journal of an existing system was lost: requests made up to then, and
    /// [`ApplyOptions::clock_margin`] longer, are parked instead of being decided.
    pub was_lost: bool,
}

/// The topology was not applied, or not as a whole.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TopologyError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectionError),
    /// The connection gives no channel.
    #[error("failed to open a channel")]
    Open(#[source] AskError),
    /// The broker could not be asked what exists.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// Something exists and differs. Nothing was declared.
    #[error("{}", listed(.0))]
    Mismatch(Vec<Finding>),
    /// These queues are out of reach, and without them nothing can be declared.
    #[error("{}", listed(.0))]
    Unavailable(Vec<Finding>),
    /// An exchange or queue was not declared; those before it were.
    #[error("failed to declare {subject}")]
    Declare {
        /// The object.
        subject: Subject,
        /// The cause.
        #[source]
        source: AskError,
    },
    /// A queue was not bound; everything before it was declared.
    #[error("failed to bind queue `{queue}` to exchange `{exchange}`")]
    Bind {
        /// The queue.
        queue: String,
        /// The exchange.
        exchange: String,
        /// The cause.
        #[source]
        source: AskError,
    },
    /// The first record of the journal could be neither found nor written.
    #[error("failed to begin the journal `{journal}`")]
    Begin {
        /// The journal.
        journal: String,
        /// The cause.
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

/// How often an apply starts over because another process is just declaring the journal.
const ATTEMPTS: usize = 6;

/// Declares everything that `services` and the rest of one system need.
///
/// # Errors
///
/// It was not declared. [`TopologyError::Mismatch`] lists everything that differs.
pub async fn apply(
    broker: &Broker,
    names: &Names,
    services: &[ServiceTopology],
    options: &ApplyOptions,
) -> Result<ApplyReport, TopologyError> {
    let topology = Topology::of(names, services, &options.settings);
    apply_topology(broker, names, &topology, options).await
}

/// Declares only what `services` need to be reached and to answer, for development: [`apply`]
/// declares the rest.
///
/// # Errors
///
/// As for [`apply`].
pub async fn apply_services(
    broker: &Broker,
    names: &Names,
    services: &[ServiceTopology],
    options: &ApplyOptions,
) -> Result<ApplyReport, TopologyError> {
    let topology = Topology::of_services(names, services, &options.settings);
    apply_topology(broker, names, &topology, options).await
}

/// Declares `topology`.
///
/// # Errors
///
/// As for [`apply`].
pub async fn apply_topology(
    broker: &Broker,
    names: &Names,
    topology: &Topology,
    options: &ApplyOptions,
) -> Result<ApplyReport, TopologyError> {
    let applied = attempts(pin!(future::pending()), broker, names, topology, options).await?;
    // Nothing stops it.
    Ok(applied.unwrap_or_default())
}

/// [`apply`] until `stop` ends. `None`: it ended first, and the broker has finished every request:
/// what was declared can be deleted.
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
    options: &ApplyOptions,
) -> Result<Option<ApplyReport>, TopologyError> {
    let topology = Topology::of(names, services, &options.settings);
    attempts(pin!(stop), broker, names, &topology, options).await
}

async fn attempts(
    mut stop: Pin<&mut impl Future<Output = ()>>,
    broker: &Broker,
    names: &Names,
    topology: &Topology,
    options: &ApplyOptions,
) -> Result<Option<ApplyReport>, TopologyError> {
    let mut applied = ApplyReport::default();
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
        // The broker answers this after it has handled all earlier requests. A broker with an alarm
        // would not read it, and has handled everything but the message.
        if !connection.status().blocked() {
            close(&connection).await;
        }
        match ended {
            None => break,
            Some(Ok(())) => return Ok(Some(applied)),
            // A stream that is being declared has its name before it can be written to or read, and
            // an attempt to do so ends the connection.
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

/// One attempt; what it declares is added to `applied`.
async fn apply_on(
    connection: &BrokerConnection,
    names: &Names,
    topology: &Topology,
    options: &ApplyOptions,
    applied: &mut ApplyReport,
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

/// Alternate exchanges are declared with their queues before the exchanges that use them.
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
    /// refuse them, or declare another queue instead of the one that it can't reach.
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

/// Writes the first record of the journal if it is missing.
///
/// Two processes that find the journal empty both write one, and the first one counts. Each is
/// written before any queue is declared that would indicate an existing system, so the first one of
/// a new system is correct.
async fn begin_journal(
    connection: &BrokerConnection,
    names: &Names,
    options: &ApplyOptions,
    is_new: bool,
) -> Result<Option<JournalStart>, TopologyError> {
    let failed = |source| TopologyError::Begin { journal: names.journal().to_string(), source };
    let beginning = if is_new {
        JournalBeginning::Empty
    } else {
        begin::beginning(connection, names).await.map_err(failed)?
    };
    let was_lost = match beginning {
        JournalBeginning::Begun | JournalBeginning::CutOff => return Ok(None),
        JournalBeginning::Empty => begin::has_existed(connection, names).await.map_err(failed)?,
        // Another system was at work before the journal was created.
        JournalBeginning::Other(_) => true,
    };
    let complete_since = begin::complete_since(options.now, options.clock_margin, was_lost);
    match begin::begin(connection, names, complete_since).await.map_err(failed)? {
        PublishOutcome::Confirmed => Ok(Some(JournalStart { complete_since, was_lost })),
        PublishOutcome::Lost(source) => Err(failed(source.into())),
        PublishOutcome::Unconfirmed(limit) => Err(failed(AskError::Silent { limit })),
        PublishOutcome::Refused | PublishOutcome::Unroutable => {
            Err(TopologyError::NotTaken { journal: names.journal().to_string() })
        }
    }
}

/// Declares one object after the other.
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

/// A refused declaration: another process may have declared it differently since it was compared.
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
