//! Sends the result for each request of a transaction, and acknowledges the request when the result is safe.

use std::sync::Arc;

use crate::protocol::{
    coordinator::{
        CoordinatorContext,
        event::{Anomaly, Effect},
        transaction::{CoordinatedTransaction, Enlistment, Phase, finishing::FinishState},
    },
    ids::ServiceName,
    message::{Answer, Decision, Delivery},
    time::Time,
};

/// A request of the transaction.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Requester {
    pub(super) delivery: Delivery,
    /// When to publish the result again, if it failed.
    pub(super) republish_at: Option<Time>,
    /// How often it failed.
    failures: u32,
}

impl Requester {
    pub(super) const fn new(delivery: Delivery) -> Self {
        Self { delivery, republish_at: None, failures: 0 }
    }
}

impl CoordinatedTransaction {
    /// Adds one more request.
    pub(in super::super) fn attach(
        &mut self,
        delivery: Delivery,
        deliveries: u32,
        cx: &mut CoordinatorContext<'_>,
    ) {
        self.requesters.push(Requester::new(delivery));
        if deliveries > 1 {
            self.redelivered = true;
            self.settle_committed(cx);
        }
        match self.phase {
            Phase::Aborting | Phase::Answering => self.publish(self.requesters.len() - 1, cx),
            Phase::Recalling
            | Phase::Waiting
            | Phase::Querying
            | Phase::Preparing
            | Phase::Deciding
            | Phase::Committing
            | Phase::Parking => {}
        }
    }

    /// Answers with the outcome of an earlier transaction with the same id and content.
    pub(in super::super) fn answer_as(
        &mut self,
        decision: &Arc<Decision>,
        cx: &mut CoordinatorContext<'_>,
    ) {
        self.begin(cx);
        self.decision = Some(Arc::clone(decision));
        self.phase = Phase::Answering;
        self.publish_to_all(cx);
    }

    pub(super) fn answer_if_complete(&mut self, cx: &mut CoordinatorContext<'_>) {
        let is_complete = |enlistment: &Enlistment| {
            matches!(enlistment.finish_state, FinishState::None | FinishState::Parked)
        };
        if self.phase == Phase::Committing && self.enlistments.iter().all(is_complete) {
            self.phase = Phase::Answering;
            self.publish_to_all(cx);
        }
    }

    pub(super) fn publish_to_all(&mut self, cx: &mut CoordinatorContext<'_>) {
        for index in 0..self.requesters.len() {
            self.publish(index, cx);
        }
    }

    pub(super) fn publish(&mut self, index: usize, cx: &mut CoordinatorContext<'_>) {
        let Some(decision) = &self.decision else { return };
        let requester = &mut self.requesters[index];
        requester.republish_at = None;
        let parked = |(enlistment, service): (&Enlistment, &ServiceName)| {
            (enlistment.finish_state == FinishState::Parked).then(|| service.clone())
        };
        let answer = Answer {
            id: self.request.key.id.clone(),
            requested_at: decision.key.requested_at,
            outcome: decision.outcome,
            reason: decision.reason.clone(),
            unresolved: self
                .enlistments
                .iter()
                .zip(&*self.request.services)
                .filter_map(parked)
                .collect(),
            decided_at: decision.decided_at,
        };
        let (key, delivery) = (self.request.key.clone(), requester.delivery);
        cx.effects.push(Effect::Publish { key, delivery, answer });
    }

    /// A result is safe: only now may its request be acknowledged.
    pub(in super::super) fn result_confirmed(
        &mut self,
        delivery: Delivery,
        cx: &mut CoordinatorContext<'_>,
    ) {
        if !matches!(self.phase, Phase::Aborting | Phase::Answering) {
            return;
        }
        if let Some(index) = self.requesters.iter().position(|one| one.delivery == delivery) {
            self.requesters.remove(index);
            cx.effects.push(Effect::Ack(delivery));
        }
    }

    /// A result may be lost: it is published again, with growing pauses. After too many failures it counts as
    /// unclaimed, since one producer must not hold up this worker for ever.
    pub(in super::super) fn result_failed(
        &mut self,
        delivery: Delivery,
        cx: &mut CoordinatorContext<'_>,
    ) {
        // Before the decision there is no result to publish again.
        if !matches!(self.phase, Phase::Aborting | Phase::Answering) {
            return;
        }
        let key = &self.request.key;
        let Some(index) = self.requesters.iter().position(|one| one.delivery == delivery) else {
            return;
        };
        let one = &mut self.requesters[index];
        one.failures += 1;
        if one.failures > cx.settings().result_retries {
            let (key, attempts) = (key.clone(), one.failures);
            self.requesters.remove(index);
            cx.effects.push(Effect::Report(Anomaly::ResultUnclaimed { key, attempts }));
            return cx.effects.push(Effect::Ack(delivery));
        }
        let at = cx.now + cx.backoff(key, one.failures);
        one.republish_at = Some(at);
        cx.wake(key, &mut self.due, at);
    }

    /// Whether no service was asked yet.
    pub(in super::super) fn is_not_begun(&self) -> bool {
        !self.begun && matches!(self.phase, Phase::Waiting | Phase::Recalling)
    }

    /// Returns the requests to the queue, if the transaction has not begun.
    pub(in super::super) fn release_if_not_begun(
        &mut self,
        cx: &mut CoordinatorContext<'_>,
    ) -> bool {
        if !self.is_not_begun() {
            return false;
        }
        self.withdraw(cx);
        for requester in std::mem::take(&mut self.requesters) {
            cx.effects.push(Effect::Release(requester.delivery));
        }
        true
    }
}
