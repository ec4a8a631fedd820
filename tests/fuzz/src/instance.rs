//! An instance's state machine, given any events in any order.
//!
//! The store reports what is in it, the service's code ends the calls, and a transaction has one
//! outcome. Everything else that the instance is given may be true or not. Its effects must still
//! keep the rules that don't depend on others keeping theirs.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use arbitrary::{Result, Unstructured};
use dtc::protocol::{
    ids::{Branch, InstanceId, RequestHash, ServiceName, TransactionId, TransactionKey, WorkerId},
    message::{Delivery, Finish, Outcome, Payload, Prepare, Query, VoteKind},
    participant::{Effect, Event, InDoubt, Instance, Settings, Verdict},
    time::Time,
};

use crate::trace::trace;

const BEGINNING: Time = Time::from_millis(1_700_000_000_000);

/// How often a deadline may be due at the same moment before time must pass.
const WAKES_MAX: usize = 100;

/// Settings, and one event after another.
pub fn instance(input: &[u8]) {
    let mut source = Unstructured::new(input);
    let Ok(mut world) = World::new(&mut source) else { return };
    while !source.is_empty() && world.step(&mut source).is_ok() {}
}

struct World {
    now: Time,
    instance: Instance,
    max_concurrency: u32,
    has_store: bool,
    /// What is prepared, by this instance and by others.
    store: BTreeSet<InDoubt>,
    /// Every branch that was ever prepared, or may have been.
    ever_stored: BTreeSet<Branch>,
    /// The running calls of the service's code.
    running: BTreeMap<TransactionKey, Effect>,
    /// Reads of the store without an answer: of one transaction, or of all.
    looks: Vec<Option<TransactionKey>>,
    /// Branches to be committed that the store is asked about.
    lookups: Vec<(TransactionKey, Branch)>,
    outcomes: BTreeMap<TransactionKey, (Outcome, Option<Branch>)>,
    /// The workers from which the instance got the outcome.
    finished_by: BTreeSet<(TransactionKey, WorkerId)>,
    /// Deliveries that are not acknowledged.
    deliveries: BTreeSet<Delivery>,
    last_delivery: u64,
    calls: BTreeSet<Branch>,
}

impl World {
    fn new(source: &mut Unstructured<'_>) -> Result<Self> {
        let max_concurrency = source.int_in_range(1..=3)?;
        let has_store = source.arbitrary()?;
        let settings = Settings {
            has_store,
            remembers_commits: has_store,
            remembered_max: source.int_in_range(0..=4)?,
            visitors_max: source.int_in_range(0..=3)?,
            seed: source.arbitrary()?,
            ..Settings::new(ServiceName::parse("a").expect("a name"), own(), max_concurrency)
        };
        Ok(Self {
            now: BEGINNING,
            instance: Instance::new(BEGINNING, settings),
            max_concurrency,
            has_store,
            store: BTreeSet::new(),
            ever_stored: BTreeSet::new(),
            running: BTreeMap::new(),
            looks: Vec::new(),
            lookups: Vec::new(),
            outcomes: BTreeMap::new(),
            finished_by: BTreeSet::new(),
            deliveries: BTreeSet::new(),
            last_delivery: 0,
            calls: BTreeSet::new(),
        })
    }

    fn step(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        match source.int_in_range(0..=15)? {
            0..=2 => self.prepare(source),
            3 => {
                let (worker, key) = (worker(source)?, key(source)?);
                let query = Query { key, request_hash: hash(source)? };
                self.tell(Event::QueryReceived { worker, query });
                Ok(())
            }
            4 => {
                let key = key(source)?;
                self.tell(Event::CancelReceived(key));
                Ok(())
            }
            5..=7 => self.finish(source),
            8 | 9 => self.end_call(source),
            10 | 11 => self.answer_look(source),
            12 => self.end_at_random(source),
            13 => self.let_time_pass(source),
            14 => self.others_prepare_or_finish(source),
            _ => {
                if source.ratio(1, 4)? {
                    self.deliveries.clear();
                    self.tell(Event::Disconnected);
                }
                Ok(())
            }
        }
    }

    // ---- What happens --------------------------------------------------------------------------

    fn deliver(&mut self) -> Delivery {
        self.last_delivery += 1;
        self.deliveries.insert(Delivery(self.last_delivery));
        Delivery(self.last_delivery)
    }

    fn prepare(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        let prepare = Prepare {
            key: key(source)?,
            request_hash: hash(source)?,
            data: Payload::new("{}"),
            deadline: BEGINNING + Duration::from_secs(source.int_in_range(0..=120)?),
            repeated: source.arbitrary()?,
        };
        let (worker, redelivered) = (worker(source)?, source.arbitrary()?);
        let delivery = self.deliver();
        self.tell(Event::PrepareReceived { worker, delivery, redelivered, prepare });
        Ok(())
    }

    fn finish(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        let (key, worker) = (key(source)?, worker(source)?);
        let known = self.branches_of(&key);
        if !self.outcomes.contains_key(&key) {
            let outcome = if source.arbitrary()? { Outcome::Committed } else { Outcome::Aborted };
            let branch = match source.int_in_range(0..=4)? {
                0 => None,
                1 => Some(Branch::of(&other(source)?, source.int_in_range(1..=2)?)),
                _ if known.is_empty() => None,
                _ => Some(source.choose(&known)?.clone()),
            };
            self.outcomes.insert(key.clone(), (outcome, branch));
        }
        let (outcome, branch) = self.outcomes[&key].clone();
        // An abort may name any branch that the worker knows.
        let branch = match outcome {
            Outcome::Aborted if source.arbitrary()? => None,
            Outcome::Aborted | Outcome::Committed => branch,
        };
        let delivery = if source.ratio(1, 4)? { Some(self.deliver()) } else { None };
        let parked = source.arbitrary()?;
        self.finished_by.insert((key.clone(), worker.clone()));
        let finish = Finish { key, outcome, branch, parked };
        self.tell(Event::FinishReceived { worker, finish, delivery });
        Ok(())
    }

    fn branches_of(&self, key: &TransactionKey) -> Vec<Branch> {
        let of_key = self.store.iter().filter(|held| held.key == *key);
        of_key.map(|held| held.branch.clone()).collect()
    }

    /// A running call of the service's code ends.
    fn end_call(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        let keys: Vec<_> = self.running.keys().cloned().collect();
        if keys.is_empty() {
            return Ok(());
        }
        let key = source.choose(&keys)?.clone();
        let succeeds = source.ratio(3, 4)?;
        match self.running.remove(&key) {
            Some(Effect::CallPrepare { key, branch, request_hash, deadline, .. }) => {
                let verdict = match source.int_in_range(0..=5)? {
                    0..=2 => Verdict::Prepared,
                    3 => Verdict::ReadOnly,
                    4 => Verdict::Refused(None),
                    _ => Verdict::Failed("no".into()),
                };
                let is_stored = match verdict {
                    Verdict::Prepared => true,
                    Verdict::Failed(_) => source.arbitrary()?,
                    _ => false,
                };
                if is_stored {
                    let (key, branch) = (key.clone(), branch.clone());
                    self.put(InDoubt { key, request_hash, branch, deadline });
                }
                if let Verdict::Failed(_) = verdict {
                    self.ever_stored.insert(branch.clone());
                }
                self.tell(Event::PrepareEnded { key, branch, verdict });
            }
            Some(Effect::CallCommit { key, branch } | Effect::CallAbort { key, branch }) => {
                let applied = if succeeds { Ok(()) } else { Err("no".into()) };
                if succeeds {
                    self.store.retain(|held| held.key != key || held.branch != branch);
                }
                self.tell(Event::FinishEnded { key, branch, applied });
            }
            _ => {}
        }
        Ok(())
    }

    fn put(&mut self, held: InDoubt) {
        self.ever_stored.insert(held.branch.clone());
        self.store.insert(held);
    }

    fn answer_look(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        if let Some((key, branch)) = self.lookups.pop() {
            let is_known = self.ever_stored.contains(&branch);
            self.tell(Event::CommitLookedUp { key, branch, is_known });
            return Ok(());
        }
        if self.looks.is_empty() {
            return Ok(());
        }
        let look = self.looks.remove(source.choose_index(self.looks.len())?);
        self.tell(match look {
            None => Event::StoreScanned(self.store.iter().cloned().collect()),
            Some(key) => {
                let held = self.store.iter().filter(|held| held.key == key).cloned().collect();
                Event::StoreRead { key, held }
            }
        });
        Ok(())
    }

    /// A call ends that nobody waits for any more.
    fn end_at_random(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        let key = key(source)?;
        let branch = Branch::of(&own(), source.int_in_range(0..=9)?);
        if self.running.contains_key(&key) {
            return Ok(());
        }
        let event = match source.int_in_range(0..=3)? {
            0 => Event::PrepareEnded { key, branch, verdict: Verdict::ReadOnly },
            1 => Event::FinishEnded { key, branch, applied: Ok(()) },
            2 if self.has_store => Event::StoreScanned(self.store.iter().cloned().collect()),
            _ => Event::DeadlineReached,
        };
        self.tell(event);
        Ok(())
    }

    fn let_time_pass(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        let next = self.instance.next_deadline().filter(|at| *at > self.now);
        self.now = match next {
            Some(next) if source.ratio(3, 4)? => next,
            Some(_) | None => self.now + Duration::from_millis(source.int_in_range(0..=90_000)?),
        };
        let mut n_wakes = 0;
        while self.instance.next_deadline().is_some_and(|at| at <= self.now) {
            n_wakes += 1;
            assert!(n_wakes < WAKES_MAX, "a deadline at {:?} is due for ever", self.now);
            self.tell(Event::DeadlineReached);
        }
        Ok(())
    }

    /// Another instance prepares something, unless that has ended; or finishes something.
    fn others_prepare_or_finish(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        let key = key(source)?;
        if let Some((_, committed)) = self.outcomes.get(&key) {
            if source.arbitrary()? {
                let committed = committed.clone();
                self.store
                    .retain(|held| held.key != key || Some(&held.branch) == committed.as_ref());
            }
        } else if self.has_store {
            let branch = Branch::of(&other(source)?, source.int_in_range(1..=2)?);
            let request_hash = hash(source)?;
            self.put(InDoubt { key, request_hash, branch, deadline: BEGINNING });
        }
        Ok(())
    }

    // ---- What must hold ------------------------------------------------------------------------

    fn tell(&mut self, event: Event) {
        trace(|| format!("{:?} {event:?}", self.now));
        let mut effects = Vec::new();
        self.instance.handle(self.now, event, &mut effects);
        for effect in effects {
            trace(|| format!("    {effect:?}"));
            self.check(effect);
        }
        assert!(self.instance.slots_used() <= self.max_concurrency);
    }

    fn check(&mut self, effect: Effect) {
        match &effect {
            Effect::CallPrepare { key, branch, .. } => {
                assert!(self.calls.insert(branch.clone()), "{branch} was prepared before");
                self.starts(&key.clone(), effect);
            }
            Effect::CallCommit { key, branch } => {
                let outcome = self.outcomes.get(key);
                assert_eq!(outcome, Some(&(Outcome::Committed, Some(branch.clone()))));
                self.starts(&key.clone(), effect);
            }
            Effect::CallAbort { key, branch } => {
                let outcome = self.outcomes.get(key);
                let committed = (Outcome::Committed, Some(branch.clone()));
                assert!(outcome.is_some() && outcome != Some(&committed), "{key} {branch}");
                assert!(self.ever_stored.contains(branch), "{branch} was never prepared");
                self.starts(&key.clone(), effect);
            }
            Effect::ReadStore(key) => {
                assert!(self.has_store);
                self.looks.push(Some(key.clone()));
            }
            Effect::LookUpCommit { key, branch } => {
                let committed = (Outcome::Committed, Some(branch.clone()));
                assert_eq!(self.outcomes.get(key), Some(&committed));
                assert!(self.has_store);
                self.lookups.push((key.clone(), branch.clone()));
            }
            Effect::ScanStore => {
                assert!(self.has_store);
                self.looks.push(None);
            }
            Effect::Vote { vote, .. } => match &vote.kind {
                VoteKind::Prepared { branch } | VoteKind::Failed { branch, .. } => {
                    assert!(self.ever_stored.contains(branch), "{branch} was never prepared");
                }
                VoteKind::Finished(outcome) => {
                    let heard = self.outcomes.get(&vote.key).map(|(outcome, _)| *outcome);
                    assert_eq!(heard, Some(*outcome));
                }
                VoteKind::ReadOnly | VoteKind::Refused(_) => {}
            },
            Effect::Done { to, done, ack } => {
                if let Some(delivery) = ack {
                    assert!(self.deliveries.remove(delivery), "{delivery:?} is acknowledged");
                }
                let heard_from = (done.key.clone(), to.clone());
                assert!(self.finished_by.contains(&heard_from), "{to} never told of {}", done.key);
                if done.applied.is_ok() {
                    self.is_applied(&done.key);
                }
            }
            Effect::Inquire(inquiry) => {
                assert!(self.ever_stored.contains(&inquiry.branch), "{}", inquiry.branch);
            }
            Effect::Ack(delivery) => {
                assert!(self.deliveries.remove(delivery), "{delivery:?} is acknowledged");
            }
        }
    }

    /// At most one call of the service's code is in progress per transaction.
    fn starts(&mut self, key: &TransactionKey, call: Effect) {
        let running = self.running.insert(key.clone(), call);
        assert!(running.is_none(), "{running:?}");
    }

    /// A committed branch is in no store as in doubt.
    fn is_applied(&self, key: &TransactionKey) {
        if let Some((Outcome::Committed, Some(branch))) = self.outcomes.get(key) {
            assert!(!self.branches_of(key).contains(branch), "{branch} of {key} is in doubt");
        }
    }
}

// ---- A small world -----------------------------------------------------------------------------

fn own() -> InstanceId {
    InstanceId::parse("i1").expect("a name")
}

fn other(source: &mut Unstructured<'_>) -> Result<InstanceId> {
    let name = *source.choose(&["i2", "i3"])?;
    Ok(InstanceId::parse(name).expect("a name"))
}

fn worker(source: &mut Unstructured<'_>) -> Result<WorkerId> {
    let name = *source.choose(&["w1", "w2"])?;
    Ok(WorkerId::parse(name).expect("a name"))
}

fn hash(source: &mut Unstructured<'_>) -> Result<RequestHash> {
    Ok(RequestHash([u8::from(source.ratio(1, 4)?); 16]))
}

fn key(source: &mut Unstructured<'_>) -> Result<TransactionKey> {
    let id = *source.choose(&["t1", "t2", "t3", "t4"])?;
    let second = *source.choose(&[0_u64, 0, 0, 1])?;
    Ok(TransactionKey {
        id: TransactionId::parse(id).expect("a name"),
        requested_at: BEGINNING + Duration::from_secs(second),
    })
}
