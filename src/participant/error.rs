//! Why an instance can't serve.

use crate::{
    protocol::ids::ServiceName,
    setting::InvalidSetting,
    transport::amqp::{
        bounded::AskError,
        connection::ConnectionError,
        error::{BrokerError, Disposition, is_not_found},
        topology::apply::TopologyError,
    },
};

/// Why an instance of a service can't serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// A setting is invalid.
    #[error("invalid service")]
    Invalid(#[from] InvalidSetting),
    /// The broker refuses the connection, or a permission that the instance needs.
    #[error("the broker refuses service `{service}`")]
    Refused {
        /// The service.
        service: ServiceName,
        /// What the broker refused.
        #[source]
        source: BrokerError,
    },
    /// Other instances of the service serve with another store.
    #[error(
        "the store of this instance of service `{service}` is `{own}`, and other instances serve with \
         store `{other}`: all instances of a service must share one store, or they lose commits; \
         give this one theirs, or stop them first if this store is the right one"
    )]
    OtherStore {
        /// The service.
        service: ServiceName,
        /// The id of this instance's store.
        own: String,
        /// The id of the others' store.
        other: String,
    },
    /// A queue or exchange that is to be declared exists, but differs.
    #[error("the queues of service `{service}` differ from what is to be declared")]
    Mismatch {
        /// The service.
        service: ServiceName,
        /// The differences.
        #[source]
        source: BrokerError,
    },
}

/// An instance could not open its session.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    /// No connection.
    #[error("failed to connect")]
    Connect(#[from] ConnectionError),
    /// The connection gives no channel.
    #[error("failed to open a channel")]
    Channel(#[source] AskError),
    /// The service's queues can't be declared.
    #[error("failed to declare the service's queues")]
    Declare(#[source] Box<TopologyError>),
    /// Other instances, which are connected, have another store.
    #[error("this instance's store is `{own}`, and other instances serve with store `{other}`")]
    OtherStore {
        /// The id of this instance's store.
        own: String,
        /// The id of the others' store.
        other: String,
    },
    /// The queue can't be consumed or declared.
    #[error("failed to use queue `{name}`")]
    Queue {
        /// The queue.
        name: String,
        /// The cause.
        #[source]
        source: AskError,
    },
    /// No queue can be bound to the exchange, or nothing published to it.
    #[error("failed to use exchange `{name}`")]
    Exchange {
        /// The exchange.
        name: String,
        /// The cause.
        #[source]
        source: AskError,
    },
}

impl ServeError {
    /// `error` is final for `service`: waiting doesn't help.
    pub(super) fn of(service: ServiceName, error: OpenError) -> Self {
        let disposition = error.disposition();
        match error {
            OpenError::Declare(source) if matches!(*source, TopologyError::Mismatch(_)) => {
                Self::Mismatch { service, source: BrokerError::new(*source, disposition) }
            }
            OpenError::OtherStore { own, other } => Self::OtherStore { service, own, other },
            OpenError::Connect(_)
            | OpenError::Channel(_)
            | OpenError::Declare(_)
            | OpenError::Queue { .. }
            | OpenError::Exchange { .. } => {
                Self::Refused { service, source: BrokerError::new(error, disposition) }
            }
        }
    }
}

impl OpenError {
    /// Whether to retry.
    pub(super) fn disposition(&self) -> Disposition {
        match self {
            Self::Connect(error) => error.disposition(),
            Self::Declare(error) => error.disposition(),
            Self::OtherStore { .. } => Disposition::GiveUp,
            Self::Channel(source) | Self::Queue { source, .. } | Self::Exchange { source, .. } => {
                source.disposition()
            }
        }
    }

    /// Whether the broker has accepted the instance's connections.
    pub(super) fn is_connected(&self) -> bool {
        !matches!(self, Self::Connect(_))
    }

    /// The queue or exchange that does not exist: the topology was not applied, or not yet.
    pub(super) fn missing(&self) -> Option<String> {
        let is_missing = |source: &AskError| source.broker().is_some_and(is_not_found);
        match self {
            Self::Queue { name, source } => is_missing(source).then(|| format!("queue `{name}`")),
            Self::Exchange { name, source } => {
                is_missing(source).then(|| format!("exchange `{name}`"))
            }
            Self::Connect(_) | Self::Channel(_) | Self::Declare(_) | Self::OtherStore { .. } => {
                None
            }
        }
    }
}
