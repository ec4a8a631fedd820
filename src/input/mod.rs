//! The files of `dtc run`, `dtc service` and `dtc submit`, read and checked.
//!
//! * [`services`]: simulated services, from `services.json`.
//! * [`transactions`]: transactions, as one array or as lines.
//!
//! **Unknown fields.** The person who runs the command also writes the file, and needs to know of a
//! misspelt field: files refuse unknown fields.
//!
//! **Invariant:** no text, however broken, makes this code panic; it leads to complaints.

pub mod services;
pub mod transactions;
