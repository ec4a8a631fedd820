//! Tests of an engine with a journal that is killed and started again, with simulated time and services.
//!
//! The journal is a real file. The stores of the services are in memory, and their calls end at once.
//! Time passes only when nothing else is left to do.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    time::Duration,
};

use serde_json::json;
use tempfile::TempDir;

use super::{
    Concluded, Embedded, MemberSettings, Transaction, backend::FileBackend, engine::Engine,
};
use crate::{
    clock::ClockReading,
    journal::file::{
        self, JournalFileWriter, JournalOptions,
        frames::{FrameReader, NextFrame},
    },
    participant::{Service, Verdict},
    protocol::{
        ids::{Branch, ServiceName, TransactionKey},
        message::{Outcome, ReasonCode},
        participant::{Effect, Event, InDoubt},
        time::Time,
    },
    wire::message::Entry,
};

/// The services.
const NAMES: [&str; 2] = ["A", "B"];
const A: usize = 0;
const B: usize = 1;

/// What outlives a process: the file, the services' stores, and the clock.
struct World {
    directory: TempDir,
    now: Time,
    slots: u32,
    /// The prepared branches of each service.
    held: BTreeMap<(usize, Branch), InDoubt>,
    /// The services whose prepares refuse.
    refusing: BTreeSet<usize>,
    /// The branches of prepares that timed out, which become visible later; `None`: no prepare times
    /// out.
    late: Option<Vec<(usize, InDoubt)>>,
    /// The services whose commits and aborts fail.
    failing: BTreeSet<usize>,
    /// The commits and aborts, as `service id outcome`, in order.
    finished: Vec<String>,
    answers: BTreeMap<String, (Outcome, Option<ReasonCode>)>,
}

/// One process.
struct Process {
    engine: Engine,
    writer: JournalFileWriter,
    calls: Vec<(usize, Effect)>,
}

impl World {
    fn new(slots: u32) -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            now: Time::from_millis(1_000_000),
            slots,
            held: BTreeMap::new(),
            refusing: BTreeSet::new(),
            late: None,
            failing: BTreeSet::new(),
            finished: Vec::new(),
            answers: BTreeMap::new(),
        }
    }

    fn start(&self) -> Process {
        let options = JournalOptions { now: self.now, retention: Embedded::RETENTION };
        let opened = file::open(&self.directory.path().join("journal"), &options).unwrap();
        let services = NAMES.map(|name| Service::new(name, self.slots));
        let mut embedded = Embedded::new(services).unwrap().max_in_flight(1000);
        let (writer, journal) = embedded.take_over(opened).unwrap();
        let wait = Duration::from_secs(1);
        let members = NAMES.map(|name| MemberSettings {
            name: ServiceName::parse(name).unwrap(),
            max_concurrency: self.slots,
            max_wait: wait,
            has_store: true,
        });
        let (settings, (entries, unfinished)) = (embedded.settings, journal);
        let backend = FileBackend::new(self.now, &settings, &members, entries, unfinished);
        let engine = Engine::new(self.now, settings, members, backend);
        Process { engine, writer, calls: Vec::new() }
    }

    fn reading(&self) -> ClockReading {
        ClockReading { time: self.now, elapsed: Duration::ZERO }
    }

    /// The decisions in the file, in order.
    fn decided(&self) -> BTreeMap<String, Vec<Outcome>> {
        let file = File::open(self.directory.path().join("journal")).unwrap();
        let mut frames = FrameReader::after_header(file).unwrap();
        let mut decided: BTreeMap<_, Vec<_>> = BTreeMap::new();
        while let NextFrame::Frame(frame) = frames.read().unwrap() {
            if let Entry::Decided(decision) = Entry::read(frame.tag, &frame.text).unwrap() {
                let outcomes = decided.entry(decision.key.id.to_string()).or_default();
                outcomes.push(decision.outcome);
            }
        }
        decided
    }

    /// Makes a call; returns its event.
    fn call(&mut self, number: usize, call: Effect) -> Event {
        match call {
            Effect::CallPrepare { key, branch, request_hash, deadline, .. } => {
                let verdict = if self.refusing.contains(&number) {
                    Verdict::Refused(None)
                } else {
                    let held = (key.clone(), branch.clone());
                    let held = InDoubt { key: held.0, request_hash, branch: held.1, deadline };
                    match &mut self.late {
                        Some(late) => {
                            late.push((number, held));
                            Verdict::Failed("timed out".into())
                        }
                        None => {
                            self.held.insert((number, branch.clone()), held);
                            Verdict::Prepared
                        }
                    }
                };
                Event::PrepareEnded { key, branch, verdict }
            }
            Effect::CallCommit { key, branch } => {
                self.finish(number, key, branch, Outcome::Committed)
            }
            Effect::CallAbort { key, branch } => self.finish(number, key, branch, Outcome::Aborted),
            Effect::ReadStore(key) => {
                let held = self.held_by(number).filter(|it| it.key == key).cloned().collect();
                Event::StoreRead { key, held }
            }
            Effect::ScanStore => Event::StoreScanned(self.held_by(number).cloned().collect()),
            Effect::LookUpCommit { .. }
            | Effect::Vote { .. }
            | Effect::Done { .. }
            | Effect::Inquire(_)
            | Effect::Ack(_) => {
                panic!("not a call")
            }
        }
    }

    /// Makes the branches of timed-out prepares visible; from now on, no prepare times out.
    fn store_late(&mut self) {
        let late = self.late.take().into_iter().flatten();
        self.held.extend(late.map(|(of, held)| ((of, held.branch.clone()), held)));
    }

    fn held_by(&self, number: usize) -> impl Iterator<Item = &InDoubt> {
        self.held.iter().filter(move |((of, _), _)| *of == number).map(|(_, held)| held)
    }

    fn finish(
        &mut self,
        number: usize,
        key: TransactionKey,
        branch: Branch,
        outcome: Outcome,
    ) -> Event {
        if self.failing.contains(&number) {
            return Event::FinishEnded { key, branch, applied: Err("simulated error".into()) };
        }
        self.held.remove(&(number, branch.clone()));
        self.finished.push(format!("{} {} {}", NAMES[number], key.id, outcome.as_str()));
        Event::FinishEnded { key, branch, applied: Ok(()) }
    }
}

impl Process {
    fn submit(&mut self, world: &World, id: &str, services: &[&str]) {
        let transaction = Transaction::new(id, services.iter().copied(), json!({}));
        self.engine.submit(world.reading(), transaction.check().unwrap());
    }

    /// Does everything that needs neither time nor calls.
    fn settle(&mut self, world: &mut World) {
        loop {
            self.engine.settle(world.reading());
            let batch = self.engine.take_batch();
            if let Some(batch) = &batch {
                self.writer.write(batch).unwrap();
            }
            self.engine.safe(u64::MAX);
            for Concluded { answer, .. } in self.engine.take_concluded() {
                let result = (answer.outcome, answer.reason.map(|reason| reason.code));
                let before = world.answers.insert(answer.id.to_string(), result);
                assert!(before.is_none_or(|before| before == result), "{}: {before:?}", answer.id);
            }
            self.calls.extend(self.engine.take_calls());
            if batch.is_none() {
                return;
            }
        }
    }

    /// Continues until nothing is left to do before `until`. The latest call is made first.
    fn run_until(&mut self, world: &mut World, until: Time) {
        loop {
            self.settle(world);
            if let Some((number, call)) = self.calls.pop() {
                let ended = world.call(number, call);
                self.engine.call_ended(number, ended);
                continue;
            }
            match self.engine.next_deadline().filter(|next| *next <= until) {
                Some(next) => world.now = world.now.max(next),
                None if world.now < until => world.now = until,
                None => return,
            }
            self.engine.wake(world.now);
        }
    }

    /// Continues until nothing is left to do without waiting.
    fn run(&mut self, world: &mut World) {
        self.run_until(world, world.now);
    }

    /// Takes a step that `draw` chooses: it makes a call, or lets time pass. Returns whether there was one.
    fn step(&mut self, world: &mut World, draw: &mut Draw) -> bool {
        self.settle(world);
        if !self.calls.is_empty() {
            let (number, call) = self.calls.swap_remove(draw.below(self.calls.len()));
            let ended = world.call(number, call);
            self.engine.call_ended(number, ended);
            return true;
        }
        let Some(next) = self.engine.next_deadline() else { return false };
        world.now = world.now.max(next);
        self.engine.wake(world.now);
        true
    }

    fn run_for(&mut self, world: &mut World, time: Duration) {
        self.run_until(world, world.now + time);
    }

    /// Runs `count` transactions over one service.
    fn run_many(&mut self, world: &mut World, count: usize, service: &str) {
        for n in 0..count {
            self.submit(world, &format!("other-{n}"), &[service]);
            self.run(world);
            assert_eq!(world.answers[&format!("other-{n}")].0, Outcome::Committed);
        }
    }
}

/// Pseudo-random numbers, the same for the same seed.
struct Draw(u64);

impl Draw {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) as usize % limit
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    fn some_of(&mut self, count: usize) -> BTreeSet<usize> {
        [A, B].into_iter().filter(|_| self.one_in(count)).collect()
    }
}

/// The services of a transaction of `killed_at_random`.
fn involved(n: usize) -> &'static [&'static str] {
    [&NAMES[..], &NAMES[..1], &NAMES[1..]][n % 3]
}

/// Kills one process after the other during its work, with services that refuse and fail now and then,
/// and lets the last one finish everything.
fn killed_at_random(seed: u64) {
    let draw = &mut Draw(seed);
    let mut world = World::new([1, 3, 300][draw.below(3)]);
    let mut n_known = 0;
    for _ in 0..5 {
        let mut process = world.start();
        for _ in 0..draw.below(400) {
            if draw.one_in(20) {
                world.refusing = draw.some_of(6);
                world.failing = draw.some_of(3);
                world.store_late();
                world.late = draw.one_in(6).then(Vec::new);
            }
            if process.engine.room() > 0 && draw.one_in(2) {
                process.submit(&world, &format!("t{n_known}"), involved(n_known));
                n_known += 1;
            }
            process.step(&mut world, draw);
        }
        // Some calls still take effect when the process is killed, without anybody seeing it.
        for (number, call) in std::mem::take(&mut process.calls) {
            if draw.one_in(2) {
                world.call(number, call);
            }
        }
    }

    (world.refusing, world.failing) = (BTreeSet::new(), BTreeSet::new());
    world.store_late();
    let mut last = world.start();
    last.run(&mut world);
    for n in 0..n_known {
        last.submit(&world, &format!("t{n}"), involved(n));
        last.run(&mut world);
    }
    last.engine.requests_ended();
    last.run_for(&mut world, Duration::from_secs(200));
    assert!(last.engine.is_idle(), "seed {seed}");
    assert_eq!(world.held, BTreeMap::new(), "seed {seed}: nothing is left in doubt");
    let decided = world.decided();
    for n in 0..n_known {
        let id = format!("t{n}");
        let (outcome, _) = world.answers[&id];
        let decisions = decided.get(&id).into_iter().flatten();
        assert!(decisions.clone().all(|it| *it == outcome), "seed {seed}: {id} is decided once");
        let is_committed = |name: &&&str| {
            let entry = format!("{name} {id} {}", Outcome::Committed.as_str());
            match world.finished.iter().filter(|it| **it == entry).count() {
                0 => false,
                1 => true,
                count => panic!("seed {seed}: {id} is committed {count} times at {name}"),
            }
        };
        let n_committed = involved(n).iter().filter(is_committed).count();
        let wanted = if outcome == Outcome::Committed { involved(n).len() } else { 0 };
        assert_eq!(n_committed, wanted, "seed {seed}: {id} is {outcome:?}");
    }
}

#[test]
fn processes_killed_at_random_end_every_transaction_once() {
    for seed in 0..12 {
        killed_at_random(seed);
    }
}

#[test]
fn an_abort_that_failed_for_long_succeeds_after_many_later_decisions() {
    let mut world = World::new(1);
    let mut process = world.start();
    process.run(&mut world);
    world.refusing.insert(B);
    world.failing.insert(A);
    process.submit(&world, "t0", &["A", "B"]);
    process.run_for(&mut world, Duration::from_secs(6));
    assert_eq!(world.answers["t0"], (Outcome::Aborted, Some(ReasonCode::Refused)));
    assert_eq!(world.held.len(), 1, "the coordinator is done with it");

    world.refusing.clear();
    process.run_many(&mut world, 2000, "B");
    world.failing.clear();
    process.run_for(&mut world, Duration::from_secs(30));
    assert_eq!(world.held.len(), 0, "A has inquired, and aborted");
    process.submit(&world, "t1", &["A"]);
    process.run_for(&mut world, Duration::from_secs(6));
    assert_eq!(world.answers["t1"], (Outcome::Committed, None), "the slot of A is free");
    assert_eq!(world.decided()["t0"], [Outcome::Aborted]);
}

#[test]
fn a_transaction_that_finishes_before_the_inquiry_about_it_is_not_decided_again() {
    let mut world = World::new(200);
    let mut first = world.start();
    first.run(&mut world);
    world.failing.extend([A, B]);
    let ids: Vec<_> = (0..200).map(|n| format!("t{n}")).collect();
    for id in &ids {
        first.submit(&world, id, &NAMES);
    }
    first.run(&mut world);
    assert_eq!((world.held.len(), world.decided().len()), (400, 200), "none is committed yet");
    drop(first);

    world.failing.clear();
    let mut second = world.start();
    second.run(&mut world);
    assert_eq!(world.held.len(), 0);
    second.run_many(&mut world, 2000, "A");
    second.engine.requests_ended();
    second.run_for(&mut world, Duration::from_secs(60));
    assert!(second.engine.is_idle());
    for (id, decided) in world.decided() {
        assert_eq!(decided, [Outcome::Committed], "{id}");
    }
}

#[test]
fn each_process_retries_an_abort_until_it_succeeds() {
    let mut world = World::new(1);
    let mut first = world.start();
    first.run(&mut world);
    world.refusing.insert(B);
    world.failing.insert(A);
    first.submit(&world, "t0", &["A", "B"]);
    first.run_for(&mut world, Duration::from_secs(6));
    assert_eq!(world.answers["t0"].0, Outcome::Aborted);
    drop(first);

    let mut second = world.start();
    second.engine.requests_ended();
    second.run_for(&mut world, Duration::from_secs(10));
    assert!(second.engine.is_idle(), "it is left for the next start");
    assert_eq!(world.held.len(), 1);
    drop(second);

    world.failing.clear();
    let mut third = world.start();
    third.run(&mut world);
    assert_eq!(world.held.len(), 0);
    assert_eq!(world.finished, ["A t0 ABORTED"]);
    assert_eq!(world.decided()["t0"], [Outcome::Aborted], "decided once");
}

#[test]
fn a_branch_that_is_stored_long_after_its_prepare_timed_out_is_aborted() {
    let mut world = World::new(1);
    let mut process = world.start();
    process.run(&mut world);
    world.late = Some(Vec::new());
    process.submit(&world, "t0", &["A"]);
    process.run(&mut world);
    assert_eq!(world.answers["t0"], (Outcome::Aborted, Some(ReasonCode::Failed)));
    let late = world.late.take();

    process.run_many(&mut world, 2000, "B");
    world.late = late;
    world.store_late();
    assert_eq!(world.held.len(), 1);
    process.run_for(&mut world, Duration::from_secs(100));
    assert_eq!(world.held.len(), 0, "A has found and aborted it");
    assert_eq!(world.decided()["t0"], [Outcome::Aborted]);
}
