//! A worker that reads the older part of the journal from packs, and what is wrong with packs.

use std::{ops::Range, sync::Arc};

use dtc::{
    ReasonCode, Transaction,
    transport::amqp::publisher::{OutgoingMessage, Publisher},
    wire::message::{Items, Kind, PackedMessage, decode},
};
use lapin::message::Delivery;
use serde_json::json;
use tokio::time::Instant;

use super::{
    PATIENCE, READY, System,
    load::{Load, Plan, percentile},
    long_journal::{Content, confirmed, fill},
    stream::{Watch, delete},
    until,
};
use crate::{
    broker::{Broker, place},
    processes::{LIMIT, Process, World},
    proxy::{Action, CONSUME, Frames, Proxy, Scope},
};

/// How many messages a pack has at most.
const PACK_MAX: usize = 1024;

/// What of the journal's end may be in no pack: one is due with up to one and a half.
const UNPACKED_MAX: usize = 2 * PACK_MAX;

/// How many messages are enough for the first pack.
const PACKED_AT: usize = PACK_MAX * 3 / 2 + 16;

/// How many decisions a journal has that is long: so many as `DTC_TEST_DECISIONS` says.
fn decisions() -> usize {
    let wanted = std::env::var("DTC_TEST_DECISIONS");
    wanted.map_or(8 * PACK_MAX, |text| text.parse().expect("DTC_TEST_DECISIONS is a number"))
}

fn system() -> System {
    let service = |name| json!({"name": name, "max_concurrency": 10});
    System::new(place(), json!([service("payments"), service("stock")]))
}

/// Writes so many decisions while a worker packs them, which is the result; and waits until it has.
fn write_and_pack(system: &System, decisions: usize) -> Process {
    let packs = Watch::stream(system, system.names.packed_journal());
    let until_packed = |offset: usize| {
        until("what was read is packed", || packed_up_to(&packs) >= offset as u64);
    };
    let worker = system.worker("w1", &[]);
    // It writes none until it knows that others have written none: no more are written meanwhile than
    // it keeps.
    write(system, 0..PACKED_AT, 1);
    until_packed(1);
    // One after the other: the worker reads them as they are written.
    write(system, PACKED_AT..decisions, 1);
    until_packed(decisions - UNPACKED_MAX);
    worker
}

/// Writes these decisions, each by itself; without optimisation too.
fn write(system: &System, decisions: Range<usize>, outstanding: usize) {
    let content = Content { decisions, per_message: 1, outstanding };
    system.runtime.block_on(fill(system, &content));
}

/// The number that follows `name=` in a line of a log.
#[track_caller]
fn number(line: &str, name: &str) -> usize {
    let after = line.split_once(&format!("{name}=")).map(|(_, after)| after);
    let digits = after.map(|after| after.split(|it: char| !it.is_ascii_digit()).next());
    digits.flatten().and_then(|digits| digits.parse().ok()).unwrap_or_else(|| panic!("{line}"))
}

/// What a worker that starts has read: how many decisions, and how many of them from packs.
fn has_read(worker: &Process) -> (usize, usize) {
    let line = worker.wait_for_line("the journal is read", LIMIT);
    worker.wait_for_line(READY, LIMIT);
    println!("{line}");
    (number(&line, "decisions"), number(&line, "packed"))
}

fn offset(delivery: &Delivery) -> u64 {
    let headers = delivery.properties.headers().as_ref().unwrap();
    let offset = headers.inner()["x-stream-offset"].as_long_long_int().unwrap();
    u64::try_from(offset).unwrap()
}

/// Up to which offset of the journal there are packs.
fn packed_up_to(packs: &Watch) -> u64 {
    let seen = packs.seen();
    let copies = seen.iter().flat_map(|it| decode::<PackedMessage>(&it.data).unwrap());
    copies.map(|copied| copied.unwrap().offset).max().unwrap_or(0)
}

/// A worker knows of that decision: it was made for another request under this id.
fn assert_is_known(system: &System, number: usize) {
    let transaction = Transaction::new(format!("order-{number:08}"), ["payments"], json!({}));
    let client = system.client();
    let submitting = client.submit_and_wait(transaction, PATIENCE);
    let answer = system.runtime.block_on(submitting).unwrap();
    assert_eq!(answer.reason.map(|reason| reason.code), Some(ReasonCode::IdReused));
}

#[test]
fn a_worker_that_starts_reads_the_older_part_of_the_journal_from_packs() {
    let decisions = decisions();
    let system = system();
    let mut first = write_and_pack(&system, decisions);

    let second = system.start_worker("w2", &[]);
    let (n_read, n_packed) = has_read(&second);
    assert_eq!(n_read, decisions);
    // The last pack is compared with the journal.
    assert!(n_packed >= decisions - UNPACKED_MAX - PACK_MAX, "{n_packed}");
    let said = second.stderr.text();
    assert!(!said.contains("do not agree") && !said.contains("incomplete"), "{said}");
    first.terminate();
    first.exited(0, LIMIT);
    assert_is_known(&system, 1);
    assert_is_known(&system, decisions - 1);
}

/// They read all of a long journal, one message after the other, and results of others came after
/// 1.2 s.
#[test]
fn transactions_commit_while_four_workers_start_at_once_on_a_long_journal() {
    let system = system();
    let instances = ["payments", "stock"].map(|it| system.instance(it, it, &[]));
    let decisions = decisions();
    let first = write_and_pack(&system, decisions);
    let plan =
        Plan { services: &["payments", "stock"], total: 500, per_second: 100, timeout: None };
    let alone = Load::start(&system, "alone", plan).results();

    let load = Load::start(&system, "beside", plan);
    load.wait_for(50);
    let started = Instant::now();
    let others = ["w2", "w3", "w4", "w5"].map(|name| system.start_worker(name, &[]));
    for other in &others {
        assert!(has_read(other).1 >= decisions - UNPACKED_MAX - PACK_MAX);
    }
    let serve_after = started.elapsed();
    let beside = load.results();
    for (when, results) in [("before", &alone), ("while four workers start", &beside)] {
        let latencies = results.latencies();
        let [p50, p99] = [50, 99].map(|it| percentile(&latencies, it));
        println!(
            "{when}: p50 {p50:.1?}, p99 {p99:.1?}, at most {:.1?}",
            percentile(&latencies, 100)
        );
        assert_eq!(results.committed().len(), plan.total, "{:?}", results.counts());
    }
    println!("{decisions} decisions; all four serve after {serve_after:.1?}");
    drop((first, others, instances));
}

#[test]
fn packs_of_a_journal_that_was_made_anew_are_ignored() {
    let decisions = 5 * PACK_MAX;
    let system = system();
    let mut first = write_and_pack(&system, decisions);
    first.terminate();
    first.exited(0, LIMIT);

    delete(&system, system.names.journal());
    system.world.apply_topology(Some(&system.services));
    let anew = decisions - PACK_MAX;
    write(&system, 0..anew, 50);
    let second = system.start_worker("w2", &[]);
    assert_eq!(has_read(&second), (anew, 0));
}

#[test]
fn a_pack_that_does_not_agree_with_the_journal_is_ignored_and_nothing_is_guessed() {
    let decisions = 4 * PACK_MAX;
    let system = system();
    write(&system, 0..decisions, 50);
    let mut copies = copies_of(&system, decisions);
    // A decision that was never made, in the last pack.
    let last = packs_of(&copies).pop().unwrap();
    let number = (last.start + last.end) / 2;
    let forged = &mut copies[number];
    assert!(forged.body.contains(&format!("order-{number:08}")), "{}", forged.body);
    forged.body = forged.body.replace("order-", "OTHER-").into();

    write_packs(&system, &copies, Some(&user(&system)));
    let worker = system.start_worker("w1", &[]);
    worker.wait_for_line("the packs of the journal do not agree with it", LIMIT);
    assert_eq!(has_read(&worker), (decisions, 0));
    assert_is_known(&system, 1);
    assert_is_known(&system, number);
}

#[test]
fn packs_that_no_worker_vouches_for_are_ignored() {
    let decisions = 4 * PACK_MAX;
    let system = system();
    write(&system, 0..decisions, 50);
    write_packs(&system, &copies_of(&system, decisions), None);
    let worker = system.start_worker("w1", &[]);
    assert_eq!(has_read(&worker), (decisions, 0));
    let said = worker.stderr.text();
    assert!(!said.contains("do not agree"), "{said}");
}

#[test]
fn garbage_among_packs_is_skipped() {
    let decisions = 4 * PACK_MAX;
    let system = system();
    write(&system, 0..decisions, 50);
    let copies = copies_of(&system, decisions);
    let mut jump = Items::new();
    [&copies[1], &copies[3]].into_iter().for_each(|copied| jump.push(copied).unwrap());
    let bodies = [
        b"\x00\xff\xfe".to_vec(),
        Vec::new(),
        b"17".to_vec(),
        br#"[{"offset":1,"body":7}]"#.to_vec(),
        br#"[{"offset":9007199254740993,"body":""}]"#.to_vec(),
        vec![b' '; 300 * 1024],
        jump.into_body(),
    ];
    let garbage = bodies.map(|body| (Kind::Pack, body)).into_iter();
    let garbage: Vec<_> = garbage.chain([(Kind::Decision, b"[]".to_vec())]).collect();
    publish(&system, garbage.clone(), Some(&user(&system)));
    write_packs(&system, &copies, Some(&user(&system)));
    publish(&system, garbage, Some(&user(&system)));

    let worker = system.start_worker("w1", &[]);
    // The first one is read in the journal, and the last pack is compared with it.
    let last = packs_of(&copies).pop().unwrap();
    assert_eq!(has_read(&worker), (decisions, last.start));
    let said = worker.stderr.text();
    assert_eq!(said.matches("skipping a pack").count(), 1, "{said}");
    assert_is_known(&system, 1);
}

/// A pack was written while no queue took it, or its writer died.
#[test]
fn a_gap_between_packs_is_read_in_the_journal() {
    let decisions = 8 * PACK_MAX;
    let system = system();
    write(&system, 0..decisions, 50);
    let copies = copies_of(&system, decisions);
    let packs = packs_of(&copies);
    let gap = packs.len() / 2;
    let without = |number: usize| (number != gap).then(|| packs[number].clone());
    let written: Vec<_> = (0..packs.len()).filter_map(without).collect();
    write_these(&system, &copies, &written, Some(&user(&system)));

    let worker = system.start_worker("w1", &[]);
    // The first message after each gap is read in the journal, and so is the last pack before it.
    let last = packs.last().unwrap();
    let packed = packs[gap - 1].start + last.start - packs[gap + 1].start;
    assert_eq!(has_read(&worker), (decisions, packed));
    assert_is_known(&system, packs[gap].start + 1);
}

/// The broker delivers no pack, as while a stream has no leader; or begins no consumer.
#[test]
fn a_worker_whose_packs_do_not_arrive_reads_the_journal() {
    let decisions = 4 * PACK_MAX;
    let system = system();
    write(&system, 0..decisions, 50);
    write_packs(&system, &copies_of(&system, decisions), Some(&user(&system)));
    let packs = system.names.packed_journal();
    for (frames, deed) in [
        (Frames::deliveries(), Action::Swallow),
        (Frames::questions(CONSUME), Action::NotFound),
        (Frames::confirms(), Action::Swallow),
    ] {
        let proxy = Proxy::to(&system.world.place.url);
        let stopped = proxy.rule(frames.about(packs.as_str()), Scope::All, deed);
        let mut worker = start_by(&system, proxy.url(&system.world.place.url));
        assert_eq!(has_read(&worker), (decisions, 0), "{deed:?}");
        assert!(stopped.count() > 0, "{deed:?}");
        assert_is_known(&system, 1);
        worker.terminate();
        worker.exited(0, LIMIT);
    }
}

#[test]
fn a_worker_goes_on_when_the_packed_stream_is_deleted_while_it_runs() {
    let system = system();
    let packs = Watch::stream(&system, system.names.packed_journal());
    let mut command = system.world.dtc(&["worker", "--name", "w1"]);
    let mut worker = Process::start("w1", command.env("DTC_LOG", "debug"));
    worker.wait_for_line(READY, LIMIT);
    write(&system, 0..PACKED_AT, 1);
    until("what was read is packed", || packed_up_to(&packs) >= 1);
    delete(&system, system.names.packed_journal());
    write(&system, PACKED_AT..3 * PACKED_AT, 1);
    until("the worker notices", || {
        let said = worker.stderr.text();
        said.contains("did not take a pack") || said.contains("lost the consumer of packs")
    });
    assert_is_known(&system, 1);
    assert_is_known(&system, 3 * PACKED_AT - 1);
    worker.terminate();
    worker.exited(0, LIMIT);
    // The requests that have shown that it serves were rejected.
    let alarming = |line: &&String| line.contains(" WARN ") || line.contains(" ERROR ");
    let lines = worker.stderr.all();
    let mut alarming = lines.iter().filter(alarming);
    assert!(alarming.all(|line| line.contains("id_reused")), "{lines:#?}");
}

/// Every login is that of `guest`, whatever name it comes with: so a token's user may have another
/// name than the URL.
const EVERYBODY_IS_GUEST: &str = r#"
    Parse = fun(Text) ->
        {ok, Tokens, _} = erl_scan:string(Text),
        {ok, Form} = erl_parse:parse_form(Tokens),
        Form
    end,
    {ok, Module, Code} = compile:forms([Parse(Text) || Text <- [
        "-module(everybody_is_guest).",
        "-export([user_login_authentication/2]).",
        "user_login_authentication(_, _) ->
            {ok, {auth_user, <<\"guest\">>, [administrator], none}}."
    ]]),
    {module, Module} = code:load_binary(Module, "everybody_is_guest.beam", Code),
    application:set_env(rabbit, auth_backends, [{Module, rabbit_auth_backend_internal}])."#;

/// It said so at the level DEBUG alone.
#[test]
fn a_worker_that_the_broker_knows_by_another_name_works_without_packs_and_says_so() {
    let broker = Broker::start();
    broker.control(&["eval", EVERYBODY_IS_GUEST]);
    let system = System::new(broker.place(), json!([{"name": "payments", "max_concurrency": 10}]));
    let url = system.world.place.url.replace("guest:guest@", "token:secret@");
    let worker = start_by(&system, url);
    worker.wait_for_line(READY, LIMIT);
    write(&system, 0..PACKED_AT, 50);
    let said = worker.wait_for_line("is not the one in `broker.url`", LIMIT);
    println!("{said}");
    assert!(said.contains(" WARN "), "{said}");
    assert!(said.contains("'token'") && said.contains("'guest'"), "{said}");
    assert_is_known(&system, 1);
}

#[test]
fn a_worker_without_the_packed_stream_starts_as_before() {
    let decisions = 3 * PACK_MAX;
    let system = system();
    write(&system, 0..decisions, 50);
    delete(&system, system.names.packed_journal());
    let worker = system.start_worker("w1", &[]);
    assert_eq!(has_read(&worker), (decisions, 0));
    let said = worker.wait_for_line("workers start sooner", LIMIT);
    let queue = system.names.packed_journal();
    assert!(said.contains(queue.as_str()) && said.contains("dtc topology apply"), "{said}");
    assert_is_known(&system, 1);
}

/// A worker, just started, which reaches its broker by `url`.
fn start_by(system: &System, url: String) -> Process {
    let mut place = system.world.place.clone();
    place.url = url;
    let mut command = World::at(place).dtc(&["worker", "--name", "w1"]);
    Process::start("w1", command.current_dir("/"))
}

/// The user that all of a test's processes are.
fn user(system: &System) -> String {
    let (_, after) = system.world.place.url.split_once("//").unwrap();
    after.split(':').next().unwrap().to_owned()
}

/// All that is in the journal but for its first record.
fn copies_of(system: &System, decisions: usize) -> Vec<PackedMessage> {
    let journal = Watch::journal(system);
    until("the journal is read", || journal.seen().len() > decisions);
    journal.seen().iter().skip(1).map(copy_of).collect()
}

fn copy_of(delivery: &Delivery) -> PackedMessage {
    let message_id = delivery.properties.message_id().as_ref();
    PackedMessage {
        offset: offset(delivery),
        message_id: message_id.map(|id| id.as_str().into()),
        tried: None,
        body: std::str::from_utf8(&delivery.data).unwrap().into(),
    }
}

/// What goes into each pack: it begins with what the one before it ends with. The end is in none.
fn packs_of(copies: &[PackedMessage]) -> Vec<Range<usize>> {
    let (mut packs, mut begins) = (Vec::new(), 0);
    while begins + PACK_MAX <= copies.len() {
        let mut items = Items::new();
        let some = copies[begins..begins + PACK_MAX].iter();
        let len = some.take_while(|copied| items.push(*copied).is_ok()).count();
        packs.push(begins..begins + len);
        begins += len - 1;
    }
    packs
}

fn write_packs(system: &System, copies: &[PackedMessage], user: Option<&str>) {
    write_these(system, copies, &packs_of(copies), user);
}

fn write_these(
    system: &System,
    copies: &[PackedMessage],
    packs: &[Range<usize>],
    user: Option<&str>,
) {
    let packs = packs.iter().map(|pack| {
        let mut items = Items::new();
        copies[pack.clone()].iter().for_each(|copied| items.push(copied).unwrap());
        (Kind::Pack, items.into_body())
    });
    publish(system, packs.collect(), user);
}

/// Publishes to the stream of packs.
fn publish(system: &System, messages: Vec<(Kind, Vec<u8>)>, user: Option<&str>) {
    system.runtime.block_on(async {
        let connection = Arc::new(system.address().connect("publish").await.unwrap());
        let mut publisher = Publisher::open(&connection, "packs").await.unwrap();
        for (kind, body) in messages {
            let message = OutgoingMessage {
                key: system.names.packed_journal(),
                message_type: kind.as_type(),
                body,
                persistent: true,
                mandatory: true,
                user_id: user.map(Into::into),
                ..OutgoingMessage::default()
            };
            publisher.publish(message, ());
            confirmed(&mut publisher).await;
        }
        connection.close(200, "".into()).await.unwrap();
    });
}
