//! A map of transactions, fast enough for several lookups per message: `indexmap`'s, with a hash of the
//! key and an index by id.

use std::hash::{BuildHasherDefault, Hash, Hasher};

use indexmap::IndexMap;

use crate::protocol::{
    ids::{TransactionId, TransactionKey},
    time::Time,
};

/// A map from [`TransactionKey`] that also finds the transactions of one id.
///
/// A lookup takes the same time however many entries there are. Maps with equal contents are equal, and
/// [`KeyMap::keys`] lists them in the same order, however they were built: the hash table below is not
/// visible.
///
/// Many maps here are full most of the time and change all the time. A hash table marks removed entries,
/// and doubles when it is full of marks; the standard library's map then grows with all its values, hours
/// later and by tens of megabytes. Here the table holds only numbers, and the entries lie without gaps in
/// an array.
#[derive(Clone, Debug)]
pub(crate) struct KeyMap<V> {
    /// By id. Nearly always an id has one transaction.
    of: IndexMap<TransactionId, SameIdValues<V>, BuildHasherDefault<ByDigest>>,
    len: usize,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct SameIdValues<V> {
    first: (Time, V),
    /// In the order of `requested_at`, all later than `first`.
    others: Vec<(Time, V)>,
}

impl<V> KeyMap<V> {
    pub(crate) fn new() -> Self {
        Self { of: IndexMap::default(), len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn get(&self, key: &TransactionKey) -> Option<&V> {
        let same_id = self.of.get(&key.id)?;
        if same_id.first.0 == key.requested_at {
            return Some(&same_id.first.1);
        }
        same_id.others.iter().find(|(at, _)| *at == key.requested_at).map(|(_, value)| value)
    }

    pub(crate) fn get_mut(&mut self, key: &TransactionKey) -> Option<&mut V> {
        let same_id = self.of.get_mut(&key.id)?;
        if same_id.first.0 == key.requested_at {
            return Some(&mut same_id.first.1);
        }
        same_id.others.iter_mut().find(|(at, _)| *at == key.requested_at).map(|(_, value)| value)
    }

    pub(crate) fn contains_key(&self, key: &TransactionKey) -> bool {
        self.get(key).is_some()
    }

    /// Inserts `value`, and returns the value that it replaces.
    pub(crate) fn insert(&mut self, key: &TransactionKey, value: V) -> Option<V> {
        let at = key.requested_at;
        let Some(same_id) = self.of.get_mut(&key.id) else {
            self.of.insert(key.id.clone(), SameIdValues { first: (at, value), others: Vec::new() });
            self.len += 1;
            return None;
        };
        if same_id.first.0 == at {
            return Some(std::mem::replace(&mut same_id.first.1, value));
        }
        let later = if at < same_id.first.0 {
            std::mem::replace(&mut same_id.first, (at, value))
        } else {
            (at, value)
        };
        match same_id.others.binary_search_by_key(&later.0, |(at, _)| *at) {
            Ok(place) => Some(std::mem::replace(&mut same_id.others[place].1, later.1)),
            Err(place) => {
                same_id.others.insert(place, later);
                self.len += 1;
                None
            }
        }
    }

    pub(crate) fn remove(&mut self, key: &TransactionKey) -> Option<V> {
        let same_id = self.of.get_mut(&key.id)?;
        let removed = if same_id.first.0 != key.requested_at {
            let place = same_id.others.iter().position(|(at, _)| *at == key.requested_at)?;
            same_id.others.remove(place).1
        } else if same_id.others.is_empty() {
            self.of.swap_remove(&key.id)?.first.1
        } else {
            let next = same_id.others.remove(0);
            std::mem::replace(&mut same_id.first, next).1
        };
        self.len -= 1;
        Some(removed)
    }

    /// The transactions of this id with their `requested_at`, earliest first.
    pub(crate) fn of_id(&self, id: &TransactionId) -> impl Iterator<Item = (Time, &V)> {
        let same_id = self.of.get(id).into_iter();
        same_id
            .flat_map(|it| std::iter::once(&it.first).chain(&it.others))
            .map(|(at, value)| (*at, value))
    }

    /// All keys, in the order of ids.
    pub(crate) fn keys(&self) -> Vec<TransactionKey> {
        let mut keys = Vec::with_capacity(self.len);
        for id in self.of.keys() {
            let key = |(requested_at, _)| TransactionKey { id: id.clone(), requested_at };
            keys.extend(self.of_id(id).map(key));
        }
        keys.sort_unstable();
        keys
    }

    /// All values, in no particular order.
    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.of
            .values()
            .flat_map(|it| std::iter::once(&it.first).chain(&it.others))
            .map(|(_, value)| value)
    }

    /// Changes all values, in no particular order: `change` must treat all alike.
    pub(crate) fn for_each(&mut self, mut change: impl FnMut(&mut V)) {
        for same_id in self.of.values_mut() {
            change(&mut same_id.first.1);
            same_id.others.iter_mut().for_each(|(_, value)| change(value));
        }
    }
}

impl<V: PartialEq> PartialEq for KeyMap<V> {
    fn eq(&self, other: &Self) -> bool {
        self.of == other.of
    }
}

impl<V: Eq> Eq for KeyMap<V> {}

impl<V: Hash> Hash for KeyMap<V> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for key in self.keys() {
            key.hash(state);
            self.get(&key).hash(state);
        }
    }
}

/// Hashes an id by the digest that it has.
#[derive(Default)]
struct ByDigest(u64);

impl Hasher for ByDigest {
    fn write_u64(&mut self, digest: u64) {
        // The table uses the topmost bits, which are the worst ones of FNV-1a.
        self.0 = digest.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::KeyMap;
    use crate::protocol::{
        ids::{TransactionId, TransactionKey},
        time::Time,
    };

    fn key(id: u8, at: u8) -> TransactionKey {
        let id = TransactionId::parse(&format!("t{id}")).unwrap();
        TransactionKey { id, requested_at: Time::from_millis(at.into()) }
    }

    /// Long after it was full, the map took twice the memory: 20 MB in an instance, after 740,000
    /// transactions.
    #[test]
    fn a_full_map_does_not_grow_however_much_comes_and_goes() {
        const HELD: u32 = 1000;
        let many = |number: u32| {
            let id = TransactionId::parse(&format!("load-{number}")).unwrap();
            TransactionKey { id, requested_at: Time::from_millis(7) }
        };
        let mut map = KeyMap::new();
        for number in 0..HELD {
            map.insert(&many(number), number);
        }
        let filled = map.of.capacity();
        for number in HELD..300 * HELD {
            assert_eq!(map.remove(&many(number - HELD)), Some(number - HELD));
            assert_eq!(map.insert(&many(number), number), None);
        }
        assert_eq!(map.of.capacity(), filled);
    }

    proptest! {
        #[test]
        fn it_holds_what_any_map_would(steps in prop::collection::vec((0..3_u8, 0..4_u8, 0..4_u8, any::<u8>()), 0..60)) {
            let (mut map, mut plain) = (KeyMap::new(), BTreeMap::new());
            for (what, id, at, value) in steps {
                let key = key(id, at);
                if what == 0 {
                    prop_assert_eq!(map.remove(&key), plain.remove(&key));
                } else {
                    prop_assert_eq!(map.insert(&key, value), plain.insert(key, value));
                }
                prop_assert_eq!(map.len(), plain.len());
                prop_assert_eq!(map.keys(), plain.keys().cloned().collect::<Vec<_>>());
                for id in 0..4 {
                    let of_id: Vec<_> = map.of_id(&self::key(id, 0).id).map(|(at, it)| (at, *it)).collect();
                    let same: Vec<_> = plain.iter().filter(|(it, _)| it.id == self::key(id, 0).id)
                        .map(|(it, value)| (it.requested_at, *value)).collect();
                    prop_assert_eq!(of_id, same);
                    for at in 0..4 {
                        prop_assert_eq!(map.get(&self::key(id, at)), plain.get(&self::key(id, at)));
                        prop_assert_eq!(map.get_mut(&self::key(id, at)).copied(), plain.get(&self::key(id, at)).copied());
                    }
                }
            }
            let mut other_way_round = KeyMap::new();
            for (key, value) in plain.iter().rev() {
                other_way_round.insert(key, *value);
            }
            prop_assert_eq!(&map, &other_way_round);
        }
    }
}
