//! Verifying a broker's certificate, and presenting a client certificate.
//!
//! A [`Tls`] is for hosts whose URL begins with `amqps://`. Its files are read whenever a
//! connection is opened, so renewed certificates are used without a restart.
//!
//! The broker's certificate is always verified: without a CA of your own, name the certificate
//! itself as the CA.
//!
//! `rustls` verifies. What is written here reads the files and says which of them is wrong, and how,
//! before a connection is opened.
//!
//! **Invariant:** no error, and no output, contains a private key.

use std::{
    fmt, fs, io,
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustls::{
    AlertDescription, CertificateError, Error as Rustls, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    sign::CertifiedKey,
};
use rustls_connector::{RustlsConnector, RustlsConnectorConfig};

use crate::transport::amqp::error::Disposition;

/// The size limit of a chain, a key or a set of CAs: a larger file was named by mistake.
const BYTES_MAX: u64 = 4 * 1024 * 1024;

/// The CAs to trust and the client certificate to present, for brokers whose URL begins with
/// `amqps://`. By default, the system's CAs are trusted, and no certificate is presented.
///
/// Files are read whenever a connection is made: renewed files are used without a restart, and an
/// error in them is an error of the connection. The broker's certificate is always verified.
///
/// ```
/// use dtc::{Pem, Tls};
///
/// let tls = Tls::new()
///     .ca(Pem::File("ca.pem".into()))
///     .client_certificate(Pem::File("shop.pem".into()), Pem::File("shop-key.pem".into()));
/// ```
#[derive(Clone, Debug, Default)]
pub struct Tls {
    pub(crate) ca: Option<Pem>,
    pub(crate) identity: Option<Identity>,
    pub(crate) server_name: Option<String>,
}

impl Tls {
    /// Trusts the system's CAs, and presents no certificate.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the CAs that may have signed the broker's certificate; no others are trusted then.
    /// Default: those of the system.
    #[must_use]
    pub fn ca(mut self, ca: Pem) -> Self {
        self.ca = Some(ca);
        self
    }

    /// Sets the certificate to present to a broker that asks for one, followed by its intermediate
    /// CAs, and its private key without a passphrase. Default: none.
    #[must_use]
    pub fn client_certificate(mut self, certificate: Pem, key: Pem) -> Self {
        self.identity = Some(Identity { certificate, key });
        self
    }

    /// Sets the name that the broker's certificate must be for. Default: the host in the URL.
    #[must_use]
    pub fn server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }
}

/// A client certificate and its key.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) certificate: Pem,
    pub(crate) key: Pem,
}

/// Certificates or a private key, in PEM. `Debug` doesn't show the text, which may be a key.
#[derive(Clone)]
#[non_exhaustive]
pub enum Pem {
    /// The content of this file at the time when a connection is made.
    File(PathBuf),
    /// This text.
    Text(String),
}

/// It may be a private key.
impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Text(_) => f.write_str("Text(not shown)"),
        }
    }
}

/// PEM data can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{rule}", place(file.as_deref()))]
pub struct InvalidPem {
    /// The file, if it is one.
    pub file: Option<PathBuf>,
    /// The rule that it breaks: lower case, without a full stop.
    pub rule: String,
}

fn place(file: Option<&Path>) -> String {
    file.map(|path| format!("`{}` ", path.display())).unwrap_or_default()
}

/// A client certificate can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidIdentity {
    /// The certificate can't be read.
    #[error("unusable client certificate")]
    Certificate(#[source] InvalidPem),
    /// The key can't be read, or belongs to another certificate.
    #[error("unusable key of the client certificate")]
    Key(#[source] InvalidPem),
}

/// A connection over TLS failed: one side does not trust the other, or the handshake failed.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The CAs can't be read.
    #[error("unusable CA certificates")]
    Ca(#[source] InvalidPem),
    /// The client certificate can't be read.
    #[error(transparent)]
    Identity(#[from] InvalidIdentity),
    /// No CAs were configured, and the system has none.
    #[error("this system trusts no CA, and none is named: {0}")]
    NoSystemCa(String),
    /// The host's name is not valid.
    #[error("`{0}` is no host's name")]
    ServerName(String),
    /// No trusted CA has signed the broker's certificate.
    #[error("its certificate is signed by no CA that is trusted here")]
    UnknownCa,
    /// The broker's certificate is for another name.
    #[error("its certificate is not for `{wanted}`{}", but_for_names(names))]
    OtherName {
        /// The expected name.
        wanted: String,
        /// The names in the certificate.
        names: Vec<String>,
    },
    /// The broker's certificate has expired.
    #[error("its certificate has expired{}", ago(*since))]
    Expired {
        /// How long ago, if that is known.
        since: Option<Duration>,
    },
    /// The broker's certificate is not yet valid.
    #[error("its certificate is not valid yet: is a clock wrong?")]
    NotYetValid,
    /// The broker's certificate is invalid for another reason.
    #[error("its certificate is not accepted: {0}")]
    Unacceptable(String),
    /// The broker requires a client certificate.
    #[error("it requires a client certificate, and none is set")]
    CertificateRequired,
    /// The broker does not accept the client certificate.
    #[error("it does not accept our certificate: {0}")]
    CertificateRefused(String),
    /// The broker refused the handshake for another reason.
    #[error("it ends the handshake: {0}")]
    Refused(String),
    /// The broker failed during the handshake, or aborted it.
    #[error("it gives up the handshake: {0}")]
    GivenUp(String),
    /// The broker closed the connection when it should have authenticated the user by the client
    /// certificate.
    #[error("it does not accept a certificate as a login; does it offer the mechanism EXTERNAL?")]
    NoUser,
    /// The peer doesn't speak TLS, or not a version that is supported.
    #[error("what answers there does not speak TLS as it should: {0}")]
    NotTls(String),
}

fn but_for_names(names: &[String]) -> String {
    let quoted: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
    if quoted.is_empty() { String::new() } else { format!(", but for {}", quoted.join(", ")) }
}

fn ago(since: Option<Duration>) -> String {
    let Some(since) = since else { return String::new() };
    match since.as_secs() {
        seconds @ 0..=119 => format!(" {seconds} s ago"),
        seconds @ 120..=7199 => format!(" {} min ago", seconds / 60),
        seconds @ 7200..=172_799 => format!(" {} h ago", seconds / 3600),
        seconds => format!(" {} days ago", seconds / 86_400),
    }
}

impl TlsError {
    /// Whether to try again. Most of these failures last until an operator changes something.
    pub fn disposition(&self) -> Disposition {
        match self {
            // Time passes; and the peer may be a proxy, or be starting or stopping.
            Self::NotYetValid | Self::NoUser | Self::NotTls(_) | Self::GivenUp(_) => {
                Disposition::Retry
            }
            Self::Ca(_)
            | Self::Identity(_)
            | Self::NoSystemCa(_)
            | Self::ServerName(_)
            | Self::UnknownCa
            | Self::OtherName { .. }
            | Self::Expired { .. }
            | Self::Unacceptable(_)
            | Self::CertificateRequired
            | Self::CertificateRefused(_)
            | Self::Refused(_) => Disposition::GiveUp,
        }
    }

    /// The meaning of `error` during a handshake, or just after it, if it is about TLS.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "rustls may know more, and it is all one here"
    )]
    pub(crate) fn of(error: &io::Error, tls: &Tls) -> Option<Self> {
        let error = error.get_ref()?.downcast_ref::<Rustls>()?;
        Some(match error {
            Rustls::InvalidCertificate(error) => Self::of_certificate(error),
            Rustls::NoCertificatesPresented => Self::Unacceptable("there is none".to_owned()),
            Rustls::AlertReceived(alert) => Self::of_alert(*alert, tls.identity.is_some()),
            other => Self::NotTls(other.to_string()),
        })
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "rustls may know more, and it is all one here"
    )]
    fn of_certificate(error: &CertificateError) -> Self {
        match error {
            CertificateError::UnknownIssuer => Self::UnknownCa,
            CertificateError::NotValidForName => {
                Self::OtherName { wanted: "this host".to_owned(), names: Vec::new() }
            }
            CertificateError::NotValidForNameContext { expected, presented } => Self::OtherName {
                wanted: expected.to_str().into_owned(),
                names: presented.iter().map(|name| readable(name)).collect(),
            },
            CertificateError::Expired => Self::Expired { since: None },
            CertificateError::ExpiredContext { time, not_after } => {
                let since = time.as_secs().saturating_sub(not_after.as_secs());
                Self::Expired { since: Some(Duration::from_secs(since)) }
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Self::NotYetValid
            }
            other => {
                let text = other.to_string();
                Self::Unacceptable(match text.contains("CaUsedAsEndEntity") {
                    true => {
                        "it is a CA's own: a broker must have one that the CA has signed".into()
                    }
                    false => text,
                })
            }
        }
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "rustls may know more, and it is all one here"
    )]
    fn of_alert(alert: AlertDescription, has_certificate: bool) -> Self {
        use AlertDescription as Alert;
        match alert {
            Alert::CertificateRequired if !has_certificate => Self::CertificateRequired,
            // TLS 1.2 uses this alert, since it has none of its own for a missing certificate.
            Alert::HandshakeFailure if !has_certificate => {
                Self::Refused("HandshakeFailure; does it require a client certificate?".to_owned())
            }
            Alert::UnknownCA if has_certificate => {
                Self::CertificateRefused("it does not trust the CA that has signed it".to_owned())
            }
            Alert::CertificateExpired if has_certificate => {
                Self::CertificateRefused("it has expired".to_owned())
            }
            Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateUnknown
            | Alert::AccessDenied
                if has_certificate =>
            {
                Self::CertificateRefused(format!("{alert:?}"))
            }
            // None of these is about the client certificate.
            Alert::InternalError | Alert::UserCanceled => Self::GivenUp(format!("{alert:?}")),
            _ => Self::Refused(format!("{alert:?}")),
        }
    }
}

/// `DnsName("localhost")` as `localhost`: rustls shows names in Rust syntax.
fn readable(name: &str) -> String {
    let inside = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    inside.map_or(name, |inside| inside.trim_matches('"')).to_owned()
}

impl Tls {
    /// A connector with the present content of all files.
    ///
    /// # Errors
    ///
    /// One of them can't be read.
    pub(crate) fn connector(&self) -> Result<RustlsConnector, TlsError> {
        let config = match &self.ca {
            Some(ca) => RustlsConnectorConfig::default()
                .with_parsable_certificates(ca.authorities().map_err(TlsError::Ca)?),
            None => RustlsConnectorConfig::new_with_native_certs()
                .map_err(|error| TlsError::NoSystemCa(error.to_string()))?,
        };
        let built = match &self.identity {
            Some(identity) => {
                let (chain, key) = identity.read()?;
                config.connector_with_single_cert(chain, key)
            }
            None => config.connector_with_no_client_auth(),
        };
        built.map_err(|error| TlsError::NoSystemCa(error.to_string()))
    }

    /// Whether this is a host name or an address that a certificate may contain.
    pub(crate) fn is_host(name: &str) -> bool {
        ServerName::try_from(name).is_ok()
    }

    /// The name that the certificate of the broker at `host` must be for.
    pub(crate) fn expected_name(&self, host: &str) -> Result<String, TlsError> {
        let name = self.server_name.as_deref().unwrap_or(host);
        if Self::is_host(name) {
            Ok(name.to_owned())
        } else {
            Err(TlsError::ServerName(name.to_owned()))
        }
    }
}

impl Identity {
    /// Reads the certificates and their key.
    ///
    /// # Errors
    ///
    /// One of them can't be read, or they don't belong together.
    pub(crate) fn read(
        &self,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), InvalidIdentity> {
        let chain = self.certificate.certificates().map_err(InvalidIdentity::Certificate)?;
        let key = self.key.private_key().map_err(InvalidIdentity::Key)?;
        let both =
            CertifiedKey::from_der(chain.clone(), key.clone_key(), &ring::default_provider());
        match both {
            Ok(_) => Ok((chain, key)),
            Err(Rustls::InconsistentKeys(_)) => {
                let rule = match &self.certificate {
                    Pem::File(path) => {
                        format!("must be the key of the certificate in `{}`", path.display())
                    }
                    Pem::Text(_) => "must be the key of the certificate".to_owned(),
                };
                Err(InvalidIdentity::Key(self.key.refused(rule)))
            }
            Err(Rustls::InvalidCertificate(_)) => Err(InvalidIdentity::Certificate(
                self.certificate.refused("must begin with a certificate that can be understood"),
            )),
            Err(_) => Err(InvalidIdentity::Key(
                self.key.refused("must hold an RSA, ECDSA or Ed25519 key that can be used"),
            )),
        }
    }
}

impl Pem {
    /// The CAs in it: at least one, all of them valid.
    pub(crate) fn authorities(&self) -> Result<Vec<CertificateDer<'static>>, InvalidPem> {
        let certificates = self.certificates()?;
        let mut store = RootCertStore::empty();
        for (index, certificate) in certificates.iter().enumerate() {
            if store.add(certificate.clone()).is_err() {
                let number = index + 1;
                let rule = format!("must hold certificates only; number {number} is none");
                return Err(self.refused(rule));
            }
        }
        Ok(certificates)
    }

    /// The certificates in it: at least one.
    pub(crate) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, InvalidPem> {
        let text = self.text()?;
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
        match certificates {
            Ok(certificates) if !certificates.is_empty() => Ok(certificates),
            Ok(_) | Err(_) => Err(self.refused("must hold certificates in PEM")),
        }
    }

    /// The first private key in it.
    pub(crate) fn private_key(&self) -> Result<PrivateKeyDer<'static>, InvalidPem> {
        let text = self.text()?;
        PrivateKeyDer::from_pem_slice(&text).map_err(|_| {
            let is_encrypted = text.windows(9).any(|it| it == b"ENCRYPTED");
            self.refused(match is_encrypted {
                true => "must hold a private key without a passphrase",
                false => "must hold a private key in PEM",
            })
        })
    }

    fn text(&self) -> Result<Vec<u8>, InvalidPem> {
        match self {
            Self::Text(text) => Ok(text.clone().into_bytes()),
            Self::File(path) => {
                let mut bytes = Vec::new();
                let unreadable = |error: io::Error| self.refused(format!("can't be read: {error}"));
                let file = fs::File::open(path).map_err(unreadable)?;
                file.take(BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
                if bytes.len() as u64 > BYTES_MAX {
                    return Err(self.refused(format!("must have at most {BYTES_MAX} bytes")));
                }
                Ok(bytes)
            }
        }
    }

    fn refused(&self, rule: impl Into<String>) -> InvalidPem {
        let file = match self {
            Self::File(path) => Some(path.clone()),
            Self::Text(_) => None,
        };
        InvalidPem { file, rule: rule.into() }
    }
}

#[cfg(test)]
mod tests {
    use rustls::AlertDescription as Alert;

    use super::TlsError;
    use crate::transport::amqp::error::Disposition;

    #[test]
    fn a_broker_that_fails_at_the_handshake_is_tried_again_and_one_that_refuses_is_not() {
        for (alert, disposition) in [
            (Alert::InternalError, Disposition::Retry),
            (Alert::UserCanceled, Disposition::Retry),
            (Alert::ProtocolVersion, Disposition::GiveUp),
            (Alert::CertificateExpired, Disposition::GiveUp),
            (Alert::UnknownCA, Disposition::GiveUp),
        ] {
            for has_certificate in [false, true] {
                let error = TlsError::of_alert(alert, has_certificate);
                assert_eq!(error.disposition(), disposition, "{error}");
            }
        }
    }
}
