//! Inquiries about transactions that this worker doesn't work on. If such a transaction is undecided after
//! its deadline, the worker proposes to abort it.

use std::collections::{BTreeMap, BTreeSet};

use crate::protocol::{
    coordinator::{Anomaly, CoordinatorContext, Effect, Work},
    deadlines::Deadlines,
    ids::{InstanceId, RequestHash, ServiceName, TransactionKey},
    journal_view::Recall,
    message::{Decision, Inquiry, Outcome, Reason, ReasonCode},
    time::Time,
};

/// The inquiries that wait for an answer.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub(super) struct Inquiries {
    pending: BTreeMap<TransactionKey, PendingInquiry>,
    deadlines: Deadlines,
}

/// The inquiries about one transaction.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct PendingInquiry {
    request_hash: RequestHash,
    askers: BTreeSet<(ServiceName, InstanceId)>,
    deadline: Time,
    /// Whether an abort was proposed. If not, the transaction is being looked up.
    is_proposed: bool,
    /// When to propose again: its entry among the deadlines.
    due: Option<Time>,
}

impl Inquiries {
    /// When to look at one of them again.
    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.deadlines.next()
    }

    /// Adds an inquiry. Returns whether it is the first about its transaction.
    fn open(&mut self, inquiry: Inquiry, cx: &mut CoordinatorContext<'_>) -> bool {
        let asker = (inquiry.service, inquiry.instance);
        let inquiries_max = cx.settings().inquiries_max;
        if let Some(pending) = self.pending.get_mut(&inquiry.key) {
            // Few instances hold one transaction, but an attacker may send many inquiries.
            if pending.askers.len() < inquiries_max {
                pending.askers.insert(asker);
            }
            return false;
        }
        if self.pending.len() >= inquiries_max {
            cx.effects.push(Effect::Report(Anomaly::InquiryDropped(inquiry.key)));
            return false;
        }
        let pending = PendingInquiry {
            request_hash: inquiry.request_hash,
            askers: BTreeSet::from([asker]),
            deadline: inquiry.deadline,
            is_proposed: false,
            due: None,
        };
        self.pending.insert(inquiry.key, pending);
        true
    }

    fn propose_abort(&mut self, key: &TransactionKey, cx: &mut CoordinatorContext<'_>) {
        let Some(pending) = self.pending.get_mut(key) else { return };
        pending.is_proposed = true;
        let at = cx.now + cx.settings().append_timeout;
        self.deadlines.wake_by(key, &mut pending.due, at);
        cx.effects.push(Effect::Append(Decision {
            key: key.clone(),
            request_hash: pending.request_hash,
            outcome: Outcome::Aborted,
            branches: Vec::new(),
            reason: Some(Reason { code: ReasonCode::Deadline, service: None, message: None }),
            decided_at: cx.now,
            worker: cx.settings().worker.clone(),
        }));
    }

    /// The first record of a transaction was read.
    pub(super) fn first_read(&mut self, first: &Decision, cx: &mut CoordinatorContext<'_>) {
        // While it is being looked up, an older record may turn out to be the outcome.
        if self.pending.get(&first.key).is_some_and(|it| it.is_proposed) {
            self.answer(first, cx);
        }
    }

    /// The transaction was looked up in older parts. `is_complete`: without a gap, so that `first` is its
    /// first record, if it has one.
    pub(super) fn recalled(
        &mut self,
        key: &TransactionKey,
        first: Option<&Decision>,
        is_complete: bool,
        cx: &mut CoordinatorContext<'_>,
    ) {
        let Some(pending) = self.pending.get(key).filter(|it| !it.is_proposed) else { return };
        let is_due = pending.deadline < cx.now;
        match first {
            Some(first) => self.answer(first, cx),
            None if is_complete && is_due => self.propose_abort(key, cx),
            None => {
                let Some(pending) = self.close(key) else { return };
                if is_complete || !is_due {
                    return;
                }
                cx.effects.extend(pending.askers.into_iter().map(|(service, _)| {
                    Effect::Report(Anomaly::InquiryUndecidable(key.clone(), service))
                }));
            }
        }
    }

    fn answer(&mut self, first: &Decision, cx: &mut CoordinatorContext<'_>) {
        let Some(pending) = self.close(&first.key) else { return };
        for (service, instance) in pending.askers {
            cx.tell(first, &service, instance);
        }
    }

    fn close(&mut self, key: &TransactionKey) -> Option<PendingInquiry> {
        let mut pending = self.pending.remove(key)?;
        self.deadlines.disarm(key, &mut pending.due);
        Some(pending)
    }

    pub(super) fn deadline_reached(&mut self, cx: &mut CoordinatorContext<'_>) {
        for key in self.deadlines.take_due(cx.now) {
            if let Some(pending) = self.pending.get_mut(&key) {
                pending.due = None;
                self.propose_abort(&key, cx);
            }
        }
    }
}

impl Work {
    pub(super) fn inquiry_received(&mut self, inquiry: Inquiry, cx: &mut CoordinatorContext<'_>) {
        let key = inquiry.key.clone();
        if let Some(it) = self.transactions.get(&key) {
            let is_ours = it.request().request_hash == inquiry.request_hash;
            return self.with(&key, cx, |it, cx| match it.is_undecided() {
                // The instance holds a branch. Only its vote can say whether that is prepared or was left by
                // a failed prepare.
                true if is_ours => it.query(&inquiry.service, inquiry.instance, cx),
                true => {}
                false => it.answer_inquiry(inquiry, cx),
            });
        }
        let margin = cx.settings().clock_margin;
        // No instance can hold it yet. And an abort that is recorded now would lie before the part of the
        // journal that workers read when they look for it.
        let is_ahead = key.requested_at > cx.now + margin;
        match self.view.recall(&key, margin) {
            Recall::Found(first) => cx.tell(&first, &inquiry.service, inquiry.instance),
            Recall::Absent | Recall::OutOfSight if is_ahead => {}
            Recall::Absent if cx.now <= inquiry.deadline => {}
            Recall::Absent => {
                if self.inquiries.open(inquiry, cx) {
                    self.inquiries.propose_abort(&key, cx);
                }
            }
            Recall::OutOfSight => {
                if self.inquiries.open(inquiry, cx) {
                    self.history.look_for(&key, &self.view, cx);
                }
            }
        }
    }
}
