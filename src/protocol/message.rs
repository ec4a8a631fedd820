//! The messages between producers, workers, services and the journal.
//!
//! These are the items of the protocol. `wire` defines their form in messages, and the driver decides how
//! many items share a message.

use std::{fmt, sync::Arc, time::Duration};

use crate::protocol::{
    ids::{
        Branch, InstanceId, ReplyToken, RequestHash, ServiceName, StoreId, TransactionId,
        TransactionKey, WorkerId,
    },
    time::Time,
};

/// The transport's name for a message that it has delivered. The core that gets it settles it once, by an
/// effect.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Delivery(pub u64);

/// How long a prepare waits for a slot where its service sets nothing else.
pub const MAX_WAIT: Duration = Duration::from_secs(1);

/// What `max_concurrency` limits. With a single instance, both are the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Cap {
    /// Each instance has `max_concurrency` slots.
    #[default]
    Instance,
    /// All instances together have `max_concurrency` slots: one works, and the others stand by.
    Service,
}

/// A producer's data, unchanged: text that only the services read.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Payload(Arc<str>);

impl Payload {
    /// Takes the text as it is.
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self(text.into())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A transaction, as its producer specifies it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TransactionSpec {
    /// Its id.
    pub id: TransactionId,
    /// Every service involved, each once, in name order. Never empty.
    pub services: Arc<[ServiceName]>,
    /// The data for the services: a JSON object in its canonical form.
    pub data: Payload,
    /// The digest of `services` and `data`.
    pub request_hash: RequestHash,
    /// How long its prepares may take, from 1 ms to a day; `None`: the run's own setting.
    pub timeout: Option<Duration>,
    /// When its result goes out, if it commits.
    pub answer_at: AnswerAt,
}

/// When the result of a committed transaction goes out. That of an aborted one goes out when it is decided.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[non_exhaustive]
pub enum AnswerAt {
    /// When every service has applied the commit, or the commit of a service that did not is parked.
    #[default]
    Applied,
    /// When the transaction is decided. The services apply the commit then or soon after: who reads what
    /// they have written may not see it yet. The result doesn't say which commits are parked later.
    Decided,
}

impl AnswerAt {
    /// The word in requests.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Decided => "decided",
        }
    }

    /// The moment whose [`AnswerAt::as_str`] is `text`.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Applied, Self::Decided].into_iter().find(|it| it.as_str() == text)
    }
}

/// How a transaction ends, for all its services alike. There is no third outcome, and there won't be one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Outcome {
    /// Every service commits what it prepared.
    Committed,
    /// No service keeps anything.
    Aborted,
}

impl Outcome {
    /// The word in results and records.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Committed => "COMMITTED",
            Self::Aborted => "ABORTED",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why a transaction aborts, in one word.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum ReasonCode {
    /// A service's code has refused.
    Refused,
    /// A service's code ended with an error, a panic or a time-out; or the request was delivered too
    /// often.
    Failed,
    /// A service had no slot free within its `max_wait`.
    NoSlot,
    /// No service of that name exists.
    UnknownService,
    /// A vote was missing when the prepare deadline passed.
    Deadline,
    /// A service exists, but could not be reached before the deadline passed.
    Unavailable,
    /// The prepare was cancelled before it reached the service's code.
    Cancelled,
    /// The request is invalid.
    Invalid,
    /// Another transaction, with other content, has this id.
    IdReused,
}

impl ReasonCode {
    /// Every code that this release knows.
    pub fn all() -> impl Iterator<Item = Self> {
        // The exhaustive match makes sure that none is left out.
        let next = |code: &Self| match code {
            Self::Refused => Some(Self::Failed),
            Self::Failed => Some(Self::NoSlot),
            Self::NoSlot => Some(Self::UnknownService),
            Self::UnknownService => Some(Self::Deadline),
            Self::Deadline => Some(Self::Unavailable),
            Self::Unavailable => Some(Self::Cancelled),
            Self::Cancelled => Some(Self::Invalid),
            Self::Invalid => Some(Self::IdReused),
            Self::IdReused => None,
        };
        std::iter::successors(Some(Self::Refused), next)
    }

    /// The word in results and records.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::NoSlot => "no_slot",
            Self::UnknownService => "unknown_service",
            Self::Deadline => "deadline",
            Self::Unavailable => "unavailable",
            Self::Cancelled => "cancelled",
            Self::Invalid => "invalid",
            Self::IdReused => "id_reused",
        }
    }
}

impl fmt::Display for ReasonCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why a transaction aborts, or a request was rejected.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub struct Reason {
    /// The reason in one word.
    pub code: ReasonCode,
    /// The service that is the reason, if there is one.
    pub service: Option<ServiceName>,
    /// A message of that service, or of the coordinator.
    pub message: Option<Arc<str>>,
}

impl Reason {
    /// `code`, at a service or at none, with a message or without one.
    pub fn new(code: ReasonCode, service: Option<ServiceName>, message: Option<Arc<str>>) -> Self {
        Self { code, service, message }
    }

    /// `code` at `service`, without a message.
    pub fn at(service: &ServiceName, code: ReasonCode) -> Self {
        Self { code, service: Some(service.clone()), message: None }
    }

    /// `code` at no service in particular, with a message.
    pub fn because(code: ReasonCode, message: impl Into<Arc<str>>) -> Self {
        Self { code, service: None, message: Some(message.into()) }
    }
}

/// A producer's request that all of `services` commit, or none.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Request {
    /// Which transaction.
    pub key: TransactionKey,
    /// The digest of `services` and `data`.
    pub request_hash: RequestHash,
    /// Every service involved, each once, in name order. Never empty.
    pub services: Arc<[ServiceName]>,
    /// The data for every prepare.
    pub data: Payload,
    /// How long the prepares may take; `None`: the worker's default.
    pub timeout: Option<Duration>,
    /// When its result goes out, if it commits.
    pub answer_at: AnswerAt,
    /// Where the producer wants the result.
    pub reply: Option<ReplyToken>,
}

/// A worker's command to instances of a service.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Command {
    /// If you hold this transaction, vote again.
    Query(Query),
    /// The outcome: commit or undo.
    Finish(Finish),
    /// A prepare may still wait for a slot: don't start it.
    Cancel(TransactionKey),
}

/// Where a command goes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Destination {
    /// To one instance: the one that holds the slot.
    Instance(InstanceId),
    /// To every instance that runs now.
    AllInstances,
    /// To the service's durable queue: any one instance takes it, now or later.
    AnyInstance,
}

/// The prepare command: make ready to commit, and vote. It goes to the service's prepare queue, and any
/// instance that has a free slot takes it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Prepare {
    /// Which transaction.
    pub key: TransactionKey,
    /// The digest of the request, to be kept with what is prepared.
    pub request_hash: RequestHash,
    /// What to prepare.
    pub data: Payload,
    /// After this moment the service's code is not called any more.
    pub deadline: Time,
    /// Whether the transaction may have been prepared before, since a worker took over, or the prepare was
    /// delivered again. Then the instance looks into the store before it calls the service's code.
    pub repeated: bool,
}

/// The question who holds a transaction.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Query {
    /// Which transaction.
    pub key: TransactionKey,
    /// The digest of the request. An instance that holds other content with this key refuses.
    pub request_hash: RequestHash,
}

/// The commit or abort command.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Finish {
    /// Which transaction.
    pub key: TransactionKey,
    /// The outcome.
    pub outcome: Outcome,
    /// The branch that `outcome` is about. An instance that holds another branch of a committed
    /// transaction undoes it. `None` with [`Outcome::Committed`]: the transaction commits nothing of this
    /// service.
    pub branch: Option<Branch>,
    /// Whether the coordinator has parked this command: its done settles the parked commit.
    pub parked: bool,
}

/// The answer to a prepare or a query.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Vote {
    /// Which transaction.
    pub key: TransactionKey,
    /// The digest of the request that the vote is about. If the vote reaches a worker that knows the key with
    /// other content, it doesn't count.
    pub request_hash: RequestHash,
    /// The service that votes.
    pub service: ServiceName,
    /// The instance that votes for it.
    pub instance: InstanceId,
    /// The instance's store, if it has an id: all instances of a service name the same.
    pub store: Option<StoreId>,
    /// The vote itself.
    pub kind: VoteKind,
    /// The instance's free slots.
    pub free: u32,
}

/// A vote.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum VoteKind {
    /// The branch is stored, and kept until the outcome comes.
    Prepared {
        /// The branch, which a decision must name to commit it.
        branch: Branch,
    },
    /// There is nothing to commit: the service needs no finish.
    ReadOnly,
    /// The service's code has refused. Nothing is held.
    Refused(Reason),
    /// An error, a panic or a time-out. Something may be held.
    Failed {
        /// The branch that may be held.
        branch: Branch,
        /// What happened.
        reason: Reason,
    },
    /// The instance knows the outcome already.
    Finished(Outcome),
}

/// The answer to a finish.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Done {
    /// Which transaction.
    pub key: TransactionKey,
    /// The service that answers.
    pub service: ServiceName,
    /// The instance that answers for it.
    pub instance: InstanceId,
    /// The instance's store, if it has an id: all instances of a service name the same.
    pub store: Option<StoreId>,
    /// Whether the outcome is applied; if not, the error of the service's code.
    pub applied: Result<(), Arc<str>>,
    /// Copied from the finish: see [`Finish::parked`].
    pub parked: bool,
    /// The instance's free slots.
    pub free: u32,
}

/// An instance that holds a transaction asks what became of it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Inquiry {
    /// Which transaction.
    pub key: TransactionKey,
    /// The digest of the request it prepared.
    pub request_hash: RequestHash,
    /// The service that asks.
    pub service: ServiceName,
    /// The instance that asks for it, and wants the answer.
    pub instance: InstanceId,
    /// The branch it holds.
    pub branch: Branch,
    /// The deadline of the prepare. Before it, no worker decides because of an inquiry.
    pub deadline: Time,
}

/// A record in the journal that proposes an outcome. The *first* one for its key is the outcome.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Decision {
    /// Which transaction.
    pub key: TransactionKey,
    /// The digest of the request that it decides.
    pub request_hash: RequestHash,
    /// The outcome it proposes.
    pub outcome: Outcome,
    /// The branches that [`Outcome::Committed`] commits: one of every service that voted prepared, in name
    /// order.
    pub branches: Vec<(ServiceName, Branch)>,
    /// Why it aborts.
    pub reason: Option<Reason>,
    /// When it was proposed, by the clock of `worker`.
    pub decided_at: Time,
    /// The worker that proposed it.
    pub worker: WorkerId,
}

impl Decision {
    /// The branch of `service` that is committed, if any is.
    pub fn branch_of(&self, service: &ServiceName) -> Option<&Branch> {
        self.branches.iter().find(|(name, _)| name == service).map(|(_, branch)| branch)
    }
}

/// The result that a producer receives.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Answer {
    /// The id of the transaction.
    pub id: TransactionId,
    /// The `requested_at` of the transaction that was decided. It differs from the request's own if that
    /// was a retry with a new timestamp.
    pub requested_at: Time,
    /// The outcome.
    pub outcome: Outcome,
    /// Why it aborted.
    pub reason: Option<Reason>,
    /// The services whose commit is parked.
    pub unresolved: Vec<ServiceName>,
    /// When it was decided.
    pub decided_at: Time,
}

/// A record for operators: a transaction or a commit that the system can't finish by itself.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Parked {
    /// Which transaction.
    pub key: TransactionKey,
    /// Why it is parked.
    pub cause: ParkedCause,
    /// When it was parked.
    pub parked_at: Time,
}

impl Parked {
    /// The service whose commit is parked; `None`: the transaction itself is.
    pub fn service(&self) -> Option<&ServiceName> {
        match &self.cause {
            ParkedCause::Uncommitted { service, .. } => Some(service),
            ParkedCause::Undecidable(_) => None,
        }
    }
}

/// Why something is parked: what an operator has to resolve.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum ParkedCause {
    /// `service` did not commit `branch`, though the transaction is committed.
    Uncommitted {
        /// The service that did not commit.
        service: ServiceName,
        /// The branch that it has to commit.
        branch: Branch,
        /// The last error of its code. `None`: it never answered.
        error: Option<Arc<str>>,
    },
    /// The journal doesn't reach back to where the transaction began: its outcome can't be determined.
    Undecidable(Request),
}
