//! A service never holds more than its cap, and reaches it under load.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{collections::BTreeMap, time::Duration};

use dtc::{Outcome, Transaction, protocol::message::Cap};
use serde_json::json;

use crate::{
    system::{Served, Setup},
    watched::RecordedService,
};

const CAP: u32 = 4;
const COUNT: usize = 200;

/// The most that the service ever held, and the most that each of its instances did.
struct Most {
    in_all: usize,
    by_instance: Vec<usize>,
}

/// Lets two workers bring a service to its cap.
async fn under_pressure(change: impl FnOnce(&mut Served)) -> Most {
    let watched = RecordedService::slow(Duration::from_millis(10));
    let mut service = Served::new("A", CAP, &watched);
    change(&mut service);
    let instances = service.instances;
    let system = Setup::new([service]).workers(2).start().await;
    let transactions = (0..COUNT).map(|n| Transaction::new(format!("t{n}"), ["A"], json!({})));
    let answers = system.run_all(transactions.collect()).await;
    system.stop().await;
    assert!(answers.iter().all(|answer| answer.outcome == Outcome::Committed), "{answers:?}");
    let book = watched.book();
    let by_instance: BTreeMap<_, _> = book.most_held_by.clone();
    println!(
        "cap {CAP}, {instances} instances: at most {} held at once, by instance {:?}, in {COUNT} \
         transactions",
        book.most_held,
        by_instance.values().collect::<Vec<_>>(),
    );
    Most { in_all: book.most_held, by_instance: by_instance.into_values().collect() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cap_is_reached_and_never_exceeded() {
    let most = under_pressure(|_| ()).await;
    assert_eq!((most.in_all, most.by_instance), (4, vec![4]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_broker_enforces_a_cap_by_itself() {
    let most = under_pressure(|service| service.own_limit = false).await;
    assert_eq!((most.in_all, most.by_instance), (4, vec![4]));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_instance_has_a_cap_of_its_own() {
    let most = under_pressure(|service| {
        service.instances = 2;
        service.own_limit = false;
    });
    let most = most.await;
    assert_eq!((most.in_all, most.by_instance), (8, vec![4, 4]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cap_of_the_service_counts_for_all_instances_together() {
    let most = under_pressure(|service| {
        service.cap = Cap::Service;
        service.instances = 2;
        service.own_limit = false;
    });
    let most = most.await;
    assert_eq!((most.in_all, most.by_instance), (4, vec![4]));
}

/// How many prepares the messages to a service with so many slots contained, and the most that it
/// held at once.
async fn sent_together(slots: u32) -> (Vec<usize>, usize) {
    const COUNT: usize = 1000;
    let watched = RecordedService::slow(Duration::from_millis(5));
    let system = Setup::new([Served::new("A", slots, &watched)]).workers(2).start().await;
    let mut copies = system.raw.copies(&system.names.prepare()).await;
    let transactions = (0..COUNT).map(|n| Transaction::new(format!("t{n}"), ["A"], json!({})));
    let answers = system.run_all(transactions.collect()).await;
    assert!(answers.iter().all(|answer| answer.outcome == Outcome::Committed), "{answers:?}");
    let mut sizes = Vec::new();
    while sizes.iter().sum::<usize>() < COUNT {
        sizes.push(copies.items("dtc.prepare.v1").await.len());
    }
    system.stop().await;
    let book = watched.book();
    book.assert_only_necessary_calls();
    book.assert_nothing_is_held();
    let most_held = book.most_held;
    println!(
        "{slots} slots: {COUNT} prepares in {} messages, at most {most_held} held at once",
        sizes.len()
    );
    (sizes, most_held)
}

#[tokio::test(flavor = "multi_thread")]
async fn with_many_free_slots_one_message_carries_several_prepares() {
    let (sizes, _) = sent_together(2000).await;
    assert!(sizes.iter().any(|size| *size > 1), "{sizes:?}");
    assert!(sizes.iter().all(|size| *size <= 16), "{sizes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_all_of_many_slots_in_use_no_more_than_the_cap_is_held() {
    let (_, most_held) = sent_together(128).await;
    assert!(most_held <= 128, "{most_held}");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_few_slots_the_broker_delivers_each_prepare_alone() {
    let (sizes, most_held) = sent_together(32).await;
    assert!(sizes.iter().all(|size| *size == 1), "{sizes:?}");
    assert!(most_held <= 32, "{most_held}");
}
