//! The events that an instance handles, and the effects that it asks for.

use std::sync::Arc;

use crate::protocol::{
    ids::{Branch, RequestHash, TransactionKey, WorkerId},
    message::{Delivery, Done, Finish, Inquiry, Payload, Prepare, Query, Vote},
    time::Time,
};

/// A branch that the service's store holds as prepared, without an outcome.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct InDoubt {
    /// Which transaction.
    pub key: TransactionKey,
    /// The digest of the request it was prepared for.
    pub request_hash: RequestHash,
    /// Its branch.
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
    /// There is nothing to commit. Neither commit nor abort is called.
    ReadOnly,
    /// The service refuses, for this reason. Nothing is stored, and the abort is not called.
    Refused(Option<Arc<str>>),
    /// An error, a panic, or a time-out. Something may be stored, and the abort is called. A prepare that
    /// returns an error has this verdict.
    Failed(Arc<str>),
}

/// An event that an instance handles. Any event may come twice, late, or out of order.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Event {
    /// A prepare was taken from the service's queue.
    PrepareReceived {
        /// The worker that wants the vote.
        worker: WorkerId,
        /// The slot: unacknowledged as long as the transaction is held.
        delivery: Delivery,
        /// Whether the broker delivered it before, on a connection that is gone.
        redelivered: bool,
        /// What to prepare.
        prepare: Prepare,
    },
    /// A worker asks who holds a transaction.
    QueryReceived {
        /// The worker that wants the vote.
        worker: WorkerId,
        /// Which transaction.
        query: Query,
    },
    /// A prepare that may still wait in the queue is cancelled.
    CancelReceived(TransactionKey),
    /// The outcome of a transaction.
    FinishReceived {
        /// The worker that wants the answer.
        worker: WorkerId,
        /// The outcome.
        finish: Finish,
        /// What to acknowledge when it is done, if it came by the service's durable queue.
        delivery: Option<Delivery>,
    },
    /// The service's prepare has ended.
    PrepareEnded {
        /// Which transaction.
        key: TransactionKey,
        /// Which run.
        branch: Branch,
        /// How it ended.
        verdict: Verdict,
    },
    /// The service's commit or abort has ended.
    FinishEnded {
        /// Which transaction.
        key: TransactionKey,
        /// What was committed or undone.
        branch: Branch,
        /// Whether it succeeded; if not, the error of the code.
        applied: Result<(), Arc<str>>,
    },
    /// What the store holds of one transaction.
    StoreRead {
        /// Which transaction.
        key: TransactionKey,
        /// Its branches.
        held: Vec<InDoubt>,
    },
    /// Whether the store knows a branch: holds it, or has committed it.
    CommitLookedUp {
        /// Which transaction.
        key: TransactionKey,
        /// Which branch.
        branch: Branch,
        /// Whether the store knows it.
        is_known: bool,
    },
    /// All branches that the store holds.
    StoreScanned(Vec<InDoubt>),
    /// The moment of [`Instance::next_deadline`](super::Instance::next_deadline) has come.
    DeadlineReached,
    /// The connection is lost: every delivery will come again, to any instance.
    Disconnected,
    /// The process stops: it leaves parked commits to the next one.
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

/// Something that the driver must do for an instance. It carries out effects in order.
///
/// * A prepared vote comes only after the [`Event::PrepareEnded`] that says that the branch is stored.
/// * The [`Effect::Ack`] that frees a slot comes only after the outcome was applied, or after a verdict that
///   left nothing to apply.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Effect {
    /// Call the service's prepare, until `deadline` at most. The answer is [`Event::PrepareEnded`].
    CallPrepare {
        /// Which transaction.
        key: TransactionKey,
        /// The branch to store it under.
        branch: Branch,
        /// The digest to store with it.
        request_hash: RequestHash,
        /// What to prepare.
        data: Payload,
        /// When to give up.
        deadline: Time,
    },
    /// Call the service's commit. The answer is [`Event::FinishEnded`].
    CallCommit {
        /// Which transaction.
        key: TransactionKey,
        /// The branch to commit.
        branch: Branch,
    },
    /// Call the service's abort. The answer is [`Event::FinishEnded`].
    CallAbort {
        /// Which transaction.
        key: TransactionKey,
        /// The branch to undo.
        branch: Branch,
    },
    /// Read what the store holds of a transaction. The answer is [`Event::StoreRead`].
    ReadStore(TransactionKey),
    /// Find out whether the store knows a branch that must be committed, and that it doesn't hold. The
    /// answer is [`Event::CommitLookedUp`]. Only if [`Settings::remembers_commits`] is set.
    ///
    /// [`Settings::remembers_commits`]: super::Settings::remembers_commits
    LookUpCommit {
        /// Which transaction.
        key: TransactionKey,
        /// Which branch.
        branch: Branch,
    },
    /// Read all that the store holds. The answer is [`Event::StoreScanned`].
    ScanStore,
    /// Send a vote.
    Vote {
        /// To which worker.
        to: WorkerId,
        /// The vote.
        vote: Vote,
    },
    /// Answer a finish.
    Done {
        /// To which worker.
        to: WorkerId,
        /// The answer.
        done: Done,
        /// What to acknowledge when this answer is safe, if the finish came by the service's durable queue.
        ack: Option<Delivery>,
    },
    /// Ask any worker what became of a transaction.
    Inquire(Inquiry),
    /// Acknowledge a prepare: it must not come again, and its slot is free.
    Ack(Delivery),
}
