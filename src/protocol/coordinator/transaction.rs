//! One transaction as a worker sees it: its phase, what each service has said, and one method for
//! each way on.

use std::{sync::Arc, time::Duration};

use crate::protocol::{
    coordinator::{
        Context,
        event::{Anomaly, Delivery, Effect},
        flow::Flow,
        reject,
    },
    deadlines::Deadlines,
    ids::{Branch, InstanceId, ServiceName},
    message::{
        Answer, Ballot, Command, Decision, Destination, Done, Finish, Inquiry, Matter, Outcome,
        Parked, Prepare, Query, Reason, ReasonCode, Request, Vote,
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
    /// It will be asked when those before it have voted; its flow keeps a place until then.
    Reserved,
    /// It will be asked when its flow has room.
    Queued,
    Queried,
    Asked {
        at: Time,
        /// Whether it looked full then.
        looked_full: bool,
        /// Whether it is known to get a slot.
        sure: bool,
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

impl Standing {
    fn is_to_be_asked(&self) -> bool {
        matches!(self, Self::Unasked | Self::Reserved)
    }
}

/// How often a transaction goes from the queue of one service to that of another before it takes
/// what it can get: often enough that a scarce service is seen to be, and not so often that those
/// who need but one are served for ever first.
const DETOURS_MAX: u32 = 2;

/// Whether a transaction that holds nothing can have all it needs.
enum Scarcity {
    None,
    WaitAt(usize),
    TakeInOrder,
}

/// Whether one that is not in the queue of `service`, or was just taken from it, may go ahead.
fn has_room(
    service: &ServiceName,
    turn: Option<&ServiceName>,
    begun: bool,
    cx: &mut Context<'_>,
) -> bool {
    let now = cx.now;
    let flow = cx.flow(service);
    flow.admits(now, begun) && (turn == Some(service) || !flow.has_waiters_before(begun))
}

/// What is still to be done about one service once the outcome is known.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Duty {
    None,
    /// A finish was sent and is not answered; sent again at `due`.
    Owed(Telling),
    /// The service's code failed; called again at `due`.
    BackingOff(Telling),
    /// A parked record is not confirmed; written again at `due`.
    Parking {
        error: Option<Arc<str>>,
        due: Time,
    },
    Parked,
}

/// How far it has come with telling a service the outcome.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Telling {
    due: Time,
    /// Whether all instances are told, though one is known to have the slot.
    all: bool,
    silences: u32,
    failures: u32,
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
    /// Whether one of its requests was delivered before: whoever had it then may have parked a
    /// commit, and not lived to know that the record is safe.
    redelivered: bool,
    /// How often it went from the queue of one service to that of another without being asked for.
    detours: u32,
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
            redelivered: deliveries > 1,
            detours: 0,
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
                self.send(part, Destination::AllInstances, self.query_command(), cx);
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

    fn unbegin(&mut self, cx: &mut Context<'_>) {
        if self.begun {
            self.begun = false;
            cx.shared.active -= 1;
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
        let (mut is_plenty, mut first) = (true, None);
        for (index, service) in services.iter().enumerate() {
            if !self.parts[index].standing.is_to_be_asked() {
                continue;
            }
            first = first.or(Some(index));
            let now = cx.now;
            let flow = cx.flow(service);
            if !flow.is_found() {
                return self.queue(index, cx);
            }
            is_plenty &= flow.is_plenty(now);
        }
        let Some(first) = first else { return };
        if !self.begun && cx.is_at_capacity() {
            cx.shared.gated = true;
            return self.queue(first, cx);
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

    /// It can have all it needs, as far as is known.
    fn ask_within_room(&mut self, turn: Option<&ServiceName>, cx: &mut Context<'_>) {
        let services = Arc::clone(&self.request.services);
        let (mut is_own, mut is_sure) = (true, true);
        for (index, service) in services.iter().enumerate() {
            if !self.parts[index].standing.is_to_be_asked() {
                continue;
            }
            let flow = cx.flow(service);
            if !flow.has_spare() && flow.returns_at_once() {
                // It is likely to say no, and then the others need not be called.
                return self.ask(index, cx);
            }
            is_own &= flow.is_own();
            is_sure &= flow.has_spare();
        }
        if is_own && is_sure {
            return self.ask_all(cx);
        }
        if is_sure {
            // Not where one may have to wait: for whoever waits in turn for what would be kept.
            self.reserve_all(cx);
        }
        self.ask_in_order(turn, cx);
    }

    /// Contended services are taken one after another in name order, so that no two transactions
    /// wait for what the other one holds: the next when the one before has voted, or when it is
    /// known to have a slot.
    fn ask_in_order(&mut self, turn: Option<&ServiceName>, cx: &mut Context<'_>) {
        let services = Arc::clone(&self.request.services);
        let now = cx.now;
        for (index, service) in services.iter().enumerate() {
            if !self.parts[index].standing.is_to_be_asked() {
                continue;
            }
            let waits = |part: &Part| matches!(part.standing, Standing::Asked { sure: false, .. });
            if self.parts.iter().any(waits) {
                return;
            }
            let is_reserved = self.parts[index].standing == Standing::Reserved;
            let flow = cx.flow(service);
            if !is_reserved && !flow.is_own() && flow.is_plenty(now) {
                // It can wait until the contended ones are had.
                continue;
            }
            if is_reserved || has_room(service, turn, self.begun, cx) {
                self.ask(index, cx);
            } else {
                return self.queue(index, cx);
            }
        }
    }

    fn holds_nothing(&self) -> bool {
        self.parts.iter().all(|part| {
            !part.holds_slot
                && !matches!(part.standing, Standing::Asked { .. } | Standing::Reserved)
        })
    }

    /// Whether it can have all it needs, and if not, where to wait: a slot that is held while
    /// waiting for another is lost to everyone else, so it waits for the scarcest first, and holds
    /// nothing. Only where that fails again and again does it take what it can get; or where what
    /// it has got is the scarcest, and nobody else holds slots while waiting for the rest.
    fn scarce(&self, turn: Option<&ServiceName>, cx: &mut Context<'_>) -> Scarcity {
        let services = &self.request.services;
        let mut scarcest = None;
        let mut may_hold = turn.is_some();
        for (index, service) in services.iter().enumerate() {
            let to_be_asked = self.parts[index].standing.is_to_be_asked();
            if !to_be_asked || has_room(service, turn, self.begun, cx) {
                continue;
            }
            let flow = cx.flow(service);
            let waiters = flow.waiters();
            may_hold &= turn.is_some_and(|turn| turn < service) && !flow.has_begun_waiters();
            if scarcest.is_none_or(|(most, _)| waiters > most) {
                scarcest = Some((waiters, index));
            }
        }
        let Some((waiters, index)) = scarcest else { return Scarcity::None };
        let waiters_here = turn.map_or(0, |turn| cx.flow(turn).waiters());
        if self.detours >= DETOURS_MAX || may_hold && waiters_here >= waiters {
            Scarcity::TakeInOrder
        } else {
            Scarcity::WaitAt(index)
        }
    }

    fn ask_all(&mut self, cx: &mut Context<'_>) {
        for index in 0..self.parts.len() {
            if self.parts[index].standing.is_to_be_asked() {
                self.ask(index, cx);
            }
        }
    }

    /// Keeps a place at every service that is to be asked, until it is.
    fn reserve_all(&mut self, cx: &mut Context<'_>) {
        for index in 0..self.parts.len() {
            if self.parts[index].standing == Standing::Unasked {
                self.parts[index].standing = Standing::Reserved;
                cx.flow(&self.request.services[index]).reserve();
            }
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
        self.parts[index].standing = Standing::Queued;
        let service = &self.request.services[index];
        let now = cx.now;
        let flow = cx.flow(service);
        flow.enqueue(&self.request.key, self.begun);
        // Who stands before it may only wait for fewer to be in flight.
        if flow.admits(now, self.begun) || flow.is_own() {
            cx.shared.touched.insert(service.clone());
        }
    }

    fn ask(&mut self, index: usize, cx: &mut Context<'_>) {
        self.begin(cx);
        self.phase = Phase::Preparing;
        let deadline = self.start_deadline(cx);
        let at = cx.now;
        let flow = cx.flow(&self.request.services[index]);
        if self.parts[index].standing == Standing::Reserved {
            flow.unreserve();
        }
        let looked_full = flow.looks_full();
        let sure = flow.is_own() && flow.has_spare();
        flow.asked();
        self.parts[index].standing = Standing::Asked { at, looked_full, sure };
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

    fn query_command(&self) -> Command {
        let (key, request_hash) = (self.request.key.clone(), self.request.request_hash);
        Command::Query(Query { key, request_hash })
    }

    /// Asks one instance that is known to hold something for its vote.
    pub(super) fn query(&self, service: &ServiceName, to: InstanceId, cx: &mut Context<'_>) {
        if let Some(index) = self.part_of(service) {
            self.send(index, Destination::Instance(to), self.query_command(), cx);
        }
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
                let holder = if branch != known {
                    let twice = Anomaly::PreparedTwice(vote.key, vote.service);
                    cx.effects.push(Effect::Report(twice));
                    None
                } else if *known.instance() == instance {
                    // Who made the branch has the slot; others vote from the store.
                    holder.map(|_| instance)
                } else {
                    holder.filter(|holder| holder == known.instance() || *holder == instance)
                };
                Standing::Prepared { branch: known, holder }
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
            | Standing::Reserved
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
        if decision.branch_of(&self.request.services[index]).is_some() {
            self.owe(index, 0, 0, false, cx);
        } else if self.parts[index].holds_slot {
            // Somebody else decided without this service's branch: it is undone. Lost, it will be
            // asked for.
            let finish = self.finish(Outcome::Committed, None);
            self.send(index, Destination::AllInstances, Command::Finish(finish), cx);
            self.release(index, cx);
        }
    }

    fn owe_abort(&mut self, index: usize, cx: &mut Context<'_>) {
        match &self.parts[index].standing {
            Standing::Prepared { .. } | Standing::Failed { .. } => {
                self.owe(index, 0, 0, false, cx);
            }
            Standing::Unasked | Standing::Reserved | Standing::Queried if self.repeated => {
                let finish = self.finish(Outcome::Aborted, None);
                self.send(index, Destination::AllInstances, Command::Finish(finish), cx);
            }
            Standing::Unasked
            | Standing::Reserved
            | Standing::Queued
            | Standing::Queried
            | Standing::Asked { .. }
            | Standing::ReadOnly
            | Standing::Declined
            | Standing::Heard => {}
        }
    }

    /// What a service is to be told of the outcome, and who has the slot, if that is known.
    fn telling(&self, index: usize, decision: &Decision) -> (Finish, Option<InstanceId>) {
        let (held, holder) = match &self.parts[index].standing {
            Standing::Prepared { branch, holder } | Standing::Failed { branch, holder } => {
                (Some(branch), holder.clone())
            }
            Standing::Unasked
            | Standing::Reserved
            | Standing::Queued
            | Standing::Queried
            | Standing::Asked { .. }
            | Standing::ReadOnly
            | Standing::Declined
            | Standing::Heard => (None, None),
        };
        let branch = match decision.outcome {
            Outcome::Committed => decision.branch_of(&self.request.services[index]),
            Outcome::Aborted => held,
        };
        // Where nothing is known but the decision, the instance that made the branch has the slot, or
        // it is gone: then the transport finds another one. Told all together, one that sees the
        // branch in the store would call the service's code as well.
        let holder = match held {
            Some(_) => holder.filter(|_| held == branch),
            None => branch.map(|branch| branch.instance().clone()),
        };
        (self.finish(decision.outcome, branch.cloned()), holder)
    }

    /// Tells a service the outcome, and goes on until it has answered.
    fn owe(&mut self, index: usize, silences: u32, failures: u32, all: bool, cx: &mut Context<'_>) {
        let Some(decision) = &self.decision else { return };
        let (finish, holder) = self.telling(index, decision);
        let patience = match decision.outcome {
            Outcome::Committed => cx.settings().finish_timeout,
            Outcome::Aborted => cx.settings().finish_timeout / 4,
        };
        let to = holder.filter(|_| !all).map_or(Destination::AllInstances, Destination::Instance);
        self.send(index, to, Command::Finish(finish), cx);
        let due = cx.now + patience;
        self.parts[index].duty = Duty::Owed(Telling { due, all, silences, failures });
        cx.wake(&self.request.key, &mut self.due, due);
    }

    pub(super) fn record_done(&mut self, done: &Done, cx: &mut Context<'_>) {
        let Some(index) = self.part_of(&done.service) else { return };
        match &done.applied {
            Ok(()) => {
                // What was parked is settled by the parked command's own done; what may have been,
                // by nothing but this.
                if self.may_be_listed(index) && !done.parked {
                    self.settle(index, cx);
                }
                if !matches!(self.parts[index].duty, Duty::None | Duty::Parked) {
                    self.parts[index].duty = Duty::None;
                    self.release(index, cx);
                }
            }
            Err(error) => self.record_failure(index, error, cx),
        }
        self.answer_if_complete(cx);
    }

    /// Whether a record may say that this service's commit, which is owed, is parked.
    fn may_be_listed(&self, index: usize) -> bool {
        match self.parts[index].duty {
            Duty::Parking { .. } => true,
            Duty::Owed(_) | Duty::BackingOff(_) => {
                self.redelivered && self.phase == Phase::Committing
            }
            Duty::None | Duty::Parked => false,
        }
    }

    fn settle(&self, index: usize, cx: &mut Context<'_>) {
        let (key, service) = (self.request.key.clone(), self.request.services[index].clone());
        cx.effects.push(Effect::Settle { key, service });
    }

    /// A request was delivered again of what has committed in part or as a whole.
    fn settle_committed(&self, cx: &mut Context<'_>) {
        let Some(decision) = self.own_decision() else { return };
        for (index, service) in self.request.services.iter().enumerate() {
            if self.parts[index].duty == Duty::None && decision.branch_of(service).is_some() {
                self.settle(index, cx);
            }
        }
    }

    /// A service's code failed to finish. Only the answer that is waited for counts: several
    /// instances may report the same attempt.
    fn record_failure(&mut self, index: usize, error: &Arc<str>, cx: &mut Context<'_>) {
        let Duty::Owed(telling) = self.parts[index].duty else { return };
        let failures = telling.failures + 1;
        cx.effects.push(Effect::Report(Anomaly::CommitFailed {
            key: self.request.key.clone(),
            service: self.request.services[index].clone(),
            failures,
            error: Arc::clone(error),
        }));
        if self.phase == Phase::Committing && failures > cx.settings().commit_retries {
            return self.park_commit(index, Some(Arc::clone(error)), cx);
        }
        let due = cx.now + cx.backoff(&self.request.key, failures);
        self.parts[index].duty = Duty::BackingOff(Telling { due, failures, ..telling });
        cx.wake(&self.request.key, &mut self.due, due);
    }

    fn park_commit(&mut self, index: usize, error: Option<Arc<str>>, cx: &mut Context<'_>) {
        let service = self.request.services[index].clone();
        let decided = self.decision.as_ref().and_then(|decision| decision.branch_of(&service));
        let Some(branch) = decided.cloned() else { return };
        let matter = Matter::Uncommitted { service, branch, error: error.clone() };
        let parked = Parked { key: self.request.key.clone(), matter, parked_at: cx.now };
        cx.effects.push(Effect::Park(parked));
        let due = cx.now + cx.settings().finish_timeout;
        self.parts[index].duty = Duty::Parking { error, due };
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
        if let (Duty::Parking { .. }, Some(decision)) = (&self.parts[index].duty, &self.decision) {
            let (finish, _) = self.telling(index, decision);
            let finish = Finish { parked: true, ..finish };
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
                    // Once everyone has been given up on, nobody would end the repetitions.
                    Outcome::Aborted
                        if self.parts[index].duty == Duty::None && self.until.is_some() =>
                    {
                        let holder = Some(vote.instance);
                        self.parts[index].standing = Standing::Failed { branch, holder };
                        self.owe(index, 0, 0, false, cx);
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

    /// An instance that holds the transaction, or has found it in the store, asks what became of it.
    pub(super) fn answer_inquiry(&self, inquiry: Inquiry, cx: &mut Context<'_>) {
        let index = self.part_of(&inquiry.service);
        if index.is_some_and(|it| self.is_with_holder(it, &inquiry.branch, &inquiry.instance)) {
            return;
        }
        if let Some(decision) = self.own_decision() {
            cx.tell(&decision, &inquiry.service, inquiry.instance);
        }
    }

    /// Whether the holder of `branch` is being told the outcome, and `instance` is another one that
    /// has seen the branch in the store: told as well, both would call the service's code.
    fn is_with_holder(&self, index: usize, branch: &Branch, instance: &InstanceId) -> bool {
        let part = &self.parts[index];
        let (Duty::Owed(telling) | Duty::BackingOff(telling)) = &part.duty else { return false };
        match &part.standing {
            Standing::Prepared { branch: held, holder: Some(holder) }
            | Standing::Failed { branch: held, holder: Some(holder) } => {
                !telling.all && held == branch && holder != instance
            }
            Standing::Prepared { .. }
            | Standing::Failed { .. }
            | Standing::Unasked
            | Standing::Reserved
            | Standing::Queued
            | Standing::Queried
            | Standing::Asked { .. }
            | Standing::ReadOnly
            | Standing::Declined
            | Standing::Heard => false,
        }
    }

    /// What the journal says of this very transaction: a careless retry is answered with another's
    /// decision, which is about nothing that was prepared for this one.
    fn own_decision(&self) -> Option<Arc<Decision>> {
        self.decision.clone().filter(|decision| decision.key == self.request.key)
    }

    // ---- The result --------------------------------------------------------------------------

    /// One more request for this transaction.
    pub(super) fn attach(&mut self, delivery: Delivery, deliveries: u32, cx: &mut Context<'_>) {
        self.requesters.push(Requester { delivery, republish_at: None });
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
        // Before the decision there is none to be published again.
        if !matches!(self.phase, Phase::Aborting | Phase::Answering) {
            return;
        }
        let at = cx.now + cx.settings().backoff_first;
        if let Some(one) = self.requesters.iter_mut().find(|one| one.delivery == delivery) {
            one.republish_at = Some(at);
            cx.wake(&self.request.key, &mut self.due, at);
        }
    }

    /// Whether nothing was asked for it yet.
    pub(super) fn is_unbegun(&self) -> bool {
        !self.begun && matches!(self.phase, Phase::Waiting | Phase::Recalling)
    }

    /// Hands the requests back, if nothing was begun.
    pub(super) fn release_unbegun(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.is_unbegun() {
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
            if self.parts[index].standing == Standing::Queued {
                cx.shared.touched.insert(self.request.services[index].clone());
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
        if self.parts.iter().all(|part| part.standing == Standing::Unasked) {
            // Nobody holds any of it. It waits like a new one, and doesn't keep out those of which
            // something is held: they have slots that others wait for.
            self.phase = Phase::Waiting;
            self.unbegin(cx);
        }
        self.advance(None, cx);
    }

    fn give_up_preparing(&mut self, cx: &mut Context<'_>) {
        let silent = self.parts.iter().position(|part| {
            part.standing.is_to_be_asked()
                || matches!(part.standing, Standing::Queued | Standing::Asked { .. })
        });
        let service = silent.map(|index| self.request.services[index].clone());
        self.reason.get_or_insert(Reason { code: ReasonCode::Deadline, service, message: None });
        self.propose(Outcome::Aborted, cx);
    }

    fn wake_duty(&mut self, index: usize, cx: &mut Context<'_>) {
        match &self.parts[index].duty {
            Duty::Owed(telling) if telling.due <= cx.now => {
                let Telling { silences, failures, .. } = *telling;
                let (key, service) = (self.request.key.clone(), &self.request.services[index]);
                let unanswered = Anomaly::Unanswered(key, service.clone());
                cx.effects.push(Effect::Report(unanswered));
                if self.phase == Phase::Committing && silences >= cx.settings().commit_retries {
                    self.park_commit(index, None, cx);
                } else {
                    self.owe(index, silences + 1, failures, true, cx);
                }
            }
            Duty::BackingOff(telling) if telling.due <= cx.now => {
                let Telling { silences, failures, all, .. } = *telling;
                self.owe(index, silences, failures, all, cx);
            }
            Duty::Parking { error, due } if *due <= cx.now => {
                let error = error.clone();
                self.park_commit(index, error, cx);
            }
            Duty::None
            | Duty::Owed(_)
            | Duty::BackingOff(_)
            | Duty::Parking { .. }
            | Duty::Parked => {}
        }
    }

    /// To be looked at when the service it waits for has been silent for too long.
    pub(super) fn wake_by(&mut self, at: Time, deadlines: &mut Deadlines) {
        deadlines.wake_by(&self.request.key, &mut self.due, at);
    }

    fn wake_at(&mut self, at: Time, cx: &mut Context<'_>) {
        self.until = Some(at);
        cx.wake(&self.request.key, &mut self.due, at);
    }

    fn rearm(&mut self, cx: &mut Context<'_>) {
        let duties = self.parts.iter().filter_map(|part| match &part.duty {
            Duty::Owed(telling) | Duty::BackingOff(telling) => Some(telling.due),
            Duty::Parking { due, .. } => Some(*due),
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
            cx.relieve(&self.request.services[index], Flow::freed_slot);
        }
    }

    /// No prepare of this service is waited for any more.
    fn unask(&mut self, index: usize, admitted: bool, cx: &mut Context<'_>) {
        let service = &self.request.services[index];
        let standing = &mut self.parts[index].standing;
        match *standing {
            Standing::Asked { looked_full, .. } => {
                *standing = Standing::Unasked;
                cx.relieve(service, |flow| {
                    flow.answered();
                    if admitted {
                        flow.admitted(looked_full);
                    }
                });
            }
            Standing::Queued => {
                *standing = Standing::Unasked;
                if let Some(flow) = cx.known_flow(service) {
                    flow.remove(&self.request.key);
                }
            }
            Standing::Reserved => {
                *standing = Standing::Unasked;
                cx.relieve(service, Flow::unreserve);
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
