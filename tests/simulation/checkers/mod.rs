//! The properties: each checker is one file with one sentence, and returns what it saw if that
//! doesn't hold.

pub(crate) mod ack_after_result;
pub(crate) mod agreement;
pub(crate) mod cap;
pub(crate) mod ended;
pub(crate) mod executed_once;
pub(crate) mod necessary_calls;
pub(crate) mod parked;
pub(crate) mod read_back;
pub(crate) mod result;
pub(crate) mod stored_before_voted;
pub(crate) mod unanimity;

/// `Err`: the violation that was seen.
pub(crate) type Checked = Result<(), String>;

/// A violated property.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Violation {
    /// The checker's name.
    pub(crate) property: &'static str,
    /// What it saw.
    pub(crate) seen: String,
}
