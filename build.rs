//! Finds the commit that the binary is built from, for `dtc --version`.
//!
//! The sources, in this order: the variable `DTC_COMMIT`, as set for the image; the file that cargo
//! puts into a package; git, in a clone. If there is none, the version names no commit.
//!
//! The script runs when the sources change, not when a commit is made: it names the commit that was
//! checked out then, and `modified` means that the sources differed from it.

use std::{env, fs, path::Path, process::Command};

/// The files that the binary is built from.
const SOURCES: [&str; 5] = ["Cargo.lock", "Cargo.toml", "build.rs", "deploy/dtc.toml", "src"];

fn main() {
    for source in SOURCES {
        println!("cargo::rerun-if-changed={source}");
    }
    println!("cargo::rerun-if-env-changed=DTC_COMMIT");
    let given = env::var("DTC_COMMIT").ok();
    let version = version(env!("CARGO_PKG_VERSION"), Path::new("."), given.as_deref());
    println!("cargo::rustc-env=DTC_VERSION={version}");
}

/// `number`, with the commit if one is known: `given`, or from `directory`.
pub(crate) fn version(number: &str, directory: &Path, given: Option<&str>) -> String {
    let given = given.filter(|commit| !commit.is_empty()).map(str::to_owned);
    match given.or_else(|| of_package(directory)).or_else(|| of_clone(directory)) {
        Some(commit) => format!("{number} ({commit})"),
        None => number.to_owned(),
    }
}

/// The commit that cargo has written into a package that was built in a clone.
fn of_package(directory: &Path) -> Option<String> {
    let info = fs::read_to_string(directory.join(".cargo_vcs_info.json")).ok()?;
    let (_, commit) = info.split_once("\"sha1\"")?;
    let commit = commit.split('"').nth(1)?;
    Some(named(commit, info.contains("\"dirty\": true")))
}

/// The commit of a clone. If the clone holds more than this crate, its commit says nothing useful.
fn of_clone(directory: &Path) -> Option<String> {
    let head = git(directory, &["rev-parse", "--show-prefix", "HEAD"])?;
    let commit = head.strip_prefix('\n')?.trim();
    let status = git(directory, &[&["status", "--porcelain", "--"][..], &SOURCES].concat())?;
    Some(named(commit, !status.is_empty()))
}

fn named(commit: &str, is_modified: bool) -> String {
    let short: String = commit.chars().take(12).collect();
    if is_modified { format!("{short}, modified") } else { short }
}

fn git(directory: &Path, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new("git");
    command.arg("--no-optional-locks").args(arguments).current_dir(directory);
    let output = command.output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}
