//! Unique names for workers, instances and producers without a configured one.
//!
//! The standard library has what is needed of the system's random source, so no crate is used for it.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Sixty-four random bits: no other process is likely to draw the same.
///
/// They come from the keys with which the standard library seeds its hash maps, which it takes from
/// the system's random source.
pub fn number() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// A name of 16 characters: letters and digits only.
pub fn name(prefix: char) -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut bits = u128::from(number()) << 64 | u128::from(number());
    let mut name = String::from(prefix);
    for _ in 0..15 {
        name.push(char::from(DIGITS[(bits % 36) as usize]));
        bits /= 36;
    }
    name
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::name;
    use crate::protocol::ids::InstanceId;

    #[test]
    fn names_are_names_and_differ() {
        let names: BTreeSet<_> = (0..1000).map(|_| name('i')).collect();
        assert_eq!(names.len(), 1000);
        assert!(names.iter().all(|name| InstanceId::parse(name).is_ok()));
    }
}
