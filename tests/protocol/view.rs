//! The journal's view against the whole journal, which the view sees only in part: records from
//! before it began, records lost in a gap, and records it has forgotten.
//!
//! What makes a view right is checked by the whole journal; what makes it useful, by a naive view
//! that keeps every record it has read in a `Vec`.

use std::{sync::Arc, time::Duration};

use dtc::protocol::{
    ids::{TransactionKey, WorkerId},
    journal::{JournalView, Reading, Recall},
    message::{Decision, Outcome},
    time::Time,
};
use proptest::prelude::*;

use crate::words::{BEGINNING, hash, key};

const CLOCK_MARGIN: Duration = Duration::from_millis(10);
const WINDOW: Duration = Duration::from_millis(60);

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// One more record in the journal, and whether the view reads it.
#[derive(Clone, Debug)]
struct Step {
    /// How long after the record before it.
    after: u64,
    id: usize,
    /// How long before the record the transaction was requested, by its producer's clock.
    age: u64,
    /// By how much the clock of who decides is off; 10 is right.
    clock: u64,
    commits: bool,
    fate: Fate,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Read,
    /// Lost: the next one that is read shows a gap.
    Lost,
    /// Read, after the so many before it were read once more.
    ReadAgain(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let fate = prop_oneof![
        10 => Just(Fate::Read),
        1 => Just(Fate::Lost),
        1 => (1..5_usize).prop_map(Fate::ReadAgain),
    ];
    let step = (0..15_u64, 0..4_usize, 0..5_u64, 0..=20_u64, any::<bool>(), fate);
    let step = step.prop_map(|(after, id, age, clock, commits, fate)| Step {
        after,
        id,
        // Few different moments, so that one transaction has several records.
        age: age * 20,
        clock,
        commits,
        fate,
    });
    prop::collection::vec(step, 1..60)
}

/// A record, and when it was appended by the reader's clock.
fn record(now: Time, step: &Step) -> Decision {
    // A producer's clock is off as well, and no more than the margin allows.
    let asked = now - millis(step.age);
    let coarse = Time::from_millis(asked.as_millis() / 20 * 20);
    let id = key(&format!("t{}", step.id)).id;
    Decision {
        key: TransactionKey { id, requested_at: coarse },
        request_hash: hash(""),
        outcome: if step.commits { Outcome::Committed } else { Outcome::Aborted },
        branches: Vec::new(),
        reason: None,
        decided_at: now + millis(step.clock) - CLOCK_MARGIN,
        worker: WorkerId::parse("w1").unwrap(),
    }
}

/// What was read since the last gap and not forgotten: the first record of each transaction.
struct Naive {
    since: Time,
    next: u64,
    kept: Vec<Arc<Decision>>,
    records_max: usize,
}

impl Naive {
    fn read(&mut self, now: Time, offset: u64, decision: &Arc<Decision>) -> Reading {
        if offset < self.next {
            return Reading::Repeated;
        }
        if offset > self.next {
            self.since = now + millis(1);
            self.kept.clear();
        }
        self.next = offset + 1;
        if self.kept.iter().any(|known| known.key == decision.key) {
            return Reading::Void;
        }
        self.kept.push(Arc::clone(decision));
        while let Some(oldest) = self.kept.first()
            && (self.kept.len() > self.records_max || oldest.decided_at + WINDOW < now)
        {
            self.since = self.since.max(oldest.decided_at + millis(1));
            self.kept.remove(0);
        }
        Reading::First(Arc::clone(decision))
    }

    fn recall(&self, key: &TransactionKey) -> Recall {
        if self.since > key.requested_at - CLOCK_MARGIN {
            return Recall::OutOfSight;
        }
        let found = self.kept.iter().find(|it| it.key == *key);
        found.map_or(Recall::Absent, |it| Recall::Found(Arc::clone(it)))
    }
}

fn check(begins: usize, records_max: usize, steps: &[Step]) {
    let mut now = BEGINNING;
    let mut journal: Vec<Arc<Decision>> = Vec::new();
    let mut view = JournalView::new(records_max, WINDOW);
    let mut naive = Naive { since: Time::EPOCH, next: 0, kept: Vec::new(), records_max };
    for step in steps {
        if journal.len() == begins {
            let before = journal.iter().map(|it| it.decided_at + millis(1)).max();
            naive.since = before.unwrap_or(Time::EPOCH);
            naive.next = u64::try_from(begins).unwrap();
            view.attach(naive.next, naive.since);
        }
        now = now + millis(step.after);
        journal.push(Arc::new(record(now, step)));
        let last = journal.len() - 1;
        if last < begins || step.fate == Fate::Lost {
            continue;
        }
        let again = if let Fate::ReadAgain(n) = step.fate { n } else { 0 };
        let from = last.saturating_sub(again).max(begins);
        for (offset, decision) in (from..).zip(&journal[from..]) {
            let offset = u64::try_from(offset).unwrap();
            let reading = view.read(now, offset, Arc::clone(decision));
            assert_eq!(reading, naive.read(now, offset, decision));
        }
        assert!(view.len() <= records_max, "the view is bounded");
        for asked in journal.iter().map(|it| &it.key) {
            check_recall(&journal, &view, &naive, asked);
        }
    }
}

fn check_recall(
    journal: &[Arc<Decision>],
    view: &JournalView,
    naive: &Naive,
    key: &TransactionKey,
) {
    let recall = view.recall(key, CLOCK_MARGIN);
    assert_eq!(recall, naive.recall(key), "{key}");

    let read = &journal[..usize::try_from(view.next_offset()).unwrap()];
    let outcome = read.iter().find(|it| it.key == *key);
    match &recall {
        Recall::Found(found) => assert_eq!(Some(found), outcome, "only the first one counts"),
        Recall::Absent => assert_eq!(None, outcome, "absent is said only of what has no record"),
        Recall::OutOfSight => {}
    }

    let is_namesake = |it: &&Arc<Decision>| it.key.id == key.id && it.key != *key;
    let found = |it: &Arc<Decision>| matches!(naive.recall(&it.key), Recall::Found(_));
    match view.namesake(key, CLOCK_MARGIN) {
        Some(Recall::Found(namesake)) => {
            assert!(is_namesake(&&namesake) && found(&namesake));
        }
        Some(Recall::Absent | Recall::OutOfSight) => panic!("a namesake is one that was found"),
        None => assert!(!journal.iter().filter(is_namesake).any(found)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        // More with PROPTEST_CASES.
        cases: ProptestConfig::default().cases.max(500),
        // What is found becomes a golden trace, not a seed in a file.
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_view_says_only_what_the_whole_journal_says(
        begins in 0..10_usize, records_max in 1..12_usize, steps in steps()
    ) {
        check(begins, records_max, &steps);
    }
}
