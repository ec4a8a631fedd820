//! A commit that its service can't apply: what is said of it, and who goes on with it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    broker::place,
    processes::{LIMIT, Process},
    stand::{Producer, READY, Site},
};

/// What the worker says when it is over.
const SETTLED: &str = "a parked commit is settled";

/// A worker, and a service called `stock` whose first transaction is parked.
struct Parked {
    producer: Producer,
    worker: Process,
    stock: Process,
    site: Site,
}

impl Parked {
    /// `commit`: how commits of `stock` behave.
    fn new(commit: Value) -> Self {
        let service = json!([{"name": "stock", "max_concurrency": 2, "commit": commit}]);
        let site = Site::of(place(), service);
        let (stock, worker, producer) = (site.service("stock"), site.worker(&[]), site.producer());
        let answer = producer.answered(&producer.submit(&["stock"]), LIMIT);
        println!("{answer}");
        assert_eq!(
            (&answer["status"], &answer["unresolved"]),
            (&json!("COMMITTED"), &json!(["stock"]))
        );
        Self { producer, worker, stock, site }
    }

    /// One more instance, whose code has no fault.
    fn mended(&self) -> Process {
        let services = json!([{"name": "stock", "max_concurrency": 2}]);
        let services = self.site.world.file("mended.json", &services);
        let mut command = self.site.world.dtc(&["service", "--name", "stock"]);
        command.arg("--services").arg(services).arg("--state").arg(self.site.world.path("state"));
        command.args(["--instance", "mended", "--inquire-after", "200ms"]);
        let mended = Process::start("mended", &mut command);
        mended.wait_for_line(READY, LIMIT);
        mended
    }
}

/// The worker said that a person is needed, and nobody said a word when it was over.
#[test]
fn a_parked_commit_is_said_to_be_tried_on_and_to_be_settled() {
    // The first time, three more for the worker, and one that nobody waits for.
    let parked = Parked::new(json!({"fail_first": 5}));
    let said = parked.worker.wait_for_line("ERROR", LIMIT);
    println!("{said}");
    assert!(said.contains("commit parked") && said.contains("go on trying"), "{said}");
    assert!(said.contains("simulated error") && !said.contains("operator"), "{said}");
    println!("{}", parked.stock.wait_for_line("an outcome is parked", LIMIT));
    println!("{}", parked.worker.wait_for_line(SETTLED, LIMIT));
    println!("{}", parked.stock.wait_for_line("a parked outcome is applied", LIMIT));
    parked.site.is_committed_once("t-0", &["stock"]);
    drop(parked.producer);
}

/// It waited for the whole drain, and for nothing.
#[test]
fn an_instance_that_stops_leaves_what_is_parked_to_the_next() {
    const LONG_BEFORE_ITS_DRAIN_ENDS: Duration = Duration::from_secs(15);
    let mut parked = Parked::new(json!({"fail_for": ["t-0"]}));
    parked.stock.wait_for_line("an outcome is parked", LIMIT);
    parked.stock.terminate();
    parked.stock.exited(0, LONG_BEFORE_ITS_DRAIN_ENDS);
    let said = parked.stock.stderr.wait_for("stopping though", LIMIT).expect("what it leaves");
    println!("{said}");
    assert!(said.contains("t-0@"), "{said}");
    let mended = parked.mended();
    parked.site.is_committed_once("t-0", &["stock"]);
    println!("{}", parked.worker.wait_for_line(SETTLED, LIMIT));
    drop((parked, mended));
}

/// The instance that had the parked command called its own code for ever, though another one had
/// committed: it was never settled, and its slot never free.
#[test]
fn what_a_broken_instance_holds_is_applied_by_a_mended_one_and_settled() {
    let parked = Parked::new(json!({"fail_for": ["t-0"]}));
    parked.stock.wait_for_line("an outcome is parked", LIMIT);
    let mended = parked.mended();
    parked.site.is_committed_once("t-0", &["stock"]);
    println!("{}", parked.worker.wait_for_line(SETTLED, LIMIT));
    println!("{}", parked.stock.wait_for_line("a parked outcome is applied", LIMIT));
    drop((parked, mended));
}
