//! Every command to Python's service, and its exact answer.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    System,
    raw::{HASH, PlayedWorker},
    until,
};

const OTHER_HASH: &str = "ffffffffffffffffffffffffffffffff";

fn system() -> System {
    System::new(4, 60_000, 0)
}

#[test]
fn a_duplicate_prepare_gets_a_vote_with_the_same_branch() {
    let system = system();
    let _books = system.books("py");
    let mut player = PlayedWorker::new(&system);
    player.prepares("t", HASH, Duration::from_secs(60));
    let first = player.hears("vote");
    player.prepares("t", HASH, Duration::from_secs(60));
    let second = player.hears("vote");
    player.tells("query", "t", json!({"request_hash": HASH}));
    let third = player.hears("vote");
    for vote in [&first, &second, &third] {
        assert_eq!((&vote["vote"], &vote["branch"]), (&json!("prepared"), &first["branch"]));
        assert_eq!(vote["free"], 3);
    }

    player.prepares("t", OTHER_HASH, Duration::from_secs(60));
    let other = player.hears("vote");
    assert_eq!(
        (&other["vote"], &other["reason"]["code"]),
        (&json!("refused"), &json!("id_reused"))
    );
    let commit = json!({"outcome": "COMMITTED", "branch": first["branch"]});
    for _ in 0..2 {
        player.tells("finish", "t", commit.clone());
        assert_eq!(player.hears("done")["done"], true);
    }
    player.prepares("t", HASH, Duration::from_secs(60));
    let late = player.hears("vote");
    assert_eq!((&late["vote"], &late["outcome"]), (&json!("finished"), &json!("COMMITTED")));
    let held = system.held_by_books();
    assert_eq!(held.whats_of("t"), ["prepare", "commit"]);
    assert_eq!((held.committed, held.prepared.len()), (vec!["t".to_owned()], 0));
}

#[test]
fn a_finish_with_another_branch_undoes_what_is_prepared() {
    let system = system();
    let _books = system.books("py");
    let mut player = PlayedWorker::new(&system);
    for (id, more) in [
        ("t1", json!({"outcome": "COMMITTED", "branch": "another.1"})),
        ("t2", json!({"outcome": "COMMITTED"})),
        ("t3", json!({"outcome": "ABORTED"})),
    ] {
        player.prepares(id, HASH, Duration::from_secs(60));
        assert_eq!(player.hears("vote")["vote"], "prepared");
        player.tells("finish", id, more);
        let done = player.hears("done");
        assert_eq!((&done["done"], &done["free"]), (&json!(true), &json!(4)), "{done}");
        assert_eq!(system.held_by_books().whats_of(id), ["prepare", "abort"]);
    }
    let held = system.held_by_books();
    assert_eq!((held.committed.len(), held.prepared.len()), (0, 0));
}

#[test]
fn a_cancelled_or_late_prepare_does_not_call_the_service() {
    let system = system();
    let _books = system.books("py");
    let mut player = PlayedWorker::new(&system);
    player.tells("cancel", "t1", json!({}));
    // Its answer to this shows that it has received the cancel before.
    player.tells("finish", "t0", json!({"outcome": "ABORTED"}));
    assert_eq!(player.hears("done")["id"], "t0");
    player.prepares("t1", HASH, Duration::from_secs(60));
    let cancelled = player.hears("vote");
    assert_eq!(cancelled["reason"]["code"], "cancelled", "{cancelled}");
    player.prepares("t2", HASH, Duration::ZERO);
    let late = player.hears("vote");
    assert_eq!(late["reason"]["code"], "deadline", "{late}");
    // A cancel changes nothing that is prepared.
    player.prepares("t3", HASH, Duration::from_secs(60));
    assert_eq!(player.hears("vote")["vote"], "prepared");
    player.tells("cancel", "t3", json!({}));
    player.tells("query", "t3", json!({"request_hash": HASH}));
    assert_eq!(player.hears("vote")["vote"], "prepared");
    let held = system.held_by_books();
    let asked = [held.whats_of("t0"), held.whats_of("t1"), held.whats_of("t2")];
    assert_eq!(asked, [[""; 0]; 3]);
}

#[test]
fn an_instance_inquires_about_a_missing_outcome_and_a_worker_answers_once_it_starts() {
    let system = system();
    let mut books = system.books("py");
    let mut player = PlayedWorker::new(&system);
    player.prepares("t", HASH, Duration::from_secs(5));
    assert_eq!(player.hears("vote")["vote"], "prepared");
    // The instance that prepared it is killed too: the inquiry comes from the store.
    books.kill9();
    let _other = system.books("other");
    until("an inquiry waits", || player.waiting_in(system.names.inquiries()) > 0);
    let worker = system.world.worker("w1");
    until("it is undone", || system.held_by_books().prepared.is_empty());
    assert_eq!(system.held_by_books().whats_of("t"), ["prepare", "abort"]);
    drop(worker);
}

#[test]
fn several_prepares_in_a_message_take_a_slot_each_and_wait_for_one() {
    let system = system();
    let _books = system.books("py");
    let mut player = PlayedWorker::new(&system);
    let ids = ["t1", "t2", "t3", "t4", "t5", "t6"];
    player.prepares_together(&ids, HASH, Duration::from_secs(60));
    let mut votes: Vec<_> = (0..4).map(|_| player.hears("vote")).collect();
    // Its answer to this shows that it has not answered the others.
    player.tells("finish", "t0", json!({"outcome": "ABORTED"}));
    let done = player.hears("done");
    assert_eq!((&done["id"], &done["free"]), (&json!("t0"), &json!(0)));
    let commit = |vote: &Value| json!({"outcome": "COMMITTED", "branch": vote["branch"]});
    for next in 0..6 {
        let vote = votes[next].clone();
        assert_eq!(vote["vote"], "prepared", "{vote}");
        player.tells("finish", vote["id"].as_str().unwrap(), commit(&vote));
        // The slot is free, and one of the waiting ones takes it.
        let (mut heard, expected) = (Vec::new(), if next < 2 { 2 } else { 1 });
        while heard.len() < expected {
            heard.push(player.hears_any());
        }
        assert!(heard.iter().any(|(kind, item)| kind == "done" && item["id"] == vote["id"]));
        votes.extend(heard.into_iter().filter(|(kind, _)| kind == "vote").map(|(_, item)| item));
    }
    let held = system.held_by_books();
    assert_eq!((held.committed.len(), held.prepared.len()), (6, 0));
}
