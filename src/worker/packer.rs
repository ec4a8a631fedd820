//! Writes packs of what was read of the journal; and follows the packs of all workers, so that not every
//! worker writes each of them.
//!
//! Nothing depends on a pack. If one can't be written, or packs can't be read, the worker stops packing
//! for a while, and nothing else stops.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use lapin::types::AMQPValue;
use tokio::time::{Sleep, sleep};

use crate::{
    error::ErrorChain,
    transport::amqp::{
        bounded::{AskError, STREAM_MAX},
        consumer::{ConsumerError, QueueConsumer},
        publisher::{PublishOutcome, Publisher, PublisherError},
    },
    worker::{
        pack_buffer::PackBuffer,
        packs::{NoPack, Pack, PackEvent, PackedJournal, PacksUnusable},
    },
};

/// How long to wait for the last pack before this worker writes one.
const LAST_WITHIN: Duration = Duration::from_millis(500);

/// How long to write no packs after a failure.
const REST: Duration = Duration::from_secs(60);

/// How many unacknowledged packs the broker delivers.
const PREFETCH: u16 = 4;

/// How many packs in a row may be confirmed and not read back.
const UNSEEN_MAX: u32 = 4;

/// The stream of packs over one link: takes this worker's packs, and delivers those of all workers.
pub(super) trait PackStream: Send + 'static {
    /// Ready with the broker's answer to the pack that was written.
    fn poll_written(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<PublishOutcome, PublisherError>>;

    /// The next message.
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Result<Pack, NoPack>, ConsumerError>>;

    /// Whether a pack is written and not answered.
    fn is_writing(&self) -> bool;

    fn write(&mut self, body: Vec<u8>);

    /// Acknowledges the messages that were read.
    fn flush(&mut self);

    /// Closes it, without waiting.
    fn close(self);
}

/// The stream at the broker.
pub(super) struct BrokerPacks {
    stream: PackedJournal,
    lane: Publisher<()>,
    inbox: QueueConsumer,
}

impl BrokerPacks {
    /// Reads the last pack, and then follows.
    async fn open(stream: PackedJournal) -> Result<Self, AskError> {
        let lane = Publisher::open(&stream.publishing, "packs of the journal").await?;
        // The long limit harms nothing: the worker serves meanwhile.
        let inbox = stream.open(AMQPValue::LongString("last".into()), PREFETCH, STREAM_MAX);
        let inbox = inbox.await?;
        Ok(Self { stream, lane, inbox })
    }
}

impl PackStream for BrokerPacks {
    fn poll_written(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<PublishOutcome, PublisherError>> {
        self.lane.poll_next(cx).map_ok(|((), published)| published)
    }

    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Result<Pack, NoPack>, ConsumerError>> {
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

/// Writes packs over one link, and follows those of all workers.
pub(super) struct Packer<S = BrokerPacks> {
    /// Opens the stream. `None`: this worker can't distinguish its own user's packs from others.
    open: Option<PackOpener<S>>,
    state: PackerState<S>,
}

type PackOpener<S> = Box<dyn Fn() -> Opening<S> + Send + Sync>;

type Opening<S> = BoxFuture<'static, Result<S, AskError>>;

enum PackerState<S> {
    Opening(Opening<S>),
    Open(Box<Opened<S>>),
    /// After a failure.
    Resting(Pin<Box<Sleep>>),
}

struct Opened<S> {
    stream: S,
    /// Until when to wait for the last pack. `None`: it is known how far others have packed.
    last_until: Option<Pin<Box<Sleep>>>,
    /// How many packs were confirmed since one was read.
    unseen: u32,
}

/// The stream can't be used any more; and why, if an operator must change something.
struct Ended(Option<PacksUnusable>);

impl Ended {
    fn by(error: Option<&lapin::Error>) -> Self {
        Self(error.and_then(PacksUnusable::of))
    }
}

impl<S: PackStream> Opened<S> {
    fn new(stream: S) -> Self {
        Self { stream, last_until: Some(Box::pin(sleep(LAST_WITHIN))), unseen: 0 }
    }

    /// Ready with the next event; after an error the stream can't be used any more.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<PackEvent, Ended>> {
        while let Poll::Ready(answered) = self.stream.poll_written(cx) {
            match answered {
                Ok(PublishOutcome::Confirmed) if self.unseen < UNSEEN_MAX => self.unseen += 1,
                Ok(PublishOutcome::Confirmed) => {
                    tracing::debug!("the broker confirms packs and doesn't deliver them");
                    return Poll::Ready(Err(Ended(None)));
                }
                Ok(outcome) => {
                    tracing::debug!(?outcome, "the broker did not take a pack");
                    return Poll::Ready(Err(Ended(None)));
                }
                Err(lost) => {
                    tracing::debug!(error = %ErrorChain(&lost), "lost the channel for packs");
                    return Poll::Ready(Err(Ended::by(lost.broker())));
                }
            }
        }
        while let Poll::Ready(message) = self.stream.poll_read(cx) {
            match message {
                Ok(Ok(pack)) => {
                    (self.last_until, self.unseen) = (None, 0);
                    return Poll::Ready(Ok(PackEvent::Written(pack)));
                }
                Ok(Err(NoPack::Marker | NoPack::Foreign)) => {}
                Ok(Err(NoPack::Unreadable(reason))) => {
                    tracing::debug!(%reason, "skipping a message that is no pack");
                }
                Err(closed) => {
                    tracing::debug!(error = %ErrorChain(&closed), "lost the consumer of packs");
                    return Poll::Ready(Err(Ended::by(closed.broker())));
                }
            }
        }
        if self.last_until.as_mut().is_some_and(|until| until.as_mut().poll(cx).is_ready()) {
            self.last_until = None;
            return Poll::Ready(Ok(PackEvent::NoneYet));
        }
        Poll::Pending
    }

    fn flush(&mut self, buffer: &mut PackBuffer) {
        self.stream.flush();
        if self.stream.is_writing() || self.last_until.is_some() {
            return;
        }
        if let Some(body) = buffer.pack() {
            self.stream.write(body);
        }
    }
}

impl Packer {
    pub(super) fn new(stream: Option<PackedJournal>) -> Self {
        Self::of(stream.map(|stream| -> PackOpener<BrokerPacks> {
            Box::new(move || BrokerPacks::open(stream.clone()).boxed())
        }))
    }
}

impl<S: PackStream> Packer<S> {
    fn of(open: Option<PackOpener<S>>) -> Self {
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
                            tracing::debug!(error = %ErrorChain(&error), "failed to open the stream of packs");
                            if let Some(why) = error.broker().and_then(PacksUnusable::of) {
                                return Poll::Ready(PackEvent::Unusable(why));
                            }
                        }
                    }
                }
                PackerState::Open(opened) => {
                    let Poll::Ready(event) = opened.poll_next(cx) else { return Poll::Pending };
                    let Ended(why) = match event {
                        Ok(event) => return Poll::Ready(event),
                        Err(ended) => ended,
                    };
                    if let PackerState::Open(opened) = std::mem::replace(&mut self.state, resting())
                    {
                        opened.stream.close();
                    }
                    if let Some(why) = why {
                        return Poll::Ready(PackEvent::Unusable(why));
                    }
                }
            }
        }
    }

    /// Writes a pack, if one is due and no other is on its way.
    pub(super) fn flush(&mut self, buffer: &mut PackBuffer) {
        if let PackerState::Open(opened) = &mut self.state {
            opened.flush(buffer);
        }
    }
}

fn resting<S>() -> PackerState<S> {
    PackerState::Resting(Box::pin(sleep(REST)))
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::{Arc, Mutex, MutexGuard, PoisonError},
        task::{Context, Poll, Waker},
        time::Duration,
    };

    use lapin::{
        ErrorKind,
        protocol::{AMQPError, AMQPErrorKind, AMQPHardError, AMQPSoftError},
    };
    use tokio::time::advance;

    use super::{
        AskError, ConsumerError, LAST_WITHIN, Pack, PackEvent, PackStream, Packer, PacksUnusable,
        PublishOutcome, PublisherError, REST, UNSEEN_MAX,
    };
    use crate::{
        transport::amqp::bounded::ANSWER_MAX,
        wire::message::{BODY_MAX, PackedMessage},
        worker::{
            journal::Record,
            pack_buffer::PackBuffer,
            packs::{MESSAGES_MAX, NoPack},
        },
    };

    /// A broker's part in what a packer does.
    #[derive(Clone, Default)]
    struct Broker(Arc<Mutex<BrokerState>>);

    #[derive(Default)]
    struct BrokerState {
        /// How often the stream was opened, and closed.
        opened: usize,
        closed: usize,
        /// Why it can't be opened.
        refuses: Option<AskError>,
        /// How many packs were written, and how many of them have an answer.
        written: usize,
        answered: usize,
        answers: VecDeque<Result<PublishOutcome, PublisherError>>,
        messages: VecDeque<Result<Result<Pack, NoPack>, ConsumerError>>,
    }

    impl Broker {
        fn state(&self) -> MutexGuard<'_, BrokerState> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        fn packer(&self) -> Packer<Self> {
            let broker = self.clone();
            Packer::of(Some(Box::new(move || {
                let broker = broker.clone();
                Box::pin(async move {
                    if let Some(error) = broker.state().refuses.clone() {
                        return Err(error);
                    }
                    broker.state().opened += 1;
                    Ok(broker)
                })
            })))
        }

        fn answers(&self, answer: Result<PublishOutcome, PublisherError>) {
            self.state().answers.push_back(answer);
        }

        fn delivers(&self, message: Result<Result<Pack, NoPack>, ConsumerError>) {
            self.state().messages.push_back(message);
        }

        /// How often it was opened and closed, and how many packs were written.
        fn seen(&self) -> (usize, usize, usize) {
            let state = self.state();
            (state.opened, state.closed, state.written)
        }
    }

    impl PackStream for Broker {
        fn poll_written(
            &mut self,
            _: &mut Context<'_>,
        ) -> Poll<Result<PublishOutcome, PublisherError>> {
            let mut state = self.state();
            let Some(answer) = state.answers.pop_front() else { return Poll::Pending };
            state.answered += 1;
            Poll::Ready(answer)
        }

        fn poll_read(
            &mut self,
            _: &mut Context<'_>,
        ) -> Poll<Result<Result<Pack, NoPack>, ConsumerError>> {
            self.state().messages.pop_front().map_or(Poll::Pending, Poll::Ready)
        }

        fn is_writing(&self) -> bool {
            let state = self.state();
            state.written > state.answered
        }

        fn write(&mut self, body: Vec<u8>) {
            assert!(body.len() <= BODY_MAX);
            assert!(!self.is_writing(), "two packs are on their way");
            self.state().written += 1;
        }

        fn flush(&mut self) {}

        fn close(self) {
            self.state().closed += 1;
        }
    }

    fn message(offset: u64) -> PackedMessage {
        PackedMessage { offset, message_id: None, tried: None, body: "x".repeat(100).into() }
    }

    fn pack(offset: u64) -> Pack {
        Pack::of(vec![message(offset)]).unwrap()
    }

    /// Reads enough of the journal for a pack to be due.
    fn read(buffer: &mut PackBuffer, from: &mut u64) {
        let more = *from + MESSAGES_MAX as u64 * 3 / 2;
        (*from..more).for_each(|offset| buffer.read(&Record::copied(message(offset))));
        *from = more;
    }

    /// All that the packer says until it has to wait.
    fn events(packer: &mut Packer<Broker>) -> Vec<PackEvent> {
        let mut context = Context::from_waker(Waker::noop());
        let next = || match packer.poll_next(&mut context) {
            Poll::Ready(event) => Some(event),
            Poll::Pending => None,
        };
        std::iter::from_fn(next).collect()
    }

    /// A packer that may write, since nobody else has.
    async fn open(broker: &Broker) -> Packer<Broker> {
        let mut packer = broker.packer();
        assert!(events(&mut packer).is_empty());
        advance(LAST_WITHIN).await;
        assert!(matches!(*events(&mut packer), [PackEvent::NoneYet]));
        packer
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_writes_a_pack_once_it_knows_how_far_others_have_packed() {
        let (mut buffer, mut from) = (PackBuffer::default(), 0);
        read(&mut buffer, &mut from);
        let broker = Broker::default();
        let mut packer = broker.packer();
        packer.flush(&mut buffer);
        assert_eq!(broker.seen(), (0, 0, 0));
        assert!(events(&mut packer).is_empty());
        packer.flush(&mut buffer);
        assert_eq!(broker.seen(), (1, 0, 0), "the last pack of others may still come");
        broker.delivers(Ok(Ok(pack(7))));
        assert!(matches!(*events(&mut packer), [PackEvent::Written(_)]));
        packer.flush(&mut buffer);
        assert_eq!(broker.seen(), (1, 0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_pack_waits_until_the_one_before_it_is_confirmed() {
        let (mut buffer, mut from) = (PackBuffer::default(), 0);
        let broker = Broker::default();
        let mut packer = open(&broker).await;
        for _ in 0..2 {
            read(&mut buffer, &mut from);
            packer.flush(&mut buffer);
            assert_eq!(broker.seen(), (1, 0, 1));
        }
        broker.answers(Ok(PublishOutcome::Confirmed));
        assert!(events(&mut packer).is_empty());
        packer.flush(&mut buffer);
        assert_eq!(broker.seen(), (1, 0, 2));
    }

    /// Each of these is a failure of the broker, of the queue or of the connection.
    #[tokio::test(start_paused = true)]
    async fn a_failure_ends_packing_for_a_while_and_then_the_stream_is_opened_again() {
        type Failure = fn(&Broker);
        let failures: [(&str, Failure); 6] = [
            ("no queue takes it", |it| it.answers(Ok(PublishOutcome::Unroutable))),
            ("the queue refuses it", |it| it.answers(Ok(PublishOutcome::Refused))),
            ("it is not confirmed", |it| it.answers(Ok(PublishOutcome::Unconfirmed(ANSWER_MAX)))),
            ("the channel is lost", |it| {
                it.answers(Err(PublisherError::Silent {
                    what: "packs".into(),
                    silent_for: ANSWER_MAX,
                    source: AskError::Silent { limit: ANSWER_MAX },
                }));
            }),
            ("the consumer is cancelled", |it| {
                it.delivers(Err(ConsumerError::Cancelled { queue: "packs".to_owned() }));
            }),
            ("the broker forgets the consumer", |it| {
                it.delivers(Err(ConsumerError::Unknown { queue: "packs".to_owned() }));
            }),
        ];
        for (what, failure) in failures {
            let (mut buffer, mut from) = (PackBuffer::default(), 0);
            let broker = Broker::default();
            let mut packer = open(&broker).await;
            read(&mut buffer, &mut from);
            packer.flush(&mut buffer);
            assert_eq!(broker.seen(), (1, 0, 1), "{what}");
            failure(&broker);
            assert!(events(&mut packer).is_empty(), "{what}");
            assert_eq!(broker.seen(), (1, 1, 1), "{what}");

            advance(REST - Duration::from_millis(10)).await;
            read(&mut buffer, &mut from);
            packer.flush(&mut buffer);
            assert!(events(&mut packer).is_empty(), "{what}");
            assert_eq!(broker.seen(), (1, 1, 1), "{what}: it rests");

            broker.state().answered = 1;
            advance(Duration::from_millis(10)).await;
            assert!(events(&mut packer).is_empty(), "{what}");
            advance(LAST_WITHIN).await;
            assert!(matches!(*events(&mut packer), [PackEvent::NoneYet]), "{what}");
            packer.flush(&mut buffer);
            assert_eq!(broker.seen(), (2, 1, 2), "{what}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_can_not_be_opened_is_tried_again_after_a_while() {
        let broker = Broker::default();
        broker.state().refuses = Some(AskError::Silent { limit: ANSWER_MAX });
        let mut packer = broker.packer();
        assert!(events(&mut packer).is_empty());
        broker.state().refuses = None;
        advance(REST - Duration::from_millis(10)).await;
        assert!(events(&mut packer).is_empty());
        assert_eq!(broker.seen(), (0, 0, 0));
        advance(Duration::from_millis(10)).await;
        assert!(events(&mut packer).is_empty());
        assert_eq!(broker.seen(), (1, 0, 0));
    }

    /// RabbitMQ 3.10 doesn't end the consumers of a stream that is deleted and declared again.
    #[tokio::test(start_paused = true)]
    async fn packs_that_are_confirmed_and_not_read_back_end_the_consumer() {
        let (mut buffer, mut from) = (PackBuffer::default(), 0);
        let broker = Broker::default();
        let mut packer = open(&broker).await;
        let mut write = |packer: &mut Packer<Broker>| {
            read(&mut buffer, &mut from);
            packer.flush(&mut buffer);
            broker.answers(Ok(PublishOutcome::Confirmed));
            events(packer)
        };
        for _ in 0..UNSEEN_MAX {
            assert!(write(&mut packer).is_empty());
        }
        // One is read back, and so all before it arrived as well.
        broker.delivers(Ok(Ok(pack(7))));
        assert!(matches!(*events(&mut packer), [PackEvent::Written(_)]));
        for _ in 0..UNSEEN_MAX {
            assert!(write(&mut packer).is_empty());
            assert_eq!(broker.state().closed, 0);
        }
        assert!(write(&mut packer).is_empty());
        assert_eq!(broker.state().closed, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn messages_that_are_no_packs_are_skipped_and_do_not_delay_writing() {
        let broker = Broker::default();
        let mut packer = broker.packer();
        for no_pack in [NoPack::Marker, NoPack::Foreign, NoPack::Unreadable("it is odd".to_owned())]
        {
            broker.delivers(Ok(Err(no_pack)));
        }
        assert!(events(&mut packer).is_empty());
        assert!(broker.state().messages.is_empty());
        advance(LAST_WITHIN).await;
        assert!(matches!(*events(&mut packer), [PackEvent::NoneYet]));
        assert!(events(&mut packer).is_empty(), "it is said once");
    }

    fn error(kind: AMQPErrorKind, words: &str) -> lapin::Error {
        ErrorKind::ProtocolError(AMQPError::new(kind, words.into())).into()
    }

    /// What only an operator can change, whenever it shows.
    #[tokio::test(start_paused = true)]
    async fn a_refusal_of_packs_is_reported_in_the_brokers_words() {
        use PacksUnusable::{Missing, NotPermitted, OtherUser};
        let soft = |kind, words: &str| error(AMQPErrorKind::Soft(kind), words);
        let user = "user_id property set to 'x' but authenticated user was 'y'";
        let other_user = format!("PRECONDITION_FAILED - {user}");
        let refused = "ACCESS_REFUSED - access to queue 'packs' in vhost '/' refused";
        let missing = "NOT_FOUND - no queue 'packs' in vhost '/'";
        for (error, why) in [
            (
                soft(AMQPSoftError::PRECONDITIONFAILED, &other_user),
                Some(OtherUser(other_user.clone())),
            ),
            (soft(AMQPSoftError::PRECONDITIONFAILED, "PRECONDITION_FAILED - no"), None),
            (soft(AMQPSoftError::ACCESSREFUSED, refused), Some(NotPermitted(refused.to_owned()))),
            (soft(AMQPSoftError::NOTFOUND, missing), Some(Missing)),
            (error(AMQPErrorKind::Hard(AMQPHardError::INTERNALERROR), "INTERNAL_ERROR"), None),
        ] {
            let told = |packer: &mut Packer<Broker>| match events(packer).pop() {
                Some(PackEvent::Unusable(why)) => Some(why),
                Some(other) => panic!("{other:?}"),
                None => None,
            };
            let broker = Broker::default();
            broker.state().refuses = Some(AskError::Broker(error.clone()));
            assert_eq!(told(&mut broker.packer()), why, "while it is opened");

            let broker = Broker::default();
            let mut packer = open(&broker).await;
            broker.answers(Err(PublisherError::Channel {
                what: "packs".into(),
                source: error.clone(),
            }));
            assert_eq!(told(&mut packer), why, "when a pack is written");
            assert_eq!(broker.seen(), (1, 1, 0));

            let broker = Broker::default();
            let mut packer = open(&broker).await;
            broker.delivers(Err(ConsumerError::Lost { queue: "packs".to_owned(), source: error }));
            assert_eq!(told(&mut packer), why, "while packs are read");
            assert_eq!(broker.seen(), (1, 1, 0));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_does_not_know_its_user_opens_no_packs() {
        let mut packer = Packer::<Broker>::of(None);
        advance(REST).await;
        assert!(events(&mut packer).is_empty());
        packer.flush(&mut PackBuffer::default());
    }
}
