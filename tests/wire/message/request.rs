//! Requests, good and bad, and what their producer can learn.

use std::time::Duration;

use super::*;
use dtc::{
    protocol::message::TransactionSpec,
    wire::message::{
        DecodedRequests, REQUEST_MAX, RequestBody, RequestMalformed, RequestTooLarge, SERVICES_MAX,
        decode_request, decode_requests, encode_request,
    },
};

const GOOD: &str = r#"{"id": "TX1", "involved_services": ["stock", "payments", "stock"],
    "data": {"amount": 100}, "timeout_ms": 500, "reply": "r-1", "new": {"a": 1}}"#;
const NOW: u64 = 1_700_000_000;

fn malformed(body: &str) -> RequestMalformed {
    decode_request(body.as_bytes(), Some(NOW)).unwrap_err()
}

fn spec() -> TransactionSpec {
    let Request { key, request_hash, services, data, .. } = request();
    TransactionSpec {
        id: key.id,
        services,
        data,
        request_hash,
        timeout: None,
        answer_at: AnswerAt::Applied,
    }
}

#[test]
fn a_good_request_is_read_with_its_timestamp() {
    let expected = Request {
        timeout: Some(Duration::from_millis(500)),
        reply: Some(ReplyToken::parse("r-1").unwrap()),
        ..request()
    };
    assert_eq!(decode_request(GOOD.as_bytes(), Some(NOW)), Ok(expected.clone()));
    assert_eq!(decode_request(format!("\u{feff}{GOOD}").as_bytes(), Some(NOW)), Ok(expected));
}

#[test]
fn an_encoded_request_is_read_back() {
    let token = ReplyToken::parse("r-1").unwrap();
    let body = encode_request(&spec(), None).unwrap();
    let json = r#"{"id":"TX1","involved_services":["payments","stock"],"data":{"amount":100}}"#;
    assert_eq!(String::from_utf8_lossy(&body), json);
    assert_eq!(decode_request(&body, Some(NOW)), Ok(request()));
    let timeout = Some(Duration::from_millis(1));
    let body = encode_request(&TransactionSpec { timeout, ..spec() }, Some(&token)).unwrap();
    let expected = Request { timeout, reply: Some(token), ..request() };
    assert_eq!(decode_request(&body, Some(NOW)), Ok(expected));
}

#[test]
fn all_complaints_come_at_once_with_the_producers_reply_token() {
    let malformed = malformed(
        r#"{"id": "TX1", "reply": "r-1", "involved_services": [], "data": {"a": 1, "a": 2},
            "timeout_ms": 0, "id": "TX1"}"#,
    );
    assert_eq!(
        malformed.to_string(),
        "$.id is \"TX1\": must be given once in its object; \
         $.involved_services is []: must name at least one service; \
         $.data.a is 2: must be given once in its object; \
         $.timeout_ms is 0: must be a whole number from 1 to 86400000"
    );
    assert_eq!(malformed.id, Some(id()));
    assert_eq!(malformed.reply, ReplyToken::parse("r-1").ok());
    assert_eq!(malformed.requested_at, Some(key().requested_at));
}

#[test]
fn every_required_field_is_missed() {
    assert_eq!(
        malformed("{}").to_string(),
        "$ is {}: must have a field `id`; $ is {}: must have a field `involved_services`; \
         $ is {}: must have a field `data`"
    );
    let bare = r#"{"id":"x","involved_services":["s"],"data":{}}"#;
    assert!(decode_request(bare.as_bytes(), Some(NOW)).is_ok());
}

#[test]
fn a_broken_field_is_named_and_does_not_hide_the_reply_token() {
    for (name, value, rule) in [
        ("id", r#""a b""#, "must match [A-Za-z0-9._:-]{1,128}"),
        ("id", "null", "must be a string"),
        ("involved_services", r#""s""#, "must be an array of service names"),
        ("data", "[]", "must be an object"),
        ("timeout_ms", "86400001", "must be a whole number from 1 to 86400000"),
        ("timeout_ms", "null", "must be a whole number from 1 to 86400000"),
        ("answer", r#""later""#, "must be `applied` or `decided`"),
        ("answer", "null", "must be a string"),
        ("reply", r#""a.b""#, "must match [A-Za-z0-9_-]{1,64}"),
        ("reply", "null", "must be a string"),
    ] {
        let mut request: serde_json::Value = serde_json::from_str(GOOD).unwrap();
        request[name] = serde_json::from_str(value).unwrap();
        let malformed = malformed(&request.to_string());
        assert_eq!(malformed.to_string(), format!("$.{name} is {value}: {rule}"));
        assert_eq!(malformed.id.is_none(), name == "id");
        assert_eq!(malformed.reply.is_none(), name == "reply");
    }
}

#[test]
fn a_timestamp_must_be_there_and_be_in_seconds() {
    for (timestamp, reason) in [
        (None, "the message must have a timestamp"),
        (
            Some(1_700_000_000_000),
            "the message's timestamp is 1700000000000: must be seconds since 1970, at most \
             253402300799",
        ),
        (
            Some(u64::MAX),
            "the message's timestamp is 18446744073709551615: must be seconds since 1970, at most \
             253402300799",
        ),
    ] {
        let malformed = decode_request(GOOD.as_bytes(), timestamp).unwrap_err();
        assert_eq!(malformed.to_string(), reason);
        assert_eq!((malformed.id, malformed.requested_at), (Some(id()), None));
    }
    let last = decode_request(GOOD.as_bytes(), Some(253_402_300_799)).unwrap();
    assert_eq!(last.key.requested_at.as_millis(), 253_402_300_799_000);
}

#[test]
fn a_body_that_is_not_one_object_is_refused() {
    for (body, reason) in [
        ("[]", "$ is []: must be an object"),
        ("", "1:1: not JSON: the body ends where a value should be"),
        ("{}{}", "1:3: not JSON: found `{` where nothing more should be"),
    ] {
        let malformed = malformed(body);
        assert_eq!(malformed.to_string(), reason);
        assert_eq!((malformed.id, malformed.reply), (None, None));
    }
    let malformed = decode_request(b"{\"\xff", Some(NOW)).unwrap_err();
    assert_eq!(malformed.to_string(), "1:3: not UTF-8");
}

#[test]
fn a_reason_is_cut_after_1_kib() {
    let services = "\"é é\",".repeat(1000);
    let body = format!(r#"{{"id":"TX1","involved_services":[{services}5],"data":{{}}}}"#);
    let malformed = malformed(&body);
    assert!((1000..=1024).contains(&malformed.reason.len()), "{}", malformed.reason.len());
    assert!(malformed.reason.ends_with('…'));
    assert_eq!(malformed.id, Some(id()));
}

#[test]
fn a_body_that_is_too_large_is_not_read() {
    let size = REQUEST_MAX + 1;
    let body = format!("{GOOD}{}", " ".repeat(size - GOOD.len()));
    let malformed = malformed(&body);
    assert_eq!(malformed.to_string(), "the request has 261121 bytes: must have at most 261120");
    assert_eq!(malformed.id, None);
    assert!(decode_request(&body.as_bytes()[..REQUEST_MAX], Some(NOW)).is_ok());
}

#[test]
fn too_many_services_are_refused_on_both_sides() {
    let with = |n_services: usize| {
        let services: Vec<_> = (0..n_services).map(|it| service(&format!("{it:04}"))).collect();
        TransactionSpec { services: services.into(), ..spec() }
    };
    let body = encode_request(&with(SERVICES_MAX), None).unwrap();
    assert!(decode_request(&body, Some(NOW)).is_ok());
    let n_services = SERVICES_MAX + 1;
    let refused = encode_request(&with(n_services), None).unwrap_err();
    assert_eq!(refused, RequestTooLarge::Services { n_services });
    let body = String::from_utf8(body).unwrap().replacen("[", "[\"one-more\",", 1);
    let found = malformed(&body).to_string();
    assert!(found.ends_with("…: must name at most 1000 services"), "{found}");
}

#[test]
fn a_request_that_could_not_be_read_is_not_encoded() {
    let fill = |size: usize| {
        let data = format!(r#"{{"a":"{}"}}"#, "x".repeat(size));
        TransactionSpec { data: Payload::new(data), ..spec() }
    };
    let size = REQUEST_MAX - encode_request(&fill(0), None).unwrap().len();
    assert!(decode_request(&encode_request(&fill(size), None).unwrap(), Some(NOW)).is_ok());
    let refused = encode_request(&fill(size + 1), None).unwrap_err();
    assert_eq!(refused, RequestTooLarge::Bytes { size: REQUEST_MAX + 1 });
    assert_eq!(refused.to_string(), "the request has 261121 bytes: must have at most 261120");
}

// ---- Several in a message ------------------------------------------------------------------------

/// What is read of each request of a message: its id, or the reason.
fn read_of(decoded: &DecodedRequests<'_>) -> Vec<Result<String, String>> {
    let read = decoded.items.iter().map(|item| match &item.read {
        Ok(request) => Ok(request.key.id.to_string()),
        Err(malformed) => Err(malformed.reason.clone()),
    });
    read.collect()
}

fn small(id: &str) -> String {
    format!(r#"{{"id":"{id}","involved_services":["stock"],"data":{{}},"reply":"r-{id}"}}"#)
}

fn array(items: &[String]) -> String {
    format!("[{}]", items.join(","))
}

#[test]
fn an_object_is_a_message_of_one_request() {
    let decoded = decode_requests(GOOD.as_bytes(), Some(NOW));
    assert_eq!(decoded.fault, None);
    assert_eq!(decoded.items.len(), 1);
    assert_eq!(decoded.items[0].read, decode_request(GOOD.as_bytes(), Some(NOW)));
    let decoded = decode_requests(b"{}", Some(NOW));
    assert_eq!(decoded.fault, Some(malformed("{}").reason));
    assert_eq!(decoded.items.len(), 1);
}

#[test]
fn the_requests_of_an_array_are_read_as_if_each_were_alone() {
    let body = format!("\u{feff} [{},\n{GOOD}]", small("a"));
    let decoded = decode_requests(body.as_bytes(), Some(NOW));
    assert_eq!(decoded.fault, None);
    let alone = [small("a"), GOOD.to_owned()];
    assert_eq!(decoded.items.len(), alone.len());
    for (item, alone) in decoded.items.iter().zip(&alone) {
        assert_eq!(item.text, alone);
        assert_eq!(item.read, decode_request(alone.as_bytes(), Some(NOW)));
    }
}

#[test]
fn a_malformed_request_among_others_is_named_alone_with_its_producer() {
    let bad = r#"{"id":"b","involved_services":[],"data":{},"reply":"r-b"}"#.to_owned();
    let body = array(&[small("a"), bad.clone(), "5".to_owned(), small("c")]);
    let decoded = decode_requests(body.as_bytes(), Some(NOW));
    assert_eq!(decoded.fault, None);
    let services = "$[1].involved_services is []: must name at least one service";
    let read = read_of(&decoded);
    assert_eq!(read[0], Ok("a".to_owned()));
    assert_eq!(read[1], Err(services.to_owned()));
    assert_eq!(read[2], Err("$[2] is 5: must be an object".to_owned()));
    assert_eq!(read[3], Ok("c".to_owned()));
    assert_eq!(decoded.items[1].text, bad);
    let malformed = decoded.items[1].read.as_ref().unwrap_err();
    assert_eq!(malformed.id.as_ref().unwrap().as_str(), "b");
    assert_eq!(malformed.reply.as_ref().unwrap().as_str(), "r-b");
    assert_eq!(malformed.requested_at.unwrap().as_millis(), NOW * 1000);
}

#[test]
fn a_message_that_can_not_be_served_names_all_of_its_requests() {
    let many: Vec<_> = (0..65).map(|n| small(&format!("t{n}"))).collect();
    let two = [small("a"), small("b")];
    for (requests, timestamp, fault) in [
        (&many[..], Some(NOW), "the message has 65 requests: must have at most 64"),
        (&two, None, "the message must have a timestamp"),
        (&[], Some(NOW), "the message has no request"),
    ] {
        let body = array(requests);
        let decoded = decode_requests(body.as_bytes(), timestamp);
        assert_eq!(decoded.fault.as_deref(), Some(fault));
        assert_eq!(decoded.items.len(), requests.len());
        let replies = decoded.items.iter().map(|item| match &item.read {
            Ok(request) => request.reply.is_some(),
            Err(malformed) => malformed.id.is_some() && malformed.reply.is_some(),
        });
        assert!(replies.into_iter().all(|it| it));
    }
    assert_eq!(decode_requests(array(&many[..64]).as_bytes(), Some(NOW)).fault, None);
    let broken = decode_requests(b"[{}", Some(NOW));
    assert!(broken.fault.unwrap().contains("not JSON") && broken.items.is_empty());
    let large = format!("[{}]", " ".repeat(256 * 1024));
    let large = decode_requests(large.as_bytes(), Some(NOW));
    assert!(large.fault.unwrap().contains("must have at most 262144") && large.items.is_empty());
}

#[test]
fn a_request_is_nested_as_deep_in_an_array_as_alone() {
    for (depth, is_read) in [(100, true), (101, false)] {
        // The request is one level, and its data another one.
        let (open, close) = (r#"{"a":"#.repeat(depth - 2), "}".repeat(depth - 2));
        let text =
            format!(r#"{{"id":"a","involved_services":["s"],"data":{{"a":{open}1{close}}}}}"#);
        assert_eq!(decode_request(text.as_bytes(), Some(NOW)).is_ok(), is_read, "{depth}");
        let decoded = decode_requests(array(&[text]).as_bytes(), Some(NOW)).fault;
        assert_eq!(decoded.is_none(), is_read, "{decoded:?}");
    }
}

#[test]
fn requests_are_joined_up_to_the_limits_of_a_message() {
    let mut body = RequestBody::new();
    assert!(body.is_empty());
    for n in 0..64 {
        body.push(small(&format!("t{n}")).as_bytes()).unwrap();
        let bytes = body.clone().into_bytes();
        let decoded = decode_requests(&bytes, Some(NOW));
        assert_eq!((decoded.fault, decoded.items.len()), (None, n + 1));
        assert_eq!(bytes[0], if n == 0 { b'{' } else { b'[' });
    }
    assert!(body.push(small("one-more").as_bytes()).is_err());
    assert_eq!(body.len(), 64);
    let mut body = RequestBody::new();
    body.push(&[b'1'; 200_000]).unwrap();
    assert!(body.push(&[b'1'; 62_143]).is_err());
    body.push(&[b'1'; 62_141]).unwrap();
    assert_eq!(body.into_bytes().len(), 256 * 1024);
}
