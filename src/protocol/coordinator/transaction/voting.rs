//! Asks the services for their votes: which service, and when, so that transactions don't block each other.
//! Each [`ServiceLoad`] counts the prepares that are sent and the slots that are held.

use std::{sync::Arc, time::Duration};

use crate::protocol::{
    coordinator::{
        Anomaly, CoordinatorContext, Effect,
        admission::ServiceLoad,
        transaction::{CoordinatedTransaction, Enlistment, Phase, VoteState},
    },
    ids::ServiceName,
    message::{Outcome, Prepare},
    time::Time,
};

/// How often a transaction moves from the queue of one service to that of another before it takes the slots
/// that it can get: high enough to discover which service is scarce, low enough that transactions of a
/// single service can't starve it.
const DETOURS_MAX: u32 = 2;

/// Whether a transaction that holds no slot can get all that it needs.
enum Scarcity {
    None,
    WaitAt(usize),
    TakeInOrder,
}

/// Whether a transaction that is not in the queue of `service`, or was just taken from it, may ask it.
fn has_room(
    service: &ServiceName,
    turn: Option<&ServiceName>,
    begun: bool,
    cx: &mut CoordinatorContext<'_>,
) -> bool {
    let now = cx.now;
    let load = cx.load(service);
    load.admits(now, begun) && (turn == Some(service) || !load.has_waiters_before(begun))
}

impl CoordinatedTransaction {
    /// Asks for as many votes at once as possible without blocking other transactions. `turn`: the service
    /// from whose queue this transaction was just taken.
    pub(in super::super) fn advance(
        &mut self,
        turn: Option<&ServiceName>,
        cx: &mut CoordinatorContext<'_>,
    ) {
        debug_assert!(matches!(self.phase, Phase::Waiting | Phase::Preparing));
        if self.enlistments.iter().any(|enlistment| enlistment.vote_state == VoteState::Queued) {
            return;
        }
        let services = Arc::clone(&self.request.services);
        let (mut is_plenty, mut first, mut unserved) = (true, None, None);
        for (index, service) in services.iter().enumerate() {
            if !self.enlistments[index].vote_state.is_to_be_asked() {
                continue;
            }
            first = first.or(Some(index));
            let (now, workers) = (cx.now, cx.shared.workers);
            let load = cx.load(service);
            if !load.is_found() {
                return self.queue(index, cx);
            }
            is_plenty &= load.is_plenty(now, workers);
            if load.is_unserved() {
                unserved = unserved.or(Some(index));
            }
        }
        let Some(first) = unserved.or(first) else { return };
        if !self.begun && cx.is_at_capacity() {
            cx.shared.was_at_capacity = true;
            return self.queue(first, cx);
        }
        if unserved.is_some() && self.holds_nothing() {
            // The transaction will probably abort there, so it takes no slot of another service before.
            return match has_room(&services[first], turn, self.begun, cx) {
                true => self.ask(first, cx),
                false => self.queue(first, cx),
            };
        }
        if is_plenty {
            return self.ask_all(cx);
        }
        if self.holds_nothing() {
            match self.scarce(turn, cx) {
                Scarcity::None => return self.ask_within_room(turn, cx),
                Scarcity::WaitAt(index) => {
                    self.detours += u32::from(turn.is_some_and(|it| *it != services[index]));
                    return self.queue(index, cx);
                }
                Scarcity::TakeInOrder => {}
            }
        }
        self.ask_in_order(turn, cx);
    }

    /// As far as is known, it can get all slots that it needs.
    fn ask_within_room(&mut self, turn: Option<&ServiceName>, cx: &mut CoordinatorContext<'_>) {
        let services = Arc::clone(&self.request.services);
        let (mut is_own, mut is_sure) = (true, true);
        for (index, service) in services.iter().enumerate() {
            if !self.enlistments[index].vote_state.is_to_be_asked() {
                continue;
            }
            let load = cx.load(service);
            if !load.has_spare() && load.returns_at_once() {
                // It will probably refuse, and then the other services need not be called.
                return self.ask(index, cx);
            }
            is_own &= load.is_own();
            is_sure &= load.has_spare();
        }
        if is_own && is_sure {
            return self.ask_all(cx);
        }
        if is_sure {
            // Not if it may have to wait: others would wait for the slots that it keeps.
            self.reserve_all(cx);
        }
        self.ask_in_order(turn, cx);
    }

    /// Asks contended services one after another, in the order of their names, so that no two transactions
    /// wait for each other's slots. The next service is asked when the one before has voted, or is certain
    /// to have a slot.
    fn ask_in_order(&mut self, turn: Option<&ServiceName>, cx: &mut CoordinatorContext<'_>) {
        let services = Arc::clone(&self.request.services);
        for (index, service) in services.iter().enumerate() {
            if !self.enlistments[index].vote_state.is_to_be_asked() {
                continue;
            }
            let waits = |enlistment: &Enlistment| {
                matches!(enlistment.vote_state, VoteState::Asked { sure: false, .. })
            };
            if self.enlistments.iter().any(waits) {
                return;
            }
            let is_reserved = self.enlistments[index].vote_state == VoteState::Reserved;
            if is_reserved || has_room(service, turn, self.begun, cx) {
                self.ask(index, cx);
            } else {
                return self.queue(index, cx);
            }
        }
    }

    fn holds_nothing(&self) -> bool {
        self.enlistments.iter().all(|enlistment| {
            !enlistment.holds_slot
                && !matches!(enlistment.vote_state, VoteState::Asked { .. } | VoteState::Reserved)
        })
    }

    /// Whether it can get all slots that it needs, and if not, where to wait. A slot that is held while its
    /// transaction waits for another one is useless to all others. So a transaction first waits for the
    /// scarcest slot, and holds none. It takes the slots that it can get only if that has failed several
    /// times; or if it has the scarcest slot, and no other transaction holds slots while waiting for the
    /// rest.
    fn scarce(&self, turn: Option<&ServiceName>, cx: &mut CoordinatorContext<'_>) -> Scarcity {
        let services = &self.request.services;
        let mut scarcest = None;
        let mut may_hold = turn.is_some();
        for (index, service) in services.iter().enumerate() {
            let to_be_asked = self.enlistments[index].vote_state.is_to_be_asked();
            if !to_be_asked || has_room(service, turn, self.begun, cx) {
                continue;
            }
            let load = cx.load(service);
            let waiters = load.waiters();
            may_hold &= turn.is_some_and(|turn| turn < service) && !load.has_begun_waiters();
            if scarcest.is_none_or(|(most, _)| waiters > most) {
                scarcest = Some((waiters, index));
            }
        }
        let Some((waiters, index)) = scarcest else { return Scarcity::None };
        let waiters_here = turn.map_or(0, |turn| cx.load(turn).waiters());
        if self.detours >= DETOURS_MAX || may_hold && waiters_here >= waiters {
            Scarcity::TakeInOrder
        } else {
            Scarcity::WaitAt(index)
        }
    }

    fn ask_all(&mut self, cx: &mut CoordinatorContext<'_>) {
        for index in 0..self.enlistments.len() {
            if self.enlistments[index].vote_state.is_to_be_asked() {
                self.ask(index, cx);
            }
        }
    }

    /// Keeps a slot of every service that will be asked.
    fn reserve_all(&mut self, cx: &mut CoordinatorContext<'_>) {
        for index in 0..self.enlistments.len() {
            if self.enlistments[index].vote_state == VoteState::Unasked {
                self.enlistments[index].vote_state = VoteState::Reserved;
                cx.load(&self.request.services[index]).reserve();
            }
        }
    }

    /// It was taken from the queue of `service`.
    pub(in super::super) fn dequeued(
        &mut self,
        service: &ServiceName,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let Some(index) = self.index_of(service) else { return };
        if self.enlistments[index].vote_state == VoteState::Queued {
            self.enlistments[index].vote_state = VoteState::Unasked;
            self.wait_deadline = None;
            self.advance(Some(service), cx);
        }
    }

    fn queue(&mut self, index: usize, cx: &mut CoordinatorContext<'_>) {
        let services = Arc::clone(&self.request.services);
        let service = &services[index];
        if let Some(reason) = cx.load(service).why_out_of_reach(service) {
            if !self.begun && cx.is_full_of_stranded() {
                self.reason.get_or_insert(reason);
                return self.propose(Outcome::Aborted, cx);
            }
            self.limit_wait(cx);
        }
        let now = cx.now;
        let load = cx.load(service);
        if self.enlistments[index].vote_state == VoteState::Reserved {
            load.unreserve();
        }
        self.enlistments[index].vote_state = VoteState::Queued;
        load.enqueue(&self.request.key, self.begun);
        // Perhaps only the in-flight limit blocks the waiters ahead of it.
        if load.admits(now, self.begun) || load.is_own() {
            cx.shared.dirty_services.insert(service.clone());
        }
    }

    fn ask(&mut self, index: usize, cx: &mut CoordinatorContext<'_>) {
        self.begin(cx);
        self.phase = Phase::Preparing;
        let deadline = self.start_deadline(cx);
        let at = cx.now;
        let load = cx.load(&self.request.services[index]);
        if self.enlistments[index].vote_state == VoteState::Reserved {
            load.unreserve();
        }
        let looked_full = load.looks_full();
        let sure = load.is_own() && load.has_spare();
        load.asked();
        let spare = load.spare();
        let enlistment = &mut self.enlistments[index];
        enlistment.vote_state = VoteState::Asked { at, looked_full, sure };
        let prepare = Prepare {
            key: self.request.key.clone(),
            request_hash: self.request.request_hash,
            data: self.request.data.clone(),
            deadline,
            repeated: self.repeated || enlistment.was_refused,
        };
        let service = self.request.services[index].clone();
        cx.effects.push(Effect::SendPrepare { service, prepare, spare });
    }

    /// Sets the prepare deadline, if it is not set: from the first slot that it asks for, or holds, other
    /// transactions may wait for it.
    pub(super) fn start_deadline(&mut self, cx: &mut CoordinatorContext<'_>) -> Time {
        let at = cx.now + self.timeout(cx);
        let deadline = *self.prepare_deadline.get_or_insert(at);
        cx.wake(&self.request.key, &mut self.due, deadline);
        deadline
    }

    /// Limits the wait for a service that can't be reached or has no instance, even before any service is
    /// asked.
    fn limit_wait(&mut self, cx: &mut CoordinatorContext<'_>) {
        let at = cx.now + self.timeout(cx);
        let until = match self.prepare_deadline {
            Some(deadline) => deadline,
            None => *self.wait_deadline.get_or_insert(at),
        };
        cx.wake(&self.request.key, &mut self.due, until);
    }

    fn timeout(&self, cx: &CoordinatorContext<'_>) -> Duration {
        let usual = cx.settings().prepare_timeout;
        self.request.timeout.unwrap_or(usual)
    }

    pub(super) fn hold(&mut self, index: usize, cx: &mut CoordinatorContext<'_>) {
        if !self.enlistments[index].holds_slot {
            self.enlistments[index].holds_slot = true;
            if let Some(load) = cx.known_load(&self.request.services[index]) {
                load.took_slot();
            }
        }
    }

    pub(super) fn release(&mut self, index: usize, cx: &mut CoordinatorContext<'_>) {
        if self.enlistments[index].holds_slot {
            self.enlistments[index].holds_slot = false;
            cx.relieve(&self.request.services[index], ServiceLoad::freed_slot);
        }
    }

    /// The transaction doesn't wait for a vote of this service any more.
    pub(super) fn unask(&mut self, index: usize, admitted: bool, cx: &mut CoordinatorContext<'_>) {
        let service = &self.request.services[index];
        let vote_state = &mut self.enlistments[index].vote_state;
        match *vote_state {
            VoteState::Asked { looked_full, .. } => {
                *vote_state = VoteState::Unasked;
                cx.relieve(service, |load| {
                    load.answered();
                    if admitted {
                        load.admitted(looked_full);
                    }
                });
                if admitted && cx.known_load(service).is_some_and(ServiceLoad::is_reachable_again) {
                    let available = Anomaly::ServiceAvailable(service.clone());
                    cx.effects.push(Effect::Report(available));
                }
            }
            VoteState::Queued => {
                *vote_state = VoteState::Unasked;
                self.wait_deadline = None;
                if let Some(load) = cx.known_load(service) {
                    load.remove(&self.request.key);
                }
            }
            VoteState::Reserved => {
                *vote_state = VoteState::Unasked;
                cx.relieve(service, ServiceLoad::unreserve);
            }
            VoteState::Unasked
            | VoteState::Queried
            | VoteState::Prepared { .. }
            | VoteState::ReadOnly
            | VoteState::Declined
            | VoteState::Failed { .. }
            | VoteState::Heard => {}
        }
    }

    pub(super) fn withdraw_prepares(&mut self, cx: &mut CoordinatorContext<'_>) {
        for index in 0..self.enlistments.len() {
            self.unask(index, false, cx);
        }
    }

    /// Removes all that it has counted in the loads of services.
    pub(in super::super) fn withdraw(&mut self, cx: &mut CoordinatorContext<'_>) {
        for index in 0..self.enlistments.len() {
            self.unask(index, false, cx);
            self.release(index, cx);
        }
    }
}
