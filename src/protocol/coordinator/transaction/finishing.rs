//! Sends the outcome to each service until it has answered or is parked, and to instances that inquire.

use std::sync::Arc;

use crate::protocol::{
    coordinator::{
        CoordinatorContext,
        event::{Anomaly, Effect},
        transaction::{CoordinatedTransaction, Phase, VoteState},
    },
    ids::{Branch, InstanceId, ServiceName},
    message::{
        Command, Decision, Delivery, Destination, Done, Finish, Inquiry, Outcome, Parked,
        ParkedCause, Vote, VoteKind,
    },
    time::Time,
};

/// What is left to do for one service when the outcome is known.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum FinishState {
    None,
    /// A finish was sent and is not answered. It is sent again at `due`.
    Sent(FinishAttempts),
    /// The service's code failed. The finish is sent again at `due`.
    BackingOff(FinishAttempts),
    /// The parked record is not confirmed. It is written again at `due`.
    Parking {
        error: Option<Arc<str>>,
        due: Time,
    },
    Parked,
}

/// How often a finish was sent, and when to send it again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct FinishAttempts {
    pub(super) due: Time,
    /// Whether it goes to all instances, although the holder of the slot is known.
    all: bool,
    silences: u32,
    failures: u32,
}

impl CoordinatedTransaction {
    pub(super) fn finish(&self, outcome: Outcome, branch: Option<Branch>) -> Finish {
        Finish { key: self.request.key.clone(), outcome, branch, parked: false }
    }

    pub(super) fn send_commit(
        &mut self,
        index: usize,
        decision: &Decision,
        cx: &mut CoordinatorContext<'_>,
    ) {
        if decision.branch_of(&self.request.services[index]).is_some() {
            self.send_finish(index, 0, 0, false, cx);
        } else if self.enlistments[index].holds_slot {
            // Another worker has decided without this service's branch, so it must be undone. If this
            // message is lost, the instance will inquire.
            let finish = self.finish(Outcome::Committed, None);
            self.send(index, Destination::AllInstances, Command::Finish(finish), cx);
            self.release(index, cx);
        }
    }

    pub(super) fn send_abort(&mut self, index: usize, cx: &mut CoordinatorContext<'_>) {
        let vote_state = &self.enlistments[index].vote_state;
        let is_silent = vote_state.is_to_be_asked() || *vote_state == VoteState::Queried;
        let may_hold = self.repeated || self.enlistments[index].was_refused;
        if vote_state.held().is_some() {
            self.send_finish(index, 0, 0, false, cx);
        } else if is_silent && may_hold {
            let finish = self.finish(Outcome::Aborted, None);
            self.send(index, Destination::AllInstances, Command::Finish(finish), cx);
        }
    }

    /// The finish for a service, and the instance that has the slot, if that is known.
    fn finish_and_holder(&self, index: usize, decision: &Decision) -> (Finish, Option<InstanceId>) {
        let (held, holder) = self.enlistments[index].vote_state.held().unzip();
        let branch = match decision.outcome {
            Outcome::Committed => decision.branch_of(&self.request.services[index]),
            Outcome::Aborted => held,
        };
        // If only the decision is known, the instance that made the branch has the slot, or is gone: then the
        // transport finds another one. If all instances got the finish, another one that sees the branch in
        // the store would call the service's code as well.
        let holder = match held {
            Some(_) => holder.flatten().filter(|_| held == branch).cloned(),
            None => branch.map(|branch| branch.instance().clone()),
        };
        (self.finish(decision.outcome, branch.cloned()), holder)
    }

    /// Sends the outcome to a service. It is sent again until the service has answered.
    fn send_finish(
        &mut self,
        index: usize,
        silences: u32,
        failures: u32,
        all: bool,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let Some(decision) = &self.decision else { return };
        let (finish, holder) = self.finish_and_holder(index, decision);
        let patience = match decision.outcome {
            Outcome::Committed => cx.settings().finish_timeout,
            Outcome::Aborted => cx.settings().finish_timeout / 4,
        };
        let to = holder.filter(|_| !all).map_or(Destination::AllInstances, Destination::Instance);
        self.send(index, to, Command::Finish(finish), cx);
        let due = cx.now + patience;
        self.enlistments[index].finish_state =
            FinishState::Sent(FinishAttempts { due, all, silences, failures });
        cx.wake(&self.request.key, &mut self.due, due);
    }

    /// `delivery`: the delivery of the done, to acknowledge when all records that follow from it are safe.
    pub(in super::super) fn record_done(
        &mut self,
        done: &Done,
        delivery: Option<Delivery>,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let Some(index) = self.index_of(&done.service) else { return };
        match &self.applied(index, done) {
            Ok(()) => {
                // The done of the parked command settles a commit that was parked. If it is unknown whether
                // it was, only this done can settle it.
                if self.may_be_listed(index) && !done.parked {
                    self.settle(index, delivery, cx);
                }
                if !matches!(
                    self.enlistments[index].finish_state,
                    FinishState::None | FinishState::Parked
                ) {
                    self.enlistments[index].finish_state = FinishState::None;
                    self.release(index, cx);
                }
            }
            Err(error) => self.record_failure(index, &done.instance, error, cx),
        }
        self.answer_if_complete(cx);
    }

    /// The answer in a done. An instance whose store is not the one that holds the branch can't know whether
    /// the branch is committed.
    fn applied(&self, index: usize, done: &Done) -> Result<(), Arc<str>> {
        done.applied.clone()?;
        match (self.phase, &done.store, &self.enlistments[index].store) {
            (Phase::Committing, Some(named), Some(holding)) if named != holding => {
                let instance = &done.instance;
                let elsewhere = format!(
                    "{instance}, which has store {named}, says that it is committed, but it was \
                     prepared in store {holding}"
                );
                Err(elsewhere.into())
            }
            _ => Ok(()),
        }
    }

    /// Whether there may be a record that this service's commit is parked.
    fn may_be_listed(&self, index: usize) -> bool {
        match self.enlistments[index].finish_state {
            FinishState::Parking { .. } => true,
            FinishState::Sent(_) | FinishState::BackingOff(_) => {
                self.redelivered && self.phase == Phase::Committing
            }
            FinishState::None | FinishState::Parked => false,
        }
    }

    fn settle(&self, index: usize, ack: Option<Delivery>, cx: &mut CoordinatorContext<'_>) {
        let (key, service) = (self.request.key.clone(), self.request.services[index].clone());
        let was_parked =
            matches!(self.enlistments[index].finish_state, FinishState::Parking { .. });
        cx.effects.push(Effect::Settle { key, service, ack, was_parked });
    }

    /// A request of this transaction was delivered again, after some or all services have committed.
    pub(super) fn settle_committed(&self, cx: &mut CoordinatorContext<'_>) {
        let Some(decision) = self.own_decision() else { return };
        for (index, service) in self.request.services.iter().enumerate() {
            if self.enlistments[index].finish_state == FinishState::None
                && decision.branch_of(service).is_some()
            {
                self.settle(index, None, cx);
            }
        }
    }

    /// A service's code has failed. Only the first answer to an attempt counts: several instances may report
    /// the same attempt.
    fn record_failure(
        &mut self,
        index: usize,
        instance: &InstanceId,
        error: &Arc<str>,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let FinishState::Sent(attempts) = self.enlistments[index].finish_state else { return };
        let failures = attempts.failures + 1;
        cx.effects.push(Effect::Report(Anomaly::CommitFailed {
            key: self.request.key.clone(),
            service: self.request.services[index].clone(),
            instance: instance.clone(),
            failures,
            error: Arc::clone(error),
        }));
        if self.phase == Phase::Committing && failures > cx.settings().commit_retries {
            return self.park_commit(index, Some(Arc::clone(error)), cx);
        }
        let due = cx.now + cx.backoff(&self.request.key, failures);
        self.enlistments[index].finish_state =
            FinishState::BackingOff(FinishAttempts { due, failures, ..attempts });
        cx.wake(&self.request.key, &mut self.due, due);
    }

    fn park_commit(
        &mut self,
        index: usize,
        error: Option<Arc<str>>,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let service = self.request.services[index].clone();
        let decided = self.decision.as_ref().and_then(|decision| decision.branch_of(&service));
        let Some(branch) = decided.cloned() else { return };
        let cause = ParkedCause::Uncommitted { service, branch, error: error.clone() };
        let parked = Parked { key: self.request.key.clone(), cause, parked_at: cx.now };
        cx.effects.push(Effect::Park(parked));
        let due = cx.now + cx.settings().finish_timeout;
        self.enlistments[index].finish_state = FinishState::Parking { error, due };
        cx.wake(&self.request.key, &mut self.due, due);
    }

    /// The parked record is safe.
    pub(in super::super) fn park_confirmed(
        &mut self,
        service: Option<&ServiceName>,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let Some(service) = service else {
            if self.phase == Phase::Parking {
                for requester in std::mem::take(&mut self.requesters) {
                    cx.effects.push(Effect::Ack(requester.delivery));
                }
            }
            return;
        };
        let Some(index) = self.index_of(service) else { return };
        if let (FinishState::Parking { .. }, Some(decision)) =
            (&self.enlistments[index].finish_state, &self.decision)
        {
            let (finish, _) = self.finish_and_holder(index, decision);
            let finish = Finish { parked: true, ..finish };
            self.send(index, Destination::AnyInstance, Command::Finish(finish), cx);
            self.enlistments[index].finish_state = FinishState::Parked;
            self.release(index, cx);
            self.answer_if_complete(cx);
        }
    }

    pub(super) fn answer_late_vote(
        &mut self,
        index: usize,
        vote: Vote,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let Some(decision) = self.own_decision() else { return };
        match vote.kind {
            VoteKind::Prepared { branch } | VoteKind::Failed { branch, .. } => {
                let late = Anomaly::LateVote(vote.key, vote.service);
                cx.effects.push(Effect::Report(late));
                if self.is_with_holder(index, &branch, &vote.instance) {
                    return;
                }
                let to = Destination::Instance(vote.instance.clone());
                match decision.outcome {
                    Outcome::Committed => {
                        let branch = decision.branch_of(&self.request.services[index]).cloned();
                        let finish = self.finish(Outcome::Committed, branch);
                        self.send(index, to, Command::Finish(finish), cx);
                    }
                    // Only while aborts are repeated: later nothing would end the repetition.
                    Outcome::Aborted
                        if self.enlistments[index].finish_state == FinishState::None
                            && self.phase_timer.is_some() =>
                    {
                        let holder = Some(vote.instance);
                        self.enlistments[index].vote_state = VoteState::Failed { branch, holder };
                        self.send_finish(index, 0, 0, false, cx);
                    }
                    Outcome::Aborted => {
                        let finish = self.finish(Outcome::Aborted, Some(branch));
                        self.send(index, to, Command::Finish(finish), cx);
                    }
                }
            }
            VoteKind::ReadOnly | VoteKind::Refused(_) | VoteKind::Finished(_) => {}
        }
    }

    /// Answers an inquiry.
    pub(in super::super) fn answer_inquiry(
        &self,
        inquiry: Inquiry,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let index = self.index_of(&inquiry.service);
        if index.is_some_and(|it| self.is_with_holder(it, &inquiry.branch, &inquiry.instance)) {
            return;
        }
        if let Some(decision) = self.own_decision() {
            cx.tell(&decision, &inquiry.service, inquiry.instance);
        }
    }

    /// Whether a finish is on its way to the holder of `branch`, and `instance` is another one that has seen
    /// the branch in the store. If both got a finish, both would call the service's code.
    fn is_with_holder(&self, index: usize, branch: &Branch, instance: &InstanceId) -> bool {
        let enlistment = &self.enlistments[index];
        let (FinishState::Sent(attempts) | FinishState::BackingOff(attempts)) =
            &enlistment.finish_state
        else {
            return false;
        };
        let Some((held, Some(holder))) = enlistment.vote_state.held() else { return false };
        !attempts.all && held == branch && holder != instance
    }

    pub(super) fn wake_finish(&mut self, index: usize, cx: &mut CoordinatorContext<'_>) {
        match &self.enlistments[index].finish_state {
            FinishState::Sent(attempts) if attempts.due <= cx.now => {
                let FinishAttempts { silences, failures, .. } = *attempts;
                let (key, service) = (self.request.key.clone(), &self.request.services[index]);
                let unanswered = Anomaly::Unanswered(key, service.clone());
                cx.effects.push(Effect::Report(unanswered));
                cx.check(service);
                if self.phase == Phase::Committing && silences >= cx.settings().commit_retries {
                    self.park_commit(index, None, cx);
                } else {
                    self.send_finish(index, silences + 1, failures, true, cx);
                }
            }
            FinishState::BackingOff(attempts) if attempts.due <= cx.now => {
                let FinishAttempts { silences, failures, all, .. } = *attempts;
                self.send_finish(index, silences, failures, all, cx);
            }
            FinishState::Parking { error, due } if *due <= cx.now => {
                let error = error.clone();
                self.park_commit(index, error, cx);
            }
            FinishState::None
            | FinishState::Sent(_)
            | FinishState::BackingOff(_)
            | FinishState::Parking { .. }
            | FinishState::Parked => {}
        }
    }
}
