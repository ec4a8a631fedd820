//! JSON as promised to others: what is in a message, what is written for a result.
//!
//! * [`message`]: the bodies of all messages between producers, workers and services.
//! * [`result`]: what is said about a transaction when it has ended.
//! * [`hash`]: the digest that tells a retry from another request under the same id.
//!
//! Types of the protocol never become JSON by themselves: every shape has a type of its own here,
//! so that a change inside can't change a promise.
//!
//! **Unknown fields.** A message may come from a newer release: messages ignore them.
//!
//! **Invariant:** no text, however broken, makes anything here panic; it makes complaints.

pub mod hash;
pub mod message;
pub mod result;
pub(crate) mod transaction;
