//! The configuration as commands read it: from a file, the environment and flags.

use std::{fs, path::PathBuf};

use tempfile::TempDir;

use crate::world::{assert_golden, dtc, output, repository};

/// A directory with a file in it.
fn file(name: &str, text: &str) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    fs::write(&path, text).unwrap();
    (directory, path)
}

#[test]
fn each_value_is_shown_with_its_source() {
    let (directory, _) = file(
        "own.toml",
        "[broker]\nnamespace = \"shop\"\npassword_file = \"password\"\n\
         [worker]\nmax_in_flight = 7\ndrain = \"1s\"\n\
         [services.Payments]\ncap = \"service\"\n",
    );
    fs::write(directory.path().join("password"), "canary\n").unwrap();
    let mut command = dtc();
    command
        .current_dir(directory.path())
        .args(["config", "--config", "own.toml", "--heartbeat", "3s"])
        .env("DTC__WORKER__DRAIN", "2s")
        .env("DTC__BROKER__HEARTBEAT", "2s")
        .env("DTC__BROKER__URL", "amqp://me@there/v");
    assert_golden("config.txt", &output(&mut command).exited(0).saying("").stdout);
}

#[test]
fn the_output_is_a_file_with_the_same_configuration() {
    let shown = output(dtc().arg("config")).exited(0).saying("").stdout;
    let (_directory, path) = file("shown.toml", &shown.replace("guest:***@", ""));
    let again = output(dtc().arg("config").arg("--config").arg(&path)).exited(0).stdout;
    let values = |text: &str| -> Vec<String> {
        text.lines().map(|line| line.split(" # ").next().unwrap().to_owned()).collect()
    };
    assert_eq!(values(&again), values(&shown));
}

#[test]
fn the_defaults_are_a_valid_file_and_match_the_help() {
    let defaults = output(dtc().args(["config", "--defaults"])).exited(0).stdout;
    assert_eq!(defaults, fs::read_to_string(repository().join("deploy/dtc.toml")).unwrap());
    let (_directory, path) = file("defaults.toml", &defaults);
    output(dtc().arg("config").arg("--config").arg(&path)).exited(0);

    let shown = output(dtc().arg("config")).exited(0).stdout;
    let mut section = "";
    let mut defaults = Vec::new();
    for line in shown.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']');
        } else if let Some((name, value)) = line.split_once(" = ") {
            let value = value.split(" # ").next().unwrap().trim_matches('"');
            let variable = format!("DTC__{section}__{name}").to_uppercase();
            defaults.push((variable, value.replace("guest:***@localhost:5672", "localhost")));
        }
    }
    let mut n_shown = 0;
    for command in [vec!["worker"], vec!["service"], vec!["topology", "apply"]] {
        let help = output(dtc().args(&command).arg("--help")).exited(0).stdout;
        let help: Vec<_> = help.split_whitespace().collect();
        let help = help.join(" ");
        for (variable, value) in &defaults {
            if help.contains(&format!("[env: {variable}]")) {
                let said = format!("[default: {value}] [env: {variable}]");
                assert!(help.contains(&said), "{command:?}: {said}");
                n_shown += 1;
            }
        }
    }
    assert_eq!(n_shown, 3 * 3 + 4 + 2 + 3);
}

#[test]
fn every_command_reports_all_errors_at_once() {
    let (_directory, path) =
        file("own.toml", "[broker]\nheartbeat = 5\n[worker]\ndrian = \"1s\"\n");
    let services = repository().join("deploy/examples/services.json");
    let services = services.to_str().unwrap();
    let transactions = repository().join("deploy/examples/transactions.json");
    let transactions = transactions.to_str().unwrap();
    for command in [
        vec!["config"],
        vec!["worker"],
        vec!["service", "--services", services, "--name", "ServiceA"],
        vec!["submit", transactions],
        vec!["status", "TX1"],
        vec!["topology", "print"],
        vec!["topology", "check"],
        vec!["topology", "apply"],
        vec!["topology", "delete", "--yes"],
        vec!["run", "--services", services, "--transactions", transactions, "--broker", "amqp://a"],
    ] {
        let ended = output(
            dtc()
                .args(&command)
                .env("DTC_CONFIG", &path)
                .env("DTC__WORKER__MAX_IN_FLIGHT", "0")
                .env("DTC__BROKER__PASWORD", "canary"),
        );
        let path = path.display();
        ended.exited(78).silent().saying(&format!(
            "`broker.heartbeat` is `5` (from {path}): must be a whole number with a unit: ms, s, \
             min, h or d\n\
             `worker.max_in_flight` is `0` (from DTC__WORKER__MAX_IN_FLIGHT): must be a whole \
             number from 1 to 65535\n\
             `broker.pasword` (from DTC__BROKER__PASWORD): is no key of the configuration; is \
             `DTC__BROKER__PASSWORD` meant?\n\
             `worker.drian` (from {path}): is no key of the configuration; is `worker.drain` meant?\n"
        ));
    }
}

#[test]
fn errors_in_flags_only_are_a_usage_error() {
    output(dtc().args(["worker", "--drain", "soon", "--broker", "http://me:canary@a"]))
        .exited(2)
        .silent()
        .saying(
            "`broker.url` (from --broker): part 1 of the broker's address is not an AMQP URL: must \
             begin with amqp:// or amqps://\n\
             `worker.drain` is `soon` (from --drain): must be a whole number with a unit: ms, s, \
             min, h or d\n",
        );
}

#[test]
fn a_file_that_is_not_toml_is_named_without_showing_its_lines() {
    let (directory, path) = file("own.toml", "[broker]\nurl = amqp://me:canary@a\n");
    let ended = output(dtc().arg("config").arg("--config").arg(&path)).exited(78).silent();
    let (path, missing) = (path.display(), directory.path().join("missing"));
    ended.saying(&format!("(from {path}): is not TOML, at line 2, column 7\n"));
    let ended = output(dtc().arg("config").arg("--config").arg(&missing)).exited(78).silent();
    let said = format!("(from {}): can't be read: No such file", missing.display());
    assert!(ended.stderr.starts_with(&said), "{}", ended.stderr);
}

#[test]
fn the_topology_has_the_services_of_the_configuration_too() {
    let (directory, path) = file(
        "own.toml",
        "[services.payments]\nmax_wait = \"0s\"\n[services.stock]\ncap = \"service\"\n",
    );
    let services = directory.path().join("services.json");
    let print = || {
        let mut command = dtc();
        command.args(["topology", "print", "--retention", "36h"]);
        command
    };
    let configured = output(print().arg("--config").arg(&path)).exited(0).saying("").stdout;
    assert_golden("topology.txt", &configured);

    fs::write(&services, r#"[{"name": "stock", "max_concurrency": 1, "cap": "service"}]"#).unwrap();
    let mut both = print();
    both.arg("--config").arg(&path).arg("--services").arg(&services);
    let mut lines: Vec<_> = output(&mut both).exited(0).stdout.lines().map(str::to_owned).collect();
    let mut wanted: Vec<_> = configured.lines().map(str::to_owned).collect();
    lines.sort();
    wanted.sort();
    assert_eq!(lines, wanted);

    fs::write(&services, r#"[{"name": "stock", "max_concurrency": 1}]"#).unwrap();
    output(&mut both).exited(78).silent().saying(
        "service `stock` has another max_wait or cap in --services than in the configuration \
         (services.stock)\n",
    );
}
