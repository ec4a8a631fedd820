//! Everything that can happen to a coordinator, and everything it can ask for.

use std::{sync::Arc, time::Duration};

use crate::protocol::{
    ids::{InstanceId, ServiceName, StoreId, TransactionKey},
    message::{
        Answer, Command, Decision, Delivery, Destination, Done, Inquiry, Parked, Prepare, Reason,
        Request, Vote,
    },
    time::Time,
};

/// A fact that the coordinator learns. Any of them may come twice, late, or out of order.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Event {
    /// The journal is read from offset `next` on; every record made at `since` or later has that
    /// offset or a higher one. Comes before the first request.
    JournalAttached {
        /// The first offset that will be read.
        next: u64,
        /// From when on nothing is missing.
        since: Time,
    },
    /// A message was read back from the journal: records of the coordinator's own and of other
    /// workers', in their order.
    RecordsRead {
        /// Its place in the journal. A message is one place, however many records it holds.
        offset: u64,
        /// The records; none: the message is only a marker.
        decisions: Vec<Arc<Decision>>,
    },
    /// A record was read by the look further back that [`Effect::ReadHistory`] asked for. They come
    /// in journal order.
    HistoryRead(Arc<Decision>),
    /// That look is over: every record made at `reaches` or later has been read by it or is in
    /// view. `None`: nothing can be vouched for.
    HistoryEnded {
        /// From when on nothing is missing.
        reaches: Option<Time>,
    },
    /// A request was taken from the queue.
    RequestReceived {
        /// The request.
        request: Request,
        /// What to settle when its result is confirmed.
        delivery: Delivery,
        /// How often it has been delivered, this time included; or less, if it is more than
        /// [`deliveries_max`](super::Settings::deliveries_max) and still to be tried.
        deliveries: u32,
    },
    /// The service that [`Effect::FindService`] asked for exists; or nobody served it, as
    /// [`Event::ServiceUnserved`] said, and somebody does now.
    ServiceFound(ServiceName),
    /// It doesn't.
    ServiceMissing(ServiceName),
    /// An interim answer to [`Effect::FindService`]: the service can't be reached. Its queue exists
    /// but the queue's node is down, or the broker does not answer. The driver keeps looking, and
    /// reports [`Event::ServiceFound`] or [`Event::ServiceMissing`] later.
    ServiceUnavailable(ServiceName),
    /// The service exists, and nobody takes what is sent to it: no instance runs, or none that
    /// works. An answer to [`Effect::FindService`] or [`Effect::CheckService`], or found out when a
    /// prepare came back. The driver keeps looking, and reports [`Event::ServiceFound`] or
    /// [`Event::ServiceMissing`] when that is over.
    ServiceUnserved(ServiceName),
    /// A service's vote came in.
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
    /// A service's answer to a finish came in.
    DoneReceived {
        /// What it says.
        done: Done,
        /// The message it came in, if that is from the durable queue of all workers: it may not be
        /// acknowledged before the records of every [`Effect::Settle`] that names it are safe.
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
    /// The moment of [`Coordinator::next_deadline`](super::Coordinator::next_deadline) has come.
    /// Late or needless, it does no harm.
    DeadlineReached,
    /// The connection is lost: every delivery will come again, to any worker. Nothing in flight
    /// is worth keeping.
    Disconnected,
    /// Take no new work; hand back what has not begun.
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
            | Self::DeadlineReached
            | Self::Disconnected
            | Self::DrainRequested => None,
        }
    }
}

/// Something the coordinator asks for. They are to be carried out in the order in which they come;
/// any of them may be lost to a crash, and none needs to have succeeded before the next, except:
///
/// * [`Effect::Ack`] comes only after the [`Event::ResultConfirmed`] (or
///   [`Event::ParkConfirmed`]) of that delivery, so a crash in between repeats the answer rather
///   than losing it. The one exception is a result that can't be delivered: after
///   [`result_retries`](super::Settings::result_retries) repetitions it counts as unclaimed
///   ([`Anomaly::ResultUnclaimed`]), and its producer can ask again with the same key.
/// * [`Effect::Publish`] and every finish and cancel come only after the [`Event::RecordsRead`] of
///   the outcome; the result of a committed transaction also only after every service has
///   committed, or the [`Event::ParkConfirmed`] of the one that did not.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Effect {
    /// Find out whether a service exists: answered by [`Event::ServiceFound`],
    /// [`Event::ServiceUnserved`] or [`Event::ServiceMissing`], and before that by
    /// [`Event::ServiceUnavailable`] while that is not known.
    FindService {
        /// The service.
        service: ServiceName,
        /// How long to wait before looking: its queue refused a prepare just now.
        after: Duration,
    },
    /// Find out whether anybody serves a service, of which too long nothing was heard:
    /// [`Event::ServiceUnserved`] if nobody does, and else nothing. Asked for as often as
    /// something isn't answered: how often to look is the driver's business.
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
    /// Read the journal from `from` up to the message before offset `until`: answered by
    /// [`Event::HistoryRead`]s and one [`Event::HistoryEnded`].
    ReadHistory {
        /// Where to begin.
        from: Time,
        /// Where to end.
        until: u64,
    },
    /// Tell the producer, and answer with [`Event::ResultConfirmed`] or [`Event::ResultFailed`].
    Publish {
        /// The transaction whose result it is.
        key: TransactionKey,
        /// The request that is answered.
        delivery: Delivery,
        /// The result.
        answer: Answer,
    },
    /// The request is dealt with: it must not come again.
    Ack(Delivery),
    /// The request was not begun: hand it to another worker.
    Release(Delivery),
    /// The request can't be dealt with: set it aside with the reason, and tell its producer.
    Reject {
        /// The request.
        request: Request,
        /// What to settle.
        delivery: Delivery,
        /// What is wrong with it.
        reason: Reason,
    },
    /// Write it down for a person, durably, and answer with [`Event::ParkConfirmed`]. The parked
    /// finish of a commit is sent after that; a driver may have made it safe before it wrote the
    /// record, and then sends no other.
    Park(Parked),
    /// Write down, durably, that a parked commit was applied after all. That is final: a parked
    /// record of it that comes later, as one of a worker that died meanwhile may, changes nothing;
    /// nor does this where nothing was parked.
    Settle {
        /// Which transaction.
        key: TransactionKey,
        /// The service that has committed.
        service: ServiceName,
        /// The delivery of the [`Event::DoneReceived`] that this follows from. It may be
        /// acknowledged when this record is safe, and that of every other effect that names it.
        ack: Option<Delivery>,
        /// Whether it is known to have been parked. If not, a worker that is gone may have done so,
        /// and not have sent the parked finish. A system in which each worker makes that safe before
        /// the record needs no such record: the done of that finish will settle it.
        was_parked: bool,
    },
    /// Worth a line in the log or a count, nothing more.
    Report(Anomaly),
}

/// Something unusual that the protocol deals with by itself.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Anomaly {
    /// A request came again that is being worked on.
    DuplicateRequest(TransactionKey),
    /// A vote came for a transaction that is decided, or unknown here.
    LateVote(TransactionKey, ServiceName),
    /// Two instances of one service prepared the same transaction: one of them will undo it.
    PreparedTwice(TransactionKey, ServiceName),
    /// A service's code failed to commit and will be called again.
    CommitFailed {
        /// Which transaction.
        key: TransactionKey,
        /// Which service.
        service: ServiceName,
        /// How many attempts have failed.
        failures: u32,
        /// What the code said.
        error: Arc<str>,
    },
    /// A command was not answered and is sent again.
    Unanswered(TransactionKey, ServiceName),
    /// A transaction that held slots elsewhere got none here in time.
    Stalled(TransactionKey, ServiceName),
    /// An inquiry could not be taken in: too many are under way. It will be repeated.
    InquiryDropped(TransactionKey),
    /// An instance of this service holds a transaction that is past its deadline, and the journal
    /// doesn't reach back to where the transaction began: nobody can tell its outcome, or may decide
    /// it. It is asked about, and reported, again and again.
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
    /// Two instances of a service name different stores, though they should share one: what one has
    /// prepared the other can't commit. Reported once in a while, as long as it is so.
    StoresDiffer {
        /// Which service.
        service: ServiceName,
        /// Who named which store before.
        before: (InstanceId, StoreId),
        /// Who names which now.
        now: (InstanceId, StoreId),
    },
    /// A service can't be reached. Reported once, when that begins.
    ServiceUnavailable(ServiceName),
    /// That service can be reached again. Reported once.
    ServiceAvailable(ServiceName),
    /// Nobody serves a service. Reported once, when that begins.
    ServiceUnserved(ServiceName),
    /// Somebody serves that service again. Reported once.
    ServiceServed(ServiceName),
}
