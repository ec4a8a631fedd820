//! The JSON that `dtc` promises to others: the bodies of messages, and the results that it prints.
//!
//! * [`message`]: the bodies of all messages between producers, workers and services.
//! * [`result`]: the result of a transaction, as it is printed.
//! * [`hash`]: the digest that distinguishes a retry from another request with the same id.
//!
//! Types of the protocol are never serialized directly: every format has its own type here, so that
//! an internal change can't break a promise.
//!
//! **Unknown fields.** A message may come from a newer release: messages ignore them.
//!
//! **Invariant:** no text, however broken, makes this code panic; it leads to complaints.

pub mod hash;
pub mod message;
pub mod result;
pub(crate) mod transaction;
