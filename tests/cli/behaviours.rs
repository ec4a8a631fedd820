//! How services behave, and what results that leads to.

use crate::world::{World, output, transaction};
use serde_json::{Value, json};

/// TX1 over `tested`, which behaves as `behaviour` says, and `other`, which always succeeds.
fn with(behaviour: &Value) -> World {
    let mut tested = json!({"name": "tested", "max_concurrency": 1});
    let tested_fields = tested.as_object_mut().unwrap();
    tested_fields.extend(behaviour.as_object().unwrap().clone());
    let services = json!([tested, {"name": "other", "max_concurrency": 1}]);
    World::with(&services, &json!([transaction("TX1", &["tested", "other"])]))
}

#[test]
fn a_refusal_aborts_and_the_refusing_service_gets_no_abort() {
    let told = with(&json!({"prepare": {"refuse_rate": 1}})).tell_all(&[]);
    assert_eq!(told.results[0]["status"], "ABORTED");
    assert_eq!(
        told.results[0]["reason"],
        json!({"service": "tested", "code": "refused", "message": "simulated refusal"})
    );
    assert_eq!(told.calls("tested"), [1, 0, 0]);
    assert_eq!(told.calls("other"), [1, 0, 1]);
}

#[test]
fn an_error_a_panic_or_a_hang_aborts_and_the_service_gets_the_abort() {
    for (behaviour, message) in [
        ("error_rate", "simulated error"),
        ("panic_rate", "panicked: simulated"),
        ("hang_rate", "timed out"),
    ] {
        let told = with(&json!({"prepare": {behaviour: 1}})).tell_all(&["--timeout-ms", "500"]);
        let result = &told.results[0];
        assert_eq!(result["status"], "ABORTED", "{behaviour}");
        assert_eq!(result["reason"]["code"], "failed", "{behaviour}");
        assert_eq!(result["reason"]["service"], "tested", "{behaviour}");
        assert_eq!(result["reason"]["message"], message, "{behaviour}");
        assert_eq!(told.calls("tested"), [1, 0, 1], "{behaviour}");
        assert_eq!(told.calls("other"), [1, 0, 1], "{behaviour}");
        assert!(!told.stderr.contains("panicked at"), "{}", told.stderr);
    }
}

#[test]
fn a_commit_that_fails_twice_is_called_a_third_time() {
    let told = with(&json!({"commit": {"fail_first": 2}})).tell_all(&[]);
    assert_eq!(told.results[0]["status"], "COMMITTED");
    assert_eq!(told.results[0]["unresolved"], json!([]));
    assert_eq!(told.calls("tested"), [1, 3, 0]);
    assert_eq!(told.calls("other"), [1, 1, 0]);
}

#[test]
fn a_commit_that_panics_is_a_failed_attempt_like_any_other() {
    let told = with(&json!({"commit": {"panic_rate": 1}})).tell_all(&[]);
    assert_eq!(told.results[0]["status"], "COMMITTED");
    assert_eq!(told.results[0]["unresolved"], json!(["tested"]));
    assert_eq!(told.calls("tested"), [1, 4, 0]);
}

#[test]
fn a_commit_that_always_fails_is_parked_after_four_calls_and_the_log_says_so() {
    let told = with(&json!({"commit": {"fail_for": ["TX1"]}})).tell_all(&[]);
    assert_eq!(told.results[0]["status"], "COMMITTED");
    assert_eq!(told.results[0]["unresolved"], json!(["tested"]));
    assert_eq!(told.calls("tested"), [1, 4, 0]);
    assert_eq!(told.calls("other"), [1, 1, 0]);
    let parked: Vec<_> = told.stderr.lines().filter(|line| line.contains("parked")).collect();
    let [line] = parked[..] else { panic!("not one line: {parked:?}") };
    for part in [
        "ERROR",
        "parked: the transaction is committed, but this service has not applied it",
        "service=tested",
        "transaction=TX1@",
        "error=\"simulated error\"",
    ] {
        assert!(line.contains(part), "{part} is missing in {line}");
    }
}

#[test]
fn an_abort_that_fails_is_called_again() {
    let behaviour = json!({"prepare": {"error_rate": 1}, "abort": {"fail_first": 2}});
    let told = with(&behaviour).tell_all(&[]);
    assert_eq!(told.results[0]["status"], "ABORTED");
    assert_eq!(told.calls("tested"), [1, 0, 3]);
}

#[test]
fn a_prepare_fails_the_first_time_and_is_not_called_again() {
    let told = with(&json!({"prepare": {"fail_first": 1}})).tell_all(&[]);
    assert_eq!(told.results[0]["reason"]["code"], "failed");
    assert_eq!(told.calls("tested"), [1, 0, 1]);
}

#[test]
fn a_read_only_service_gets_no_commit() {
    let told = with(&json!({"prepare": {"read_only": true}})).tell_all(&[]);
    assert_eq!(told.results[0]["status"], "COMMITTED");
    assert_eq!(told.calls("tested"), [1, 0, 0]);
    assert_eq!(told.calls("other"), [1, 1, 0]);
}

#[test]
fn a_read_only_service_gets_no_abort() {
    let services = json!([
        {"name": "reads", "max_concurrency": 1, "prepare": {"read_only": true}},
        {"name": "refuses", "max_concurrency": 1,
         "prepare": {"latency_ms": 20, "refuse_rate": 1}},
    ]);
    let transactions = json!([transaction("TX1", &["reads", "refuses"])]);
    let told = World::with(&services, &transactions).tell_all(&[]);
    assert_eq!(told.results[0]["status"], "ABORTED");
    assert_eq!(told.calls("reads"), [1, 0, 0]);
}

#[test]
fn a_transaction_with_an_unknown_service_calls_no_one() {
    let services = json!([{"name": "known", "max_concurrency": 1}]);
    let transactions = json!([
        transaction("TX1", &["known", "unknown"]),
        transaction("TX2", &["unknown", "known"]),
    ]);
    let told = World::with(&services, &transactions).tell_all(&[]);
    for result in &told.results {
        assert_eq!(result["status"], "ABORTED");
        assert_eq!(
            result["reason"],
            json!({"service": "unknown", "code": "unknown_service", "message": null})
        );
        assert_eq!(result["attempts"], json!({}));
    }
    assert_eq!(told.calls("known"), [0, 0, 0]);
    assert_eq!(told.report["aborted"], 2);
}

#[test]
fn a_service_named_twice_is_called_once() {
    let services = json!([{"name": "a", "max_concurrency": 2}]);
    let transactions = json!([transaction("TX1", &["a", "a", "a"])]);
    let told = World::with(&services, &transactions).tell_all(&[]);
    assert_eq!(told.results[0]["status"], "COMMITTED");
    assert_eq!(told.calls("a"), [1, 1, 0]);
}

#[test]
fn a_transaction_has_its_own_timeout() {
    let services = json!([
        {"name": "slow", "max_concurrency": 4, "prepare": {"latency_ms": 150}},
    ]);
    let mut hasty = transaction("hasty", &["slow"]);
    hasty["timeout_ms"] = json!(20);
    let mut patient = transaction("patient", &["slow"]);
    patient["timeout_ms"] = json!(60_000);
    let world = World::with(&services, &json!([hasty, patient, transaction("usual", &["slow"])]));
    let usual = |arguments: &[&str]| {
        let statuses = output(world.run().args(arguments)).exited(0).statuses();
        assert_eq!(statuses[..2], ["hasty ABORTED", "patient COMMITTED"]);
        statuses[2].clone()
    };
    assert_eq!(usual(&[]), "usual COMMITTED");
    assert_eq!(usual(&["--timeout-ms", "20"]), "usual ABORTED");
}

#[test]
fn with_a_max_wait_of_zero_a_taken_slot_aborts() {
    let services = json!([
        {"name": "one", "max_concurrency": 1, "max_wait_ms": 0, "prepare": {"latency_ms": 300}},
    ]);
    let transactions = json!([transaction("TX1", &["one"]), transaction("TX2", &["one"])]);
    let told = World::with(&services, &transactions).tell_all(&[]);
    let aborted: Vec<_> = told.results.iter().filter(|it| it["status"] == "ABORTED").collect();
    let [aborted] = aborted[..] else { panic!("not one aborted: {:?}", told.results) };
    assert_eq!(aborted["reason"]["code"], "no_slot");
    assert_eq!(aborted["reason"]["service"], "one");
    assert_eq!(aborted["attempts"], json!({}));
    assert_eq!(told.calls("one"), [1, 1, 0]);
    assert_eq!(told.report["services"]["one"]["max_in_use"], 1);
}

#[test]
fn the_same_seed_gives_the_same_statuses_however_many_are_in_flight() {
    let services = json!([
        {"name": "a", "max_concurrency": 3,
         "prepare": {"latency_ms": [0, 2], "refuse_rate": 0.2, "error_rate": 0.1}},
        {"name": "b", "max_concurrency": 2,
         "prepare": {"panic_rate": 0.1}, "commit": {"error_rate": 0.1, "latency_ms": [0, 1]}},
    ]);
    let transactions: Vec<_> = (0..200)
        .map(|number| {
            let services: &[_] = [&["a"][..], &["b"], &["a", "b"]][number % 3];
            transaction(&format!("TX{number}"), services)
        })
        .collect();
    let world = World::with(&services, &json!(transactions));
    let run = |arguments: &[&str]| output(world.run().args(arguments)).exited(0).stdout;
    let first = run(&["--seed", "7"]);
    assert!(first.contains("ABORTED") && first.contains("COMMITTED"));
    assert_eq!(run(&["--seed", "7"]), first);
    assert_eq!(run(&["--seed", "7", "--max-in-flight", "1"]), first);
    assert_eq!(run(&["--seed", "7", "--max-in-flight", "3"]), first);
    assert_ne!(run(&["--seed", "8"]), first);
    assert_eq!(run(&["--seed", "0"]), run(&[]));
}
