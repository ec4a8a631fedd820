//! What drives a coordinator: a clock, and the loop that lets it handle what has happened and does
//! what it asks for.

pub mod clock;
