//! What a worker says of what is unusual and dealt with by itself.

use std::collections::BTreeSet;

use crate::{
    anomalies,
    protocol::{
        coordinator::Anomaly,
        ids::{ServiceName, TransactionKey},
        message::{Parked, ParkedCause},
    },
    transport::amqp::names::Names,
    worker::{Tally, packs::PacksUnusable, searches::Searches},
};

/// How many undecidable inquiries are known to have been logged.
const UNDECIDABLE_MAX: usize = 1024;

/// Which undecidable inquiries were logged: instances repeat theirs every few seconds.
#[derive(Debug, Default)]
pub(super) struct Undecidable {
    logged: BTreeSet<(TransactionKey, ServiceName)>,
}

impl Undecidable {
    /// Whether this one is to be logged. Where there are too many to remember, all are logged again.
    fn is_new(&mut self, key: &TransactionKey, service: &ServiceName) -> bool {
        if self.logged.len() >= UNDECIDABLE_MAX {
            self.logged.clear();
        }
        self.logged.insert((key.clone(), service.clone()))
    }
}

/// Says what is parked, who goes on with it, and what a person can do.
pub(super) fn tell_parked(parked: &Parked, names: &Names) {
    let Parked { key, cause, .. } = parked;
    match cause {
        ParkedCause::Uncommitted { service, error: Some(error), .. } => tracing::error!(
            transaction = %key, %service, %error,
            "commit parked: the transaction is committed, but this service has failed to apply it; \
             its instances go on trying, with pauses, until one succeeds: mend what the error says"
        ),
        ParkedCause::Uncommitted { service, error: None, .. } => tracing::error!(
            transaction = %key, %service,
            "commit parked: the transaction is committed, but no instance of this service answers; \
             the commit waits in queue `{}`: start an instance, or find out why none answers",
            names.finish_any_of(service)
        ),
        ParkedCause::Undecidable(_) => tracing::error!(
            transaction = %key,
            "transaction parked: the journal doesn't reach back to where it began, so its outcome \
             can't be told, and a person has to see to it; its request is in `{}`",
            names.unresolved()
        ),
    }
}

/// Says why this worker starts more slowly than it could, and what an operator can do.
pub(super) fn tell_packs_unusable(why: &PacksUnusable, names: &Names) {
    let queue = names.packed_journal();
    match why {
        PacksUnusable::Missing => tracing::info!(
            "there is no queue `{queue}`, by which workers start sooner: run `dtc topology apply`"
        ),
        PacksUnusable::OtherUser(reason) => tracing::warn!(
            reason,
            "this worker can't use `{queue}`, by which workers start sooner: the broker knows its \
             user by another name than `broker.url` has, as with OAuth 2 tokens; put the name that \
             the broker says into `broker.url`"
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
    tally: &mut Tally,
) {
    match anomaly {
        Anomaly::ResultUnclaimed { key, attempts } => {
            tally.unclaimed += 1;
            tracing::warn!(
                transaction = %key, attempts,
                "the broker did not take a result, and it is given up; its producer can ask again"
            );
        }
        Anomaly::StoresDiffer { service, before, now } => {
            let ((other_instance, other_store), (instance, store)) = (before, now);
            tracing::error!(
                %service, %instance, %store, %other_instance, %other_store,
                "instances of a service name different stores, and what one has prepared the others \
                 can't commit: all of them must share one; stop those with the wrong one"
            );
        }
        Anomaly::ServiceUnavailable(service) => {
            let queue = names.prepare_of(service);
            let why = searches.why_unavailable(service).unwrap_or("the broker refused a prepare");
            tracing::warn!(
                %service, %queue, why,
                "a service can't be reached; its transactions wait, and end by their deadlines"
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
