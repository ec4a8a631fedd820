//! Certificates for tests: new CAs, and certificates that they sign.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};

/// A certificate and its key, in PEM.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// A certificate authority.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    own: Pair,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = named(name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let own =
            Pair { certificate: params.self_signed(&key).unwrap().pem(), key: key.serialize_pem() };
        Self { issuer: Issuer::new(params, key), own }
    }

    /// The certificate to trust, in PEM.
    pub(crate) fn certificate(&self) -> &str {
        &self.own.certificate
    }

    /// Its own certificate and key.
    pub(crate) fn pair(&self) -> &Pair {
        &self.own
    }

    /// A certificate for `name`, valid for `hosts`.
    pub(crate) fn signs(&self, name: &str, hosts: &[&str]) -> Pair {
        self.sign(&named(name, hosts))
    }

    /// The same, valid in 2020 only.
    pub(crate) fn signed_long_ago(&self, name: &str, hosts: &[&str]) -> Pair {
        let mut params = named(name, hosts);
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2020, 12, 31);
        self.sign(&params)
    }

    fn sign(&self, params: &CertificateParams) -> Pair {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Pair { certificate, key: key.serialize_pem() }
    }
}

fn named(name: &str, hosts: &[&str]) -> CertificateParams {
    let hosts: Vec<_> = hosts.iter().map(|host| (*host).to_owned()).collect();
    let mut params = CertificateParams::new(hosts).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}
