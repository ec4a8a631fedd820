//! The transport over RabbitMQ.
//!
//! * [`address`]: the brokers' addresses, and how a process authenticates to them.
//! * [`agreed_value`]: a value that all instances of a service must agree on.
//! * [`bounded`]: requests to the broker with a time limit.
//! * [`connection`]: connecting and reconnecting.
//! * [`connection_pair`]: the two connections of a process that publishes and consumes.
//! * [`consumer`]: consuming, and acknowledging in as few frames as possible.
//! * [`error`]: the meaning of a failure.
//! * [`exclusive_queue`]: the exclusive queue of one connection, which proves that its link is
//!   alive.
//! * [`frames`]: screening the broker's frames before lapin parses them.
//! * [`names`]: the names of exchanges and queues.
//! * `options`: what a program sets about the broker, and its check.
//! * [`pool`]: shared channels.
//! * [`publisher`]: publishing with confirms, each with a time limit.
//! * [`queue_lookup`]: repeated lookups of whether queues exist.
//! * [`rejected`]: setting aside messages that can't be read.
//! * [`reliable`]: publishing messages that must not be lost.
//! * `screened_stream`: the byte stream that lapin reads.
//! * [`stream`]: reading a stream up to its end.
//! * [`supervisor`]: when to reconnect, and when to give up.
//! * [`tls`]: the CAs to trust over `amqps://`, and the client certificate.
//! * [`topology`]: every exchange and queue, and declaring them at a broker.
//! * [`traffic`]: how many messages were published and delivered.
//!
//! Nothing here knows the protocol: the floors above decide what a message contains, and what
//! follows from it.
//!
//! **Invariant:** every wait for the broker has a time limit: for an answer ([`bounded`]), a
//! confirm ([`publisher`]), a delivery ([`exclusive_queue`], and the watch of [`consumer`]), the
//! end of an alarm ([`connection_pair`]). After it, the channel or the connection is opened again.
//!
//! **Invariant:** a publish doesn't count before the broker has confirmed it, and one that was
//! returned is distinguished from one that a queue took.

pub mod address;
pub mod agreed_value;
pub mod bounded;
pub mod connection;
pub mod connection_pair;
pub mod consumer;
pub mod error;
pub mod exclusive_queue;
pub mod frames;
pub mod names;
pub(crate) mod options;
pub mod pool;
pub mod publisher;
pub mod queue_lookup;
pub mod rejected;
pub mod reliable;
mod screened_stream;
pub mod stream;
pub mod supervisor;
pub mod tls;
pub mod topology;
pub mod traffic;

pub use crate::unique;
