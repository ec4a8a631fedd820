//! A worker's state machine, given any events in any order.
//!
//! Only the journal behaves as in reality: records have one order, and are read from it. Everything
//! else that the coordinator is given may be true or not. Its effects must still keep the rules
//! that don't depend on others keeping theirs.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use arbitrary::{Result, Unstructured};
use dtc::protocol::{
    coordinator::{Anomaly, Coordinator, Effect, Event, Settings, Slots},
    ids::{
        Branch, InstanceId, RequestHash, ServiceName, StoreId, TransactionId, TransactionKey,
        WorkerId,
    },
    message::{
        AnswerAt, Command, Decision, Delivery, Done, Finish, Inquiry, Outcome, Payload, Prepare,
        Reason, ReasonCode, Request, Vote, VoteKind,
    },
    time::Time,
};

use crate::trace::trace;

const MARGIN: Duration = Duration::from_secs(60);
const BEGINNING: Time = Time::from_millis(1_700_000_000_000);

/// How often a deadline may be due at the same moment before time must pass.
const WAKES_MAX: usize = 100;

/// Settings, and one event after another.
pub fn coordinator(input: &[u8]) {
    let mut source = Unstructured::new(input);
    let Ok(mut world) = World::new(&mut source) else { return };
    while !source.is_empty() && world.step(&mut source).is_ok() {}
}

type Voter = (TransactionKey, RequestHash, ServiceName);

struct World {
    now: Time,
    coordinator: Coordinator,
    journal: Vec<Vec<Arc<Decision>>>,
    /// The transactions of which the coordinator has read a record.
    read: BTreeSet<TransactionKey>,
    /// What it waits for.
    asked: Vec<Effect>,
    looking: VecDeque<Event>,
    /// Requests that are not settled, and whether a result of each is safe.
    deliveries: BTreeMap<Delivery, bool>,
    /// Requests that want their results when they are decided.
    hasty: BTreeSet<Delivery>,
    /// Those of them whose results went out.
    early: BTreeMap<Delivery, Arc<Decision>>,
    /// Whether the delivery that is acknowledged next has an unclaimed result.
    is_unclaimed: bool,
    requests: BTreeMap<(TransactionKey, RequestHash), Request>,
    last_delivery: u64,
    prepared: BTreeMap<Voter, BTreeSet<Branch>>,
    read_only: BTreeSet<Voter>,
    heard: BTreeSet<(TransactionKey, Outcome)>,
    done: BTreeSet<(TransactionKey, ServiceName)>,
    parked: BTreeSet<(TransactionKey, ServiceName)>,
}

impl World {
    fn new(source: &mut Unstructured<'_>) -> Result<Self> {
        let worker = WorkerId::parse("w1").expect("a name");
        let mut own_services = BTreeMap::new();
        if source.arbitrary()? {
            let max_wait = Duration::from_millis(source.int_in_range(0..=2000)?);
            let slots = Slots { max_concurrency: source.int_in_range(1..=3)?, max_wait };
            own_services.insert(service(0), slots);
        }
        let settings = Settings {
            clock_margin: MARGIN,
            window: Duration::from_secs(source.int_in_range(1..=300)?),
            records_max: source.int_in_range(0..=6)?,
            digests_max: source.int_in_range(0..=4)?,
            in_flight_max: source.int_in_range(1..=4)?,
            waiting_max: source.int_in_range(0..=4)?,
            inquiries_max: source.int_in_range(0..=3)?,
            services_max: source.int_in_range(0..=3)?,
            commit_retries: source.int_in_range(0..=2)?,
            deliveries_max: source.int_in_range(1..=3)?,
            own_services,
            seed: source.arbitrary()?,
            ..Settings::new(worker)
        };
        let mut world = Self {
            now: BEGINNING,
            coordinator: Coordinator::new(settings),
            journal: Vec::new(),
            read: BTreeSet::new(),
            asked: Vec::new(),
            looking: VecDeque::new(),
            deliveries: BTreeMap::new(),
            hasty: BTreeSet::new(),
            early: BTreeMap::new(),
            is_unclaimed: false,
            requests: BTreeMap::new(),
            last_delivery: 0,
            prepared: BTreeMap::new(),
            read_only: BTreeSet::new(),
            heard: BTreeSet::new(),
            done: BTreeSet::new(),
            parked: BTreeSet::new(),
        };
        for _ in 0..source.int_in_range(0..=3)? {
            world.others_decide(source)?;
        }
        world.attach(source)?;
        Ok(world)
    }

    fn step(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        match source.int_in_range(0..=19)? {
            0..=2 => self.request(source),
            3..=6 => self.answer(source),
            7 | 8 => self.read_on(source),
            9 => self.others_decide(source),
            10 | 11 => self.vote(source),
            12 => self.done(source),
            13 => self.inquire(source),
            14 | 15 => self.let_time_pass(source),
            16 => {
                let (key, service) = (key(source)?, any_service(source)?);
                self.tell(match source.int_in_range(0..=2)? {
                    0 => Event::PrepareReturned { key, service },
                    1 => Event::PrepareUnroutable { key, service },
                    _ => Event::PrepareRefused { key, service },
                });
                Ok(())
            }
            17 => {
                let service = any_service(source)?;
                self.tell(match source.int_in_range(0..=4)? {
                    0 => Event::ServiceFound(service),
                    1 => Event::ServiceMissing(service),
                    2 => Event::ServiceUnavailable(service),
                    3 => Event::WorkersCounted(source.arbitrary()?),
                    _ => Event::ServiceUnserved(service),
                });
                Ok(())
            }
            18 => self.confirm_at_random(source),
            _ => self.disturb(source),
        }
    }

    // ---- What happens --------------------------------------------------------------------------

    fn request(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        let key = key(source)?;
        let n_services = source.int_in_range(1..=3)?;
        let first = source.int_in_range(0..=1)?;
        let services: Vec<_> = (first..first + n_services).map(service).collect();
        let request_hash = RequestHash([source.int_in_range(0..=1)? + n_services as u8; 16]);
        let timeout = if source.arbitrary()? {
            Some(Duration::from_millis(source.int_in_range(1..=20_000)?))
        } else {
            None
        };
        let answer_at = if source.arbitrary()? { AnswerAt::Decided } else { AnswerAt::Applied };
        let request = Request {
            key,
            request_hash,
            services: services.into(),
            data: Payload::new("{}"),
            timeout,
            answer_at,
            reply: None,
        };
        self.last_delivery += 1;
        let delivery = Delivery(self.last_delivery);
        self.deliveries.insert(delivery, false);
        // The same content always names the same services.
        let known = (request.key.clone(), request_hash);
        let request = self.requests.entry(known).or_insert(request).clone();
        if request.answer_at == AnswerAt::Decided {
            self.hasty.insert(delivery);
        }
        let deliveries = source.int_in_range(1..=4)?;
        self.tell(Event::RequestReceived { request, delivery, deliveries });
        Ok(())
    }

    /// Something that the coordinator waits for happens, or fails.
    fn answer(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        if self.asked.is_empty() {
            return Ok(());
        }
        let asked = self.asked.remove(source.choose_index(self.asked.len())?);
        let succeeds = source.ratio(7, 8)?;
        match asked {
            Effect::FindService { service, .. } => self.tell(match succeeds {
                true => Event::ServiceFound(service),
                false => Event::ServiceMissing(service),
            }),
            Effect::Append(decision) if succeeds => {
                self.journal.push(vec![Arc::new(decision)]);
                if source.arbitrary()? {
                    self.read_next();
                }
            }
            Effect::ReadHistory { from, until } => self.look(source, from, until)?,
            Effect::Publish { key, delivery, .. } if succeeds => {
                self.is_safe(delivery);
                self.tell(Event::ResultConfirmed { key, delivery });
            }
            Effect::Publish { key, delivery, .. } => {
                self.tell(Event::ResultFailed { key, delivery });
            }
            Effect::Park(parked) if succeeds => {
                let service = match parked.cause {
                    dtc::protocol::message::ParkedCause::Uncommitted { service, .. } => {
                        Some(service)
                    }
                    dtc::protocol::message::ParkedCause::Undecidable(_) => None,
                };
                self.park_confirmed(parked.key, service);
            }
            Effect::SendPrepare { service, prepare, .. } => {
                self.answer_prepare(source, service, prepare)?;
            }
            Effect::Send { service, to: _, command } => self.obey(source, service, command)?,
            Effect::Append(_)
            | Effect::Park(_)
            | Effect::Ack(_)
            | Effect::Release(_)
            | Effect::Reject { .. }
            | Effect::Settle { .. }
            | Effect::CheckService(_)
            | Effect::Report(_) => {}
        }
        Ok(())
    }

    fn answer_prepare(
        &mut self,
        source: &mut Unstructured<'_>,
        service: ServiceName,
        prepare: Prepare,
    ) -> Result<()> {
        let instance = instance(source)?;
        let free = source.int_in_range(0..=3)?;
        let kind = vote_kind(source, &instance)?;
        let (key, request_hash) = (prepare.key, prepare.request_hash);
        let store = store(source)?;
        self.cast(Vote { key, request_hash, service, instance, store, kind, free });
        Ok(())
    }

    /// Mostly as a correct service would.
    fn obey(
        &mut self,
        source: &mut Unstructured<'_>,
        service: ServiceName,
        command: Command,
    ) -> Result<()> {
        let instance = instance(source)?;
        let free = source.int_in_range(0..=3)?;
        match command {
            Command::Query(query) => {
                let kind = vote_kind(source, &instance)?;
                let (key, request_hash) = (query.key, query.request_hash);
                let store = store(source)?;
                self.cast(Vote { key, request_hash, service, instance, store, kind, free });
            }
            Command::Finish(Finish { key, parked, .. }) => {
                let applied = if source.ratio(3, 4)? { Ok(()) } else { Err("no".into()) };
                let store = store(source)?;
                self.report(Done { key, service, instance, store, applied, parked, free });
            }
            Command::Cancel(_) => {}
        }
        Ok(())
    }

    fn vote(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        let instance = instance(source)?;
        let kind = vote_kind(source, &instance)?;
        let request_hash = RequestHash([source.int_in_range(1..=4)?; 16]);
        let (key, service) = (key(source)?, any_service(source)?);
        let free = if source.ratio(1, 8)? { u32::MAX } else { source.int_in_range(0..=3)? };
        let store = store(source)?;
        self.cast(Vote { key, request_hash, service, instance, store, kind, free });
        Ok(())
    }

    fn cast(&mut self, vote: Vote) {
        let voter = (vote.key.clone(), vote.request_hash, vote.service.clone());
        match &vote.kind {
            VoteKind::Prepared { branch } => {
                self.prepared.entry(voter).or_default().insert(branch.clone());
            }
            // A branch that failed may be named where another instance prepared it.
            VoteKind::Failed { .. } | VoteKind::Refused(_) => {}
            VoteKind::ReadOnly => drop(self.read_only.insert(voter)),
            VoteKind::Finished(outcome) => drop(self.heard.insert((vote.key.clone(), *outcome))),
        }
        self.tell(Event::VoteReceived(vote));
    }

    fn done(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        let applied = if source.arbitrary()? { Ok(()) } else { Err("no".into()) };
        let done = Done {
            key: key(source)?,
            service: any_service(source)?,
            instance: instance(source)?,
            store: store(source)?,
            applied,
            parked: source.arbitrary()?,
            free: source.arbitrary()?,
        };
        self.report(done);
        Ok(())
    }

    fn report(&mut self, done: Done) {
        if done.applied.is_ok() {
            self.done.insert((done.key.clone(), done.service.clone()));
        }
        self.tell(Event::DoneReceived { done, delivery: None });
    }

    fn inquire(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        let instance = instance(source)?;
        let inquiry = Inquiry {
            key: key(source)?,
            request_hash: RequestHash([source.int_in_range(1..=4)?; 16]),
            service: any_service(source)?,
            branch: Branch::of(&instance, source.int_in_range(0..=2)?),
            instance,
            deadline: BEGINNING + Duration::from_secs(source.int_in_range(0..=120)?),
        };
        self.tell(Event::InquiryReceived(inquiry));
        Ok(())
    }

    fn confirm_at_random(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        let key = key(source)?;
        let delivery = Delivery(source.int_in_range(0..=self.last_delivery)?);
        match source.int_in_range(0..=3)? {
            0 => {
                self.is_safe(delivery);
                self.tell(Event::ResultConfirmed { key, delivery });
            }
            1 => self.tell(Event::ResultFailed { key, delivery }),
            2 => self.park_confirmed(key, None),
            _ => {
                let service = any_service(source)?;
                self.park_confirmed(key, Some(service));
            }
        }
        Ok(())
    }

    fn is_safe(&mut self, delivery: Delivery) {
        if let Some(is_safe) = self.deliveries.get_mut(&delivery) {
            *is_safe = true;
        }
    }

    fn park_confirmed(&mut self, key: TransactionKey, service: Option<ServiceName>) {
        match &service {
            Some(service) => drop(self.parked.insert((key.clone(), service.clone()))),
            // That answers every request for it.
            None => self.deliveries.values_mut().for_each(|is_safe| *is_safe = true),
        }
        self.tell(Event::ParkConfirmed { key, service });
    }

    fn let_time_pass(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        let next = self.coordinator.next_deadline().filter(|at| *at > self.now);
        self.now = match next {
            Some(next) if source.ratio(3, 4)? => next,
            Some(_) | None => self.now + Duration::from_millis(source.int_in_range(0..=90_000)?),
        };
        let mut n_wakes = 0;
        while self.coordinator.next_deadline().is_some_and(|at| at <= self.now) {
            n_wakes += 1;
            assert!(n_wakes < WAKES_MAX, "a deadline at {:?} is due for ever", self.now);
            self.tell(Event::DeadlineReached);
        }
        Ok(())
    }

    fn disturb(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        match source.int_in_range(0..=15)? {
            0 => self.tell(Event::DrainRequested),
            1 | 2 => {
                self.tell(Event::Disconnected);
                assert!(self.coordinator.is_empty());
                self.asked.clear();
                self.looking.clear();
                self.deliveries.clear();
                self.hasty.clear();
                self.early.clear();
                if source.arbitrary()? {
                    self.attach(source)?;
                }
            }
            3 => self.tell(Event::DeadlineReached),
            _ => {}
        }
        Ok(())
    }

    // ---- The journal -----------------------------------------------------------------------------

    /// Some worker's record, about anything that could have been requested by now.
    fn others_decide(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        let mut decisions = Vec::new();
        for _ in 0..source.int_in_range(0..=2)? {
            let key = key(source)?;
            if key.requested_at > self.now + MARGIN {
                continue;
            }
            let outcome = outcome(source)?;
            let mut branches = Vec::new();
            if outcome == Outcome::Committed {
                for index in 0..source.int_in_range(0..=3)? {
                    let branch = Branch::of(&instance(source)?, source.int_in_range(0..=2)?);
                    branches.push((service(index), branch));
                }
            }
            let skew = Duration::from_secs(source.int_in_range(0..=60)?);
            decisions.push(Arc::new(Decision {
                request_hash: RequestHash([source.int_in_range(1..=4)?; 16]),
                outcome,
                branches,
                reason: None,
                decided_at: (self.now - skew).max(key.requested_at - MARGIN),
                worker: WorkerId::parse("w2").expect("a name"),
                key,
            }));
        }
        self.journal.push(decisions);
        Ok(())
    }

    /// Begins to read somewhere, with a true statement from when on nothing is missing.
    fn attach(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        let next = source.int_in_range(0..=self.journal.len())?;
        let since = self.complete_since(next);
        self.tell(Event::JournalAttached { next: next as u64, since });
        Ok(())
    }

    /// From when on every record has this offset or a higher one.
    fn complete_since(&self, offset: usize) -> Time {
        let before = self.journal[..offset].iter().flatten();
        let last = before.map(|decision| decision.decided_at).max();
        last.map_or(Time::EPOCH, |last| last + Duration::from_millis(1))
    }

    fn read_on(&mut self, source: &mut Unstructured<'_>) -> Result<()> {
        if source.ratio(1, 16)? && !self.journal.is_empty() {
            // Once more, or with a gap before it.
            let offset = source.choose_index(self.journal.len())?;
            self.read_at(offset as u64);
        } else if source.ratio(1, 4)? && !self.looking.is_empty() {
            self.look_on();
        } else {
            self.read_next();
        }
        Ok(())
    }

    fn read_next(&mut self) {
        let next = self.coordinator.next_offset();
        if next < self.journal.len() as u64 {
            self.read_at(next);
        }
    }

    fn read_at(&mut self, offset: u64) {
        let decisions = self.journal[offset as usize].clone();
        self.read.extend(decisions.iter().map(|decision| decision.key.clone()));
        self.tell(Event::RecordsRead { offset, decisions });
    }

    /// A look further back, with a true statement of how far it reached.
    fn look(&mut self, source: &mut Unstructured<'_>, from: Time, until: u64) -> Result<()> {
        let until = (until as usize).min(self.journal.len());
        let wanted = (0..=until).rev().find(|start| self.complete_since(*start) <= from);
        let start = match wanted {
            Some(start) if source.ratio(3, 4)? => start,
            Some(_) | None => source.int_in_range(0..=until)?,
        };
        let reaches = if source.ratio(7, 8)? { Some(self.complete_since(start)) } else { None };
        let found = self.journal[start..until].iter().flatten();
        self.looking = found.map(|decision| Event::HistoryRead(Arc::clone(decision))).collect();
        self.looking.push_back(Event::HistoryEnded { reaches });
        if source.ratio(3, 4)? {
            while !self.looking.is_empty() {
                self.look_on();
            }
        }
        Ok(())
    }

    fn look_on(&mut self) {
        let Some(event) = self.looking.pop_front() else { return };
        if let Event::HistoryRead(decision) = &event {
            self.read.insert(decision.key.clone());
        }
        self.tell(event);
    }

    fn first(&self, key: &TransactionKey) -> Option<&Arc<Decision>> {
        self.journal.iter().flatten().find(|decision| decision.key == *key)
    }

    // ---- What must hold ----------------------------------------------------------------------

    fn tell(&mut self, event: Event) {
        trace(|| format!("{:?} {event:?}", self.now));
        let mut effects = Vec::new();
        self.coordinator.handle(self.now, event, &mut effects);
        for effect in effects {
            trace(|| format!("    {effect:?}"));
            self.check(&effect);
            self.asked.push(effect);
        }
        assert!(self.coordinator.waiting() <= self.coordinator.len());
        assert!(self.coordinator.len() <= self.last_delivery as usize);
        let _ = (self.coordinator.room(), self.coordinator.next_deadline());
    }

    fn check(&mut self, effect: &Effect) {
        match effect {
            Effect::Send { service, command: Command::Finish(finish), .. } => {
                let first = self.outcome_read(&finish.key);
                assert_eq!(finish.outcome, first.outcome);
                if first.outcome == Outcome::Committed {
                    assert_eq!(finish.branch.as_ref(), first.branch_of(service));
                }
            }
            Effect::Send { command: Command::Cancel(key), .. } => {
                self.outcome_read(key);
            }
            Effect::Publish { key, delivery, answer } => {
                assert!(self.deliveries.contains_key(delivery), "{delivery:?} is settled");
                let (id, requested_at) = (answer.id.clone(), answer.requested_at);
                let answered = TransactionKey { id, requested_at };
                assert_eq!(key.id, answered.id);
                let first = self.outcome_read(&answered);
                assert_eq!(answer.outcome, first.outcome);
                if *key == answered && first.outcome == Outcome::Committed {
                    self.is_answered_in_time(*delivery, &first, &answer.unresolved);
                }
            }
            Effect::Append(decision) => self.is_voted_for(decision),
            Effect::Ack(delivery) => {
                let is_safe = self.deliveries.remove(delivery);
                let is_unclaimed = std::mem::take(&mut self.is_unclaimed);
                assert!(is_safe == Some(true) || is_safe.is_some() && is_unclaimed, "{delivery:?}");
                // Whenever its result went out.
                if let Some(first) = self.early.remove(delivery) {
                    self.has_committed(&first, |_| true);
                }
            }
            Effect::Release(delivery) | Effect::Reject { delivery, .. } => {
                assert!(self.deliveries.remove(delivery).is_some(), "{delivery:?} is settled");
            }
            // Its request may be acknowledged now, though its result is not safe.
            Effect::Report(Anomaly::ResultUnclaimed { .. }) => self.is_unclaimed = true,
            Effect::FindService { .. }
            | Effect::SendPrepare { .. }
            | Effect::Send { .. }
            | Effect::ReadHistory { .. }
            | Effect::Park(_)
            | Effect::Settle { .. }
            | Effect::CheckService(_)
            | Effect::Report(_) => {}
        }
    }

    /// The first record in the journal, which must have been read.
    fn outcome_read(&self, key: &TransactionKey) -> Arc<Decision> {
        assert!(self.read.contains(key), "no record of {key} was read");
        Arc::clone(self.first(key).expect("it was read from the journal"))
    }

    /// A result of a commit comes when every service has committed, or is named as one that has not. It may
    /// come sooner if the request asks for that.
    fn is_answered_in_time(
        &mut self,
        delivery: Delivery,
        first: &Arc<Decision>,
        unresolved: &[ServiceName],
    ) {
        // It may be a retry, under another key, of a request that wants to wait.
        if self.hasty.contains(&delivery) {
            self.early.insert(delivery, Arc::clone(first));
        } else {
            self.has_committed(first, |service| unresolved.contains(service));
        }
    }

    /// Every service that has to commit has done so, or is known to have not.
    fn has_committed(&self, first: &Decision, is_known: impl Fn(&ServiceName) -> bool) {
        let Some(request) = self.requests.get(&(first.key.clone(), first.request_hash)) else {
            return;
        };
        for service in &*request.services {
            let of = (first.key.clone(), service.clone());
            let is_parked = is_known(service) && self.parked.contains(&of);
            let commits = first.branch_of(service).is_some();
            assert!(
                !commits || is_parked || self.done.contains(&of),
                "{service} has not committed"
            );
        }
    }

    /// A commit is proposed only if every service voted for it, and names the prepared branches.
    fn is_voted_for(&self, decision: &Decision) {
        let Decision { key, request_hash, outcome, branches, .. } = decision;
        if *outcome == Outcome::Aborted {
            return assert!(branches.is_empty());
        }
        let voter = |service: &ServiceName| (key.clone(), *request_hash, service.clone());
        for (service, branch) in branches {
            let prepared = self.prepared.get(&voter(service));
            assert!(prepared.is_some_and(|it| it.contains(branch)), "{service} never had {branch}");
        }
        if self.heard.contains(&(key.clone(), Outcome::Committed)) {
            return;
        }
        let request = &self.requests[&(key.clone(), *request_hash)];
        for service in &*request.services {
            let is_read_only = self.read_only.contains(&voter(service));
            assert!(
                decision.branch_of(service).is_some() || is_read_only,
                "{service} did not vote"
            );
        }
    }
}

// ---- A small world -----------------------------------------------------------------------------

fn service(index: usize) -> ServiceName {
    let names = ["a", "b", "c", "d"];
    ServiceName::parse(names[index % names.len()]).expect("a name")
}

fn any_service(source: &mut Unstructured<'_>) -> Result<ServiceName> {
    Ok(service(source.int_in_range(0..=3)?))
}

fn instance(source: &mut Unstructured<'_>) -> Result<InstanceId> {
    let name = *source.choose(&["i1", "i2", "i3"])?;
    Ok(InstanceId::parse(name).expect("a name"))
}

fn store(source: &mut Unstructured<'_>) -> Result<Option<StoreId>> {
    let name = *source.choose(&["", "s1", "s2"])?;
    Ok(StoreId::parse(name).ok())
}

fn key(source: &mut Unstructured<'_>) -> Result<TransactionKey> {
    let id = *source.choose(&["t1", "t2", "t3", "t4", "t5", "t6"])?;
    let second = *source.choose(&[0_u64, 0, 0, 0, 10, 60, 61, 200])?;
    Ok(TransactionKey {
        id: TransactionId::parse(id).expect("a name"),
        requested_at: BEGINNING + Duration::from_secs(second),
    })
}

fn outcome(source: &mut Unstructured<'_>) -> Result<Outcome> {
    Ok(if source.arbitrary()? { Outcome::Committed } else { Outcome::Aborted })
}

fn vote_kind(source: &mut Unstructured<'_>, instance: &InstanceId) -> Result<VoteKind> {
    let reason = |code| Reason::new(code, None, None);
    Ok(match source.int_in_range(0..=9)? {
        0..=5 => {
            let branch = Branch::of(instance, source.int_in_range(0..=2)?);
            VoteKind::Prepared { branch }
        }
        6 => VoteKind::ReadOnly,
        7 => VoteKind::Refused(reason(ReasonCode::Refused)),
        8 => {
            let branch = Branch::of(instance, source.int_in_range(0..=2)?);
            VoteKind::Failed { branch, reason: reason(ReasonCode::Failed) }
        }
        _ => VoteKind::Finished(outcome(source)?),
    })
}
