//! Every interleaving of a small world.
#![allow(missing_docs, unreachable_pub, reason = "a test has no public face")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

#[path = "../support/bugs.rs"]
mod bugs;
mod classic;
mod configurations;
mod hashed;
mod healing;
mod properties;
mod scenario;
mod world;

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::SystemTime,
};

use stateright::{Checker, Model, Property};

use crate::{
    properties::Sight,
    scenario::{Faults, Scenario, Service, request},
    world::{Action, World},
};

/// The search copies worlds, in small pieces, and does little else.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

pub struct System {
    pub scenario: Scenario,
    expanded: AtomicUsize,
    found_after: AtomicUsize,
}

impl System {
    fn new(scenario: Scenario) -> Self {
        Self { scenario, expanded: AtomicUsize::new(0), found_after: AtomicUsize::new(usize::MAX) }
    }

    fn check(&self, holds: bool) -> bool {
        if !holds {
            self.found_after.fetch_min(self.expanded.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        holds
    }
}

impl Model for System {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(&self.scenario)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        self.expanded.fetch_add(1, Ordering::Relaxed);
        let acked = world.requests.iter().all(|it| it.state == world::QueueState::Acked);
        if acked {
            STATS[0].fetch_add(1, Ordering::Relaxed);
        }
        if acked && world.stores.iter().all(|it| it.prepared.is_empty()) {
            STATS[1].fetch_add(1, Ordering::Relaxed);
        }
        STATS[2].fetch_add(world.net.len(), Ordering::Relaxed);
        for m in &world.net {
            let i = match &**m {
                world::Message::ToWorker {
                    event: dtc::protocol::coordinator::Event::DoneReceived(_),
                    ..
                } => 3,
                world::Message::ToWorker {
                    event: dtc::protocol::coordinator::Event::VoteReceived(_),
                    ..
                } => 4,
                world::Message::ToWorker { .. } => 5,
                world::Message::ToMember {
                    event: dtc::protocol::participant::Event::QueryReceived { .. },
                    ..
                } => 6,
                world::Message::ToMember {
                    event: dtc::protocol::participant::Event::FinishReceived { .. },
                    ..
                } => 7,
                world::Message::ToMember { .. } => 8,
                world::Message::Append(_) => 9,
                world::Message::Prepare { .. } => 10,
                _ => 11,
            };
            STATS[i].fetch_add(1, Ordering::Relaxed);
        }
        world.actions(&self.scenario, actions);
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        world.step(&self.scenario, &action);
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = properties::always();
        properties.extend(self.scenario.reaches.iter().map(|sight| properties::sometimes(*sight)));
        properties
    }
}

static STATS: [AtomicUsize; 12] = [const { AtomicUsize::new(0) }; 12];

fn explore(scenario: Scenario) -> usize {
    let began = SystemTime::now();
    let name = scenario.name;
    let checker = System::new(scenario)
        .checker()
        .threads(2)
        .target_state_count(6_000_000)
        .finish_when(stateright::HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    println!(
        "{name}: {} states, {} steps, depth {}, {:?}",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        began.elapsed().unwrap()
    );
    println!("acked, empty, net, done vote otherW query finish otherM append prep other {STATS:?}");
    for property in checker.model().properties() {
        let found = checker.discovery(property.name);
        match (property.expectation.discovery_is_failure(), found) {
            (true, Some(path)) => {
                let last = path.last_state().clone();
                if property.name == "everything ends" {
                    println!("{}", last.ails_after_loss(&checker.model().scenario).unwrap());
                }
                for (_, action) in path.into_vec() {
                    println!("  {action:?}");
                }
                println!("!!! {name}: {}", property.name);
            }
            (false, None) => println!("!!! {name}: never {}", property.name),
            _ => {}
        }
    }
    checker.unique_state_count()
}

#[test]
fn try_all() {
    let wanted = std::env::var("ONLY").unwrap_or_default();
    for scenario in configurations::all()
        .into_iter()
        .filter(|it| wanted.split(',').any(|one| it.name.contains(one)))
    {
        explore(scenario);
    }
}

#[test]
fn controls() {
    let wanted = std::env::var("BUG").unwrap_or_default();
    let mut scenarios = configurations::all();
    scenarios.truncate(17);
    for bug in bugs::Bug::ALL.into_iter().filter(|it| format!("{it:?}").contains(&wanted)) {
        let mut found = 0;
        for scenario in &scenarios {
            let scenario = Scenario { bug: Some(bug), healed_one_in: 1, ..scenario.clone() };
            let name = scenario.name;
            let checker = System::new(scenario)
                .checker()
                .threads(1)
                .target_state_count(40_000)
                .finish_when(stateright::HasDiscoveries::AnyFailures)
                .spawn_bfs()
                .join();
            let failures: Vec<_> = checker
                .discoveries()
                .into_keys()
                .filter(|name| checker.model().property(name).expectation.discovery_is_failure())
                .collect();
            if !failures.is_empty() {
                found += 1;
                println!(
                    "{bug:?} | {failures:?} | {name} | {} of {}",
                    checker.model().found_after.load(Ordering::Relaxed),
                    checker.unique_state_count()
                );
            }
            if found == 3 {
                break;
            }
        }
        if found == 0 {
            println!("{bug:?} | not found");
        }
    }
}
