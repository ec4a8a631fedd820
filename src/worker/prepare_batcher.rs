//! Puts several prepares in one message.
//!
//! A prepare takes a slot. If slots may be scarce, each prepare is a message of its own, so that the broker
//! enforces the cap. If many slots are free, as far as is known, several prepares share a message, which
//! costs the broker hardly more than a single one. An instance says how many it takes in one message. Any
//! instance of the service may get the message, so the smallest number counts, and one until an instance
//! has said a number. An instance that has said none yet may get as many as the others take, and the
//! protocol requires that it accepts them.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

use crate::{
    protocol::{
        ids::{ServiceName, TransactionKey},
        message::Prepare,
    },
    wire::message::Items,
};

/// How long the smallest number counts after an instance has said it. No instance that votes is silent for
/// so long.
const FEWER_FOR: Duration = Duration::from_secs(60);

/// A message of several prepares is sent only if so many times their number of slots are free. Then none
/// of them waits at an instance, where the broker can't return it.
const SPARE_FOR_EACH: u32 = 4;

/// For how many services the number is remembered. Others get one prepare in a message.
const SERVICES_MAX: usize = 4096;

/// The prepares of one message.
#[derive(Debug, Default)]
pub(super) struct Prepares {
    pub(super) items: Items,
    pub(super) keys: Vec<TransactionKey>,
}

impl Prepares {
    fn one(prepare: &Prepare) -> Self {
        let mut one = Self::default();
        one.add(prepare);
        one
    }

    /// Returns whether it fits.
    fn add(&mut self, prepare: &Prepare) -> bool {
        let fits = self.items.push(prepare).is_ok();
        if fits {
            self.keys.push(prepare.key.clone());
        }
        fits
    }
}

/// How many prepares the instances of a service take in one message.
#[derive(Clone, Copy, Debug)]
struct Room {
    prepares_max: u16,
    /// When an instance said this number last.
    said_at: Instant,
}

/// The prepares that wait for the next flush.
#[derive(Debug, Default)]
pub(super) struct PrepareBatcher {
    rooms: BTreeMap<ServiceName, Room>,
    gathered: BTreeMap<ServiceName, Prepares>,
}

impl PrepareBatcher {
    /// An instance of `service` has said how many prepares it takes in one message.
    pub(super) fn announced(&mut self, service: ServiceName, prepares_max: u16, now: Instant) {
        let said = Room { prepares_max, said_at: now };
        if let Some(room) = self.rooms.get_mut(&service) {
            if prepares_max <= room.prepares_max || now - room.said_at >= FEWER_FOR {
                *room = said;
            }
        } else if self.rooms.len() < SERVICES_MAX {
            self.rooms.insert(service, said);
        }
    }

    /// Adds a prepare; `spare`: how many slots are free. Returns the message to publish at once, if any.
    pub(super) fn add(
        &mut self,
        service: &ServiceName,
        prepare: &Prepare,
        spare: u32,
    ) -> Option<Prepares> {
        let prepares_max = self.rooms.get(service).map_or(1, |room| room.prepares_max);
        let abound = spare >= u32::from(prepares_max).saturating_mul(SPARE_FOR_EACH);
        // A repeated prepare may hold up another transaction: it must not wait.
        if prepares_max <= 1 || !abound || prepare.repeated {
            return Some(Prepares::one(prepare));
        }
        let gathered = self.gathered.entry(service.clone()).or_default();
        if !gathered.add(prepare) {
            return Some(std::mem::replace(gathered, Prepares::one(prepare)));
        }
        let is_full = gathered.keys.len() >= usize::from(prepares_max);
        if is_full { self.gathered.remove(service) } else { None }
    }

    /// Takes all messages that were gathered.
    pub(super) fn take(&mut self) -> BTreeMap<ServiceName, Prepares> {
        std::mem::take(&mut self.gathered)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::{FEWER_FOR, PrepareBatcher};
    use crate::{
        protocol::{
            ids::{RequestHash, ServiceName, TransactionId, TransactionKey},
            message::{Payload, Prepare},
            time::Time,
        },
        wire::message::BODY_MAX,
    };

    const PLENTY: u32 = 1000;

    fn service() -> ServiceName {
        ServiceName::parse("payments").unwrap()
    }

    fn prepare(number: usize) -> Prepare {
        let id = TransactionId::parse(&format!("t{number}")).unwrap();
        Prepare {
            key: TransactionKey { id, requested_at: Time::EPOCH },
            request_hash: RequestHash([0; 16]),
            data: Payload::new("{}"),
            deadline: Time::EPOCH,
            repeated: false,
        }
    }

    fn announced(prepares_max: u16) -> PrepareBatcher {
        let mut batcher = PrepareBatcher::default();
        batcher.announced(service(), prepares_max, Instant::now());
        batcher
    }

    /// The number of prepares in each message that is written for `n` prepares.
    fn written(batcher: &mut PrepareBatcher, n: usize, spare: u32) -> Vec<usize> {
        let at_once = (0..n).filter_map(|it| batcher.add(&service(), &prepare(it), spare));
        let mut written: Vec<_> = at_once.map(|it| it.keys.len()).collect();
        written.extend(batcher.take().into_values().map(|it| it.keys.len()));
        written
    }

    #[test]
    fn each_prepare_is_a_message_until_an_instance_has_announced_that_it_takes_more() {
        assert_eq!(written(&mut PrepareBatcher::default(), 3, PLENTY), [1, 1, 1]);
        assert_eq!(written(&mut announced(1), 3, PLENTY), [1, 1, 1]);
        assert_eq!(written(&mut announced(4), 10, PLENTY), [4, 4, 2]);
    }

    #[test]
    fn each_prepare_is_a_message_while_slots_are_scarce() {
        assert_eq!(written(&mut announced(4), 3, 15), [1, 1, 1]);
        assert_eq!(written(&mut announced(4), 3, 16), [3]);
    }

    #[test]
    fn the_smallest_announced_number_counts_for_a_while() {
        let mut batcher = announced(16);
        let now = Instant::now();
        batcher.announced(service(), 1, now);
        batcher.announced(service(), 16, now + FEWER_FOR - Duration::from_secs(1));
        assert_eq!(written(&mut batcher, 2, PLENTY), [1, 1]);
        batcher.announced(service(), 16, now + FEWER_FOR);
        assert_eq!(written(&mut batcher, 2, PLENTY), [2]);
    }

    #[test]
    fn a_repeated_prepare_is_a_message_of_its_own() {
        let mut batcher = announced(16);
        let repeated = Prepare { repeated: true, ..prepare(1) };
        let alone = batcher.add(&service(), &repeated, PLENTY).unwrap();
        assert_eq!(alone.keys, [repeated.key]);
    }

    #[test]
    fn a_message_holds_as_many_prepares_as_fit_and_none_is_lost() {
        let mut batcher = announced(16);
        let data = format!(r#"{{"x":"{}"}}"#, "x".repeat(BODY_MAX / 3));
        let mut messages = Vec::new();
        for number in 0..5 {
            let large = Prepare { data: Payload::new(data.as_str()), ..prepare(number) };
            messages.extend(batcher.add(&service(), &large, PLENTY));
        }
        messages.extend(batcher.take().into_values());
        let keys: Vec<_> = messages.iter().flat_map(|it| it.keys.clone()).collect();
        assert_eq!(keys, (0..5).map(|number| prepare(number).key).collect::<Vec<_>>());
        for message in messages {
            assert_eq!(message.items.len(), message.keys.len());
            assert!(message.items.into_body().len() <= BODY_MAX);
        }
    }
}
