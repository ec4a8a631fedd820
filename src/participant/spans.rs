//! The spans of the log: which service, instance and transaction a line is about.
//!
//! Every span has the level ERROR, so that no line lacks its fields, whatever level is logged. The
//! span of an instance is entered at each poll, which costs some 10 ns. Any other span is created only
//! where a line is logged or a service's code is called. Without a subscriber, none costs anything.

use tracing::{Span, field};

#[cfg(feature = "service")]
use crate::protocol::ids::InstanceId;
use crate::protocol::{
    ids::{ServiceName, TransactionKey},
    participant::Effect,
};

/// The target of the spans around calls of a service's code. Where a subscriber is set, such a span
/// costs about 0.3 µs; turn this target off to save that.
pub(crate) const CALL_TARGET: &str = "dtc::call";

/// A span around one instance of a service.
#[cfg(feature = "service")]
pub(crate) fn serve(service: &ServiceName, instance: &InstanceId) -> Span {
    tracing::error_span!("serve", %service, %instance)
}

/// A span around lines about what a service does with an outcome. An instance on RabbitMQ leaves out
/// `service`: [`serve`] has it.
pub(crate) fn finish(service: Option<&ServiceName>, key: &TransactionKey) -> Span {
    tracing::error_span!("finish", service = service.map(field::display), transaction = %key)
}

/// A span around the call of a service's code that `effect` asks for, so that what the code logs
/// carries the fields too.
pub(super) fn call(service: Option<&ServiceName>, effect: &Effect) -> Span {
    macro_rules! call_span {
        ($name:literal, $key:expr) => {
            tracing::error_span!(
                target: CALL_TARGET, $name,
                service = service.map(field::display), transaction = $key.map(field::display)
            )
        };
    }
    match effect {
        Effect::CallPrepare { key, .. } => call_span!("prepare", Some(key)),
        Effect::CallCommit { key, .. } => call_span!("commit", Some(key)),
        Effect::CallAbort { key, .. } => call_span!("abort", Some(key)),
        Effect::ReadStore(key) => call_span!("in_doubt", Some(key)),
        Effect::LookUpCommit { key, .. } => call_span!("has_committed", Some(key)),
        Effect::ScanStore => call_span!("in_doubt", None::<&TransactionKey>),
        Effect::Vote { .. } | Effect::Done { .. } | Effect::Inquire(_) | Effect::Ack(_) => {
            Span::none()
        }
    }
}
