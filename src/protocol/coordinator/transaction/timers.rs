//! What happens to a transaction when a time limit is over.

use std::time::Duration;

use crate::protocol::{
    coordinator::{
        CoordinatorContext,
        transaction::{
            CoordinatedTransaction, Enlistment, Phase, VoteState, finishing::FinishState,
        },
    },
    deadlines::Deadlines,
    message::{Outcome, Reason, ReasonCode},
    time::Time,
};

/// What to do if a phase lasts too long. The deadline of prepares has a field of its own: it holds
/// through several phases.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum PhaseTimer {
    /// Ask the services that have not answered the query for their votes.
    EndQuery,
    /// Append the proposal again: it was not read back.
    AppendAgain,
    /// Write the parked record again: it was not confirmed.
    ParkAgain,
    /// Stop repeating aborts that are not answered.
    StopAborts,
}

impl CoordinatedTransaction {
    /// Its deadline has come.
    pub(in super::super) fn wake(&mut self, cx: &mut CoordinatorContext<'_>) {
        let due = self.phase_timer.filter(|(_, at)| *at <= cx.now).map(|(timer, _)| timer);
        match (self.phase, due) {
            (Phase::Querying, Some(PhaseTimer::EndQuery)) => self.end_query(cx),
            (Phase::Deciding, Some(PhaseTimer::AppendAgain)) => {
                let proposal = self.proposal.unwrap_or(Outcome::Aborted);
                self.propose(proposal, cx);
            }
            (Phase::Parking, Some(PhaseTimer::ParkAgain)) => self.park(cx),
            (Phase::Aborting, Some(PhaseTimer::StopAborts)) => {
                // Instances that have not heard the outcome by now will inquire.
                for index in 0..self.enlistments.len() {
                    self.enlistments[index].finish_state = FinishState::None;
                    self.release(index, cx);
                }
                self.phase_timer = None;
            }
            _ if self.gives_up_at().is_some_and(|at| at <= cx.now) => self.give_up_preparing(cx),
            _ => {}
        }
        for index in 0..self.enlistments.len() {
            self.wake_finish(index, cx);
            if self.enlistments[index].vote_state == VoteState::Queued {
                cx.shared.dirty_services.insert(self.request.services[index].clone());
            }
        }
        for index in 0..self.requesters.len() {
            if self.requesters[index].republish_at.is_some_and(|at| at <= cx.now) {
                self.publish(index, cx);
            }
        }
        self.answer_if_complete(cx);
        self.rearm(cx);
    }

    /// The services that have not answered the query don't hold it: asks them for their votes.
    fn end_query(&mut self, cx: &mut CoordinatorContext<'_>) {
        self.phase = Phase::Preparing;
        self.phase_timer = None;
        for enlistment in &mut self.enlistments {
            if enlistment.vote_state == VoteState::Queried {
                enlistment.vote_state = VoteState::Unasked;
            }
        }
        if self.enlistments.iter().any(|enlistment| enlistment.holds_slot) {
            self.start_deadline(cx);
        }
        if self.enlistments.iter().all(|enlistment| enlistment.vote_state == VoteState::Unasked) {
            // No service holds a branch of it, so it must not keep out transactions that hold slots, for
            // which others wait.
            self.wait_again(cx);
        }
        self.advance(None, cx);
    }

    /// When to give up preparing, or waiting for a service that can't be reached.
    fn gives_up_at(&self) -> Option<Time> {
        match self.phase {
            Phase::Waiting | Phase::Preparing => self.prepare_deadline.or(self.wait_deadline),
            Phase::Recalling
            | Phase::Querying
            | Phase::Deciding
            | Phase::Committing
            | Phase::Aborting
            | Phase::Answering
            | Phase::Parking => None,
        }
    }

    /// The deadline is over. If a service that has not voted can't be reached or has no instance, that is the
    /// reason.
    fn give_up_preparing(&mut self, cx: &mut CoordinatorContext<'_>) {
        let is_silent = |enlistment: &Enlistment| {
            enlistment.vote_state.is_to_be_asked()
                || matches!(enlistment.vote_state, VoteState::Queued | VoteState::Asked { .. })
        };
        let silent: Vec<_> = (self.enlistments.iter().zip(&*self.request.services))
            .filter_map(|(enlistment, service)| is_silent(enlistment).then_some(service))
            .collect();
        let mut out_of_reach = silent.iter().filter_map(|service| {
            cx.known_load(service).and_then(|load| load.why_out_of_reach(service))
        });
        let reason = out_of_reach.next().unwrap_or_else(|| {
            let service = silent.first().map(|&service| service.clone());
            Reason { code: ReasonCode::Deadline, service, message: None }
        });
        for (enlistment, service) in self.enlistments.iter().zip(&*self.request.services) {
            if matches!(enlistment.vote_state, VoteState::Asked { .. }) {
                cx.check(service);
            }
        }
        self.reason.get_or_insert(reason);
        self.propose(Outcome::Aborted, cx);
    }

    /// Wakes it when the service that it waits for has been silent for too long.
    pub(in super::super) fn wake_by(&mut self, at: Time, deadlines: &mut Deadlines) {
        deadlines.wake_by(&self.request.key, &mut self.due, at);
    }

    /// Sets the phase's timer, and wakes the transaction then.
    pub(super) fn set_timer(
        &mut self,
        timer: PhaseTimer,
        after: Duration,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let at = cx.now + after;
        self.phase_timer = Some((timer, at));
        cx.wake(&self.request.key, &mut self.due, at);
    }

    pub(super) fn rearm(&mut self, cx: &mut CoordinatorContext<'_>) {
        let finishes =
            self.enlistments.iter().filter_map(|enlistment| match &enlistment.finish_state {
                FinishState::Sent(attempts) | FinishState::BackingOff(attempts) => {
                    Some(attempts.due)
                }
                FinishState::Parking { due, .. } => Some(*due),
                FinishState::None | FinishState::Parked => None,
            });
        let answers = self.requesters.iter().filter_map(|requester| requester.republish_at);
        let timer = self.phase_timer.map(|(_, at)| at);
        let soonest = finishes.chain(answers).chain(self.gives_up_at()).chain(timer).min();
        if let (false, Some(at)) = (self.is_finished(), soonest) {
            cx.wake(&self.request.key, &mut self.due, at);
        }
    }
}
