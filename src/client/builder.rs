//! How a producer's end is set up.

use std::time::Duration;

use crate::{
    client::{Client, Settings},
    setting::{self, InvalidSetting},
    transport::amqp::{
        error::{BrokerError, Disposition},
        options::{BrokerOptions, broker_setters},
        pool::PublishError,
    },
};

/// No client waits for more transactions at once.
const IN_FLIGHT_MAX: usize = 1_000_000;

/// Sets up a [`Client`]: see [`Client::builder`].
#[derive(Clone, Debug)]
#[must_use = "a builder does nothing until it is told to connect"]
pub struct ClientBuilder {
    broker: BrokerOptions,
    settings: Settings,
}

/// A client could not connect.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// A value that was set can't be used.
    #[error("invalid client")]
    Invalid(#[from] InvalidSetting),
    /// The broker refuses this client, or can't be trusted: that stays so until somebody changes
    /// something.
    #[error("the broker refuses this client")]
    Refused(#[source] BrokerError),
    /// No host lets the client in now. It may be otherwise later.
    #[error("the broker can't be reached")]
    Unavailable(#[source] BrokerError),
}

impl ClientBuilder {
    pub(super) fn new(url: String) -> Self {
        Self { broker: BrokerOptions::new(url), settings: Settings::default() }
    }

    broker_setters!();

    /// Sets how long [`Client::submit`] tries to hand a transaction to the broker: at least 1 ms.
    /// Default: 30 s.
    pub fn publish_timeout(mut self, timeout: Duration) -> Self {
        self.settings.publish_timeout = timeout;
        self
    }

    /// Sets how many transactions [`Client::submit_and_wait`] waits for at once: from 1 to
    /// 1,000,000. Further calls wait for their turn, within their own timeout, so the memory of the
    /// client is bounded. Default: 1000.
    pub fn max_in_flight(mut self, max: usize) -> Self {
        self.settings.in_flight_max = max;
        self
    }

    /// Connects. Later, when the connection is lost, the client connects again by itself.
    ///
    /// All hosts are tried, each for the [`connect_timeout`](Self::connect_timeout).
    ///
    /// # Errors
    ///
    /// What was set can't be used, or no host lets the client in.
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

    /// A client that connects when it is first used, for a producer that starts before its broker.
    /// What hinders it then is an error of what it is used for.
    ///
    /// # Errors
    ///
    /// What was set can't be used.
    pub fn connect_lazy(self) -> Result<Client, InvalidSetting> {
        let (broker, names) = self.broker.check("dtc client".to_owned())?;
        let Settings { publish_timeout, in_flight_max } = self.settings;
        setting::duration("publish_timeout", publish_timeout, Duration::from_millis(1))?;
        setting::count("max_in_flight", in_flight_max, IN_FLIGHT_MAX)?;
        Ok(Client::with(broker, names, self.settings))
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, time::Duration};

    use super::ConnectError;
    use crate::{client::Client, error::ErrorChain};

    #[tokio::test]
    async fn what_can_not_be_used_is_told_before_anything_is_connected() {
        let refused = |change: fn(super::ClientBuilder) -> super::ClientBuilder| {
            change(Client::builder("amqp://localhost")).connect_lazy().unwrap_err().to_string()
        };
        assert_eq!(
            refused(|it| it.max_in_flight(0)),
            "setting `max_in_flight`: must be from 1 to 1000000, not 0"
        );
        assert_eq!(
            refused(|it| it.publish_timeout(Duration::ZERO)),
            "setting `publish_timeout`: must be at least 1ms, not 0ns"
        );
        let error = Client::builder("localhost").connect().await.unwrap_err();
        assert!(matches!(&error, ConnectError::Invalid(it) if it.setting() == "url"), "{error:?}");
    }

    #[tokio::test]
    async fn a_broker_that_is_not_there_is_an_error_that_says_so() {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let url = format!("amqp://shop:geheim@{address}");
        let error = Client::builder(url).connect().await.unwrap_err();
        assert!(matches!(&error, ConnectError::Unavailable(it) if it.may_pass()), "{error:?}");
        let told = ErrorChain(&error).to_string();
        let beginning = format!(
            "the broker can't be reached: no connection to publish on: failed to connect to the \
             broker at amqp://{address}"
        );
        assert!(told.starts_with(&beginning), "{told}");
        assert!(!format!("{told} {error:?}").contains("geheim"));
    }
}
