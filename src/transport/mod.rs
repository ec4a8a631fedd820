//! Transports: they deliver the protocol's messages, each at least once.
//!
//! Every transport guarantees the same: a request, and a command for a service's durable queue, is
//! delivered until it is acked; an unacked prepare is a slot, and a service's queue delivers no
//! more than its cap; a prepare that finds no slot within the service's `max_wait` is returned; the
//! journal is append-only, and all read it in the same order.
//!
//! It does *not* guarantee that a message is delivered only once, or in order, or that a command
//! reaches an instance that is about to end: the protocol needs none of that.

#[cfg(feature = "amqp")]
pub mod amqp;
#[cfg(feature = "embedded")]
pub mod embedded;
