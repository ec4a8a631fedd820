//! The help and the version, and errors of usage.

use std::process::Command;

use crate::world::{World, assert_golden, dtc, output, transaction};
use serde_json::json;

#[test]
fn the_help_is_as_in_the_golden_files() {
    assert_golden("help.txt", &output(dtc().arg("--help")).exited(0).saying("").stdout);
    for command in ["run", "worker", "service", "submit", "status", "config", "bench"] {
        let ended = output(dtc().args([command, "--help"])).exited(0).saying("");
        assert_golden(&format!("{command}-help.txt"), &ended.stdout);
    }
    for word in ["apply", "check", "print", "delete"] {
        let ended = output(dtc().args(["topology", word, "--help"])).exited(0).saying("");
        assert_golden(&format!("topology-{word}-help.txt"), &ended.stdout);
    }
}

#[test]
fn without_arguments_the_help_is_shown_as_an_error() {
    let ended = output(&mut dtc()).exited(2).silent();
    assert_golden("help.txt", &ended.stderr);
}

#[test]
fn the_version_is_that_of_the_crate_and_names_the_commit_of_a_clone() {
    let ended = output(dtc().arg("--version")).exited(0).saying("");
    let own = format!("dtc {}", env!("CARGO_PKG_VERSION"));
    let Some(named) = ended.stdout.trim_end().strip_prefix(&own) else {
        panic!("{}", ended.stdout)
    };
    let git = |arguments: &[&str]| {
        let repository = env!("CARGO_MANIFEST_DIR");
        Command::new("git").args(arguments).current_dir(repository).output()
    };
    // Only a clone has a commit, and only git knows it.
    let is_known = git(&["rev-parse", "--verify", "HEAD"]).is_ok_and(|it| it.status.success());
    if !is_known {
        assert_eq!(named, "");
        return;
    }
    let commit =
        named.trim_start_matches(" (").trim_end_matches(')').trim_end_matches(", modified");
    let found = git(&["rev-parse", "--verify", &format!("{commit}^{{commit}}")]).unwrap();
    assert!(commit.len() == 12 && found.status.success(), "`{named}` names no commit");
}

#[test]
fn unknown_or_missing_arguments_are_a_usage_error() {
    for (arguments, complaint) in [
        (vec!["walk"], "unrecognized subcommand 'walk'"),
        (vec!["run", "--nope"], "unexpected argument '--nope' found"),
        (vec!["run"], "the following required arguments were not provided:"),
        (vec!["run", "--services", "-"], "--transactions <FILE>"),
    ] {
        let ended = output(dtc().args(&arguments)).exited(2).silent();
        assert!(ended.stderr.contains(complaint), "{arguments:?}: {}", ended.stderr);
    }
}

#[test]
fn an_invalid_value_is_refused_with_its_rule() {
    let world = World::with(&json!([{"name": "a", "max_concurrency": 1}]), &json!([]));
    let most = u64::MAX.to_string();
    let timeout = "must be a whole number from 1 to 86400000";
    for (flag, value, rule) in [
        ("--max-in-flight", "0", "must be a whole number from 1 to "),
        ("--max-in-flight", "-1", "must be a whole number from 1 to "),
        ("--max-in-flight", "many", "must be a whole number from 1 to "),
        ("--max-in-flight", "99999999999999999999", "must be a whole number from 1 to "),
        ("--timeout-ms", "0", timeout),
        ("--timeout-ms", "1e3", timeout),
        ("--timeout-ms", "86400001", timeout),
        ("--seed", "-1", &format!("must be a whole number from 0 to {most}")),
        ("--output", "xml", "[possible values: json, ndjson, table]"),
    ] {
        let ended = output(world.run().args([flag, value])).exited(2).silent();
        let named = format!("invalid value '{value}' for '{flag} <");
        assert!(ended.stderr.contains(&named), "{flag} {value}: {}", ended.stderr);
        assert!(ended.stderr.contains(rule), "{flag} {value}: {}", ended.stderr);
    }
}

/// The message was `invalid digit found in string`.
#[test]
fn a_requested_at_that_is_not_a_number_of_seconds_is_refused_with_its_rule() {
    for value in ["tomorrow", "1.5", "253402300800"] {
        let ended = output(dtc().args(["submit", "-", "--requested-at", value])).exited(2).silent();
        let rule = "must be a whole number of seconds since 1970, up to 253402300799";
        assert!(ended.stderr.contains(rule), "{value}: {}", ended.stderr);
    }
}

#[test]
fn both_files_from_stdin_is_a_usage_error() {
    output(dtc().args(["run", "--services", "-", "--transactions", "-"]))
        .exited(2)
        .silent()
        .saying("--services and --transactions can't both be stdin\n");
}

#[test]
fn an_unknown_log_level_is_refused_rather_than_ignored() {
    let services = json!([{"name": "a", "max_concurrency": 1}]);
    let world = World::with(&services, &json!([transaction("TX1", &["a"])]));
    output(world.run().env("DTC_LOG", "verbose"))
        .exited(2)
        .silent()
        .saying("DTC_LOG is `verbose`: must be one of error, warn, info, debug, trace, off\n");
    let ended = output(world.run().env("DTC_LOG", "debug")).exited(0);
    assert_eq!(ended.statuses(), ["TX1 COMMITTED"]);
    output(world.run().env("DTC_LOG", "")).exited(0);
}
