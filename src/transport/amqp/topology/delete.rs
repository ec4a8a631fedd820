//! Deleting one system, with all its messages.
//!
//! It is for temporary namespaces. The exclusive queues of instances, workers and producers are
//! deleted with their connections.

use lapin::{
    Channel, Connection,
    options::{ExchangeDeleteOptions, QueueDeleteOptions},
};

use crate::transport::amqp::{
    bounded::AskError,
    error::Disposition,
    topology::{
        Topology,
        finding::{Finding, Subject, listed},
        probe::{Prober, unavailable},
    },
};

/// Something was not deleted.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DeleteError {
    /// The broker refuses, or is gone. Everything before it was deleted.
    #[error("failed to delete {subject}")]
    Failed {
        /// The object.
        subject: Subject,
        /// The cause.
        #[source]
        source: AskError,
    },
    /// These were out of reach; everything else was deleted.
    #[error("not deleted:\n{}", listed(.0))]
    Left(Vec<Finding>),
}

impl DeleteError {
    /// Whether to try again.
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Failed { source, .. } => source.disposition(),
            Self::Left(_) => Disposition::Retry,
        }
    }
}

/// Deletes everything in `topology`: first what lets messages in, the journal last. An object that
/// doesn't exist is no error.
///
/// # Errors
///
/// The broker refuses, or is gone, or a queue is out of reach.
pub async fn delete(connection: &Connection, topology: &Topology) -> Result<(), DeleteError> {
    let mut deletion = Deletion { prober: Prober::on(connection), left: Vec::new() };
    for exchange in topology.exchanges.iter().rev() {
        let subject = Subject::Exchange(exchange.name.to_string());
        let delete = async |channel: Channel| {
            let options = ExchangeDeleteOptions::default();
            channel.exchange_delete(exchange.name.clone(), options).await
        };
        deletion.delete(subject, delete).await?;
    }
    for queue in topology.queues.iter().rev() {
        let subject = Subject::Queue(queue.name.to_string());
        let delete = async |channel: Channel| {
            let options = QueueDeleteOptions::default();
            channel.queue_delete(queue.name.clone(), options).await.map(drop)
        };
        deletion.delete(subject, delete).await?;
    }
    if deletion.left.is_empty() { Ok(()) } else { Err(DeleteError::Left(deletion.left)) }
}

struct Deletion<'a> {
    prober: Prober<'a>,
    left: Vec<Finding>,
}

impl Deletion<'_> {
    async fn delete(
        &mut self,
        subject: Subject,
        delete: impl AsyncFnOnce(Channel) -> Result<(), lapin::Error>,
    ) -> Result<(), DeleteError> {
        let Err(source) = self.prober.ask(delete).await else { return Ok(()) };
        let Some(fault) = unavailable(&source) else {
            return Err(DeleteError::Failed { subject, source });
        };
        self.left.push(Finding { subject, fault });
        if self.prober.is_given_up() {
            return Err(DeleteError::Left(std::mem::take(&mut self.left)));
        }
        Ok(())
    }
}
