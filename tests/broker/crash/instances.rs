//! Instances that are killed or frozen while they hold prepared transactions.

use std::time::Duration;

use dtc::clock::Clock;
use serde_json::json;

use super::{
    PATIENCE, READY, System,
    ledger::{Call, Ledger, assert_cap_holds, assert_none_called_again, assert_services_hold},
    load::{Load, Plan},
    until,
};
use crate::{broker::place, processes::LIMIT};

const SERVICES: &[&str] = &["payments", "stock"];

/// How many slots each instance of `payments` has. It is asked before `stock`: while a prepare of
/// `stock` takes its time, all of them are in use.
const CAP: usize = 10;

/// How long a prepare of `stock` takes.
const STOCK_TAKES: Duration = Duration::from_secs(3);

fn system() -> System {
    let payments = json!({"name": "payments", "max_concurrency": CAP, "max_wait_ms": 60_000});
    let stock = json!({"name": "stock", "max_concurrency": 1000, "max_wait_ms": 60_000,
        "prepare": {"latency_ms": STOCK_TAKES.as_millis()}});
    System::new(place(), json!([payments, stock]))
}

/// When the instance with this label has prepared each branch that it holds: a file that is
/// incomplete when an instance is killed is not a branch.
fn held_by(system: &System, label: &str) -> Vec<Duration> {
    let Ledger { calls, prepared, .. } = system.ledger("payments");
    let prepared_at = |branch: &str| {
        let end = calls.iter().find(|it| !it.is_start && it.branch == branch);
        end.map(Call::at)
    };
    let branches = prepared.iter().filter_map(|name| name.rsplit('@').next());
    branches.filter(|it| it.starts_with(&format!("{label}-"))).filter_map(prepared_at).collect()
}

/// Whether all slots of the instance with this label are in use, and none will soon be free: a
/// worker that doesn't know the services yet may let one transaction through first, and the others
/// when that one is answered.
fn has_just_filled(system: &System, label: &str) -> bool {
    let held = held_by(system, label);
    let now = Duration::from_millis(Clock::start().now().as_millis());
    held.len() == CAP && held.iter().all(|at| now < *at + STOCK_TAKES / 2)
}

fn plan(total: usize) -> Plan {
    Plan { services: SERVICES, total, per_second: 200, timeout: Some(PATIENCE) }
}

#[test]
fn what_a_killed_instance_had_prepared_is_finished_by_another() {
    let system = system();
    let stock = system.instance("stock", "stock", &[]);
    let mut killed = system.instance("payments", "killed", &[]);
    let worker = system.worker("w1", &[]);
    // More than it has slots: those that the worker lets through before it knows the services end
    // earlier.
    let load = Load::start(&system, "t", plan(3 * CAP));
    until("its slots are in use", || has_just_filled(&system, "killed"));
    killed.kill9();
    assert_eq!(held_by(&system, "killed").len(), CAP, "nothing was decided yet");
    let other = system.instance("payments", "other", &[]);

    let results = load.results();
    system.wait_until_nothing_is_prepared();
    let ledgers = system.ledgers();
    let by_other =
        ledgers[0].calls.iter().filter(|it| it.is_start && it.instance.starts_with("other-"));
    println!(
        "killed with {CAP} prepared: {:?}; the other instance was called {} times",
        results.counts(),
        by_other.count()
    );
    assert_eq!(results.committed().len(), 3 * CAP, "{:?}", results.counts());
    assert_services_hold(&ledgers, &results.committed());
    assert_none_called_again(&ledgers);
    assert_cap_holds(&ledgers[..1], CAP);
    drop((stock, worker, other));
}

#[test]
fn an_instance_frozen_for_too_long_neither_undoes_nor_exceeds_anything_when_it_wakes() {
    let system = system();
    let stock = system.instance("stock", "stock", &[]);
    let frozen = system.instance("payments", "frozen", &["--heartbeat", "1s"]);
    let worker = system.worker("w1", &[]);
    let load = Load::start(&system, "t", plan(3 * CAP));
    until("its slots are in use", || has_just_filled(&system, "frozen"));
    frozen.stop();
    let other = system.instance("payments", "other", &[]);
    let results = load.results();
    let lines = frozen.stderr.count();
    frozen.cont();
    let again = frozen.stderr.wait_for_from(lines, READY, LIMIT);
    assert!(again.is_some(), "it connects again");

    let more = Load::start(&system, "later", plan(4 * CAP)).results();
    system.wait_until_nothing_is_prepared();
    let ledgers = system.ledgers();
    let most = assert_cap_holds(&ledgers[..1], CAP);
    println!(
        "frozen with {CAP} of {} prepared: {:?}, and when it was awake {:?}; at most {most} of \
        {CAP} slots in use",
        3 * CAP,
        results.counts(),
        more.counts()
    );
    let committed = &results.committed() | &more.committed();
    assert_eq!(committed.len(), 7 * CAP);
    assert_services_hold(&ledgers, &committed);
    assert_none_called_again(&ledgers);
    assert_eq!(most, CAP, "the cap is reached");
    drop((stock, worker, other));
}

/// With that many slots several prepares travel in one message, which is acknowledged when the last
/// of them is finished. Prepares that were finished before the instance was killed are delivered
/// again with the others, may be prepared again, and are then undone.
#[test]
fn an_instance_killed_with_several_prepares_in_a_message_loses_and_doubles_nothing() {
    const SLOTS: usize = 200;
    const TOTAL: usize = 1500;
    let service = |name| {
        json!({"name": name, "max_concurrency": SLOTS, "max_wait_ms": 60_000,
            "prepare": {"latency_ms": [1, 40]}, "commit": {"latency_ms": [1, 40]}})
    };
    let system = System::new(place(), json!([service("payments"), service("stock")]));
    let stock = system.instance("stock", "stock", &[]);
    let mut killed = system.instance("payments", "killed", &[]);
    let other = system.instance("payments", "other", &[]);
    let worker = system.worker("w1", &[]);
    let load = Load::start(&system, "t", Plan { per_second: 500, ..plan(TOTAL) });
    load.wait_for(TOTAL / 3);
    killed.kill9();

    let results = load.results();
    system.wait_until_nothing_is_prepared();
    let ledgers = system.ledgers();
    let again = ledgers[0].called_again().len();
    println!("{:?}; {again} were called for again", results.counts());
    assert_services_hold(&ledgers, &results.committed());
    assert_none_called_again(&ledgers[1..]);
    assert_cap_holds(&ledgers, SLOTS);
    // No more was delivered again than was in progress.
    assert!(again <= SLOTS, "{again}");
    assert_eq!(results.committed().len(), TOTAL, "{:?}", results.counts());
    drop((stock, worker, other));
}
