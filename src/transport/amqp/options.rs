//! Where a program says that the broker is, and how to talk to it: before it is checked.

use std::{fmt, time::Duration};

use crate::{
    setting::{self, InvalidSetting},
    transport::amqp::{
        address::Address,
        connection::Broker,
        names::{Names, Namespace},
        tls::Tls,
    },
};

/// AMQP has 16 bits for a heartbeat, in seconds.
const HEARTBEAT_MAX: Duration = Duration::from_secs(u16::MAX as u64);

/// What the builders of a client, a worker and a service have in common: [`broker_setters`] are its
/// methods.
#[derive(Clone)]
pub(crate) struct BrokerOptions {
    url: String,
    pub(crate) namespace: Option<String>,
    pub(crate) connection_name: Option<String>,
    pub(crate) heartbeat: Duration,
    pub(crate) connect_timeout: Duration,
    pub(crate) tls: Option<Tls>,
}

/// A URL may hold a password.
impl fmt::Debug for BrokerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BrokerOptions")
            .field("namespace", &self.namespace)
            .field("connection_name", &self.connection_name)
            .finish_non_exhaustive()
    }
}

impl BrokerOptions {
    pub(crate) fn new(url: String) -> Self {
        Self {
            url,
            namespace: None,
            connection_name: None,
            heartbeat: Broker::HEARTBEAT,
            connect_timeout: Broker::CONNECT_TIMEOUT,
            tls: None,
        }
    }

    /// The broker, and the names of its exchanges and queues. `name` is the connections' name
    /// unless another one is set.
    pub(crate) fn check(&self, name: String) -> Result<(Broker, Names), InvalidSetting> {
        let address: Address =
            self.url.parse().map_err(|error| InvalidSetting::new("url", format!("{error}")))?;
        let namespace = self.namespace.as_deref().map(Namespace::parse);
        let namespace =
            setting::name("namespace", namespace.unwrap_or_else(|| Ok(Namespace::default())))?;
        let heartbeat = setting::duration("heartbeat", self.heartbeat, Duration::from_secs(1))?;
        if heartbeat > HEARTBEAT_MAX || heartbeat.subsec_nanos() != 0 {
            let rule = format!("must be in whole seconds, and at most {HEARTBEAT_MAX:?}");
            return Err(InvalidSetting::new("heartbeat", rule));
        }
        let least = Duration::from_millis(1);
        let connect_timeout = setting::duration("connect_timeout", self.connect_timeout, least)?;
        let tls = self.tls(&address)?;
        let mut broker = Broker::new(address, self.connection_name.clone().unwrap_or(name));
        (broker.heartbeat, broker.connect_timeout, broker.tls) = (heartbeat, connect_timeout, tls);
        Ok((broker, Names::new(namespace)))
    }

    fn tls(&self, address: &Address) -> Result<Tls, InvalidSetting> {
        if self.tls.is_some() && !address.is_secure() {
            let rule = "is for amqps:// only, and no URL of the broker begins so";
            return Err(InvalidSetting::new("tls", rule));
        }
        let tls = self.tls.clone().unwrap_or_default();
        if let Some(name) = tls.server_name.as_deref().filter(|name| !Tls::is_host(name)) {
            let rule =
                format!("the server name {name:?} must be the name or the address of a host");
            return Err(InvalidSetting::new("tls", rule));
        }
        if address.is_external() && tls.identity.is_none() {
            let rule = "`auth_mechanism=external` requires a client certificate, and none is set";
            return Err(InvalidSetting::new("url", rule));
        }
        Ok(tls)
    }
}

/// The methods of a builder that has `broker: BrokerOptions`.
macro_rules! broker_setters {
    () => {
        /// Sets the namespace, with which the names of all exchanges and queues begin
        /// (`[A-Za-z0-9._-]{1,64}`). All processes of one system use the namespace that `dtc
        /// topology apply` was given. Default: `dtc`.
        pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
            self.broker.namespace = Some(namespace.into());
            self
        }

        /// Sets the name under which the broker lists the connections of this process. Default:
        /// what the process is, such as `dtc worker w1`.
        pub fn connection_name(mut self, name: impl Into<String>) -> Self {
            self.broker.connection_name = Some(name.into());
            self
        }

        /// Sets the interval of heartbeats in both directions: from 1 s to 65,535 s, in whole
        /// seconds. A broker that is silent for two intervals is given up. Default: 10 s.
        pub fn heartbeat(mut self, heartbeat: std::time::Duration) -> Self {
            self.broker.heartbeat = heartbeat;
            self
        }

        /// Sets how long one host may take to accept a connection: at least 1 ms. Default: 10 s.
        pub fn connect_timeout(mut self, timeout: std::time::Duration) -> Self {
            self.broker.connect_timeout = timeout;
            self
        }

        /// Sets which CAs to trust and which certificate to present, for URLs that begin with
        /// `amqps://`; it is an error if no URL does. Default: the CAs of the system, and no
        /// certificate.
        pub fn tls(mut self, tls: crate::Tls) -> Self {
            self.broker.tls = Some(tls);
            self
        }
    };
}

pub(crate) use broker_setters;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::BrokerOptions;
    use crate::transport::amqp::tls::{Pem, Tls};

    fn refused(url: &str, change: impl FnOnce(&mut BrokerOptions)) -> String {
        let mut options = BrokerOptions::new(url.to_owned());
        change(&mut options);
        options.check("test".to_owned()).unwrap_err().to_string()
    }

    #[test]
    fn what_is_not_set_is_as_the_documentation_says() {
        let options = BrokerOptions::new("amqp://localhost".to_owned());
        let (broker, names) = options.check("test".to_owned()).unwrap();
        assert_eq!((broker.name.as_str(), names.namespace().to_string().as_str()), ("test", "dtc"));
        assert_eq!([broker.heartbeat, broker.connect_timeout], [Duration::from_secs(10); 2]);
    }

    #[test]
    fn the_setting_that_can_not_be_used_is_named_with_its_rule() {
        let url = "amqp://localhost";
        assert_eq!(
            refused(url, |it| it.namespace = Some("a b".to_owned())),
            "setting `namespace`: \"a b\" must match [A-Za-z0-9._-]{1,64}"
        );
        assert_eq!(
            refused(url, |it| it.heartbeat = Duration::from_millis(100)),
            "setting `heartbeat`: must be at least 1s, not 100ms"
        );
        for wrong in [1500, 70_000_000] {
            assert_eq!(
                refused(url, |it| it.heartbeat = Duration::from_millis(wrong)),
                "setting `heartbeat`: must be in whole seconds, and at most 65535s"
            );
        }
        assert_eq!(
            refused(url, |it| it.connect_timeout = Duration::MAX),
            "setting `connect_timeout`: must be at most 36500 days"
        );
        assert_eq!(
            refused(url, |it| it.tls = Some(Tls::new().ca(Pem::File("ca.pem".into())))),
            "setting `tls`: is for amqps:// only, and no URL of the broker begins so"
        );
        assert_eq!(
            refused("amqps://localhost", |it| it.tls = Some(Tls::new().server_name("a b"))),
            "setting `tls`: the server name \"a b\" must be the name or the address of a host"
        );
        assert_eq!(
            refused("amqps://localhost?auth_mechanism=external", |_| ()),
            "setting `url`: `auth_mechanism=external` requires a client certificate, and none is set"
        );
    }

    #[test]
    fn a_password_in_a_url_is_not_repeated() {
        let url = "amqp://shop:geheim@local host";
        let text = refused(url, |_| ());
        assert!(text.starts_with("setting `url`: ") && !text.contains("geheim"), "{text}");
        let options = BrokerOptions::new(url.to_owned());
        assert!(!format!("{options:?}").contains("geheim"));
    }
}
