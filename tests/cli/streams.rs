//! Streams: input line by line, output that nobody reads, and long runs.

use crate::world::{LiveProcess, World, output, transaction};
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
fn each_result_is_printed_before_the_next_line_is_read() {
    for arguments in [&["--output", "ndjson"][..], &["--output", "ndjson", "--detail"], &[]] {
        let world = world();
        let mut talk = LiveProcess::with(world.run_over("-").args(arguments));
        for number in 0..20 {
            let id = format!("TX{number}");
            talk.say(&line(&id, &["a", "b"]));
            let heard: Value = serde_json::from_str(&talk.hear()).unwrap();
            assert_eq!((&heard["id"], &heard["status"]), (&json!(id), &json!("COMMITTED")));
        }
        talk.close_stdin();
        assert_eq!(talk.end().exited(0).stdout, "");
    }
}

#[test]
fn a_result_is_printed_while_the_next_line_is_incomplete() {
    let world = world();
    let mut talk = LiveProcess::with(&mut world.run_over("-"));
    let (head, tail) = (line("2", &["a"]), line("3", &["a"]));
    talk.say(&(line("1", &["a"]) + &head[..10]));
    assert_eq!(talk.hear(), "{\"id\":\"1\",\"status\":\"COMMITTED\"}\n");
    talk.say(&head[10..]);
    assert_eq!(talk.hear(), "{\"id\":\"2\",\"status\":\"COMMITTED\"}\n");
    talk.say(&tail);
    assert_eq!(talk.hear(), "{\"id\":\"3\",\"status\":\"COMMITTED\"}\n");
    talk.close_stdin();
    talk.end().exited(0);
}

#[test]
fn ordered_results_are_printed_as_soon_as_the_order_allows() {
    let world = world();
    let mut talk = LiveProcess::with(world.run_over("-").args(["--output", "table"]));
    talk.say(&line("1", &["a"]));
    assert_eq!(talk.hear().trim_end(), "ID                       STATUS");
    assert_eq!(talk.hear().trim_end(), "1                        COMMITTED");
    talk.say(&line("2", &["b"]));
    assert_eq!(talk.hear().trim_end(), "2                        COMMITTED");
    talk.close_stdin();
    talk.end().exited(0);
}

#[test]
fn a_reader_that_closes_the_pipe_ends_the_run_quietly() {
    let world = world();
    let lines: String = (0..20_000).fold(String::new(), |mut lines, number| {
        let _ = write!(lines, "{}", line(&format!("TX{number}"), &["a"]));
        lines
    });
    world.write("t.ndjson", lines);
    for form in ["ndjson", "json", "table"] {
        let mut talk = LiveProcess::with(world.run_over("t.ndjson").args(["--output", form]));
        assert_ne!(talk.hear(), "");
        let ended = talk.hang_up().exited(1);
        assert!(ended.stderr.contains(" committed, 0 aborted"), "{form}: {}", ended.stderr);
        assert!(!ended.stderr.contains("panicked"), "{form}: {}", ended.stderr);
        assert!(!ended.stderr.contains("roken pipe"), "{form}: {}", ended.stderr);
    }
}

#[test]
fn a_reader_that_closes_the_pipe_ends_the_run_even_if_stdin_stays_open() {
    let world = world();
    let mut talk = LiveProcess::with(&mut world.run_over("-"));
    talk.say(&line("1", &["a"]));
    assert_ne!(talk.hear(), "");
    talk.say(&line("2", &["b"]));
    // The second result is on its way, or printed already: then the third one fails.
    let mut deaf = talk.stop_listening();
    deaf.say(&line("3", &["a"]));
    deaf.end().exited(1);
}

#[test]
fn a_full_disk_is_an_error_that_says_so() {
    let world = world();
    world.write("transactions.json", json!([transaction("TX1", &["a"])]).to_string());
    let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
    let status = world.run().stdout(full()).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(status.status.code(), Some(1));
    let said = String::from_utf8(status.stderr).unwrap();
    let complaint = "failed to print the results: No space left on device (os error 28)";
    assert_eq!(said.lines().last(), Some(complaint));
    output(world.run().args(["--report", "/dev/full"])).exited(1).saying(
        "failed to write the report to `/dev/full`: No space left on device (os error 28)\n",
    );
}

#[test]
fn a_closed_stderr_changes_neither_results_nor_exit_code() {
    let world = World::with(
        &json!([{"name": "a", "max_concurrency": 2, "commit": {"fail_for": ["TX1"]}}]),
        &json!([transaction("TX1", &["a"]), transaction("TX2", &["a"])]),
    );
    let full = || OpenOptions::new().write(true).open("/dev/full").unwrap();
    // The log would report that TX1 is parked, and the summary follows it.
    let ended = world.run().stderr(full()).output().unwrap();
    assert_eq!(ended.status.code(), Some(0));
    let results: Value = serde_json::from_slice(&ended.stdout).unwrap();
    assert_eq!(results[1], json!({"id": "TX2", "status": "COMMITTED"}));
    let ended = world.run_over("nope.json").stderr(full()).output().unwrap();
    assert_eq!(ended.status.code(), Some(65));
}

#[test]
fn a_hundred_thousand_results_are_printed_once_each_and_in_order_on_request() {
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
