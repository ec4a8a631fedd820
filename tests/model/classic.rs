//! Two-phase commit as in the textbook (Gray and Lamport, "Consensus on Transaction Commit"), as an
//! abstract model: to show that the checker counts the published number of states.

use std::collections::BTreeSet;

use stateright::{Checker, Model, Property};

struct TwoPhaseCommit {
    resource_managers: usize,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    managers: Vec<Manager>,
    coordinator: Coordinator,
    heard_from: BTreeSet<usize>,
    sent: BTreeSet<Message>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Manager {
    Working,
    Prepared,
    Committed,
    Aborted,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Coordinator {
    Collecting,
    Committed,
    Aborted,
}

/// A sent message stays sent: anyone may receive it, at any time, any number of times.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Message {
    Prepared(usize),
    Commit,
    Abort,
}

#[derive(Clone, PartialEq, Debug)]
enum Action {
    HearPrepared(usize),
    DecideCommit,
    DecideAbort,
    Prepare(usize),
    ChooseToAbort(usize),
    HearCommit(usize),
    HearAbort(usize),
}

impl Model for TwoPhaseCommit {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            managers: vec![Manager::Working; self.resource_managers],
            coordinator: Coordinator::Collecting,
            heard_from: BTreeSet::new(),
            sent: BTreeSet::new(),
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let is_collecting = state.coordinator == Coordinator::Collecting;
        if is_collecting && state.heard_from.len() == self.resource_managers {
            actions.push(Action::DecideCommit);
        }
        if is_collecting {
            actions.push(Action::DecideAbort);
        }
        for (index, manager) in state.managers.iter().enumerate() {
            if is_collecting && state.sent.contains(&Message::Prepared(index)) {
                actions.push(Action::HearPrepared(index));
            }
            if *manager == Manager::Working {
                actions.extend([Action::Prepare(index), Action::ChooseToAbort(index)]);
            }
            if state.sent.contains(&Message::Commit) {
                actions.push(Action::HearCommit(index));
            }
            if state.sent.contains(&Message::Abort) {
                actions.push(Action::HearAbort(index));
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::HearPrepared(index) => {
                state.heard_from.insert(index);
            }
            Action::DecideCommit => {
                state.coordinator = Coordinator::Committed;
                state.sent.insert(Message::Commit);
            }
            Action::DecideAbort => {
                state.coordinator = Coordinator::Aborted;
                state.sent.insert(Message::Abort);
            }
            Action::Prepare(index) => {
                state.managers[index] = Manager::Prepared;
                state.sent.insert(Message::Prepared(index));
            }
            Action::ChooseToAbort(index) => state.managers[index] = Manager::Aborted,
            Action::HearCommit(index) => state.managers[index] = Manager::Committed,
            Action::HearAbort(index) => state.managers[index] = Manager::Aborted,
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::sometimes("all commit", |_, state: &State| {
                state.managers.iter().all(|manager| *manager == Manager::Committed)
            }),
            Property::sometimes("all abort", |_, state: &State| {
                state.managers.iter().all(|manager| *manager == Manager::Aborted)
            }),
            Property::always("they agree", |_, state: &State| {
                !(state.managers.contains(&Manager::Aborted)
                    && state.managers.contains(&Manager::Committed))
            }),
        ]
    }
}

#[test]
fn the_textbooks_two_phase_commit_with_three_resource_managers_has_288_states() {
    let checker = TwoPhaseCommit { resource_managers: 3 }.checker().spawn_bfs().join();
    checker.assert_properties();
    assert!(checker.is_done());
    assert_eq!(checker.unique_state_count(), 288);
}
