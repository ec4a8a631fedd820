//! The forms in which results, report and summary are given.

use crate::world::{World, assert_golden, dtc, output, transaction};
use serde_json::{Value, json};
use std::fs;

const EXAMPLE: [&str; 5] = [
    "run",
    "--services",
    "deploy/examples/services.json",
    "--transactions",
    "deploy/examples/transactions.json",
];

#[test]
fn the_tasks_example_as_lines_and_as_a_table() {
    let ended = output(dtc().args(EXAMPLE).args(["--output", "ndjson"])).exited(0);
    let mut lines: Vec<_> = ended.stdout.lines().collect();
    lines.sort_unstable();
    let expected =
        ["{\"id\":\"TX1\",\"status\":\"COMMITTED\"}", "{\"id\":\"TX2\",\"status\":\"COMMITTED\"}"];
    assert_eq!(lines, expected);

    let ended = output(dtc().args(EXAMPLE).args(["--output", "table"])).exited(0);
    assert_golden("example-table.txt", &ended.stdout);
}

/// A service for each way in which a transaction ends.
fn endings() -> World {
    let services = json!([
        {"name": "good", "max_concurrency": 4},
        {"name": "picky", "max_concurrency": 1, "prepare": {"refuse_rate": 1}},
        {"name": "stubborn", "max_concurrency": 2, "commit": {"fail_for": ["parked"]}},
    ]);
    let transactions = json!([
        transaction("committed", &["good"]),
        transaction("refused", &["good", "picky"]),
        transaction("parked", &["stubborn", "good"]),
        transaction("unknown", &["nobody"]),
    ]);
    World::with(&services, &transactions)
}

#[test]
fn a_table_with_detail_says_why() {
    let ended = output(endings().run().args(["--output", "table", "--detail"])).exited(0);
    // The one column that differs from run to run.
    let timeless: String = ended.stdout.lines().map(|line| without_column(line, 35, 46)).collect();
    assert_golden("detail-table.txt", &timeless);
    assert!(!ended.stdout.lines().any(|line| line.ends_with(' ')), "{}", ended.stdout);
}

fn without_column(line: &str, from: usize, to: usize) -> String {
    format!("{}{}\n", &line[..from], &line[to..])
}

#[test]
fn the_summary_names_every_service_in_its_columns() {
    let services = json!([
        {"name": "a", "max_concurrency": 4_294_967_295_u32},
        {"name": "with-a-long-name", "max_concurrency": 1},
    ]);
    let world = World::with(&services, &json!([]));
    let ended = output(&mut world.run()).exited(0);
    assert_eq!(ended.stdout, "[]\n");
    assert_golden("empty-summary.txt", &ended.stderr);
}
