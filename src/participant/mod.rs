//! The SDK for services: the traits that an author implements, and the code that calls them.
//!
//! An author writes three functions: prepare, commit, abort.
//! [`protocol::participant`](crate::protocol::participant) and the loop that drives it decide when and
//! how often to call each, and what to do when it fails, hangs or panics.

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
pub(crate) use self::calls::EndedCall;
pub(crate) use self::calls::{Callee, Calls};
#[cfg(feature = "embedded")]
pub use self::service::Service;
pub use crate::protocol::participant::{InDoubt, Verdict};
use crate::protocol::{
    ids::{Branch, RequestHash, StoreId, TransactionKey},
    message::Payload,
    time::Time,
};

/// The error of a service's code, of any type. Its text becomes the reason of the transaction's abort,
/// or appears in the log.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A service, as its author sees it.
///
/// Calls for different transactions run at the same time, up to the service's `max_concurrency`; for
/// one transaction, at most one call is in progress. A call fails if it returns an error, panics, or
/// exceeds its time limit. A failed prepare aborts the transaction and is followed by
/// [`Participant::abort`]; a failed commit or abort is called again.
///
/// For the embedded coordinator this trait is enough. A service on RabbitMQ must also implement
/// [`DurableParticipant`].
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
    /// Prepares to commit. Everything that the commit needs must be stored, under
    /// [`Prepare::branch`], before this returns [`Verdict::Prepared`].
    ///
    /// The call is dropped, and has failed, shortly before [`Prepare::deadline`].
    fn prepare(&self, call: Prepare) -> impl Future<Output = Result<Verdict, BoxError>> + Send;

    /// Makes permanent what was prepared under [`Finish::branch`]. It must be idempotent: to commit a
    /// branch again succeeds. To commit a branch that the store does not know also succeeds, unless the
    /// store can tell that it has never committed it: that is an error.
    fn commit(&self, call: Finish) -> impl Future<Output = Result<(), BoxError>> + Send;

    /// Undoes what was prepared under [`Finish::branch`], if anything was. It must be idempotent.
    ///
    /// The default does nothing.
    fn abort(&self, call: Finish) -> impl Future<Output = Result<(), BoxError>> + Send {
        let _ = call;
        std::future::ready(Ok(()))
    }
}

/// A [`Participant`] with a store that outlives its process and that all instances of the service share.
///
/// An instance reads the store when it starts, from time to time, and when it needs to know what another
/// instance has prepared. A call that fails, or takes longer than a commit may take, is repeated until
/// it succeeds.
pub trait DurableParticipant: Participant {
    /// Returns every branch that the store holds as prepared, whichever instance has prepared it; only
    /// those of transaction `of`, if that is given.
    fn in_doubt(
        &self,
        of: Option<TransactionKey>,
    ) -> impl Future<Output = Result<Vec<InDoubt>, BoxError>> + Send;

    /// Returns the id of the store: a unique text that is created with the store and kept in it. All
    /// instances that share the store return the same id. An instance does not serve while other
    /// instances serve with another id.
    ///
    /// The default is `None`: the store has no id, and instances that don't share their store are not
    /// detected.
    fn store_id(&self) -> impl Future<Output = Result<Option<StoreId>, BoxError>> + Send {
        std::future::ready(Ok(None))
    }

    /// Returns whether the store has committed [`Finish::branch`], by any instance; `None` if it does
    /// not remember what it has committed. It is called only for branches that
    /// [`in_doubt`](DurableParticipant::in_doubt) does not return.
    ///
    /// `Some(false)` means that the branch was prepared in another store: its commit fails here, and
    /// other instances try it. With `None`, which is the default, the commit counts as applied, and
    /// instances that don't share their store lose commits.
    fn has_committed(
        &self,
        call: Finish,
    ) -> impl Future<Output = Result<Option<bool>, BoxError>> + Send {
        let _ = call;
        std::future::ready(Ok(None))
    }
}

/// The arguments of a prepare. A service stores [`branch`](Self::branch), [`key`](Self::key),
/// [`request_hash`](Self::request_hash) and [`deadline`](Self::deadline) in one write with what the
/// commit needs, and returns them as [`InDoubt`].
#[derive(Debug, Clone)]
pub struct Prepare {
    /// The transaction.
    pub key: TransactionKey,
    /// The id of this prepare. A transaction that is prepared twice has two branches, and only the one
    /// that its decision names is committed.
    pub branch: Branch,
    /// The hash of the request.
    pub request_hash: RequestHash,
    /// The time by which the service must have voted.
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

    /// The request's data, deserialized as a `T`.
    ///
    /// # Errors
    ///
    /// The data is not a valid `T`. A prepare that returns this error has failed.
    pub fn data<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_str(self.data.as_str())
    }
}

/// The arguments of a commit or an abort.
#[derive(Debug, Clone)]
pub struct Finish {
    /// The transaction.
    pub key: TransactionKey,
    /// The branch to commit or undo.
    pub branch: Branch,
}

impl Finish {
    /// The transaction's id.
    pub fn id(&self) -> &str {
        self.key.id.as_str()
    }
}

/// A [`Participant`] of any type, behind a pointer. By default it has no store.
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

/// Makes an [`AnyParticipant`] with a store of a [`DurableParticipant`].
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
