//! `dtc topology` without a broker: what it prints, and how it fails.

use std::{fs, net::TcpListener};

use crate::world::{assert_golden, dtc, output};

#[test]
fn the_topology_is_printed_as_a_table() {
    let directory = tempfile::tempdir().unwrap();
    let services = directory.path().join("services.json");
    let text = r#"[{"name": "payments", "max_concurrency": 2, "max_wait_ms": 0},
        {"name": "stock", "max_concurrency": 1, "cap": "service"}]"#;
    fs::write(&services, text).unwrap();
    let mut command = dtc();
    command.args(["topology", "print", "--retention", "36h", "--services"]).arg(&services);
    assert_golden("topology.txt", &output(&mut command).exited(0).saying("").stdout);
}

#[test]
fn an_invalid_value_is_refused_with_its_rule() {
    for (flag, value, rule) in [
        ("--retention", "7", "must be a whole number with a unit: ms, s, min, h or d"),
        ("--retention", "1500ms", "must be at least 1s, in whole seconds"),
        ("--retention", "0s", "must be at least 1s, in whole seconds"),
        ("--namespace", "a b", "must match [A-Za-z0-9._-]{1,64}"),
        ("--commands", "fast", "must be `auto`, `classic` or `quorum`"),
    ] {
        let ended = output(dtc().args(["topology", "print", flag, value])).exited(2).silent();
        assert!(ended.stderr.contains(rule), "{flag} {value}: {}", ended.stderr);
    }
}

#[test]
fn a_service_to_be_replaced_must_be_among_the_services() {
    let services = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/examples/services.json");
    let arguments = ["topology", "apply", "--services", services, "--replace", "stock"];
    let complaint = "neither --services nor the configuration has a service `stock`";
    let there_are = format!("{complaint}; there are `ServiceA`, `ServiceB`\n");
    output(dtc().args(arguments)).exited(2).silent().saying(&there_are);
    let none = format!("{complaint}; they name none\n");
    output(dtc().args(["topology", "apply", "--replace", "stock"])).exited(2).saying(&none);
}

#[test]
fn an_absent_broker_is_unavailable() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqp://me:secret@{}", listener.local_addr().unwrap());
    drop(listener);
    for word in ["apply", "check"] {
        let ended = output(dtc().args(["topology", word, "--broker", &url])).exited(69).silent();
        let said = ended.stderr.starts_with("failed to connect to the broker at amqp://127.0.0.1:");
        assert!(said && !ended.stderr.contains("secret"), "{}", ended.stderr);
    }
}
