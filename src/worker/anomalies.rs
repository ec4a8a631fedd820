//! What a worker says of what is unusual and dealt with by itself.

use crate::{
    protocol::coordinator::Anomaly, transport::amqp::names::Names, worker::Tally,
    worker::searches::Searches,
};

/// Logs `anomaly`, or counts it.
pub(super) fn report(anomaly: &Anomaly, names: &Names, searches: &Searches, tally: &mut Tally) {
    match anomaly {
        Anomaly::ResultUnclaimed { key, attempts } => {
            tally.unclaimed += 1;
            tracing::warn!(
                transaction = %key, attempts,
                "the broker did not take a result, and it is given up; its producer can ask again"
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
        Anomaly::DuplicateRequest(_)
        | Anomaly::LateVote(..)
        | Anomaly::PreparedTwice(..)
        | Anomaly::CommitFailed { .. }
        | Anomaly::Unanswered(..)
        | Anomaly::Stalled(..)
        | Anomaly::InquiryDropped(_)
        | Anomaly::JournalGap(_) => tracing::debug!(?anomaly, "reported"),
    }
}
