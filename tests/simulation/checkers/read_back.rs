//! A worker sends a finish, a cancel or a result only after it has read back the first record of
//! the transaction, and a finish has the outcome of that record.

use dtc::protocol::{
    ids::{ServiceName, TransactionKey},
    message::{Command, Decision, Finish, Outcome},
};

use super::Checked;

/// A worker sends a command; `has_read`: whether it has read a record of the transaction.
pub(crate) fn sending(
    command: &Command,
    service: &ServiceName,
    first: Option<&Decision>,
    has_read: impl Fn(&TransactionKey) -> bool,
) -> Checked {
    match command {
        Command::Query(_) => Ok(()),
        Command::Cancel(key) if has_read(key) => Ok(()),
        Command::Finish(finish) if has_read(&finish.key) && is_true(finish, service, first) => {
            Ok(())
        }
        Command::Cancel(_) | Command::Finish(_) => {
            Err(format!("{command:?} leaves for {service}; the first record: {first:?}"))
        }
    }
}

/// A worker publishes a result.
pub(crate) fn publishing(
    decided: &TransactionKey,
    has_read: impl Fn(&TransactionKey) -> bool,
) -> Checked {
    if has_read(decided) { Ok(()) } else { Err(format!("the result of {decided} leaves unread")) }
}

fn is_true(finish: &Finish, service: &ServiceName, first: Option<&Decision>) -> bool {
    first.is_some_and(|first| {
        first.outcome == finish.outcome
            && (first.outcome == Outcome::Aborted
                || first.branch_of(service) == finish.branch.as_ref())
    })
}
