//! Every interleaving of a small world around the real state machines.
//!
//! [`Coordinator`](dtc::protocol::coordinator::Coordinator) and
//! [`Instance`](dtc::protocol::participant::Instance) run unchanged. Around them, as plain data:
//! the request queue with its delivery counts, the messages in transit, the prepare queues with
//! their unacked deliveries (which are the slots), the journal that each worker reads back record
//! by record, and each service's store. The checker takes every step that any of them could take
//! next, in every order, until it finds no new world: each configuration is searched completely
//! within the faults it allows.
//!
//! What is left out, and why that loses nothing:
//!
//! * *Loss, delay, reordering, a frozen process* need no steps of their own. Any message may be the
//!   next to arrive and none ever has to be; so a world in which one is lost behaves like the one
//!   in which it is still on its way, and that is searched.
//! * *Time* passes only when a deadline is reached; each process has its own clock, and the checker
//!   chooses which deadline comes first. So clocks differ as much as deadlines allow. Pauses are a
//!   few milliseconds, too short to be scattered by jitter: worlds that differ only in how long
//!   something took are one.
//! * *Answers that only the asking process waits for* come at once: whether a service exists,
//!   and, where a configuration isn't about slow ones, the service's code, its store, and the
//!   confirmation of a result. For everybody else a late answer is a step that is taken later.
//! * *Free slots* are reported as a constant: none, or plenty. They are hints, stale at any time;
//!   the two values lead to prepares one by one and to prepares in parallel.
//! * *Dones that nobody can wait for any more* are dropped.
//! * *The first request goes to the first worker* where the two don't differ in anything but name.
//! * *The network* is a multiset, kept in a fixed order; a delivery's number is the lowest free one.
//!
//! One property can't be seen in a single world: that everything ends. It is tried from a sample of
//! worlds: see [`healing`].

#![allow(missing_docs, private_interfaces, unreachable_pub, reason = "a test has no public face")]
#![allow(clippy::unwrap_used, reason = "a test may fail here")]
#![allow(clippy::print_stdout, reason = "a test prints what it has counted")]
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "the world looks at the few messages that it treats in a way of their own"
)]

#[path = "../support/bugs.rs"]
mod bugs;
mod classic;
mod configurations;
mod hashed;
mod healing;
mod properties;
mod scenario;
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};

use stateright::{Checker, HasDiscoveries, Model, Path, Property};

use crate::{
    bugs::Bug,
    scenario::Scenario,
    world::{Action, World},
};

/// The search copies worlds in small pieces, and does little else.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A scenario that is searched, and the progress of the search.
pub struct System {
    pub scenario: Scenario,
    searched: AtomicUsize,
    failed_after: AtomicUsize,
}

impl System {
    fn new(scenario: Scenario) -> Self {
        let (searched, failed_after) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
        Self { scenario, searched, failed_after }
    }

    /// Notes the first violation.
    fn check(&self, holds: bool) -> bool {
        if !holds {
            let searched = self.searched.load(Ordering::Relaxed);
            self.failed_after.fetch_min(searched, Ordering::Relaxed);
        }
        holds
    }
}

impl Model for System {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(&self.scenario)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        self.searched.fetch_add(1, Ordering::Relaxed);
        world.actions(&self.scenario, actions);
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        world.step(&self.scenario, &action);
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = properties::always();
        properties.extend(self.scenario.reaches.iter().map(|sight| properties::sometimes(*sight)));
        properties
    }
}

/// Searches a scenario completely, and compares the number of its worlds.
#[track_caller]
fn search(scenario: Scenario, worlds: usize) {
    let name = scenario.name;
    // `tests/run --quick` searches only the small ones.
    if std::env::var("DTC_MODEL").is_ok_and(|it| it == "quick") && worlds > 100_000 {
        println!("{name}: left out, {worlds} worlds");
        return;
    }
    let system = System::new(scenario);
    let checker =
        system.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let found = checker.unique_state_count();
    println!("{name}: {found} worlds, {} steps", checker.state_count());
    for property in checker.model().properties() {
        let discovery = checker.discovery(property.name);
        match (property.expectation.discovery_is_failure(), discovery) {
            (true, Some(path)) => panic!("{name}: not {}\n{}", property.name, tell(path)),
            (false, None) => panic!("{name}: never {}", property.name),
            (true, None) | (false, Some(_)) => {}
        }
    }
    assert!(checker.is_done());
    assert_eq!(found, worlds, "{name}: the number of worlds has changed");
}

/// A path, step by step, and its last world.
fn tell(path: Path<World, Action>) -> String {
    let end = format!("{:#?}", path.last_state());
    let steps = path.into_actions().into_iter().map(|action| format!("  {action:?}\n"));
    steps.collect::<String>() + &end
}

macro_rules! searches {
    ($($name:ident: $scenario:ident, $worlds:literal;)*) => {$(
        #[test]
        fn $name() {
            search(configurations::$scenario(), $worlds);
        }
    )*};
}

searches! {
    a_crash_is_taken_over: crash, 252_169;
    a_crash_amid_two_services_is_taken_over: crash_two_services, 701_304;
    a_frozen_worker_that_wakes_late_changes_nothing: frozen_worker, 315_715;
    nor_does_it_with_prepares_in_parallel: frozen_worker_with_plenty, 1_071_096;
    three_services_agree: three_services, 671_054;
    a_request_published_twice_is_one_transaction: duplicate_request, 72_645;
    a_request_delivered_too_often_is_aborted: poison_request, 93_888;
    a_reader_that_comes_late_looks_back: late_reader, 12_225;
    a_reader_that_comes_late_answers_inquiries: late_inquiry, 8_710;
    a_truncated_journal_is_not_guessed: truncated_journal, 43_008;
    a_short_memory_forgets_no_outcome: short_memory, 1_367_011;
    a_service_that_forgets_executes_once: forgetful_service, 13_463;
    two_instances_that_both_prepare_execute_once: two_instances, 359_482;
    slow_code_and_slow_stores_execute_once: slow_services, 513_073;
    commits_that_fail_are_parked_and_settled: commit_failures, 458_447;
    every_answer_to_a_prepare_counts: votes, 984_049;
    no_slot_aborts: no_slot, 40_548;
    an_inquiry_decides: inquiries, 1_093_660;
    a_retry_under_a_new_timestamp_gets_its_own_or_the_earlier_outcome: retry_under_a_new_timestamp, 55_427;
    other_content_under_the_same_key_is_rejected: other_content, 808_065;
    other_content_is_rejected_after_a_crash: other_content_after_crash, 85_370;
    a_lost_connection_is_taken_over: worker_disconnects, 323_943;
    a_result_at_the_decision_keeps_the_request_until_all_have_committed: early_answer, 48_134;
    requests_that_share_a_message_are_all_answered_after_a_crash: shared_message, 92_571;
}

/// Searches a scenario with a bug until something doesn't hold; returns after how many worlds.
fn find(bug: Bug, scenario: Scenario, property: &'static str) -> Option<usize> {
    find_breach(Scenario { bug: Some(bug), ..scenario }, property)
}

fn find_breach(scenario: Scenario, property: &'static str) -> Option<usize> {
    let system = System::new(Scenario { healed_one_in: 1, ..scenario });
    // One thread, so that the order of the search, and so the number, is the same in every run.
    let checker = system.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    checker.discovery(property)?;
    Some(checker.model().failed_after.load(Ordering::Relaxed))
}

#[test]
fn every_bug_that_breaks_a_property_is_found() {
    use Bug::*;
    use configurations::*;
    const READ_BACK: &str = "nothing leaves before read-back";
    const VOTES: &str = "commits only what all voted for";
    const JOURNAL: &str = "services follow the journal";
    const ENDS: &str = "everything ends";
    const RESULT: &str = "a result is the outcome";
    let table = [
        (AckBeforeResult, "acked after the answer", crash()),
        (AckDuplicateAtOnce, "acked after the answer", duplicate_request()),
        (ActOnSentDecision, READ_BACK, crash()),
        (PublishWithProposal, READ_BACK, crash()),
        (AnswerWithOwnProposal, RESULT, late_reader()),
        (LastRecordWins, JOURNAL, late_inquiry()),
        (CommitWithoutBranches, VOTES, crash()),
        (MissingVoteIsYes, VOTES, inquiries()),
        (RefusalIsReadOnly, VOTES, votes()),
        (AbortAfterFailedCommit, READ_BACK, commit_failures()),
        (AttachAtNext, READ_BACK, late_reader()),
        (TrustLateView, JOURNAL, late_inquiry()),
        (SkipAfterReconnect, READ_BACK, worker_disconnects()),
        (PresumeAbort, JOURNAL, inquiries()),
        (VoteForOtherContent, VOTES, other_content_after_crash()),
        (ProposeOnce, ENDS, crash()),
        (ForgetParkedCommand, ENDS, commit_failures()),
        (VoteWithoutStoring, "services agree", crash()),
        (CommitWhateverIsHeld, JOURNAL, forgetful_service()),
        (CancelUndoesPrepared, JOURNAL, late_reader()),
        (FreeSlotAtVote, "the cap holds", no_slot()),
        (DecideAlone, JOURNAL, inquiries()),
        (NeverInquire, ENDS, inquiries()),
        (NeverScanStore, ENDS, forgetful_service()),
    ];
    println!("{:<24} | {:<32} | {:<34} | worlds", "bug", "not", "configuration");
    for (bug, property, scenario) in table {
        let name = scenario.name;
        let worlds = find(bug, scenario, property);
        let worlds = worlds.unwrap_or_else(|| panic!("{bug:?} is not found in `{name}`"));
        println!("{:<24} | {property:<32} | {name:<34} | {worlds}", format!("{bug:?}"));
    }
}

#[test]
fn a_message_that_is_acknowledged_with_its_first_result_is_found() {
    let scenario = Scenario { acks_with_first: true, ..configurations::shared_message() };
    assert!(find_breach(scenario, "acked after the answer").is_some());
}
