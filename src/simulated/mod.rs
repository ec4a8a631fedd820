//! Services that do nothing but behave as services.json says: for trying things out.
//!
//! * [`service`]: what such a service answers, and how long it takes.
//! * [`store`]: what it holds, in memory or in a directory that its instances share.

pub mod service;
pub mod store;
