//! What commands are told about the configuration, and about RabbitMQ.

use std::{
    env, fmt,
    path::{Path, PathBuf},
};

use clap::Args;

use crate::{
    cli::{Exit, Failure},
    complaint::{Complaint, Complaints, Place},
    config::{self, Config, Flag, Given},
    transport::amqp::{
        connection::{Broker, ConnectError},
        error::Disposition,
        names::{Names, Namespace},
    },
};

#[derive(Debug, Args)]
pub(super) struct ConfigArgument {
    /// Configuration file in the form that `dtc config --defaults` prints; flags and environment
    /// variables take precedence
    #[arg(long, value_name = "FILE", env = "DTC_CONFIG")]
    config: Option<PathBuf>,
}

impl ConfigArgument {
    /// The file, for another process that is to work with the same.
    pub(super) fn file(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// All that is set, with `flags` above the rest.
    pub(super) fn load(
        &self,
        flags: impl IntoIterator<Item = Option<Flag>>,
    ) -> Result<Config, Failure> {
        let given = Given {
            file: self.config.clone(),
            environment: env::vars_os().collect(),
            flags: flags.into_iter().flatten().collect(),
        };
        config::load(&given).map_err(bad_configuration)
    }
}

/// A flag that sets `key`, where it was given.
pub(super) fn flag(
    key: &'static str,
    flag: &'static str,
    value: Option<impl ToString>,
) -> Option<Flag> {
    value.map(|value| Flag { key, flag, value: value.to_string() })
}

/// What is wrong with nothing but the command line is an error of usage.
fn bad_configuration(complaints: Complaints) -> Failure {
    let is_of_flag = |complaint: &Complaint| match &complaint.place {
        Place::Key { source, .. } => source.is_flag(),
        Place::Text { .. } => false,
    };
    let is_usage = complaints.listed().iter().all(is_of_flag);
    Failure::new(if is_usage { Exit::Usage } else { Exit::BadConfiguration }, complaints)
}

#[derive(Debug, Args)]
pub(super) struct NamespaceArgument {
    /// First word of the names of all exchanges and queues [default: dtc]
    ///
    /// [env: DTC__BROKER__NAMESPACE]
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
}

impl NamespaceArgument {
    pub(super) fn flag(&self) -> Option<Flag> {
        flag("broker.namespace", "--namespace", self.namespace.as_ref())
    }
}

#[derive(Debug, Args)]
pub(super) struct UrlArgument {
    /// RabbitMQ as amqp://user:password@host:port/vhost, or amqps:// for TLS; for several hosts of
    /// a cluster, such URLs separated by commas [default: amqp://localhost]
    ///
    /// [env: DTC__BROKER__URL]
    #[arg(long = "broker", value_name = "URL")]
    url: Option<Secret>,
}

impl UrlArgument {
    pub(super) fn flag(&self) -> Option<Flag> {
        flag("broker.url", "--broker", self.url.as_ref().map(|url| &url.0))
    }

    /// As it was said, for another process. It may hold a password.
    pub(super) fn secret(&self) -> Option<&str> {
        self.url.as_ref().map(|url| url.0.as_str())
    }
}

#[derive(Debug, Args)]
pub(super) struct BrokerArguments {
    #[command(flatten)]
    config: ConfigArgument,
    #[command(flatten)]
    url: UrlArgument,
    #[command(flatten)]
    namespace: NamespaceArgument,
    /// Interval of AMQP heartbeats, in whole seconds; the broker closes a connection that is silent
    /// for two to three intervals [default: 10s]
    ///
    /// [env: DTC__BROKER__HEARTBEAT]
    #[arg(long, value_name = "DURATION")]
    heartbeat: Option<String>,
    /// CAs to trust for the broker's certificate (amqps://), in PEM [default: the system's CAs]
    ///
    /// [env: DTC__BROKER__TLS__CA_FILE]
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<String>,
    /// Client certificate, for a broker that asks for one, followed by its intermediate CAs, in PEM
    ///
    /// [env: DTC__BROKER__TLS__CERTIFICATE_FILE]
    #[arg(long, value_name = "FILE")]
    tls_certificate: Option<String>,
    /// Private key of the client certificate, in PEM, without a passphrase
    ///
    /// [env: DTC__BROKER__TLS__KEY_FILE]
    #[arg(long, value_name = "FILE")]
    tls_key: Option<String>,
}

impl BrokerArguments {
    /// All that is set, with these flags, and the command's own `flags`, above the rest.
    pub(super) fn load(
        &self,
        flags: impl IntoIterator<Item = Option<Flag>>,
    ) -> Result<Config, Failure> {
        let own = [
            self.url.flag(),
            self.namespace.flag(),
            flag("broker.heartbeat", "--heartbeat", self.heartbeat.as_ref()),
            flag("broker.tls.ca_file", "--tls-ca", self.tls_ca.as_ref()),
            flag("broker.tls.certificate_file", "--tls-certificate", self.tls_certificate.as_ref()),
            flag("broker.tls.key_file", "--tls-key", self.tls_key.as_ref()),
        ];
        self.config.load(own.into_iter().chain(flags))
    }
}

/// Where to connect to, as `name`.
pub(super) fn broker(config: &Config, name: impl Into<String>) -> Broker {
    let address = config.broker.address.clone();
    let heartbeat = config.broker.heartbeat;
    let mut broker = Broker::new(address, name).with_tls(config.broker.tls.clone());
    broker.heartbeat = heartbeat;
    broker
}

/// What everything is called there.
pub(super) fn names(config: &Config) -> Names {
    Names::new(config.broker.namespace.clone())
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
    /// Run it through RabbitMQ at amqp://user:password@host:port/vhost, or amqps:// for TLS; for
    /// several hosts of a cluster, such URLs separated by commas
    #[arg(long = "broker", value_name = "URL")]
    url: Option<Secret>,
    /// First word of the names of all exchanges and queues, which must exist [default: a new name,
    /// under which they are declared, and deleted at the end]
    #[arg(long, value_name = "NAME", requires = "url")]
    namespace: Option<Namespace>,
    #[command(flatten)]
    config: ConfigArgument,
}

impl OptionalBroker {
    /// Where to connect to, as `name`, if anywhere; how is a matter of configuration.
    pub(super) fn broker(&self, name: impl Into<String>) -> Result<Option<Broker>, Failure> {
        let Some(url) = &self.url else { return Ok(None) };
        let config = self.config.load([flag("broker.url", "--broker", Some(&url.0))])?;
        Ok(Some(broker(&config, name)))
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
