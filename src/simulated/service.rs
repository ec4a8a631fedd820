//! A service that behaves as services.json says, and keeps what it prepares.

use crate::{
    input::services::ServiceSpec,
    participant::{Error, Finish, InDoubt, Participant, Prepare, Verdict},
    protocol::{
        ids::{StoreId, TransactionKey},
        message::Outcome,
    },
    simulated::{
        behaviour::{Behaviours, Call, CallEnding},
        store::SimulatedStore,
    },
};

/// A service as services.json describes it.
#[derive(Debug)]
pub struct Simulated {
    behaviours: Behaviours,
    /// Its state. Without it, it has nothing that it could report as in doubt.
    store: Option<SimulatedStore>,
}

impl Simulated {
    /// The service that `spec` describes; runs with the same `seed` repeat each other.
    pub fn new(spec: &ServiceSpec, seed: u64) -> Self {
        Self { behaviours: Behaviours::new(spec, seed), store: None }
    }

    /// The same, with `store` as its state.
    #[must_use]
    pub fn with_store(mut self, store: SimulatedStore) -> Self {
        self.store = Some(store);
        self
    }

    /// Runs the code of a prepare; returns its verdict.
    async fn decide(&self, call: &Prepare) -> Result<Verdict, Error> {
        let (behaviours, id) = (&self.behaviours, &call.key.id);
        if behaviours.is_trivial() {
            return Ok(Verdict::Prepared);
        }
        match behaviours.behave(id, Call::Prepare).await {
            CallEnding::Error => Err("simulated error".into()),
            CallEnding::Refusal => {
                behaviours.forget(id);
                Ok(Verdict::Refused(Some("simulated refusal".into())))
            }
            CallEnding::Success if behaviours.is_read_only() => {
                behaviours.forget(id);
                Ok(Verdict::ReadOnly)
            }
            CallEnding::Success | CallEnding::Panic | CallEnding::Hang => Ok(Verdict::Prepared),
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
        let (behaviours, id) = (&self.behaviours, &call.key.id);
        if behaviours.is_trivial() {
            return Ok(());
        }
        match behaviours.behave(id, kind).await {
            CallEnding::Error => Err("simulated error".into()),
            CallEnding::Success | CallEnding::Refusal | CallEnding::Panic | CallEnding::Hang => {
                behaviours.forget(id);
                Ok(())
            }
        }
    }
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
