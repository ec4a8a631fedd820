//! The forms of results, report and summary.

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
fn the_first_example_prints_exactly_the_documented_output() {
    let array = "[\n  {\"id\":\"TX1\",\"status\":\"COMMITTED\"},\n  \
                 {\"id\":\"TX2\",\"status\":\"COMMITTED\"}\n]\n";
    assert_eq!(output(dtc().args(EXAMPLE)).exited(0).stdout, array);
    assert_eq!(output(dtc().args(EXAMPLE).args(["--output", "json"])).exited(0).stdout, array);
}

#[test]
fn the_first_example_prints_lines_and_a_table() {
    let ended = output(dtc().args(EXAMPLE).args(["--output", "ndjson"])).exited(0);
    let mut lines: Vec<_> = ended.stdout.lines().collect();
    lines.sort_unstable();
    let expected =
        ["{\"id\":\"TX1\",\"status\":\"COMMITTED\"}", "{\"id\":\"TX2\",\"status\":\"COMMITTED\"}"];
    assert_eq!(lines, expected);

    let ended = output(dtc().args(EXAMPLE).args(["--output", "table"])).exited(0);
    assert_golden("example-table.txt", &ended.stdout);
}

#[test]
fn the_lively_example_has_every_kind_of_result() {
    let run = || {
        output(dtc().args([
            "run",
            "--services",
            "deploy/examples/lively-services.json",
            "--transactions",
            "deploy/examples/lively-transactions.json",
            "--detail",
        ]))
        .exited(0)
    };
    let ended = run();
    let results = ended.results();
    assert_eq!(results.len(), 200);
    assert!(
        results.iter().any(|it| it["status"] == "ABORTED" && it["reason"]["code"] == "refused")
    );
    assert!(results.iter().any(|it| it["status"] == "ABORTED" && it["reason"]["code"] == "failed"));
    let order_042 = results.iter().find(|it| it["id"] == "order-042").unwrap();
    assert_eq!(order_042["status"], "COMMITTED");
    assert_eq!(order_042["unresolved"], json!(["shipping"]));
    assert!(results.iter().any(|it| it["status"] == "COMMITTED" && it["unresolved"] == json!([])));
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
fn detail_has_every_field_for_every_transaction() {
    let told = endings().tell_all(&[]);
    let timeless: Vec<_> = told
        .results
        .into_iter()
        .map(|mut result| {
            let duration = result.as_object_mut().unwrap().remove("duration_ms").unwrap();
            assert!(duration.as_f64().unwrap() >= 0.0);
            result
        })
        .collect();
    let once = json!({"prepare": 1, "commit": 1, "abort": 0});
    let undone = json!({"prepare": 1, "commit": 0, "abort": 1});
    let refused = json!({"prepare": 1, "commit": 0, "abort": 0});
    let parked = json!({"prepare": 1, "commit": 4, "abort": 0});
    let expected = json!([
        {"id": "committed", "status": "COMMITTED", "reason": null, "unresolved": [],
         "attempts": {"good": once}},
        {"id": "refused", "status": "ABORTED",
         "reason": {"service": "picky", "code": "refused", "message": "simulated refusal"},
         "unresolved": [], "attempts": {"good": undone, "picky": refused}},
        {"id": "parked", "status": "COMMITTED", "reason": null, "unresolved": ["stubborn"],
         "attempts": {"good": once, "stubborn": parked}},
        {"id": "unknown", "status": "ABORTED",
         "reason": {"service": "nobody", "code": "unknown_service", "message": null},
         "unresolved": [], "attempts": {}},
    ]);
    assert_eq!(Value::from(timeless), expected);
}

#[test]
fn a_table_with_detail_shows_the_reason() {
    let ended = output(endings().run().args(["--output", "table", "--detail"])).exited(0);
    // The duration is the one column that differs from run to run.
    let timeless: String = ended.stdout.lines().map(|line| without_column(line, 35, 46)).collect();
    assert_golden("detail-table.txt", &timeless);
    assert!(!ended.stdout.lines().any(|line| line.ends_with(' ')), "{}", ended.stdout);
}

fn without_column(line: &str, from: usize, to: usize) -> String {
    format!("{}{}\n", &line[..from], &line[to..])
}

#[test]
fn the_report_has_the_figures_of_the_summary() {
    let world = endings();
    let mut report = world.tell_all(&[]).report;
    let fields: Vec<_> = report.as_object().unwrap().keys().cloned().collect();
    let expected =
        ["aborted", "committed", "p50_ms", "p99_ms", "services", "tx_per_s", "unresolved"];
    assert_eq!(fields, expected);
    for field in ["p50_ms", "p99_ms", "tx_per_s"] {
        assert!(report[field].as_f64().unwrap() >= 0.0, "{field} of {report}");
    }
    assert_eq!(report["committed"], 2);
    assert_eq!(report["aborted"], 2);
    assert_eq!(report["unresolved"], 1);
    for service in report["services"].as_object_mut().unwrap().values_mut() {
        let waited = service.as_object_mut().unwrap().remove("longest_wait_ms").unwrap();
        assert!(waited.as_f64().unwrap() >= 0.0);
        let most = service.as_object_mut().unwrap().remove("max_in_use").unwrap();
        assert!(
            (1..=service["max_concurrency"].as_u64().unwrap()).contains(&most.as_u64().unwrap())
        );
    }
    let expected = json!({
        "good": {"prepare_calls": 3, "commit_calls": 2, "abort_calls": 1, "max_concurrency": 4},
        "picky": {"prepare_calls": 1, "commit_calls": 0, "abort_calls": 0, "max_concurrency": 1},
        "stubborn": {"prepare_calls": 1, "commit_calls": 4, "abort_calls": 0, "max_concurrency": 2},
    });
    assert_eq!(report["services"], expected);
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

#[test]
fn a_report_that_cannot_be_written_fails_before_anything_runs() {
    let world = endings();
    let report = "nowhere/report.json";
    output(world.run().args(["--report", report]))
        .exited(2)
        .silent()
        .saying("failed to create `nowhere/report.json`: No such file or directory (os error 2)\n");
}

#[test]
fn bad_input_leaves_an_earlier_report_alone() {
    let world = endings();
    world.write("report.json", "of yesterday");
    world.write("transactions.json", "[{}]");
    output(world.run().args(["--report", "report.json"])).exited(65).silent();
    assert_eq!(fs::read_to_string(world.path("report.json")).unwrap(), "of yesterday");
}
