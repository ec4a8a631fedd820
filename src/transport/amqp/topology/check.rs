//! What is missing at a broker, or different from what it should be.
//!
//! It covers exchanges and queues, with every argument that the broker compares, and the first
//! record of the journal. It doesn't cover bindings, which AMQP can't list (a probe would have to
//! travel through queues that are in use): [`apply`](super::apply) makes them anew each time.
//! Policies are beyond AMQP too.

use lapin::Connection;

use crate::transport::amqp::{
    error::Disposition,
    names::Names,
    topology::{
        Topology, begin,
        finding::{Fault, Finding, Subject},
        probe::{Presence, Prober},
    },
};

/// The broker could not be asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CheckError {
    /// About an exchange or queue.
    #[error("failed to ask the broker about {subject}")]
    Ask {
        /// Which.
        subject: Subject,
        /// Why.
        #[source]
        source: lapin::Error,
    },
}

impl CheckError {
    /// Whether to try again.
    pub fn disposition(&self) -> Disposition {
        let Self::Ask { source, .. } = self;
        super::disposition(source)
    }
}

/// Compares everything in `topology` with what the broker has.
///
/// # Errors
///
/// It couldn't be asked.
pub async fn check(
    connection: &Connection,
    names: &Names,
    topology: &Topology,
) -> Result<Vec<Finding>, CheckError> {
    let mut findings = compare(connection, topology).await?;
    let journal = Subject::Queue(names.journal().to_string());
    let is_sound = !findings.iter().any(|finding| finding.subject == journal);
    if is_sound && topology.queues.iter().any(|queue| queue.name == names.journal()) {
        let beginning = begin::beginning(connection, names).await;
        let beginning =
            beginning.map_err(|source| CheckError::Ask { subject: journal.clone(), source })?;
        if let Some(found) = beginning.fault() {
            findings.push(Finding { subject: journal, fault: Fault::NotBegun(found) });
        }
    }
    Ok(findings)
}

/// The same without a look into the journal.
pub(super) async fn compare(
    connection: &Connection,
    topology: &Topology,
) -> Result<Vec<Finding>, CheckError> {
    let mut prober = Prober::on(connection);
    let mut findings = Vec::new();
    for exchange in &topology.exchanges {
        let found = prober.exchange(exchange).await;
        let subject = || Subject::Exchange(exchange.name.to_string());
        findings.extend(found.map_err(|source| CheckError::Ask { subject: subject(), source })?);
    }
    for queue in &topology.queues {
        let found = prober.queue(queue).await;
        let subject = || Subject::Queue(queue.name.to_string());
        findings.extend(found.map_err(|source| CheckError::Ask { subject: subject(), source })?);
    }
    for name in &topology.stand_ins {
        let subject = Subject::Queue(name.to_string());
        let presence = prober.queue_presence(name.as_str()).await;
        let presence =
            presence.map_err(|source| CheckError::Ask { subject: subject.clone(), source })?;
        if presence != Presence::Missing {
            findings.push(Finding { subject, fault: Fault::LeftOver });
        }
    }
    Ok(findings)
}
