//! The files of `dtc run`, `dtc service` and `dtc submit`, read and checked.
//!
//! * [`services`]: simulated services, from `services.json`.
//! * [`transactions`]: transactions, as one array or as lines.
//!
//! **Unknown fields.** A file is written by the person who runs the command, who wants to hear of a
//! misspelt field: files refuse unknown fields.
//!
//! **Invariant:** no text, however broken, makes anything here panic; it makes complaints.

pub mod services;
pub mod transactions;
