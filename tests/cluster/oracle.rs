//! What must hold at the end of a run, whatever was done to the cluster.
//!
//! It checks what is visible from outside: what was submitted, the results of producers, what the
//! services have committed, and the journal at each node.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    journal::{Entry, decisions},
    network::NODES,
    system::{Answer, Record, SERVICES, TIMED_OUT},
};

/// The reasons for which a transaction may abort while nodes are down: no time, no slot, no
/// reachable queue. A prepare that arrives just before its deadline is begun, and times out.
const TRUE_REASONS: [&str; 4] = ["deadline", TIMED_OUT, "no_slot", "unavailable"];
/// How many complaints of one kind are printed.
const TOLD_MAX: usize = 5;

/// The node, and its journal.
pub(crate) type Journals = BTreeMap<String, Vec<Entry>>;

/// The observations after a run.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    /// The name of each service, and its `committed.log`.
    pub(crate) committed: BTreeMap<String, String>,
    pub(crate) journals: Journals,
}

/// A branch that a service has committed.
#[derive(Debug, PartialEq, Eq)]
struct Committed<'a> {
    requested_at: i64,
    branch: &'a str,
}

/// The violations of the rules; empty if there are none.
///
/// A missing result is no violation but a hang, which is detected by waiting for it.
pub(crate) fn violations(record: &Record, facts: &Facts) -> Vec<String> {
    let mut complaints = Complaints::default();
    let committed = committed(facts);
    let results = results(record, &mut complaints);
    for (id, submitted) in &record.submitted {
        let count = |service: &str| committed.get(&(id.as_str(), service)).map_or(0, Vec::len);
        for service in SERVICES {
            let (times, involved) = (count(service), submitted.services.contains(&service));
            if times > usize::from(involved) {
                complaints.add("committed too often", format!("{id}: {times} times at {service}"));
            }
        }
        let counts = submitted.services.iter().map(|service| count(service));
        let counts: Vec<_> = counts.collect();
        match results.get(id.as_str()) {
            Some(answer) if answer.status == "COMMITTED" => {
                let unresolved = |service: &str| answer.unresolved.iter().any(|it| it == service);
                for (service, count) in submitted.services.iter().zip(&counts) {
                    if *count == 0 {
                        let more = if unresolved(service) { ", unresolved" } else { "" };
                        let told = format!("{id}: told COMMITTED, not at {service}{more}");
                        complaints.add("committed in part", told);
                    }
                }
            }
            Some(answer) => {
                if counts.iter().any(|count| *count > 0) {
                    complaints.add("aborted in part", format!("{id}: {counts:?}"));
                }
                if !TRUE_REASONS.contains(&answer.reason.as_str()) {
                    let what = format!("aborted as `{}`, which isn't true", answer.reason);
                    complaints.add(&what, id.clone());
                }
            }
            None if counts.iter().collect::<BTreeSet<_>>().len() > 1 => {
                let told = format!("{id}: {counts:?}");
                complaints.add("without a result, and committed in part", told);
            }
            None => {}
        }
    }
    journals(record, facts, &committed, &results, &mut complaints);
    complaints.told()
}

/// The only result of each transaction.
fn results<'a>(record: &'a Record, complaints: &mut Complaints) -> BTreeMap<&'a str, &'a Answer> {
    let mut results = BTreeMap::<_, &Answer>::new();
    for answer in &record.results {
        if !record.submitted.contains_key(&answer.id) {
            complaints.add("a result that nobody waits for", answer.id.clone());
        }
        if let Some(before) = results.insert(answer.id.as_str(), answer) {
            let told = format!("{}: {} and {}", answer.id, before.status, answer.status);
            complaints.add("two results", told);
        }
    }
    results
}

/// What the services have committed, by id and service.
fn committed(facts: &Facts) -> BTreeMap<(&str, &str), Vec<Committed<'_>>> {
    let mut committed = BTreeMap::<_, Vec<_>>::new();
    for (service, log) in &facts.committed {
        for line in log.lines() {
            let fields: Vec<_> = line.split(' ').collect();
            let [id, requested_at, branch, ..] = fields[..] else { continue };
            let requested_at = requested_at.parse().unwrap_or_default();
            let branches = committed.entry((id, service.as_str())).or_default();
            branches.push(Committed { requested_at, branch });
        }
    }
    committed
}

/// All replicas must be equal, and their first record of a transaction must be what happened.
fn journals(
    record: &Record,
    facts: &Facts,
    committed: &BTreeMap<(&str, &str), Vec<Committed<'_>>>,
    results: &BTreeMap<&str, &Answer>,
    complaints: &mut Complaints,
) {
    let Some((node, journal)) = facts.journals.iter().max_by_key(|(_, journal)| journal.len())
    else {
        complaints.add("the journal can't be read", "at any node".to_owned());
        return;
    };
    // A replica that RabbitMQ leaves down, whatever an operator does, is reported as the broker's.
    if facts.journals.len() <= NODES.len() / 2 {
        let unread = NODES.iter().filter(|node| !facts.journals.contains_key(**node));
        unread.for_each(|node| complaints.add("the journal can't be read", format!("at {node}")));
    }
    for (other, replica) in &facts.journals {
        if replica != journal {
            let same = replica.iter().zip(journal).take_while(|(one, other)| one == other).count();
            let told = format!(
                "{other} has {} records, {node} {}, the first {same} are the same",
                replica.len(),
                journal.len()
            );
            complaints.add("replicas of the journal differ", told);
        }
    }
    let gap = journal.windows(2).find(|pair| pair[1].offset != pair[0].offset + 1);
    if let Some(pair) = gap {
        let told = format!("{} follows {}", pair[1].offset, pair[0].offset);
        complaints.add("the journal has a gap", told);
    }
    let mut first = BTreeMap::new();
    for decision in decisions(journal) {
        first.entry((decision.id.clone(), decision.requested_at)).or_insert(decision);
    }
    let mut outcomes = BTreeMap::<&str, Vec<&str>>::new();
    for ((id, requested_at), decision) in &first {
        outcomes.entry(id).or_default().push(&decision.outcome);
        for service in SERVICES {
            let done = committed.get(&(id.as_str(), service)).into_iter().flatten();
            let done = done.filter(|it| it.requested_at == *requested_at).map(|it| it.branch);
            let done: Vec<_> = done.collect();
            let named = match decision.outcome.as_str() {
                "COMMITTED" => decision.branches.get(service),
                _ => None,
            };
            let wrong = done.iter().any(|branch| named.is_none_or(|named| named != branch));
            // A missing commit is reported with its result, or waited for.
            if wrong {
                let told = format!("{id} at {service}: {done:?}, decided {named:?}");
                complaints.add("committed another branch than was decided", told);
            }
        }
    }
    for (id, answer) in results {
        let decided = outcomes.get(id).is_some_and(|all| all.contains(&answer.status.as_str()));
        if !decided && record.submitted.contains_key(*id) {
            let told = format!("{id}: told {}, decided {:?}", answer.status, outcomes.get(id));
            complaints.add("told what the journal doesn't say", told);
        }
    }
}

/// Complaints of the same kind, together.
#[derive(Default)]
struct Complaints {
    by_kind: BTreeMap<String, Vec<String>>,
}

impl Complaints {
    fn add(&mut self, kind: &str, what: String) {
        self.by_kind.entry(kind.to_owned()).or_default().push(what);
    }

    fn told(self) -> Vec<String> {
        let told = self.by_kind.into_iter().map(|(kind, all)| {
            let more = if all.len() > TOLD_MAX { ", …" } else { "" };
            let examples: Vec<_> = all.iter().take(TOLD_MAX).cloned().collect();
            format!("{kind}, {} times: {}{more}", all.len(), examples.join("; "))
        });
        told.collect()
    }
}

/// The times of a run: measured, not judged.
#[derive(Debug, Default, Clone)]
pub(crate) struct Times {
    /// From the fault to the first commit of a transaction that was submitted after it.
    pub(crate) first_after_fault: Option<Duration>,
    /// The same from healing.
    pub(crate) first_after_healing: Option<Duration>,
    /// The longest time without a commit, from the fault to the last submission.
    pub(crate) longest_gap: Duration,
    pub(crate) committed: usize,
    /// How many were aborted, by reason.
    pub(crate) aborted: BTreeMap<String, usize>,
    pub(crate) submitted: usize,
}

/// The times of a run, given when the fault began and when it was healed.
pub(crate) fn times(record: &Record, fault: Duration, healed: Duration) -> Times {
    let committed = || record.results.iter().filter(|answer| answer.status == "COMMITTED");
    let first_after = |moment: Duration| {
        let is_new = |answer: &&Answer| {
            record.submitted.get(&answer.id).is_some_and(|submitted| submitted.at > moment)
        };
        committed().filter(is_new).map(|answer| answer.at - moment).min()
    };
    let last = record.submitted.values().map(|submitted| submitted.at).max().unwrap_or_default();
    let mut moments: Vec<_> = committed().map(|answer| answer.at).collect();
    moments.extend([fault, last]);
    moments.sort_unstable();
    let gaps = moments.windows(2).filter(|pair| pair[0] >= fault).map(|pair| pair[1] - pair[0]);
    let mut aborted = BTreeMap::new();
    for answer in record.results.iter().filter(|answer| answer.status == "ABORTED") {
        *aborted.entry(answer.reason.clone()).or_default() += 1;
    }
    Times {
        first_after_fault: first_after(fault),
        first_after_healing: first_after(healed),
        longest_gap: gaps.max().unwrap_or_default(),
        committed: committed().count(),
        aborted,
        submitted: record.submitted.len(),
    }
}
