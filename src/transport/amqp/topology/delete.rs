//! Taking everything of one system away, with all that is in it.
//!
//! It is for namespaces that were made to be thrown away. Queues that instances, workers and
//! producers have declared for themselves go with their connections.

use lapin::{
    Connection,
    options::{ExchangeDeleteOptions, QueueDeleteOptions},
};

use crate::transport::amqp::{
    error::Disposition,
    topology::{Topology, finding::Subject},
};

/// Something was not deleted; what comes before it was.
#[derive(Clone, Debug, thiserror::Error)]
#[error("failed to delete {subject}")]
pub struct DeleteError {
    /// What.
    pub subject: Subject,
    /// Why.
    #[source]
    pub source: lapin::Error,
}

impl DeleteError {
    /// Whether to try again.
    pub fn disposition(&self) -> Disposition {
        super::disposition(&self.source)
    }
}

/// Deletes everything in `topology`: first what lets messages in, the journal last. What isn't there
/// is no failure.
///
/// # Errors
///
/// The broker refuses it, or is gone.
pub async fn delete(connection: &Connection, topology: &Topology) -> Result<(), DeleteError> {
    let failed = |subject: Subject| move |source| DeleteError { subject, source };
    let Some(first) = topology.exchanges.first() else { return Ok(()) };
    let opened = connection.create_channel().await;
    let channel = opened.map_err(failed(Subject::Exchange(first.name.to_string())))?;
    for exchange in topology.exchanges.iter().rev() {
        let deleted =
            channel.exchange_delete(exchange.name.clone(), ExchangeDeleteOptions::default()).await;
        deleted.map_err(failed(Subject::Exchange(exchange.name.to_string())))?;
    }
    for queue in topology.queues.iter().rev() {
        let deleted = channel.queue_delete(queue.name.clone(), QueueDeleteOptions::default()).await;
        deleted.map_err(failed(Subject::Queue(queue.name.to_string())))?;
    }
    Ok(())
}
