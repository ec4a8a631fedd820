//! Sends the result for each request of a transaction, and acknowledges the request when the result is safe.

use std::sync::Arc;

use crate::protocol::{
    coordinator::{
        CoordinatorContext,
        event::{Anomaly, Effect},
        transaction::{CoordinatedTransaction, Enlistment, Phase, finishing::FinishState},
    },
    ids::ServiceName,
    message::{Answer, AnswerAt, Decision, Delivery},
    time::Time,
};

/// A request of the transaction.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Requester {
    pub(super) delivery: Delivery,
    answer_at: AnswerAt,
    is_published: bool,
    /// Whether its result is safe, or given up, while services have still to commit: when they have, the
    /// request is acknowledged.
    is_answered: bool,
    /// When to publish the result again, if it failed.
    pub(super) republish_at: Option<Time>,
    /// How often it failed.
    failures: u32,
}

impl Requester {
    pub(super) const fn new(delivery: Delivery, answer_at: AnswerAt) -> Self {
        Self {
            delivery,
            answer_at,
            is_published: false,
            is_answered: false,
            republish_at: None,
            failures: 0,
        }
    }

    /// Whether its result goes out before the services have committed.
    fn is_early(&self) -> bool {
        self.answer_at == AnswerAt::Decided
    }
}

impl CoordinatedTransaction {
    /// Adds one more request.
    pub(in super::super) fn attach(
        &mut self,
        (delivery, answer_at): (Delivery, AnswerAt),
        deliveries: u32,
        cx: &mut CoordinatorContext<'_>,
    ) {
        self.requesters.push(Requester::new(delivery, answer_at));
        if deliveries > 1 {
            self.redelivered = true;
            self.settle_committed(cx);
        }
        match self.phase {
            Phase::Aborting | Phase::Answering => self.publish(self.requesters.len() - 1, cx),
            Phase::Committing => self.publish_early(cx),
            Phase::Recalling
            | Phase::Waiting
            | Phase::Querying
            | Phase::Preparing
            | Phase::Deciding
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
            for requester in self.requesters.extract_if(.., |it| it.is_answered) {
                cx.effects.push(Effect::Ack(requester.delivery));
            }
            self.publish_to_all(cx);
        }
    }

    /// The transaction is committed: answers the requests that don't wait for the services.
    pub(super) fn publish_early(&mut self, cx: &mut CoordinatorContext<'_>) {
        for index in 0..self.requesters.len() {
            if self.requesters[index].is_early() && !self.requesters[index].is_published {
                self.publish(index, cx);
            }
        }
    }

    /// Publishes the result for every request that has none on its way.
    pub(super) fn publish_to_all(&mut self, cx: &mut CoordinatorContext<'_>) {
        for index in 0..self.requesters.len() {
            if !self.requesters[index].is_published {
                self.publish(index, cx);
            }
        }
    }

    pub(super) fn publish(&mut self, index: usize, cx: &mut CoordinatorContext<'_>) {
        let Some(decision) = &self.decision else { return };
        let requester = &mut self.requesters[index];
        requester.republish_at = None;
        requester.is_published = true;
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
        if let Some(index) = self.published_for(delivery) {
            self.answered(index, cx);
        }
    }

    /// The request whose result was published.
    fn published_for(&self, delivery: Delivery) -> Option<usize> {
        let is_decided =
            matches!(self.phase, Phase::Committing | Phase::Aborting | Phase::Answering);
        let is_it = |one: &Requester| one.delivery == delivery && one.is_published;
        self.requesters.iter().position(is_it).filter(|_| is_decided)
    }

    /// The request needs nothing more. It is acknowledged when no service has to commit any more: until
    /// then its next delivery would let another worker finish what this one has not.
    fn answered(&mut self, index: usize, cx: &mut CoordinatorContext<'_>) {
        if self.phase == Phase::Committing {
            let requester = &mut self.requesters[index];
            (requester.is_answered, requester.republish_at) = (true, None);
        } else {
            let Requester { delivery, .. } = self.requesters.remove(index);
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
        let Some(index) = self.published_for(delivery) else { return };
        let key = &self.request.key;
        let one = &mut self.requesters[index];
        if one.is_answered {
            return;
        }
        one.failures += 1;
        if one.failures > cx.settings().result_retries {
            let (key, attempts) = (key.clone(), one.failures);
            cx.effects.push(Effect::Report(Anomaly::ResultUnclaimed { key, attempts }));
            return self.answered(index, cx);
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
