//! The state of a simulated service, read from its directory: see `simulated::store`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::Duration,
};

use super::text_of;

/// One service's state.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    pub(super) service: String,
    /// How often each transaction was committed.
    pub(super) committed: BTreeMap<String, u32>,
    pub(super) aborted: BTreeMap<String, u32>,
    /// The branches in doubt: `<id>@<requested_at>@<branch>`.
    pub(super) prepared: BTreeSet<String>,
    pub(super) calls: Vec<Call>,
}

/// A line of `calls.log`.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) is_start: bool,
    pub(super) name: String,
    pub(super) id: String,
    pub(super) branch: String,
    pub(super) instance: String,
    pub(super) ending: String,
    line: String,
}

impl Call {
    /// When it began or ended, since the Unix epoch.
    pub(super) fn at(&self) -> Duration {
        let nanoseconds = self.line.split(' ').next().unwrap();
        Duration::from_nanos(nanoseconds.parse().unwrap())
    }
}

impl Ledger {
    pub(super) fn read(directory: &Path) -> Self {
        let log = |name| text_of(&directory.join(name));
        let mut prepared = BTreeSet::new();
        for entry in fs::read_dir(directory.join("prepared")).into_iter().flatten() {
            prepared.insert(entry.unwrap().file_name().into_string().unwrap());
        }
        Self {
            service: directory.file_name().unwrap().to_string_lossy().into_owned(),
            committed: counted(&log("committed.log")),
            aborted: counted(&log("aborted.log")),
            prepared,
            calls: log("calls.log").lines().map(Call::read).collect(),
        }
    }

    /// How many calls of this name have started.
    pub(super) fn started(&self, name: &str) -> usize {
        self.calls.iter().filter(|call| call.is_start && call.name == name).count()
    }

    /// The transactions with unnecessary calls: for a phase that the service had answered before.
    pub(super) fn called_again(&self) -> BTreeSet<&str> {
        let mut answered = BTreeSet::new();
        let mut again = BTreeSet::new();
        for call in &self.calls {
            // A transaction that prepares twice has two branches, of which one is undone.
            let about = match call.name.as_str() {
                "prepare" => (&call.name, &call.id),
                _ => (&call.name, &call.branch),
            };
            let is_answer = !matches!(call.ending.as_str(), "failed" | "dropped");
            if call.is_start && answered.contains(&about) {
                again.insert(call.id.as_str());
            } else if !call.is_start && is_answer {
                answered.insert(about);
            }
        }
        again
    }

    /// How many slots each instance had in use at most: from the start of a prepare to the end of
    /// the commit or abort, whichever instance did that.
    pub(super) fn most_held(&self) -> BTreeMap<String, usize> {
        let mut held: BTreeMap<String, BTreeSet<&str>> = BTreeMap::new();
        let mut most = BTreeMap::new();
        for call in &self.calls {
            let holds_on = matches!(call.ending.as_str(), "prepared" | "failed" | "dropped");
            match (call.name.as_str(), call.is_start) {
                ("prepare", true) => {
                    let here = held.entry(call.instance.clone()).or_default();
                    here.insert(&call.branch);
                    let most = most.entry(call.instance.clone()).or_default();
                    *most = here.len().max(*most);
                }
                ("prepare", false) if holds_on => {}
                (_, false) => held.values_mut().for_each(|it| {
                    it.remove(&*call.branch);
                }),
                (_, true) => {}
            }
        }
        most
    }
}

impl Call {
    fn read(line: &str) -> Self {
        let mut words = line.split(' ');
        let mut next = || words.next().unwrap_or_default().to_owned();
        let _nanos = next();
        let is_start = next() == "start";
        let (name, id, _requested_at) = (next(), next(), next());
        let (branch, instance, ending) = (next(), next(), next());
        Self { is_start, name, id, branch, instance, ending, line: line.to_owned() }
    }
}

/// How often each id begins a line.
fn counted(log: &str) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    for line in log.lines() {
        *counts.entry(line.split(' ').next().unwrap().to_owned()).or_default() += 1;
    }
    counts
}

/// Asserts that every service holds what the producer was told: each of `committed` once, and
/// nothing else.
#[track_caller]
pub(super) fn assert_services_hold(ledgers: &[Ledger], committed: &BTreeSet<String>) {
    for ledger in ledgers {
        let service = &ledger.service;
        let held: BTreeSet<_> = ledger.committed.keys().cloned().collect();
        let unheard: Vec<_> = held.difference(committed).take(5).collect();
        assert!(
            unheard.is_empty(),
            "{service} has committed, though ABORTED or untold: {unheard:?}"
        );
        let missing: Vec<_> = committed.difference(&held).take(5).collect();
        assert!(missing.is_empty(), "{service} lacks what is COMMITTED: {missing:?}");
        let twice: Vec<_> = ledger.committed.iter().filter(|(_, count)| **count != 1).collect();
        assert!(twice.is_empty(), "{service} has committed twice: {twice:?}");
        assert!(ledger.prepared.is_empty(), "{service} still holds {:?}", ledger.prepared);
    }
}

/// Asserts that no service was called again for a phase that it had answered.
#[track_caller]
pub(super) fn assert_none_called_again(ledgers: &[Ledger]) {
    for ledger in ledgers {
        let again = ledger.called_again();
        let is_about = |call: &&Call| again.first().is_some_and(|id| *id == call.id);
        let lines: Vec<_> = ledger.calls.iter().filter(is_about).map(|it| &*it.line).collect();
        let (service, count, lines) = (&ledger.service, again.len(), lines.join("\n"));
        assert!(again.is_empty(), "{service} was called again for {count} transactions:\n{lines}");
    }
}

/// Asserts that no instance had more slots in use than `cap`, and prints the maximum.
#[track_caller]
pub(super) fn assert_cap_holds(ledgers: &[Ledger], cap: usize) -> usize {
    let mut most = 0;
    for ledger in ledgers {
        for (instance, held) in ledger.most_held() {
            assert!(held <= cap, "{instance} of {} had {held} slots in use", ledger.service);
            most = most.max(held);
        }
    }
    most
}

#[test]
fn a_call_for_an_answered_phase_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let log = "1 start prepare t1 9 a.1 a\n2 end prepare t1 9 a.1 a prepared\n\
               3 start prepare t1 9 b.1 b\n4 end prepare t1 9 b.1 b prepared\n\
               5 start commit t1 9 a.1 a\n6 end commit t1 9 a.1 a failed\n\
               7 start commit t1 9 a.1 a\n8 end commit t1 9 a.1 a done\n\
               9 start abort t1 9 b.1 b\n10 end abort t1 9 b.1 b done\n";
    fs::write(directory.path().join("calls.log"), log).unwrap();
    let ledger = Ledger::read(directory.path());
    assert_eq!(ledger.called_again(), BTreeSet::from(["t1"]));
    let answered_once = Ledger { calls: ledger.calls[4..].to_vec(), ..Ledger::default() };
    assert_eq!(answered_once.called_again(), BTreeSet::new());
    assert_eq!(ledger.most_held().values().copied().collect::<Vec<_>>(), [1, 1]);
    assert_eq!((ledger.started("prepare"), ledger.started("commit")), (2, 2));
}
