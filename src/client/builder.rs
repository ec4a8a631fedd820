//! Setting up a client.

use std::time::Duration;

use crate::{
    client::{Client, Settings},
    protocol::request_messages::REQUESTS_MAX,
    setting::{self, InvalidSetting},
    transport::amqp::{
        error::{BrokerError, Disposition},
        options::{BrokerOptions, broker_setters},
        pool::PublishError,
    },
};

/// The most that [`ClientBuilder::max_in_flight`] accepts.
const IN_FLIGHT_MAX: usize = 1_000_000;

/// Sets up a [`Client`]: see [`Client::builder`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until `connect` or `connect_lazy` is called"]
pub struct ClientBuilder {
    broker: BrokerOptions,
    settings: Settings,
}

/// A client could not connect.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// A setting is invalid.
    #[error("invalid client")]
    Invalid(#[from] InvalidSetting),
    /// The broker refuses this client, or its certificate is not trusted. Retrying doesn't help until
    /// somebody changes something.
    #[error("the broker refuses this client")]
    Refused(#[source] BrokerError),
    /// No host accepts a connection now. A later attempt may succeed.
    #[error("the broker can't be reached")]
    Unavailable(#[source] BrokerError),
}

impl ClientBuilder {
    pub(super) fn new(url: String) -> Self {
        Self { broker: BrokerOptions::new(url), settings: Settings::default() }
    }

    broker_setters!();

    /// Sets for how long [`Client::submit`] tries to publish a transaction: at least 1 ms. Default:
    /// 30 s.
    pub fn publish_timeout(mut self, timeout: Duration) -> Self {
        self.settings.publish_timeout = timeout;
        self
    }

    /// Sets how many transactions [`Client::submit_and_wait`] waits for at once: from 1 to
    /// 1,000,000. Further calls wait for their turn, within their own timeout, which bounds the memory
    /// of the client. Default: 1000.
    pub fn max_in_flight(mut self, max: usize) -> Self {
        self.settings.in_flight_max = max;
        self
    }

    /// Sets how many transactions may share a message: from 1 to 64. With 1, each has a message of its
    /// own. Default: 64.
    pub fn batch_max(mut self, max: usize) -> Self {
        self.settings.batch_max = max;
        self
    }

    /// Connects. The client reconnects by itself when the connection is lost later.
    ///
    /// It tries all hosts, each for the [`connect_timeout`](Self::connect_timeout).
    ///
    /// # Errors
    ///
    /// A setting is invalid, or no host accepts the client.
    pub async fn connect(self) -> Result<Client, ConnectError> {
        let client = self.connect_lazy()?;
        client.open().await.map_err(|error| {
            let disposition = match &error {
                PublishError::Connect(error) => error.disposition(),
                PublishError::Open(error) => error.disposition(),
                PublishError::Unconfirmed(_)
                | PublishError::Silent
                | PublishError::Refused
                | PublishError::Unroutable { .. }
                | PublishError::Blocked { .. }
                | PublishError::Closed => Disposition::Retry,
            };
            let source = BrokerError::new(error, disposition);
            match disposition {
                Disposition::GiveUp => ConnectError::Refused(source),
                Disposition::Retry => ConnectError::Unavailable(source),
            }
        })?;
        Ok(client)
    }

    /// Returns a client that connects when it is first used, for a producer that starts before its
    /// broker. A failure to connect is then an error of that first call.
    ///
    /// # Errors
    ///
    /// A setting is invalid.
    pub fn connect_lazy(self) -> Result<Client, InvalidSetting> {
        let (broker, names) = self.broker.check("dtc client".to_owned())?;
        let Settings { publish_timeout, in_flight_max, batch_max } = self.settings;
        setting::duration("publish_timeout", publish_timeout, Duration::from_millis(1))?;
        setting::count("max_in_flight", in_flight_max, IN_FLIGHT_MAX)?;
        setting::count("batch_max", batch_max, REQUESTS_MAX)?;
        Ok(Client::with(broker, names, self.settings))
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, time::Duration};

    use super::ConnectError;
    use crate::{client::Client, error::ErrorChain};

    #[tokio::test]
    async fn an_invalid_setting_is_reported_before_anything_is_connected() {
        let refused = |change: fn(super::ClientBuilder) -> super::ClientBuilder| {
            change(Client::builder("amqp://localhost")).connect_lazy().unwrap_err().to_string()
        };
        assert_eq!(
            refused(|it| it.max_in_flight(0)),
            "setting `max_in_flight`: must be from 1 to 1000000, not 0"
        );
        assert_eq!(
            refused(|it| it.batch_max(65)),
            "setting `batch_max`: must be from 1 to 64, not 65"
        );
        assert_eq!(
            refused(|it| it.publish_timeout(Duration::ZERO)),
            "setting `publish_timeout`: must be at least 1ms, not 0ns"
        );
        let error = Client::builder("localhost").connect().await.unwrap_err();
        assert!(matches!(&error, ConnectError::Invalid(it) if it.setting() == "url"), "{error:?}");
    }

    #[tokio::test]
    async fn a_broker_that_does_not_listen_is_reported_as_unavailable() {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let url = format!("amqp://shop:geheim@{address}");
        let error = Client::builder(url).connect().await.unwrap_err();
        assert!(matches!(&error, ConnectError::Unavailable(it) if it.may_pass()), "{error:?}");
        let text = ErrorChain(&error).to_string();
        let beginning = format!(
            "the broker can't be reached: no connection to publish on: failed to connect to the \
             broker at amqp://{address}"
        );
        assert!(text.starts_with(&beginning), "{text}");
        assert!(!format!("{text} {error:?}").contains("geheim"));
    }
}
