//! Writing decisions to the journal: one append at a time, and all that is ready by its end in the
//! next.
//!
//! An append is done when it is confirmed *or* read back: a broker that has elected a leader may lose
//! the confirm of what is in the stream. One that is neither is published again by the lane's own
//! bound. What is confirmed and is not read back shows that the journal is not read any more.
//!
//! Nothing is decided meanwhile, so these waits are short. When a stream's writer moves to
//! another node, what is on its way in these milliseconds is lost without a word, and so are the
//! journal's consumers.

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use lapin::types::ShortString;
use tokio::time::Instant;

use crate::{
    protocol::message::Decision,
    transport::amqp::{
        bounded::AskError,
        connection::{Backoff, BrokerConnection},
        names::Names,
        publisher::{LaneLost, Outgoing, Published, Publisher},
        unique,
    },
    wire::message::{Items, Kind},
};

/// How long an append may be unconfirmed at first, and at most. A stream that elects a leader takes
/// 10 s and more, and then what is published first.
const CONFIRM_FIRST: Duration = Duration::from_secs(1);
const CONFIRM_MAX: Duration = Duration::from_secs(2);

/// How long what was confirmed may take to be read back, at first and at most.
const UNREAD_FIRST: Duration = Duration::from_secs(1);
const UNREAD_MAX: Duration = Duration::from_secs(4);

/// The same when the append before it was not confirmed.
const UNREAD_AFTER_A_LOSS: Duration = Duration::from_millis(200);

/// The first pause before an append is published again that the journal did not take, and the
/// longest.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How many confirmed appends are remembered until they are read back.
const UNREAD_COUNT_MAX: usize = 1024;

/// Decisions on their way to the journal.
#[derive(Debug)]
pub(super) struct Appender {
    journal: ShortString,
    lane: Publisher<Append>,
    /// What the ids of this link's appends begin with.
    link: String,
    last_number: u64,
    /// Those that wait for the append before them.
    decisions: Vec<Decision>,
    /// The append that is on its way.
    on_its_way: Option<ShortString>,
    again_at: Option<Instant>,
    backoff: Backoff,
    /// Appends that are confirmed and not read back, and since when.
    unread: VecDeque<(ShortString, Instant)>,
    /// How long they may be that.
    unread_limit: Duration,
    /// The journal did not take the last append, and nothing was read back since.
    is_untaken: bool,
}

/// One message of decisions.
#[derive(Debug)]
struct Append {
    id: ShortString,
    decisions: Vec<Decision>,
}

impl Appender {
    pub(super) async fn open(
        publishing: &Arc<BrokerConnection>,
        names: &Names,
    ) -> Result<Self, AskError> {
        let lane = Publisher::open(publishing, format!("appends to `{}`", names.journal()));
        Ok(Self {
            journal: names.journal(),
            lane: lane.await?.impatient(CONFIRM_FIRST, CONFIRM_MAX),
            link: unique::name('a'),
            last_number: 0,
            decisions: Vec::new(),
            on_its_way: None,
            again_at: None,
            backoff: first_pause(),
            unread: VecDeque::new(),
            unread_limit: UNREAD_FIRST,
            is_untaken: false,
        })
    }

    pub(super) fn append(&mut self, decision: Decision) {
        self.decisions.push(decision);
    }

    /// Publishes what waits, if no append is on its way.
    pub(super) fn flush(&mut self, now: Instant) {
        if self.on_its_way.is_some() || self.again_at.is_some_and(|at| at > now) {
            return;
        }
        let mut items = Items::new();
        let full = self.decisions.iter().position(|decision| items.push(decision).is_err());
        let rest = self.decisions.split_off(full.unwrap_or(self.decisions.len()));
        let decisions = std::mem::replace(&mut self.decisions, rest);
        if decisions.is_empty() {
            return;
        }
        self.last_number += 1;
        let id = ShortString::from(format!("{}-{}", self.link, self.last_number));
        let message = Outgoing {
            key: self.journal.clone(),
            message_type: Kind::Decision.as_type(),
            body: items.into_body(),
            persistent: true,
            mandatory: true,
            message_id: Some(id.clone()),
            ..Outgoing::default()
        };
        self.on_its_way = Some(id.clone());
        self.again_at = None;
        self.lane.publish(message, Append { id, decisions });
    }

    /// Ready when an append is answered; more can be flushed then.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LaneLost>> {
        let Poll::Ready(answered) = self.lane.poll_next(cx) else { return Poll::Pending };
        let (append, published) = answered?;
        self.answered(append, &published);
        Poll::Ready(Ok(()))
    }

    fn answered(&mut self, append: Append, published: &Published) {
        // Read back before: then its confirm says nothing new, whatever it says.
        if self.on_its_way.as_ref() != Some(&append.id) {
            return;
        }
        self.on_its_way = None;
        if matches!(published, Published::Confirmed) {
            self.backoff = first_pause();
            if self.unread.len() < UNREAD_COUNT_MAX {
                self.unread.push_back((append.id, Instant::now()));
            }
            return;
        }
        let is_known = std::mem::replace(&mut self.is_untaken, true);
        if is_known {
            tracing::debug!(fate = ?published, "the journal did not take an append again");
        } else {
            tracing::warn!(
                journal = %self.journal, fate = ?published, decisions = append.decisions.len(),
                "the journal did not take an append; it is published again until it does"
            );
        }
        if matches!(published, Published::Unconfirmed(_)) {
            // It has been waited for; and what is lost with the writer are its readers, too.
            self.unread_limit = UNREAD_AFTER_A_LOSS;
        } else {
            self.again_at = Some(Instant::now() + self.backoff.pause());
        }
        self.decisions.splice(..0, append.decisions);
    }

    /// A message was read from the journal.
    pub(super) fn read_back(&mut self, message_id: Option<&ShortString>) {
        let Some(id) = message_id.filter(|id| id.as_str().starts_with(&self.link)) else { return };
        if let Some(place) = self.unread.iter().position(|(unread, _)| unread == id) {
            // Appends are in the journal in the order in which they were published.
            self.unread.drain(..=place);
            self.unread_limit = UNREAD_FIRST;
            self.is_untaken = false;
        } else if self.on_its_way.as_ref() == Some(id) {
            self.on_its_way = None;
            self.backoff = first_pause();
            self.is_untaken = false;
        }
    }

    /// The journal is read by another consumer: what was confirmed may still be read back by that.
    pub(super) fn read_anew(&mut self) {
        let now = Instant::now();
        self.unread.iter_mut().for_each(|(_, since)| *since = now);
        self.unread_limit = (self.unread_limit * 2).clamp(UNREAD_FIRST, UNREAD_MAX);
    }

    /// How long something confirmed has not been read back, if that is too long.
    pub(super) fn unread_for(&self, now: Instant) -> Option<Duration> {
        let (_, since) = self.unread.front()?;
        Some(now.saturating_duration_since(*since)).filter(|unread| *unread >= self.unread_limit)
    }

    /// When there is something to be done though nothing happens.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let unread = self.unread.front().map(|(_, since)| *since + self.unread_limit);
        let again = self.again_at.filter(|_| !self.decisions.is_empty());
        unread.into_iter().chain(again).min()
    }

    /// Whether nothing is on its way.
    pub(super) fn is_idle(&self) -> bool {
        self.decisions.is_empty() && self.on_its_way.is_none()
    }

    pub(super) fn is_open(&self) -> bool {
        self.lane.is_open()
    }

    /// Waits until nothing is on its way.
    pub(super) async fn finish(&mut self) {
        self.lane.finish().await;
    }
}

fn first_pause() -> Backoff {
    Backoff::new(PAUSE_FIRST, PAUSE_MAX)
}
