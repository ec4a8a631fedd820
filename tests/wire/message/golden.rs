//! The exact JSON of every kind of item: a promise to others.

use std::time::Duration;

use super::*;
use dtc::wire::message::Kind;

/// Asserts that `item` is written as `json`, and read from it.
fn is<T: Item + Debug + PartialEq + Clone>(kind: Kind, item: T, json: &str) {
    assert_eq!(T::KIND, kind);
    let json = format!("[{json}]");
    assert_eq!(text(std::slice::from_ref(&item)), json);
    asyncapi::allows(kind, &json);
    assert_eq!(all_good(decode::<T>(json.as_bytes()).unwrap()), [item]);
}

#[test]
fn a_prepare() {
    is(
        Kind::Prepare,
        prepare(r#"{"amount":100}"#),
        r#"{"id":"TX1","requested_at":1700000000,"request_hash":"000123456789abcdeffffe100708090a","data":{"amount":100},"deadline":1700000005123,"repeated":false}"#,
    );
}

#[test]
fn a_query() {
    is(
        Kind::Query,
        Query { key: key(), request_hash: hash() },
        r#"{"id":"TX1","requested_at":1700000000,"request_hash":"000123456789abcdeffffe100708090a"}"#,
    );
}

#[test]
fn a_cancel() {
    is(Kind::Cancel, Cancel(key()), r#"{"id":"TX1","requested_at":1700000000}"#);
}

#[test]
fn a_finish() {
    let finish =
        Finish { key: key(), outcome: Outcome::Committed, branch: Some(branch()), parked: true };
    is(
        Kind::Finish,
        finish.clone(),
        r#"{"id":"TX1","requested_at":1700000000,"outcome":"COMMITTED","branch":"stock-1.42","parked":true}"#,
    );
    is(
        Kind::Finish,
        Finish { outcome: Outcome::Aborted, branch: None, parked: false, ..finish },
        r#"{"id":"TX1","requested_at":1700000000,"outcome":"ABORTED"}"#,
    );
}

#[test]
fn each_vote() {
    let head = r#"{"id":"TX1","requested_at":1700000000,"request_hash":"000123456789abcdeffffe100708090a","service":"stock","instance":"stock-1","vote":"#;
    let reason =
        r#""reason":{"service":"stock","code":"refused","message":"sold \"out\"\n\u0001\\ é"}"#;
    for (kind, json) in [
        (VoteKind::Prepared { branch: branch() }, r#""prepared","branch":"stock-1.42""#.to_owned()),
        (VoteKind::ReadOnly, r#""read_only""#.to_owned()),
        (VoteKind::Refused(sold_out()), format!(r#""refused",{reason}"#)),
        (
            VoteKind::Failed { branch: branch(), reason: sold_out() },
            format!(r#""failed","branch":"stock-1.42",{reason}"#),
        ),
        (VoteKind::Finished(Outcome::Aborted), r#""finished","outcome":"ABORTED""#.to_owned()),
    ] {
        is(Kind::Vote, vote(kind), &format!(r#"{head}{json},"free":7}}"#));
    }
}

#[test]
fn votes_and_dones_name_the_store_if_it_has_an_id() {
    let store = StoreId::parse("store-1").ok();
    is(
        Kind::Vote,
        Vote { store: store.clone(), ..vote(VoteKind::ReadOnly) },
        r#"{"id":"TX1","requested_at":1700000000,"request_hash":"000123456789abcdeffffe100708090a","service":"stock","instance":"stock-1","store":"store-1","vote":"read_only","free":7}"#,
    );
    is(
        Kind::Done,
        Done { store, ..done(Ok(()), false) },
        r#"{"id":"TX1","requested_at":1700000000,"service":"stock","instance":"stock-1","store":"store-1","done":true,"free":7}"#,
    );
}

#[test]
fn a_done() {
    is(
        Kind::Done,
        done(Ok(()), false),
        r#"{"id":"TX1","requested_at":1700000000,"service":"stock","instance":"stock-1","done":true,"free":7}"#,
    );
    is(
        Kind::Done,
        done(Err("no disk".into()), true),
        r#"{"id":"TX1","requested_at":1700000000,"service":"stock","instance":"stock-1","done":false,"error":"no disk","parked":true,"free":7}"#,
    );
}

#[test]
fn an_inquiry() {
    is(
        Kind::Inquiry,
        inquiry(),
        r#"{"id":"TX1","requested_at":1700000000,"request_hash":"000123456789abcdeffffe100708090a","service":"stock","instance":"stock-1","branch":"stock-1.42","deadline":1700000005123}"#,
    );
}

#[test]
fn a_decision() {
    is(
        Kind::Decision,
        committed(),
        r#"{"id":"TX1","requested_at":1700000000,"request_hash":"000123456789abcdeffffe100708090a","outcome":"COMMITTED","branches":{"payments":"stock-1.42","stock":"stock-1.42"},"decided_at":1700000005123,"worker":"w1"}"#,
    );
    let reason = Some(Reason::new(ReasonCode::Deadline, None, None));
    is(
        Kind::Decision,
        Decision { outcome: Outcome::Aborted, branches: vec![], reason, ..committed() },
        r#"{"id":"TX1","requested_at":1700000000,"request_hash":"000123456789abcdeffffe100708090a","outcome":"ABORTED","branches":{},"reason":{"code":"deadline"},"decided_at":1700000005123,"worker":"w1"}"#,
    );
}

#[test]
fn a_result() {
    is(
        Kind::Result,
        Answer { unresolved: vec![service("a"), service("b")], ..answer() },
        r#"{"id":"TX1","status":"COMMITTED","unresolved":["a","b"],"requested_at":1700000000,"decided_at":1700000005123}"#,
    );
    let reason = Some(Reason::at(&service("stock"), ReasonCode::NoSlot));
    is(
        Kind::Result,
        Answer { outcome: Outcome::Aborted, reason, ..answer() },
        r#"{"id":"TX1","status":"ABORTED","reason":{"service":"stock","code":"no_slot"},"requested_at":1700000000,"decided_at":1700000005123}"#,
    );
}

#[test]
fn what_is_parked() {
    is(
        Kind::Parked,
        uncommitted(Some("no disk")),
        r#"{"id":"TX1","requested_at":1700000000,"service":"stock","branch":"stock-1.42","error":"no disk","parked_at":1700000005123}"#,
    );
    let request = Request {
        timeout: Some(Duration::from_millis(500)),
        reply: Some(ReplyToken::parse("r-1").unwrap()),
        ..request()
    };
    let hash = request.request_hash;
    is(
        Kind::Parked,
        parked(ParkedCause::Undecidable(request)),
        &format!(
            r#"{{"id":"TX1","requested_at":1700000000,"request_hash":"{hash}","request":{{"id":"TX1","involved_services":["payments","stock"],"data":{{"amount":100}},"timeout_ms":500,"reply":"r-1"}},"parked_at":1700000005123}}"#
        ),
    );
}

#[test]
fn what_is_settled() {
    is(
        Kind::Settled,
        settled(),
        r#"{"id":"TX1","requested_at":1700000000,"service":"stock","settled_at":1700000005123,"worker":"w1"}"#,
    );
}

#[test]
fn the_beginning_of_a_journal() {
    is(
        Kind::JournalBegun,
        JournalBegun { complete_since: moment() },
        r#"{"complete_since":1700000005123}"#,
    );
}

#[test]
fn a_message_in_a_pack() {
    is(
        Kind::Pack,
        copied(),
        r#"{"offset":1024,"message_id":"a1-7","try":{"id":"TX1","requested_at":1700000000,"begins":true},"body":"[{\"id\":\"TX1\"}]\n"}"#,
    );
    is(
        Kind::Pack,
        PackedMessage { message_id: None, tried: None, body: "é".repeat(2000).into(), ..copied() },
        &format!(r#"{{"offset":1024,"body":"{}"}}"#, "é".repeat(2000)),
    );
}

#[test]
fn each_reason_code() {
    for (code, word) in [
        (ReasonCode::Refused, "refused"),
        (ReasonCode::Failed, "failed"),
        (ReasonCode::NoSlot, "no_slot"),
        (ReasonCode::UnknownService, "unknown_service"),
        (ReasonCode::Deadline, "deadline"),
        (ReasonCode::Unavailable, "unavailable"),
        (ReasonCode::Cancelled, "cancelled"),
        (ReasonCode::Invalid, "invalid"),
        (ReasonCode::IdReused, "id_reused"),
    ] {
        let aborted = Answer {
            outcome: Outcome::Aborted,
            reason: Some(Reason::new(code, None, None)),
            ..answer()
        };
        is(
            Kind::Result,
            aborted,
            &format!(
                r#"{{"id":"TX1","status":"ABORTED","reason":{{"code":"{word}"}},"requested_at":1700000000,"decided_at":1700000005123}}"#
            ),
        );
    }
}

#[test]
fn a_type_names_its_kind_and_no_other() {
    for kind in Kind::ALL {
        assert_eq!(Kind::parse_type(kind.as_type()), Some(kind));
    }
    assert_eq!(Kind::Vote.as_type(), "dtc.vote.v1");
    assert_eq!(Kind::JournalBegun.as_type(), "dtc.journal-begun.v1");
    assert_eq!(Kind::Pack.as_type(), "dtc.pack.v1");
    for other in ["", "vote", "dtc.vote.v2", "dtc.vote.v1 ", "DTC.vote.v1", "dtc.journal_begun.v1"]
    {
        assert_eq!(Kind::parse_type(other), None, "{other:?}");
    }
}

#[test]
fn a_command_travels_as_its_kind() {
    let finish = Finish { key: key(), outcome: Outcome::Aborted, branch: None, parked: false };
    for (command, kind) in [
        (Command::Query(Query { key: key(), request_hash: hash() }), Kind::Query),
        (Command::Finish(finish), Kind::Finish),
        (Command::Cancel(key()), Kind::Cancel),
    ] {
        assert_eq!(Kind::of(&command), kind);
        let mut items = Items::new();
        assert_eq!(items.kind(), None);
        items.push_command(&command).unwrap();
        assert_eq!(items.kind(), Some(kind));
    }
}
