//! Gathers what an instance publishes: all votes for one worker travel in one message, and so do all
//! dones.

use std::collections::BTreeMap;

use lapin::types::{AMQPValue, FieldTable, ShortString};

use crate::{
    protocol::{
        ids::{ServiceName, WorkerId},
        message::{Delivery, Done, Inquiry, Vote},
    },
    transport::amqp::{
        names::{ANY, Names, PREPARES_MAX, key},
        publisher::OutgoingMessage,
    },
    wire::message::{Item, Items, Kind},
};

/// What is to be published.
#[derive(Debug)]
pub(super) struct InstanceOutbox {
    exchange: ShortString,
    service: ServiceName,
    /// The headers of votes and dones.
    headers: Option<FieldTable>,
    votes: BTreeMap<WorkerId, Bodies>,
    dones: BTreeMap<WorkerId, Bodies>,
    inquiries: Bodies,
    settled: Bodies,
    /// By the index of a message in `settled`: the deliveries to acknowledge when the broker has
    /// confirmed it.
    owed: BTreeMap<usize, Vec<Delivery>>,
}

/// Items of one kind for one destination, in as few messages as possible.
type Bodies = Vec<Items>;

/// A message to publish. `owed` may be acknowledged when the broker has confirmed it.
#[derive(Debug)]
pub(super) struct OutboundMessage {
    pub(super) message: OutgoingMessage,
    pub(super) owed: Vec<Delivery>,
    /// Whether it must not be lost. If a message of the other kind is lost, its receiver asks again.
    pub(super) must_arrive: bool,
}

impl InstanceOutbox {
    /// `prepares_max`: how many prepares one message may contain.
    pub(super) fn new(names: &Names, service: ServiceName, prepares_max: u16) -> Self {
        let headers = (prepares_max > 1).then(|| {
            let mut headers = FieldTable::default();
            headers.insert(PREPARES_MAX.into(), AMQPValue::LongInt(prepares_max.into()));
            headers
        });
        Self {
            exchange: names.replies(),
            service,
            headers,
            votes: BTreeMap::new(),
            dones: BTreeMap::new(),
            inquiries: Vec::new(),
            settled: Vec::new(),
            owed: BTreeMap::new(),
        }
    }

    pub(super) fn vote(&mut self, to: WorkerId, vote: &Vote) {
        push(self.votes.entry(to).or_default(), vote);
    }

    pub(super) fn done(&mut self, to: WorkerId, done: &Done) {
        push(self.dones.entry(to).or_default(), done);
    }

    pub(super) fn inquire(&mut self, inquiry: &Inquiry) {
        push(&mut self.inquiries, inquiry);
    }

    /// Adds the done of a parked command. It goes to any worker, and `delivery` is acknowledged only
    /// after the broker has confirmed it.
    pub(super) fn settle(&mut self, done: &Done, delivery: Option<Delivery>) {
        push(&mut self.settled, done);
        let last = self.settled.len().saturating_sub(1);
        self.owed.entry(last).or_default().extend(delivery);
    }

    /// Discards everything. Workers that wait for it ask again.
    pub(super) fn clear(&mut self) {
        self.votes.clear();
        self.dones.clear();
        self.inquiries.clear();
        self.settled.clear();
        self.owed.clear();
    }

    /// Takes everything that is to be published.
    pub(super) fn take(&mut self) -> Vec<OutboundMessage> {
        let mut messages = Vec::new();
        // Dones first: a slot must be reported free before a vote reports it taken again.
        let to_workers = std::mem::take(&mut self.dones)
            .into_iter()
            .chain(std::mem::take(&mut self.votes))
            .flat_map(|(to, bodies)| bodies.into_iter().map(move |body| (to.clone(), body)));
        for (to, body) in to_workers {
            messages.push(self.outbound(to.as_str(), body, None));
        }
        for body in std::mem::take(&mut self.inquiries) {
            messages.push(self.outbound(ANY, body, None));
        }
        for (number, body) in std::mem::take(&mut self.settled).into_iter().enumerate() {
            let owed = self.owed.remove(&number).unwrap_or_default();
            messages.push(self.outbound(ANY, body, Some(owed)));
        }
        messages
    }

    fn outbound(&self, to: &str, body: Items, owed: Option<Vec<Delivery>>) -> OutboundMessage {
        let must_arrive = owed.is_some();
        let kind = body.kind();
        let message = OutgoingMessage {
            exchange: self.exchange.clone(),
            key: key(to, &self.service),
            message_type: kind.map_or("", |kind| kind.as_type()),
            body: body.into_body(),
            persistent: must_arrive,
            mandatory: must_arrive,
            headers: self.headers.clone().filter(|_| kind != Some(Kind::Inquiry)),
            ..OutgoingMessage::default()
        };
        OutboundMessage { message, owed: owed.unwrap_or_default(), must_arrive }
    }
}

fn push<T: Item>(bodies: &mut Bodies, item: &T) {
    if let Some(last) = bodies.last_mut()
        && last.push(item).is_ok()
    {
        return;
    }
    let mut items = Items::new();
    // An empty message accepts any item.
    if items.push(item).is_ok() {
        bodies.push(items);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::InstanceOutbox;
    use crate::{
        protocol::{
            ids::{
                Branch, InstanceId, RequestHash, ServiceName, TransactionId, TransactionKey,
                WorkerId,
            },
            message::{Delivery, Done, Inquiry},
            time::Time,
        },
        transport::amqp::names::{Names, Namespace},
        wire::message::{BODY_MAX, decode},
    };

    fn outbox() -> InstanceOutbox {
        outbox_of(1)
    }

    fn outbox_of(prepares_max: u16) -> InstanceOutbox {
        let names = Names::new(Namespace::parse("dtc").unwrap());
        InstanceOutbox::new(&names, ServiceName::parse("payments").unwrap(), prepares_max)
    }

    fn done(number: usize, applied: Result<(), Arc<str>>) -> Done {
        let id = TransactionId::parse(&format!("t{number}")).unwrap();
        Done {
            key: TransactionKey { id, requested_at: Time::EPOCH },
            service: ServiceName::parse("payments").unwrap(),
            instance: InstanceId::parse("i1").unwrap(),
            store: None,
            applied,
            parked: false,
            free: 1,
        }
    }

    #[test]
    fn all_dones_for_one_worker_travel_in_one_message() {
        let mut outbox = outbox();
        for (number, worker) in ["w1", "w2", "w1", "w1"].into_iter().enumerate() {
            outbox.done(WorkerId::parse(worker).unwrap(), &done(number, Ok(())));
        }
        let messages = outbox.take();
        let published: Vec<_> = messages
            .iter()
            .map(|it| (it.message.key.as_str(), decode::<Done>(&it.message.body).unwrap().len()))
            .collect();
        assert_eq!(published, [("w1.payments", 3), ("w2.payments", 1)]);
        assert!(outbox.take().is_empty());
    }

    #[test]
    fn items_that_do_not_fit_into_one_message_go_into_another() {
        let mut outbox = outbox();
        let worker = WorkerId::parse("w1").unwrap();
        for number in 0..1000 {
            outbox.done(worker.clone(), &done(number, Err("x".repeat(1000).into())));
        }
        let messages = outbox.take();
        assert!(messages.iter().all(|it| it.message.body.len() <= BODY_MAX));
        let dones: usize =
            messages.iter().map(|it| decode::<Done>(&it.message.body).unwrap().len()).sum();
        assert_eq!((messages.len() > 1, dones), (true, 1000));
    }

    #[test]
    fn every_vote_and_done_says_how_many_prepares_a_message_may_contain() {
        let mut outbox = outbox_of(16);
        let worker = WorkerId::parse("w1").unwrap();
        outbox.done(worker, &done(1, Ok(())));
        outbox.settle(&done(2, Ok(())), Some(Delivery(2)));
        let instance = InstanceId::parse("i1").unwrap();
        outbox.inquire(&Inquiry {
            key: done(3, Ok(())).key,
            request_hash: RequestHash([0; 16]),
            service: ServiceName::parse("payments").unwrap(),
            branch: Branch::of(&instance, 1),
            instance,
            deadline: Time::EPOCH,
        });
        let messages = outbox.take();
        let published: Vec<_> = messages
            .iter()
            .map(|it| (it.message.message_type, it.message.headers.is_some()))
            .collect();
        let expected = [("dtc.done.v1", true), ("dtc.inquiry.v1", false), ("dtc.done.v1", true)];
        assert_eq!(published, expected);
    }

    #[test]
    fn each_delivery_is_acknowledged_with_the_message_that_answers_it() {
        let mut outbox = outbox();
        for number in 0..1000 {
            let error = Err("x".repeat(1000).into());
            outbox.settle(&done(number, error), Some(Delivery(number as u64)));
        }
        let mut owed = Vec::new();
        for outbound in outbox.take() {
            assert!(
                outbound.must_arrive && outbound.message.persistent && outbound.message.mandatory
            );
            assert_eq!(outbound.message.key.as_str(), "any.payments");
            let dones = decode::<Done>(&outbound.message.body).unwrap();
            assert_eq!(outbound.owed.len(), dones.len());
            owed.extend(outbound.owed);
        }
        assert_eq!(owed, (0..1000).map(Delivery).collect::<Vec<_>>());
    }
}
