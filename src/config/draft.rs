//! The values of all configuration layers, with their sources, before they are checked.
//!
//! The layers are merged key by key. The section that knows a key's rule then takes the key out;
//! keys that are left over in the end are unknown. So one pass finds every error, where parsing
//! into a struct, as the crates config and figment do it, would stop at the first.
//!
//! Values of secrets and of unknown keys never get into a complaint.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    io::Read as _,
    path::Path,
};

use ::config::{Environment, File, FileFormat, Map, Source as _, Value, ValueKind};

use crate::{
    complaint::{Complaint, Location, ValueSource},
    config::{ConfigFlag, ConfigSources, spelling},
};

/// The defaults, as a file.
pub(super) const DEFAULTS: &str = include_str!("../../deploy/dtc.toml");

/// Keys whose value may be read from a separate file, which `<key>_file` names.
pub(super) const SECRETS: [&str; 2] = ["broker.url", "broker.password"];

/// The size limit of a secret's file: a larger one was named by mistake.
const SECRET_BYTES_MAX: u64 = 64 * 1024;

const PREFIX: &str = "DTC__";

#[derive(Debug)]
pub(super) struct Draft {
    values: BTreeMap<String, RawValue>,
    /// The services that have a section, and its source.
    services: BTreeMap<String, ValueSource>,
    /// Variables that look like ours but have another name, such as `DTC_BROKER_URL`.
    lookalikes: Vec<String>,
    pub(super) complaints: Vec<Complaint>,
    /// The keys that were taken, in that order.
    pub(super) entries: Vec<ResolvedKey>,
    /// The existing keys, as far as they were asked for.
    known: BTreeSet<String>,
}

/// A value as it was given.
struct RawValue {
    /// `None`: it is a table or an array.
    text: Option<String>,
    source: ValueSource,
}

/// The value may be a password.
impl std::fmt::Debug for RawValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RawValue").field("source", &self.source).finish_non_exhaustive()
    }
}

/// A key that was taken, for the output of `dtc config`.
#[derive(Clone, Debug)]
pub(super) struct ResolvedKey {
    pub(super) key: String,
    /// Its value as TOML, with a secret masked, and the source. `None`: it is not set.
    pub(super) value: Option<(String, ValueSource)>,
    /// What the value means in this configuration, if it depends on other keys.
    pub(super) meaning: Option<String>,
}

/// The values of one layer.
type Layer = Vec<(String, RawValue)>;

impl Draft {
    pub(super) fn of(sources: &ConfigSources) -> Self {
        let mut draft = Self {
            values: BTreeMap::new(),
            services: BTreeMap::new(),
            lookalikes: Vec::new(),
            complaints: Vec::new(),
            entries: Vec::new(),
            known: BTreeSet::new(),
        };
        draft.merge_file(DEFAULTS, &ValueSource::Default);
        if let Some(path) = &sources.file {
            let source = ValueSource::File(path.display().to_string());
            match fs::read_to_string(path) {
                Ok(text) => draft.merge_file(&text, &source),
                Err(error) => draft.complain("", source, format!("can't be read: {error}")),
            }
        }
        draft.merge_environment(&sources.environment);
        draft.merge_flags(&sources.flags);
        draft
    }

    fn merge_file(&mut self, text: &str, source: &ValueSource) {
        match File::from_str(text, FileFormat::Toml).collect() {
            Ok(values) => {
                let mut layer = Layer::new();
                for (key, value) in sorted(values) {
                    self.flatten(key, value, source, &mut layer);
                }
                self.merge(layer);
            }
            Err(error) => {
                // The rest of the parser's message quotes the line, which may hold a password.
                let text = error.to_string();
                let place = text.lines().find_map(|line| line.split_once(" at line "));
                let place = place.map(|(_, place)| place.split(" in ").next().unwrap_or(place));
                let rule = match place {
                    Some(place) => format!("is not TOML, at line {}", place.trim()),
                    None => "is not TOML".to_owned(),
                };
                self.complain("", source.clone(), rule);
            }
        }
    }

    /// Adds the values in `value` to `layer`, each under its full key.
    fn flatten(&mut self, key: String, value: Value, source: &ValueSource, layer: &mut Layer) {
        let text = match value.kind {
            ValueKind::Table(table) => {
                if let Some(name) = key.strip_prefix("services.") {
                    self.services.insert(name.to_owned(), source.clone());
                }
                for (name, value) in sorted(table) {
                    self.flatten(format!("{key}.{name}"), value, source, layer);
                }
                return;
            }
            ValueKind::String(text) => Some(text),
            ValueKind::Boolean(value) => Some(value.to_string()),
            ValueKind::I64(number) => Some(number.to_string()),
            ValueKind::I128(number) => Some(number.to_string()),
            ValueKind::U64(number) => Some(number.to_string()),
            ValueKind::U128(number) => Some(number.to_string()),
            ValueKind::Float(number) => Some(number.to_string()),
            ValueKind::Array(_) | ValueKind::Nil => None,
        };
        layer.push((key, RawValue { text, source: source.clone() }));
    }

    fn merge_environment(&mut self, variables: &[(OsString, OsString)]) {
        let mut ours = Map::new();
        for (name, value) in variables {
            let name = name.to_string_lossy();
            if !name.starts_with(PREFIX) {
                if spelling::begins_alike(&name) && !value.is_empty() {
                    self.lookalikes.push(name.into_owned());
                }
                continue;
            }
            let source = ValueSource::Variable(name.to_string());
            let key = name.to_lowercase().replacen(&PREFIX.to_lowercase(), "", 1);
            let key = key.replace("__", ".");
            match value.to_str() {
                _ if name.to_uppercase() != name => {
                    self.complain(&key, source, "must be written in upper case".to_owned());
                }
                _ if key.starts_with("services.") => {
                    let rule = "services are set in a file only".to_owned();
                    self.complain(&key, source, rule);
                }
                None => self.complain(&key, source, "must be UTF-8".to_owned()),
                Some(value) => {
                    ours.insert(name.into_owned(), value.to_owned());
                }
            }
        }
        let environment = Environment::with_prefix("DTC")
            .prefix_separator("__")
            .separator("__")
            .ignore_empty(true)
            .source(Some(ours));
        match environment.collect() {
            Ok(values) => {
                let mut layer = Layer::new();
                for (key, value) in sorted(values) {
                    let source = ValueSource::Variable(variable(&key));
                    self.flatten(key, value, &source, &mut layer);
                }
                self.merge(layer);
            }
            Err(_) => {
                let source = ValueSource::Variable(format!("{PREFIX}…"));
                self.complain("", source, "can't be read".to_owned());
            }
        }
    }

    fn merge_flags(&mut self, flags: &[ConfigFlag]) {
        let raw = |flag: &ConfigFlag| {
            let source = ValueSource::Flag(flag.flag.to_owned());
            (flag.key.to_owned(), RawValue { text: Some(flag.value.clone()), source })
        };
        self.merge(flags.iter().map(raw).collect());
    }

    /// Merges one layer over all earlier ones.
    fn merge(&mut self, layer: Layer) {
        for secret in SECRETS {
            let file = format!("{secret}_file");
            let direct = layer.iter().find(|(key, _)| key == secret);
            let by_file = layer.iter().find(|(key, _)| *key == file);
            if let (Some((_, direct)), Some(_)) = (direct, by_file) {
                let rule = format!("can't be set where `{file}` is");
                self.complain(secret, direct.source.clone(), rule);
            }
            if direct.or(by_file).is_some() {
                self.values.remove(secret);
                self.values.remove(&file);
            }
        }
        self.values.extend(layer);
    }

    pub(super) fn complain(&mut self, key: &str, source: ValueSource, rule: String) {
        self.complain_of(key, None, source, rule);
    }

    /// Complains about a value that is not secret.
    fn complain_of(&mut self, key: &str, value: Option<String>, source: ValueSource, rule: String) {
        let location = Location::Key { key: key.to_owned(), source };
        self.complaints.push(Complaint { location, value, rule });
    }

    /// Takes a key that must have a value; `None` after a complaint.
    pub(super) fn required<T>(
        &mut self,
        key: &str,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let n_complaints = self.complaints.len();
        let value = self.optional(key, read)?;
        if value.is_none() && self.complaints.len() == n_complaints {
            self.complain(key, ValueSource::Default, "must be set".to_owned());
        }
        value
    }

    /// Takes a key that may have a value; `None` after a complaint.
    pub(super) fn optional<T>(
        &mut self,
        key: &str,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Option<T>> {
        self.known.insert(key.to_owned());
        let Some(RawValue { text, source }) = self.values.remove(key) else {
            self.entries.push(ResolvedKey { key: key.to_owned(), value: None, meaning: None });
            return Some(None);
        };
        let Some(text) = text else {
            self.complain(key, source, "must be a single value".to_owned());
            return None;
        };
        match read(&text) {
            Ok(value) => {
                let shown = if is_number(&text) { text } else { quoted(&text) };
                self.show(key, shown, source);
                Some(Some(value))
            }
            Err(rule) => {
                self.complain_of(key, Some(text), source, rule);
                None
            }
        }
    }

    /// Takes the path of a file; `None` after a complaint.
    ///
    /// If the value is the file's content instead, it may be a secret, and is not shown.
    pub(super) fn file<T>(
        &mut self,
        key: &str,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Option<T>> {
        let is_content = |raw: &RawValue| raw.text.as_deref().is_some_and(is_pem);
        if self.values.get(key).is_some_and(is_content) {
            let source = self.values.remove(key).map_or(ValueSource::Default, |raw| raw.source);
            let rule = "must be the path of a file, not what is in it".to_owned();
            self.complain(key, source, rule);
            return None;
        }
        self.optional(key, read)
    }

    /// Complains about a key that was taken, because of the values of other keys.
    pub(super) fn refuse(&mut self, key: &str, value: Option<String>, rule: &str) {
        let entry = self.entries.iter().find(|entry| entry.key == key);
        let source = entry.and_then(|entry| entry.value.as_ref()).map(|(_, source)| source.clone());
        let source = source.unwrap_or(ValueSource::Default);
        self.complain_of(key, value, source, rule.to_owned());
    }

    fn show(&mut self, key: &str, shown: String, source: ValueSource) {
        let (key, value) = (key.to_owned(), Some((shown, source)));
        self.entries.push(ResolvedKey { key, value, meaning: None });
    }

    /// Records what the value of a key that was taken means in this configuration.
    pub(super) fn explain(&mut self, key: &str, meaning: String) {
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.key == key) {
            entry.meaning = Some(meaning);
        }
    }

    /// Takes a secret, set directly or by a file; `None` after a complaint.
    pub(super) fn secret<T>(
        &mut self,
        key: &str,
        read: impl Fn(&str) -> Result<T, String>,
        mask: impl Fn(&T) -> String,
    ) -> Option<Option<T>> {
        let file = format!("{key}_file");
        self.known.extend([key.to_owned(), file.clone()]);
        let (direct, by_file) = (self.values.remove(key), self.values.remove(&file));
        let is_by_file = direct.is_none();
        let Some(RawValue { text, source }) = direct.or(by_file) else {
            self.entries.push(ResolvedKey { key: key.to_owned(), value: None, meaning: None });
            return Some(None);
        };
        let Some(text) = text else {
            self.complain(key, source, "must be a single value".to_owned());
            return None;
        };
        let (text, source) = if is_by_file {
            match secret_in(Path::new(&text)) {
                Ok(secret) => {
                    (secret, ValueSource::SecretFile { path: text, named_by: Box::new(source) })
                }
                Err(rule) => {
                    self.complain_of(&file, Some(text), source, rule);
                    return None;
                }
            }
        } else {
            (text, source)
        };
        match read(&text) {
            Ok(value) => {
                self.show(key, quoted(&mask(&value)), source);
                Some(Some(value))
            }
            Err(rule) => {
                self.complain(key, source, rule);
                None
            }
        }
    }

    /// Takes the services that have a section, with its source.
    pub(super) fn take_services(&mut self) -> BTreeMap<String, ValueSource> {
        std::mem::take(&mut self.services)
    }

    /// Drops the values of a section that has been complained about.
    pub(super) fn forget(&mut self, section: &str) {
        let prefix = format!("{section}.");
        self.values.retain(|key, _| !key.starts_with(&prefix));
    }

    /// Complains about every key that nobody has taken, and suggests existing ones.
    ///
    /// A variable that differs from one of ours only in underscores or case would have no effect,
    /// and the default would apply silently. It is no error if the key is set otherwise: the
    /// variable may be another program's.
    pub(super) fn refuse_unknown_keys(&mut self) {
        let keys: Vec<_> = std::mem::take(&mut self.known).into_iter().collect();
        for (key, raw) in std::mem::take(&mut self.values) {
            let is_variable = matches!(raw.source, ValueSource::Variable(_));
            let suggestions = spelling::suggestions(&key, &keys).into_iter();
            let suggestions = suggestions.map(|key| if is_variable { variable(&key) } else { key });
            let suggestions: Vec<_> = suggestions.map(|key| format!("`{key}`")).collect();
            let hint = match suggestions.is_empty() {
                true => "`dtc config --defaults` prints them all".to_owned(),
                false => format!("is {} meant?", suggestions.join(" or ")),
            };
            self.complain(&key, raw.source, format!("is no key of the configuration; {hint}"));
        }
        for name in std::mem::take(&mut self.lookalikes) {
            let Some(key) = keys.iter().find(|key| spelling::is_same(&name, &variable(key))) else {
                continue;
            };
            let ours = variable(key);
            let is_unset = self.entries.iter().any(|entry| {
                let source = entry.value.as_ref().map(|(_, source)| source);
                entry.key == *key && source.is_none_or(|source| *source == ValueSource::Default)
            });
            if is_unset {
                let rule = format!("is not a variable of dtc: the variable is called `{ours}`");
                self.complain(key, ValueSource::Variable(name), rule);
            }
        }
    }
}

fn sorted(values: Map<String, Value>) -> BTreeMap<String, Value> {
    values.into_iter().collect()
}

/// The variable that sets a key.
fn variable(key: &str) -> String {
    format!("{PREFIX}{}", key.to_uppercase().replace('.', "__"))
}

/// The content of a file, without the final line break that editors add.
fn secret_in(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    let file = fs::File::open(path).map_err(|error| format!("can't be read: {error}"))?;
    let mut limited = file.take(SECRET_BYTES_MAX + 1);
    limited.read_to_string(&mut text).map_err(|error| format!("can't be read: {error}"))?;
    if text.len() as u64 > SECRET_BYTES_MAX {
        return Err(format!("must name a file of at most {SECRET_BYTES_MAX} bytes"));
    }
    let text = text.trim_end_matches(['\r', '\n']);
    if text.is_empty() {
        return Err("must name a file that is not empty".to_owned());
    }
    Ok(text.to_owned())
}

fn is_pem(text: &str) -> bool {
    text.contains("-----BEGIN")
}

/// Whether it is a number, spelled as TOML would spell it.
fn is_number(text: &str) -> bool {
    text.parse().is_ok_and(|number: u32| number.to_string() == text)
}

/// A text as a TOML string.
fn quoted(text: &str) -> String {
    let escape = |character: char| match character {
        '"' | '\\' => format!("\\{character}"),
        control if control.is_control() => format!("\\u{:04X}", u32::from(control)),
        other => other.to_string(),
    };
    format!("\"{}\"", text.chars().map(escape).collect::<String>())
}
