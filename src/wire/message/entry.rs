//! The entries of a journal file: each is a tag of one byte and a text.
//!
//! | tag | text | meaning |
//! |---|---|---|
//! | `o` | `{"worker","opened_at"}` | a process has opened the file, under the name `worker` |
//! | `b` | `{"id","requested_at","request_hash","involved_services","timeout_ms"?,"worker"}`, a line feed, and the request's data unchanged | `worker` has begun this request |
//! | `d` | a decision, as on the wire | |
//! | `f` | a decision, and `"unresolved"` services if there are any | the transaction is finished, except at these services |
//! | `c` | `{"closed_at"}` | the process has ended and left nothing unfinished |
//!
//! The fields are those of the messages, and unknown ones are ignored in the same way. The limits
//! of messages don't apply: a text may have any length, and data any depth.
//!
//! **Invariant:** no text, however broken, makes this code panic.

use std::{sync::Arc, time::Duration};

use crate::{
    complaint::Complaints,
    json::check::JsonPath,
    protocol::{
        ids::{ServiceName, WorkerId},
        message::{AnswerAt, Decision, Payload, Request},
        time::Time,
    },
    wire::{
        hash::request_hash,
        message::{
            read::{BodyReader, ParsedObject},
            sealed::Sealed as _,
            write::ObjectWriter,
        },
    },
};

/// The largest number up to which a double is exact: enough milliseconds for any time-out.
const MILLIS_MAX: u64 = 1 << 53;

/// One entry of a journal file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Entry {
    /// A process has opened the file.
    Opened {
        /// Its name, as a worker and as an instance of its services.
        worker: WorkerId,
        /// When.
        opened_at: Time,
    },
    /// A transaction is in flight from here on.
    Begun(Begun),
    /// A decision: the first one of its transaction is the outcome.
    Decided(Arc<Decision>),
    /// A transaction is finished.
    Finished(Finished),
    /// The process has ended in an orderly way.
    Closed {
        /// When.
        closed_at: Time,
    },
}

/// A request that was begun, and the worker that began it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Begun {
    /// The request.
    pub request: Request,
    /// The worker that began it first.
    pub worker: WorkerId,
}

/// The end of a transaction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finished {
    /// Its outcome.
    pub decision: Arc<Decision>,
    /// The services whose commit is parked.
    pub unresolved: Vec<ServiceName>,
}

/// Why an entry can't be understood.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EntryMalformed {
    /// There are no entries with this tag.
    #[error("there are no entries of kind {:?}", char::from(*.0))]
    Tag(u8),
    /// All errors in it.
    #[error("{0}")]
    Invalid(Complaints),
    /// A request without data, or whose data is not UTF-8.
    #[error("its data is no text")]
    NoData,
    /// The request's hash is not that of its services and data.
    #[error("its request_hash is not that of its services and data")]
    OtherContent,
}

impl Entry {
    /// The byte that identifies its kind.
    pub const fn tag(&self) -> u8 {
        match self {
            Self::Opened { .. } => b'o',
            Self::Begun(_) => b'b',
            Self::Decided(_) => b'd',
            Self::Finished(_) => b'f',
            Self::Closed { .. } => b'c',
        }
    }

    /// Appends its text to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        let mut object = ObjectWriter::new(out);
        match self {
            Self::Opened { worker, opened_at } => {
                object.word("worker", worker.as_str());
                object.moment("opened_at", *opened_at);
            }
            Self::Begun(Begun { request, worker }) => {
                object.key(&request.key);
                object.request_hash(&request.request_hash);
                object.services("involved_services", &request.services);
                if let Some(timeout) = request.timeout {
                    let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
                    object.number("timeout_ms", millis.min(MILLIS_MAX));
                }
                object.word("worker", worker.as_str());
            }
            Self::Decided(decision) => decision.write(&mut object),
            Self::Finished(Finished { decision, unresolved }) => {
                decision.write(&mut object);
                if !unresolved.is_empty() {
                    object.services("unresolved", unresolved);
                }
            }
            Self::Closed { closed_at } => object.moment("closed_at", *closed_at),
        }
        object.end();
        if let Self::Begun(Begun { request, .. }) = self {
            out.push(b'\n');
            out.extend_from_slice(request.data.as_str().as_bytes());
        }
    }

    /// Parses the entry with the tag `tag` and the text `text`.
    ///
    /// # Errors
    ///
    /// It is not a valid entry.
    pub fn read(tag: u8, text: &[u8]) -> Result<Self, EntryMalformed> {
        match tag {
            b'o' => object("opened", text, |reader, object| {
                let [worker, opened_at] = reader.fields(object, ["worker", "opened_at"])?;
                let worker = reader.required(object, worker, BodyReader::worker);
                let opened_at = reader.required(object, opened_at, BodyReader::moment);
                Some(Self::Opened { worker: worker?, opened_at: opened_at? })
            }),
            b'b' => begun(text),
            b'd' => object("decision", text, |reader, object| {
                Decision::read(reader, object).map(|decision| Self::Decided(Arc::new(decision)))
            }),
            b'f' => object("finished", text, |reader, object| {
                let [unresolved] = reader.fields(object, ["unresolved"])?;
                let unresolved = reader.optional(object, unresolved, BodyReader::services);
                let decision = Arc::new(Decision::read(reader, object)?);
                let unresolved = unresolved?.unwrap_or_default();
                Some(Self::Finished(Finished { decision, unresolved }))
            }),
            b'c' => object("closed", text, |reader, object| {
                let [closed_at] = reader.fields(object, ["closed_at"])?;
                let closed_at = reader.required(object, closed_at, BodyReader::moment)?;
                Some(Self::Closed { closed_at })
            }),
            tag => Err(EntryMalformed::Tag(tag)),
        }
    }
}

fn object<T>(
    kind: &str,
    text: &[u8],
    read: impl FnOnce(&mut BodyReader, &ParsedObject<'_, '_, '_>) -> Option<T>,
) -> Result<T, EntryMalformed> {
    let mut reader = BodyReader::new(kind);
    let value = reader.json(text);
    let value = reader.or_complaints(value).map_err(EntryMalformed::Invalid)?;
    let found = read(&mut reader, &ParsedObject { path: JsonPath::TOP, value: &value });
    reader.or_complaints(found).map_err(EntryMalformed::Invalid)
}

fn begun(text: &[u8]) -> Result<Entry, EntryMalformed> {
    // The part before the data contains no line feed.
    let (head, data) = match text.iter().position(|byte| *byte == b'\n') {
        Some(at) => (text.get(..at), text.get(at + 1..)),
        None => (None, None),
    };
    let data = data.and_then(|data| std::str::from_utf8(data).ok());
    let data = Payload::new(data.ok_or(EntryMalformed::NoData)?);
    let (mut request, worker) = object("begun", head.unwrap_or_default(), |reader, object| {
        let known =
            ["id", "requested_at", "request_hash", "involved_services", "timeout_ms", "worker"];
        let [id, requested_at, hash, services, timeout, worker] = reader.fields(object, known)?;
        let key = reader.key(object, id, requested_at);
        let hash = reader.required(object, hash, BodyReader::request_hash);
        let services = reader.required(object, services, BodyReader::services);
        let timeout = reader.optional(object, timeout, |reader, path, value| {
            reader.whole_number(path, value, 0..=MILLIS_MAX)
        });
        let worker = reader.required(object, worker, BodyReader::worker);
        let request = Request {
            key: key?,
            request_hash: hash?,
            services: services?.into(),
            data: Payload::new(""),
            timeout: timeout?.map(Duration::from_millis),
            answer_at: AnswerAt::default(),
            reply: None,
        };
        Some((request, worker?))
    })?;
    let is_listed = !request.services.is_empty() && request.services.is_sorted_by(|a, b| a < b);
    if !is_listed || request_hash(&request.services, &data) != request.request_hash {
        return Err(EntryMalformed::OtherContent);
    }
    request.data = data;
    Ok(Entry::Begun(Begun { request, worker }))
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use proptest::prelude::{any, prop, proptest};

    use super::{Begun, Entry, EntryMalformed, Finished};
    use crate::{
        protocol::{
            ids::{Branch, InstanceId, ServiceName, TransactionId, TransactionKey, WorkerId},
            message::{AnswerAt, Decision, Outcome, Payload, Reason, ReasonCode, Request},
            time::Time,
        },
        wire::hash::request_hash,
    };

    fn service(name: &str) -> ServiceName {
        ServiceName::parse(name).unwrap()
    }

    fn worker() -> WorkerId {
        WorkerId::parse("jabc-7").unwrap()
    }

    fn request(data: &str, timeout: Option<Duration>) -> Request {
        let services: Arc<[_]> = [service("a"), service("b")].into();
        let data = Payload::new(data);
        Request {
            key: TransactionKey {
                id: TransactionId::parse("TX1").unwrap(),
                requested_at: Time::from_millis(7000),
            },
            request_hash: request_hash(&services, &data),
            services,
            data,
            timeout,
            answer_at: AnswerAt::default(),
            reply: None,
        }
    }

    fn decision(outcome: Outcome) -> Arc<Decision> {
        let instance = InstanceId::parse("jabc-7").unwrap();
        let of = request("{}", None);
        let is_committed = outcome == Outcome::Committed;
        let branches = [(service("a"), Branch::of(&instance, 3))];
        let reason = Reason {
            message: Some("no\n\u{1e}".into()),
            ..Reason::at(&service("b"), ReasonCode::Refused)
        };
        Arc::new(Decision {
            key: of.key,
            request_hash: of.request_hash,
            outcome,
            branches: if is_committed { branches.into() } else { Vec::new() },
            reason: (!is_committed).then_some(reason),
            decided_at: Time::from_millis(7123),
            worker: worker(),
        })
    }

    fn text(entry: &Entry) -> String {
        let mut text = Vec::new();
        entry.write(&mut text);
        String::from_utf8(text).unwrap()
    }

    fn every_entry() -> Vec<Entry> {
        let begun = |data, timeout| {
            Entry::Begun(Begun { request: request(data, timeout), worker: worker() })
        };
        let finished = |outcome, unresolved| {
            Entry::Finished(Finished { decision: decision(outcome), unresolved })
        };
        vec![
            Entry::Opened { worker: worker(), opened_at: Time::from_millis(5) },
            begun("{\"x\":\"\\n\"}", None),
            begun("", Some(Duration::from_millis(250))),
            Entry::Decided(decision(Outcome::Committed)),
            Entry::Decided(decision(Outcome::Aborted)),
            finished(Outcome::Committed, vec![service("a")]),
            finished(Outcome::Committed, Vec::new()),
            finished(Outcome::Aborted, Vec::new()),
            Entry::Closed { closed_at: Time::from_millis(9) },
        ]
    }

    #[test]
    fn every_entry_is_read_back() {
        for entry in every_entry() {
            assert_eq!(Entry::read(entry.tag(), text(&entry).as_bytes()), Ok(entry));
        }
    }

    #[test]
    fn an_entry_has_the_format_of_its_message() {
        let entries = every_entry();
        assert_eq!(text(&entries[0]), r#"{"worker":"jabc-7","opened_at":5}"#);
        assert_eq!(
            text(&entries[2]),
            "{\"id\":\"TX1\",\"requested_at\":7,\"request_hash\":\"\
             338c69226edd9f2f3956bc42e960cf62\",\"involved_services\":[\"a\",\"b\"],\
             \"timeout_ms\":250,\"worker\":\"jabc-7\"}\n"
        );
        assert!(text(&entries[5]).ends_with(r#","worker":"jabc-7","unresolved":["a"]}"#));
    }

    #[test]
    fn data_may_have_any_depth() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let entry = Entry::Begun(Begun { request: request(&deep, None), worker: worker() });
        assert_eq!(Entry::read(b'b', text(&entry).as_bytes()), Ok(entry));
    }

    #[test]
    fn a_request_with_a_wrong_hash_is_refused() {
        let entry = Entry::Begun(Begun { request: request("{}", None), worker: worker() });
        for (from, to) in [("{}", "{ }"), ("\"a\",", ""), ("\"a\",\"b\"", "\"b\",\"a\"")] {
            let changed = text(&entry).replace(from, to);
            let read = Entry::read(b'b', changed.as_bytes());
            assert_eq!(read, Err(EntryMalformed::OtherContent), "{changed}");
        }
        let without = text(&entry).replace('\n', "");
        assert_eq!(Entry::read(b'b', without.as_bytes()), Err(EntryMalformed::NoData));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(tag in any::<u8>(), text in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = Entry::read(tag, &text);
        }

        #[test]
        fn nothing_near_an_entry_makes_it_panic(which in 0..9_usize, at in any::<usize>(), byte in any::<u8>()) {
            let entry = &every_entry()[which];
            let mut text = text(entry).into_bytes();
            let at = at % text.len();
            text[at] = byte;
            let _ = Entry::read(entry.tag(), &text);
        }
    }
}
