//! Services that do nothing but behave as services.json says: for trying things out.
//!
//! * [`service`]: such a service.
//! * `behaviour`: how its calls end, and when.
//! * [`store`]: what it holds, in memory or in a directory that its instances share.

mod behaviour;
pub mod service;
pub mod store;
