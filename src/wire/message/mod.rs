//! The bodies of all messages between producers, workers, services and the journal.
//!
//! A message has the properties `content_type` `application/json` and `type` `dtc.<kind>.v1`. A body is an
//! array of items of its one kind; that of requests is one object, or an array of 1 to
//! [`REQUESTS_MAX`](crate::protocol::request_messages::REQUESTS_MAX). A body has at most [`BODY_MAX`] bytes
//! of UTF-8.
//!
//! | kind | fields of an item (`?`: may be missing) |
//! |---|---|
//! | request | `id`, `involved_services`, `data`, `timeout_ms`?, `answer`?, `reply`?; `requested_at` is the message's `timestamp` |
//! | prepare | `id`, `requested_at`, `request_hash`, `data`, `deadline`, `repeated` |
//! | query | `id`, `requested_at`, `request_hash` |
//! | cancel | `id`, `requested_at` |
//! | finish | `id`, `requested_at`, `outcome`, `branch`?, `parked`? |
//! | vote | `id`, `requested_at`, `request_hash`, `service`, `instance`, `store`?, `vote`, `branch`?, `outcome`?, `reason`?, `free` |
//! | done | `id`, `requested_at`, `service`, `instance`, `store`?, `done`, `error`?, `parked`?, `free` |
//! | inquiry | `id`, `requested_at`, `request_hash`, `service`, `instance`, `branch`, `deadline` |
//! | decision | `id`, `requested_at`, `request_hash`, `outcome`, `branches`, `reason`?, `decided_at`, `worker` |
//! | result | `id`, `status`, `reason`?, `unresolved`?, `requested_at`, `decided_at` |
//! | parked | `id`, `requested_at`, `service`?, `branch`?, `error`?, `request_hash`?, `request`?, `parked_at` |
//! | settled | `id`, `requested_at`, `service`, `settled_at`, `worker` |
//! | journal-begun | `complete_since` |
//! | pack | `offset`, `message_id`?, `try`?, `body` |
//!
//! | field | value | if missing |
//! |---|---|---|
//! | `id` | `[A-Za-z0-9._:-]{1,128}` | |
//! | `requested_at` | whole seconds since the Unix epoch, up to the end of the year 9999 | |
//! | `deadline`, `decided_at`, `parked_at`, `settled_at`, `complete_since` | whole milliseconds since the Unix epoch, up to the end of the year 9999 | |
//! | `request_hash` | 32 lower-case hexadecimal digits: see [`hash`](crate::wire::hash) | |
//! | `service`, `instance`, `store`, `worker`, `reply`, each of `involved_services` and `unresolved` | `[A-Za-z0-9_-]{1,64}` | `unresolved`: none; `reply`: `none` |
//! | `involved_services` | array of 1 to [`SERVICES_MAX`] names; one named twice counts once | |
//! | `data` | any object, in which no field is given twice | |
//! | `timeout_ms` | whole number from 1 to 86400000 (a day) | the worker's `prepare_timeout` |
//! | `answer` | `applied` or `decided` | `applied` |
//! | `branch` | `<instance>.<number>`, the number below 2^64 and without leading zeros; required in votes `prepared` and `failed` | in a finish: nothing of this service is committed |
//! | `branches` | object: the branch of each service | |
//! | `outcome`, `status` | `COMMITTED` or `ABORTED`; `outcome` is required in a vote `finished` | |
//! | `vote` | `prepared`, `read_only`, `refused`, `failed` or `finished` | |
//! | `reason` | object: `service`?, `code`, `message`? | in a vote: the vote as code, and its service |
//! | `code` | `refused`, `failed`, `no_slot`, `unknown_service`, `deadline`, `unavailable`, `cancelled`, `invalid` or `id_reused` | |
//! | `message`, `error` | any text, cut after [`TEXT_MAX`] characters | `error` of a done: empty |
//! | `done`, `repeated`, `parked`, `begins` | `true` or `false` | `parked`: `false` |
//! | `free` | whole number of slots, up to 4294967295 | |
//! | `offset` | whole number up to 2^53: the place of a message in the journal | |
//! | `message_id` | `[ -~]{0,255}` | the message had none |
//! | `body` | any text: that of the message, letter by letter | |
//! | `try` | object: `id`, `requested_at`, `begins` | the message was no try |
//! | `request` | as the body of a request; required, with its `request_hash`, if the transaction itself is parked; otherwise `service` and `branch` are required | |
//!
//! **Unknown fields** are ignored, since they come from a newer release; a field given twice is an
//! error. An optional field may also be `null`, except in a request. The values of `vote`, `code`
//! and `outcome` are final in `v1`: all must read the journal alike.
//!
//! **What is too large.** A request has at most [`REQUEST_MAX`] bytes and [`SERVICES_MAX`]
//! services, so that every message that follows from it fits into [`BODY_MAX`], at worst as its
//! only item: its prepare and its parked record are some hundred bytes larger, and a decision that
//! names a branch of every service has up to 157 bytes for each. A request is nested at most 100
//! deep, also in an array.
//!
//! **Invariant:** no body, however broken, makes this code panic; it leads to complaints.

mod answer;
mod command;
mod entry;
mod pack;
mod read;
mod record;
mod request;
mod write;

use crate::{
    complaint::Complaints,
    json::check::{JsonPath, without_byte_order_mark},
    protocol::message::Command,
};

pub use self::{
    command::Cancel,
    entry::{Begun, Entry, EntryMalformed, Finished},
    pack::PackedMessage,
    record::{JournalBegun, Settled},
    request::{
        DecodedRequests, REQUEST_MAX, RequestBody, RequestItem, RequestMalformed, RequestTooLarge,
        SERVICES_MAX, decode_request, decode_requests, encode_request,
    },
};

/// How many bytes a body may have: 256 KiB.
pub const BODY_MAX: usize = 256 * 1024;

/// To how many characters an error text of a service is cut, so that no error text makes a message
/// too large.
pub const TEXT_MAX: usize = 1024;

/// The last second of the year 9999: a later time is a mistake, such as milliseconds given for
/// seconds.
const TIME_MAX_SECONDS: u64 = 253_402_300_799;

/// The kind of a message, by its property `type`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// A producer requests a transaction.
    Request,
    /// Prepare to commit, and vote.
    Prepare,
    /// Who holds this transaction?
    Query,
    /// Withdraw a prepare that still waits for a slot.
    Cancel,
    /// The outcome, for a service.
    Finish,
    /// The answer to a prepare or a query.
    Vote,
    /// The answer to a finish.
    Done,
    /// What is the outcome of this transaction?
    Inquiry,
    /// A record of the journal.
    Decision,
    /// The outcome, for the producer.
    Result,
    /// A commit or a transaction that is parked for an operator.
    Parked,
    /// A parked commit was applied.
    Settled,
    /// The first record of a journal.
    JournalBegun,
    /// Messages of the journal, copied.
    Pack,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 14] = [
        Self::Request,
        Self::Prepare,
        Self::Query,
        Self::Cancel,
        Self::Finish,
        Self::Vote,
        Self::Done,
        Self::Inquiry,
        Self::Decision,
        Self::Result,
        Self::Parked,
        Self::Settled,
        Self::JournalBegun,
        Self::Pack,
    ];

    /// The value of the property `type`.
    pub const fn as_type(self) -> &'static str {
        match self {
            Self::Request => "dtc.request.v1",
            Self::Prepare => "dtc.prepare.v1",
            Self::Query => "dtc.query.v1",
            Self::Cancel => "dtc.cancel.v1",
            Self::Finish => "dtc.finish.v1",
            Self::Vote => "dtc.vote.v1",
            Self::Done => "dtc.done.v1",
            Self::Inquiry => "dtc.inquiry.v1",
            Self::Decision => "dtc.decision.v1",
            Self::Result => "dtc.result.v1",
            Self::Parked => "dtc.parked.v1",
            Self::Settled => "dtc.settled.v1",
            Self::JournalBegun => "dtc.journal-begun.v1",
            Self::Pack => "dtc.pack.v1",
        }
    }

    /// The kind whose [`Kind::as_type`] is `text`.
    pub fn parse_type(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_type() == text)
    }

    /// The kind of message that carries `command`.
    pub const fn of(command: &Command) -> Self {
        match command {
            Command::Query(_) => Self::Query,
            Command::Finish(_) => Self::Finish,
            Command::Cancel(_) => Self::Cancel,
        }
    }

    /// The kind in one word, for complaints.
    fn word(self) -> &'static str {
        let name = self.as_type();
        name.strip_prefix("dtc.").and_then(|name| name.strip_suffix(".v1")).unwrap_or(name)
    }
}

/// An element of the array in a body.
pub trait Item: sealed::Sealed {
    /// The kind of such items.
    const KIND: Kind;
}

mod sealed {
    use crate::wire::message::{
        read::{BodyReader, ParsedObject},
        write::ObjectWriter,
    };

    /// How an item is written and read.
    pub trait Sealed: Sized {
        fn write(&self, object: &mut ObjectWriter<'_>);

        /// The item at `object`; it complains about all errors in it.
        fn read(reader: &mut BodyReader, object: &ParsedObject<'_, '_, '_>) -> Option<Self>;
    }
}

/// A body under construction: items of one kind.
///
/// ```
/// # use dtc::{protocol::time::Time, wire::message::{Items, JournalBegun}};
/// let mut items = Items::new();
/// items.push(&JournalBegun { complete_since: Time::EPOCH })?;
/// assert_eq!(items.into_body(), br#"[{"complete_since":0}]"#);
/// # Ok::<(), dtc::wire::message::BodyFull>(())
/// ```
#[derive(Clone, Debug)]
pub struct Items {
    /// Without the closing bracket.
    body: Vec<u8>,
    len: usize,
    kind: Option<Kind>,
}

/// An item does not fit into a body with those that are in it: send that body first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a body of {len} items has no room for one more")]
pub struct BodyFull {
    /// How many items there are.
    pub len: usize,
}

impl Items {
    /// A body without items.
    pub fn new() -> Self {
        Self { body: vec![b'['], len: 0, kind: None }
    }

    /// Adds `item`, which must be of the same kind as the earlier ones.
    ///
    /// # Errors
    ///
    /// The body would have more than [`BODY_MAX`] bytes, and is unchanged. An empty one takes any
    /// item, since none is that large by itself.
    pub fn push<T: Item>(&mut self, item: &T) -> Result<(), BodyFull> {
        debug_assert!(self.kind.is_none_or(|kind| kind == T::KIND), "a body has one kind");
        let before = self.body.len();
        if self.len > 0 {
            self.body.push(b',');
        }
        let mut object = write::ObjectWriter::new(&mut self.body);
        item.write(&mut object);
        object.end();
        if self.size() > BODY_MAX && self.len > 0 {
            self.body.truncate(before);
            return Err(BodyFull { len: self.len });
        }
        self.len += 1;
        self.kind = Some(T::KIND);
        Ok(())
    }

    /// [`Items::push`] for a command of any kind.
    ///
    /// # Errors
    ///
    /// As for [`Items::push`].
    pub fn push_command(&mut self, command: &Command) -> Result<(), BodyFull> {
        match command {
            Command::Query(query) => self.push(query),
            Command::Finish(finish) => self.push(finish),
            Command::Cancel(key) => self.push(&Cancel(key.clone())),
        }
    }

    /// The kind of the items, if there are any.
    pub fn kind(&self) -> Option<Kind> {
        self.kind
    }

    /// How many items there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no items.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many bytes the body has.
    pub fn size(&self) -> usize {
        self.body.len() + 1
    }

    /// The body.
    pub fn into_body(mut self) -> Vec<u8> {
        self.body.push(b']');
        self.body
    }
}

impl Default for Items {
    fn default() -> Self {
        Self::new()
    }
}

/// Why a body, or an item in it, can't be read.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Malformed {
    /// The body is larger than the limit, and is not read.
    #[error("the body has {size} bytes: must have at most {BODY_MAX}")]
    TooLarge {
        /// How many bytes it has.
        size: usize,
    },
    /// All errors in it.
    #[error("{0}")]
    Invalid(Complaints),
}

/// The items of `body`, in order; a malformed item is an error among the good ones.
///
/// # Errors
///
/// The body is not an array, or too large.
pub fn decode<T: Item>(body: &[u8]) -> Result<Vec<Result<T, Malformed>>, Malformed> {
    if body.len() > BODY_MAX {
        return Err(Malformed::TooLarge { size: body.len() });
    }
    let mut reader = read::BodyReader::new(T::KIND.word());
    let value = reader.json(without_byte_order_mark(body));
    let value = reader.or_complaints(value).map_err(Malformed::Invalid)?;
    let elements = reader.check.elements(&JsonPath::TOP, &value, "an array of items");
    let elements = reader.or_complaints(elements).map_err(Malformed::Invalid)?;
    let items = elements.iter().enumerate().map(|(index, value)| {
        let object = read::ParsedObject { path: JsonPath::TOP.element(index), value };
        let item = T::read(&mut reader, &object);
        reader.or_complaints(item).map_err(Malformed::Invalid)
    });
    Ok(items.collect())
}

/// Applies `understand` to the good items of a message, and returns the results and the complaints
/// about the other items. More than ten complaints are only counted: a message of nothing but
/// commas would fill a log.
#[cfg(any(feature = "service", feature = "worker"))]
pub(crate) fn split_items<T, U>(
    items: Vec<Result<T, Malformed>>,
    understand: impl Fn(T) -> Result<U, String>,
) -> (Vec<U>, Vec<String>) {
    const COMPLAINTS_MAX: usize = 10;
    let (mut understood, mut complaints, mut unlisted) = (Vec::new(), Vec::new(), 0_usize);
    for item in items {
        match item {
            Ok(item) => match understand(item) {
                Ok(item) => understood.push(item),
                Err(complaint) if complaints.len() < COMPLAINTS_MAX => complaints.push(complaint),
                Err(_) => unlisted += 1,
            },
            Err(malformed) if complaints.len() < COMPLAINTS_MAX => {
                complaints.push(malformed.to_string());
            }
            Err(_) => unlisted += 1,
        }
    }
    if unlisted > 0 {
        complaints.push(format!("and {unlisted} more items"));
    }
    (understood, complaints)
}

/// `text` up to [`TEXT_MAX`] characters.
fn cut(text: &str) -> &str {
    if text.len() <= TEXT_MAX {
        return text;
    }
    let end = text.char_indices().nth(TEXT_MAX).map_or(text.len(), |(end, _)| end);
    text.get(..end).unwrap_or(text)
}
