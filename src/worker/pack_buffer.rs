//! The messages of the journal that this worker would pack next.
//!
//! When a pack is full, the worker waits for a random number of further messages before it writes the
//! pack, and drops the messages that another worker packs meanwhile. So rarely do two workers write the
//! same pack; if they do, it does no harm: see [`packs`](crate::worker::packs).

use std::{collections::VecDeque, sync::Arc};

use crate::{
    unique,
    wire::message::{BODY_MAX, Items, PackedMessage},
    worker::{
        journal::Record,
        packs::{MESSAGES_MAX, Pack, digest_of},
    },
};

/// Larger messages are not packed: reading them one by one is fast enough.
const COPIED_MAX: usize = 8 * 1024;

/// A pack of fewer messages saves too little.
const MESSAGES_MIN: usize = 256;

/// The least weight of a message: [`MESSAGES_MAX`] messages have the weight of a full pack.
const WEIGHT_MIN: usize = BODY_MAX / MESSAGES_MAX;

/// Copies of messages of the journal that are in no pack, as far as is known: two packs at most.
#[derive(Debug)]
pub(super) struct PackBuffer {
    /// Consecutive. The first one is the last message of the pack before, if that one was read.
    messages: VecDeque<PackedMessage>,
    weight: usize,
    /// From which weight on the next pack is written.
    due: usize,
    /// The offset and the digest of the last message of the pack that was read last.
    packed: Option<(u64, u64)>,
}

impl Default for PackBuffer {
    fn default() -> Self {
        Self { messages: VecDeque::new(), weight: 0, due: next_due(), packed: None }
    }
}

/// A random weight, from one full pack to one and a half.
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

impl PackBuffer {
    /// The worker reads the journal again, from any offset.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
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

    /// Drops the first `count` messages.
    fn forget(&mut self, count: usize) {
        for copied in self.messages.drain(..count.min(self.messages.len())) {
            self.weight = self.weight.saturating_sub(weight(&copied));
        }
    }

    /// A pack was read.
    pub(super) fn packed(&mut self, pack: &Pack) {
        self.packed = pack.last();
    }

    /// Drops the messages that are in the pack that was read last, if that pack is of this journal.
    fn forget_packed(&mut self) {
        let Some((offset, digest)) = self.packed else { return };
        let Some(first) = self.messages.front() else { return };
        let place = offset.checked_sub(first.offset).and_then(|it| usize::try_from(it).ok());
        match place.map(|place| (place, self.messages.get(place))) {
            // The journal has not been read that far.
            Some((_, None)) => return,
            Some((place, Some(same))) if digest_of(same) == digest => self.forget(place),
            Some((_, Some(_))) | None => {}
        }
        self.packed = None;
    }

    /// The body of the next pack, if it is due.
    pub(super) fn pack(&mut self) -> Option<Vec<u8>> {
        self.forget_packed();
        if self.weight < self.due {
            return None;
        }
        self.due = next_due();
        let mut items = Items::new();
        let first_ones = self.messages.iter().take(MESSAGES_MAX);
        let count = first_ones.take_while(|copied| items.push(*copied).is_ok()).count();
        // The next pack begins with the last message of this one.
        self.forget(count.saturating_sub(1).max(1));
        (count >= MESSAGES_MIN).then(|| items.into_body())
    }
}

#[cfg(test)]
mod tests {
    use super::{BODY_MAX, COPIED_MAX, MESSAGES_MAX, PackBuffer, next_due};
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

    fn reads(buffer: &mut PackBuffer, offsets: std::ops::Range<u64>, len: usize) {
        offsets.for_each(|offset| buffer.read(&Record::copied(message(offset, len))));
    }

    fn packs(buffer: &mut PackBuffer) -> Option<Pack> {
        let body = buffer.pack()?;
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
    fn a_pack_begins_with_the_last_message_of_the_one_before() {
        let mut buffer = PackBuffer::default();
        reads(&mut buffer, 7..1000, 100);
        assert_eq!(packs(&mut buffer), None);
        reads(&mut buffer, 1000..DUE + 7, 100);
        let first = packs(&mut buffer).unwrap();
        assert_eq!(first, of(7..7 + MESSAGES_MAX as u64));
        assert_eq!(packs(&mut buffer), None);
        let (last, _) = first.last().unwrap();
        reads(&mut buffer, DUE + 7..last + DUE, 100);
        assert_eq!(packs(&mut buffer), Some(of(last..last + MESSAGES_MAX as u64)));
    }

    #[test]
    fn the_weight_at_which_a_pack_is_due_is_random() {
        let dues: Vec<_> = (0..100).map(|_| next_due()).collect();
        assert!(dues.iter().all(|due| (BODY_MAX..BODY_MAX * 3 / 2).contains(due)));
        let first = dues[0];
        assert!(dues.iter().any(|due| *due != first));
    }

    #[test]
    fn messages_that_another_worker_has_packed_are_not_packed_again_even_before_they_are_read() {
        let mut buffer = PackBuffer::default();
        reads(&mut buffer, 0..DUE, 100);
        buffer.packed(&of(0..1024));
        assert_eq!(packs(&mut buffer), None);
        assert_eq!(buffer.messages.front().unwrap().offset, 1023);
        buffer.packed(&of(1023..2047));
        reads(&mut buffer, DUE..2000, 100);
        assert_eq!(packs(&mut buffer), None);
        assert_eq!(buffer.messages.len(), 977);
        reads(&mut buffer, 2000..2047 + DUE, 100);
        assert_eq!(packs(&mut buffer), Some(of(2046..2046 + 1024)));
        // One of long ago, and one of another journal.
        buffer.packed(&of(0..1024));
        reads(&mut buffer, 2047 + DUE..4000, 100);
        let other = message(4000, 7);
        buffer.packed(&Pack::of(vec![PackedMessage { offset: 3999, ..other }]).unwrap());
        reads(&mut buffer, 4000..3069 + DUE, 100);
        assert_eq!(packs(&mut buffer), Some(of(3069..3069 + 1024)));
    }

    #[test]
    fn a_message_that_can_not_be_packed_or_does_not_follow_clears_the_buffer() {
        let other = |copied| {
            let mut buffer = PackBuffer::default();
            reads(&mut buffer, 0..10, 100);
            buffer.read(&Record::copied(copied));
            buffer.messages.len()
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
        let mut buffer = PackBuffer::default();
        reads(&mut buffer, 0..10, 100);
        buffer.read(&Record { body: None, ..Record::copied(message(10, 100)) });
        assert_eq!((buffer.messages.len(), buffer.weight), (0, 0));
    }

    #[test]
    fn after_a_gap_or_a_repetition_packs_begin_there() {
        let mut buffer = PackBuffer::default();
        reads(&mut buffer, 0..500, 100);
        reads(&mut buffer, 200..200 + DUE, 100);
        assert_eq!(packs(&mut buffer), Some(of(200..200 + MESSAGES_MAX as u64)));
        reads(&mut buffer, 5000..5000 + DUE, 100);
        assert_eq!(packs(&mut buffer), Some(of(5000..5000 + MESSAGES_MAX as u64)));
        buffer.clear();
        assert_eq!((buffer.messages.len(), buffer.weight), (0, 0));
        reads(&mut buffer, 0..DUE, 100);
        assert_eq!(packs(&mut buffer), Some(of(0..MESSAGES_MAX as u64)));
    }

    /// Each quote takes two bytes in a pack.
    #[test]
    fn a_pack_that_is_full_early_has_fewer_messages_and_the_next_one_begins_with_its_last() {
        let mut buffer = PackBuffer::default();
        let quotes = |offset| PackedMessage { body: "\"".repeat(400).into(), ..message(offset, 0) };
        let mut next = 0;
        let mut pack_of_quotes = || loop {
            buffer.read(&Record::copied(quotes(next)));
            next += 1;
            if let Some(pack) = packs(&mut buffer) {
                return pack;
            }
        };
        let (first, second) = (pack_of_quotes(), pack_of_quotes());
        let (last, digest) = first.last().unwrap();
        assert!((256..400).contains(&last), "{last}");
        assert_eq!(second.digest_at(last), Some(digest));
        assert_eq!(second.digest_at(last - 1), None);
    }

    #[test]
    fn the_oldest_messages_are_dropped_if_no_pack_can_be_written() {
        let mut buffer = PackBuffer::default();
        reads(&mut buffer, 0..10_000, 100);
        assert_eq!(buffer.messages.len(), 2 * MESSAGES_MAX);
        reads(&mut buffer, 10_000..11_000, COPIED_MAX);
        assert!(buffer.weight <= 2 * BODY_MAX);
    }

    #[test]
    fn few_large_messages_are_not_worth_a_pack() {
        let mut buffer = PackBuffer::default();
        reads(&mut buffer, 0..60, COPIED_MAX);
        assert_eq!(packs(&mut buffer), None);
        let left = buffer.messages.front().unwrap().offset;
        assert!((20..40).contains(&left), "{left}");
    }
}
