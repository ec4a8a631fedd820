//! `dtc bench`, as far as it can be tested without judging speeds.

#![allow(clippy::unwrap_used, reason = "a test may fail here")]

use std::{collections::BTreeSet, fs, time::Duration};

use serde_json::Value;

use crate::{
    broker::{Broker, place},
    crash::until,
    processes::{Process, World},
};

/// How long a whole bench may take, processes included, on a busy machine.
const LIMIT: Duration = Duration::from_secs(180);

/// Files are created in the world's directory, so that leftovers can be found.
fn bench(world: &World, flags: &[&str]) -> Process {
    let directory = world.path("tmp");
    fs::create_dir(&directory).unwrap();
    let mut command = world.dtc_at_broker(&["bench"]);
    Process::start("bench", command.args(flags).env("TMPDIR", directory))
}

#[test]
fn every_measurement_is_in_the_report_and_in_the_plot() {
    let world = World::at(place());
    let loads =
        ["--seconds", "1", "--rounds", "1", "--in-flight", "1,8", "--backlog", "200", "--times"];
    let bench = bench(&world, &[&loads[..], &["--json", "--plot", "plot.svg"]].concat());
    let told: Value = serde_json::from_str(&bench.succeeded(LIMIT).join("\n")).unwrap();

    for path in [
        "/yardstick/echo_per_s/median",
        "/yardstick/raw_echo_per_s/median",
        "/yardstick/cpu_us_per_raw_echo/producers/median",
        "/yardstick/echo_alone_p50_ms/median",
        "/yardstick/raw_messages_per_s/median",
        "/yardstick/hop_alone_p50_ms/classic/median",
        "/yardstick/hop_alone_p50_ms/quorum/median",
        "/yardstick/hop_alone_p50_ms/stream/median",
        "/yardstick/hops_of_a_tx_ms",
        "/load/0/tx_per_s/median",
        "/load/3/tx_per_echo/median",
        "/load/3/tx_per_raw_echo/median",
        "/load/3/p99_ms/median",
        "/load/3/cpu_us_per_tx/workers/median",
        "/load/3/resident_mib/services/median",
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
    let points = told["load"].as_array().unwrap().iter();
    let points =
        points.map(|it| (it["in_flight"].as_u64().unwrap(), it["batch_max"].as_u64().unwrap()));
    assert_eq!(points.collect::<Vec<_>>(), [(1, 1), (1, 64), (8, 1), (8, 64)]);
    let plot = fs::read_to_string(world.path("plot.svg")).unwrap();
    assert_eq!(plot.matches("<circle").count(), 8, "{plot}");
}

/// A configured worker's name would apply to each of them, so the bench must choose their names:
/// two workers with one name would both get all replies.
#[test]
fn several_workers_get_different_names_even_if_the_configuration_has_one() {
    let mut world = World::at(place());
    world.variables.push(("DTC__WORKER__NAME", "one".to_owned()));
    let mut bench =
        bench(&world, &["--seconds", "1", "--rounds", "9", "--in-flight", "1", "--workers", "2"]);
    let mut ready = Vec::new();
    until("two workers are ready", || {
        ready = names_of_workers(&world);
        ready.len() >= 2
    });
    bench.terminate();
    bench.exited(130, LIMIT);
    assert_ne!(ready[0], ready[1]);
}

/// The names of the workers that have logged that they are ready.
fn names_of_workers(world: &World) -> Vec<String> {
    let directories = files_of(world).into_iter().map(|it| world.path("tmp").join(it));
    let files = directories.flat_map(|it| fs::read_dir(it).into_iter().flatten());
    let logs = files.filter_map(|it| fs::read_to_string(it.ok()?.path()).ok()).collect::<String>();
    let ready = logs.lines().filter(|line| line.contains("ready"));
    ready.filter_map(|line| Some(line.split_once("worker=")?.1.trim().to_owned())).collect()
}

/// When to interrupt a bench.
#[derive(Clone, Copy, Debug)]
enum During {
    Declaring,
    Yardstick,
    Load,
}

#[test]
fn an_interrupted_bench_leaves_no_process_and_nothing_at_the_broker() {
    let broker = Broker::start();
    for during in [During::Declaring, During::Yardstick, During::Load] {
        let world = World::at(broker.place());
        // Long enough that it is still running when it has been seen.
        let seconds = if matches!(during, During::Yardstick) { "20" } else { "1" };
        let mut bench = bench(&world, &["--seconds", seconds, "--in-flight", "4"]);
        match during {
            During::Declaring => until("it declares", || !files_of(&world).is_empty()),
            During::Yardstick => {
                bench.wait_for_line("the yardstick", LIMIT);
                until("it has its queue", || {
                    broker.declared_at(&world.place).iter().any(|it| it.ends_with(".yardstick"))
                });
            }
            During::Load => {
                bench.wait_for_line("4 in flight", LIMIT);
                until("a worker, both services and their guards are there", || {
                    users_of(&world).len() >= 7
                });
            }
        }
        bench.terminate();
        bench.exited(130, LIMIT);
        println!("interrupted during {during:?}: {}", bench.stderr.text());
        assert_eq!(broker.declared_at(&world.place), [""; 0]);
        assert_eq!(users_of(&world), BTreeSet::new());
        assert_eq!(files_of(&world), [""; 0]);
    }
}

/// The entries of a bench's directory for files.
fn files_of(world: &World) -> Vec<String> {
    let files = fs::read_dir(world.path("tmp")).unwrap();
    files.map(|it| it.unwrap().file_name().into_string().unwrap()).collect()
}

/// The processes that run in the world's directory, or have its files open.
fn users_of(world: &World) -> BTreeSet<String> {
    let directory = world.path("tmp").parent().unwrap().to_owned();
    let mut users = BTreeSet::new();
    for process in fs::read_dir("/proc").unwrap().map(|it| it.unwrap().path()) {
        // An entry that isn't a process, or has ended meanwhile, has none.
        let files = fs::read_dir(process.join("fd")).into_iter().flatten();
        let files = files.filter_map(|it| Some(it.ok()?.path())).chain([process.join("cwd")]);
        let mut links = files.filter_map(|it| fs::read_link(it).ok());
        if links.any(|it| it.starts_with(&directory)) {
            users.insert(fs::read_to_string(process.join("cmdline")).unwrap_or_default());
        }
    }
    users
}
