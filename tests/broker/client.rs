//! Producers on a real broker: the test plays the worker, message by message.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs,
    time::Duration,
};

use dtc::{
    Client, Outcome, Transaction,
    client::{
        SubmitError, WaitError,
        history::{self, Since},
    },
    clock::Clock,
    protocol::{
        ids::{
            Branch, InstanceId, RequestHash, ServiceName, TransactionId, TransactionKey, WorkerId,
        },
        message::{Answer, Decision, Parked, ParkedCause, Request},
        time::Time,
    },
    transport::amqp::{
        connection::Broker as Address,
        names::{Names, Namespace, key},
        topology::{
            Settings, Topology,
            apply::{ApplyOptions, apply},
        },
    },
    wire::message::{Item, Items, Settled, decode_request, decode_requests},
};
use futures_util::{StreamExt, future::join_all};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties, Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions,
        ConfirmSelectOptions, QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    broker::{Broker, Leftovers, Place, place, until_served},
    processes::World,
};

/// The default of `topology.clock_margin`.
const CLOCK_MARGIN: Duration = Duration::from_secs(60);

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

// ---- The library -----------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn the_broker_has_the_request_when_submit_returns() {
    let desk = PlayedWorker::new(place()).await;
    let transaction = Transaction::new("TX1", ["b", "a", "b"], json!({"amount": 1}));
    let key = desk.client().submit(transaction).await.unwrap();
    let delivery = desk.take_now().await.unwrap();
    let properties = &delivery.properties;
    assert_eq!(delivery.exchange.as_str(), desk.names.requests().as_str());
    assert_eq!(delivery.routing_key.as_str(), "request");
    assert_eq!(properties.kind().as_ref().unwrap().as_str(), "dtc.request.v1");
    assert_eq!(properties.message_id().as_ref().unwrap().as_str(), "TX1");
    assert_eq!(*properties.delivery_mode(), Some(2));
    assert_eq!(properties.timestamp().map(|it| it * 1000), Some(key.requested_at.as_millis()));
    let body: Value = serde_json::from_slice(&delivery.data).unwrap();
    assert_eq!(body, json!({"id": "TX1", "involved_services": ["a", "b"], "data": {"amount": 1}}));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_topology_the_error_names_the_remedy_at_once() {
    let place = place();
    let client = client(&place);
    let error = client.submit(transaction("TX1")).await.unwrap_err();
    assert!(matches!(error, SubmitError::NoTopology { .. }), "{error:?}");
    assert!(error.to_string().contains("dtc topology apply"), "{error}");
    let error = client.submit_and_wait(transaction("TX1"), PATIENCE).await.unwrap_err();
    assert!(matches!(error, WaitError::NoTopology { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn results_in_any_order_are_matched_to_their_requests() {
    const COUNT: usize = 200;
    let desk = PlayedWorker::new(place()).await;
    let client = desk.client();
    let waiting = (0..COUNT).map(|number| {
        let client = client.clone();
        async move { client.submit_and_wait(transaction(&format!("TX{number}")), PATIENCE).await }
    });
    let waiting = tokio::spawn(join_all(waiting));
    let mut consumer = desk.consume().await;
    let mut requests = Vec::new();
    while requests.len() < COUNT {
        requests.push(take(&mut consumer).await);
    }
    requests.reverse();
    for several in requests.chunks(7) {
        let answers: Vec<_> =
            several.iter().map(|request| answer(request, number(request))).collect();
        desk.answer(several[0].reply.as_ref().unwrap().as_str(), &answers).await;
    }
    for (number, answer) in waiting.await.unwrap().into_iter().enumerate() {
        let answer = answer.unwrap();
        assert_eq!(answer.id.as_str(), format!("TX{number}"));
        assert_eq!(answer.outcome, outcome_of(number), "{number}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_to_a_retry_under_a_new_timestamp_names_the_earlier_transaction() {
    let desk = PlayedWorker::new(place()).await;
    let client = desk.client();
    let waiting =
        tokio::spawn(
            async move { client.submit_and_wait(transaction("TX2"), PATIENCE).await.unwrap() },
        );
    let request = take(&mut desk.consume().await).await;
    let mut answer = answer(&request, 0);
    answer.requested_at = answer.requested_at - Duration::from_secs(100);
    desk.answer(request.reply.unwrap().as_str(), &[answer.clone()]).await;
    let result = waiting.await.unwrap();
    assert_eq!(result.requested_at, answer.requested_at);
    assert_eq!((result.id, result.outcome), (answer.id, answer.outcome));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_timed_out_can_be_repeated_under_the_same_key() {
    let desk = PlayedWorker::new(place()).await;
    let client = desk.client();
    let mut consumer = desk.consume().await;
    // With all connections open, a request reaches the broker at once.
    let warm = tokio::spawn({
        let client = client.clone();
        async move { client.submit_and_wait(transaction("TX0"), PATIENCE).await.unwrap() }
    });
    let request = take(&mut consumer).await;
    desk.answer(request.reply.as_ref().unwrap().as_str(), &[answer(&request, 0)]).await;
    warm.await.unwrap();
    let error = client.submit_and_wait(transaction("TX1"), Duration::from_secs(5)).await;
    let WaitError::Unanswered { key, source: None, .. } = error.unwrap_err() else {
        panic!("it was confirmed, and not answered");
    };
    let again = transaction("TX1").requested_at(key.requested_at);
    let waiting =
        tokio::spawn(async move { client.submit_and_wait(again, PATIENCE).await.unwrap() });
    let (first, second) = (take(&mut consumer).await, take(&mut consumer).await);
    assert_eq!(first, second);
    assert_eq!(first.key, key);
    desk.answer(second.reply.as_ref().unwrap().as_str(), &[answer(&second, 0)]).await;
    assert_eq!(waiting.await.unwrap().outcome, Outcome::Committed);
}

#[tokio::test(flavor = "multi_thread")]
async fn unanswered_requests_are_sent_again_under_the_same_key_after_a_lost_connection() {
    let broker = Broker::start();
    let desk = PlayedWorker::new(broker.place()).await;
    let client = desk.client();
    let waiting = tokio::spawn(async move {
        client.submit_and_wait(transaction("TX1"), Duration::from_secs(120)).await.unwrap()
    });
    let delivery = desk.consume().await.consumer.next().await.unwrap().unwrap();
    let first = decode_request(&delivery.data, *delivery.properties.timestamp()).unwrap();
    let restarting = tokio::task::spawn_blocking(move || {
        broker.restart();
        broker
    });
    let _broker = restarting.await.unwrap();
    let (desk, mut consumer) = desk.again().await;
    // The earlier request, since nobody has acknowledged it; and its copy.
    let (again, copy) = (take(&mut consumer).await, take(&mut consumer).await);
    // Its result comes through another queue, since the earlier one may still exist, locked.
    assert_ne!(copy.reply, first.reply);
    let is_copy = Request { reply: first.reply.clone(), ..copy.clone() };
    assert_eq!([&again, &is_copy], [&first, &first]);
    desk.answer(copy.reply.as_ref().unwrap().as_str(), &[answer(&copy, 0)]).await;
    assert_eq!(waiting.await.unwrap().requested_at, first.key.requested_at);
}

/// A node that was cut off from the others keeps its clients' queues, which no result reaches. Or
/// nothing was decided meanwhile, and the results are on their way.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_result_is_requested_through_another_queue_and_may_arrive_through_both() {
    let desk = PlayedWorker::new(place()).await;
    let client = desk.client();
    let waiting = tokio::spawn(async move {
        let submit = |id| client.submit_and_wait(transaction(id), Duration::from_secs(120));
        tokio::join!(submit("TX0"), submit("TX2"))
    });
    let mut consumer = desk.consume().await;
    let mut asked: BTreeMap<_, Vec<_>> = BTreeMap::new();
    while asked.values().map(Vec::len).sum::<usize>() < 4 {
        let request = take(&mut consumer).await;
        asked.entry(request.key.clone()).or_default().push(request);
    }
    let [Some([first, _]), Some([before, after])] = [0, 1].map(|at| {
        asked.values().nth(at).map(|copies| <[Request; 2]>::try_from(copies.clone()).unwrap())
    }) else {
        panic!("two transactions are asked for twice each: {asked:?}");
    };
    assert_ne!(before.reply, after.reply, "the same queue was to take the result");
    desk.answer(first.reply.as_ref().unwrap().as_str(), &[answer(&first, 0)]).await;
    desk.answer(after.reply.as_ref().unwrap().as_str(), &[answer(&after, 0)]).await;
    let (first, second) = waiting.await.unwrap();
    assert_eq!([first.unwrap().outcome, second.unwrap().outcome], [Outcome::Committed; 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_waits_for_an_absent_broker_no_longer_than_its_timeout() {
    let client = client(&at(place(), "amqp://127.0.0.1:9"));
    let limit = Duration::from_millis(500);
    let error = client.submit_and_wait(transaction("TX1"), limit).await.unwrap_err();
    assert!(matches!(error, WaitError::Unanswered { .. }), "{error:?}");
}

// ---- `dtc submit` ----------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn submitted_files_print_their_results_in_order() {
    let desk = PlayedWorker::new(place()).await;
    let world = World::at(desk.place.clone());
    let file = world.file("transactions.json", &transactions(50));
    let mut submit = world.submit(&file, &["--wait"]);
    let mut consumer = desk.consume().await;
    let mut requests = Vec::new();
    while requests.len() < 50 {
        requests.push(take(&mut consumer).await);
    }
    for request in requests.iter().rev() {
        let answer = answer(request, number(request));
        desk.answer(request.reply.as_ref().unwrap().as_str(), &[answer]).await;
    }
    submit.exited(0, PATIENCE);
    let results: Vec<Value> = serde_json::from_str(&submit.stdout.text()).unwrap();
    let expected: Vec<_> = (0..50)
        .map(|number| json!({"id": format!("TX{number}"), "status": outcome_of(number).as_str()}))
        .collect();
    assert_eq!(results, expected);
    assert!(submit.stderr.text().contains("25 committed, 25 aborted, 0 unresolved"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_submitted_again_with_the_same_requested_at_is_the_same_transactions() {
    let desk = PlayedWorker::new(place()).await;
    let world = World::at(desk.place.clone());
    let file = world.file("transactions.json", &transactions(3));
    for _ in 0..2 {
        let submit = world.submit(&file, &["--requested-at", "1700000000"]);
        assert!(submit.succeeded(PATIENCE).is_empty());
    }
    let mut consumer = desk.consume().await;
    let mut keys = Vec::new();
    while keys.len() < 6 {
        keys.push(take(&mut consumer).await.key.to_string());
    }
    keys.sort();
    let expected: Vec<_> = (0..6).map(|number| format!("TX{}@1700000000000", number / 2)).collect();
    assert_eq!(keys, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_without_a_result_in_time_are_named() {
    let desk = PlayedWorker::new(place()).await;
    let world = World::at(desk.place);
    let file = world.file("transactions.json", &transactions(2));
    let mut submit =
        world.submit(&file, &["--wait", "--timeout", "500ms", "--requested-at", "1700000000"]);
    submit.exited(1, PATIENCE);
    assert_eq!(submit.stdout.text().trim(), "[]");
    let said = submit.stderr.text();
    assert!(said.contains("2 of 2 not answered: "), "{said}");
    assert!(said.contains("TX1 (--requested-at 1700000000)"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_bad_array_is_sent_and_of_bad_lines_only_the_earlier_ones() {
    let desk = PlayedWorker::new(place()).await;
    let world = World::at(desk.place.clone());
    let bad = world.file("bad.json", &json!([{"id": "TX1"}]));
    world.submit(&bad, &[]).exited(65, PATIENCE);
    let large = "x".repeat(256 * 1024 - 100);
    let large = json!([{"id": "L", "involved_services": ["a"], "data": {"x": large}}]);
    let large = world.file("large.json", &large);
    world.submit(&large, &[]).exited(65, PATIENCE);
    let lines = world.path("lines.ndjson");
    fs::write(&lines, format!("{}\n{{}}\n", one("TX7"))).unwrap();
    let mut submit = world.submit(&lines, &[]);
    submit.exited(65, PATIENCE);
    assert!(submit.stderr.text().contains("lines.ndjson:2"), "{}", submit.stderr.text());
    assert_eq!(take(&mut desk.consume().await).await.key.id.as_str(), "TX7");
    assert!(desk.take_now().await.is_none());
}

#[test]
fn an_absent_or_refusing_broker_has_its_exit_code() {
    let place = place();
    let world = World::at(place.clone());
    let file = world.file("transactions.json", &transactions(1));
    world.submit(&file, &[]).exited(78, PATIENCE);
    world.submit(&file, &["--wait"]).exited(78, PATIENCE);
    let nobody = at(place.clone(), "amqp://127.0.0.1:9");
    World::at(nobody).submit(&file, &[]).exited(69, PATIENCE);
    let host = place.url.rsplit('@').next().unwrap();
    let stranger = format!("amqp://guest:hush-hush@{}", host.trim_start_matches("amqp://"));
    let mut refused = World::at(at(place, &stranger)).submit(&file, &[]);
    refused.exited(77, PATIENCE);
    assert!(!refused.stderr.text().contains("hush"), "{}", refused.stderr.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_signal_submit_sends_no_more_and_waits_for_what_was_sent() {
    let desk = PlayedWorker::new(place()).await;
    let world = World::at(desk.place.clone());
    let mut command = world.dtc(&["submit", "-", "--wait"]);
    command.stdin(std::process::Stdio::piped());
    let mut child = command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, format!("{}\n", one("TX1")).as_bytes()).unwrap();
    let request = take(&mut desk.consume().await).await;
    let id = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGINT).unwrap();
    let said = crate::lines::Lines::of(child.stderr.take().unwrap());
    assert!(said.wait_for("interrupted", PATIENCE).is_some());
    desk.answer(request.reply.as_ref().unwrap().as_str(), &[answer(&request, 0)]).await;
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    let output = timeout(PATIENCE, output).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(output.stdout, b"{\"id\":\"TX1\",\"status\":\"COMMITTED\"}\n");
    drop(stdin);
}

// ---- `dtc status` ----------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn status_shows_the_first_record_of_every_transaction_with_the_id() {
    let desk = PlayedWorker::new(place()).await;
    let now = Clock::start().now();
    // As far back as the journal is complete.
    let at = Time::from_millis((now + Duration::from_secs(120)).as_millis() / 1000 * 1000);
    let mut first = decision("TX1", at, Outcome::Committed, "w1");
    let payments = ServiceName::parse("payments").unwrap();
    let branch = Branch::of(&InstanceId::parse("i1").unwrap(), 7);
    first.branches = vec![(payments.clone(), branch.clone())];
    let void = decision("TX1", at, Outcome::Aborted, "w2");
    let other = decision("TX1", at + Duration::from_secs(1), Outcome::Aborted, "w2");
    desk.write(&[decision("TX0", at, Outcome::Aborted, "w1"), first.clone()]).await;
    desk.write::<Decision>(&[]).await;
    desk.write(&[void, other]).await;
    let parked_at = now + Duration::from_secs(1);
    let cause = ParkedCause::Uncommitted {
        service: payments.clone(),
        branch: branch.clone(),
        error: Some("disk full".into()),
    };
    desk.write_to(&desk.names.unresolved(), &[Parked { key: first.key.clone(), cause, parked_at }])
        .await;

    let world = World::at(desk.place.clone());
    let [one, two]: [Value; 2] = status(&world, &["TX1"], 0).try_into().unwrap();
    assert_eq!((&one["outcome"], &one["worker"]), (&json!("COMMITTED"), &json!("w1")));
    assert_eq!((&one["void_records"], &one["certain"]), (&json!(1), &json!(true)));
    assert_eq!(one["branches"], json!({"payments": "i1.7"}));
    let parked = &one["parked"][0];
    assert_eq!((&parked["error"], &parked["settled_at"]), (&json!("disk full"), &Value::Null));
    assert_eq!((&two["outcome"], &two["parked"]), (&json!("ABORTED"), &json!([])));

    let settled_at = parked_at + Duration::from_secs(1);
    let worker = WorkerId::parse("w3").unwrap();
    let settled = Settled { key: first.key, service: payments, settled_at, worker };
    desk.write_to(&desk.names.unresolved(), &[settled]).await;
    let found = status(&world, &["TX1"], 0);
    assert_eq!(found[0]["parked"][0]["settled_at"], settled_at.as_millis());
}

#[tokio::test(flavor = "multi_thread")]
async fn status_says_since_when_the_journal_is_complete_if_it_finds_nothing() {
    let desk = PlayedWorker::new(place()).await;
    let world = World::at(desk.place.clone());
    let begun_at = desk.begun_at.as_millis();
    let missing = json!([
        {"id": "TX9", "found": false, "not_found_since": begun_at, "looked_since": null},
    ]);
    assert_eq!(json!(status(&world, &["TX9"], 1)), missing);
    let now = Clock::start().now();
    desk.write(&[decision("TX1", now, Outcome::Aborted, "w1")]).await;
    let both = status(&world, &["TX9", "TX1"], 1);
    assert_eq!((&both[0]["outcome"], &both[1]), (&json!("ABORTED"), &missing[0]));
    // The journal begins later than that.
    assert_eq!(json!(status(&world, &["TX9", "--since", "1h"], 1)), missing);
    let found = status(&world, &["TX1", "--since", "1h"], 0);
    assert_eq!(found[0]["outcome"], "ABORTED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_without_its_beginning_is_complete_a_margin_after_its_first_record() {
    let desk = PlayedWorker::bare(place()).await;
    desk.stream(&desk.names.journal()).await;
    desk.stream(&desk.names.unresolved()).await;
    let world = World::at(desk.place.clone());
    assert_eq!(status(&world, &["TX9"], 1)[0]["not_found_since"], Value::Null);
    let now = Clock::start().now();
    let record = decision("TX1", now, Outcome::Committed, "w1");
    let decided_at = record.decided_at;
    desk.write(&[record]).await;
    let both = status(&world, &["TX1", "TX9"], 1);
    assert_eq!((&both[0]["outcome"], &both[0]["certain"]), (&json!("COMMITTED"), &json!(false)));
    let since = (decided_at + CLOCK_MARGIN).as_millis();
    assert_eq!(both[1]["not_found_since"], since);
}

#[tokio::test(flavor = "multi_thread")]
async fn status_looks_back_until_it_finds_a_day_at_most_and_says_how_far() {
    let desk = PlayedWorker::bare(place()).await;
    desk.stream(&desk.names.journal()).await;
    desk.stream(&desk.names.unresolved()).await;
    let now = Clock::start().now();
    let day = Duration::from_secs(24 * 60 * 60);
    let old = decision("TX0", now - day * 2, Outcome::Aborted, "w1");
    desk.write(&[old, decision("TX1", now, Outcome::Committed, "w1")]).await;
    let world = World::at(desk.place.clone());
    let back = |found: &Value| {
        let since = Time::from_millis(found["looked_since"].as_u64().unwrap());
        Clock::start().now().since(since)
    };
    let near = |back: Duration, wanted: Duration| back >= wanted && back < wanted + PATIENCE;

    let found = status(&world, &["TX1"], 0).remove(0);
    assert_eq!((&found["outcome"], &found["certain"]), (&json!("COMMITTED"), &json!(true)));
    assert!(near(back(&found), Duration::from_secs(15 * 60)), "{found}");
    let missing = status(&world, &["TX1", "TX9"], 1).remove(1);
    assert!(near(back(&missing), day), "{missing}");
    assert_eq!(missing["not_found_since"], missing["looked_since"]);
    let missing = status(&world, &["TX9", "--since", "36h"], 1).remove(0);
    assert!(near(back(&missing), day * 3 / 2), "{missing}");
    let missing = status(&world, &["TX9", "--since", "2026-01-02T03:04:05Z"], 1).remove(0);
    assert_eq!(missing["looked_since"], Value::Null, "the journal begins later");
    assert_eq!(status(&world, &["TX9", "--all"], 1)[0]["looked_since"], Value::Null);

    let mut command = world.dtc(&["status", "TX9"]);
    let mut process = crate::processes::Process::start("status", &mut command);
    process.exited(1, PATIENCE);
    let said = process.stdout.text();
    assert!(said.starts_with("TX9  not found since 20"), "{said}");
    assert!(said.contains("\nlooked back to 20"), "{said}");
    assert!(said.trim_end().ends_with("; --since or --all looks further"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn status_does_not_read_records_older_than_it_looks_back() {
    let desk = PlayedWorker::new(place()).await;
    let now = Clock::start().now();
    for number in 0..100 {
        desk.write(&[decision(&format!("TX{number}"), now, Outcome::Committed, "w1")]).await;
    }
    let key = decision("TX1", now, Outcome::Committed, "w1").key;
    let service = ServiceName::parse("payments").unwrap();
    let branch = Branch::of(&InstanceId::parse("i1").unwrap(), 7);
    let cause = ParkedCause::Uncommitted { service, branch, error: None };
    let parked = Parked { key: key.clone(), cause, parked_at: now };
    desk.write_to(&desk.names.unresolved(), &[parked]).await;
    let ids = BTreeSet::from([key.id]);
    let (address, names) = address(&desk.place);
    for (since, n_read, n_found) in [
        (Since::Always, 100, 1),
        (Since::Ago(Duration::ZERO), 100, 1),
        (Since::Moment(now + CLOCK_MARGIN * 2), 0, 0),
    ] {
        let looking_up = history::look_up(&address, &names, &ids, since, CLOCK_MARGIN);
        let history = looking_up.await.unwrap();
        let read = (history.n_records, history.transactions.len());
        assert_eq!(read, (n_read, n_found), "{since:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn status_without_a_topology_is_a_configuration_error() {
    let world = World::at(place());
    let status = crate::processes::Process::start("status", &mut world.dtc(&["status", "TX1"]));
    let mut status = status;
    status.exited(78, PATIENCE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_journal_is_read_to_its_end() {
    const MESSAGES: usize = 50_000;
    let desk = PlayedWorker::new(place()).await;
    let now = Clock::start().now();
    let mut confirms = Vec::new();
    for number in 0..MESSAGES {
        let record = decision(&format!("TX{number}"), now, Outcome::Committed, "w1");
        confirms.push(desk.publish_to(&desk.names.journal(), &[record]).await);
    }
    for confirm in confirms {
        assert!(confirm.await.unwrap().is_ack());
    }
    let last = format!("TX{}", MESSAGES - 1);
    let ids: BTreeSet<_> =
        ["TX0", &last, "TX"].iter().map(|id| TransactionId::parse(id).unwrap()).collect();
    let began = tokio::time::Instant::now();
    let (address, names) = address(&desk.place);
    let looking_up = history::look_up(&address, &names, &ids, Since::Always, CLOCK_MARGIN);
    let history = looking_up.await.unwrap();
    let took = began.elapsed();
    println!("{MESSAGES} records read in {took:?}: {:.0}/s", MESSAGES as f64 / took.as_secs_f64());
    assert_eq!((history.n_records, history.n_unreadable), (MESSAGES as u64, 0));
    assert_eq!(history.transactions.len(), 2);
}

fn status(world: &World, arguments: &[&str], code: i32) -> Vec<Value> {
    let mut command = world.dtc(&["status", "--output", "json"]);
    let mut process = crate::processes::Process::start("status", command.args(arguments));
    process.exited(code, PATIENCE);
    serde_json::from_str(&process.stdout.text()).unwrap()
}

// ---- `dtc run --broker` -----------------------------------------------------------------------

#[test]
fn a_run_through_a_broker_ends_like_one_without_and_leaves_nothing() {
    let place = place();
    let world = World::at(place.clone());
    let services = json!([
        {"name": "a", "max_concurrency": 2, "prepare": {"fail_for": ["TX2"]}},
        {"name": "b", "max_concurrency": 1, "commit": {"fail_first": 1}},
    ]);
    let services = world.file("services.json", &services);
    let transactions = world.file(
        "transactions.json",
        &json!([
            {"id": "TX1", "involved_services": ["a", "b"], "data": {}},
            {"id": "TX2", "involved_services": ["a"], "data": {}},
            {"id": "TX3", "involved_services": ["b", "nobody"], "data": {}},
        ]),
    );
    let command = world.dtc(&["run", "--detail", "--report", "report.json"]);
    // In its own namespace.
    let words: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let words = words.iter().filter(|word| **word != *"--namespace" && **word != *place.namespace);
    let mut run = std::process::Command::new(command.get_program());
    run.args(words).arg("--services").arg(services).arg("--transactions").arg(transactions);
    run.current_dir(world.path("."));
    let mut run = crate::processes::Process::start("run", &mut run);
    run.exited(0, PATIENCE);
    assert!(!run.stderr.text().contains("trying again"), "{}", run.stderr.text());
    let results: Vec<Value> = serde_json::from_str(&run.stdout.text()).unwrap();
    let told: Vec<_> =
        results.iter().map(|it| (it["status"].as_str().unwrap(), &it["reason"]["code"])).collect();
    let (failed, unknown) = (json!("failed"), json!("unknown_service"));
    assert_eq!(told, [("COMMITTED", &Value::Null), ("ABORTED", &failed), ("ABORTED", &unknown)]);
    assert_eq!(
        results[0]["attempts"],
        json!({"a": {"prepare": 1, "commit": 1, "abort": 0}, "b": {"prepare": 1, "commit": 2, "abort": 0}})
    );
    let report: Value =
        serde_json::from_slice(&fs::read(world.path("report.json")).unwrap()).unwrap();
    assert_eq!((&report["committed"], &report["aborted"]), (&json!(1), &json!(2)));
    assert_eq!(report["services"]["b"]["longest_wait_ms"], Value::Null);
}

// ---- Who plays the worker --------------------------------------------------------------------

/// A worker that does what the test says.
struct PlayedWorker {
    place: Place,
    names: Names,
    begun_at: Time,
    channel: Channel,
    _connection: Connection,
    _leftovers: Leftovers,
}

/// The same `place`, at another address.
fn at(mut place: Place, url: &str) -> Place {
    url.clone_into(&mut place.url);
    place
}

fn address(place: &Place) -> (Address, Names) {
    let address = Address::new(place.url.parse().unwrap(), "test");
    (address, Names::new(Namespace::parse(&place.namespace).unwrap()))
}

/// A client that connects when it is used.
fn client(place: &Place) -> Client {
    Client::builder(&place.url).namespace(&place.namespace).connect_lazy().unwrap()
}

impl PlayedWorker {
    /// With the topology declared.
    async fn new(place: Place) -> Self {
        let (address, names) = address(&place);
        let now = Clock::start().now();
        let clock_margin = CLOCK_MARGIN;
        let options = ApplyOptions { settings: Settings::default(), now, clock_margin };
        let applied = apply(&address, &names, &[], &options).await.unwrap();
        let begun_at = applied.begun.unwrap().complete_since;
        Self { begun_at, ..Self::bare(place).await }
    }

    /// Without a topology.
    async fn bare(place: Place) -> Self {
        let (_, names) = address(&place);
        let topology = Topology::of(&names, &[], &Settings::default());
        let queues = topology.queues.iter().map(|it| it.name.to_string()).collect();
        let exchanges = topology.exchanges.iter().map(|it| it.name.to_string()).collect();
        let leftovers = place.leaves(queues, exchanges);
        let connection =
            Connection::connect(&place.url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        let begun_at = Time::EPOCH;
        Self { place, names, begun_at, channel, _connection: connection, _leftovers: leftovers }
    }

    /// The same after the broker was away, with the requests.
    async fn again(self) -> (Self, TakenRequests) {
        let again = async |connection, channel: Channel| {
            let consumer = consume(&channel, &self.names).await?;
            Ok((connection, channel, consumer))
        };
        let (connection, channel, consumer) = until_served(&self.place.url, again).await;
        (Self { channel, _connection: connection, ..self }, consumer)
    }

    fn client(&self) -> Client {
        client(&self.place)
    }

    async fn stream(&self, name: &lapin::types::ShortString) {
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("stream".into()));
        self.channel.queue_declare(name.clone(), options, arguments).await.unwrap();
    }

    /// A request, if there is one.
    async fn take_now(&self) -> Option<Delivery> {
        let taken = self
            .channel
            .basic_get(self.names.requests(), BasicGetOptions::default())
            .await
            .unwrap();
        taken.map(|message| message.delivery)
    }

    async fn consume(&self) -> TakenRequests {
        consume(&self.channel, &self.names).await.unwrap()
    }

    async fn answer(&self, reply: &str, answers: &[Answer]) {
        let mut items = Items::new();
        answers.iter().for_each(|answer| items.push(answer).unwrap());
        let properties = BasicProperties::default().with_type("dtc.result.v1".into());
        let confirm = self
            .channel
            .basic_publish(
                self.names.results(),
                key(reply, answers[0].outcome),
                BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() },
                &items.into_body(),
                properties,
            )
            .await
            .unwrap()
            .await
            .unwrap();
        assert!(matches!(confirm, lapin::Confirmation::Ack(None)), "{confirm:?}");
    }

    /// Writes into the journal.
    async fn write<T: Item>(&self, items: &[T]) {
        self.write_to(&self.names.journal(), items).await;
    }

    async fn write_to<T: Item>(&self, stream: &lapin::types::ShortString, items: &[T]) {
        assert!(self.publish_to(stream, items).await.await.unwrap().is_ack());
    }

    async fn publish_to<T: Item>(
        &self,
        stream: &lapin::types::ShortString,
        items: &[T],
    ) -> lapin::PublisherConfirm {
        let mut body = Items::new();
        items.iter().for_each(|item| body.push(item).unwrap());
        let properties = BasicProperties::default().with_type(T::KIND.as_type().into());
        let options = BasicPublishOptions::default();
        self.channel
            .basic_publish("".into(), stream.clone(), options, &body.into_body(), properties)
            .await
            .unwrap()
    }
}

async fn consume(channel: &Channel, names: &Names) -> lapin::Result<TakenRequests> {
    let (options, nothing) = (BasicConsumeOptions::default(), FieldTable::default());
    let consuming = channel.basic_consume(names.requests(), "".into(), options, nothing);
    Ok(TakenRequests { consumer: consuming.await?, ready: VecDeque::new() })
}

/// Requests as they come, each for itself.
struct TakenRequests {
    consumer: Consumer,
    /// Those of the last message that were not returned.
    ready: VecDeque<Request>,
}

async fn take(requests: &mut TakenRequests) -> Request {
    if let Some(next) = requests.ready.pop_front() {
        return next;
    }
    let delivery = timeout(PATIENCE, requests.consumer.next()).await.unwrap().unwrap().unwrap();
    delivery.ack(BasicAckOptions::default()).await.unwrap();
    let read = decode_requests(&delivery.data, *delivery.properties.timestamp());
    requests.ready.extend(read.items.into_iter().map(|item| item.read.unwrap()));
    requests.ready.pop_front().unwrap()
}

fn transaction(id: &str) -> Transaction {
    Transaction::new(id, ["payments"], json!({"amount": 1}))
}

fn one(id: &str) -> Value {
    json!({"id": id, "involved_services": ["payments"], "data": {}})
}

fn transactions(count: usize) -> Value {
    (0..count).map(|number| one(&format!("TX{number}"))).collect()
}

fn number(request: &Request) -> usize {
    request.key.id.as_str().trim_start_matches("TX").parse().unwrap()
}

fn outcome_of(number: usize) -> Outcome {
    if number.is_multiple_of(2) { Outcome::Committed } else { Outcome::Aborted }
}

fn answer(request: &Request, number: usize) -> Answer {
    let TransactionKey { id, requested_at } = request.key.clone();
    let (outcome, decided_at) = (outcome_of(number), requested_at);
    Answer { id, requested_at, outcome, reason: None, unresolved: vec![], decided_at }
}

fn decision(id: &str, at: Time, outcome: Outcome, worker: &str) -> Decision {
    let requested_at = Time::from_millis(at.as_millis() / 1000 * 1000);
    Decision {
        key: TransactionKey { id: TransactionId::parse(id).unwrap(), requested_at },
        request_hash: RequestHash([7; 16]),
        outcome,
        branches: vec![],
        reason: None,
        decided_at: requested_at + Duration::from_millis(1),
        worker: WorkerId::parse(worker).unwrap(),
    }
}
