//! Limits of size, depth and time; and that nothing exceeds them that follows from an accepted
//! request.

use super::*;
use dtc::wire::message::{BODY_MAX, REQUEST_MAX, SERVICES_MAX, TEXT_MAX, decode_request};

/// The last valid time, at a whole second.
const LAST: Time = Time::from_millis(253_402_300_799_000);

fn longest_key() -> TransactionKey {
    let id = TransactionId::parse(&"x".repeat(128)).unwrap();
    TransactionKey { id, requested_at: LAST }
}

/// A text that needs the most room.
fn longest_text() -> Arc<str> {
    "\u{1}".repeat(2 * TEXT_MAX).into()
}

fn longest_reason() -> Reason {
    let service = service(&"s".repeat(64));
    Reason::new(ReasonCode::UnknownService, Some(service), Some(longest_text()))
}

fn with_message(message: Arc<str>) -> Reason {
    let mut reason = sold_out();
    reason.message = Some(message);
    reason
}

fn size<T: Item>(item: &T) -> usize {
    body(std::slice::from_ref(item)).len()
}

#[test]
fn a_body_has_at_most_256_kib() {
    let padded = |size: usize| format!("[{}]", " ".repeat(size - 2));
    assert_eq!(decode::<Cancel>(padded(BODY_MAX).as_bytes()), Ok(vec![]));
    let size = BODY_MAX + 1;
    assert_eq!(decode::<Cancel>(padded(size).as_bytes()), Err(Malformed::TooLarge { size }));
    assert_eq!(
        outer::<Cancel>(&vec![b'['; size]),
        "the body has 262145 bytes: must have at most 262144"
    );
}

#[test]
fn a_full_body_takes_no_more_and_is_unchanged() {
    let mut items = Items::new();
    while items.push(&vote(VoteKind::ReadOnly)).is_ok() {}
    let (len, size) = (items.len(), items.size());
    assert!(size <= BODY_MAX && size + body(&[vote(VoteKind::ReadOnly)]).len() > BODY_MAX);
    assert_eq!(items.push(&vote(VoteKind::ReadOnly)).unwrap_err().len, len);
    assert_eq!((items.len(), items.size()), (len, size));
    assert_eq!(all_good(decode::<Vote>(&items.into_body()).unwrap()).len(), len);
}

#[test]
fn a_body_without_items_is_an_empty_array() {
    assert!(Items::new().is_empty());
    assert_eq!(Items::new().size(), 2);
    assert_eq!(Items::default().into_body(), b"[]");
    assert_eq!(decode::<Decision>(b"[]"), Ok(vec![]));
}

#[test]
fn every_message_that_follows_from_the_largest_request_fits_into_a_body() {
    let id = "x".repeat(128);
    // As short as a request can be around its data, and as hard to keep short.
    let head = format!(r#"{{"id":"{id}","involved_services":["s"],"timeout_ms":8e7,"data":{{"":""#);
    let fill = "x".repeat(REQUEST_MAX - head.len() - 3);
    let body = format!("{head}{fill}\"}}}}");
    assert_eq!(body.len(), REQUEST_MAX);
    let request = decode_request(body.as_bytes(), Some(253_402_300_799)).unwrap();
    let prepare = Prepare {
        key: request.key.clone(),
        request_hash: request.request_hash,
        data: request.data.clone(),
        deadline: LAST,
        repeated: false,
    };
    let parked = Parked {
        key: request.key.clone(),
        cause: ParkedCause::Undecidable(request),
        parked_at: LAST,
    };
    for size in [size(&prepare), size(&parked)] {
        assert!(size <= BODY_MAX, "{size}");
    }
    assert_eq!(
        all_good(decode::<Prepare>(&super::body(std::slice::from_ref(&prepare))).unwrap()),
        [prepare]
    );
    assert_eq!(
        all_good(decode::<Parked>(&super::body(std::slice::from_ref(&parked))).unwrap()),
        [parked]
    );
    assert!(decode_request(format!("{body} ").as_bytes(), Some(0)).is_err());
}

#[test]
fn the_canonical_form_of_data_is_never_longer_than_the_original() {
    let data =
        r#"{"a":"\u0001\u001f\u007f\u00e9\ud83d\ude00\/\"\\\b\f\n\r\t","\u0062":[1e5,-0.10]}"#;
    let body = format!(r#"{{"id":"x","involved_services":["s"],"data":{data}}}"#);
    let request = decode_request(body.as_bytes(), Some(0)).unwrap();
    assert!(request.data.as_str().len() <= data.len(), "{}", request.data.as_str());
}

#[test]
fn a_decision_of_the_most_services_fits_into_a_body() {
    let instance = InstanceId::parse(&"i".repeat(64)).unwrap();
    let name = |index| service(&format!("{index:064}"));
    let branch = Branch::of(&instance, u64::MAX);
    let services: Vec<_> = (0..SERVICES_MAX).map(name).collect();
    let decision = Decision {
        key: longest_key(),
        request_hash: hash(),
        outcome: Outcome::Committed,
        branches: services.iter().map(|name| (name.clone(), branch.clone())).collect(),
        reason: Some(longest_reason()),
        decided_at: LAST,
        worker: WorkerId::parse(&"w".repeat(64)).unwrap(),
    };
    let answer = Answer {
        id: longest_key().id,
        requested_at: LAST,
        outcome: Outcome::Committed,
        reason: Some(longest_reason()),
        unresolved: services,
        decided_at: LAST,
    };
    let vote = vote(VoteKind::Failed { branch, reason: longest_reason() });
    let sizes = [size(&decision), size(&answer), size(&vote)];
    assert!(sizes.iter().all(|size| *size <= BODY_MAX), "{sizes:?}");
    assert_eq!(all_good(decode::<Decision>(&body(&[decision])).unwrap()).len(), 1);
}

#[test]
fn texts_are_cut_at_a_character_when_written_and_when_read() {
    for character in ["x", "é", "😀", "\u{1}", "\""] {
        let long: Arc<str> = character.repeat(TEXT_MAX + 1).into();
        let cut: Arc<str> = character.repeat(TEXT_MAX).into();
        let written = body(&[done(Err(long.clone()), false)]);
        let whole = serde_json::json!([{"id": "TX1", "requested_at": 1_700_000_000,
            "service": "stock", "instance": "stock-1", "done": false, "error": &*long, "free": 7}]);
        for body in [written, whole.to_string().into_bytes()] {
            let read = all_good(decode::<Done>(&body).unwrap());
            assert_eq!(read, [done(Err(cut.clone()), false)]);
        }
        let reason = with_message(long);
        let read = all_good(decode::<Vote>(&body(&[vote(VoteKind::Refused(reason))])).unwrap());
        let reason = with_message(cut);
        assert_eq!(read, [vote(VoteKind::Refused(reason))]);
    }
}

#[test]
fn nesting_too_deep_is_refused_and_never_overflows() {
    for depth in [109, 128, 1000, 100_000] {
        for (open, close) in [("[", "]"), (r#"{"a":"#, "}")] {
            let n = depth.min((BODY_MAX - 100) / (open.len() + 1));
            let nested = format!("{}0{}", open.repeat(n), close.repeat(n));
            for body in
                [nested.clone(), format!(r#"[{{"id":"a","requested_at":1,"new":{nested}}}]"#)]
            {
                assert!(outer::<Cancel>(body.as_bytes()).ends_with("nested more than 108 deep"));
            }
            let unclosed = outer::<Cancel>(open.repeat(n).as_bytes());
            assert!(unclosed.ends_with("nested more than 108 deep"));
        }
    }
}

#[test]
fn the_deepest_request_is_readable_in_every_message_that_follows_from_it() {
    let data = format!("{}0{}", r#"{"a":"#.repeat(99), "}".repeat(99));
    let body = format!(r#"{{"id":"TX1","involved_services":["s"],"data":{data}}}"#);
    let request = decode_request(body.as_bytes(), Some(1)).unwrap();
    let prepare = prepare(request.data.as_str());
    assert_eq!(
        all_good(decode::<Prepare>(&super::body(std::slice::from_ref(&prepare))).unwrap()),
        [prepare]
    );
    let parked = Parked {
        key: request.key.clone(),
        cause: ParkedCause::Undecidable(request),
        parked_at: LAST,
    };
    assert_eq!(
        all_good(decode::<Parked>(&super::body(std::slice::from_ref(&parked))).unwrap()),
        [parked]
    );
    let deeper = body.replacen(r#"{"a":"#, r#"{"a":["#, 1).replacen("}}", "]}}", 1);
    let malformed = decode_request(deeper.as_bytes(), Some(1)).unwrap_err();
    assert!(malformed.reason.ends_with("nested more than 100 deep"), "{malformed}");
}

#[test]
fn numbers_are_whole_however_they_are_written_and_never_too_large() {
    let read = |number: &str| {
        let body = format!(r#"[{{"complete_since":{number}}}]"#);
        let items = decode::<JournalBegun>(body.as_bytes()).unwrap();
        items[0].as_ref().ok().map(|it| it.complete_since.as_millis())
    };
    for (number, value) in [
        ("0", 0),
        ("-0", 0),
        ("1e3", 1000),
        ("5.0", 5),
        ("1700000005.123e3", 1_700_000_005_123),
        ("253402300799999", 253_402_300_799_999),
    ] {
        assert_eq!(read(number), Some(value), "{number}");
    }
    for number in ["-1", "0.5", "253402300800000", "18446744073709551616", "1e300", "-1e300"] {
        assert_eq!(read(number), None, "{number}");
    }
    let digits = "9".repeat(250);
    assert_eq!(read(&digits), None);
}

#[test]
fn a_body_of_nothing_but_bad_items_is_many_complaints() {
    let body = format!("[{}5]", "5,".repeat(BODY_MAX / 2 - 2));
    let items = decode::<Vote>(body.as_bytes()).unwrap();
    assert_eq!(items.len(), BODY_MAX / 2 - 1);
    assert!(items.iter().all(Result::is_err));
}
