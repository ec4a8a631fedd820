//! Appends decisions to the journal: one message at a time; the next message takes all decisions that
//! are ready by then.
//!
//! An append is done when it is confirmed *or* read back: a broker that has just elected a leader may
//! lose the confirm of a message that is in the stream. If neither happens in time, the same append is
//! published again. It is done when the first of its copies is read back, so a broker that is slower
//! than the limit still makes progress. If an append is confirmed and not read back, the journal's
//! consumer has stopped.
//!
//! No decision takes effect meanwhile, so the limits are short. While a stream's writer moves to another
//! node, messages on their way are lost silently, and so are the journal's consumers.

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
        publisher::{OutgoingMessage, PublishOutcome, Publisher, PublisherError},
        unique,
    },
    wire::message::{Items, Kind},
};

/// How long to wait for a confirm at first, and at most. A stream that elects a leader takes 10 s or
/// more, and then takes the copy that was published first.
const CONFIRM_FIRST: Duration = Duration::from_secs(1);
const CONFIRM_MAX: Duration = Duration::from_secs(2);

/// How long to wait until a confirmed append is read back, at first and at most.
const UNREAD_FIRST: Duration = Duration::from_secs(1);
const UNREAD_MAX: Duration = Duration::from_secs(4);

/// The same if the append before it was not confirmed.
const UNREAD_AFTER_A_LOSS: Duration = Duration::from_millis(200);

/// The pause before an append is published again that the journal did not take: the first one, and the
/// longest.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How many confirmed appends are remembered until they are read back.
const UNREAD_COUNT_MAX: usize = 1024;

/// Decisions on their way to the journal.
#[derive(Debug)]
pub(super) struct Appender {
    journal: ShortString,
    /// The ticket of a publish is the id of its append.
    lane: Publisher<ShortString>,
    pending: Pending,
    again_at: Option<Instant>,
    backoff: Backoff,
    /// Appends that are confirmed and not read back, and since when.
    unread: VecDeque<(ShortString, Instant)>,
    /// How long an append may stay unread.
    unread_limit: Duration,
    /// Whether the journal did not take the last append, and nothing was read back since.
    is_untaken: bool,
}

/// Decisions that the journal doesn't have yet, as far as is known.
#[derive(Debug)]
struct Pending {
    /// The prefix of this link's append ids.
    link: String,
    last_number: u64,
    /// Decisions for the next append.
    decisions: Vec<Decision>,
    append: Option<Append>,
}

/// One message of decisions.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Append {
    id: ShortString,
    body: Vec<u8>,
    len: usize,
    is_on_its_way: bool,
}

impl Pending {
    /// The append to publish now, if none is on its way.
    fn next(&mut self) -> Option<&Append> {
        if self.append.is_none() {
            self.append = self.gathered();
        }
        let append = self.append.as_mut().filter(|append| !append.is_on_its_way)?;
        append.is_on_its_way = true;
        Some(append)
    }

    /// A new append of as many decisions as fit in a message.
    fn gathered(&mut self) -> Option<Append> {
        let mut items = Items::new();
        let full = self.decisions.iter().position(|decision| items.push(decision).is_err());
        let len = self.decisions.drain(..full.unwrap_or(self.decisions.len())).count();
        if len == 0 {
            return None;
        }
        self.last_number += 1;
        let id = ShortString::from(format!("{}-{}", self.link, self.last_number));
        Some(Append { id, body: items.into_body(), len, is_on_its_way: false })
    }

    /// The journal has append `id`. Returns whether that is news.
    fn done(&mut self, id: &ShortString) -> bool {
        self.append.take_if(|append| append.id == *id).is_some()
    }

    /// The journal did not take append `id`, which will be published again: returns how many decisions it
    /// has. `None`: the journal has it after all.
    fn not_taken(&mut self, id: &ShortString) -> Option<usize> {
        let append = self.append.as_mut().filter(|append| append.id == *id)?;
        append.is_on_its_way = false;
        Some(append.len)
    }

    fn is_empty(&self) -> bool {
        self.decisions.is_empty() && self.append.is_none()
    }
}

impl Appender {
    pub(super) async fn open(
        publishing: &Arc<BrokerConnection>,
        names: &Names,
    ) -> Result<Self, AskError> {
        let lane = Publisher::open(publishing, format!("appends to `{}`", names.journal()));
        Ok(Self {
            journal: names.journal(),
            lane: lane.await?.with_growing_limit(CONFIRM_FIRST, CONFIRM_MAX),
            pending: Pending {
                link: unique::name('a'),
                last_number: 0,
                decisions: Vec::new(),
                append: None,
            },
            again_at: None,
            backoff: first_pause(),
            unread: VecDeque::new(),
            unread_limit: UNREAD_FIRST,
            is_untaken: false,
        })
    }

    /// The prefix of this link's append ids.
    pub(super) fn link(&self) -> &str {
        &self.pending.link
    }

    pub(super) fn append(&mut self, decision: Decision) {
        self.pending.decisions.push(decision);
    }

    /// Publishes the next append, if none is on its way.
    pub(super) fn flush(&mut self, now: Instant) {
        if self.again_at.is_some_and(|at| at > now) {
            return;
        }
        let Some(append) = self.pending.next() else { return };
        let message = OutgoingMessage {
            key: self.journal.clone(),
            message_type: Kind::Decision.as_type(),
            body: append.body.clone(),
            persistent: true,
            mandatory: true,
            message_id: Some(append.id.clone()),
            ..OutgoingMessage::default()
        };
        self.again_at = None;
        self.lane.publish(message, append.id.clone());
    }

    /// Ready when an append is answered; then [`Self::flush`] may publish the next.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), PublisherError>> {
        let Poll::Ready(answered) = self.lane.poll_next(cx) else { return Poll::Pending };
        let (id, published) = answered?;
        self.answered(id, &published);
        Poll::Ready(Ok(()))
    }

    fn answered(&mut self, id: ShortString, published: &PublishOutcome) {
        if matches!(published, PublishOutcome::Confirmed) {
            // If it was read back before, the confirm is no news.
            if self.pending.done(&id) {
                self.backoff = first_pause();
                if self.unread.len() < UNREAD_COUNT_MAX {
                    self.unread.push_back((id, Instant::now()));
                }
            }
            return;
        }
        let Some(decisions) = self.pending.not_taken(&id) else { return };
        let is_known = std::mem::replace(&mut self.is_untaken, true);
        if is_known {
            tracing::debug!(outcome = ?published, "again the journal did not take an append");
        } else {
            tracing::warn!(
                journal = %self.journal, outcome = ?published, decisions,
                "the journal did not take an append; publishing it again until it does"
            );
        }
        if matches!(published, PublishOutcome::Unconfirmed(_)) {
            // The wait was the pause. And if the writer is lost, so are the readers.
            self.unread_limit = UNREAD_AFTER_A_LOSS;
        } else {
            self.again_at = Some(Instant::now() + self.backoff.pause());
        }
    }

    /// A message was read from the journal.
    pub(super) fn read_back(&mut self, message_id: Option<&ShortString>) {
        let Some(id) = message_id.filter(|id| id.as_str().starts_with(&self.pending.link)) else {
            return;
        };
        if let Some(place) = self.unread.iter().position(|(unread, _)| unread == id) {
            // The journal has appends in the order in which they were published.
            self.unread.drain(..=place);
            self.unread_limit = UNREAD_FIRST;
            self.is_untaken = false;
        } else if self.pending.done(id) {
            self.again_at = None;
            self.backoff = first_pause();
            self.is_untaken = false;
        }
    }

    /// Another consumer reads the journal, and may read back what was confirmed before.
    pub(super) fn reader_resumed(&mut self) {
        let now = Instant::now();
        self.unread.iter_mut().for_each(|(_, since)| *since = now);
        self.unread_limit = (self.unread_limit * 2).clamp(UNREAD_FIRST, UNREAD_MAX);
    }

    /// How long a confirmed append has not been read back, if that is too long.
    pub(super) fn unread_for(&self, now: Instant) -> Option<Duration> {
        let (_, since) = self.unread.front()?;
        Some(now.saturating_duration_since(*since)).filter(|unread| *unread >= self.unread_limit)
    }

    /// When to act even if nothing happens.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let unread = self.unread.front().map(|(_, since)| *since + self.unread_limit);
        let again = self.again_at.filter(|_| !self.pending.is_empty());
        unread.into_iter().chain(again).min()
    }

    /// Whether the journal has all decisions.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    pub(super) fn is_open(&self) -> bool {
        self.lane.is_open()
    }

    /// Waits until the broker has answered all publishes.
    pub(super) async fn finish(&mut self) {
        self.lane.finish().await;
    }
}

fn first_pause() -> Backoff {
    Backoff::new(PAUSE_FIRST, PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::Pending;
    use crate::protocol::{
        ids::{RequestHash, TransactionId, TransactionKey, WorkerId},
        message::{Decision, Outcome},
        time::Time,
    };

    fn pending() -> Pending {
        Pending { link: "a".to_owned(), last_number: 0, decisions: Vec::new(), append: None }
    }

    fn decision(id: &str) -> Decision {
        Decision {
            key: TransactionKey {
                id: TransactionId::parse(id).unwrap(),
                requested_at: Time::EPOCH,
            },
            request_hash: RequestHash([0; 16]),
            outcome: Outcome::Aborted,
            branches: Vec::new(),
            reason: None,
            decided_at: Time::EPOCH,
            worker: WorkerId::parse("w1").unwrap(),
        }
    }

    #[test]
    fn decisions_that_come_during_an_append_go_into_the_next_one() {
        let mut pending = pending();
        assert_eq!(pending.next(), None);
        pending.decisions.push(decision("t1"));
        let first = pending.next().unwrap().id.clone();
        pending.decisions.extend([decision("t2"), decision("t3")]);
        assert_eq!(pending.next(), None);
        assert!(pending.done(&first) && !pending.done(&first));
        let second = pending.next().unwrap().clone();
        assert_eq!(second.len, 2);
        assert!(second.id != first && pending.done(&second.id) && pending.is_empty());
    }

    /// The decisions were gathered again, with newer ones, under a new id: if the broker took longer than
    /// the limit each time, the append was never done, and grew.
    #[test]
    fn an_unconfirmed_append_is_published_again_unchanged_and_its_first_copy_counts() {
        let mut pending = pending();
        pending.decisions.push(decision("t1"));
        let first = pending.next().unwrap().clone();
        pending.decisions.push(decision("t2"));
        assert_eq!(pending.not_taken(&first.id), Some(1));
        assert_eq!(pending.next(), Some(&first));
        assert!(pending.done(&first.id), "the first copy is read back");
        assert_eq!(pending.not_taken(&first.id), None, "the second one doesn't matter any more");
        assert_eq!(pending.next().unwrap().len, 1);
    }
}
