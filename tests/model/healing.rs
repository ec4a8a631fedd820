//! What must become of any world: without further faults, everything ends by itself, whatever was
//! lost before.
//!
//! This can't be a property of single states, and following every fair path is infeasible. So one
//! such path is tried, from many states: all messages in transit are lost; from then on everything
//! that can happen happens at once, and the next deadline is reached when nothing else can happen.

use dtc::protocol::coordinator::Event;

use crate::{
    scenario::{Answer, Faults, Scenario},
    world::{Action, Call, Message, QueueState, World},
};

/// More than any healing takes; ten times what the longest was seen to take.
const STEPS_MAX: usize = 400;

impl World {
    /// What is still unfinished, if this world doesn't come to rest.
    pub fn ails_after_loss(&self, scenario: &Scenario) -> Option<String> {
        let mut world = self.clone();
        world.lose_all();
        for _ in 0..STEPS_MAX {
            world.left = Faults { worker_timeouts: 2, member_timeouts: 2, ..Faults::NONE };
            match world.next_of_healing(scenario) {
                Some(action) => world.step(scenario, &action),
                None => {
                    if world.is_well() {
                        return None;
                    }
                    let soonest = world.soonest_deadline();
                    let Some(action) = soonest else { break };
                    world.step(scenario, &action);
                }
            }
        }
        Some(format!("{world:#?}"))
    }

    /// Loses everything that a broker may lose. A look back, a service's code and a publisher's
    /// confirm end in some way as long as their process lives; and an instance that takes a command
    /// from a durable queue acks it only when its done is safe.
    fn lose_all(&mut self) {
        self.net.retain(|message| match &**message {
            Message::ToWorker { event: Event::ResultConfirmed { .. }, .. }
            | Message::History { .. }
            | Message::Call { .. }
            | Message::Finish { .. } => true,
            Message::ToWorker { event: Event::DoneReceived { done, .. }, .. } => done.parked,
            Message::ToMember { event, .. } => event.label() == "StoreRead",
            Message::ToWorker { .. }
            | Message::Inquiry { .. }
            | Message::Prepare { .. }
            | Message::Append(_) => false,
        });
    }

    fn next_of_healing(&self, scenario: &Scenario) -> Option<Action> {
        let mut actions = Vec::new();
        self.actions(scenario, &mut actions);
        actions.into_iter().find(|action| match action {
            Action::PrepareEnds { message, answer } => match &**message {
                Message::Call { member, call: Call::Prepare { .. } } => {
                    let service = self.members[*member].service;
                    Some(answer) == scenario.services[service].verdicts.first()
                }
                _ => *answer == Answer::Prepared,
            },
            Action::CommitEnds { succeeds, .. } => *succeeds,
            Action::Take { .. }
            | Action::Read { .. }
            | Action::Start { .. }
            | Action::Deliver { .. } => true,
            _ => false,
        })
    }

    fn soonest_deadline(&self) -> Option<Action> {
        let workers = self.workers.iter().enumerate().filter_map(|(worker, slot)| {
            let due = slot.core.as_ref()?.core().next_deadline()?;
            Some((due, Action::WorkerDeadline { worker }))
        });
        let members = self.members.iter().enumerate().filter_map(|(member, slot)| {
            Some((slot.core.core().next_deadline()?, Action::MemberDeadline { member }))
        });
        workers.chain(members).min_by_key(|(due, _)| *due).map(|(_, action)| action)
    }

    /// Whether every request has its answer, nothing is held, and no finished commit is listed as
    /// parked. What a truncated journal can't show is left to an operator.
    fn is_well(&self) -> bool {
        let is_parked =
            |key| self.told.parked.iter().any(|(it, service)| it == key && service.is_none());
        let is_over = |state| matches!(state, QueueState::Acked | QueueState::Rejected);
        let idle = |core: &crate::bugs::Worker| core.core().is_empty();
        let left_to_a_person = self.kept_from > 0;
        self.requests.iter().all(|it| is_over(it.state))
            && self.workers.iter().all(|it| it.core.as_ref().is_none_or(|core| idle(core)))
            && self.stores.iter().all(|store| {
                left_to_a_person || store.prepared.keys().all(|(key, _)| is_parked(key))
            })
            && (left_to_a_person
                || self
                    .members
                    .iter()
                    .all(|it| it.core.core().slots_used() == 0 && it.unacked.is_empty()))
            && self.told.parked.iter().all(|(key, service)| {
                service
                    .as_ref()
                    .is_none_or(|it| self.told.settled.contains(&(key.clone(), it.clone())))
            })
    }
}
