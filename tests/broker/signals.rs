//! The tests' own tools for processes, tried on a simple one.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{fs, process::Command, time::Duration};

use crate::processes::{LIMIT, Process};

fn shell(script: &str) -> Process {
    Process::start("shell", Command::new("sh").args(["-c", script]))
}

#[test]
fn a_line_is_found_whether_it_was_printed_before_or_after_the_wait_began() {
    let process =
        shell("echo first >&2; read line </dev/stdin; sleep 0.2; echo second >&2; exit 3");
    assert_eq!(process.wait_for_line("second", LIMIT), "second");
    assert_eq!(process.wait_for_line("first", LIMIT), "first");
    assert_eq!(process.stderr.wait_for("third", LIMIT), None);
    let mut process = process;
    process.exited(3, LIMIT);
}

#[test]
fn a_process_reads_its_standard_input() {
    let process =
        Process::start_given("cat", Command::new("cat").arg("-"), "one\ntwo\n".to_owned());
    assert_eq!(process.succeeded(LIMIT), ["one", "two"]);
}

#[test]
fn a_frozen_process_does_nothing_until_it_is_woken() {
    let mut process = shell("trap 'echo asked >&2; exit 7' TERM; echo up >&2; while :; do :; done");
    process.wait_for_line("up", LIMIT);
    process.stop();
    while state(&process) != "T" {
        std::thread::yield_now();
    }
    let computed = process.computed();
    process.terminate();
    assert_eq!(process.stderr.wait_for("asked", Duration::from_millis(200)), None);
    assert_eq!(process.computed(), computed);
    assert!(process.resident() > 100_000, "{}", process.resident());
    process.cont();
    process.wait_for_line("asked", LIMIT);
    process.exited(7, LIMIT);
}

#[test]
fn a_killed_process_is_gone() {
    let mut process = shell("echo up >&2; while :; do sleep 1; done");
    process.wait_for_line("up", LIMIT);
    process.kill9();
    assert!(!fs::exists(format!("/proc/{}", process.id())).unwrap());
}

fn state(process: &Process) -> String {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.id())).unwrap();
    stat.rsplit_once(") ").unwrap().1[..1].to_owned()
}
