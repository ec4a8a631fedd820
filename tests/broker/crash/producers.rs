//! `dtc submit` that is interrupted or killed.

use std::{collections::BTreeSet, fs};

use dtc::clock::Clock;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{
    System,
    ledger::{Ledger, assert_none_called_again, assert_services_hold},
    stream::waiting_in,
    until,
};
use crate::{
    broker::place,
    processes::{LIMIT, Process},
};

/// Many enough that some are unfinished when the first ends are noticed, late.
const TRANSACTIONS: usize = 1500;

#[test]
fn a_submit_that_is_interrupted_leaves_what_it_began_finished_and_can_be_repeated() {
    let (told, held) = is_stopped(|submit| {
        kill(Pid::from_raw(i32::try_from(submit.id()).unwrap()), Signal::SIGINT).unwrap();
        submit.exited(130, LIMIT);
    });
    assert_eq!(told, held, "it waits for the results of all it has begun");
}

#[test]
fn a_submit_that_is_killed_leaves_what_it_began_finished_and_can_be_repeated() {
    let (told, held) = is_stopped(Process::kill9);
    assert!(told < held, "{told} of {held}");
}

/// How many results it printed, and how many committed.
#[track_caller]
fn is_stopped(stop: impl FnOnce(&mut Process)) -> (usize, usize) {
    let service = |name| {
        json!({"name": name, "max_concurrency": 50, "max_wait_ms": 60_000,
        "prepare": {"latency_ms": [20, 60]}, "commit": {"latency_ms": [20, 60]}})
    };
    let system = System::new(place(), json!([service("payments"), service("stock")]));
    let instances = ["payments", "stock"].map(|it| system.instance(it, it, &[]));
    let workers = ["w1", "w2"].map(|name| system.worker(name, &[]));
    let ids: BTreeSet<_> = (0..TRANSACTIONS).map(|number| format!("t-{number}")).collect();
    let transaction = |id: &String| {
        json!({"id": id, "involved_services": ["payments", "stock"], "data": {},
            "timeout_ms": 60_000})
    };
    let lines: Vec<_> = ids.iter().map(|id| transaction(id).to_string()).collect();
    let path = system.world.path("transactions.ndjson");
    fs::write(&path, lines.join("\n")).unwrap();
    let since = Clock::start().now().as_millis() / 1000;
    let flags = ["--wait", "--requested-at", &since.to_string()];

    let mut submit = system.world.submit(&path, &flags);
    until("some have ended", || submit.stdout.count() >= 20);
    stop(&mut submit);
    let told = committed(&submit.stdout.all());
    until("the workers have taken all", || waiting_in(&system, system.names.requests()) == 0);
    until("all services agree", || {
        let ledgers = system.ledgers();
        let settled = |it: &Ledger| it.prepared.is_empty();
        ledgers.iter().all(settled) && ledgers[0].committed == ledgers[1].committed
    });
    let held: BTreeSet<_> = system.ledger("stock").committed.into_keys().collect();
    assert!(told.is_subset(&held), "told of what isn't held");

    let again = committed(&system.world.submit(&path, &flags).succeeded(LIMIT));
    system.wait_until_nothing_is_prepared();
    println!(
        "stopped when {} of {TRANSACTIONS} were told, {} had committed; then all {}",
        told.len(),
        held.len(),
        again.len()
    );
    let ledgers = system.ledgers();
    assert_eq!(again, ids);
    assert_services_hold(&ledgers, &ids);
    assert_none_called_again(&ledgers);
    drop((instances, workers));
    (told.len(), held.len())
}

/// The ids of committed transactions in these lines.
fn committed(lines: &[String]) -> BTreeSet<String> {
    let mut committed = BTreeSet::new();
    for line in lines {
        let result: Value = serde_json::from_str(line).unwrap();
        assert_eq!(result["status"], "COMMITTED", "{line}");
        committed.insert(result["id"].as_str().unwrap().to_owned());
    }
    committed
}
