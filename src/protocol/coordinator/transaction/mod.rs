//! One transaction as a worker sees it: its phase, the answers of each service, and a method for each
//! transition. Here: from the start to the decision. [`voting`]: asking for votes. [`finishing`]: sending
//! the outcome to services. [`result`]: sending the result to producers. [`timers`]: what happens when a time
//! limit is over.

mod finishing;
mod result;
mod timers;
mod voting;

use std::{sync::Arc, time::Duration};

use crate::protocol::{
    coordinator::{
        CoordinatorContext,
        event::{Anomaly, Effect},
        transaction::{finishing::FinishState, result::Requester, timers::PhaseTimer},
    },
    ids::{Branch, InstanceId, ServiceName, StoreId},
    message::{
        Command, Decision, Delivery, Destination, Outcome, Parked, ParkedCause, Query, Reason,
        ReasonCode, Request, Vote, VoteKind,
    },
    time::Time,
};

/// The phase of a transaction at this worker.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Phase {
    /// The worker searches older parts of the journal for a decision.
    Recalling,
    /// It has not begun: no service was asked, and its deadline is not running.
    Waiting,
    /// Another worker may have begun it: the worker asks the instances who holds it.
    Querying,
    /// The worker asks services for their votes.
    Preparing,
    /// An outcome was proposed and not yet read back.
    Deciding,
    /// The outcome is `COMMITTED`: each service is sent its commit until it has committed or is parked.
    Committing,
    /// The outcome is `ABORTED`: the result is on its way, and an abort to each holder.
    Aborting,
    /// All that is missing is the confirm of the result.
    Answering,
    /// Its outcome can't be determined: the worker records it for an operator.
    Parking,
}

impl Phase {
    /// All phases, for coverage tables.
    pub const ALL: [Self; 9] = [
        Self::Recalling,
        Self::Waiting,
        Self::Querying,
        Self::Preparing,
        Self::Deciding,
        Self::Committing,
        Self::Aborting,
        Self::Answering,
        Self::Parking,
    ];

    const fn is_decided(self) -> bool {
        match self {
            Self::Committing | Self::Aborting | Self::Answering | Self::Parking => true,
            Self::Recalling | Self::Waiting | Self::Querying | Self::Preparing | Self::Deciding => {
                false
            }
        }
    }
}

/// How far one service's vote is.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum VoteState {
    Unasked,
    /// The worker will ask it when the services before it have voted, and keeps a slot for that.
    Reserved,
    /// The worker will ask it when a slot may be free.
    Queued,
    Queried,
    Asked {
        at: Time,
        /// Whether it looked full then.
        looked_full: bool,
        /// Whether it is certain to get a slot.
        sure: bool,
    },
    /// `holder`: the instance that has the slot. `None`: not certain, so a finish goes to all instances.
    Prepared {
        branch: Branch,
        holder: Option<InstanceId>,
    },
    ReadOnly,
    /// It has refused, or had no slot, or does not exist: it needs no finish.
    Declined,
    Failed {
        branch: Branch,
        holder: Option<InstanceId>,
    },
    /// It has heard the outcome from another worker.
    Heard,
}

impl VoteState {
    fn is_to_be_asked(&self) -> bool {
        matches!(self, Self::Unasked | Self::Reserved)
    }

    /// The branch that it holds or may hold, and the instance that has the slot, if that is certain.
    fn held(&self) -> Option<(&Branch, Option<&InstanceId>)> {
        match self {
            Self::Prepared { branch, holder } | Self::Failed { branch, holder } => {
                Some((branch, holder.as_ref()))
            }
            Self::Unasked
            | Self::Reserved
            | Self::Queued
            | Self::Queried
            | Self::Asked { .. }
            | Self::ReadOnly
            | Self::Declined
            | Self::Heard => None,
        }
    }
}

/// One service's part in a transaction.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Enlistment {
    vote_state: VoteState,
    /// The store that holds the branch, if the instance that voted has named one.
    store: Option<StoreId>,
    /// Whether the broker has refused a prepare, which may have arrived all the same.
    was_refused: bool,
    /// Whether the service's load counts a slot for it.
    holds_slot: bool,
    finish_state: FinishState,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct CoordinatedTransaction {
    request: Request,
    requesters: Vec<Requester>,
    phase: Phase,
    /// The parts of `request.services`, in that order.
    enlistments: Vec<Enlistment>,
    /// Whether it counts as in flight.
    begun: bool,
    /// Whether another worker may have begun it.
    repeated: bool,
    /// Whether one of its requests was delivered before: another worker may have parked a commit, and may
    /// have crashed before it knew that the record is safe.
    redelivered: bool,
    /// How often it moved from the queue of one service to that of another before it was asked for.
    detours: u32,
    /// Whether it was delivered too often to be tried again.
    is_poison: bool,
    /// Set by the first service that declines or fails.
    reason: Option<Reason>,
    /// The outcome that a service has already heard.
    heard: Option<Outcome>,
    /// When to give up preparing. Set when the first prepare is sent.
    prepare_deadline: Option<Time>,
    /// When to give up waiting for a service that is out of reach, if no prepare deadline is set.
    wait_deadline: Option<Time>,
    /// What to do when, if the phase has not ended by then.
    phase_timer: Option<(PhaseTimer, Time)>,
    proposal: Option<Outcome>,
    decision: Option<Arc<Decision>>,
    /// The moment of its entry among the deadlines.
    pub(super) due: Option<Time>,
}

impl CoordinatedTransaction {
    pub(super) fn new(request: Request, delivery: Delivery, deliveries: u32, many: u32) -> Self {
        let enlistment = Enlistment {
            vote_state: VoteState::Unasked,
            store: None,
            was_refused: false,
            holds_slot: false,
            finish_state: FinishState::None,
        };
        Self {
            enlistments: vec![enlistment; request.services.len()],
            requesters: vec![Requester::new(delivery, request.answer_at)],
            phase: Phase::Recalling,
            begun: false,
            repeated: deliveries > 1,
            redelivered: deliveries > 1,
            detours: 0,
            is_poison: deliveries > many,
            reason: None,
            heard: None,
            prepare_deadline: None,
            wait_deadline: None,
            phase_timer: None,
            proposal: None,
            decision: None,
            due: None,
            request,
        }
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn request(&self) -> &Request {
        &self.request
    }

    pub(super) fn is_undecided(&self) -> bool {
        !self.phase.is_decided()
    }

    pub(super) fn has_begun(&self) -> bool {
        self.begun
    }

    /// Whether nothing is left to do.
    pub(super) fn is_finished(&self) -> bool {
        self.phase.is_decided()
            && self.requesters.is_empty()
            && self.enlistments.iter().all(|enlistment| {
                matches!(enlistment.finish_state, FinishState::None | FinishState::Parked)
            })
    }

    fn index_of(&self, service: &ServiceName) -> Option<usize> {
        self.request.services.iter().position(|name| name == service)
    }

    // ---- Before the decision -----------------------------------------------------------------

    /// The journal has no decision. If another worker may have begun the transaction, asks who holds it;
    /// otherwise asks the services for their votes.
    pub(super) fn start(&mut self, cx: &mut CoordinatorContext<'_>) {
        if self.is_poison {
            self.reason = Some(Reason::because(ReasonCode::Failed, "delivered too often"));
            self.begin(cx);
            self.propose(Outcome::Aborted, cx);
        } else if self.repeated {
            self.begin(cx);
            self.phase = Phase::Querying;
            for index in 0..self.enlistments.len() {
                self.enlistments[index].vote_state = VoteState::Queried;
                self.send(index, Destination::AllInstances, self.query_command(), cx);
            }
            self.set_timer(PhaseTimer::EndQuery, cx.settings().query_timeout, cx);
        } else {
            self.phase = Phase::Waiting;
            self.advance(None, cx);
        }
    }

    /// The journal that was read may lack a decision of this transaction: it begins again when it has been
    /// looked up.
    pub(super) fn recall_again(&mut self, cx: &mut CoordinatorContext<'_>) {
        self.withdraw(cx);
        for enlistment in &mut self.enlistments {
            enlistment.vote_state = VoteState::Unasked;
        }
        self.phase = Phase::Recalling;
        self.repeated = true;
        self.reason = None;
        self.heard = None;
        self.prepare_deadline = None;
        self.wait_deadline = None;
        self.phase_timer = None;
        self.proposal = None;
    }

    /// The outcome can't be determined: records that for an operator.
    pub(super) fn park(&mut self, cx: &mut CoordinatorContext<'_>) {
        self.phase = Phase::Parking;
        let cause = ParkedCause::Undecidable(self.request.clone());
        let parked = Parked { key: self.request.key.clone(), cause, parked_at: cx.now };
        cx.effects.push(Effect::Park(parked));
        self.set_timer(PhaseTimer::ParkAgain, cx.settings().finish_timeout, cx);
    }

    fn begin(&mut self, cx: &mut CoordinatorContext<'_>) {
        if !self.begun {
            self.begun = true;
            cx.shared.active += 1;
        }
    }

    /// Waits like a new transaction, and no longer counts as in flight.
    fn wait_again(&mut self, cx: &mut CoordinatorContext<'_>) {
        self.phase = Phase::Waiting;
        if self.begun {
            self.begun = false;
            cx.shared.active -= 1;
        }
    }

    fn query_command(&self) -> Command {
        let (key, request_hash) = (self.request.key.clone(), self.request.request_hash);
        Command::Query(Query { key, request_hash })
    }

    /// Asks an instance that holds a branch for its vote.
    pub(super) fn query(
        &self,
        service: &ServiceName,
        to: InstanceId,
        cx: &mut CoordinatorContext<'_>,
    ) {
        if let Some(index) = self.index_of(service) {
            self.send(index, Destination::Instance(to), self.query_command(), cx);
        }
    }

    pub(super) fn record_vote(&mut self, vote: Vote, cx: &mut CoordinatorContext<'_>) {
        let Some(index) = self.index_of(&vote.service) else {
            let late = Anomaly::LateVote(vote.key, vote.service);
            return cx.effects.push(Effect::Report(late));
        };
        match self.phase {
            Phase::Waiting => {
                self.begin(cx);
                self.phase = Phase::Preparing;
                self.start_deadline(cx);
                self.apply_vote(index, vote, cx);
                self.evaluate(cx);
            }
            Phase::Querying | Phase::Preparing => {
                self.apply_vote(index, vote, cx);
                self.evaluate(cx);
            }
            Phase::Deciding => self.apply_vote(index, vote, cx),
            Phase::Committing | Phase::Aborting | Phase::Answering => {
                self.answer_late_vote(index, vote, cx);
            }
            Phase::Recalling | Phase::Parking => {
                let late = Anomaly::LateVote(vote.key, vote.service);
                cx.effects.push(Effect::Report(late));
            }
        }
    }

    fn apply_vote(&mut self, index: usize, vote: Vote, cx: &mut CoordinatorContext<'_>) {
        self.unask(index, true, cx);
        let instance = vote.instance;
        let held = match &vote.kind {
            VoteKind::Prepared { branch } => vote.store.map(|store| (branch.clone(), store)),
            VoteKind::ReadOnly
            | VoteKind::Refused(_)
            | VoteKind::Failed { .. }
            | VoteKind::Finished(_) => None,
        };
        let vote_state =
            std::mem::replace(&mut self.enlistments[index].vote_state, VoteState::Unasked);
        let next = match (vote.kind, vote_state) {
            (VoteKind::Prepared { branch }, VoteState::Prepared { branch: known, holder }) => {
                let holder = if branch != known {
                    let twice = Anomaly::PreparedTwice(vote.key, vote.service);
                    cx.effects.push(Effect::Report(twice));
                    None
                } else if *known.instance() == instance {
                    // The instance that made the branch has the slot; others vote from the store.
                    holder.map(|_| instance)
                } else {
                    holder.filter(|holder| holder == known.instance() || *holder == instance)
                };
                VoteState::Prepared { branch: known, holder }
            }
            (VoteKind::Prepared { branch }, VoteState::Failed { .. }) => {
                VoteState::Prepared { branch, holder: None }
            }
            (VoteKind::Prepared { branch }, _) => {
                self.hold(index, cx);
                VoteState::Prepared { branch, holder: Some(instance) }
            }
            (VoteKind::Failed { reason, .. }, VoteState::Prepared { branch, .. }) => {
                self.reason.get_or_insert(reason);
                VoteState::Prepared { branch, holder: None }
            }
            (VoteKind::Failed { branch, reason }, _) => {
                self.reason.get_or_insert(reason);
                self.hold(index, cx);
                VoteState::Failed { branch, holder: Some(instance) }
            }
            (VoteKind::Finished(outcome), vote_state) => {
                self.heard.get_or_insert(outcome);
                if matches!(vote_state, VoteState::Prepared { .. } | VoteState::Failed { .. }) {
                    vote_state
                } else {
                    VoteState::Heard
                }
            }
            // A branch that one instance holds counts more than the vote of another that holds none.
            (
                VoteKind::ReadOnly | VoteKind::Refused(_),
                vote_state @ (VoteState::Prepared { .. } | VoteState::Failed { .. }),
            ) => vote_state,
            (VoteKind::ReadOnly, _) => VoteState::ReadOnly,
            (VoteKind::Refused(reason), _) => {
                self.reason.get_or_insert(reason);
                VoteState::Declined
            }
        };
        if let (VoteState::Prepared { branch, .. }, Some((held, store))) = (&next, held)
            && *branch == held
        {
            self.enlistments[index].store = Some(store);
        }
        self.enlistments[index].vote_state = next;
    }

    /// A prepare came back.
    pub(super) fn prepare_returned(
        &mut self,
        service: &ServiceName,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let Some(index) = self.index_of(service) else { return };
        let VoteState::Asked { at, .. } = self.enlistments[index].vote_state else { return };
        let waited = cx.now.since(at);
        let contended_for = cx.jitter(&self.request.key, cx.settings().prepare_timeout / 10);
        let now = cx.now;
        if let Some(load) = cx.known_load(service) {
            load.returned(now, waited, contended_for);
        }
        if self.enlistments.iter().any(|enlistment| enlistment.holds_slot) {
            let stalled = Anomaly::Stalled(self.request.key.clone(), service.clone());
            cx.effects.push(Effect::Report(stalled));
        }
        let reason = match cx.known_load(service) {
            Some(load) => load.no_slot(service),
            None => Reason::at(service, ReasonCode::NoSlot),
        };
        self.decline(index, reason, cx);
    }

    /// The service does not exist.
    pub(super) fn service_missing(
        &mut self,
        service: &ServiceName,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let Some(index) = self.index_of(service) else { return };
        if matches!(self.enlistments[index].vote_state, VoteState::Asked { .. } | VoteState::Queued)
        {
            self.begin(cx);
            self.decline(index, Reason::at(service, ReasonCode::UnknownService), cx);
        }
    }

    /// The broker has refused the prepare, which is sent again when the service is found again. Until then
    /// the transaction doesn't count as in flight, unless it holds a slot of another service.
    pub(super) fn prepare_refused(
        &mut self,
        service: &ServiceName,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let Some(index) = self.index_of(service) else { return };
        let is_asked = matches!(self.enlistments[index].vote_state, VoteState::Asked { .. });
        if self.phase != Phase::Preparing || !is_asked {
            return;
        }
        self.unask(index, false, cx);
        self.enlistments[index].was_refused = true;
        let holds =
            |it: &Enlistment| it.holds_slot || matches!(it.vote_state, VoteState::Asked { .. });
        if !self.enlistments.iter().any(holds) {
            self.withdraw_prepares(cx);
            self.wait_again(cx);
        }
        self.advance(None, cx);
    }

    fn decline(&mut self, index: usize, reason: Reason, cx: &mut CoordinatorContext<'_>) {
        self.unask(index, false, cx);
        self.enlistments[index].vote_state = VoteState::Declined;
        self.reason.get_or_insert(reason);
        if self.is_undecided() && self.phase != Phase::Deciding {
            self.evaluate(cx);
        }
    }

    /// Proposes an outcome if the votes allow one; otherwise asks for more votes.
    fn evaluate(&mut self, cx: &mut CoordinatorContext<'_>) {
        let in_favour = |enlistment: &Enlistment| {
            matches!(enlistment.vote_state, VoteState::Prepared { .. } | VoteState::ReadOnly)
        };
        if let Some(outcome) = self.heard {
            self.propose(outcome, cx);
        } else if self.reason.is_some() {
            self.propose(Outcome::Aborted, cx);
        } else if self.enlistments.iter().all(in_favour) {
            self.propose(Outcome::Committed, cx);
        } else if self.phase != Phase::Querying {
            self.advance(None, cx);
        }
    }

    fn propose(&mut self, outcome: Outcome, cx: &mut CoordinatorContext<'_>) {
        self.begin(cx);
        for index in 0..self.enlistments.len() {
            if self.enlistments[index].vote_state == VoteState::Queued {
                self.unask(index, false, cx);
            }
        }
        self.phase = Phase::Deciding;
        self.proposal = Some(outcome);
        let named = |(enlistment, service): (&Enlistment, &ServiceName)| {
            let VoteState::Prepared { branch, .. } = &enlistment.vote_state else { return None };
            Some((service.clone(), branch.clone()))
        };
        let (branches, reason) = match outcome {
            Outcome::Committed => (
                self.enlistments.iter().zip(&*self.request.services).filter_map(named).collect(),
                None,
            ),
            Outcome::Aborted => (Vec::new(), self.reason.clone()),
        };
        cx.effects.push(Effect::Append(Decision {
            key: self.request.key.clone(),
            request_hash: self.request.request_hash,
            outcome,
            branches,
            reason,
            decided_at: cx.now,
            worker: cx.settings().worker.clone(),
        }));
        self.set_timer(PhaseTimer::AppendAgain, cx.settings().append_timeout, cx);
    }

    // ---- After the decision ------------------------------------------------------------------

    /// The outcome was read back. Only this leads to commits, aborts and results.
    pub(super) fn adopt(&mut self, decision: &Arc<Decision>, cx: &mut CoordinatorContext<'_>) {
        self.begin(cx);
        for index in 0..self.enlistments.len() {
            if matches!(self.enlistments[index].vote_state, VoteState::Asked { .. }) {
                let cancel = Command::Cancel(self.request.key.clone());
                self.send(index, Destination::AllInstances, cancel, cx);
            }
        }
        self.withdraw_prepares(cx);
        self.decision = Some(Arc::clone(decision));
        self.phase_timer = None;
        if decision.request_hash != self.request.request_hash {
            return self.yield_to_other_content(decision, cx);
        }
        match decision.outcome {
            Outcome::Committed => {
                self.phase = Phase::Committing;
                for index in 0..self.enlistments.len() {
                    self.send_commit(index, decision, cx);
                }
                self.publish_early(cx);
                self.answer_if_complete(cx);
            }
            Outcome::Aborted => {
                self.phase = Phase::Aborting;
                let until = cx.now + cx.settings().finish_timeout;
                self.phase_timer = Some((PhaseTimer::StopAborts, until));
                self.publish_to_all(cx);
                for index in 0..self.enlistments.len() {
                    self.send_abort(index, cx);
                }
                self.rearm(cx);
            }
        }
    }

    /// The first decision with this key is about another request. This request is rejected, and what was
    /// prepared for it is undone.
    fn yield_to_other_content(&mut self, decision: &Decision, cx: &mut CoordinatorContext<'_>) {
        self.phase = Phase::Answering;
        for index in 0..self.enlistments.len() {
            if self.enlistments[index].holds_slot {
                let branch = decision.branch_of(&self.request.services[index]).cloned();
                let finish = self.finish(decision.outcome, branch);
                self.send(index, Destination::AllInstances, Command::Finish(finish), cx);
                self.release(index, cx);
            }
        }
        for requester in std::mem::take(&mut self.requesters) {
            let (request, delivery) = (self.request.clone(), requester.delivery);
            cx.reject(request, delivery, ReasonCode::IdReused);
        }
    }

    /// The decision about this transaction itself. A retry with a new timestamp is answered with the decision
    /// of another transaction, which names no branch of this one.
    fn own_decision(&self) -> Option<Arc<Decision>> {
        self.decision.clone().filter(|decision| decision.key == self.request.key)
    }

    fn send(
        &self,
        index: usize,
        to: Destination,
        command: Command,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let service = self.request.services[index].clone();
        cx.effects.push(Effect::Send { service, to, command });
    }
}

/// The pause after `failures` failed attempts: doubling from `first` up to `max`.
pub(super) fn backoff(first: Duration, max: Duration, failures: u32) -> Duration {
    first.saturating_mul(1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX)).min(max)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Phase, backoff};

    #[test]
    fn the_pause_doubles_up_to_its_limit() {
        let pause = |failures| {
            backoff(Duration::from_millis(100), Duration::from_secs(10), failures).as_millis()
        };
        assert_eq!([1, 2, 3, 4].map(pause), [100, 200, 400, 800]);
        assert_eq!([7, 8, 9].map(pause), [6400, 10_000, 10_000]);
        assert_eq!([0, 32, 33, u32::MAX].map(pause), [100, 10_000, 10_000, 10_000]);
    }

    #[test]
    fn all_phases_are_listed_in_order() {
        assert!(Phase::ALL.is_sorted_by(|one, next| one < next));
        assert_eq!(Phase::ALL.last(), Some(&Phase::Parking));
    }
}
