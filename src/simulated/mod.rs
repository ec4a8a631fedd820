//! Services that only behave as services.json says, for experiments and tests.
//!
//! * [`service`]: such a service.
//! * `behaviour`: how, and after how long, its calls end.
//! * [`store`]: its state, in memory or in a directory that its instances share.

mod behaviour;
pub mod service;
pub mod store;
