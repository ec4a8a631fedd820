//! What a failure at the broker means: whether it will pass, and what the broker said.

use lapin::{
    ErrorKind,
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
};

/// What follows from a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disposition {
    /// It may be gone the next time.
    Retry,
    /// It will be the same until a person changes something.
    GiveUp,
}

/// Whether the broker said no to who we are or what we want, rather than failing at it.
pub fn is_refusal(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED)
        || *error.kind() == AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)
}

/// Whether the broker said that something doesn't exist.
pub fn is_not_found(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND)
}

/// Whether the broker said that something is not as it is asked for.
pub fn is_precondition_failed(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED)
}
