//! A service made for tests: it does what its script says, and records every call.
//!
//! Scenarios measure here, on the service's side of the SDK, when a service was called for what,
//! how it answered, what it holds, and how much it ever held at once. A transaction is held from
//! the call of its prepare until a refusal, a "nothing to commit", or a successful commit or abort.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::resume_unwind,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use dtc::{
    participant::{BoxError, DurableParticipant, Finish, InDoubt, Participant, Prepare, Verdict},
    protocol::ids::{Branch, InstanceId, TransactionKey},
};
use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, timeout},
};

/// How long something may take that should happen at once.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// A function of a service.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Function {
    Prepare,
    Commit,
    Abort,
}

/// The question to a script.
#[derive(Clone, Debug)]
pub(crate) struct CallContext {
    pub(crate) what: Function,
    pub(crate) id: String,
    /// How often this was called for this transaction, this time included.
    pub(crate) attempt: usize,
    /// The request's data, in a prepare.
    pub(crate) data: Value,
}

/// How a call ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ending {
    Done,
    ReadOnly,
    Refused,
    Error,
    Panic,
}

/// The end of a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ended {
    /// It returned.
    With(Ending),
    /// It timed out, and was dropped.
    Dropped,
}

/// One call of the service's code.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) what: Function,
    pub(crate) key: TransactionKey,
    pub(crate) branch: Branch,
    pub(crate) began: Instant,
    pub(crate) ended: Option<(Instant, Ended)>,
}

impl Call {
    fn is_answered(&self) -> bool {
        match self.ended {
            Some((_, Ended::With(ending))) => match ending {
                Ending::Done | Ending::ReadOnly | Ending::Refused => true,
                Ending::Error | Ending::Panic => false,
            },
            Some((_, Ended::Dropped)) | None => false,
        }
    }
}

/// All records of a service.
#[derive(Default, Debug)]
pub(crate) struct CallRecord {
    pub(crate) calls: Vec<Call>,
    attempts: BTreeMap<(TransactionKey, Function), usize>,
    /// What is prepared.
    pub(crate) prepared: BTreeMap<Branch, InDoubt>,
    pub(crate) committed: BTreeMap<TransactionKey, Branch>,
    /// What has taken a slot and not released it.
    held: BTreeSet<Branch>,
    pub(crate) most_held: usize,
    /// The same for each instance.
    pub(crate) most_held_by: BTreeMap<InstanceId, usize>,
}

type Script = Box<dyn Fn(CallContext) -> BoxFuture<'static, Ending> + Send + Sync>;

/// A service of which several instances may run: they share its state.
#[derive(Clone)]
pub(crate) struct RecordedService(Arc<Shared>);

struct Shared {
    script: Script,
    book: Mutex<CallRecord>,
    changed: watch::Sender<()>,
}

impl RecordedService {
    /// A service whose calls end as `script` says.
    pub(crate) fn new<F>(script: impl Fn(CallContext) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Ending> + Send + 'static,
    {
        Self(Arc::new(Shared {
            script: Box::new(move |asked| Box::pin(script(asked))),
            book: Mutex::default(),
            changed: watch::Sender::new(()),
        }))
    }

    /// A service that accepts everything at once.
    pub(crate) fn willing() -> Self {
        Self::new(|_| std::future::ready(Ending::Done))
    }

    /// A service that takes so long for every prepare.
    pub(crate) fn slow(takes: Duration) -> Self {
        Self::new(move |asked| async move {
            if asked.what == Function::Prepare {
                tokio::time::sleep(takes).await;
            }
            Ending::Done
        })
    }

    pub(crate) fn book(&self) -> MutexGuard<'_, CallRecord> {
        self.0.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `is_so`.
    pub(crate) async fn until(&self, what: &str, is_so: impl Fn(&CallRecord) -> bool) {
        let mut changed = self.0.changed.subscribe();
        let waiting = async {
            while !is_so(&self.book()) {
                changed.changed().await.unwrap();
            }
        };
        if timeout(LIMIT, waiting).await.is_err() {
            panic!("waited in vain until {what}: {:#?}", self.book());
        }
    }

    async fn call(
        &self,
        what: Function,
        key: TransactionKey,
        branch: Branch,
        data: Value,
    ) -> Ending {
        let id = key.id.to_string();
        let mut running = Running { of: self, number: 0, ended: Ended::Dropped };
        let attempt = self.change(|book| {
            running.number = book.calls.len();
            book.began(what, key, branch)
        });
        let ending = (self.0.script)(CallContext { what, id, attempt, data }).await;
        running.ended = Ended::With(ending);
        ending
    }

    fn change<T>(&self, change: impl FnOnce(&mut CallRecord) -> T) -> T {
        let changed = change(&mut self.book());
        self.0.changed.send_replace(());
        changed
    }
}

/// A call in progress; dropping it ends it.
struct Running<'a> {
    of: &'a RecordedService,
    number: usize,
    ended: Ended,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.of.change(|book| book.ended(self.number, self.ended));
    }
}

impl CallRecord {
    fn began(&mut self, what: Function, key: TransactionKey, branch: Branch) -> usize {
        let began = Instant::now();
        if what == Function::Prepare {
            self.held.insert(branch.clone());
            self.most_held = self.most_held.max(self.held.len());
            let own = self.held.iter().filter(|it| it.instance() == branch.instance()).count();
            let most = self.most_held_by.entry(branch.instance().clone()).or_default();
            *most = own.max(*most);
        }
        let attempt = self.attempts.entry((key.clone(), what)).or_default();
        *attempt += 1;
        let attempt = *attempt;
        self.calls.push(Call { what, key, branch, began, ended: None });
        attempt
    }

    fn ended(&mut self, number: usize, ended: Ended) {
        let call = &mut self.calls[number];
        call.ended = Some((Instant::now(), ended));
        let is_over = match call.what {
            Function::Prepare => matches!(ended, Ended::With(Ending::ReadOnly | Ending::Refused)),
            Function::Commit | Function::Abort => ended == Ended::With(Ending::Done),
        };
        if is_over {
            self.held.remove(&call.branch);
        }
    }

    pub(crate) fn n_calls(&self, what: Function) -> usize {
        self.calls.iter().filter(|call| call.what == what).count()
    }

    /// The calls for the transactions of this id, in order.
    pub(crate) fn calls_of(&self, id: &str) -> Vec<&Call> {
        self.calls.iter().filter(|call| call.key.id.as_str() == id).collect()
    }

    /// The calls for the transactions of this id, in order, by function.
    pub(crate) fn whats_of(&self, id: &str) -> Vec<Function> {
        self.calls_of(id).into_iter().map(|call| call.what).collect()
    }

    /// Asserts that no function was called again for a transaction for which it had answered, and
    /// none unnecessarily: no finish after a refusal, never both kinds, none before a prepare.
    pub(crate) fn assert_only_necessary_calls(&self) {
        let mut of: BTreeMap<_, Vec<&Call>> = BTreeMap::new();
        for call in &self.calls {
            of.entry(&call.key).or_default().push(call);
        }
        for (key, calls) in of {
            let mut answered = BTreeSet::new();
            for call in &calls {
                let is_new = answered.iter().all(|it: &(Function, Branch)| it.0 != call.what);
                assert!(is_new, "{key} was answered before: {calls:#?}");
                if call.is_answered() {
                    answered.insert((call.what, call.branch.clone()));
                }
            }
            assert_eq!(calls[0].what, Function::Prepare, "{calls:#?}");
            let has = |what| calls.iter().any(|call| call.what == what);
            assert!(!(has(Function::Commit) && has(Function::Abort)), "{key}: both: {calls:#?}");
            let is_over = calls.iter().any(|call| {
                matches!(call.ended, Some((_, Ended::With(Ending::Refused | Ending::ReadOnly))))
            });
            assert!(!is_over || calls.len() == 1, "{key}: nothing was held: {calls:#?}");
        }
    }

    /// Nothing is prepared, and no slot is taken.
    pub(crate) fn assert_nothing_is_held(&self) {
        assert!(self.prepared.is_empty(), "still prepared: {:#?}", self.prepared);
        assert!(self.held.is_empty(), "still held: {:#?}", self.held);
    }
}

/// The answer of a script to a commit or an abort, as the SDK takes it.
fn finished(ending: Ending) -> Result<(), BoxError> {
    match ending {
        Ending::Done => Ok(()),
        Ending::Panic => resume_unwind(Box::new("as the script says")),
        Ending::Error | Ending::ReadOnly | Ending::Refused => Err("as the script says".into()),
    }
}

impl Participant for RecordedService {
    async fn prepare(&self, call: Prepare) -> Result<Verdict, BoxError> {
        let data = call.data()?;
        let (key, branch) = (call.key.clone(), call.branch.clone());
        match self.call(Function::Prepare, key, branch, data).await {
            Ending::Done => {
                let in_doubt = InDoubt {
                    key: call.key,
                    request_hash: call.request_hash,
                    branch: call.branch.clone(),
                    deadline: call.deadline,
                };
                self.change(|book| book.prepared.insert(call.branch, in_doubt));
                Ok(Verdict::Prepared)
            }
            Ending::ReadOnly => Ok(Verdict::ReadOnly),
            Ending::Refused => Ok(Verdict::Refused(Some("as the script says".into()))),
            Ending::Error => Err("as the script says".into()),
            // Without the panic hook: this panic is intended.
            Ending::Panic => resume_unwind(Box::new("as the script says")),
        }
    }

    async fn commit(&self, call: Finish) -> Result<(), BoxError> {
        let (key, branch) = (call.key.clone(), call.branch.clone());
        let ending = self.call(Function::Commit, key, branch, Value::Null).await;
        finished(ending)?;
        self.change(|book| {
            if book.prepared.remove(&call.branch).is_some() {
                let before = book.committed.insert(call.key, call.branch);
                assert_eq!(before, None, "it is committed under two branches");
            }
        });
        Ok(())
    }

    async fn abort(&self, call: Finish) -> Result<(), BoxError> {
        let (key, branch) = (call.key.clone(), call.branch.clone());
        let ending = self.call(Function::Abort, key, branch, Value::Null).await;
        finished(ending)?;
        self.change(|book| book.prepared.remove(&call.branch));
        Ok(())
    }
}

impl DurableParticipant for RecordedService {
    async fn in_doubt(&self, of: Option<TransactionKey>) -> Result<Vec<InDoubt>, BoxError> {
        let book = self.book();
        let asked_for = |it: &&InDoubt| of.as_ref().is_none_or(|key| it.key == *key);
        Ok(book.prepared.values().filter(asked_for).cloned().collect())
    }
}

/// A gate at which calls wait until it is opened.
#[derive(Clone, Debug)]
pub(crate) struct Gate(Arc<Semaphore>);

impl Gate {
    pub(crate) fn shut() -> Self {
        Self(Arc::new(Semaphore::new(0)))
    }

    pub(crate) fn open(&self) {
        self.0.close();
    }

    pub(crate) fn is_open(&self) -> bool {
        self.0.is_closed()
    }

    pub(crate) async fn pass(&self) {
        drop(self.0.acquire().await);
    }
}
