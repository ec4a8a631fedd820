//! Logs what is unusual. The worker deals with it by itself; some of it needs an operator as well.

use std::collections::BTreeSet;

use crate::{
    anomalies,
    protocol::{
        coordinator::Anomaly,
        ids::{ServiceName, TransactionKey},
        message::{Parked, ParkedCause},
    },
    transport::amqp::names::Names,
    worker::{WorkerStats, packs::PacksUnusable, searches::Searches},
};

/// How many undecidable inquiries to remember.
const UNDECIDABLE_MAX: usize = 1024;

/// The undecidable inquiries that were logged: instances repeat them every few seconds.
#[derive(Debug, Default)]
pub(super) struct Undecidable {
    logged: BTreeSet<(TransactionKey, ServiceName)>,
}

impl Undecidable {
    /// Whether to log this one. If there are too many to remember, all are logged again.
    fn is_new(&mut self, key: &TransactionKey, service: &ServiceName) -> bool {
        if self.logged.len() >= UNDECIDABLE_MAX {
            self.logged.clear();
        }
        self.logged.insert((key.clone(), service.clone()))
    }
}

/// Logs what is parked, who retries it, and what an operator can do.
pub(super) fn tell_parked(parked: &Parked, names: &Names) {
    let Parked { key, cause, .. } = parked;
    match cause {
        ParkedCause::Uncommitted { service, error: Some(error), .. } => tracing::error!(
            transaction = %key, %service, %error,
            "commit parked: the transaction is committed, but this service has failed to apply it; its \
             instances keep retrying, with pauses, until one succeeds: fix what the error says"
        ),
        ParkedCause::Uncommitted { service, error: None, .. } => tracing::error!(
            transaction = %key, %service,
            "commit parked: the transaction is committed, but no instance of this service answers; the \
             commit waits in queue `{}`: start an instance, or see in its log why it does not answer",
            names.finish_any_of(service)
        ),
        ParkedCause::Undecidable(_) => tracing::error!(
            transaction = %key,
            "transaction parked: the journal doesn't reach back to where it began, so its outcome can't \
             be determined; its request is in `{}`: find out from its producer and its services how it \
             ended",
            names.unresolved()
        ),
    }
}

/// Logs why this worker starts more slowly than it could, and what an operator can do.
pub(super) fn tell_packs_unusable(why: &PacksUnusable, names: &Names) {
    let queue = names.packed_journal();
    match why {
        PacksUnusable::Missing => tracing::info!(
            "there is no queue `{queue}`, by which workers start sooner: run `dtc topology apply`"
        ),
        PacksUnusable::OtherUser(reason) => tracing::warn!(
            reason,
            "this worker can't use `{queue}`, by which workers start sooner: the broker's name for its \
             user is not the one in `broker.url`, as may be with OAuth 2 tokens; put the broker's name \
             into `broker.url`"
        ),
        PacksUnusable::NotPermitted(reason) => tracing::warn!(
            reason,
            "this worker can't use `{queue}`, by which workers start sooner: permit its user to read \
             it, and to write to the default exchange"
        ),
    }
}

/// Logs `anomaly`, or counts it.
pub(super) fn report(
    anomaly: &Anomaly,
    names: &Names,
    searches: &Searches,
    undecidable: &mut Undecidable,
    stats: &mut WorkerStats,
) {
    match anomaly {
        Anomaly::ResultUnclaimed { key, attempts } => {
            stats.unclaimed += 1;
            tracing::warn!(
                transaction = %key, attempts,
                "giving up a result that the broker did not take; its producer can ask again"
            );
        }
        Anomaly::StoresDiffer { service, before, now } => {
            let ((other_instance, other_store), (instance, store)) = (before, now);
            tracing::error!(
                %service, %instance, %store, %other_instance, %other_store,
                "instances of a service name different stores, so one can't commit what another has \
                 prepared: all of them must share one store; stop those with the wrong one"
            );
        }
        Anomaly::ServiceUnavailable(service) => {
            let queue = names.prepare_of(service);
            let why = searches.why_unavailable(service).unwrap_or("the broker refused a prepare");
            tracing::warn!(
                %service, %queue, why,
                "a service can't be reached; its transactions wait, and abort at their deadlines"
            );
        }
        Anomaly::ServiceAvailable(service) => {
            let queue = names.prepare_of(service);
            tracing::info!(%service, %queue, "a service can be reached again");
        }
        Anomaly::ServiceUnserved(service) => {
            let queue = names.prepare_of(service);
            tracing::warn!(
                %service, %queue,
                "no instance serves a service: its queue has no consumer, and its transactions abort \
                 (`no_slot`) until there is one; start an instance, or see in its log why it takes \
                 nothing"
            );
        }
        Anomaly::ServiceServed(service) => {
            let queue = names.prepare_of(service);
            tracing::info!(%service, %queue, "a service is served again");
        }
        Anomaly::InquiryUndecidable(key, service) => {
            if undecidable.is_new(key, service) {
                anomalies::log(anomaly);
            }
        }
        Anomaly::DuplicateRequest(_)
        | Anomaly::LateVote(..)
        | Anomaly::PreparedTwice(..)
        | Anomaly::CommitFailed { .. }
        | Anomaly::Unanswered(..)
        | Anomaly::Stalled(..)
        | Anomaly::InquiryDropped(_)
        | Anomaly::JournalGap(_) => anomalies::log(anomaly),
    }
}
