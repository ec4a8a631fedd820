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
//! * Producers: [`Client`] takes a [`Submission`] to the workers and brings back how it ended.
//! * Services: [`serve`] runs one instance of a [`Participant`], as [`ServeSettings`] say.
//! * Workers: [`worker::run`], which is what `dtc worker` does.
//!
//! All of them are told where the [`Broker`] is, and by which [`Names`] to go there; [`Tls`] is
//! whom to trust on the way.
//!
//! # Layout
//!
//! From the ground up; nothing imports from above itself.
//!
//! * [`protocol`]: the commit protocol as pure state machines.
//! * [`clock`]: the one clock of a process. [`error`]: an error with all that caused it. [`unique`]:
//!   names that nobody else has.
//! * [`complaint`]: what is wrong with what was read, where, and by which rule. `json`: reading JSON,
//!   with a complaint for each value that is not as it should be.
//! * [`wire`]: JSON as promised to others.
//! * [`transport`]: moving messages, at least once. [`journal`]: the journal of one process.
//! * [`worker`]: what drives a coordinator on a broker.
//! * [`participant`]: the SDK for services.
//! * [`client`]: for producers.
//! * [`input`]: the files of the `dtc` command.
//! * [`embedded`]: both sides in one process.
//! * [`simulated`]: services that behave as services.json says.
//! * [`cli`]: the `dtc` command.
//!
//! Beside the stairs stands [`config`](mod@config), which only [`cli`] knows.

mod anomalies;
pub mod cli;
pub mod client;
pub mod clock;
pub mod complaint;
pub mod config;
pub mod embedded;
pub mod error;
pub mod input;
pub mod journal;
mod json;
pub mod participant;
pub mod protocol;
pub mod simulated;
pub mod transport;
pub mod unique;
pub mod wire;
pub mod worker;

pub use crate::{
    client::{Client, Submission},
    embedded::{
        Embedded, InvalidService, InvalidTransaction, RunError, Transaction, TransactionResult, run,
    },
    journal::file::JournalError,
    participant::{Participant, Service, Verdict, serve::serve, settings::ServeSettings},
    protocol::message::{Outcome, Reason, ReasonCode},
    transport::amqp::{
        connection::Broker,
        names::{Names, Namespace},
        tls::{Identity, Pem, Tls},
    },
};
