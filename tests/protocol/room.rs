//! How much a worker takes on.

use std::{sync::Arc, time::Duration};

use dtc::protocol::{
    coordinator::{Coordinator, Event, Settings},
    ids::{RequestHash, ServiceName, TransactionId, TransactionKey, WorkerId},
    message::{Delivery, Payload, Request},
    time::Time,
};

const NOW: Time = Time::from_millis(1_000_000);

fn request(id: &str) -> Request {
    Request {
        key: TransactionKey { id: TransactionId::parse(id).unwrap(), requested_at: NOW },
        request_hash: RequestHash([0; 16]),
        services: Arc::new([ServiceName::parse("payments").unwrap()]),
        data: Payload::new("{}"),
        timeout: None,
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

/// A killed worker leaves many requests to another. Those that had only waited must not keep out
/// the one that holds the slot for which they all wait: it may be among the last to come.
#[test]
fn what_is_taken_over_and_held_by_nobody_leaves_room_for_more() {
    let mut coordinator = two_taken_over();
    assert_eq!(coordinator.room(), 0);

    let later = NOW + Duration::from_millis(100);
    coordinator.handle(later, Event::DeadlineReached, &mut Vec::new());

    assert_eq!((coordinator.room(), coordinator.waiting()), (2, 2));
}
