//! Unexpected events.

use dtc::protocol::{
    coordinator::{Coordinator, Event, Settings},
    ids::{RequestHash, ServiceName, TransactionId, TransactionKey, WorkerId},
    message::{AnswerAt, Delivery, Payload, Request},
    time::Time,
};

#[test]
fn a_lost_result_of_an_unknown_transaction_sets_no_deadline() {
    let now = Time::from_millis(1_700_000_000_000);
    let mut coordinator = Coordinator::new(Settings::new(WorkerId::parse("w1").unwrap()));
    let mut effects = Vec::new();
    let mut tell = |now, event| {
        coordinator.handle(now, event, &mut effects);
        coordinator.next_deadline()
    };
    let key = TransactionKey { id: TransactionId::parse("t1").unwrap(), requested_at: now };
    let delivery = Delivery(1);
    let request = Request {
        key: key.clone(),
        request_hash: RequestHash([0; 16]),
        services: [ServiceName::parse("payments").unwrap()].into(),
        data: Payload::new("{}"),
        timeout: None,
        answer_at: AnswerAt::default(),
        reply: None,
    };
    tell(now, Event::JournalAttached { next: 0, since: Time::EPOCH });
    let due = tell(now, Event::RequestReceived { request, delivery, deliveries: 21 });
    assert!(due.is_some_and(|due| due > now), "its proposal is to be read back");
    let still = tell(now, Event::ResultFailed { key, delivery });
    assert_eq!(still, due);
    let later = due.unwrap();
    let next = tell(later, Event::DeadlineReached);
    assert!(next.is_some_and(|next| next > later), "it is looked at again at once, for ever");
}
