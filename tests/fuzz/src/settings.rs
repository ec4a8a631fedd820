//! An operator's input: the configuration, the broker's address, names.

use std::{
    fmt::{Debug, Display},
    fs,
    path::PathBuf,
    sync::LazyLock,
};

use dtc::{
    complaint::Complaints,
    config::{ConfigFlag, ConfigSources, duration, load},
    protocol::ids::{
        Branch, InstanceId, InvalidName, ReplyToken, ServiceName, TransactionId, WorkerId,
    },
    transport::amqp::{address::Address, names::Namespace},
    wire::message::Kind,
};

use crate::complaints::is_one_line;

/// A marker that no output may repeat. No valid text contains it by chance.
const CANARY: &str = "cAnArY~1";

/// Every flag that sets a key.
const FLAGS: [(&str, &str); 16] = [
    ("broker.url", "--broker"),
    ("broker.namespace", "--namespace"),
    ("broker.heartbeat", "--heartbeat"),
    ("worker.name", "--name"),
    ("worker.max_in_flight", "--max-in-flight"),
    ("worker.prepare_timeout", "--prepare-timeout"),
    ("worker.drain", "--drain"),
    ("worker.window", "--window"),
    ("service.instance", "--instance"),
    ("service.inquire_after", "--inquire-after"),
    ("service.drain", "--drain"),
    ("topology.retention", "--retention"),
    ("topology.commands", "--commands"),
    ("topology.clock_margin", "--clock-margin"),
    ("broker.password", "--password"),
    ("broker.password_file", "--password-file"),
];

/// The path of the file that is loaded: one for each process, in memory if possible.
static OWN_FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = PathBuf::from("/dev/shm");
    let directory = if memory.is_dir() { memory } else { std::env::temp_dir() };
    directory.join(format!("dtc-fuzz-{}.toml", std::process::id()))
});

/// A configuration: lines `DTC__… = value` and `--flag value`, and after a line `---` the file.
pub fn config(input: &[u8]) {
    let Some(said) = TypedInput::in_input(input) else { return };
    let (read, is_secret) = (said.load(), said.has_secret());
    assert_eq!(shown(&read), shown(&said.load()), "read twice");
    match read {
        Ok(config) => {
            let text = config.to_string();
            assert!(!is_secret || !format!("{text}{config:?}").contains(CANARY), "{text}");
            // The output is a file with the same configuration.
            let again = TypedInput { file: text.clone(), ..TypedInput::default() };
            let again = again.load().map(|it| it.to_string());
            assert_eq!(again.as_deref().map(without_sources), Ok(without_sources(&text)));
        }
        Err(complaints) => {
            assert!(!complaints.listed().is_empty() && complaints.unlisted() == 0);
            for complaint in complaints.listed() {
                let text = complaint.to_string();
                assert!(!is_secret || !format!("{text}{complaint:?}").contains(CANARY), "{text}");
                assert!(text.len() <= 4096, "{text}");
                is_one_line(&text);
                assert!(!complaint.rule.is_empty() && !complaint.rule.ends_with('.'), "{text}");
            }
        }
    }
}

#[derive(Default)]
struct TypedInput {
    variables: Vec<(String, String)>,
    flags: Vec<(usize, String)>,
    file: String,
}

impl TypedInput {
    /// `None`: it names a file that is not in the input, which might be any device.
    fn in_input(input: &[u8]) -> Option<Self> {
        let text = str::from_utf8(input).ok()?.replace('\0', "");
        let (head, file) = text.split_once("---\n").unwrap_or(("", &text));
        let mut said = Self { file: file.to_owned(), ..Self::default() };
        for line in head.lines() {
            let (name, value) = line.split_once(['=', ' ']).unwrap_or((line, ""));
            let name = name.trim();
            match FLAGS.iter().position(|(_, flag)| *flag == name) {
                Some(flag) => said.flags.push((flag, value.to_owned())),
                None => said.variables.push((name.to_owned(), value.to_owned())),
            }
        }
        let names_file =
            |name: &str, value: &str| name.to_lowercase().ends_with("_file") && value.contains('/');
        let is_elsewhere = said.variables.iter().any(|(name, value)| names_file(name, value))
            || said.flags.iter().any(|(flag, value)| names_file(FLAGS[*flag].0, value));
        let table: Option<toml::Table> = said.file.parse().ok();
        let is_in_table = |table: &toml::Table| {
            let values = table.values().filter_map(toml::Value::as_table).flatten();
            let values = values.chain(table);
            values.into_iter().any(|(name, value)| names_file(name, &format!("{value:?}")))
        };
        (!is_elsewhere && !table.as_ref().is_some_and(is_in_table)).then_some(said)
    }

    /// Whether the canary is given only as a secret, so that it must not be shown.
    fn has_secret(&self) -> bool {
        let secrets = ["broker.url", "broker.password"];
        let is_secret = |name: &str| {
            let key = name.strip_prefix("DTC__").unwrap_or_default();
            secrets.contains(&key.to_lowercase().replace("__", ".").as_str())
        };
        let variables = self.variables.iter().filter(|(name, _)| is_secret(name));
        let flags = self.flags.iter().filter(|(flag, _)| secrets.contains(&FLAGS[*flag].0));
        let table: toml::Table = self.file.parse().unwrap_or_default();
        let broker = table.get("broker").and_then(toml::Value::as_table);
        let in_file = ["url", "password"].into_iter().filter_map(|key| broker?.get(key)?.as_str());
        let said_as_secrets = variables.map(|(_, value)| value.as_str());
        let said_as_secrets = said_as_secrets.chain(flags.map(|(_, value)| value.as_str()));
        let secret: usize = said_as_secrets.chain(in_file).map(secret_canaries).sum();
        let names = self.variables.iter().map(|(name, _)| name);
        let values = self.variables.iter().map(|(_, value)| value);
        let flags = self.flags.iter().map(|(_, value)| value);
        let said: usize =
            names.chain(values).chain(flags).chain([&self.file]).map(|it| canaries(it)).sum();
        secret > 0 && secret == said
    }

    fn load(&self) -> Result<dtc::config::Config, Complaints> {
        fs::write(&*OWN_FILE, &self.file).expect("a place for the file");
        let variables = self.variables.iter();
        let flag = |(index, value): &(usize, String)| {
            let (key, flag) = FLAGS[*index];
            ConfigFlag { key, flag, value: value.clone() }
        };
        let sources = ConfigSources {
            file: Some(OWN_FILE.clone()),
            environment: variables.map(|(name, value)| (name.into(), value.into())).collect(),
            flags: self.flags.iter().map(flag).collect(),
        };
        load(&sources)
    }
}

/// How often the canary is in parts of a URL that must not be shown.
fn secret_canaries(value: &str) -> usize {
    match value.parse::<Address>() {
        Ok(_) => passwords(value).map(canaries).sum(),
        Err(_) => canaries(value),
    }
}

fn canaries(text: &str) -> usize {
    text.matches(CANARY).count()
}

fn shown(read: &Result<dtc::config::Config, Complaints>) -> String {
    match read {
        Ok(config) => format!("{config}{config:?}"),
        Err(complaints) => format!("{complaints}{complaints:?}"),
    }
}

/// Each line without the comment that names its source; no value has a `#` before a quote.
fn without_sources(shown: &str) -> Vec<String> {
    let value = |line: &str| match line.rsplit_once(" # ") {
        Some((value, _)) if !line.starts_with('#') => value.to_owned(),
        _ => line.to_owned(),
    };
    shown.lines().map(value).collect()
}

/// The broker's address.
pub fn address(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    if text.contains(CANARY) {
        return;
    }
    let read: Result<Address, _> = text.parse();
    match read {
        Ok(address) => {
            let with_password = address.clone().with_password(CANARY);
            for address in [address, with_password] {
                let public = address.to_string();
                let shown = format!("{public} {address:?} {}", address.masked());
                assert!(!shown.contains(CANARY), "{shown}");
                is_one_line(&shown);
                // Those that are recognisable, and occur nowhere else.
                let is_telling = |it: &&str| it.len() >= 8 && text.matches(*it).count() == 1;
                for password in passwords(text).filter(is_telling) {
                    assert!(!shown.contains(password), "{password} in {shown}");
                }
                // A shown address is parsed to one that is shown alike.
                let again = address.masked().parse().map(|it: Address| it.masked());
                assert_eq!(again, Ok(address.masked()));
            }
        }
        Err(error) => {
            let error = error.to_string();
            assert!(error.len() <= 200, "{error}");
            is_one_line(&error);
        }
    }
}

/// The text between `:` and `@`.
fn passwords(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').filter_map(|part| {
        let (_, rest) = part.split_once("://")?;
        let authority = rest.split(['/', '?', '#']).next()?;
        Some(authority.rsplit_once('@')?.0.split_once(':')?.1)
    })
}

/// Names, ids and durations.
pub fn names(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    const WORD: &str = "_-";
    is_name(text, 128, "._:-", TransactionId::parse(text));
    is_name(text, 64, WORD, ServiceName::parse(text));
    is_name(text, 64, WORD, InstanceId::parse(text));
    is_name(text, 64, WORD, WorkerId::parse(text));
    is_name(text, 64, WORD, ReplyToken::parse(text));
    is_name(text, 64, "._-", Namespace::parse(text));
    match Branch::parse(text) {
        Ok(branch) => {
            assert_eq!(branch.to_string(), text);
            assert_eq!(Branch::of(branch.instance(), branch.number()), branch);
        }
        Err(error) => is_short(&error),
    }
    match duration::parse(text) {
        Ok(duration) => {
            let again = duration::parse(&format!("{}ms", duration.as_millis()));
            assert_eq!(again, Ok(duration), "{text}");
        }
        Err(rule) => assert!((1..=200).contains(&rule.len())),
    }
    assert!(Kind::parse_type(text).is_none_or(|kind| kind.as_type() == text));
}

fn is_name<T: Display + Debug>(
    text: &str,
    max: usize,
    extra: &str,
    parsed: Result<T, InvalidName>,
) {
    let is_allowed = |it: char| it.is_ascii_alphanumeric() || extra.contains(it);
    let is_valid = (1..=max).contains(&text.len()) && text.chars().all(is_allowed);
    match parsed {
        Ok(name) => assert!(is_valid && name.to_string() == text, "{text:?}"),
        Err(error) => {
            assert!(!is_valid, "{text:?}");
            is_short(&error);
        }
    }
}

fn is_short(error: &InvalidName) {
    let error = error.to_string();
    assert!(error.len() <= 1024, "{error}");
    is_one_line(&error);
}
