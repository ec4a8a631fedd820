//! Requests of producers, and the result of a request that can't be read.
//!
//! A message is one request, or an array of requests that share its timestamp. Fields are checked as in
//! the files of [`transactions`](crate::input::transactions), except that unknown ones are ignored.
//!
//! **Invariant:** a malformed request in an array is rejected alone. If the message itself can't be served,
//! every request in it that can be read is named, so that its producer gets a result.

use std::{sync::Arc, time::Duration};

use crate::{
    complaint::{Complaints, Position},
    json::{
        self, Value,
        check::{DAY_MS, JsonPath, without_byte_order_mark},
    },
    protocol::{
        ids::{ReplyToken, RequestHash, ServiceName, TransactionId, TransactionKey},
        message::{AnswerAt, Payload, Request, TransactionSpec},
        request_messages::REQUESTS_MAX,
        time::Time,
    },
    wire::{
        hash::request_hash,
        message::{
            BODY_MAX, BodyFull, Kind, Malformed, TIME_MAX_SECONDS,
            read::{BodyReader, ParsedObject},
            write::ObjectWriter,
        },
        transaction::{read_answer_at, read_data, read_services},
    },
};

/// How many bytes a request may have: every message that follows from it, such as its prepare, is
/// at most 1 KiB larger and fits into [`BODY_MAX`].
pub const REQUEST_MAX: usize = BODY_MAX - 1024;

/// How many services a transaction may involve: a decision that names a branch of each must fit
/// into [`BODY_MAX`].
pub const SERVICES_MAX: usize = 1000;

/// How many bytes a complaint about a request may have.
const REASON_MAX: usize = 1024;

/// A request that can't be read, with what is needed to answer it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{reason}")]
pub struct RequestMalformed {
    /// All errors in it, in at most 1 KiB.
    pub reason: String,
    /// Its id, if it could be read.
    pub id: Option<TransactionId>,
    /// Its timestamp, if it could be read.
    pub requested_at: Option<Time>,
    /// The producer's reply token, if it could be read.
    pub reply: Option<ReplyToken>,
}

/// The requests of a message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DecodedRequests<'a> {
    /// Each of them, in order, as far as the body can be read.
    pub items: Vec<RequestItem<'a>>,
    /// Why none of them can be served, in at most 1 KiB: the message is rejected as a whole.
    pub fault: Option<String>,
}

/// One request of a message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RequestItem<'a> {
    /// Its text, as the producer wrote it.
    pub text: &'a str,
    /// The request, or what is wrong with it.
    pub read: Result<Request, RequestMalformed>,
}

/// The body of a message under construction: one request, or an array of several.
///
/// ```
/// # use dtc::wire::message::RequestBody;
/// let mut body = RequestBody::new();
/// body.push(br#"{"id":"a"}"#)?;
/// assert_eq!(body.clone().into_bytes(), br#"{"id":"a"}"#);
/// body.push(br#"{"id":"b"}"#)?;
/// assert_eq!(body.into_bytes(), br#"[{"id":"a"},{"id":"b"}]"#);
/// # Ok::<(), dtc::wire::message::BodyFull>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct RequestBody {
    /// An array without its closing bracket.
    array: Vec<u8>,
    len: usize,
}

impl RequestBody {
    /// A body without requests.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a request, as [`encode_request`] has written it.
    ///
    /// # Errors
    ///
    /// The body would have more than [`REQUESTS_MAX`] requests or [`BODY_MAX`] bytes, and is unchanged.
    pub fn push(&mut self, request: &[u8]) -> Result<(), BodyFull> {
        const BRACKETS: usize = 2;
        let size = self.array.len() + request.len() + BRACKETS;
        if self.len == REQUESTS_MAX || (self.len > 0 && size > BODY_MAX) {
            return Err(BodyFull { len: self.len });
        }
        self.array.push(if self.len == 0 { b'[' } else { b',' });
        self.array.extend_from_slice(request);
        self.len += 1;
        Ok(())
    }

    /// How many requests there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no requests.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The body.
    pub fn into_bytes(mut self) -> Vec<u8> {
        if self.len == 1 {
            self.array.remove(0);
        } else {
            self.array.push(b']');
        }
        self.array
    }
}

/// A request can't be sent, since a message that follows from it might be too large.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RequestTooLarge {
    /// It has too many bytes.
    #[error("the request has {size} bytes: must have at most {REQUEST_MAX}")]
    Bytes {
        /// How many it has.
        size: usize,
    },
    /// It involves too many services.
    #[error("the request involves {n_services} services: must involve at most {SERVICES_MAX}")]
    Services {
        /// How many it involves.
        n_services: usize,
    },
}

/// The body of a request for `transaction`, with the result to be sent to `reply`.
///
/// # Errors
///
/// The transaction is too large for a message, though not for a file.
pub fn encode_request(
    transaction: &TransactionSpec,
    reply: Option<&ReplyToken>,
) -> Result<Vec<u8>, RequestTooLarge> {
    let TransactionSpec { id, services, data, request_hash: _, timeout, answer_at } = transaction;
    let n_services = services.len();
    if n_services > SERVICES_MAX {
        return Err(RequestTooLarge::Services { n_services });
    }
    let mut body = Vec::with_capacity(data.as_str().len() + 256);
    let mut object = ObjectWriter::new(&mut body);
    write(
        &mut object,
        &RequestFields { id, services, data, timeout: *timeout, answer_at: *answer_at, reply },
    );
    object.end();
    if body.len() > REQUEST_MAX {
        return Err(RequestTooLarge::Bytes { size: body.len() });
    }
    Ok(body)
}

/// Reads the requests of a message, from `body` and from the property `timestamp`, in seconds.
pub fn decode_requests(body: &[u8], timestamp: Option<u64>) -> DecodedRequests<'_> {
    let text = without_byte_order_mark(body);
    if text.trim_ascii_start().first() != Some(&b'[') {
        let read = decode_request(body, timestamp);
        let fault = read.as_ref().err().map(|malformed| malformed.reason.clone());
        let text = str::from_utf8(text).unwrap_or_default();
        return DecodedRequests { items: vec![RequestItem { text, read }], fault };
    }
    if body.len() > BODY_MAX {
        let fault = Some(Malformed::TooLarge { size: body.len() }.to_string());
        return DecodedRequests { items: Vec::new(), fault };
    }
    let mut faults = Vec::new();
    let requested_at = requested_at(timestamp, &mut faults);
    let mut reader = BodyReader::new(Kind::Request.word());
    let value = reader.check.json_by(Position::START, text, json::parse_array);
    let elements = match reader.or_complaints(value) {
        Ok(Value { kind: json::ValueKind::Array(elements), .. }) => elements,
        Ok(_) => Vec::new(),
        Err(found) => {
            faults.extend(lines(&found));
            let fault = Some(shortened(faults.join("; ")));
            return DecodedRequests { items: Vec::new(), fault };
        }
    };
    match elements.len() {
        0 => faults.push("the message has no request".to_owned()),
        1..=REQUESTS_MAX => {}
        n => {
            faults.push(format!("the message has {n} requests: must have at most {REQUESTS_MAX}"));
        }
    }
    let items = elements.iter().enumerate().map(|(index, value)| {
        let read = read_element(&mut reader, &JsonPath::TOP.element(index), value, requested_at);
        RequestItem { text: value.text, read }
    });
    let items: Vec<_> = items.collect();
    // An array of one is rejected like an object.
    if let ([RequestItem { read: Err(malformed), .. }], true) = (&*items, faults.is_empty()) {
        faults.push(malformed.reason.clone());
    }
    let fault = (!faults.is_empty()).then(|| shortened(faults.join("; ")));
    DecodedRequests { items, fault }
}

/// Reads a request of an array.
fn read_element(
    reader: &mut BodyReader,
    path: &JsonPath<'_>,
    value: &Value<'_>,
    requested_at: Option<Time>,
) -> Result<Request, RequestMalformed> {
    let size = value.text.len();
    if size > REQUEST_MAX {
        let reason = RequestTooLarge::Bytes { size }.to_string();
        return Err(RequestMalformed { reason, id: None, requested_at, reply: None });
    }
    let read = read(reader, path, value);
    let (id, reply) = (read.id.clone(), read.reply.clone());
    let request = requested_at.and_then(|requested_at| read.into_request(requested_at));
    let found = reader.or_complaints(Some(())).err();
    request.filter(|_| found.is_none()).ok_or_else(|| {
        let complaints = found.as_ref().map(lines).unwrap_or_default();
        let reason = shortened(complaints.join("; "));
        RequestMalformed { reason, id, requested_at, reply }
    })
}

/// Reads the one request of a message, from `body` and from the property `timestamp`, in seconds.
///
/// # Errors
///
/// All errors in it.
pub fn decode_request(body: &[u8], timestamp: Option<u64>) -> Result<Request, RequestMalformed> {
    let mut complaints = Vec::new();
    let requested_at = requested_at(timestamp, &mut complaints);
    let mut read = PartialRequest::default();
    if body.len() > REQUEST_MAX {
        let size = body.len();
        complaints.push(RequestTooLarge::Bytes { size }.to_string());
    } else {
        let mut reader = BodyReader::new(Kind::Request.word());
        let body = without_byte_order_mark(body);
        if let Some(value) = reader.check.json(Position::START, body) {
            read = self::read(&mut reader, &JsonPath::TOP, &value);
        }
        if let Err(found) = reader.or_complaints(Some(())) {
            complaints.extend(lines(&found));
        }
    }
    let (id, reply) = (read.id.clone(), read.reply.clone());
    match requested_at.and_then(|requested_at| read.into_request(requested_at)) {
        Some(request) if complaints.is_empty() => Ok(request),
        Some(_) | None => {
            let reason = shortened(complaints.join("; "));
            Err(RequestMalformed { reason, id, requested_at, reply })
        }
    }
}

fn requested_at(timestamp: Option<u64>, complaints: &mut Vec<String>) -> Option<Time> {
    let Some(seconds) = timestamp else {
        complaints.push("the message must have a timestamp".to_owned());
        return None;
    };
    if seconds > TIME_MAX_SECONDS {
        let rule = format!("must be seconds since 1970, at most {TIME_MAX_SECONDS}");
        complaints.push(format!("the message's timestamp is {seconds}: {rule}"));
        return None;
    }
    Some(Time::from_millis(seconds * 1000))
}

/// The complaints, without the name of a file.
fn lines(complaints: &Complaints) -> Vec<String> {
    let prefix = Kind::Request.word();
    let line = |line: &str| line.trim_start_matches(prefix).trim_start_matches([':', ' ']).into();
    complaints.to_string().lines().map(line).collect()
}

fn shortened(mut reason: String) -> String {
    if reason.len() > REASON_MAX {
        let mut end = REASON_MAX - '…'.len_utf8();
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        reason.truncate(end);
        reason.push('…');
    }
    reason
}

/// The parts of a request that is written.
pub(super) struct RequestFields<'a> {
    id: &'a TransactionId,
    services: &'a [ServiceName],
    data: &'a Payload,
    timeout: Option<Duration>,
    answer_at: AnswerAt,
    reply: Option<&'a ReplyToken>,
}

impl<'a> RequestFields<'a> {
    pub(super) fn of(request: &'a Request) -> Self {
        let Request { key, request_hash: _, services, data, timeout, answer_at, reply } = request;
        let (timeout, answer_at, reply) = (*timeout, *answer_at, reply.as_ref());
        Self { id: &key.id, services, data, timeout, answer_at, reply }
    }
}

pub(super) fn write(object: &mut ObjectWriter<'_>, parts: &RequestFields<'_>) {
    object.word("id", parts.id.as_str());
    object.services("involved_services", parts.services);
    object.json("data", parts.data.as_str());
    if let Some(timeout) = parts.timeout {
        object.number("timeout_ms", u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
    }
    if parts.answer_at != AnswerAt::default() {
        object.word("answer", parts.answer_at.as_str());
    }
    if let Some(reply) = parts.reply {
        object.word("reply", reply.as_str());
    }
}

/// The parts of a request that could be read.
#[derive(Debug, Default)]
pub(super) struct PartialRequest {
    pub(super) id: Option<TransactionId>,
    services: Option<Arc<[ServiceName]>>,
    data: Option<Payload>,
    timeout: Option<Duration>,
    answer_at: AnswerAt,
    reply: Option<ReplyToken>,
}

impl PartialRequest {
    pub(super) fn into_request(self, requested_at: Time) -> Option<Request> {
        let (services, data) = (self.services?, self.data?);
        let request_hash: RequestHash = request_hash(&services, &data);
        let key = TransactionKey { id: self.id?, requested_at };
        Some(Request {
            key,
            request_hash,
            services,
            data,
            timeout: self.timeout,
            answer_at: self.answer_at,
            reply: self.reply,
        })
    }
}

/// Reads the request at `path`; it complains about all errors in it.
pub(super) fn read(
    reader: &mut BodyReader,
    path: &JsonPath<'_>,
    value: &Value<'_>,
) -> PartialRequest {
    let object = ParsedObject { path: *path, value };
    let known = ["id", "involved_services", "data", "timeout_ms", "answer", "reply"];
    let Some([id, services, data, timeout, answer, reply]) = reader.fields(&object, known) else {
        return PartialRequest::default();
    };
    let id = reader.required(&object, id, BodyReader::id);
    let services = reader.required(&object, services, |reader, path, value| {
        let services = read_services(&mut reader.check, path, value);
        // However often a service is named.
        if matches!(&value.kind, json::ValueKind::Array(elements) if elements.len() > SERVICES_MAX)
        {
            let rule = format!("must name at most {SERVICES_MAX} services");
            reader.check.complain(path, value, rule);
        }
        services
    });
    let data = reader.required(&object, data, |reader, path, value| {
        read_data(&mut reader.check, path, value, &mut reader.buffer)
    });
    let timeout = timeout.value.and_then(|value| {
        reader.check.whole_number(&object.path.field(timeout.name), value, 1..=DAY_MS)
    });
    let answer_at = answer.value.and_then(|value| {
        read_answer_at(&mut reader.check, &object.path.field(answer.name), value)
    });
    let answer_at = answer_at.unwrap_or_default();
    let reply = reply.value.and_then(|value| {
        let path = object.path.field(reply.name);
        reader.check.name(&path, value, ReplyToken::RULE, ReplyToken::parse)
    });
    let timeout = timeout.map(|millis| Duration::from_millis(millis.into()));
    PartialRequest { id, services, data, timeout, answer_at, reply }
}
