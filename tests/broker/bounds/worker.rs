//! The waits of a worker.

use std::time::Duration;

use crate::{
    proxy::{Action, Frames, QUEUE_DECLARE_OK, Scope},
    stand::{BOTH, ProxiedPlace, ProxiedSystem},
};

const PUBLISH: &str = "dtc worker w1 (publish)";
const CONSUME: &str = "dtc worker w1 (consume)";

#[test]
fn a_worker_does_not_wait_for_an_append_that_is_never_confirmed() {
    let stand = ProxiedSystem::new();
    let journal = stand.site.name("journal");
    let mark = stand.marked();
    let stopped = stand.site.proxy.stop(Frames::confirms().on(PUBLISH).about(&journal));
    stand.commits_again(&mark, &stopped, &BOTH);
    stand.worker_says(&mark, &journal);
}

#[test]
fn an_append_that_is_never_read_back_is_read_on_another_channel() {
    let stand = ProxiedSystem::new();
    let journal = stand.site.name("journal");
    let mark = stand.marked();
    let stopped = stand.site.proxy.stop(Frames::deliveries().on(CONSUME).about(&journal));
    stand.commits_again(&mark, &stopped, &BOTH);
    stand.worker_says(&mark, &journal);
}

#[test]
fn a_result_that_is_never_confirmed_is_published_again_and_its_request_acknowledged() {
    let stand = ProxiedSystem::new();
    let (requests, results) = (stand.site.name("requests"), stand.site.name("results/"));
    let mark = stand.marked();
    let proxy = &stand.site.proxy;
    let acknowledged = proxy.rule(Frames::acks().about(&requests), Scope::All, Action::Count);
    let stopped = proxy.stop(Frames::confirms().on(PUBLISH).about(&results));
    stand.commits_again(&mark, &stopped, &BOTH);
    let is_acknowledged = acknowledged.has_come(1, mark.left());
    assert!(is_acknowledged, "the request is still in hand");
    stand.worker_says(&mark, &stand.site.name("results"));
}

#[test]
fn a_worker_does_not_wait_for_prepares_that_are_never_confirmed() {
    let stand = ProxiedSystem::new();
    let prepares = stand.site.name("prepare/");
    let mark = stand.marked();
    let stopped = stand.site.proxy.stop(Frames::confirms().on(PUBLISH).about(&prepares));
    stand.commits_again(&mark, &stopped, &BOTH);
    stand.worker_says(&mark, &stand.site.name("prepare"));
}

#[test]
fn requests_that_are_never_delivered_are_asked_for_again() {
    let stand = ProxiedSystem::new();
    let requests = stand.site.name("requests");
    let mark = stand.marked();
    let deliveries = Frames::deliveries().on(CONSUME).about(&requests);
    let stopped = stand.site.proxy.stop_channels(deliveries);
    stand.commits_again(&mark, &stopped, &BOTH);
    stand.worker_says(&mark, &requests);
}

#[test]
fn replies_that_are_never_delivered_are_asked_for_again() {
    let stand = ProxiedSystem::new();
    let replies = stand.site.name("replies");
    let mark = stand.marked();
    let stopped = stand.site.proxy.stop(Frames::deliveries().on(CONSUME).about(&replies));
    stand.commits_again(&mark, &stopped, &BOTH);
    stand.worker_says(&mark, &replies);
}

/// The worker holds as many requests as it may, and has acknowledged all of them.
#[test]
fn requests_whose_acknowledgements_get_lost_do_not_use_up_what_a_worker_may_hold() {
    let stand = ProxiedSystem::at(ProxiedPlace::new(), &["--max-in-flight", "2"]);
    let requests = stand.site.name("requests");
    let mark = stand.marked();
    let stopped = stand.site.proxy.stop(Frames::acks().on(CONSUME).about(&requests));
    for number in 1..=2 {
        stand.submit(&BOTH);
        stopped.wait_for(number);
    }
    stand.commits_again(&mark, &stopped, &BOTH);
    stand.worker_says(&mark, &requests);
}

/// The broker reads no more of the worker's publishes, and is alive otherwise.
#[test]
fn a_worker_gives_up_a_publishing_connection_that_the_broker_no_longer_reads() {
    let stand = ProxiedSystem::new();
    let mark = stand.marked();
    let stopped = stand.site.proxy.stop(Frames::publishes().on(PUBLISH));
    stand.commits_again(&mark, &stopped, &BOTH);
    stand.worker_says(&mark, &stand.site.name("replies"));
}

/// The worker has not used the service before.
#[test]
fn a_lookup_of_a_service_that_gets_no_answer_is_repeated() {
    let site = ProxiedPlace::new();
    let services = BOTH.map(|name| site.service(name));
    let (worker, producer) = (site.worker(&[]), site.producer());
    let stand = ProxiedSystem::of(site, worker, services, producer);
    stand.commits(&["payments"]);
    let queue = stand.site.name("prepare.stock");
    let mark = stand.marked();
    let looks = Frames::answers(QUEUE_DECLARE_OK).on("dtc worker w1").about(&queue);
    let stopped = stand.site.proxy.stop(looks);
    stand.commits_again(&mark, &stopped, &BOTH);
    stand.worker_says(&mark, &queue);
}

/// A publish that arrives while a stream's writer moves to another node is lost silently, and so
/// are the stream's consumers. It took 10 s until the append was published again, and 3 s more
/// until it was read.
#[test]
fn an_append_that_is_lost_with_the_readers_of_the_journal_is_repeated_and_read_in_seconds() {
    let stand = ProxiedSystem::new();
    let (journal, proxy) = (stand.site.name("journal"), &stand.site.proxy);
    let publishes = Frames::publishes().on("dtc worker w1").about(&journal);
    let lost = proxy.rule_for(1, publishes, Scope::Channels, Action::Swallow);
    proxy.stop_channels(Frames::deliveries().on("dtc worker w1").about(&journal));
    let answer = stand.answered(&stand.submit(&BOTH), Duration::from_secs(6));
    println!("{answer}");
    assert_eq!(answer["status"], "COMMITTED", "{answer}");
    assert_eq!(lost.count(), 1);
}
