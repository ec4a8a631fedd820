//! The documentation is consistent: every link and anchor has a target, every block is run or
//! marked as text, every page is listed and begins with its purpose.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

mod links;
#[path = "../support/pages.rs"]
mod pages;
mod service;

use std::{fs, path::PathBuf};

use pages::{SCRIPTS, blocks, blocks_under, page, pages, root};

/// The kinds of blocks that are only shown.
const SHOWN: [&str; 2] = ["text", "json"];

/// The pages whose blocks of Rust are compiled, and by what.
const COMPILED: [(&str, &str); 3] = [
    ("README.md", "src/embedded/mod.rs"),
    ("docs/producers.md", "src/client/mod.rs"),
    ("docs/services.md", "tests/docs/service.rs"),
];

/// How many lines the front page has at most.
const FRONT_PAGE_MAX: usize = 150;

#[test]
fn every_block_is_run_or_compiled_or_marked_as_text() {
    let mut complaints = Vec::new();
    for page in pages() {
        for block in blocks(&page.text) {
            let is_run = match block.kind.as_str() {
                // tests/cli/readme.rs runs all of them, on every page.
                "console" => block.lines.iter().any(|line| line.starts_with("$ ")),
                "sh" => SCRIPTS.iter().any(|(path, heading, _)| {
                    *path == page.path && block.under.iter().any(|under| under == heading)
                }),
                "rust" | "rust,no_run" => COMPILED.iter().any(|(path, _)| *path == page.path),
                kind => SHOWN.contains(&kind),
            };
            if !is_run {
                let (path, line, kind) = (&page.path, block.line, &block.kind);
                complaints.push(format!("{path}:{line}: no test runs this block of kind `{kind}`"));
            }
        }
    }
    assert_none(&complaints);
}

#[test]
fn the_tests_that_run_the_pages_blocks_exist() {
    let mut complaints = Vec::new();
    let runs = SCRIPTS.iter().map(|(path, _, runner)| (*path, *runner));
    for (path, runner) in runs.chain(COMPILED) {
        if !fs::read_to_string(root().join(runner)).unwrap().contains(path) {
            complaints.push(format!("{runner} does not name {path}"));
        }
    }
    for (path, heading, _) in SCRIPTS {
        let under = blocks_under(&page(path), heading);
        if !under.iter().any(|block| block.kind == "sh") {
            complaints.push(format!("{path}: `{heading}` has no block of kind `sh`"));
        }
    }
    assert_none(&complaints);
}

#[test]
fn the_service_on_the_page_is_the_one_that_compiles() {
    let compiled = fs::read_to_string(root().join("tests/docs/service.rs")).unwrap();
    let (_, compiled) = compiled.split_once("// ---- docs/services.md ----\n\n").unwrap();
    let page = page("docs/services.md");
    let shown: Vec<_> = blocks(&page.text).into_iter().filter(|it| it.kind == "rust").collect();
    assert_eq!(shown.len(), 1, "one block of Rust");
    assert_eq!(shown[0].lines.join("\n"), compiled.trim_end());
}

#[test]
fn the_front_page_is_short() {
    let lines = page("README.md").text.lines().count();
    assert!(lines <= FRONT_PAGE_MAX, "README.md has {lines} lines, and {FRONT_PAGE_MAX} at most");
}

#[test]
fn every_page_begins_with_its_purpose_and_is_listed() {
    let index = page("docs/README.md");
    let mut complaints = Vec::new();
    for page in pages() {
        let Some(name) = page.path.strip_prefix("docs/").filter(|name| *name != "README.md") else {
            continue;
        };
        let mut lines = page.text.lines();
        let is_title = lines.next().is_some_and(|line| line.starts_with("# "));
        let says_why = lines.nth(1).is_some_and(|line| line.starts_with("After this page you "));
        if !is_title || !says_why {
            complaints
                .push(format!("{}: `# Title`, a blank line, `After this page you …`", page.path));
        }
        if !index.text.contains(&format!("]({name})")) {
            complaints.push(format!("docs/README.md does not list {name}"));
        }
    }
    assert_none(&complaints);
}

#[test]
fn the_light_and_the_dark_picture_differ_only_in_colours() {
    let without_colours = |path: &str| {
        let text = fs::read_to_string(root().join(path)).unwrap();
        let mut parts = text.split("\"#");
        let mut rest = parts.next().unwrap().to_owned();
        rest.extend(parts.map(|part| part.trim_start_matches(|it: char| it.is_ascii_hexdigit())));
        rest
    };
    assert_eq!(without_colours("docs/flow-light.svg"), without_colours("docs/flow-dark.svg"));
}

/// Phrases that a reader has to read twice, and plain ones instead. One term stands for one thing: see
/// docs/glossary.md.
const AVOIDED: [(&str, &str); 9] = [
    ("anew", "again"),
    ("whoever", "name the actor"),
    ("whomever", "name the actor"),
    ("of whom", "of which"),
    ("gone on with", "continued"),
    ("is another than", "differs from"),
    ("another than it should be", "the wrong one"),
    ("is told", "name the actor: `the producer gets`"),
    ("what is said", "name the text"),
];

#[test]
fn no_text_has_a_phrase_that_a_reader_must_read_twice() {
    let mut complaints = Vec::new();
    for path in texts() {
        let text = fs::read_to_string(&path).unwrap();
        let path = path.strip_prefix(root()).unwrap().display();
        for (number, line) in (1..).zip(text.lines()) {
            for (phrase, instead) in avoided_in(line) {
                complaints.push(format!("{path}:{number}: not `{phrase}`, but {instead}"));
            }
        }
    }
    assert_none(&complaints);
}

#[test]
fn a_phrase_to_avoid_is_found_as_words_in_any_case() {
    let found = |line: &str| avoided_in(line).map(|(phrase, _)| phrase).collect::<Vec<_>>();
    assert_eq!(found("Whoever reads it begins anew."), ["anew", "whoever"]);
    assert_eq!(found("the janew, and this told"), [""; 0]);
}

fn avoided_in(line: &str) -> impl Iterator<Item = (&'static str, &'static str)> {
    let is_word = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let line = line.to_lowercase();
    AVOIDED.into_iter().filter(move |(phrase, _)| {
        line.match_indices(phrase).any(|(at, _)| {
            let (before, after) = (&line.as_bytes()[..at], &line.as_bytes()[at + phrase.len()..]);
            !is_word(before.last()) && !is_word(after.first())
        })
    })
}

/// The files with text for people: code, pages, help, and what is deployed. The licences of others
/// are theirs.
fn texts() -> Vec<PathBuf> {
    const IN: [&str; 5] = ["src", "docs", "deploy", "examples", "tests/cli/golden"];
    let mut texts: Vec<_> = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
        .map(|it| root().join(it))
        .into();
    let mut directories: Vec<_> = IN.map(|it| root().join(it)).into();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true if path.ends_with("deploy/licences") => {}
                true => directories.push(path),
                false => texts.push(path),
            }
        }
    }
    texts
}

fn assert_none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}
