//! One transaction as an instance sees it: how far it is, its slot, and who waits for what; and what
//! it does when time passes. In [`preparing`] is what leads to a vote, in [`lookup`] what the store
//! is asked, and in [`finishing`] what follows from the outcome.

mod finishing;
mod lookup;
mod preparing;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use crate::protocol::{
    ids::{Branch, RequestHash, TransactionKey, WorkerId},
    message::{Delivery, Finish, Outcome, Prepare},
    participant::{Effect, InDoubt, InstanceContext},
    time::Time,
};

/// Where a transaction stands at this instance.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum TransactionStage {
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

impl TransactionStage {
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

/// How far a transaction is, with what it has at no other stage. Others see a [`TransactionStage`].
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Progress {
    /// The store is asked what it holds of it, on behalf of this prepare, or of those who wait
    /// for the vote or for the outcome to be applied.
    Recalling(Option<Prepare>),
    /// The store is asked whether it has committed `branch`, which is to be committed and which it
    /// does not hold. What it does hold waits to be finished.
    LookingUp { branch: Branch, calls: PendingCalls },
    /// The service's prepare runs, to be stored under this branch.
    Preparing(Branch),
    /// The outcome of what is held is awaited.
    InDoubt,
    /// The first of these runs. `is_unknown`: the store does not know the branch that is to be
    /// committed.
    Finishing { calls: PendingCalls, is_unknown: bool },
    /// A parked commit failed and will be tried again.
    BackingOff,
}

/// The branches that are still to be committed or undone for a transaction.
type PendingCalls = VecDeque<(Branch, Outcome)>;

/// What this instance holds: what its own prepare has left, or what was found in the store and is
/// treated like that.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum HeldBranch {
    Prepared(Branch),
    /// Something may be stored under it.
    Failed {
        branch: Branch,
        why: Arc<str>,
    },
}

impl HeldBranch {
    fn branch(&self) -> &Branch {
        match self {
            Self::Prepared(branch) | Self::Failed { branch, .. } => branch,
        }
    }
}

/// Whether a transaction counts against the cap.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Slot {
    /// It doesn't: another instance holds it, or nobody.
    None,
    Held(Delivery),
    /// It does, but the delivery was lost with its connection and may come again.
    Detached,
}

/// A command to finish a transaction, and who waits for the answer.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Finisher {
    pub(super) worker: WorkerId,
    pub(super) finish: Finish,
    pub(super) delivery: Option<Delivery>,
}

/// What becomes of a transaction that has handled an event.
#[must_use]
pub(super) enum AfterEvent {
    /// It goes on.
    Held,
    /// It goes on, and has let go of something that delivered prepares may have waited for.
    Yielded,
    /// It is to be forgotten.
    Over,
}

/// A transaction that this instance has to do with.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct HeldTransaction {
    key: TransactionKey,
    progress: Progress,
    slot: Slot,
    /// `None`: it is looked into because of a finish, which doesn't say.
    request_hash: Option<RequestHash>,
    deadline: Time,
    held: Option<HeldBranch>,
    /// The worker that alone has asked for the vote, and over a connection that still stands: nobody
    /// else tells of the outcome, so no other instance has been told. `None`: others may have
    /// finished it.
    asked_by: Option<WorkerId>,
    /// Whether its prepare came from an instance that is gone: then what it left is ours.
    redelivered: bool,
    /// Who waits for the vote.
    voters: Vec<(WorkerId, RequestHash)>,
    /// Who waits for the outcome to be applied.
    finishers: Vec<Finisher>,
    failures: u32,
    /// Whether its commit is parked, as far as this instance can tell: no worker says when to try
    /// again.
    is_parked: bool,
    /// When to inquire, or to try again.
    wake_at: Option<Time>,
    /// Its entry among the deadlines.
    due: Option<Time>,
}

impl HeldTransaction {
    /// A transaction that is looked into and holds no slot.
    fn visiting(key: TransactionKey, request_hash: Option<RequestHash>, deadline: Time) -> Self {
        Self {
            key,
            progress: Progress::Recalling(None),
            slot: Slot::None,
            request_hash,
            deadline,
            held: None,
            asked_by: None,
            redelivered: false,
            voters: Vec::new(),
            finishers: Vec::new(),
            failures: 0,
            is_parked: false,
            wake_at: None,
            due: None,
        }
    }

    pub(super) fn stage(&self) -> TransactionStage {
        match (&self.progress, &self.held) {
            (Progress::Recalling(_) | Progress::LookingUp { .. }, _) => TransactionStage::Recalling,
            (Progress::Preparing(_), _) => TransactionStage::Preparing,
            (Progress::InDoubt, Some(HeldBranch::Failed { .. })) => TransactionStage::Failed,
            (Progress::InDoubt, Some(HeldBranch::Prepared(_)) | None) => TransactionStage::Prepared,
            (Progress::Finishing { .. }, _) => TransactionStage::Finishing,
            (Progress::BackingOff, _) => TransactionStage::BackingOff,
        }
    }

    /// What its prepare here is, or was found to be, stored under.
    pub(super) fn branch(&self) -> Option<&Branch> {
        match &self.progress {
            Progress::Preparing(branch) => Some(branch),
            Progress::Recalling(_)
            | Progress::LookingUp { .. }
            | Progress::InDoubt
            | Progress::Finishing { .. }
            | Progress::BackingOff => self.held.as_ref().map(HeldBranch::branch),
        }
    }

    pub(super) fn has_slot(&self) -> bool {
        self.slot != Slot::None
    }

    /// Whether it was told, could not be applied, and nobody waits for it any more.
    pub(super) fn is_stuck(&self) -> bool {
        self.is_parked && self.failures > 0
    }

    /// Whether it is, or may be, for a request with this digest.
    fn is_about(&self, request_hash: RequestHash) -> bool {
        self.request_hash.is_none_or(|own| own == request_hash)
    }

    /// Frees its slot, and says which delivery is to be acknowledged for that.
    pub(super) fn free_slot(&mut self, cx: &mut InstanceContext<'_>) -> Option<Delivery> {
        if self.has_slot() {
            cx.resources.slots_used -= 1;
        }
        match std::mem::replace(&mut self.slot, Slot::None) {
            Slot::Held(delivery) => Some(delivery),
            Slot::None | Slot::Detached => None,
        }
    }

    fn ask_store(&mut self, cx: &mut InstanceContext<'_>) {
        self.progress = Progress::Recalling(None);
        cx.effects.push(Effect::ReadStore(self.key.clone()));
    }

    // ---- Time, and the ends of things --------------------------------------------------------

    fn inquire_later(&mut self, cx: &mut InstanceContext<'_>) {
        let after = cx.settings().inquire_after;
        self.wake_at(cx.now + after + cx.jitter(&self.key, after / 4), cx);
    }

    fn try_parked_later(&mut self, cx: &mut InstanceContext<'_>) {
        self.progress = Progress::BackingOff;
        let pause = cx.settings().retry_parked_every;
        self.wake_at(cx.now + (pause - cx.jitter(&self.key, pause / 4)), cx);
    }

    fn wake_at(&mut self, at: Time, cx: &mut InstanceContext<'_>) {
        self.wake_at = Some(at);
        cx.resources.deadlines.wake_by(&self.key, &mut self.due, at);
    }

    /// Takes its entry among the deadlines out.
    pub(super) fn disarm(&mut self, cx: &mut InstanceContext<'_>) {
        cx.resources.deadlines.disarm(&self.key, &mut self.due);
    }

    /// Its entry among the deadlines was due, and is taken out.
    pub(super) fn wake(&mut self, cx: &mut InstanceContext<'_>) -> AfterEvent {
        self.due = None;
        let Some(at) = self.wake_at else { return AfterEvent::Held };
        if at > cx.now {
            self.wake_at(at, cx);
            return AfterEvent::Held;
        }
        self.wake_at = None;
        match self.progress {
            Progress::InDoubt => self.inquire(cx),
            Progress::BackingOff if cx.resources.draining => {}
            Progress::BackingOff if self.held.is_some() => return self.apply(cx),
            Progress::BackingOff => self.ask_store(cx),
            Progress::Recalling(_)
            | Progress::LookingUp { .. }
            | Progress::Preparing(_)
            | Progress::Finishing { .. } => {}
        }
        AfterEvent::Held
    }

    fn inquire(&mut self, cx: &mut InstanceContext<'_>) {
        let (Some(held), Some(request_hash)) = (&self.held, self.request_hash) else { return };
        // Its outcome came and could not be applied, and nobody has sent it again: the worker has
        // given up.
        self.is_parked |= self.failures > 0;
        if cx.resources.draining && self.is_stuck() {
            return;
        }
        let (key, branch) = (self.key.clone(), held.branch().clone());
        cx.inquire(InDoubt { key, request_hash, branch, deadline: self.deadline });
        self.inquire_later(cx);
    }

    pub(super) fn disconnected(&mut self) {
        if let Slot::Held(_) = self.slot {
            self.slot = Slot::Detached;
        }
        self.asked_by = None;
        for finisher in &mut self.finishers {
            finisher.delivery = None;
        }
    }

    pub(super) fn clock_set_back(&mut self, by: Duration) {
        self.due = self.due.map(|at| at - by);
        self.wake_at = self.wake_at.map(|at| at - by);
    }
}
