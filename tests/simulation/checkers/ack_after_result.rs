//! A request is acked only after its result, its rejection or its parking is safe at the broker.

use dtc::protocol::ids::TransactionKey;

use super::Checked;

/// The request for `key` is acked.
pub(crate) fn acked(key: &TransactionKey, is_answered: bool, is_parked: bool) -> Checked {
    if is_answered || is_parked {
        return Ok(());
    }
    Err(format!("a request for {key} is acked that has no result"))
}
