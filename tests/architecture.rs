//! What the code deliberately doesn't contain: floors that import upwards, words that have no place
//! in the protocol, left-overs.
//!
//! It reads lines, not Rust; comments are skipped.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The stairs, ground floor first. Who stands on one step knows only the steps below it.
const FLOORS: [&[&str]; 7] = [
    &["protocol"],
    &["clock", "error"],
    &["wire"],
    &["transport"],
    &["worker", "participant", "client"],
    &["embedded"],
    &["cli", "main"],
];

/// What stands beside the stairs, and on which step one must be to use it.
const BESIDE: [&str; 1] = ["config"];
const TOP: usize = FLOORS.len() - 1;

/// What would let the world into the protocol: a runtime, a broker, a format, a log, a clock,
/// chance, or an order that differs from run to run.
///
/// [`HIDES_ITS_TABLE`] may name a hash table, since it lets nobody see its order.
const BANNED_IN_PROTOCOL: [&str; 10] = [
    "tokio",
    "lapin",
    "serde",
    "tracing",
    "async ",
    "Instant::now",
    "SystemTime",
    "rand",
    "HashMap",
    "HashSet",
];

const HIDES_ITS_TABLE: &str = "src/protocol/keymap.rs";

#[test]
fn no_floor_imports_from_a_higher_one() {
    let mut complaints = Vec::new();
    for file in source_files() {
        let Some(own) = floor_of(&file.module) else { continue };
        for (number, line) in file.code() {
            for imported in crate_paths(line) {
                let is_above = match floor_of(imported) {
                    Some(floor) => floor > own,
                    None => BESIDE.contains(&imported) && own < TOP,
                };
                if is_above {
                    complaints.push(format!("{}:{number}: imports {imported}", file.path));
                }
            }
        }
    }
    assert_none(&complaints);
}

#[test]
fn every_module_has_its_floor() {
    let mut complaints = Vec::new();
    for file in source_files().iter().filter(|file| file.module != "lib") {
        if floor_of(&file.module).is_none() && !BESIDE.contains(&file.module.as_str()) {
            complaints.push(format!("{}: on which floor is {}?", file.path, file.module));
        }
    }
    assert_none(&complaints);
}

#[test]
fn the_protocol_knows_no_runtime_clock_or_chance() {
    let mut complaints = Vec::new();
    for file in source_files().iter().filter(|file| file.module == "protocol") {
        for (number, line) in file.code() {
            for banned in BANNED_IN_PROTOCOL.iter().filter(|word| has_word(line, word)) {
                if file.path == HIDES_ITS_TABLE && *banned == "HashMap" {
                    continue;
                }
                complaints.push(format!("{}:{number}: mentions `{}`", file.path, banned.trim()));
            }
        }
    }
    assert_none(&complaints);
}

#[test]
fn every_file_says_what_it_is_for() {
    let is_silent = |file: &&File| !file.text.starts_with("//!");
    let files = [source_files(), test_files()].concat();
    let silent: Vec<_> = files.iter().filter(is_silent).map(|file| file.path.clone()).collect();
    assert_none(&silent);
}

#[test]
fn nothing_is_left_over() {
    let macros = ["todo", "unimplemented", "dbg"].map(|name| format!("{name}!"));
    let attributes = ["ignore", "should_panic"].map(|name| format!("#[{name}"));
    let mut complaints = Vec::new();
    for file in [source_files(), test_files()].concat() {
        for (number, line) in file.code() {
            for leftover in macros.iter().chain(&attributes).filter(|it| line.contains(*it)) {
                complaints.push(format!("{}:{number}: `{leftover}`", file.path));
            }
        }
        // A note to oneself is a comment, so comments count here.
        let note = ["FIX", "ME"].concat();
        for (number, _) in file.lines().filter(|(_, line)| line.contains(&note)) {
            complaints.push(format!("{}:{number}: `{note}`", file.path));
        }
    }
    assert_none(&complaints);
}

#[test]
fn every_relaxed_lint_has_its_reason() {
    let opening = ["#[allow(", "#![allow(", "#[expect(", "#![expect("];
    let mut complaints = Vec::new();
    for file in [source_files(), test_files()].concat() {
        for (number, line) in file.code() {
            if !opening.iter().any(|it| line.trim_start().starts_with(it)) {
                continue;
            }
            // An attribute may span lines; it ends at the first `)]`.
            let rest: String = file.text.lines().skip(number - 1).collect::<Vec<_>>().join("\n");
            let attribute = rest.split(")]").next().unwrap_or(&rest);
            if !attribute.contains("reason = ") {
                complaints.push(format!("{}:{number}: gives no reason", file.path));
            }
        }
    }
    assert_none(&complaints);
}

#[test]
fn the_code_map_names_every_directory() {
    let readme = fs::read_to_string(root().join("README.md")).expect("a README.md");
    let (_, after) = readme.split_once("\n## Code map\n").expect("a section `## Code map`");
    let map = after.split("\n## ").next().unwrap();
    let mut directories: Vec<String> = source_files()
        .iter()
        .filter_map(|file| Some(Path::new(&file.path).parent()?.to_str()?.to_owned()))
        .filter(|directory| directory != "src")
        .collect();
    directories.dedup();
    directories.retain(|directory| !map.contains(directory.as_str()));
    assert_none(&directories);
}

#[test]
fn imports_are_seen_however_they_are_written() {
    for (line, imported) in [
        ("use crate::wire::Body;", vec!["wire"]),
        ("    let it = crate::cli::run();", vec!["cli"]),
        ("use crate::{ids::{Branch, InstanceId}, wire::Body};", vec!["ids", "wire"]),
        ("use dtc::{worker, wire::Body};", vec!["worker", "wire"]),
        ("    worker::{", vec!["worker"]),
        ("    transport::{embedded::Broker, Port},", vec!["transport"]),
        ("let worker = 1;", vec![]),
    ] {
        assert_eq!(crate_paths(line), imported, "{line}");
    }
    assert!(has_word("use rand::Rng;", "rand") && !has_word("let operand = 1;", "rand"));
}

#[derive(Clone)]
struct File {
    /// From the root of the repository.
    path: String,
    /// The first step below `src`: `protocol` for `src/protocol/ids.rs`, `main` for `src/main.rs`.
    module: String,
    text: String,
}

impl File {
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(index, line)| (index + 1, line))
    }

    /// Its lines without those that are comments.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.lines().filter(|(_, line)| !line.trim_start().starts_with("//"))
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn source_files() -> Vec<File> {
    let files = rust_files("src");
    assert!(files.len() > 10, "src was read");
    files
}

fn test_files() -> Vec<File> {
    rust_files("tests")
}

fn rust_files(directory: &str) -> Vec<File> {
    let mut files = Vec::new();
    let mut directories = vec![root().join(directory)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    let read = |path: PathBuf| {
        let relative = path.strip_prefix(root()).unwrap();
        let module = relative.components().nth(1).unwrap().as_os_str().to_str().unwrap();
        File {
            path: relative.to_str().unwrap().to_owned(),
            module: module.trim_end_matches(".rs").to_owned(),
            text: fs::read_to_string(&path).unwrap(),
        }
    };
    files.into_iter().map(read).collect()
}

fn floor_of(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

/// The modules that a line names by a path from the crate's root.
fn crate_paths(line: &str) -> Vec<&str> {
    let paths = ["crate::", "dtc::"].into_iter().flat_map(|root| line.split(root).skip(1));
    paths.flat_map(names_at_root).chain(grouped(line).map(first_name)).collect()
}

/// `ids` of `ids::Branch`; `ids` and `time` of `{ids::{Branch, InstanceId}, time::Time}`.
fn names_at_root(path: &str) -> Vec<&str> {
    let Some(group) = path.strip_prefix('{') else { return vec![first_name(path)] };
    let mut depth = 0;
    let at_root = |character: char| {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        character == ',' && depth == 0
    };
    group.split(at_root).map(|path| first_name(path.trim())).collect()
}

/// Where rustfmt has broken `use crate::{…}` over lines, each module begins one: `    ids::{`.
fn grouped(line: &str) -> Option<&str> {
    let inner = line.strip_prefix("    ").filter(|rest| !rest.starts_with(' '))?;
    let is_import = inner.contains("::") && (inner.ends_with('{') || inner.ends_with(','));
    is_import.then_some(inner)
}

fn first_name(path: &str) -> &str {
    path.split(|character: char| !(character.is_alphanumeric() || character == '_')).next().unwrap()
}

/// Whether `word` occurs in `line` and doesn't merely end or begin another word.
fn has_word(line: &str, word: &str) -> bool {
    let is_part = |character: char| character.is_alphanumeric() || character == '_';
    line.match_indices(word).any(|(at, _)| {
        let (before, after) =
            (line[..at].chars().next_back(), line[at + word.len()..].chars().next());
        !before.is_some_and(is_part) && (word.ends_with(' ') || !after.is_some_and(is_part))
    })
}

fn assert_none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}
