//! Any item is read as it was written; any bytes are items or lead to complaints.

use std::time::Duration;

use super::*;
use dtc::{
    protocol::message::TransactionSpec,
    wire::{
        hash::canonical,
        message::{RequestMalformed, decode_request, encode_request},
    },
};
use proptest::prelude::{Just, Strategy, any, prop, prop_oneof, proptest};

use crate::{damage, object};

const SECONDS: std::ops::RangeInclusive<u64> = 0..=253_402_300_799;

fn a_key() -> impl Strategy<Value = TransactionKey> {
    ("[A-Za-z0-9._:-]{1,128}", SECONDS).prop_map(|(id, seconds)| TransactionKey {
        id: TransactionId::parse(&id).unwrap(),
        requested_at: Time::from_millis(seconds * 1000),
    })
}

fn a_service() -> impl Strategy<Value = ServiceName> {
    "[A-Za-z0-9_-]{1,64}".prop_map(|name| service(&name))
}

fn an_instance() -> impl Strategy<Value = InstanceId> {
    "[A-Za-z0-9_-]{1,64}|[ab]".prop_map(|name| InstanceId::parse(&name).unwrap())
}

fn a_store() -> impl Strategy<Value = Option<StoreId>> {
    prop::option::of("[A-Za-z0-9_-]{1,64}".prop_map(|name| StoreId::parse(&name).unwrap()))
}

fn a_worker() -> impl Strategy<Value = WorkerId> {
    "[A-Za-z0-9_-]{1,64}".prop_map(|name| WorkerId::parse(&name).unwrap())
}

fn a_branch() -> impl Strategy<Value = Branch> {
    (an_instance(), any::<u64>()).prop_map(|(instance, number)| Branch::of(&instance, number))
}

fn a_hash() -> impl Strategy<Value = RequestHash> {
    any::<[u8; 16]>().prop_map(RequestHash)
}

fn a_moment() -> impl Strategy<Value = Time> {
    (0..=253_402_300_799_000u64).prop_map(Time::from_millis)
}

fn a_text() -> impl Strategy<Value = Arc<str>> {
    any::<String>().prop_map(Arc::from)
}

fn an_outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![Just(Outcome::Committed), Just(Outcome::Aborted)]
}

fn a_reason() -> impl Strategy<Value = Reason> {
    let codes = vec![
        ReasonCode::Refused,
        ReasonCode::Failed,
        ReasonCode::NoSlot,
        ReasonCode::UnknownService,
        ReasonCode::Deadline,
        ReasonCode::Unavailable,
        ReasonCode::Cancelled,
        ReasonCode::Invalid,
        ReasonCode::IdReused,
    ];
    let parts =
        (prop::sample::select(codes), prop::option::of(a_service()), prop::option::of(a_text()));
    parts.prop_map(|(code, service, message)| Reason::new(code, service, message))
}

fn a_prepare() -> impl Strategy<Value = Prepare> {
    let parts = (a_key(), a_hash(), object(), a_moment(), any::<bool>());
    parts.prop_map(|(key, request_hash, data, deadline, repeated)| Prepare {
        key,
        request_hash,
        data: canonical(data),
        deadline,
        repeated,
    })
}

fn a_query() -> impl Strategy<Value = Query> {
    (a_key(), a_hash()).prop_map(|(key, request_hash)| Query { key, request_hash })
}

fn a_finish() -> impl Strategy<Value = Finish> {
    let parts = (a_key(), an_outcome(), prop::option::of(a_branch()), any::<bool>());
    parts.prop_map(|(key, outcome, branch, parked)| Finish { key, outcome, branch, parked })
}

fn a_vote() -> impl Strategy<Value = Vote> {
    let kind = prop_oneof![
        a_branch().prop_map(|branch| VoteKind::Prepared { branch }),
        Just(VoteKind::ReadOnly),
        a_reason().prop_map(VoteKind::Refused),
        (a_branch(), a_reason()).prop_map(|(branch, reason)| VoteKind::Failed { branch, reason }),
        an_outcome().prop_map(VoteKind::Finished),
    ];
    let parts = (a_key(), a_hash(), a_service(), an_instance(), a_store(), kind, any::<u32>());
    parts.prop_map(|(key, request_hash, service, instance, store, kind, free)| Vote {
        key,
        request_hash,
        service,
        instance,
        store,
        kind,
        free,
    })
}

fn a_done() -> impl Strategy<Value = Done> {
    let applied = prop_oneof![Just(Ok(())), a_text().prop_map(Err)];
    let parts =
        (a_key(), a_service(), an_instance(), a_store(), applied, any::<bool>(), any::<u32>());
    parts.prop_map(|(key, service, instance, store, applied, parked, free)| Done {
        key,
        service,
        instance,
        store,
        applied,
        parked,
        free,
    })
}

fn an_inquiry() -> impl Strategy<Value = Inquiry> {
    let parts = (a_key(), a_hash(), a_service(), an_instance(), a_branch(), a_moment());
    parts.prop_map(|(key, request_hash, service, instance, branch, deadline)| Inquiry {
        key,
        request_hash,
        service,
        instance,
        branch,
        deadline,
    })
}

fn a_decision() -> impl Strategy<Value = Decision> {
    let branches = prop::collection::btree_map(a_service(), a_branch(), 0..4)
        .prop_map(|branches| branches.into_iter().collect());
    let reason = prop::option::of(a_reason());
    let parts = (a_key(), a_hash(), an_outcome(), branches, reason, a_moment(), a_worker());
    parts.prop_map(|(key, request_hash, outcome, branches, reason, decided_at, worker)| Decision {
        key,
        request_hash,
        outcome,
        branches,
        reason,
        decided_at,
        worker,
    })
}

fn an_answer() -> impl Strategy<Value = Answer> {
    let unresolved = prop::collection::vec(a_service(), 0..4);
    let parts = (a_key(), an_outcome(), prop::option::of(a_reason()), unresolved, a_moment());
    parts.prop_map(|(key, outcome, reason, unresolved, decided_at)| {
        let TransactionKey { id, requested_at } = key;
        Answer { id, requested_at, outcome, reason, unresolved, decided_at }
    })
}

fn a_request() -> impl Strategy<Value = Request> {
    let services = prop::collection::btree_set(a_service(), 1..4);
    let timeout = prop::option::of(1..=86_400_000u64);
    let reply = prop::option::of("[A-Za-z0-9_-]{1,64}");
    let answer_at = prop::sample::select(vec![AnswerAt::Applied, AnswerAt::Decided]);
    let parts = (a_key(), services, object(), timeout, answer_at, reply);
    parts.prop_map(|(key, services, data, timeout, answer_at, reply)| {
        let (services, data): (Arc<[_]>, _) = (services.into_iter().collect(), canonical(data));
        Request {
            key,
            request_hash: request_hash(&services, &data),
            services,
            data,
            timeout: timeout.map(Duration::from_millis),
            answer_at,
            reply: reply.map(|reply| ReplyToken::parse(&reply).unwrap()),
        }
    })
}

fn a_parked() -> impl Strategy<Value = Parked> {
    let uncommitted = (a_key(), a_service(), a_branch(), prop::option::of(a_text())).prop_map(
        |(key, service, branch, error)| (key, ParkedCause::Uncommitted { service, branch, error }),
    );
    let undecidable =
        a_request().prop_map(|request| (request.key.clone(), ParkedCause::Undecidable(request)));
    (prop_oneof![uncommitted, undecidable], a_moment())
        .prop_map(|((key, cause), parked_at)| Parked { key, cause, parked_at })
}

fn a_settled() -> impl Strategy<Value = Settled> {
    let parts = (a_key(), a_service(), a_moment(), a_worker());
    parts.prop_map(|(key, service, settled_at, worker)| Settled {
        key,
        service,
        settled_at,
        worker,
    })
}

fn a_copy() -> impl Strategy<Value = PackedMessage> {
    let tried = prop::option::of((a_key(), any::<bool>()));
    let parts = (0..=1_u64 << 53, prop::option::of("[ -~]{0,255}"), tried, any::<String>());
    parts.prop_map(|(offset, message_id, tried, body)| {
        let copied = PackedMessage {
            offset,
            message_id: message_id.map(Arc::from),
            tried,
            body: body.into(),
        };
        assert!(copied.is_encodable());
        copied
    })
}

/// Asserts that `items` are read as they were written: by us, and by other encoders.
fn comes_back<T: Item + Debug + PartialEq>(items: &[T]) {
    let body = body(items);
    assert_eq!(all_good(decode::<T>(&body).unwrap()), items);
    // A layout that another encoder might choose.
    let mut value: serde_json::Value = serde_json::from_slice(&body).unwrap();
    for item in value.as_array_mut().unwrap() {
        item["~"] = serde_json::json!({"unknown": [true]});
    }
    let pretty = serde_json::to_vec_pretty(&value).unwrap();
    assert_eq!(decode::<T>(&pretty).unwrap().len(), items.len());
}

/// Asserts that there are complaints about each, on lines that are fit for a log.
fn is_harmless<T: Item + Debug>(body: &[u8]) {
    let complaints = match decode::<T>(body) {
        Ok(items) => items.into_iter().filter_map(Result::err).collect(),
        Err(malformed) => vec![malformed],
    };
    for complaint in complaints {
        let text = complaint.to_string();
        assert!(!text.is_empty());
        assert!(text.lines().all(|line| !line.contains(char::is_control)), "{text:?}");
    }
}

fn all_are_harmless(body: &[u8]) {
    is_harmless::<Prepare>(body);
    is_harmless::<Query>(body);
    is_harmless::<Cancel>(body);
    is_harmless::<Finish>(body);
    is_harmless::<Vote>(body);
    is_harmless::<Done>(body);
    is_harmless::<Inquiry>(body);
    is_harmless::<Decision>(body);
    is_harmless::<Answer>(body);
    is_harmless::<Parked>(body);
    is_harmless::<Settled>(body);
    is_harmless::<JournalBegun>(body);
    is_harmless::<PackedMessage>(body);
    if let Err(malformed) = decode_request(body, Some(1)) {
        is_fit_for_a_result(&malformed);
    }
}

fn is_fit_for_a_result(malformed: &RequestMalformed) {
    assert!((1..=1024).contains(&malformed.reason.len()));
    assert!(!malformed.reason.contains(char::is_control), "{malformed}");
}

proptest! {
    #[test]
    fn commands_are_read_back(
        prepares in prop::collection::vec(a_prepare(), 0..3),
        queries in prop::collection::vec(a_query(), 0..3),
        finishes in prop::collection::vec(a_finish(), 0..3),
        keys in prop::collection::vec(a_key(), 0..3),
    ) {
        comes_back(&prepares);
        comes_back(&queries);
        comes_back(&finishes);
        comes_back(&keys.into_iter().map(Cancel).collect::<Vec<_>>());
    }

    #[test]
    fn answers_are_read_back(
        votes in prop::collection::vec(a_vote(), 0..4),
        dones in prop::collection::vec(a_done(), 0..3),
        inquiries in prop::collection::vec(an_inquiry(), 0..3),
        answers in prop::collection::vec(an_answer(), 0..3),
    ) {
        comes_back(&votes);
        comes_back(&dones);
        comes_back(&inquiries);
        comes_back(&answers);
    }

    #[test]
    fn records_are_read_back(
        decisions in prop::collection::vec(a_decision(), 0..4),
        parked in prop::collection::vec(a_parked(), 0..3),
        settled in prop::collection::vec(a_settled(), 0..3),
        complete_since in a_moment(),
        copies in prop::collection::vec(a_copy(), 0..3),
    ) {
        comes_back(&decisions);
        comes_back(&parked);
        comes_back(&settled);
        comes_back(&[JournalBegun { complete_since }]);
        comes_back(&copies);
    }

    #[test]
    fn requests_are_read_back(request in a_request()) {
        let Request { key, request_hash, services, data, timeout, answer_at, reply } = request.clone();
        let seconds = key.requested_at.as_millis() / 1000;
        let spec =
            TransactionSpec { id: key.id, services, data, request_hash, timeout, answer_at };
        let body = encode_request(&spec, reply.as_ref()).unwrap();
        assert_eq!(decode_request(&body, Some(seconds)), Ok(request));
        let value: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let pretty = serde_json::to_vec_pretty(&value).unwrap();
        assert!(decode_request(&pretty, Some(seconds)).is_ok());
    }

    #[test]
    fn any_bytes_are_harmless(
        bytes in any::<Vec<u8>>(),
        first in prop::sample::select(vec!["", "[", "[{", "{\"id\":", "[[", "[{\"id\":\""]),
    ) {
        all_are_harmless(&[first.as_bytes(), &bytes].concat());
    }

    #[test]
    fn damaged_bodies_are_harmless(
        vote in a_vote(),
        decision in a_decision(),
        parked in a_parked(),
        answer in an_answer(),
        damage in damage(),
    ) {
        let texts = [text(&[vote]), text(&[decision]), text(&[parked]), text(&[answer])];
        texts.iter().for_each(|text| all_are_harmless(&damage.to(text)));
    }

    #[test]
    fn a_damaged_request_is_harmless(request in a_request(), damage in damage()) {
        let Request { key, request_hash, services, data, timeout, answer_at, reply } = request;
        let spec =
            TransactionSpec { id: key.id, services, data, request_hash, timeout, answer_at };
        let body = String::from_utf8(encode_request(&spec, reply.as_ref()).unwrap()).unwrap();
        all_are_harmless(&damage.to(&body));
    }

    #[test]
    fn values_of_any_type_in_any_field_are_harmless(
        vote in a_vote(),
        value in object(),
        at in any::<prop::sample::Index>(),
    ) {
        let mut item: serde_json::Value = serde_json::from_str(&text(&[vote])).unwrap();
        let fields = item[0].as_object_mut().unwrap();
        let name = fields.keys().nth(at.index(fields.len())).unwrap().clone();
        fields.insert(name, value.into());
        let body = item.to_string();
        all_are_harmless(body.as_bytes());
        assert!(decode::<Vote>(body.as_bytes()).unwrap()[0].is_err());
    }
}
