//! A service's prepare queue: it enforces the cap.

use std::{collections::VecDeque, time::Duration};

use crate::protocol::{
    ids::TransactionKey,
    message::{Delivery, Prepare},
    time::Time,
};

/// The prepares that wait for one of a service's slots.
///
/// A delivered prepare holds its slot until it is acked. A prepare that has waited for `max_wait`
/// is returned; with a `max_wait` of zero, it is returned at once if no slot is free.
#[derive(Debug)]
pub struct MemoryPrepareQueue {
    max_concurrency: u32,
    max_wait: Duration,
    waiting: VecDeque<WaitingPrepare>,
    unacked: u32,
    delivered: u64,
    longest_wait: Duration,
}

#[derive(Debug)]
struct WaitingPrepare {
    since: Time,
    prepare: Prepare,
}

/// A prepare that found no slot in time.
#[derive(Debug)]
pub struct ReturnedPrepare(pub TransactionKey);

impl MemoryPrepareQueue {
    /// An empty queue.
    pub fn new(max_concurrency: u32, max_wait: Duration) -> Self {
        Self {
            max_concurrency,
            max_wait,
            waiting: VecDeque::new(),
            unacked: 0,
            delivered: 0,
            longest_wait: Duration::ZERO,
        }
    }

    /// Adds a prepare.
    pub fn publish(&mut self, now: Time, prepare: Prepare) {
        self.waiting.push_back(WaitingPrepare { since: now, prepare });
    }

    /// The next prepare that has a slot.
    pub fn deliver(&mut self, now: Time) -> Option<(Delivery, Prepare)> {
        if self.unacked >= self.max_concurrency {
            return None;
        }
        let WaitingPrepare { since, prepare } = self.waiting.pop_front()?;
        self.longest_wait = self.longest_wait.max(now.since(since));
        self.unacked += 1;
        self.delivered += 1;
        Some((Delivery(self.delivered), prepare))
    }

    /// The next prepare that has waited long enough. Call it after [`MemoryPrepareQueue::deliver`]
    /// has delivered all that it can.
    pub fn expire(&mut self, now: Time) -> Option<ReturnedPrepare> {
        if self.next_expiry()? > now {
            return None;
        }
        let WaitingPrepare { since, prepare } = self.waiting.pop_front()?;
        self.longest_wait = self.longest_wait.max(now.since(since));
        Some(ReturnedPrepare(prepare.key))
    }

    /// When the next prepare will have waited long enough.
    pub fn next_expiry(&self) -> Option<Time> {
        self.waiting.front().map(|waiting| waiting.since + self.max_wait)
    }

    /// Frees a slot.
    pub fn ack(&mut self) {
        self.unacked = self.unacked.saturating_sub(1);
    }

    /// The longest time that a prepare has waited for a slot, or for its return.
    pub fn longest_wait(&self) -> Duration {
        self.longest_wait
    }
}
