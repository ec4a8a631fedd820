//! The waits of a producer.

use crate::{
    proxy::Frames,
    stand::{BOTH, ProxiedSystem},
};

#[test]
fn results_that_are_never_delivered_are_asked_for_again() {
    let stand = ProxiedSystem::new();
    let results = stand.site.name("results");
    let mark = stand.marked();
    let stopped = stand.site.proxy.stop(Frames::deliveries().on("(results)").about(&results));
    stand.commits_again(&mark, &stopped, &BOTH);
    stand.producer_says(&mark, &results);
}

#[test]
fn requests_that_are_never_confirmed_still_get_results() {
    let stand = ProxiedSystem::new();
    let requests = stand.site.name("requests/");
    let mark = stand.marked();
    let stopped = stand.site.proxy.stop(Frames::confirms().on("dtc submit").about(&requests));
    // Each result shows that its request arrived, so no wait for a confirm reaches its limit.
    stand.commits_again(&mark, &stopped, &BOTH);
}

/// The broker neither takes the request nor reports that.
#[test]
fn a_producer_gives_up_a_publishing_connection_that_the_broker_no_longer_reads() {
    let stand = ProxiedSystem::new();
    let requests = stand.site.name("requests/");
    let mark = stand.marked();
    let stopped = stand.site.proxy.stop(Frames::publishes().on("dtc submit").about(&requests));
    stand.commits_again(&mark, &stopped, &BOTH);
    stand.producer_says(&mark, &stand.site.name("requests"));
}
