//! Inquiries about transactions that this worker doesn't work on.

use std::collections::BTreeSet;

use crate::protocol::{
    coordinator::{Anomaly, Context, Coordinator, Effect, Shared},
    ids::{InstanceId, RequestHash, ServiceName, TransactionKey},
    journal::Recall,
    message::{Decision, Inquiry, Outcome, Reason, ReasonCode},
    time::Time,
};

/// An inquiry about a transaction that this worker doesn't work on.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Inquest {
    request_hash: RequestHash,
    askers: BTreeSet<(ServiceName, InstanceId)>,
    pub(super) deadline: Time,
    /// When to propose again; `None`: it is being looked up.
    pub(super) propose_at: Option<Time>,
    pub(super) due: Option<Time>,
}

impl Coordinator {
    pub(super) fn inquiry_received(
        &mut self,
        now: Time,
        inquiry: Inquiry,
        effects: &mut Vec<Effect>,
    ) {
        let key = inquiry.key.clone();
        if let Some(it) = self.transactions.get(&key) {
            let is_ours = it.request().request_hash == inquiry.request_hash;
            return self.with(now, &key, effects, |it, cx| match it.is_undecided() {
                // It holds something. Whether that is prepared, or what a failed prepare has left,
                // only its vote can say.
                true if is_ours => it.query(&inquiry.service, inquiry.instance, cx),
                true => {}
                false => it.answer_inquiry(inquiry, cx),
            });
        }
        let cx = &mut Context { now, shared: &mut self.shared, effects };
        let margin = cx.settings().clock_margin;
        // Nobody can hold it yet. A record of it, made before those who look for one begin to read,
        // would be missed by them.
        let is_ahead = key.requested_at > now + margin;
        match self.view.recall(&key, margin) {
            Recall::Found(first) => cx.tell(&first, &inquiry.service, inquiry.instance),
            Recall::Absent | Recall::OutOfSight if is_ahead => {}
            Recall::Absent if now <= inquiry.deadline => {}
            Recall::Absent => {
                if self.open_inquest(inquiry, effects) {
                    self.propose_abort(now, &key, effects);
                }
            }
            Recall::OutOfSight => {
                if self.open_inquest(inquiry, effects) {
                    self.look_further_back(&key, effects);
                }
            }
        }
    }

    /// Whether this is the first that is asked about the transaction.
    fn open_inquest(&mut self, inquiry: Inquiry, effects: &mut Vec<Effect>) -> bool {
        let asker = (inquiry.service, inquiry.instance);
        if let Some(inquest) = self.inquests.get_mut(&inquiry.key) {
            // What few instances hold one transaction is bounded by its services; a flood is not.
            if inquest.askers.len() < self.shared.settings.inquiries_max {
                inquest.askers.insert(asker);
            }
            return false;
        }
        if self.inquests.len() >= self.shared.settings.inquiries_max {
            effects.push(Effect::Report(Anomaly::InquiryDropped(inquiry.key)));
            return false;
        }
        let inquest = Inquest {
            request_hash: inquiry.request_hash,
            askers: BTreeSet::from([asker]),
            deadline: inquiry.deadline,
            propose_at: None,
            due: None,
        };
        self.inquests.insert(inquiry.key, inquest);
        true
    }

    /// Asking is deciding: a transaction past its deadline that nobody has decided is aborted.
    pub(super) fn propose_abort(
        &mut self,
        now: Time,
        key: &TransactionKey,
        effects: &mut Vec<Effect>,
    ) {
        let Some(inquest) = self.inquests.get_mut(key) else { return };
        let Shared { settings, inquest_deadlines, .. } = &mut self.shared;
        let at = now + settings.append_timeout;
        inquest.propose_at = Some(at);
        inquest_deadlines.wake_by(key, &mut inquest.due, at);
        effects.push(Effect::Append(Decision {
            key: key.clone(),
            request_hash: inquest.request_hash,
            outcome: Outcome::Aborted,
            branches: Vec::new(),
            reason: Some(Reason { code: ReasonCode::Deadline, service: None, message: None }),
            decided_at: now,
            worker: settings.worker.clone(),
        }));
    }

    pub(super) fn answer_inquest(
        &mut self,
        now: Time,
        first: &Decision,
        effects: &mut Vec<Effect>,
    ) {
        let Some(inquest) = self.drop_inquest(&first.key) else { return };
        let cx = &mut Context { now, shared: &mut self.shared, effects };
        for (service, instance) in inquest.askers {
            cx.tell(first, &service, instance);
        }
    }

    pub(super) fn drop_inquest(&mut self, key: &TransactionKey) -> Option<Inquest> {
        let mut inquest = self.inquests.remove(key)?;
        self.shared.inquest_deadlines.disarm(key, &mut inquest.due);
        Some(inquest)
    }
}
