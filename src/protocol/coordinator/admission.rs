//! What a worker knows of one service's slots, and who waits for them.
//!
//! The service's queue enforces the cap; this is about not sending it what would only come back.
//! All of it is hints: wrong ones cost time, never agreement.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::protocol::{
    coordinator::{Slots, transaction::backoff},
    ids::{InstanceId, ServiceName, StoreId, TransactionKey},
    message::{Reason, ReasonCode},
    time::Time,
};

/// A prepare that comes back sooner than this was not made to wait for a slot. Ten times what a
/// broker needs to return one, and a fiftieth of the default `max_wait`.
const IMPATIENT_BELOW: Duration = Duration::from_millis(20);

/// How many instances' free slots are remembered. More than that are asked without a hint.
const INSTANCES_MAX: usize = 64;

/// How long a service that is not heard of is remembered where memory is short. A
/// transaction that is about to use one has it found, and asked, within a tenth of this.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);

/// The pause before it is reported again that instances of one service have different stores.
const STORES_DIFFER_EVERY: Duration = Duration::from_secs(60);

/// How many prepares may at most be sent to a service that returned the last one: what waits for a
/// service that never has a slot is answered in rounds that double up to this.
const PROBES_MAX: u32 = 256;

/// Why a transaction got no slot of a service that nobody serves.
const UNSERVED: &str = "no instance serves it: start one, or see in its log why it takes nothing";

/// The longest pause before a service whose queue has refused prepares is looked for again: a small
/// part of the usual prepare timeout, as those that wait for it have no more.
const REFUSED_MAX: Duration = Duration::from_secs(1);

/// Whether the service exists.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum ServiceExistence {
    /// It is being looked for.
    Sought,
    Found,
    /// It is being looked for, and could not be reached so far.
    Unavailable,
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

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct ServiceLoad {
    existence: ServiceExistence,
    /// How often it was found and then refused a prepare, since a prepare last got through.
    refusals: u32,
    /// Whether its unavailability was reported, and not yet its end.
    is_reported: bool,
    /// Whether nobody takes what is sent to it, as far as is known.
    is_unserved: bool,
    patience: Patience,
    /// Whether no other worker uses its slots.
    is_own: bool,
    /// How long a service of this worker's own may be silent before somebody tries whether it has a
    /// slot after all: it is better to wait for a slot than to be refused one.
    silence_max: Duration,
    /// When it reported last.
    reported_at: Time,
    /// The free slots each instance reported last, less the prepares sent since.
    free: BTreeMap<InstanceId, u32>,
    /// The sum of `free`.
    free_in_all: u64,
    most_free: u32,
    /// The most slots that were seen: free, or held by this worker's transactions.
    capacity: u32,
    /// Who named a store last, and which.
    store: Option<(InstanceId, StoreId)>,
    /// When it was last reported that two instances name different ones.
    stores_differed_at: Option<Time>,
    /// Prepares sent and not answered.
    outstanding: u32,
    /// Slots that this worker's transactions hold.
    holding: u32,
    /// Slots kept for transactions that are being asked for elsewhere first.
    reserved: u32,
    /// Prepares that may be outstanding though no slot is known to be free.
    probes: u32,
    contended_until: Time,
    /// Who waits and has begun: they go first, since others wait for what they hold, and for their
    /// end if no more may begin.
    begun: VecDeque<TransactionKey>,
    /// Who waits and has not begun.
    waiting: VecDeque<TransactionKey>,
}

impl ServiceLoad {
    /// A service of which is known what `own` says, if no other worker uses it.
    pub(super) fn new(own: Option<&Slots>) -> Self {
        let patience = match own {
            None => Patience::Unknown,
            Some(slots) if slots.max_wait < IMPATIENT_BELOW => Patience::Returns,
            Some(_) => Patience::Waits,
        };
        Self {
            existence: ServiceExistence::Sought,
            refusals: 0,
            is_reported: false,
            is_unserved: false,
            patience,
            is_own: own.is_some(),
            silence_max: own.map_or(Duration::ZERO, |slots| slots.max_wait / 4),
            reported_at: Time::EPOCH,
            free: BTreeMap::new(),
            free_in_all: 0,
            most_free: 0,
            capacity: own.map_or(0, |slots| slots.max_concurrency),
            store: None,
            stores_differed_at: None,
            outstanding: 0,
            holding: 0,
            reserved: 0,
            probes: 0,
            contended_until: Time::EPOCH,
            begun: VecDeque::new(),
            waiting: VecDeque::new(),
        }
    }

    pub(super) fn is_found(&self) -> bool {
        self.existence == ServiceExistence::Found
    }

    /// It exists and can be reached. Whether that is to be reported: a queue that has refused a
    /// prepare may be there and still take nothing.
    pub(super) fn found(&mut self) -> bool {
        self.existence = ServiceExistence::Found;
        self.refusals == 0 && std::mem::take(&mut self.is_reported)
    }

    /// Somebody takes what is sent to it. Whether that is to be reported.
    pub(super) fn served(&mut self) -> bool {
        std::mem::take(&mut self.is_unserved)
    }

    /// Nobody takes what is sent to it: there are no slots. Whether that is to be reported.
    pub(super) fn unserved(&mut self) -> bool {
        self.forget_slots();
        !std::mem::replace(&mut self.is_unserved, true)
    }

    pub(super) fn is_unserved(&self) -> bool {
        self.is_unserved
    }

    /// Whether those who wait for it may wait in vain: it can't be reached, or nobody serves it.
    pub(super) fn is_out_of_reach(&self) -> bool {
        self.is_unavailable() || self.is_unserved
    }

    /// Why those abort that waited for it, which is called `service`, in vain.
    pub(super) fn why_out_of_reach(&self, service: &ServiceName) -> Option<Reason> {
        if self.is_unavailable() {
            return Some(Reason::at(service, ReasonCode::Unavailable));
        }
        self.is_unserved.then(|| self.no_slot(service))
    }

    /// Why those abort that got no slot of it, which is called `service`.
    pub(super) fn no_slot(&self, service: &ServiceName) -> Reason {
        let message = self.is_unserved.then(|| UNSERVED.into());
        Reason { message, ..Reason::at(service, ReasonCode::NoSlot) }
    }

    /// The service is gone: it must be found again.
    pub(super) fn lost(&mut self) {
        self.existence = ServiceExistence::Sought;
    }

    pub(super) fn is_unavailable(&self) -> bool {
        self.existence == ServiceExistence::Unavailable
    }

    /// It can't be reached for now. Whether that is to be reported.
    pub(super) fn unavailable(&mut self) -> bool {
        self.existence = ServiceExistence::Unavailable;
        !std::mem::replace(&mut self.is_reported, true)
    }

    /// It was looked for and could not be reached: once it is found, it will be.
    pub(super) fn unreached(&mut self) {
        self.refusals = 0;
    }

    /// A prepare got through. Whether that is to be reported.
    pub(super) fn is_reachable_again(&mut self) -> bool {
        self.refusals = 0;
        self.is_found() && std::mem::take(&mut self.is_reported)
    }

    /// Its queue was found and has refused a prepare: how long to wait before it is looked for.
    pub(super) fn refused(&mut self, first: Duration) -> Duration {
        self.refusals = self.refusals.saturating_add(1);
        backoff(first, REFUSED_MAX, self.refusals)
    }

    /// Whether it was of use, but not for `FORGOTTEN_AFTER`: forgetting it costs a question.
    pub(super) fn is_stale(&self, now: Time) -> bool {
        let was_used = self.reported_at > Time::EPOCH;
        let is_forgettable = self.is_idle() && !self.is_unavailable() && !self.is_unserved;
        was_used && self.reported_at + FORGOTTEN_AFTER < now && is_forgettable
    }

    /// Whether forgetting it loses nothing but hints.
    pub(super) fn is_idle(&self) -> bool {
        self.outstanding == 0
            && self.holding == 0
            && self.reserved == 0
            && !self.has_waiters()
            && !self.is_own
    }

    pub(super) fn is_own(&self) -> bool {
        self.is_own
    }

    fn reported_free(&self) -> u32 {
        u32::try_from(self.free_in_all).unwrap_or(u32::MAX)
    }

    /// How many slots are free, as far as is known, beyond what is already on its way.
    ///
    /// A report doesn't say which prepares had arrived by then, so it may count as free what one on
    /// its way will take; but of all slots ever seen, those on their way and those held are not.
    pub(super) fn spare(&self) -> u32 {
        self.spare_or_kept().saturating_sub(self.reserved)
    }

    fn spare_or_kept(&self) -> u32 {
        if self.is_unserved {
            // An instance that reports now takes nothing new: it is stopping, for example.
            return 0;
        }
        let unused = self.capacity.saturating_sub(self.holding).saturating_sub(self.outstanding);
        if self.free.is_empty() { unused } else { self.reported_free().min(unused) }
    }

    /// Whether a slot is free, as far as is known.
    pub(super) fn has_spare(&self) -> bool {
        self.spare() > 0
    }

    pub(super) fn returns_at_once(&self) -> bool {
        self.patience == Patience::Returns
    }

    /// Whether one more prepare can expect a slot, or an answer worth having. `begun`: others wait
    /// for the one that sends it, so what is kept for somebody who doesn't need it yet gives way.
    pub(super) fn admits(&self, now: Time, begun: bool) -> bool {
        let (spare, on_its_way) = if begun {
            (self.spare_or_kept(), self.outstanding)
        } else {
            (self.spare(), self.on_its_way())
        };
        let probes = match self.patience {
            Patience::Returns => return true,
            // One waits there for the first instance that comes; more would hold up the worker.
            _ if self.is_unserved => 1,
            Patience::Unknown => self.probes.max(1),
            // While a transaction of this worker's holds a slot, its done will tell of a free one.
            // Where nobody else's would, it may not be silent for ever.
            Patience::Waits => {
                let is_told = self.holding > 0
                    && self.silent_until().is_none_or(|silent_until| now < silent_until);
                if is_told { self.probes } else { self.probes.max(1) }
            }
        };
        spare > 0 || on_its_way < probes
    }

    fn silent_until(&self) -> Option<Time> {
        self.is_own.then_some(self.reported_at + self.silence_max)
    }

    /// When one that waits is to try whether there is a slot after all, if nothing is heard by then.
    pub(super) fn to_be_tried_at(&self, now: Time) -> Option<Time> {
        let is_awaited = self.on_its_way() > 0 || self.holding == 0;
        self.silent_until().filter(|at| !is_awaited && *at > now)
    }

    fn on_its_way(&self) -> u32 {
        self.outstanding.saturating_add(self.reserved)
    }

    /// Keeps a slot, or the right to ask for one.
    pub(super) fn reserve(&mut self) {
        self.reserved += 1;
    }

    pub(super) fn unreserve(&mut self) {
        self.reserved = self.reserved.saturating_sub(1);
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
        // The one with most free slots is as good a guess as any of who will take it.
        if let Some(free) = self.free.values_mut().max().filter(|free| **free > 0) {
            *free -= 1;
            self.free_in_all -= 1;
        }
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
        self.forget_slots();
        self.contended_until = now + contended_for;
    }

    fn forget_slots(&mut self) {
        self.free.clear();
        self.free_in_all = 0;
        self.capacity = 0;
    }

    pub(super) fn took_slot(&mut self) {
        self.holding += 1;
    }

    pub(super) fn freed_slot(&mut self) {
        self.holding = self.holding.saturating_sub(1);
    }

    pub(super) fn reported(&mut self, now: Time, instance: &InstanceId, free: u32) {
        self.reported_at = now;
        self.most_free = self.most_free.max(free);
        let before = if let Some(known) = self.free.get_mut(instance) {
            std::mem::replace(known, free)
        } else if self.free.len() < INSTANCES_MAX {
            self.free.insert(instance.clone(), free);
            0
        } else {
            return;
        };
        self.free_in_all = self.free_in_all - u64::from(before) + u64::from(free);
    }

    /// An instance names its store. Who named another one before, if that is to be reported.
    pub(super) fn named_store(
        &mut self,
        now: Time,
        instance: &InstanceId,
        store: &StoreId,
    ) -> Option<(InstanceId, StoreId)> {
        if self.store.as_ref().is_some_and(|(_, known)| known == store) {
            return None;
        }
        let before = self.store.replace((instance.clone(), store.clone()))?;
        let is_new = |at: Time| now.since(at) >= STORES_DIFFER_EVERY;
        if !self.stores_differed_at.is_none_or(is_new) {
            return None;
        }
        self.stores_differed_at = Some(now);
        Some(before)
    }

    /// The report is dealt with: now it says how many slots there are.
    pub(super) fn learn(&mut self) {
        let seen = self.reported_free().saturating_add(self.holding);
        self.capacity = self.capacity.max(seen);
    }

    /// How many wait.
    pub(super) fn waiters(&self) -> usize {
        self.begun.len() + self.waiting.len()
    }

    /// Whether one waits that holds a slot elsewhere.
    pub(super) fn has_begun_waiters(&self) -> bool {
        !self.begun.is_empty()
    }

    pub(super) fn has_waiters(&self) -> bool {
        !self.begun.is_empty() || !self.waiting.is_empty()
    }

    /// Whether somebody waits who goes before one that comes now.
    pub(super) fn has_waiters_before(&self, begun: bool) -> bool {
        !self.begun.is_empty() || (!begun && !self.waiting.is_empty())
    }

    pub(super) fn enqueue(&mut self, key: &TransactionKey, begun: bool) {
        let queue = if begun { &mut self.begun } else { &mut self.waiting };
        queue.push_back(key.clone());
    }

    /// Who would be next.
    pub(super) fn first_waiter(&self) -> Option<&TransactionKey> {
        self.begun.front().or_else(|| self.waiting.front())
    }

    /// Who is next. Those that have not begun only if `may_begin`.
    pub(super) fn dequeue(&mut self, may_begin: bool) -> Option<TransactionKey> {
        self.begun.pop_front().or_else(|| if may_begin { self.waiting.pop_front() } else { None })
    }

    /// All who wait.
    pub(super) fn dequeue_all(&mut self) -> impl Iterator<Item = TransactionKey> {
        std::mem::take(&mut self.begun).into_iter().chain(std::mem::take(&mut self.waiting))
    }

    /// Takes out every waiter for which `is_leaving` is true, in one pass.
    pub(super) fn remove_all(&mut self, is_leaving: impl Fn(&TransactionKey) -> bool) {
        self.begun.retain(|waiter| !is_leaving(waiter));
        self.waiting.retain(|waiter| !is_leaving(waiter));
    }

    pub(super) fn remove(&mut self, key: &TransactionKey) {
        self.begun.retain(|waiter| waiter != key);
        self.waiting.retain(|waiter| waiter != key);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{IMPATIENT_BELOW, PROBES_MAX, ServiceLoad};
    use crate::protocol::{
        ids::{InstanceId, TransactionId, TransactionKey},
        message::MAX_WAIT,
        time::Time,
    };

    const NOW: Time = Time::from_millis(1_000_000);

    fn instance(id: &str) -> InstanceId {
        InstanceId::parse(id).unwrap()
    }

    fn key(id: &str) -> TransactionKey {
        TransactionKey { id: TransactionId::parse(id).unwrap(), requested_at: Time::EPOCH }
    }

    fn found() -> ServiceLoad {
        let mut load = ServiceLoad::new(None);
        load.found();
        load
    }

    fn report(load: &mut ServiceLoad, from: &str, free: u32) {
        load.reported(NOW, &instance(from), free);
        load.learn();
    }

    /// How many prepares can be sent before one is answered.
    fn admitted_at_once(mut load: ServiceLoad) -> u32 {
        for sent in 0..1000 {
            if !load.admits(NOW, false) {
                return sent;
            }
            load.asked();
        }
        1000
    }

    #[test]
    fn of_an_unknown_service_one_is_asked_to_find_out() {
        assert_eq!(admitted_at_once(found()), 1);
        assert!(!found().is_plenty(NOW));
    }

    #[test]
    fn reported_slots_are_asked_for_and_no_more() {
        let mut load = found();
        report(&mut load, "p1", 3);
        report(&mut load, "p2", 2);
        assert_eq!(admitted_at_once(load.clone()), 5);
        report(&mut load, "p2", 0);
        assert_eq!(admitted_at_once(load), 3);
    }

    #[test]
    fn plenty_is_a_quarter_of_the_most_and_at_least_two() {
        let with_free = |free| {
            let mut load = found();
            report(&mut load, "p1", 100);
            report(&mut load, "p1", free);
            load.is_plenty(NOW)
        };
        assert_eq!([0, 24, 25, 100].map(with_free), [false, false, true, true]);
        let mut small = found();
        report(&mut small, "p1", 1);
        assert!(!small.is_plenty(NOW), "one slot is always contended");
        report(&mut small, "p1", 2);
        assert!(small.is_plenty(NOW));
        small.enqueue(&key("t1"), false);
        assert!(!small.is_plenty(NOW), "somebody waits for it");
    }

    #[test]
    fn a_return_makes_it_contended_for_a_while_and_its_slots_unknown() {
        let mut load = found();
        report(&mut load, "p1", 9);
        load.returned(NOW, MAX_WAIT, Duration::from_millis(300));
        report(&mut load, "p1", 9);
        assert!(!load.is_plenty(NOW + Duration::from_millis(299)));
        assert!(load.is_plenty(NOW + Duration::from_millis(300)));
    }

    #[test]
    fn what_returns_at_once_is_never_held_back_from() {
        let mut load = found();
        load.returned(NOW, IMPATIENT_BELOW - Duration::from_millis(1), Duration::ZERO);
        assert_eq!(admitted_at_once(load), 1000);
    }

    #[test]
    fn a_service_that_returns_after_waiting_is_probed_in_doubling_rounds() {
        let mut load = found();
        let mut rounds = Vec::new();
        for _ in 0..10 {
            load.returned(NOW, MAX_WAIT, Duration::ZERO);
            rounds.push(admitted_at_once(load.clone()));
        }
        assert_eq!(rounds[..4], [2, 4, 8, 16]);
        assert_eq!(rounds[9], PROBES_MAX);
        load.admitted(false);
        assert_eq!(admitted_at_once(load), 1, "a slot was free after all");
    }

    #[test]
    fn while_an_own_transaction_holds_a_slot_of_a_full_patient_service_nobody_is_sent() {
        let mut load = found();
        report(&mut load, "p1", 0);
        load.took_slot();
        assert!(load.looks_full());
        load.admitted(true);
        assert!(!load.admits(NOW, false));
        load.freed_slot();
        assert_eq!(admitted_at_once(load), 1, "nobody's done would tell");
    }

    #[test]
    fn who_has_begun_goes_first_and_the_others_only_if_they_may() {
        let mut load = found();
        load.enqueue(&key("new"), false);
        load.enqueue(&key("begun"), true);
        assert!(load.has_waiters_before(false) && load.has_waiters_before(true));
        assert_eq!(load.dequeue(false), Some(key("begun")));
        assert!(load.has_waiters_before(false) && !load.has_waiters_before(true));
        assert_eq!(load.dequeue(false), None);
        assert_eq!(load.dequeue(true), Some(key("new")));
        assert!(!load.has_waiters());
    }

    #[test]
    fn who_gives_up_waits_no_more() {
        let mut load = found();
        load.enqueue(&key("t1"), false);
        load.enqueue(&key("t2"), true);
        assert!(!load.is_idle());
        load.remove(&key("t1"));
        load.remove(&key("t2"));
        assert!(load.is_idle());
    }
}
