//! Requests of producers, and the result of a request that can't be read.
//!
//! Fields are checked as in the files of [`transactions`](crate::input::transactions), except that
//! unknown ones are ignored.

use std::{sync::Arc, time::Duration};

use crate::{
    complaint::{Complaints, Position},
    json::{
        self, Value,
        check::{DAY_MS, JsonPath, without_byte_order_mark},
    },
    protocol::{
        ids::{ReplyToken, RequestHash, ServiceName, TransactionId, TransactionKey},
        message::{Payload, Request, TransactionSpec},
        time::Time,
    },
    wire::{
        hash::request_hash,
        message::{
            BODY_MAX, Kind, TIME_MAX_SECONDS,
            read::{BodyReader, ParsedObject},
            write::ObjectWriter,
        },
        transaction::{read_data, read_services},
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
    let TransactionSpec { id, services, data, request_hash: _, timeout } = transaction;
    let n_services = services.len();
    if n_services > SERVICES_MAX {
        return Err(RequestTooLarge::Services { n_services });
    }
    let mut body = Vec::with_capacity(data.as_str().len() + 256);
    let mut object = ObjectWriter::new(&mut body);
    write(&mut object, &RequestFields { id, services, data, timeout: *timeout, reply });
    object.end();
    if body.len() > REQUEST_MAX {
        return Err(RequestTooLarge::Bytes { size: body.len() });
    }
    Ok(body)
}

/// Reads a request from `body` and from the property `timestamp`, in seconds.
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
    reply: Option<&'a ReplyToken>,
}

impl<'a> RequestFields<'a> {
    pub(super) fn of(request: &'a Request) -> Self {
        let Request { key, request_hash: _, services, data, timeout, reply } = request;
        Self { id: &key.id, services, data, timeout: *timeout, reply: reply.as_ref() }
    }
}

pub(super) fn write(object: &mut ObjectWriter<'_>, parts: &RequestFields<'_>) {
    object.word("id", parts.id.as_str());
    object.services("involved_services", parts.services);
    object.json("data", parts.data.as_str());
    if let Some(timeout) = parts.timeout {
        object.number("timeout_ms", u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX));
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
    let known = ["id", "involved_services", "data", "timeout_ms", "reply"];
    let Some([id, services, data, timeout, reply]) = reader.fields(&object, known) else {
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
    let reply = reply.value.and_then(|value| {
        let path = object.path.field(reply.name);
        reader.check.name(&path, value, ReplyToken::RULE, ReplyToken::parse)
    });
    let timeout = timeout.map(|millis| Duration::from_millis(millis.into()));
    PartialRequest { id, services, data, timeout, reply }
}
