//! Comparing what a broker has with what it should have.
//!
//! The comparison covers exchanges and queues, with every argument that the broker compares, and
//! the first record of the journal. It doesn't cover bindings, which AMQP can't list (a probe would
//! have to travel through queues in use): [`apply`](super::apply) declares them each time. Policies
//! are not accessible by AMQP either.

use lapin::Connection;

use crate::transport::amqp::{
    bounded::AskError,
    error::{Disposition, may_pass},
    names::Names,
    topology::{
        ServiceTopology, Settings, Topology, begin,
        finding::{Difference, Fault, Finding, Subject, listed},
        probe::{Presence, Prober, unavailable},
    },
};

/// The broker could not be asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CheckError {
    /// About an exchange or queue.
    #[error("failed to ask the broker about {subject}")]
    Ask {
        /// The object.
        subject: Subject,
        /// The cause.
        #[source]
        source: AskError,
    },
    /// Several questions in a row got no answer.
    #[error("{}\nthe broker answers nothing: no more is asked", listed(.found))]
    Silent {
        /// What was found before that.
        found: Vec<Finding>,
    },
}

impl CheckError {
    /// Whether to try again.
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Ask { source, .. } => source.disposition(),
            Self::Silent { .. } => Disposition::Retry,
        }
    }

    /// Whether it may be from a broker that has just started, which may answer soon.
    pub fn may_be_starting(&self) -> bool {
        match self {
            Self::Ask { source, .. } => source.broker().is_some_and(may_pass),
            Self::Silent { .. } => false,
        }
    }
}

/// Compares everything in `topology` with what the broker has. Objects that it can't be asked about
/// are reported as [`Fault::Unavailable`], and the rest is compared.
///
/// # Errors
///
/// The broker couldn't be asked.
pub async fn check(
    connection: &Connection,
    names: &Names,
    topology: &Topology,
) -> Result<Vec<Finding>, CheckError> {
    let mut findings = compare(connection, topology).await?;
    let journal = Subject::Queue(names.journal().to_string());
    let is_sound = !findings.iter().any(|finding| finding.subject == journal);
    if is_sound && topology.queues.iter().any(|queue| queue.name == names.journal()) {
        let fault = match begin::beginning(connection, names).await {
            Ok(beginning) => beginning.fault().map(Fault::NotBegun),
            Err(source) => match unavailable(&source) {
                Some(fault) => Some(fault),
                None => return Err(CheckError::Ask { subject: journal, source }),
            },
        };
        findings.extend(fault.map(|fault| Finding { subject: journal, fault }));
    }
    Ok(findings)
}

/// The same without reading the journal.
pub(super) async fn compare(
    connection: &Connection,
    topology: &Topology,
) -> Result<Vec<Finding>, CheckError> {
    let mut comparison = Comparison { prober: Prober::on(connection), findings: Vec::new() };
    for exchange in &topology.exchanges {
        let found = comparison.prober.exchange(exchange).await;
        comparison.take(Subject::Exchange(exchange.name.to_string()), found)?;
    }
    for queue in &topology.queues {
        let found = comparison.prober.queue(queue).await;
        comparison.take(Subject::Queue(queue.name.to_string()), found)?;
    }
    for name in &topology.stand_ins {
        let subject = Subject::Queue(name.to_string());
        let presence = comparison.prober.queue_presence(name.as_str()).await;
        let left_over = || Finding { subject: subject.clone(), fault: Fault::LeftOver };
        let found = presence.map(|presence| match presence {
            Presence::Missing => Vec::new(),
            Presence::There | Presence::Exclusive => vec![left_over()],
        });
        comparison.take(subject, found)?;
    }
    Ok(comparison.findings)
}

/// A difference between a service's queue and a field of its services.json.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceMismatch {
    /// The field.
    pub field: &'static str,
    /// The value in services.json.
    pub wanted: String,
    /// The value of the queue.
    pub found: String,
}

impl ServiceMismatch {
    fn of(finding: &Finding) -> Option<Self> {
        let Fault::Differs(Difference { argument, wanted, found, .. }) = &finding.fault else {
            return None;
        };
        let (field, readable): (_, fn(Option<&str>) -> String) = match argument.as_str() {
            "x-message-ttl" => ("max_wait_ms", max_wait),
            "x-single-active-consumer" => ("cap", cap),
            _ => return None,
        };
        Some(Self { field, wanted: readable(wanted.as_deref()), found: readable(found.as_deref()) })
    }
}

fn max_wait(value: Option<&str>) -> String {
    value.unwrap_or("any").to_owned()
}

fn cap(value: Option<&str>) -> String {
    match value {
        Some("true") => "service".to_owned(),
        Some(_) | None => "instance".to_owned(),
    }
}

/// Compares the queue of a service's prepares with `service`, whatever kind of queue it is: each
/// difference from `settings`, too, costs a question that the broker logs. For a queue that doesn't
/// exist, there is no difference.
///
/// # Errors
///
/// The broker couldn't be asked.
pub async fn service_mismatches(
    connection: &Connection,
    names: &Names,
    service: &ServiceTopology,
    settings: &Settings,
) -> Result<Vec<ServiceMismatch>, CheckError> {
    let (_, queue) = service.queues(names, settings);
    let subject = Subject::Queue(queue.name.to_string());
    let found = Prober::on(connection).queue(&queue).await;
    let findings = found.map_err(|source| CheckError::Ask { subject, source })?;
    Ok(findings.iter().filter_map(ServiceMismatch::of).collect())
}

struct Comparison<'a> {
    prober: Prober<'a>,
    findings: Vec<Finding>,
}

impl Comparison<'_> {
    /// Records what was found about `subject`.
    fn take(
        &mut self,
        subject: Subject,
        found: Result<Vec<Finding>, AskError>,
    ) -> Result<(), CheckError> {
        match found {
            Ok(found) => self.findings.extend(found),
            Err(source) => match unavailable(&source) {
                Some(fault) => self.findings.push(Finding { subject, fault }),
                None => return Err(CheckError::Ask { subject, source }),
            },
        }
        if self.prober.is_given_up() {
            return Err(CheckError::Silent { found: std::mem::take(&mut self.findings) });
        }
        Ok(())
    }
}
