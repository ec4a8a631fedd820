//! What a producer asks for.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde_json::Value;

use crate::{
    protocol::{
        ids::{InvalidName, ServiceName, TransactionId},
        message::TransactionSpec,
        time::Time,
    },
    wire::{hash, message::RequestTooLarge},
};

/// What is to commit at every service named, or at none.
#[derive(Debug, Clone, PartialEq)]
pub struct Submission {
    /// What it is called: `[A-Za-z0-9._:-]{1,128}`.
    pub id: String,
    /// The services it is about. At least one; one named twice counts once.
    pub involved_services: Vec<String>,
    /// Handed to every prepare: a JSON object.
    pub data: Value,
    /// How long the prepares may take; `None`: the workers' default.
    pub timeout: Option<Duration>,
    /// When it was first asked for, of which the whole seconds count; `None`: now. Who asks again
    /// for the same transaction repeats it: see [the module](super).
    pub requested_at: Option<Time>,
}

/// A transaction that can't be sent as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidSubmission {
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
    /// A prepare has at least a millisecond, and at most a day.
    #[error("the timeout of transaction `{id}` must be from 1 ms to a day")]
    Timeout {
        /// Which.
        id: TransactionId,
    },
    /// It doesn't fit into a message.
    #[error("transaction `{id}` is too large")]
    TooLarge {
        /// Which.
        id: TransactionId,
        /// By which measure.
        #[source]
        source: RequestTooLarge,
    },
}

impl Submission {
    /// A transaction over `involved_services`, asked for now.
    pub fn new<S: Into<String>>(
        id: impl Into<String>,
        involved_services: impl IntoIterator<Item = S>,
        data: Value,
    ) -> Self {
        let involved_services = involved_services.into_iter().map(Into::into).collect();
        Self { id: id.into(), involved_services, data, timeout: None, requested_at: None }
    }

    /// The same transaction as the one that was asked for at `moment`.
    #[must_use]
    pub fn requested_at(mut self, moment: Time) -> Self {
        self.requested_at = Some(moment);
        self
    }

    pub(crate) fn check(&self) -> Result<TransactionSpec, InvalidSubmission> {
        const DAY: Duration = Duration::from_secs(24 * 60 * 60);
        let id = TransactionId::parse(&self.id)?;
        let services: Result<BTreeSet<_>, _> =
            self.involved_services.iter().map(|name| ServiceName::parse(name)).collect();
        let services: Arc<[_]> = services?.into_iter().collect();
        if services.is_empty() {
            return Err(InvalidSubmission::NoServices { id });
        }
        let Value::Object(data) = &self.data else {
            return Err(InvalidSubmission::DataNotAnObject { id });
        };
        if self.timeout.is_some_and(|it| it < Duration::from_millis(1) || it > DAY) {
            return Err(InvalidSubmission::Timeout { id });
        }
        let data = hash::canonical(data.clone());
        let request_hash = hash::request_hash(&services, &data);
        Ok(TransactionSpec { id, services, data, request_hash, timeout: self.timeout })
    }
}
