//! The bodies of messages: their format, that they are read as they were written, and that no
//! broken one does harm.

mod asyncapi;
mod golden;
mod limits;
mod refused;
mod request;
mod round_trip;

use std::{fmt::Debug, sync::Arc};

use dtc::{
    protocol::{
        ids::{
            Branch, InstanceId, ReplyToken, RequestHash, ServiceName, StoreId, TransactionId,
            TransactionKey, WorkerId,
        },
        message::{
            Answer, AnswerAt, Command, Decision, Done, Finish, Inquiry, Outcome, Parked,
            ParkedCause, Payload, Prepare, Query, Reason, ReasonCode, Request, Vote, VoteKind,
        },
        time::Time,
    },
    wire::{
        hash::request_hash,
        message::{Cancel, Item, Items, JournalBegun, Malformed, PackedMessage, Settled, decode},
    },
};

/// The body of `items`.
fn body<T: Item>(items: &[T]) -> Vec<u8> {
    let mut body = Items::new();
    items.iter().for_each(|item| body.push(item).unwrap());
    let size = body.size();
    let body = body.into_body();
    assert_eq!(body.len(), size);
    body
}

fn text<T: Item>(items: &[T]) -> String {
    String::from_utf8(body(items)).unwrap()
}

/// The complaints about `item`, the only one of its body.
fn complaint<T: Item + Debug>(item: &str) -> String {
    let body = format!("[{item}]");
    let items = decode::<T>(body.as_bytes()).unwrap();
    let [Err(malformed)] = &items[..] else { panic!("one bad item: {items:?}") };
    malformed.to_string()
}

/// The complaints about the whole of `body`.
fn outer<T: Item + Debug>(body: &[u8]) -> String {
    decode::<T>(body).unwrap_err().to_string()
}

fn all_good<T: Item + Debug>(items: Vec<Result<T, Malformed>>) -> Vec<T> {
    items.into_iter().collect::<Result<_, _>>().unwrap()
}

fn id() -> TransactionId {
    TransactionId::parse("TX1").unwrap()
}

fn key() -> TransactionKey {
    TransactionKey { id: id(), requested_at: Time::from_millis(1_700_000_000_000) }
}

fn hash() -> RequestHash {
    RequestHash([0, 1, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 255, 254, 0x10, 7, 8, 9, 10])
}

fn service(name: &str) -> ServiceName {
    ServiceName::parse(name).unwrap()
}

fn instance() -> InstanceId {
    InstanceId::parse("stock-1").unwrap()
}

fn branch() -> Branch {
    Branch::of(&instance(), 42)
}

fn worker() -> WorkerId {
    WorkerId::parse("w1").unwrap()
}

fn moment() -> Time {
    Time::from_millis(1_700_000_005_123)
}

fn sold_out() -> Reason {
    let message = Some("sold \"out\"\n\u{1}\\ é".into());
    Reason::new(ReasonCode::Refused, Some(service("stock")), message)
}

fn vote(kind: VoteKind) -> Vote {
    let (service, instance) = (service("stock"), instance());
    Vote { key: key(), request_hash: hash(), service, instance, store: None, kind, free: 7 }
}

fn done(applied: Result<(), Arc<str>>, parked: bool) -> Done {
    let (service, instance) = (service("stock"), instance());
    Done { key: key(), service, instance, store: None, applied, parked, free: 7 }
}

fn prepare(data: &str) -> Prepare {
    let data = Payload::new(data);
    Prepare { key: key(), request_hash: hash(), data, deadline: moment(), repeated: false }
}

fn inquiry() -> Inquiry {
    Inquiry {
        key: key(),
        request_hash: hash(),
        service: service("stock"),
        instance: instance(),
        branch: branch(),
        deadline: moment(),
    }
}

fn committed() -> Decision {
    Decision {
        key: key(),
        request_hash: hash(),
        outcome: Outcome::Committed,
        branches: vec![(service("payments"), branch()), (service("stock"), branch())],
        reason: None,
        decided_at: moment(),
        worker: worker(),
    }
}

fn answer() -> Answer {
    Answer {
        id: id(),
        requested_at: key().requested_at,
        outcome: Outcome::Committed,
        reason: None,
        unresolved: vec![],
        decided_at: moment(),
    }
}

fn request() -> Request {
    let services: Arc<[_]> = [service("payments"), service("stock")].into();
    let data = Payload::new(r#"{"amount":100}"#);
    Request {
        key: key(),
        request_hash: request_hash(&services, &data),
        services,
        data,
        timeout: None,
        answer_at: AnswerAt::default(),
        reply: None,
    }
}

fn parked(cause: ParkedCause) -> Parked {
    Parked { key: key(), cause, parked_at: moment() }
}

fn uncommitted(error: Option<&str>) -> Parked {
    let error = error.map(Arc::from);
    parked(ParkedCause::Uncommitted { service: service("stock"), branch: branch(), error })
}

fn settled() -> Settled {
    Settled { key: key(), service: service("stock"), settled_at: moment(), worker: worker() }
}

fn copied() -> PackedMessage {
    PackedMessage {
        offset: 1024,
        message_id: Some("a1-7".into()),
        tried: Some((key(), true)),
        body: "[{\"id\":\"TX1\"}]\n".into(),
    }
}
