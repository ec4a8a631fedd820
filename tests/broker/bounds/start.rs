//! The waits of a process that starts.

use std::time::Duration;

use crate::{
    processes::Process,
    proxy::{
        Action, CHANNEL_OPEN_OK, CONFIRM_SELECT_OK, CONSUME_OK, Frames, QOS_OK, QUEUE_BIND_OK,
        QUEUE_DECLARE_OK, Scope,
    },
    stand::{BOTH, ProxiedPlace, ProxiedSystem, READY, WITHIN},
};

/// Such an answer is missing on the first connection that waits for one: the process must be ready
/// in time all the same.
fn comes_to_work(frames: Frames, start: impl Fn(&ProxiedPlace) -> Process) {
    let site = ProxiedPlace::new();
    let stopped = site.proxy.rule(frames, Scope::First, Action::Swallow);
    let process = start(&site);
    assert!(stopped.has_come(1, WITHIN), "nothing was stopped");
    process.wait_for_line(READY, WITHIN);
    let said = process.stderr.text();
    let says_so = |line: &str| line.contains("WARN") && crate::stand::is_end_of_a_wait(line, "");
    assert!(said.lines().any(says_so), "no line says which wait has ended:\n{said}");
}

macro_rules! starts {
    ($($name:ident: $who:ident, $frames:expr;)*) => {
        $(
            #[test]
            fn $name() {
                comes_to_work($frames, $who);
            }
        )*
    };
}

fn worker(site: &ProxiedPlace) -> Process {
    site.start_worker(&[])
}

fn stock(site: &ProxiedPlace) -> Process {
    site.start_service("stock")
}

starts! {
    a_worker_that_is_given_no_channel_to_publish_on_asks_again:
        worker, Frames::answers(CHANNEL_OPEN_OK).on("(publish)");
    a_worker_that_is_given_no_channel_to_consume_on_asks_again:
        worker, Frames::answers(CHANNEL_OPEN_OK).on("(consume)");
    a_worker_whose_channel_never_confirms_that_it_confirms_asks_again:
        worker, Frames::answers(CONFIRM_SELECT_OK).on("dtc worker w1");
    a_worker_whose_mark_in_the_journal_is_never_confirmed_sets_another:
        worker, Frames::confirms().on("dtc worker w1");
    a_worker_that_is_given_nothing_of_the_journal_asks_again:
        worker, Frames::deliveries().on("dtc worker w1");
    a_worker_whose_consumer_is_never_begun_asks_again:
        worker, Frames::answers(CONSUME_OK).on("dtc worker w1");
    a_worker_whose_prefetch_is_never_agreed_to_asks_again:
        worker, Frames::answers(QOS_OK).on("dtc worker w1");
    a_worker_whose_queue_is_never_declared_asks_again:
        worker, Frames::answers(QUEUE_DECLARE_OK).on("dtc worker w1");
    a_worker_whose_queue_is_never_bound_asks_again:
        worker, Frames::answers(QUEUE_BIND_OK).on("dtc worker w1");
    a_service_that_is_given_no_channel_to_publish_on_asks_again:
        stock, Frames::answers(CHANNEL_OPEN_OK).on("(publish)");
    a_service_that_is_given_no_channel_to_consume_on_asks_again:
        stock, Frames::answers(CHANNEL_OPEN_OK).on("(consume)");
    a_service_whose_channel_never_confirms_that_it_confirms_asks_again:
        stock, Frames::answers(CONFIRM_SELECT_OK).on("dtc service stock");
    a_service_whose_consumer_is_never_begun_asks_again:
        stock, Frames::answers(CONSUME_OK).on("dtc service stock");
    a_service_whose_queue_is_never_declared_asks_again:
        stock, Frames::answers(QUEUE_DECLARE_OK).on("dtc service stock");
    a_service_whose_queue_is_never_bound_asks_again:
        stock, Frames::answers(QUEUE_BIND_OK).on("dtc service stock");
}

/// A node that is cut off from the others accepts connections, and declares nothing.
#[test]
fn a_client_tries_the_next_host_before_it_gives_up_one_that_declares_nothing() {
    for start in [worker, stock] {
        let mut site = ProxiedPlace::new();
        let url = site.world.place.url.clone();
        site.world.place.url = format!("{url},{url}");
        let frames = Frames::answers(QUEUE_DECLARE_OK);
        let stopped = site.proxy.rule(frames, Scope::First, Action::Swallow);
        let process = start(&site);
        assert!(stopped.has_come(1, WITHIN), "nothing was stopped");
        process.wait_for_line(READY, WITHIN);
        let said = process.stderr.text();
        assert!(said.contains("trying the next host as well"), "{said}");
        assert!(!said.contains("failed to"), "the first host was waited for:\n{said}");
    }
}

#[test]
fn a_producer_whose_consumer_never_starts_tries_again() {
    asks_again(Frames::answers(CONSUME_OK));
}

#[test]
fn a_producer_whose_queue_is_never_declared_tries_again() {
    asks_again(Frames::answers(QUEUE_DECLARE_OK));
}

#[test]
fn a_producer_that_gets_no_channel_tries_again() {
    asks_again(Frames::answers(CHANNEL_OPEN_OK));
}

/// Such an answer is missing on a producer's first connection that waits for one: what it submits
/// must get its result in time.
fn asks_again(frames: Frames) {
    let site = ProxiedPlace::new();
    let services = BOTH.map(|name| site.service(name));
    let worker = site.worker(&[]);
    let frames = frames.on("dtc submit");
    let stopped = site.proxy.rule(frames, Scope::First, Action::Swallow);
    let producer = site.producer();
    let stand = ProxiedSystem::of(site, worker, services, producer);
    let mark = stand.marked();
    let id = stand.submit(&BOTH);
    assert!(stopped.has_come(1, WITHIN), "nothing was stopped");
    let answer = stand.answered(&id, mark.left().max(Duration::from_millis(1)));
    assert_eq!(answer["status"], "COMMITTED", "{answer}");
    stand.producer_says(&mark, "");
}
