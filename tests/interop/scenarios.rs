//! Whole transactions over a service in Python and one of ours, requested by a producer in Python.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{collections::BTreeSet, fs};

use serde_json::{Value, json};

use crate::{
    System, order,
    processes::{LIMIT, Process},
    results, until,
};

const PATIENT: u32 = 60_000;

fn status(result: &Value) -> (&str, &str) {
    (result["status"].as_str().unwrap(), result["reason"]["code"].as_str().unwrap_or("-"))
}

#[test]
fn two_transactions_commit() {
    let system = System::new(2, PATIENT, 0);
    let (_books, _payments, _worker) =
        (system.books("py"), system.payments(), system.world.worker("w1"));
    let results = system.run(&json!([order("TX1", &json!({})), order("TX2", &json!({}))]));
    assert_eq!(status(&results["TX1"]), ("COMMITTED", "-"));
    assert_eq!(status(&results["TX2"]), ("COMMITTED", "-"));
    let books = system.both_hold(&["TX1", "TX2"]);
    assert_eq!(books.whats_of("TX1"), ["prepare", "commit"]);
    // It doesn't execute again what it has executed, though the workers ask with another
    // requested_at.
    let again = system.run(&json!([order("TX1", &json!({"other": "content"}))]));
    assert_eq!(status(&again["TX1"]), ("ABORTED", "id_reused"));
    system.both_hold(&["TX1", "TX2"]);
}

#[test]
fn many_transactions_at_two_workers_commit_once_at_both_services() {
    const COUNT: usize = 200;
    let system = System::new(4, PATIENT, 0);
    let _services = (system.books("py1"), system.books("py2"), system.payments());
    let _workers = (system.world.worker("w1"), system.world.worker("w2"));
    let ids: Vec<_> = (0..COUNT).map(|number| format!("t{number:03}")).collect();
    let orders: Vec<_> = ids.iter().map(|id| order(id, &json!({}))).collect();
    let results = system.run(&json!(orders));
    assert!(results.values().all(|it| it["status"] == "COMMITTED"), "{results:?}");
    let ids: Vec<_> = ids.iter().map(String::as_str).collect();
    let books = system.both_hold(&ids);
    // Two calls for each, unless the machine is slow: these instances inquire about what isn't
    // committed within seconds, and both are told to commit it. So one that is committing may be
    // joined by the other; the store lets one of them through. Of 1200 transactions on a busy
    // machine that happened to 11, each with an inquiry.
    let calls = |what: &str, of: &str| {
        let of_it = books.calls.iter().filter(|call| call[1] == what && call[2] == of);
        of_it.map(|call| call[0].as_str()).collect::<Vec<_>>()
    };
    for id in ids {
        assert_eq!(calls("prepare", id).len(), 1, "{id} is prepared once");
        let commits = calls("commit", id);
        let by: BTreeSet<_> = commits.iter().collect();
        assert!(!commits.is_empty() && by.len() == commits.len(), "{id}: {commits:?}");
        assert_eq!(calls("abort", id), [""; 0]);
    }
    let instances: BTreeSet<_> = books.calls.iter().map(|it| &it[0]).collect();
    println!("{COUNT} committed by {} instances, {} calls", instances.len(), books.calls.len());
}

#[test]
fn a_producer_in_node_puts_many_transactions_into_one_message() {
    let system = System::new(4, PATIENT, 0);
    let (_books, _payments, _worker) =
        (system.books("py"), system.payments(), system.world.worker("w1"));
    let ids: Vec<_> = (0..100).map(|number| format!("t{number:03}")).collect();
    let orders: Vec<_> = ids.iter().map(|id| order(id, &json!({}))).collect();
    let results = system.run_by_node(&json!(orders));
    assert_eq!(results.len(), ids.len());
    assert!(results.values().all(|it| it["status"] == "COMMITTED"), "{results:?}");
    system.both_hold(&ids.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn a_refusal_or_a_failure_aborts_and_leaves_nothing_prepared() {
    let system = System::new(2, PATIENT, 0);
    let (_books, _payments, _worker) =
        (system.books("py"), system.payments(), system.world.worker("w1"));
    let results = system.run(&json!([
        order("t1", &json!({"refuse": "sold out"})),
        order("t2", &json!({"fail_prepare": true})),
        order("t3", &json!({"read_only": true})),
    ]));
    assert_eq!(status(&results["t1"]), ("ABORTED", "refused"));
    assert_eq!(results["t1"]["reason"]["message"], "sold out");
    assert_eq!(status(&results["t2"]), ("ABORTED", "failed"));
    assert_eq!(status(&results["t3"]), ("COMMITTED", "-"));
    until("what failed is undone", || {
        system.held_by_books().whats_of("t2") == ["prepare", "abort"]
    });
    let books = system.held_by_books();
    assert_eq!((books.whats_of("t1"), books.whats_of("t3")), (vec!["prepare"], vec!["prepare"]));
    assert_eq!((books.committed.len(), system.committed_by_payments()), (0, vec!["t3".to_owned()]));
}

/// One transaction has the only slot of `books` until its commit's gate is opened.
fn with_the_slot_taken(max_wait_ms: u32, test: impl FnOnce(&System, &dyn Fn())) {
    let system = System::new(1, max_wait_ms, 0);
    let (_books, _payments, _worker) =
        (system.books("py"), system.payments(), system.world.worker("w1"));
    let (gate, name) = system.gate("gate");
    let holder = system.produce(&json!([order("holder", &json!({"commit_gate": name}))]));
    until("the slot is taken", || {
        system.held_by_books().whats_of("holder") == ["prepare", "commit"]
    });
    test(&system, &|| fs::write(&gate, "").unwrap());
    assert_eq!(status(&results(holder)["holder"]), ("COMMITTED", "-"));
}

#[test]
fn a_full_service_with_a_max_wait_of_zero_is_reported_as_no_slot() {
    with_the_slot_taken(0, |system, open| {
        let results = system.run(&json!([order("t", &json!({}))]));
        assert_eq!(status(&results["t"]), ("ABORTED", "no_slot"));
        assert_eq!(results["t"]["reason"]["service"], "books");
        assert_eq!(system.held_by_books().whats_of("t"), [""; 0]);
        open();
        system.both_hold(&["holder"]);
    });
}

#[test]
fn a_prepare_waits_for_a_slot() {
    with_the_slot_taken(PATIENT, |system, open| {
        let waiting = system.produce(&json!([order("t", &json!({}))]));
        waiting.wait_for_line("sent", LIMIT);
        assert_eq!(system.held_by_books().whats_of("t"), [""; 0]);
        open();
        assert_eq!(status(&results(waiting)["t"]), ("COMMITTED", "-"));
        let books = system.both_hold(&["holder", "t"]);
        let ids: Vec<_> = books.calls.iter().map(|call| call[2].as_str()).collect();
        assert_eq!(ids, ["holder", "holder", "t", "t"]);
    });
}

#[test]
fn a_commit_that_fails_twice_succeeds_and_one_that_keeps_failing_is_parked_and_settled() {
    let system = System::new(2, PATIENT, 0);
    let (_books, _payments, _worker) =
        (system.books("py"), system.payments(), system.world.worker("w1"));
    let results = system.run(&json!([order("t1", &json!({"fail_commits": 2}))]));
    assert_eq!(status(&results["t1"]), ("COMMITTED", "-"));
    assert!(results["t1"].get("unresolved").is_none(), "{results:?}");
    let books = system.both_hold(&["t1"]);
    assert_eq!(books.whats_of("t1"), ["prepare", "commit", "commit", "commit"]);

    let (gate, name) = system.gate("gate");
    let results = system.run(&json!([order("t2", &json!({"commit_fails_until": name}))]));
    assert_eq!(status(&results["t2"]), ("COMMITTED", "-"));
    assert_eq!(results["t2"]["unresolved"], json!(["books"]));
    fs::write(gate, "").unwrap();
    system.both_hold(&["t1", "t2"]);
}

#[test]
fn another_instance_finishes_what_a_killed_one_had_prepared() {
    let system = System::new(2, PATIENT, 10_000);
    let (mut killed, _payments, _worker) =
        (system.books("killed"), system.payments(), system.world.worker("w1"));
    let producer = system.produce(&json!([order("t", &json!({}))]));
    until("it is prepared", || system.held_by_books().prepared.len() == 1);
    killed.kill9();
    assert_eq!(system.held_by_books().prepared.len(), 1, "nothing was decided yet");
    let _other = system.books("other");
    assert_eq!(status(&results(producer)["t"]), ("COMMITTED", "-"));
    let books = system.both_hold(&["t"]);
    assert_eq!(books.whats_of("t"), ["prepare", "commit"]);
    assert!(books.calls[0][0].starts_with("killed-") && books.calls[1][0].starts_with("other-"));
}

#[test]
fn a_worker_that_is_killed_is_taken_over_from_and_nothing_is_prepared_twice() {
    let system = System::new(2, PATIENT, 0);
    let (_books, _payments) = (system.books("py"), system.payments());
    let mut worker = system.world.worker("w1");
    let (gate, name) = system.gate("gate");
    let producer = system.produce(&json!([order("t", &json!({"prepare_gate": name}))]));
    until("it is being prepared", || system.held_by_books().whats_of("t") == ["prepare"]);
    worker.kill9();
    let _other = system.world.worker("w2");
    fs::write(gate, "").unwrap();
    assert_eq!(status(&results(producer)["t"]), ("COMMITTED", "-"));
    let books = system.both_hold(&["t"]);
    assert_eq!(books.whats_of("t"), ["prepare", "commit"]);
}

#[test]
fn a_service_whose_queue_is_replaced_consumes_the_new_one() {
    let system = System::new(2, PATIENT, 0);
    let (books, _payments, _worker) =
        (system.books("py"), system.payments(), system.world.worker("w1"));
    let so_far = books.stderr.count();
    let services = system.world.file(
        "other.json",
        &json!([
            {"name": "books", "max_concurrency": 2, "max_wait_ms": 30_000},
            {"name": "payments", "max_concurrency": 100, "max_wait_ms": 60_000},
        ]),
    );
    let mut command = system.world.dtc(&["topology", "apply", "--replace", "books"]);
    command.arg("--services").arg(services);
    Process::start("replace", &mut command).succeeded(LIMIT);
    books.stderr.wait_for_from(so_far, "ready", LIMIT).expect("it serves again");
    let results = system.run(&json!([order("t", &json!({}))]));
    assert_eq!(status(&results["t"]), ("COMMITTED", "-"));
    system.both_hold(&["t"]);
}
