//! Compares what the services hold with the producer's results.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufRead, BufReader},
    path::Path,
};

use anyhow::{Context, Result};

use crate::load::{Fate, SERVICES, involved, number_of};

/// How many problems are named.
const NAMED_MAX: usize = 10;

/// How often each service has committed each transaction, by number.
#[derive(Default, Debug)]
pub(crate) struct Ledger {
    committed: BTreeMap<&'static str, Vec<u8>>,
    /// Commits that nobody submitted, and branches that are still prepared.
    odd: Vec<String>,
}

impl Ledger {
    /// Reads the services' files in `state`.
    pub(crate) fn read(state: &Path) -> Result<Self> {
        let mut ledger = Self::default();
        for service in SERVICES {
            let directory = state.join(service);
            let log = directory.join("committed.log");
            let lines = File::open(&log).map(|file| BufReader::new(file).lines());
            let read = lines.and_then(|lines| ledger.read_log(service, lines));
            read.with_context(|| format!("{} can't be read", log.display()))?;
            let held = directory.join("prepared");
            let held = fs::read_dir(&held)
                .with_context(|| format!("{} can't be read", held.display()))?
                .count();
            if held > 0 {
                ledger.odd.push(format!("{service} holds {held} branches prepared"));
            }
        }
        Ok(ledger)
    }

    fn read_log(
        &mut self,
        service: &'static str,
        lines: impl Iterator<Item = io::Result<String>>,
    ) -> io::Result<()> {
        let counts = self.committed.entry(service).or_default();
        for line in lines {
            let line = line?;
            let Some(number) = line.split(' ').next().and_then(number_of) else {
                self.odd.push(format!("{service} has committed `{line}`"));
                continue;
            };
            if number >= counts.len() {
                counts.resize(number + 1, 0);
            }
            counts[number] = counts[number].saturating_add(1);
        }
        Ok(())
    }

    /// The violations of: each transaction was committed once at every service involved, or
    /// nowhere.
    pub(crate) fn problems(&self, fates: &[Fate]) -> Vec<String> {
        let known = self.committed.values().map(Vec::len).max().unwrap_or(0).max(fates.len());
        let mut problems = self.odd.clone();
        let mut more = 0;
        for number in 0..known {
            let fate = fates.get(number).copied().unwrap_or_default();
            for service in SERVICES {
                let counts = self.committed.get(service);
                let count = counts.and_then(|counts| counts.get(number)).copied().unwrap_or(0);
                let is_due = fate == Fate::Committed && involved(number).contains(&service);
                if count == u8::from(is_due) {
                    continue;
                }
                if problems.len() < NAMED_MAX {
                    let fate = format!("{fate:?}").to_lowercase();
                    problems.push(format!("{number} is {fate}: {count} commits at {service}"));
                } else {
                    more += 1;
                }
            }
        }
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        problems
    }
}

/// Tests that it detects what it must, by name. They panic if they fail.
pub(crate) const CHECKS: &[(&str, fn())] = &[
    ("ledger::a_run_in_which_all_is_well_has_no_problem", all_is_well),
    ("ledger::what_is_committed_in_part_is_seen", in_part),
    ("ledger::what_is_committed_twice_is_seen", twice),
    ("ledger::what_is_aborted_and_committed_is_seen", aborted_and_committed),
];

/// The ledger of these logs: transaction 0 involves all services, 1 `payments` and `stock`.
fn ledger(logs: [(&'static str, &str); 3]) -> Ledger {
    let mut ledger = Ledger::default();
    for (service, log) in logs {
        let lines = log.lines().map(|line| Ok(line.to_owned()));
        assert!(ledger.read_log(service, lines).is_ok());
    }
    ledger
}

fn all_is_well() {
    let good = ledger([
        ("payments", "soak-1 7 p.1 9 p\nsoak-0 7 p.2 9 p\n"),
        ("shipping", "soak-0 7 s.1 9 s\n"),
        ("stock", "soak-0 7 t.1 9 t\nsoak-1 7 t.2 9 t\n"),
    ]);
    assert_eq!(good.problems(&[Fate::Committed, Fate::Committed, Fate::Aborted]), [""; 0]);
}

fn in_part() {
    let part = ledger([("payments", "soak-1 7 p.1 9 p\n"), ("shipping", ""), ("stock", "")]);
    let told = [Fate::Aborted, Fate::Committed];
    assert_eq!(part.problems(&told), ["1 is committed: 0 commits at stock"]);
    let untold = [Fate::Aborted, Fate::Unanswered];
    assert_eq!(part.problems(&untold), ["1 is unanswered: 1 commits at payments"]);
}

fn twice() {
    let both = "soak-1 7 p.1 9 p\n";
    let twice = ledger([
        ("payments", both),
        ("shipping", ""),
        ("stock", "soak-1 7 t.1 9 t\nsoak-1 7 t.2 9 t\n"),
    ]);
    let told = [Fate::Aborted, Fate::Committed];
    assert_eq!(twice.problems(&told), ["1 is committed: 2 commits at stock"]);
}

fn aborted_and_committed() {
    let aborted = ledger([("payments", ""), ("shipping", "soak-0 7 s.1 9 s\n"), ("stock", "")]);
    assert_eq!(aborted.problems(&[Fate::Aborted]), ["0 is aborted: 1 commits at shipping"]);
}
