//! The SDK for services: what a service's author implements, and what calls it.
//!
//! An author writes three functions: prepare, commit, abort. When to call them, what to do when
//! they fail, hang or panic, and that each is called no more often than needed, is the business of
//! [`protocol::participant`](crate::protocol::participant) and of the loop that drives it.

mod calls;
#[cfg(feature = "service")]
pub mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
#[cfg(feature = "service")]
mod health;
#[cfg(feature = "service")]
mod inbound;
#[cfg(feature = "service")]
mod outbox;
#[cfg(feature = "service")]
mod parked;
#[cfg(feature = "service")]
pub mod serve;
#[cfg(feature = "embedded")]
mod service;
#[cfg(feature = "service")]
mod session;
#[cfg(feature = "service")]
pub mod settings;

use std::{fmt, future::Future, sync::Arc};

use futures_util::future::BoxFuture;
use serde::de::DeserializeOwned;

pub(crate) use self::calls::Calls;
#[cfg(feature = "embedded")]
pub(crate) use self::calls::Ended;
#[cfg(feature = "embedded")]
pub use self::service::Service;
pub use crate::protocol::participant::{InDoubt, Verdict};
use crate::protocol::{
    ids::{Branch, RequestHash, StoreId, TransactionKey},
    message::Payload,
    time::Time,
};

/// What a service's code may end in.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// A service, as its author sees it.
///
/// Every function may be called for many transactions at once, up to the service's
/// `max_concurrency`, and for one transaction one at a time. An error, a panic, or taking longer
/// than allowed are all the same: a failed prepare aborts the transaction and is followed by
/// [`Participant::abort`]; a failed commit or abort is called again.
pub trait Participant: Send + Sync + 'static {
    /// Makes ready to commit: whatever is needed to commit later must be stored, under
    /// [`Prepare::branch`], before this says [`Verdict::Prepared`].
    ///
    /// It may take until shortly before [`Prepare::deadline`]: then it is dropped, and has failed.
    fn prepare(&self, call: Prepare) -> impl Future<Output = Result<Verdict, Error>> + Send;

    /// Makes what was prepared under [`Finish::branch`] last. Must be idempotent: a branch that is
    /// committed already is a success. So is one that the store does not know, unless it can tell
    /// that it has never committed it: that is an error.
    fn commit(&self, call: Finish) -> impl Future<Output = Result<(), Error>> + Send;

    /// Undoes what was prepared under [`Finish::branch`], or may have been. Must be idempotent.
    ///
    /// By default there is nothing to undo.
    fn abort(&self, call: Finish) -> impl Future<Output = Result<(), Error>> + Send {
        let _ = call;
        std::future::ready(Ok(()))
    }

    /// Whether [`Participant::in_doubt`] tells what the store holds, so that it can be asked after
    /// a restart, and by one instance for another. Without a store, which is the default, what is
    /// prepared lives no longer than the process.
    fn has_store(&self) -> bool {
        false
    }

    /// What the store holds as prepared; of one transaction, if `of` names it.
    fn in_doubt(
        &self,
        of: Option<TransactionKey>,
    ) -> impl Future<Output = Result<Vec<InDoubt>, Error>> + Send {
        let _ = of;
        std::future::ready(Ok(Vec::new()))
    }

    /// What the store is called, if it has a name: an id that was made with the store and is kept in
    /// it, so that every instance with this store says the same, and one with another store another.
    /// An instance does not serve while others serve with another store. Without it, which is the
    /// default, nobody notices two instances that don't share their store.
    fn store_id(&self) -> impl Future<Output = Result<Option<StoreId>, Error>> + Send {
        std::future::ready(Ok(None))
    }

    /// Whether [`Participant::has_committed`] tells what the store has committed. Then a commit of a
    /// branch that the store neither holds nor has committed is an error, and is tried elsewhere: it
    /// was prepared in another store. Without it, which is the default, such a commit counts as
    /// applied, and two instances that don't share their store lose commits.
    fn remembers_commits(&self) -> bool {
        false
    }

    /// Whether the store has committed [`Finish::branch`], by whichever instance. It is asked only
    /// about what [`Participant::in_doubt`] does not name.
    fn has_committed(&self, call: Finish) -> impl Future<Output = Result<bool, Error>> + Send {
        let _ = call;
        std::future::ready(Ok(true))
    }
}

/// What a prepare is about.
#[derive(Debug, Clone)]
pub struct Prepare {
    /// Which transaction.
    pub key: TransactionKey,
    /// What to store it under: a transaction that is prepared twice has two branches, and only the
    /// one that its decision names may commit.
    pub branch: Branch,
    /// The digest of the request; to be stored with it, for [`InDoubt`].
    pub request_hash: RequestHash,
    /// When to give up; to be stored with it, for [`InDoubt`].
    pub deadline: Time,
    data: Payload,
}

impl Prepare {
    pub(crate) fn new(
        key: TransactionKey,
        branch: Branch,
        request_hash: RequestHash,
        deadline: Time,
        data: Payload,
    ) -> Self {
        Self { key, branch, request_hash, deadline, data }
    }

    /// The transaction's id.
    pub fn id(&self) -> &str {
        self.key.id.as_str()
    }

    /// The request's data, as JSON text.
    pub fn json(&self) -> &str {
        self.data.as_str()
    }

    /// The request's data.
    pub fn data<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_str(self.data.as_str())
    }
}

/// What a commit or an abort is about.
#[derive(Debug, Clone)]
pub struct Finish {
    /// Which transaction.
    pub key: TransactionKey,
    /// What to commit or undo.
    pub branch: Branch,
}

impl Finish {
    /// The transaction's id.
    pub fn id(&self) -> &str {
        self.key.id.as_str()
    }
}

/// A [`Participant`] of whatever type, for those who call many.
pub(crate) trait AnyParticipant: Send + Sync {
    fn prepare(self: Arc<Self>, call: Prepare) -> BoxFuture<'static, Result<Verdict, Error>>;
    fn commit(self: Arc<Self>, call: Finish) -> BoxFuture<'static, Result<(), Error>>;
    fn abort(self: Arc<Self>, call: Finish) -> BoxFuture<'static, Result<(), Error>>;
    fn in_doubt(
        self: Arc<Self>,
        of: Option<TransactionKey>,
    ) -> BoxFuture<'static, Result<Vec<InDoubt>, Error>>;
    fn has_store(&self) -> bool;

    fn has_committed(self: Arc<Self>, call: Finish) -> BoxFuture<'static, Result<bool, Error>> {
        let _ = call;
        Box::pin(std::future::ready(Ok(true)))
    }

    #[cfg(feature = "service")]
    fn remembers_commits(&self) -> bool {
        false
    }

    #[cfg(feature = "service")]
    fn store_id(self: Arc<Self>) -> BoxFuture<'static, Result<Option<StoreId>, Error>> {
        Box::pin(std::future::ready(Ok(None)))
    }
}

impl<P: Participant> AnyParticipant for P {
    fn prepare(self: Arc<Self>, call: Prepare) -> BoxFuture<'static, Result<Verdict, Error>> {
        Box::pin(async move { Participant::prepare(&*self, call).await })
    }

    fn commit(self: Arc<Self>, call: Finish) -> BoxFuture<'static, Result<(), Error>> {
        Box::pin(async move { Participant::commit(&*self, call).await })
    }

    fn abort(self: Arc<Self>, call: Finish) -> BoxFuture<'static, Result<(), Error>> {
        Box::pin(async move { Participant::abort(&*self, call).await })
    }

    fn in_doubt(
        self: Arc<Self>,
        of: Option<TransactionKey>,
    ) -> BoxFuture<'static, Result<Vec<InDoubt>, Error>> {
        Box::pin(async move { Participant::in_doubt(&*self, of).await })
    }

    fn has_committed(self: Arc<Self>, call: Finish) -> BoxFuture<'static, Result<bool, Error>> {
        Box::pin(async move { Participant::has_committed(&*self, call).await })
    }

    fn has_store(&self) -> bool {
        Participant::has_store(self)
    }

    #[cfg(feature = "service")]
    fn remembers_commits(&self) -> bool {
        Participant::remembers_commits(self)
    }

    #[cfg(feature = "service")]
    fn store_id(self: Arc<Self>) -> BoxFuture<'static, Result<Option<StoreId>, Error>> {
        Box::pin(async move { Participant::store_id(&*self).await })
    }
}

impl fmt::Debug for dyn AnyParticipant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AnyParticipant")
    }
}
