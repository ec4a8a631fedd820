//! Streams: what comes line by line, what nobody reads, and what is long.

use crate::world::{Talk, World, output, transaction};
use serde_json::{Value, json};
use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions},
    process::Stdio,
};

fn world() -> World {
    World::new(&json!([
        {"name": "a", "max_concurrency": 2},
        {"name": "b", "max_concurrency": 1, "prepare": {"latency_ms": [0, 2]}},
    ]))
}

fn line(id: &str, services: &[&str]) -> String {
    format!("{}\n", transaction(id, services))
}

#[test]
fn a_reader_that_has_had_enough_is_noticed_though_stdin_stays_open() {
    let world = world();
    let mut talk = Talk::with(&mut world.run_over("-"));
    talk.say(&line("1", &["a"]));
    assert_ne!(talk.hear(), "");
    talk.say(&line("2", &["b"]));
    // The second result is on its way, or out already: then it takes a third one to notice.
    let mut deaf = talk.stop_listening();
    deaf.say(&line("3", &["a"]));
    deaf.end().exited(1);
}

#[test]
fn a_stderr_that_is_gone_harms_neither_results_nor_exit_code() {
    let world = World::with(
        &json!([{"name": "a", "max_concurrency": 2, "commit": {"fail_for": ["TX1"]}}]),
        &json!([transaction("TX1", &["a"]), transaction("TX2", &["a"])]),
    );
    let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
    // The log would say that TX1 is parked, and the summary comes after it.
    let ended = world.run().stderr(full()).output().unwrap();
    assert_eq!(ended.status.code(), Some(0));
    let results: Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert_eq!(results[1], json!({"id": "TX2", "status": "COMMITTED"}));
    let ended = world.run_over("nope.json").stderr(full()).output().unwrap();
    assert_eq!(ended.status.code(), Some(65));
}

#[test]
fn a_hundred_thousand_lines_come_out_once_each_and_in_order_if_asked() {
    const COUNT: usize = 100_000;
    let world = World::new(&json!([
        {"name": "a", "max_concurrency": 64},
        {"name": "b", "max_concurrency": 64, "prepare": {"refuse_rate": 0.1}},
    ]));
    let lines: String = (0..COUNT).fold(String::new(), |mut lines, number| {
        let _ = write!(lines, "{}", line(&format!("TX{number}"), &["a", "b"]));
        lines
    });
    world.write("t.ndjson", lines);
    let run = |form: &str| {
        let out = world.path("out");
        let mut command = world.run_over("t.ndjson");
        command.args(["--output", form]).stdout(File::create(&out).unwrap());
        command.stderr(Stdio::null());
        assert_eq!(command.status().unwrap().code(), Some(0), "{form}");
        fs::read_to_string(&out).unwrap()
    };
    let array: Vec<Value> = serde_json::from_str(&run("json")).unwrap();
    assert_eq!(array.len(), COUNT);
    for (number, result) in array.iter().enumerate() {
        assert_eq!(result["id"].as_str(), Some(format!("TX{number}").as_str()));
    }
    let text = run("ndjson");
    let mut unordered: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    unordered.sort_by_key(|it| it["id"].as_str().unwrap()[2..].parse::<usize>().unwrap());
    assert!(unordered == array, "the two forms differ in more than order");
    let refused = array.iter().filter(|it| it["status"] == "ABORTED").count();
    assert!((COUNT / 20..COUNT / 5).contains(&refused), "{refused} were refused, not a tenth");
}
