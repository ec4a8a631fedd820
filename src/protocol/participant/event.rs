//! Everything that can happen to an instance of a service, and everything it can ask for.

use std::sync::Arc;

use crate::protocol::{
    ids::{Branch, RequestHash, TransactionKey, WorkerId},
    message::{Delivery, Done, Finish, Inquiry, Payload, Prepare, Query, Vote},
    time::Time,
};

/// What the service's store holds as prepared: one branch that has heard no outcome.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct InDoubt {
    /// Which transaction.
    pub key: TransactionKey,
    /// The digest of the request it was prepared for.
    pub request_hash: RequestHash,
    /// The branch under which it is stored.
    pub branch: Branch,
    /// The deadline of its prepare.
    pub deadline: Time,
}

/// How the service's prepare ended: its vote.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Verdict {
    /// What the commit needs is stored under the branch, and the commit can succeed whatever happens.
    Prepared,
    /// There is nothing to commit: the service is left out, and hears no more of the transaction.
    ReadOnly,
    /// No, for this reason. Nothing is stored, and the abort is not called.
    Refused(Option<Arc<str>>),
    /// An error, a panic, a time-out. Something may be stored, and the abort is called. A prepare that
    /// ends in an error ends so.
    Failed(Arc<str>),
}

/// A fact that an instance learns. Any of them may come twice, late, or out of order.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Event {
    /// A prepare was taken from the service's queue.
    PrepareReceived {
        /// Who wants the vote.
        worker: WorkerId,
        /// The slot: unacked as long as the transaction is held.
        delivery: Delivery,
        /// Whether it was delivered before, to an instance whose connection is gone.
        redelivered: bool,
        /// What to prepare.
        prepare: Prepare,
    },
    /// A worker asks who holds a transaction.
    QueryReceived {
        /// Who wants the vote.
        worker: WorkerId,
        /// Which transaction.
        query: Query,
    },
    /// A prepare that may still wait in the queue is withdrawn.
    CancelReceived(TransactionKey),
    /// The outcome of a transaction.
    FinishReceived {
        /// Who wants to hear that it is done.
        worker: WorkerId,
        /// The outcome.
        finish: Finish,
        /// What to ack when it is done, if it came by the service's durable queue.
        delivery: Option<Delivery>,
    },
    /// The service's prepare has ended.
    PrepareEnded {
        /// Which transaction.
        key: TransactionKey,
        /// Which run.
        branch: Branch,
        /// How.
        verdict: Verdict,
    },
    /// The service's commit or abort has ended.
    FinishEnded {
        /// Which transaction.
        key: TransactionKey,
        /// What was committed or undone.
        branch: Branch,
        /// Whether it succeeded; if not, what the code said.
        applied: Result<(), Arc<str>>,
    },
    /// What the store holds of one transaction.
    StoreRead {
        /// Which transaction.
        key: TransactionKey,
        /// Its branches.
        held: Vec<InDoubt>,
    },
    /// Whether the store knows the branch that is to be committed: holds it, or has committed it.
    CommitLookedUp {
        /// Which transaction.
        key: TransactionKey,
        /// Which branch.
        branch: Branch,
        /// Whether it does.
        is_known: bool,
    },
    /// All that the store holds.
    StoreScanned(Vec<InDoubt>),
    /// The moment of [`Instance::next_deadline`](super::Instance::next_deadline) has come.
    DeadlineReached,
    /// The connection is lost: every delivery will come again, to any instance.
    Disconnected,
    /// The process is going to end: what is parked is left to the next one.
    DrainRequested,
}

impl Event {
    /// The event's name, for logs and for coverage tables.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::PrepareReceived { .. } => "PrepareReceived",
            Self::QueryReceived { .. } => "QueryReceived",
            Self::CancelReceived(_) => "CancelReceived",
            Self::FinishReceived { .. } => "FinishReceived",
            Self::PrepareEnded { .. } => "PrepareEnded",
            Self::FinishEnded { .. } => "FinishEnded",
            Self::StoreRead { .. } => "StoreRead",
            Self::CommitLookedUp { .. } => "CommitLookedUp",
            Self::StoreScanned(_) => "StoreScanned",
            Self::DeadlineReached => "DeadlineReached",
            Self::Disconnected => "Disconnected",
            Self::DrainRequested => "DrainRequested",
        }
    }

    /// The transaction it is about, if it is about one.
    pub fn key(&self) -> Option<&TransactionKey> {
        match self {
            Self::PrepareReceived { prepare, .. } => Some(&prepare.key),
            Self::QueryReceived { query, .. } => Some(&query.key),
            Self::FinishReceived { finish, .. } => Some(&finish.key),
            Self::CancelReceived(key)
            | Self::PrepareEnded { key, .. }
            | Self::FinishEnded { key, .. }
            | Self::StoreRead { key, .. }
            | Self::CommitLookedUp { key, .. } => Some(key),
            Self::StoreScanned(_)
            | Self::DeadlineReached
            | Self::Disconnected
            | Self::DrainRequested => None,
        }
    }
}

/// Something an instance asks for, to be carried out in the order in which they come.
///
/// * A vote of prepared comes only after the [`Event::PrepareEnded`] that says it is stored.
/// * The [`Effect::Ack`] that frees a slot comes only after the outcome was applied, or after a
///   verdict that left nothing to apply.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Effect {
    /// Call the service's prepare, until `deadline` at the longest: answered by
    /// [`Event::PrepareEnded`].
    CallPrepare {
        /// Which transaction.
        key: TransactionKey,
        /// What to store it under.
        branch: Branch,
        /// The digest to store with it.
        request_hash: RequestHash,
        /// What to prepare.
        data: Payload,
        /// When to give up.
        deadline: Time,
    },
    /// Call the service's commit: answered by [`Event::FinishEnded`].
    CallCommit {
        /// Which transaction.
        key: TransactionKey,
        /// What to commit.
        branch: Branch,
    },
    /// Call the service's abort: answered by [`Event::FinishEnded`].
    CallAbort {
        /// Which transaction.
        key: TransactionKey,
        /// What to undo.
        branch: Branch,
    },
    /// Find out what the store holds of a transaction: answered by [`Event::StoreRead`].
    ReadStore(TransactionKey),
    /// Find out whether the store knows the branch that is to be committed, and that it was not seen
    /// to hold: answered by [`Event::CommitLookedUp`]. Only where [`Settings::remembers_commits`] is
    /// set.
    ///
    /// [`Settings::remembers_commits`]: super::Settings::remembers_commits
    LookUpCommit {
        /// Which transaction.
        key: TransactionKey,
        /// Which branch.
        branch: Branch,
    },
    /// Find out all that the store holds: answered by [`Event::StoreScanned`].
    ScanStore,
    /// Send a vote.
    Vote {
        /// To whom.
        to: WorkerId,
        /// What it says.
        vote: Vote,
    },
    /// Answer a finish.
    Done {
        /// To whom.
        to: WorkerId,
        /// What it says.
        done: Done,
        /// The delivery of the service's durable queue that the finish came by, if it did: it must
        /// not come again once this answer is safe.
        ack: Option<Delivery>,
    },
    /// Ask any worker what became of a transaction.
    Inquire(Inquiry),
    /// The delivery of a prepare is dealt with: it must not come again, and its slot is free.
    Ack(Delivery),
}
