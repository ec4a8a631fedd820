//! A distributed transaction coordinator: every service commits, or none does.

pub mod protocol;
pub mod wire;
