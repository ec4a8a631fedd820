//! Load beyond the caps must wait, and neither abort nor stall.
//!
//! Time is tokio's and passes only while everything waits, so the figures are exact and the same on
//! every machine: they measure how well the coordinator uses the slots. Each test prints its
//! figures.

#![allow(clippy::print_stdout, reason = "each test says what it has reached")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use dtc::{Embedded, Outcome, Service, Transaction, TransactionResult, embedded::CallCounts};
use serde_json::json;
use tokio::time::{Instant, sleep};

/// The behaviour of a service, and the counts of its calls.
#[derive(Clone, Default)]
struct CountedService(Arc<Counts>);

#[derive(Default)]
struct Counts {
    prepares: AtomicU64,
    commits: AtomicU64,
    aborts: AtomicU64,
    preparing: AtomicU32,
    most_preparing: AtomicU32,
    /// When each transaction was committed.
    committed_at: Mutex<BTreeMap<String, Instant>>,
}

impl CountedService {
    /// A service that sleeps for `takes` in every prepare.
    fn service(&self, name: &str, cap: u32, takes: Duration) -> Service {
        let (prepare, commit, abort) =
            (Arc::clone(&self.0), Arc::clone(&self.0), Arc::clone(&self.0));
        Service::new(name, cap)
            .prepare_async(move |_, _| {
                let counts = Arc::clone(&prepare);
                async move {
                    counts.prepares.fetch_add(1, Ordering::Relaxed);
                    let preparing = counts.preparing.fetch_add(1, Ordering::Relaxed) + 1;
                    counts.most_preparing.fetch_max(preparing, Ordering::Relaxed);
                    if !takes.is_zero() {
                        sleep(takes).await;
                    }
                    counts.preparing.fetch_sub(1, Ordering::Relaxed);
                    Ok(true)
                }
            })
            .commit_async(move |id| {
                commit.commits.fetch_add(1, Ordering::Relaxed);
                commit.committed_at.lock().unwrap().insert(id, Instant::now());
                async { Ok(()) }
            })
            .abort_async(move |_| {
                abort.aborts.fetch_add(1, Ordering::Relaxed);
                async { Ok(()) }
            })
    }

    fn calls(&self) -> CallCounts {
        let count = |it: &AtomicU64| it.load(Ordering::Relaxed);
        CallCounts {
            prepare: count(&self.0.prepares),
            commit: count(&self.0.commits),
            abort: count(&self.0.aborts),
        }
    }

    fn most_preparing(&self) -> u32 {
        self.0.most_preparing.load(Ordering::Relaxed)
    }

    fn committed_at(&self, id: &str) -> Option<Instant> {
        self.0.committed_at.lock().unwrap().get(id).copied()
    }
}

/// Pseudo-random numbers from a fixed seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % bound as u64).unwrap()
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// `count` transactions over `services`, with ids that begin with `prefix`.
fn transactions(prefix: &str, count: usize, services: &[&str]) -> Vec<Transaction> {
    let one = |n| Transaction::new(format!("{prefix}{n}"), services.iter().copied(), json!({}));
    (0..count).map(one).collect()
}

fn is_committed(result: &TransactionResult) -> bool {
    result.outcome == Outcome::Committed && result.unresolved.is_empty()
}

/// How many did not commit, by reason.
fn aborts(results: &[TransactionResult]) -> BTreeMap<&'static str, usize> {
    let mut aborts = BTreeMap::new();
    for result in results.iter().filter(|it| !is_committed(it)) {
        let code = result.reason.as_ref().map_or("none", |reason| reason.code.as_str());
        *aborts.entry(code).or_default() += 1;
    }
    aborts
}

fn assert_all_committed(results: &[TransactionResult], expected: usize) {
    assert_eq!(results.len(), expected);
    assert_eq!(aborts(results), BTreeMap::new(), "a transaction aborted");
}

async fn run_in(
    in_flight: usize,
    services: Vec<Service>,
    transactions: Vec<Transaction>,
) -> (Vec<TransactionResult>, Duration) {
    let began = Instant::now();
    let coordinator = Embedded::new(services).unwrap().max_in_flight(in_flight);
    let results = coordinator.run(transactions).await.unwrap();
    (results, began.elapsed())
}

fn ratio(reached: Duration, best: Duration) -> f64 {
    reached.as_secs_f64() / best.as_secs_f64()
}

/// How long `count` sleeps take, one after the other.
async fn one_after_another(count: usize, each: Duration) -> Duration {
    let began = Instant::now();
    for _ in 0..count {
        sleep(each).await;
    }
    began.elapsed()
}

#[tokio::test(start_paused = true)]
async fn a_thousand_transactions_on_one_slot_all_commit() {
    let best = one_after_another(1000, ms(5)).await;
    let watched = CountedService::default();

    let services = vec![watched.service("A", 1, ms(5))];
    let results = dtc::run(services, transactions("t", 1000, &["A"])).await.unwrap();
    assert_all_committed(&results, 1000);

    let services = vec![watched.service("A", 1, ms(5))];
    let (results, took) = run_in(256, services, transactions("t", 1000, &["A"])).await;
    assert_all_committed(&results, 1000);
    println!("1000 on one slot: {took:?}, {:.3} of the optimum {best:?}", ratio(took, best));
    assert_eq!(watched.most_preparing(), 1);
    assert_eq!(watched.calls(), CallCounts { prepare: 2000, commit: 2000, abort: 0 });
    assert!(ratio(took, best) <= 1.01, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn every_slot_of_a_saturated_service_is_used() {
    for cap in [1, 2, 8, 64] {
        let watched = CountedService::default();
        let services = vec![watched.service("A", cap, ms(5))];
        let count = 200 * cap as usize;
        let (results, took) = run_in(256, services, transactions("t", count, &["A"])).await;
        assert_all_committed(&results, count);
        let best = ms(5) * 200;
        println!(
            "cap {cap}: {:.1} % of the slots' time used, most preparing at once {}",
            100.0 * ratio(best, took),
            watched.most_preparing(),
        );
        assert_eq!(watched.most_preparing(), cap);
        assert!(ratio(took, best) <= 1.01, "cap {cap}: {took:?}");
    }
}

async fn two_single_slots(order: &str, in_flight: usize) -> f64 {
    let both = transactions("both", 500, &["A", "B"]);
    let only_a = transactions("a", 500, &["A"]);
    let only_b = transactions("b", 500, &["B"]);
    let transactions = match order {
        "both, a, b" => [both, only_a, only_b].concat(),
        "a, both, b" => [only_a, both, only_b].concat(),
        "b, both, a" => [only_b, both, only_a].concat(),
        "a, b, both" => [only_a, only_b, both].concat(),
        _ => {
            let mut all = [both, only_a, only_b].concat();
            Dice(7).shuffle(&mut all);
            all
        }
    };
    let (a, b) = (CountedService::default(), CountedService::default());
    let services = vec![a.service("A", 1, ms(5)), b.service("B", 1, ms(5))];
    let (results, took) = run_in(in_flight, services, transactions).await;
    assert_all_committed(&results, 1500);
    assert_eq!((a.most_preparing(), b.most_preparing()), (1, 1));
    let best = one_after_another(1000, ms(5)).await;
    let reached = ratio(took, best);
    println!("two single slots, {order}, {in_flight} in flight: {reached:.3} of the optimum");
    reached
}

#[tokio::test(start_paused = true)]
async fn two_contended_single_slots_take_at_most_twice_the_optimum() {
    for in_flight in [4, 400] {
        for order in ["shuffled", "both, a, b", "a, both, b", "b, both, a", "a, b, both"] {
            let reached = two_single_slots(order, in_flight).await;
            assert!(reached <= 2.0, "{order}, {in_flight} in flight: {reached}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_ring_of_single_slots_does_not_stall() {
    let rings = [["A", "B"], ["B", "C"], ["C", "A"]];
    for in_flight in [3, 30, 400] {
        let watched: [CountedService; 3] = Default::default();
        let services =
            ["A", "B", "C"].iter().zip(&watched).map(|(name, it)| it.service(name, 1, ms(5)));
        let mut all: Vec<_> =
            rings.iter().flat_map(|ring| transactions(&ring.concat(), 300, ring)).collect();
        Dice(3).shuffle(&mut all);
        let (results, took) = run_in(in_flight, services.collect(), all).await;
        assert_all_committed(&results, 900);
        // At most one of any two neighbours runs at a time: 900 in a row.
        let reached = ratio(took, ms(5) * 900);
        println!("ring of three, {in_flight} in flight: {reached:.3} of the optimum");
        assert!(reached <= 1.1, "{reached}");
    }
}

#[tokio::test(start_paused = true)]
async fn random_sets_of_tightly_capped_services_all_commit() {
    let names = ["A", "B", "C", "D", "E", "F"];
    for in_flight in [8, 400] {
        let mut dice = Dice(11);
        let watched: [CountedService; 6] = Default::default();
        let caps: Vec<u32> = names.iter().map(|_| 2 + dice.below(2) as u32).collect();
        let takes: Vec<u64> = names.iter().map(|_| 1 + dice.below(9) as u64).collect();
        let services = (0..6).map(|n| watched[n].service(names[n], caps[n], ms(takes[n])));
        let services = services.collect();
        let mut uses = [0_u64; 6];
        let mut all = Vec::new();
        for n in 0..2000 {
            let mut picked: Vec<usize> = (0..6).collect();
            dice.shuffle(&mut picked);
            picked.truncate(1 + dice.below(4));
            picked.iter().for_each(|&service| uses[service] += 1);
            let picked = picked.iter().map(|&service| names[service]);
            all.push(Transaction::new(format!("t{n}"), picked, json!({})));
        }
        let (results, took) = run_in(in_flight, services, all).await;
        assert_all_committed(&results, 2000);
        for n in 0..6 {
            assert!(watched[n].most_preparing() <= caps[n]);
        }
        let best = (0..6).map(|n| ms(uses[n] * takes[n]) / caps[n]).max().unwrap();
        let reached = ratio(took, best);
        println!("2000 random ones, {in_flight} in flight: {reached:.3} of the busiest's optimum");
        assert!(reached <= 1.25, "{reached}");
    }
}

/// When the last of the fast ones was committed, with and without the slow ones among them.
async fn beside_a_slow_service(fast_cap: u32, slow_sets: &[&[&str]], in_flight: usize) -> f64 {
    let fast_names = ["B", "C", "D", "E"];
    let mut times = Vec::new();
    for with_slow in [false, true] {
        let fast: [CountedService; 4] = Default::default();
        let slow = CountedService::default();
        let mut services: Vec<_> = fast_names
            .iter()
            .zip(&fast)
            .map(|(name, it)| it.service(name, fast_cap, ms(5)))
            .collect();
        services.push(slow.service("M", 2, ms(50)));
        services.push(slow.service("A", 2, ms(50)));
        let mut all = Vec::new();
        for n in 0..2000 {
            let name = fast_names[n % 4];
            all.push(Transaction::new(format!("fast{n}"), [name], json!({})));
            if with_slow && n % 4 == 3 {
                let involved = slow_sets[(n / 4) % slow_sets.len()].iter().copied();
                all.push(Transaction::new(format!("slow{n}"), involved, json!({})));
            }
        }
        let began = Instant::now();
        let (results, took) = run_in(in_flight, services, all).await;
        let count = results.len();
        assert_all_committed(&results, count);
        let ended = (0..2000).filter_map(|n| fast[n % 4].committed_at(&format!("fast{n}"))).max();
        times.push(ended.unwrap() - began);
        println!("  {count} in {took:?}, the fast ones in {:?}", ended.unwrap() - began);
    }
    ratio(times[0], times[1])
}

#[tokio::test(start_paused = true)]
async fn one_saturated_slow_service_leaves_the_others_their_speed() {
    for cap in [2, 4, 16] {
        for in_flight in [16, 256] {
            let kept = beside_a_slow_service(cap, &[&["M"]], in_flight).await;
            println!("slow alone, fast cap {cap}, {in_flight} in flight: {kept:.3} kept");
            assert!(kept >= 0.8, "{kept}");
        }
    }
}

/// A transaction that holds a slot of the slow service also holds one of a fast one, as long as the
/// slow prepare takes: the others can't have that. No more is lost, least of all by those that only
/// wait for the slow one.
#[tokio::test(start_paused = true)]
async fn a_transaction_that_waits_for_a_slow_service_holds_no_slot_of_a_fast_one() {
    let after: &[&[&str]] = &[&["B", "M"], &["C", "M"], &["D", "M"], &["E", "M"]];
    let before: &[&[&str]] = &[&["A", "B"], &["A", "C"], &["A", "D"], &["A", "E"]];
    for (what, sets) in [("after", after), ("before", before)] {
        for (cap, least) in [(2, 0.5), (4, 0.75), (16, 0.85)] {
            for in_flight in [16, 256] {
                let kept = beside_a_slow_service(cap, sets, in_flight).await;
                println!(
                    "slow {what} a fast one, cap {cap}, {in_flight} in flight: {kept:.3} kept"
                );
                assert!(kept >= least, "{kept}");
            }
        }
    }
}

/// A gate for calls to wait at.
#[derive(Clone)]
struct Gate(Arc<tokio::sync::Semaphore>);

impl Gate {
    fn shut() -> Self {
        Self(Arc::new(tokio::sync::Semaphore::new(0)))
    }

    fn open(&self) {
        self.0.close();
    }

    async fn pass(self) {
        drop(self.0.acquire().await);
    }
}

/// The results of 100 transactions over A and B, while another one holds the only slot of A from
/// its commit on for `held_for`; the calls of A and B; and when the last of the 100 ended.
struct WhileHeld {
    results: Vec<TransactionResult>,
    a: CallCounts,
    b: CallCounts,
}

async fn while_the_slot_is_held(max_wait: Duration, held_for: Duration) -> WhileHeld {
    let (a, b) = (CountedService::default(), CountedService::default());
    let gate = Gate::shut();
    let commit_began = Arc::new(tokio::sync::Notify::new());
    let (opened, begun) = (gate.clone(), Arc::clone(&commit_began));
    let held = a.service("A", 1, Duration::ZERO).max_wait(max_wait).commit_async(move |id| {
        let (opened, begun) = (opened.clone(), Arc::clone(&begun));
        async move {
            if id == "holder" {
                begun.notify_one();
                opened.pass().await;
            }
            Ok(())
        }
    });
    let mut all = vec![Transaction::new("holder", ["A"], json!({}))];
    all.extend(transactions("t", 100, &["A", "B"]));
    let services = vec![held, b.service("B", 100, Duration::ZERO)];
    let coordinator = Embedded::new(services).unwrap().finish_timeout(Duration::from_secs(60));
    let open = async {
        commit_began.notified().await;
        sleep(held_for).await;
        gate.open();
    };
    let (results, ()) = tokio::join!(coordinator.run(all), open);
    let mut results = results.unwrap();
    let holder = results.remove(0);
    assert!(is_committed(&holder), "{holder:?}");
    let (a, b) = (a.calls(), b.calls());
    println!("max_wait {max_wait:?}, held for {held_for:?}: {:?} of 100", aborts(&results));
    WhileHeld { results, a, b }
}

#[tokio::test(start_paused = true)]
async fn with_a_max_wait_of_zero_a_held_slot_is_no_slot_at_once_and_nothing_else_is_called() {
    // Two milliseconds are only enough for an immediate answer.
    let WhileHeld { results, a, b } = while_the_slot_is_held(Duration::ZERO, ms(2)).await;
    assert_eq!(aborts(&results), BTreeMap::from([("no_slot", 100)]));
    assert_eq!((a.prepare, b), (1, CallCounts::default()));
    let at = results[0].reason.as_ref().unwrap().service.as_ref().unwrap();
    assert_eq!(at.as_str(), "A");
}

#[tokio::test(start_paused = true)]
async fn a_slot_held_for_longer_than_the_wait_is_no_slot_in_rounds() {
    let WhileHeld { results, a, b } = while_the_slot_is_held(ms(200), ms(1000)).await;
    assert_eq!(aborts(&results), BTreeMap::from([("no_slot", 100)]));
    assert_eq!((a.prepare, b), (1, CallCounts::default()));

    let WhileHeld { results, .. } = while_the_slot_is_held(ms(1000), Duration::from_secs(6)).await;
    assert_eq!(aborts(&results), BTreeMap::from([("no_slot", 100)]));
}

#[tokio::test(start_paused = true)]
async fn a_slot_held_for_less_than_the_wait_is_waited_for() {
    for held_for in [1, 50, 199] {
        let WhileHeld { results, a, .. } = while_the_slot_is_held(ms(200), ms(held_for)).await;
        assert_all_committed(&results, 100);
        assert_eq!(a.prepare, 101);
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_hangs_in_every_prepare_leaves_the_others_their_speed() {
    let (good, hung) = (CountedService::default(), CountedService::default());
    let services =
        vec![good.service("B", 4, ms(5)), hung.service("A", 2, Duration::from_secs(3600))];
    let mut all = transactions("hangs", 20, &["A"]);
    all.extend(transactions("good", 400, &["B"]));
    let began = Instant::now();
    let (results, took) = run_in(256, services, all).await;
    assert_eq!(results.iter().filter(|it| is_committed(it)).count(), 400);
    assert!(results[20..].iter().all(is_committed));
    let ended = (0..400).filter_map(|n| good.committed_at(&format!("good{n}"))).max().unwrap();
    println!(
        "beside one that hangs: {:?} for what takes 500ms alone, {took:?} in all",
        ended - began
    );
    assert!(ended - began <= ms(510));
    assert_eq!(hung.calls(), CallCounts { prepare: 20, commit: 0, abort: 20 });
}

#[tokio::test(start_paused = true)]
async fn transactions_that_wait_for_a_slot_that_is_never_freed_abort_in_rounds() {
    let (dead, good) = (CountedService::default(), CountedService::default());
    let hangs = |_| std::future::pending();
    let services =
        vec![dead.service("A", 1, Duration::ZERO).commit_async(hangs), good.service("B", 4, ms(5))];
    let mut all = transactions("t", 200, &["A"]);
    all.extend(transactions("good", 100, &["B"]));
    let (results, took) = run_in(400, services, all).await;
    println!("behind a slot that is held for ever: {:?} after {took:?}", aborts(&results));
    assert_eq!(results[0].unresolved.len(), 1);
    assert_eq!(aborts(&results[1..200])["no_slot"], 199);
    assert_all_committed(&results[200..], 100);
    // The one that holds it is given up after four times five seconds; 199 times one second would
    // be more.
    assert!(took <= Duration::from_secs(30), "{took:?}");
}
