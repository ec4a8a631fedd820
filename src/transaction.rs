//! What is to commit everywhere or nowhere, and how that has ended: the same for the coordinator of
//! one process and for the workers on RabbitMQ.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde_json::Value;

use crate::{
    protocol::{
        ids::{InvalidName, ServiceName, TransactionId, TransactionKey},
        message::{Answer, AnswerAt, Outcome, Reason, TransactionSpec},
        time::Time,
    },
    wire::hash,
};

/// A prepare has at least so long.
const TIMEOUT_MIN: Duration = Duration::from_millis(1);

/// And at most so long.
const TIMEOUT_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// What is to commit at every service named, or at none.
///
/// Whether it can be run or submitted is checked when it is: see [`InvalidTransaction`].
///
/// ```
/// use std::time::Duration;
///
/// use dtc::Transaction;
/// use serde_json::json;
///
/// let order = Transaction::new("order-17", ["payments", "stock"], json!({"amount": 100}))
///     .timeout(Duration::from_secs(2));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Transaction {
    id: String,
    involved_services: Vec<String>,
    data: Value,
    timeout: Option<Duration>,
    answer_at: AnswerAt,
    requested_at: Option<Time>,
}

impl Transaction {
    /// The transaction `id` (`[A-Za-z0-9._:-]{1,128}`) over `involved_services`: at least one
    /// (`[A-Za-z0-9_-]{1,64}`); one named twice counts once. Every prepare is handed `data`, which
    /// must be a JSON object.
    pub fn new<S: Into<String>>(
        id: impl Into<String>,
        involved_services: impl IntoIterator<Item = S>,
        data: Value,
    ) -> Self {
        let involved_services = involved_services.into_iter().map(Into::into).collect();
        Self {
            id: id.into(),
            involved_services,
            data,
            timeout: None,
            answer_at: AnswerAt::default(),
            requested_at: None,
        }
    }

    /// Sets how long the prepares may take: from 1 ms to a day. Default: what the coordinator has,
    /// which is 5 s unless that is set.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Sets when the result goes out if it commits: [`AnswerAt::Applied`], the default, or
    /// [`AnswerAt::Decided`], which is sooner. The embedded coordinator answers when all is applied,
    /// whatever is set.
    #[must_use]
    pub fn answer_at(mut self, moment: AnswerAt) -> Self {
        self.answer_at = moment;
        self
    }

    /// Makes it the transaction that was requested at `moment`, of which the whole seconds count.
    /// Default: it is requested when it is submitted.
    ///
    /// A producer that has not heard what became of a transaction submits it again with the moment
    /// of its [key](TransactionKey): see [`Client`](crate::Client). The embedded coordinator
    /// ignores the moment, and knows a transaction by its id.
    #[must_use]
    pub fn requested_at(mut self, moment: Time) -> Self {
        self.requested_at = Some(moment);
        self
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The services that it is about, as they were named.
    pub fn involved_services(&self) -> &[String] {
        &self.involved_services
    }

    /// What every prepare is handed.
    pub fn data(&self) -> &Value {
        &self.data
    }

    /// When it was first requested, if that is set.
    #[cfg(feature = "client")]
    pub(crate) fn moment(&self) -> Option<Time> {
        self.requested_at
    }

    pub(crate) fn check(&self) -> Result<TransactionSpec, InvalidTransaction> {
        let id = TransactionId::parse(&self.id)?;
        let services: Result<BTreeSet<_>, _> =
            self.involved_services.iter().map(|name| ServiceName::parse(name)).collect();
        let services: Arc<[_]> = services?.into_iter().collect();
        if services.is_empty() {
            return Err(InvalidTransaction::NoServices { id });
        }
        let Value::Object(data) = &self.data else {
            return Err(InvalidTransaction::DataNotAnObject { id });
        };
        if self.timeout.is_some_and(|it| !(TIMEOUT_MIN..=TIMEOUT_MAX).contains(&it)) {
            return Err(InvalidTransaction::Timeout { id });
        }
        let data = hash::canonical(data.clone());
        let request_hash = hash::request_hash(&services, &data);
        let Self { timeout, answer_at, .. } = *self;
        Ok(TransactionSpec { id, services, data, request_hash, timeout, answer_at })
    }
}

/// How a transaction has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TransactionResult {
    /// Its id.
    pub id: TransactionId,
    /// When it was requested. Where this result answers a retry under another moment, it is the
    /// moment of the first request.
    pub requested_at: Time,
    /// How it has ended.
    pub outcome: Outcome,
    /// Why it aborted; `None` if it is committed.
    pub reason: Option<Reason>,
    /// The services whose commit failed for good: the transaction is committed, and they have still
    /// to catch up.
    pub unresolved: Vec<ServiceName>,
    /// When it was decided, by the clock of the coordinator.
    pub decided_at: Time,
}

impl TransactionResult {
    pub(crate) fn of(answer: Answer) -> Self {
        let Answer { id, requested_at, outcome, reason, unresolved, decided_at } = answer;
        Self { id, requested_at, outcome, reason, unresolved, decided_at }
    }

    /// Whether every service has committed, or will.
    pub fn is_committed(&self) -> bool {
        self.outcome == Outcome::Committed
    }

    /// What names the transaction.
    pub fn key(&self) -> TransactionKey {
        TransactionKey { id: self.id.clone(), requested_at: self.requested_at }
    }
}

/// A transaction that can't be run or submitted as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidTransaction {
    /// Its id or one of its services has a name that is not one.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// It names no service.
    #[error("transaction `{id}` involves no service")]
    NoServices {
        /// Which.
        id: TransactionId,
    },
    /// Its data is not a JSON object.
    #[error("the data of transaction `{id}` is not a JSON object")]
    DataNotAnObject {
        /// Which.
        id: TransactionId,
    },
    /// Its prepares have less than a millisecond, or more than a day.
    #[error("the timeout of transaction `{id}` must be from 1 ms to a day")]
    Timeout {
        /// Which.
        id: TransactionId,
    },
    /// It doesn't fit into a message. In one process there is no such bound.
    #[error("transaction `{id}` is too large: {problem}")]
    TooLarge {
        /// Which.
        id: TransactionId,
        /// By which measure.
        problem: String,
    },
    /// Another transaction of the same run has its id.
    #[error("duplicate transaction id `{id}`")]
    DuplicateId {
        /// Which.
        id: TransactionId,
    },
}
