//! An instance that knows that a transaction is finished doesn't call its service's code to prepare
//! it.

use std::collections::BTreeMap;

use dtc::protocol::{
    ids::TransactionKey,
    participant::{Effect, Event},
};

use super::Checked;

/// What an instance knows of transactions that it has not begun.
#[derive(Default)]
pub(crate) struct NecessaryCalls {
    over: BTreeMap<TransactionKey, &'static str>,
}

impl NecessaryCalls {
    /// `is_held`: the instance works on the transaction already.
    pub(crate) fn told(&mut self, event: &Event, is_held: bool) {
        if let Event::CancelReceived(key) = event
            && !is_held
        {
            self.over.insert(key.clone(), "cancelled");
        }
    }

    pub(crate) fn does(&mut self, effect: &Effect) -> Checked {
        match effect {
            Effect::Done { done, .. } if done.applied.is_ok() => {
                self.over.insert(done.key.clone(), "finished");
                Ok(())
            }
            Effect::CallPrepare { key, .. } => match self.over.get(key) {
                Some(how) => Err(format!("{key} is prepared after it was {how}")),
                None => Ok(()),
            },
            Effect::CallCommit { .. }
            | Effect::CallAbort { .. }
            | Effect::ReadStore(_)
            | Effect::LookUpCommit { .. }
            | Effect::ScanStore
            | Effect::Vote { .. }
            | Effect::Done { .. }
            | Effect::Inquire(_)
            | Effect::Ack(_) => Ok(()),
        }
    }
}
