//! Moving messages through RabbitMQ.
//!
//! * [`address`]: where the brokers are, and who we are to them.
//! * [`bounded`]: questions to the broker that end, whatever the broker does.
//! * [`connection`]: connecting, and connecting again.
//! * [`error`]: what a failure means.
//! * [`names`]: what every exchange and queue is called.
//! * [`publisher`]: publishing with confirms.
//! * [`consumer`]: taking deliveries, and acknowledging them in as few frames as possible.
//! * [`pool`]: channels that many share.
//! * [`rejected`]: setting aside what nobody can make sense of.
//! * [`stream`]: reading a stream up to its end.
//! * [`tls`]: whom to trust over `amqps://`, and who we are to them.
//! * [`topology`]: every exchange and queue, and making a broker's be the same.
//! * [`traffic`]: how many messages went out and came in.
//! * [`unique`]: names that nobody else has.
//!
//! Nothing here knows the protocol: what is in a message, and what follows from it, is said above.
//!
//! **Invariant:** a publish is not believed before the broker has confirmed it, and one that found
//! no queue is told apart from one that did.

pub mod address;
pub mod bounded;
pub mod connection;
pub mod consumer;
pub mod error;
pub mod names;
pub mod pool;
pub mod publisher;
pub mod rejected;
pub mod stream;
pub mod tls;
pub mod topology;
pub mod traffic;
pub mod unique;
