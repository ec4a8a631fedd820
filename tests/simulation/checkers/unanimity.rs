//! A transaction commits only if every involved service has voted for it, and still holds what the
//! record names.

use std::collections::BTreeMap;

use dtc::protocol::{
    ids::{Branch, RequestHash, ServiceName, TransactionKey},
    message::{Decision, Outcome, Vote, VoteKind},
};

use super::Checked;

/// The votes: service and branch.
type Votes = Vec<(ServiceName, Option<Branch>)>;

/// Every vote in favour.
#[derive(Default)]
pub(crate) struct Unanimity {
    in_favour: BTreeMap<(TransactionKey, RequestHash), Votes>,
}

impl Unanimity {
    pub(crate) fn voted(&mut self, vote: &Vote) {
        let branch = match &vote.kind {
            VoteKind::Prepared { branch } => Some(branch.clone()),
            VoteKind::ReadOnly => None,
            VoteKind::Refused(_) | VoteKind::Failed { .. } | VoteKind::Finished(_) => return,
        };
        let votes = self.in_favour.entry((vote.key.clone(), vote.request_hash)).or_default();
        votes.push((vote.service.clone(), branch));
    }

    /// `first` has become the first record of its transaction.
    pub(crate) fn decided(
        &self,
        first: &Decision,
        services: &[ServiceName],
        is_held: impl Fn(&ServiceName, &Branch) -> bool,
    ) -> Checked {
        if first.outcome == Outcome::Aborted {
            return Ok(());
        }
        let votes = self.in_favour.get(&(first.key.clone(), first.request_hash));
        for service in services {
            let named = first.branch_of(service);
            let has_voted = votes.is_some_and(|votes| {
                votes.iter().any(|(who, branch)| who == service && branch.as_ref() == named)
            });
            if !has_voted {
                return Err(format!("{service} has not voted {named:?} in favour of {first:?}"));
            }
            if let Some(branch) = named
                && !is_held(service, branch)
            {
                return Err(format!("{service} doesn't hold the {branch} that {first:?} names"));
            }
        }
        Ok(())
    }
}
