//! What a worker knows of one service's slots, and who waits for them.
//!
//! The service's queue enforces the cap; this is about not sending it what would only come back.
//! All of it is hints: wrong ones cost time, never agreement.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::protocol::{
    ids::{InstanceId, TransactionKey},
    time::Time,
};

/// A prepare that comes back sooner than this was not made to wait for a slot. Ten times what a
/// broker needs to return one, and a fiftieth of the default `max_wait`.
const IMPATIENT_BELOW: Duration = Duration::from_millis(20);

/// How many instances' free slots are remembered. More than that are asked without a hint.
const INSTANCES_MAX: usize = 64;

/// How many prepares may at most be sent to a service that returned the last one: what waits for a
/// service that never has a slot is answered in rounds that double up to this.
const PROBES_MAX: u32 = 256;

/// Whether the service exists.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Existence {
    Sought,
    Found,
}

/// What a full service does with a prepare.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Patience {
    Unknown,
    /// It lets a prepare wait: so hold back what can't expect a slot.
    Waits,
    /// It returns a prepare at once: so holding back would only delay the answer.
    Returns,
}

/// What makes one waiter go before another.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Claim {
    HoldsSlots,
    InFlight,
    New,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Flow {
    existence: Existence,
    patience: Patience,
    /// The free slots each instance reported last.
    free: BTreeMap<InstanceId, u32>,
    most_free: u32,
    /// Prepares sent and not answered.
    outstanding: u32,
    /// Slots that this worker's transactions hold.
    holding: u32,
    /// Prepares that may be outstanding though no slot is known to be free.
    probes: u32,
    contended_until: Time,
    /// Who waits and holds a slot elsewhere: they go first, since others wait for what they hold.
    begun: VecDeque<TransactionKey>,
    /// Who waits, was taken over, and holds nothing: it counts as in flight, so it must not wait
    /// for one that isn't.
    resumed: VecDeque<TransactionKey>,
    /// Who waits and has not begun.
    waiting: VecDeque<TransactionKey>,
}

impl Flow {
    pub(super) fn new() -> Self {
        Self {
            existence: Existence::Sought,
            patience: Patience::Unknown,
            free: BTreeMap::new(),
            most_free: 0,
            outstanding: 0,
            holding: 0,
            probes: 0,
            contended_until: Time::EPOCH,
            begun: VecDeque::new(),
            resumed: VecDeque::new(),
            waiting: VecDeque::new(),
        }
    }

    pub(super) fn is_found(&self) -> bool {
        self.existence == Existence::Found
    }

    pub(super) fn found(&mut self) {
        self.existence = Existence::Found;
    }

    /// The service is gone: it must be found again.
    pub(super) fn lost(&mut self) {
        self.existence = Existence::Sought;
    }

    /// Whether forgetting it loses nothing but hints.
    pub(super) fn is_idle(&self) -> bool {
        self.outstanding == 0 && self.holding == 0 && !self.has_waiters()
    }

    /// How many slots are free, as far as reported, beyond what is already on its way.
    fn spare(&self) -> u32 {
        let free: u32 = self.free.values().fold(0, |sum, free| sum.saturating_add(*free));
        free.saturating_sub(self.outstanding)
    }

    /// Whether one more prepare can expect a slot, or an answer worth having.
    pub(super) fn admits(&self) -> bool {
        match self.patience {
            Patience::Returns => true,
            Patience::Unknown => self.spare() > 0 || self.outstanding < self.probes.max(1),
            // While a transaction of this worker's holds a slot, its done will tell of a free one.
            Patience::Waits => {
                let probes = if self.holding == 0 { self.probes.max(1) } else { self.probes };
                self.spare() > 0 || self.outstanding < probes
            }
        }
    }

    /// Whether so many slots are free that taking one without regard to order stalls nobody.
    pub(super) fn is_plenty(&self, now: Time) -> bool {
        now >= self.contended_until
            && self.is_found()
            && !self.has_waiters()
            && self.spare() >= (self.most_free / 4).max(2)
    }

    pub(super) fn asked(&mut self) {
        self.outstanding += 1;
    }

    /// Whether a prepare sent now is expected to find no slot.
    pub(super) fn looks_full(&self) -> bool {
        !self.free.is_empty() && self.spare() == 0 && self.holding > 0
    }

    /// A prepare is no longer outstanding: it was answered, or nobody waits for the answer.
    pub(super) fn answered(&mut self) {
        self.outstanding = self.outstanding.saturating_sub(1);
    }

    /// A prepare got through; `waited`: though none was expected to.
    pub(super) fn admitted(&mut self, waited: bool) {
        self.probes = 0;
        if waited && self.patience == Patience::Unknown {
            self.patience = Patience::Waits;
        }
    }

    /// A prepare came back `after` it was sent.
    pub(super) fn returned(&mut self, now: Time, after: Duration, contended_for: Duration) {
        if after < IMPATIENT_BELOW {
            self.patience = Patience::Returns;
        } else {
            self.patience = Patience::Waits;
            self.probes = self.probes.max(1).saturating_mul(2).min(PROBES_MAX);
        }
        self.free.clear();
        self.contended_until = now + contended_for;
    }

    pub(super) fn took_slot(&mut self) {
        self.holding += 1;
    }

    pub(super) fn freed_slot(&mut self) {
        self.holding = self.holding.saturating_sub(1);
    }

    pub(super) fn reported(&mut self, instance: &InstanceId, free: u32) {
        self.most_free = self.most_free.max(free);
        if let Some(known) = self.free.get_mut(instance) {
            *known = free;
        } else if self.free.len() < INSTANCES_MAX {
            self.free.insert(instance.clone(), free);
        }
    }

    pub(super) fn has_waiters(&self) -> bool {
        !self.begun.is_empty() || !self.resumed.is_empty() || !self.waiting.is_empty()
    }

    pub(super) fn enqueue(&mut self, key: &TransactionKey, claim: Claim) {
        let queue = match claim {
            Claim::HoldsSlots => &mut self.begun,
            Claim::InFlight => &mut self.resumed,
            Claim::New => &mut self.waiting,
        };
        queue.push_back(key.clone());
    }

    /// Who is next. Those that have not begun only if `may_begin`.
    pub(super) fn dequeue(&mut self, may_begin: bool) -> Option<TransactionKey> {
        let begun = self.begun.pop_front().or_else(|| self.resumed.pop_front());
        begun.or_else(|| if may_begin { self.waiting.pop_front() } else { None })
    }

    /// All who wait.
    pub(super) fn dequeue_all(&mut self) -> impl Iterator<Item = TransactionKey> {
        let begun = std::mem::take(&mut self.begun).into_iter();
        begun.chain(std::mem::take(&mut self.resumed)).chain(std::mem::take(&mut self.waiting))
    }

    pub(super) fn remove(&mut self, key: &TransactionKey) {
        self.begun.retain(|waiter| waiter != key);
        self.resumed.retain(|waiter| waiter != key);
        self.waiting.retain(|waiter| waiter != key);
    }
}
