//! What programs see of this crate: the names at the end of `src/lib.rs`, and nothing that these don't
//! promise.
//!
//! It reads lines, not Rust; comments are skipped. Of a name that is shown it looks at every signature
//! that is documented: public fields, variants, functions of its own, functions of a trait.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Types of others that signatures may name: of the standard library, and of crates whose versions
/// a program shares with us anyway.
const OF_OTHERS: [&str; 29] = [
    "Arc",
    "Box",
    "Debug",
    "DeserializeOwned",
    "Display",
    "Duration",
    "Error",
    "Fn",
    "Future",
    "Into",
    "IntoIterator",
    "Item",
    "Iterator",
    "None",
    "Option",
    "Ordering",
    "Output",
    "Path",
    "PathBuf",
    "Receiver",
    "Result",
    "Self",
    "Send",
    "Some",
    "String",
    "Sync",
    "Sized",
    "Value",
    "Vec",
];

/// What would tie programs to what moves messages, or to how they are written.
const NOT_SHOWN: [&str; 9] = [
    "amqp",
    "async_rs",
    "deadpool",
    "lapin",
    "protocol",
    "rustls",
    "rustls_connector",
    "transport",
    "wire",
];

/// The one enum that will never have another variant: a transaction commits or aborts.
const CLOSED: &str = "Outcome";

#[test]
fn modules_are_hidden_and_what_is_shown_is_named_one_by_one() {
    let text = library();
    let lines: Vec<_> = text.lines().collect();
    let shown = lines
        .windows(2)
        .filter(|pair| pair[1].starts_with("pub mod ") && pair[0] != "#[doc(hidden)]");
    let shown: Vec<_> = shown.map(|pair| pair[1]).collect();
    assert_eq!(shown, [""; 0], "these modules are shown");
    let names = face();
    assert!(names.contains_key("Client") && names.contains_key("run"), "{names:?}");
    assert!(!names.contains_key("*"), "something is shown without being named");
    assert!(names.len() <= 60, "the face has grown to {} names", names.len());
}

#[test]
fn no_signature_that_is_shown_names_what_is_not() {
    let (sources, names) = (sources(), face());
    let mut complaints = Vec::new();
    for (name, module) in &names {
        // What a module hands on is defined elsewhere.
        let own = [format!("src/{module}/"), format!("src/{module}.rs")];
        let is_own = |path: &str| own.iter().any(|own| path.contains(own));
        let (at_home, elsewhere): (Vec<_>, Vec<_>) =
            sources.iter().cloned().partition(|(path, _)| is_own(path));
        let mut signatures = signatures(&at_home, name);
        if signatures.is_empty() {
            signatures = self::signatures(&elsewhere, name);
        }
        signatures.extend(setters(&sources, name));
        assert!(!signatures.is_empty(), "`{name}` is not found in src");
        for signature in signatures {
            let unknown = unknown_in(&signature, &names);
            complaints.extend(unknown.map(|word| format!("{name}: `{word}` in `{signature}`")));
        }
    }
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn what_may_grow_can_grow_without_breaking_programs() {
    let (sources, mut complaints) = (sources(), Vec::new());
    for (name, module) in face().iter().filter(|(name, _)| name.as_str() != CLOSED) {
        for (path, text) in &sources {
            let code = without_comments(text);
            let Some(at) = word_after(&code, "\npub enum ", name) else { continue };
            let attributes = code[..at].trim_end().rsplit("\n\n").next().unwrap();
            // A transport's error of the same name is hidden.
            let is_hidden = module == "client" && !path.contains("src/client");
            if !is_hidden && !attributes.contains("#[non_exhaustive]") {
                complaints.push(format!("{path}: `{name}` is not #[non_exhaustive]"));
            }
        }
    }
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn what_must_not_be_shown_is_noticed() {
    let file = |text: &str| vec![("src/a.rs".to_owned(), text.to_owned())];
    let names = BTreeMap::from([("Shown".to_owned(), "a".to_owned())]);
    let noticed = |text: &str| -> Vec<String> {
        let signatures = signatures(&file(text), "Shown");
        signatures.iter().flat_map(|it| unknown_in(it, &names).collect::<Vec<_>>()).collect()
    };
    assert_eq!(noticed("pub struct Shown {\n    pub a: Vec<Hidden>,\n    b: Own,\n}"), ["Hidden"]);
    assert_eq!(noticed("pub enum Shown {\n    /// Hidden.\n    A(lapin::Error),\n}"), ["lapin"]);
    assert_eq!(noticed("pub type Shown = wire::Body;"), ["wire", "Body"]);
    assert_eq!(noticed("pub trait Shown: Send {\n    fn f(&self) -> Hidden;\n}"), ["Hidden"]);
    let functions = "pub struct Shown(Own);\nimpl Shown {\n    pub fn f<T: Into<Hidden>>(\n        \
                     it: T,\n    ) -> Self {\n        Own::of(it)\n    }\n    fn g(it: Own) {}\n    \
                     pub(crate) fn h(it: Own) {}\n}\nimpl From<Own> for Shown {}";
    assert_eq!(noticed(functions), ["Hidden"]);
    let generic = "pub struct Shown<P> { p: P }\nimpl<P: Own> Shown<P> {\n    pub fn f(x: P) {}\n}";
    assert_eq!(noticed(generic), ["Own"]);
}

/// Words of `signature` that a program doesn't know from here.
fn unknown_in(signature: &str, names: &BTreeMap<String, String>) -> impl Iterator<Item = String> {
    let is_part = |it: char| it.is_alphanumeric() || it == '_';
    let words = signature.split(|it| !is_part(it)).filter(|word| !word.is_empty());
    let is_parameter =
        |word: &str| word.len() <= 3 && word.chars().all(|it| it.is_uppercase()) || word == "Fut";
    let unknown: Vec<_> = words
        .filter(|word| match word.chars().next().is_some_and(char::is_uppercase) {
            true => {
                let is_constant = word.len() > 3 && !word.chars().any(char::is_lowercase);
                let known = OF_OTHERS.contains(word) || names.contains_key(*word);
                !known && !is_constant && !is_parameter(word)
            }
            false => NOT_SHOWN.contains(word),
        })
        .map(str::to_owned)
        .collect();
    unknown.into_iter()
}

/// The documented signatures of what is called `name`.
fn signatures(sources: &[(String, String)], name: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (path, text) in sources {
        let code = without_comments(text);
        for kind in ["struct", "enum", "trait", "type", "fn", "async fn"] {
            let Some(at) = word_after(&code, &format!("\npub {kind} "), name) else { continue };
            match kind {
                "struct" => found.extend(fields(item(&code[at..]))),
                "enum" => found.extend(variants(item(&code[at..]), name)),
                "trait" => found.extend(functions(item(&code[at..]), "fn ")),
                _ => found.push(signature(&code[at..])),
            }
            found.extend(of_impls(&code, name));
        }
        // The names of things are made by one macro, whose functions take and give text.
        if path.ends_with("protocol/ids.rs") && code.contains(&format!("\n    {name}(")) {
            found.push(format!("struct {name}(String);"));
        }
    }
    found
}

/// What all builders have is written once.
fn setters(sources: &[(String, String)], name: &str) -> Vec<String> {
    if !name.ends_with("Builder") {
        return Vec::new();
    }
    let (_, options) = sources.iter().find(|(path, _)| path.ends_with("amqp/options.rs")).unwrap();
    let code = without_comments(options);
    let (_, setters) = code.split_once("macro_rules! broker_setters").unwrap();
    let found = functions(setters, "pub fn ");
    assert!(found.len() >= 5, "{found:?}");
    found
}

/// Where `name` stands behind `before`, as a whole word.
fn word_after(code: &str, before: &str, name: &str) -> Option<usize> {
    let code_with_start = format!("\n{code}");
    let is_end = |it: char| !(it.is_alphanumeric() || it == '_');
    code_with_start
        .match_indices(&format!("{before}{name}"))
        .find(|(at, found)| code_with_start[at + found.len()..].starts_with(is_end))
        .map(|(at, _)| at)
}

/// The item that `code` begins with: up to the end of its braces, or to its semicolon.
fn item(code: &str) -> &str {
    let mut depth = 0;
    for (at, character) in code.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 1 => return &code[..=at],
            '}' => depth -= 1,
            ';' if depth == 0 => return &code[..=at],
            _ => {}
        }
    }
    code
}

/// A signature without what it does.
fn signature(code: &str) -> String {
    let end = code.find([';', '{']).unwrap_or(code.len());
    code[..end].split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The head of a struct, and its public fields.
fn fields(item: &str) -> Vec<String> {
    let head = item.lines().find(|line| line.contains("struct ")).unwrap();
    let is_tuple = head.ends_with(");");
    let mut found = vec![if is_tuple && !head.contains("(pub ") {
        head.split('(').next().unwrap().to_owned()
    } else {
        head.split('{').next().unwrap().to_owned()
    }];
    let public = item.lines().map(str::trim).filter(|line| line.starts_with("pub "));
    found.extend(public.filter(|line| !line.contains("struct ")).map(str::to_owned));
    found
}

/// What an enum's variants have. The names of the variants are the enum's own.
fn variants(item: &str, name: &str) -> Vec<String> {
    let body = item.split_once('{').unwrap().1;
    let mut found = vec![format!("enum {name}")];
    for line in body.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        let rest = match line.split_once(['(', ':']) {
            // `Invalid(#[from] InvalidSetting),` or `source: BrokerError,`
            Some((_, rest)) => rest.trim_start_matches("#[from]").trim_start_matches("#[source]"),
            None => continue,
        };
        found.push(rest.to_owned());
    }
    found
}

/// The signatures in `code` that begin with `keyword`.
fn functions(code: &str, keyword: &str) -> Vec<String> {
    let starts = code.match_indices(keyword).filter(|(at, _)| {
        let before = code[..*at].rsplit('\n').next().unwrap();
        before.trim().is_empty()
    });
    // What a constant is doesn't matter.
    let without_value = |it: String| it.split(" = ").next().unwrap().to_owned();
    starts.map(|(at, _)| without_value(signature(&code[at..]))).collect()
}

/// The heads of the inherent `impl`s of `name`, and the public functions there.
fn of_impls(code: &str, name: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("\nimpl") {
        let whole = item(&code[at + 1..]);
        let head = signature(whole);
        let is_own = !head.contains(" for ")
            && (head.ends_with(&format!(" {name}")) || head.contains(&format!(" {name}<")));
        if is_own {
            found.push(head);
            for keyword in ["pub fn ", "pub async fn ", "pub const "] {
                found.extend(functions(whole, keyword));
            }
        }
    }
    found
}

/// The names that `src/lib.rs` ends with, and the module of the root that each is taken from.
fn face() -> BTreeMap<String, String> {
    let text = library();
    let (_, face) = text.split_once("// ---- The face ---").expect("a section `The face`");
    let code: String = without_comments(face).split_whitespace().collect::<Vec<_>>().join(" ");
    let mut names = BTreeMap::new();
    for used in code.split("pub use crate::").skip(1) {
        let used = used.split(';').next().unwrap().trim();
        // `{a::b, c::{d, e}}` has several modules, `a::{b, c}` has one.
        let trees = match used.strip_prefix('{').and_then(|it| it.strip_suffix('}')) {
            Some(several) => at_top(several),
            None => vec![used],
        };
        for tree in trees.iter().map(|tree| tree.trim()).filter(|tree| !tree.is_empty()) {
            let (module, rest) = tree.split_once("::").unwrap();
            for part in rest.split([',', '{', '}']) {
                let name = part.trim().rsplit("::").next().unwrap().trim();
                if !name.is_empty() {
                    names.insert(name.to_owned(), module.to_owned());
                }
            }
        }
    }
    names
}

/// Splits at the commas that stand in no braces.
fn at_top(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (at, character) in text.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn library() -> String {
    fs::read_to_string(root().join("src/lib.rs")).unwrap()
}

fn without_comments(text: &str) -> String {
    let without_comment = |line: &str| line.split("//").next().unwrap().trim_end().to_owned();
    text.lines().map(without_comment).collect::<Vec<_>>().join("\n")
}

fn sources() -> Vec<(String, String)> {
    let mut directories = vec![root().join("src")];
    let mut found = Vec::new();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                let text = fs::read_to_string(&path).unwrap();
                let shipped = text.split("#[cfg(test)]\nmod tests").next().unwrap().to_owned();
                found.push((path.to_str().unwrap().to_owned(), shipped));
            }
        }
    }
    found
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}
