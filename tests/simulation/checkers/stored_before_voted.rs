//! A vote of prepared leaves only when the branch it names is stored, or was.

use dtc::protocol::message::{Ballot, Vote};

use super::Checked;

/// `was_stored`: whether the service's store has ever held a branch of that name.
pub(crate) fn voting(
    vote: &Vote,
    was_stored: impl Fn(&dtc::protocol::ids::Branch) -> bool,
) -> Checked {
    match &vote.ballot {
        Ballot::Prepared { branch } if !was_stored(branch) => {
            Err(format!("{} votes for a branch that it never stored: {vote:?}", vote.service))
        }
        Ballot::Prepared { .. }
        | Ballot::ReadOnly
        | Ballot::Refused(_)
        | Ballot::Failed { .. }
        | Ballot::Finished(_) => Ok(()),
    }
}
