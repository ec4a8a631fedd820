//! Moving the protocol's messages, at least once each.
//!
//! Every transport promises the same: a request and a command for a service's durable queue is
//! delivered until it is acked; an unacked prepare is a slot, and a service's queue gives out no
//! more than its cap; a prepare that finds no slot within the service's `max_wait` comes back; the
//! journal is append-only and read by all in the same order.
//!
//! It does *not* promise that a message comes once, or in order, or that a command reaches an
//! instance that is just going: the protocol needs none of that.

#[cfg(feature = "amqp")]
pub mod amqp;
#[cfg(feature = "embedded")]
pub mod embedded;
