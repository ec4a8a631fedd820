//! The printed result of a transaction: [`BriefResult`], [`DetailedResult`], or [`ProducerResult`].
//!
//! ```json
//! {"id":"TX1","status":"COMMITTED"}
//! {"id":"TX2","status":"ABORTED","reason":{"service":"stock","code":"refused","message":"sold out"},
//!  "unresolved":[],"attempts":{"stock":{"prepare":1,"commit":0,"abort":0}},"duration_ms":12.345}
//! ```
//!
//! A field is never left out: without a value it is `null`, or an empty array or object. So a
//! reader can rely on the fields, and two results can be compared line by line.

use std::{collections::BTreeMap, time::Duration};

use serde::{Serialize, Serializer};

use crate::protocol::{
    ids::ServiceName,
    message::{Answer, Reason},
};

/// A result in its shortest form: `{"id","status"}`.
#[derive(Clone, Debug, Serialize)]
pub struct BriefResult<'a> {
    /// The transaction's id.
    pub id: &'a str,
    /// `COMMITTED` or `ABORTED`.
    pub status: &'static str,
}

impl<'a> BriefResult<'a> {
    /// The short form of `answer`.
    pub fn of(answer: &'a Answer) -> Self {
        Self { id: answer.id.as_str(), status: answer.outcome.as_str() }
    }
}

/// A result with everything that is known about it:
/// `{"id","status","reason","unresolved","attempts","duration_ms"}`.
#[derive(Clone, Debug, Serialize)]
pub struct DetailedResult<'a> {
    /// The transaction's id.
    pub id: &'a str,
    /// `COMMITTED` or `ABORTED`.
    pub status: &'static str,
    /// Why it aborted; `null` if it is committed.
    pub reason: Option<AbortReason<'a>>,
    /// The services whose commit is parked, in the answer's order.
    #[serde(serialize_with = "names")]
    pub unresolved: &'a [ServiceName],
    /// How often the code of each service was called; services without a call are left out.
    #[serde(serialize_with = "by_name")]
    pub attempts: &'a BTreeMap<ServiceName, Attempts>,
    /// From the start of the transaction to its result, in milliseconds with microsecond precision.
    pub duration_ms: f64,
}

impl<'a> DetailedResult<'a> {
    /// The long form of `answer`, which took `duration`.
    pub fn of(
        answer: &'a Answer,
        attempts: &'a BTreeMap<ServiceName, Attempts>,
        duration: Duration,
    ) -> Self {
        let BriefResult { id, status } = BriefResult::of(answer);
        Self {
            id,
            status,
            reason: answer.reason.as_ref().map(AbortReason::of),
            unresolved: &answer.unresolved,
            attempts,
            duration_ms: duration.as_micros() as f64 / 1000.0,
        }
    }
}

/// A result with everything that a producer receives:
/// `{"id","status","reason","unresolved","requested_at","decided_at","duration_ms"}`.
#[derive(Clone, Debug, Serialize)]
pub struct ProducerResult<'a> {
    /// The transaction's id.
    pub id: &'a str,
    /// `COMMITTED` or `ABORTED`.
    pub status: &'static str,
    /// Why it aborted; `null` if it is committed.
    pub reason: Option<AbortReason<'a>>,
    /// The services whose commit is parked, in the answer's order.
    #[serde(serialize_with = "names")]
    pub unresolved: &'a [ServiceName],
    /// When it was requested, in seconds since the Unix epoch. A retry repeats it.
    pub requested_at: u64,
    /// When it was decided, in milliseconds since the Unix epoch.
    pub decided_at: u64,
    /// From sending the request to its result, in milliseconds with microsecond precision.
    pub duration_ms: f64,
}

impl<'a> ProducerResult<'a> {
    /// The result in `answer`, which took `duration`.
    pub fn of(answer: &'a Answer, duration: Duration) -> Self {
        let BriefResult { id, status } = BriefResult::of(answer);
        Self {
            id,
            status,
            reason: answer.reason.as_ref().map(AbortReason::of),
            unresolved: &answer.unresolved,
            requested_at: answer.requested_at.as_millis() / 1000,
            decided_at: answer.decided_at.as_millis(),
            duration_ms: duration.as_micros() as f64 / 1000.0,
        }
    }
}

/// Why a transaction aborted: `{"service","code","message"}`.
#[derive(Clone, Debug, Serialize)]
pub struct AbortReason<'a> {
    /// The service that caused it, if it was one; otherwise `null`.
    pub service: Option<&'a str>,
    /// The code: see [`ReasonCode`](crate::protocol::message::ReasonCode).
    pub code: &'static str,
    /// The message of the service or of the coordinator; otherwise `null`.
    pub message: Option<&'a str>,
}

impl<'a> AbortReason<'a> {
    /// The printed form of `reason`.
    pub fn of(reason: &'a Reason) -> Self {
        Self {
            service: reason.service.as_ref().map(ServiceName::as_str),
            code: reason.code.as_str(),
            message: reason.message.as_deref(),
        }
    }
}

/// How often a service's code was called for one transaction: `{"prepare","commit","abort"}`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Attempts {
    /// Calls of its prepare.
    pub prepare: u32,
    /// Calls of its commit.
    pub commit: u32,
    /// Calls of its abort.
    pub abort: u32,
}

fn names<S: Serializer>(names: &[ServiceName], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(names.iter().map(ServiceName::as_str))
}

fn by_name<S: Serializer>(
    attempts: &BTreeMap<ServiceName, Attempts>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(attempts.iter().map(|(name, attempts)| (name.as_str(), attempts)))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::{Attempts, BriefResult, DetailedResult};
    use crate::protocol::{
        ids::{ServiceName, TransactionId},
        message::{Answer, Outcome, Reason, ReasonCode},
        time::Time,
    };

    fn answer(outcome: Outcome, reason: Option<Reason>, unresolved: &[&str]) -> Answer {
        let unresolved = unresolved.iter().map(|name| ServiceName::parse(name).unwrap()).collect();
        let id = TransactionId::parse("TX1").unwrap();
        let (requested_at, decided_at) = (Time::EPOCH, Time::EPOCH);
        Answer { id, requested_at, outcome, reason, unresolved, decided_at }
    }

    fn detailed(answer: &Answer, attempts: &[(&str, [u32; 3])]) -> String {
        let attempts: BTreeMap<_, _> = attempts
            .iter()
            .map(|(name, [prepare, commit, abort])| {
                let attempts = Attempts { prepare: *prepare, commit: *commit, abort: *abort };
                (ServiceName::parse(name).unwrap(), attempts)
            })
            .collect();
        let duration = Duration::from_nanos(12_345_678);
        serde_json::to_string(&DetailedResult::of(answer, &attempts, duration)).unwrap()
    }

    #[test]
    fn a_brief_result_is_id_and_status() {
        let brief =
            |outcome| serde_json::to_string(&BriefResult::of(&answer(outcome, None, &[]))).unwrap();
        assert_eq!(brief(Outcome::Committed), r#"{"id":"TX1","status":"COMMITTED"}"#);
        assert_eq!(brief(Outcome::Aborted), r#"{"id":"TX1","status":"ABORTED"}"#);
    }

    #[test]
    fn a_committed_result_has_no_reason() {
        let answer = answer(Outcome::Committed, None, &["stock"]);
        assert_eq!(
            detailed(&answer, &[("stock", [1, 4, 0]), ("payments", [1, 1, 0])]),
            r#"{"id":"TX1","status":"COMMITTED","reason":null,"unresolved":["stock"],"attempts":{"payments":{"prepare":1,"commit":1,"abort":0},"stock":{"prepare":1,"commit":4,"abort":0}},"duration_ms":12.345}"#
        );
    }

    #[test]
    fn an_aborted_result_says_why() {
        let stock = ServiceName::parse("stock").unwrap();
        let refused =
            Reason { message: Some("sold out".into()), ..Reason::at(&stock, ReasonCode::Refused) };
        assert_eq!(
            detailed(&answer(Outcome::Aborted, Some(refused), &[]), &[("stock", [1, 0, 0])]),
            r#"{"id":"TX1","status":"ABORTED","reason":{"service":"stock","code":"refused","message":"sold out"},"unresolved":[],"attempts":{"stock":{"prepare":1,"commit":0,"abort":0}},"duration_ms":12.345}"#
        );
    }

    #[test]
    fn a_reason_without_service_or_message_says_so() {
        let late = Reason { code: ReasonCode::Deadline, service: None, message: None };
        assert_eq!(
            detailed(&answer(Outcome::Aborted, Some(late), &[]), &[]),
            r#"{"id":"TX1","status":"ABORTED","reason":{"service":null,"code":"deadline","message":null},"unresolved":[],"attempts":{},"duration_ms":12.345}"#
        );
    }
}
