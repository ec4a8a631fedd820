//! The flags about the configuration and RabbitMQ that several commands share.

use std::{
    env,
    path::{Path, PathBuf},
};

use clap::Args;
use secrecy::{ExposeSecret, SecretString};

use crate::{
    cli::{Exit, Failure},
    complaint::{Complaint, Complaints, Location},
    config::{self, Config, ConfigFlag, ConfigSources},
    transport::amqp::{
        connection::{Broker, ConnectionError},
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
    /// The configuration file, to pass on to a child process.
    pub(super) fn file(&self) -> Option<&Path> {
        self.config.as_deref()
    }

    /// Loads the configuration, with `flags` above environment and file.
    pub(super) fn load(
        &self,
        flags: impl IntoIterator<Item = Option<ConfigFlag>>,
    ) -> Result<Config, Failure> {
        let sources = ConfigSources {
            file: self.config.clone(),
            environment: env::vars_os().collect(),
            flags: flags.into_iter().flatten().collect(),
        };
        config::load(&sources).map_err(bad_configuration)
    }
}

/// A flag that sets `key`, if it was given.
pub(super) fn flag(
    key: &'static str,
    flag: &'static str,
    value: Option<impl ToString>,
) -> Option<ConfigFlag> {
    value.map(|value| ConfigFlag { key, flag, value: value.to_string() })
}

/// If all complaints are about flags, it is a usage error.
fn bad_configuration(complaints: Complaints) -> Failure {
    let is_of_flag = |complaint: &Complaint| match &complaint.location {
        Location::Key { source, .. } => source.is_flag(),
        Location::Text { .. } => false,
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
    pub(super) fn flag(&self) -> Option<ConfigFlag> {
        flag("broker.namespace", "--namespace", self.namespace.as_ref())
    }
}

#[derive(Debug, Args)]
pub(super) struct UrlArgument {
    /// RabbitMQ as amqp://user:password@host:port/vhost, or amqps:// for TLS; for several hosts of
    /// a cluster, such URLs separated by commas [default: amqp://localhost]
    ///
    /// [env: DTC__BROKER__URL]
    // It may hold a password, so it is parsed later: clap would repeat an invalid value in its error.
    #[arg(long = "broker", value_name = "URL")]
    url: Option<SecretString>,
}

impl UrlArgument {
    pub(super) fn flag(&self) -> Option<ConfigFlag> {
        flag("broker.url", "--broker", self.url.as_ref().map(ExposeSecret::expose_secret))
    }

    /// The URL as it was given, to pass on to a child process. It may hold a password.
    pub(super) fn secret(&self) -> Option<&str> {
        self.url.as_ref().map(ExposeSecret::expose_secret)
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
    /// Loads the configuration, with these flags and the command's own `flags` above environment
    /// and file.
    pub(super) fn load(
        &self,
        flags: impl IntoIterator<Item = Option<ConfigFlag>>,
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

/// The broker to connect to, with `name` as the connection's name.
pub(super) fn broker(config: &Config, name: impl Into<String>) -> Broker {
    let address = config.broker.address.clone();
    let heartbeat = config.broker.heartbeat;
    let mut broker = Broker::new(address, name).with_tls(config.broker.tls.clone());
    broker.heartbeat = heartbeat;
    broker
}

/// The names of exchanges and queues in the configured namespace.
pub(super) fn names(config: &Config) -> Names {
    Names::new(config.broker.namespace.clone())
}

/// The exit code for a connection that failed.
pub(super) fn exit_of(error: &ConnectionError) -> Exit {
    match error.disposition() {
        Disposition::GiveUp => Exit::Refused,
        Disposition::Retry => Exit::Unavailable,
    }
}

/// The same for `dtc run`, where a broker is optional: without `--broker`, none is used.
#[derive(Debug, Args)]
pub(super) struct OptionalBroker {
    /// Run it through RabbitMQ at amqp://user:password@host:port/vhost, or amqps:// for TLS; for
    /// several hosts of a cluster, such URLs separated by commas
    #[arg(long = "broker", value_name = "URL")]
    url: Option<SecretString>,
    /// First word of the names of all exchanges and queues, which must exist [default: a new name,
    /// under which they are declared, and deleted at the end]
    #[arg(long, value_name = "NAME", requires = "url")]
    namespace: Option<Namespace>,
    #[command(flatten)]
    config: ConfigArgument,
}

impl OptionalBroker {
    /// The broker to connect to, if `--broker` was given, with `name` as the connection's name. The
    /// other settings of the connection come from the configuration.
    pub(super) fn broker(&self, name: impl Into<String>) -> Result<Option<Broker>, Failure> {
        let Some(url) = &self.url else { return Ok(None) };
        let config =
            self.config.load([flag("broker.url", "--broker", Some(url.expose_secret()))])?;
        Ok(Some(broker(&config, name)))
    }

    /// The names of exchanges and queues, if a namespace was given.
    pub(super) fn names(&self) -> Option<Names> {
        self.namespace.clone().map(Names::new)
    }
}
