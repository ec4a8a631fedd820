//! A service of the embedded coordinator, made of closures or of a participant.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use tracing::Span;

use crate::{
    participant::{
        AnyParticipant, BoxError, Durable, DurableParticipant, Finish, Participant, Prepare,
        Verdict, calls,
    },
    protocol::message,
};

type PrepareFn =
    Arc<dyn Fn(Prepare) -> BoxFuture<'static, Result<Verdict, BoxError>> + Send + Sync>;
type FinishFn = Arc<dyn Fn(Finish) -> BoxFuture<'static, Result<(), BoxError>> + Send + Sync>;

/// A service of the embedded coordinator: its name, its code, how many transactions it works on at once,
/// and how long a prepare may wait for a slot.
///
/// ```
/// # use dtc::Service;
/// let payments = Service::new("payments", 8)
///     .prepare(|id, data| Ok(data["amount"].as_u64().is_some_and(|amount| amount < 1000)))
///     .commit(|id| Ok(()))
///     .abort(|id| Ok(()));
/// ```
///
/// Give closures that block to [`prepare`](Service::prepare), [`commit`](Service::commit) and
/// [`abort`](Service::abort): they run on separate threads. A blocking closure can't be stopped: if it
/// exceeds its time limit, the call has failed, but the slot stays in use until the closure returns. Give
/// asynchronous closures to [`prepare_async`](Service::prepare_async), `commit_async` and `abort_async`:
/// they must not block, and are dropped at their time limit.
///
/// A function that isn't set succeeds.
///
/// Logs that the code writes through `tracing` are in a span with the fields `service` and `transaction`.
#[derive(Clone)]
pub struct Service {
    pub(crate) name: String,
    pub(crate) max_concurrency: u32,
    pub(crate) max_wait: Duration,
    pub(crate) code: Code,
}

/// The code of a service.
#[derive(Clone)]
pub(crate) enum Code {
    Closures(Closures),
    Participant(Arc<dyn AnyParticipant>),
}

#[derive(Clone)]
pub(crate) struct Closures {
    prepare: PrepareFn,
    commit: FinishFn,
    abort: FinishFn,
    threads: Threads,
}

impl Service {
    /// A service named `name` (`[A-Za-z0-9_-]{1,64}`) that works on `max_concurrency` transactions at
    /// once (at least 1). Both are checked when the service is used.
    pub fn new(name: impl Into<String>, max_concurrency: u32) -> Self {
        let done = |_| Box::pin(std::future::ready(Ok(()))) as BoxFuture<'static, _>;
        let code = Code::Closures(Closures {
            prepare: Arc::new(|_| Box::pin(std::future::ready(Ok(Verdict::Prepared)))),
            commit: Arc::new(done),
            abort: Arc::new(done),
            threads: Threads::default(),
        });
        Self { name: name.into(), max_concurrency, max_wait: Self::MAX_WAIT, code }
    }

    /// The default of [`max_wait`](Self::max_wait): 1 s.
    pub const MAX_WAIT: Duration = message::MAX_WAIT;

    /// A service whose code is a [`Participant`]. If it also has a store, use
    /// [`from_durable`](Self::from_durable).
    pub fn from_participant(
        name: impl Into<String>,
        max_concurrency: u32,
        participant: impl Participant,
    ) -> Self {
        Self::of_any(name.into(), max_concurrency, Arc::new(participant))
    }

    /// A service whose code is a [`DurableParticipant`]: after a restart with the same
    /// [journal](crate::Embedded::journal), the coordinator asks it what it holds in doubt.
    pub fn from_durable(
        name: impl Into<String>,
        max_concurrency: u32,
        participant: impl DurableParticipant,
    ) -> Self {
        Self::of_any(name.into(), max_concurrency, Arc::new(Durable(participant)))
    }

    fn of_any(name: String, max_concurrency: u32, participant: Arc<dyn AnyParticipant>) -> Self {
        let code = Code::Participant(participant);
        Self { name, max_concurrency, max_wait: Self::MAX_WAIT, code }
    }

    /// Sets how long a prepare may wait for a slot. Zero: it is refused at once if no slot is free.
    /// Default: 1 s.
    #[must_use]
    pub fn max_wait(mut self, max_wait: Duration) -> Self {
        self.max_wait = max_wait;
        self
    }

    /// Sets the prepare. It is given the transaction's id and data, and returns `Ok(true)` if it has
    /// prepared, `Ok(false)` if it refuses. It may block.
    #[must_use]
    pub fn prepare<F>(self, prepare: F) -> Self
    where
        F: Fn(&str, &Value) -> Result<bool, BoxError> + Send + Sync + 'static,
    {
        let prepare = Arc::new(prepare);
        self.closures(|closures| {
            let threads = closures.threads.clone();
            closures.prepare = Arc::new(move |call: Prepare| {
                let (prepare, threads) = (Arc::clone(&prepare), threads.clone());
                Box::pin(async move {
                    let id = call.id().to_owned();
                    let ready = threads.run(&id, move || prepare(call.id(), &call.data()?)).await?;
                    Ok(verdict(ready))
                })
            });
        })
    }

    /// Sets the commit. It is given the transaction's id, and is called again if it fails. It may block.
    #[must_use]
    pub fn commit<F>(self, commit: F) -> Self
    where
        F: Fn(&str) -> Result<(), BoxError> + Send + Sync + 'static,
    {
        self.closures(|closures| closures.commit = closures.threads.finish(commit))
    }

    /// Sets the abort. It is given the transaction's id. It is called after a prepare that succeeded or
    /// failed, not after one that refused. It may block.
    #[must_use]
    pub fn abort<F>(self, abort: F) -> Self
    where
        F: Fn(&str) -> Result<(), BoxError> + Send + Sync + 'static,
    {
        self.closures(|closures| closures.abort = closures.threads.finish(abort))
    }

    /// Like [`Service::prepare`], for a closure that does not block.
    #[must_use]
    pub fn prepare_async<F, Fut>(self, prepare: F) -> Self
    where
        F: Fn(String, Value) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<bool, BoxError>> + Send + 'static,
    {
        let prepare = Arc::new(prepare);
        self.closures(|closures| {
            closures.prepare = Arc::new(move |call: Prepare| {
                let prepare = Arc::clone(&prepare);
                Box::pin(async move {
                    let data = call.data()?;
                    prepare(call.id().to_owned(), data).await.map(verdict)
                })
            });
        })
    }

    /// Like [`Service::commit`], for a closure that does not block.
    #[must_use]
    pub fn commit_async<F, Fut>(self, commit: F) -> Self
    where
        F: Fn(String) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), BoxError>> + Send + 'static,
    {
        self.closures(|closures| {
            closures.commit = Arc::new(move |call: Finish| Box::pin(commit(call.id().to_owned())));
        })
    }

    /// Like [`Service::abort`], for a closure that does not block.
    #[must_use]
    pub fn abort_async<F, Fut>(self, abort: F) -> Self
    where
        F: Fn(String) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), BoxError>> + Send + 'static,
    {
        self.closures(|closures| {
            closures.abort = Arc::new(move |call: Finish| Box::pin(abort(call.id().to_owned())));
        })
    }

    /// Changes the closures; has no effect on a [`Participant`].
    fn closures(mut self, change: impl FnOnce(&mut Closures)) -> Self {
        if let Code::Closures(closures) = &mut self.code {
            change(closures);
        }
        self
    }

    pub(crate) fn participant(self) -> Arc<dyn AnyParticipant> {
        match self.code {
            Code::Closures(closures) => Arc::new(closures),
            Code::Participant(participant) => participant,
        }
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service")
            .field("name", &self.name)
            .field("max_concurrency", &self.max_concurrency)
            .field("max_wait", &self.max_wait)
            .finish_non_exhaustive()
    }
}

fn verdict(ready: bool) -> Verdict {
    if ready { Verdict::Prepared } else { Verdict::Refused(None) }
}

impl Participant for Closures {
    async fn prepare(&self, call: Prepare) -> Result<Verdict, BoxError> {
        (self.prepare)(call).await
    }

    async fn commit(&self, call: Finish) -> Result<(), BoxError> {
        (self.commit)(call).await
    }

    async fn abort(&self, call: Finish) -> Result<(), BoxError> {
        (self.abort)(call).await
    }
}

/// Runs blocking closures on separate threads, at most one at a time for each transaction: a closure that
/// has exceeded its time limit still runs, and the next one for its transaction waits for it.
#[derive(Clone, Default)]
struct Threads {
    running: Arc<Mutex<BTreeMap<String, Arc<AsyncMutex<()>>>>>,
}

impl Threads {
    fn finish<F>(&self, finish: F) -> FinishFn
    where
        F: Fn(&str) -> Result<(), BoxError> + Send + Sync + 'static,
    {
        let (finish, threads) = (Arc::new(finish), self.clone());
        Arc::new(move |call: Finish| {
            let (finish, threads) = (Arc::clone(&finish), threads.clone());
            Box::pin(async move {
                let id = call.id().to_owned();
                threads.run(&id, move || finish(call.id())).await
            })
        })
    }

    async fn run<T: Send + 'static>(
        &self,
        id: &str,
        call: impl FnOnce() -> Result<T, BoxError> + Send + 'static,
    ) -> Result<T, BoxError> {
        let turn = {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(running.entry(id.to_owned()).or_default())
        };
        let turn = turn.lock_owned().await;
        let guard = Turn { threads: self.clone(), id: id.to_owned(), turn: Some(turn) };
        let span = Span::current();
        let ended = tokio::task::spawn_blocking(move || {
            let _guard = guard;
            span.in_scope(call)
        });
        match ended.await {
            Ok(ended) => ended,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => Err(calls::panicked(&*panic)),
                Err(error) => Err(error.into()),
            },
        }
    }
}

/// Held while a closure runs.
struct Turn {
    threads: Threads,
    id: String,
    turn: Option<OwnedMutexGuard<()>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turn = None;
        let mut running = self.threads.running.lock().unwrap_or_else(PoisonError::into_inner);
        // One reference is the map's; any other belongs to a closure that waits.
        if running.get(&self.id).is_some_and(|turn| Arc::strong_count(turn) == 1) {
            running.remove(&self.id);
        }
    }
}
