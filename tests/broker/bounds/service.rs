//! The waits of an instance of a service.

use crate::{
    proxy::Frames,
    stand::{BOTH, ProxiedPlace, ProxiedSystem},
};

const CONSUME: &str = "dtc service stock *(consume)";
const PUBLISH: &str = "dtc service stock *(publish)";

#[test]
fn prepares_that_are_never_delivered_are_asked_for_again() {
    let stand = ProxiedSystem::new();
    let prepares = stand.site.name("prepare.stock");
    let mark = stand.marked();
    let stopped = stand.site.proxy.stop_channels(Frames::deliveries().on(CONSUME).about(&prepares));
    stand.commits_again(&mark, &stopped, &BOTH);
    stand.stock_says(&mark, &prepares);
}

#[test]
fn commits_that_are_never_delivered_are_asked_for_again() {
    let stand = ProxiedSystem::new();
    let own = stand.site.name("finish.stock");
    let mark = stand.marked();
    let stopped = stand.site.proxy.stop(Frames::deliveries().on(CONSUME).about(&own));
    stand.commits_again(&mark, &stopped, &BOTH);
    stand.stock_says(&mark, &own);
}

/// For the broker, the slots of finished transactions stay taken.
#[test]
fn prepares_whose_acknowledgements_get_lost_do_not_use_up_the_slots() {
    let stand = ProxiedSystem::at(ProxiedPlace::narrow(), &[]);
    let prepares = stand.site.name("prepare.stock");
    let mark = stand.marked();
    let stopped = stand.site.proxy.stop_channels(Frames::acks().on(CONSUME).about(&prepares));
    stand.submit(&BOTH);
    stopped.wait_for(1);
    stand.commits_again(&mark, &stopped, &BOTH);
    stand.stock_says(&mark, &prepares);
}

/// Votes, dones, and everything else that it publishes.
#[test]
fn a_service_gives_up_a_publishing_connection_that_the_broker_no_longer_reads() {
    let stand = ProxiedSystem::new();
    let mark = stand.marked();
    let stopped = stand.site.proxy.stop(Frames::publishes().on(PUBLISH));
    stand.commits_again(&mark, &stopped, &BOTH);
    stand.stock_says(&mark, "");
}
