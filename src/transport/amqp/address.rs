//! Where the brokers are, and who we are to them.

use std::{fmt, net::Ipv6Addr, str::FromStr};

use lapin::uri::AMQPUri;

/// One or more hosts of one cluster.
///
/// As text: AMQP URLs separated by commas, `amqp://user:password@host:port/vhost`, or `amqps://` for
/// TLS. What is left out is what the AMQP URI specification of RabbitMQ says: user `guest`, port
/// 5672 (5671), virtual host `/`.
#[derive(Clone, PartialEq, Eq)]
pub struct Address {
    hosts: Vec<AMQPUri>,
    /// For each host, whether its URL has a password.
    has_password: Vec<bool>,
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

    /// The same with `password` for every host whose URL has none.
    #[must_use]
    pub fn with_password(mut self, password: &str) -> Self {
        for (host, has_password) in self.hosts.iter_mut().zip(&mut self.has_password) {
            if !*has_password {
                password.clone_into(&mut host.authority.userinfo.password);
                *has_password = true;
            }
        }
        self
    }

    /// As it was said, but for the passwords.
    pub fn masked(&self) -> String {
        let masked = |uri: &AMQPUri| {
            let (scheme, rest) = (uri.scheme.to_string(), public(uri));
            let rest = rest.strip_prefix(&format!("{scheme}://")).unwrap_or_default();
            format!("{scheme}://{}:***@{rest}", Encoded(&uri.authority.userinfo.username))
        };
        self.hosts.iter().map(masked).collect::<Vec<_>>().join(",")
    }
}

/// The host, if it is in brackets.
fn ipv6_of(url: &str) -> Option<Ipv6Addr> {
    let (_, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    host.strip_prefix('[')?.split_once(']')?.0.parse().ok()
}

/// Whether there is an `@` where the host has ended. What stands before it may be the rest of a
/// password, which would be taken for a virtual host, and shown.
fn has_late_at(url: &str) -> bool {
    let after = url.split_once("://").map_or(url, |(_, rest)| rest);
    after.split_once(['/', '?', '#']).is_some_and(|(_, late)| late.contains('@'))
}

/// Whether the part of the URL before the host goes on after a `:`.
fn has_password(url: &str) -> bool {
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = authority.split(['/', '?', '#']).next().unwrap_or_default();
    authority.rsplit_once('@').is_some_and(|(user, _)| user.contains(':'))
}

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let has_password = parts.clone().map(has_password).collect();
        let hosts: Result<Vec<AMQPUri>, InvalidAddress> = parts
            .enumerate()
            .map(|(index, part)| {
                let refuse = |rule: String| InvalidAddress::NotAnUrl { number: index + 1, rule };
                if !part.starts_with("amqp://") && !part.starts_with("amqps://") {
                    return Err(refuse("must begin with amqp:// or amqps://".to_owned()));
                }
                if has_late_at(part) {
                    let rule = "a `/` before its `@` must be written as %2F (and `?` as %3F, `#` \
                                as %23), an `@` after the host as %40";
                    return Err(refuse(rule.to_owned()));
                }
                let mut host: AMQPUri = part
                    .parse()
                    .map_err(|_| refuse("see RabbitMQ's URI specification".to_owned()))?;
                // The parser takes what has no domain for `localhost`.
                if let Some(address) = ipv6_of(part) {
                    host.authority.host = address.to_string();
                }
                Ok(host)
            })
            .collect();
        let hosts = hosts?;
        if hosts.is_empty() {
            return Err(InvalidAddress::Empty);
        }
        Ok(Self { hosts, has_password })
    }
}

/// One host, without what is nobody's business.
pub(crate) fn public(uri: &AMQPUri) -> String {
    let host = &uri.authority.host;
    let is_ipv6 = host.parse::<Ipv6Addr>().is_ok();
    let host = if is_ipv6 { format!("[{host}]") } else { Encoded(host).to_string() };
    let vhost = match uri.vhost.as_str() {
        "/" => String::new(),
        other => format!("/{}", Encoded(other)),
    };
    format!("{}://{host}:{}{vhost}", uri.scheme, uri.authority.port)
}

/// A part of a URL that was decoded, as it can stand in one: nothing in it ends that part, or
/// disturbs a terminal.
struct Encoded<'a>(&'a str);

impl fmt::Display for Encoded<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            if character.is_alphanumeric() || "-._~!$&'()*+;=".contains(character) {
                write!(f, "{character}")?;
            } else {
                let mut bytes = [0; 4];
                for byte in character.encode_utf8(&mut bytes).bytes() {
                    write!(f, "%{byte:02X}")?;
                }
            }
        }
        Ok(())
    }
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
    fn a_password_goes_where_the_url_has_none() {
        let address: Address = "amqp://me@a,amqp://you:own@b:1/v,amqp://c".parse().unwrap();
        let address = address.with_password("s:e/c@ret");
        let passwords: Vec<_> =
            address.hosts().iter().map(|host| host.authority.userinfo.password.as_str()).collect();
        assert_eq!(passwords, ["s:e/c@ret", "own", "s:e/c@ret"]);
        assert_eq!(
            address.masked(),
            "amqp://me:***@a:5672,amqp://you:***@b:1/v,amqp://guest:***@c:5672"
        );
    }

    #[test]
    fn an_address_in_brackets_is_the_host() {
        for url in ["amqp://[::1]:1/v", "amqps://[fd00::2]:5671"] {
            let address: Address = url.parse().unwrap();
            assert_eq!(address.to_string(), url);
            assert!(address.hosts()[0].authority.host.contains("::"));
        }
        assert!("amqp://[::1".parse::<Address>().is_err());
    }

    #[test]
    fn a_password_that_ends_the_host_is_no_virtual_host() {
        for url in ["amqp://me:1/secret@h", "amqp://me:1?secret@h/v", "amqp://me:1#secret@h"] {
            let complaint = url.parse::<Address>().unwrap_err().to_string();
            assert!(complaint.contains("must be written as %2F"), "{complaint}");
            assert!(!complaint.contains("secret"), "{complaint}");
        }
        let address: Address = "amqp://me:1%2Fsecret@h/a%40b".parse().unwrap();
        assert_eq!(address.hosts()[0].authority.userinfo.password, "1/secret");
        assert_eq!(address.to_string(), "amqp://h:5672/a%40b");
    }

    #[test]
    fn what_is_shown_is_an_address_again_whatever_its_parts_are() {
        let text = "amqp://m%0a%1be%40%3a%2f%2c%25:x@a%0a/v%0d%2fw%20%23,amqp://%C3%BC@[::1]/%2f";
        let address: Address = text.parse().unwrap();
        let shown =
            "amqp://m%0A%1Be%40%3A%2F%2C%25:***@a%0A:5672/v%0D%2Fw%20%23,amqp://ü:***@[::1]:5672";
        assert_eq!(address.masked(), shown);
        assert_eq!(shown.parse::<Address>().unwrap().masked(), shown);
        assert_eq!(address.to_string(), "amqp://a%0A:5672/v%0D%2Fw%20%23,amqp://[::1]:5672");
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
