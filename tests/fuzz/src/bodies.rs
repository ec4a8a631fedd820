//! Bodies of messages, from any bytes.
//!
//! A body that is read keeps its limits and is read again from what it is written as; one that
//! isn't read leads to complaints; and `serde_json` agrees on what is JSON.

use std::{fmt::Debug, time::Duration};

use dtc::{
    protocol::{
        ids::{Branch, ServiceName, TransactionKey},
        message::{
            Answer, Decision, Done, Finish, Inquiry, Parked, ParkedCause, Prepare, Query, Reason,
            Request, TransactionSpec, Vote, VoteKind,
        },
        request_messages::REQUESTS_MAX,
        time::Time,
    },
    wire::{
        hash::request_hash,
        message::{
            BODY_MAX, Cancel, DecodedRequests, Item, Items, JournalBegun, Malformed, PackedMessage,
            REQUEST_MAX, RequestBody, RequestItem, RequestMalformed, SERVICES_MAX, Settled,
            TEXT_MAX, decode, decode_request, decode_requests, encode_request,
        },
    },
};

use crate::{complaints, json};

/// How deep a body may be nested, and how deep a request.
const DEPTH_MAX: usize = 108;
const REQUEST_DEPTH_MAX: usize = 100;

/// The last second of the year 9999.
const LAST_SECOND: u64 = 253_402_300_799;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// An item, and the properties of each one that was read.
pub trait Checked: Item + Clone + PartialEq + Debug {
    /// Asserts them.
    fn check(&self);
}

/// A body of items.
pub fn items<T: Checked>(body: &[u8]) {
    let read = decode::<T>(body);
    assert_eq!(read, decode::<T>(body), "read twice");
    let kind = word(T::KIND.as_type());
    let value = json::value(json::without_mark(body));
    let items = match read {
        Ok(items) => items,
        Err(malformed) => {
            complaints::are_good_about_a_body(&malformed, body.len(), kind);
            let is_array = value.is_some_and(|it| it.is_array() && json::depth(&it) <= DEPTH_MAX);
            assert!(!is_array || body.len() > BODY_MAX, "{malformed}");
            return;
        }
    };
    assert!(body.len() <= BODY_MAX);
    let n_elements = value.as_ref().and_then(|it| it.as_array()).map(Vec::len);
    assert_eq!(n_elements, Some(items.len()));
    let mut good = Vec::new();
    for item in items {
        match item {
            Ok(item) => good.push(item),
            Err(malformed) => complaints::are_good_about_a_body(&malformed, body.len(), kind),
        }
    }
    good.iter().for_each(Checked::check);
    are_read_as_written(&good);
}

/// Everything that was read can be written, at worst alone, and is read as it was.
pub fn are_read_as_written<T: Checked>(items: &[T]) {
    let mut rest = items;
    while !rest.is_empty() {
        let mut body = Items::new();
        let taken = rest.iter().take_while(|item| body.push(*item).is_ok()).count();
        assert!(taken > 0 && body.size() <= BODY_MAX, "{} bytes", body.size());
        assert_eq!((body.len(), body.kind()), (taken, Some(T::KIND)));
        let (size, body) = (body.size(), body.into_body());
        assert_eq!(body.len(), size);
        let read: Result<Vec<T>, Malformed> =
            decode(&body).and_then(|items| items.into_iter().collect());
        assert_eq!(read.as_deref(), Ok(&rest[..taken]));
        rest = &rest[taken..];
    }
}

/// A request: the first line is `at <timestamp>`, or `at` for none; the rest is the body.
pub fn request(input: &[u8]) {
    let (timestamp, body) = timestamp_and_body(input);
    let read = decode_request(body, timestamp);
    assert_eq!(read, decode_request(body, timestamp), "read twice");
    let value = json::value(json::without_mark(body));
    match read {
        Ok(request) => {
            assert!(body.len() <= REQUEST_MAX && value.is_some_and(|it| it.is_object()));
            assert_eq!(timestamp.map(|it| it * 1000), Some(request.key.requested_at.as_millis()));
            follows(&request, body.len());
        }
        Err(malformed) => {
            let RequestMalformed { reason, id, requested_at, reply: _ } = &malformed;
            assert!((1..=1024).contains(&reason.len()), "{reason}");
            complaints::is_one_line(reason);
            assert_eq!(requested_at.is_some(), timestamp.is_some_and(|it| it <= LAST_SECOND));
            // The reply token can only have been read from valid JSON.
            let is_read = value.is_some_and(|it| json::depth(&it) <= REQUEST_DEPTH_MAX);
            assert!(is_read || id.is_none(), "{malformed:?}");
        }
    }
}

/// A message of requests, given like a request.
pub fn requests(input: &[u8]) {
    let (timestamp, body) = timestamp_and_body(input);
    let DecodedRequests { items, fault } = decode_requests(body, timestamp);
    let again = decode_requests(body, timestamp);
    assert_eq!((&items, &fault), (&again.items, &again.fault), "read twice");
    if let Some(reason) = &fault {
        assert!((1..=1024).contains(&reason.len()), "{reason}");
        complaints::is_one_line(reason);
    } else {
        assert!((1..=REQUESTS_MAX).contains(&items.len()) && body.len() <= BODY_MAX);
    }
    // A byte order mark counts only in the message.
    if body.len() > REQUEST_MAX && items.len() == 1 {
        return;
    }
    let mut together = RequestBody::new();
    let mut joined = Vec::new();
    for RequestItem { text, read } in items {
        // In an array or alone, a request means the same.
        let alone = decode_request(text.as_bytes(), timestamp);
        match (read, alone) {
            (Ok(read), Ok(alone)) => {
                assert_eq!(read, alone);
                if together.push(text.as_bytes()).is_ok() {
                    joined.push(read);
                }
            }
            (Err(read), Err(alone)) => {
                assert!(read.reason.len() <= 1024, "{}", read.reason);
                assert_eq!((read.id, read.reply), (alone.id, alone.reply));
                assert_eq!(read.requested_at, alone.requested_at);
            }
            (read, alone) => panic!("{read:?} in a message, {alone:?} alone"),
        }
    }
    if !joined.is_empty() {
        let body = together.into_bytes();
        let DecodedRequests { items, fault } = decode_requests(&body, timestamp);
        assert_eq!(fault, None);
        let read: Result<Vec<_>, _> = items.into_iter().map(|item| item.read).collect();
        assert_eq!(read, Ok(joined));
    }
}

fn timestamp_and_body(input: &[u8]) -> (Option<u64>, &[u8]) {
    let Some(rest) = input.strip_prefix(b"at") else { return (Some(1_700_000_000), input) };
    let end = rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
    let (line, body) = rest.split_at(end);
    let timestamp = str::from_utf8(line).ok().and_then(|line| line.trim().parse().ok());
    (timestamp, body.get(1..).unwrap_or_default())
}

/// The properties of a request that was read from `size` bytes, and of the messages that follow
/// from it.
pub fn follows(request: &Request, size: usize) {
    is_request(request);
    let Request { key, request_hash, services, data, timeout, answer_at, reply } = request.clone();
    let id = key.id.clone();
    let spec = TransactionSpec { id, services, data, request_hash, timeout, answer_at };
    // Its numbers may be longer than in the original: `8e7`.
    if size + 16 <= REQUEST_MAX {
        let body = encode_request(&spec, reply.as_ref()).expect("it is no larger than it came");
        let again = decode_request(&body, Some(key.requested_at.as_millis() / 1000));
        assert_eq!(again.as_ref(), Ok(request));
    }
    let prepare = Prepare {
        key: key.clone(),
        request_hash,
        data: request.data.clone(),
        deadline: Time::from_millis(LAST_SECOND * 1000),
        repeated: false,
    };
    are_read_as_written(&[prepare]);
    let cause = ParkedCause::Undecidable(request.clone());
    are_read_as_written(&[Parked { key, cause, parked_at: Time::EPOCH }]);
}

fn is_request(request: &Request) {
    let Request { key, request_hash: hash, services, data, timeout, answer_at: _, reply: _ } =
        request;
    is_key(key);
    assert!((1..=SERVICES_MAX).contains(&services.len()));
    assert!(services.is_sorted_by(|a, b| a < b), "{services:?}");
    assert_eq!(*hash, request_hash(services, data));
    assert!(timeout.is_none_or(|it| (Duration::from_millis(1)..=DAY).contains(&it)));
    assert!(json::value(data.as_str().as_bytes()).is_some_and(|it| it.is_object()));
}

/// `vote` of `dtc.vote.v1`.
fn word(kind: &str) -> &str {
    kind.trim_start_matches("dtc.").trim_end_matches(".v1")
}

fn is_key(key: &TransactionKey) {
    assert!((1..=128).contains(&key.id.as_str().len()));
    assert_eq!(key.requested_at.as_millis() % 1000, 0);
    is_moment(key.requested_at);
}

fn is_moment(moment: Time) {
    assert!(moment.as_millis() <= LAST_SECOND * 1000, "{moment:?}");
}

fn is_text(text: &str) {
    assert!(text.chars().count() <= TEXT_MAX);
}

fn is_reason(reason: &Reason) {
    reason.message.iter().for_each(|it| is_text(it));
}

fn are_branches(branches: &[(ServiceName, Branch)]) {
    assert!(branches.is_sorted_by(|(a, _), (b, _)| a < b), "{branches:?}");
}

impl Checked for Prepare {
    fn check(&self) {
        is_key(&self.key);
        is_moment(self.deadline);
        assert!(json::value(self.data.as_str().as_bytes()).is_some_and(|it| it.is_object()));
    }
}

impl Checked for Query {
    fn check(&self) {
        is_key(&self.key);
    }
}

impl Checked for Cancel {
    fn check(&self) {
        is_key(&self.0);
    }
}

impl Checked for Finish {
    fn check(&self) {
        is_key(&self.key);
    }
}

impl Checked for Vote {
    fn check(&self) {
        is_key(&self.key);
        match &self.kind {
            VoteKind::Refused(reason) | VoteKind::Failed { reason, .. } => is_reason(reason),
            VoteKind::Prepared { .. } | VoteKind::ReadOnly | VoteKind::Finished(_) => {}
        }
    }
}

impl Checked for Done {
    fn check(&self) {
        is_key(&self.key);
        self.applied.as_ref().err().into_iter().for_each(|it| is_text(it));
    }
}

impl Checked for Inquiry {
    fn check(&self) {
        is_key(&self.key);
        is_moment(self.deadline);
    }
}

impl Checked for Decision {
    fn check(&self) {
        is_key(&self.key);
        are_branches(&self.branches);
        self.reason.iter().for_each(is_reason);
        is_moment(self.decided_at);
    }
}

impl Checked for Answer {
    fn check(&self) {
        is_moment(self.requested_at);
        is_moment(self.decided_at);
        self.reason.iter().for_each(is_reason);
    }
}

impl Checked for Parked {
    fn check(&self) {
        is_key(&self.key);
        is_moment(self.parked_at);
        match &self.cause {
            ParkedCause::Uncommitted { error, .. } => error.iter().for_each(|it| is_text(it)),
            ParkedCause::Undecidable(request) => {
                assert_eq!(request.key, self.key);
                is_request(request);
            }
        }
    }
}

impl Checked for Settled {
    fn check(&self) {
        is_key(&self.key);
        is_moment(self.settled_at);
    }
}

impl Checked for JournalBegun {
    fn check(&self) {
        is_moment(self.complete_since);
    }
}

impl Checked for PackedMessage {
    fn check(&self) {
        assert!(self.is_encodable());
        if let Some((key, _)) = &self.tried {
            is_key(key);
        }
    }
}
