//! How many transactions a worker takes on.

use std::{sync::Arc, time::Duration};

use dtc::protocol::{
    coordinator::{Coordinator, Effect, Event, Settings},
    ids::{RequestHash, ServiceName, TransactionId, TransactionKey, WorkerId},
    message::{AnswerAt, Decision, Delivery, Payload, Reason, ReasonCode, Request},
    time::Time,
};

const NOW: Time = Time::from_millis(1_000_000);

fn request(id: &str) -> Request {
    request_of(id, "payments")
}

fn request_of(id: &str, service: &str) -> Request {
    Request {
        key: TransactionKey { id: TransactionId::parse(id).unwrap(), requested_at: NOW },
        request_hash: RequestHash([0; 16]),
        services: Arc::new([ServiceName::parse(service).unwrap()]),
        data: Payload::new("{}"),
        timeout: None,
        answer_at: AnswerAt::default(),
        reply: None,
    }
}

/// A worker for two at a time that has taken over two, and has asked who holds them.
fn two_taken_over() -> Coordinator {
    let settings = Settings { in_flight_max: 2, ..Settings::new(WorkerId::parse("w").unwrap()) };
    let mut coordinator = Coordinator::new(settings);
    let mut effects = Vec::new();
    coordinator.handle(NOW, Event::JournalAttached { next: 0, since: Time::EPOCH }, &mut effects);
    for (number, id) in ["t1", "t2"].into_iter().enumerate() {
        let (request, delivery) = (request(id), Delivery(number as u64));
        let received = Event::RequestReceived { request, delivery, deliveries: 2 };
        coordinator.handle(NOW, received, &mut effects);
    }
    coordinator
}

/// A killed worker leaves many requests to another. Those that had only waited must not exclude the
/// one that holds the slot for which they all wait: it may be among the last to arrive.
#[test]
fn a_takeover_of_transactions_that_nobody_holds_leaves_room_for_more() {
    let mut coordinator = two_taken_over();
    assert_eq!(coordinator.room(), 0);

    let later = NOW + Duration::from_millis(100);
    coordinator.handle(later, Event::DeadlineReached, &mut Vec::new());

    assert_eq!((coordinator.room(), coordinator.waiting()), (2, 2));
}

/// Transactions that need a service which is out of reach, as `begins` describes, delay no others,
/// however many they are.
fn others_are_served_while_many_wait(begins: impl FnOnce(ServiceName) -> Event) -> Vec<Reason> {
    let (in_flight_max, waiting_max) = (2, 8);
    let worker = WorkerId::parse("w").unwrap();
    let settings = Settings { in_flight_max, waiting_max, ..Settings::new(worker) };
    let mut coordinator = Coordinator::new(settings);
    let mut tell = |event| {
        let mut effects = Vec::new();
        coordinator.handle(NOW, event, &mut effects);
        (effects, coordinator.room(), coordinator.waiting())
    };
    let received = |number: u64, service: &str| Event::RequestReceived {
        request: request_of(&format!("t{number}"), service),
        delivery: Delivery(number),
        deliveries: 1,
    };
    tell(Event::JournalAttached { next: 0, since: Time::EPOCH });
    tell(received(0, "payments"));
    tell(begins(ServiceName::parse("payments").unwrap()));
    let mut aborted: Vec<Decision> = Vec::new();
    for number in 1..100 {
        let (effects, ..) = tell(received(number, "payments"));
        for effect in effects {
            if let Effect::Append(decision) = effect {
                let offset = aborted.len() as u64;
                tell(Event::RecordsRead { offset, decisions: vec![Arc::new(decision.clone())] });
                tell(Event::ResultConfirmed {
                    key: decision.key.clone(),
                    delivery: Delivery(number),
                });
                aborted.push(decision);
            }
        }
        let (_, room, waiting) = tell(Event::DeadlineReached);
        assert!(room > 0 && waiting <= waiting_max / 2, "{number}: {room}, {waiting}");
    }

    tell(received(100, "stock"));
    let (effects, ..) = tell(Event::ServiceFound(ServiceName::parse("stock").unwrap()));
    assert!(matches!(effects[..], [Effect::SendPrepare { .. }]), "{effects:?}");
    aborted.into_iter().filter_map(|it| it.reason).collect()
}

/// Transactions that need a service whose queue can't be reached delay no others, however many
/// wait.
#[test]
fn a_worker_full_of_waiters_for_an_unavailable_service_serves_the_others() {
    let reasons = others_are_served_while_many_wait(Event::ServiceUnavailable);
    assert_eq!(reasons.len(), 96, "as many wait as may, and the others have ended");
    assert!(reasons.iter().all(|it| it.code == ReasonCode::Unavailable), "{reasons:?}");
}

/// One prepare waits in its queue; no more than the limit wait in the worker.
#[test]
fn a_worker_full_of_waiters_for_a_service_without_instances_serves_the_others() {
    let reasons = others_are_served_while_many_wait(Event::ServiceUnserved);
    assert_eq!(reasons.len(), 95, "as many wait as may, and the others have ended");
    let says_why = |it: &Reason| {
        let message = it.message.as_deref().unwrap_or_default();
        it.code == ReasonCode::NoSlot && message.starts_with("no instance serves it")
    };
    assert!(reasons.iter().all(says_why), "{reasons:?}");
}
