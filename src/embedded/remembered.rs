//! A service without a store, where the journal is one: what the processes before have decided, and
//! it may still hold, is remembered in its place.
//!
//! It can't be known what such a service has prepared, nor what of that has outlived its process.
//! So it is told again what was decided: it must bear that for what it has ended already, and for
//! what it doesn't know any more, and say so by an error where it can't do it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::future::BoxFuture;

use crate::{
    journal::file::UnfinishedTransaction,
    participant::{AnyParticipant, BoxError, Finish, InDoubt, Prepare, Verdict},
    protocol::{
        ids::{Branch, InstanceId, ServiceName, TransactionKey},
        message::Outcome,
        time::Time,
    },
};

type Held = BTreeMap<TransactionKey, Vec<InDoubt>>;

pub(super) struct Remembered {
    inner: Arc<dyn AnyParticipant>,
    /// What it holds, as far as that can be told from what was decided and from its answers.
    held: Mutex<Held>,
}

impl Remembered {
    /// `service`, whose code is `inner`, with what `unfinished` says that it may hold.
    pub(super) fn new(
        inner: Arc<dyn AnyParticipant>,
        service: &ServiceName,
        unfinished: &[UnfinishedTransaction],
    ) -> Self {
        let held = unfinished.iter().filter_map(|it| may_hold(service, it));
        let held = held.map(|it| (it.key.clone(), vec![it])).collect();
        Self { inner, held: Mutex::new(held) }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ended(&self, call: &Finish) {
        let mut held = self.lock();
        if let Some(branches) = held.get_mut(&call.key) {
            branches.retain(|it| it.branch != call.branch);
            if branches.is_empty() {
                held.remove(&call.key);
            }
        }
    }
}

/// What `service` may hold of a transaction that an earlier process has decided. What is undecided
/// it is asked to prepare again.
fn may_hold(service: &ServiceName, it: &UnfinishedTransaction) -> Option<InDoubt> {
    let decision = it.decision.as_ref()?;
    let branch = match decision.outcome {
        Outcome::Committed if !it.parked.is_empty() && !it.parked.contains(service) => None,
        Outcome::Committed => decision.branch_of(service).cloned(),
        // Which one it was isn't said: all that it holds is undone.
        Outcome::Aborted => {
            let is_involved = it.request.services.contains(service);
            let instance = InstanceId::parse(it.begun_by.as_str()).ok();
            instance.filter(|_| is_involved).map(|instance| Branch::of(&instance, 0))
        }
    };
    branch.map(|branch| InDoubt {
        key: decision.key.clone(),
        request_hash: decision.request_hash,
        branch,
        deadline: Time::EPOCH,
    })
}

impl AnyParticipant for Remembered {
    fn prepare(self: Arc<Self>, call: Prepare) -> BoxFuture<'static, Result<Verdict, BoxError>> {
        let held = InDoubt {
            key: call.key.clone(),
            request_hash: call.request_hash,
            branch: call.branch.clone(),
            deadline: call.deadline,
        };
        let prepared = Arc::clone(&self.inner).prepare(call);
        Box::pin(async move {
            let verdict = prepared.await?;
            if verdict == Verdict::Prepared {
                self.lock().entry(held.key.clone()).or_default().push(held);
            }
            Ok(verdict)
        })
    }

    fn commit(self: Arc<Self>, call: Finish) -> BoxFuture<'static, Result<(), BoxError>> {
        let committed = Arc::clone(&self.inner).commit(call.clone());
        Box::pin(async move {
            committed.await?;
            self.ended(&call);
            Ok(())
        })
    }

    fn abort(self: Arc<Self>, call: Finish) -> BoxFuture<'static, Result<(), BoxError>> {
        let aborted = Arc::clone(&self.inner).abort(call.clone());
        Box::pin(async move {
            aborted.await?;
            self.ended(&call);
            Ok(())
        })
    }

    fn in_doubt(
        self: Arc<Self>,
        of: Option<TransactionKey>,
    ) -> BoxFuture<'static, Result<Vec<InDoubt>, BoxError>> {
        let held = self.lock();
        let found = match of {
            Some(key) => held.get(&key).cloned().unwrap_or_default(),
            None => held.values().flatten().cloned().collect(),
        };
        drop(held);
        Box::pin(std::future::ready(Ok(found)))
    }

    fn has_store(&self) -> bool {
        true
    }
}
