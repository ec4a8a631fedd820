//! Plays every file of `traces/`, and compares the effects.

use std::{env, fmt::Write, fs, path::PathBuf};

use crate::{instance::Bench, workers::Workers};

/// One test for each trace, so that the list of tests is the list of traces.
macro_rules! stories {
    ($($of:ident { $($story:ident)* })*) => {
        $(mod $of {
            $(#[test]
            fn $story() {
                super::play(stringify!($of), stringify!($story));
            })*
        })*

        #[test]
        fn every_trace_has_its_test() {
            let told = [$($(concat!(stringify!($of), "/", stringify!($story)),)*)*];
            let mut untold = Vec::new();
            for of in ["worker", "instance"] {
                for entry in fs::read_dir(directory().join(of)).unwrap() {
                    let file = entry.unwrap().file_name().into_string().unwrap();
                    let story = format!("{of}/{}", file.trim_end_matches(".txt"));
                    if !told.contains(&story.as_str()) {
                        untold.push(story);
                    }
                }
            }
            assert!(untold.is_empty(), "add to stories! in tests/protocol/traces.rs: {untold:?}");
        }
    };
}

stories! {
    worker {
        aborts_are_repeated_until_answered_or_given_up
        all_prepare_and_all_commit
        all_read_only_commits_without_telling_anyone
        commit_fails_twice_and_then_succeeds
        commit_that_fails_for_good_is_parked
        committed_after_all_while_the_parked_record_is_being_written
        contended_services_are_asked_one_after_another
        decided_and_aborted_is_answered_like_any_other
        decided_and_applied_requests_of_one_transaction_are_each_answered_in_time
        decided_is_answered_at_once_and_acknowledged_when_all_have_committed
        decided_is_published_again_until_it_is_safe_or_unclaimed
        decision_names_another_branch_so_the_own_one_is_undone
        decision_of_another_worker_cuts_preparing_short
        decision_without_a_service_undoes_what_it_prepared
        delivered_too_often_is_aborted
        disconnect_forgets_all_but_the_journal
        done_from_another_store_than_the_one_that_prepared_does_not_count
        drain_finishes_what_has_begun_and_hands_back_the_rest
        duplicate_request_after_the_result
        duplicate_request_gets_the_same_answer
        failed_is_told_to_abort_too
        finished_vote_proposes_what_was_heard
        first_of_two_retries_under_new_timestamps_that_is_in_sight_answers
        free_service_is_asked_in_name_order_beside_a_contended_one
        full_worker_begins_no_more_until_one_ends
        half_of_those_who_may_wait_wait_for_a_service_that_is_unavailable
        half_of_those_who_may_wait_wait_for_a_service_that_nobody_serves
        inquiry_about_a_transaction_in_flight_asks_for_the_vote
        instances_that_name_different_stores_are_reported_once_in_a_while
        inquiry_before_the_deadline_is_left_and_after_it_decides
        inquiry_from_the_future_is_left
        inquiry_is_not_answered_by_a_record_that_may_not_be_the_first
        inquiry_loses_against_a_decision
        inquiry_that_nothing_can_be_told_about_is_left
        journal_gap_during_a_look_begins_it_anew
        journal_gap_makes_all_undecided_look_again
        late_vote_after_giving_up_is_answered_once
        late_vote_is_answered_with_the_outcome
        lost_record_is_proposed_again
        lost_result_is_published_again
        no_slot_aborts
        nothing_is_known_of_the_services_so_they_are_found_and_asked_in_turn
        other_content_decided_first_under_the_same_key
        outcome_of_a_transaction_is_not_that_of_its_namesake_in_flight
        own_timeout_of_the_request
        parked_by_a_worker_that_died_and_committed_by_the_next
        parked_by_another_worker_after_this_one_has_committed
        parked_record_is_written_again_until_it_is_safe
        read_only_is_left_out
        record_forgotten_during_the_look_is_not_lost
        record_read_during_the_look_counts_only_if_the_look_finds_none
        refusal_aborts_the_prepared
        refused_prepare_is_sent_again_when_the_service_is_back
        refused_prepares_of_a_service_that_stays_unavailable_abort
        request_from_the_future_is_rejected
        result_that_is_refused_for_good_counts_as_unclaimed
        retry_under_a_new_timestamp_in_flight_waits_for_the_earlier_one
        retry_under_a_new_timestamp_is_answered_with_the_earlier_outcome
        returned_prepare_makes_the_service_contended
        same_id_with_other_content_is_rejected_within_the_window
        same_transaction_with_other_content_is_rejected
        saturated_service_holds_up_only_who_needs_it
        service_deleted_since_it_was_found
        service_is_served_again_and_who_waited_is_asked_for
        service_that_is_not_served_any_more_is_the_reason
        service_that_nobody_serves_says_so_and_one_at_a_time_waits_there
        service_whose_instances_died_with_all_slots_is_known_to_be_served_by_nobody
        service_that_refuses_whenever_it_is_found_is_looked_for_with_growing_pauses
        settled_records_name_the_delivery_that_they_follow_from
        silence_until_the_deadline_aborts
        silent_service_that_is_unavailable_is_the_reason
        taking_over_after_an_abort
        taking_over_after_the_decision
        taking_over_asks_first_and_prepares_only_the_silent
        taking_over_what_everyone_still_holds
        two_instances_prepare_and_one_branch_commits
        two_workers_decide_differently_and_the_first_record_wins
        unanswered_commit_is_sent_again_and_parked_at_last
        unavailable_service_is_back_within_the_deadline
        unavailable_service_that_does_not_come_back_aborts
        unknown_service_calls_no_one
        view_that_starts_too_late_and_nothing_further_back_is_left
        view_that_starts_too_late_reads_further_back_and_finds
        view_that_starts_too_late_reads_further_back_and_finds_nothing
        void_record_changes_nothing
        vote_about_other_content_does_not_count
        vote_from_the_store_does_not_take_the_holders_place
        who_has_begun_goes_before_those_who_may_not_begin
        worker_takes_its_share_of_the_slots_in_parallel
    }
    instance {
        abort_of_what_was_never_prepared_calls_nothing
        cancel_never_touches_what_is_prepared
        cancelled_here_and_prepared_by_another_it_is_voted_on_from_the_store
        cancelled_while_a_query_is_looked_up
        cancelled_while_the_store_is_read
        cap_holds_when_more_is_delivered
        clock_set_back_delays_no_inquiry
        commit_from_the_store_fails_though_the_slot_is_held
        commit_of_a_branch_that_the_store_never_had_is_an_error
        commit_of_a_branch_that_the_store_never_had_undoes_the_own_one
        commit_of_anothers_branch_without_a_store_is_not_applied
        commit_of_what_only_the_store_holds
        commit_of_anothers_branch_undoes_the_own_one_and_is_not_applied_without_a_store
        commit_without_a_branch_undoes_the_own_one
        disconnect_and_the_outcome_comes_before_the_delivery
        disconnect_keeps_the_slot
        disconnected_it_looks_first_whether_others_have_finished_it
        drain_leaves_what_is_parked_and_waits_for_the_rest
        failed_commit_is_reported_and_stays_prepared
        failed_keeps_the_slot_until_the_abort
        finish_twice_while_it_is_applied_is_done_once
        finish_while_preparing_of_what_is_then_refused
        finish_while_preparing_waits_for_the_code
        inquires_after_ten_seconds_of_silence
        late_end_of_an_old_run_is_ignored
        other_branch_is_committed_so_the_own_one_is_undone
        other_branch_is_committed_though_the_own_run_is_then_refused
        other_content_under_the_same_key_in_the_store_is_refused
        other_content_under_the_same_key_is_refused
        other_transaction_of_the_same_id_is_refused
        parked_commit_from_the_store_is_retried_until_it_succeeds
        parked_commit_is_looked_into_however_many_are
        parked_commit_is_retried_until_it_succeeds
        parked_commit_of_a_branch_that_the_store_never_had_is_tried_again
        parked_commit_that_another_instance_has_applied_is_not_called_again
        parked_commit_that_nobody_tells_of_is_known_by_the_silence
        prepare_after_a_cancel_is_refused
        prepare_after_its_deadline_is_refused
        prepare_after_the_outcome_hears_it
        prepare_cancelled_while_it_waits_for_a_slot
        prepare_twice_votes_the_same_branch
        prepares_votes_and_commits
        query_is_answered_from_the_store
        query_without_a_store_is_answered_only_by_who_holds
        read_only_counts_only_for_the_content_that_was_seen
        redelivered_after_its_deadline_it_is_found_in_the_store
        redelivered_prepare_is_found_in_the_store
        refused_and_read_only_free_the_slot_at_once
        repeated_prepare_of_what_another_instance_holds_takes_no_slot
        repeated_prepare_that_the_store_does_not_know_is_run
        told_by_another_worker_it_looks_first_whether_it_is_finished
        visit_goes_first_and_the_prepare_that_comes_meanwhile_waits
        what_the_store_holds_and_nobody_here_is_asked_about
    }
}

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/protocol/traces")
}

fn play(of: &str, story: &str) {
    let path = directory().join(of).join(format!("{story}.txt"));
    let written = fs::read_to_string(&path).unwrap();
    let mut workers = Workers::new();
    let mut bench = Bench::new();
    let happened = replay(&written, |line| match of {
        "worker" => workers.run(line),
        _ => bench.run(line),
    });
    if happened == written {
        return;
    }
    if env::var_os("UPDATE_TRACES").is_some() {
        return fs::write(&path, happened).unwrap();
    }
    let differs = |(written, happened): &(&str, &str)| written != happened;
    let line = written.lines().zip(happened.lines()).take_while(|it| !differs(it)).count();
    panic!(
        "{} differs from line {}; UPDATE_TRACES=1 writes what happened:\n\n{happened}",
        path.display(),
        line + 1
    );
}

/// The same text with the lower half of each block replaced by the effects of its upper half.
fn replay(text: &str, mut run: impl FnMut(&str) -> Vec<String>) -> String {
    let mut happened = String::new();
    for block in text.trim_end().split("\n\n") {
        let (above, _) = block.split_once("\n----").unwrap_or((block, ""));
        let is_comment = |line: &&str| line.starts_with('#');
        let separator = if happened.is_empty() { "" } else { "\n" };
        writeln!(happened, "{separator}{above}").unwrap();
        if above.lines().all(|line| is_comment(&line)) {
            continue;
        }
        happened.push_str("----\n");
        for line in above.lines().filter(|line| !is_comment(line)) {
            for said in run(line) {
                writeln!(happened, "{said}").unwrap();
            }
        }
    }
    happened
}
