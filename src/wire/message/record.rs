//! Records: decisions in the journal, and what is parked for an operator.

use crate::{
    json::{self, Value, check::JsonPath},
    protocol::{
        ids::{ServiceName, TransactionKey, WorkerId},
        message::{Decision, Parked, ParkedCause, Request},
        time::Time,
    },
    wire::message::{
        Item, Kind,
        read::{BodyReader, ParsedObject},
        request,
        sealed::Sealed,
        write::ObjectWriter,
    },
};

/// A parked commit was applied.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Settled {
    /// The transaction.
    pub key: TransactionKey,
    /// The service that has committed.
    pub service: ServiceName,
    /// When `worker` received the done, by its clock.
    pub settled_at: Time,
    /// The worker that wrote the record.
    pub worker: WorkerId,
}

/// The first record of a journal.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct JournalBegun {
    /// The journal has every decision made at this time or later.
    pub complete_since: Time,
}

impl Item for Decision {
    const KIND: Kind = Kind::Decision;
}

impl Sealed for Decision {
    fn write(&self, object: &mut ObjectWriter<'_>) {
        let Self { key, request_hash, outcome, branches, reason, decided_at, worker } = self;
        object.key(key);
        object.request_hash(request_hash);
        object.outcome("outcome", *outcome);
        object.branches(branches);
        if let Some(reason) = reason {
            object.reason(reason);
        }
        object.moment("decided_at", *decided_at);
        object.word("worker", worker.as_str());
    }

    fn read(reader: &mut BodyReader, object: &ParsedObject<'_, '_, '_>) -> Option<Self> {
        let [id, requested_at, request_hash, outcome, branches, reason, decided_at, worker] =
            reader.fields(
                object,
                [
                    "id",
                    "requested_at",
                    "request_hash",
                    "outcome",
                    "branches",
                    "reason",
                    "decided_at",
                    "worker",
                ],
            )?;
        let key = reader.key(object, id, requested_at);
        let request_hash = reader.required(object, request_hash, BodyReader::request_hash);
        let outcome = reader.required(object, outcome, BodyReader::outcome);
        let branches = reader.required(object, branches, BodyReader::branches);
        let reason = reader.optional(object, reason, BodyReader::reason);
        let decided_at = reader.required(object, decided_at, BodyReader::moment);
        let worker = reader.required(object, worker, BodyReader::worker);
        Some(Self {
            key: key?,
            request_hash: request_hash?,
            outcome: outcome?,
            branches: branches?,
            reason: reason?,
            decided_at: decided_at?,
            worker: worker?,
        })
    }
}

impl Item for Parked {
    const KIND: Kind = Kind::Parked;
}

impl Sealed for Parked {
    fn write(&self, object: &mut ObjectWriter<'_>) {
        let Self { key, cause, parked_at } = self;
        object.key(key);
        match cause {
            ParkedCause::Uncommitted { service, branch, error } => {
                object.word("service", service.as_str());
                object.branch("branch", branch);
                if let Some(error) = error {
                    object.text("error", error);
                }
            }
            ParkedCause::Undecidable(request) => {
                object.request_hash(&request.request_hash);
                let mut inner = object.object("request");
                request::write(&mut inner, &request::RequestFields::of(request));
                inner.end();
            }
        }
        object.moment("parked_at", *parked_at);
    }

    fn read(reader: &mut BodyReader, object: &ParsedObject<'_, '_, '_>) -> Option<Self> {
        let [id, requested_at, service, branch, error, request_hash, request, parked_at] = reader
            .fields(
            object,
            [
                "id",
                "requested_at",
                "service",
                "branch",
                "error",
                "request_hash",
                "request",
                "parked_at",
            ],
        )?;
        let key = reader.key(object, id, requested_at);
        let parked_at = reader.required(object, parked_at, BodyReader::moment);
        let is_undecidable =
            request.value.is_some_and(|it| !matches!(it.kind, json::ValueKind::Null));
        let error = reader.optional(object, error, BodyReader::text);
        let cause = if is_undecidable {
            let path = object.path.field(request.name);
            let request = request.value.zip(key.clone()).and_then(|(value, key)| {
                let request = read_request(reader, &path, value, key)?;
                let hash = reader.required(object, request_hash, BodyReader::request_hash)?;
                if hash != request.request_hash {
                    reader.check.complain(&path, value, "must be what `request_hash` says");
                }
                Some(request)
            });
            // Fields that are not needed may be there, if their values are valid.
            reader.optional(object, service, BodyReader::service);
            reader.optional(object, branch, BodyReader::branch);
            request.map(ParkedCause::Undecidable)
        } else {
            let service = reader.required(object, service, BodyReader::service);
            let branch = reader.required(object, branch, BodyReader::branch);
            reader.optional(object, request_hash, BodyReader::request_hash);
            service.zip(branch).zip(error).map(|((service, branch), error)| {
                ParkedCause::Uncommitted { service, branch, error }
            })
        };
        Some(Self { key: key?, cause: cause?, parked_at: parked_at? })
    }
}

/// The request at `path`, which must be that of `key`.
fn read_request(
    reader: &mut BodyReader,
    path: &JsonPath<'_>,
    value: &Value<'_>,
    key: TransactionKey,
) -> Option<Request> {
    let read = request::read(reader, path, value);
    let id = read.id.as_ref()?;
    if *id != key.id {
        reader.check.complain(path, value, format!("must be of the transaction `{}`", key.id));
    }
    read.into_request(key.requested_at)
}

impl Item for Settled {
    const KIND: Kind = Kind::Settled;
}

impl Sealed for Settled {
    fn write(&self, object: &mut ObjectWriter<'_>) {
        let Self { key, service, settled_at, worker } = self;
        object.key(key);
        object.word("service", service.as_str());
        object.moment("settled_at", *settled_at);
        object.word("worker", worker.as_str());
    }

    fn read(reader: &mut BodyReader, object: &ParsedObject<'_, '_, '_>) -> Option<Self> {
        let [id, requested_at, service, settled_at, worker] =
            reader.fields(object, ["id", "requested_at", "service", "settled_at", "worker"])?;
        let key = reader.key(object, id, requested_at);
        let service = reader.required(object, service, BodyReader::service);
        let settled_at = reader.required(object, settled_at, BodyReader::moment);
        let worker = reader.required(object, worker, BodyReader::worker);
        Some(Self { key: key?, service: service?, settled_at: settled_at?, worker: worker? })
    }
}

impl Item for JournalBegun {
    const KIND: Kind = Kind::JournalBegun;
}

impl Sealed for JournalBegun {
    fn write(&self, object: &mut ObjectWriter<'_>) {
        object.moment("complete_since", self.complete_since);
    }

    fn read(reader: &mut BodyReader, object: &ParsedObject<'_, '_, '_>) -> Option<Self> {
        let [complete_since] = reader.fields(object, ["complete_since"])?;
        let complete_since = reader.required(object, complete_since, BodyReader::moment)?;
        Some(Self { complete_since })
    }
}
