//! Many schedules on all cores, their totals, and how to repeat a failure.

use std::{
    collections::BTreeMap,
    env,
    fmt::Write as _,
    io::Write as _,
    num::NonZero,
    panic,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use crate::{
    checkers::Violation,
    coverage::Coverage,
    driver::Flaw,
    rules::Kind,
    world::{self, Summary},
};

/// How many of the last lines of a failed schedule are shown.
const LAST_LINES: usize = 60;

/// How many seeds a thread takes at a time.
const SEEDS_AT_ONCE: u64 = 64;

/// The totals of many schedules.
pub(crate) struct Totals {
    pub(crate) schedules: u64,
    pub(crate) faults: [u64; Kind::ALL.len()],
    pub(crate) endings: BTreeMap<&'static str, u64>,
    pub(crate) coverage: Coverage,
    pub(crate) steps: u64,
    /// The fewest faults that took effect in one schedule.
    pub(crate) faults_min: u64,
    /// The failed schedule with the lowest seed.
    pub(crate) failure: Option<(u64, Violation)>,
}

impl Totals {
    fn new() -> Self {
        Self {
            schedules: 0,
            faults: [0; _],
            endings: BTreeMap::new(),
            coverage: Coverage::new(),
            steps: 0,
            faults_min: u64::MAX,
            failure: None,
        }
    }

    fn add(&mut self, other: Self) {
        self.schedules += other.schedules;
        self.steps += other.steps;
        self.faults_min = self.faults_min.min(other.faults_min);
        self.coverage.add(&other.coverage);
        for (own, other) in self.faults.iter_mut().zip(other.faults) {
            *own += other;
        }
        for (word, n) in other.endings {
            *self.endings.entry(word).or_default() += n;
        }
        if let Some((seed, violation)) = other.failure {
            self.fail(seed, violation);
        }
    }

    fn count(&mut self, seed: u64, summary: Summary) {
        self.schedules += 1;
        self.steps += summary.steps;
        self.faults_min = self.faults_min.min(summary.faults.iter().sum());
        self.coverage.add(&summary.coverage);
        for (own, other) in self.faults.iter_mut().zip(summary.faults) {
            *own += other;
        }
        for (word, n) in summary.endings {
            *self.endings.entry(word).or_default() += n;
        }
        if let Some(violation) = summary.violation {
            self.fail(seed, violation);
        }
    }

    fn fail(&mut self, seed: u64, violation: Violation) {
        if self.failure.as_ref().is_none_or(|(lowest, _)| seed < *lowest) {
            self.failure = Some((seed, violation));
        }
    }

    /// Everything worth printing.
    pub(crate) fn report(&self) -> String {
        let mut text = format!("schedules: {} ({} happenings)\n", self.schedules, self.steps);
        for (word, n) in &self.endings {
            let _ = writeln!(text, "  {word}: {n}");
        }
        let (faults, least) = (self.faults.iter().sum::<u64>(), self.faults_min);
        let _ =
            writeln!(text, "faults that took effect: {faults}, {least} or more in each schedule");
        for (kind, n) in Kind::ALL.iter().zip(self.faults) {
            let _ = writeln!(text, "  {kind:?}: {n}");
        }
        let (pairs, hit, listed) = self.coverage.totals();
        let _ = writeln!(
            text,
            "(state × event) pairs: {pairs}, hit {hit}, listed as out of reach {listed}{}",
            self.coverage.table()
        );
        text
    }
}

/// Runs `seeds` on all cores until one fails or `goes_on` returns false.
pub(crate) fn run(
    seeds: std::ops::Range<u64>,
    flaw: Option<Flaw>,
    goes_on: impl Fn() -> bool + Sync,
) -> Totals {
    let next = AtomicU64::new(seeds.start);
    let has_failed = AtomicBool::new(false);
    let totals = Mutex::new(Totals::new());
    let n_threads = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| {
        for _ in 0..n_threads {
            scope.spawn(|| {
                let mut own = Totals::new();
                while !has_failed.load(Ordering::Relaxed) && goes_on() {
                    let from = next.fetch_add(SEEDS_AT_ONCE, Ordering::Relaxed);
                    let to = (from + SEEDS_AT_ONCE).min(seeds.end);
                    if from >= to {
                        break;
                    }
                    for seed in from..to {
                        own.count(seed, run_one(seed, flaw, false));
                        // Other threads run lower or higher seeds: each part is run until its first
                        // failure, so that the lowest one is found.
                        if own.failure.is_some() {
                            has_failed.store(true, Ordering::Relaxed);
                            break;
                        }
                    }
                }
                totals.lock().unwrap().add(own);
            });
        }
    });
    totals.into_inner().unwrap()
}

/// One schedule; a panic in it is a violation like any other.
pub(crate) fn run_one(seed: u64, flaw: Option<Flaw>, is_traced: bool) -> Summary {
    panic::catch_unwind(|| world::run(seed, flaw, is_traced)).unwrap_or_else(|cause| {
        let words = cause.downcast_ref::<String>().cloned();
        let words = words.or_else(|| cause.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let seen = words.unwrap_or_default();
        Summary {
            violation: Some(Violation { property: "no_panic", seen }),
            faults: [0; _],
            coverage: Coverage::new(),
            endings: BTreeMap::new(),
            steps: 0,
            trace: Vec::new(),
        }
    })
}

/// The report of a failed schedule: the property, the last lines, and how to repeat it.
pub(crate) fn account(seed: u64, flaw: Option<Flaw>, violation: &Violation) -> String {
    let summary = run_one(seed, flaw, true);
    let is_idle = |line: &&String| {
        line.contains("ScanStore")
            || line.contains("StoreScanned([])")
            || line.contains("DeadlineReached")
    };
    let lines: Vec<_> = summary.trace.iter().filter(|line| !is_idle(line)).collect();
    let skipped = lines.len().saturating_sub(LAST_LINES);
    let mut text = format!(
        "seed {seed} violates {}: {}\nthe last {LAST_LINES} of {} lines:\n",
        violation.property,
        violation.seen,
        summary.trace.len()
    );
    for line in &lines[skipped..] {
        let _ = writeln!(text, "{line}");
    }
    let bug = flaw
        .map(|flaw| match flaw {
            Flaw::Core(bug) => format!("DTC_SIM_BUG={bug:?} "),
            Flaw::Driver(bug) => format!("DTC_SIM_BUG={bug:?} "),
        })
        .unwrap_or_default();
    let _ = writeln!(
        text,
        "again, with all lines:\n  {bug}DTC_SIM_SEED={seed} DTC_SIM_TRACE=1 \
         cargo test --profile optimised --test simulation the_seed_of_the_environment_is_simulated \
         -- --nocapture"
    );
    text
}

/// A number from the environment.
pub(crate) fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} must be a number, and is {text:?}")))
}

/// Prints even when the test passes, although its output is captured then.
pub(crate) fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}");
}
