//! The names of things: checked once when they come in, cheap to copy afterwards.
//!
//! A name never says more than which thing is meant. Nothing here makes names up; who needs a new
//! one (an instance its branches, a worker its own id) is given it or counts.

use std::{
    cmp::Ordering,
    fmt,
    hash::{Hash, Hasher},
    sync::Arc,
};

use crate::protocol::time::Time;

/// A text that is not the name it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidName {
    /// What the text was meant to name, for example `transaction id`.
    pub what: &'static str,
    /// The text as it came, cut after 64 characters.
    pub value: String,
    /// The rule it breaks.
    pub rule: &'static str,
}

impl fmt::Display for InvalidName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:?} must match {}", self.what, self.value, self.rule)
    }
}

impl std::error::Error for InvalidName {}

/// A text that many share: it is compared with itself most of the time. One pointer wide, since
/// names are moved about more often than they are read.
#[derive(Clone)]
struct Shared(Arc<Box<str>>);

impl Hash for Shared {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl From<&str> for Shared {
    fn from(text: &str) -> Self {
        Self(Arc::new(text.into()))
    }
}

impl AsRef<str> for Shared {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl PartialEq for Shared {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
    }
}

impl Eq for Shared {}

impl PartialOrd for Shared {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Shared {
    fn cmp(&self, other: &Self) -> Ordering {
        if Arc::ptr_eq(&self.0, &other.0) { Ordering::Equal } else { self.0.cmp(&other.0) }
    }
}

/// A text that is compared by a digest of it first: in a map of many, that saves a look at most of
/// the texts. Its order means nothing, but is the same everywhere.
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

/// The 64-bit FNV-1a digest: no quality is needed but that near texts scatter.
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
                let value = text.chars().take(64).collect();
                Err(InvalidName { what: $what, value, rule: Self::RULE })
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
    /// What a producer calls its transaction. Two requests with one id are told apart by their
    /// `requested_at`: see [`TransactionKey`]. Its order is not that of the text.
    TransactionId(Scattered): "transaction id", 128, "._:-";
    /// A named participant with one durable state.
    ServiceName(Shared): "service name", 64, "_-";
    /// One running process of a service. A process started again is another instance.
    InstanceId(Shared): "instance id", 64, "_-";
    /// One process of the coordinator.
    WorkerId(Shared): "worker id", 64, "_-";
    /// What a service keeps its branches in. All its instances share one, so all name the same.
    StoreId(Shared): "store id", 64, "_-";
    /// Where a producer wants its result: a token of its own, never a queue name.
    ReplyToken(Shared): "reply token", 64, "_-";
}

impl TransactionId {
    /// Says little of the text, and always the same.
    pub(crate) fn digest(&self) -> u64 {
        self.0.0.digest
    }
}

/// One run of a service's prepare for a transaction. Made by the instance that runs it, stored with
/// what it prepared, and named by the decision that commits it. As text: `<instance>.<number>`.
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
            // One branch has one text.
            let canonical = number == "0" || !number.starts_with(['0', '+']);
            let number = number.parse().ok().filter(|_| canonical)?;
            Some(Self { instance: InstanceId::parse(instance).ok()?, number })
        });
        let value = || text.chars().take(64).collect();
        parts.ok_or_else(|| InvalidName { what: "branch", value: value(), rule: Self::RULE })
    }

    /// The instance that made it.
    pub fn instance(&self) -> &InstanceId {
        &self.instance
    }

    /// Which one of that instance's it is.
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl fmt::Display for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.instance, self.number)
    }
}

impl fmt::Debug for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What names a transaction everywhere and in every message.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransactionKey {
    /// What the producer calls it.
    pub id: TransactionId,
    /// When the producer asked for it, by the producer's clock. A retry repeats it.
    pub requested_at: Time,
}

impl fmt::Display for TransactionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.id, self.requested_at.as_millis())
    }
}

impl fmt::Debug for TransactionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A digest of a request's services and data: what tells a retry from another request under the
/// same id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestHash(pub [u8; 16]);

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
    use super::{Branch, InstanceId, ServiceName, TransactionId};

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
}
