//! A modelled service: its code, its durable store, and its queues.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use dtc::protocol::{
    ids::{Branch, RequestHash, TransactionKey},
    participant::{Event, InDoubt, Verdict},
    time::Time,
};

use crate::{
    broker::{Command, QueuedPrepare},
    checkers::{agreement, executed_once},
    plan::{Conduct, ServicePlan},
    rules::shifted,
    world::{ScheduledEvent, World, tell},
};

/// One service with all its instances share.
pub(crate) struct Service {
    pub(crate) plan: ServicePlan,
    pub(crate) store: Store,
    /// Prepares that wait for a slot.
    pub(crate) queue: VecDeque<QueuedPrepare>,
    pub(crate) head_due: Option<Time>,
    /// Until when its prepare queue doesn't exist.
    pub(crate) unbound_until: Option<Time>,
    /// Until when its prepare queue can't be reached.
    pub(crate) unreachable_until: Option<Time>,
    /// Until when no publish brings it a command.
    pub(crate) finish_refused_until: Option<Time>,
    /// Prepares delivered and not acked: each is a slot.
    pub(crate) slots: BTreeMap<u64, Slot>,
    /// Commands for any instance.
    pub(crate) durable: VecDeque<Command>,
    pub(crate) durable_unacked: BTreeMap<u64, (Command, usize)>,
    /// How often the commit of a transaction will still fail.
    failures: BTreeMap<TransactionKey, u32>,
}

pub(crate) struct Slot {
    pub(crate) instance: usize,
    pub(crate) prepare: QueuedPrepare,
}

/// The state of a service, which survives its instances.
#[derive(Default)]
pub(crate) struct Store {
    held: BTreeMap<TransactionKey, Vec<InDoubt>>,
    committed: BTreeMap<TransactionKey, Vec<Branch>>,
    ever: BTreeSet<Branch>,
}

/// A call of the service's code, or of its store, that has ended.
#[derive(Debug)]
pub(crate) enum Call {
    Prepare {
        stored: Option<InDoubt>,
        key: TransactionKey,
        branch: Branch,
        verdict: Verdict,
    },
    /// A prepare that was given up has continued and stores something after all.
    StoreLate(InDoubt),
    Commit {
        key: TransactionKey,
        branch: Branch,
        fails: bool,
    },
    Abort {
        key: TransactionKey,
        branch: Branch,
        fails: bool,
    },
    /// `None`: the present content; otherwise that of an earlier time.
    ReadStore {
        key: TransactionKey,
        held: Option<Vec<InDoubt>>,
    },
    ScanStore {
        held: Option<Vec<InDoubt>>,
    },
    LookUpCommit {
        key: TransactionKey,
        branch: Branch,
    },
}

impl Service {
    pub(crate) fn new(plan: ServicePlan) -> Self {
        Self {
            plan,
            store: Store::default(),
            queue: VecDeque::new(),
            head_due: None,
            unbound_until: None,
            unreachable_until: None,
            finish_refused_until: None,
            slots: BTreeMap::new(),
            durable: VecDeque::new(),
            durable_unacked: BTreeMap::new(),
            failures: BTreeMap::new(),
        }
    }

    /// Its code succeeds from here on.
    pub(crate) fn heal(&mut self) {
        self.failures.clear();
        self.unbound_until = None;
        self.unreachable_until = None;
        self.finish_refused_until = None;
        let latency_max = self.plan.conduct.latency_max;
        self.plan.conduct = Conduct { latency_max, ..Conduct::default() };
    }

    pub(crate) fn is_unreachable(&self, now: Time) -> bool {
        self.unreachable_until.is_some_and(|until| now < until)
    }

    pub(crate) fn what_is_left(&self) -> Vec<String> {
        let mut left = Vec::new();
        let name = &self.plan.name;
        if !self.queue.is_empty() || !self.slots.is_empty() {
            let (ready, slots) = (self.queue.len(), self.slots.len());
            left.push(format!("{name}: {ready} prepares are queued and {slots} slots taken"));
        }
        if !self.store.held.is_empty() {
            left.push(format!("{name}: still prepared: {:?}", self.store.held));
        }
        let n_durable = self.durable.len() + self.durable_unacked.len();
        if n_durable > 0 && !self.plan.instances.is_empty() {
            left.push(format!("{name}: {n_durable} commands wait in the durable queue"));
        }
        left
    }
}

impl Store {
    pub(crate) fn holds(&self, key: &TransactionKey, branch: &Branch) -> bool {
        self.held.get(key).is_some_and(|held| held.iter().any(|it| it.branch == *branch))
    }

    pub(crate) fn has_stored(&self, branch: &Branch) -> bool {
        self.ever.contains(branch)
    }

    /// What was committed of `key`.
    pub(crate) fn committed(&self, key: &TransactionKey) -> &[Branch] {
        self.committed.get(key).map_or(&[], Vec::as_slice)
    }

    fn insert(&mut self, it: InDoubt) {
        self.ever.insert(it.branch.clone());
        self.held.entry(it.key.clone()).or_default().push(it);
    }

    /// Whether it was there.
    fn remove(&mut self, key: &TransactionKey, branch: &Branch) -> bool {
        let Some(held) = self.held.get_mut(key) else { return false };
        let before = held.len();
        held.retain(|it| it.branch != *branch);
        let was_there = held.len() < before;
        if held.is_empty() {
            self.held.remove(key);
        }
        was_there
    }

    fn read(&self, key: &TransactionKey) -> Vec<InDoubt> {
        self.held.get(key).cloned().unwrap_or_default()
    }

    fn scan(&self) -> Vec<InDoubt> {
        self.held.values().flatten().cloned().collect()
    }
}

impl World {
    fn begin_call(&mut self, instance: usize, millis: u64, call: Call) {
        let incarnation = self.instances[instance].life.incarnation;
        self.after(millis, ScheduledEvent::CallEnds { instance, incarnation, call });
    }

    fn call_latency(&mut self, instance: usize) -> u64 {
        let service = self.instances[instance].service;
        let latency_max = self.services[service].plan.conduct.latency_max;
        self.rng.below(latency_max + 1)
    }

    pub(crate) fn call_prepare(
        &mut self,
        instance: usize,
        key: TransactionKey,
        branch: Branch,
        request_hash: RequestHash,
        deadline: Time,
    ) {
        self.instances[instance].working.insert(key.clone());
        let plan = &self.services[self.instances[instance].service].plan;
        let (conduct, in_memory) = (plan.conduct, plan.in_memory);
        let latency = self.call_latency(instance);
        let skew = self.instances[instance].skew;
        let gives_up_at = shifted(deadline, -skew);
        let given = gives_up_at.since(self.now).as_millis() as u64;
        let what = InDoubt { key: key.clone(), request_hash, branch: branch.clone(), deadline };
        let draw = self.rng.below(1000);
        let hangs = draw < conduct.hang || latency > given;
        let draw = draw.saturating_sub(conduct.hang);
        if hangs {
            let verdict = Verdict::Failed("time-out".into());
            let stored = self.rng.chance(300).then(|| what.clone());
            if stored.is_none() && !in_memory && self.rng.chance(300) {
                let late = given + self.rng.pick(&[1, 20, 1_000]);
                self.begin_call(instance, late, Call::StoreLate(what));
            }
            return self.begin_call(
                instance,
                given,
                Call::Prepare { stored, key, branch, verdict },
            );
        }
        let (verdict, stored) = if draw < conduct.refuse {
            (Verdict::Refused(None), None)
        } else if draw < conduct.refuse + conduct.fail {
            (Verdict::Failed("error".into()), self.rng.chance(500).then_some(what))
        } else if draw < conduct.refuse + conduct.fail + conduct.read_only {
            (Verdict::ReadOnly, None)
        } else {
            (Verdict::Prepared, Some(what))
        };
        self.begin_call(instance, latency, Call::Prepare { stored, key, branch, verdict });
    }

    pub(crate) fn call_commit(&mut self, instance: usize, key: TransactionKey, branch: Branch) {
        let service = &self.services[self.instances[instance].service];
        let is_there =
            service.store.holds(&key, &branch) || service.store.committed(&key).contains(&branch);
        let first = self.journal.first(&key).map(|first| &**first);
        let checked = agreement::committing(first, &key, &service.plan.name, &branch, is_there);
        self.check("agreement", checked);
        let Self { rng, services, instances, .. } = self;
        let service = &mut services[instances[instance].service];
        let conduct = service.plan.conduct;
        let failures = service.failures.entry(key.clone()).or_insert_with(|| {
            if rng.chance(conduct.commit_fails_for_good) {
                u32::MAX
            } else if rng.chance(conduct.commit_fails) {
                rng.between(1, 6) as u32
            } else {
                0
            }
        });
        let fails = *failures > 0;
        *failures = failures.saturating_sub(1);
        let latency = self.call_latency(instance);
        self.begin_call(instance, latency, Call::Commit { key, branch, fails });
    }

    pub(crate) fn call_abort(&mut self, instance: usize, key: TransactionKey, branch: Branch) {
        let service = &self.services[self.instances[instance].service];
        let first = self.journal.first(&key).map(|first| &**first);
        let checked = agreement::undoing(first, &key, &service.plan.name, &branch);
        let fails = service.plan.conduct.abort_fails;
        self.check("agreement", checked);
        let fails = self.rng.chance(fails);
        let latency = self.call_latency(instance);
        self.begin_call(instance, latency, Call::Abort { key, branch, fails });
    }

    /// The store's answer may be outdated when it arrives.
    pub(crate) fn read_store(&mut self, instance: usize, key: Option<TransactionKey>) {
        let store = &self.services[self.instances[instance].service].store;
        let is_old = self.rng.chance(500);
        let call = match key {
            Some(key) => {
                let held = is_old.then(|| store.read(&key));
                Call::ReadStore { key, held }
            }
            None => Call::ScanStore { held: is_old.then(|| store.scan()) },
        };
        let latency = self.call_latency(instance).min(10);
        self.begin_call(instance, latency, call);
    }

    pub(crate) fn look_up_commit(&mut self, instance: usize, key: TransactionKey, branch: Branch) {
        let latency = self.call_latency(instance).min(10);
        self.begin_call(instance, latency, Call::LookUpCommit { key, branch });
    }

    pub(crate) fn end_call(&mut self, instance: usize, incarnation: u32, call: Call) {
        let is_alive = self.instances[instance].life.incarnation == incarnation
            && self.is_instance_alive(instance);
        // The call may or may not have reached the store before the process died.
        if !is_alive && self.rng.chance(500) {
            return;
        }
        let index = self.instances[instance].service;
        let event = match call {
            Call::Prepare { stored, key, branch, verdict } => {
                if let Some(what) = stored {
                    tell!(self, "{} stores {branch} of {key}", self.services[index].plan.name);
                    self.services[index].store.insert(what);
                }
                if is_alive && matches!(verdict, Verdict::Refused(_) | Verdict::ReadOnly) {
                    self.instances[instance].working.remove(&key);
                }
                Event::PrepareEnded { key, branch, verdict }
            }
            Call::StoreLate(what) => {
                tell!(self, "{} stores {what:?} late", self.services[index].plan.name);
                self.services[index].store.insert(what);
                return;
            }
            Call::Commit { key, branch, fails } => {
                let applied = if fails { Err("no".into()) } else { Ok(()) };
                if !fails {
                    self.commit(index, &key, &branch);
                    self.leave(instance, is_alive, &key);
                    self.finished_for(&key, &branch);
                }
                Event::FinishEnded { key, branch, applied }
            }
            Call::Abort { key, branch, fails } => {
                let applied = if fails { Err("no".into()) } else { Ok(()) };
                if !fails {
                    tell!(self, "{} undoes {branch} of {key}", self.services[index].plan.name);
                    self.services[index].store.remove(&key, &branch);
                    self.leave(instance, is_alive, &key);
                    self.finished_for(&key, &branch);
                }
                Event::FinishEnded { key, branch, applied }
            }
            Call::ReadStore { key, held } => {
                let held = held.unwrap_or_else(|| self.services[index].store.read(&key));
                Event::StoreRead { key, held }
            }
            Call::LookUpCommit { key, branch } => {
                let store = &self.services[index].store;
                let is_known =
                    store.holds(&key, &branch) || store.committed(&key).contains(&branch);
                Event::CommitLookedUp { key, branch, is_known }
            }
            Call::ScanStore { held } => {
                let held = held.unwrap_or_else(|| self.services[index].store.scan());
                Event::StoreScanned(held)
            }
        };
        if is_alive {
            self.tell_instance(instance, event);
        }
    }

    fn leave(&mut self, instance: usize, is_alive: bool, key: &TransactionKey) {
        if is_alive {
            self.instances[instance].working.remove(key);
        }
    }

    /// Whichever instance has finished it: the instance that made the branch has no more work with
    /// it, and sees that in the store.
    fn finished_for(&mut self, key: &TransactionKey, branch: &Branch) {
        for node in self.instances.iter_mut().filter(|node| node.id == *branch.instance()) {
            node.working.remove(key);
        }
    }

    fn commit(&mut self, index: usize, key: &TransactionKey, branch: &Branch) {
        let service = &mut self.services[index];
        let was_there = service.store.remove(key, branch);
        let committed = service.store.committed.entry(key.clone()).or_default();
        if was_there && !committed.contains(branch) {
            committed.push(branch.clone());
        }
        let checked = executed_once::executed(key, &service.plan.name, committed);
        tell!(self, "{} commits {branch} of {key}", self.services[index].plan.name);
        self.check("executed_once", checked);
    }
}
