//! A request that kills every worker, and others that only look like it.

use dtc::protocol::message::{Outcome, ReasonCode};
use serde_json::{Value, json};

use super::{
    System,
    ledger::{assert_none_called_again, assert_services_hold},
    stream::{Watch, look_into, publish_request, waiting_in},
    until,
};
use crate::{
    broker::place,
    processes::{LIMIT, Process},
};

/// How many workers die at most.
const CRASHES_MAX: usize = 40;
/// How often a request may be delivered before it is tried alone.
const SUSPECT_AFTER: usize = 20;
/// How many workers may die while they try it alone.
const TRIES_MAX: usize = 5;
/// How many may be killed while they look for the service: those were not trying it.
const LOOKING_MAX: usize = 5;

/// Submits these transactions, once each, without waiting for results: a producer that waits
/// publishes again.
fn submit(system: &System, transactions: &[Value]) {
    let lines: Vec<_> = transactions.iter().map(Value::to_string).collect();
    let mut command = system.world.dtc(&["submit", "-"]);
    Process::start_given("producer", &mut command, lines.join("\n")).succeeded(LIMIT);
}

fn transaction(id: &str, service: &str) -> Value {
    json!({"id": id, "involved_services": [service], "data": {}, "timeout_ms": 3_600_000})
}

/// Starts one worker after the other, and kills each when it has asked for `id`, or has shown that
/// it will not; returns how many have asked until it was decided.
fn die_of(system: &System, id: &str, journal: &Watch, commands: &Watch) -> usize {
    let decided = || !journal.decisions(id).is_empty();
    let mut asked = 0;
    for number in 0..CRASHES_MAX {
        let name = format!("w{number}");
        let mut worker = system.worker(&name, &[]);
        until("it takes the request", || commands.has_asked(&name, id) || decided());
        if decided() {
            worker.terminate();
            worker.exited(0, LIMIT);
            return asked;
        }
        asked += 1;
        worker.kill9();
    }
    panic!("{asked} workers have died of it, and it isn't given up")
}

/// Every worker dies of one request, which is given up; those beside it, which were delivered as
/// often, are carried out.
#[test]
fn a_request_that_kills_every_worker_aborts_and_its_neighbours_commit() {
    let hangs = json!({"name": "payments", "max_concurrency": 3, "prepare": {"hang_rate": 1}});
    let slow = json!({"name": "stock", "max_concurrency": 1, "max_wait_ms": 86_400_000,
        "prepare": {"latency_ms": 8000}});
    let system = System::new(place(), json!([hangs, slow]));
    let instances = ["payments", "stock"].map(|name| system.instance(name, name, &[]));
    let (journal, commands) = (Watch::journal(&system), Watch::commands(&system));
    let neighbours = ["n-0", "n-1", "n-2"];
    submit(&system, &[transaction("poison", "payments")]);
    submit(&system, &neighbours.map(|id| transaction(id, "stock")));

    let asked = die_of(&system, "poison", &journal, &commands);
    let decisions = journal.decisions("poison");
    assert!(decisions.iter().all(|it| it.outcome == Outcome::Aborted), "{decisions:?}");
    let reason = decisions[0].reason.as_ref().unwrap();
    let message = reason.message.as_deref().unwrap_or_default();
    println!("{asked} workers died, and the next one gave it up ({}: {message})", reason.code);
    assert_eq!(reason.code, ReasonCode::Failed);
    let fewest = SUSPECT_AFTER + TRIES_MAX;
    assert!((fewest..=fewest + LOOKING_MAX).contains(&asked), "{asked} died of it");

    let worker = system.worker("survivor", &[]);
    until("the neighbours are decided", || {
        neighbours.iter().all(|id| !journal.decisions(id).is_empty())
    });
    until("the requests are gone", || waiting_in(&system, system.names.requests()) == 0);
    system.wait_until_nothing_is_prepared();
    let ledgers = system.ledgers();
    assert_eq!(ledgers[0].started("prepare"), 1, "whatever dies, the service is called once");
    assert_none_called_again(&ledgers);
    assert_services_hold(&ledgers[1..], &neighbours.map(str::to_owned).into());
    drop((instances, worker));
}

/// The others came in the same message, and were delivered as often until they were given messages of
/// their own.
#[test]
fn a_request_that_kills_every_worker_takes_no_others_of_its_message_with_it() {
    let hangs = json!({"name": "payments", "max_concurrency": 3, "prepare": {"hang_rate": 1}});
    let stock = json!({"name": "stock", "max_concurrency": 3, "max_wait_ms": 86_400_000});
    let system = System::new(place(), json!([hangs, stock]));
    let _payments = system.instance("payments", "payments", &[]);
    let (journal, commands) = (Watch::journal(&system), Watch::commands(&system));
    let neighbours = ["n-0", "n-1"];
    let requests = [
        transaction("n-0", "stock"),
        transaction("poison", "payments"),
        transaction("n-1", "stock"),
    ];
    publish_request(&system, &Value::from_iter(requests));

    // Its neighbours are not begun meanwhile: their service has no instance.
    let mut deaths = 0;
    loop {
        let mut worker = system.worker(&format!("w{deaths}"), &[]);
        until("it takes the request", || commands.has_asked(&format!("w{deaths}"), "poison"));
        let is_replaced = worker.stderr.text().contains("one message for each request");
        worker.kill9();
        deaths += 1;
        if is_replaced {
            break;
        }
        assert!(deaths <= 5, "the message is not replaced");
    }
    println!("the message was replaced after {} deaths", deaths - 1);
    assert!(deaths > 3);
    let _stock = system.instance("stock", "stock", &[]);
    let worker = system.worker("survivor", &[]);
    until("the neighbours are decided", || {
        neighbours.iter().all(|id| !journal.decisions(id).is_empty())
    });
    system.wait_until_nothing_is_prepared();
    assert_services_hold(&system.ledgers()[1..], &neighbours.map(str::to_owned).into());
    drop(worker);
}

/// It was aborted as "delivered too often", though no worker had tried it.
#[test]
fn a_request_delivered_25_times_to_a_foreign_consumer_is_carried_out() {
    let system = System::new(place(), json!([{"name": "stock", "max_concurrency": 1}]));
    let instance = system.instance("stock", "stock", &[]);
    let journal = Watch::journal(&system);
    submit(&system, &[transaction("t-0", "stock")]);
    look_into(&system, &system.names.requests(), 25);

    // RabbitMQ 3.10 counts these as deliveries; 4.3 does not.
    let worker = system.worker("w1", &[]);
    until("it is decided", || !journal.decisions("t-0").is_empty());
    assert_eq!(journal.decisions("t-0")[0].outcome, Outcome::Committed);
    system.wait_until_nothing_is_prepared();
    assert_services_hold(&system.ledgers(), &["t-0".to_owned()].into());
    drop((instance, worker));
}

/// All of them were aborted as "delivered too often", even those that had only waited.
#[test]
fn requests_that_wait_for_a_slot_while_22_workers_are_killed_are_carried_out() {
    const KILLS: usize = 22;
    let slow = json!({"name": "stock", "max_concurrency": 1, "max_wait_ms": 86_400_000,
        "prepare": {"latency_ms": 10_000}});
    let system = System::new(place(), json!([slow]));
    let instance = system.instance("stock", "stock", &[]);
    let (journal, commands) = (Watch::journal(&system), Watch::commands(&system));
    let ids = ["t-0", "t-1", "t-2"];
    submit(&system, &ids.map(|id| transaction(id, "stock")));

    for number in 0..KILLS {
        let name = format!("w{number}");
        let mut worker = system.worker(&name, &[]);
        until("it takes a request", || ids.iter().any(|id| commands.has_asked(&name, id)));
        worker.kill9();
    }
    let left = ids.iter().filter(|id| journal.decisions(id).is_empty()).count();
    println!("{left} of {} wait after {KILLS} kills", ids.len());
    let worker = system.worker("survivor", &[]);
    for id in ids {
        until("it is decided", || !journal.decisions(id).is_empty());
        assert_eq!(journal.decisions(id)[0].outcome, Outcome::Committed);
    }
    system.wait_until_nothing_is_prepared();
    assert_services_hold(&system.ledgers(), &ids.map(str::to_owned).into());
    drop((instance, worker));
}
