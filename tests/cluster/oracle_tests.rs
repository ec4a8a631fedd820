//! Tests that the oracle detects what it must, and accepts a correct run.

use std::{collections::BTreeMap, time::Duration};

use serde_json::json;

use crate::{
    journal::Entry,
    network::NODES,
    oracle::{Facts, times, violations},
    system::{Answer, Record, Submitted},
};

/// Every check, and its name. They panic if they fail.
pub(crate) const ALL: &[(&str, fn())] = &[
    ("oracle::a_run_in_which_all_is_well_has_no_violation", all_is_well),
    ("oracle::a_service_that_committed_twice_is_seen", committed_twice),
    ("oracle::a_service_that_was_not_asked_is_seen", committed_unasked),
    ("oracle::a_service_that_didnt_commit_is_seen", not_committed),
    ("oracle::an_aborted_transaction_that_is_committed_is_seen", aborted_and_committed),
    ("oracle::an_unanswered_transaction_that_is_committed_in_part_is_seen", unanswered_in_part),
    ("oracle::a_reason_that_cant_be_true_is_seen", untrue_reason),
    ("oracle::two_results_are_seen", two_results),
    ("oracle::another_branch_than_was_decided_is_seen", another_branch),
    ("oracle::a_result_that_the_journal_doesnt_have_is_seen", not_in_journal),
    ("oracle::a_replica_that_is_behind_is_seen", replica_behind),
    ("oracle::a_gap_in_the_journal_is_seen", gap),
    ("oracle::a_journal_that_nobody_could_read_is_seen", no_journal),
    ("oracle::a_journal_that_less_than_a_majority_has_is_seen", few_replicas),
    ("oracle::only_a_new_transaction_ends_the_wait_for_a_commit", new_commits),
];

/// A run of two transactions: `a` was committed at payments and stock, `b` was aborted.
struct Run {
    record: Record,
    facts: Facts,
}

impl Run {
    fn good() -> Self {
        let mut record = Record::default();
        for (id, services) in [("a", vec!["payments", "stock"]), ("b", vec!["stock"])] {
            let submitted = Submitted { at: Duration::from_secs(1), services };
            record.submitted.insert(id.to_owned(), submitted);
        }
        record.results = vec![answer("a", "COMMITTED", ""), answer("b", "ABORTED", "deadline")];
        let committed = [("payments", "a 7 pa 0 i\n"), ("stock", "a 7 sa 0 i\n"), ("shipping", "")];
        let committed = committed.map(|(service, log)| (service.to_owned(), log.to_owned()));
        let records = vec![
            decision(0, "a", "COMMITTED", &[("payments", "pa"), ("stock", "sa")]),
            decision(1, "b", "ABORTED", &[]),
            // A later record is void.
            decision(2, "a", "ABORTED", &[]),
        ];
        let journals = NODES.map(|node| (node.to_owned(), records.clone()));
        let facts = Facts { committed: committed.into(), journals: journals.into() };
        Self { record, facts }
    }

    fn commits(mut self, service: &str, log: &str) -> Self {
        self.facts.committed.insert(service.to_owned(), log.to_owned());
        self
    }

    /// Asserts that the only complaint is of this kind.
    fn has_one_complaint(self, kind: &str) {
        let complaints = violations(&self.record, &self.facts);
        assert!(matches!(&complaints[..], [one] if one.starts_with(kind)), "{complaints:?}");
    }
}

fn answer(id: &str, status: &str, reason: &str) -> Answer {
    let (id, status, reason) = (id.to_owned(), status.to_owned(), reason.to_owned());
    Answer { at: Duration::from_secs(2), id, status, reason, unresolved: Vec::new() }
}

fn decision(offset: i64, id: &str, outcome: &str, branches: &[(&str, &str)]) -> Entry {
    let branches: BTreeMap<_, _> = branches.iter().copied().collect();
    let item = json!({"id": id, "requested_at": 7, "outcome": outcome, "branches": branches});
    let body = json!([item]).to_string().into_bytes();
    Entry { offset, kind: "dtc.decision.v1".to_owned(), body }
}

fn all_is_well() {
    let run = Run::good();
    assert_eq!(violations(&run.record, &run.facts), Vec::<String>::new());
}

fn committed_twice() {
    Run::good()
        .commits("stock", "a 7 sa 0 i\na 7 sa 0 j\n")
        .has_one_complaint("committed too often");
}

fn committed_unasked() {
    let run = Run::good().commits("shipping", "a 8 xa 0 i\n");
    run.has_one_complaint("committed too often");
}

fn not_committed() {
    Run::good().commits("payments", "").has_one_complaint("committed in part");
}

fn aborted_and_committed() {
    let run = Run::good().commits("stock", "a 7 sa 0 i\nb 8 sb 0 i\n");
    run.has_one_complaint("aborted in part");
}

fn unanswered_in_part() {
    let mut run = Run::good().commits("stock", "");
    run.record.results.remove(0);
    run.has_one_complaint("without a result, and committed in part");
}

fn untrue_reason() {
    let mut run = Run::good();
    run.record.results[1].reason = "unknown_service".to_owned();
    run.has_one_complaint("aborted as `unknown_service`, which isn't true");
}

fn two_results() {
    let mut run = Run::good();
    run.record.results.push(answer("a", "COMMITTED", ""));
    run.has_one_complaint("two results");
}

fn another_branch() {
    Run::good().commits("stock", "a 7 other 0 i\n").has_one_complaint("committed another branch");
}

fn not_in_journal() {
    let mut run = Run::good();
    run.facts.journals.values_mut().for_each(|journal| drop(journal.remove(1)));
    for journal in run.facts.journals.values_mut() {
        journal[1].offset = 1;
    }
    run.has_one_complaint("told what the journal doesn't say");
}

fn replica_behind() {
    let mut run = Run::good();
    run.facts.journals.values_mut().take(1).for_each(|journal| journal.truncate(2));
    run.has_one_complaint("replicas of the journal differ");
}

fn gap() {
    let mut run = Run::good();
    run.facts.journals.values_mut().for_each(|journal| journal[2].offset = 3);
    run.has_one_complaint("the journal has a gap");
}

fn no_journal() {
    let mut run = Run::good();
    run.facts.journals.clear();
    run.has_one_complaint("the journal can't be read");
}

fn few_replicas() {
    let mut run = Run::good();
    run.facts.journals.pop_first();
    assert_eq!(violations(&run.record, &run.facts), [""; 0]);
    run.facts.journals.pop_first();
    run.has_one_complaint("the journal can't be read");
}

fn new_commits() {
    let mut record = Record::default();
    let (fault, healed) = (Duration::from_secs(10), Duration::from_secs(20));
    // When each was submitted and committed.
    for (id, at, done) in [("old", 9, 12), ("new", 11, 16), ("last", 21, 22)] {
        let submitted = Submitted { at: Duration::from_secs(at), services: vec!["stock"] };
        record.submitted.insert(id.to_owned(), submitted);
        let at = Duration::from_secs(done);
        record.results.push(Answer { at, ..answer(id, "COMMITTED", "") });
    }
    let times = times(&record, fault, healed);
    assert_eq!(times.first_after_fault, Some(Duration::from_secs(6)));
    assert_eq!(times.first_after_healing, Some(Duration::from_secs(2)));
    assert_eq!(times.longest_gap, Duration::from_secs(5));
}
