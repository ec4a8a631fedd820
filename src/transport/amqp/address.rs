//! Where the brokers are, and who we are to them.

use std::{fmt, str::FromStr};

use lapin::uri::AMQPUri;

/// One or more hosts of one cluster.
///
/// As text: AMQP URLs separated by commas, `amqp://user:password@host:port/vhost`, or `amqps://` for
/// TLS. What is left out is what the AMQP URI specification of RabbitMQ says: user `guest`, port
/// 5672 (5671), virtual host `/`.
#[derive(Clone, PartialEq, Eq)]
pub struct Address {
    hosts: Vec<AMQPUri>,
}

/// A text that is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAddress {
    /// It names no host.
    #[error("no broker is named: must be one or more AMQP URLs separated by commas")]
    Empty,
    /// One part is no AMQP URL. The part itself is not repeated, as it may hold a password.
    #[error("part {number} of the broker's address is no AMQP URL: {rule}")]
    NotAnUrl {
        /// Which, from 1.
        number: usize,
        /// What is wrong with it.
        rule: String,
    },
}

impl Address {
    /// The hosts, in the order in which they were named.
    pub(crate) fn hosts(&self) -> &[AMQPUri] {
        &self.hosts
    }
}

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let hosts: Result<Vec<AMQPUri>, InvalidAddress> = parts
            .enumerate()
            .map(|(index, part)| {
                let refuse = |rule: String| InvalidAddress::NotAnUrl { number: index + 1, rule };
                if !part.starts_with("amqp://") && !part.starts_with("amqps://") {
                    return Err(refuse("must begin with amqp:// or amqps://".to_owned()));
                }
                part.parse().map_err(|_| refuse("see RabbitMQ's URI specification".to_owned()))
            })
            .collect();
        let hosts = hosts?;
        if hosts.is_empty() {
            return Err(InvalidAddress::Empty);
        }
        Ok(Self { hosts })
    }
}

/// One host, without what is nobody's business.
pub(crate) fn public(uri: &AMQPUri) -> String {
    let host = &uri.authority.host;
    let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let vhost = match uri.vhost.as_str() {
        "/" => String::new(),
        other => format!("/{other}"),
    };
    format!("{}://{host}:{}{vhost}", uri.scheme, uri.authority.port)
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.hosts.iter().map(public).collect::<Vec<_>>().join(","))
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::Address;

    #[test]
    fn the_password_is_never_shown() {
        let address: Address = "amqp://me:secret@a:1/v, amqps://me:secret@b".parse().unwrap();
        assert_eq!(
            format!("{address} {address:?}"),
            "amqp://a:1/v,amqps://b:5671 ".repeat(2).trim()
        );
    }

    #[test]
    fn a_bad_part_is_named_by_its_number_and_not_repeated() {
        let complaint = "amqp://a,http://me:secret@b".parse::<Address>().unwrap_err().to_string();
        assert_eq!(
            complaint,
            "part 2 of the broker's address is no AMQP URL: must begin with amqp:// or amqps://"
        );
        assert!("amqp://me:se cret@b:x/".parse::<Address>().unwrap_err().to_string().len() < 100);
        assert!("".parse::<Address>().is_err());
        assert!(" , ".parse::<Address>().is_err());
    }
}
