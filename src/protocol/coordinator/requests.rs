//! Handles a request when it comes: rejects it, adds it to a transaction in flight, answers it with a
//! decision from the journal, or begins a transaction.

use crate::protocol::{
    coordinator::{
        Anomaly, CoordinatorContext, Effect, Settings, Work, transaction::CoordinatedTransaction,
    },
    ids::TransactionKey,
    journal_view::Recall,
    message::{Delivery, ReasonCode, Request},
};

impl Work {
    pub(super) fn request_received(
        &mut self,
        request: Request,
        delivery: Delivery,
        deliveries: u32,
        cx: &mut CoordinatorContext<'_>,
    ) {
        if cx.shared.draining {
            return cx.effects.push(Effect::Release(delivery));
        }
        let Settings { clock_margin, deliveries_max, .. } = *cx.settings();
        if request.key.requested_at > cx.now + clock_margin {
            return cx.reject(request, delivery, ReasonCode::Invalid);
        }
        let key = request.key.clone();
        let in_flight = self.same_id_in_flight(&key);
        if in_flight.as_ref() == Some(&key) {
            return self.attach(&key, request, (delivery, deliveries), cx);
        }
        let (recall, earlier) = self.view.recall_or_namesake(&key, clock_margin);
        // A transaction that has its own outcome, or may have one, is no retry of another one.
        if recall == Recall::Absent
            && let Some(earlier) = in_flight
        {
            // Other workers can't have worked on the earlier transaction because of this request.
            return self.attach(&earlier, request, (delivery, 1), cx);
        }
        let decided = match &recall {
            Recall::Found(first) => Some(first),
            Recall::Absent | Recall::OutOfSight => earlier.as_ref(),
        };
        if decided.is_some_and(|first| first.request_hash != request.request_hash) {
            return cx.reject(request, delivery, ReasonCode::IdReused);
        }
        let transaction =
            CoordinatedTransaction::new(request, delivery, deliveries, deliveries_max);
        self.transactions.insert(&key, Box::new(transaction));
        match (recall, earlier) {
            (Recall::Found(first), _) => self.with(&key, cx, |it, cx| it.adopt(&first, cx)),
            (Recall::Absent, Some(earlier)) => {
                self.with(&key, cx, |it, cx| it.answer_as(&earlier, cx));
            }
            (Recall::Absent, None) => self.with(&key, cx, CoordinatedTransaction::start),
            (Recall::OutOfSight, _) => self.history.look_for(&key, &self.view, cx),
        }
    }

    /// The transaction in flight with this id: `key` itself, or else one that `key` is a retry of, with a new
    /// timestamp.
    fn same_id_in_flight(&self, key: &TransactionKey) -> Option<TransactionKey> {
        let mut times = self.transactions.of_id(&key.id).map(|(requested_at, _)| requested_at);
        let first = times.next()?;
        let exact = first == key.requested_at || times.any(|at| at == key.requested_at);
        let requested_at = if exact { key.requested_at } else { first };
        Some(TransactionKey { id: key.id.clone(), requested_at })
    }

    fn attach(
        &mut self,
        to: &TransactionKey,
        request: Request,
        (delivery, deliveries): (Delivery, u32),
        cx: &mut CoordinatorContext<'_>,
    ) {
        self.with(to, cx, |it, cx| {
            if it.request().request_hash == request.request_hash {
                cx.effects.push(Effect::Report(Anomaly::DuplicateRequest(request.key)));
                it.attach((delivery, request.answer_at), deliveries, cx);
            } else {
                cx.reject(request, delivery, ReasonCode::IdReused);
            }
        });
    }
}
