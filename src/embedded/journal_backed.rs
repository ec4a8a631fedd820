//! A service without a store, in a process with a journal: the journal says what it may still hold from
//! earlier processes.
//!
//! The service itself can't say what it has prepared, nor what of that has outlived its process. So its
//! commit or abort is called again for every decision that was not finished. The service must accept
//! that for what it has already finished, and return an error for what it can't do.

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

pub(super) struct JournalBacked {
    inner: Arc<dyn AnyParticipant>,
    /// What it may hold, by the decisions in the journal and by its answers.
    held: Mutex<Held>,
}

impl JournalBacked {
    /// The service `service`, whose code is `inner` and which may hold what is `unfinished`.
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

/// What `service` may hold of a transaction that an earlier process has decided. For an undecided one,
/// its prepare is called again.
fn may_hold(service: &ServiceName, it: &UnfinishedTransaction) -> Option<InDoubt> {
    let decision = it.decision.as_ref()?;
    let branch = match decision.outcome {
        Outcome::Committed if !it.parked.is_empty() && !it.parked.contains(service) => None,
        Outcome::Committed => decision.branch_of(service).cloned(),
        // The decision names no branch: everything that the service holds is undone.
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

impl AnyParticipant for JournalBacked {
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
