//! Services commit and undo only what the journal's first record decides.

use dtc::protocol::{
    ids::{Branch, ServiceName, TransactionKey},
    message::{Decision, Outcome},
};

use super::Checked;

fn is_committed(first: Option<&Decision>, service: &ServiceName, branch: &Branch) -> bool {
    first.is_some_and(|first| {
        first.outcome == Outcome::Committed && first.branch_of(service) == Some(branch)
    })
}

/// The service's code commits `branch`; `is_there`: it is stored, or was committed before.
pub(crate) fn committing(
    first: Option<&Decision>,
    key: &TransactionKey,
    service: &ServiceName,
    branch: &Branch,
    is_there: bool,
) -> Checked {
    if !is_committed(first, service, branch) {
        return Err(format!("{service} commits {branch} of {key}; the first record: {first:?}"));
    }
    if !is_there {
        return Err(format!("{service} shall commit {branch} of {key} and doesn't hold it"));
    }
    Ok(())
}

/// The service's code undoes `branch`.
pub(crate) fn undoing(
    first: Option<&Decision>,
    key: &TransactionKey,
    service: &ServiceName,
    branch: &Branch,
) -> Checked {
    if first.is_none() || is_committed(first, service, branch) {
        return Err(format!("{service} undoes {branch} of {key}; the first record: {first:?}"));
    }
    Ok(())
}

/// At the end: what was committed of `key` at `service`.
pub(crate) fn ended(first: &Decision, service: &ServiceName, committed: &[Branch]) -> Checked {
    let named = first.branch_of(service);
    if committed.iter().ne(named) {
        let key = &first.key;
        return Err(format!("{service} has committed {committed:?} of {key}, decided: {first:?}"));
    }
    Ok(())
}
