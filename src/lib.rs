//! A distributed transaction coordinator: every service commits, or none does.
//!
//! # Running transactions in one process
//!
//! [`run`] takes services and transactions and gives results; [`Embedded`] has the settings, and
//! keeps its [journal](Embedded::journal) in a file if it is to survive its process.
//! [`Service`] makes a service of closures, [`Participant`] is what a larger one implements.
//!
//! # On RabbitMQ
//!
//! * Producers: [`Client`] takes a [`Transaction`] to the workers and brings back how it ended.
//! * Services: [`service`](service()) serves one instance of a [`DurableParticipant`].
//! * Workers: [`worker::run`], which is what `dtc worker` does.
//!
//! All of them are told where the [`Broker`] is, and by which [`Names`] to go there; [`Tls`] is
//! whom to trust on the way.
//!
//! # Features
//!
//! | feature | what it is for |
//! |---|---|
//! | `client` | submitting transactions: [`Client`] |
//! | `service` | running an instance of a service: [`service`](service()) |
//! | `worker` | running a worker in a program of one's own: [`worker::run`] |
//! | `embedded` | transactions in one process, without RabbitMQ: [`Embedded`] |
//! | `cli` | the `dtc` command, and all of the above; this is the default |
//!
//! A program names those that it uses, and compiles nothing of the others. A producer depends on
//! `dtc` with `default-features = false, features = ["client"]`.
//!
//! # Layout
//!
//! From the ground up; nothing imports from above itself.
//!
//! * [`protocol`]: the commit protocol as pure state machines.
//! * [`clock`]: the one clock of a process. [`error`]: an error with all that caused it. [`unique`]:
//!   names that nobody else has. `anomalies`: how what is unusual is logged. `readiness`: whether a
//!   process is of use. `shutdown`: when it is to end. `setting`: what is wrong with what is set.
//! * [`complaint`]: what is wrong with what was read, where, and by which rule. `json`: reading JSON,
//!   with a complaint for each value that is not as it should be.
//! * [`wire`]: JSON as promised to others.
//! * [`transport`]: moving messages, at least once. [`journal`]: the journal of one process.
//!   `transaction`: what is asked of a coordinator, and what comes of it.
//! * [`worker`]: what drives a coordinator on a broker.
//! * [`participant`]: the SDK for services.
//! * [`client`]: for producers.
//! * `input`: the files of the `dtc` command.
//! * [`embedded`]: both sides in one process.
//! * `simulated`: services that behave as services.json says.
//! * `cli`: the `dtc` command.
//!
//! Beside the stairs stands `config`, which only `cli` knows. Neither is meant for other programs.

#[cfg(any(feature = "worker", feature = "embedded"))]
mod anomalies;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
#[cfg(feature = "client")]
pub mod client;
pub mod clock;
pub mod complaint;
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod config;
#[cfg(feature = "embedded")]
pub mod embedded;
pub mod error;
#[cfg(feature = "cli")]
pub mod input;
#[cfg(feature = "embedded")]
pub mod journal;
mod json;
#[cfg(any(feature = "service", feature = "embedded"))]
pub mod participant;
pub mod protocol;
#[cfg(any(feature = "service", feature = "worker"))]
mod readiness;
#[cfg(feature = "amqp")]
mod setting;
#[cfg(any(feature = "service", feature = "worker"))]
mod shutdown;
#[cfg(feature = "cli")]
pub mod simulated;
#[cfg(any(feature = "client", feature = "embedded"))]
mod transaction;
pub mod transport;
pub mod unique;
pub mod wire;
#[cfg(feature = "worker")]
pub mod worker;

#[cfg(feature = "client")]
pub use crate::client::{Client, ClientBuilder, ConnectError, SubmitError, WaitError};
#[cfg(any(feature = "service", feature = "embedded"))]
pub use crate::participant::{
    BoxError, DurableParticipant, Finish, InDoubt, Participant, Prepare, Verdict,
};
#[cfg(feature = "service")]
pub use crate::participant::{ServiceBuilder, error::ServeError, service};
pub use crate::protocol::{
    ids::{Branch, InvalidName, RequestHash, ServiceName, TransactionKey},
    message::{Outcome, Reason, ReasonCode},
    time::Time,
};
#[cfg(feature = "amqp")]
pub use crate::setting::InvalidSetting;
#[cfg(any(feature = "client", feature = "embedded"))]
pub use crate::transaction::{InvalidTransaction, Transaction, TransactionResult};
#[cfg(feature = "amqp")]
pub use crate::transport::amqp::{
    connection::Broker,
    error::BrokerError,
    names::{Names, Namespace},
    tls::{Pem, Tls},
};
#[cfg(feature = "worker")]
pub use crate::worker::{Tally, Worker, WorkerBuilder, WorkerError};
#[cfg(feature = "embedded")]
pub use crate::{
    embedded::{Embedded, InvalidService, RunError, run},
    journal::file::JournalError,
    participant::Service,
};
#[cfg(any(feature = "service", feature = "worker"))]
pub use crate::{readiness::Readiness, shutdown::shutdown_signal};
