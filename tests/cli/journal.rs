//! `dtc run --journal`: whenever it is killed, the next run finishes what it has begun, once.
//!
//! The tests look at what the services hold in the end, how often they were called, and that no
//! transaction gets two outcomes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    path::Path,
    process::Command,
    time::Duration,
};

use crate::{
    pages::{page, script},
    world::{Ended, LiveProcess, World, dtc, output, transaction},
};
use serde_json::{Value, json};

/// `SIGABRT`: how a process ends at its fault point.
const ABORTED: i32 = 6;

fn services() -> Value {
    json!([
        {"name": "payments", "max_concurrency": 4},
        {"name": "stock", "max_concurrency": 4, "prepare": {"fail_for": ["bad"]}},
        {"name": "strict", "max_concurrency": 4, "prepare": {"refuse_rate": 1}},
    ])
}

/// `dtc run` over `transactions`, with the journal and the state of `world`.
fn run_over(world: &World, transactions: &str) -> Command {
    let mut command = world.run_over(transactions);
    command.args(["--journal", "journal", "--state", "state"]);
    command
}

fn run(world: &World) -> Command {
    run_over(world, "transactions.json")
}

/// What the services of a world hold, and how often they were called.
#[derive(Debug, Default, PartialEq, Eq)]
struct Held {
    /// By id: the services that have committed it, once for each time.
    committed: BTreeMap<String, Vec<String>>,
    aborted: BTreeMap<String, Vec<String>>,
    /// Branches that are still in doubt, as `service branch`.
    prepared: BTreeSet<String>,
    /// Calls of the services' code.
    calls: usize,
}

impl Held {
    fn of(world: &World) -> Self {
        let mut held = Self::default();
        let Ok(services) = fs::read_dir(world.path("state")) else { return held };
        for service in services {
            let service = service.unwrap();
            let name = service.file_name().into_string().unwrap();
            for (log, map) in
                [("committed.log", &mut held.committed), ("aborted.log", &mut held.aborted)]
            {
                for id in ids(&service.path().join(log)) {
                    map.entry(id).or_default().push(name.clone());
                }
            }
            let calls = fs::read_to_string(service.path().join("calls.log")).unwrap_or_default();
            held.calls += calls.lines().filter(|line| line.contains(" start ")).count();
            for branch in fs::read_dir(service.path().join("prepared")).into_iter().flatten() {
                let branch = branch.unwrap();
                // A file that a kill has kept from being written completely is not a prepared
                // branch.
                if fs::read_to_string(branch.path()).unwrap().ends_with('\n') {
                    let branch = branch.file_name().into_string().unwrap();
                    held.prepared.insert(format!("{name} {branch}"));
                }
            }
        }
        held.committed.values_mut().chain(held.aborted.values_mut()).for_each(|it| it.sort());
        held
    }
}

/// The ids in a log. If a kill has torn a line, its branch is still prepared, or the line was
/// written again.
fn ids(log: &Path) -> Vec<String> {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    lines.filter(|words| words.len() > 3).map(|words| words[0].to_owned()).collect()
}

/// The result of each transaction that was printed, even by a process that was killed meanwhile.
fn told(ended: &Ended) -> BTreeMap<String, String> {
    let lines = ended.stdout.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    lines.map(|line| (text(&line["id"]), text(&line["status"]))).collect()
}

/// Asserts that `held` agrees with `results`, for transactions over these services.
#[track_caller]
fn assert_agreed(
    results: &BTreeMap<String, String>,
    held: &Held,
    involved: &BTreeMap<String, Vec<String>>,
) {
    assert_eq!(held.prepared, BTreeSet::new(), "nothing is left in doubt");
    for (id, status) in results {
        let committed = held.committed.get(id).cloned().unwrap_or_default();
        match status.as_str() {
            "COMMITTED" => assert_eq!(committed, involved[id], "{id}: all, each once"),
            _ => assert_eq!(committed, [""; 0], "{id}: none"),
        }
    }
    let unknown = held.committed.keys().find(|id| !results.contains_key(*id));
    assert_eq!(unknown, None, "nothing is committed that was not told");
}

fn involved(transactions: &[Value]) -> BTreeMap<String, Vec<String>> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let of = |it: &Value| {
        let services = it["involved_services"].as_array().unwrap().iter().map(text);
        (text(&it["id"]), services.collect())
    };
    transactions.iter().map(of).collect()
}

fn ndjson(transactions: &[Value]) -> String {
    transactions.iter().map(|it| format!("{it}\n")).collect()
}

/// Runs `transactions` repeatedly, killed at its first fault point, at its second and so on, each
/// time from the beginning; after each kill it is run once more, to its end. Returns how many fault
/// points there are.
fn killed_at_every_point(services: &Value, transactions: &[Value], arguments: &[&str]) -> u64 {
    let wanted = involved(transactions);
    for point in 1.. {
        let world = World::new(services);
        world.write("in.ndjson", ndjson(transactions));
        let mut first = run_over(&world, "in.ndjson");
        let first = output(first.args(arguments).env("DTC_FAULT_POINT", point.to_string()));
        let before = Held::of(&world);
        if first.status.signal() != Some(ABORTED) {
            assert_eq!(first.status.code(), Some(0), "{point}: {first:?}");
            assert_agreed(&told(&first), &before, &wanted);
            return point - 1;
        }
        let again = output(run_over(&world, "in.ndjson").args(arguments)).exited(0);
        let (results, held) = (told(&again), Held::of(&world));
        assert_eq!(results.len(), transactions.len(), "point {point}: {}", again.stdout);
        assert_agreed(&results, &held, &wanted);
        for (id, status) in told(&first) {
            assert_eq!(results[&id], status, "point {point}: {id} was told otherwise before");
        }
        // A third time: no service is called, and all results are the same.
        let third = output(run_over(&world, "in.ndjson").args(arguments)).exited(0);
        assert_eq!(told(&third), results, "point {point}");
        assert_eq!(Held::of(&world), held, "point {point}: nobody is called for what is finished");
    }
    unreachable!("there are fewer points than numbers")
}

// ---- Every fault point -------------------------------------------------------------------------

#[test]
fn a_commit_that_is_killed_at_any_point_is_all_or_none_and_once() {
    let transactions = [transaction("TX1", &["payments", "stock"])];
    let n_points = killed_at_every_point(&services(), &transactions, &[]);
    println!("{n_points} points");
    assert!(n_points >= 15, "{n_points} points: before and after each write, sync and call");
}

#[test]
fn aborts_that_are_killed_at_any_point_leave_nothing() {
    let transactions = [
        transaction("bad", &["payments", "stock"]),
        transaction("no", &["payments", "strict"]),
        transaction("nowhere", &["payments", "void"]),
    ];
    let n_points = killed_at_every_point(&services(), &transactions, &["--max-in-flight", "1"]);
    println!("{n_points} points");
    assert!(n_points >= 20, "{n_points}");
}

#[test]
fn several_at_once_that_are_killed_at_any_point_are_each_all_or_none() {
    let mut transactions: Vec<_> =
        (0..6).map(|n| transaction(&format!("TX{n}"), &["payments", "stock"])).collect();
    transactions.push(transaction("bad", &["payments", "stock"]));
    let n_points = killed_at_every_point(&services(), &transactions, &[]);
    println!("{n_points} points");
    assert!(n_points >= 30, "{n_points}");
}

#[test]
fn a_run_killed_during_recovery_is_recovered_by_the_next() {
    let transactions =
        [transaction("TX1", &["payments", "stock"]), transaction("bad", &["payments", "stock"])];
    let wanted = involved(&transactions);
    let mut n_killed_twice = 0;
    // Undecided, decided, and committed in part.
    for first in [16, 20, 24] {
        for second in 1.. {
            let world = World::new(&services());
            world.write("in.ndjson", ndjson(&transactions));
            let killed_at = |point: u64| {
                let mut run = run_over(&world, "in.ndjson");
                let ended = output(run.env("DTC_FAULT_POINT", point.to_string()));
                (ended.status.signal() == Some(ABORTED)).then_some(ended)
            };
            assert!(killed_at(first).is_some(), "{first}");
            let is_killed = killed_at(second).is_some();
            let ended = output(&mut run_over(&world, "in.ndjson")).exited(0);
            assert_agreed(&told(&ended), &Held::of(&world), &wanted);
            assert_eq!(told(&ended).len(), 2, "{first}, {second}");
            if !is_killed {
                break;
            }
            n_killed_twice += 1;
        }
    }
    println!("killed {n_killed_twice} times while recovering");
    assert!(n_killed_twice >= 45, "{n_killed_twice}");
}

#[test]
fn a_journal_killed_at_any_point_of_its_compaction_keeps_its_content() {
    let transactions: Vec<_> =
        (0..150).map(|n| transaction(&format!("TX{n}"), &["payments", "stock"])).collect();
    let wanted = involved(&transactions);
    let world = World::new(&services());
    world.write("in.ndjson", ndjson(&transactions));
    let first = output(&mut run_over(&world, "in.ndjson")).exited(0);
    let (journal, held) = (fs::read(world.path("journal")).unwrap(), Held::of(&world));
    assert_agreed(&told(&first), &held, &wanted);
    let mut n_points = 0;
    for point in 1.. {
        fs::write(world.path("journal"), &journal).unwrap();
        let mut run = run_over(&world, "in.ndjson");
        let ended = output(run.env("DTC_FAULT_POINT", point.to_string()));
        if ended.status.signal() != Some(ABORTED) {
            n_points = point - 1;
        }
        let again = output(&mut run_over(&world, "in.ndjson")).exited(0);
        assert_eq!(told(&again), told(&first), "point {point}");
        let len = fs::metadata(world.path("journal")).unwrap().len();
        assert!(len < journal.len() as u64 / 2, "point {point}: {len} of {}", journal.len());
        if n_points > 0 {
            break;
        }
    }
    println!("{n_points} points");
    assert!(n_points >= 10, "{n_points}");
    assert_eq!(Held::of(&world), held, "nobody is called for what is finished");
}

// ---- Kills at any moment -----------------------------------------------------------------------

#[test]
fn a_run_killed_repeatedly_under_load_ends_and_prints_every_transaction_once() {
    let services = json!([
        {"name": "payments", "max_concurrency": 50, "prepare": {"error_rate": 0.02},
         "commit": {"latency_ms": [0, 2], "error_rate": 0.02}},
        {"name": "stock", "max_concurrency": 20, "prepare": {"latency_ms": [0, 2]},
         "abort": {"error_rate": 0.1}},
    ]);
    let transactions: Vec<_> = (0..1500)
        .map(|n| transaction(&format!("TX{n}"), [&["payments", "stock"][..], &["stock"]][n % 2]))
        .collect();
    let world = World::new(&services);
    world.write("in.ndjson", ndjson(&transactions));
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    let mut n_killed = 0;
    // Each run first prints the results of earlier ones, so it is killed after more and more lines.
    let ended = loop {
        let mut talk = LiveProcess::with(&mut run_over(&world, "in.ndjson"));
        let wanted = known.len() + 60 + n_killed * 13 % 90;
        let mut heard = String::new();
        for _ in 0..wanted.min(transactions.len()) {
            heard += &talk.hear();
        }
        let is_last = wanted >= transactions.len();
        if !is_last {
            talk.signal("KILL");
            n_killed += 1;
        }
        let ended = talk.end();
        let ended = Ended { stdout: heard + &ended.stdout, ..ended };
        for (id, status) in told(&ended) {
            let before = known.insert(id.clone(), status.clone());
            assert!(before.as_ref().is_none_or(|it| *it == status), "{id}: {before:?}, {status}");
        }
        if is_last {
            break ended.exited(0);
        }
    };
    println!("killed {n_killed} times");
    assert!(n_killed >= 8, "{n_killed}");
    let held = Held::of(&world);
    assert_eq!(told(&ended).len(), transactions.len());
    assert_agreed(&told(&ended), &held, &involved(&transactions));
    let again = output(&mut run_over(&world, "in.ndjson")).exited(0);
    assert_eq!(told(&again), known);
    assert_eq!(Held::of(&world), held);
}

#[test]
fn transactions_missing_from_the_next_runs_file_are_finished_too() {
    let transactions = [transaction("TX1", &["payments", "stock"])];
    let mut n_committed = 0;
    for point in 6..40 {
        let world = World::with(&services(), &json!(transactions));
        let mut first = run(&world);
        let first = output(first.env("DTC_FAULT_POINT", point.to_string()));
        if first.status.signal() != Some(ABORTED) {
            break;
        }
        world.write("other.ndjson", ndjson(&[transaction("TX2", &["stock"])]));
        let other = output(&mut run_over(&world, "other.ndjson")).exited(0);
        assert_eq!(other.statuses(), ["TX2 COMMITTED"], "point {point}");
        let held = Held::of(&world);
        assert_eq!(held.prepared, BTreeSet::new(), "point {point}");
        let committed = held.committed.get("TX1").map_or(0, Vec::len);
        assert!(committed == 0 || committed == 2, "point {point}: {held:?}");
        n_committed += usize::from(committed == 2);
    }
    assert!(n_committed >= 5, "{n_committed}");
}

// ---- Started again -----------------------------------------------------------------------------

#[test]
fn the_same_run_again_is_answered_from_the_journal_and_calls_no_service() {
    let transactions = json!([
        transaction("TX1", &["payments", "stock"]),
        transaction("bad", &["payments", "stock"]),
        transaction("no", &["strict"]),
    ]);
    let world = World::with(&services(), &transactions);
    let first = output(run(&world).arg("--detail")).exited(0);
    let held = Held::of(&world);
    let second = output(run(&world).args(["--detail", "--report", "report.json"])).exited(0);
    for (first, second) in first.results().iter().zip(second.results()) {
        for field in ["id", "status", "reason", "unresolved"] {
            assert_eq!(first[field], second[field]);
        }
        assert_eq!(second["attempts"], json!({}));
    }
    assert_eq!(Held::of(&world), held);
    let report = world.report();
    assert_eq!((&report["committed"], &report["aborted"]), (&json!(1), &json!(2)));
    assert_eq!(report["services"]["payments"]["prepare_calls"], 0);
}

#[test]
fn an_id_with_other_content_than_before_is_refused() {
    let world = World::with(&services(), &json!([transaction("TX1", &["payments", "stock"])]));
    output(&mut run(&world)).exited(0);
    let held = Held::of(&world);
    world.write("transactions.json", json!([transaction("TX1", &["payments"])]).to_string());
    let ended = output(run(&world).arg("--detail")).exited(0);
    assert_eq!(ended.statuses(), ["TX1 ABORTED"]);
    assert_eq!(ended.results()[0]["reason"]["code"], "id_reused");
    assert_eq!(Held::of(&world), held);
}

#[test]
fn an_id_with_other_content_is_refused_while_its_first_transaction_is_recovered() {
    let mut n_refused = 0;
    for point in 6.. {
        let world = World::with(&services(), &json!([transaction("TX1", &["payments", "stock"])]));
        let first = output(run(&world).env("DTC_FAULT_POINT", point.to_string()));
        if first.status.signal() != Some(ABORTED) {
            break;
        }
        let journal = fs::read(world.path("journal")).unwrap();
        let is_over = journal.windows(4).any(|it| it == b"\x1edtf");
        let other = json!([transaction("TX1", &["payments"])]);
        world.write("transactions.json", other.to_string());
        let ended = output(run(&world).arg("--detail")).exited(0);
        let committed = Held::of(&world).committed.get("TX1").map_or(0, Vec::len);
        // A record that was torn while it was written counts as neither.
        if is_over || ended.stderr.contains("to be finished") {
            assert_eq!(ended.statuses(), ["TX1 ABORTED"], "point {point}");
            assert_eq!(ended.results()[0]["reason"]["code"], "id_reused", "point {point}");
            assert!(committed == 0 || committed == 2, "point {point}: {committed}");
            n_refused += 1;
        } else {
            assert_eq!(ended.statuses(), ["TX1 COMMITTED"], "point {point}");
            assert_eq!(committed, 1, "point {point}");
        }
    }
    assert!(n_refused >= 10, "{n_refused}");
}

#[test]
fn a_commit_that_was_parked_is_tried_again_until_it_succeeds() {
    let failing = json!([
        {"name": "payments", "max_concurrency": 4},
        {"name": "stock", "max_concurrency": 4, "commit": {"fail_for": ["TX1"]}},
    ]);
    let world = World::with(&failing, &json!([transaction("TX1", &["payments", "stock"])]));
    for _ in 0..2 {
        let ended = output(run(&world).arg("--detail")).exited(0);
        assert_eq!(ended.statuses(), ["TX1 COMMITTED"]);
        assert_eq!(ended.results()[0]["unresolved"], json!(["stock"]));
        assert_eq!(Held::of(&world).committed["TX1"], ["payments"]);
    }
    world.write("services.json", services().to_string());
    let ended = output(run(&world).arg("--detail")).exited(0);
    assert_eq!(ended.results()[0]["unresolved"], json!([]));
    let held = Held::of(&world);
    assert_eq!(held.committed["TX1"], ["payments", "stock"]);
    assert_eq!(held.prepared, BTreeSet::new());
    output(&mut run(&world)).exited(0);
    assert_eq!(Held::of(&world), held);
}

#[test]
fn after_the_retention_an_id_is_a_new_transaction() {
    let world = World::with(&services(), &json!([transaction("TX1", &["payments"])]));
    output(&mut run(&world)).exited(0);
    let mut forgetful = run(&world);
    // A decision in the same millisecond is not older than this.
    std::thread::sleep(Duration::from_millis(2));
    output(forgetful.args(["--retention", "0s"])).exited(0);
    assert_eq!(Held::of(&world).committed["TX1"].len(), 2);
}

#[test]
fn a_run_ended_by_a_signal_leaves_nothing_to_finish() {
    let services = json!([{"name": "slow", "max_concurrency": 2, "prepare": {"latency_ms": 20}}]);
    let transactions: Vec<_> =
        (0..5000).map(|n| transaction(&format!("TX{n}"), &["slow"])).collect();
    let world = World::with(&services, &json!(transactions));
    let mut talk = LiveProcess::with(run(&world).args(["--output", "ndjson"]));
    let heard = talk.hear() + &talk.hear();
    talk.signal("INT");
    let ended = talk.end().exited(130);
    let n_told = (heard + &ended.stdout).lines().count();
    let held = Held::of(&world);
    assert_eq!((held.committed.len(), held.prepared.len()), (n_told, 0));
    world.write("none.ndjson", "");
    output(&mut run_over(&world, "none.ndjson")).exited(0).saying_nothing_of("journal");
}

// ---- The file ----------------------------------------------------------------------------------

/// A world with one committed transaction in its journal.
fn with_one() -> World {
    let world = World::with(&services(), &json!([transaction("TX1", &["payments", "stock"])]));
    output(&mut run(&world)).exited(0);
    world
}

#[test]
fn a_torn_tail_is_cut_off_and_reported() {
    let world = with_one();
    let whole = fs::read(world.path("journal")).unwrap();
    for (torn, n_cut) in [
        ([&whole[..], b"\x1edtd"].concat(), 4),
        ([&whole[..], &[0; 4096]].concat(), 4096),
        ([&whole[..], &whole[16..60]].concat(), 44),
    ] {
        fs::write(world.path("journal"), &torn).unwrap();
        let ended = output(&mut run(&world)).exited(0);
        assert_eq!(ended.statuses(), ["TX1 COMMITTED"]);
        let said = format!("journal: truncated a torn tail of {n_cut} bytes\n");
        assert!(ended.stderr.starts_with(&said), "{}", ended.stderr);
        let again = output(&mut run(&world)).exited(0);
        assert!(!again.stderr.contains("cut off"), "{}", again.stderr);
    }
}

#[test]
fn a_journal_cut_anywhere_is_still_a_journal() {
    let world = with_one();
    let whole = fs::read(world.path("journal")).unwrap();
    for len in (0..whole.len()).step_by(7).chain([1, 15, 16, 17]) {
        fs::write(world.path("journal"), &whole[..len]).unwrap();
        // Without the state of the services: that and the journal belong together.
        fs::remove_dir_all(world.path("state")).unwrap();
        let ended = output(&mut run(&world)).exited(0);
        assert_eq!(ended.statuses(), ["TX1 COMMITTED"], "{len}");
        assert_eq!(Held::of(&world).prepared, BTreeSet::new(), "{len}");
    }
}

#[test]
fn a_corrupt_middle_is_an_error_that_names_the_place_and_leaves_the_file() {
    let world = with_one();
    let mut bytes = fs::read(world.path("journal")).unwrap();
    let at = bytes.windows(4).position(|it| it == b"\x1edtd").unwrap();
    bytes[at + 40] ^= 1;
    fs::write(world.path("journal"), &bytes).unwrap();
    let ended = output(&mut run(&world)).exited(65).silent();
    let path = fs::canonicalize(world.path("journal")).unwrap();
    let path = path.display();
    let said =
        format!("the journal `{path}` is corrupt: what was written at byte {at} is damaged, ");
    assert!(ended.stderr.starts_with(&said), "{}", ended.stderr);
    assert_eq!(fs::read(world.path("journal")).unwrap(), bytes);
}

#[test]
fn a_file_that_is_not_a_journal_is_refused_and_left_as_it_is() {
    let world = World::with(&services(), &json!([transaction("TX1", &["payments"])]));
    for (text, said) in [
        ("[]\n", "is not a dtc journal\n"),
        ("dtc journal v2\n\nwhatever", "is of version 2: this release reads version 1\n"),
        ("dtc journal\n", "is not a dtc journal\n"),
    ] {
        world.write("journal", text);
        let ended = output(&mut run(&world)).exited(65).silent();
        assert!(ended.stderr.ends_with(said), "{}", ended.stderr);
        assert_eq!(fs::read_to_string(world.path("journal")).unwrap(), text);
    }
    fs::remove_file(world.path("journal")).unwrap();
    fs::create_dir(world.path("journal")).unwrap();
    output(&mut run(&world))
        .exited(78)
        .silent()
        .saying("the journal `journal` is not a regular file\n");
}

#[test]
fn a_short_file_of_zeros_becomes_a_journal_and_a_longer_one_is_refused() {
    let world = with_one();
    let whole = fs::read(world.path("journal")).unwrap();
    let begun = whole.windows(4).position(|it| it == b"\x1edtb").unwrap();
    for len in [1, 15, 16, 17, 40, begun] {
        fs::write(world.path("journal"), vec![0; len]).unwrap();
        fs::remove_dir_all(world.path("state")).unwrap();
        let ended = output(&mut run(&world)).exited(0);
        assert_eq!(ended.statuses(), ["TX1 COMMITTED"], "{len}");
        let now = fs::read(world.path("journal")).unwrap();
        assert!(now.starts_with(b"dtc journal v1\n\n"), "{len}");
    }
    // Something may have been acted upon.
    let mut stained = vec![0; begun];
    stained[begun - 1] = 1;
    for bytes in [vec![0; whole.len()], vec![0; 4096], stained] {
        fs::write(world.path("journal"), &bytes).unwrap();
        let ended = output(&mut run(&world)).exited(65).silent();
        assert!(ended.stderr.ends_with("is not a dtc journal\n"), "{}", ended.stderr);
        assert_eq!(fs::read(world.path("journal")).unwrap(), bytes);
    }
}

#[test]
fn a_journal_that_is_in_use_is_refused() {
    let world = World::new(&services());
    let mut talk = LiveProcess::with(&mut run_over(&world, "-"));
    talk.say(&ndjson(&[transaction("TX1", &["payments"])]));
    assert_eq!(talk.hear(), "{\"id\":\"TX1\",\"status\":\"COMMITTED\"}\n");
    world.write("none.ndjson", "");
    let said = "the journal `journal` is in use: another process has it open\n";
    output(&mut run_over(&world, "none.ndjson")).exited(78).silent().saying(said);
    talk.close_stdin();
    talk.end().exited(0);
    output(&mut run_over(&world, "none.ndjson")).exited(0);
}

#[test]
fn a_journal_that_cannot_be_created_is_refused() {
    let world = World::with(&services(), &json!([transaction("TX1", &["payments"])]));
    let mut run = world.run();
    run.args(["--journal", "nowhere/journal", "--state", "state"]);
    let ended = output(&mut run).exited(78).silent();
    assert!(
        ended.stderr.starts_with("failed to open the journal `nowhere/journal`: "),
        "{ended:?}"
    );
}

/// A shell that lets no file grow beyond so many blocks of 512 bytes.
fn limited(world: &World, blocks: u32) -> Command {
    let mut shell = Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    shell.args(["-c", &script]).arg(dtc().get_program()).current_dir(world.path(""));
    shell.args(["run", "--services", "services.json", "--transactions", "in.ndjson"]);
    shell.args(["--journal", "journal", "--state", "state", "--max-in-flight", "8"]);
    shell.env_remove("DTC_LOG").env_remove("DTC_CONFIG");
    shell
}

#[test]
fn a_full_disk_ends_the_run_and_loses_nothing() {
    // Services whose logs grow less than the journal does.
    let transactions: Vec<_> = (0..200)
        .map(|n| {
            let mut it = transaction(&format!("TX{n}"), &["payments", "stock"]);
            it["data"]["note"] = json!("x".repeat(2000));
            it
        })
        .collect();
    let world = World::new(&services());
    world.write("in.ndjson", ndjson(&transactions));
    let first = output(&mut limited(&world, 400)).exited(1);
    let said = "failed to write the journal `";
    assert!(first.stderr.contains(said) && first.stderr.contains("large"), "{}", first.stderr);
    let known = told(&first);
    assert!((1..200).contains(&known.len()), "{} were told", known.len());
    for id in known.keys() {
        assert_eq!(Held::of(&world).committed[id].len(), 2, "{id}");
    }
    let second = output(&mut run_over(&world, "in.ndjson")).exited(0);
    assert_eq!(told(&second).len(), 200);
    assert_agreed(&told(&second), &Held::of(&world), &involved(&transactions));
    assert!(known.iter().all(|(id, status)| told(&second)[id] == *status));
}

/// Leaves a world whose services hold TX1 in doubt, and whose journal has lost the record that it
/// was begun, as after a power cut before that was on the disk.
fn with_a_lost_request() -> World {
    for point in 10.. {
        let world = World::with(&services(), &json!([transaction("TX1", &["payments", "stock"])]));
        let first = output(run(&world).env("DTC_FAULT_POINT", point.to_string()));
        assert_eq!(first.status.signal(), Some(ABORTED), "no point has left it so");
        let journal = fs::read(world.path("journal")).unwrap();
        let begun = journal.windows(4).position(|it| it == b"\x1edtb");
        if let (Some(begun), 2) = (begun, Held::of(&world).prepared.len()) {
            fs::write(world.path("journal"), &journal[..begun]).unwrap();
            return world;
        }
    }
    unreachable!("there are fewer points than numbers")
}

#[test]
fn a_branch_of_a_lost_request_is_committed_when_that_is_repeated() {
    let world = with_a_lost_request();
    let n_calls = Held::of(&world).calls;
    let ended = output(&mut run(&world)).exited(0);
    assert_eq!(ended.statuses(), ["TX1 COMMITTED"]);
    let held = Held::of(&world);
    assert_eq!(held.committed["TX1"], ["payments", "stock"]);
    assert_eq!((held.prepared.len(), held.aborted.len()), (0, 0));
    assert_eq!(held.calls, n_calls + 2, "two commits, and nothing is prepared again");
}

#[test]
fn a_branch_of_a_lost_request_is_aborted_when_that_is_not_repeated() {
    let world = with_a_lost_request();
    world.write("other.ndjson", ndjson(&[transaction("TX2", &["payments"])]));
    let ended = output(&mut run_over(&world, "other.ndjson")).exited(0);
    assert_eq!(ended.statuses(), ["TX2 COMMITTED"]);
    let held = Held::of(&world);
    assert_eq!(held.aborted["TX1"], ["payments", "stock"]);
    assert_eq!(held.prepared, BTreeSet::new());
    // Nobody got a result, so it may be requested as if it were new.
    let ended = output(&mut run(&world)).exited(0);
    assert_eq!(ended.statuses(), ["TX1 COMMITTED"]);
}

#[test]
fn a_branch_of_another_journal_is_left_alone() {
    let transactions = [transaction("TX1", &["payments", "stock"])];
    let world = World::with(&services(), &json!(transactions));
    let mut n_in_doubt = 0;
    for point in 1.. {
        let first = output(run(&world).env("DTC_FAULT_POINT", point.to_string()));
        let held = Held::of(&world);
        if first.status.signal() != Some(ABORTED) {
            break;
        }
        if held.prepared.is_empty() {
            let _ = fs::remove_dir_all(world.path("state"));
            let _ = fs::remove_file(world.path("journal"));
            continue;
        }
        n_in_doubt = held.prepared.len();
        break;
    }
    assert!(n_in_doubt > 0);
    let before = Held::of(&world);
    world.write("none.ndjson", "");
    let mut run = world.run_over("none.ndjson");
    let ended = output(run.args(["--journal", "another", "--state", "state"])).exited(0);
    assert!(ended.stderr.contains("prepared under another journal"), "{}", ended.stderr);
    assert_eq!(Held::of(&world), before);
    output(&mut run_over(&world, "none.ndjson")).exited(0);
    assert_eq!(Held::of(&world).prepared, BTreeSet::new());
}

#[test]
fn a_compacted_journal_keeps_its_permissions_and_its_symlink() {
    let transactions: Vec<_> =
        (0..150).map(|n| transaction(&format!("TX{n}"), &["payments"])).collect();
    let world = World::with(&services(), &json!(transactions));
    fs::create_dir(world.path("elsewhere")).unwrap();
    let real = world.path("elsewhere/real");
    std::os::unix::fs::symlink(&real, world.path("journal")).unwrap();
    output(&mut run(&world)).exited(0);
    fs::set_permissions(&real, fs::Permissions::from_mode(0o600)).unwrap();
    let before = fs::metadata(&real).unwrap().len();
    output(&mut run(&world)).exited(0);
    let after = fs::metadata(&real).unwrap();
    assert!(after.len() < before / 2, "{} of {before}", after.len());
    assert_eq!(after.permissions().mode() & 0o777, 0o600);
    assert!(fs::symlink_metadata(world.path("journal")).unwrap().is_symlink());
    assert_eq!(fs::read_dir(world.path("elsewhere")).unwrap().count(), 1);
}

#[test]
fn a_journal_that_cannot_be_compacted_stays_in_use() {
    let transactions: Vec<_> =
        (0..150).map(|n| transaction(&format!("TX{n}"), &["payments"])).collect();
    let world = World::with(&services(), &json!(transactions));
    let first = output(&mut run(&world)).exited(0);
    let before = fs::metadata(world.path("journal")).unwrap().len();
    // No file can be created with this name.
    fs::create_dir(world.path("journal.rewritten")).unwrap();
    let second = output(run(&world).env("DTC_LOG", "warn")).exited(0);
    assert_eq!(second.stdout, first.stdout);
    assert!(second.stderr.contains("journal compaction failed"), "{}", second.stderr);
    assert!(
        fs::metadata(world.path("journal")).unwrap().len() > before,
        "the uncompacted file stays in use"
    );
    fs::remove_dir(world.path("journal.rewritten")).unwrap();
    assert_eq!(output(&mut run(&world)).exited(0).stdout, first.stdout);
    assert!(fs::metadata(world.path("journal")).unwrap().len() < before / 2);
}

// ---- Flags -------------------------------------------------------------------------------------

#[test]
fn a_journal_needs_a_state_directory() {
    let world = World::with(&services(), &json!([]));
    for (arguments, missing) in [
        (&["--journal", "journal"][..], "--state <DIR>"),
        (&["--state", "state"], "--journal <FILE>"),
        (&["--retention", "1d"], "--journal <FILE>"),
    ] {
        let ended = output(world.run().args(arguments)).exited(2).silent();
        assert!(ended.stderr.contains(missing), "{}", ended.stderr);
    }
    let ended = output(run(&world).args(["--broker", "amqp://localhost"])).exited(2).silent();
    assert!(ended.stderr.contains("cannot be used with"), "{}", ended.stderr);
    output(run(&world).args(["--retention", "soon"])).exited(2).silent();
}

// ---- The documentation -------------------------------------------------------------------------

#[test]
fn a_newcomer_who_follows_the_page_kills_a_run_and_loses_nothing() {
    let world = World::new(&json!([]));
    let (script, printed) = script(&page("docs/embedded.md"), "## A run that survives its process");
    let mut shell = Command::new("bash");
    // Everything that it has started ends with it.
    let script = format!("trap 'kill -9 $(jobs -p) 2> /dev/null || true' EXIT\n{script}");
    shell.args(["-euc", &script]).current_dir(world.path("")).env_remove("DTC_LOG");
    let mut path = dtc().get_program().to_owned();
    path = Path::new(&path).parent().unwrap().as_os_str().to_owned();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let ended = output(shell.env("PATH", path)).exited(0);

    let n_told = fs::read_to_string(world.path("first.ndjson")).unwrap().matches('\n').count();
    assert!((1..5000).contains(&n_told), "{n_told} were told: the first run was not killed");
    assert!(ended.stderr.contains("j: to be finished: "), "{}", ended.stderr);
    let wanted = printed.join("\n").replace('…', &n_told.to_string());
    assert_eq!(ended.stdout, format!("{wanted}\n"), "{}", ended.stderr);
}
