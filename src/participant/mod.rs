//! The SDK for services: what a service's author implements, and what calls it.
//!
//! An author writes three functions: prepare, commit, abort. When to call them, what to do when
//! they fail, hang or panic, and that each is called no more often than needed, is the business of
//! [`protocol::participant`](crate::protocol::participant) and of the loop that drives it.

#[cfg(feature = "service")]
mod builder;
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
pub(crate) mod spans;

use std::{fmt, future::Future, sync::Arc};

use futures_util::future::BoxFuture;
use serde::de::DeserializeOwned;

#[cfg(feature = "service")]
pub use self::builder::{ServiceBuilder, service};
#[cfg(feature = "embedded")]
pub(crate) use self::calls::Ended;
pub(crate) use self::calls::{Callee, Calls};
#[cfg(feature = "embedded")]
pub use self::service::Service;
pub use crate::protocol::participant::{InDoubt, Verdict};
use crate::protocol::{
    ids::{Branch, RequestHash, StoreId, TransactionKey},
    message::Payload,
    time::Time,
};

/// The error that a service's code may end in: any. What it says is told in the reason of the
/// transaction's abort, or in the log.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A service, as its author sees it.
///
/// Every function may be called for many transactions at once, up to the service's
/// `max_concurrency`, and for one transaction one at a time. An error, a panic, or taking longer
/// than allowed are all the same: a failed prepare aborts the transaction and is followed by
/// [`Participant::abort`]; a failed commit or abort is called again.
///
/// This is enough for the embedded coordinator, which lives no longer than what the service holds in
/// memory. A service on RabbitMQ must also be a [`DurableParticipant`].
///
/// ```
/// use dtc::{BoxError, Finish, Participant, Prepare, Verdict};
///
/// struct Payments;
///
/// impl Participant for Payments {
///     async fn prepare(&self, call: Prepare) -> Result<Verdict, BoxError> {
///         let data: serde_json::Value = call.data()?;
///         match data["amount"].as_u64().ok_or("the amount is not a number")? {
///             0..1000 => Ok(Verdict::Prepared),
///             _ => Ok(Verdict::Refused(Some("too much".into()))),
///         }
///     }
///
///     async fn commit(&self, call: Finish) -> Result<(), BoxError> {
///         println!("{} is paid", call.id());
///         Ok(())
///     }
/// }
/// ```
pub trait Participant: Send + Sync + 'static {
    /// Makes ready to commit: whatever is needed to commit later must be stored, under
    /// [`Prepare::branch`], before this says [`Verdict::Prepared`].
    ///
    /// It may take until shortly before [`Prepare::deadline`]: then it is dropped, and has failed.
    fn prepare(&self, call: Prepare) -> impl Future<Output = Result<Verdict, BoxError>> + Send;

    /// Makes what was prepared under [`Finish::branch`] last. Must be idempotent: a branch that is
    /// committed already is a success. So is one that the store does not know, unless it can tell
    /// that it has never committed it: that is an error.
    fn commit(&self, call: Finish) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// Undoes what was prepared under [`Finish::branch`], or may have been. Must be idempotent.
    ///
    /// By default there is nothing to undo.
    fn abort(&self, call: Finish) -> impl Future<Output = Result<(), BoxError>> + Send {
        let _ = call;
        std::future::ready(Ok(()))
    }
}

/// A [`Participant`] with a store that outlives its process, and that all instances of the service
/// share.
///
/// The coordinator asks the store after a restart, and asks one instance about what another one has
/// prepared. An error, a panic, or taking longer than a commit may take is no answer: the coordinator
/// asks again until it has one.
pub trait DurableParticipant: Participant {
    /// What the store holds as prepared: every branch, whichever instance has prepared it; of one
    /// transaction, if `of` names it.
    fn in_doubt(
        &self,
        of: Option<TransactionKey>,
    ) -> impl Future<Output = Result<Vec<InDoubt>, BoxError>> + Send;

    /// What the store is called, if it has a name: an id that was made with the store and is kept in
    /// it, so that every instance with this store says the same, and one with another store another.
    /// An instance does not serve while others serve with another store.
    ///
    /// By default the store has no name, and nobody notices two instances that don't share their
    /// store.
    fn store_id(&self) -> impl Future<Output = Result<Option<StoreId>, BoxError>> + Send {
        std::future::ready(Ok(None))
    }

    /// Whether the store has committed [`Finish::branch`], by whichever instance; `None` if it does
    /// not remember what it has committed. It is asked only about what
    /// [`in_doubt`](DurableParticipant::in_doubt) does not name.
    ///
    /// After `Some(false)` the commit of that branch is an error, and is tried elsewhere: the branch
    /// was prepared in another store. After `None`, which is the default, the commit counts as
    /// applied, and two instances that don't share their store lose commits.
    fn has_committed(
        &self,
        call: Finish,
    ) -> impl Future<Output = Result<Option<bool>, BoxError>> + Send {
        let _ = call;
        std::future::ready(Ok(None))
    }
}

/// What a prepare is about. A service stores [`branch`](Self::branch), [`key`](Self::key),
/// [`request_hash`](Self::request_hash) and [`deadline`](Self::deadline) in one write with what the
/// commit needs, and gives them back as [`InDoubt`].
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

    /// The request's data, read as a `T`.
    ///
    /// # Errors
    ///
    /// It is not as a `T` should be. A prepare that ends in this error has failed.
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

/// A [`Participant`] of whatever type, for those who call many. Unless it says otherwise it has no
/// store.
pub(crate) trait AnyParticipant: Send + Sync {
    fn prepare(self: Arc<Self>, call: Prepare) -> BoxFuture<'static, Result<Verdict, BoxError>>;
    fn commit(self: Arc<Self>, call: Finish) -> BoxFuture<'static, Result<(), BoxError>>;
    fn abort(self: Arc<Self>, call: Finish) -> BoxFuture<'static, Result<(), BoxError>>;

    #[cfg(feature = "embedded")]
    fn has_store(&self) -> bool {
        false
    }

    fn in_doubt(
        self: Arc<Self>,
        of: Option<TransactionKey>,
    ) -> BoxFuture<'static, Result<Vec<InDoubt>, BoxError>> {
        let _ = of;
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    fn has_committed(
        self: Arc<Self>,
        call: Finish,
    ) -> BoxFuture<'static, Result<Option<bool>, BoxError>> {
        let _ = call;
        Box::pin(std::future::ready(Ok(None)))
    }

    #[cfg(feature = "service")]
    fn store_id(self: Arc<Self>) -> BoxFuture<'static, Result<Option<StoreId>, BoxError>> {
        Box::pin(std::future::ready(Ok(None)))
    }
}

impl<P: Participant> AnyParticipant for P {
    fn prepare(self: Arc<Self>, call: Prepare) -> BoxFuture<'static, Result<Verdict, BoxError>> {
        Box::pin(async move { Participant::prepare(&*self, call).await })
    }

    fn commit(self: Arc<Self>, call: Finish) -> BoxFuture<'static, Result<(), BoxError>> {
        Box::pin(async move { Participant::commit(&*self, call).await })
    }

    fn abort(self: Arc<Self>, call: Finish) -> BoxFuture<'static, Result<(), BoxError>> {
        Box::pin(async move { Participant::abort(&*self, call).await })
    }
}

/// A participant that is asked what its store holds.
pub(crate) struct Durable<P>(pub(crate) P);

impl<P: DurableParticipant> AnyParticipant for Durable<P> {
    fn prepare(self: Arc<Self>, call: Prepare) -> BoxFuture<'static, Result<Verdict, BoxError>> {
        Box::pin(async move { self.0.prepare(call).await })
    }

    fn commit(self: Arc<Self>, call: Finish) -> BoxFuture<'static, Result<(), BoxError>> {
        Box::pin(async move { self.0.commit(call).await })
    }

    fn abort(self: Arc<Self>, call: Finish) -> BoxFuture<'static, Result<(), BoxError>> {
        Box::pin(async move { self.0.abort(call).await })
    }

    #[cfg(feature = "embedded")]
    fn has_store(&self) -> bool {
        true
    }

    fn in_doubt(
        self: Arc<Self>,
        of: Option<TransactionKey>,
    ) -> BoxFuture<'static, Result<Vec<InDoubt>, BoxError>> {
        Box::pin(async move { self.0.in_doubt(of).await })
    }

    fn has_committed(
        self: Arc<Self>,
        call: Finish,
    ) -> BoxFuture<'static, Result<Option<bool>, BoxError>> {
        Box::pin(async move { self.0.has_committed(call).await })
    }

    #[cfg(feature = "service")]
    fn store_id(self: Arc<Self>) -> BoxFuture<'static, Result<Option<StoreId>, BoxError>> {
        Box::pin(async move { self.0.store_id().await })
    }
}

impl fmt::Debug for dyn AnyParticipant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AnyParticipant")
    }
}
