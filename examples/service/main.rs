//! A service with a store of its own, which is a file.
//!
//! It requires RabbitMQ with the topology, and a worker: see `worker.rs`. The orders of `producer.rs` are
//! for two of these:
//!
//! ```text
//! $ cargo run --example service -- payments
//! payments has 1000 left, and nothing in doubt
//! payments serves
//! $ cargo run --example service -- stock
//! stock has 1000 left, and nothing in doubt
//! stock serves
//! ```
//!
//! It may be killed at any moment. Started again it says what it holds in doubt, asks the workers what
//! became of that, and does what they answer:
//!
//! ```text
//! $ cargo run --example service -- payments
//! payments has 900 left, and is in doubt about order-4711@1764497314000
//! payments serves
//! ```
//!
//! `DTC__BROKER__URL` and `DTC__BROKER__NAMESPACE` say where the broker is, as for the `dtc` command.
//! A program of one's own needs the feature `service` alone.

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

mod store;

use std::{
    env,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use dtc::{
    BoxError, DurableParticipant, Finish, InDoubt, Participant, Prepare, Readiness, ServiceName,
    TransactionKey, Verdict,
};
use store::Store;

struct Account(Mutex<Store>);

impl Account {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Participant for Account {
    async fn prepare(&self, call: Prepare) -> Result<Verdict, BoxError> {
        let data: serde_json::Value = call.data()?;
        let amount = data["amount"].as_u64().ok_or("the amount is not a number")?;
        Ok(match self.store().reserve(&call, amount)? {
            true => Verdict::Prepared,
            false => Verdict::Refused(Some("there is not enough left".into())),
        })
    }

    async fn commit(&self, call: Finish) -> Result<(), BoxError> {
        self.store().commit(&call.branch)
    }

    async fn abort(&self, call: Finish) -> Result<(), BoxError> {
        self.store().abort(&call.branch)
    }
}

impl DurableParticipant for Account {
    async fn in_doubt(&self, of: Option<TransactionKey>) -> Result<Vec<InDoubt>, BoxError> {
        let is_wanted = |held: &&InDoubt| of.as_ref().is_none_or(|key| held.key == *key);
        Ok(self.store().in_doubt().filter(is_wanted).cloned().collect())
    }
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let name: ServiceName = env::args().nth(1).ok_or("usage: service NAME")?.parse()?;
    let url = env::var("DTC__BROKER__URL").unwrap_or_else(|_| "amqp://localhost".to_owned());
    let namespace = env::var("DTC__BROKER__NAMESPACE").unwrap_or_else(|_| "dtc".to_owned());

    let store = Store::open(Path::new(&format!("{name}.store")))?;
    let in_doubt: Vec<_> = store.in_doubt().map(|held| held.key.to_string()).collect();
    match in_doubt.is_empty() {
        true => println!("{name} has {} left, and nothing in doubt", store.left()),
        false => println!(
            "{name} has {} left, and is in doubt about {}",
            store.left(),
            in_doubt.join(", ")
        ),
    }

    let readiness = Readiness::new();
    let service = dtc::service(url, name.as_str(), Account(Mutex::new(store)))
        .namespace(namespace)
        .max_concurrency(8)
        // In development the service declares its own queues, which else `dtc topology apply` does.
        .declare(Duration::from_secs(1))
        .readiness(&readiness);
    tokio::spawn(async move {
        readiness.ready().await;
        println!("{name} serves");
    });
    service.serve_until(dtc::shutdown_signal()).await?;
    Ok(())
}
