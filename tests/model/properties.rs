//! What must always hold, and what must be reached somewhere, so that nothing holds only because
//! nothing happens.

use dtc::protocol::message::Outcome;
use stateright::Property;

use crate::{
    System,
    world::{QueueState, World},
};

/// A forbidden step, which the state afterwards doesn't show.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Breach {
    /// A branch was undone after it was committed, or to be committed after it was undone.
    Disagreement,
    /// A command or a result was sent before its worker had read the first record.
    Early,
    /// A result was not the first record's outcome, or not the earlier result's.
    Result,
    /// An instance held more than its cap.
    Cap,
    /// A request was acked before an answer was safe.
    Ack,
}

/// Something that must be reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Milestone {
    Commits,
    Aborts,
    TakesOver,
    SplitDecision,
    InquiryDecides,
    ParksTransaction,
    ParksCommit,
    Settles,
    UndoesSecondBranch,
    Rejects,
}

impl World {
    fn is_free_of(&self, breach: Breach) -> bool {
        self.breaches & (1 << breach as u16) == 0
    }

    /// No service has executed a transaction that another one has undone.
    fn services_agree(&self, system: &System) -> bool {
        system.scenario.requests.iter().all(|request| {
            let mut executes = false;
            let mut undoes = false;
            for (store, service) in self.stores.iter().zip(&system.scenario.services) {
                let executed = store.executed.iter().any(|(key, _)| *key == request.key);
                let held = store.prepared.keys().any(|(key, _)| *key == request.key);
                let undone = store.undone.iter().any(|(key, _)| *key == request.key);
                let is_read_only = self.told.votes.iter().any(|(key, _, name, branch)| {
                    *key == request.key && name.as_str() == service.name && branch.is_none()
                });
                executes |= executed;
                undoes |= undone && !executed && !held && !is_read_only;
            }
            !(executes && undoes)
        })
    }

    /// A transaction is executed only if its first record commits it; if it is undone, no first
    /// record does.
    fn services_follow_the_journal(&self, system: &System) -> bool {
        self.stores.iter().zip(&system.scenario.services).all(|(store, service)| {
            let named = |(key, branch): &(_, _)| {
                let first = self.first_of(key)?;
                let name = crate::scenario::service_name(service.name);
                Some(first.outcome == Outcome::Committed && first.branch_of(&name) == Some(branch))
            };
            store.executed.iter().all(|it| named(it) == Some(true))
                && store.undone.iter().all(|it| named(it) == Some(false))
        })
    }

    fn commits_only_what_all_voted_for(&self, system: &System) -> bool {
        system.scenario.requests.iter().all(|request| {
            let Some(first) = self.first_of(&request.key) else { return true };
            first.request_hash != request.request_hash
                || first.outcome == Outcome::Aborted
                || request.services.iter().all(|service| {
                    let branch = first.branch_of(service).cloned();
                    let (key, hash) = (request.key.clone(), request.request_hash);
                    let vote = (key, hash, service.clone(), branch);
                    self.told.votes.contains(&vote)
                })
        })
    }

    fn executes_once(&self) -> bool {
        self.stores.iter().all(|store| {
            let mut keys: Vec<_> = store.executed.iter().map(|(key, _)| key).collect();
            let executions = keys.len();
            keys.dedup();
            keys.len() == executions
        })
    }

    fn sees(&self, sight: Milestone) -> bool {
        let result = |outcome| {
            self.requests.iter().any(|it| it.results.iter().any(|result| result.outcome == outcome))
        };
        match sight {
            Milestone::Commits => {
                result(Outcome::Committed) && self.stores.iter().any(|it| !it.executed.is_empty())
            }
            Milestone::Aborts => result(Outcome::Aborted),
            Milestone::TakesOver => self.requests.iter().any(|it| {
                it.deliveries > 1
                    && it.results.iter().any(|result| Some(result.worker) != it.first_taker)
            }),
            Milestone::SplitDecision => self.journal.iter().any(|record| {
                let first = self.first_of(&record.decision.key);
                let settled = self.requests.iter().any(|it| !it.results.is_empty());
                settled && first.is_some_and(|first| first.outcome != record.decision.outcome)
            }),
            Milestone::InquiryDecides => self.journal.iter().any(|record| {
                record.by_inquiry && self.first_of(&record.decision.key) == Some(&record.decision)
            }),
            Milestone::ParksTransaction => self.told.parked.iter().any(|(_, it)| it.is_none()),
            Milestone::ParksCommit => self.told.parked.iter().any(|(_, it)| it.is_some()),
            Milestone::Settles => !self.told.settled.is_empty(),
            Milestone::UndoesSecondBranch => self.stores.iter().any(|store| {
                store.undone.iter().any(|(undone, _)| {
                    store.executed.iter().any(|(executed, _)| executed == undone)
                })
            }),
            Milestone::Rejects => self.requests.iter().any(|it| it.state == QueueState::Rejected),
        }
    }
}

pub fn always() -> Vec<Property<System>> {
    vec![
        Property::always("services agree", |system: &System, world: &World| {
            system.check(world.services_agree(system) && world.is_free_of(Breach::Disagreement))
        }),
        Property::always("services follow the journal", |system: &System, world: &World| {
            system.check(world.services_follow_the_journal(system))
        }),
        Property::always("commits only what all voted for", |system: &System, world: &World| {
            system.check(world.commits_only_what_all_voted_for(system))
        }),
        Property::always("executes once", |system: &System, world: &World| {
            system.check(world.executes_once())
        }),
        Property::always("a result is the outcome", |system: &System, world: &World| {
            system.check(world.is_free_of(Breach::Result))
        }),
        Property::always("nothing leaves before read-back", |system: &System, world: &World| {
            system.check(world.is_free_of(Breach::Early))
        }),
        Property::always("acked after the answer", |system: &System, world: &World| {
            system.check(world.is_free_of(Breach::Ack))
        }),
        Property::always("the cap holds", |system: &System, world: &World| {
            system.check(world.is_free_of(Breach::Cap))
        }),
        Property::always("everything ends", |system: &System, world: &World| {
            let is_sampled = world.sample().is_multiple_of(system.scenario.healed_one_in);
            system.check(!is_sampled || world.ails_after_loss(&system.scenario).is_none())
        }),
    ]
}

pub fn sometimes(sight: Milestone) -> Property<System> {
    match sight {
        Milestone::Commits => {
            Property::sometimes("commits", |_, it: &World| it.sees(Milestone::Commits))
        }
        Milestone::Aborts => {
            Property::sometimes("aborts", |_, it: &World| it.sees(Milestone::Aborts))
        }
        Milestone::TakesOver => {
            Property::sometimes("takes over", |_, it: &World| it.sees(Milestone::TakesOver))
        }
        Milestone::SplitDecision => {
            Property::sometimes("two decisions", |_, it: &World| it.sees(Milestone::SplitDecision))
        }
        Milestone::InquiryDecides => Property::sometimes("an inquiry decides", |_, it: &World| {
            it.sees(Milestone::InquiryDecides)
        }),
        Milestone::ParksTransaction => {
            Property::sometimes("parks a transaction", |_, it: &World| {
                it.sees(Milestone::ParksTransaction)
            })
        }
        Milestone::ParksCommit => {
            Property::sometimes("parks a commit", |_, it: &World| it.sees(Milestone::ParksCommit))
        }
        Milestone::Settles => {
            Property::sometimes("settles", |_, it: &World| it.sees(Milestone::Settles))
        }
        Milestone::UndoesSecondBranch => {
            Property::sometimes("undoes a second branch", |_, it: &World| {
                it.sees(Milestone::UndoesSecondBranch)
            })
        }
        Milestone::Rejects => {
            Property::sometimes("rejects", |_, it: &World| it.sees(Milestone::Rejects))
        }
    }
}
