//! Which brokers are believed to be who they say, and how we show them who we are.
//!
//! A [`Tls`] is for hosts whose URL begins with `amqps://`. What it names is read whenever a
//! connection is made, so certificates that were renewed are taken without a new start.
//!
//! There is no way to do without a check of the broker's certificate: who can't have it signed by a
//! CA of their own can name the certificate itself as one.
//!
//! **Invariant:** a private key is in no error, and in nothing that is shown.

use std::{
    fmt, fs, io,
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use lapin::tcp::{RustlsConnector, RustlsConnectorConfig};
use rustls::{
    AlertDescription, CertificateError, Error as Rustls, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    sign::CertifiedKey,
};

use crate::transport::amqp::error::Disposition;

/// No chain, key or set of CAs is longer; a file that is was not meant.
const BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Whom to trust, and what to show, for brokers whose URL begins with `amqps://`. The default trusts
/// whom the system trusts, and shows nothing.
///
/// What it names is looked at when a connection is made: renewed files are taken without a restart,
/// and what is wrong with them is an error of the connection. The broker's certificate is always
/// checked.
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
    /// Trusts whom the system trusts, and shows nothing.
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

    /// Sets what to show a broker that asks for a certificate: the certificate, followed by those
    /// that lead from it to its CA, and its private key without a passphrase. Default: nothing.
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

/// Who we are to a broker.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) certificate: Pem,
    pub(crate) key: Pem,
}

/// Certificates or a private key, in PEM. It is not shown: it may be a key.
#[derive(Clone)]
#[non_exhaustive]
pub enum Pem {
    /// What is in this file whenever a connection is made.
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

/// Something is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{rule}", place(file.as_deref()))]
pub struct InvalidPem {
    /// Which file, if it is one.
    pub file: Option<PathBuf>,
    /// What is wrong with it: lower case, without a full stop.
    pub rule: String,
}

fn place(file: Option<&Path>) -> String {
    file.map(|path| format!("`{}` ", path.display())).unwrap_or_default()
}

/// A client certificate that can't be shown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidIdentity {
    /// The certificate can't be had.
    #[error("unusable client certificate")]
    Certificate(#[source] InvalidPem),
    /// The key can't be had, or is another certificate's.
    #[error("unusable key of the client certificate")]
    Key(#[source] InvalidPem),
}

/// There is no connection over TLS that could be trusted, or none that the broker wants.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The CAs to be trusted can't be had.
    #[error("unusable CA certificates")]
    Ca(#[source] InvalidPem),
    /// What is to be shown can't be had.
    #[error(transparent)]
    Identity(#[from] InvalidIdentity),
    /// No CAs were named, and the system has none.
    #[error("this system trusts no CA, and none is named: {0}")]
    NoSystemCa(String),
    /// There is no such name.
    #[error("`{0}` is no host's name")]
    ServerName(String),
    /// Nobody who is trusted has signed the broker's certificate.
    #[error("its certificate is signed by no CA that is trusted here")]
    UnknownCa,
    /// The broker's certificate is somebody else's.
    #[error("its certificate is not for `{wanted}`{}", whom_for(names))]
    OtherName {
        /// Who it should be.
        wanted: String,
        /// Who it is.
        names: Vec<String>,
    },
    /// The broker's certificate is no longer valid.
    #[error("its certificate has expired{}", ago(*since))]
    Expired {
        /// For how long, if that is known.
        since: Option<Duration>,
    },
    /// The broker's certificate is not yet valid.
    #[error("its certificate is not valid yet: is a clock wrong?")]
    NotYetValid,
    /// The broker's certificate is not good for another reason.
    #[error("its certificate is not accepted: {0}")]
    Unacceptable(String),
    /// The broker wants to know who we are.
    #[error("it wants a client certificate, and none is set")]
    CertificateRequired,
    /// The broker does not accept who we are.
    #[error("it does not accept our certificate: {0}")]
    CertificateRefused(String),
    /// The broker ends the handshake for a reason of its own.
    #[error("it ends the handshake: {0}")]
    Refused(String),
    /// The broker fails at the handshake, or gives it up.
    #[error("it gives up the handshake: {0}")]
    GivenUp(String),
    /// It ends the connection where it should have taken our certificate for a user's.
    #[error("it does not accept a certificate as a login; does it offer the mechanism EXTERNAL?")]
    NoUser,
    /// What answers there doesn't speak TLS, or speaks it in a way of its own.
    #[error("what answers there does not speak TLS as it should: {0}")]
    NotTls(String),
}

fn whom_for(names: &[String]) -> String {
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
    /// Whether to try again. Most of this stays as it is until a person changes something.
    pub fn disposition(&self) -> Disposition {
        match self {
            // Time goes by; and who answers so may be a proxy, or about to begin or to end.
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

    /// What `error` says of a handshake, or of the first moments after it, if it is about TLS.
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
                let said = other.to_string();
                Self::Unacceptable(match said.contains("CaUsedAsEndEntity") {
                    true => {
                        "it is a CA's own: a broker must have one that the CA has signed".into()
                    }
                    false => said,
                })
            }
        }
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "rustls may know more, and it is all one here"
    )]
    fn of_alert(alert: AlertDescription, has_certificate: bool) -> Self {
        use AlertDescription as Said;
        match alert {
            Said::CertificateRequired if !has_certificate => Self::CertificateRequired,
            // So says TLS 1.2, which has no word of its own for it.
            Said::HandshakeFailure if !has_certificate => {
                Self::Refused("HandshakeFailure; does it want a client certificate?".to_owned())
            }
            Said::UnknownCA if has_certificate => {
                Self::CertificateRefused("it does not trust the CA that has signed it".to_owned())
            }
            Said::CertificateExpired if has_certificate => {
                Self::CertificateRefused("it has expired".to_owned())
            }
            Said::BadCertificate
            | Said::UnsupportedCertificate
            | Said::CertificateRevoked
            | Said::CertificateUnknown
            | Said::AccessDenied
                if has_certificate =>
            {
                Self::CertificateRefused(format!("{alert:?}"))
            }
            // None of this is about us.
            Said::InternalError | Said::UserCanceled => Self::GivenUp(format!("{alert:?}")),
            _ => Self::Refused(format!("{alert:?}")),
        }
    }
}

/// `DnsName("localhost")` as `localhost`: rustls tells names as its code has them.
fn readable(name: &str) -> String {
    let inside = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    inside.map_or(name, |inside| inside.trim_matches('"')).to_owned()
}

impl Tls {
    /// What makes connections, with everything as it is now.
    ///
    /// # Errors
    ///
    /// Something of it can't be had.
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

    /// Whether this may be a host's name in a certificate, or its address.
    pub(crate) fn is_host(name: &str) -> bool {
        ServerName::try_from(name).is_ok()
    }

    /// What the certificate of the broker at `host` must be for.
    pub(crate) fn name_of(&self, host: &str) -> Result<String, TlsError> {
        let name = self.server_name.as_deref().unwrap_or(host);
        if Self::is_host(name) {
            Ok(name.to_owned())
        } else {
            Err(TlsError::ServerName(name.to_owned()))
        }
    }
}

impl Identity {
    /// The certificates and their key.
    ///
    /// # Errors
    ///
    /// One of them can't be had, or they don't belong together.
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
    /// The CAs in it: at least one, and all of them good.
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
    use rustls::AlertDescription as Said;

    use super::TlsError;
    use crate::transport::amqp::error::Disposition;

    #[test]
    fn a_broker_that_fails_at_the_handshake_is_tried_again_and_one_that_says_no_is_not() {
        for (said, disposition) in [
            (Said::InternalError, Disposition::Retry),
            (Said::UserCanceled, Disposition::Retry),
            (Said::ProtocolVersion, Disposition::GiveUp),
            (Said::CertificateExpired, Disposition::GiveUp),
            (Said::UnknownCA, Disposition::GiveUp),
        ] {
            for has_certificate in [false, true] {
                let error = TlsError::of_alert(said, has_certificate);
                assert_eq!(error.disposition(), disposition, "{error}");
            }
        }
    }
}
