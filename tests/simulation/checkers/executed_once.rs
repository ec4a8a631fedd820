//! No service executes a transaction twice.

use dtc::protocol::ids::{Branch, ServiceName, TransactionKey};

use super::Checked;

/// `service` has committed `branches` of `key`.
pub(crate) fn executed(
    key: &TransactionKey,
    service: &ServiceName,
    branches: &[Branch],
) -> Checked {
    if branches.len() > 1 {
        return Err(format!("{service} has executed {key} as each of {branches:?}"));
    }
    Ok(())
}
