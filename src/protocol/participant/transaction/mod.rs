//! One transaction as an instance sees it: its stage, its slot, and who waits for what. In
//! [`preparing`] what leads to a vote, in [`lookup`] what the store is asked, and in [`finishing`]
//! what follows from the outcome.

mod finishing;
mod lookup;
mod preparing;

use std::{collections::VecDeque, sync::Arc};

use crate::protocol::{
    ids::{Branch, RequestHash, WorkerId},
    message::{Delivery, Finish, Outcome, Prepare},
    time::Time,
};

/// Where a transaction stands at this instance.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Stage {
    /// The store is asked what it holds of it.
    Recalling,
    /// The service's prepare runs.
    Preparing,
    /// Stored and voted for: the outcome is awaited.
    Prepared,
    /// The service's prepare failed; something may be stored: the outcome is awaited.
    Failed,
    /// The service's commit or abort runs.
    Finishing,
    /// A parked commit failed and will be tried again.
    BackingOff,
}

impl Stage {
    /// All of them, for coverage tables.
    pub const ALL: [Self; 6] = [
        Self::Recalling,
        Self::Preparing,
        Self::Prepared,
        Self::Failed,
        Self::Finishing,
        Self::BackingOff,
    ];
}

/// Whether a transaction counts against the cap.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Slot {
    /// It doesn't: another instance holds it, or nobody.
    None,
    Held(Delivery),
    /// It does, but the delivery was lost with its connection and may come again.
    Detached,
}

/// A transaction that this instance has to do with.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Holding {
    pub(super) stage: Stage,
    pub(super) slot: Slot,
    /// `None`: it is looked into because of a finish, which doesn't say.
    pub(super) request_hash: Option<RequestHash>,
    pub(super) deadline: Time,
    /// What this instance's own prepare is, or was found to be, stored under.
    pub(super) branch: Option<Branch>,
    /// The worker that alone has asked for the vote, and over a connection that still stands: nobody
    /// else tells of the outcome, so no other instance has been told. `None`: others may have
    /// finished it.
    pub(super) asked_by: Option<WorkerId>,
    /// The prepare that waits for what the store says.
    pub(super) prepare: Option<Prepare>,
    /// Whether `prepare` came from an instance that is gone: then what it left is ours.
    pub(super) redelivered: bool,
    pub(super) why_failed: Option<Arc<str>>,
    /// Who waits for the vote.
    pub(super) voters: Vec<(WorkerId, RequestHash)>,
    /// Who waits for the outcome to be applied.
    pub(super) finishers: Vec<Finisher>,
    /// What is still to be called for it; the first is running in [`Stage::Finishing`].
    pub(super) calls: VecDeque<(Branch, Outcome)>,
    pub(super) failures: u32,
    /// Whether its commit is parked, as far as this instance can tell: no worker says when to try
    /// again.
    pub(super) is_parked: bool,
    /// The branch that the store is asked about, since it is to be committed and not held.
    pub(super) looked_up: Option<Branch>,
    /// Whether the store does not know the branch that is to be committed.
    pub(super) is_unknown: bool,
    /// When to inquire, or to try again.
    pub(super) wake_at: Option<Time>,
    pub(super) due: Option<Time>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Finisher {
    pub(super) worker: WorkerId,
    pub(super) finish: Finish,
    pub(super) delivery: Option<Delivery>,
}

/// A prepare that was delivered and can't be looked at yet.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Waiting {
    pub(super) worker: WorkerId,
    pub(super) delivery: Delivery,
    pub(super) redelivered: bool,
    pub(super) prepare: Prepare,
}

impl Holding {
    /// A transaction that is looked into and holds no slot.
    pub(super) fn visiting(request_hash: Option<RequestHash>, deadline: Time) -> Self {
        Self {
            stage: Stage::Recalling,
            slot: Slot::None,
            request_hash,
            deadline,
            branch: None,
            asked_by: None,
            prepare: None,
            redelivered: false,
            why_failed: None,
            voters: Vec::new(),
            finishers: Vec::new(),
            calls: VecDeque::new(),
            failures: 0,
            is_parked: false,
            looked_up: None,
            is_unknown: false,
            wake_at: None,
            due: None,
        }
    }

    /// Whether it was told, could not be applied, and nobody waits for it any more.
    pub(super) fn is_stuck(&self) -> bool {
        self.is_parked && self.failures > 0
    }

    /// Whether it is, or may be, for a request with this digest.
    pub(super) fn is_about(&self, request_hash: RequestHash) -> bool {
        self.request_hash.is_none_or(|own| own == request_hash)
    }
}
