//! Moving messages through RabbitMQ.
//!
//! * [`address`]: where the brokers are, and who we are to them.
//! * [`agreed`]: a word that all who serve one thing must agree on.
//! * [`bounded`]: questions to the broker that end, whatever the broker does.
//! * [`connection`]: connecting, and connecting again.
//! * [`error`]: what a failure means.
//! * [`exclusive`]: a queue that belongs to one connection, and proves that its link is alive.
//! * [`frames`]: screening what the broker sends before lapin parses it.
//! * [`link`]: the two connections of one that publishes and consumes, and what happens to them.
//! * [`lookup`]: whether queues exist, asked over and over.
//! * [`names`]: what every exchange and queue is called.
//! * `options`: what a program says of the broker, and its check.
//! * [`publisher`]: publishing with confirms, each within a bound.
//! * [`reliable`]: publishing what must not be lost.
//! * [`supervisor`]: when to connect again, and when to give up.
//! * [`consumer`]: taking deliveries, and acknowledging them in as few frames as possible.
//! * [`pool`]: channels that many share.
//! * [`rejected`]: setting aside what nobody can make sense of.
//! * `screened`: the byte stream that lapin is given.
//! * [`stream`]: reading a stream up to its end.
//! * [`tls`]: whom to trust over `amqps://`, and who we are to them.
//! * [`topology`]: every exchange and queue, and making a broker's be the same.
//! * [`traffic`]: how many messages went out and came in.
//!
//! Nothing here knows the protocol: what is in a message, and what follows from it, is said above.
//!
//! **Invariant:** every wait for the broker has a bound: an answer ([`bounded`]), a confirm
//! ([`publisher`]), a delivery ([`exclusive`], and the watch of [`consumer`]), the end of an alarm
//! ([`link`]). What was waited for on is made again then: the channel, or the connection.
//!
//! **Invariant:** a publish is not believed before the broker has confirmed it, and one that found
//! no queue is told apart from one that did.

pub mod address;
pub mod agreed;
pub mod bounded;
pub mod connection;
pub mod consumer;
pub mod error;
pub mod exclusive;
pub mod frames;
pub mod link;
pub mod lookup;
pub mod names;
pub(crate) mod options;
pub mod pool;
pub mod publisher;
pub mod rejected;
pub mod reliable;
mod screened;
pub mod stream;
pub mod supervisor;
pub mod tls;
pub mod topology;
pub mod traffic;

pub use crate::unique;
