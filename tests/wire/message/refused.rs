//! Broken items, and the complaints about each.

use super::*;
use serde_json::{Value, json};

const WHOLE: &str = "must be a whole number from 0 to";

/// A good item of each kind, as JSON.
fn good<T: Item>(item: &T) -> Value {
    serde_json::from_slice::<Vec<Value>>(&body(std::slice::from_ref(item))).unwrap().remove(0)
}

/// Asserts that each field of `item` that is not `optional` is missed, and none of the others.
fn misses<T: Item + Debug>(item: &T, optional: &[&str]) {
    let good = good(item);
    for name in good.as_object().unwrap().keys() {
        let mut without = good.clone();
        without.as_object_mut().unwrap().remove(name);
        let mut null = good.clone();
        null[name] = Value::Null;
        if optional.contains(&name.as_str()) {
            for text in [without, null] {
                let body = format!("[{text}]");
                assert!(decode::<T>(body.as_bytes()).unwrap()[0].is_ok(), "{body}");
            }
            continue;
        }
        let missed = complaint::<T>(&without.to_string());
        assert!(missed.contains(&format!(": must have a field `{name}`")), "{missed}");
        assert!(missed.contains(": $[0] is {"), "{missed}");
        let refused = complaint::<T>(&null.to_string());
        assert!(refused.contains(&format!("$[0].{name} is null: must ")), "{refused}");
    }
}

#[test]
fn every_required_field_is_missed() {
    misses(&prepare("{}"), &[]);
    misses(&Query { key: key(), request_hash: hash() }, &[]);
    misses(&Cancel(key()), &[]);
    let finish =
        Finish { key: key(), outcome: Outcome::Aborted, branch: Some(branch()), parked: true };
    misses(&finish, &["branch", "parked"]);
    misses(&vote(VoteKind::Prepared { branch: branch() }), &[]);
    misses(&vote(VoteKind::ReadOnly), &[]);
    misses(&vote(VoteKind::Refused(sold_out())), &["reason"]);
    misses(&vote(VoteKind::Failed { branch: branch(), reason: sold_out() }), &["reason"]);
    misses(&vote(VoteKind::Finished(Outcome::Aborted)), &[]);
    misses(&done(Err("no".into()), true), &["error", "parked"]);
    misses(&inquiry(), &[]);
    misses(&Decision { reason: Some(sold_out()), ..committed() }, &["reason"]);
    let told = Answer { reason: Some(sold_out()), unresolved: vec![service("a")], ..answer() };
    misses(&told, &["reason", "unresolved"]);
    misses(&uncommitted(Some("no")), &["error"]);
    misses(&settled(), &[]);
    misses(&JournalBegun { complete_since: moment() }, &[]);
    misses(&copied(), &["message_id", "try"]);
}

/// Asserts the complaints about `item` with `value` under `name`.
fn refuses<T: Item + Debug>(item: &T, kind: &str, name: &str, value: &str, rule: &str) {
    let mut item = good(item);
    item[name] = serde_json::from_str(value).unwrap();
    let wanted = format!("{kind}: $[0].{name} is {value}: {rule}");
    assert_eq!(complaint::<T>(&item.to_string()), wanted);
}

#[test]
fn a_wrong_field_is_named_with_its_value_and_rule() {
    let prepared = vote(VoteKind::Prepared { branch: branch() });
    let seconds = format!("{WHOLE} 253402300799");
    let millis = format!("{WHOLE} 253402300799999");
    let slots = format!("{WHOLE} 4294967295");
    let name = "must match [A-Za-z0-9_-]{1,64}";
    let branches = "must match [A-Za-z0-9_-]{1,64}[.](0|[1-9][0-9]{0,19})";
    for (field, value, rule) in [
        ("id", "5", "must be a string"),
        ("id", r#""a b""#, "must match [A-Za-z0-9._:-]{1,128}"),
        ("requested_at", r#""1700000000""#, &*seconds),
        ("requested_at", "-1", &*seconds),
        ("requested_at", "0.5", &*seconds),
        ("requested_at", "253402300800", &*seconds),
        ("request_hash", "{}", "must be a string"),
        ("request_hash", r#""000123456789ABCDEFFFFE100708090A""#, "must match [0-9a-f]{32}"),
        ("request_hash", r#""000123456789abcdeffffe100708090""#, "must match [0-9a-f]{32}"),
        ("request_hash", r#""000123456789abcdeffffe100708090aa0""#, "must match [0-9a-f]{32}"),
        ("service", r#""a.b""#, name),
        ("instance", r#""""#, name),
        ("store", r#""a b""#, name),
        (
            "vote",
            r#""maybe""#,
            "must be one of `prepared`, `read_only`, `refused`, `failed`, `finished`",
        ),
        ("vote", "true", "must be a string"),
        ("branch", r#""stock-1""#, branches),
        ("branch", r#""stock-1.01""#, branches),
        ("branch", "[]", "must be a string"),
        ("free", "-1", &*slots),
        ("free", "4294967296", &*slots),
    ] {
        refuses(&prepared, "vote", field, value, rule);
    }
    refuses(&prepare("{}"), "prepare", "deadline", "253402300800000", &millis);
    refuses(&prepare("{}"), "prepare", "data", "[]", "must be an object");
    refuses(&prepare("{}"), "prepare", "repeated", "1", "must be true or false");
    let finished = vote(VoteKind::Finished(Outcome::Aborted));
    let outcomes = "must be one of `COMMITTED`, `ABORTED`";
    refuses(&finished, "vote", "outcome", r#""committed""#, outcomes);
    refuses(&answer(), "result", "status", r#""UNKNOWN""#, outcomes);
    refuses(&answer(), "result", "unresolved", r#""a""#, "must be an array of service names");
    refuses(&done(Ok(()), false), "done", "done", r#""yes""#, "must be true or false");
    refuses(&done(Err("a".into()), false), "done", "error", "5", "must be a string");
    refuses(&committed(), "decision", "branches", "[]", "must be an object");
    refuses(&committed(), "decision", "reason", r#""no""#, "must be an object");
    refuses(&settled(), "settled", "worker", r#""w 1""#, name);
    let offsets = format!("{WHOLE} 9007199254740992");
    let printable = "must match [ -~]{0,255}";
    for (field, value, rule) in [
        ("offset", "-1", &*offsets),
        ("offset", "9007199254740993", &*offsets),
        ("offset", r#""7""#, &*offsets),
        ("message_id", "7", "must be a string"),
        ("message_id", r#""é""#, printable),
        ("message_id", r#""a\u007f""#, printable),
        ("message_id", r#""a\tb""#, printable),
        ("try", "true", "must be an object"),
        ("body", "[]", "must be a string"),
    ] {
        let mut item = good(&copied());
        item[field] = serde_json::from_str(value).unwrap();
        let complaint = complaint::<PackedMessage>(&item.to_string());
        assert!(complaint.starts_with(&format!("pack: $[0].{field} is ")), "{complaint}");
        assert!(complaint.ends_with(&format!(": {rule}")), "{complaint}");
    }
}

/// What can't be read must not be written: a worker would pass over the pack.
#[test]
fn a_copy_that_no_reader_would_take_is_known_before_it_is_written() {
    let is_read = |copied: &PackedMessage| {
        let mut item = good(&self::copied());
        item["offset"] = copied.offset.into();
        item["message_id"] = copied.message_id.as_deref().into();
        let (key, begins) = copied.tried.as_ref().unwrap();
        let millis = key.requested_at.as_millis();
        let seconds = millis.is_multiple_of(1000).then_some(millis / 1000);
        item["try"] = json!({"id": key.id.as_str(), "requested_at": seconds, "begins": begins});
        decode::<PackedMessage>(format!("[{item}]").as_bytes()).unwrap()[0].is_ok()
    };
    let requested = |millis| {
        let key = TransactionKey { requested_at: Time::from_millis(millis), ..key() };
        PackedMessage { tried: Some((key, false)), ..copied() }
    };
    let named = |id: &str| PackedMessage { message_id: Some(id.into()), ..copied() };
    let at = |offset| PackedMessage { offset, ..copied() };
    for (copied, is_encodable) in [
        (copied(), true),
        (at(1 << 53), true),
        (at((1 << 53) + 1), false),
        (at(u64::MAX), false),
        (named(""), true),
        (named(&"~".repeat(255)), true),
        (named(&"~".repeat(256)), false),
        (named("é"), false),
        (named("a\u{7f}"), false),
        (named("a\nb"), false),
        (requested(0), true),
        (requested(7000), true),
        (requested(7001), false),
        (requested(253_402_300_799_000), true),
        (requested(253_402_300_800_000), false),
    ] {
        assert_eq!(copied.is_encodable(), is_encodable, "{copied:?}");
        assert_eq!(is_read(&copied), is_encodable, "{copied:?}");
    }
}

#[test]
fn a_value_inside_a_field_is_named_by_its_path() {
    let mut decision = good(&committed());
    decision["branches"] = json!({"a b": "i.1", "c": "i"});
    decision["reason"] = json!({"code": "why", "service": 1, "message": 2});
    assert_eq!(
        complaint::<Decision>(&decision.to_string()),
        "decision: $[0].branches[\"a b\"] is \"i.1\": must stand under a service's name: \
         [A-Za-z0-9_-]{1,64}\n\
         decision: $[0].branches.c is \"i\": must match [A-Za-z0-9_-]{1,64}[.](0|[1-9][0-9]{0,19})\n\
         decision: $[0].reason.service is 1: must be a string\n\
         decision: $[0].reason.code is \"why\": must be one of `refused`, `failed`, `no_slot`, \
         `unknown_service`, `deadline`, `unavailable`, `cancelled`, `invalid`, `id_reused`\n\
         decision: $[0].reason.message is 2: must be a string"
    );
    let mut copied = good(&copied());
    copied["try"] = json!({"id": "a b", "requested_at": -1, "begins": 1});
    assert_eq!(
        complaint::<PackedMessage>(&copied.to_string()),
        "pack: $[0].try.id is \"a b\": must match [A-Za-z0-9._:-]{1,128}\n\
         pack: $[0].try.requested_at is -1: must be a whole number from 0 to 253402300799\n\
         pack: $[0].try.begins is 1: must be true or false"
    );
    copied["try"] = json!({"id": "a"});
    let missed = complaint::<PackedMessage>(&copied.to_string());
    for name in ["requested_at", "begins"] {
        let wanted = format!("$[0].try is {{\"id\":\"a\"}}: must have a field `{name}`");
        assert!(missed.contains(&wanted), "{missed}");
    }
}

#[test]
fn a_value_is_cut_in_the_complaint() {
    let long = format!(r#"{{"id":"{}","requested_at":1}}"#, "x".repeat(10_000));
    let complaint = complaint::<Cancel>(&long);
    let cut = format!("cancel: $[0].id is \"{}…: must match ", "x".repeat(62));
    assert!(complaint.starts_with(&cut), "{complaint}");
}

#[test]
fn a_field_given_twice_is_refused_at_every_level() {
    let twice = "must be given once in its object";
    assert_eq!(
        complaint::<Cancel>(r#"{"id":"a","requested_at":1,"\u0069d":"b"}"#),
        format!("cancel: $[0].id is \"b\": {twice}")
    );
    let decision = text(&[committed()]);
    let decision = decision.trim_matches(['[', ']']);
    let double = decision.replace(r#""payments":"#, r#""stock":"#);
    assert_eq!(
        complaint::<Decision>(&double),
        format!("decision: $[0].branches.stock is \"stock-1.42\": {twice}")
    );
}

#[test]
fn unknown_fields_are_ignored_even_twice() {
    let body = br#"[ {"new": [{"id": 5}], "id": "a", "requested_at": 1, "new": null} ]"#;
    let [Cancel(key)] = &all_good(decode(body).unwrap())[..] else { panic!("one item") };
    assert_eq!(key.to_string(), "a@1000");
}

#[test]
fn a_bad_item_does_not_spoil_the_good_ones() {
    let good = |id: &str| format!(r#"{{"id":"{id}","requested_at":1}}"#);
    let body = format!("[{},7,{},{{}},[],{}]", good("a"), good("b"), good("c"));
    let items = decode::<Cancel>(body.as_bytes()).unwrap();
    let ids = items.iter().map(|item| item.as_ref().ok().map(|Cancel(key)| key.id.as_str()));
    let expected = [Some("a"), None, Some("b"), None, None, Some("c")];
    assert!(ids.eq(expected));
    assert_eq!(items[1].as_ref().unwrap_err().to_string(), "cancel: $[1] is 7: must be an object");
    assert_eq!(
        items[3].as_ref().unwrap_err().to_string(),
        "cancel: $[3] is {}: must have a field `id`\n\
         cancel: $[3] is {}: must have a field `requested_at`"
    );
}

#[test]
fn a_vote_without_a_reason_gets_one_with_its_code_and_service() {
    for (word, code) in [("refused", ReasonCode::Refused), ("failed", ReasonCode::Failed)] {
        let mut bare = good(&vote(VoteKind::Prepared { branch: branch() }));
        bare["vote"] = json!(word);
        let items = all_good(decode::<Vote>(json!([bare]).to_string().as_bytes()).unwrap());
        let reason = Reason::at(&service("stock"), code);
        match &items[0].kind {
            VoteKind::Refused(found) => assert_eq!((found, word), (&reason, "refused")),
            VoteKind::Failed { reason: found, .. } => {
                assert_eq!((found, word), (&reason, "failed"))
            }
            VoteKind::Prepared { .. } | VoteKind::ReadOnly | VoteKind::Finished(_) => {
                panic!("{items:?}")
            }
        }
    }
}

#[test]
fn a_parked_request_must_be_that_of_its_transaction() {
    let mut item = good(&parked(ParkedCause::Undecidable(request())));
    item["request"]["id"] = json!("TX2");
    let found = complaint::<Parked>(&item.to_string());
    assert!(found.ends_with(": must be of the transaction `TX1`"), "{found}");
    item["request"]["id"] = json!("TX1");
    item["request"]["data"] = json!({});
    let found = complaint::<Parked>(&item.to_string());
    assert!(found.ends_with(": must be what `request_hash` says"), "{found}");
    item["request_hash"] = Value::Null;
    item["request"]["data"] = json!([]);
    let found = complaint::<Parked>(&item.to_string());
    assert_eq!(found, "parked: $[0].request.data is []: must be an object");
}

#[test]
fn a_body_that_is_not_an_array_is_refused_as_a_whole() {
    assert_eq!(outer::<Cancel>(b"{}"), "cancel: $ is {}: must be an array of items");
    assert_eq!(outer::<Cancel>(b""), "cancel:1:1: not JSON: the body ends where a value should be");
    assert_eq!(
        outer::<Cancel>(b"[] []"),
        "cancel:1:4: not JSON: found `[` where nothing more should be"
    );
    assert_eq!(outer::<Cancel>(b"[\"\xff\"]"), "cancel:1:3: not UTF-8");
    assert_eq!(
        outer::<Cancel>(br#"["\ud800"]"#),
        "cancel:1:2: not JSON: a `\\u` in this string is not followed by a character's code"
    );
    assert!(outer::<Cancel>(b"[\"\0\"]").ends_with("must be escaped"));
    assert!(outer::<Cancel>(b"\0").contains("found `\\0` where a value should be"));
}

#[test]
fn a_byte_order_mark_is_ignored() {
    assert_eq!(decode::<Cancel>(b"\xEF\xBB\xBF[]"), Ok(vec![]));
}

#[test]
fn a_text_may_have_an_escaped_nul() {
    let item = br#"[{"id":"a","requested_at":1,"service":"s","instance":"i","done":false,"error":"\u0000","free":0}]"#;
    let [item] = &all_good(decode::<Done>(item).unwrap())[..] else { panic!("one item") };
    assert_eq!(item.applied, Err("\0".into()));
}
