//! What every command that talks to RabbitMQ is told about it.

use std::{fmt, time::Duration};

use anyhow::Context as _;
use clap::Args;

use crate::{
    cli::{Exit, Failure, duration},
    transport::amqp::{
        connection::{Broker, ConnectError, Disposition},
        names::{Names, Namespace},
    },
};

#[derive(Debug, Args)]
pub(super) struct BrokerArguments {
    /// RabbitMQ: amqp://user:password@host:port/vhost; several hosts of a cluster: such URLs,
    /// separated by commas
    #[arg(long = "broker", value_name = "URL", default_value = "amqp://localhost")]
    #[arg(env = "DTC__BROKER__URL", hide_env_values = true)]
    url: Secret,
    /// What the names of all exchanges and queues begin with
    #[arg(long, value_name = "NAME", default_value = "dtc", env = "DTC__BROKER__NAMESPACE")]
    namespace: Namespace,
    /// How often to show the broker that we live, in whole seconds; it gives up who is silent for
    /// two to three times as long
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = duration::parse)]
    #[arg(env = "DTC__BROKER__HEARTBEAT")]
    heartbeat: Duration,
}

impl BrokerArguments {
    /// Where to connect to, as `name`.
    pub(super) fn broker(&self, name: impl Into<String>) -> Result<Broker, Failure> {
        let address = self.url.0.parse().context("invalid --broker (or DTC__BROKER__URL)");
        let address = address.map_err(|error| Failure::new(Exit::Usage, error))?;
        Ok(Broker { heartbeat: self.heartbeat, ..Broker::new(address, name) })
    }

    /// What everything is called there.
    pub(super) fn names(&self) -> Names {
        Names::new(self.namespace.clone())
    }
}

/// How a command ends that can't do without a connection.
pub(super) fn exit_of(error: &ConnectError) -> Exit {
    match error.disposition() {
        Disposition::GiveUp => Exit::Refused,
        Disposition::Retry => Exit::Unavailable,
    }
}

/// The same where it is a matter of choice: without an address, no broker is used.
#[derive(Debug, Args)]
pub(super) struct OptionalBroker {
    /// Run it through RabbitMQ: amqp://user:password@host:port/vhost; several hosts of a cluster:
    /// such URLs, separated by commas
    #[arg(long = "broker", value_name = "URL")]
    url: Option<Secret>,
    /// What the names of all exchanges and queues begin with, which must be there [default: a new
    /// name; everything is made, and deleted at the end]
    #[arg(long, value_name = "NAME", requires = "url")]
    namespace: Option<Namespace>,
}

impl OptionalBroker {
    /// Where to connect to, as `name`, if anywhere.
    pub(super) fn broker(&self, name: impl Into<String>) -> Result<Option<Broker>, Failure> {
        let Some(url) = &self.url else { return Ok(None) };
        let address = url.0.parse().context("invalid --broker");
        let address = address.map_err(|error| Failure::new(Exit::Usage, error))?;
        Ok(Some(Broker::new(address, name)))
    }

    /// What everything is called there, if that is said.
    pub(super) fn names(&self) -> Option<Names> {
        self.namespace.clone().map(Names::new)
    }
}

/// A text that may hold a password. It is looked at by ourselves: the command line's parser would
/// repeat what it doesn't like.
#[derive(Clone)]
struct Secret(String);

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(not shown)")
    }
}
