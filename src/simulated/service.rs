//! A service that does nothing but behave as it is told: for trying things out.
//!
//! Whether a call succeeds depends on the seed, the service, the transaction and how often it was
//! called for it, and on nothing else: a run repeats itself however its calls fall.
//!
//! Calls are counted by each instance for itself, so what depends on how often something was called
//! (`fail_first`, and the rates) begins anew where another instance takes over.

use std::{
    collections::BTreeMap,
    panic::resume_unwind,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use crate::{
    input::services::{Behaviour, Latency, ServiceSpec},
    participant::{Error, Finish, InDoubt, Participant, Prepare, Verdict},
    protocol::{
        ids::{ServiceName, StoreId, TransactionId, TransactionKey, fnv1a},
        message::Outcome,
    },
    simulated::store::SimulatedStore,
};

/// Of how many transactions the calls are counted. More are over, or finished by other instances.
const COUNTED_MAX: usize = 65_536;

/// A service as services.json describes it.
#[derive(Debug)]
pub struct Simulated {
    name: ServiceName,
    prepare: Behaviour,
    commit: Behaviour,
    abort: Behaviour,
    seed: u64,
    /// How often each call was made for each transaction that is not over.
    attempts: Mutex<BTreeMap<TransactionId, [u32; 3]>>,
    /// What it holds. Without it, it holds nothing that could be asked for.
    store: Option<SimulatedStore>,
}

#[derive(Clone, Copy)]
enum Call {
    Prepare,
    Commit,
    Abort,
}

enum Ending {
    Success,
    Refusal,
    Error,
    Panic,
    Hang,
}

impl Simulated {
    /// The service that `spec` describes; runs with the same `seed` repeat each other.
    pub fn new(spec: &ServiceSpec, seed: u64) -> Self {
        Self {
            name: spec.name.clone(),
            prepare: spec.prepare.clone(),
            commit: spec.commit.clone(),
            abort: spec.abort.clone(),
            seed,
            attempts: Mutex::new(BTreeMap::new()),
            store: None,
        }
    }

    /// The same, holding what it prepares in `store`.
    #[must_use]
    pub fn with_store(mut self, store: SimulatedStore) -> Self {
        self.store = Some(store);
        self
    }

    fn is_trivial(&self) -> bool {
        let trivial = Behaviour::default();
        [&self.prepare, &self.commit, &self.abort].iter().all(|behaviour| **behaviour == trivial)
    }

    /// How often `call` has now been made for this transaction.
    fn count(&self, id: &TransactionId, call: Call) -> u32 {
        let mut attempts = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
        if attempts.len() >= COUNTED_MAX && !attempts.contains_key(id) {
            attempts.pop_first();
        }
        let attempt = &mut attempts.entry(id.clone()).or_default()[call as usize];
        *attempt = attempt.saturating_add(1);
        *attempt
    }

    /// The transaction is over here.
    fn forget(&self, id: &TransactionId) {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    async fn behave(&self, behaviour: &Behaviour, id: &TransactionId, call: Call) -> Ending {
        let attempt = self.count(id, call);
        let mut dice = Dice::new(self.seed, &self.name, id, call, attempt);
        let latency = dice.between(behaviour.latency);
        let ending = ending(behaviour, id, attempt, dice.unit());
        if latency > Duration::ZERO {
            tokio::time::sleep(latency).await;
        }
        match ending {
            Ending::Hang => std::future::pending().await,
            // Without the panic hook: this one is no surprise.
            Ending::Panic => resume_unwind(Box::new("simulated")),
            Ending::Success | Ending::Refusal | Ending::Error => ending,
        }
    }

    /// What the code of a prepare does, and what it is to be counted as.
    async fn decide(&self, call: &Prepare) -> Result<Verdict, Error> {
        if self.is_trivial() {
            return Ok(Verdict::Prepared);
        }
        let id = &call.key.id;
        match self.behave(&self.prepare, id, Call::Prepare).await {
            Ending::Error => Err("simulated error".into()),
            Ending::Refusal => {
                self.forget(id);
                Ok(Verdict::Refused(Some("simulated refusal".into())))
            }
            Ending::Success if self.prepare.read_only => {
                self.forget(id);
                Ok(Verdict::ReadOnly)
            }
            Ending::Success | Ending::Panic | Ending::Hang => Ok(Verdict::Prepared),
        }
    }

    async fn finish(&self, call: Finish, kind: Call) -> Result<(), Error> {
        let Some(store) = &self.store else { return self.finish_code(&call, kind).await };
        let (name, outcome) = match kind {
            Call::Prepare | Call::Commit => ("commit", Outcome::Committed),
            Call::Abort => ("abort", Outcome::Aborted),
        };
        let called = store.called(name, &call.key, &call.branch)?;
        let mut ended = self.finish_code(&call, kind).await;
        if ended.is_ok() {
            ended = store.finish(&call, outcome).await.map_err(Error::from);
        }
        called.ended(if ended.is_ok() { "done" } else { "failed" });
        ended
    }

    async fn finish_code(&self, call: &Finish, kind: Call) -> Result<(), Error> {
        if self.is_trivial() {
            return Ok(());
        }
        let behaviour = match kind {
            Call::Prepare | Call::Commit => &self.commit,
            Call::Abort => &self.abort,
        };
        match self.behave(behaviour, &call.key.id, kind).await {
            Ending::Error => Err("simulated error".into()),
            Ending::Success | Ending::Refusal | Ending::Panic | Ending::Hang => {
                self.forget(&call.key.id);
                Ok(())
            }
        }
    }
}

fn ending(behaviour: &Behaviour, id: &TransactionId, attempt: u32, draw: f64) -> Ending {
    if attempt <= behaviour.fail_first || behaviour.fail_for.contains(id) {
        return Ending::Error;
    }
    let rates = [
        (behaviour.refuse_rate, Ending::Refusal),
        (behaviour.error_rate, Ending::Error),
        (behaviour.panic_rate, Ending::Panic),
        (behaviour.hang_rate, Ending::Hang),
    ];
    let mut bound = 0.0;
    for (rate, ending) in rates {
        bound += rate;
        if draw < bound {
            return ending;
        }
    }
    Ending::Success
}

/// A verdict in one word.
fn word(verdict: &Result<Verdict, Error>) -> &'static str {
    match verdict {
        Ok(Verdict::Prepared) => "prepared",
        Ok(Verdict::ReadOnly) => "read_only",
        Ok(Verdict::Refused(_)) => "refused",
        Ok(Verdict::Failed(_)) | Err(_) => "failed",
    }
}

impl Participant for Simulated {
    async fn prepare(&self, call: Prepare) -> Result<Verdict, Error> {
        let Some(store) = &self.store else { return self.decide(&call).await };
        let called = store.called("prepare", &call.key, &call.branch)?;
        let mut verdict = self.decide(&call).await;
        if let Ok(Verdict::Prepared) = verdict
            && let Err(error) = store.prepare(&call)
        {
            verdict = Err(error.into());
        }
        called.ended(word(&verdict));
        verdict
    }

    async fn commit(&self, call: Finish) -> Result<(), Error> {
        self.finish(call, Call::Commit).await
    }

    async fn abort(&self, call: Finish) -> Result<(), Error> {
        self.finish(call, Call::Abort).await
    }

    fn has_store(&self) -> bool {
        self.store.is_some()
    }

    async fn store_id(&self) -> Result<Option<StoreId>, Error> {
        Ok(self.store.as_ref().and_then(SimulatedStore::id).cloned())
    }

    fn remembers_commits(&self) -> bool {
        self.store.as_ref().is_some_and(SimulatedStore::remembers_commits)
    }

    async fn has_committed(&self, call: Finish) -> Result<bool, Error> {
        let committed = self.store.as_ref().map(|store| store.has_committed(&call));
        Ok(committed.transpose()?.unwrap_or(true))
    }

    async fn in_doubt(&self, of: Option<TransactionKey>) -> Result<Vec<InDoubt>, Error> {
        let held = self.store.as_ref().map(|store| store.in_doubt(of.as_ref()));
        Ok(held.transpose()?.unwrap_or_default())
    }
}

/// Numbers that look random and are the same for the same call.
struct Dice(u64);

impl Dice {
    fn new(seed: u64, service: &ServiceName, id: &TransactionId, call: Call, attempt: u32) -> Self {
        let numbers = [seed, call as u64, u64::from(attempt)];
        let bytes = numbers.iter().flat_map(|number| number.to_le_bytes());
        let names = service.as_str().bytes().chain([0]).chain(id.as_str().bytes());
        // FNV-1a gathers, SplitMix64 (below) scatters.
        Self(fnv1a(bytes.chain(names)))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 up to, and without, 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn between(&mut self, Latency { min, max }: Latency) -> Duration {
        min + max.saturating_sub(min).mul_f64(self.unit())
    }
}
