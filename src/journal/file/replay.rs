//! The content of a journal file, read from its beginning to its end.
//!
//! It depends only on the file's bytes; the opener decides what to do with them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read, Seek},
    sync::Arc,
};

use crate::{
    journal::file::frames::{FrameReader, HEADER, NextFrame},
    protocol::{
        ids::{InstanceId, ServiceName, TransactionId, TransactionKey, WorkerId},
        message::{AnswerAt, Decision, Payload, Request},
        time::Time,
    },
    unique,
    wire::message::{Begun, Entry, EntryMalformed, Finished},
};

/// A transaction that was in flight when writing ended, or that has a parked commit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnfinishedTransaction {
    /// The request. If only the decision is known, what follows from that.
    pub request: Request,
    /// The worker that began it first.
    pub begun_by: WorkerId,
    /// Its outcome, if it is decided.
    pub decision: Option<Arc<Decision>>,
    /// If all services but these have committed: those whose commit is parked.
    pub parked: Vec<ServiceName>,
}

/// One opening of a journal file: it names the process as a worker, and as an instance of its
/// services. So every branch id shows which process created it.
///
/// As text: `<journal>-<number>`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Incarnation {
    /// The name of the journal, chosen when it was created.
    pub journal: String,
    /// The number of the opening.
    pub number: u64,
}

impl Incarnation {
    /// Parses `text` as an incarnation.
    pub fn parse(text: &str) -> Option<Self> {
        let (journal, number) = text.rsplit_once('-')?;
        let is_plain = number == "0" || !number.starts_with(['0', '+']);
        let number = number.parse().ok().filter(|_| is_plain && !journal.is_empty())?;
        Some(Self { journal: journal.to_owned(), number })
    }

    /// The first one of a new journal.
    pub fn first() -> Self {
        Self { journal: unique::name('j'), number: 1 }
    }

    /// The next one.
    #[must_use]
    pub fn next(&self) -> Self {
        Self { journal: self.journal.clone(), number: self.number.saturating_add(1) }
    }

    /// Its name as a worker.
    pub fn worker(&self) -> Option<WorkerId> {
        WorkerId::parse(&format!("{}-{}", self.journal, self.number)).ok()
    }

    /// Its name as an instance of each of its services.
    pub fn instance(&self) -> Option<InstanceId> {
        InstanceId::parse(&format!("{}-{}", self.journal, self.number)).ok()
    }
}

/// Where the outcome of a transaction is in the file: a digest of its id, and the offset.
///
/// Of a finished transaction only this is kept in memory: 16 bytes.
pub(super) type FinishedOffset = (u64, u64);

/// The content of a file.
#[derive(Debug, Default)]
pub struct Replay {
    /// The last opening.
    pub last: Option<Incarnation>,
    /// The transactions that are not finished, in the order in which they were begun.
    pub unfinished: Vec<UnfinishedTransaction>,
    /// The finished ones, in the order of the digests, and then of the offsets.
    pub(super) endings: Vec<FinishedOffset>,
    /// How much of the file is still needed.
    pub needed: u64,
    /// The latest time in it.
    pub latest: Time,
    /// The offset after the last good frame.
    pub end: u64,
    /// How much of it was on the disk when its last frame was written.
    pub durable: u64,
    /// Whether unreadable bytes follow that were not safe when writing ended.
    pub is_torn: bool,
}

/// A file can't be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// It can't be read.
    #[error("can't be read")]
    Read(#[from] io::Error),
    /// Bytes that were safe have been damaged.
    #[error(
        "what was written at byte {at} is damaged, and the entry at byte {witness} shows that it was safe"
    )]
    Damaged {
        /// The offset.
        at: u64,
        /// The offset of the frame that shows that they were on the disk.
        witness: u64,
    },
    /// An entry is intact, but can't be understood.
    #[error("the entry at byte {at} can't be understood")]
    Malformed {
        /// The offset.
        at: u64,
        /// Why.
        #[source]
        source: EntryMalformed,
    },
    /// It was written by processes that didn't know of each other.
    #[error("the entry at byte {at} belongs to another journal, that of `{worker}`")]
    Foreign {
        /// The offset.
        at: u64,
        /// The worker in the entry.
        worker: WorkerId,
    },
    /// The journal's name leaves no room for the number of the next opening.
    #[error("its name `{journal}` is too long")]
    Nameless {
        /// Its name.
        journal: String,
    },
}

/// What is known of a transaction that is not finished.
#[derive(Default)]
struct OpenTransaction {
    /// Its position in the order in which transactions were begun or decided.
    order: u64,
    /// The size of its entries in the file.
    size: u64,
    begun: Option<Begun>,
    decision: Option<Arc<Decision>>,
    parked: Vec<ServiceName>,
}

/// Reads a journal file after its header. It leaves out what is finished and was decided before
/// `forget_before`.
///
/// # Errors
///
/// It can't be read, or it is damaged.
pub fn replay<R: Read + Seek>(reader: R, forget_before: Time) -> Result<Replay, ReplayError> {
    let mut frames = FrameReader::after_header(reader)?;
    let mut it = Replay { end: HEADER.len() as u64, ..Replay::default() };
    let mut open: BTreeMap<TransactionKey, OpenTransaction> = BTreeMap::new();
    let mut order = 0;
    loop {
        let frame = match frames.read()? {
            NextFrame::Frame(frame) => frame,
            NextFrame::End => break,
            NextFrame::Torn => {
                it.is_torn = true;
                break;
            }
            NextFrame::Corrupt { witness } => {
                return Err(ReplayError::Damaged { at: it.end, witness });
            }
        };
        let at = frame.at;
        let entry = Entry::read(frame.tag, &frame.text)
            .map_err(|source| ReplayError::Malformed { at, source })?;
        it.end = frame.end();
        it.durable = frame.durable;
        order += 1;
        match entry {
            Entry::Opened { worker, opened_at } => {
                let opened = Incarnation::parse(worker.as_str())
                    .filter(|new| it.last.as_ref().is_none_or(|last| last.journal == new.journal));
                let Some(opened) = opened else { return Err(ReplayError::Foreign { at, worker }) };
                it.last = Some(opened);
                it.latest = it.latest.max(opened_at);
            }
            Entry::Begun(begun) => {
                it.latest = it.latest.max(begun.request.key.requested_at);
                let open = open.entry(begun.request.key.clone());
                let open =
                    open.or_insert_with(|| OpenTransaction { order, ..OpenTransaction::default() });
                open.size += it.end - at;
                open.begun.get_or_insert(begun);
            }
            Entry::Decided(decision) => {
                it.latest = it.latest.max(decision.decided_at);
                let open = open.entry(decision.key.clone());
                let open =
                    open.or_insert_with(|| OpenTransaction { order, ..OpenTransaction::default() });
                open.size += it.end - at;
                open.decision.get_or_insert(decision);
            }
            Entry::Finished(Finished { decision, unresolved }) => {
                it.latest = it.latest.max(decision.decided_at);
                if !unresolved.is_empty() {
                    let open = open.entry(decision.key.clone());
                    let open = open
                        .or_insert_with(|| OpenTransaction { order, ..OpenTransaction::default() });
                    open.decision.get_or_insert(decision);
                    open.parked = unresolved;
                    continue;
                }
                open.remove(&decision.key);
                if decision.decided_at >= forget_before {
                    it.endings.push((digest(&decision.key.id), at));
                    it.needed += it.end - at;
                }
            }
            Entry::Closed { closed_at } => it.latest = it.latest.max(closed_at),
        }
    }
    it.endings.sort_unstable();
    it.needed += open.values().map(|open| open.size).sum::<u64>();
    let mut unfinished: Vec<_> = open.into_values().filter_map(unfinished).collect();
    unfinished.sort_by_key(|(order, _)| *order);
    it.unfinished = unfinished.into_iter().map(|(_, unfinished)| unfinished).collect();
    Ok(it)
}

/// The digest by which an id is looked up.
pub(super) fn digest(id: &TransactionId) -> u64 {
    id.digest()
}

fn unfinished(open: OpenTransaction) -> Option<(u64, UnfinishedTransaction)> {
    let OpenTransaction { order, size: _, begun, decision, parked } = open;
    let (request, worker) = match (begun, &decision) {
        (Some(begun), _) => (begun.request, begun.worker),
        (None, Some(decision)) => (request_of(decision)?, decision.worker.clone()),
        (None, None) => return None,
    };
    Some((order, UnfinishedTransaction { request, begun_by: worker, decision, parked }))
}

/// The request that remains to be finished if only the decision is known; `None`: nothing remains,
/// since no service was asked.
fn request_of(decision: &Decision) -> Option<Request> {
    let services: BTreeSet<_> = decision.branches.iter().map(|(name, _)| name.clone()).collect();
    (!services.is_empty()).then(|| Request {
        key: decision.key.clone(),
        request_hash: decision.request_hash,
        services: services.into_iter().collect(),
        data: Payload::new("{}"),
        timeout: None,
        answer_at: AnswerAt::default(),
        reply: None,
    })
}

#[cfg(test)]
mod tests {
    use std::{io::Cursor, sync::Arc};

    use proptest::prelude::{any, prop, proptest};

    use super::{Incarnation, Replay, ReplayError, replay};
    use crate::{
        journal::file::frames::{self, HEADER},
        protocol::{
            ids::{Branch, ServiceName, TransactionId, TransactionKey},
            message::{AnswerAt, Decision, Outcome, Payload, Request},
            time::Time,
        },
        wire::{
            hash::request_hash,
            message::{Begun, Entry, Finished},
        },
    };

    fn incarnation(number: u64) -> Incarnation {
        Incarnation { journal: "jx".to_owned(), number }
    }

    fn opened(number: u64) -> Entry {
        let worker = incarnation(number).worker().unwrap();
        Entry::Opened { worker, opened_at: Time::from_millis(500 + number) }
    }

    fn names(names: &[&str]) -> Vec<ServiceName> {
        names.iter().map(|name| ServiceName::parse(name).unwrap()).collect()
    }

    fn request(id: &str) -> Request {
        let services: Arc<[_]> = names(&["a", "b"]).into();
        let data = Payload::new("{}");
        let id = TransactionId::parse(id).unwrap();
        Request {
            key: TransactionKey { id, requested_at: Time::from_millis(1000) },
            request_hash: request_hash(&services, &data),
            services,
            data,
            timeout: None,
            answer_at: AnswerAt::default(),
            reply: None,
        }
    }

    fn begun(id: &str) -> Entry {
        Entry::Begun(Begun { request: request(id), worker: incarnation(1).worker().unwrap() })
    }

    fn decision(id: &str, outcome: Outcome) -> Arc<Decision> {
        let of = request(id);
        let branch = Branch::of(&incarnation(1).instance().unwrap(), 1);
        let is_committed = outcome == Outcome::Committed;
        let branches = names(&["a", "b"]).into_iter().map(|name| (name, branch.clone()));
        Arc::new(Decision {
            key: of.key,
            request_hash: of.request_hash,
            outcome,
            branches: branches.filter(|_| is_committed).collect(),
            reason: None,
            decided_at: Time::from_millis(2000),
            worker: incarnation(1).worker().unwrap(),
        })
    }

    fn decided(id: &str, outcome: Outcome) -> Entry {
        Entry::Decided(decision(id, outcome))
    }

    fn finished(id: &str, unresolved: &[&str]) -> Entry {
        let decision = decision(id, Outcome::Committed);
        Entry::Finished(Finished { decision, unresolved: names(unresolved) })
    }

    fn file(entries: &[Entry]) -> Vec<u8> {
        let mut bytes = HEADER.to_vec();
        for entry in entries {
            let mut text = Vec::new();
            entry.write(&mut text);
            let at = bytes.len() as u64;
            frames::write(&mut bytes, at, at, entry.tag(), &text).unwrap();
        }
        bytes
    }

    fn read(entries: &[Entry]) -> Replay {
        replay(Cursor::new(file(entries)), Time::EPOCH).unwrap()
    }

    /// What is unfinished, as `id outcome parked`.
    fn unfinished(replay: &Replay) -> Vec<String> {
        let line = |it: &super::UnfinishedTransaction| {
            let outcome = it.decision.as_ref().map_or("undecided", |it| it.outcome.as_str());
            let parked: Vec<_> = it.parked.iter().map(ServiceName::as_str).collect();
            format!("{} {outcome} {}", it.request.key.id, parked.join(","))
        };
        replay.unfinished.iter().map(line).collect()
    }

    const COMMITTED: Outcome = Outcome::Committed;
    const ABORTED: Outcome = Outcome::Aborted;

    #[test]
    fn unfinished_transactions_are_in_the_order_in_which_they_were_begun() {
        let entries = [
            opened(1),
            begun("t3"),
            begun("t1"),
            begun("t2"),
            decided("t2", COMMITTED),
            decided("t1", ABORTED),
            begun("t4"),
            decided("t4", COMMITTED),
            finished("t4", &[]),
        ];
        let replay = read(&entries);
        assert_eq!(unfinished(&replay), ["t3 undecided ", "t1 ABORTED ", "t2 COMMITTED "]);
        assert_eq!(replay.endings.len(), 1);
        assert_eq!(replay.last, Some(incarnation(1)));
        assert_eq!(replay.latest, Time::from_millis(2000));
        assert_eq!(replay.end, file(&entries).len() as u64);
    }

    #[test]
    fn the_first_decision_counts() {
        let entries = [begun("t"), decided("t", ABORTED), decided("t", COMMITTED)];
        assert_eq!(unfinished(&read(&entries)), ["t ABORTED "]);
    }

    #[test]
    fn a_parked_transaction_is_unfinished_until_it_is_settled() {
        let mut entries = vec![begun("t"), decided("t", COMMITTED), finished("t", &["b"])];
        assert_eq!(unfinished(&read(&entries)), ["t COMMITTED b"]);
        // As a compacted file has it.
        assert_eq!(unfinished(&read(&[finished("t", &["b"])])), ["t COMMITTED b"]);
        entries.push(finished("t", &[]));
        let replay = read(&entries);
        assert_eq!(unfinished(&replay), [""; 0]);
        assert_eq!(replay.endings.len(), 1);
    }

    #[test]
    fn a_commit_without_its_request_is_finished_at_the_services_it_names() {
        let replay = read(&[decided("t", COMMITTED)]);
        assert_eq!(unfinished(&replay), ["t COMMITTED "]);
        let request = &replay.unfinished[0].request;
        assert_eq!(request.services[..], names(&["a", "b"]));
        assert_eq!(request.request_hash, decision("t", COMMITTED).request_hash);
        // After an abort nothing remains to be done that its services wouldn't ask for.
        assert_eq!(unfinished(&read(&[decided("t", ABORTED)])), [""; 0]);
    }

    #[test]
    fn after_the_retention_finished_transactions_are_forgotten_and_parked_ones_kept() {
        let bytes = file(&[finished("t1", &[]), finished("t2", &["a"])]);
        let later = Time::from_millis(2001);
        let replay = replay(Cursor::new(bytes), later).unwrap();
        assert_eq!(replay.endings.len(), 0);
        assert_eq!(unfinished(&replay), ["t2 COMMITTED a"]);
    }

    #[test]
    fn openings_are_counted_and_those_of_another_journal_are_an_error() {
        assert_eq!(read(&[opened(1), opened(2), opened(7)]).last, Some(incarnation(7)));
        let worker = Incarnation { journal: "jy".to_owned(), number: 1 }.worker().unwrap();
        let other = Entry::Opened { worker, opened_at: Time::EPOCH };
        let read = replay(Cursor::new(file(&[opened(1), other])), Time::EPOCH);
        assert!(matches!(read, Err(ReplayError::Foreign { .. })), "{read:?}");
    }

    #[test]
    fn an_incarnation_and_its_name_are_one() {
        for number in [0, 1, u64::MAX] {
            let name = incarnation(number).worker().unwrap();
            assert_eq!(Incarnation::parse(name.as_str()), Some(incarnation(number)));
        }
        for bad in ["", "jx", "-1", "jx-", "jx-01", "jx-+1", "jx-x", "embedded"] {
            assert_eq!(Incarnation::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_invalid_entry_is_an_error_anywhere() {
        for (tag, text) in [(b'x', "{}"), (b'd', "{}"), (b'f', "nothing"), (b'b', "{}\n{}")] {
            let mut bytes = file(&[opened(1)]);
            let at = bytes.len() as u64;
            frames::write(&mut bytes, at, at, tag, text.as_bytes()).unwrap();
            let read = replay(Cursor::new(bytes), Time::EPOCH);
            let found =
                matches!(read, Err(ReplayError::Malformed { at: found, .. }) if found == at);
            assert!(found, "{tag} {text}: {read:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_near_a_journal_makes_it_panic(
            which in prop::collection::vec((any::<usize>(), any::<u8>()), 1..4),
            end in any::<usize>(),
        ) {
            let entries = [opened(1), begun("t"), decided("t", COMMITTED), finished("t", &["a"])];
            let mut bytes = file(&entries);
            for (at, byte) in which {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            bytes.truncate(end % (bytes.len() + 1));
            let _ = replay(Cursor::new(bytes), Time::EPOCH);
        }
    }
}
