//! A vote `prepared` is sent only when the branch it names is, or was, in the store.

use dtc::protocol::message::{Vote, VoteKind};

use super::Checked;

/// `was_stored`: whether the service's store has ever held that branch.
pub(crate) fn voting(
    vote: &Vote,
    was_stored: impl Fn(&dtc::protocol::ids::Branch) -> bool,
) -> Checked {
    match &vote.kind {
        VoteKind::Prepared { branch } if !was_stored(branch) => {
            Err(format!("{} votes for a branch that it never stored: {vote:?}", vote.service))
        }
        VoteKind::Prepared { .. }
        | VoteKind::ReadOnly
        | VoteKind::Refused(_)
        | VoteKind::Failed { .. }
        | VoteKind::Finished(_) => Ok(()),
    }
}
