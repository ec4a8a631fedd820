//! The level and the words with which a coordinator's anomalies are logged, for workers and for the
//! embedded coordinator.
//!
//! WARN: an operator should investigate. ERROR: a service, or a producer, loses an outcome. DEBUG:
//! the protocol expects and corrects it, however rare it is.

use crate::protocol::coordinator::Anomaly;

/// Logs an anomaly that involves no queue.
pub(crate) fn log(anomaly: &Anomaly) {
    match anomaly {
        Anomaly::CommitFailed { key, service, instance, failures, error } => tracing::warn!(
            transaction = %key, %service, %instance, failures, %error,
            "a service failed to apply an outcome; it is asked again, and a commit that keeps failing \
             is parked"
        ),
        Anomaly::JournalGap(offset) => tracing::error!(
            offset,
            "the journal has a gap before this offset: transactions requested before it was written \
             can't be resolved and will be parked; was the journal deleted or truncated?"
        ),
        Anomaly::Unanswered(key, service) => tracing::debug!(
            transaction = %key, %service, "no answer to a command; it is sent again"
        ),
        Anomaly::PreparedTwice(key, service) => tracing::debug!(
            transaction = %key, %service, "two branches of one transaction are prepared; one is undone"
        ),
        Anomaly::DuplicateRequest(key) => {
            tracing::debug!(transaction = %key, "a request came twice");
        }
        Anomaly::LateVote(key, service) => {
            tracing::debug!(transaction = %key, %service, "a vote came late");
        }
        Anomaly::Stalled(key, service) => tracing::debug!(
            transaction = %key, %service,
            "a transaction that holds slots of other services got none of this one in time"
        ),
        Anomaly::InquiryDropped(key) => tracing::debug!(
            transaction = %key, "too many inquiries at once; this one is dropped and will come again"
        ),
        Anomaly::InquiryUndecidable(key, service) => tracing::error!(
            transaction = %key, %service,
            "a service holds a prepared transaction whose outcome can't be determined: the journal doesn't \
             reach back to where it began; nothing is guessed, so find out from its producer or the \
             other services how it ended, and end it in this service's store"
        ),
        Anomaly::ResultUnclaimed { .. }
        | Anomaly::ServiceUnavailable(_)
        | Anomaly::ServiceAvailable(_)
        | Anomaly::ServiceUnserved(_)
        | Anomaly::ServiceServed(_)
        | Anomaly::StoresDiffer { .. } => tracing::debug!(?anomaly, "reported"),
    }
}
