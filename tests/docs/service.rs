//! The service of docs/services.md, compiled: what stands below the line is on the page, word for
//! word.

#![allow(dead_code, reason = "it is compiled, not run")]

use dtc::Branch;

/// Stands for a service author's database.
struct Store;

impl Store {
    async fn reserve(&self, call: &Prepare) -> Result<bool, BoxError> {
        Ok(std::future::ready(!call.json().is_empty()).await)
    }

    async fn commit(&self, _: &TransactionKey, _: &Branch) -> Result<(), BoxError> {
        std::future::ready(Ok(())).await
    }

    async fn release(&self, _: &TransactionKey, _: &Branch) -> Result<(), BoxError> {
        std::future::ready(Ok(())).await
    }

    async fn prepared(&self, _: Option<TransactionKey>) -> Result<Vec<InDoubt>, BoxError> {
        std::future::ready(Ok(Vec::new())).await
    }
}

// ---- docs/services.md ----

use dtc::{
    BoxError, DurableParticipant, Finish, InDoubt, Participant, Prepare, ServeError,
    TransactionKey, Verdict,
};

struct Payments {
    store: Store,
}

impl Participant for Payments {
    /// Stores whatever a commit needs, under `call.branch`, before it returns `Prepared`.
    async fn prepare(&self, call: Prepare) -> Result<Verdict, BoxError> {
        if !self.store.reserve(&call).await? {
            return Ok(Verdict::Refused(Some("not enough money".into())));
        }
        Ok(Verdict::Prepared)
    }

    /// Makes the branch permanent. A branch that is already committed, or unknown, is a success.
    async fn commit(&self, call: Finish) -> Result<(), BoxError> {
        self.store.commit(&call.key, &call.branch).await
    }

    /// Undoes the branch. An unknown branch is a success.
    async fn abort(&self, call: Finish) -> Result<(), BoxError> {
        self.store.release(&call.key, &call.branch).await
    }
}

impl DurableParticipant for Payments {
    /// Every prepared branch, other instances' too; of one transaction, if `of` names it.
    async fn in_doubt(&self, of: Option<TransactionKey>) -> Result<Vec<InDoubt>, BoxError> {
        self.store.prepared(of).await
    }
}

/// One instance, with 50 slots, until the process gets a signal to stop.
async fn payments(store: Store) -> Result<(), ServeError> {
    dtc::service("amqp://localhost", "payments", Payments { store })
        .namespace("shop")
        .max_concurrency(50)
        .serve_until(dtc::shutdown_signal())
        .await
}
