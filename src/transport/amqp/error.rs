//! The meaning of a failure at the broker: whether it is temporary, and the broker's words.

use std::{error::Error, fmt, sync::Arc};

use lapin::{
    ErrorKind,
    protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError},
};

/// What to do after a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disposition {
    /// Retry: it may succeed the next time.
    Retry,
    /// Give up: it will fail until an operator changes something.
    GiveUp,
}

/// What went wrong between this process and the broker.
///
/// Its text, and those of the errors that it names as its [source](Error::source), say what happened,
/// at which host, and what the broker said. They are for people and change from release to release: a
/// program decides by the error that holds this one, and by [`may_pass`](Self::may_pass).
#[derive(Clone)]
pub struct BrokerError {
    cause: Arc<dyn Error + Send + Sync>,
    disposition: Disposition,
}

impl BrokerError {
    pub(crate) fn new(cause: impl Error + Send + Sync + 'static, disposition: Disposition) -> Self {
        Self { cause: Arc::new(cause), disposition }
    }

    /// Whether the same may succeed later by itself: the broker is down, starts, or has an alarm.
    /// If not, an operator must change something: a password, a certificate, a permission, a queue.
    pub fn may_pass(&self) -> bool {
        self.disposition == Disposition::Retry
    }
}

/// Shows the cause, and adds nothing.
impl fmt::Display for BrokerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.cause, f)
    }
}

impl fmt::Debug for BrokerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.cause, f)
    }
}

impl Error for BrokerError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.source()
    }
}

/// Whether the broker refused the user or the request, rather than failing at it.
pub fn is_refusal(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED)
        || *error.kind() == AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)
}

/// Whether the broker reported that something doesn't exist: `NOT_FOUND - no queue 'q' in vhost
/// '/'`.
///
/// A queue that exists but can't be used for now is "not found" too, in other words: see
/// [`is_out_of_reach`].
pub fn is_not_found(error: &lapin::Error) -> bool {
    is_absent(error) && names_nothing(&broker_text(error))
}

/// Whether the broker reported that a queue exists but can't be used for now: its node is down, or
/// its process is being started, stopped or moved.
///
/// ```text
/// NOT_FOUND - home node 'rabbit@n3' of durable queue 'q' in vhost '/' is down or inaccessible
/// NOT_FOUND - queue 'q' in vhost '/' process is stopped by supervisor
/// NOT_FOUND - failed to perform operation on queue 'q' in vhost '/' due to timeout
/// ```
pub fn is_out_of_reach(error: &lapin::Error) -> bool {
    is_absent(error) && !names_nothing(&broker_text(error))
}

/// Whether the operation may succeed later without a change to the topology or to permissions,
/// judging by the broker's words. A broker that starts, or elects a leader, answers with
/// `INTERNAL_ERROR`, reports a queue as out of reach, or closes the connection.
pub fn may_pass(error: &lapin::Error) -> bool {
    !is_refusal(error) && !is_not_found(error) && !is_precondition_failed(error)
}

/// The broker's own words, if the error is from the broker.
pub fn broker_text(error: &lapin::Error) -> String {
    let ErrorKind::ProtocolError(error) = error.kind() else { return error.to_string() };
    error.get_message().to_string()
}

fn is_absent(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND)
}

/// Whether the text of a `NOT_FOUND` means that no object has the name.
fn names_nothing(text: &str) -> bool {
    text.strip_prefix("NOT_FOUND - ").unwrap_or(text).starts_with("no ")
}

/// Whether the broker reported that something differs from the request.
pub fn is_precondition_failed(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(error) = error.kind() else { return false };
    *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED)
}

#[cfg(test)]
mod tests {
    use lapin::{
        ErrorKind,
        protocol::{AMQPError, AMQPErrorKind, AMQPHardError, AMQPSoftError},
    };

    use super::{is_not_found, is_out_of_reach, may_pass};

    fn soft(kind: AMQPSoftError, words: &str) -> lapin::Error {
        ErrorKind::ProtocolError(AMQPError::new(AMQPErrorKind::Soft(kind), words.into())).into()
    }

    fn not_found(words: &str) -> lapin::Error {
        soft(AMQPSoftError::NOTFOUND, &format!("NOT_FOUND - {words}"))
    }

    #[test]
    fn a_name_without_a_queue_is_missing_for_good() {
        for words in ["no queue 'q' in vhost '/'", "no exchange 'x' in vhost '/'"] {
            let error = not_found(words);
            assert!(is_not_found(&error) && !is_out_of_reach(&error), "{words}");
            assert!(!may_pass(&error), "{words}");
        }
    }

    #[test]
    fn a_queue_on_a_node_that_is_down_is_not_missing() {
        for words in [
            "home node 'rabbit@n3' of durable queue 'q' in vhost '/' is down or inaccessible",
            "queue 'q' in vhost '/' process is stopped by supervisor",
            "queue 'q' in vhost '/' has crashed and failed to restart",
            "failed to perform operation on queue 'q' in vhost '/' due to timeout",
        ] {
            let error = not_found(words);
            assert!(is_out_of_reach(&error) && !is_not_found(&error), "{words}");
            assert!(may_pass(&error), "{words}");
        }
    }

    #[test]
    fn a_broker_that_starts_is_asked_again_and_one_that_refuses_is_not() {
        let hard = |kind| -> lapin::Error {
            let error = AMQPError::new(AMQPErrorKind::Hard(kind), "words".into());
            ErrorKind::ProtocolError(error).into()
        };
        assert!(may_pass(&hard(AMQPHardError::INTERNALERROR)));
        assert!(may_pass(&hard(AMQPHardError::CONNECTIONFORCED)));
        assert!(may_pass(&soft(AMQPSoftError::RESOURCELOCKED, "RESOURCE_LOCKED - it is locked")));
        assert!(!may_pass(&soft(AMQPSoftError::ACCESSREFUSED, "ACCESS_REFUSED - no")));
        assert!(!may_pass(&soft(AMQPSoftError::PRECONDITIONFAILED, "PRECONDITION_FAILED - no")));
    }
}
