//! Writing decisions to the journal: one append at a time, and all that is ready by its end in the
//! next.
//!
//! An append is done when it is confirmed *or* read back: a broker that has elected a leader may lose
//! the confirm of what is in the stream. One that is neither is published again by the lane's own
//! bound, as the same append: when the first of its copies is read back it is done, so a broker that is
//! slower than the bound still gets on. What is confirmed and is not read back shows that the journal is
//! not read any more.
//!
//! Nothing is decided meanwhile, so these waits are short. When a stream's writer moves to another node,
//! what is on its way in these milliseconds is lost without a word, and so are the journal's consumers.

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
    /// Each publish has the id of its append.
    lane: Publisher<ShortString>,
    pending: Pending,
    again_at: Option<Instant>,
    backoff: Backoff,
    /// Appends that are confirmed and not read back, and since when.
    unread: VecDeque<(ShortString, Instant)>,
    /// How long they may be that.
    unread_limit: Duration,
    /// The journal did not take the last append, and nothing was read back since.
    is_untaken: bool,
}

/// What the journal doesn't have yet, as far as is known.
#[derive(Debug)]
struct Pending {
    /// What the ids of this link's appends begin with.
    link: String,
    last_number: u64,
    /// Those that wait for the append before them.
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
    /// The append that is to be published now, if none is on its way.
    fn next(&mut self) -> Option<&Append> {
        if self.append.is_none() {
            self.append = self.gathered();
        }
        let append = self.append.as_mut().filter(|append| !append.is_on_its_way)?;
        append.is_on_its_way = true;
        Some(append)
    }

    /// As many of those that wait as a message has room for.
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

    /// The journal has append `id`: whether that was not known.
    fn done(&mut self, id: &ShortString) -> bool {
        self.append.take_if(|append| append.id == *id).is_some()
    }

    /// Append `id` was not taken, and is the next one again; how many decisions it has. `None`: the
    /// journal has it after all.
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

    /// What the ids of its appends begin with.
    pub(super) fn link(&self) -> &str {
        &self.pending.link
    }

    pub(super) fn append(&mut self, decision: Decision) {
        self.pending.decisions.push(decision);
    }

    /// Publishes what waits, if no append is on its way.
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

    /// Ready when an append is answered; more can be flushed then.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), PublisherError>> {
        let Poll::Ready(answered) = self.lane.poll_next(cx) else { return Poll::Pending };
        let (id, published) = answered?;
        self.answered(id, &published);
        Poll::Ready(Ok(()))
    }

    fn answered(&mut self, id: ShortString, published: &PublishOutcome) {
        if matches!(published, PublishOutcome::Confirmed) {
            // Read back before: then its confirm says nothing new.
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
            tracing::debug!(fate = ?published, "the journal did not take an append again");
        } else {
            tracing::warn!(
                journal = %self.journal, fate = ?published, decisions,
                "the journal did not take an append; it is published again until it does"
            );
        }
        if matches!(published, PublishOutcome::Unconfirmed(_)) {
            // It has been waited for; and what is lost with the writer are its readers, too.
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
            // Appends are in the journal in the order in which they were published.
            self.unread.drain(..=place);
            self.unread_limit = UNREAD_FIRST;
            self.is_untaken = false;
        } else if self.pending.done(id) {
            self.again_at = None;
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
        let again = self.again_at.filter(|_| !self.pending.is_empty());
        unread.into_iter().chain(again).min()
    }

    /// Whether nothing is on its way.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.is_empty()
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
    fn one_append_is_on_its_way_and_what_comes_meanwhile_is_the_next() {
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

    /// It was gathered anew, with what had come meanwhile, under a new id: a broker that took longer than
    /// the bound each time was never done, and the message grew.
    #[test]
    fn an_append_that_is_given_up_is_published_as_it_was_and_done_by_its_first_copy() {
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
