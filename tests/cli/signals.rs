//! Ctrl-C and SIGTERM: nothing new is begun; what is in progress finishes and is printed.

use crate::world::{LiveProcess, World, transaction};
use serde_json::{Value, json};

const SIGNALS: [&str; 4] = ["INT", "TERM", "QUIT", "HUP"];

/// The message at the first signal.
const HEARD: &str = "interrupted: what has begun is finished; once more to stop at once\n";

/// More transactions than a test has time for, over a slow service.
fn endless() -> World {
    let services = json!([
        {"name": "slow", "max_concurrency": 2, "prepare": {"latency_ms": 50}},
    ]);
    let transactions: Vec<_> =
        (0..20_000).map(|number| transaction(&format!("TX{number}"), &["slow"])).collect();
    World::with(&services, &json!(transactions))
}

#[test]
fn a_signal_ends_the_run_with_valid_json_of_what_is_known() {
    for signal in SIGNALS {
        let world = endless();
        let mut talk = LiveProcess::with(world.run().args(["--report", "report.json"]));
        let heard = talk.hear() + &talk.hear();
        talk.signal(signal);
        let ended = talk.end().exited(130);
        let results: Vec<Value> = serde_json::from_str(&(heard + &ended.stdout)).unwrap();
        assert!((1..20_000).contains(&results.len()), "{signal}: {} results", results.len());
        for result in &results {
            assert_eq!(result["status"], "COMMITTED", "{signal}: {result}");
        }
        // Everything that was prepared was also finished and printed: nothing was left half done.
        let report = world.report();
        let slow = &report["services"]["slow"];
        assert_eq!(slow["prepare_calls"], results.len(), "{signal}: {report}");
        assert_eq!(slow["commit_calls"], results.len(), "{signal}: {report}");
        assert_eq!(report["committed"], results.len(), "{signal}: {report}");
    }
}

#[test]
fn a_signal_ends_the_run_even_after_the_last_transaction_was_read() {
    let services = json!([
        {"name": "slow", "max_concurrency": 1, "prepare": {"latency_ms": 50}},
    ]);
    let transactions: Vec<_> =
        (0..2000).map(|number| transaction(&format!("TX{number}"), &["slow"])).collect();
    let world = World::with(&services, &json!(transactions));
    let mut talk = LiveProcess::with(world.run().args(["--output", "ndjson"]));
    assert_ne!(talk.hear(), "");
    talk.signal("INT");
    let ended = talk.end().exited(130);
    assert!(ended.lines().len() < 1000, "{} more were begun", ended.lines().len());
}

#[test]
fn a_second_signal_ends_the_run_at_once() {
    for (first, second) in [("INT", "INT"), ("TERM", "INT")] {
        let world = World::with(
            &json!([{"name": "hangs", "max_concurrency": 1, "prepare": {"hang_rate": 1}},
                    {"name": "works", "max_concurrency": 1}]),
            &json!([transaction("quick", &["works"]), transaction("stuck", &["hangs"])]),
        );
        let mut talk =
            LiveProcess::with(world.run().args(["--timeout-ms", "86400000", "--output", "ndjson"]));
        assert_eq!(talk.hear(), "{\"id\":\"quick\",\"status\":\"COMMITTED\"}\n");
        talk.signal(first);
        assert_eq!(talk.hear_error(), HEARD);
        talk.signal(second);
        assert_eq!(talk.end().exited(130).stdout, "");
    }
}

#[test]
fn a_signal_without_meaning_changes_nothing() {
    let world = World::new(&json!([{"name": "a", "max_concurrency": 1}]));
    let mut talk = LiveProcess::with(&mut world.run_over("-"));
    for (number, signal) in ["USR1", "USR2", "ALRM"].into_iter().enumerate() {
        talk.say(&format!("{}\n", transaction(&format!("TX{number}"), &["a"])));
        assert_eq!(talk.hear(), format!("{{\"id\":\"TX{number}\",\"status\":\"COMMITTED\"}}\n"));
        talk.signal(signal);
    }
    talk.say(&format!("{}\n", transaction("last", &["a"])));
    assert_eq!(talk.hear(), "{\"id\":\"last\",\"status\":\"COMMITTED\"}\n");
    talk.close_stdin();
    talk.end().exited(0);
}

#[test]
fn a_signal_ends_a_run_that_waits_for_stdin() {
    for signal in SIGNALS {
        let world = World::new(&json!([{"name": "a", "max_concurrency": 1}]));
        let mut talk = LiveProcess::with(&mut world.run_over("-"));
        talk.say(&format!("{}\n", transaction("TX1", &["a"])));
        assert_eq!(talk.hear(), "{\"id\":\"TX1\",\"status\":\"COMMITTED\"}\n");
        talk.signal(signal);
        let ended = talk.end().exited(130);
        assert_eq!(ended.stdout, "");
        let summary = ended.stderr.strip_prefix(HEARD).unwrap();
        assert!(summary.starts_with("1 committed, 0 aborted"), "{summary}");
    }
}

#[test]
fn an_array_is_closed_when_a_signal_ends_a_run_that_waits_for_stdin() {
    let world = World::new(&json!([{"name": "a", "max_concurrency": 1}]));
    let mut talk = LiveProcess::with(world.run_over("-").args(["--output", "json"]));
    talk.say(&format!("{}\n", transaction("TX1", &["a"])));
    let heard = talk.hear() + &talk.hear_bytes("  {\"id\":\"TX1\",\"status\":\"COMMITTED\"}".len());
    talk.signal("INT");
    let ended = talk.end().exited(130);
    let results: Value = serde_json::from_str(&(heard + &ended.stdout)).unwrap();
    assert_eq!(results, json!([{"id": "TX1", "status": "COMMITTED"}]));
}
