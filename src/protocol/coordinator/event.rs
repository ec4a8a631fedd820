//! The events that a coordinator handles, and the effects that it asks for.

use std::{sync::Arc, time::Duration};

use crate::protocol::{
    ids::{InstanceId, ServiceName, StoreId, TransactionKey},
    message::{
        Answer, Command, Decision, Delivery, Destination, Done, Inquiry, Parked, Prepare, Reason,
        Request, Vote,
    },
    time::Time,
};

/// An event that the coordinator handles. Any event may come twice, late, or out of order.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Event {
    /// The driver reads the journal from offset `next` on. Every record that was made at `since` or later
    /// has that offset or a higher one. Comes before the first request.
    JournalAttached {
        /// The first offset that will be read.
        next: u64,
        /// Since when no record is missing.
        since: Time,
    },
    /// A message was read from the journal: records of this worker and of others, in order.
    RecordsRead {
        /// The offset of the message, however many records it holds.
        offset: u64,
        /// The records. A marker has none.
        decisions: Vec<Arc<Decision>>,
    },
    /// A record of the older part that [`Effect::ReadHistory`] asked for. They come in journal order.
    HistoryRead(Arc<Decision>),
    /// That part was read: every record that was made at `reaches` or later was in it or is in view.
    /// `None`: nothing is certain.
    HistoryEnded {
        /// Since when no record is missing.
        reaches: Option<Time>,
    },
    /// A request was taken from the queue.
    RequestReceived {
        /// The request.
        request: Request,
        /// What to settle when its result is confirmed.
        delivery: Delivery,
        /// How often it was delivered, this time included. A driver that tries it again although it was
        /// delivered more than [`deliveries_max`](super::Settings::deliveries_max) times names that number.
        deliveries: u32,
    },
    /// The service that [`Effect::FindService`] asked for exists; or, after [`Event::ServiceUnserved`], it
    /// has an instance again.
    ServiceFound(ServiceName),
    /// The service does not exist.
    ServiceMissing(ServiceName),
    /// An interim answer to [`Effect::FindService`]: the service can't be reached. Its queue exists
    /// but the queue's node is down, or the broker does not answer. The driver keeps looking, and
    /// reports [`Event::ServiceFound`] or [`Event::ServiceMissing`] later.
    ServiceUnavailable(ServiceName),
    /// The service exists, but has no instance that takes messages. An answer to
    /// [`Effect::FindService`] or [`Effect::CheckService`], or a finding after a prepare came back. The
    /// driver keeps looking, and reports [`Event::ServiceFound`] or [`Event::ServiceMissing`] when that has
    /// changed.
    ServiceUnserved(ServiceName),
    /// A vote.
    VoteReceived(Vote),
    /// The transport brought a prepare back: no slot became free within the service's `max_wait`.
    PrepareReturned {
        /// Which transaction.
        key: TransactionKey,
        /// The service without a slot.
        service: ServiceName,
    },
    /// A prepare could not be delivered: there is no such service.
    PrepareUnroutable {
        /// Which transaction.
        key: TransactionKey,
        /// The service that does not exist.
        service: ServiceName,
    },
    /// The broker refused a prepare: the queue's node is down, or the queue is full. The prepare
    /// may have arrived all the same.
    PrepareRefused {
        /// Which transaction.
        key: TransactionKey,
        /// The service that can't be reached.
        service: ServiceName,
    },
    /// An answer to a finish.
    DoneReceived {
        /// The answer.
        done: Done,
        /// Its message, if that is from the durable queue of all workers: it must not be acknowledged
        /// before the records of every [`Effect::Settle`] that names it are safe.
        delivery: Option<Delivery>,
    },
    /// An instance asks what became of a transaction.
    InquiryReceived(Inquiry),
    /// A result is safe with the broker.
    ResultConfirmed {
        /// Whose result.
        key: TransactionKey,
        /// The request it answers.
        delivery: Delivery,
    },
    /// A result may be lost.
    ResultFailed {
        /// Whose result.
        key: TransactionKey,
        /// The request it answers.
        delivery: Delivery,
    },
    /// A parked record is safe with the broker.
    ParkConfirmed {
        /// Which transaction.
        key: TransactionKey,
        /// The service whose commit is parked; `None`: the transaction itself is.
        service: Option<ServiceName>,
    },
    /// So many workers share the services, this one included. Until it comes, this worker counts as the
    /// only one.
    WorkersCounted(u32),
    /// The moment of [`Coordinator::next_deadline`](super::Coordinator::next_deadline) has come. If it comes
    /// late or needlessly, it does no harm.
    DeadlineReached,
    /// The connection is lost: every delivery will come again, to any worker.
    Disconnected,
    /// The worker stops: take no new requests, and hand back those that have not begun.
    DrainRequested,
}

impl Event {
    /// The event's name, for logs and for coverage tables.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::JournalAttached { .. } => "JournalAttached",
            Self::RecordsRead { .. } => "RecordsRead",
            Self::HistoryRead(_) => "HistoryRead",
            Self::HistoryEnded { .. } => "HistoryEnded",
            Self::RequestReceived { .. } => "RequestReceived",
            Self::ServiceFound(_) => "ServiceFound",
            Self::ServiceMissing(_) => "ServiceMissing",
            Self::ServiceUnavailable(_) => "ServiceUnavailable",
            Self::ServiceUnserved(_) => "ServiceUnserved",
            Self::VoteReceived(_) => "VoteReceived",
            Self::PrepareReturned { .. } => "PrepareReturned",
            Self::PrepareUnroutable { .. } => "PrepareUnroutable",
            Self::PrepareRefused { .. } => "PrepareRefused",
            Self::DoneReceived { .. } => "DoneReceived",
            Self::InquiryReceived(_) => "InquiryReceived",
            Self::ResultConfirmed { .. } => "ResultConfirmed",
            Self::ResultFailed { .. } => "ResultFailed",
            Self::ParkConfirmed { .. } => "ParkConfirmed",
            Self::WorkersCounted(_) => "WorkersCounted",
            Self::DeadlineReached => "DeadlineReached",
            Self::Disconnected => "Disconnected",
            Self::DrainRequested => "DrainRequested",
        }
    }

    /// The transactions it is about: none, one, or those of several records.
    pub fn keys(&self) -> impl Iterator<Item = &TransactionKey> {
        let records: &[_] =
            if let Self::RecordsRead { decisions, .. } = self { decisions } else { &[] };
        self.key().into_iter().chain(records.iter().map(|decision| &decision.key))
    }

    fn key(&self) -> Option<&TransactionKey> {
        match self {
            Self::HistoryRead(decision) => Some(&decision.key),
            Self::RequestReceived { request, .. } => Some(&request.key),
            Self::VoteReceived(vote) => Some(&vote.key),
            Self::DoneReceived { done, .. } => Some(&done.key),
            Self::InquiryReceived(inquiry) => Some(&inquiry.key),
            Self::PrepareReturned { key, .. }
            | Self::PrepareUnroutable { key, .. }
            | Self::PrepareRefused { key, .. }
            | Self::ResultConfirmed { key, .. }
            | Self::ResultFailed { key, .. }
            | Self::ParkConfirmed { key, .. } => Some(key),
            Self::JournalAttached { .. }
            | Self::RecordsRead { .. }
            | Self::HistoryEnded { .. }
            | Self::ServiceFound(_)
            | Self::ServiceMissing(_)
            | Self::ServiceUnavailable(_)
            | Self::ServiceUnserved(_)
            | Self::WorkersCounted(_)
            | Self::DeadlineReached
            | Self::Disconnected
            | Self::DrainRequested => None,
        }
    }
}

/// Something that the driver must do for the coordinator. It carries out effects in order. A crash may lose
/// any of them, and none needs to have succeeded before the next, except:
///
/// * [`Effect::Ack`] comes only after the [`Event::ResultConfirmed`] (or
///   [`Event::ParkConfirmed`]) of that delivery, so a crash in between repeats the answer rather
///   than losing it. The one exception is a result that can't be delivered: after
///   [`result_retries`](super::Settings::result_retries) repetitions it counts as unclaimed
///   ([`Anomaly::ResultUnclaimed`]), and its producer can ask again with the same key.
/// * [`Effect::Publish`] and every finish and cancel come only after the [`Event::RecordsRead`] of
///   the outcome; the result of a committed transaction also only after every service has
///   committed, or the [`Event::ParkConfirmed`] of the one that did not. The latter holds for
///   [`Effect::Ack`] too, and for the result unless the request asks for it at
///   [`AnswerAt::Decided`](crate::protocol::message::AnswerAt::Decided).
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Effect {
    /// Find out whether a service exists. The answer is [`Event::ServiceFound`],
    /// [`Event::ServiceUnserved`] or [`Event::ServiceMissing`]; [`Event::ServiceUnavailable`] comes first
    /// while that is unknown.
    FindService {
        /// The service.
        service: ServiceName,
        /// How long to wait first: the service's queue has just refused a prepare.
        after: Duration,
    },
    /// Find out whether a service has instances: [`Event::ServiceUnserved`] if it has none, and nothing
    /// otherwise. The coordinator asks whenever a message is not answered; the driver decides how often to
    /// look.
    CheckService(ServiceName),
    /// Send a prepare to the queue of a service.
    SendPrepare {
        /// The service.
        service: ServiceName,
        /// What to prepare.
        prepare: Prepare,
        /// How many more of the service's slots are free, as far as is known: a hint.
        spare: u32,
    },
    /// Send a command to the instances of a service.
    Send {
        /// The service.
        service: ServiceName,
        /// Which of its instances.
        to: Destination,
        /// What to do.
        command: Command,
    },
    /// Append a record to the journal.
    Append(Decision),
    /// Read the journal from `from` up to the message before offset `until`. The answer is any number of
    /// [`Event::HistoryRead`], and one [`Event::HistoryEnded`].
    ReadHistory {
        /// Where to begin.
        from: Time,
        /// Where to end.
        until: u64,
    },
    /// Publish a result. The answer is [`Event::ResultConfirmed`] or [`Event::ResultFailed`].
    Publish {
        /// The transaction whose result it is.
        key: TransactionKey,
        /// The request that is answered.
        delivery: Delivery,
        /// The result.
        answer: Answer,
    },
    /// Acknowledge the request: it must not come again.
    Ack(Delivery),
    /// The request was not begun: return it to the queue, for another worker.
    Release(Delivery),
    /// Reject the request: set it aside with the reason, and publish a result.
    Reject {
        /// The request.
        request: Request,
        /// What to settle.
        delivery: Delivery,
        /// Why it is rejected.
        reason: Reason,
    },
    /// Write a durable record for operators. The answer is [`Event::ParkConfirmed`]. After that the
    /// coordinator sends the parked finish of a commit. A driver that has made the finish safe before the
    /// record drops that one.
    Park(Parked),
    /// Write a durable record that a parked commit was applied after all. It is final: a parked record that
    /// comes later, for example from a worker that crashed meanwhile, changes nothing. If nothing was parked,
    /// the record does no harm.
    Settle {
        /// Which transaction.
        key: TransactionKey,
        /// The service that has committed.
        service: ServiceName,
        /// The delivery of the [`Event::DoneReceived`] that this follows from. It may be
        /// acknowledged when this record is safe, and that of every other effect that names it.
        ack: Option<Delivery>,
        /// Whether this worker has parked the commit. If not, a worker that is gone may have, without having
        /// sent the parked finish. If every worker makes that finish safe before it writes the parked record,
        /// this record is not needed: the done of that finish will settle the commit.
        was_parked: bool,
    },
    /// Log it, or count it.
    Report(Anomaly),
}

/// Something unusual that the protocol handles by itself.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Anomaly {
    /// A request came again while its transaction was in flight.
    DuplicateRequest(TransactionKey),
    /// A vote came for a transaction that is decided, or that this coordinator doesn't know.
    LateVote(TransactionKey, ServiceName),
    /// Two instances of one service have prepared the same transaction: one of them will undo it.
    PreparedTwice(TransactionKey, ServiceName),
    /// A service's code failed to commit and will be called again.
    CommitFailed {
        /// Which transaction.
        key: TransactionKey,
        /// Which service.
        service: ServiceName,
        /// Which of its instances has answered.
        instance: InstanceId,
        /// How many attempts have failed.
        failures: u32,
        /// The error of the code.
        error: Arc<str>,
    },
    /// A command was not answered and is sent again.
    Unanswered(TransactionKey, ServiceName),
    /// A transaction that held slots of other services got no slot of this one in time.
    Stalled(TransactionKey, ServiceName),
    /// An inquiry was dropped, since too many are pending. The instance will repeat it.
    InquiryDropped(TransactionKey),
    /// An instance of this service holds a transaction that is past its deadline, and the journal doesn't
    /// reach back to where the transaction began: its outcome can't be determined, and no worker may decide
    /// it. The instance inquires again and again, and each time this is reported.
    InquiryUndecidable(TransactionKey, ServiceName),
    /// The journal has a gap before this offset.
    JournalGap(u64),
    /// A result could not be delivered, and counts as unclaimed: its request is acknowledged.
    ResultUnclaimed {
        /// Which transaction.
        key: TransactionKey,
        /// How often it was published.
        attempts: u32,
    },
    /// Two instances of a service name different stores, though they must share one: neither can commit what
    /// the other has prepared. Reported from time to time while this lasts.
    StoresDiffer {
        /// Which service.
        service: ServiceName,
        /// The instance that named a store before, and that store.
        before: (InstanceId, StoreId),
        /// The instance that names another one now, and that store.
        now: (InstanceId, StoreId),
    },
    /// A service can't be reached. Reported once, when that begins.
    ServiceUnavailable(ServiceName),
    /// The service can be reached again. Reported once.
    ServiceAvailable(ServiceName),
    /// A service has no instance. Reported once, when that begins.
    ServiceUnserved(ServiceName),
    /// The service has an instance again. Reported once.
    ServiceServed(ServiceName),
}
