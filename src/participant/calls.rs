//! Calls of a service's code. Every call ends, even if the code panics or hangs.

use std::{
    any::Any,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout_at},
};
use tracing::{Instrument as _, Span};

#[cfg(feature = "service")]
use crate::protocol::ids::StoreId;
use crate::{
    clock::Clock,
    participant::{AnyParticipant, BoxError, Finish, InDoubt, Prepare, Verdict, spans},
    protocol::{
        ids::{Branch, ServiceName, TransactionKey},
        participant::{Effect, Event},
        time::Time,
    },
};

/// The last tenth of a prepare's time, but no more than this, is reserved for its vote. So the worker
/// learns that a slow prepare has failed, and needn't conclude it from silence.
const VOTE_TIME_MAX: Duration = Duration::from_millis(50);

/// A participant whose code is called.
#[derive(Debug)]
pub(crate) struct Callee {
    /// Its place among the participants of one process.
    pub(crate) number: usize,
    /// Its name for the log; `None` if every line has it anyway.
    pub(crate) service: Option<ServiceName>,
    pub(crate) code: Arc<dyn AnyParticipant>,
}

/// A call that has ended, at the participant with this number.
pub(crate) struct EndedCall {
    #[cfg_attr(not(feature = "embedded"), expect(dead_code, reason = "an instance calls one"))]
    pub(crate) participant: usize,
    pub(crate) event: Event,
}

/// The calls in progress. Each ends by its deadline; a panic is an error like any other.
pub(crate) struct Calls {
    clock: Clock,
    finish_timeout: Duration,
    running: JoinSet<EndedCall>,
    /// The number of prepares, commits and aborts among them.
    limited: usize,
    /// The number of reads of one transaction among them.
    reading: usize,
}

impl Calls {
    pub(crate) fn new(clock: Clock, finish_timeout: Duration) -> Self {
        Self { clock, finish_timeout, running: JoinSet::new(), limited: 0, reading: 0 }
    }

    /// Makes the call that `effect` asks for, if any. A call that needn't wait ends before this returns,
    /// without a task.
    pub(crate) fn start(&mut self, callee: &Callee, effect: Effect) -> Option<EndedCall> {
        let span = spans::call(callee.service.as_ref(), &effect);
        let (number, participant) = (callee.number, Arc::clone(&callee.code));
        match effect {
            Effect::CallPrepare { key, branch, request_hash, data, deadline } => {
                let call = Prepare::new(key.clone(), branch.clone(), request_hash, deadline, data);
                let ended = move |ended: Result<Verdict, BoxError>| {
                    let verdict =
                        ended.unwrap_or_else(|error| Verdict::Failed(error.to_string().into()));
                    EndedCall {
                        participant: number,
                        event: Event::PrepareEnded { key, branch, verdict },
                    }
                };
                self.run(span, Some(deadline), move || participant.prepare(call), ended)
            }
            Effect::CallCommit { key, branch } => {
                let call = Finish { key: key.clone(), branch: branch.clone() };
                let ended = move |ended| finished(number, key, branch, ended);
                self.run(span, None, move || participant.commit(call), ended)
            }
            Effect::CallAbort { key, branch } => {
                let call = Finish { key: key.clone(), branch: branch.clone() };
                let ended = move |ended| finished(number, key, branch, ended);
                self.run(span, None, move || participant.abort(call), ended)
            }
            Effect::ReadStore(key) => {
                let patience = self.finish_timeout;
                let reading = async move {
                    let held = read_store(participant, Some(key.clone()), patience).await;
                    EndedCall { participant: number, event: Event::StoreRead { key, held } }
                };
                self.reading += 1;
                self.running.spawn(reading.instrument(span));
                None
            }
            Effect::LookUpCommit { key, branch } => {
                let patience = self.finish_timeout;
                let looking_up = async move {
                    let call = Finish { key: key.clone(), branch: branch.clone() };
                    let is_known = knows_branch(participant, call, patience).await;
                    let event = Event::CommitLookedUp { key, branch, is_known };
                    EndedCall { participant: number, event }
                };
                self.reading += 1;
                self.running.spawn(looking_up.instrument(span));
                None
            }
            Effect::ScanStore => {
                let patience = self.finish_timeout;
                let scanning = async move {
                    let held = read_store(participant, None, patience).await;
                    EndedCall { participant: number, event: Event::StoreScanned(held) }
                };
                self.running.spawn(scanning.instrument(span));
                None
            }
            Effect::Vote { .. } | Effect::Done { .. } | Effect::Inquire(_) | Effect::Ack(_) => None,
        }
    }

    /// The time limit of a call. A prepare is stopped early enough for its vote to arrive by `deadline`.
    fn given_up_at(&self, deadline: Option<Time>) -> Instant {
        let now = self.clock.now();
        let Some(deadline) = deadline else {
            return self.clock.instant_of(now + self.finish_timeout);
        };
        let left = deadline.since(now);
        self.clock.instant_of(deadline) - (left / 10).min(VOTE_TIME_MAX)
    }

    /// Polls the call once, and moves it to a task of its own only if it is not finished then.
    fn run<T: 'static>(
        &mut self,
        span: Span,
        deadline: Option<Time>,
        call: impl FnOnce() -> BoxFuture<'static, Result<T, BoxError>>,
        ended: impl FnOnce(Result<T, BoxError>) -> EndedCall + Send + 'static,
    ) -> Option<EndedCall> {
        // The code may panic before it returns its future, and at every poll.
        let first_poll = AssertUnwindSafe(|| {
            let mut call = call();
            match call.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(result) => Ok(result),
                Poll::Pending => Err(call),
            }
        });
        let made = span.in_scope(|| catch_unwind(first_poll));
        match made {
            Ok(Ok(result)) => Some(ended(result)),
            Ok(Err(call)) => {
                let deadline = self.given_up_at(deadline);
                self.limited += 1;
                let rest = async move { ended(guarded(deadline, call).await) };
                self.running.spawn(rest.instrument(span));
                None
            }
            Err(panic) => Some(ended(Err(panicked(&*panic)))),
        }
    }

    /// Waits for the next call to end; for ever if none is in progress.
    pub(crate) async fn next(&mut self) -> EndedCall {
        loop {
            match self.running.join_next().await {
                Some(Ok(ended)) => return self.over(ended),
                // Calls catch their panics, and are never aborted.
                Some(Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }

    /// Returns a call that has ended, if there is one.
    pub(crate) fn try_next(&mut self) -> Option<EndedCall> {
        loop {
            if let Ok(ended) = self.running.try_join_next()? {
                return Some(self.over(ended));
            }
        }
    }

    fn over(&mut self, ended: EndedCall) -> EndedCall {
        match ended.event {
            Event::PrepareEnded { .. } | Event::FinishEnded { .. } => self.limited -= 1,
            Event::StoreRead { .. } | Event::CommitLookedUp { .. } => self.reading -= 1,
            Event::PrepareReceived { .. }
            | Event::QueryReceived { .. }
            | Event::CancelReceived(_)
            | Event::FinishReceived { .. }
            | Event::StoreScanned(_)
            | Event::DeadlineReached
            | Event::Disconnected
            | Event::DrainRequested => {}
        }
        ended
    }

    /// Whether no prepare, commit or abort is in progress. Reading a store doesn't count: it is repeated
    /// until it succeeds.
    pub(crate) fn is_idle(&self) -> bool {
        self.limited == 0
    }

    /// Whether a store is being read for one transaction: an outcome may wait for that.
    #[cfg(feature = "embedded")]
    pub(crate) fn is_reading(&self) -> bool {
        self.reading > 0
    }
}

fn finished(
    participant: usize,
    key: TransactionKey,
    branch: Branch,
    ended: Result<(), BoxError>,
) -> EndedCall {
    let applied = ended.map_err(|error| error.to_string().into());
    EndedCall { participant, event: Event::FinishEnded { key, branch, applied } }
}

/// Runs `call` until `deadline` at most, and turns a panic into an error.
async fn guarded<T>(
    deadline: Instant,
    call: impl Future<Output = Result<T, BoxError>>,
) -> Result<T, BoxError> {
    match timeout_at(deadline, AssertUnwindSafe(call).catch_unwind()).await {
        Ok(Ok(ended)) => ended,
        Ok(Err(panic)) => Err(panicked(&*panic)),
        Err(_) => Err("timed out".into()),
    }
}

/// Reads the store until that succeeds: an instance that doesn't know what it holds must not vote.
async fn read_store(
    participant: Arc<dyn AnyParticipant>,
    of: Option<TransactionKey>,
    patience: Duration,
) -> Vec<InDoubt> {
    let ask = || {
        let (reader, key) = (Arc::clone(&participant), of.clone());
        // Within the future, since the code may panic before it returns its own.
        async move { reader.in_doubt(key).await }
    };
    let failed = "failed to read what the store holds in doubt; trying again";
    until_answered(ask, failed, patience).await
}

/// Reads the id of the store until that succeeds.
#[cfg(feature = "service")]
pub(super) async fn name_of_store(
    participant: Arc<dyn AnyParticipant>,
    patience: Duration,
) -> Option<StoreId> {
    let ask = || {
        let reader = Arc::clone(&participant);
        async move { reader.store_id().await }
    };
    until_answered(ask, "failed to read the id of the store; trying again", patience).await
}

/// Whether the store holds the branch, or has committed it.
async fn knows_branch(
    participant: Arc<dyn AnyParticipant>,
    call: Finish,
    patience: Duration,
) -> bool {
    let ask = || {
        let (reader, call) = (Arc::clone(&participant), call.clone());
        async move {
            // In this order: the second call sees a branch that is committed in between.
            let held = Arc::clone(&reader).in_doubt(Some(call.key.clone())).await?;
            match held.iter().any(|doubt| doubt.branch == call.branch) {
                true => Ok(true),
                // A store that doesn't remember its commits is assumed to have made this one.
                false => Ok(reader.has_committed(call).await?.unwrap_or(true)),
            }
        }
    };
    let failed = "failed to read what the store has committed; trying again";
    until_answered(ask, failed, patience).await
}

/// Calls `ask` until it succeeds. `failed` is logged after each failure.
async fn until_answered<T, F>(ask: impl Fn() -> F, failed: &str, patience: Duration) -> T
where
    F: Future<Output = Result<T, BoxError>>,
{
    let mut pause = Duration::from_millis(100);
    loop {
        match guarded(Instant::now() + patience, ask()).await {
            Ok(answer) => return answer,
            Err(error) => {
                tracing::warn!(%error, "{failed}");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(patience);
            }
        }
    }
}

/// The error that stands for a panic.
pub(super) fn panicked(panic: &(dyn Any + Send)) -> BoxError {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panicked: {}", text.unwrap_or("no message")).into()
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::{Callee, Calls, EndedCall};
    use crate::{
        clock::Clock,
        participant::{
            BoxError, Durable, DurableParticipant, Finish, InDoubt, Participant, Prepare, Verdict,
        },
        protocol::{
            ids::{Branch, RequestHash, TransactionId, TransactionKey},
            participant::{Effect, Event},
            time::Time,
        },
    };

    struct Store {
        held: Vec<InDoubt>,
        committed: Option<bool>,
    }

    impl Participant for Store {
        async fn prepare(&self, _: Prepare) -> Result<Verdict, BoxError> {
            Ok(Verdict::Prepared)
        }

        async fn commit(&self, _: Finish) -> Result<(), BoxError> {
            Ok(())
        }
    }

    impl DurableParticipant for Store {
        async fn in_doubt(&self, _: Option<TransactionKey>) -> Result<Vec<InDoubt>, BoxError> {
            Ok(self.held.clone())
        }

        async fn has_committed(&self, _: Finish) -> Result<Option<bool>, BoxError> {
            Ok(self.committed)
        }
    }

    #[tokio::test]
    async fn a_branch_is_unknown_only_to_a_store_that_would_remember_its_commit() {
        let id = TransactionId::parse("t1").unwrap();
        let key = TransactionKey { id, requested_at: Time::EPOCH };
        let branch = Branch::parse("i1.1").unwrap();
        let (request_hash, deadline) = (RequestHash([0; 16]), Time::EPOCH);
        let held = InDoubt { key: key.clone(), request_hash, branch: branch.clone(), deadline };
        let nothing = Vec::new;
        for (held, committed, is_known) in [
            (vec![held.clone()], None, true),
            (vec![held], Some(false), true),
            (nothing(), None, true),
            (nothing(), Some(true), true),
            (nothing(), Some(false), false),
        ] {
            let code = Arc::new(Durable(Store { held, committed }));
            let store = Callee { number: 0, service: None, code };
            let mut calls = Calls::new(Clock::start(), Duration::from_secs(5));
            let (key, branch) = (key.clone(), branch.clone());
            let look = Effect::LookUpCommit { key: key.clone(), branch: branch.clone() };
            assert!(calls.start(&store, look).is_none());
            let EndedCall { event, .. } = calls.next().await;
            assert_eq!(event, Event::CommitLookedUp { key, branch, is_known }, "{committed:?}");
        }
    }
}
