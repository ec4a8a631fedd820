//! Reading the journal's window when a worker starts: the older part from packs.
//!
//! The broker spends 20 to 80 µs on each message of a stream that is read over AMQP, however small the
//! message is. Under light load each decision is a message of its own, and a window of 200,000 decisions
//! takes 6 to 16 s. So workers copy what they have read of the journal to a second stream, many messages
//! in one: a *pack*. The first message of a pack is the last message of the pack before it.
//!
//! Packs are an optimisation. A worker waits only briefly for one. Where there is no pack, or none that
//! can be read, it reads the journal.
//!
//! **Why a pack is as good as the journal.** A journal grows at its end, and can only lose its end: a
//! part of it in a power cut on a single node, all of it when the journal is deleted and created again.
//! So if two states of a journal have the same message at the same offset, they have the same messages
//! before it. A pack holds only what its writer has read *back*, message by message, or has read from
//! valid packs. Therefore:
//!
//! * If any message of a pack stands in the journal at its offset, the pack is valid up to that message.
//! * If the last message of a pack stands at its offset in the next pack, and that pack is valid up to
//!   there, the whole pack is valid.
//! * So in a run of packs, each of which contains the last message of the one before it, all are valid if
//!   the last one is. The worker compares *every* message of the last pack with the journal. A run begins
//!   with a message that was read in the journal, so packs of another journal are not mistaken for packs
//!   of this one.
//!
//! A worker makes the same check when it continues after a break ([`Journal::resume`]); here it continues
//! from where other workers had read to. Until the check is made, the worker serves nobody, and no later
//! link continues from what was read in packs. If the check fails, the worker clears its view and reads
//! the journal. So packs need not name their journal, whose first message may have expired.
//!
//! **Trust.** A user that forges a record in the journal can decide what is undecided, and every worker
//! reads the record. A forged pack could tell a single worker that an old decision was different. So a pack
//! counts only if its property `user_id`, which the broker checks, is this worker's own user. That makes
//! forging harder for those who may write to the default exchange; it doesn't prevent it.

use std::{future::Future, sync::Arc, time::Duration};

use futures_util::future::try_join;
use lapin::{
    message::Delivery,
    types::{AMQPValue, ShortString},
};
use tokio::time::timeout;

use crate::{
    error::ErrorChain,
    protocol::time::Time,
    transport::amqp::{
        bounded::{ANSWER_MAX, AskError, answer},
        connection::{Broker, BrokerConnection, PublishChannel},
        connection_pair::ConnectionPair,
        consumer::QueueConsumer,
        error::{broker_text, is_not_found, is_precondition_failed, is_refusal},
        names::Names,
        publisher::{OutgoingMessage, PublishOutcome, publish_within},
        stream, unique,
    },
    wire::message::{Kind, PackedMessage, decode},
    worker::journal::{Journal, ReadError, Record, Tail, digest},
};

/// How many messages a pack has at most.
pub(super) const MESSAGES_MAX: usize = 1024;

/// If no more messages of the journal are to be read, packs save no time.
const WORTH_READING: u64 = 2 * MESSAGES_MAX as u64;

/// How many unacknowledged packs the broker delivers to a reader.
const PREFETCH: u16 = 16;

/// How long the broker has to confirm a marker, to begin a consumer, and to deliver the next pack.
const WAIT_MAX: Duration = Duration::from_secs(2);

/// Consecutive messages of the journal; at least one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Pack(Vec<PackedMessage>);

/// Why a message of the stream is no pack, or none that counts.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum NoPack {
    /// It is empty: a reader has marked the end of the stream.
    #[error("a marker")]
    Marker,
    #[error("the pack of another user")]
    Foreign,
    #[error("{0}")]
    Unreadable(String),
}

/// An event of the stream of packs.
#[derive(Debug)]
pub(super) enum PackEvent {
    /// A worker, this one or another, has written this pack.
    Written(Pack),
    /// For a while no pack has come: this worker may write one.
    NoneYet,
    /// This worker can't read or write packs until an operator has changed something.
    Unusable(PacksUnusable),
}

/// Why a worker can't read or write packs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum PacksUnusable {
    /// There is no such stream.
    Missing,
    /// The broker's name for the worker's user is not the one in the URL. In the broker's words.
    OtherUser(String),
    /// The broker refuses to let this user read or write packs. In the broker's words.
    NotPermitted(String),
}

impl PacksUnusable {
    /// The cause of `error`, if an operator must do something about it.
    pub(super) fn of(error: &lapin::Error) -> Option<Self> {
        if is_not_found(error) {
            Some(Self::Missing)
        } else if is_refusal(error) {
            Some(Self::NotPermitted(broker_text(error)))
        } else if is_precondition_failed(error) && broker_text(error).contains("user_id") {
            // `user_id property set to 'x' but authenticated user was 'y'`
            Some(Self::OtherUser(broker_text(error)))
        } else {
            None
        }
    }
}

/// The stream of packs at the broker.
#[derive(Clone, Debug)]
pub(super) struct PackedJournal {
    queue: ShortString,
    user: ShortString,
    consuming: Arc<BrokerConnection>,
    pub(super) publishing: Arc<BrokerConnection>,
}

impl Pack {
    pub(super) fn of(messages: Vec<PackedMessage>) -> Result<Self, NoPack> {
        let unreadable = |why: &str| Err(NoPack::Unreadable(why.to_owned()));
        if messages.is_empty() {
            return Err(NoPack::Marker);
        }
        if messages.len() > MESSAGES_MAX {
            return unreadable("it has too many messages");
        }
        let offsets = messages.iter().map(|copied| copied.offset);
        if !offsets.clone().zip(offsets.skip(1)).all(|(one, next)| one.checked_add(1) == Some(next))
        {
            return unreadable("its offsets are not consecutive");
        }
        Ok(Self(messages))
    }

    pub(super) fn read(delivery: &Delivery, user: &ShortString) -> Result<Self, NoPack> {
        let properties = &delivery.properties;
        if properties.user_id().as_ref() != Some(user) {
            return Err(NoPack::Foreign);
        }
        let kind = properties.kind().as_ref().and_then(|text| Kind::parse_type(text.as_str()));
        if kind != Some(Kind::Pack) {
            return Err(NoPack::Unreadable("its type is not that of a pack".to_owned()));
        }
        let messages = decode(&delivery.data).and_then(|items| items.into_iter().collect());
        Self::of(messages.map_err(|error| NoPack::Unreadable(error.to_string()))?)
    }

    /// The offset of the first message.
    fn begins(&self) -> u64 {
        self.0.first().map_or(0, |first| first.offset)
    }

    /// The offset after the last message.
    fn ends(&self) -> u64 {
        self.begins().saturating_add(self.0.len() as u64)
    }

    /// The digest of the message at `offset`, if the pack has it.
    pub(super) fn digest_at(&self, offset: u64) -> Option<u64> {
        let place = usize::try_from(offset.checked_sub(self.begins())?).ok()?;
        self.0.get(place).map(digest_of)
    }

    /// The offset and the digest of the last message.
    pub(super) fn last(&self) -> Option<(u64, u64)> {
        self.0.last().map(|last| (last.offset, digest_of(last)))
    }
}

/// A digest that distinguishes a copied message from another one at the same offset.
pub(super) fn digest_of(copied: &PackedMessage) -> u64 {
    digest(copied.body.as_bytes(), copied.message_id.as_deref())
}

impl PackedJournal {
    /// `None`: this process doesn't know the broker's name for its user.
    pub(super) fn of(link: &ConnectionPair, names: &Names, broker: &Broker) -> Option<Self> {
        if broker.address.is_external() {
            return None;
        }
        Some(Self {
            queue: names.packed_journal(),
            user: ShortString::try_new(link.publishing.status().username()).ok()?,
            consuming: Arc::clone(&link.consuming),
            publishing: Arc::clone(&link.publishing),
        })
    }

    pub(super) fn user(&self) -> &ShortString {
        &self.user
    }

    /// The message to publish for a pack with this body.
    pub(super) fn message(&self, body: Vec<u8>) -> OutgoingMessage {
        OutgoingMessage {
            key: self.queue.clone(),
            message_type: Kind::Pack.as_type(),
            body,
            persistent: true,
            mandatory: true,
            message_id: Some(unique::name('p').into()),
            user_id: Some(self.user.clone()),
            ..OutgoingMessage::default()
        }
    }

    /// Consumes the stream. The broker has `limit` to begin that.
    pub(super) async fn open(
        &self,
        from: AMQPValue,
        prefetch: u16,
        limit: Duration,
    ) -> Result<QueueConsumer, AskError> {
        let (queue, from) = (self.queue.clone(), stream::reading_from(from));
        let inbox = QueueConsumer::open_within(limit, &self.consuming, queue, prefetch, from);
        Ok(inbox.await?.with_lazy_acks())
    }

    /// The packs that were written from `second`, by the broker's clock, until now.
    async fn since(&self, second: u64) -> Result<Option<WrittenPacks>, AskError> {
        let marker = self.message(b"[]".into());
        let id = marker.message_id.clone();
        let channel = PublishChannel::open(&self.publishing).await?;
        let published = publish_within(channel.clone(), marker, WAIT_MAX).await;
        tokio::spawn(async move { answer(ANSWER_MAX, channel.close(200, "done".into())).await });
        if !matches!(published, PublishOutcome::Confirmed) {
            tracing::debug!(outcome = ?published, "no packs are read: their stream took no marker");
            return Ok(None);
        }
        let inbox = self.open(AMQPValue::Timestamp(second), PREFETCH, WAIT_MAX).await?;
        let reader = PackReader { user: self.user.clone(), marker: id, has_warned: false };
        Ok(Some(WrittenPacks { inbox, reader }))
    }
}

/// The packs that were written before a reader began.
struct WrittenPacks {
    inbox: QueueConsumer,
    reader: PackReader,
}

/// Tells these packs from what else is in their stream.
struct PackReader {
    user: ShortString,
    /// The id of the marker that this reader has written after these packs.
    marker: Option<ShortString>,
    has_warned: bool,
}

/// A message of the stream, as a [`PackReader`] takes it.
#[derive(Clone, PartialEq, Eq, Debug)]
enum WrittenMessage {
    Pack(Pack),
    Skipped,
    /// The reader's own marker: no more packs follow.
    End,
}

impl PackReader {
    fn read(&mut self, delivery: &Delivery) -> WrittenMessage {
        if *delivery.properties.message_id() == self.marker {
            return WrittenMessage::End;
        }
        match Pack::read(delivery, &self.user) {
            Ok(pack) => WrittenMessage::Pack(pack),
            Err(NoPack::Unreadable(reason)) => {
                if !std::mem::replace(&mut self.has_warned, true) {
                    tracing::warn!(%reason, "skipping a pack of the journal that can't be read");
                }
                WrittenMessage::Skipped
            }
            Err(NoPack::Marker | NoPack::Foreign) => WrittenMessage::Skipped,
        }
    }
}

/// Packs, in the order in which they were written.
trait Packs {
    /// `None`: no more packs will come.
    fn next(&mut self) -> impl Future<Output = Option<Pack>> + Send;
}

impl Packs for WrittenPacks {
    async fn next(&mut self) -> Option<Pack> {
        loop {
            let delivery = match timeout(WAIT_MAX, self.inbox.next()).await {
                Ok(Ok(delivery)) => delivery,
                Ok(Err(closed)) => {
                    tracing::debug!(error = %ErrorChain(&closed), "lost the consumer of packs");
                    return None;
                }
                Err(_) => {
                    tracing::debug!("the broker delivers no more packs, though there are some");
                    return None;
                }
            };
            self.inbox.ack(delivery.delivery_tag);
            self.inbox.flush();
            match self.reader.read(&delivery) {
                WrittenMessage::Pack(pack) => return Some(pack),
                WrittenMessage::Skipped => {}
                WrittenMessage::End => return None,
            }
        }
    }
}

/// The journal's messages, in order.
trait Messages {
    fn next(&mut self) -> impl Future<Output = Result<Record, ReadError>> + Send;

    /// Continues at the offset `first`, if there is a message at `last` or after it. Returns whether
    /// there is.
    fn go_to(
        &mut self,
        first: u64,
        last: u64,
    ) -> impl Future<Output = Result<bool, ReadError>> + Send;
}

/// The journal at the broker.
struct JournalStream<'a> {
    journal: &'a Journal,
    tail: Tail,
}

impl Messages for JournalStream<'_> {
    async fn next(&mut self) -> Result<Record, ReadError> {
        self.tail.record().await
    }

    async fn go_to(&mut self, first: u64, last: u64) -> Result<bool, ReadError> {
        let Some(tail) = self.journal.open_between(first, last).await? else { return Ok(false) };
        std::mem::replace(&mut self.tail, tail).close().await;
        Ok(true)
    }
}

/// Where a message was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ReadIn {
    Journal,
    /// Whether the journal has it too is checked later.
    Pack,
}

/// Reads the window, from packs and from the journal.
struct WindowReader<'a, M, R> {
    messages: M,
    /// Takes each message.
    read: R,
    /// The id of a message that was at the journal's end when the reader began.
    marker: &'a ShortString,
    is_at_end: bool,
    /// The offset of the next message, and the digest of the one before it.
    next: u64,
    last_digest: u64,
    /// Whether packs have yielded messages that `messages` has not.
    is_ahead: bool,
}

impl<M: Messages, R: FnMut(Record, ReadIn)> WindowReader<'_, M, R> {
    fn take(&mut self, record: Record, read_in: ReadIn) {
        self.is_at_end |= record.is_marker(self.marker);
        (self.next, self.last_digest) = (record.offset + 1, record.digest);
        (self.read)(record, read_in);
    }

    async fn read_one(&mut self) -> Result<(), ReadError> {
        let record = self.messages.next().await?;
        self.take(record, ReadIn::Journal);
        Ok(())
    }

    /// Reads up to the marker, from `packs` where there are any. Returns whether the packs were valid.
    async fn read(&mut self, packs: Option<&mut impl Packs>) -> Result<bool, ReadError> {
        if let Some(packs) = packs
            && !self.read_packs(packs).await?
        {
            return Ok(false);
        }
        while !self.is_at_end {
            self.read_one().await?;
        }
        Ok(true)
    }

    async fn read_packs(&mut self, packs: &mut impl Packs) -> Result<bool, ReadError> {
        // This pack has the message that was read last. Its newer messages wait for a pack that continues
        // it, or for the journal.
        let mut held: Option<Pack> = None;
        while let Some(pack) = packs.next().await {
            if let Some(before) = held.take() {
                let Some((last, digest)) = before.last() else { continue };
                if pack.ends() <= before.ends() {
                    held = Some(before);
                    continue;
                }
                match pack.digest_at(last) {
                    Some(same) if same == digest => {
                        self.take_copies(before);
                        held = Some(pack);
                        continue;
                    }
                    // One of the two is of another journal. The journal will show which.
                    Some(_) => {
                        held = Some(before);
                        continue;
                    }
                    None if !self.check(&before).await? => return Ok(false),
                    None => {}
                }
            }
            while self.next <= pack.begins() && !self.is_at_end {
                self.read_one().await?;
            }
            if self.is_at_end {
                break;
            }
            let goes_on = pack.ends() > self.next;
            held = Some(pack)
                .filter(|it| goes_on && it.digest_at(self.next - 1) == Some(self.last_digest));
        }
        match held {
            Some(pack) => self.check(&pack).await,
            None => Ok(true),
        }
    }

    fn take_copies(&mut self, pack: Pack) {
        for copied in pack.0 {
            if copied.offset >= self.next {
                self.is_ahead = true;
                self.take(Record::copied(copied), ReadIn::Pack);
            }
        }
    }

    /// Continues in the journal from the beginning of `pack`, which has the message that was read last.
    /// Returns whether the journal has each message of the pack.
    async fn check(&mut self, pack: &Pack) -> Result<bool, ReadError> {
        if !std::mem::take(&mut self.is_ahead) {
            // All messages so far came from the journal, which continues from here.
            return Ok(true);
        }
        if !self.messages.go_to(pack.begins(), pack.ends() - 1).await? {
            return Ok(false);
        }
        for copied in &pack.0 {
            let record = self.messages.next().await?;
            if (record.offset, record.digest) != (copied.offset, digest_of(copied)) {
                return Ok(false);
            }
            if record.offset >= self.next {
                self.take(record, ReadIn::Journal);
            }
        }
        Ok(true)
    }
}

/// Reads the journal from `from` to its end, and then follows it.
///
/// `begin` gets the first offset and the moment since which no record is missing; `read` gets each
/// message. If packs turn out to be invalid, both are called again from the beginning.
pub(super) async fn attach(
    journal: &Journal,
    mut packed: Option<&PackedJournal>,
    from: Time,
    clock_margin: Duration,
    mut begin: impl FnMut(u64, Option<Time>),
    mut read: impl FnMut(Record, ReadIn),
) -> Result<Tail, ReadError> {
    let marker = journal.mark().await?;
    loop {
        // In parallel: a broker that misses a node is slow to answer each of them.
        let end = async { if packed.is_some() { journal.end().await.map(Some) } else { Ok(None) } };
        let opening = journal.open_at(from, clock_margin, &marker);
        let (end, (tail, first, reaches)) = try_join(end, opening).await?;
        let is_long = end.is_some_and(|end| end.saturating_sub(first.offset) > WORTH_READING);
        let packs = match packed.filter(|_| is_long) {
            // A pack is written after the messages that it holds.
            Some(packed) => packed.since((from - clock_margin).as_millis() / 1000).await,
            None => Ok(None),
        };
        let mut packs = packs.unwrap_or_else(|error| {
            tracing::debug!(error = %ErrorChain(&error), "no packs are read");
            None
        });
        let mut reader = WindowReader {
            messages: JournalStream { journal, tail },
            read: &mut read,
            marker: &marker,
            is_at_end: false,
            next: first.offset,
            last_digest: first.digest,
            is_ahead: false,
        };
        begin(first.offset, reaches);
        reader.take(first, ReadIn::Journal);
        let read = reader.read(packs.as_mut()).await;
        if let Some(packs) = packs {
            tokio::spawn(packs.inbox.close());
        }
        if read? {
            return Ok(reader.messages.tail);
        }
        tracing::warn!(
            "the packs of the journal do not agree with it, as after it has lost its end or was created \
             again; ignoring the packs and reading the journal"
        );
        reader.messages.tail.close().await;
        packed = None;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use futures_util::FutureExt as _;
    use lapin::{BasicProperties, message::Delivery, types::ShortString};
    use proptest::prelude::{Just, Strategy, any, prop, prop_oneof, proptest};

    use super::{
        Kind, MESSAGES_MAX, Messages, NoPack, Pack, PackReader, PackedMessage, Packs, ReadIn,
        WindowReader, WrittenMessage, digest_of,
    };
    use crate::{
        wire::message::{BODY_MAX, Items},
        worker::journal::{ReadError, Record},
    };

    /// A journal in memory, whose first offset is zero.
    struct Log {
        journal: Vec<PackedMessage>,
        at: usize,
    }

    impl Messages for Log {
        async fn next(&mut self) -> Result<Record, ReadError> {
            let next = self.journal.get(self.at).cloned().ok_or(ReadError::Silent)?;
            self.at += 1;
            Ok(Record::copied(next))
        }

        async fn go_to(&mut self, first: u64, last: u64) -> Result<bool, ReadError> {
            let is_there = (last as usize) < self.journal.len();
            self.at = if is_there { first as usize } else { self.at };
            Ok(is_there)
        }
    }

    struct Written(VecDeque<Pack>);

    impl Packs for Written {
        async fn next(&mut self) -> Option<Pack> {
            self.0.pop_front()
        }
    }

    /// A message of the `which`-th history of a journal.
    fn message(which: usize, place: usize) -> PackedMessage {
        PackedMessage {
            offset: place as u64,
            message_id: Some(format!("{which}-{place}").into()),
            tried: None,
            body: "[]".into(),
        }
    }

    fn journal(len: usize) -> Vec<PackedMessage> {
        (0..len).map(|place| message(0, place)).collect()
    }

    fn pack(journal: &[PackedMessage], first: usize, len: usize) -> Pack {
        Pack::of(journal[first..first + len].to_vec()).unwrap()
    }

    /// What was read of `journal` from `first` to its message at `end`, by `packs`.
    #[derive(PartialEq, Eq, Debug)]
    struct Told {
        is_right: bool,
        messages: Vec<(u64, u64)>,
        n_packed: usize,
    }

    fn told(journal: &[PackedMessage], first: usize, end: usize, packs: Vec<Pack>) -> Told {
        let (mut messages, mut n_packed) = (Vec::new(), 0);
        let marker = ShortString::from(&**journal[end].message_id.as_ref().unwrap());
        let mut log = Log { journal: journal.to_vec(), at: first };
        let begun = log.next().now_or_never().unwrap().unwrap();
        let mut reader = WindowReader {
            messages: log,
            read: |record: Record, read_in| {
                messages.push((record.offset, record.digest));
                n_packed += usize::from(read_in == ReadIn::Pack);
            },
            marker: &marker,
            is_at_end: false,
            next: begun.offset,
            last_digest: begun.digest,
            is_ahead: false,
        };
        reader.take(begun, ReadIn::Journal);
        let mut packs = Written(packs.into());
        let is_right = reader.read(Some(&mut packs)).now_or_never().unwrap().unwrap();
        Told { is_right, messages, n_packed }
    }

    fn told_by_journal(journal: &[PackedMessage], first: usize) -> Vec<(u64, u64)> {
        journal[first..].iter().map(|it| (it.offset, digest_of(it))).collect()
    }

    #[test]
    fn a_run_of_packs_is_read_instead_of_the_journal_but_for_its_last_one() {
        let journal = journal(40);
        let packs = [pack(&journal, 0, 11), pack(&journal, 10, 11), pack(&journal, 20, 11)];
        let told = told(&journal, 3, 39, packs.into());
        let messages = told_by_journal(&journal, 3);
        assert_eq!(told, Told { is_right: true, messages, n_packed: 17 });
    }

    #[test]
    fn repeated_overlapping_and_old_packs_do_no_harm() {
        let journal = journal(40);
        let packs = [(0, 3), (0, 11), (0, 11), (5, 10), (2, 4), (14, 11), (10, 4), (20, 11)];
        let packs = packs.map(|(first, len)| pack(&journal, first, len));
        let told = told(&journal, 3, 39, packs.into());
        let messages = told_by_journal(&journal, 3);
        assert_eq!(told, Told { is_right: true, messages, n_packed: 21 });
    }

    #[test]
    fn messages_that_no_pack_has_are_read_in_the_journal() {
        let journal = journal(60);
        // The second run goes on from nothing that the first one ends with.
        let packs = [(5, 6), (10, 6), (20, 6), (25, 6), (30, 6)];
        let packs = packs.map(|(first, len)| pack(&journal, first, len));
        let told = told(&journal, 0, 59, packs.into());
        let messages = told_by_journal(&journal, 0);
        assert_eq!(told, Told { is_right: true, messages, n_packed: 15 });
    }

    #[test]
    fn without_packs_the_journal_is_read_and_not_opened_again() {
        let journal = journal(20);
        for packs in [vec![], vec![pack(&journal, 4, 6)]] {
            let told = told(&journal, 3, 19, packs);
            let messages = told_by_journal(&journal, 3);
            assert_eq!(told, Told { is_right: true, messages, n_packed: 0 });
        }
    }

    /// The first pack has more than was left of the journal; what was written after that doesn't go on
    /// from there.
    #[test]
    fn packs_of_a_lost_end_are_detected() {
        let journal = journal(40);
        let lost: Vec<_> = (0..40).map(|place| message(usize::from(place >= 18), place)).collect();
        let of_lost = [pack(&lost, 0, 11), pack(&lost, 10, 11)];
        let of_rest = [pack(&journal, 17, 11), pack(&journal, 27, 11)];
        let told_of_both = told(&journal, 3, 39, [of_lost.clone(), of_rest].concat());
        assert!(!told_of_both.is_right, "{told_of_both:?}");
        assert!(!told(&journal, 3, 39, of_lost.into()).is_right);
        // What would go on in the lost end is beyond the journal's.
        let beyond = [pack(&lost, 0, 18), pack(&lost, 17, 23)];
        let told_beyond = told(&journal[..30], 3, 29, beyond.into());
        assert!(!told_beyond.is_right, "{told_beyond:?}");
    }

    #[test]
    fn packs_of_another_journal_are_skipped() {
        let journal = journal(40);
        let other: Vec<_> = (0..40).map(|place| message(1, place)).collect();
        let packs = [pack(&other, 0, 11), pack(&other, 10, 11), pack(&journal, 10, 11)];
        let packs = [packs.as_slice(), &[pack(&journal, 20, 11)]].concat();
        let told = told(&journal, 3, 39, packs);
        assert!(told.is_right && told.n_packed > 0, "{told:?}");
        assert_eq!(told.messages, told_by_journal(&journal, 3));
    }

    #[test]
    fn a_pack_has_consecutive_offsets_and_a_limited_length() {
        let journal = journal(MESSAGES_MAX + 1);
        assert_eq!(Pack::of(Vec::new()), Err(NoPack::Marker));
        assert!(Pack::of(journal[..MESSAGES_MAX].to_vec()).is_ok());
        let refused = |messages: Vec<PackedMessage>| Pack::of(messages).unwrap_err().to_string();
        assert_eq!(refused(journal.clone()), "it has too many messages");
        let jump = vec![journal[1].clone(), journal[3].clone()];
        assert_eq!(refused(jump), "its offsets are not consecutive");
        let mut last = message(0, 0);
        last.offset = u64::MAX;
        assert_eq!(refused(vec![last.clone(), last]), "its offsets are not consecutive");
    }

    #[test]
    fn a_pack_has_a_digest_at_each_of_its_offsets_and_at_no_other() {
        let journal = journal(20);
        let pack = pack(&journal, 5, 10);
        assert_eq!((pack.begins(), pack.ends()), (5, 15));
        for copied in &journal {
            let offset = copied.offset;
            let expected = (5..15).contains(&offset).then(|| digest_of(copied));
            assert_eq!(pack.digest_at(offset), expected, "{offset}");
        }
        assert_eq!(pack.digest_at(u64::MAX), None);
        assert_eq!(pack.last(), Some((14, digest_of(&journal[14]))));
    }

    /// All markers have the same body, and a body may be that of another message.
    #[test]
    fn a_digest_depends_on_body_and_id() {
        let this = message(0, 1);
        assert_ne!(digest_of(&this), digest_of(&message(1, 1)));
        assert_ne!(
            digest_of(&this),
            digest_of(&PackedMessage { message_id: None, ..this.clone() })
        );
        let other_body = PackedMessage { body: "[ ]".into(), ..this.clone() };
        assert_ne!(digest_of(&this), digest_of(&other_body));
        // A record of the journal has the same digest.
        assert_eq!(Record::copied(this.clone()).digest, digest_of(&this));
    }

    const USER: &str = "workers";

    fn properties() -> BasicProperties {
        BasicProperties::default().with_user_id(USER.into()).with_type(Kind::Pack.as_type().into())
    }

    fn delivery(properties: BasicProperties, body: &[u8]) -> Delivery {
        let mut delivery = Delivery::mock(1, "".into(), "packs".into(), false, body.to_vec());
        delivery.properties = properties;
        delivery
    }

    fn body(messages: &[PackedMessage]) -> Vec<u8> {
        let mut items = Items::new();
        messages.iter().for_each(|copied| items.push(copied).unwrap());
        items.into_body()
    }

    fn reader() -> PackReader {
        PackReader { user: USER.into(), marker: Some("p1".into()), has_warned: false }
    }

    #[test]
    fn a_pack_of_this_workers_user_is_read() {
        let journal = journal(3);
        let delivery = delivery(properties(), &body(&journal));
        let expected = WrittenMessage::Pack(Pack::of(journal).unwrap());
        assert_eq!(reader().read(&delivery), expected);
    }

    #[test]
    fn a_pack_that_the_broker_does_not_ascribe_to_this_workers_user_is_skipped() {
        let good = body(&journal(3));
        let nobodys = || BasicProperties::default().with_type(Kind::Pack.as_type().into());
        for user in [None, Some("guest"), Some(""), Some("Workers"), Some("workers2")] {
            let properties = match user {
                None => nobodys(),
                Some(user) => nobodys().with_user_id(user.into()),
            };
            let delivery = delivery(properties, &good);
            assert_eq!(Pack::read(&delivery, &USER.into()), Err(NoPack::Foreign), "{user:?}");
            assert_eq!(reader().read(&delivery), WrittenMessage::Skipped, "{user:?}");
        }
    }

    #[test]
    fn a_message_that_is_no_pack_is_refused_with_the_reason() {
        let good = journal(4);
        let refused = |properties, body: &[u8]| {
            let delivery = delivery(properties, body);
            let mut reader = reader();
            assert_eq!(reader.read(&delivery), WrittenMessage::Skipped);
            assert!(reader.has_warned);
            Pack::read(&delivery, &USER.into()).unwrap_err().to_string()
        };
        let untyped = BasicProperties::default().with_user_id(USER.into());
        let decision = untyped.clone().with_type(Kind::Decision.as_type().into());
        for properties in [untyped, decision] {
            let reason = "its type is not that of a pack";
            assert_eq!(refused(properties, &body(&good)), reason);
        }
        let jump = [good[0].clone(), good[2].clone()];
        let backwards = [good[1].clone(), good[0].clone()];
        let twice = [good[1].clone(), good[1].clone()];
        for messages in [jump, backwards, twice] {
            let reason = "its offsets are not consecutive";
            assert_eq!(refused(properties(), &body(&messages)), reason);
        }
        let one_bad =
            String::from_utf8(body(&good)).unwrap().replace("\"offset\":2", "\"offset\":-2");
        assert!(one_bad.contains("-2"));
        for (body, reason) in [
            (&b"\xff"[..], "UTF-8"),
            (b"", "JSON"),
            (b"[", "JSON"),
            (b"{}", "array"),
            (one_bad.as_bytes(), "$[2].offset is -2"),
            (&vec![b' '; BODY_MAX + 1], "bytes"),
        ] {
            let refused = refused(properties(), body);
            assert!(refused.contains(reason), "{refused}");
        }
    }

    #[test]
    fn the_marker_of_another_reader_is_skipped_and_the_own_one_is_the_end() {
        let mut reader = reader();
        let marker = |id: &str| delivery(properties().with_message_id(id.into()), b"[]");
        assert_eq!(reader.read(&delivery(properties(), b"[]")), WrittenMessage::Skipped);
        assert_eq!(reader.read(&marker("p2")), WrittenMessage::Skipped);
        assert_eq!(reader.read(&marker("p1")), WrittenMessage::End);
        assert!(!reader.has_warned, "markers are no pack, and no mistake");
    }

    /// A journal that delivers `left` more messages, and then nothing.
    struct FallsSilent {
        log: Log,
        left: usize,
    }

    impl Messages for FallsSilent {
        async fn next(&mut self) -> Result<Record, ReadError> {
            self.left = self.left.checked_sub(1).ok_or(ReadError::Silent)?;
            self.log.next().await
        }

        async fn go_to(&mut self, first: u64, last: u64) -> Result<bool, ReadError> {
            self.log.go_to(first, last).await
        }
    }

    #[test]
    fn a_journal_that_falls_silent_anywhere_ends_the_reading_with_an_error() {
        let journal = journal(60);
        // Two runs, with a gap before, between and after them.
        let packs = [(5, 6), (10, 6), (20, 6), (25, 6)];
        let packs = packs.map(|(first, len)| pack(&journal, first, len));
        let marker = ShortString::from("0-59");
        // A gap and the last pack of a run, twice; and the rest.
        let needed = 5 + 6 + (20 - 15) + 6 + (59 - 30);
        for left in 0..=needed {
            let mut messages = Vec::new();
            let mut reader = WindowReader {
                messages: FallsSilent { log: Log { journal: journal.clone(), at: 1 }, left },
                read: |record: Record, _| messages.push((record.offset, record.digest)),
                marker: &marker,
                is_at_end: false,
                next: 0,
                last_digest: 0,
                is_ahead: false,
            };
            reader.take(Record::copied(journal[0].clone()), ReadIn::Journal);
            let mut packs = Written(packs.clone().into());
            let read = reader.read(Some(&mut packs)).now_or_never().unwrap();
            match left < needed {
                true => assert!(matches!(read, Err(ReadError::Silent)), "{left}: {read:?}"),
                false => assert!(matches!(read, Ok(true)), "{left}: {read:?}"),
            }
            assert_eq!(messages, told_by_journal(&journal, 0)[..messages.len()]);
        }
    }

    const LEN: usize = 50;

    /// Histories of one journal: the last one is what it is now, and of each other one some beginning
    /// is there.
    fn histories() -> impl Strategy<Value = Vec<Vec<PackedMessage>>> {
        prop::collection::vec(0..LEN, 0..3).prop_map(|kept| {
            let mut histories = vec![journal(LEN)];
            for (which, kept) in (1..).zip(kept) {
                let mut next = histories.last().map_or_else(Vec::new, |it| it[..kept].to_vec());
                next.extend((kept..LEN).map(|place| message(which, place)));
                histories.push(next);
            }
            histories
        })
    }

    proptest! {
        /// With any packs, of any state of the journal, in any order.
        #[test]
        fn packs_yield_what_the_journal_has_or_are_detected(
            histories in histories(),
            packs in prop::collection::vec((any::<prop::sample::Index>(), 0..LEN, 1..20_usize), 0..20),
            is_sorted in prop_oneof![Just(true), any::<bool>()],
            (first, end) in (0..LEN, 0..LEN).prop_map(|(a, b)| (a.min(b), a.max(b))),
        ) {
            let mut packs = packs;
            if is_sorted {
                packs.sort_by_key(|(_, first, _)| *first);
            }
            let packs = packs.into_iter().map(|(which, first, len)| {
                pack(&histories[which.index(histories.len())], first, len.min(LEN - first))
            });
            let now = histories.last().unwrap();
            let told = told(now, first, end, packs.collect());
            if told.is_right {
                assert!(told.messages.len() > end - first);
                assert_eq!(told.messages, told_by_journal(now, first)[..told.messages.len()]);
            } else {
                assert!(histories.len() > 1 && told.n_packed > 0, "{told:?}");
            }
        }
    }
}
