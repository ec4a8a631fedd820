//! The commands in the documentation about RabbitMQ do what it says.
//!
//! One shell runs the blocks of kind `sh` of a section, one after the other, on the test's own
//! broker, in a directory with `deploy/examples`. The block of kind `text` after one shows its
//! output; `…` stands for any text in a line.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
};

use crate::{
    broker::place,
    pages::{SCRIPTS, page, root, script},
};

const HEADING: &str = "## On RabbitMQ";

fn is_like(line: &str, pattern: &str) -> bool {
    let mut rest = line;
    let mut parts = pattern.split('…');
    let Some(begins) = parts.next().and_then(|first| rest.strip_prefix(first)) else {
        return false;
    };
    rest = begins;
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.is_empty() || pattern.ends_with('…')
}

/// What the processes in the directory have logged.
fn logs(directory: &Path) -> String {
    let files = fs::read_dir(directory).unwrap().map(|file| file.unwrap().path());
    let logs = files.filter(|file| file.extension().is_some_and(|it| it == "log"));
    logs.map(|file| fs::read_to_string(file).unwrap()).collect()
}

/// Runs the section of a page, and compares the output with the page.
fn follow(path: &str) {
    assert!(SCRIPTS.contains(&(path, HEADING, "tests/broker/readme.rs")), "{path} is listed");
    let (script, wanted) = script(&page(path), HEADING);
    let place = place();
    let directory = tempfile::tempdir().unwrap();
    symlink(root().join("deploy"), directory.path().join("deploy")).unwrap();
    let binaries = Path::new(env!("CARGO_BIN_EXE_dtc")).parent().unwrap();
    let search = format!("{}:{}", binaries.display(), env::var("PATH").unwrap());
    let ended = Command::new("timeout")
        // Job control, as at a terminal; and everything that it starts ends with it.
        .args(["--signal=KILL", "240", "bash", "-emc"])
        .arg(format!("trap 'kill -9 $(jobs -p) 2> /dev/null || true' EXIT\n{script}"))
        .current_dir(directory.path())
        .env("PATH", search)
        .env("EXAMPLES", root().join("deploy/examples"))
        .env("DTC__BROKER__URL", &place.url)
        .env("DTC__BROKER__NAMESPACE", &place.namespace)
        .stdin(Stdio::null())
        .output()
        .unwrap();

    let printed = String::from_utf8_lossy(&ended.stdout);
    let complaints = String::from_utf8_lossy(&ended.stderr);
    println!("{}", complaints.lines().last().unwrap_or_default());
    let lines: Vec<_> = printed.lines().collect();
    let is_as_wanted = lines.len() == wanted.len()
        && lines.iter().zip(&wanted).all(|(line, pattern)| is_like(line, pattern));
    assert!(
        ended.status.success() && is_as_wanted,
        "{path}: {}\nprinted:\n{printed}\nwanted:\n{}\ncomplaints:\n{complaints}\nlogs:\n{}",
        ended.status,
        wanted.join("\n"),
        logs(directory.path())
    );
}

#[test]
fn a_newcomer_who_follows_the_front_page_sees_two_transactions_committed() {
    follow("README.md");
}

#[test]
fn a_newcomer_who_follows_the_pages_kills_a_worker_and_loses_nothing() {
    let path = "docs/getting-started.md";
    let (script, _) = script(&page(path), HEADING);
    assert!(script.contains("kill -9"), "the section kills a worker:\n{script}");
    follow(path);
}

#[test]
fn an_ellipsis_stands_for_any_text() {
    assert!(is_like("a 12 b", "a … b") && is_like("a 12", "a …") && is_like("same", "same"));
    assert!(!is_like("a 12 c", "a … b") && !is_like("b", "a") && !is_like("a b", "a"));
}
