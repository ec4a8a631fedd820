//! `dtc bench`, as far as it can be tried without measuring anything: speed is no test's business.

use std::fs;

use serde_json::Value;

use crate::{
    broker::place,
    processes::{LIMIT, Process, World},
};

fn bench(world: &World, flags: &[&str]) -> Process {
    Process::start("bench", world.dtc_at_broker(&["bench", "--seconds", "1"]).args(flags))
}

#[test]
fn everything_that_is_measured_is_told_and_drawn() {
    let world = World::at(place());
    let loads = ["--rounds", "1", "--in-flight", "1,8", "--backlog", "200", "--times"];
    let bench = bench(&world, &[&loads[..], &["--json", "--plot", "plot.svg"]].concat());
    let told: Value = serde_json::from_str(&bench.succeeded(LIMIT).join("\n")).unwrap();

    for path in [
        "/yardstick/echo_per_s/median",
        "/yardstick/echo_alone_p50_ms/median",
        "/yardstick/raw_messages_per_s/median",
        "/load/0/tx_per_s/median",
        "/load/1/tx_per_echo/median",
        "/load/1/p99_ms/median",
        "/load/1/cpu_us_per_tx/workers/median",
        "/load/1/resident_mib/services/median",
        "/backlog/0/tx_per_s/median",
        "/backlog/0/worker_resident_mib/max/median",
        "/times/startup_ms",
        "/times/takeover_ms",
    ] {
        let value = told.pointer(path).and_then(Value::as_f64);
        assert!(value.is_some_and(|value| value > 0.0), "{path}: {told:#}");
    }
    // Alone, a transaction over two services is a request, two each of prepares, votes, finishes
    // and dones, a decision and a result.
    let messages = told["load"][0]["messages_per_tx"]["median"].as_f64().unwrap();
    assert!((10.5..12.5).contains(&messages), "{messages}");
    assert!(told["broker"]["version"].is_string(), "{told:#}");
    let plot = fs::read_to_string(world.path("plot.svg")).unwrap();
    assert_eq!(plot.matches("<circle").count(), 6, "{plot}");
}

#[test]
fn one_that_is_interrupted_leaves_no_process_and_nothing_at_the_broker() {
    let world = World::at(place());
    let mut bench = bench(&world, &["--in-flight", "4", "--rounds", "100"]);
    bench.wait_for_line("4 in flight", LIMIT);
    bench.terminate();
    bench.exited(130, LIMIT);
    assert!(!bench.stderr.text().contains("still there"), "{}", bench.stderr.text());
}
