//! Calls of a service's code: whatever it does, they end.

use std::{
    any::Any,
    future::Future,
    panic::AssertUnwindSafe,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{
    task::JoinSet,
    time::{Instant, timeout_at},
};

use crate::{
    participant::{AnyParticipant, Error, Finish, InDoubt, Prepare, Verdict},
    protocol::{
        ids::TransactionKey,
        participant::{Effect, Event},
    },
    worker::clock::Clock,
};

/// The last tenth of a prepare's time, but no more than this, is left for its vote: so a prepare
/// that takes too long is said to have failed, and nobody has to guess it from silence.
const VOTE_TIME_MAX: Duration = Duration::from_millis(50);

/// A call that has ended, at the participant with this number.
pub(crate) struct Ended {
    pub(crate) participant: usize,
    pub(crate) event: Event,
}

/// The calls under way. Each ends by its deadline at the latest; a panic is an error like any other.
pub(crate) struct Calls {
    clock: Clock,
    finish_timeout: Duration,
    running: JoinSet<Ended>,
}

impl Calls {
    pub(crate) fn new(clock: Clock, finish_timeout: Duration) -> Self {
        Self { clock, finish_timeout, running: JoinSet::new() }
    }

    /// Makes the call that `effect` asks for, if it asks for one. A call that has nothing to wait
    /// for is over before this returns, and costs no task.
    pub(crate) fn start(
        &mut self,
        number: usize,
        participant: &Arc<dyn AnyParticipant>,
        effect: Effect,
    ) -> Option<Ended> {
        let participant = Arc::clone(participant);
        let deadline = self.deadline_of(&effect);
        let mut call = match effect {
            Effect::CallPrepare { key, branch, request_hash, data, deadline: at } => {
                let call = Prepare::new(key.clone(), branch.clone(), request_hash, at, data);
                let running = guarded(deadline, move || participant.prepare(call));
                running
                    .map(move |ended| {
                        let verdict =
                            ended.unwrap_or_else(|error| Verdict::Failed(error.to_string().into()));
                        Ended {
                            participant: number,
                            event: Event::PrepareEnded { key, branch, verdict },
                        }
                    })
                    .boxed()
            }
            Effect::CallCommit { key, branch } => {
                let call = Finish { key: key.clone(), branch: branch.clone() };
                let running = guarded(deadline, move || participant.commit(call));
                running.map(move |ended| finished(number, key, branch, ended)).boxed()
            }
            Effect::CallAbort { key, branch } => {
                let call = Finish { key: key.clone(), branch: branch.clone() };
                let running = guarded(deadline, move || participant.abort(call));
                running.map(move |ended| finished(number, key, branch, ended)).boxed()
            }
            Effect::ReadStore(key) => {
                let of = Some(key.clone());
                let read = read_store(participant, of, self.finish_timeout);
                read.map(move |held| Ended {
                    participant: number,
                    event: Event::StoreRead { key, held },
                })
                .boxed()
            }
            Effect::ScanStore => {
                let read = read_store(participant, None, self.finish_timeout);
                read.map(move |held| Ended {
                    participant: number,
                    event: Event::StoreScanned(held),
                })
                .boxed()
            }
            Effect::Vote { .. } | Effect::Done { .. } | Effect::Inquire(_) | Effect::Ack(_) => {
                return None;
            }
        };
        match call.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(ended) => Some(ended),
            Poll::Pending => {
                self.running.spawn(call);
                None
            }
        }
    }

    fn deadline_of(&self, effect: &Effect) -> Instant {
        match effect {
            Effect::CallPrepare { deadline, .. } => {
                let left = deadline.since(self.clock.now());
                self.clock.instant_of(*deadline) - (left / 10).min(VOTE_TIME_MAX)
            }
            Effect::CallCommit { .. }
            | Effect::CallAbort { .. }
            | Effect::ReadStore(_)
            | Effect::ScanStore
            | Effect::Vote { .. }
            | Effect::Done { .. }
            | Effect::Inquire(_)
            | Effect::Ack(_) => self.clock.instant_of(self.clock.now() + self.finish_timeout),
        }
    }

    /// Waits for the next call to end; for ever, if none is under way.
    pub(crate) async fn next(&mut self) -> Ended {
        loop {
            match self.running.join_next().await {
                Some(Ok(ended)) => return ended,
                // The calls catch their panics, and nobody aborts them.
                Some(Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }

    /// A call that has ended, if there is one.
    pub(crate) fn try_next(&mut self) -> Option<Ended> {
        loop {
            if let Ok(ended) = self.running.try_join_next()? {
                return Some(ended);
            }
        }
    }
}

fn finished(
    participant: usize,
    key: TransactionKey,
    branch: crate::protocol::ids::Branch,
    ended: Result<(), Error>,
) -> Ended {
    let applied = ended.map_err(|error| error.to_string().into());
    Ended { participant, event: Event::FinishEnded { key, branch, applied } }
}

/// Runs `call` until `deadline` at the longest, and turns a panic into an error.
async fn guarded<T, F>(deadline: Instant, call: impl FnOnce() -> F + Send) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>> + Send,
{
    // A call may panic before it has made its future.
    let call = AssertUnwindSafe(async move { call().await }).catch_unwind();
    match timeout_at(deadline, call).await {
        Ok(Ok(ended)) => ended,
        Ok(Err(panic)) => Err(format!("panicked: {}", panic_message(&*panic)).into()),
        Err(_) => Err("timed out".into()),
    }
}

/// Asks the store until it answers: whoever doesn't know what it holds may not vote.
async fn read_store(
    participant: Arc<dyn AnyParticipant>,
    of: Option<TransactionKey>,
    patience: Duration,
) -> Vec<InDoubt> {
    let mut pause = Duration::from_millis(100);
    loop {
        let deadline = Instant::now() + patience;
        let reader = Arc::clone(&participant);
        let key = of.clone();
        match guarded(deadline, move || reader.in_doubt(key)).await {
            Ok(held) => return held,
            Err(error) => {
                tracing::warn!(%error, "failed to read what the store holds in doubt");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(patience);
            }
        }
    }
}

pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
