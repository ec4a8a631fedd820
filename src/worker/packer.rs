//! Writing packs of what was read of the journal; and following the packs of others, so that not every
//! worker writes each.
//!
//! No pack is needed. What goes wrong with one ends it, or the worker's packing for a while, and nothing
//! else.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use lapin::types::{AMQPValue, ShortString};
use tokio::time::{Sleep, sleep};

use crate::{
    error::Chain,
    transport::amqp::{
        bounded::{AskError, STREAM_MAX},
        consumer::Inbox,
        error::is_not_found,
        publisher::{Published, Publisher},
    },
    worker::{
        pack_buffer::Unpacked,
        packs::{NoPack, Pack, PackEvent, PackedJournal},
    },
};

/// How long the last pack may take to come, before this worker writes one.
const LAST_WITHIN: Duration = Duration::from_millis(500);

/// How long nothing is packed when something went wrong.
const REST: Duration = Duration::from_secs(60);

/// How many packs are on their way to those who follow them.
const PREFETCH: u16 = 4;

/// How many packs may be confirmed of which none is read back.
const UNSEEN_MAX: u32 = 4;

/// What packs over one link.
pub(super) struct Packer {
    stream: Option<PackedJournal>,
    state: PackerState,
}

enum PackerState {
    Opening(BoxFuture<'static, Result<Opened, AskError>>),
    Open(Box<Opened>),
    /// Something went wrong.
    Resting(Pin<Box<Sleep>>),
}

struct Opened {
    lane: Publisher<()>,
    inbox: Inbox,
    /// Until when the last pack of others may come; none: it is known how far they have come.
    last_until: Option<Pin<Box<Sleep>>>,
    /// How many packs were confirmed since one was read.
    unseen: u32,
}

impl Opened {
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
                Ok(((), Published::Confirmed)) if self.unseen < UNSEEN_MAX => self.unseen += 1,
                Ok(((), Published::Confirmed)) => {
                    tracing::debug!("packs are confirmed and don't come back");
                    return Poll::Ready(None);
                }
                Ok(((), fate)) => {
                    tracing::debug!(?fate, "a pack of the journal was not taken");
                    return Poll::Ready(None);
                }
                Err(lost) => {
                    tracing::debug!(error = %Chain(&lost), "no packs can be written");
                    return Poll::Ready(None);
                }
            }
        }
        while let Poll::Ready(delivery) = self.inbox.poll_next(cx) {
            let delivery = match delivery {
                Ok(delivery) => delivery,
                Err(closed) => {
                    tracing::debug!(error = %Chain(&closed), "packs are not followed any more");
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
                    self.state = PackerState::Opening(Opened::of(stream.clone()).boxed());
                }
                PackerState::Opening(opening) => {
                    let Poll::Ready(opened) = opening.poll_unpin(cx) else { return Poll::Pending };
                    match opened {
                        Ok(opened) => self.state = PackerState::Open(Box::new(opened)),
                        Err(error) => {
                            self.state = resting();
                            tracing::debug!(error = %Chain(&error), "nothing is packed for now");
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
