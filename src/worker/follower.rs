//! Follows the journal's end, and reads older parts when the coordinator asks for them. Resumes when the
//! broker has ended the consumer.

use std::{
    sync::{Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use lapin::message::Delivery;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, sleep},
};
use tracing::Instrument as _;

use crate::{
    clock::Clock,
    error::ErrorChain,
    protocol::{coordinator::Event, time::Time},
    transport::amqp::{
        bounded::ANSWER_MAX, connection::Backoff, connection_pair::ConnectionPair,
        consumer::ConsumerError,
    },
    worker::{
        Settings,
        clocks::ClockComparison,
        journal::{HistoryItem, HistoryRange, Journal, ReadError, Record, Tail},
        packs::{self, PackedJournal, ReadIn},
        state::{LastRead, WorkerState},
        suspects::Tries,
    },
};

/// How many messages that were read of older parts may wait.
const FOUND_MAX: usize = 64;

/// How often to resume before the worker gives up the link.
const RESUMES_MAX: u32 = 3;

/// Reads the journal over one link.
pub(super) struct Follower {
    journal: Journal,
    tail: Tail,
    /// Whether the broker has ended the consumer.
    is_cut_off: bool,
    history_reads: JoinSet<()>,
    found: (mpsc::Sender<HistoryItem>, mpsc::Receiver<HistoryItem>),
}

/// What was read.
pub(super) enum JournalEvent {
    /// At the journal's end.
    Record(Record),
    /// In an older part.
    History(HistoryItem),
    /// The broker has ended the consumer: nothing more comes until [`Follower::resume`].
    CutOff,
}

/// The journal can't be read any more over this link.
#[derive(Debug, thiserror::Error)]
pub(super) enum FollowError {
    #[error("failed to read the journal")]
    Read(#[source] ReadError),
    #[error("lost the journal's consumer")]
    Closed(#[source] ConsumerError),
    #[error("the journal no longer contains the last record read; was it recreated?")]
    OtherJournal,
}

impl Follower {
    /// Reads the journal to its end: from where an earlier link has left it, or else from the beginning
    /// of the window.
    pub(super) async fn open(
        mut journal: Journal,
        packed: Option<&PackedJournal>,
        settings: &Settings,
        state: &mut WorkerState,
    ) -> Result<Self, FollowError> {
        let opened = read_journal(&journal, packed, settings, state).await;
        let opened = opened.inspect_err(|error| journal.be_patient(error));
        state.begin_max = if opened.is_ok() { ANSWER_MAX } else { journal.begin_max };
        let tail = opened.map_err(FollowError::Read)?;
        Ok(Self {
            journal,
            tail,
            is_cut_off: false,
            history_reads: JoinSet::new(),
            found: mpsc::channel(FOUND_MAX),
        })
    }

    pub(super) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<JournalEvent, FollowError>> {
        if !self.is_cut_off
            && let Poll::Ready(message) = self.tail.poll_next(cx)
        {
            return Poll::Ready(self.read(message));
        }
        match self.found.1.poll_recv(cx) {
            Poll::Ready(Some(found)) => Poll::Ready(Ok(JournalEvent::History(found))),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }

    fn read(
        &mut self,
        message: Result<Delivery, ConsumerError>,
    ) -> Result<JournalEvent, FollowError> {
        match message {
            Ok(message) => {
                self.tail.read(&message).map(JournalEvent::Record).map_err(FollowError::Read)
            }
            // The stream's leader has moved, or its replica on this node is gone.
            Err(ConsumerError::Cancelled { .. }) => {
                self.is_cut_off = true;
                Ok(JournalEvent::CutOff)
            }
            Err(closed) => Err(FollowError::Closed(closed)),
        }
    }

    /// Whether nothing more comes until [`Self::resume`].
    pub(super) fn is_cut_off(&self) -> bool {
        self.is_cut_off
    }

    /// Continues after the last message, with another consumer. The worker does nothing else meanwhile:
    /// without the journal it can't finish any transaction.
    pub(super) async fn resume(
        &mut self,
        last_read: Option<LastRead>,
        link: &ConnectionPair,
    ) -> Result<(), FollowError> {
        let Some(LastRead { offset, digest }) = last_read else {
            return Err(FollowError::OtherJournal);
        };
        let mut backoff = Backoff::default();
        for attempt in 1.. {
            let resumed = self.journal.resume(offset, digest).await;
            match resumed.inspect_err(|error| self.journal.be_patient(error)) {
                Ok(Some(tail)) => {
                    tracing::info!(offset, "resumed reading the journal");
                    self.tail = tail;
                    self.is_cut_off = false;
                    return Ok(());
                }
                Ok(None) => return Err(FollowError::OtherJournal),
                // Perhaps the connection is what delivers nothing.
                Err(error @ ReadError::Silent) => return Err(FollowError::Read(error)),
                Err(error) if attempt < RESUMES_MAX && link.is_up() => {
                    tracing::warn!(error = %ErrorChain(&error), "failed to resume reading the journal; retrying");
                    sleep(backoff.pause()).await;
                }
                Err(error) => return Err(FollowError::Read(error)),
            }
        }
        Err(FollowError::OtherJournal)
    }

    /// Reads an older part, from `from` up to the message before `until`.
    pub(super) fn read_history(&mut self, from: Time, until: u64, clock_margin: Duration) {
        let range = HistoryRange { from, until, clock_margin };
        let looking = self.journal.clone().read_history(range, self.found.0.clone());
        self.history_reads.spawn(looking.in_current_span());
    }

    /// Compares the clocks. `None`: that failed.
    pub(super) fn compare(
        &self,
        clock: Clock,
        clock_margin: Duration,
    ) -> impl Future<Output = Option<ClockComparison>> + use<> {
        let journal = self.journal.clone();
        async move {
            let compared = journal.compare(clock, clock_margin).await;
            compared
                .inspect_err(|error| {
                    tracing::warn!(error = %ErrorChain(error), "failed to compare clocks with the broker");
                })
                .ok()
        }
    }

    /// Acknowledges the messages that were read.
    pub(super) fn flush(&mut self) {
        self.tail.flush();
    }
}

/// Takes in a record at the journal's end: the event for the coordinator.
pub(super) fn read_event(state: &mut WorkerState, record: Record) -> Event {
    state.pack_buffer.read(&record);
    let Record { offset, decisions, digest, tried, message_id, .. } = record;
    state.tries.read(tried, message_id.as_ref(), &decisions);
    let now = state.clock.read();
    // All records of a message are of one worker, and were made at about the same moment.
    if let Some(decision) = decisions.last() {
        state.clocks.record(now, decision);
    }
    state.last_read = Some(LastRead { offset, digest });
    Event::RecordsRead { offset, decisions }
}

async fn read_journal(
    journal: &Journal,
    packed: Option<&PackedJournal>,
    settings: &Settings,
    state: &mut WorkerState,
) -> Result<Tail, ReadError> {
    if let Some(LastRead { offset, digest }) = state.last_read {
        if let Some(tail) = journal.resume(offset, digest).await? {
            return Ok(tail);
        }
        tracing::warn!(
            offset,
            "the journal no longer contains the last record read; reading it from the beginning of \
             the window"
        );
    }
    let started = Instant::now();
    let now = state.clock.now();
    let margin = settings.coordinator.clock_margin;
    let from = now - settings.coordinator.window - margin;
    let progress = Mutex::new(WindowProgress { state, decisions: 0, packed: 0 });
    let tail = packs::attach(
        journal,
        packed,
        from,
        margin,
        |next, reaches| {
            if reaches.is_none() {
                tracing::error!(
                    "the journal is incomplete: requests made before now can't be resolved and will \
                     be parked; was the journal deleted or truncated?"
                );
            }
            // If the journal proves nothing, only records from now on are certain to be seen.
            let since = reaches.unwrap_or(now + margin);
            let progress = &mut *progress.lock().unwrap_or_else(PoisonError::into_inner);
            (progress.decisions, progress.packed) = (0, 0);
            progress.state.tries = Tries::default();
            progress.state.pack_buffer.clear();
            let event = Event::JournalAttached { next, since };
            progress.state.coordinator.handle(now, event, &mut Vec::new());
        },
        |record, read_in| {
            let progress = &mut *progress.lock().unwrap_or_else(PoisonError::into_inner);
            progress.decisions += record.decisions.len();
            let is_packed = read_in == ReadIn::Pack;
            progress.packed += if is_packed { record.decisions.len() } else { 0 };
            let state = &mut *progress.state;
            state.pack_buffer.read(&record);
            let Record { offset, decisions, digest, tried, message_id, .. } = record;
            state.tries.read(tried, message_id.as_ref(), &decisions);
            let now = state.clock.read();
            if let Some(decision) = decisions.last() {
                state.clocks.past_record(now, decision);
            }
            // No link may continue from a message that the journal may not have.
            state.last_read = (!is_packed).then_some(LastRead { offset, digest });
            let event = Event::RecordsRead { offset, decisions };
            // The worker serves nobody yet, so there are no effects.
            state.coordinator.handle(now.time, event, &mut Vec::new());
        },
    );
    let tail = tail.await?;
    let WindowProgress { decisions, packed, .. } =
        progress.into_inner().unwrap_or_else(PoisonError::into_inner);
    let elapsed_ms = started.elapsed().as_millis() as u64;
    tracing::info!(decisions, packed, elapsed_ms, "the journal is read");
    Ok(tail)
}

/// How much of the window was read.
struct WindowProgress<'a> {
    state: &'a mut WorkerState,
    decisions: usize,
    /// How many of the decisions were in packs.
    packed: usize,
}
