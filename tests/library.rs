//! The library as its users meet it: services of closures, transactions in, results out.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    panic::panic_any,
    path::Path,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use dtc::{
    DurableParticipant, Embedded, Finish, InDoubt, InvalidService, InvalidTransaction,
    JournalError, Outcome, Participant, Prepare, ReasonCode, RunError, Service, Transaction,
    TransactionKey, TransactionResult, Verdict, run,
};
use proptest::prelude::{ProptestConfig, Strategy, prop, prop_assert, prop_assert_eq, proptest};
use serde_json::{Value, json};
use tokio::time::sleep;

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn transaction(id: &str, services: &[&str]) -> Transaction {
    Transaction::new(id, services.iter().copied(), json!({}))
}

fn transactions(count: usize, services: &[&str]) -> Vec<Transaction> {
    (0..count).map(|n| transaction(&format!("t{n}"), services)).collect()
}

/// The calls, in order, as `name call id`.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn add(&self, name: &str, call: &str, id: &str) {
        self.0.lock().unwrap().push(format!("{name} {call} {id}"));
    }

    fn count(&self, entry: &str) -> usize {
        self.0.lock().unwrap().iter().filter(|it| *it == entry).count()
    }

    fn sorted(&self) -> Vec<String> {
        let mut entries = self.0.lock().unwrap().clone();
        entries.sort();
        entries
    }

    /// A service that accepts everything and logs it.
    fn service(&self, name: &'static str, cap: u32) -> Service {
        let (prepare, commit, abort) = (self.clone(), self.clone(), self.clone());
        Service::new(name, cap)
            .prepare_async(move |id, _| {
                prepare.add(name, "prepare", &id);
                async { Ok(true) }
            })
            .commit_async(move |id| {
                commit.add(name, "commit", &id);
                async { Ok(()) }
            })
            .abort_async(move |id| {
                abort.add(name, "abort", &id);
                async { Ok(()) }
            })
    }
}

/// The one result's status, reason and message.
fn told(results: &[TransactionResult]) -> (Outcome, Option<ReasonCode>, Option<&str>) {
    let [result] = results else { panic!("one result, not {results:?}") };
    let reason = result.reason.as_ref();
    let message = reason.and_then(|reason| reason.message.as_deref());
    (result.outcome, reason.map(|reason| reason.code), message)
}

// ---- What a run gives --------------------------------------------------------------------------

#[tokio::test]
async fn the_first_example_commits_both_transactions() {
    let log = Log::default();
    let seen = Arc::new(Mutex::new(BTreeMap::new()));
    let (of_a, logged) = (Arc::clone(&seen), log.clone());
    let a = log.service("ServiceA", 2).prepare(move |id, data| {
        logged.add("ServiceA", "prepare", id);
        of_a.lock().unwrap().insert(id.to_owned(), data.clone());
        Ok(true)
    });
    let results = run(
        [a, log.service("ServiceB", 1)],
        [
            Transaction::new("TX1", ["ServiceA", "ServiceB"], json!({"amount": 100})),
            Transaction::new("TX2", ["ServiceA"], json!({"item": "Widget"})),
        ],
    )
    .await
    .unwrap();

    let told: Vec<_> = results.iter().map(|it| (it.id.as_str(), it.outcome.as_str())).collect();
    assert_eq!(told, [("TX1", "COMMITTED"), ("TX2", "COMMITTED")]);
    let expected = [
        "ServiceA commit TX1",
        "ServiceA commit TX2",
        "ServiceA prepare TX1",
        "ServiceA prepare TX2",
        "ServiceB commit TX1",
        "ServiceB prepare TX1",
    ];
    assert_eq!(log.sorted(), expected);
    let data = seen.lock().unwrap().clone();
    assert_eq!(data["TX1"], json!({"amount": 100}));
    assert_eq!(data["TX2"], json!({"item": "Widget"}));
}

#[tokio::test(start_paused = true)]
async fn results_are_in_the_order_of_the_transactions() {
    let slow_first = Service::new("A", 50).prepare_async(|id: String, _| async move {
        let n: u64 = id[1..].parse()?;
        sleep(ms(100 - n)).await;
        Ok(!n.is_multiple_of(3))
    });
    let results = run([slow_first], transactions(50, &["A"])).await.unwrap();
    let ids: Vec<_> = results.iter().map(|it| it.id.to_string()).collect();
    assert_eq!(ids, (0..50).map(|n| format!("t{n}")).collect::<Vec<_>>());
    let aborted: Vec<_> = results.iter().map(|it| it.outcome == Outcome::Aborted).collect();
    assert_eq!(aborted, (0..50).map(|n| n % 3 == 0).collect::<Vec<_>>());
}

#[tokio::test]
async fn no_transactions_give_no_results() {
    assert_eq!(run([Service::new("A", 1)], []).await.unwrap(), []);
    assert_eq!(run([], []).await.unwrap(), []);
}

#[tokio::test]
async fn a_service_named_twice_is_called_once() {
    let log = Log::default();
    let results = run([log.service("A", 1)], [transaction("t", &["A", "A", "A"])]).await.unwrap();
    assert_eq!(told(&results).0, Outcome::Committed);
    assert_eq!(log.sorted(), ["A commit t", "A prepare t"]);
}

#[tokio::test]
async fn an_unknown_service_aborts_and_calls_no_one() {
    let log = Log::default();
    for services in [["A", "Z"], ["0", "A"]] {
        let results = run([log.service("A", 1)], [transaction("t", &services)]).await.unwrap();
        let (status, code, _) = told(&results);
        assert_eq!((status, code), (Outcome::Aborted, Some(ReasonCode::UnknownService)));
        let at = results[0].reason.as_ref().unwrap().service.as_ref().unwrap();
        assert!(["0", "Z"].contains(&at.as_str()));
    }
    assert_eq!(log.sorted(), [""; 0]);
}

#[tokio::test]
async fn ten_thousand_transactions_commit() {
    let log = Log::default();
    let services = [log.service("A", 3), log.service("B", 64)];
    let results = run(services, transactions(10_000, &["A", "B"])).await.unwrap();
    assert_eq!(results.len(), 10_000);
    assert!(results.iter().all(|it| it.outcome == Outcome::Committed));
    assert_eq!(log.sorted().len(), 40_000);
}

#[test]
fn both_kinds_of_tokio_runtime_work() {
    let in_one = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let in_many = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    for runtime in [in_one, in_many] {
        let services = [
            Service::new("A", 2).prepare(|_, _| Ok(true)).commit(|_| Ok(())),
            Service::new("B", 2).prepare_async(|_, _| async {
                tokio::task::yield_now().await;
                Ok(true)
            }),
        ];
        let ran = runtime.block_on(run(services, transactions(100, &["A", "B"]))).unwrap();
        assert!(ran.iter().all(|it| it.outcome == Outcome::Committed));
    }
}

/// With a journal, the next one began with the next look into the stores, 30 s later.
#[tokio::test]
async fn a_transaction_begins_as_soon_as_an_abort_has_made_room() {
    let directory = tempfile::tempdir().unwrap();
    let a = Service::new("A", 4)
        .prepare_async(|_, _| async {
            sleep(ms(2)).await;
            Ok(true)
        })
        .abort_async(|_| async {
            sleep(ms(2)).await;
            Ok(())
        });
    let b = Service::new("B", 4).prepare_async(|_, _| async { Err("it fails".into()) });
    let coordinator = Embedded::new(vec![a, b]).unwrap().max_in_flight(1);
    let coordinator = coordinator.journal(directory.path().join("journal"));
    let running = coordinator.run(transactions(20, &["A", "B"]));
    let results = tokio::time::timeout(ms(15_000), running).await.expect("it waits for a timer");
    assert!(results.unwrap().iter().all(|it| it.outcome == Outcome::Aborted));
}

#[tokio::test(start_paused = true)]
async fn a_run_that_is_dropped_midway_stops() {
    let log = Log::default();
    let logged = log.clone();
    let a = log.service("A", 1).prepare_async(move |id, _| {
        logged.add("A", "prepare", &id);
        async {
            sleep(ms(10)).await;
            Ok(true)
        }
    });
    let running = run([a], transactions(100, &["A"]));
    assert!(tokio::time::timeout(ms(95), running).await.is_err());
    let called = log.sorted().len();
    sleep(ms(1000)).await;
    assert_eq!(log.sorted().len(), called, "calls go on after the drop");
}

// ---- What is not taken -------------------------------------------------------------------------

#[tokio::test]
async fn bad_services_are_reported_by_name() {
    let of = |services: Vec<Service>| Embedded::new(services).unwrap_err();
    let twice = of(vec![Service::new("A", 1), Service::new("A", 2)]);
    assert_eq!(twice.to_string(), "duplicate service name `A`");
    let none = of(vec![Service::new("A", 0)]);
    assert!(matches!(none, InvalidService::NoSlots { .. }));
    assert_eq!(none.to_string(), "the max_concurrency of service `A` is 0: must be at least 1");
    for name in ["", "a b", "ä", &"x".repeat(65)] {
        assert!(matches!(of(vec![Service::new(name, 1)]), InvalidService::Name(_)), "{name}");
    }
}

#[tokio::test]
async fn bad_transactions_are_reported_before_any_service_is_called() {
    let log = Log::default();
    let of = async |bad: Vec<Transaction>| {
        let all = [vec![transaction("good", &["A"])], bad].concat();
        match run([log.service("A", 1)], all).await {
            Err(RunError::Transaction(error)) => error,
            other => panic!("{other:?}"),
        }
    };
    let twice = of(vec![transaction("t", &["A"]), transaction("t", &["A"])]).await;
    assert_eq!(twice.to_string(), "duplicate transaction id `t`");
    let nowhere = of(vec![transaction("t", &[])]).await;
    assert!(matches!(nowhere, InvalidTransaction::NoServices { .. }));
    for data in [json!([]), json!(null), json!("x"), json!(1)] {
        let not_an_object = of(vec![Transaction::new("t", ["A"], data)]).await;
        assert!(matches!(not_an_object, InvalidTransaction::DataNotAnObject { .. }));
    }
    for id in ["", "a b", "a/b", &"x".repeat(129)] {
        let bad = of(vec![transaction(id, &["A"])]).await;
        assert!(matches!(bad, InvalidTransaction::Name(_)), "{id}");
    }
    let bad_service = of(vec![transaction("t", &["A", "b c"])]).await;
    assert!(matches!(bad_service, InvalidTransaction::Name(_)));
    assert_eq!(log.sorted(), [""; 0]);
}

// ---- What prepare may end in -------------------------------------------------------------------

/// Runs one transaction over A (which is `of`) and B, which succeeds; returns the result and the
/// calls.
async fn beside_b(of: impl FnOnce(Service) -> Service) -> (Vec<TransactionResult>, Vec<String>) {
    let log = Log::default();
    let services = [of(log.service("A", 1)), log.service("B", 1)];
    let results = Embedded::new(services)
        .unwrap()
        .prepare_timeout(ms(500))
        .finish_timeout(ms(500))
        .run([transaction("t", &["A", "B"])])
        .await
        .unwrap();
    (results, log.sorted())
}

#[tokio::test]
async fn a_refusal_aborts_and_the_refusing_service_gets_no_abort() {
    let (results, calls) = beside_b(|a| a.prepare(|_, _| Ok(false))).await;
    assert_eq!(told(&results), (Outcome::Aborted, Some(ReasonCode::Refused), None));
    assert!(!calls.iter().any(|call| call.starts_with('A')), "{calls:?}");
    assert!(!calls.contains(&"B commit t".to_owned()));

    let (results, calls) = beside_b(|a| a.prepare_async(|_, _| async { Ok(false) })).await;
    assert_eq!(told(&results), (Outcome::Aborted, Some(ReasonCode::Refused), None));
    assert!(!calls.iter().any(|call| call.starts_with('A')), "{calls:?}");
}

/// A transaction that fails at A aborts, and both get one abort.
fn assert_failed(ran: &(Vec<TransactionResult>, Vec<String>), message: &str) {
    let (results, calls) = ran;
    assert_eq!(told(results), (Outcome::Aborted, Some(ReasonCode::Failed), Some(message)));
    assert_eq!(calls.iter().filter(|call| *call == "A abort t").count(), 1, "{calls:?}");
    let prepared = calls.contains(&"B prepare t".to_owned());
    assert_eq!(calls.contains(&"B abort t".to_owned()), prepared, "{calls:?}");
}

#[tokio::test]
async fn an_error_in_prepare_aborts_and_its_service_gets_the_abort() {
    assert_failed(&beside_b(|a| a.prepare(|_, _| Err("no disk".into()))).await, "no disk");
    let ran = beside_b(|a| a.prepare_async(|_, _| async { Err("no disk".into()) })).await;
    assert_failed(&ran, "no disk");
}

#[tokio::test]
async fn a_panic_in_prepare_is_an_error_like_any_other() {
    assert_failed(&beside_b(|a| a.prepare(|_, _| panic!("oh"))).await, "panicked: oh");
    let ran = beside_b(|a| {
        a.prepare_async(|_, _| async {
            tokio::task::yield_now().await;
            panic!("oh {}", 1)
        })
    })
    .await;
    assert_failed(&ran, "panicked: oh 1");
    let ran = beside_b(|a| {
        a.prepare_async(|id, _| {
            assert!(id.is_empty(), "before its future is made");
            async { Ok(true) }
        })
    })
    .await;
    assert_failed(&ran, "panicked: before its future is made");
    let ran = beside_b(|a| a.prepare(|_, _| panic_any(7))).await;
    assert_failed(&ran, "panicked: no message");
}

#[tokio::test(start_paused = true)]
async fn a_prepare_that_takes_too_long_fails_and_its_service_gets_the_abort() {
    let hangs = |a: Service| a.prepare_async(|_, _| std::future::pending());
    let (results, calls) = beside_b(hangs).await;
    assert_eq!(told(&results).0, Outcome::Aborted);
    let code = told(&results).1.unwrap();
    assert!(matches!(code, ReasonCode::Failed | ReasonCode::Deadline), "{code}");
    assert!(calls.contains(&"A abort t".to_owned()), "{calls:?}");
}

// ---- What commit may end in --------------------------------------------------------------------

/// A's commit fails `failures` times by `fail`; returns the result, and how often it was called.
async fn failing_commit<F>(failures: u32, fail: F) -> (Vec<TransactionResult>, u32, Vec<String>)
where
    F: Fn() + Send + Sync + 'static,
{
    let attempts = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&attempts);
    let fail = Arc::new(fail);
    let (results, calls) = beside_b(|a| {
        a.commit_async(move |_| {
            let attempt = counted.fetch_add(1, Ordering::Relaxed) + 1;
            let fail = Arc::clone(&fail);
            async move {
                if attempt > failures {
                    return Ok(());
                }
                fail();
                Err("not now".into())
            }
        })
    })
    .await;
    (results, attempts.load(Ordering::Relaxed), calls)
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_fails_is_called_three_times_more() {
    for failures in 0..=3 {
        let (results, attempts, _) = failing_commit(failures, || {}).await;
        assert_eq!(told(&results).0, Outcome::Committed);
        assert_eq!((results[0].unresolved.len(), attempts), (0, failures + 1));
    }
    let (results, attempts, _) = failing_commit(3, || panic!("not now")).await;
    assert_eq!((results[0].unresolved.len(), attempts), (0, 4));
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_never_succeeds_is_unresolved_and_the_others_commit() {
    for fail in [|| {}, || panic!("never")] {
        let (results, attempts, calls) = failing_commit(u32::MAX, fail).await;
        assert_eq!(told(&results), (Outcome::Committed, None, None));
        let unresolved: Vec<_> = results[0].unresolved.iter().map(|it| it.as_str()).collect();
        assert_eq!((unresolved, attempts), (vec!["A"], 4));
        assert_eq!(calls.iter().filter(|call| *call == "B commit t").count(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_hangs_is_unresolved_and_the_others_commit() {
    let (results, calls) = beside_b(|a| a.commit_async(|_| std::future::pending())).await;
    assert_eq!(told(&results).0, Outcome::Committed);
    assert_eq!(results[0].unresolved.len(), 1);
    assert_eq!(calls.iter().filter(|call| *call == "B commit t").count(), 1);
    assert!(!calls.iter().any(|call| call.contains("abort")), "{calls:?}");
}

// ---- Closures that block -----------------------------------------------------------------------

/// A gate for threads to wait at.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let open = self.0.0.lock().unwrap();
        drop(self.0.1.wait_while(open, |open| !*open).unwrap());
    }
}

#[tokio::test]
async fn a_blocking_closure_does_not_delay_the_others() {
    let gate = Gate::default();
    let (passed, opened) = (gate.clone(), gate);
    let blocked = Service::new("A", 1).prepare(move |_, _| {
        passed.pass();
        Ok(true)
    });
    // If A delayed B, nobody would open the gate.
    let opens = Service::new("B", 1).commit(move |_| {
        opened.open();
        Ok(())
    });
    let all = [transaction("waits", &["A"]), transaction("opens", &["B"])];
    let results = run([blocked, opens], all).await.unwrap();
    assert!(results.iter().all(|it| it.outcome == Outcome::Committed));
}

#[tokio::test]
async fn a_blocking_prepare_that_times_out_keeps_its_slot_and_is_aborted_when_it_ends() {
    let (gate, log) = (Gate::default(), Log::default());
    let (passed, opened) = (gate.clone(), gate);
    let (prepares, aborts) = (log.clone(), log.clone());
    let running = Arc::new(AtomicU32::new(0));
    let most = Arc::new(AtomicU32::new(0));
    let (of_prepare, of_abort, of_most) =
        (Arc::clone(&running), Arc::clone(&running), Arc::clone(&most));
    let a = Service::new("A", 1)
        .max_wait(Duration::from_secs(60))
        .prepare(move |id, _| {
            of_most.fetch_max(of_prepare.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            prepares.add("A", "prepare", id);
            if id == "slow" {
                passed.pass();
            }
            prepares.add("A", "prepared", id);
            of_prepare.fetch_sub(1, Ordering::SeqCst);
            Ok(true)
        })
        .abort(move |id| {
            assert_eq!(of_abort.load(Ordering::SeqCst), 0, "abort beside a prepare");
            aborts.add("A", "abort", id);
            Ok(())
        });
    let slow = transaction("slow", &["A"]).timeout(ms(50));
    // Opens the gate once the slow one has been given up.
    let (counted, until) = (log.clone(), Arc::new(AtomicU32::new(0)));
    let b = Service::new("B", 1).prepare_async(move |_, _| {
        let (opened, counted, until) = (opened.clone(), counted.clone(), Arc::clone(&until));
        async move {
            sleep(ms(400)).await;
            until.store(1, Ordering::SeqCst);
            assert_eq!(counted.count("A prepare next"), 0, "the slot was given away");
            opened.open();
            Ok(true)
        }
    });
    let all = [slow, transaction("next", &["A"]), transaction("opens", &["B"])];
    let results = run([a, b], all).await.unwrap();
    let statuses: Vec<_> = results.iter().map(|it| it.outcome).collect();
    assert_eq!(statuses, [Outcome::Aborted, Outcome::Committed, Outcome::Committed]);
    assert_eq!(most.load(Ordering::SeqCst), 1);
    let entries = log.0.lock().unwrap().clone();
    let expected =
        ["A prepare slow", "A prepared slow", "A abort slow", "A prepare next", "A prepared next"];
    assert_eq!(entries, expected);
}

// ---- Participants written by hand --------------------------------------------------------------

#[derive(Clone, Default)]
struct ByHand {
    log: Log,
    held: Arc<Mutex<BTreeMap<String, InDoubt>>>,
}

impl Participant for ByHand {
    async fn prepare(&self, call: Prepare) -> Result<Verdict, Box<dyn Error + Send + Sync>> {
        #[derive(serde::Deserialize)]
        struct Wish {
            wish: String,
        }
        self.log.add("H", "prepare", call.id());
        let Wish { wish } = call.data()?;
        assert_eq!(serde_json::from_str::<Value>(call.json())?["wish"], json!(wish));
        match wish.as_str() {
            "look" => Ok(Verdict::ReadOnly),
            "steal" => Ok(Verdict::Refused(Some("not yours".into()))),
            "explode" => Ok(Verdict::Failed("boom".into())),
            _ => {
                let held = InDoubt {
                    key: call.key.clone(),
                    branch: call.branch.clone(),
                    request_hash: call.request_hash,
                    deadline: call.deadline,
                };
                self.held.lock().unwrap().insert(call.id().to_owned(), held);
                Ok(Verdict::Prepared)
            }
        }
    }

    async fn commit(&self, call: Finish) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.log.add("H", "commit", call.id());
        let held = self.held.lock().unwrap().remove(call.id()).expect("committed once");
        assert_eq!(held.branch, call.branch);
        Ok(())
    }

    async fn abort(&self, call: Finish) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.log.add("H", "abort", call.id());
        self.held.lock().unwrap().remove(call.id());
        Ok(())
    }
}

impl DurableParticipant for ByHand {
    async fn in_doubt(
        &self,
        of: Option<TransactionKey>,
    ) -> Result<Vec<InDoubt>, Box<dyn Error + Send + Sync>> {
        let held = self.held.lock().unwrap();
        let is_meant = |it: &&InDoubt| of.as_ref().is_none_or(|key| it.key == *key);
        Ok(held.values().filter(is_meant).cloned().collect())
    }
}

#[tokio::test]
async fn a_participant_written_by_hand_gets_the_outcomes_of_its_verdicts() {
    let by_hand = ByHand::default();
    let log = Log::default();
    let services = [Service::from_durable("H", 2, by_hand.clone()), log.service("A", 9)];
    let wish = |id: &str, wish| Transaction::new(id, ["H", "A"], json!({ "wish": wish }));
    let all = [wish("1", "buy"), wish("2", "look"), wish("3", "steal"), wish("4", "explode")];
    let results = run(services, all).await.unwrap();

    let statuses: Vec<_> = results.iter().map(|it| it.outcome.as_str()).collect();
    assert_eq!(statuses, ["COMMITTED", "COMMITTED", "ABORTED", "ABORTED"]);
    assert_eq!(results[2].reason.as_ref().unwrap().message.as_deref(), Some("not yours"));
    assert_eq!(results[3].reason.as_ref().unwrap().message.as_deref(), Some("boom"));
    let expected = ["H abort 4", "H commit 1", "H prepare 1", "H prepare 2", "H prepare 3"];
    assert_eq!(by_hand.log.sorted()[..5], expected);
    assert!(by_hand.held.lock().unwrap().is_empty());
}

// ---- With a journal ----------------------------------------------------------------------------

/// A service whose store outlives every run of a test, and whose commits hang on request.
#[derive(Clone, Default)]
struct DurableService {
    log: Log,
    held: Arc<Mutex<Vec<InDoubt>>>,
    hangs: Arc<AtomicBool>,
}

impl DurableService {
    fn service(&self, name: &str) -> Service {
        Service::from_durable(name, 8, self.clone())
    }
}

impl Participant for DurableService {
    async fn prepare(&self, call: Prepare) -> Result<Verdict, Box<dyn Error + Send + Sync>> {
        self.log.add("L", "prepare", call.id());
        let (key, branch) = (call.key.clone(), call.branch.clone());
        let (request_hash, deadline) = (call.request_hash, call.deadline);
        self.held.lock().unwrap().push(InDoubt { key, request_hash, branch, deadline });
        Ok(Verdict::Prepared)
    }

    async fn commit(&self, call: Finish) -> Result<(), Box<dyn Error + Send + Sync>> {
        if self.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        self.log.add("L", "commit", call.id());
        self.held.lock().unwrap().retain(|it| it.branch != call.branch);
        Ok(())
    }

    async fn abort(&self, call: Finish) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.log.add("L", "abort", call.id());
        self.held.lock().unwrap().retain(|it| it.branch != call.branch);
        Ok(())
    }
}

impl DurableParticipant for DurableService {
    async fn in_doubt(
        &self,
        of: Option<TransactionKey>,
    ) -> Result<Vec<InDoubt>, Box<dyn Error + Send + Sync>> {
        let held = self.held.lock().unwrap().clone();
        Ok(held.into_iter().filter(|it| of.as_ref().is_none_or(|key| it.key == *key)).collect())
    }
}

/// Runs until `is_enough`, and then stops as if the process ended there.
async fn run_until(
    services: impl IntoIterator<Item = Service>,
    journal: &Path,
    transactions: Vec<Transaction>,
    is_enough: impl Fn() -> bool,
) {
    let run = Embedded::new(services).unwrap().journal(journal).run(transactions);
    let enough = async {
        while !is_enough() {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        ended = run => panic!("it has ended before: {ended:?}"),
        () = enough => {}
    }
}

/// Runs transaction `t0` until it is decided and `Q` has committed it, while the commit of `L` hangs.
async fn run_until_only_one_has_committed(lasting: &DurableService, quick: &Log, journal: &Path) {
    lasting.hangs.store(true, Ordering::Relaxed);
    let services = [lasting.service("L"), quick.service("Q", 8)];
    let has_committed = || quick.count("Q commit t0") > 0;
    run_until(services, journal, transactions(1, &["L", "Q"]), has_committed).await;
}

async fn run_with(
    services: impl IntoIterator<Item = Service>,
    journal: &Path,
    transactions: Vec<Transaction>,
) -> Vec<TransactionResult> {
    Embedded::new(services).unwrap().journal(journal).run(transactions).await.unwrap()
}

#[tokio::test]
async fn a_transaction_decided_when_a_run_ends_is_finished_by_the_next_run() {
    let directory = tempfile::tempdir().unwrap();
    let journal = directory.path().join("journal");
    let (lasting, quick) = (DurableService::default(), Log::default());
    let services = || [lasting.service("L"), quick.service("Q", 8)];
    run_until_only_one_has_committed(&lasting, &quick, &journal).await;
    assert_eq!(lasting.log.sorted(), ["L prepare t0"]);

    lasting.hangs.store(false, Ordering::Relaxed);
    assert_eq!(run_with(services(), &journal, vec![]).await, []);
    assert_eq!(lasting.log.sorted(), ["L commit t0", "L prepare t0"]);
    assert_eq!(lasting.held.lock().unwrap().len(), 0);

    let results = run_with(services(), &journal, transactions(1, &["L", "Q"])).await;
    assert_eq!(told(&results), (Outcome::Committed, None, None));
    assert_eq!(lasting.log.sorted().len(), 2, "nobody is called for what is finished");
}

#[tokio::test]
async fn a_transaction_undecided_when_a_run_ends_is_not_prepared_again_where_it_is_held() {
    let directory = tempfile::tempdir().unwrap();
    let journal = directory.path().join("journal");
    let (lasting, quick) = (DurableService::default(), Log::default());
    let hung = || {
        let hangs = |_, _| std::future::pending();
        [lasting.service("L"), quick.service("Q", 8).prepare_async(hangs)]
    };
    let is_prepared = || lasting.log.count("L prepare t0") > 0;
    run_until(hung(), &journal, transactions(1, &["L", "Q"]), is_prepared).await;

    let services = [lasting.service("L"), quick.service("Q", 8)];
    let results = run_with(services, &journal, transactions(1, &["L", "Q"])).await;
    assert_eq!(told(&results), (Outcome::Committed, None, None));
    assert_eq!(lasting.log.sorted(), ["L commit t0", "L prepare t0"]);
    assert_eq!(quick.sorted(), ["Q commit t0", "Q prepare t0"]);
}

/// A service with a store that takes its time.
#[derive(Clone, Default)]
struct SlowService(DurableService);

impl Participant for SlowService {
    async fn prepare(&self, call: Prepare) -> Result<Verdict, Box<dyn Error + Send + Sync>> {
        self.0.log.add("L", "begin", call.id());
        sleep(ms(50)).await;
        self.0.prepare(call).await
    }

    async fn commit(&self, call: Finish) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.0.commit(call).await
    }

    async fn abort(&self, call: Finish) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.0.abort(call).await
    }
}

impl DurableParticipant for SlowService {
    async fn in_doubt(
        &self,
        of: Option<TransactionKey>,
    ) -> Result<Vec<InDoubt>, Box<dyn Error + Send + Sync>> {
        if of.is_some() {
            sleep(ms(50)).await;
        }
        self.0.in_doubt(of).await
    }
}

/// The run used to end while the store was read before the abort.
#[tokio::test]
async fn what_is_prepared_after_its_transaction_has_aborted_is_undone_before_the_run_ends() {
    let directory = tempfile::tempdir().unwrap();
    let journal = directory.path().join("journal");
    let first = Log::default();
    let log = first.clone();
    let hangs = move |id: String, _| {
        log.add("L", "prepare", &id);
        std::future::pending()
    };
    let hung = [Service::new("L", 8).prepare_async(hangs), Service::new("Q", 8)];
    let has_begun = || first.count("L prepare t0") > 0;
    run_until(hung, &journal, transactions(1, &["L", "Q"]), has_begun).await;

    let slow = SlowService::default();
    let log = slow.0.log.clone();
    let refuses_meanwhile = move |_, _| {
        let log = log.clone();
        async move {
            while log.count("L begin t0") == 0 {
                tokio::task::yield_now().await;
            }
            Ok(false)
        }
    };
    let services = [
        Service::from_durable("L", 8, slow.clone()),
        Service::new("Q", 8).prepare_async(refuses_meanwhile),
    ];
    let results = run_with(services, &journal, transactions(1, &["L", "Q"])).await;
    assert_eq!(told(&results).1, Some(ReasonCode::Refused));
    assert_eq!(slow.0.log.sorted(), ["L abort t0", "L begin t0", "L prepare t0"]);
    assert_eq!(slow.0.held.lock().unwrap().len(), 0);
}

#[tokio::test]
async fn a_service_is_asked_what_it_holds_though_it_may_take_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let journal = directory.path().join("journal");
    let (lasting, quick) = (DurableService::default(), Log::default());
    let services = || [lasting.service("L"), quick.service("Q", 8)];
    run_until_only_one_has_committed(&lasting, &quick, &journal).await;

    lasting.hangs.store(false, Ordering::Relaxed);
    let embedded = Embedded::new(services()).unwrap().journal(&journal);
    let running = embedded.finish_timeout(Duration::MAX).run(vec![]);
    let ended = tokio::time::timeout(Duration::from_secs(10), running).await;
    assert_eq!(ended.expect("it is asked").unwrap(), []);
    assert_eq!(lasting.log.sorted(), ["L commit t0", "L prepare t0"]);
}

#[tokio::test]
async fn closures_get_outcomes_again_that_were_decided_and_not_finished() {
    let directory = tempfile::tempdir().unwrap();
    let journal = directory.path().join("journal");
    let (log, quick) = (Log::default(), Log::default());
    let hung = || {
        let hangs = |_| std::future::pending();
        [log.service("C", 8).commit_async(hangs), quick.service("Q", 8)]
    };
    let is_decided = || quick.count("Q commit t0") > 0;
    run_until(hung(), &journal, transactions(1, &["C", "Q"]), is_decided).await;

    // It has forgotten it, and answers that.
    let forgetful = |_| async { Err("what was that?".into()) };
    let services = [log.service("C", 8).commit_async(forgetful), quick.service("Q", 8)];
    let results = run_with(services, &journal, transactions(1, &["C", "Q"])).await;
    assert_eq!(results[0].outcome, Outcome::Committed);
    let unresolved = results[0].unresolved.iter().map(|it| it.as_str()).collect::<Vec<_>>();
    assert_eq!(unresolved, ["C"]);

    let n_calls = quick.sorted().len();
    let services = [log.service("C", 8), quick.service("Q", 8)];
    let results = run_with(services, &journal, transactions(1, &["C", "Q"])).await;
    assert_eq!((results[0].outcome, results[0].unresolved.len()), (Outcome::Committed, 0));
    assert_eq!(log.sorted(), ["C commit t0", "C prepare t0"]);
    assert_eq!(quick.sorted().len(), n_calls, "what has committed is not told again");
}

#[tokio::test]
async fn a_finished_transaction_gets_its_old_result_and_other_content_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let journal = directory.path().join("journal");
    let log = Log::default();
    let services = || {
        let refuses = |id: String, _| async move { Ok(id != "t1") };
        [log.service("A", 8), Service::new("B", 8).prepare_async(refuses)]
    };
    let first = run_with(services(), &journal, transactions(3, &["A", "B"])).await;
    let n_calls = log.sorted().len();
    let second = run_with(services(), &journal, transactions(3, &["A", "B"])).await;
    assert_eq!(first, second);
    assert_eq!(second[1].reason.as_ref().unwrap().code, ReasonCode::Refused);
    let other = run_with(services(), &journal, transactions(1, &["A"])).await;
    assert_eq!(told(&other).1, Some(ReasonCode::IdReused));
    assert_eq!(log.sorted().len(), n_calls);

    // A decision in the same millisecond isn't older than a retention of nothing.
    sleep(ms(2)).await;
    let forgetful = Embedded::new(services()).unwrap().journal(&journal);
    let third = forgetful.journal_retention(Duration::ZERO).run(transactions(1, &["A"])).await;
    assert_eq!(told(&third.unwrap()).0, Outcome::Committed);
    assert_eq!(log.sorted().len(), n_calls + 2);
}

#[tokio::test]
async fn an_unusable_journal_is_an_error_and_no_service_is_called() {
    let directory = tempfile::tempdir().unwrap();
    let log = Log::default();
    let run_at = async |path: &str| {
        let embedded = Embedded::new([log.service("A", 1)]).unwrap();
        embedded.journal(directory.path().join(path)).run(transactions(1, &["A"])).await
    };
    std::fs::write(directory.path().join("letter"), "Dear Sir or Madam").unwrap();
    let letter = run_at("letter").await.unwrap_err();
    assert!(matches!(letter, RunError::Journal(JournalError::NoJournal { .. })), "{letter:?}");
    let nowhere = run_at("no/where").await.unwrap_err();
    assert!(matches!(nowhere, RunError::Journal(JournalError::Open { .. })), "{nowhere:?}");
    assert_eq!(log.sorted(), [""; 0]);
}

#[tokio::test]
async fn a_journal_belongs_to_one_run_at_a_time() {
    let directory = tempfile::tempdir().unwrap();
    let journal = directory.path().join("journal");
    let log = Log::default();
    let logged = log.clone();
    let hangs = move |id: String, _| {
        logged.add("A", "hangs", &id);
        std::future::pending()
    };
    let first = Embedded::new([log.service("A", 1).prepare_async(hangs)]).unwrap();
    let mut first = Box::pin(first.journal(&journal).run(transactions(1, &["A"])));
    while log.count("A hangs t0") == 0 {
        tokio::select! {
            ended = &mut first => panic!("it has ended: {ended:?}"),
            () = tokio::task::yield_now() => {}
        }
    }
    let second = Embedded::new([log.service("A", 1)]).unwrap().journal(&journal);
    let second = second.run(transactions(1, &["A"])).await;
    let error = second.unwrap_err();
    assert!(matches!(error, RunError::Journal(JournalError::InUse { .. })), "{error:?}");
    drop(first);
    let results = run_with([log.service("A", 1)], &journal, transactions(1, &["A"])).await;
    assert_eq!(told(&results).0, Outcome::Committed);
}

/// The tests of the command are killed by it.
#[test]
fn fault_points_of_the_environment_do_not_kill_a_program_with_a_journal() {
    let this = std::env::current_exe().unwrap();
    let mut again = std::process::Command::new(this);
    again.args(["--exact", "a_journal_belongs_to_one_run_at_a_time"]).env("DTC_FAULT_POINT", "1");
    let ended = again.output().unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    assert!(ended.status.success() && said.contains("1 passed"), "{}: {said}", ended.status);
}

#[tokio::test]
async fn data_of_any_size_and_depth_survives_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let journal = directory.path().join("journal");
    let mut deep = json!("x".repeat(1 << 20));
    for _ in 0..120 {
        deep = json!([deep]);
    }
    let all = || vec![Transaction::new("t0", ["L", "Q"], json!({"deep": deep}))];
    let (lasting, quick) = (DurableService::default(), Log::default());
    let seen = Arc::new(Mutex::new(json!(null)));
    let hangs = |_, _| std::future::pending();
    let hung = [lasting.service("L"), quick.service("Q", 8).prepare_async(hangs)];
    run_until(hung, &journal, all(), || lasting.log.count("L prepare t0") > 0).await;

    let saw = Arc::clone(&seen);
    let sees = move |_, data| {
        *saw.lock().unwrap() = data;
        async { Ok(true) }
    };
    let services = [lasting.service("L"), quick.service("Q", 8).prepare_async(sees)];
    assert_eq!(run_with(services, &journal, vec![]).await, []);
    assert_eq!(seen.lock().unwrap()["deep"], deep);
    assert_eq!(lasting.log.sorted(), ["L commit t0", "L prepare t0"]);
}

// ---- Whatever happens --------------------------------------------------------------------------

#[derive(Clone, Copy, Debug, PartialEq)]
enum Ending {
    Yes,
    No,
    Error,
    Panic,
    Hang,
}

#[derive(Clone, Debug)]
struct Scenario {
    caps: Vec<u32>,
    in_flight: usize,
    /// The services that each involves, and how each prepare ends, after how long.
    transactions: Vec<Vec<(usize, Ending, u64)>>,
}

const NAMES: [&str; 4] = ["A", "B", "C", "D"];

fn scenario() -> impl Strategy<Value = Scenario> {
    let ending = prop::sample::select(vec![
        Ending::Yes,
        Ending::Yes,
        Ending::Yes,
        Ending::Yes,
        Ending::Yes,
        Ending::Yes,
        Ending::Yes,
        Ending::No,
        Ending::Error,
        Ending::Panic,
        Ending::Hang,
    ]);
    let call = (ending, 0_u64..20);
    let services = prop::collection::btree_map(0..NAMES.len(), call, 1..=NAMES.len());
    let transaction = services.prop_map(|services| {
        services.into_iter().map(|(service, (ending, takes))| (service, ending, takes)).collect()
    });
    let transactions = prop::collection::vec(transaction, 1..60);
    let caps = prop::collection::vec(1_u32..4, NAMES.len());
    (caps, 1_usize..70, transactions).prop_map(|(caps, in_flight, transactions)| Scenario {
        caps,
        in_flight,
        transactions,
    })
}

/// The calls of one service, and what it holds.
#[derive(Default)]
struct Books {
    slots: u32,
    most_slots: u32,
    prepared: BTreeSet<String>,
    failed: BTreeSet<String>,
    committed: BTreeSet<String>,
    aborted: BTreeSet<String>,
}

fn keeps_books(number: usize, scenario: &Arc<Scenario>, books: &Arc<Mutex<Books>>) -> Service {
    let scenario = Arc::clone(scenario);
    let cap = scenario.caps[number];
    let (prepare, commit, abort) = (Arc::clone(books), Arc::clone(books), Arc::clone(books));
    Service::new(NAMES[number], cap)
        .max_wait(Duration::from_secs(3600))
        .prepare_async(move |id, _| {
            let nth: usize = id[1..].parse().unwrap();
            let calls = &scenario.transactions[nth];
            let &(_, ending, takes) = calls.iter().find(|(of, ..)| *of == number).unwrap();
            let books = Arc::clone(&prepare);
            {
                let mut books = books.lock().unwrap();
                books.slots += 1;
                books.most_slots = books.most_slots.max(books.slots);
                let is_new = books.failed.insert(id.clone());
                assert!(is_new, "prepared twice");
            }
            async move {
                if takes > 0 {
                    sleep(ms(takes)).await;
                }
                match ending {
                    Ending::Hang => std::future::pending().await,
                    Ending::Panic => std::panic::resume_unwind(Box::new("as told")),
                    Ending::Error => return Err("as told".into()),
                    Ending::Yes | Ending::No => {}
                }
                let mut books = books.lock().unwrap();
                books.failed.remove(&id);
                if ending == Ending::Yes {
                    books.prepared.insert(id);
                } else {
                    books.slots -= 1;
                }
                Ok(ending == Ending::Yes)
            }
        })
        .commit_async(move |id| {
            let mut books = commit.lock().unwrap();
            assert!(books.prepared.remove(&id), "commits what it did not prepare");
            books.slots -= 1;
            books.committed.insert(id);
            async { Ok(()) }
        })
        .abort_async(move |id| {
            let mut books = abort.lock().unwrap();
            assert!(books.prepared.remove(&id) || books.failed.remove(&id), "aborts nothing");
            books.slots -= 1;
            books.aborted.insert(id);
            async { Ok(()) }
        })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn all_services_keep_a_transaction_or_none_does(scenario in scenario()) {
        let scenario = Arc::new(scenario);
        let books: Vec<_> = NAMES.iter().map(|_| Arc::<Mutex<Books>>::default()).collect();
        let services: Vec<_> = (0..NAMES.len())
            .map(|number| keeps_books(number, &scenario, &books[number]))
            .collect();
        let all = scenario.transactions.iter().enumerate().map(|(nth, calls)| {
            let services = calls.iter().map(|(service, ..)| NAMES[*service]);
            Transaction::new(format!("t{nth}"), services, json!({}))
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        let coordinator = Embedded::new(services)
            .unwrap()
            .max_in_flight(scenario.in_flight)
            // Longer than all that hang together could delay one another.
            .prepare_timeout(Duration::from_secs(100));
        let results = runtime.block_on(coordinator.run(all)).unwrap();

        prop_assert_eq!(results.len(), scenario.transactions.len());
        for (result, calls) in results.iter().zip(&scenario.transactions) {
            prop_assert!(result.unresolved.is_empty());
            let all_agree = calls.iter().all(|(_, ending, _)| *ending == Ending::Yes);
            let committed = result.outcome == Outcome::Committed;
            // A transaction that waits for one that hangs may reach its own deadline.
            let nobody_hangs =
                scenario.transactions.iter().flatten().all(|(_, it, _)| *it != Ending::Hang);
            prop_assert!(!committed || all_agree);
            prop_assert!(committed || !all_agree || !nobody_hangs, "{result:?}");
            for (service, ..) in calls {
                let books = books[*service].lock().unwrap();
                prop_assert_eq!(books.committed.contains(result.id.as_str()), committed);
                prop_assert!(!(books.aborted.contains(result.id.as_str()) && committed));
            }
        }
        for (number, books) in books.iter().enumerate() {
            let books = books.lock().unwrap();
            prop_assert!(books.most_slots <= scenario.caps[number], "the cap is exceeded");
            prop_assert_eq!(books.slots, 0);
            prop_assert!(books.prepared.is_empty() && books.failed.is_empty());
        }
    }
}
