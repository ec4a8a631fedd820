//! Input files with errors, and unusual ones without.

use crate::world::{World, dtc, output, output_given, transaction};
use serde_json::{Value, json};
use std::{fs, process::Command};

const SERVICES: &str = r#"[{"name": "a", "max_concurrency": 2}]"#;

fn world() -> World {
    World::new(&serde_json::from_str(SERVICES).unwrap())
}

/// The lines for these ids.
fn lines(ids: &[&str]) -> String {
    ids.iter().map(|id| format!("{}\n", transaction(id, &["a"]))).collect()
}

#[test]
fn all_errors_in_both_files_are_reported_at_once() {
    let world = world();
    world.write(
        "services.json",
        r#"[{"name": "a b", "max_concurrency": 0, "slots": 1},
            {"name": "b", "max_concurrency": 1, "prepare": {"latency_ms": [5, 1], "error_rate": -1}}]"#,
    );
    world.write(
        "transactions.json",
        r#"[{"id": "TX1", "involved_services": [], "data": {}},
            {"id": "TX1", "involved_services": ["b"], "data": 7, "timeout_ms": 0}]"#,
    );
    output(world.run().args(["--report", "report.json"])).exited(65).silent().saying(
        "services.json: $[0].slots is 1: unknown field; there are `name`, `max_concurrency`, \
         `max_wait_ms`, `cap`, `prepare`, `commit`, `abort`\n\
         services.json: $[0].name is \"a b\": must match [A-Za-z0-9_-]{1,64}\n\
         services.json: $[0].max_concurrency is 0: must be a whole number from 1 to 4294967295\n\
         services.json: $[1].prepare.error_rate is -1: must be a number from 0 to 1\n\
         services.json: $[1].prepare.latency_ms is [5, 1]: must be [min, max] with a min of at \
         most max\n\
         transactions.json: $[0].involved_services is []: must name at least one service\n\
         transactions.json: $[1].id is \"TX1\": must differ from $[0].id\n\
         transactions.json: $[1].data is 7: must be an object\n\
         transactions.json: $[1].timeout_ms is 0: must be a whole number from 1 to 86400000\n",
    );
    assert!(!fs::exists(world.path("report.json")).unwrap(), "nothing ran, nothing to report");
}

#[test]
fn truncated_json_is_refused_with_line_and_column() {
    let world = world();
    world.write("transactions.json", "[\n  {\"id\": \"TX1\",\n   \"data\": {");
    output(&mut world.run()).exited(65).silent().saying(
        "transactions.json:3:13: not JSON: the file ends where the name of a field should be\n",
    );
}

#[test]
fn files_that_cannot_be_opened_are_both_named() {
    let world = world();
    output(&mut world.run_over("nope.json"))
        .exited(65)
        .silent()
        .saying("failed to open `nope.json`: No such file or directory (os error 2)\n");
    fs::remove_file(world.path("services.json")).unwrap();
    output(&mut world.run_over("nope.json")).exited(65).silent().saying(
        "failed to open `services.json`: No such file or directory (os error 2)\n\
         failed to open `nope.json`: No such file or directory (os error 2)\n",
    );
}

#[test]
fn a_directory_given_as_a_file_is_refused_as_a_directory() {
    let world = world();
    output(&mut world.run_over("."))
        .exited(65)
        .silent()
        .saying("failed to open `.`: it is a directory\n");
    fs::remove_file(world.path("services.json")).unwrap();
    fs::create_dir(world.path("services.json")).unwrap();
    output(&mut world.run_over("/dev/null"))
        .exited(65)
        .silent()
        .saying("failed to open `services.json`: it is a directory\n");
}

#[test]
fn an_empty_file_is_a_list_of_no_transactions_but_not_of_services() {
    let world = world();
    world.write("transactions.json", "");
    output(&mut world.run()).exited(0).silent();
    let ended = output(world.run().args(["--output", "json"])).exited(0);
    assert_eq!(ended.stdout, "[]\n");
    world.write("services.json", "");
    output(&mut world.run())
        .exited(65)
        .silent()
        .saying("services.json:1:1: not JSON: the file ends where a value should be\n");
}

#[test]
fn an_array_may_come_from_stdin() {
    let world = world();
    let input = json!([transaction("TX1", &["a"]), transaction("TX2", &["a"])]).to_string();
    let ended = output_given(&mut world.run_over("-"), input.as_bytes()).exited(0);
    assert_eq!(ended.stdout.lines().next(), Some("["));
    assert_eq!(ended.statuses(), ["TX1 COMMITTED", "TX2 COMMITTED"]);
    output_given(&mut world.run_over("-"), b"[7]")
        .exited(65)
        .silent()
        .saying("stdin: $[0] is 7: must be an object\n");
}

#[test]
fn the_services_may_come_from_stdin() {
    let world = World::with(&json!([]), &json!([transaction("TX1", &["a"])]));
    let mut command = world.run();
    command.args(["--output", "ndjson"]);
    let ended = output_given(&mut command, SERVICES.as_bytes()).exited(65).silent();
    assert!(ended.stderr.contains("must have at least one service"), "{}", ended.stderr);
    let mut command = dtc();
    let transactions = world.path("transactions.json");
    command.args(["run", "--services", "-", "--transactions"]).arg(transactions);
    let ended = output_given(&mut command, SERVICES.as_bytes()).exited(0);
    assert_eq!(ended.statuses(), ["TX1 COMMITTED"]);
}

#[test]
fn a_bad_line_ends_the_intake_and_what_came_before_it_finishes() {
    let world = World::new(&json!([
        {"name": "a", "max_concurrency": 2, "prepare": {"latency_ms": 5}},
    ]));
    let text = format!("{}{{\"id\":\n{}", lines(&["1", "2", "3"]), lines(&["4"]));
    world.write("t.ndjson", text);
    for form in ["ndjson", "json", "table"] {
        let mut command = world.run_over("t.ndjson");
        command.args(["--output", form, "--report", "report.json"]);
        let ended = output(&mut command).exited(65);
        for id in ["1", "2", "3"] {
            assert!(ended.stdout.contains(id), "{form}: {}", ended.stdout);
        }
        assert!(!ended.stdout.contains('4'), "{form}: {}", ended.stdout);
        if form != "table" {
            let mut statuses = ended.statuses();
            statuses.sort_unstable();
            assert_eq!(statuses, ["1 COMMITTED", "2 COMMITTED", "3 COMMITTED"], "{form}");
        }
        let complaint = "t.ndjson:4:7: not JSON: the line ends where a value should be";
        assert_eq!(ended.stderr.lines().last(), Some(complaint), "{form}");
        assert_eq!(world.report()["committed"], 3, "{form}");
    }
}

#[test]
fn all_errors_in_a_line_are_reported_at_once() {
    let text = format!("{}{{\"id\": \"a b\", \"involved_services\": [\"a\"]}}\n", lines(&["1"]));
    let ended = output_given(&mut world().run_over("-"), text.as_bytes()).exited(65);
    assert_eq!(ended.statuses(), ["1 COMMITTED"]);
    let complaints: Vec<_> =
        ended.stderr.lines().filter(|line| line.starts_with("stdin:2: $")).collect();
    let [name, data] = complaints[..] else { panic!("{}", ended.stderr) };
    assert_eq!(name, "stdin:2: $.id is \"a b\": must match [A-Za-z0-9._:-]{1,128}");
    assert!(data.ends_with("must have a field `data`"), "{data}");
}

#[test]
fn a_repeated_id_ends_the_intake() {
    let text = lines(&["1", "2", "1", "3"]);
    let ended = output_given(&mut world().run_over("-"), text.as_bytes()).exited(65);
    let mut statuses = ended.statuses();
    statuses.sort_unstable();
    assert_eq!(statuses, ["1 COMMITTED", "2 COMMITTED"]);
    let complaint = "stdin:3: $.id is \"1\": must differ from the id of every earlier line";
    assert_eq!(ended.stderr.lines().last(), Some(complaint));
}

#[test]
fn lines_may_end_in_any_way_and_be_blank() {
    let world = world();
    let [one, two, three] = ["1", "2", "3"].map(|id| transaction(id, &["a"]));
    for text in [
        format!("{one}\n{two}\n{three}\n"),
        format!("{one}\n{two}\n{three}"),
        format!("{one}\r\n{two}\r\n{three}\r\n"),
        format!("\n\r\n {one}\n\n \t\n{two} \r\n\n{three}\n\n"),
        format!("\u{feff}{one}\n{two}\n{three}\n"),
    ] {
        let mut command = world.run_over("-");
        let ended = output_given(command.args(["--output", "json"]), text.as_bytes()).exited(0);
        let expected = ["1 COMMITTED", "2 COMMITTED", "3 COMMITTED"];
        assert_eq!(ended.statuses(), expected, "{text:?}");
    }
}

#[test]
fn odd_ids_and_data_pass_unharmed() {
    let longest = "x".repeat(128);
    let data = json!({"text": "ünï\u{0}\u{1F980}\"\\", "big": 12_345_678_901_234_567_890_u64,
                      "empty": {}, "none": null, "": [[[[]]]]});
    let ids = ["A", "a", "0", "-", "a.b:c_d-e", &longest];
    let transactions: Vec<_> =
        ids.iter().map(|id| json!({"id": id, "involved_services": ["a"], "data": data})).collect();
    let world = World::with(&serde_json::from_str(SERVICES).unwrap(), &json!(transactions));
    let ended = output(&mut world.run()).exited(0);
    let expected: Vec<_> = ids.iter().map(|id| format!("{id} COMMITTED")).collect();
    assert_eq!(ended.statuses(), expected);
}

#[test]
fn input_that_is_too_large_too_deep_or_not_text_is_refused() {
    let world = world();
    let with = |data: &str| {
        format!("{{\"id\":\"1\",\"involved_services\":[\"a\"],\"data\":{{\"d\":{data}}}}}")
    };
    let large = with(&format!("\"{}\"", "x".repeat(300 * 1024)));
    let deep = with(&format!("{}{}", "[".repeat(200), "]".repeat(200)));
    for (text, rule) in [
        (large.as_bytes(), "must have at most 262144 bytes"),
        (deep.as_bytes(), "nested more than 100 deep"),
        (&b"{\"id\": \"\xff\"}"[..], "not UTF-8"),
        (with("NaN").as_bytes(), "not JSON: found `N` where a value should be"),
        (with("1e999").as_bytes(), "not JSON: this number is out of range"),
    ] {
        let array = [b"[", text, b"]"].concat();
        for input in [text, &array] {
            let ended = output_given(&mut world.run_over("-"), input).exited(65).silent();
            let complaint = ended.stderr.lines().last().unwrap();
            assert!(complaint.starts_with("stdin:"), "{complaint}");
            assert!(complaint.ends_with(rule), "{complaint}");
        }
    }
}

#[test]
fn a_long_list_of_complaints_is_cut_and_counted() {
    let transactions: Vec<_> = (0..150).map(|_| Value::Null).collect();
    let world = World::with(&serde_json::from_str(SERVICES).unwrap(), &json!(transactions));
    let ended = output(&mut world.run()).exited(65).silent();
    assert_eq!(ended.stderr.lines().count(), 101);
    assert_eq!(ended.stderr.lines().last(), Some("and 50 more"));
}

/// tokio panics if it can't create the sockets through which it receives signals.
#[test]
fn a_too_low_limit_of_open_files_is_reported_without_a_panic() {
    for limit in 3..20 {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("ulimit -n {limit}; exec \"$0\" \"$@\"")]);
        shell.arg(dtc().get_program()).args(["run", "--services", "deploy/examples/services.json"]);
        shell.args(["--transactions", "deploy/examples/transactions.json"]);
        let ended = output(shell.current_dir(env!("CARGO_MANIFEST_DIR")));
        assert!(!ended.stderr.contains("panicked"), "{limit}: {}", ended.stderr);
        // With too few to load libraries, only the system can report anything.
        let is_told = ended.stderr.to_lowercase().contains("open ");
        assert!(ended.status.success() || is_told, "{limit}: {}", ended.stderr);
    }
}
