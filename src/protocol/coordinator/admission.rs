//! What a worker knows of one service's slots, and the transactions that wait for them.
//!
//! The service's queue enforces the cap. This avoids sending prepares that would only come back. Everything
//! here is a hint: a wrong one costs time, never agreement.

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

/// A prepare that comes back sooner than this has not waited for a slot. Ten times what a broker needs to
/// return one, and a fiftieth of the default `max_wait`.
const IMPATIENT_BELOW: Duration = Duration::from_millis(20);

/// For how many instances the free slots are remembered.
const INSTANCES_MAX: usize = 64;

/// How long a silent service is remembered when too many are known. A transaction that is about to use a
/// service has found and asked it within a tenth of this.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);

/// How often to report, at most, that instances of one service have different stores.
const STORES_DIFFER_EVERY: Duration = Duration::from_secs(60);

/// How many prepares to send, at most, to a service that has returned the last one. So the transactions
/// that wait for a service without free slots are answered in rounds that double up to this.
const PROBES_MAX: u32 = 256;

/// Why a transaction got no slot of a service without instances.
const UNSERVED: &str = "no instance serves it: start one, or see in its log why it takes nothing";

/// The longest pause before looking again for a service whose queue has refused prepares: a small part of
/// the usual prepare timeout, which is all that its waiters have.
const REFUSED_MAX: Duration = Duration::from_secs(1);

/// Whether the service exists.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum ServiceExistence {
    /// A search for it is under way.
    Sought,
    Found,
    /// A search for it is under way, and could not reach it so far.
    Unavailable,
}

/// What a full service does with a prepare.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Patience {
    Unknown,
    /// It lets a prepare wait: so hold back prepares that can't expect a slot.
    Waits,
    /// It returns a prepare at once: so holding one back would only delay the answer.
    Returns,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct ServiceLoad {
    existence: ServiceExistence,
    /// How often it was found and then refused a prepare, since a prepare was last accepted.
    refusals: u32,
    /// Whether it was reported as unavailable, and not yet as available again.
    is_reported: bool,
    /// Whether it has no instance, as far as is known.
    is_unserved: bool,
    patience: Patience,
    /// Whether no other worker uses its slots.
    is_own: bool,
    /// How long this worker's own service may be silent before a waiter tries whether it has a slot after
    /// all. Waiting for a slot is better than a refusal.
    silence_max: Duration,
    /// When the last report came.
    reported_at: Time,
    /// The free slots that each instance has reported, less the prepares sent since.
    free: BTreeMap<InstanceId, u32>,
    /// The sum of `free`.
    free_in_all: u64,
    most_free: u32,
    /// The most slots that were seen: free, or held by this worker's transactions.
    capacity: u32,
    /// The instance that named a store last, and the store.
    store: Option<(InstanceId, StoreId)>,
    /// When it was last reported that two instances name different stores.
    stores_differed_at: Option<Time>,
    /// Prepares that are sent and not answered.
    outstanding: u32,
    /// Slots that this worker's transactions hold.
    holding: u32,
    /// Slots that are kept for transactions that ask another service first.
    reserved: u32,
    /// How many prepares may be outstanding though no slot is known to be free.
    probes: u32,
    contended_until: Time,
    /// Waiters that have begun. They go first: other transactions may wait for the slots that they hold, and
    /// at the in-flight limit others wait for their end.
    begun: VecDeque<TransactionKey>,
    /// Waiters that have not begun.
    waiting: VecDeque<TransactionKey>,
}

impl ServiceLoad {
    /// `own`: the slots of the service, if no other worker uses it.
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

    /// It exists and can be reached. Returns whether to report that: a queue that has refused a prepare may
    /// exist and still take nothing.
    pub(super) fn found(&mut self) -> bool {
        self.existence = ServiceExistence::Found;
        self.refusals == 0 && std::mem::take(&mut self.is_reported)
    }

    /// It has an instance. Returns whether to report that.
    pub(super) fn served(&mut self) -> bool {
        std::mem::take(&mut self.is_unserved)
    }

    /// It has no instance, and so no slots. Returns whether to report that.
    pub(super) fn unserved(&mut self) -> bool {
        self.forget_slots();
        !std::mem::replace(&mut self.is_unserved, true)
    }

    pub(super) fn is_unserved(&self) -> bool {
        self.is_unserved
    }

    /// Whether its waiters may wait in vain: it can't be reached, or has no instance.
    pub(super) fn is_out_of_reach(&self) -> bool {
        self.is_unavailable() || self.is_unserved
    }

    /// Why its waiters abort, if it is out of reach. `service`: its name.
    pub(super) fn why_out_of_reach(&self, service: &ServiceName) -> Option<Reason> {
        if self.is_unavailable() {
            return Some(Reason::at(service, ReasonCode::Unavailable));
        }
        self.is_unserved.then(|| self.no_slot(service))
    }

    /// Why a transaction aborts that got no slot of it. `service`: its name.
    pub(super) fn no_slot(&self, service: &ServiceName) -> Reason {
        let message = self.is_unserved.then(|| UNSERVED.into());
        Reason { message, ..Reason::at(service, ReasonCode::NoSlot) }
    }

    /// It is gone, and must be found again.
    pub(super) fn lost(&mut self) {
        self.existence = ServiceExistence::Sought;
    }

    pub(super) fn is_unavailable(&self) -> bool {
        self.existence == ServiceExistence::Unavailable
    }

    /// It can't be reached for now. Returns whether to report that.
    pub(super) fn unavailable(&mut self) -> bool {
        self.existence = ServiceExistence::Unavailable;
        !std::mem::replace(&mut self.is_reported, true)
    }

    /// A search could not reach it. So when it is found, it can be reached again.
    pub(super) fn unreached(&mut self) {
        self.refusals = 0;
    }

    /// It has accepted a prepare. Returns whether to report that.
    pub(super) fn is_reachable_again(&mut self) -> bool {
        self.refusals = 0;
        self.is_found() && std::mem::take(&mut self.is_reported)
    }

    /// Its queue was found and has refused a prepare. Returns how long to wait before the next search.
    pub(super) fn refused(&mut self, first: Duration) -> Duration {
        self.refusals = self.refusals.saturating_add(1);
        backoff(first, REFUSED_MAX, self.refusals)
    }

    /// Whether it was used, but not for `FORGOTTEN_AFTER`. To forget it costs one search.
    pub(super) fn is_stale(&self, now: Time) -> bool {
        let was_used = self.reported_at > Time::EPOCH;
        let is_forgettable = self.is_idle() && !self.is_unavailable() && !self.is_unserved;
        was_used && self.reported_at + FORGOTTEN_AFTER < now && is_forgettable
    }

    /// Whether forgetting it loses only hints.
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

    /// How many slots are free, as far as is known, besides those for prepares on their way.
    ///
    /// A report doesn't say which prepares had arrived by then, so it may count a slot as free that a prepare
    /// on its way will take. But the free slots can't be more than all slots ever seen, less those that are
    /// held and those that prepares on their way will take.
    pub(super) fn spare(&self) -> u32 {
        self.spare_or_kept().saturating_sub(self.reserved)
    }

    fn spare_or_kept(&self) -> u32 {
        if self.is_unserved {
            // An instance that still reports is stopping, and takes no prepares.
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

    /// Whether one more prepare can expect a slot, or a useful answer. `begun`: the transaction has begun, so
    /// others may wait for it; then it may take a slot that is reserved for another one.
    pub(super) fn admits(&self, now: Time, begun: bool) -> bool {
        let (spare, on_its_way) = if begun {
            (self.spare_or_kept(), self.outstanding)
        } else {
            (self.spare(), self.on_its_way())
        };
        let probes = match self.patience {
            Patience::Returns => return true,
            // One prepare waits for the first instance that starts. More would hold up the worker.
            _ if self.is_unserved => 1,
            Patience::Unknown => self.probes.max(1),
            // While a transaction of this worker holds a slot, its done will report a free one. Nobody else
            // reports the slots of this worker's own service, so there the silence has a limit.
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

    /// When a waiter should try whether there is a slot after all, if no report comes before.
    pub(super) fn to_be_tried_at(&self, now: Time) -> Option<Time> {
        let is_awaited = self.on_its_way() > 0 || self.holding == 0;
        self.silent_until().filter(|at| !is_awaited && *at > now)
    }

    fn on_its_way(&self) -> u32 {
        self.outstanding.saturating_add(self.reserved)
    }

    /// Keeps a slot, or the right to ask for one, for a transaction.
    pub(super) fn reserve(&mut self) {
        self.reserved += 1;
    }

    pub(super) fn unreserve(&mut self) {
        self.reserved = self.reserved.saturating_sub(1);
    }

    /// Whether so many slots are free that a transaction may take one out of order without stalling others.
    ///
    /// All workers may see the same free slots. So each of the `workers` takes no more than its share out of
    /// order: otherwise the transactions of some could get all slots of one service, and those of others
    /// all of another.
    pub(super) fn is_plenty(&self, now: Time, workers: u32) -> bool {
        now >= self.contended_until
            && self.is_found()
            && !self.has_waiters()
            && self.spare() >= (self.most_free / 4).max(2)
            && self.holding.saturating_add(self.on_its_way()) < self.capacity / workers
    }

    pub(super) fn asked(&mut self) {
        self.outstanding += 1;
        // Any instance may take it. The one with most free slots is as good a guess as any.
        if let Some(free) = self.free.values_mut().max().filter(|free| **free > 0) {
            *free -= 1;
            self.free_in_all -= 1;
        }
    }

    /// Whether a prepare that is sent now would probably find no slot.
    pub(super) fn looks_full(&self) -> bool {
        !self.free.is_empty() && self.spare() == 0 && self.holding > 0
    }

    /// A prepare is no longer outstanding: it was answered, or its transaction doesn't wait any more.
    pub(super) fn answered(&mut self) {
        self.outstanding = self.outstanding.saturating_sub(1);
    }

    /// A prepare has got a slot. `waited`: it was expected to find none.
    pub(super) fn admitted(&mut self, waited: bool) {
        self.probes = 0;
        if waited && self.patience == Patience::Unknown {
            self.patience = Patience::Waits;
        }
    }

    /// A prepare came back, `after` that time.
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

    /// An instance has named its store. If another instance has named a different one before, returns that
    /// one, from time to time.
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

    /// The message that came with the report is handled: now the report shows how many slots there are.
    pub(super) fn learn(&mut self) {
        let seen = self.reported_free().saturating_add(self.holding);
        self.capacity = self.capacity.max(seen);
    }

    /// How many transactions wait.
    pub(super) fn waiters(&self) -> usize {
        self.begun.len() + self.waiting.len()
    }

    /// Whether a transaction waits that has begun.
    pub(super) fn has_begun_waiters(&self) -> bool {
        !self.begun.is_empty()
    }

    pub(super) fn has_waiters(&self) -> bool {
        !self.begun.is_empty() || !self.waiting.is_empty()
    }

    /// Whether there are waiters that go before a transaction that comes now.
    pub(super) fn has_waiters_before(&self, begun: bool) -> bool {
        !self.begun.is_empty() || (!begun && !self.waiting.is_empty())
    }

    pub(super) fn enqueue(&mut self, key: &TransactionKey, begun: bool) {
        let queue = if begun { &mut self.begun } else { &mut self.waiting };
        queue.push_back(key.clone());
    }

    /// The first waiter.
    pub(super) fn first_waiter(&self) -> Option<&TransactionKey> {
        self.begun.front().or_else(|| self.waiting.front())
    }

    /// Removes and returns the first waiter; one that has not begun only if `may_begin`.
    pub(super) fn dequeue(&mut self, may_begin: bool) -> Option<TransactionKey> {
        self.begun.pop_front().or_else(|| if may_begin { self.waiting.pop_front() } else { None })
    }

    /// Removes and returns all waiters.
    pub(super) fn dequeue_all(&mut self) -> impl Iterator<Item = TransactionKey> {
        std::mem::take(&mut self.begun).into_iter().chain(std::mem::take(&mut self.waiting))
    }

    /// Removes every waiter for which `is_leaving` is true, in one pass.
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

    /// How many prepares can be sent before the first answer.
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
        assert!(!found().is_plenty(NOW, 1));
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
            load.is_plenty(NOW, 1)
        };
        assert_eq!([0, 24, 25, 100].map(with_free), [false, false, true, true]);
        let mut small = found();
        report(&mut small, "p1", 1);
        assert!(!small.is_plenty(NOW, 1), "one slot is always contended");
        report(&mut small, "p1", 2);
        assert!(small.is_plenty(NOW, 1));
        small.enqueue(&key("t1"), false);
        assert!(!small.is_plenty(NOW, 1), "somebody waits for it");
    }

    #[test]
    fn a_worker_takes_no_more_than_its_share_out_of_order() {
        let taken_at_once = |workers| {
            let mut load = found();
            report(&mut load, "p1", 8);
            let mut taken = 0;
            while load.is_plenty(NOW, workers) {
                load.asked();
                taken += 1;
            }
            taken
        };
        assert_eq!([1, 2, 4, 8, 9].map(taken_at_once), [7, 4, 2, 1, 0]);
    }

    #[test]
    fn a_return_makes_it_contended_for_a_while_and_its_slots_unknown() {
        let mut load = found();
        report(&mut load, "p1", 9);
        load.returned(NOW, MAX_WAIT, Duration::from_millis(300));
        report(&mut load, "p1", 9);
        assert!(!load.is_plenty(NOW + Duration::from_millis(299), 1));
        assert!(load.is_plenty(NOW + Duration::from_millis(300), 1));
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
