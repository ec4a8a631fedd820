//! A service that exists and has no instances.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{iter, time::Duration};

use dtc::{Outcome, Transaction};
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    broker::place,
    proxy::{Action, Frames, Scope},
    stand::{BOTH, ProxiedPlace, ProxiedSystem, WITHIN},
    system::{Served, Setup},
    watched::RecordedService,
};

const BEGINS: &str = "no instance serves a service";
const ENDS: &str = "a service is served again";

/// The reason in words, as the producer gets it, for one transaction over both services while
/// `stock` has no instances.
#[track_caller]
fn message(stand: &ProxiedSystem) -> Option<String> {
    let answer = stand.answered(&stand.submit(&BOTH), WITHIN);
    let reason = &answer["reason"];
    let end = [&answer["status"], &reason["code"], &reason["service"]];
    assert_eq!(end.map(Value::as_str), ["ABORTED", "no_slot", "stock"].map(Some), "{answer}");
    reason["message"].as_str().map(str::to_owned)
}

/// Later transactions get the same reason.
#[track_caller]
fn nobody_serves_stock(stand: &ProxiedSystem) {
    const COUNT: usize = 3;
    for _ in 0..COUNT {
        let said = message(stand).expect("nobody serves it, as is known");
        assert!(said.starts_with("no instance serves it: start one"), "{said}");
    }
}

/// How often the worker has logged `what` about `stock`, in lines that name its queue.
fn times(stand: &ProxiedSystem, level: &str, what: &str) -> usize {
    let queue = stand.site.name("prepare.stock");
    let said = stand.worker.stderr.all();
    let is_it = |line: &&String| {
        [level, what, "service=stock", &queue].iter().all(|part| line.contains(part))
    };
    said.iter().filter(is_it).count()
}

/// `stock` starts later than everything else, is killed, and starts again.
fn comes_and_goes(max_wait_ms: u64) {
    let service = |name| json!({"name": name, "max_concurrency": 8, "max_wait_ms": max_wait_ms});
    let site = ProxiedPlace::of(place(), json!([service("payments"), service("stock")]));
    let payments = site.service("payments");
    let (worker, producer) = (site.worker(&[]), site.producer());
    let another = site.service("payments");
    let mut stand = ProxiedSystem::of(site, worker, [payments, another], producer);
    nobody_serves_stock(&stand);
    assert_eq!((times(&stand, "WARN", BEGINS), times(&stand, "INFO", ENDS)), (1, 0));
    stand.commits(&["payments"]);

    serves_stock_again(&mut stand);
    assert_eq!((times(&stand, "WARN", BEGINS), times(&stand, "INFO", ENDS)), (1, 1));

    stand.stock.kill9();
    let killed_at = Instant::now();
    let untold = iter::from_fn(|| Some(message(&stand))).take_while(Option::is_none).count();
    println!("told {:.1?} after it is killed; {untold} before", killed_at.elapsed());
    assert!(killed_at.elapsed() < WITHIN, "{:?}", killed_at.elapsed());
    nobody_serves_stock(&stand);
    assert_eq!((times(&stand, "WARN", BEGINS), times(&stand, "INFO", ENDS)), (2, 1));

    serves_stock_again(&mut stand);
    assert_eq!((times(&stand, "WARN", BEGINS), times(&stand, "INFO", ENDS)), (2, 2));
}

/// An instance starts; the worker logs it, and transactions commit.
fn serves_stock_again(stand: &mut ProxiedSystem) {
    let said = stand.worker.stderr.count();
    stand.stock = stand.site.service("stock");
    let (_, line) = stand.worker.stderr.wait_for_from(said, ENDS, WITHIN).expect("it is said");
    println!("{line}");
    stand.commits(&BOTH);
}

#[test]
fn a_service_without_instances_is_distinguished_from_a_busy_one_where_prepares_wait() {
    comes_and_goes(1000);
}

#[test]
fn a_service_without_instances_is_distinguished_from_a_busy_one_with_a_max_wait_of_zero() {
    comes_and_goes(0);
}

/// The only slot of `stock` is held when its instance dies, and a prepare would wait there for a
/// minute: no message would report it.
#[test]
fn a_service_whose_only_instance_died_is_reported_as_without_instances() {
    const COUNT: usize = 10;
    let site = ProxiedPlace::of(
        place(),
        json!([
            {"name": "payments", "max_concurrency": 8},
            {"name": "stock", "max_concurrency": 1, "max_wait_ms": 60_000,
                "commit": {"hang_rate": 1}},
        ]),
    );
    let services = BOTH.map(|name| site.service(name));
    let (worker, producer) = (site.worker(&[]), site.producer());
    let mut stand = ProxiedSystem::of(site, worker, services, producer);
    let finish = format!("{}/", stand.site.name("finish"));
    let frames = Frames::publishes().on("dtc worker w1").about(&finish);
    let told_to_commit = stand.site.proxy.rule(frames, Scope::All, Action::Count);
    let holder = stand.submit(&["stock"]);
    assert!(told_to_commit.has_come(1, WITHIN), "{holder} is told to commit");
    stand.stock.kill9();

    let began = Instant::now();
    let ids: Vec<_> = (0..COUNT).map(|_| stand.submit(&["stock"])).collect();
    // The first one finds no instance before that is known.
    for id in &ids {
        let answer = stand.answered(id, Duration::from_secs(25).saturating_sub(began.elapsed()));
        println!("{answer} {:.1?}", began.elapsed());
        let message = answer["reason"]["message"].as_str().unwrap_or_default();
        assert!(message.starts_with("no instance serves it") || *id == ids[0], "{answer}");
    }
    assert_eq!(times(&stand, "WARN", BEGINS), 1);
    stand.commits(&["payments"]);
}

/// One of them waits at the queue, and the others in the worker.
#[test]
fn a_request_that_waits_for_a_service_without_instances_is_served_when_one_starts() {
    const COUNT: usize = 50;
    // Less than a transaction's own timeout, and more than an instance takes to start.
    let service = |name| json!({"name": name, "max_concurrency": 8, "max_wait_ms": 4000});
    let site = ProxiedPlace::of(place(), json!([service("payments"), service("stock")]));
    let payments = site.service("payments");
    let (worker, producer) = (site.worker(&[]), site.producer());
    let another = site.service("payments");
    let mut stand = ProxiedSystem::of(site, worker, [payments, another], producer);
    let ids: Vec<_> = (0..COUNT).map(|_| stand.submit(&BOTH)).collect();
    stand.worker.wait_for_line(BEGINS, WITHIN);
    stand.stock = stand.site.service("stock");
    for id in &ids {
        let answer = stand.answered(id, WITHIN);
        assert_eq!(answer["status"], "COMMITTED", "{answer}");
        stand.site.is_committed_once(id, &BOTH);
    }
    stand.worker.wait_for_line(ENDS, WITHIN);
    assert_eq!((times(&stand, "WARN", BEGINS), times(&stand, "INFO", ENDS)), (1, 1));
}

/// Before one request there are many for a service without instances: far more than may wait in the
/// worker.
#[tokio::test(flavor = "multi_thread")]
async fn requests_for_a_service_without_instances_delay_no_other_service() {
    const COUNT: usize = 1500;
    let open = RecordedService::willing();
    let mut dead = Served::new("dead", 10, &RecordedService::willing());
    (dead.instances, dead.max_wait) = (0, Duration::from_secs(1));
    let system = Setup::new([Served::new("open", 10, &open), dead]).alone().tune(|settings| {
        let coordinator = &mut settings.coordinator;
        (coordinator.in_flight_max, coordinator.waiting_max) = (16, 64);
        coordinator.prepare_timeout = Duration::from_secs(5);
    });
    let system = system.start().await;
    let transactions =
        (0..COUNT).map(|n| Transaction::new(format!("dead{n}"), ["dead"], json!({})));
    let submitted =
        join_all(transactions.map(|transaction| system.client.submit(transaction))).await;
    assert!(submitted.iter().all(Result::is_ok), "{submitted:?}");
    let began = Instant::now();
    let answer = system.run("other", &["open"], json!({})).await;
    let took = began.elapsed();
    println!("behind {COUNT} requests for a service that nobody serves: {took:.1?}");
    assert_eq!(answer.outcome, Outcome::Committed, "{answer:?}");
    system.stop().await;
    assert!(took < Duration::from_secs(15), "{took:.1?}");
}
