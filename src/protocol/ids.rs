//! Names: checked once when they come in, cheap to copy afterwards.
//!
//! A name identifies a thing and says nothing else about it. Nothing here makes up a name: an instance
//! numbers its branches, and everything else is given its name.
//!
//! # What a service stores
//!
//! A service stores what it prepares under its [`TransactionKey`] and its [`Branch`], with its
//! [`RequestHash`] and its deadline, a [`Time`]; and it must tell them again after a restart. Each has
//! one text: `to_string` writes it, `parse` reads it and nothing else. These texts are stable: a later
//! version of this crate writes the same, and reads what an earlier one has written.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use dtc::{Branch, RequestHash, Time, TransactionKey};
//!
//! let key: TransactionKey = "order-17@1764497314000".parse()?;
//! let branch: Branch = "i4f0x9k2m1q7z3w8.12".parse()?;
//! let request_hash: RequestHash = "0f1e2d3c4b5a69788796a5b4c3d2e1f0".parse()?;
//! let deadline: Time = "1764497319000".parse()?;
//!
//! assert_eq!(key.id.as_str(), "order-17");
//! assert_eq!(key.to_string(), "order-17@1764497314000");
//! # let _ = (branch, request_hash, deadline);
//! # Ok(())
//! # }
//! ```

use std::{
    cmp::Ordering,
    fmt,
    hash::{Hash, Hasher},
    sync::Arc,
};

use crate::protocol::time::Time;

/// A text that is not a valid name.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct InvalidName {
    /// What the text was meant to name, for example `transaction id`.
    pub what: &'static str,
    /// The text as it came, cut after 64 characters.
    pub value: String,
    /// The rule it breaks.
    pub rule: &'static str,
}

impl InvalidName {
    fn of(what: &'static str, text: &str, rule: &'static str) -> Self {
        Self { what, value: text.chars().take(64).collect(), rule }
    }
}

impl fmt::Display for InvalidName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} must match {}", self.what, self.value, self.rule)
    }
}

impl std::error::Error for InvalidName {}

/// A shared text. It is mostly compared with itself. It is one pointer wide, since names are moved more
/// often than they are read.
#[derive(Clone)]
struct SharedText(Arc<Box<str>>);

impl Hash for SharedText {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl From<&str> for SharedText {
    fn from(text: &str) -> Self {
        Self(Arc::new(text.into()))
    }
}

impl AsRef<str> for SharedText {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl PartialEq for SharedText {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
    }
}

impl Eq for SharedText {}

impl PartialOrd for SharedText {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SharedText {
    fn cmp(&self, other: &Self) -> Ordering {
        if Arc::ptr_eq(&self.0, &other.0) { Ordering::Equal } else { self.0.cmp(&other.0) }
    }
}

/// A text that is compared by its digest first: in a large map, that avoids reading most of the texts. The
/// order has no meaning, but is the same everywhere.
#[derive(Clone)]
struct Scattered(Arc<Digested>);

struct Digested {
    digest: u64,
    text: Box<str>,
}

impl From<&str> for Scattered {
    fn from(text: &str) -> Self {
        Self(Arc::new(Digested { digest: fnv1a(text.bytes()), text: text.into() }))
    }
}

impl AsRef<str> for Scattered {
    fn as_ref(&self) -> &str {
        &self.0.text
    }
}

impl PartialEq for Scattered {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Scattered {}

impl PartialOrd for Scattered {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scattered {
    fn cmp(&self, other: &Self) -> Ordering {
        if Arc::ptr_eq(&self.0, &other.0) {
            return Ordering::Equal;
        }
        let by_digest = self.0.digest.cmp(&other.0.digest);
        by_digest.then_with(|| self.0.text.cmp(&other.0.text))
    }
}

impl Hash for Scattered {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0.digest);
    }
}

/// The 64-bit FNV-1a digest. All that is needed is that similar texts have different digests.
pub(crate) fn fnv1a(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |digest, byte| {
        (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

macro_rules! names {
    ($($(#[$doc:meta])* $name:ident($text:ty): $what:literal, $max:literal, $extra:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name($text);

        impl $name {
            /// The characters allowed, and how many.
            pub const RULE: &'static str = concat!("[A-Za-z0-9", $extra, "]{1,", $max, "}");

            /// Checks `text` against [`Self::RULE`].
            pub fn parse(text: &str) -> Result<Self, InvalidName> {
                let allowed =
                    |byte: u8| byte.is_ascii_alphanumeric() || $extra.as_bytes().contains(&byte);
                if (1..=$max).contains(&text.len()) && text.bytes().all(allowed) {
                    return Ok(Self(text.into()));
                }
                Err(InvalidName::of($what, text, Self::RULE))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                self.0.as_ref()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidName;
            fn from_str(text: &str) -> Result<Self, InvalidName> {
                Self::parse(text)
            }
        }
    )*};
}

names! {
    /// A producer's name for its transaction. Two requests with one id are distinguished by
    /// `requested_at`: see [`TransactionKey`]. The order is not that of the text.
    TransactionId(Scattered): "transaction id", 128, "._:-";
    /// A named participant with one durable state.
    ServiceName(SharedText): "service name", 64, "_-";
    /// One running process of a service. A process started again is another instance.
    InstanceId(SharedText): "instance id", 64, "_-";
    /// One process of the coordinator.
    WorkerId(SharedText): "worker id", 64, "_-";
    /// The store in which a service keeps its branches. All its instances share one, so all name the same.
    StoreId(SharedText): "store id", 64, "_-";
    /// Where a producer wants its result: its own token, never the name of a queue.
    ReplyToken(SharedText): "reply token", 64, "_-";
}

impl TransactionId {
    /// A digest of the text, always the same.
    pub(crate) fn digest(&self) -> u64 {
        self.0.0.digest
    }
}

/// One run of a service's prepare for a transaction. The instance that runs it makes the name, stores it
/// with what it has prepared, and the decision that commits the run names it.
///
/// As text it is `<instance>.<number>`, the number in decimal and without leading zeros. This form is
/// stable.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Branch {
    instance: InstanceId,
    number: u64,
}

impl Branch {
    /// What a branch looks like.
    pub const RULE: &'static str = "[A-Za-z0-9_-]{1,64}[.](0|[1-9][0-9]{0,19})";

    /// The `number`th branch that `instance` makes.
    pub fn of(instance: &InstanceId, number: u64) -> Self {
        Self { instance: instance.clone(), number }
    }

    /// Checks `text` against [`Self::RULE`].
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let parts = text.rsplit_once('.').and_then(|(instance, number)| {
            // A branch has only one text.
            let canonical = number == "0" || !number.starts_with(['0', '+']);
            let number = number.parse().ok().filter(|_| canonical)?;
            Some(Self { instance: InstanceId::parse(instance).ok()?, number })
        });
        parts.ok_or_else(|| InvalidName::of("branch", text, Self::RULE))
    }

    /// The instance that made it.
    pub fn instance(&self) -> &InstanceId {
        &self.instance
    }

    /// Its number among that instance's branches.
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl fmt::Display for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.instance, self.number)
    }
}

impl std::str::FromStr for Branch {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        Self::parse(text)
    }
}

impl fmt::Debug for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Identifies a transaction, everywhere and in every message.
///
/// As text it is `<id>@<requested_at>`, the moment in milliseconds since the Unix epoch, in decimal and
/// without leading zeros. No id has an `@`. This form is stable.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransactionKey {
    /// The producer's name for it.
    pub id: TransactionId,
    /// When the producer requested it, by the producer's clock. A retry repeats this moment.
    pub requested_at: Time,
}

impl TransactionKey {
    /// What a transaction's key looks like.
    pub const RULE: &'static str = "[A-Za-z0-9._:-]{1,128}@(0|[1-9][0-9]{0,19})";

    /// Checks `text` against [`Self::RULE`].
    ///
    /// # Errors
    ///
    /// The text is not that of a key.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let parts = text.split_once('@').and_then(|(id, requested_at)| {
            let requested_at = Time::parse(requested_at).ok()?;
            Some(Self { id: TransactionId::parse(id).ok()?, requested_at })
        });
        parts.ok_or_else(|| InvalidName::of("transaction key", text, Self::RULE))
    }
}

impl fmt::Display for TransactionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.id, self.requested_at)
    }
}

impl std::str::FromStr for TransactionKey {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        Self::parse(text)
    }
}

impl fmt::Debug for TransactionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A digest of a request's services and data: it distinguishes a retry from another request under the same
/// id.
///
/// As text it is 32 hexadecimal digits in lower case. This form is stable.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestHash(pub [u8; 16]);

impl RequestHash {
    /// What a digest looks like.
    pub const RULE: &'static str = "[0-9a-f]{32}";

    /// Checks `text` against [`Self::RULE`].
    ///
    /// # Errors
    ///
    /// The text is not that of a digest.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        digits_of(text).map(Self).ok_or_else(|| InvalidName::of("request hash", text, Self::RULE))
    }
}

/// The bytes that `text` writes in hexadecimal, each with two digits.
fn digits_of(text: &str) -> Option<[u8; 16]> {
    let nibble = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; 16];
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if pairs.len() != bytes.len() || !rest.is_empty() {
        return None;
    }
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = nibble(*high)? << 4 | nibble(*low)?;
    }
    Some(bytes)
}

impl std::str::FromStr for RequestHash {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        Self::parse(text)
    }
}

impl fmt::Display for RequestHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for RequestHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        Branch, InstanceId, RequestHash, ServiceName, Time, TransactionId, TransactionKey,
    };

    #[test]
    fn names_keep_to_their_characters_and_lengths() {
        for good in ["a", "A-1_b", &"x".repeat(64)] {
            assert_eq!(ServiceName::parse(good).map(|name| name.to_string()).as_deref(), Ok(good));
        }
        for bad in ["", "a b", "a.b", "pay/ments", "ünïcode", "a\n", &"x".repeat(65)] {
            assert!(ServiceName::parse(bad).is_err(), "{bad:?}");
        }
        assert!(TransactionId::parse("order:17.b-2_c").is_ok());
        assert!(TransactionId::parse(&"x".repeat(129)).is_err());
    }

    #[test]
    fn the_complaint_names_what_the_value_and_the_rule() {
        let complaint = TransactionId::parse("a b").unwrap_err().to_string();
        assert_eq!(complaint, r#"transaction id "a b" must match [A-Za-z0-9._:-]{1,128}"#);
    }

    #[test]
    fn a_branch_and_its_text_are_one() {
        let instance = InstanceId::parse(&"i".repeat(64)).unwrap();
        for number in [0, 1, u64::MAX] {
            let branch = Branch::of(&instance, number);
            assert_eq!(Branch::parse(&branch.to_string()), Ok(branch));
        }
        for bad in ["", "i", "i.", ".1", "i.01", "i.+1", "i.-1", "i.1.1", "i.18446744073709551616"]
        {
            assert!(Branch::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_key_and_its_text_are_one() {
        for id in ["a", "order:17.b-2_c", &"x".repeat(128)] {
            for millis in [0, 1_764_497_314_000, u64::MAX] {
                let id = TransactionId::parse(id).unwrap();
                let key = TransactionKey { id, requested_at: Time::from_millis(millis) };
                assert_eq!(TransactionKey::parse(&key.to_string()), Ok(key));
            }
        }
        for bad in ["", "a", "a@", "@1", "a@01", "a@+1", "a@1@2", "a b@1", "a@1ms", "a@1 "] {
            assert!(TransactionKey::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_request_hash_and_its_text_are_one() {
        for byte in 0..=u8::MAX {
            let mut hash = RequestHash([byte; 16]);
            hash.0[0] = 0x0f;
            assert_eq!(RequestHash::parse(&hash.to_string()), Ok(hash));
        }
        let good = "0f1e2d3c4b5a69788796a5b4c3d2e1f0";
        assert!(RequestHash::parse(good).is_ok());
        let bad =
            [&good[1..], &good.replace('f', "F"), &good.replace('f', "g"), "", &good.repeat(2)];
        for bad in bad {
            assert!(RequestHash::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_texts_that_services_have_stored_are_written_and_read_as_ever() {
        for key in ["order-17@1764497314000", "a.b:c_d@0"] {
            assert_eq!(key.parse::<TransactionKey>().map(|it| it.to_string()).as_deref(), Ok(key));
        }
        let branch = "i4f0x9k2m1q7z3w8.12";
        assert_eq!(branch.parse::<Branch>().map(|it| it.to_string()).as_deref(), Ok(branch));
        let hash = "0f1e2d3c4b5a69788796a5b4c3d2e1f0";
        assert_eq!(hash.parse::<RequestHash>().map(|it| it.to_string()).as_deref(), Ok(hash));
        let key = TransactionKey {
            id: TransactionId::parse("order-17").unwrap(),
            requested_at: Time::from_millis(1_764_497_314_000),
        };
        assert_eq!(key.to_string(), "order-17@1764497314000");
        assert_eq!(Branch::of(&InstanceId::parse("i").unwrap(), 12).to_string(), "i.12");
        assert_eq!(RequestHash([0xa0; 16]).to_string(), "a0".repeat(16));
    }

    #[test]
    fn a_text_that_is_no_key_branch_or_hash_is_shown_with_the_rule() {
        let complaints = [
            TransactionKey::parse("order-17").unwrap_err(),
            Branch::parse("i-12").unwrap_err(),
            RequestHash::parse("0F").unwrap_err(),
        ];
        assert_eq!(
            complaints.map(|it| it.to_string()),
            [
                r#"transaction key "order-17" must match [A-Za-z0-9._:-]{1,128}@(0|[1-9][0-9]{0,19})"#,
                r#"branch "i-12" must match [A-Za-z0-9_-]{1,64}[.](0|[1-9][0-9]{0,19})"#,
                r#"request hash "0F" must match [0-9a-f]{32}"#,
            ]
        );
    }
}
