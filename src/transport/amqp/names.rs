//! The names of exchanges and queues.
//!
//! All names begin with the namespace, so that several systems can share a virtual host. A routing
//! key reads `<to>.<about>`: the worker, instance or producer that it addresses, and the service or
//! status that it is about. None of these contains a dot.

use std::fmt;

use lapin::types::ShortString;

use crate::protocol::ids::{InstanceId, InvalidName, ReplyToken, ServiceName, WorkerId};

/// The first word of all names of one system.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Namespace(String);

impl Namespace {
    /// The characters allowed, and how many.
    pub const RULE: &'static str = "[A-Za-z0-9._-]{1,64}";

    /// Checks `text` against [`Self::RULE`].
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if (1..=64).contains(&text.len()) && text.bytes().all(allowed) {
            return Ok(Self(text.to_owned()));
        }
        let value = text.chars().take(64).collect();
        Err(InvalidName { what: "namespace", value, rule: Self::RULE })
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self("dtc".to_owned())
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for Namespace {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        Self::parse(text)
    }
}

/// The header of a message that has replaced one of several requests: its request was delivered before.
pub const REPEATED: &str = "repeated";

/// The first part of a routing key that addresses every instance.
pub const ALL: &str = "all";
/// The first part of a routing key that addresses any worker or any instance.
pub const ANY: &str = "any";
/// The routing key of every request.
pub const REQUEST: &str = "request";
/// The header of votes and dones with which an instance states how many prepares one message to it
/// may hold. Without it, one.
pub const PREPARES_MAX: &str = "prepares-max";
/// The reply token for a producer that gave none.
pub const NO_REPLY: &str = "none";

/// All names in one namespace.
///
/// No part of a name is longer than 64 bytes, so that no name exceeds the broker's limit of 255.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Names {
    namespace: Namespace,
}

impl Names {
    /// The names in `namespace`.
    pub fn new(namespace: Namespace) -> Self {
        Self { namespace }
    }

    /// The namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    fn name(&self, rest: impl fmt::Display) -> ShortString {
        format!("{}.{rest}", self.namespace).into()
    }

    // ---- Exchanges ---------------------------------------------------------------------------

    /// The exchange for requests, and the queue bound to it, which all workers share.
    pub fn requests(&self) -> ShortString {
        self.name("requests")
    }

    /// The exchange for prepares.
    pub fn prepare(&self) -> ShortString {
        self.name("prepare")
    }

    /// The exchange for votes and dones, and for prepares that found no slot.
    pub fn replies(&self) -> ShortString {
        self.name("replies")
    }

    /// The exchange for commits, aborts, cancels and queries.
    pub fn finish(&self) -> ShortString {
        self.name("finish")
    }

    /// The exchange for those that any instance may apply.
    pub fn finish_any(&self) -> ShortString {
        self.name("finish.any")
    }

    /// The exchange for results.
    pub fn results(&self) -> ShortString {
        self.name("results")
    }

    // ---- Queues ------------------------------------------------------------------------------

    /// The queue in which a service's prepares wait for a slot.
    pub fn prepare_of(&self, service: &ServiceName) -> ShortString {
        self.name(format_args!("prepare.{service}"))
    }

    /// The queue of one worker.
    pub fn replies_of(&self, worker: &WorkerId) -> ShortString {
        self.name(format_args!("replies.{worker}"))
    }

    /// The queue of one instance.
    pub fn finish_of(&self, service: &ServiceName, instance: &InstanceId) -> ShortString {
        self.name(format_args!("finish.{service}.{instance}"))
    }

    /// The queue of finishes that any instance of a service may apply, present or future.
    pub fn finish_any_of(&self, service: &ServiceName) -> ShortString {
        self.name(format_args!("finish.{service}"))
    }

    /// The queue that holds the id of the store which the instances of a service share.
    pub fn store_of(&self, service: &ServiceName) -> ShortString {
        self.name(format_args!("store.{service}"))
    }

    /// The queue in which finishes wait while that queue is replaced.
    pub fn moving(&self, service: &ServiceName) -> ShortString {
        self.name(format_args!("moving.{service}"))
    }

    /// The stream of decisions.
    pub fn journal(&self) -> ShortString {
        self.name("journal")
    }

    /// The stream of packs: copies of what is in the journal, many messages in one.
    pub fn packed_journal(&self) -> ShortString {
        self.name("journal.packed")
    }

    /// The queue of inquiries, and of messages for workers that are gone; the exchange of the same
    /// name feeds it.
    pub fn inquiries(&self) -> ShortString {
        self.name("inquiries")
    }

    /// The queue of one producer's results.
    pub fn results_of(&self, reply: &ReplyToken) -> ShortString {
        self.name(format_args!("results.{reply}"))
    }

    /// The stream of what is parked and what is settled.
    pub fn unresolved(&self) -> ShortString {
        self.name("unresolved")
    }

    /// The stream for what operators did.
    pub fn audit(&self) -> ShortString {
        self.name("audit")
    }

    /// The queue of messages that could not be read.
    pub fn rejected(&self) -> ShortString {
        self.name("rejected")
    }
}

/// The routing key `<to>.<about>`.
pub fn key(to: impl fmt::Display, about: impl fmt::Display) -> ShortString {
    format!("{to}.{about}").into()
}

/// The parts of a routing key: `(to, about)`.
pub fn parts(key: &str) -> Option<(&str, &str)> {
    key.split_once('.').filter(|(_, about)| !about.contains('.'))
}

#[cfg(test)]
mod tests {
    use super::{Names, Namespace, key, parts};
    use crate::protocol::ids::{InstanceId, ServiceName};

    #[test]
    fn names_begin_with_the_namespace() {
        let names = Names::new(Namespace::parse("shop.test").unwrap());
        let service = ServiceName::parse("payments").unwrap();
        let instance = InstanceId::parse("i1").unwrap();
        assert_eq!(names.finish_of(&service, &instance).as_str(), "shop.test.finish.payments.i1");
        assert_eq!(names.journal().as_str(), "shop.test.journal");
    }

    #[test]
    fn a_key_and_its_parts_are_one() {
        assert_eq!(parts(key("w1", "payments").as_str()), Some(("w1", "payments")));
        assert_eq!(parts("w1"), None);
        assert_eq!(parts("a.b.c"), None);
    }

    #[test]
    fn the_longest_names_fit_into_what_the_broker_allows() {
        let longest = "x".repeat(64);
        let names = Names::new(Namespace::parse(&longest).unwrap());
        let service = ServiceName::parse(&longest).unwrap();
        let instance = InstanceId::parse(&longest).unwrap();
        assert!(names.finish_of(&service, &instance).as_str().len() <= 255);
    }

    #[test]
    fn a_namespace_has_no_wildcards_or_blanks() {
        for bad in ["", "a b", "a#", "*", "ü", &"x".repeat(65)] {
            assert!(Namespace::parse(bad).is_err(), "{bad:?}");
        }
    }
}
