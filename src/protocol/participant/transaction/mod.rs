//! One transaction as an instance sees it: its progress, its slot, and the workers that wait for answers.
//! Here: what all stages share, and deadlines. [`preparing`]: from a prepare to the vote. [`lookup`]: looking
//! into the store. [`finishing`]: applying the outcome.

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

/// The stage of a transaction at this instance.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum TransactionStage {
    /// The instance looks up what the store holds of it.
    Recalling,
    /// The service's prepare runs.
    Preparing,
    /// The branch is stored, and the instance has voted: it waits for the outcome.
    Prepared,
    /// The service's prepare failed, and something may be stored: the instance waits for the outcome.
    Failed,
    /// The service's commit or abort runs.
    Finishing,
    /// A parked commit failed and will be tried again.
    BackingOff,
}

impl TransactionStage {
    /// All stages, for coverage tables.
    pub const ALL: [Self; 6] = [
        Self::Recalling,
        Self::Preparing,
        Self::Prepared,
        Self::Failed,
        Self::Finishing,
        Self::BackingOff,
    ];
}

/// The progress of a transaction, with the data of each stage. Others see a [`TransactionStage`].
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Progress {
    /// The instance looks up what the store holds: for this prepare, or for workers that wait for a vote or
    /// for the outcome to be applied.
    Recalling(Option<Prepare>),
    /// The instance looks up whether the store has committed `branch`, which must be committed, and which
    /// the store doesn't hold. `calls`: what to do then with the branches that it holds.
    LookingUp { branch: Branch, calls: PendingCalls },
    /// The service's prepare runs, for this branch.
    Preparing(Branch),
    /// The instance waits for the outcome of the branch that it holds.
    InDoubt,
    /// The first of these calls runs. `is_unknown`: the store doesn't know the branch that must be
    /// committed.
    Finishing { calls: PendingCalls, is_unknown: bool },
    /// A parked commit failed and will be tried again.
    BackingOff,
}

/// The branches that are still to be committed or undone for a transaction.
type PendingCalls = VecDeque<(Branch, Outcome)>;

/// The branch that this instance holds: of its own prepare, or found in the store and handled alike.
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
    /// It doesn't: another instance holds the slot, or none.
    None,
    Held(Delivery),
    /// It does, but the delivery was lost with its connection, and may come again.
    Detached,
}

/// A finish, and the worker that waits for the answer.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Finisher {
    pub(super) worker: WorkerId,
    pub(super) finish: Finish,
    pub(super) delivery: Option<Delivery>,
}

/// What to do with a transaction that has handled an event.
#[must_use]
pub(super) enum AfterEvent {
    /// Keep it.
    Held,
    /// Keep it, and handle the waiting prepares: it has freed something that they may need.
    Yielded,
    /// Remove it.
    Over,
}

/// A transaction of this instance.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct HeldTransaction {
    key: TransactionKey,
    progress: Progress,
    slot: Slot,
    /// `None`: it was created for a finish, which has no digest.
    request_hash: Option<RequestHash>,
    deadline: Time,
    held: Option<HeldBranch>,
    /// The only worker that has asked for the vote, over a connection that is still open. Only that worker
    /// sends the outcome, so no other instance has got it. `None`: another instance may have finished the
    /// transaction.
    asked_by: Option<WorkerId>,
    /// Whether the prepare was delivered before, to an instance that is gone: then this instance takes over
    /// its branch.
    redelivered: bool,
    /// The workers that wait for the vote.
    voters: Vec<(WorkerId, RequestHash)>,
    /// The workers that wait until the outcome is applied.
    finishers: Vec<Finisher>,
    failures: u32,
    /// Whether its commit is parked, as far as this instance knows: no worker sends the outcome again.
    is_parked: bool,
    /// When to inquire, or to try again.
    wake_at: Option<Time>,
    /// The moment of its entry among the deadlines.
    due: Option<Time>,
}

impl HeldTransaction {
    /// A transaction without a slot, that is only looked up.
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

    /// The branch that this instance prepares or holds.
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

    /// Whether its outcome is known and could not be applied, and no worker waits for that any more.
    pub(super) fn is_stuck(&self) -> bool {
        self.is_parked && self.failures > 0
    }

    /// Whether it is, or may be, about a request with this digest.
    fn is_about(&self, request_hash: RequestHash) -> bool {
        self.request_hash.is_none_or(|own| own == request_hash)
    }

    /// Frees its slot, and returns the delivery to acknowledge.
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

    /// Removes its entry among the deadlines.
    pub(super) fn disarm(&mut self, cx: &mut InstanceContext<'_>) {
        cx.resources.deadlines.disarm(&self.key, &mut self.due);
    }

    /// Its entry among the deadlines was due, and is removed.
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
        // Its outcome came and could not be applied, and no worker has sent it again: the worker has parked
        // it.
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
