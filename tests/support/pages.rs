//! The pages of the documentation, and the fenced blocks in them.

#![allow(dead_code, reason = "each target uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The pages whose blocks of kind `sh` are run, and by which test: one shell runs them unchanged, one
/// after the other. The block of kind `text` after one shows its output.
pub(crate) const SCRIPTS: [(&str, &str, &str); 3] = [
    ("README.md", "## On RabbitMQ", "tests/broker/readme.rs"),
    ("docs/getting-started.md", "## On RabbitMQ", "tests/broker/readme.rs"),
    ("docs/embedded.md", "## A run that survives its process", "tests/cli/journal.rs"),
];

/// A page, by its path from the root of the repository.
#[derive(Clone, Debug)]
pub(crate) struct Page {
    pub(crate) path: String,
    pub(crate) text: String,
}

/// A fenced block: its kind, its place, and its lines.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Block {
    pub(crate) kind: String,
    /// The line of the opening fence.
    pub(crate) line: usize,
    /// The headings of the second and third level above it, if there are any.
    pub(crate) under: Vec<String>,
    /// Whether only blank lines are between it and the previous block.
    pub(crate) follows: bool,
    pub(crate) lines: Vec<String>,
}

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn page(path: &str) -> Page {
    let text = fs::read_to_string(root().join(path));
    Page { path: path.to_owned(), text: text.unwrap_or_else(|error| panic!("{path}: {error}")) }
}

/// Every page, the front page first.
pub(crate) fn pages() -> Vec<Page> {
    let mut paths = Vec::new();
    for directory in ["docs", "deploy", "tests"] {
        markdown_in(&root().join(directory), &mut paths);
    }
    let at_top = fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().path());
    paths.extend(at_top.filter(|path| is_markdown(path)));
    let relative = |path: &PathBuf| path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
    let mut paths: Vec<_> = paths.iter().map(relative).collect();
    paths.sort_by_key(|path| (path != "README.md", path.clone()));
    let pages: Vec<_> = paths.iter().map(|path| page(path)).collect();
    assert!(pages.len() > 10 && pages[0].path == "README.md", "the pages were found");
    pages
}

fn markdown_in(directory: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let is_built = path.file_name().is_some_and(|name| name == "target");
        if path.is_dir() && !is_built {
            markdown_in(&path, paths);
        } else if is_markdown(&path) {
            paths.push(path);
        }
    }
}

fn is_markdown(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "md")
}

pub(crate) fn blocks(text: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut under: Vec<String> = Vec::new();
    let (mut is_open, mut follows) = (false, false);
    for (index, line) in text.lines().enumerate() {
        if is_open {
            if line.trim() == "```" {
                (is_open, follows) = (false, true);
            } else if let Some(block) = blocks.last_mut() {
                block.lines.push(line.to_owned());
            }
        } else if let Some(kind) = line.trim_start().strip_prefix("```") {
            is_open = true;
            let (kind, under) = (kind.to_owned(), under.clone());
            blocks.push(Block { kind, line: index + 1, under, follows, lines: Vec::new() });
        } else if !line.trim().is_empty() {
            follows = false;
            if line.starts_with("## ") {
                under = vec![line.to_owned()];
            } else if line.starts_with("### ") {
                under.truncate(1);
                under.push(line.to_owned());
            }
        }
    }
    blocks
}

/// The blocks under a heading.
pub(crate) fn blocks_under(page: &Page, heading: &str) -> Vec<Block> {
    let is_under = |block: &Block| block.under.iter().any(|it| it == heading);
    let found: Vec<_> = blocks(&page.text).into_iter().filter(is_under).collect();
    assert!(!found.is_empty(), "{} has blocks under `{heading}`", page.path);
    found
}

/// The commands in the blocks of kind `sh` under a heading, and their output on the page.
pub(crate) fn script(page: &Page, heading: &str) -> (String, Vec<String>) {
    let (mut script, mut printed) = (String::new(), Vec::new());
    let mut last = "";
    let blocks = blocks_under(page, heading);
    for block in &blocks {
        match block.kind.as_str() {
            "sh" => script.extend(block.lines.iter().flat_map(|line| [line, "\n"])),
            "text" if last == "sh" && block.follows => printed.extend(block.lines.clone()),
            _ => {}
        }
        last = &block.kind;
    }
    assert!(!script.is_empty(), "{} has blocks of kind `sh` under `{heading}`", page.path);
    (script, printed)
}
