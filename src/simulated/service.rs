//! A service that behaves as services.json says, and keeps what it prepares.

use crate::{
    input::services::ServiceSpec,
    participant::{BoxError, DurableParticipant, Finish, InDoubt, Participant, Prepare, Verdict},
    protocol::{
        ids::{StoreId, TransactionKey},
        message::Outcome,
    },
    simulated::{
        behaviour::{Behaviours, Call, CallEnding},
        store::SimulatedStore,
    },
};

/// A service as services.json describes it. It holds nothing that could be asked for.
#[derive(Debug)]
pub struct Simulated {
    behaviours: Behaviours,
}

impl Simulated {
    /// The service that `spec` describes; runs with the same `seed` repeat each other.
    pub fn new(spec: &ServiceSpec, seed: u64) -> Self {
        Self { behaviours: Behaviours::new(spec, seed) }
    }

    /// The same, with `store` as its state.
    pub fn with_store(self, store: SimulatedStore) -> Stored {
        Stored { service: self, store }
    }

    /// Runs the code of a prepare; returns its verdict.
    async fn decide(&self, call: &Prepare) -> Result<Verdict, BoxError> {
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

    async fn finish_code(&self, call: &Finish, kind: Call) -> Result<(), BoxError> {
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
fn word(verdict: &Result<Verdict, BoxError>) -> &'static str {
    match verdict {
        Ok(Verdict::Prepared) => "prepared",
        Ok(Verdict::ReadOnly) => "read_only",
        Ok(Verdict::Refused(_)) => "refused",
        Ok(Verdict::Failed(_)) | Err(_) => "failed",
    }
}

impl Participant for Simulated {
    async fn prepare(&self, call: Prepare) -> Result<Verdict, BoxError> {
        self.decide(&call).await
    }

    async fn commit(&self, call: Finish) -> Result<(), BoxError> {
        self.finish_code(&call, Call::Commit).await
    }

    async fn abort(&self, call: Finish) -> Result<(), BoxError> {
        self.finish_code(&call, Call::Abort).await
    }
}

/// The same with a store.
#[derive(Debug)]
pub struct Stored {
    service: Simulated,
    store: SimulatedStore,
}

impl Stored {
    async fn finish(&self, call: Finish, kind: Call) -> Result<(), BoxError> {
        let (name, outcome) = match kind {
            Call::Prepare | Call::Commit => ("commit", Outcome::Committed),
            Call::Abort => ("abort", Outcome::Aborted),
        };
        let called = self.store.called(name, &call.key, &call.branch)?;
        let mut ended = self.service.finish_code(&call, kind).await;
        if ended.is_ok() {
            ended = self.store.finish(&call, outcome).await.map_err(BoxError::from);
        }
        called.ended(if ended.is_ok() { "done" } else { "failed" });
        ended
    }
}

impl Participant for Stored {
    async fn prepare(&self, call: Prepare) -> Result<Verdict, BoxError> {
        let called = self.store.called("prepare", &call.key, &call.branch)?;
        let mut verdict = self.service.decide(&call).await;
        if let Ok(Verdict::Prepared) = verdict
            && let Err(error) = self.store.prepare(&call)
        {
            verdict = Err(error.into());
        }
        called.ended(word(&verdict));
        verdict
    }

    async fn commit(&self, call: Finish) -> Result<(), BoxError> {
        self.finish(call, Call::Commit).await
    }

    async fn abort(&self, call: Finish) -> Result<(), BoxError> {
        self.finish(call, Call::Abort).await
    }
}

impl DurableParticipant for Stored {
    async fn in_doubt(&self, of: Option<TransactionKey>) -> Result<Vec<InDoubt>, BoxError> {
        Ok(self.store.in_doubt(of.as_ref())?)
    }

    async fn store_id(&self) -> Result<Option<StoreId>, BoxError> {
        Ok(self.store.id().cloned())
    }

    async fn has_committed(&self, call: Finish) -> Result<Option<bool>, BoxError> {
        Ok(self.store.has_committed(&call)?)
    }
}
