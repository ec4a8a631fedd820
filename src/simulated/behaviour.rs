//! How, and after how long, the calls of a simulated service end.
//!
//! Whether a call succeeds depends only on the seed, the service, the transaction and the number of
//! earlier calls for it: a run gives the same results in whatever order its calls happen.
//!
//! Each instance counts its own calls, so what depends on that number (`fail_first`, and the rates)
//! starts again when another instance takes over.

use std::{
    collections::BTreeMap,
    panic::resume_unwind,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use crate::{
    input::services::{Behaviour, Latency, ServiceSpec},
    protocol::ids::{ServiceName, TransactionId, fnv1a},
};

/// For how many transactions calls are counted. Older ones are finished, or other instances finish
/// them.
const COUNTED_MAX: usize = 65_536;

/// The behaviour of a service, as services.json describes it.
#[derive(Debug)]
pub(super) struct Behaviours {
    name: ServiceName,
    prepare: Behaviour,
    commit: Behaviour,
    abort: Behaviour,
    seed: u64,
    /// How often each call was made for each unfinished transaction.
    attempts: Mutex<BTreeMap<TransactionId, [u32; 3]>>,
}

#[derive(Clone, Copy)]
pub(super) enum Call {
    Prepare,
    Commit,
    Abort,
}

pub(super) enum CallEnding {
    Success,
    Refusal,
    Error,
    Panic,
    Hang,
}

impl Behaviours {
    pub(super) fn new(spec: &ServiceSpec, seed: u64) -> Self {
        Self {
            name: spec.name.clone(),
            prepare: spec.prepare.clone(),
            commit: spec.commit.clone(),
            abort: spec.abort.clone(),
            seed,
            attempts: Mutex::new(BTreeMap::new()),
        }
    }

    /// Whether every call succeeds at once.
    pub(super) fn is_trivial(&self) -> bool {
        let trivial = Behaviour::default();
        [&self.prepare, &self.commit, &self.abort].iter().all(|behaviour| **behaviour == trivial)
    }

    /// Whether a successful prepare votes that there is nothing to commit.
    pub(super) fn is_read_only(&self) -> bool {
        self.prepare.read_only
    }

    /// How often `call` has been made for this transaction, including this time.
    fn count(&self, id: &TransactionId, call: Call) -> u32 {
        let mut attempts = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
        if attempts.len() >= COUNTED_MAX && !attempts.contains_key(id) {
            attempts.pop_first();
        }
        let attempt = &mut attempts.entry(id.clone()).or_default()[call as usize];
        *attempt = attempt.saturating_add(1);
        *attempt
    }

    /// Forgets a transaction that is finished here.
    pub(super) fn forget(&self, id: &TransactionId) {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    /// Waits as long as `call` should take for this transaction, and returns how it ends.
    pub(super) async fn behave(&self, id: &TransactionId, call: Call) -> CallEnding {
        let behaviour = match call {
            Call::Prepare => &self.prepare,
            Call::Commit => &self.commit,
            Call::Abort => &self.abort,
        };
        let attempt = self.count(id, call);
        let mut dice = Dice::new(self.seed, &self.name, id, call, attempt);
        let latency = dice.between(behaviour.latency);
        let ending = ending(behaviour, id, attempt, dice.unit());
        if latency > Duration::ZERO {
            tokio::time::sleep(latency).await;
        }
        match ending {
            CallEnding::Hang => std::future::pending().await,
            // Without the panic hook: this panic is intended.
            CallEnding::Panic => resume_unwind(Box::new("simulated")),
            CallEnding::Success | CallEnding::Refusal | CallEnding::Error => ending,
        }
    }
}

fn ending(behaviour: &Behaviour, id: &TransactionId, attempt: u32, draw: f64) -> CallEnding {
    if attempt <= behaviour.fail_first || behaviour.fail_for.contains(id) {
        return CallEnding::Error;
    }
    let rates = [
        (behaviour.refuse_rate, CallEnding::Refusal),
        (behaviour.error_rate, CallEnding::Error),
        (behaviour.panic_rate, CallEnding::Panic),
        (behaviour.hang_rate, CallEnding::Hang),
    ];
    let mut bound = 0.0;
    for (rate, ending) in rates {
        bound += rate;
        if draw < bound {
            return ending;
        }
    }
    CallEnding::Success
}

/// Pseudo-random numbers that are the same for the same call.
struct Dice(u64);

impl Dice {
    fn new(seed: u64, service: &ServiceName, id: &TransactionId, call: Call, attempt: u32) -> Self {
        let numbers = [seed, call as u64, u64::from(attempt)];
        let bytes = numbers.iter().flat_map(|number| number.to_le_bytes());
        let names = service.as_str().bytes().chain([0]).chain(id.as_str().bytes());
        // FNV-1a combines, SplitMix64 (below) mixes.
        Self(fnv1a(bytes.chain(names)))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 (included) to 1 (excluded).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn between(&mut self, Latency { min, max }: Latency) -> Duration {
        min + max.saturating_sub(min).mul_f64(self.unit())
    }
}
