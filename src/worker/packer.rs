//! Writing packs of what was read of the journal; and following the packs of others, so that not every
//! worker writes each.
//!
//! A worker whose next pack is full waits for a random number of further messages before it writes it,
//! and drops what another has packed meanwhile. What is packed twice does no harm: see
//! [`packs`](crate::worker::packs).
//!
//! No pack is needed. What goes wrong with one ends it, or the worker's packing for a while, and nothing
//! else.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use lapin::types::{AMQPValue, ShortString};
use tokio::time::{Sleep, sleep};

use crate::{
    error::ErrorChain,
    transport::amqp::{
        bounded::{AskError, STREAM_MAX},
        consumer::QueueConsumer,
        error::is_not_found,
        names::Names,
        publisher::{PublishOutcome, Publisher},
    },
    unique,
    wire::message::{BODY_MAX, Items, PackedMessage},
    worker::{
        journal::Record,
        packs::{MESSAGES_MAX, NoPack, Pack, PackedJournal, digest_of},
    },
};

/// What is larger is not packed: it is not slow to read.
const COPIED_MAX: usize = 8 * 1024;

/// A pack of fewer messages is not worth its bytes.
const MESSAGES_MIN: usize = 256;

/// What a message counts at least, so that a full pack has a full pack's weight.
const WEIGHT_MIN: usize = BODY_MAX / MESSAGES_MAX;

/// How long the last pack may take to come, before this worker writes one.
const LAST_WITHIN: Duration = Duration::from_millis(500);

/// How long nothing is packed when something went wrong.
const REST: Duration = Duration::from_secs(60);

/// How many packs are on their way to those who follow them.
const PREFETCH: u16 = 4;

/// How many packs may be confirmed of which none is read back.
const UNSEEN_MAX: u32 = 4;

/// What was read of the journal and is not packed, as far as is known: two packs of it at most.
#[derive(Debug)]
pub(super) struct Unpacked {
    /// Consecutive. The first one is the last of the pack before, if it was there to be seen.
    messages: VecDeque<PackedMessage>,
    weight: usize,
    /// With which weight the next pack is written.
    due: usize,
    /// The last message of the pack that was read last: its offset and digest.
    packed: Option<(u64, u64)>,
    /// That there is no stream of packs was said.
    has_told: bool,
}

impl Default for Unpacked {
    fn default() -> Self {
        Self {
            messages: VecDeque::new(),
            weight: 0,
            due: next_due(),
            packed: None,
            has_told: false,
        }
    }
}

/// From one full pack up to one and a half.
fn next_due() -> usize {
    BODY_MAX + (unique::number() % (BODY_MAX as u64 / 2)) as usize
}

fn weight(copied: &PackedMessage) -> usize {
    (copied.body.len() + 64).max(WEIGHT_MIN)
}

fn copy_of(record: &Record) -> Option<PackedMessage> {
    let body = record.body.as_ref().filter(|body| body.len() <= COPIED_MAX)?;
    let copied = PackedMessage {
        offset: record.offset,
        message_id: record.message_id.as_ref().map(|id| id.as_str().into()),
        tried: record.tried.as_ref().map(|it| (it.key.clone(), it.begins)),
        body: Arc::clone(body),
    };
    copied.is_encodable().then_some(copied)
}

impl Unpacked {
    /// The journal is read anew, from wherever.
    pub(super) fn begin_anew(&mut self) {
        *self = Self { has_told: self.has_told, ..Self::default() };
    }

    /// A message of the journal was read.
    pub(super) fn read(&mut self, record: &Record) {
        let copied = copy_of(record);
        let follows = self.messages.back().is_none_or(|last| last.offset + 1 == record.offset);
        if !follows || copied.is_none() {
            self.forget(self.messages.len());
        }
        let Some(copied) = copied else { return };
        self.weight += weight(&copied);
        self.messages.push_back(copied);
        while self.weight > 2 * BODY_MAX {
            self.forget(1);
        }
    }

    /// Forgets the first ones.
    fn forget(&mut self, count: usize) {
        for copied in self.messages.drain(..count.min(self.messages.len())) {
            self.weight = self.weight.saturating_sub(weight(&copied));
        }
    }

    /// A pack was read.
    fn packed(&mut self, pack: &Pack) {
        self.packed = pack.last();
    }

    /// Forgets what is in the pack that was read last, if that is of this journal.
    fn forget_packed(&mut self) {
        let Some((offset, digest)) = self.packed else { return };
        let Some(first) = self.messages.front() else { return };
        let place = offset.checked_sub(first.offset).and_then(|it| usize::try_from(it).ok());
        match place.map(|place| (place, self.messages.get(place))) {
            // It is yet to be read.
            Some((_, None)) => return,
            Some((place, Some(same))) if digest_of(same) == digest => self.forget(place),
            Some((_, Some(_))) | None => {}
        }
        self.packed = None;
    }

    /// The body of a pack that is due.
    fn pack(&mut self) -> Option<Vec<u8>> {
        self.forget_packed();
        if self.weight < self.due {
            return None;
        }
        self.due = next_due();
        let mut items = Items::new();
        let first_ones = self.messages.iter().take(MESSAGES_MAX);
        let count = first_ones.take_while(|copied| items.push(*copied).is_ok()).count();
        // The next one begins with its last message.
        self.forget(count.saturating_sub(1).max(1));
        (count >= MESSAGES_MIN).then(|| items.into_body())
    }

    pub(super) fn heard(&mut self, heard: &PackEvent, names: &Names) {
        match heard {
            PackEvent::Packed(pack) => self.packed(pack),
            PackEvent::Missing if !std::mem::replace(&mut self.has_told, true) => tracing::info!(
                "there is no queue `{}`, by which workers start sooner: run `dtc topology apply`",
                names.packed_journal()
            ),
            PackEvent::NoneYet | PackEvent::Missing => {}
        }
    }
}

/// Something of the stream of packs.
#[derive(Debug)]
pub(super) enum PackEvent {
    Packed(Pack),
    /// No pack of others has come for a moment: this worker may write one.
    NoneYet,
    /// It is not there.
    Missing,
}

/// What packs over one link.
pub(super) struct Packer {
    stream: Option<PackedJournal>,
    state: PackerState,
}

enum PackerState {
    Opening(BoxFuture<'static, Result<OpenPacker, AskError>>),
    Open(Box<OpenPacker>),
    /// Something went wrong.
    Resting(Pin<Box<Sleep>>),
}

struct OpenPacker {
    lane: Publisher<()>,
    inbox: QueueConsumer,
    /// Until when the last pack of others may come; none: it is known how far they have come.
    last_until: Option<Pin<Box<Sleep>>>,
    /// How many packs were confirmed since one was read.
    unseen: u32,
}

impl OpenPacker {
    async fn of(stream: PackedJournal) -> Result<Self, AskError> {
        let lane = Publisher::open(&stream.publishing, "packs of the journal").await?;
        // Nobody waits for it.
        let inbox = stream.open(AMQPValue::LongString("last".into()), PREFETCH, STREAM_MAX);
        let inbox = inbox.await?;
        Ok(Self { lane, inbox, last_until: Some(Box::pin(sleep(LAST_WITHIN))), unseen: 0 })
    }

    /// Ready with what was read, or that it is of no use any more.
    fn poll_next(&mut self, cx: &mut Context<'_>, user: &ShortString) -> Poll<Option<PackEvent>> {
        while let Poll::Ready(answered) = self.lane.poll_next(cx) {
            match answered {
                Ok(((), PublishOutcome::Confirmed)) if self.unseen < UNSEEN_MAX => self.unseen += 1,
                Ok(((), PublishOutcome::Confirmed)) => {
                    tracing::debug!("packs are confirmed and don't come back");
                    return Poll::Ready(None);
                }
                Ok(((), fate)) => {
                    tracing::debug!(?fate, "a pack of the journal was not taken");
                    return Poll::Ready(None);
                }
                Err(lost) => {
                    tracing::debug!(error = %ErrorChain(&lost), "no packs can be written");
                    return Poll::Ready(None);
                }
            }
        }
        while let Poll::Ready(delivery) = self.inbox.poll_next(cx) {
            let delivery = match delivery {
                Ok(delivery) => delivery,
                Err(closed) => {
                    tracing::debug!(error = %ErrorChain(&closed), "packs are not followed any more");
                    return Poll::Ready(None);
                }
            };
            self.inbox.ack(delivery.delivery_tag);
            match Pack::read(&delivery, user) {
                Ok(pack) => {
                    (self.last_until, self.unseen) = (None, 0);
                    return Poll::Ready(Some(PackEvent::Packed(pack)));
                }
                Err(NoPack::Marker | NoPack::Foreign) => {}
                Err(NoPack::Unreadable(reason)) => {
                    tracing::debug!(%reason, "what is no pack is skipped");
                }
            }
        }
        if self.last_until.as_mut().is_some_and(|until| until.as_mut().poll(cx).is_ready()) {
            self.last_until = None;
            return Poll::Ready(Some(PackEvent::NoneYet));
        }
        Poll::Pending
    }
}

impl Packer {
    /// `stream`: none, if packs can't be told from those of others.
    pub(super) fn new(stream: Option<PackedJournal>) -> Self {
        Self { stream, state: PackerState::Resting(Box::pin(sleep(Duration::ZERO))) }
    }

    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<PackEvent> {
        let Some(stream) = &self.stream else { return Poll::Pending };
        loop {
            match &mut self.state {
                PackerState::Resting(until) => {
                    if until.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                    self.state = PackerState::Opening(OpenPacker::of(stream.clone()).boxed());
                }
                PackerState::Opening(opening) => {
                    let Poll::Ready(opened) = opening.poll_unpin(cx) else { return Poll::Pending };
                    match opened {
                        Ok(opened) => self.state = PackerState::Open(Box::new(opened)),
                        Err(error) => {
                            self.state = resting();
                            tracing::debug!(error = %ErrorChain(&error), "nothing is packed for now");
                            if error.broker().is_some_and(is_not_found) {
                                return Poll::Ready(PackEvent::Missing);
                            }
                        }
                    }
                }
                PackerState::Open(opened) => {
                    let Poll::Ready(event) = opened.poll_next(cx, stream.user()) else {
                        return Poll::Pending;
                    };
                    if let Some(event) = event {
                        return Poll::Ready(event);
                    }
                    if let PackerState::Open(opened) = std::mem::replace(&mut self.state, resting())
                    {
                        tokio::spawn(opened.inbox.close());
                    }
                }
            }
        }
    }

    /// Writes a pack if one is due, and none is on its way.
    pub(super) fn flush(&mut self, unpacked: &mut Unpacked) {
        let (Some(stream), PackerState::Open(opened)) = (&self.stream, &mut self.state) else {
            return;
        };
        opened.inbox.flush();
        if opened.lane.outstanding() > 0 || opened.last_until.is_some() {
            return;
        }
        if let Some(body) = unpacked.pack() {
            opened.lane.publish(stream.message(body), ());
        }
    }
}

fn resting() -> PackerState {
    PackerState::Resting(Box::pin(sleep(REST)))
}

#[cfg(test)]
mod tests {
    use super::{BODY_MAX, COPIED_MAX, MESSAGES_MAX, Unpacked, next_due};
    use crate::{
        protocol::{
            ids::{TransactionId, TransactionKey},
            time::Time,
        },
        wire::message::{PackedMessage, decode},
        worker::{journal::Record, packs::Pack},
    };

    fn message(offset: u64, len: usize) -> PackedMessage {
        let message_id = Some(format!("a-{offset}").into());
        PackedMessage { offset, message_id, tried: None, body: "x".repeat(len).into() }
    }

    fn reads(unpacked: &mut Unpacked, offsets: std::ops::Range<u64>, len: usize) {
        offsets.for_each(|offset| unpacked.read(&Record::copied(message(offset, len))));
    }

    fn packs(unpacked: &mut Unpacked) -> Option<Pack> {
        let body = unpacked.pack()?;
        assert!(body.len() <= BODY_MAX);
        let messages = decode::<PackedMessage>(&body).unwrap().into_iter().map(Result::unwrap);
        Some(Pack::of(messages.collect()).unwrap())
    }

    fn of(offsets: std::ops::Range<u64>) -> Pack {
        Pack::of(offsets.map(|offset| message(offset, 100)).collect()).unwrap()
    }

    /// An offset at which a pack is due for certain.
    const DUE: u64 = MESSAGES_MAX as u64 * 3 / 2;

    #[test]
    fn a_pack_begins_with_what_the_one_before_it_ends_with() {
        let mut unpacked = Unpacked::default();
        reads(&mut unpacked, 7..1000, 100);
        assert_eq!(packs(&mut unpacked), None);
        reads(&mut unpacked, 1000..DUE + 7, 100);
        let first = packs(&mut unpacked).unwrap();
        assert_eq!(first, of(7..7 + MESSAGES_MAX as u64));
        assert_eq!(packs(&mut unpacked), None);
        let (last, _) = first.last().unwrap();
        reads(&mut unpacked, DUE + 7..last + DUE, 100);
        assert_eq!(packs(&mut unpacked), Some(of(last..last + MESSAGES_MAX as u64)));
    }

    #[test]
    fn who_is_due_when_is_a_matter_of_chance() {
        let dues: Vec<_> = (0..100).map(|_| next_due()).collect();
        assert!(dues.iter().all(|due| (BODY_MAX..BODY_MAX * 3 / 2).contains(due)));
        let first = dues[0];
        assert!(dues.iter().any(|due| *due != first));
    }

    #[test]
    fn what_another_has_packed_is_not_packed_again_also_if_it_is_yet_to_be_read() {
        let mut unpacked = Unpacked::default();
        reads(&mut unpacked, 0..DUE, 100);
        unpacked.packed(&of(0..1024));
        assert_eq!(packs(&mut unpacked), None);
        assert_eq!(unpacked.messages.front().unwrap().offset, 1023);
        unpacked.packed(&of(1023..2047));
        reads(&mut unpacked, DUE..2000, 100);
        assert_eq!(packs(&mut unpacked), None);
        assert_eq!(unpacked.messages.len(), 977);
        reads(&mut unpacked, 2000..2047 + DUE, 100);
        assert_eq!(packs(&mut unpacked), Some(of(2046..2046 + 1024)));
        // One of long ago, and one of another journal.
        unpacked.packed(&of(0..1024));
        reads(&mut unpacked, 2047 + DUE..4000, 100);
        let other = message(4000, 7);
        unpacked.packed(&Pack::of(vec![PackedMessage { offset: 3999, ..other }]).unwrap());
        reads(&mut unpacked, 4000..3069 + DUE, 100);
        assert_eq!(packs(&mut unpacked), Some(of(3069..3069 + 1024)));
    }

    #[test]
    fn what_is_too_large_or_does_not_follow_or_is_not_of_a_worker_begins_anew() {
        let other = |copied| {
            let mut unpacked = Unpacked::default();
            reads(&mut unpacked, 0..10, 100);
            unpacked.read(&Record::copied(copied));
            unpacked.messages.len()
        };
        assert_eq!(other(message(10, COPIED_MAX)), 11);
        assert_eq!(other(message(10, COPIED_MAX + 1)), 0);
        assert_eq!(other(message(11, 100)), 1);
        assert_eq!(other(PackedMessage { message_id: Some("ü".into()), ..message(10, 100) }), 0);
        let key = |millis| TransactionKey {
            id: TransactionId::parse("t1").unwrap(),
            requested_at: Time::from_millis(millis),
        };
        let tried = |millis| PackedMessage { tried: Some((key(millis), true)), ..message(10, 2) };
        assert_eq!((other(tried(7000)), other(tried(7001))), (11, 0));
        let mut unpacked = Unpacked::default();
        reads(&mut unpacked, 0..10, 100);
        unpacked.read(&Record { body: None, ..Record::copied(message(10, 100)) });
        assert_eq!((unpacked.messages.len(), unpacked.weight), (0, 0));
    }

    #[test]
    fn what_nobody_packs_is_forgotten() {
        let mut unpacked = Unpacked::default();
        reads(&mut unpacked, 0..10_000, 100);
        assert_eq!(unpacked.messages.len(), 2 * MESSAGES_MAX);
        reads(&mut unpacked, 10_000..11_000, COPIED_MAX);
        assert!(unpacked.weight <= 2 * BODY_MAX);
    }

    #[test]
    fn few_large_messages_are_not_worth_a_pack() {
        let mut unpacked = Unpacked::default();
        reads(&mut unpacked, 0..60, COPIED_MAX);
        assert_eq!(packs(&mut unpacked), None);
        let left = unpacked.messages.front().unwrap().offset;
        assert!((20..40).contains(&left), "{left}");
    }
}
