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
use lapin::types::AMQPValue;
use tokio::time::{Sleep, sleep};

use crate::{
    error::Chain,
    transport::amqp::{
        bounded::{AskError, STREAM_MAX},
        consumer::{Closed, Inbox},
        error::is_not_found,
        publisher::{LaneLost, Published, Publisher},
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

/// The stream of packs over one link: this worker's packs go out, and all come in.
pub(super) trait PackStream: Send + 'static {
    /// What became of the pack that was written.
    fn poll_written(&mut self, cx: &mut Context<'_>) -> Poll<Result<Published, LaneLost>>;

    /// The next message.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Result<Pack, NoPack>, Closed>>;

    /// Whether a pack is on its way.
    fn is_writing(&self) -> bool;

    fn write(&mut self, body: Vec<u8>);

    /// Acknowledges what was read.
    fn flush(&mut self);

    /// Gives it up, without waiting for that.
    fn close(self);
}

/// The stream at the broker.
pub(super) struct BrokerPacks {
    stream: PackedJournal,
    lane: Publisher<()>,
    inbox: Inbox,
}

impl BrokerPacks {
    /// Reads on from the last pack.
    async fn open(stream: PackedJournal) -> Result<Self, AskError> {
        let lane = Publisher::open(&stream.publishing, "packs of the journal").await?;
        // Nobody waits for it.
        let inbox = stream.open(AMQPValue::LongString("last".into()), PREFETCH, STREAM_MAX);
        let inbox = inbox.await?;
        Ok(Self { stream, lane, inbox })
    }
}

impl PackStream for BrokerPacks {
    fn poll_written(&mut self, cx: &mut Context<'_>) -> Poll<Result<Published, LaneLost>> {
        self.lane.poll_next(cx).map_ok(|((), published)| published)
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Result<Pack, NoPack>, Closed>> {
        let Poll::Ready(delivery) = self.inbox.poll_next(cx) else { return Poll::Pending };
        Poll::Ready(delivery.map(|delivery| {
            self.inbox.ack(delivery.delivery_tag);
            Pack::read(&delivery, self.stream.user())
        }))
    }

    fn is_writing(&self) -> bool {
        self.lane.outstanding() > 0
    }

    fn write(&mut self, body: Vec<u8>) {
        self.lane.publish(self.stream.message(body), ());
    }

    fn flush(&mut self) {
        self.inbox.flush();
    }

    fn close(self) {
        tokio::spawn(self.inbox.close());
    }
}

/// Writes packs over one link, and follows those of all.
pub(super) struct Packer<S = BrokerPacks> {
    /// Opens the stream; none, if packs can't be told from those of others.
    open: Option<Open<S>>,
    state: PackerState<S>,
}

type Open<S> = Box<dyn Fn() -> Opening<S> + Send + Sync>;

type Opening<S> = BoxFuture<'static, Result<S, AskError>>;

enum PackerState<S> {
    Opening(Opening<S>),
    Open(Box<Opened<S>>),
    /// Something went wrong.
    Resting(Pin<Box<Sleep>>),
}

struct Opened<S> {
    stream: S,
    /// Until when the last pack of others may come; none: it is known how far they have come.
    last_until: Option<Pin<Box<Sleep>>>,
    /// How many packs were confirmed since one was read.
    unseen: u32,
}

impl<S: PackStream> Opened<S> {
    fn new(stream: S) -> Self {
        Self { stream, last_until: Some(Box::pin(sleep(LAST_WITHIN))), unseen: 0 }
    }

    /// Ready with what was read, or that it is of no use any more.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<PackEvent>> {
        while let Poll::Ready(answered) = self.stream.poll_written(cx) {
            match answered {
                Ok(Published::Confirmed) if self.unseen < UNSEEN_MAX => self.unseen += 1,
                Ok(Published::Confirmed) => {
                    tracing::debug!("packs are confirmed and don't come back");
                    return Poll::Ready(None);
                }
                Ok(fate) => {
                    tracing::debug!(?fate, "a pack of the journal was not taken");
                    return Poll::Ready(None);
                }
                Err(lost) => {
                    tracing::debug!(error = %Chain(&lost), "no packs can be written");
                    return Poll::Ready(None);
                }
            }
        }
        while let Poll::Ready(message) = self.stream.poll_read(cx) {
            match message {
                Ok(Ok(pack)) => {
                    (self.last_until, self.unseen) = (None, 0);
                    return Poll::Ready(Some(PackEvent::Packed(pack)));
                }
                Ok(Err(NoPack::Marker | NoPack::Foreign)) => {}
                Ok(Err(NoPack::Unreadable(reason))) => {
                    tracing::debug!(%reason, "what is no pack is skipped");
                }
                Err(closed) => {
                    tracing::debug!(error = %Chain(&closed), "packs are not followed any more");
                    return Poll::Ready(None);
                }
            }
        }
        if self.last_until.as_mut().is_some_and(|until| until.as_mut().poll(cx).is_ready()) {
            self.last_until = None;
            return Poll::Ready(Some(PackEvent::NoneYet));
        }
        Poll::Pending
    }

    /// Writes a pack if one is due, and none is on its way.
    fn flush(&mut self, unpacked: &mut Unpacked) {
        self.stream.flush();
        if self.stream.is_writing() || self.last_until.is_some() {
            return;
        }
        if let Some(body) = unpacked.pack() {
            self.stream.write(body);
        }
    }
}

impl Packer {
    /// `stream`: none, if packs can't be told from those of others.
    pub(super) fn new(stream: Option<PackedJournal>) -> Self {
        Self::of(stream.map(|stream| -> Open<BrokerPacks> {
            Box::new(move || BrokerPacks::open(stream.clone()).boxed())
        }))
    }
}

impl<S: PackStream> Packer<S> {
    fn of(open: Option<Open<S>>) -> Self {
        Self { open, state: PackerState::Resting(Box::pin(sleep(Duration::ZERO))) }
    }

    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<PackEvent> {
        let Some(open) = &self.open else { return Poll::Pending };
        loop {
            match &mut self.state {
                PackerState::Resting(until) => {
                    if until.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                    self.state = PackerState::Opening(open());
                }
                PackerState::Opening(opening) => {
                    let Poll::Ready(opened) = opening.poll_unpin(cx) else { return Poll::Pending };
                    match opened {
                        Ok(stream) => self.state = PackerState::Open(Box::new(Opened::new(stream))),
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
                    let Poll::Ready(event) = opened.poll_next(cx) else { return Poll::Pending };
                    if let Some(event) = event {
                        return Poll::Ready(event);
                    }
                    if let PackerState::Open(opened) = std::mem::replace(&mut self.state, resting())
                    {
                        opened.stream.close();
                    }
                }
            }
        }
    }

    /// Writes a pack if one is due, and none is on its way.
    pub(super) fn flush(&mut self, unpacked: &mut Unpacked) {
        if let PackerState::Open(opened) = &mut self.state {
            opened.flush(unpacked);
        }
    }
}

fn resting<S>() -> PackerState<S> {
    PackerState::Resting(Box::pin(sleep(REST)))
}
