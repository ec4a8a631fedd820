//! What this crate is to who depends on it: what each of its features brings along, and what is in
//! its package.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{collections::BTreeSet, process::Command};

/// What only the command needs.
const OF_THE_COMMAND: [&str; 7] =
    ["anyhow", "clap", "config", "indicatif", "mimalloc", "tracing-appender", "tracing-subscriber"];

/// What speaks to RabbitMQ.
const OF_THE_BROKER: [&str; 4] = ["async-rs", "deadpool", "lapin", "rustls"];

/// What the coordinator of one process needs beside what all need.
const OF_EMBEDDED: [&str; 2] = ["crc32fast", "hdrhistogram"];

#[test]
fn a_producer_a_service_and_a_worker_compile_nothing_of_the_command() {
    for feature in ["client", "service", "worker"] {
        let brought = brought_by(&["--no-default-features", "--features", feature]);
        assert_eq!(among(&brought, &OF_THE_COMMAND), [""; 0], "{feature}");
        assert_eq!(among(&brought, &OF_EMBEDDED), [""; 0], "{feature}");
        assert_eq!(among(&brought, &OF_THE_BROKER), OF_THE_BROKER, "{feature}");
    }
}

#[test]
fn a_coordinator_in_one_process_compiles_nothing_that_speaks_to_a_broker() {
    let brought = brought_by(&["--no-default-features", "--features", "embedded"]);
    assert_eq!(among(&brought, &OF_THE_COMMAND), [""; 0]);
    assert_eq!(among(&brought, &OF_THE_BROKER), [""; 0]);
    assert_eq!(among(&brought, &OF_EMBEDDED), OF_EMBEDDED);
}

#[test]
fn who_asks_for_nothing_gets_everything() {
    let brought = brought_by(&[]);
    for all in [&OF_THE_COMMAND[..], &OF_THE_BROKER, &OF_EMBEDDED] {
        assert_eq!(among(&brought, all), all);
    }
}

/// The crates that are compiled for who depends on this one with these flags.
fn brought_by(flags: &[&str]) -> BTreeSet<String> {
    let tree = ["tree", "--edges", "normal", "--prefix", "none", "--format", "{p}"];
    let listed = cargo(&[&tree, flags].concat());
    listed.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

/// Those of `names` that are in `brought`.
fn among<'a>(brought: &BTreeSet<String>, names: &[&'a str]) -> Vec<&'a str> {
    names.iter().copied().filter(|name| brought.contains(*name)).collect()
}

/// What `cargo` prints in the root of the repository, without the network.
fn cargo(arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO"));
    command.args(arguments).args(["--locked", "--offline"]);
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}
