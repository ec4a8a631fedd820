//! The README's section "On RabbitMQ" does what it says.
//!
//! Its blocks of kind `sh` are run as they stand, one after the other, by one shell, on a broker of
//! the test's own. The block of kind `text` behind one says what it prints; `…` stands for any text
//! in a line.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    env, fs,
    path::Path,
    process::{Command, Stdio},
};

use crate::broker::place;

const SECTION: &str = "## On RabbitMQ";

/// The blocks of a section: what is run, and what is printed.
fn blocks(readme: &str) -> (String, Vec<String>) {
    let section = readme.split(SECTION).nth(1).expect("the README has the section");
    let section = section.split("\n## ").next().unwrap();
    let (mut script, mut printed) = (String::new(), Vec::new());
    let (mut kind, mut last) = (None, "");
    for line in section.lines() {
        match (line.strip_prefix("```"), kind) {
            (Some(opened), None) => kind = Some((opened, last)),
            (Some(_), Some((closed, _))) => (kind, last) = (None, closed),
            (None, Some(("sh", _))) => script.extend([line, "\n"]),
            (None, Some(("text", "sh"))) => printed.push(line.to_owned()),
            // What stands between a command and what it prints is blank.
            (None, None) if !line.trim().is_empty() => last = "",
            (None, _) => {}
        }
    }
    (script, printed)
}

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

#[test]
fn a_newcomer_who_follows_the_readme_kills_a_worker_and_loses_nothing() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(repository.join("README.md")).unwrap();
    let (script, wanted) = blocks(&readme);
    assert!(script.contains("kill -9"), "the section kills a worker:\n{script}");

    let place = place();
    let directory = tempfile::tempdir().unwrap();
    let binaries = Path::new(env!("CARGO_BIN_EXE_dtc")).parent().unwrap();
    let path = format!("{}:{}", binaries.display(), env::var("PATH").unwrap());
    let ended = Command::new("timeout")
        // Job control, as at a terminal; and everything that it starts ends with it.
        .args(["--signal=KILL", "240", "bash", "-emc"])
        .arg(format!("trap 'kill -9 $(jobs -p) 2> /dev/null || true' EXIT\n{script}"))
        .current_dir(directory.path())
        .env("PATH", path)
        .env("EXAMPLES", repository.join("deploy/examples"))
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
        "{}\nprinted:\n{printed}\nwanted:\n{}\ncomplaints:\n{complaints}",
        ended.status,
        wanted.join("\n")
    );
}

#[test]
fn an_ellipsis_stands_for_any_text() {
    assert!(is_like("a 12 b", "a … b") && is_like("a 12", "a …") && is_like("same", "same"));
    assert!(!is_like("a 12 c", "a … b") && !is_like("b", "a") && !is_like("a b", "a"));
}
