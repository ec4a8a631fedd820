//! What the code must not contain: imports from a higher floor, words that don't belong in the
//! protocol, debugging code.
//!
//! It reads lines, not Rust; comments are skipped.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// The floors, from the ground up. A module imports only from lower floors; the rooms on one floor
/// do not import each other.
const FLOORS: [&[&str]; 8] = [
    &["protocol"],
    &["anomalies", "clock", "complaint", "error", "readiness", "setting", "shutdown", "unique"],
    &["json"],
    &["wire"],
    &["transport", "journal", "transaction"],
    &["worker", "participant", "client", "input"],
    &["embedded", "simulated"],
    &["cli", "main"],
];

/// Modules beside the floors, each with the lowest floor that may import it.
const BESIDE: [&str; 1] = ["config"];
const TOP: usize = FLOORS.len() - 1;

/// What would make the protocol impure: a runtime, a broker, a serialization format, a log, a
/// clock, randomness, or an iteration order that differs from run to run.
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

/// Type names that may occur twice: each room has its settings, and each of the two state machines
/// its events and effects. `Prepare` and `Finish` are messages of the protocol, and a service's
/// code gets what is in them under the same names.
const SHARED_NAMES: [&str; 5] = ["Settings", "Event", "Effect", "Prepare", "Finish"];

#[test]
fn no_floor_imports_from_a_higher_one() {
    let mut complaints = Vec::new();
    for file in source_files() {
        let Some(own) = floor_of(&file.module) else { continue };
        for (number, imported) in rooms_named(&file.text) {
            let is_above = match floor_of(&imported) {
                Some(floor) => floor > own,
                None => BESIDE.contains(&imported.as_str()) && own < TOP,
            };
            if is_above {
                complaints.push(format!("{}:{number}: imports {imported}", file.path));
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

/// A module and the file that declares it may import each other: the file collects its parts, and
/// they share its items. Any other two files that import each other are really one.
#[test]
fn no_two_files_import_each_other() {
    assert_none(&mutual_imports(&imports_of(&sources())));
}

#[test]
fn the_rooms_on_one_floor_do_not_import_each_other() {
    assert_none(&sideways_imports(&imports_of(&sources())));
}

#[test]
fn two_files_that_import_each_other_are_found() {
    let noticed = |files: &[(&str, &str)]| mutual_imports(&imports_of(&owned(files)));
    let pair = [
        (
            "src/wire/read.rs",
            "use crate::{\n    clock::Clock,\n    wire::{json::{self, Value}},\n};",
        ),
        ("src/wire/json.rs", "fn f() { crate::wire::read::g() }"),
        ("src/wire/mod.rs", "pub mod json;\npub mod read;"),
    ];
    assert_eq!(noticed(&pair), ["wire::json and wire::read import each other"]);
    let by_super = [("src/a/b.rs", "use super::c::D;"), ("src/a/c.rs", "use super::b::E;")];
    assert_eq!(noticed(&by_super), ["a::b and a::c import each other"]);
    let of_parent = [("src/a/mod.rs", "mod b;\nuse self::b::C;"), ("src/a/b.rs", "use super::D;")];
    assert_eq!(noticed(&of_parent), [""; 0]);
    let in_tests = [
        ("src/a.rs", "use crate::b::C;"),
        ("src/b.rs", "#[cfg(test)]\nmod tests { use crate::a::D; }"),
    ];
    assert_eq!(noticed(&in_tests), [""; 0]);
    let in_comment = [("src/a.rs", "use crate::b::C;"), ("src/b.rs", "// use crate::a::D;")];
    assert_eq!(noticed(&in_comment), [""; 0]);
}

#[test]
fn a_sideways_import_is_found() {
    let files = owned(&[
        ("src/worker/mod.rs", "use crate::protocol::ids::WorkerId;"),
        ("src/worker/outbox.rs", "use crate::participant::error::Error;"),
        ("src/client/results.rs", "fn f() { crate::worker::g() }"),
        ("src/participant/error.rs", "use crate::participant::calls::Call;"),
        ("src/participant/calls.rs", ""),
        ("src/protocol/ids.rs", ""),
        ("src/input/services.rs", "use crate::{protocol::ids::Id, participant::calls::Call};"),
        ("src/cli/run.rs", "use crate::{client::results::R, worker::run};"),
    ]);
    assert_eq!(
        sideways_imports(&imports_of(&files)),
        [
            "client::results imports worker",
            "input::services imports participant::calls",
            "worker::outbox imports participant::error",
        ]
    );
}

#[test]
fn the_protocol_uses_no_runtime_clock_or_randomness() {
    let mut complaints = Vec::new();
    for file in source_files().iter().filter(|file| file.module == "protocol") {
        for (number, line) in file.code() {
            for banned in BANNED_IN_PROTOCOL.iter().filter(|word| has_word(line, word)) {
                complaints.push(format!("{}:{number}: mentions `{}`", file.path, banned.trim()));
            }
        }
    }
    assert_none(&complaints);
}

#[test]
fn every_file_has_a_header() {
    let is_silent = |file: &&File| !file.text.starts_with("//!");
    let files = [source_files(), test_files()].concat();
    let silent: Vec<_> = files.iter().filter(is_silent).map(|file| file.path.clone()).collect();
    assert_none(&silent);
}

#[test]
fn no_debugging_or_unfinished_code_is_left() {
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
fn a_type_name_stands_for_one_thing() {
    let files = source_files();
    let files: Vec<_> = files.iter().map(|file| (file.path.as_str(), file.text.as_str())).collect();
    let twice = names_of_several_types(&files);
    let mut complaints = Vec::new();
    for (name, paths) in twice.iter().filter(|(name, _)| !SHARED_NAMES.contains(&name.as_str())) {
        let paths: Vec<_> = paths.iter().copied().collect();
        complaints.push(format!("`{name}` is a type in {}: rename one", paths.join(" and in ")));
    }
    for name in SHARED_NAMES {
        if !twice.contains_key(name) {
            complaints.push(format!("`{name}` is one type now: remove it from SHARED_NAMES"));
        }
    }
    assert_none(&complaints);
}

#[test]
fn a_type_name_that_stands_for_two_things_is_found() {
    let twice = names_of_several_types(&[
        (
            "src/a.rs",
            "pub struct Link<T> {}\n#[cfg(unix)]\nstruct Once;\n#[cfg(not(unix))]\nstruct Once;",
        ),
        (
            "src/b.rs",
            "// struct Once;\npub(in crate::b) enum Link {}\nimpl Link {\n    type Once = ();\n}",
        ),
        ("src/c.rs", "type Links = Vec<Link>;\ntrait Linked {}"),
    ]);
    let twice: Vec<_> = twice.into_iter().collect();
    assert_eq!(twice, [("Link".to_owned(), BTreeSet::from(["src/a.rs", "src/b.rs"]))]);
}

#[test]
fn the_code_map_names_every_directory() {
    let page = fs::read_to_string(root().join("docs/architecture.md")).expect("the page is there");
    let (_, after) = page.split_once("\n## Code map\n").expect("a section `## Code map`");
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
fn imports_are_found_however_they_are_written() {
    for (text, imported) in [
        ("use crate::wire::Body;", vec![(1, "wire")]),
        ("    let it = crate::cli::run();", vec![(1, "cli")]),
        (
            "use crate::{ids::{Branch, InstanceId}, wire::Body};",
            vec![(1, "ids"), (1, "ids"), (1, "wire")],
        ),
        ("use dtc::{worker, wire::Body};", vec![(1, "worker"), (1, "wire")]),
        (
            "//!\nuse crate::{\n    worker::{\n        a,\n    },\n    wire,\n};",
            vec![(2, "worker"), (2, "wire")],
        ),
        ("    use crate::{\n        a::B,\n    };", vec![(1, "a")]),
        ("use crate::protocol::{\n    wire::Body,\n};", vec![(1, "protocol")]),
        ("let worker = 1; // crate::cli", vec![]),
    ] {
        let found = rooms_named(text);
        let found: Vec<_> = found.iter().map(|(line, room)| (*line, room.as_str())).collect();
        assert_eq!(found, imported, "{text}");
    }
    assert!(has_word("use rand::Rng;", "rand") && !has_word("let operand = 1;", "rand"));
}

/// The top-level types in `files` (their paths and contents) with a name that occurs in several of
/// them, and where.
fn names_of_several_types<'a>(files: &[(&'a str, &str)]) -> BTreeMap<String, BTreeSet<&'a str>> {
    let mut types: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for (path, text) in files {
        for line in text.lines() {
            let declared = match line.strip_prefix("pub(") {
                Some(rest) => rest.split_once(") ").map_or("", |(_, declared)| declared),
                None => line.strip_prefix("pub ").unwrap_or(line),
            };
            for keyword in ["struct ", "enum ", "trait ", "type ", "union "] {
                if let Some(name) = declared.strip_prefix(keyword) {
                    types.entry(first_name(name).to_owned()).or_default().insert(*path);
                }
            }
        }
    }
    types.retain(|_, paths| paths.len() > 1);
    types
}

/// What each module imports: for `transport::amqp::error`, the modules of the files that it names.
type Imports = BTreeMap<String, BTreeSet<String>>;

/// The files of `src`: their paths and contents.
fn sources() -> Vec<(String, String)> {
    source_files().into_iter().map(|file| (file.path, file.text)).collect()
}

fn owned(files: &[(&str, &str)]) -> Vec<(String, String)> {
    files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect()
}

fn imports_of(files: &[(String, String)]) -> Imports {
    let modules: BTreeSet<_> = files.iter().map(|(path, _)| module_of(path)).collect();
    let of_file = |(path, text): &(String, String)| {
        let own = module_of(path);
        let named = named_paths(&shipped(text), &own);
        let mut imported: BTreeSet<_> =
            named.iter().filter_map(|path| nearest(path, &modules)).map(|it| joined(it)).collect();
        imported.remove(&joined(&own));
        (joined(&own), imported)
    };
    files.iter().map(of_file).collect()
}

fn mutual_imports(imports: &Imports) -> Vec<String> {
    let mut pairs = Vec::new();
    for (module, imported) in imports {
        for other in imported.iter().filter(|other| module < *other) {
            let is_declared_there = other.rsplit_once("::").is_some_and(|(of, _)| of == module);
            let is_mutual = imports.get(other).is_some_and(|back| back.contains(module));
            if is_mutual && !is_declared_there {
                pairs.push(format!("{module} and {other} import each other"));
            }
        }
    }
    pairs
}

fn sideways_imports(imports: &Imports) -> Vec<String> {
    let mut complaints = Vec::new();
    for (module, imported) in imports {
        let own = first_name(module);
        let Some(floor) = floor_of(own) else { continue };
        let is_beside = |room: &str| room != own && floor_of(room) == Some(floor);
        let others = imported.iter().filter(|other| is_beside(first_name(other)));
        complaints.extend(others.map(|other| format!("{module} imports {other}")));
    }
    complaints
}

/// `transport`, `amqp`, `error` for `src/transport/amqp/error.rs`.
fn module_of(path: &str) -> Vec<String> {
    let path = path.trim_start_matches("src/").trim_end_matches(".rs");
    let mut names: Vec<_> = path.split('/').map(str::to_owned).collect();
    if names.last().is_some_and(|name| name == "mod") {
        names.pop();
    }
    names
}

fn joined(module: &[String]) -> String {
    module.join("::")
}

/// Without comments, and without unit tests.
fn shipped(text: &str) -> String {
    without_comments(text.split("#[cfg(test)]\nmod tests").next().unwrap())
}

fn without_comments(text: &str) -> String {
    let without_comment = |line: &str| line.split("//").next().unwrap().to_owned();
    text.lines().map(without_comment).collect::<Vec<_>>().join("\n")
}

/// Where in `code` a path begins with `beginning`.
fn beginnings(code: &str, beginning: &str) -> Vec<usize> {
    let is_part = |it: char| it.is_alphanumeric() || it == '_' || it == ':';
    let is_whole = |at: &usize| !code[..*at].chars().next_back().is_some_and(is_part);
    code.match_indices(beginning).map(|(at, _)| at).filter(is_whole).collect()
}

/// The deepest module on the path `path`.
fn nearest<'a>(path: &[String], modules: &'a BTreeSet<Vec<String>>) -> Option<&'a Vec<String>> {
    (1..=path.len()).rev().find_map(|length| modules.get(&path[..length]))
}

/// All paths in `code` that begin at the root of the crate, or at the module `own`.
fn named_paths(code: &str, own: &[String]) -> Vec<Vec<String>> {
    let mut paths = Vec::new();
    let parent = &own[..own.len().saturating_sub(1)];
    for (beginning, base) in [("crate::", &[][..]), ("self::", own), ("super::", parent)] {
        for at in beginnings(code, beginning) {
            read_tree(&code[at + beginning.len()..], base.to_vec(), &mut paths);
        }
    }
    paths
}

/// Reads `a::{b, c::D}` after `path`; returns how much of `text` it has read.
fn read_tree(text: &str, mut path: Vec<String>, paths: &mut Vec<Vec<String>>) -> usize {
    let mut at = 0;
    loop {
        at += text[at..].len() - text[at..].trim_start().len();
        let rest = &text[at..];
        if rest.starts_with('{') {
            at += 1;
            while !text[at..].trim_start().starts_with('}') && at < text.len() {
                at += read_tree(&text[at..], path.clone(), paths);
                // To the next element of the group: past a comma, and a `*` or an `as`.
                let to = text[at..].find([',', '}']).unwrap_or(text.len() - at);
                at += to + usize::from(text[at + to..].starts_with(','));
            }
            at += text[at..].find('}').map_or(0, |to| to + 1);
            return at;
        }
        let name: String =
            rest.chars().take_while(|it| it.is_alphanumeric() || *it == '_').collect();
        at += name.len();
        match name.as_str() {
            "" | "self" => {}
            "super" => drop(path.pop()),
            _ => path.push(name.clone()),
        }
        let rest = text[at..].trim_start();
        if name.is_empty() || !rest.starts_with("::") {
            paths.push(path);
            return at;
        }
        at = text.len() - rest.len() + 2;
    }
}

#[derive(Clone)]
struct File {
    /// Relative to the root of the repository.
    path: String,
    /// The first directory or file below `src`: `protocol` for `src/protocol/ids.rs`, `main` for
    /// `src/main.rs`.
    module: String,
    text: String,
}

impl File {
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(index, line)| (index + 1, line))
    }

    /// Its lines without comment lines.
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
                // What cargo builds, if it is run in `tests/fuzz`.
                if !path.ends_with("target") {
                    directories.push(path);
                }
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

/// The modules that `text` names by a path from the crate's root, each with the line in which the
/// path begins.
fn rooms_named(text: &str) -> Vec<(usize, String)> {
    let code = without_comments(text);
    let mut named = Vec::new();
    for beginning in ["crate::", "dtc::"] {
        for at in beginnings(&code, beginning) {
            let mut paths = Vec::new();
            read_tree(&code[at + beginning.len()..], Vec::new(), &mut paths);
            let line = code[..at].matches('\n').count() + 1;
            let rooms = paths.into_iter().filter_map(|path| path.into_iter().next());
            named.extend(rooms.map(|room| (line, room)));
        }
    }
    named
}

fn first_name(path: &str) -> &str {
    path.split(|character: char| !(character.is_alphanumeric() || character == '_')).next().unwrap()
}

/// Whether `word` occurs in `line` as a whole word.
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
