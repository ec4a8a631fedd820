//! The request queue: a request that is not acked is delivered again.

use std::collections::BTreeMap;

use crate::protocol::message::{Delivery, Request};

/// The requests that a coordinator has taken and not acked.
#[derive(Debug, Default)]
pub struct MemoryRequestQueue {
    unacked: BTreeMap<Delivery, UnackedRequest>,
    delivered: u64,
}

#[derive(Debug)]
struct UnackedRequest {
    request: Request,
    deliveries: u32,
}

impl MemoryRequestQueue {
    /// Delivers a new request.
    pub fn deliver(&mut self, request: &Request) -> Delivery {
        self.delivered += 1;
        let delivery = Delivery(self.delivered);
        self.unacked.insert(delivery, UnackedRequest { request: request.clone(), deliveries: 1 });
        delivery
    }

    /// The request must not be delivered again.
    pub fn ack(&mut self, delivery: Delivery) {
        self.unacked.remove(&delivery);
    }

    /// Delivers everything that is not acked again, with the number of deliveries so far.
    pub fn redeliver(&mut self) -> impl Iterator<Item = (Delivery, Request, u32)> {
        self.unacked.iter_mut().map(|(delivery, unacked)| {
            unacked.deliveries = unacked.deliveries.saturating_add(1);
            (*delivery, unacked.request.clone(), unacked.deliveries)
        })
    }
}
