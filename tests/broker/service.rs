//! A service on a real broker: the test plays the worker, message by message.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use dtc::{
    Readiness,
    input::services,
    participant::{error::ServeError, serve::serve, settings::ServeSettings},
    protocol::{ids::ServiceName, message::Cap, time::Time},
    simulated::{service::Simulated, store::SimulatedStore},
    transport::amqp::{
        connection::Broker as Address,
        names::{Names, Namespace, key},
        topology::{
            self, ServiceTopology,
            apply::{ApplyOptions, apply},
        },
    },
};
use futures_util::StreamExt;
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer, Queue,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicPublishOptions,
        ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

use crate::{
    broker::{Broker, Place, place, until_served},
    lines::Lines,
};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a prepare waits for a slot, or for an instance, in milliseconds.
const PATIENT: u64 = 60_000;
const SERVICE: &str = "payments";
const HASH: &str = "000102030405060708090a0b0c0d0e0f";

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_votes_for_a_prepare_and_commits_it() {
    let world = World::new(place(), PATIENT).await;
    let service = world.serve(r#""max_concurrency": 4"#, |settings| settings);
    world.prepare(&[1]).await;
    let vote = world.hear("vote").await;
    assert_eq!((id(&vote), &vote["vote"], &vote["free"]), (1, &json!("prepared"), &json!(3)));
    assert_eq!((&vote["service"], &vote["request_hash"]), (&json!(SERVICE), &json!(HASH)));
    let branch = vote["branch"].clone();
    assert!(branch.as_str().unwrap().starts_with(vote["instance"].as_str().unwrap()));

    // Again: the same branch, and no call.
    world.prepare(&[1]).await;
    assert_eq!(world.hear("vote").await["branch"], branch);

    world.commit(&vote).await;
    let done = world.hear("done").await;
    assert_eq!((id(&done), &done["done"], &done["free"]), (1, &json!(true), &json!(4)));
    // Again: it is remembered.
    world.commit(&vote).await;
    assert_eq!(world.hear("done").await["done"], json!(true));
    world.prepare(&[1]).await;
    let vote = world.hear("vote").await;
    assert_eq!((&vote["vote"], &vote["outcome"]), (&json!("finished"), &json!("COMMITTED")));
    service.stop().await.unwrap();
    assert_eq!(world.calls(), ["prepare 1 prepared", "commit 1 done"]);
    assert_eq!(world.committed(), [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_prepares_in_one_message_are_answered_in_one_message() {
    let world = World::new(place(), PATIENT).await;
    let service = world.serve(r#""max_concurrency": 50"#, |settings| settings);
    let ids: Vec<_> = (1..=40).collect();
    world.prepare(&ids).await;
    let votes = world.hear_all("vote", 40).await;
    assert_eq!(votes.iter().map(id).collect::<BTreeSet<_>>(), ids.iter().copied().collect());

    let queries: Vec<_> = ids.iter().map(|&id| query(id)).collect();
    world.tell("all", "dtc.query.v1", &queries).await;
    let (kind, again) = world.hear_message().await;
    assert_eq!((kind.as_str(), again.len()), ("vote", 40));
    let branches = |votes: &[Value]| -> BTreeSet<_> {
        votes.iter().map(|vote| (id(vote), vote["branch"].to_string())).collect()
    };
    assert_eq!(branches(&again), branches(&votes));

    let finishes: Vec<_> = votes.iter().map(|vote| commit_of(vote, false)).collect();
    world.tell("all", "dtc.finish.v1", &finishes).await;
    let (kind, dones) = world.hear_message().await;
    assert_eq!((kind.as_str(), dones.len()), ("done", 40));
    assert!(dones.iter().all(|done| done["done"] == json!(true)));
    service.stop().await.unwrap();
    assert_eq!(world.committed(), ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_broker_alone_enforces_the_cap() {
    let world = World::new(place(), PATIENT).await;
    let service = world.serve(r#""max_concurrency": 3"#, |settings| ServeSettings {
        own_limit: false,
        ..settings
    });
    world.prepare(&(1..=9).collect::<Vec<_>>()).await;
    let mut held = world.hear_all("vote", 3).await;
    world.waits_in(&world.names.prepare_of(&world.service), 6).await;
    let mut voted = held.len();
    // Each one that ends makes room for exactly one more.
    while let Some(vote) = held.pop() {
        world.commit(&vote).await;
        world.hear("done").await;
        if voted < 9 {
            held.push(world.hear("vote").await);
            voted += 1;
        }
    }
    service.stop().await.unwrap();
    println!("cap 3, prefetch alone: at most {} of 9 at once", world.most_at_once());
    assert_eq!(world.most_at_once(), 3);
    assert_eq!(world.committed(), (1..=9).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepare_that_finds_no_slot_is_returned_to_the_worker() {
    let world = World::new(place(), 0).await;
    let service = world.serve(r#""max_concurrency": 1"#, |settings| settings);
    world.wait_for_consumer().await;
    world.prepare(&[1]).await;
    world.hear("vote").await;
    world.prepare(&[2]).await;
    assert_eq!(id(&world.hear("prepare").await), 2);
    service.stop_now().await;
    assert_eq!(world.calls(), ["prepare 1 prepared"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_instance_votes_for_what_a_killed_one_has_prepared() {
    let world = World::new(place(), PATIENT).await;
    let mut killed = world.start_process(r#""max_concurrency": 2"#);
    world.prepare(&[1, 2]).await;
    let votes = world.hear_all("vote", 2).await;
    killed.child.kill().unwrap();
    killed.child.wait().unwrap();
    let service = world.serve(r#""max_concurrency": 2"#, |settings| settings);
    // The broker delivers both again; a held one keeps its branch.
    let again = world.hear_all("vote", 2).await;
    for vote in &again {
        let first = votes.iter().find(|it| it["id"] == vote["id"]).unwrap();
        assert_eq!(vote["branch"], first["branch"]);
        assert_ne!(vote["instance"], first["instance"]);
        world.commit(vote).await;
    }
    world.hear_all("done", 2).await;
    service.stop().await.unwrap();
    let called = ["prepare 1 prepared", "prepare 2 prepared", "commit 1 done", "commit 2 done"];
    assert_eq!(
        world.calls().into_iter().collect::<BTreeSet<_>>(),
        called.map(str::to_owned).into()
    );
    assert_eq!(world.committed(), [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_that_another_instance_holds_takes_no_slot() {
    let world = World::new(place(), PATIENT).await;
    let first = world.serve(r#""max_concurrency": 1"#, |settings| settings);
    world.prepare(&[1]).await;
    let vote = world.hear("vote").await;
    // The first is full, so this reaches the second, whose only slot stays free.
    let second = world.serve(r#""max_concurrency": 1"#, |settings| settings);
    world.publish(&world.names.prepare(), "w1", "dtc.prepare.v1", &json!([prepare(1, true)])).await;
    let again = world.hear("vote").await;
    assert_eq!(again["branch"], vote["branch"]);
    assert_ne!(again["instance"], vote["instance"]);
    world.prepare(&[2]).await;
    let other = world.hear("vote").await;
    assert_eq!((id(&other), &other["instance"]), (2, &again["instance"]));
    for vote in [&vote, &other] {
        world.commit(vote).await;
        world.hear("done").await;
    }
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    assert_eq!(world.committed(), [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_message_is_rejected_and_the_others_are_handled() {
    let world = World::new(place(), PATIENT).await;
    let service = world.serve(r#""max_concurrency": 1"#, |settings| settings);
    let (to_slot, to_all) = (world.names.prepare(), world.names.finish());
    let w1 = Some("w1");
    let good = prepare(7, false);
    let oversized = json!([{ "id": "8", "data": { "x": "x".repeat(300 * 1024) } }]).to_string();
    let bad = [
        (&to_slot, "w1", "dtc.prepare.v1", w1, "[{".to_owned(), "JSON"),
        (&to_slot, "w1", "dtc.prepare.v1", None, json!([good]).to_string(), "reply_to"),
        (&to_slot, "w1", "dtc.prepare.v1", Some("a.b"), json!([good]).to_string(), "reply_to"),
        (&to_slot, "w1", "dtc.prepare.v1", w1, "[]".to_owned(), "no items"),
        (&to_slot, "w1", "dtc.prepare.v1", w1, oversized, "bytes"),
        (&to_slot, "w1", "dtc.vote.v1", w1, json!([good]).to_string(), "dtc.vote.v1"),
        (&to_all, "all", "dtc.finish.v2", w1, "[]".to_owned(), "dtc.finish.v2"),
        (&to_all, "all", "dtc.finish.v1", None, "[]".to_owned(), "reply_to"),
        (&to_all, "gone", "dtc.query.v1", w1, json!([{"id": "?"}]).to_string(), "id"),
    ];
    // With one slot, any prepare that kept it would end the test here.
    for (exchange, to, kind, reply_to, body, complaint) in bad {
        let message = (kind, reply_to, body.clone().into_bytes());
        world.publish_raw(exchange, &key(to, SERVICE), message).await;
        let rejected = world.next_rejected().await;
        assert_eq!(String::from_utf8_lossy(&rejected.data), body);
        let header = |name: &str| {
            let headers = rejected.properties.headers().as_ref().unwrap();
            match headers.inner().get(name) {
                Some(AMQPValue::LongString(text)) => text.to_string(),
                other => panic!("header {name} is {other:?}"),
            }
        };
        assert!(header("reason").contains(complaint), "{complaint}: {}", header("reason"));
        assert_eq!(
            (header("type"), header("routing_key")),
            (kind.to_owned(), key(to, SERVICE).to_string())
        );
        assert!(header("queue").starts_with(&world.names.namespace().to_string()));
    }
    // A bad item doesn't spoil the good ones beside it.
    world.tell("all", "dtc.query.v1", &[json!({"id": "?"}), query(1)]).await;
    world.next_rejected().await;
    world.prepare(&[1]).await;
    let vote = world.hear("vote").await;
    assert_eq!((id(&vote), &vote["vote"]), (1, &json!("prepared")));
    service.stop_now().await;
    assert_eq!(world.calls(), ["prepare 1 prepared"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_commit_is_kept_until_its_done_is_safe() {
    let world = World::new(place(), PATIENT).await;
    let queue = world.names.finish_any_of(&world.service);
    let service = world.serve(r#""max_concurrency": 1"#, |settings| settings);
    world.prepare(&[1]).await;
    let vote = world.hear("vote").await;
    // No queue takes messages for any worker, so the done can't be safe.
    let inquiries = world.names.inquiries();
    let unbound = world.channel.queue_unbind(
        inquiries.clone(),
        inquiries.clone(),
        "#".into(),
        FieldTable::default(),
    );
    unbound.await.unwrap();
    world.tell("gone", "dtc.finish.v1", &[commit_of(&vote, true)]).await;
    world.until("the commit is applied", || !world.committed().is_empty()).await;
    service.stop_now().await;
    world.waits_in(&queue, 1).await;

    world.apply(PATIENT).await;
    let service = world.serve(r#""max_concurrency": 1"#, |settings| settings);
    let done = world.hear("done").await;
    assert_eq!((&done["done"], &done["parked"]), (&json!(true), &json!(true)));
    service.stop().await.unwrap();
    world.waits_in(&queue, 0).await;
    assert_eq!(world.committed(), [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_for_an_instance_that_is_gone_are_applied_by_another() {
    let world = World::new(place(), PATIENT).await;
    let mut killed = world.start_process(r#""max_concurrency": 2"#);
    world.prepare(&[1]).await;
    let vote = world.hear("vote").await;
    killed.child.kill().unwrap();
    killed.child.wait().unwrap();
    // The other one would also get what its broken connection holds.
    world.drop_prepares().await;
    let service = world.serve(r#""max_concurrency": 2"#, |settings| settings);
    world.wait_for_consumer().await;
    world.commit(&vote).await;
    let done = world.hear("done").await;
    assert_eq!((id(&done), &done["done"]), (1, &json!(true)));
    assert_ne!(done["instance"], vote["instance"]);
    service.stop().await.unwrap();
    assert_eq!(world.committed(), [1]);
}

/// Both served, and each got commits of what the other one had prepared.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_with_another_store_does_not_serve_beside_those_that_share_one() {
    let world = World::new(place(), PATIENT).await;
    let (one, elsewhere) = (r#""max_concurrency": 1"#, tempfile::tempdir().unwrap());
    let first = world.serve(one, |settings| settings);
    world.prepare(&[1]).await;
    let vote = world.hear("vote").await;
    let second = world.start_process(one);
    let mut other = world.start(Some(elsewhere.path()), one);
    let code = other.child.wait().unwrap().code();
    let said = other.printed.wait_for("all instances of a service must share one store", PATIENCE);
    println!("{}", said.unwrap_or_else(|| other.printed.text()));
    assert_eq!(code, Some(78));
    world.commit(&vote).await;
    world.hear("done").await;
    first.stop().await.unwrap();
    drop(second);
    assert_eq!(world.committed(), [1]);
    // There is no other instance left that differs.
    drop(world.start_process_with(elsewhere.path(), one));
}

/// It was only warned, and lost commits: what it had prepared ended with it, and what the others had
/// prepared it could not commit.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_with_its_state_in_memory_serves_alone_or_not_at_all() {
    let world = World::new(place(), PATIENT).await;
    let (spec, state) = (r#""max_concurrency": 1"#, Some(world.directory.path()));
    for (first, second) in [(state, None), (None, state), (None, None)] {
        let serving = world.start(first, spec);
        let ready = serving.printed.wait_for("ready", PATIENCE);
        assert!(ready.is_some(), "{}", serving.printed.text());
        let mut late = world.start(second, spec);
        let said = late.printed.wait_for("must share one store", PATIENCE);
        let said = said.unwrap_or_else(|| panic!("{}", late.printed.text()));
        println!("{said}");
        assert_eq!(late.child.wait().unwrap().code(), Some(78));
        assert!(said.contains("`in-memory:own-") && said.contains("--state"), "{said}");
        drop(serving);
        world.wait_for_no_consumer().await;
    }
}

/// It was left by a node that was down when its last user went.
#[tokio::test(flavor = "multi_thread")]
async fn a_leftover_store_queue_without_instances_keeps_no_instance_out() {
    let world = World::new(place(), PATIENT).await;
    let queue = world.names.store_of(&world.service);
    let options =
        QueueDeclareOptions { durable: true, auto_delete: true, ..QueueDeclareOptions::default() };
    let mut arguments = FieldTable::default();
    for (name, value) in [
        ("x-queue-type", "classic"),
        ("x-dead-letter-exchange", ""),
        ("x-dead-letter-routing-key", "gone"),
    ] {
        arguments.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    world.channel.queue_declare(queue.clone(), options, arguments).await.unwrap();
    let service = world.serve(r#""max_concurrency": 1"#, |settings| settings);
    world.wait_for_consumer().await;
    world.until_counts(queue.as_str(), |(_, consumers)| consumers == 1).await;
    service.stop().await.unwrap();
}

/// It answered that it was done, since it holds nothing of it; and nobody ever committed it.
#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_reaches_the_wrong_store_fails_and_waits_for_the_right_one() {
    let world = World::new(place(), PATIENT).await;
    let mut killed = world.start_process(r#""max_concurrency": 2"#);
    world.prepare(&[1]).await;
    let vote = world.hear("vote").await;
    killed.child.kill().unwrap();
    killed.child.wait().unwrap();
    world.drop_prepares().await;
    let elsewhere = tempfile::tempdir().unwrap();
    let mut other = world.start_process_with(elsewhere.path(), r#""max_concurrency": 2"#);

    world.tell("all", "dtc.finish.v1", &[commit_of(&vote, false)]).await;
    let done = world.hear("done").await;
    println!("{done}");
    assert_eq!((id(&done), &done["done"]), (1, &json!(false)));
    assert!(done["error"].as_str().unwrap().contains("share one store"), "{done}");
    let said = other.printed.wait_for("ERROR", PATIENCE).expect("it is an error");
    println!("{said}");
    assert!(said.contains(vote["branch"].as_str().unwrap()), "{said}");

    // A parked commit stays with the wrong instance as long as that is connected.
    world.tell("gone", "dtc.finish.v1", &[commit_of(&vote, true)]).await;
    let queue = world.names.finish_any_of(&world.service);
    world.waits_in(&queue, 0).await;
    other.child.kill().unwrap();
    other.child.wait().unwrap();
    world.waits_in(&queue, 1).await;
    let right = world.serve(r#""max_concurrency": 2"#, |settings| settings);
    let done = world.hear("done").await;
    assert_eq!((&done["done"], &done["parked"]), (&json!(true), &json!(true)));
    right.stop().await.unwrap();
    assert_eq!(world.committed(), [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_the_broker_changes_neither_what_is_held_nor_the_cap() {
    let broker = Broker::start();
    let mut world = World::new(broker.place(), PATIENT).await;
    let service = world.serve(r#""max_concurrency": 2"#, |settings| settings);
    world.prepare(&[1, 2]).await;
    let votes = world.hear_all("vote", 2).await;
    broker.restart();
    world.reconnect().await;
    world.wait_for_consumer().await;
    // The prepares of both are lost with the broker, but not their slots.
    world.prepare(&[3, 4, 5]).await;
    world.tell("all", "dtc.query.v1", &[query(1), query(2)]).await;
    let again = world.hear_all("vote", 2).await;
    for vote in &again {
        let first = votes.iter().find(|it| it["id"] == vote["id"]).unwrap();
        assert_eq!((&vote["vote"], &vote["branch"]), (&json!("prepared"), &first["branch"]));
        assert_eq!(vote["free"], json!(0));
    }
    let mut held = again;
    let mut voted = 2;
    while let Some(vote) = held.pop() {
        world.commit(&vote).await;
        world.hear("done").await;
        if voted < 5 {
            held.push(world.hear("vote").await);
            voted += 1;
        }
    }
    service.stop().await.unwrap();
    println!("cap 2, broker restarted: at most {} at once", world.most_at_once());
    assert_eq!(world.most_at_once(), 2);
    assert_eq!(world.committed(), [1, 2, 3, 4, 5]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_without_an_outcome_inquires() {
    let world = World::new(place(), PATIENT).await;
    let service = world.serve(r#""max_concurrency": 1"#, |settings| ServeSettings {
        inquire_after: Duration::from_millis(100),
        ..settings
    });
    world.prepare(&[1]).await;
    let vote = world.hear("vote").await;
    let inquiry = world.hear("inquiry").await;
    for field in ["id", "requested_at", "request_hash", "branch", "instance", "service"] {
        assert_eq!(inquiry[field], vote[field], "{field}");
    }
    service.stop_now().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_stops_takes_no_prepares_and_gets_the_outcomes_of_what_it_holds() {
    let world = World::new(place(), PATIENT).await;
    let mut service = world.serve(r#""max_concurrency": 4"#, |settings| settings);
    world.prepare(&[1]).await;
    let vote = world.hear("vote").await;
    service.tell_to_stop();
    world.wait_for_no_consumer().await;
    world.prepare(&[2]).await;
    // Another instance takes what comes meanwhile.
    let other = world.serve(r#""max_concurrency": 4"#, |settings| settings);
    let taken = world.hear("vote").await;
    assert_eq!(id(&taken), 2);
    assert_ne!(taken["instance"], vote["instance"]);
    assert!(!service.task.is_finished());
    world.commit(&vote).await;
    assert_eq!(id(&world.hear("done").await), 1);
    timeout(PATIENCE, &mut service.task).await.unwrap().unwrap().unwrap();
    world.commit(&taken).await;
    world.hear("done").await;
    other.stop().await.unwrap();
    assert_eq!(world.committed(), [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_stops_waits_no_longer_than_its_drain() {
    let world = World::new(place(), PATIENT).await;
    let service = world.serve(r#""max_concurrency": 1"#, |settings| ServeSettings {
        drain: Duration::from_millis(200),
        ..settings
    });
    world.prepare(&[1]).await;
    let vote = world.hear("vote").await;
    service.stop().await.unwrap();
    let other = world.serve(r#""max_concurrency": 1"#, |settings| settings);
    assert_eq!(world.hear("vote").await["branch"], vote["branch"]);
    world.commit(&vote).await;
    world.hear("done").await;
    other.stop().await.unwrap();
    assert_eq!(world.committed(), [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_queue_is_consumed_again_once_it_is_declared() {
    let world = World::new(place(), PATIENT).await;
    let service = world.serve(r#""max_concurrency": 1"#, |settings| settings);
    world.wait_for_consumer().await;
    let queue = world.names.prepare_of(&world.service);
    world.channel.queue_delete(queue, QueueDeleteOptions::default()).await.unwrap();
    world.apply(PATIENT).await;
    world.wait_for_consumer().await;
    world.prepare(&[1]).await;
    let vote = world.hear("vote").await;
    world.commit(&vote).await;
    world.hear("done").await;
    service.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_instance_holds_is_committed_while_its_prepare_queue_is_missing() {
    let world = World::new(place(), PATIENT).await;
    let readiness = Readiness::new();
    let mut serving = readiness.subscribe();
    let service = world.serve(r#""max_concurrency": 2"#, |settings| ServeSettings {
        readiness: readiness.clone(),
        ..settings
    });
    world.prepare(&[1]).await;
    let vote = world.hear("vote").await;
    let queue = world.names.prepare_of(&world.service);
    world.channel.queue_delete(queue, QueueDeleteOptions::default()).await.unwrap();
    timeout(PATIENCE, serving.wait_for(|serves| !*serves)).await.unwrap().unwrap();
    // A message that is sent while it connects may be lost with its queue: it inquires.
    world.commit(&vote).await;
    while world.hear_message().await.0 == "inquiry" {
        world.commit(&vote).await;
    }
    assert_eq!(world.committed(), [1]);
    world.apply(PATIENT).await;
    timeout(PATIENCE, serving.wait_for(|serves| *serves)).await.unwrap().unwrap();
    world.prepare(&[2]).await;
    world.commit(&world.hear_at_last("vote").await).await;
    world.hear_at_last("done").await;
    service.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_waits_for_queues_that_do_not_exist_yet() {
    let place = place();
    let world = World::undeclared(place).await;
    let service = world.serve(r#""max_concurrency": 1"#, |settings| settings);
    world.declare(PATIENT).await;
    world.prepare(&[1]).await;
    assert_eq!(id(&world.hear("vote").await), 1);
    service.stop_now().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_declares_what_it_needs_when_asked() {
    let world = World::undeclared(place()).await;
    let declaring = |max_wait| {
        world.serve(r#""max_concurrency": 1"#, |settings| ServeSettings {
            declare: Some(Duration::from_millis(max_wait)),
            ..settings
        })
    };
    let service = declaring(PATIENT);
    world.declare(PATIENT).await;
    world.prepare(&[1]).await;
    assert_eq!(id(&world.hear("vote").await), 1);
    service.stop_now().await;
    let error =
        timeout(PATIENCE, declaring(PATIENT + 1000).task).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, ServeError::Mismatch { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_ends_if_the_broker_refuses_it() {
    let world = World::new(place(), PATIENT).await;
    let Some((start, end)) = world.place.url.rsplit_once('@') else { return };
    let scheme_and_user = start.rsplit_once(':').unwrap().0;
    let url = format!("{scheme_and_user}:wrong@{end}");
    let broker = Address::new(url.parse().unwrap(), "test");
    let service =
        world.serve(r#""max_concurrency": 1"#, |settings| ServeSettings { broker, ..settings });
    let error = timeout(PATIENCE, service.task).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(error, ServeError::Refused { .. }), "{error:?}");
    assert!(!format!("{error:?}").contains("wrong"));
}

// ---- The other side --------------------------------------------------------------------------

/// A worker called `w1` and a broker, as one service sees them.
struct World {
    place: Place,
    names: Names,
    service: ServiceName,
    directory: TempDir,
    connection: Connection,
    channel: Channel,
    replies: tokio::sync::Mutex<Option<Consumer>>,
}

/// An instance that serves in this process.
struct Running {
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ServeError>>,
}

impl Running {
    fn tell_to_stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
    }

    /// Ends it properly: with nothing held, or when its drain is over.
    async fn stop(mut self) -> Result<(), ServeError> {
        self.tell_to_stop();
        timeout(PATIENCE, self.task).await.expect("it stops").unwrap()
    }

    /// Ends it in the middle of its work.
    async fn stop_now(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }
}

/// An instance in a separate process.
struct Process {
    child: Child,
    printed: Lines,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl World {
    async fn new(place: Place, max_wait_ms: u64) -> Self {
        let world = Self::undeclared(place).await;
        world.declare(max_wait_ms).await;
        world
    }

    async fn undeclared(place: Place) -> Self {
        let (connection, channel) = connect(&place.url).await;
        Self {
            names: Names::new(Namespace::parse(&place.namespace).unwrap()),
            service: ServiceName::parse(SERVICE).unwrap(),
            directory: tempfile::tempdir().unwrap(),
            place,
            connection,
            channel,
            replies: tokio::sync::Mutex::new(None),
        }
    }

    /// Reconnects to a broker that was gone.
    async fn reconnect(&mut self) {
        let again = async |connection, channel: Channel| {
            passive(&channel, self.names.prepare_of(&self.service).as_str()).await?;
            let consumers = listen(&channel, &self.names).await?;
            Ok((connection, channel, consumers))
        };
        let consumers;
        (self.connection, self.channel, consumers) = until_served(&self.place.url, again).await;
        self.hear_from(consumers).await;
    }

    // ---- Topology ----------------------------------------------------------------------------

    async fn declare(&self, max_wait_ms: u64) {
        self.apply(max_wait_ms).await;
        self.hear_from(listen(&self.channel, &self.names).await.unwrap()).await;
    }

    /// As an operator does.
    async fn apply(&self, max_wait_ms: u64) {
        let services = [ServiceTopology {
            name: self.service.clone(),
            max_wait: Duration::from_millis(max_wait_ms),
            cap: Cap::Instance,
        }];
        let options = ApplyOptions {
            settings: topology::Settings::default(),
            now: Time::from_millis(now_ms()),
            clock_margin: Duration::ZERO,
        };
        let broker = Address::new(self.place.url.parse().unwrap(), "test");
        apply(&broker, &self.names, &services, &options).await.unwrap();
    }

    /// Reads messages to `w1`, and to any worker.
    async fn hear_from(&self, (consumer, mut inquiries): (Consumer, Consumer)) {
        // Messages in the queue of all workers are put with the others.
        let (channel, replies) = (self.channel.clone(), self.names.replies());
        tokio::spawn(async move {
            while let Some(Ok(delivery)) = inquiries.next().await {
                let published = channel.basic_publish(
                    replies.clone(),
                    "w1.any".into(),
                    BasicPublishOptions::default(),
                    &delivery.data,
                    delivery.properties,
                );
                published.await.unwrap();
            }
        });
        *self.replies.lock().await = Some(consumer);
    }

    // ---- The service -------------------------------------------------------------------------

    fn spec(&self, fields: &str) -> String {
        format!(r#"[{{"name": "{SERVICE}", {fields}}}]"#)
    }

    /// Serves the service, with the settings as modified by `change`.
    fn serve(&self, fields: &str, change: impl FnOnce(ServeSettings) -> ServeSettings) -> Running {
        let spec = services::read("spec", self.spec(fields).as_bytes()).unwrap().remove(0);
        let broker = Address::new(self.place.url.parse().unwrap(), "test");
        let settings = ServeSettings::new(
            broker,
            self.names.clone(),
            self.service.clone(),
            spec.max_concurrency,
        );
        let settings = change(settings);
        let store =
            SimulatedStore::open(self.directory.path(), &self.service, &settings.instance).unwrap();
        let participant = Simulated::new(&spec, 0).with_store(store);
        let (stop, stopped) = oneshot::channel();
        let stopped = async move { stopped.await.unwrap_or(()) };
        let task = tokio::spawn(serve(participant, settings, stopped));
        Running { stop: Some(stop), task }
    }

    /// Serves the service in a separate process, and returns when it is ready.
    fn start_process(&self, fields: &str) -> Process {
        self.start_process_with(self.directory.path(), fields)
    }

    /// The same with its state in `state`.
    fn start_process_with(&self, state: &Path, fields: &str) -> Process {
        let process = self.start(Some(state), fields);
        let ready = process.printed.wait_for("ready", PATIENCE);
        assert!(ready.is_some(), "{}", process.printed.text());
        process
    }

    /// The same, without waiting; without `state`, in memory.
    fn start(&self, state: Option<&Path>, fields: &str) -> Process {
        let services = self.directory.path().join("services.json");
        fs::write(&services, self.spec(fields)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_dtc"));
        command.args(["service", "--name", SERVICE, "--instance", "own"]);
        command.args(["--namespace", &self.place.namespace]).arg("--services").arg(services);
        if let Some(state) = state {
            command.arg("--state").arg(state);
        }
        command.env("DTC__BROKER__URL", &self.place.url).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let printed = Lines::of(child.stderr.take().unwrap());
        Process { child, printed }
    }

    fn log(&self, name: &str) -> Vec<Vec<String>> {
        let path: PathBuf = Path::new(SERVICE).join(name);
        let text = fs::read_to_string(self.directory.path().join(path)).unwrap_or_default();
        text.lines().map(|line| line.split(' ').map(str::to_owned).collect()).collect()
    }

    /// The transactions that the service has committed; each once.
    fn committed(&self) -> Vec<u64> {
        let mut ids: Vec<u64> =
            self.log("committed.log").iter().map(|line| line[0].parse().unwrap()).collect();
        ids.sort_unstable();
        ids
    }

    /// The calls and how they ended, in the order of their ends.
    fn calls(&self) -> Vec<String> {
        let calls = self.log("calls.log");
        let ended = calls.iter().filter(|line| line[1] == "end");
        ended.map(|line| format!("{} {} {}", line[2], line[3], line[7])).collect()
    }

    /// How many transactions were in progress at once, from the start of their prepare to their
    /// end.
    fn most_at_once(&self) -> usize {
        let (mut held, mut most) = (BTreeSet::new(), 0);
        for line in self.log("calls.log") {
            match (line[1].as_str(), line[2].as_str()) {
                ("start", "prepare") => {
                    held.insert(line[3].clone());
                }
                ("end", "commit" | "abort") => {
                    held.remove(&line[3]);
                }
                _ => {}
            }
            most = most.max(held.len());
        }
        most
    }

    // ---- What the worker says ----------------------------------------------------------------

    async fn prepare(&self, ids: &[u64]) {
        let exchange = self.names.prepare();
        for &id in ids {
            self.publish(&exchange, "w1", "dtc.prepare.v1", &json!([prepare(id, false)])).await;
        }
    }

    async fn commit(&self, vote: &Value) {
        let to = vote["instance"].as_str().unwrap();
        self.tell(to, "dtc.finish.v1", &[commit_of(vote, false)]).await;
    }

    async fn tell(&self, to: &str, kind: &str, items: &[Value]) {
        self.publish(&self.names.finish(), to, kind, &json!(items)).await;
    }

    async fn publish(&self, exchange: &ShortString, to: &str, kind: &str, body: &Value) {
        let message = (kind, Some("w1"), body.to_string().into_bytes());
        self.publish_raw(exchange, &key(to, SERVICE), message).await;
    }

    async fn publish_raw(
        &self,
        exchange: &ShortString,
        key: &ShortString,
        (kind, reply_to, body): (&str, Option<&str>, Vec<u8>),
    ) {
        let mut properties = BasicProperties::default().with_type(kind.into());
        if let Some(reply_to) = reply_to {
            properties = properties.with_reply_to(reply_to.into());
        }
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let (exchange, key) = (exchange.clone(), key.clone());
        let written = self.channel.basic_publish(exchange, key, options, &body, properties).await;
        let confirmed = written.unwrap().await.unwrap();
        assert!(matches!(confirmed, Confirmation::Ack(None)), "{confirmed:?}");
    }

    // ---- What the worker hears ---------------------------------------------------------------

    /// The next message: its kind, and its items.
    async fn hear_message(&self) -> (String, Vec<Value>) {
        let mut replies = self.replies.lock().await;
        let next = timeout(PATIENCE, replies.as_mut().unwrap().next()).await;
        let delivery = next.expect("something is said").unwrap().unwrap();
        let kind = delivery.properties.kind().as_ref().unwrap().to_string();
        let kind = kind.strip_prefix("dtc.").unwrap().strip_suffix(".v1").unwrap().to_owned();
        (kind, serde_json::from_slice(&delivery.data).unwrap())
    }

    /// `count` items of one kind, in however many messages; nothing else may come between.
    async fn hear_all(&self, kind: &str, count: usize) -> Vec<Value> {
        let mut items = Vec::new();
        while items.len() < count {
            let (heard, more) = self.hear_message().await;
            assert_eq!(heard, kind, "{more:?}");
            items.extend(more);
        }
        assert_eq!(items.len(), count, "{items:?}");
        items
    }

    /// The next item of one kind, after at most so many messages.
    async fn hear_at_last(&self, kind: &str) -> Value {
        for _ in 0..20 {
            let (heard, mut items) = self.hear_message().await;
            if heard == kind {
                return items.remove(0);
            }
        }
        panic!("no {kind} comes");
    }

    async fn hear(&self, kind: &str) -> Value {
        self.hear_all(kind, 1).await.remove(0)
    }

    async fn next_rejected(&self) -> lapin::message::Delivery {
        let queue = self.names.rejected();
        let options = BasicGetOptions { no_ack: false };
        let got = async {
            loop {
                let got = self.channel.basic_get(queue.clone(), options).await.unwrap();
                if let Some(got) = got {
                    got.delivery.acker.ack(BasicAckOptions::default()).await.unwrap();
                    return got.delivery;
                }
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, got).await.expect("it is rejected")
    }

    // ---- What the broker has -----------------------------------------------------------------

    /// How many messages wait in `queue`, and how many consumers it has.
    async fn counts(&self, queue: &str) -> (u32, u32) {
        let queue = passive(&self.channel, queue).await.unwrap();
        (queue.message_count(), queue.consumer_count())
    }

    async fn waits_in(&self, queue: &ShortString, count: u32) {
        self.until_counts(queue.as_str(), |(waiting, _)| waiting == count).await;
    }

    async fn wait_for_consumer(&self) {
        let queue = self.names.prepare_of(&self.service);
        self.until_counts(queue.as_str(), |(_, consumers)| consumers > 0).await;
    }

    async fn wait_for_no_consumer(&self) {
        let queue = self.names.prepare_of(&self.service);
        self.until_counts(queue.as_str(), |(_, consumers)| consumers == 0).await;
    }

    async fn until_counts(&self, queue: &str, is_so: impl Fn((u32, u32)) -> bool) {
        let counted = async { while !is_so(self.counts(queue).await) {} };
        if timeout(PATIENCE, counted).await.is_err() {
            panic!("{queue} has {:?}", self.counts(queue).await);
        }
    }

    async fn until(&self, what: &str, is_so: impl Fn() -> bool) {
        let seen = async {
            while !is_so() {
                // The broker's counts lag, so they must be polled anyway.
                self.counts(self.names.inquiries().as_str()).await;
            }
        };
        timeout(PATIENCE, seen).await.unwrap_or_else(|_| panic!("not so: {what}"));
    }

    /// Drops prepares that wait for a slot, once nobody holds any of them.
    async fn drop_prepares(&self) {
        let queue = self.names.prepare_of(&self.service);
        self.waits_in(&queue, 1).await;
        self.channel.queue_purge(queue, Default::default()).await.unwrap();
    }
}

async fn connect(url: &str) -> (Connection, Channel) {
    let connection = Connection::connect(url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    (connection, channel)
}

async fn passive(channel: &Channel, queue: &str) -> lapin::Result<Queue> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.into(), options, FieldTable::default()).await
}

/// Consumes messages to `w1`, and to any worker.
async fn listen(channel: &Channel, names: &Names) -> lapin::Result<(Consumer, Consumer)> {
    let queue = ShortString::from(format!("{}.replies.w1", names.namespace()));
    let (exclusive, bind) = (
        QueueDeclareOptions { exclusive: true, ..Default::default() },
        QueueBindOptions::default(),
    );
    let nothing = FieldTable::default;
    channel.queue_declare(queue.clone(), exclusive, nothing()).await?;
    channel.queue_bind(queue.clone(), names.replies(), "w1.*".into(), bind, nothing()).await?;
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let own = channel.basic_consume(queue, "w1".into(), options, nothing()).await?;
    let any = channel.basic_consume(names.inquiries(), "any".into(), options, nothing()).await?;
    Ok((own, any))
}

fn id(item: &Value) -> u64 {
    item["id"].as_str().unwrap().parse().unwrap()
}

/// In a minute.
fn deadline() -> u64 {
    now_ms() + 60_000
}

#[expect(clippy::disallowed_methods, reason = "the worker's clock")]
fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_millis()).unwrap()
}

fn prepare(id: u64, repeated: bool) -> Value {
    json!({
        "id": id.to_string(), "requested_at": 1, "request_hash": HASH, "data": {"amount": 1},
        "deadline": deadline(), "repeated": repeated,
    })
}

fn query(id: u64) -> Value {
    json!({ "id": id.to_string(), "requested_at": 1, "request_hash": HASH })
}

fn commit_of(vote: &Value, parked: bool) -> Value {
    json!({
        "id": vote["id"], "requested_at": 1, "outcome": "COMMITTED", "branch": vote["branch"],
        "parked": parked,
    })
}
