//! The brokers' addresses, and how a process authenticates to them.

use std::{fmt, net::Ipv6Addr, str::FromStr};

use lapin::uri::{AMQPScheme, AMQPUri, SASLMechanism};

/// The parameters of a URL that have an effect here.
const PARAMETERS: [&str; 3] = ["auth_mechanism", "channel_max", "frame_max"];

/// One or more hosts of one cluster.
///
/// As text: AMQP URLs separated by commas, `amqp://user:password@host:port/vhost`, or `amqps://`
/// for TLS. The defaults are those of RabbitMQ's AMQP URI specification: user `guest`, port 5672
/// (5671), virtual host `/`. Of a URL's parameters, `auth_mechanism`, `channel_max` and `frame_max`
/// have an effect; others are refused. With `?auth_mechanism=external` the client certificate names
/// the user, and there is no password.
#[derive(Clone, PartialEq, Eq)]
pub struct Address {
    hosts: Vec<AMQPUri>,
    /// For each host, whether its URL has a password.
    has_password: Vec<bool>,
}

/// A text is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAddress {
    /// It names no host.
    #[error("no broker is named: must be one or more AMQP URLs separated by commas")]
    Empty,
    /// One part is not an AMQP URL. The part itself is not repeated, as it may hold a password.
    #[error("part {number} of the broker's address is not an AMQP URL: {rule}")]
    NotAnUrl {
        /// The number of the part, from 1.
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

    /// Name and port of the first host.
    pub fn first_host(&self) -> Option<(String, u16)> {
        let authority = &self.hosts.first()?.authority;
        Some((authority.host.clone(), authority.port))
    }

    /// The same address with `password` for every host whose URL has none.
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

    /// Whether any host is connected to over TLS.
    pub fn is_secure(&self) -> bool {
        self.hosts.iter().any(|uri| uri.scheme == AMQPScheme::AMQPS)
    }

    /// Whether the client authenticates to any host by its certificate.
    pub fn is_external(&self) -> bool {
        self.hosts.iter().any(is_external)
    }

    /// The address as it was given, with the passwords masked.
    pub fn masked(&self) -> String {
        let masked = |uri: &AMQPUri| {
            if is_external(uri) {
                return format!("{}?auth_mechanism=external", public(uri));
            }
            let (scheme, rest) = (uri.scheme.to_string(), public(uri));
            let rest = rest.strip_prefix(&format!("{scheme}://")).unwrap_or_default();
            format!("{scheme}://{}:***@{rest}", UrlEncoded(&uri.authority.userinfo.username))
        };
        self.hosts.iter().map(masked).collect::<Vec<_>>().join(",")
    }
}

/// Whether the client authenticates to it by its certificate.
pub(crate) fn is_external(uri: &AMQPUri) -> bool {
    uri.query.auth_mechanism == Some(SASLMechanism::External)
}

/// The part between the `//` and the path.
fn authority(url: &str) -> &str {
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest);
    authority.split(['/', '?', '#']).next().unwrap_or_default()
}

/// Whether there is an `@` after the end of the host. The text before it may be the rest of a
/// password, which would be taken for a virtual host, and shown.
fn has_late_at(url: &str) -> bool {
    let after = url.split_once("://").map_or(url, |(_, rest)| rest);
    after.split_once(['/', '?', '#']).is_some_and(|(_, late)| late.contains('@'))
}

/// Whether the part of the URL before the host contains a `:` and a password.
fn has_password(url: &str) -> bool {
    authority(url).rsplit_once('@').is_some_and(|(user, _)| user.contains(':'))
}

/// The address in brackets, if the host is an IPv6 address. lapin drops such a host, and then
/// connects to this machine.
fn ipv6(url: &str) -> Option<&str> {
    let authority = authority(url);
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    host.strip_prefix('[')?.split_once(']').map(|(address, _)| address)
}

/// The error for a parameter that would have no effect, such as those by which other clients' URLs
/// set TLS.
fn idle_parameter(url: &str) -> Option<String> {
    let (_, query) = url.split_once('?')?;
    let query = query.split('#').next().unwrap_or_default();
    let mut names = query.split('&').map(|pair| pair.split('=').next().unwrap_or_default());
    let idle = names.find(|name| !name.is_empty() && !PARAMETERS.contains(name))?;
    Some(match idle {
        "heartbeat" => "`heartbeat` is not set in a URL, but as `broker.heartbeat`".to_owned(),
        "connection_timeout" => {
            "`connection_timeout` is not set: each host has 10 s to let a process in".to_owned()
        }
        "cacertfile"
        | "certfile"
        | "keyfile"
        | "password"
        | "verify"
        | "fail_if_no_peer_cert"
        | "server_name_indication"
        | "depth" => {
            format!("`{idle}` is not set in a URL, but under `broker.tls`")
        }
        // It may be the rest of a password.
        _ => format!("it has a parameter other than {}", PARAMETERS.join(", ")),
    })
}

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let has_password = parts.clone().map(has_password).collect();
        // The part after a `,` that doesn't separate URLs explains the error better than the part
        // before it.
        let is_url = |part: &str| part.starts_with("amqp://") || part.starts_with("amqps://");
        let (urls, others) = parts.enumerate().partition::<Vec<_>, _>(|(_, part)| is_url(part));
        let hosts: Result<Vec<AMQPUri>, InvalidAddress> = others
            .into_iter()
            .chain(urls)
            .map(|(index, part)| {
                let refuse = |rule: String| InvalidAddress::NotAnUrl { number: index + 1, rule };
                if !is_url(part) {
                    let rule = match index {
                        0 => "must begin with amqp:// or amqps://",
                        _ => {
                            "must begin with amqp:// or amqps:// (a `,` that ends no URL must be \
                             written as %2C)"
                        }
                    };
                    return Err(refuse(rule.to_owned()));
                }
                if has_late_at(part) {
                    let rule = "a `/` before its `@` must be written as %2F (and `?` as %3F, `#` \
                                as %23), an `@` after the host as %40";
                    return Err(refuse(rule.to_owned()));
                }
                if let Some(rule) = idle_parameter(part) {
                    return Err(refuse(rule));
                }
                let parsed = part.parse::<AMQPUri>();
                let mut uri =
                    parsed.map_err(|_| refuse("see RabbitMQ's URI specification".to_owned()))?;
                if uri.vhost.is_empty() {
                    let rule = "a `/` at its end names a virtual host without a name: leave it off \
                                for the virtual host `/`";
                    return Err(refuse(rule.to_owned()));
                }
                if let Some(address) = ipv6(part) {
                    address.clone_into(&mut uri.authority.host);
                }
                if is_external(&uri) && uri.scheme != AMQPScheme::AMQPS {
                    return Err(refuse("`auth_mechanism=external` requires amqps://".to_owned()));
                }
                Ok(uri)
            })
            .collect();
        let hosts = hosts?;
        if hosts.is_empty() {
            return Err(InvalidAddress::Empty);
        }
        Ok(Self { hosts, has_password })
    }
}

/// One host, without user and password.
pub(crate) fn public(uri: &AMQPUri) -> String {
    let host = &uri.authority.host;
    let is_ipv6 = host.parse::<Ipv6Addr>().is_ok();
    let host = if is_ipv6 { format!("[{host}]") } else { UrlEncoded(host).to_string() };
    let vhost = match uri.vhost.as_str() {
        "/" => String::new(),
        other => format!("/{}", UrlEncoded(other)),
    };
    format!("{}://{host}:{}{vhost}", uri.scheme, uri.authority.port)
}

/// A decoded part of a URL, encoded again so that it neither ends that part nor disturbs a
/// terminal.
struct UrlEncoded<'a>(&'a str);

impl fmt::Display for UrlEncoded<'_> {
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
    fn an_ipv6_address_is_used_and_not_replaced_by_this_machine() {
        let address: Address = "amqp://me:p[x]@[fd00::1]:1/v,amqps://[::1]".parse().unwrap();
        let hosts = address.hosts().iter().map(|host| host.authority.host.as_str());
        assert_eq!(hosts.collect::<Vec<_>>(), ["fd00::1", "::1"]);
        assert_eq!(address.to_string(), "amqp://[fd00::1]:1/v,amqps://[::1]:5671");
    }

    /// `Cargo.lock` leaves out the tables for international domain names.
    #[test]
    fn a_host_beyond_ascii_needs_no_tables() {
        let address: Address = "amqp://br\u{f6}ker.example:1/v".parse().unwrap();
        assert_eq!(address.hosts()[0].authority.host, "br\u{f6}ker.example");
    }

    #[test]
    fn external_authentication_has_no_password() {
        let address: Address = "amqps://a/v?auth_mechanism=EXTERNAL".parse().unwrap();
        assert!(address.is_external() && address.is_secure());
        assert_eq!(address.masked(), "amqps://a:5671/v?auth_mechanism=external");
        let address: Address = "amqp://a,amqps://b?frame_max=8192".parse().unwrap();
        assert!(address.is_secure() && !address.is_external());
        let complaint = "amqp://a?auth_mechanism=external".parse::<Address>().unwrap_err();
        assert!(complaint.to_string().ends_with("requires amqps://"), "{complaint}");
    }

    #[test]
    fn a_parameter_that_would_have_no_effect_is_refused() {
        for (query, rule) in [
            ("frame_max=8192&cacertfile=/ca.pem", "not set in a URL, but under `broker.tls`"),
            ("heartbeat=0", "`heartbeat` is not set in a URL, but as `broker.heartbeat`"),
            ("connection_timeout=1", "each host has 10 s to let a process in"),
            ("secret=1", "a parameter other than auth_mechanism, channel_max, frame_max"),
        ] {
            let complaint = format!("amqps://a?{query}").parse::<Address>().unwrap_err();
            assert!(complaint.to_string().ends_with(rule), "{query}: {complaint}");
            assert!(!complaint.to_string().contains("secret"), "{complaint}");
        }
    }

    #[test]
    fn a_virtual_host_without_a_name_is_refused_with_the_way_to_the_usual_one() {
        for url in ["amqp://a/", "amqp://me:secret@a:1/?frame_max=8192"] {
            let complaint = url.parse::<Address>().unwrap_err().to_string();
            assert!(complaint.ends_with("leave it off for the virtual host `/`"), "{complaint}");
        }
        for url in ["amqp://a", "amqp://a/%2f"] {
            assert_eq!(url.parse::<Address>().unwrap().hosts()[0].vhost, "/");
        }
    }

    #[test]
    fn a_comma_in_a_password_is_pointed_out() {
        for url in ["amqp://me:se,cret@a", "amqp://me:1,cret@a/v"] {
            let complaint = url.parse::<Address>().unwrap_err().to_string();
            assert!(complaint.contains("must be written as %2C"), "{complaint}");
            assert!(!complaint.contains("cret"), "{complaint}");
        }
        let address: Address = "amqp://me:se%2Ccret@a".parse().unwrap();
        assert_eq!(address.hosts()[0].authority.userinfo.password, "se,cret");
    }

    #[test]
    fn the_rest_of_a_password_is_not_taken_for_a_virtual_host() {
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
    fn a_shown_address_can_be_parsed_again() {
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
            "part 2 of the broker's address is not an AMQP URL: must begin with amqp:// or amqps:// (a \
             `,` that ends no URL must be written as %2C)"
        );
        assert!("amqp://me:se cret@b:x/".parse::<Address>().unwrap_err().to_string().len() < 100);
        assert!("".parse::<Address>().is_err());
        assert!(" , ".parse::<Address>().is_err());
    }
}
