//! One transaction as a worker sees it: its phase, what each service has said, and one method for
//! each way on.

use std::{sync::Arc, time::Duration};

use crate::protocol::{
    coordinator::{
        Context,
        event::{Anomaly, Delivery, Effect},
        flow::Claim,
        reject,
    },
    ids::{Branch, InstanceId, ServiceName},
    message::{
        Answer, Ballot, Command, Decision, Destination, Done, Finish, Matter, Outcome, Parked,
        Prepare, Query, Reason, ReasonCode, Request, Vote,
    },
    time::Time,
};

/// Where a transaction stands at this worker.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Phase {
    /// Whether it was decided before is being looked up further back in the journal.
    Recalling,
    /// It has not begun: no service was asked. Its deadline is not running.
    Waiting,
    /// Another worker may have begun it: the instances are asked who holds it.
    Querying,
    /// Services are asked for their votes.
    Preparing,
    /// An outcome was proposed and not yet read back.
    Deciding,
    /// The outcome is `COMMITTED`: services are told until each has committed or is parked.
    Committing,
    /// The outcome is `ABORTED`: the result is on its way, and who holds something is told.
    Aborting,
    /// Everything is done but the confirmation of the result.
    Answering,
    /// Its outcome can't be told: it is being handed to a person.
    Parking,
}

impl Phase {
    /// All of them, for coverage tables.
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

/// Who asked, and whether the answer has been sent.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Requester {
    delivery: Delivery,
    /// When to send the answer again, if it failed.
    republish_at: Option<Time>,
}

/// What one service has said so far.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Standing {
    Unasked,
    /// It will be asked when its flow has room.
    Queued,
    Queried,
    Asked {
        at: Time,
        /// Whether it looked full then.
        looked_full: bool,
    },
    /// `holder`: who has the slot; `None`: not known for certain, so all are told.
    Prepared {
        branch: Branch,
        holder: Option<InstanceId>,
    },
    ReadOnly,
    /// It said no, or there was no slot, or there is no such service: nothing to tell it.
    Declined,
    Failed {
        branch: Branch,
        holder: Option<InstanceId>,
    },
    /// It has heard the outcome from somebody.
    Heard,
}

/// What is still to be done about one service once the outcome is known.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Duty {
    None,
    /// A finish was sent and is not answered; sent again at `due`.
    Owed {
        finish: Finish,
        to: Destination,
        due: Time,
        silences: u32,
        failures: u32,
    },
    /// The service's code failed; called again at `due`.
    BackingOff {
        finish: Finish,
        to: Destination,
        due: Time,
        silences: u32,
        failures: u32,
    },
    /// A parked record is not confirmed; written again at `due`.
    Parking {
        finish: Finish,
        error: Option<Arc<str>>,
        due: Time,
    },
    Parked,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Part {
    standing: Standing,
    /// Whether it counts as a slot held in the service's flow.
    holds_slot: bool,
    duty: Duty,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Transaction {
    request: Request,
    requesters: Vec<Requester>,
    phase: Phase,
    /// What each of `request.services` has said, in that order.
    parts: Vec<Part>,
    /// Whether it counts as in flight.
    begun: bool,
    /// Whether another worker may have begun it.
    repeated: bool,
    /// Delivered too often to be tried again.
    hopeless: bool,
    /// Set by the first service that says no.
    reason: Option<Reason>,
    /// What a service has already heard.
    heard: Option<Outcome>,
    /// When to give up preparing; set when the first prepare is sent.
    deadline: Option<Time>,
    /// When the phase wants to be looked at again.
    until: Option<Time>,
    proposal: Option<Outcome>,
    decision: Option<Arc<Decision>>,
    /// Its entry among the deadlines.
    pub(super) due: Option<Time>,
}

impl Transaction {
    pub(super) fn new(request: Request, delivery: Delivery, deliveries: u32, many: u32) -> Self {
        let part = Part { standing: Standing::Unasked, holds_slot: false, duty: Duty::None };
        let requester = Requester { delivery, republish_at: None };
        Self {
            parts: vec![part; request.services.len()],
            requesters: vec![requester],
            phase: Phase::Recalling,
            begun: false,
            repeated: deliveries > 1,
            hopeless: deliveries > many,
            reason: None,
            heard: None,
            deadline: None,
            until: None,
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

    /// Nothing is left to do: it can be forgotten.
    pub(super) fn is_finished(&self) -> bool {
        self.phase.is_decided()
            && self.requesters.is_empty()
            && self.parts.iter().all(|part| matches!(part.duty, Duty::None | Duty::Parked))
    }

    fn part_of(&self, service: &ServiceName) -> Option<usize> {
        self.request.services.iter().position(|name| name == service)
    }

    // ---- Before the decision -----------------------------------------------------------------

    /// The journal holds no decision: ask who holds it, if another worker may have begun it, and
    /// else the services for their votes.
    pub(super) fn start(&mut self, cx: &mut Context<'_>) {
        if self.hopeless {
            self.reason = Some(Reason::because(ReasonCode::Failed, "delivered too often"));
            self.begin(cx);
            self.propose(Outcome::Aborted, cx);
        } else if self.repeated {
            self.begin(cx);
            self.phase = Phase::Querying;
            for part in 0..self.parts.len() {
                self.parts[part].standing = Standing::Queried;
                let query = Query {
                    key: self.request.key.clone(),
                    request_hash: self.request.request_hash,
                };
                self.send(part, Destination::AllInstances, Command::Query(query), cx);
            }
            self.wake_at(cx.now + cx.settings().query_timeout, cx);
        } else {
            self.phase = Phase::Waiting;
            self.advance(None, cx);
        }
    }

    /// Whether the journal read so far may lack a decision of this transaction: begin again once
    /// it has been looked up.
    pub(super) fn recall_again(&mut self, cx: &mut Context<'_>) {
        self.withdraw(cx);
        for part in &mut self.parts {
            part.standing = Standing::Unasked;
        }
        self.phase = Phase::Recalling;
        self.repeated = true;
        self.reason = None;
        self.heard = None;
        self.deadline = None;
        self.until = None;
        self.proposal = None;
    }

    /// The outcome can't be told: hand it to a person.
    pub(super) fn park(&mut self, cx: &mut Context<'_>) {
        self.phase = Phase::Parking;
        let matter = Matter::Undecidable(self.request.clone());
        let parked = Parked { key: self.request.key.clone(), matter, parked_at: cx.now };
        cx.effects.push(Effect::Park(parked));
        self.wake_at(cx.now + cx.settings().finish_timeout, cx);
    }

    fn begin(&mut self, cx: &mut Context<'_>) {
        if !self.begun {
            self.begun = true;
            cx.shared.active += 1;
        }
    }

    /// Asks for votes, as many as can be asked for at once without standing in another
    /// transaction's way. `turn`: the service whose queue it was just taken from.
    pub(super) fn advance(&mut self, turn: Option<&ServiceName>, cx: &mut Context<'_>) {
        debug_assert!(matches!(self.phase, Phase::Waiting | Phase::Preparing));
        if self.parts.iter().any(|part| part.standing == Standing::Queued) {
            return;
        }
        let services = Arc::clone(&self.request.services);
        let mut first_contended = None;
        let mut unasked = 0;
        for (index, service) in services.iter().enumerate() {
            if self.parts[index].standing != Standing::Unasked {
                continue;
            }
            unasked += 1;
            let now = cx.now;
            let flow = cx.flow(service);
            if !flow.is_found() {
                return self.queue(index, cx);
            }
            if first_contended.is_none() && !flow.is_plenty(now) {
                first_contended = Some(index);
            }
        }
        if unasked == 0 {
            return;
        }
        if !self.begun && cx.is_at_capacity() {
            let index = self.parts.iter().position(|part| part.standing == Standing::Unasked);
            cx.shared.gated = true;
            return self.queue(index.unwrap_or(0), cx);
        }
        let Some(index) = first_contended else {
            for index in 0..self.parts.len() {
                if self.parts[index].standing == Standing::Unasked {
                    self.ask(index, cx);
                }
            }
            return;
        };
        // Contended services are taken one after another in name order, and before the others, so
        // that nobody waits for one service while keeping another from those who could use it.
        if self.parts.iter().any(|part| matches!(part.standing, Standing::Asked { .. })) {
            return;
        }
        let service = &services[index];
        let flow = cx.flow(service);
        if flow.admits() && (turn == Some(service) || !flow.has_waiters()) {
            self.ask(index, cx);
        } else {
            self.queue(index, cx);
        }
    }

    /// Back from the queue of `service`.
    pub(super) fn dequeued(&mut self, service: &ServiceName, cx: &mut Context<'_>) {
        let Some(index) = self.part_of(service) else { return };
        if self.parts[index].standing == Standing::Queued {
            self.parts[index].standing = Standing::Unasked;
            self.advance(Some(service), cx);
        }
    }

    fn queue(&mut self, index: usize, cx: &mut Context<'_>) {
        let claim = match self.begun {
            true if self.parts.iter().any(|part| part.holds_slot) => Claim::HoldsSlots,
            true => Claim::InFlight,
            false => Claim::New,
        };
        self.parts[index].standing = Standing::Queued;
        let service = &self.request.services[index];
        let flow = cx.flow(service);
        flow.enqueue(&self.request.key, claim);
        // Who stands before it may only wait for fewer to be in flight.
        if flow.admits() {
            cx.touch(service);
        }
    }

    fn ask(&mut self, index: usize, cx: &mut Context<'_>) {
        self.begin(cx);
        self.phase = Phase::Preparing;
        let deadline = self.start_deadline(cx);
        let at = cx.now;
        let flow = cx.flow(&self.request.services[index]);
        let looked_full = flow.looks_full();
        flow.asked();
        self.parts[index].standing = Standing::Asked { at, looked_full };
        let prepare = Prepare {
            key: self.request.key.clone(),
            request_hash: self.request.request_hash,
            data: self.request.data.clone(),
            deadline,
            repeated: self.repeated,
        };
        self.send(index, Destination::Slot, Command::Prepare(prepare), cx);
    }

    /// From the first slot that is asked for or held, others may wait for it.
    fn start_deadline(&mut self, cx: &mut Context<'_>) -> Time {
        let usual = cx.settings().prepare_timeout;
        let timeout = self.request.timeout.unwrap_or(usual);
        let deadline = *self.deadline.get_or_insert(cx.now + timeout);
        cx.wake(&self.request.key, &mut self.due, deadline);
        deadline
    }

    pub(super) fn record_vote(&mut self, vote: Vote, cx: &mut Context<'_>) {
        let Some(index) = self.part_of(&vote.service) else {
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

    fn apply_vote(&mut self, index: usize, vote: Vote, cx: &mut Context<'_>) {
        self.unask(index, true, cx);
        let instance = vote.instance;
        let standing = std::mem::replace(&mut self.parts[index].standing, Standing::Unasked);
        let next = match (vote.ballot, standing) {
            (Ballot::Prepared { branch }, Standing::Prepared { branch: known, holder }) => {
                let same = branch == known && holder.as_ref() == Some(&instance);
                if branch != known {
                    let twice = Anomaly::PreparedTwice(vote.key, vote.service);
                    cx.effects.push(Effect::Report(twice));
                }
                Standing::Prepared { branch: known, holder: holder.filter(|_| same) }
            }
            (Ballot::Prepared { branch }, Standing::Failed { .. }) => {
                Standing::Prepared { branch, holder: None }
            }
            (Ballot::Prepared { branch }, _) => {
                self.hold(index, cx);
                Standing::Prepared { branch, holder: Some(instance) }
            }
            (Ballot::Failed { reason, .. }, Standing::Prepared { branch, .. }) => {
                self.reason.get_or_insert(reason);
                Standing::Prepared { branch, holder: None }
            }
            (Ballot::Failed { branch, reason }, _) => {
                self.reason.get_or_insert(reason);
                self.hold(index, cx);
                Standing::Failed { branch, holder: Some(instance) }
            }
            (Ballot::Finished(outcome), standing) => {
                self.heard.get_or_insert(outcome);
                if matches!(standing, Standing::Prepared { .. } | Standing::Failed { .. }) {
                    standing
                } else {
                    Standing::Heard
                }
            }
            // What is held outweighs what another instance says of itself.
            (
                Ballot::ReadOnly | Ballot::Refused(_),
                standing @ (Standing::Prepared { .. } | Standing::Failed { .. }),
            ) => standing,
            (Ballot::ReadOnly, _) => Standing::ReadOnly,
            (Ballot::Refused(reason), _) => {
                self.reason.get_or_insert(reason);
                Standing::Declined
            }
        };
        self.parts[index].standing = next;
    }

    /// The transport brought the prepare back.
    pub(super) fn prepare_returned(&mut self, service: &ServiceName, cx: &mut Context<'_>) {
        let Some(index) = self.part_of(service) else { return };
        let Standing::Asked { at, .. } = self.parts[index].standing else { return };
        let waited = cx.now.since(at);
        let contended_for = cx.jitter(&self.request.key, cx.settings().prepare_timeout / 10);
        let now = cx.now;
        if let Some(flow) = cx.known_flow(service) {
            flow.returned(now, waited, contended_for);
        }
        if self.parts.iter().any(|part| part.holds_slot) {
            let stalled = Anomaly::Stalled(self.request.key.clone(), service.clone());
            cx.effects.push(Effect::Report(stalled));
        }
        self.decline(index, ReasonCode::NoSlot, cx);
    }

    /// There is no such service.
    pub(super) fn service_missing(&mut self, service: &ServiceName, cx: &mut Context<'_>) {
        let Some(index) = self.part_of(service) else { return };
        if matches!(self.parts[index].standing, Standing::Asked { .. } | Standing::Queued) {
            self.begin(cx);
            self.decline(index, ReasonCode::UnknownService, cx);
        }
    }

    fn decline(&mut self, index: usize, code: ReasonCode, cx: &mut Context<'_>) {
        self.unask(index, false, cx);
        self.parts[index].standing = Standing::Declined;
        self.reason.get_or_insert_with(|| Reason::at(&self.request.services[index], code));
        if self.is_undecided() && self.phase != Phase::Deciding {
            self.evaluate(cx);
        }
    }

    /// Proposes an outcome if the votes allow one, and else goes on asking.
    fn evaluate(&mut self, cx: &mut Context<'_>) {
        let in_favour =
            |part: &Part| matches!(part.standing, Standing::Prepared { .. } | Standing::ReadOnly);
        if let Some(outcome) = self.heard {
            self.propose(outcome, cx);
        } else if self.reason.is_some() {
            self.propose(Outcome::Aborted, cx);
        } else if self.parts.iter().all(in_favour) {
            self.propose(Outcome::Committed, cx);
        } else if self.phase != Phase::Querying {
            self.advance(None, cx);
        }
    }

    fn propose(&mut self, outcome: Outcome, cx: &mut Context<'_>) {
        self.begin(cx);
        for index in 0..self.parts.len() {
            if self.parts[index].standing == Standing::Queued {
                self.unask(index, false, cx);
            }
        }
        self.phase = Phase::Deciding;
        self.proposal = Some(outcome);
        let named = |(part, service): (&Part, &ServiceName)| match &part.standing {
            Standing::Prepared { branch, .. } => Some((service.clone(), branch.clone())),
            Standing::Unasked
            | Standing::Queued
            | Standing::Queried
            | Standing::Asked { .. }
            | Standing::ReadOnly
            | Standing::Declined
            | Standing::Failed { .. }
            | Standing::Heard => None,
        };
        let (branches, reason) = match outcome {
            Outcome::Committed => {
                (self.parts.iter().zip(&*self.request.services).filter_map(named).collect(), None)
            }
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
        self.wake_at(cx.now + cx.settings().append_timeout, cx);
    }

    // ---- After the decision ------------------------------------------------------------------

    /// The outcome was read back: nothing but this makes anyone commit, abort or hear a result.
    pub(super) fn adopt(&mut self, decision: &Arc<Decision>, cx: &mut Context<'_>) {
        self.begin(cx);
        for index in 0..self.parts.len() {
            if matches!(self.parts[index].standing, Standing::Asked { .. }) {
                let cancel = Command::Cancel(self.request.key.clone());
                self.send(index, Destination::AllInstances, cancel, cx);
            }
        }
        self.withdraw_prepares(cx);
        self.decision = Some(Arc::clone(decision));
        self.until = None;
        if decision.request_hash != self.request.request_hash {
            return self.yield_to_other_content(decision, cx);
        }
        match decision.outcome {
            Outcome::Committed => {
                self.phase = Phase::Committing;
                for index in 0..self.parts.len() {
                    self.owe_commit(index, decision, cx);
                }
                self.answer_if_complete(cx);
            }
            Outcome::Aborted => {
                self.phase = Phase::Aborting;
                self.until = Some(cx.now + cx.settings().finish_timeout);
                self.publish_to_all(cx);
                for index in 0..self.parts.len() {
                    self.owe_abort(index, cx);
                }
                self.rearm(cx);
            }
        }
    }

    /// The first decision under this key is about another request: this one is not carried out, and
    /// what was prepared for it is undone.
    fn yield_to_other_content(&mut self, decision: &Decision, cx: &mut Context<'_>) {
        self.phase = Phase::Answering;
        for index in 0..self.parts.len() {
            if self.parts[index].holds_slot {
                let branch = decision.branch_of(&self.request.services[index]).cloned();
                let finish = self.finish(decision.outcome, branch);
                self.send(index, Destination::AllInstances, Command::Finish(finish), cx);
                self.release(index, cx);
            }
        }
        for requester in std::mem::take(&mut self.requesters) {
            let (request, delivery) = (self.request.clone(), requester.delivery);
            reject(request, delivery, ReasonCode::IdReused, cx.effects);
        }
    }

    fn finish(&self, outcome: Outcome, branch: Option<Branch>) -> Finish {
        Finish { key: self.request.key.clone(), outcome, branch, parked: false }
    }

    fn owe_commit(&mut self, index: usize, decision: &Decision, cx: &mut Context<'_>) {
        let committed = decision.branch_of(&self.request.services[index]);
        let holder = match &self.parts[index].standing {
            Standing::Prepared { branch, holder } if Some(branch) == committed => holder.clone(),
            Standing::Unasked
            | Standing::Queued
            | Standing::Queried
            | Standing::Asked { .. }
            | Standing::Prepared { .. }
            | Standing::ReadOnly
            | Standing::Declined
            | Standing::Failed { .. }
            | Standing::Heard => None,
        };
        let to = holder.map_or(Destination::AllInstances, Destination::Instance);
        let finish = self.finish(Outcome::Committed, committed.cloned());
        if committed.is_some() {
            self.owe(index, finish, to, 0, 0, cx);
        } else if self.parts[index].holds_slot {
            // Somebody else decided without this service's branch: it is undone. Lost, it will be
            // asked for.
            self.send(index, Destination::AllInstances, Command::Finish(finish), cx);
            self.release(index, cx);
        }
    }

    fn owe_abort(&mut self, index: usize, cx: &mut Context<'_>) {
        match &self.parts[index].standing {
            Standing::Prepared { branch, holder } | Standing::Failed { branch, holder } => {
                let to = holder.clone().map_or(Destination::AllInstances, Destination::Instance);
                let finish = self.finish(Outcome::Aborted, Some(branch.clone()));
                self.owe(index, finish, to, 0, 0, cx);
            }
            Standing::Unasked | Standing::Queried if self.repeated => {
                let finish = self.finish(Outcome::Aborted, None);
                self.send(index, Destination::AllInstances, Command::Finish(finish), cx);
            }
            Standing::Unasked
            | Standing::Queued
            | Standing::Queried
            | Standing::Asked { .. }
            | Standing::ReadOnly
            | Standing::Declined
            | Standing::Heard => {}
        }
    }

    fn owe(
        &mut self,
        index: usize,
        finish: Finish,
        to: Destination,
        silences: u32,
        failures: u32,
        cx: &mut Context<'_>,
    ) {
        let patience = match finish.outcome {
            Outcome::Committed => cx.settings().finish_timeout,
            Outcome::Aborted => cx.settings().finish_timeout / 4,
        };
        let due = cx.now + patience;
        self.send(index, to.clone(), Command::Finish(finish.clone()), cx);
        self.parts[index].duty = Duty::Owed { finish, to, due, silences, failures };
        cx.wake(&self.request.key, &mut self.due, due);
    }

    pub(super) fn record_done(&mut self, done: &Done, cx: &mut Context<'_>) {
        let Some(index) = self.part_of(&done.service) else { return };
        match &done.applied {
            Ok(()) => {
                if matches!(
                    self.parts[index].duty,
                    Duty::Owed { .. } | Duty::BackingOff { .. } | Duty::Parking { .. }
                ) {
                    self.parts[index].duty = Duty::None;
                    self.release(index, cx);
                }
            }
            Err(error) => self.record_failure(index, error, cx),
        }
        self.answer_if_complete(cx);
    }

    /// A service's code failed to finish. Only the answer that is waited for counts: several
    /// instances may report the same attempt.
    fn record_failure(&mut self, index: usize, error: &Arc<str>, cx: &mut Context<'_>) {
        let Duty::Owed { finish, to, silences, failures, .. } = &self.parts[index].duty else {
            return;
        };
        let (finish, to, silences, failures) =
            (finish.clone(), to.clone(), *silences, failures + 1);
        cx.effects.push(Effect::Report(Anomaly::CommitFailed {
            key: self.request.key.clone(),
            service: self.request.services[index].clone(),
            failures,
            error: Arc::clone(error),
        }));
        if finish.outcome == Outcome::Committed && failures > cx.settings().commit_retries {
            return self.park_commit(index, finish, Some(Arc::clone(error)), cx);
        }
        let due = cx.now + cx.backoff(&self.request.key, failures);
        self.parts[index].duty = Duty::BackingOff { finish, to, due, silences, failures };
        cx.wake(&self.request.key, &mut self.due, due);
    }

    fn park_commit(
        &mut self,
        index: usize,
        finish: Finish,
        error: Option<Arc<str>>,
        cx: &mut Context<'_>,
    ) {
        let Some(branch) = finish.branch.clone() else { return };
        let service = self.request.services[index].clone();
        let matter = Matter::Uncommitted { service, branch, error: error.clone() };
        let parked = Parked { key: self.request.key.clone(), matter, parked_at: cx.now };
        cx.effects.push(Effect::Park(parked));
        let due = cx.now + cx.settings().finish_timeout;
        self.parts[index].duty = Duty::Parking { finish, error, due };
        cx.wake(&self.request.key, &mut self.due, due);
    }

    /// The parked record is safe.
    pub(super) fn park_confirmed(&mut self, service: Option<&ServiceName>, cx: &mut Context<'_>) {
        let Some(service) = service else {
            if self.phase == Phase::Parking {
                for requester in std::mem::take(&mut self.requesters) {
                    cx.effects.push(Effect::Ack(requester.delivery));
                }
            }
            return;
        };
        let Some(index) = self.part_of(service) else { return };
        if let Duty::Parking { finish, .. } = &self.parts[index].duty {
            let finish = Finish { parked: true, ..finish.clone() };
            self.send(index, Destination::AnyInstance, Command::Finish(finish), cx);
            self.parts[index].duty = Duty::Parked;
            self.release(index, cx);
            self.answer_if_complete(cx);
        }
    }

    fn answer_late_vote(&mut self, index: usize, vote: Vote, cx: &mut Context<'_>) {
        let Some(decision) = self.own_decision() else { return };
        match vote.ballot {
            Ballot::Prepared { branch } | Ballot::Failed { branch, .. } => {
                let late = Anomaly::LateVote(vote.key, vote.service);
                cx.effects.push(Effect::Report(late));
                let to = Destination::Instance(vote.instance);
                match decision.outcome {
                    Outcome::Committed => {
                        let branch = decision.branch_of(&self.request.services[index]).cloned();
                        let finish = self.finish(Outcome::Committed, branch);
                        self.send(index, to, Command::Finish(finish), cx);
                    }
                    Outcome::Aborted if self.parts[index].duty == Duty::None => {
                        let finish = self.finish(Outcome::Aborted, Some(branch));
                        self.owe(index, finish, to, 0, 0, cx);
                    }
                    Outcome::Aborted => {
                        let finish = self.finish(Outcome::Aborted, Some(branch));
                        self.send(index, to, Command::Finish(finish), cx);
                    }
                }
            }
            Ballot::ReadOnly | Ballot::Refused(_) | Ballot::Finished(_) => {}
        }
    }

    /// An instance that holds the transaction asks what became of it.
    pub(super) fn answer_inquiry(
        &self,
        service: &ServiceName,
        to: InstanceId,
        cx: &mut Context<'_>,
    ) {
        if let Some(decision) = self.own_decision() {
            cx.tell(&decision, service, to);
        }
    }

    /// Before it is decided, who asks what became of what it holds is asked for its vote: it may
    /// hold what is left of a prepare that failed.
    pub(super) fn query_holder(&self, service: &ServiceName, to: InstanceId, cx: &mut Context<'_>) {
        if let Some(index) = self.part_of(service) {
            let (key, request_hash) = (self.request.key.clone(), self.request.request_hash);
            let query = Command::Query(Query { key, request_hash });
            self.send(index, Destination::Instance(to), query, cx);
        }
    }

    /// What the journal says of this very transaction: a careless retry is answered with another's
    /// decision, which is about nothing that was prepared for this one.
    fn own_decision(&self) -> Option<Arc<Decision>> {
        self.decision.clone().filter(|decision| decision.key == self.request.key)
    }

    // ---- The result --------------------------------------------------------------------------

    /// One more request for this transaction.
    pub(super) fn attach(&mut self, delivery: Delivery, cx: &mut Context<'_>) {
        self.requesters.push(Requester { delivery, republish_at: None });
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

    /// Answers with the outcome of an earlier transaction of the same id and content.
    pub(super) fn answer_as(&mut self, decision: &Arc<Decision>, cx: &mut Context<'_>) {
        self.begin(cx);
        self.decision = Some(Arc::clone(decision));
        self.phase = Phase::Answering;
        self.publish_to_all(cx);
    }

    fn answer_if_complete(&mut self, cx: &mut Context<'_>) {
        let is_complete = |part: &Part| matches!(part.duty, Duty::None | Duty::Parked);
        if self.phase == Phase::Committing && self.parts.iter().all(is_complete) {
            self.phase = Phase::Answering;
            self.publish_to_all(cx);
        }
    }

    fn publish_to_all(&mut self, cx: &mut Context<'_>) {
        for index in 0..self.requesters.len() {
            self.publish(index, cx);
        }
    }

    fn publish(&mut self, index: usize, cx: &mut Context<'_>) {
        let Some(decision) = &self.decision else { return };
        let requester = &mut self.requesters[index];
        requester.republish_at = None;
        let parked = |(part, service): (&Part, &ServiceName)| {
            (part.duty == Duty::Parked).then(|| service.clone())
        };
        let answer = Answer {
            id: self.request.key.id.clone(),
            requested_at: decision.key.requested_at,
            outcome: decision.outcome,
            reason: decision.reason.clone(),
            unresolved: self.parts.iter().zip(&*self.request.services).filter_map(parked).collect(),
            decided_at: decision.decided_at,
        };
        let (key, delivery) = (self.request.key.clone(), requester.delivery);
        cx.effects.push(Effect::Publish { key, delivery, answer });
    }

    /// A result is safe: only now may its request go.
    pub(super) fn result_confirmed(&mut self, delivery: Delivery, cx: &mut Context<'_>) {
        if !matches!(self.phase, Phase::Aborting | Phase::Answering) {
            return;
        }
        if let Some(index) = self.requesters.iter().position(|one| one.delivery == delivery) {
            self.requesters.remove(index);
            cx.effects.push(Effect::Ack(delivery));
        }
    }

    pub(super) fn result_failed(&mut self, delivery: Delivery, cx: &mut Context<'_>) {
        let at = cx.now + cx.settings().backoff_first;
        if let Some(one) = self.requesters.iter_mut().find(|one| one.delivery == delivery) {
            one.republish_at = Some(at);
            cx.wake(&self.request.key, &mut self.due, at);
        }
    }

    /// Hands the requests back, if nothing was begun.
    pub(super) fn release_unbegun(&mut self, cx: &mut Context<'_>) -> bool {
        if self.begun || !matches!(self.phase, Phase::Waiting | Phase::Recalling) {
            return false;
        }
        self.withdraw(cx);
        for requester in std::mem::take(&mut self.requesters) {
            cx.effects.push(Effect::Release(requester.delivery));
        }
        true
    }

    // ---- Time --------------------------------------------------------------------------------

    /// The moment has come that it wanted to be looked at again.
    pub(super) fn wake(&mut self, cx: &mut Context<'_>) {
        let is_due = self.until.is_some_and(|until| until <= cx.now);
        match self.phase {
            Phase::Querying if is_due => self.end_query(cx),
            Phase::Preparing if self.deadline.is_some_and(|deadline| deadline <= cx.now) => {
                self.give_up_preparing(cx);
            }
            Phase::Deciding if is_due => {
                let proposal = self.proposal.unwrap_or(Outcome::Aborted);
                self.propose(proposal, cx);
            }
            Phase::Parking if is_due => self.park(cx),
            Phase::Aborting if is_due => {
                // What did not hear it by now asks for it.
                for index in 0..self.parts.len() {
                    self.parts[index].duty = Duty::None;
                    self.release(index, cx);
                }
                self.until = None;
            }
            Phase::Recalling
            | Phase::Waiting
            | Phase::Querying
            | Phase::Preparing
            | Phase::Deciding
            | Phase::Committing
            | Phase::Aborting
            | Phase::Answering
            | Phase::Parking => {}
        }
        for index in 0..self.parts.len() {
            self.wake_duty(index, cx);
        }
        for index in 0..self.requesters.len() {
            if self.requesters[index].republish_at.is_some_and(|at| at <= cx.now) {
                self.publish(index, cx);
            }
        }
        self.answer_if_complete(cx);
        self.rearm(cx);
    }

    /// Whoever has not answered the query doesn't hold it: ask for a vote.
    fn end_query(&mut self, cx: &mut Context<'_>) {
        self.phase = Phase::Preparing;
        self.until = None;
        for part in &mut self.parts {
            if part.standing == Standing::Queried {
                part.standing = Standing::Unasked;
            }
        }
        if self.parts.iter().any(|part| part.holds_slot) {
            self.start_deadline(cx);
        }
        self.advance(None, cx);
    }

    fn give_up_preparing(&mut self, cx: &mut Context<'_>) {
        let silent = self.parts.iter().position(|part| {
            matches!(part.standing, Standing::Unasked | Standing::Queued | Standing::Asked { .. })
        });
        let service = silent.map(|index| self.request.services[index].clone());
        self.reason.get_or_insert(Reason { code: ReasonCode::Deadline, service, message: None });
        self.propose(Outcome::Aborted, cx);
    }

    fn wake_duty(&mut self, index: usize, cx: &mut Context<'_>) {
        match &self.parts[index].duty {
            Duty::Owed { finish, due, silences, failures, .. } if *due <= cx.now => {
                let (finish, silences, failures) = (finish.clone(), silences + 1, *failures);
                let (key, service) = (self.request.key.clone(), &self.request.services[index]);
                let unanswered = Anomaly::Unanswered(key, service.clone());
                cx.effects.push(Effect::Report(unanswered));
                let give_up = silences > cx.settings().commit_retries;
                if finish.outcome == Outcome::Committed && give_up {
                    self.park_commit(index, finish, None, cx);
                } else {
                    self.owe(index, finish, Destination::AllInstances, silences, failures, cx);
                }
            }
            Duty::BackingOff { finish, to, due, silences, failures } if *due <= cx.now => {
                let (finish, to, silences, failures) =
                    (finish.clone(), to.clone(), *silences, *failures);
                self.owe(index, finish, to, silences, failures, cx);
            }
            Duty::Parking { finish, error, due } if *due <= cx.now => {
                let (finish, error) = (finish.clone(), error.clone());
                self.park_commit(index, finish, error, cx);
            }
            Duty::None
            | Duty::Owed { .. }
            | Duty::BackingOff { .. }
            | Duty::Parking { .. }
            | Duty::Parked => {}
        }
    }

    fn wake_at(&mut self, at: Time, cx: &mut Context<'_>) {
        self.until = Some(at);
        cx.wake(&self.request.key, &mut self.due, at);
    }

    fn rearm(&mut self, cx: &mut Context<'_>) {
        let duties = self.parts.iter().filter_map(|part| match &part.duty {
            Duty::Owed { due, .. } | Duty::BackingOff { due, .. } | Duty::Parking { due, .. } => {
                Some(*due)
            }
            Duty::None | Duty::Parked => None,
        });
        let answers = self.requesters.iter().filter_map(|requester| requester.republish_at);
        let preparing = (self.phase == Phase::Preparing).then_some(self.deadline).flatten();
        let soonest = duties.chain(answers).chain(preparing).chain(self.until).min();
        if let (false, Some(at)) = (self.is_finished(), soonest) {
            cx.wake(&self.request.key, &mut self.due, at);
        }
    }

    // ---- What the flows are told -------------------------------------------------------------

    fn send(&self, index: usize, to: Destination, command: Command, cx: &mut Context<'_>) {
        let service = self.request.services[index].clone();
        cx.effects.push(Effect::Send { service, to, command });
    }

    fn hold(&mut self, index: usize, cx: &mut Context<'_>) {
        if !self.parts[index].holds_slot {
            self.parts[index].holds_slot = true;
            if let Some(flow) = cx.known_flow(&self.request.services[index]) {
                flow.took_slot();
            }
        }
    }

    fn release(&mut self, index: usize, cx: &mut Context<'_>) {
        if self.parts[index].holds_slot {
            self.parts[index].holds_slot = false;
            if let Some(flow) = cx.known_flow(&self.request.services[index]) {
                flow.freed_slot();
            }
            cx.touch(&self.request.services[index]);
        }
    }

    /// No prepare of this service is waited for any more.
    fn unask(&mut self, index: usize, admitted: bool, cx: &mut Context<'_>) {
        let service = &self.request.services[index];
        let standing = &mut self.parts[index].standing;
        match *standing {
            Standing::Asked { looked_full, .. } => {
                *standing = Standing::Unasked;
                if let Some(flow) = cx.known_flow(service) {
                    flow.answered();
                    if admitted {
                        flow.admitted(looked_full);
                    }
                }
                cx.touch(service);
            }
            Standing::Queued => {
                *standing = Standing::Unasked;
                if let Some(flow) = cx.known_flow(service) {
                    flow.remove(&self.request.key);
                }
            }
            Standing::Unasked
            | Standing::Queried
            | Standing::Prepared { .. }
            | Standing::ReadOnly
            | Standing::Declined
            | Standing::Failed { .. }
            | Standing::Heard => {}
        }
    }

    fn withdraw_prepares(&mut self, cx: &mut Context<'_>) {
        for index in 0..self.parts.len() {
            self.unask(index, false, cx);
        }
    }

    /// Takes back all it has told the flows.
    pub(super) fn withdraw(&mut self, cx: &mut Context<'_>) {
        for index in 0..self.parts.len() {
            self.unask(index, false, cx);
            self.release(index, cx);
        }
    }
}

/// How long to wait before the `failures`th attempt is repeated: doubling from `first` up to `max`.
pub(super) fn backoff(first: Duration, max: Duration, failures: u32) -> Duration {
    first.saturating_mul(1u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX)).min(max)
}
