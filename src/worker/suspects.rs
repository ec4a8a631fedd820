//! Requests that may crash workers.
//!
//! The broker counts how often it delivers a request, but many deliveries say nothing about the request:
//! an operator looked into the queue, a connection was lost, or a worker crashed for another reason while
//! the request waited for a slot. So a request that was delivered more than
//! [`deliveries_max`](crate::protocol::coordinator::Settings::deliveries_max) times is not given up. It is
//! a *suspect*, and the coordinator gets it with no more deliveries than that. The worker tries suspects
//! one at a time, and records each try in the journal, which every worker reads, before it begins. After
//! [`TRIES_MAX`] tries that no worker survived, the request is given up.
//!
//! * A worker has survived a try when the transaction has an outcome, or waits for a slot, since then
//!   nothing of it has begun. The worker records that it waits, and records a new try in the moment in
//!   which it begins after all. That try is not alone.
//! * A try that takes longer than [`ALONE_MAX`] no longer holds up the next suspect. Its record stays.
//! * A try is recorded as an empty message of decisions with a header: a worker that doesn't know of tries
//!   takes it for a marker. It counts as long as workers read it when they start
//!   ([`window`](crate::protocol::coordinator::Settings::window)).
//! * A request that crashes workers before they can record anything, or so rarely that the records
//!   expire, is given up when it was delivered [`DELIVERIES_MAX`] times.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::time::Instant;

use crate::protocol::{
    coordinator::Phase,
    ids::{TransactionId, TransactionKey},
    message::{Decision, Delivery, Request},
    time::Time,
};

/// After how many tries that no worker survived a suspect is given up.
const TRIES_MAX: u32 = 5;

/// A request that was delivered more often is given up, whatever was recorded.
const DELIVERIES_MAX: u32 = 1000;

/// How long other suspects wait for the one that is being tried.
const ALONE_MAX: Duration = Duration::from_secs(10);

/// For how many transactions tries are remembered.
const REMEMBERED_MAX: usize = 4096;

/// The headers of a record.
const TRY: &str = "try";
const TRY_ID: &str = "try-id";
const TRY_REQUESTED_AT: &str = "try-requested-at";
const BEGUN: &str = "begun";
const OVER: &str = "over";

/// A record about a try of a suspect.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Try {
    pub(super) key: TransactionKey,
    /// Whether the try begins; if not, it is over and the worker has survived it.
    pub(super) begins: bool,
}

/// A request, and how often it was delivered.
#[derive(Debug)]
pub(super) struct Suspect {
    pub(super) request: Request,
    pub(super) delivery: Delivery,
    pub(super) deliveries: u32,
}

/// The suspects that this worker has taken.
#[derive(Debug)]
pub(super) struct Suspects {
    /// A request that was delivered more often is a suspect.
    deliveries_max: u32,
    waiting: VecDeque<Suspect>,
    trial: Trial,
    /// Suspects that wait for a slot at the coordinator.
    unbegun: BTreeSet<TransactionKey>,
}

#[derive(Debug, Default)]
enum Trial {
    #[default]
    Free,
    /// The record of the try is not confirmed yet.
    Recording(Suspect),
    Trying {
        key: TransactionKey,
        until: Instant,
    },
}

/// How many tries of each transaction no worker has survived, as far as the journal was read.
#[derive(Debug, Default)]
pub(super) struct Tries {
    of: BTreeMap<TransactionKey, KnownTries>,
    heard: u64,
}

/// The tries of one transaction.
#[derive(Debug, Default)]
struct KnownTries {
    tries: u32,
    /// The id of its last record, which may come twice, and the number of that record.
    last: Option<ShortString>,
    heard: u64,
}

/// What the worker has to do about a suspect.
#[derive(Debug)]
pub(super) enum SuspectStep {
    /// Write this record; then call [`Suspects::recorded`].
    Record(Try),
    /// Pass it to the coordinator, with its count of deliveries.
    Dispatch(Suspect),
}

impl Suspect {
    /// Two deliveries of one transaction are both suspects, however often each was delivered.
    fn is_suspect(&self, deliveries_max: u32, tries: &Tries) -> bool {
        self.deliveries > deliveries_max || tries.of(&self.request.key) > 0
    }

    /// The same with a count of deliveries with which the coordinator tries it.
    fn tried(self, deliveries_max: u32) -> Self {
        Self { deliveries: self.deliveries.min(deliveries_max), ..self }
    }

    /// The same with a count of deliveries with which the coordinator gives it up.
    fn given_up(self) -> Self {
        Self { deliveries: u32::MAX, ..self }
    }
}

impl Suspects {
    pub(super) fn new(deliveries_max: u32) -> Self {
        let (waiting, trial, unbegun) = (VecDeque::new(), Trial::Free, BTreeSet::new());
        Self { deliveries_max, waiting, trial, unbegun }
    }

    /// Takes in a request. Returns it if the coordinator may have it at once: if it is no suspect, or is
    /// given up.
    pub(super) fn sift(&mut self, suspect: Suspect, tries: &Tries) -> Option<Suspect> {
        if !suspect.is_suspect(self.deliveries_max, tries) {
            return Some(suspect);
        }
        if suspect.deliveries > DELIVERIES_MAX {
            return Some(suspect.given_up());
        }
        self.waiting.push_back(suspect);
        None
    }

    /// The next step, if there is one. `phase_of`: the phase of a transaction at the coordinator.
    pub(super) fn next(
        &mut self,
        tries: &Tries,
        now: Instant,
        phase_of: impl Fn(&TransactionKey) -> Option<Phase>,
    ) -> Option<SuspectStep> {
        self.unbegun.retain(|key| phase_of(key).is_some());
        if let Trial::Trying { key, until } = &self.trial {
            match phase_of(key) {
                Some(Phase::Waiting) => {
                    let key = key.clone();
                    self.trial = Trial::Free;
                    self.unbegun.insert(key.clone());
                    return Some(SuspectStep::Record(Try { key, begins: false }));
                }
                Some(_) if *until > now => return None,
                Some(_) | None => self.trial = Trial::Free,
            }
        }
        if !matches!(self.trial, Trial::Free) {
            return None;
        }
        let suspect = self.waiting.pop_front()?;
        let key = suspect.request.key.clone();
        if tries.of(&key) >= TRIES_MAX {
            return Some(SuspectStep::Dispatch(suspect.given_up()));
        }
        tracing::warn!(
            transaction = %key, deliveries = suspect.deliveries, tries = tries.of(&key),
            "a request was delivered so often that it may be what crashes workers; trying it alone"
        );
        self.trial = Trial::Recording(suspect);
        Some(SuspectStep::Record(Try { key, begins: true }))
    }

    /// The record of the try of `key` is safe: the suspect to try now.
    pub(super) fn recorded(&mut self, key: &TransactionKey, now: Instant) -> Option<Suspect> {
        let next = Trial::Trying { key: key.clone(), until: now + ALONE_MAX };
        match std::mem::replace(&mut self.trial, next) {
            Trial::Recording(suspect) if suspect.request.key == *key => {
                Some(suspect.tried(self.deliveries_max))
            }
            other @ (Trial::Free | Trial::Recording(_) | Trial::Trying { .. }) => {
                self.trial = other;
                None
            }
        }
    }

    /// The coordinator asks a service to prepare `key`: the record to write, if `key` is a suspect that
    /// has waited for a slot.
    pub(super) fn asked(&mut self, key: &TransactionKey) -> Option<Try> {
        let key = self.unbegun.take(key)?;
        Some(Try { key, begins: true })
    }

    /// When to look for the next step even if nothing happens.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        match &self.trial {
            Trial::Trying { until, .. } if !self.waiting.is_empty() => Some(*until),
            Trial::Trying { .. } | Trial::Recording(_) | Trial::Free => None,
        }
    }

    /// How many wait to be tried.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// The suspects that the coordinator doesn't have, for other workers.
    pub(super) fn give_back(&mut self) -> impl Iterator<Item = Delivery> + use<> {
        let recording = match std::mem::take(&mut self.trial) {
            Trial::Recording(suspect) => Some(suspect),
            Trial::Trying { .. } | Trial::Free => None,
        };
        let waiting = std::mem::take(&mut self.waiting);
        recording.into_iter().chain(waiting).map(|suspect| suspect.delivery)
    }
}

impl Tries {
    /// How many tries of `key` no worker has survived. A try under way counts.
    fn of(&self, key: &TransactionKey) -> u32 {
        self.of.get(key).map_or(0, |known| known.tries)
    }

    /// A message of the journal was read.
    pub(super) fn read(
        &mut self,
        tried: Option<Try>,
        message_id: Option<&ShortString>,
        decisions: &[Arc<Decision>],
    ) {
        if let Some(it) = tried {
            self.heard(it, message_id);
        }
        // No worker will try a transaction that has an outcome.
        if !self.of.is_empty() {
            for decision in decisions {
                self.of.remove(&decision.key);
            }
        }
    }

    fn heard(&mut self, it: Try, message_id: Option<&ShortString>) {
        let is_new = !self.of.contains_key(&it.key);
        if is_new && !it.begins {
            return;
        }
        if is_new && self.of.len() >= REMEMBERED_MAX {
            let oldest = self.of.iter().min_by_key(|(_, known)| known.heard);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.of.remove(&oldest);
            }
        }
        let known = self.of.entry(it.key).or_default();
        // A record that was not confirmed in time is published again.
        if message_id.is_some() && known.last.as_ref() == message_id {
            return;
        }
        self.heard += 1;
        known.heard = self.heard;
        known.last = message_id.cloned();
        known.tries = match it.begins {
            true => known.tries.saturating_add(1),
            false => known.tries.saturating_sub(1),
        };
    }
}

impl Try {
    /// The headers of the message that records it.
    pub(super) fn headers(&self) -> FieldTable {
        let TransactionKey { id, requested_at } = &self.key;
        let millis = i64::try_from(requested_at.as_millis()).unwrap_or(i64::MAX);
        let what = if self.begins { BEGUN } else { OVER };
        let mut headers = FieldTable::default();
        headers.insert(TRY.into(), AMQPValue::LongString(what.into()));
        headers.insert(TRY_ID.into(), AMQPValue::LongString(id.as_str().into()));
        headers.insert(TRY_REQUESTED_AT.into(), AMQPValue::LongLongInt(millis));
        headers
    }

    /// Reads it from the headers of a message.
    pub(super) fn of(headers: &FieldTable) -> Option<Self> {
        let text = |name| match headers.inner().get(name) {
            Some(AMQPValue::LongString(text)) => std::str::from_utf8(text.as_bytes()).ok(),
            Some(_) | None => None,
        };
        let begins = match text(TRY)? {
            BEGUN => true,
            OVER => false,
            _ => return None,
        };
        let id = TransactionId::parse(text(TRY_ID)?).ok()?;
        let AMQPValue::LongLongInt(millis) = headers.inner().get(TRY_REQUESTED_AT)? else {
            return None;
        };
        let millis = u64::try_from(*millis).ok()?;
        let requested_at = Time::from_millis(millis);
        Some(Self { key: TransactionKey { id, requested_at }, begins })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::time::Instant;

    use super::{
        ALONE_MAX, DELIVERIES_MAX, REMEMBERED_MAX, Suspect, SuspectStep, Suspects, TRIES_MAX,
        Tries, Try,
    };
    use crate::protocol::{
        coordinator::Phase,
        ids::{RequestHash, ServiceName, TransactionId, TransactionKey, WorkerId},
        message::{AnswerAt, Decision, Delivery, Outcome, Payload, Request},
        time::Time,
    };

    const SUSPECT_AFTER: u32 = 20;

    fn key(number: usize) -> TransactionKey {
        let id = TransactionId::parse(&format!("t{number}")).unwrap();
        TransactionKey { id, requested_at: Time::from_millis(1000) }
    }

    fn suspect(number: usize, deliveries: u32) -> Suspect {
        let request = Request {
            key: key(number),
            services: Arc::new([ServiceName::parse("stock").unwrap()]),
            data: Payload::new("{}"),
            request_hash: RequestHash([0; 16]),
            timeout: None,
            answer_at: AnswerAt::default(),
            reply: None,
        };
        Suspect { request, delivery: Delivery(number as u64), deliveries }
    }

    /// What each of the next steps is, until there is none.
    fn steps(suspects: &mut Suspects, tries: &Tries, phase: Option<Phase>) -> Vec<String> {
        let mut next = || suspects.next(tries, Instant::now(), |_| phase);
        let said = |next| match next {
            SuspectStep::Record(Try { key, begins: true }) => format!("{} begins", key.id),
            SuspectStep::Record(Try { key, begins: false }) => format!("{} is over", key.id),
            SuspectStep::Dispatch(it) => {
                format!("{} came {} times", it.request.key.id, it.deliveries)
            }
        };
        std::iter::from_fn(|| next().map(said)).collect()
    }

    fn begun(tries: &mut Tries, number: usize) {
        tries.read(Some(Try { key: key(number), begins: true }), None, &[]);
    }

    #[test]
    fn suspects_are_tried_one_at_a_time_and_recorded_first() {
        let (mut suspects, tries) = (Suspects::new(SUSPECT_AFTER), Tries::default());
        assert!(suspects.sift(suspect(1, SUSPECT_AFTER), &tries).is_some(), "it is none");
        assert!(suspects.sift(suspect(2, SUSPECT_AFTER + 1), &tries).is_none());
        assert!(suspects.sift(suspect(3, SUSPECT_AFTER + 5), &tries).is_none());
        assert_eq!(steps(&mut suspects, &tries, None), ["t2 begins"]);
        assert!(suspects.recorded(&key(3), Instant::now()).is_none());
        let tried = suspects.recorded(&key(2), Instant::now()).unwrap();
        assert_eq!(tried.deliveries, SUSPECT_AFTER);
        assert!(steps(&mut suspects, &tries, Some(Phase::Preparing)).is_empty());
        // It has an outcome, and is forgotten.
        assert_eq!(steps(&mut suspects, &tries, None), ["t3 begins"]);
    }

    #[test]
    fn a_suspect_that_waits_for_a_slot_has_survived_and_is_recorded_again_when_it_begins() {
        let (mut suspects, mut tries) = (Suspects::new(SUSPECT_AFTER), Tries::default());
        suspects.sift(suspect(1, 30), &tries);
        suspects.sift(suspect(2, 30), &tries);
        steps(&mut suspects, &tries, None);
        suspects.recorded(&key(1), Instant::now());
        begun(&mut tries, 1);
        assert!(suspects.sift(suspect(1, 1), &tries).is_none(), "however it comes");
        suspects.waiting.pop_back();
        let waiting = Some(Phase::Waiting);
        assert_eq!(steps(&mut suspects, &tries, waiting), ["t1 is over", "t2 begins"]);
        tries.read(Some(Try { key: key(1), begins: false }), None, &[]);
        assert_eq!(tries.of(&key(1)), 0);
        assert_eq!(suspects.asked(&key(1)), Some(Try { key: key(1), begins: true }));
        assert_eq!(suspects.asked(&key(1)), None, "once");
        assert_eq!(suspects.asked(&key(9)), None);
    }

    #[test]
    fn a_suspect_that_crashed_workers_is_given_up_and_its_neighbours_are_not() {
        let (mut suspects, mut tries) = (Suspects::new(SUSPECT_AFTER), Tries::default());
        (0..TRIES_MAX).for_each(|_| begun(&mut tries, 1));
        (1..TRIES_MAX).for_each(|_| begun(&mut tries, 2));
        suspects.sift(suspect(1, 30), &tries);
        suspects.sift(suspect(2, 30), &tries);
        let given_up = format!("t1 came {} times", u32::MAX);
        assert_eq!(steps(&mut suspects, &tries, None), [given_up.as_str(), "t2 begins"]);
    }

    #[test]
    fn a_request_that_is_delivered_without_end_is_given_up_whatever_was_recorded() {
        let (mut suspects, tries) = (Suspects::new(SUSPECT_AFTER), Tries::default());
        assert!(suspects.sift(suspect(1, DELIVERIES_MAX), &tries).is_none());
        assert_eq!(
            suspects.sift(suspect(1, DELIVERIES_MAX + 1), &tries).unwrap().deliveries,
            u32::MAX
        );
    }

    #[test]
    fn a_slow_suspect_makes_room_for_the_next() {
        let (mut suspects, tries) = (Suspects::new(SUSPECT_AFTER), Tries::default());
        suspects.sift(suspect(1, 30), &tries);
        suspects.sift(suspect(2, 30), &tries);
        steps(&mut suspects, &tries, None);
        let now = Instant::now();
        suspects.recorded(&key(1), now);
        assert_eq!(suspects.wake_at(), Some(now + ALONE_MAX));
        let preparing = |_: &TransactionKey| Some(Phase::Preparing);
        assert!(suspects.next(&tries, now, preparing).is_none());
        assert!(suspects.next(&tries, now + ALONE_MAX, preparing).is_some());
    }

    #[test]
    fn untried_suspects_go_back_to_the_queue_when_the_worker_stops() {
        let (mut suspects, tries) = (Suspects::new(SUSPECT_AFTER), Tries::default());
        suspects.sift(suspect(1, 30), &tries);
        suspects.sift(suspect(2, 30), &tries);
        steps(&mut suspects, &tries, None);
        let back: Vec<_> = suspects.give_back().collect();
        assert_eq!(back, [Delivery(1), Delivery(2)]);
        assert!(suspects.recorded(&key(1), Instant::now()).is_none());
    }

    #[test]
    fn tries_of_decided_transactions_are_forgotten_and_the_oldest_of_too_many() {
        let mut tries = Tries::default();
        begun(&mut tries, 1);
        let decision = Decision {
            key: key(1),
            request_hash: RequestHash([0; 16]),
            outcome: Outcome::Aborted,
            branches: Vec::new(),
            reason: None,
            decided_at: Time::EPOCH,
            worker: WorkerId::parse("w1").unwrap(),
        };
        tries.read(None, None, &[Arc::new(decision)]);
        assert_eq!(tries.of(&key(1)), 0);
        let twice = || Some(Try { key: key(2), begins: true });
        tries.read(twice(), Some(&"m1".into()), &[]);
        tries.read(twice(), Some(&"m1".into()), &[]);
        assert_eq!(tries.of(&key(2)), 1, "one message that came twice");
        (0..=REMEMBERED_MAX).for_each(|number| begun(&mut tries, number));
        assert_eq!((tries.of.len(), tries.of(&key(0))), (REMEMBERED_MAX, 0));
    }

    #[test]
    fn a_recorded_try_is_read_back_and_other_headers_are_no_try() {
        for begins in [true, false] {
            let it = Try { key: key(7), begins };
            assert_eq!(Try::of(&it.headers()), Some(it));
        }
        let mut headers = Try { key: key(7), begins: true }.headers();
        headers.insert("try".into(), lapin::types::AMQPValue::LongString("later".into()));
        assert_eq!(Try::of(&headers), None);
        assert_eq!(Try::of(&lapin::types::FieldTable::default()), None);
    }
}
