//! The configuration of a `dtc` process: read from files, the environment and flags, and checked.
//!
//! The layers, from the weakest: `deploy/dtc.toml`, which is compiled in; a file;
//! `DTC__SECTION__KEY` of the environment; flags. All errors are found at once. Nothing here starts
//! anything, and the environment is a parameter.
//!
//! **Invariant:** no [`Complaint`](crate::complaint::Complaint), and no output of a [`Config`],
//! contains a secret.

mod draft;
pub mod duration;
mod spelling;

use std::{ffi::OsString, fmt, path::PathBuf, time::Duration};

use crate::{
    complaint::{Complaints, ValueSource},
    config::draft::{Draft, ResolvedKey},
    protocol::{
        ids::{InstanceId, ServiceName, WorkerId},
        message::{Cap, MAX_WAIT},
    },
    transport::amqp::{
        address::Address,
        names::{ALL, ANY, Namespace},
        tls::{Identity, InvalidIdentity, InvalidPem, Pem, Tls},
        topology::{PrepareQueueKind, ServiceTopology, Settings},
    },
};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const COMMANDS: &str = "topology.commands";
const HEARTBEAT_MAX: Duration = Duration::from_secs(18 * 60 * 60);

/// The sources of a configuration.
#[derive(Default)]
pub struct ConfigSources {
    /// The file, if one is named.
    pub file: Option<PathBuf>,
    /// The environment. Only variables that begin with `DTC__`, or with something similar, are
    /// read.
    pub environment: Vec<(OsString, OsString)>,
    /// The flags that set a key.
    pub flags: Vec<ConfigFlag>,
}

/// The environment may hold secrets of any program.
impl fmt::Debug for ConfigSources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigSources").field("file", &self.file).finish_non_exhaustive()
    }
}

/// A flag that sets a key.
pub struct ConfigFlag {
    /// The key.
    pub key: &'static str,
    /// The flag's name.
    pub flag: &'static str,
    /// The flag's value.
    pub value: String,
}

/// Its value may be a password.
impl fmt::Debug for ConfigFlag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigFlag").field("flag", &self.flag).finish_non_exhaustive()
    }
}

/// A checked configuration.
#[derive(Debug)]
pub struct Config {
    /// `[broker]`
    pub broker: BrokerConfig,
    /// `[worker]`
    pub worker: WorkerConfig,
    /// `[service]`
    pub service: ServiceConfig,
    /// `[topology]`
    pub topology: TopologyConfig,
    /// `[services.…]`, in the order of their names.
    pub services: Vec<ServiceTopology>,
    entries: Vec<ResolvedKey>,
}

/// Which broker to use, and how to connect to it.
#[derive(Debug)]
pub struct BrokerConfig {
    /// The broker's hosts, and the user's name and password.
    pub address: Address,
    /// The first word of all names there.
    pub namespace: Namespace,
    /// The interval of heartbeats.
    pub heartbeat: Duration,
    /// `[broker.tls]`: the CAs to trust, and the client certificate.
    pub tls: Tls,
}

/// The settings of a worker.
#[derive(Debug)]
pub struct WorkerConfig {
    /// Its name; `None`: a new name.
    pub name: Option<WorkerId>,
    /// How many transactions it works on at once.
    pub max_in_flight: u16,
    /// How long the prepares of a transaction may take.
    pub prepare_timeout: Duration,
    /// How long it finishes begun transactions after a signal to stop.
    pub drain: Duration,
    /// How long it remembers decisions.
    pub window: Duration,
}

/// The settings of an instance of a service.
#[derive(Debug)]
pub struct ServiceConfig {
    /// The first part of its id.
    pub instance: Option<InstanceId>,
    /// How long it waits for an outcome before asking for it.
    pub inquire_after: Duration,
    /// How long it waits for outcomes after a signal to stop.
    pub drain: Duration,
}

/// The settings of exchanges and queues.
#[derive(Debug)]
pub struct TopologyConfig {
    /// The settings that all of them share.
    pub settings: Settings,
    /// How much clocks may differ.
    pub clock_margin: Duration,
    /// Whether `commands` is `auto`, and so follows from the number of hosts in the broker's URL.
    pub is_auto: bool,
}

/// Merges all sources, and checks the result.
///
/// # Errors
///
/// Everything that is wrong with them.
pub fn load(sources: &ConfigSources) -> Result<Config, Complaints> {
    let mut draft = Draft::of(sources);
    let broker = broker(&mut draft);
    let worker = worker(&mut draft);
    let service = service(&mut draft);
    let topology = topology(&mut draft, broker.as_ref().map(|broker| &broker.address));
    let services = services(&mut draft);
    draft.refuse_unknown_keys();
    let Draft { complaints, entries, .. } = draft;
    match (broker, worker, service, topology) {
        (Some(broker), Some(worker), Some(service), Some(topology)) if complaints.is_empty() => {
            Ok(Config { broker, worker, service, topology, services, entries })
        }
        _ => Err(Complaints::all(complaints)),
    }
}

/// The commented file of all keys with their defaults.
pub fn defaults() -> &'static str {
    draft::DEFAULTS
}

// ---- Section by section: each takes all its keys before it gives up ----------------------------

fn broker(draft: &mut Draft) -> Option<BrokerConfig> {
    let address = |text: &str| text.parse::<Address>().map_err(|error| error.to_string());
    let url = draft.secret("broker.url", address, Address::masked);
    let password = draft.secret("broker.password", not_empty, |_| "***".to_owned());
    let namespace = draft.required("broker.namespace", |text| {
        Namespace::parse(text).map_err(|_| format!("must match {}", Namespace::RULE))
    });
    let heartbeat = draft.required("broker.heartbeat", |text| {
        let heartbeat = duration::parse(text)?;
        let is_whole = heartbeat.subsec_nanos() == 0;
        if !is_whole || !(Duration::from_secs(1)..=HEARTBEAT_MAX).contains(&heartbeat) {
            return Err("must be from 1s to 18h, in whole seconds".to_owned());
        }
        Ok(heartbeat)
    });
    if url == Some(None) {
        draft.complain("broker.url", ValueSource::Default, "must be set".to_owned());
    }
    let tls = tls(draft, url.as_ref().and_then(Option::as_ref));
    let address = match password? {
        Some(password) => url??.with_password(&password),
        None => url??,
    };
    Some(BrokerConfig { address, namespace: namespace?, heartbeat: heartbeat?, tls: tls? })
}

/// It reads every file, so that errors in it are found before the first connection.
fn tls(draft: &mut Draft, address: Option<&Address>) -> Option<Tls> {
    const CA: &str = "broker.tls.ca_file";
    const CERTIFICATE: &str = "broker.tls.certificate_file";
    const KEY: &str = "broker.tls.key_file";
    const SERVER_NAME: &str = "broker.tls.server_name";

    let ca = draft.file(CA, |path| pem_file(path, |pem| pem.authorities().map(drop)));
    let certificate =
        draft.file(CERTIFICATE, |path| pem_file(path, |pem| pem.certificates().map(drop)));
    let key = draft.file(KEY, |path| pem_file(path, |pem| pem.private_key().map(drop)));
    let server_name = draft.optional(SERVER_NAME, |text| match Tls::is_host(text) {
        true => Ok(text.to_owned()),
        false => Err("must be the name or the address of a host".to_owned()),
    });

    if address.is_some_and(|address| !address.is_secure()) {
        let all =
            [(CA, &ca), (CERTIFICATE, &certificate), (KEY, &key), (SERVER_NAME, &server_name)];
        for (key, value) in all {
            if let Some(Some(value)) = value {
                let rule = "is for amqps:// only, and no URL of the broker begins so";
                draft.refuse(key, Some(value.clone()), rule);
            }
        }
    }
    if address.is_some_and(Address::is_external) && certificate == Some(None) {
        let rule = format!("`auth_mechanism=external` requires `{CERTIFICATE}`");
        draft.refuse("broker.url", None, &rule);
    }
    let (certificate, key) = (certificate?, key?);
    let identity = match (certificate, key) {
        (Some(certificate), Some(key)) => {
            let file = |path: &String| Pem::File(path.into());
            let identity = Identity { certificate: file(&certificate), key: file(&key) };
            match identity.read() {
                Ok(_) => {}
                Err(InvalidIdentity::Certificate(error)) => {
                    draft.refuse(CERTIFICATE, Some(certificate), &error.rule);
                }
                Err(InvalidIdentity::Key(error)) => draft.refuse(KEY, Some(key), &error.rule),
            }
            Some(identity)
        }
        (Some(certificate), None) => {
            draft.refuse(CERTIFICATE, Some(certificate), &format!("requires `{KEY}` too"));
            None
        }
        (None, Some(key)) => {
            draft.refuse(KEY, Some(key), &format!("requires `{CERTIFICATE}` too"));
            None
        }
        (None, None) => None,
    };
    let ca = ca?.map(|path| Pem::File(path.into()));
    Some(Tls { ca, identity, server_name: server_name? })
}

/// The path of a file whose content passes `check`.
fn pem_file(path: &str, check: impl Fn(&Pem) -> Result<(), InvalidPem>) -> Result<String, String> {
    check(&Pem::File(path.into())).map(|()| path.to_owned()).map_err(|error| error.rule)
}

fn worker(draft: &mut Draft) -> Option<WorkerConfig> {
    let name = draft.optional("worker.name", workers_name);
    let max_in_flight = draft.required("worker.max_in_flight", |text| {
        let number = text.parse().ok().filter(|number| *number >= 1);
        number.ok_or_else(|| format!("must be a whole number from 1 to {}", u16::MAX))
    });
    let prepare_timeout = draft.required("worker.prepare_timeout", longer_than_nothing);
    let drain = draft.required("worker.drain", duration::parse);
    let window = draft.required("worker.window", duration::parse);
    Some(WorkerConfig {
        name: name?,
        max_in_flight: max_in_flight?,
        prepare_timeout: prepare_timeout?,
        drain: drain?,
        window: window?,
    })
}

fn service(draft: &mut Draft) -> Option<ServiceConfig> {
    let instance = draft.optional("service.instance", |text| {
        InstanceId::parse(text).map_err(|error| format!("must match {}", error.rule))
    });
    let inquire_after = draft.required("service.inquire_after", longer_than_nothing);
    let drain = draft.required("service.drain", duration::parse);
    Some(ServiceConfig { instance: instance?, inquire_after: inquire_after?, drain: drain? })
}

fn topology(draft: &mut Draft, address: Option<&Address>) -> Option<TopologyConfig> {
    let retention = draft.required("topology.retention", |text| {
        let retention = duration::parse(text)?;
        if retention < Duration::from_secs(1) || retention.subsec_nanos() != 0 {
            return Err("must be at least 1s, in whole seconds".to_owned());
        }
        Ok(retention)
    });
    let forced = draft.required(COMMANDS, |text| match text {
        "auto" => Ok(None),
        "classic" => Ok(Some(PrepareQueueKind::Classic)),
        "quorum" => Ok(Some(PrepareQueueKind::Quorum)),
        _ => Err("must be `auto`, `classic` or `quorum`".to_owned()),
    });
    let clock_margin = draft.required("topology.clock_margin", duration::parse);
    let (retention, forced, clock_margin) = (retention?, forced?, clock_margin?);
    let auto = address.map(|address| (PrepareQueueKind::at(address), address.hosts().len()));
    if let (None, Some((commands, n_hosts))) = (forced, auto) {
        let hosts = if n_hosts == 1 { "one host".to_owned() } else { format!("{n_hosts} hosts") };
        draft.explain(COMMANDS, format!("{commands}, since broker.url names {hosts}"));
    }
    // Without an address there is a complaint already, and the value is not used.
    let commands = forced.or_else(|| auto.map(|(commands, _)| commands)).unwrap_or_default();
    let settings = Settings { retention, commands };
    Some(TopologyConfig { settings, clock_margin, is_auto: forced.is_none() })
}

fn services(draft: &mut Draft) -> Vec<ServiceTopology> {
    let mut services = Vec::new();
    for (name, source) in draft.take_services() {
        let section = format!("services.{name}");
        let Ok(name) = ServiceName::parse(&name) else {
            let rule = format!("the name must match {}", ServiceName::RULE);
            draft.forget(&section);
            draft.complain(&section, source, rule);
            continue;
        };
        let max_wait = draft.optional(&format!("{section}.max_wait"), |text| {
            let max_wait = duration::parse(text)?;
            if max_wait > DAY { Err("must be at most a day".to_owned()) } else { Ok(max_wait) }
        });
        let cap = draft.optional(&format!("{section}.cap"), |text| match text {
            "instance" => Ok(Cap::Instance),
            "service" => Ok(Cap::Service),
            _ => Err("must be `instance` or `service`".to_owned()),
        });
        if let (Some(max_wait), Some(cap)) = (max_wait, cap) {
            let (max_wait, cap) = (max_wait.unwrap_or(MAX_WAIT), cap.unwrap_or_default());
            services.push(ServiceTopology { name, max_wait, cap });
        }
    }
    services
}

fn not_empty(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("must not be empty".to_owned()) } else { Ok(text.to_owned()) }
}

fn longer_than_nothing(text: &str) -> Result<Duration, String> {
    let duration = duration::parse(text)?;
    if duration.is_zero() { Err("must be longer than 0s".to_owned()) } else { Ok(duration) }
}

/// The name of a worker: not one of the reserved words.
fn workers_name(text: &str) -> Result<WorkerId, String> {
    let name = WorkerId::parse(text).map_err(|error| format!("must match {}", error.rule))?;
    if [ALL, ANY].contains(&text) {
        return Err(format!("must not be `{ALL}` or `{ANY}`, which mean many"));
    }
    Ok(name)
}

/// As TOML, with secrets masked, and with the source of each value.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut section = "";
        for ResolvedKey { key, value, meaning } in &self.entries {
            let (of, name) = key.rsplit_once('.').unwrap_or_default();
            if of != section {
                let gap = if section.is_empty() { "" } else { "\n" };
                writeln!(f, "{gap}[{of}]")?;
                section = of;
            }
            match value {
                Some((value, source)) => {
                    write!(f, "{name} = {value} # {source}")?;
                    match meaning {
                        Some(meaning) => writeln!(f, ": {meaning}")?,
                        None => writeln!(f)?,
                    }
                }
                None => writeln!(f, "# {name} is not set")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path, time::Duration};

    use rcgen::{CertificateParams, KeyPair};

    use super::{Complaints, Config, ConfigFlag, ConfigSources, defaults, draft::SECRETS, load};
    use crate::protocol::message::Cap;

    /// The configuration from a file and an environment.
    #[expect(
        clippy::unwrap_in_result,
        reason = "the result is the configuration's, not the disk's"
    )]
    fn loaded(file: &str, environment: &[(&str, &str)]) -> Result<Config, Complaints> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("own.toml");
        fs::write(&path, file).unwrap();
        let variable = |(name, value): &(&str, &str)| ((*name).into(), (*value).into());
        let environment = environment.iter().map(variable).collect();
        load(&ConfigSources { file: Some(path), environment, flags: Vec::new() })
    }

    fn complaints(file: &str, environment: &[(&str, &str)]) -> String {
        let complaints = loaded(file, environment).unwrap_err();
        let lines = complaints.listed().iter().map(|complaint| {
            let text = complaint.to_string();
            text.split_once("(from ").map_or_else(
                || text.clone(),
                |(key, rest)| {
                    let rule = rest.split_once("): ").map_or("", |(_, rule)| rule);
                    format!("{key}{rule}\n")
                },
            )
        });
        lines.collect()
    }

    fn password(config: &Config) -> String {
        config.broker.address.hosts()[0].authority.userinfo.password.clone()
    }

    /// Comments had been reflowed with the keys between them, so that nobody could uncomment a key.
    #[test]
    fn each_key_has_its_own_line_in_the_file_of_defaults() {
        let config = load(&ConfigSources::default()).unwrap();
        let mut known: BTreeSet<_> = config.entries.iter().map(|entry| entry.key.clone()).collect();
        known.extend(SECRETS.map(|key| format!("{key}_file")));
        known.extend(["max_wait", "cap"].map(|key| format!("services.payments.{key}")));
        let (mut section, mut listed) = (String::new(), BTreeSet::new());
        for line in defaults().lines() {
            let line = line.strip_prefix("# ").unwrap_or(line);
            if let Some(name) = line.strip_prefix('[') {
                section = name.trim_end_matches(']').to_owned();
            } else if let Some((key, _)) = line.split_once(" = ") {
                assert!(!key.contains(' '), "not a line of its own: {line}");
                listed.insert(format!("{section}.{key}"));
            }
        }
        assert_eq!(listed, known);
    }

    #[test]
    fn without_values_the_defaults_apply() {
        let config = load(&ConfigSources::default()).unwrap();
        assert_eq!(config.broker.address.to_string(), "amqp://localhost:5672");
        assert_eq!(config.broker.namespace.to_string(), "dtc");
        assert_eq!(config.worker.max_in_flight, 256);
        assert_eq!(config.worker.window, Duration::from_secs(15 * 60));
        assert!(config.worker.name.is_none() && config.services.is_empty());
    }

    #[test]
    fn each_layer_overrides_the_earlier_one_key_by_key() {
        let file = "[worker]\ndrain = \"1s\"\nwindow = \"1s\"\nprepare_timeout = \"1s\"";
        let flag = ConfigFlag { key: "worker.drain", flag: "--drain", value: "3s".to_owned() };
        let variables = [("DTC__WORKER__DRAIN", "2s"), ("DTC__WORKER__WINDOW", "2s")];
        let config = loaded(file, &variables).unwrap();
        assert_eq!(config.worker.drain, Duration::from_secs(2));
        assert_eq!(config.worker.prepare_timeout, Duration::from_secs(1));
        let environment = variables.map(|(name, value)| (name.into(), value.into())).to_vec();
        let config = load(&ConfigSources { file: None, environment, flags: vec![flag] }).unwrap();
        assert_eq!(config.worker.drain, Duration::from_secs(3));
        assert_eq!(config.worker.window, Duration::from_secs(2));
    }

    #[test]
    fn empty_and_foreign_variables_are_ignored() {
        let variables = [("DTC__WORKER__NAME", ""), ("DTC_LOG", "info"), ("DTCX__A__B", "1")];
        assert!(loaded("", &variables).unwrap().worker.name.is_none());
    }

    #[test]
    fn unknown_keys_are_refused_in_every_source() {
        let file = "top = 1\n[broker]\nport = 1\n[worker.drain]\nmin = 1\n[colour]\nred = 1";
        let variables = [("DTC__WORKER", "x"), ("DTC____", "x"), ("DTC__Worker__Drain", "1s")];
        assert_eq!(
            complaints(file, &variables),
            "`worker.drain` must be written in upper case\n\
             `.` is no key of the configuration; `dtc config --defaults` prints them all\n\
             `broker.port` is no key of the configuration; `dtc config --defaults` prints them all\n\
             `colour.red` is no key of the configuration; `dtc config --defaults` prints them all\n\
             `top` is no key of the configuration; `dtc config --defaults` prints them all\n\
             `worker` is no key of the configuration; `dtc config --defaults` prints them all\n\
             `worker.drain.min` is no key of the configuration; is `worker.drain` meant?\n"
        );
    }

    #[test]
    fn a_key_with_a_typo_is_refused_with_the_one_that_may_be_meant() {
        let file = "[worker]\ndrian = \"1s\"\n[services.stock]\nmax_wait_ms = 5";
        let variables = [("DTC__BROKER__ULR", "amqp://there"), ("DTC__BROKER_NAMESPACE", "shop")];
        assert_eq!(
            complaints(file, &variables),
            "`broker.ulr` is no key of the configuration; is `DTC__BROKER__URL` meant?\n\
             `broker_namespace` is no key of the configuration; is `DTC__BROKER__NAMESPACE` meant?\n\
             `services.stock.max_wait_ms` is no key of the configuration; is \
             `services.stock.max_wait` meant?\n\
             `worker.drian` is no key of the configuration; is `worker.drain` meant?\n"
        );
    }

    /// The variable had no effect, and the command connected to the broker on its own machine.
    #[test]
    fn a_variable_with_a_missing_underscore_is_refused() {
        for name in ["DTC_BROKER_URL", "DTC_BROKER__URL", "dtc__broker__url"] {
            assert_eq!(
                complaints("", &[(name, "amqp://there")]),
                "`broker.url` is not a variable of dtc: the variable is called `DTC__BROKER__URL`\n",
                "{name}"
            );
        }
        let others = [("DTC_BROKER_URL", ""), ("DTC_SERVICE_PORT", "1"), ("DTC_LOG", "info")];
        assert!(loaded("", &others).is_ok(), "these are not ours, or say nothing");
        let both = [("DTC_BROKER_URL", "amqp://here"), ("DTC__BROKER__URL", "amqp://there")];
        assert!(loaded("", &both).is_ok(), "somebody has put one into the other");
    }

    #[test]
    fn services_have_defaults_and_their_names_a_rule() {
        let config =
            loaded("[services.B]\n[services.a]\nmax_wait = \"0s\"\ncap = \"service\"", &[]);
        let services = config.unwrap().services;
        let services: Vec<_> = services
            .iter()
            .map(|service| (service.name.as_str(), service.max_wait.as_millis(), service.cap))
            .collect();
        assert_eq!(services, [("B", 1000, Cap::Instance), ("a", 0, Cap::Service)]);
        assert_eq!(
            complaints(
                "[services]\nx = 1\n[services.\"a.b\"]\ncap = \"all\"\n[services.c]\ncap = \"all\"",
                &[("DTC__SERVICES__C__CAP", "service")]
            ),
            "`services.c.cap` services are set in a file only\n\
             `services.a.b` the name must match [A-Za-z0-9_-]{1,64}\n\
             `services.c.cap` is `all` must be `instance` or `service`\n\
             `services.x` is no key of the configuration; `dtc config --defaults` prints them all\n"
        );
    }

    #[test]
    fn a_secret_is_read_from_its_file_and_overrides_weaker_layers() {
        let directory = tempfile::tempdir().unwrap();
        let (url, secret) = (directory.path().join("url"), directory.path().join("password"));
        fs::write(&url, "amqp://me@there\n").unwrap();
        fs::write(&secret, "canary#1\r\n").unwrap();
        let variables = [
            ("DTC__BROKER__URL_FILE", url.to_str().unwrap()),
            ("DTC__BROKER__PASSWORD_FILE", secret.to_str().unwrap()),
        ];
        let file = "[broker]\nurl = \"amqp://other:canary@x\"\npassword = \"canary\"";
        let config = loaded(file, &variables).unwrap();
        assert_eq!(config.broker.address.masked(), "amqp://me:***@there:5672");
        assert_eq!(password(&config), "canary#1");
        let shown = format!("{config}{config:?}");
        assert!(!shown.contains("canary"), "{shown}");
        assert!(shown.contains("named by DTC__BROKER__URL_FILE"), "{shown}");
    }

    #[test]
    fn a_secret_is_set_in_one_way_and_never_shown() {
        let text = complaints(
            "[broker]\nurl = \"canary\"\nurl_file = \"/nowhere\"\npassword = [\"canary\"]\n\
             pasword = \"canary\"",
            &[("DTC__BROKER__HEARTBEAT", "1ms")],
        );
        assert_eq!(
            text,
            "`broker.url` can't be set where `broker.url_file` is\n\
             `broker.url` part 1 of the broker's address is not an AMQP URL: must begin with amqp:// or \
             amqps://\n\
             `broker.password` must be a single value\n\
             `broker.heartbeat` is `1ms` must be from 1s to 18h, in whole seconds\n\
             `broker.pasword` is no key of the configuration; is `broker.password` meant?\n"
        );
        let missing = complaints("[broker]\nurl_file = \"/nowhere/at all\"", &[]);
        assert!(missing.starts_with("`broker.url_file` is `/nowhere/at all` can't be read: "));
    }

    #[test]
    fn the_output_is_a_file_with_the_same_configuration() {
        for name in ["7", "007", "99999999999999999999", "w1"] {
            let variables = [("DTC__WORKER__NAME", name), ("DTC__WORKER__MAX_IN_FLIGHT", "0010")];
            let shown = loaded("", &variables).unwrap().to_string();
            let again = loaded(&shown, &[]).unwrap();
            assert_eq!(again.worker.name.unwrap().as_str(), name);
            assert_eq!(again.worker.max_in_flight, 10);
        }
    }

    #[test]
    fn a_worker_may_not_have_a_reserved_name() {
        for name in ["any", "all"] {
            let text = complaints("", &[("DTC__WORKER__NAME", name)]);
            assert!(text.contains("which mean many"), "{text}");
        }
        assert!(loaded("", &[("DTC__WORKER__NAME", "w1")]).is_ok());
    }

    /// A certificate and its key, in files of these names, and the variables that name them.
    fn certified(directory: &Path, certificate: &str, key: &str) -> [(&'static str, String); 2] {
        let own = KeyPair::generate().unwrap();
        let signed = CertificateParams::new(vec![]).unwrap().self_signed(&own).unwrap();
        let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
        fs::write(path(certificate), signed.pem()).unwrap();
        fs::write(path(key), own.serialize_pem()).unwrap();
        [
            ("DTC__BROKER__TLS__CERTIFICATE_FILE", path(certificate)),
            ("DTC__BROKER__TLS__KEY_FILE", path(key)),
        ]
    }

    fn tls_complaints(variables: &[(&str, &str)]) -> String {
        complaints("[broker]\nurl = \"amqps://a\"", variables)
    }

    #[test]
    fn certificates_are_checked_and_used() {
        let directory = tempfile::tempdir().unwrap();
        let [certificate, key] = certified(directory.path(), "c.pem", "k.pem");
        let variables = [
            ("DTC__BROKER__URL", "amqps://a?auth_mechanism=external"),
            ("DTC__BROKER__TLS__CA_FILE", &certificate.1),
            (certificate.0, &certificate.1),
            (key.0, &key.1),
            ("DTC__BROKER__TLS__SERVER_NAME", "b"),
        ];
        let config = loaded("", &variables).unwrap();
        let tls = &config.broker.tls;
        assert!(tls.ca.is_some() && tls.identity.is_some());
        assert_eq!(tls.server_name.as_deref(), Some("b"));
        let shown = config.to_string();
        assert!(shown.contains("\n[broker.tls]\nca_file = \"/"), "{shown}");
        assert!(shown.contains("url = \"amqps://a:5671?auth_mechanism=external\""), "{shown}");
        assert!(!shown.contains("BEGIN"), "{shown}");
    }

    #[test]
    fn all_errors_in_certificates_are_reported_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        fs::write(path("text"), "not PEM").unwrap();
        assert_eq!(
            tls_complaints(&[
                ("DTC__BROKER__TLS__CA_FILE", "/nowhere/ca.pem"),
                ("DTC__BROKER__TLS__CERTIFICATE_FILE", &path("text")),
                ("DTC__BROKER__TLS__KEY_FILE", &path("text")),
                ("DTC__BROKER__TLS__SERVER_NAME", "a b"),
            ]),
            format!(
                "`broker.tls.ca_file` is `/nowhere/ca.pem` can't be read: No such file or \
                 directory (os error 2)\n\
                 `broker.tls.certificate_file` is `{0}` must hold certificates in PEM\n\
                 `broker.tls.key_file` is `{0}` must hold a private key in PEM\n\
                 `broker.tls.server_name` is `a b` must be the name or the address of a host\n",
                path("text")
            )
        );
        let [certificate, key] = certified(directory.path(), "c.pem", "k.pem");
        let [_, others] = certified(directory.path(), "d.pem", "l.pem");
        assert_eq!(
            tls_complaints(&[(certificate.0, &certificate.1), (others.0, &others.1)]),
            format!(
                "`broker.tls.key_file` is `{}` must be the key of the certificate in `{}`\n",
                others.1, certificate.1
            )
        );
        assert_eq!(
            tls_complaints(&[(certificate.0, &certificate.1)]),
            format!(
                "`broker.tls.certificate_file` is `{}` requires `broker.tls.key_file` too\n",
                certificate.1
            )
        );
        assert_eq!(
            tls_complaints(&[(key.0, &key.1)]),
            format!(
                "`broker.tls.key_file` is `{}` requires `broker.tls.certificate_file` too\n",
                key.1
            )
        );
    }

    #[test]
    fn tls_settings_need_amqps_and_external_needs_a_certificate() {
        let directory = tempfile::tempdir().unwrap();
        let [certificate, key] = certified(directory.path(), "c.pem", "k.pem");
        let rule = "is for amqps:// only, and no URL of the broker begins so";
        let both = [(certificate.0, &*certificate.1), (key.0, &*key.1)];
        assert_eq!(
            complaints("", &both),
            format!(
                "`broker.tls.certificate_file` is `{}` {rule}\n\
                 `broker.tls.key_file` is `{}` {rule}\n",
                certificate.1, key.1
            )
        );
        assert_eq!(
            tls_complaints(&[("DTC__BROKER__URL", "amqps://a?auth_mechanism=external")]),
            "`broker.url` `auth_mechanism=external` requires `broker.tls.certificate_file`\n"
        );
    }

    #[test]
    fn a_private_key_given_instead_of_its_path_is_never_shown() {
        let directory = tempfile::tempdir().unwrap();
        let [certificate, key] = certified(directory.path(), "c.pem", "k.pem");
        let content = fs::read_to_string(&key.1).unwrap();
        assert_eq!(
            tls_complaints(&[(certificate.0, &certificate.1), (key.0, &content)]),
            "`broker.tls.key_file` must be the path of a file, not what is in it\n"
        );
        let locked = content.replace("PRIVATE", "ENCRYPTED PRIVATE");
        fs::write(&key.1, locked).unwrap();
        assert_eq!(
            tls_complaints(&[(certificate.0, &certificate.1), (key.0, &key.1)]),
            format!(
                "`broker.tls.key_file` is `{}` must hold a private key without a passphrase\n",
                key.1
            )
        );
    }
}
