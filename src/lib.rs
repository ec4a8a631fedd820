//! A distributed transaction coordinator: every service commits, or none does.
//!
//! A producer names services and data. The coordinator asks every service to *prepare*, and then tells
//! all of them to *commit*, or all to *abort*: also when services fail, hang, or crash.
//!
//! # In one process
//!
//! [`run`] takes services and transactions and gives results. [`Embedded`] has the settings, and keeps
//! a [journal](Embedded::journal) in a file if it is to survive its process. A [`Service`] is made of
//! closures, or of a [`Participant`].
//!
//! ```
//! use dtc::{Service, Transaction, run};
//! use serde_json::json;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), dtc::RunError> {
//! let payments = Service::new("payments", 8)
//!     .prepare(|id, data| Ok(data["amount"].as_u64().is_some_and(|amount| amount < 1000)));
//! let order = Transaction::new("order-17", ["payments"], json!({"amount": 100}));
//!
//! let results = run([payments], [order]).await?;
//!
//! assert!(results[0].is_committed());
//! # Ok(())
//! # }
//! ```
//!
//! # On RabbitMQ
//!
//! Producers, services and workers are processes that meet at a broker. The command `dtc topology
//! apply` makes the exchanges and queues there. Each role has a builder, which takes the broker's URL
//! first and checks all that is set when it is used: what it can't use is an [`InvalidSetting`] that
//! names it.
//!
//! **A producer** submits transactions by a [`Client`]:
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use dtc::{Client, Transaction};
//! use serde_json::json;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::builder("amqp://localhost").namespace("shop").connect().await?;
//! let order = Transaction::new("order-17", ["payments"], json!({"amount": 100}));
//! let result = client.submit_and_wait(order, Duration::from_secs(30)).await?;
//! println!("{}: {}", result.id, result.outcome);
//! # Ok(())
//! # }
//! ```
//!
//! **A service** implements [`DurableParticipant`], and each of its processes serves one instance of
//! it by [`service`](service()):
//!
//! ```no_run
//! # use dtc::{BoxError, DurableParticipant, Finish, InDoubt, Participant, Prepare, TransactionKey};
//! # use dtc::Verdict;
//! # struct Payments;
//! # impl Participant for Payments {
//! #     async fn prepare(&self, _: Prepare) -> Result<Verdict, BoxError> { Ok(Verdict::Prepared) }
//! #     async fn commit(&self, _: Finish) -> Result<(), BoxError> { Ok(()) }
//! # }
//! # impl DurableParticipant for Payments {
//! #     async fn in_doubt(&self, _: Option<TransactionKey>) -> Result<Vec<InDoubt>, BoxError> {
//! #         Ok(Vec::new())
//! #     }
//! # }
//! # async fn example(payments: Payments) -> Result<(), Box<dyn std::error::Error>> {
//! dtc::service("amqp://localhost", "payments", payments)
//!     .namespace("shop")
//!     .max_concurrency(50)
//!     .serve_until(dtc::shutdown_signal())
//!     .await?;
//! # Ok(())
//! # }
//! ```
//!
//! **Workers** coordinate. The command `dtc worker` is one; [`Worker`] runs one in your own program:
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! dtc::Worker::builder("amqp://localhost")
//!     .namespace("shop")
//!     .run_until(dtc::shutdown_signal())
//!     .await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Features
//!
//! | feature | what it is for |
//! |---|---|
//! | `client` | submitting transactions: [`Client`] |
//! | `service` | running an instance of a service: [`service`](service()) |
//! | `worker` | running a worker in your own program: [`Worker`] |
//! | `embedded` | transactions in one process, without RabbitMQ: [`Embedded`] |
//! | `cli` | the `dtc` command, and all of the above; this is the default |
//!
//! A program names those that it uses, and compiles nothing of the others. A producer depends on
//! `dtc` with `default-features = false, features = ["client"]`.
//!
//! # What is promised
//!
//! What this documentation shows, and nothing else. The modules of this crate can be named by other
//! crates, since its own tests do that; they are not shown, and change from release to release.

// The layout, from the ground up; nothing imports from above itself.
//
// * `protocol`: the commit protocol as pure state machines.
// * `clock`: the one clock of a process. `error`: an error with all that caused it. `unique`: names that
//   nobody else has. `anomalies`: how what is unusual is logged. `readiness`: whether a process
//   serves. `shutdown`: the signals that end it. `setting`: why a setting can't be used.
// * `complaint`: what is wrong with what was read, where, and by which rule. `json`: reading JSON, with
//   a complaint for each value that is not as it should be.
// * `wire`: JSON as promised to others.
// * `transport`: moving messages, at least once. `journal`: the journal of one process. `transaction`:
//   what is asked of a coordinator, and what comes of it.
// * `worker`: what drives a coordinator on a broker. `participant`: the SDK for services. `client`: for
//   producers. `input`: the files of the `dtc` command.
// * `embedded`: both sides in one process. `simulated`: services that behave as services.json says.
// * `cli`: the `dtc` command.
//
// Beside the stairs stands `config`, which only `cli` knows.
//
// Nothing of a module is promised to anybody but what is named at the end: the face.

#[cfg(any(feature = "worker", feature = "embedded"))]
mod anomalies;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
#[cfg(feature = "client")]
#[doc(hidden)]
pub mod client;
#[doc(hidden)]
pub mod clock;
#[doc(hidden)]
pub mod complaint;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod config;
#[cfg(feature = "embedded")]
#[doc(hidden)]
pub mod embedded;
#[doc(hidden)]
pub mod error;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod input;
#[cfg(feature = "embedded")]
#[doc(hidden)]
pub mod journal;
mod json;
#[cfg(any(feature = "service", feature = "embedded"))]
#[doc(hidden)]
pub mod participant;
#[doc(hidden)]
pub mod protocol;
#[cfg(any(feature = "service", feature = "worker"))]
mod readiness;
#[cfg(feature = "amqp")]
mod setting;
#[cfg(any(feature = "service", feature = "worker"))]
mod shutdown;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod simulated;
#[cfg(any(feature = "client", feature = "embedded"))]
mod transaction;
#[doc(hidden)]
pub mod transport;
#[doc(hidden)]
pub mod unique;
#[doc(hidden)]
pub mod wire;
#[cfg(feature = "worker")]
#[doc(hidden)]
pub mod worker;

// ---- The face --------------------------------------------------------------------------------

#[cfg(feature = "client")]
pub use crate::client::{Client, ClientBuilder, ConnectError, SubmitError, WaitError};
#[cfg(any(feature = "service", feature = "embedded"))]
pub use crate::participant::{
    BoxError, DurableParticipant, Finish, InDoubt, Participant, Prepare, Verdict,
};
#[cfg(feature = "service")]
pub use crate::participant::{ServiceBuilder, error::ServeError, service};
pub use crate::protocol::{
    ids::{
        Branch, InstanceId, InvalidName, RequestHash, ServiceName, StoreId, TransactionId,
        TransactionKey,
    },
    message::{AnswerAt, Cap, Outcome, Reason, ReasonCode},
    time::{InvalidTime, Time},
};
#[cfg(feature = "amqp")]
pub use crate::setting::InvalidSetting;
#[cfg(any(feature = "client", feature = "embedded"))]
pub use crate::transaction::{InvalidTransaction, Transaction, TransactionResult};
#[cfg(feature = "amqp")]
pub use crate::transport::amqp::{
    error::BrokerError,
    tls::{Pem, Tls},
};
#[cfg(feature = "worker")]
pub use crate::worker::{Worker, WorkerBuilder, WorkerError, WorkerStats};
#[cfg(feature = "embedded")]
pub use crate::{
    embedded::{Embedded, InvalidService, RunError, run},
    journal::file::JournalError,
    participant::Service,
};
#[cfg(any(feature = "service", feature = "worker"))]
pub use crate::{readiness::Readiness, shutdown::shutdown_signal};
