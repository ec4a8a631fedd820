//! The service of docs/services.md, compiled: what stands below the line is on the page, word for
//! word.

#![allow(dead_code, reason = "it is compiled, not run")]

use dtc::protocol::ids::Branch;

/// What stands for a service author's database.
struct Store;

impl Store {
    async fn reserve(&self, call: &Prepare) -> Result<bool, Error> {
        Ok(std::future::ready(!call.json().is_empty()).await)
    }

    async fn commit(&self, _: &TransactionKey, _: &Branch) -> Result<(), Error> {
        std::future::ready(Ok(())).await
    }

    async fn release(&self, _: &TransactionKey, _: &Branch) -> Result<(), Error> {
        std::future::ready(Ok(())).await
    }

    async fn prepared(&self, _: Option<TransactionKey>) -> Result<Vec<InDoubt>, Error> {
        std::future::ready(Ok(Vec::new())).await
    }
}

// ---- docs/services.md ----

use dtc::{
    Broker, DurableParticipant, Names, Namespace, Participant, ServeSettings, Verdict,
    participant::{Error, Finish, InDoubt, Prepare},
    protocol::ids::{ServiceName, TransactionKey},
    serve,
};

struct Payments {
    store: Store,
}

impl Participant for Payments {
    /// Stores whatever a commit needs, under `call.branch`, before it returns `Prepared`.
    async fn prepare(&self, call: Prepare) -> Result<Verdict, Error> {
        if !self.store.reserve(&call).await? {
            return Ok(Verdict::Refused(Some("not enough money".into())));
        }
        Ok(Verdict::Prepared)
    }

    /// Makes the branch permanent. A branch that is already committed, or unknown, is a success.
    async fn commit(&self, call: Finish) -> Result<(), Error> {
        self.store.commit(&call.key, &call.branch).await
    }

    /// Undoes the branch. An unknown branch is a success.
    async fn abort(&self, call: Finish) -> Result<(), Error> {
        self.store.release(&call.key, &call.branch).await
    }
}

impl DurableParticipant for Payments {
    /// Every prepared branch, other instances' too; of one transaction, if `of` names it.
    async fn in_doubt(&self, of: Option<TransactionKey>) -> Result<Vec<InDoubt>, Error> {
        self.store.prepared(of).await
    }
}

/// One instance, with 50 slots, until `stop` is ready.
async fn payments(
    store: Store,
    broker: Broker,
    stop: impl Future<Output = ()>,
) -> Result<(), Box<dyn std::error::Error>> {
    let names = Names::new(Namespace::default());
    let settings = ServeSettings::new(broker, names, ServiceName::parse("payments")?, 50);
    serve(Payments { store }, settings, stop).await?;
    Ok(())
}
