//! The journal's view against the whole journal, which the view sees only in part: it misses
//! records from before it began, records lost in a gap, and records it has forgotten.
//!
//! The whole journal shows whether a view is right; a naive view, which keeps every record it has
//! read in a `Vec`, shows whether it is useful.

use std::{sync::Arc, time::Duration};

use dtc::protocol::{
    ids::{TransactionKey, WorkerId},
    journal_view::{JournalView, Recall},
    message::{Decision, Outcome},
    time::Time,
};
use proptest::prelude::*;

use crate::words::{BEGINNING, hash, key};

const CLOCK_MARGIN: Duration = Duration::from_millis(10);
const WINDOW: Duration = Duration::from_millis(60);

/// Digests that are dropped now and then.
const FEW: usize = 4;

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// One more message in the journal, and whether the view reads it.
#[derive(Clone, Debug)]
struct Step {
    /// How long after the previous message.
    after: u64,
    entries: Vec<Entry>,
    fate: Fate,
}

/// One record of a message.
#[derive(Clone, Debug)]
struct Entry {
    id: usize,
    /// How long before the record the transaction was requested, by its producer's clock.
    age: u64,
    /// By how much the deciding worker's clock is off; 10 is right.
    clock: u64,
    commits: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Read,
    /// Lost: the next one that is read shows a gap.
    Lost,
    /// Read, after so many earlier ones were read once more.
    ReadAgain(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let fate = prop_oneof![
        10 => Just(Fate::Read),
        1 => Just(Fate::Lost),
        1 => (1..5_usize).prop_map(Fate::ReadAgain),
    ];
    let entry = (0..4_usize, 0..5_u64, 0..=20_u64, any::<bool>());
    let entry = entry.prop_map(|(id, age, clock, commits)| Entry {
        id,
        // Few different times, so that one transaction has several records.
        age: age * 20,
        clock,
        commits,
    });
    let entries = prop_oneof![
        4 => prop::collection::vec(entry.clone(), 1),
        1 => prop::collection::vec(entry, 0..6),
    ];
    let step = (0..15_u64, entries, fate);
    let step = step.prop_map(|(after, entries, fate)| Step { after, entries, fate });
    prop::collection::vec(step, 1..60)
}

/// A record, and when it was appended by the reader's clock.
fn record(now: Time, entry: &Entry) -> Decision {
    // A producer's clock is off as well, within the margin.
    let asked = now - millis(entry.age);
    let coarse = Time::from_millis(asked.as_millis() / 20 * 20);
    let id = key(&format!("t{}", entry.id)).id;
    Decision {
        key: TransactionKey { id, requested_at: coarse },
        request_hash: hash(""),
        outcome: if entry.commits { Outcome::Committed } else { Outcome::Aborted },
        branches: Vec::new(),
        reason: None,
        decided_at: now + millis(entry.clock) - CLOCK_MARGIN,
        worker: WorkerId::parse("w1").unwrap(),
    }
}

type Message = Vec<Arc<Decision>>;

/// Everything read since the last gap and not forgotten: the first record of each transaction.
struct Naive {
    since: Time,
    oldest: u64,
    next: u64,
    kept: Vec<(u64, Arc<Decision>)>,
    records_max: usize,
    /// From when on it has read everything.
    read_since: Time,
    forgotten: Vec<TransactionKey>,
}

impl Naive {
    fn read(&mut self, now: Time, offset: u64, message: &Message) -> Message {
        if offset < self.next {
            return Vec::new();
        }
        if offset > self.next {
            self.since = now + millis(1);
            self.read_since = self.since;
            self.oldest = offset;
            self.kept.clear();
            self.forgotten.clear();
        }
        self.next = offset + 1;
        let mut first = Vec::new();
        for decision in message {
            if self.kept.iter().any(|(_, known)| known.key == decision.key) {
                continue;
            }
            first.push(Arc::clone(decision));
            self.kept.push((offset, Arc::clone(decision)));
            while let Some((offset, oldest)) = self.kept.first()
                && (self.kept.len() > self.records_max || oldest.decided_at + WINDOW < now)
            {
                self.since = self.since.max(oldest.decided_at + millis(1));
                self.oldest = offset + 1;
                self.forgotten.push(oldest.key.clone());
                self.kept.remove(0);
            }
        }
        first
    }

    /// `remembers_names`: whether it knows which ones it has forgotten.
    fn recall(&self, key: &TransactionKey, remembers_names: bool) -> Recall {
        let began = key.requested_at - CLOCK_MARGIN;
        let is_known = remembers_names && self.read_since <= began && !self.forgotten.contains(key);
        if self.since > began && !is_known {
            return Recall::OutOfSight;
        }
        let found = self.kept.iter().find(|(_, it)| it.key == *key);
        found.map_or(Recall::Absent, |(_, it)| Recall::Found(Arc::clone(it)))
    }
}

fn check(begins: usize, records_max: usize, digests_max: usize, steps: &[Step]) {
    let mut now = BEGINNING;
    let mut journal: Vec<Message> = Vec::new();
    let mut view = JournalView::new(records_max, WINDOW).with_digests(digests_max);
    let kept = Vec::new();
    let (since, read_since) = (Time::EPOCH, Time::EPOCH);
    let forgotten = Vec::new();
    let mut naive = Naive { since, oldest: 0, next: 0, kept, records_max, read_since, forgotten };
    for step in steps {
        if journal.len() == begins {
            let before = journal.iter().flatten().map(|it| it.decided_at + millis(1)).max();
            naive.since = before.unwrap_or(Time::EPOCH);
            naive.read_since = naive.since;
            naive.next = u64::try_from(begins).unwrap();
            naive.oldest = naive.next;
            view.attach(naive.next, naive.since);
        }
        now = now + millis(step.after);
        let records = step.entries.iter().map(|entry| Arc::new(record(now, entry)));
        journal.push(records.collect());
        let last = journal.len() - 1;
        if last < begins || step.fate == Fate::Lost {
            continue;
        }
        let again = if let Fate::ReadAgain(n) = step.fate { n } else { 0 };
        let from = last.saturating_sub(again).max(begins);
        for (offset, message) in (from..).zip(&journal[from..]) {
            let offset = u64::try_from(offset).unwrap();
            let first = view.read(now, offset, message.clone());
            assert_eq!(first, naive.read(now, offset, message));
        }
        assert!(view.len() <= records_max, "the view is bounded");
        assert_eq!(view.next_offset(), u64::try_from(journal.len()).unwrap());
        assert_eq!(view.oldest_offset(), naive.oldest);
        for asked in journal.iter().flatten().map(|it| &it.key) {
            check_recall(&journal, &view, &naive, digests_max, asked);
        }
    }
}

fn check_recall(
    journal: &[Message],
    view: &JournalView,
    naive: &Naive,
    digests_max: usize,
    key: &TransactionKey,
) {
    let recall = view.recall(key, CLOCK_MARGIN);
    let (least, most) = (naive.recall(key, false), naive.recall(key, true));
    match digests_max {
        0 => assert_eq!(recall, least, "{key}"),
        FEW => assert!(recall == least || recall == most, "{key}: {recall:?}"),
        _ => assert_eq!(recall, most, "{key}"),
    }

    let read = &journal[..usize::try_from(view.next_offset()).unwrap()];
    let outcome = read.iter().flatten().find(|it| it.key == *key);
    match &recall {
        Recall::Found(found) => assert_eq!(Some(found), outcome, "only the first one counts"),
        Recall::Absent => assert_eq!(None, outcome, "absent is said only of what has no record"),
        Recall::OutOfSight => {}
    }
    // A look further back ends where the view begins: a record that neither sees does not exist.
    let further_back = &journal[..usize::try_from(view.oldest_offset()).unwrap()];
    let seen = further_back.iter().flatten().find(|it| it.key == *key);
    assert_eq!(seen.or_else(|| view.earliest_seen(key)), outcome);

    let is_namesake = |it: &&Arc<Decision>| it.key.id == key.id && it.key != *key;
    let found = |it: &Arc<Decision>, remembers| {
        matches!(naive.recall(&it.key, remembers), Recall::Found(_))
    };
    let (same, namesake) = view.recall_or_namesake(key, CLOCK_MARGIN);
    assert_eq!(same, recall);
    match namesake {
        Some(namesake) => {
            assert!(recall == Recall::Absent && is_namesake(&&namesake));
            assert!(found(&namesake, digests_max > 0));
        }
        None if recall == Recall::Absent => {
            let mut namesakes = journal.iter().flatten().filter(is_namesake);
            assert!(!namesakes.any(|it| found(it, digests_max > FEW)));
        }
        None => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        // More with PROPTEST_CASES.
        cases: ProptestConfig::default().cases.max(500),
        // A finding becomes a golden trace, not a seed in a file.
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_view_agrees_with_the_whole_journal(
        begins in 0..10_usize,
        records_max in 1..12_usize,
        digests_max in prop_oneof![Just(0), Just(FEW), Just(1_000)],
        steps in steps(),
    ) {
        check(begins, records_max, digests_max, &steps);
    }
}
