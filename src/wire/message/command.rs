//! The commands of a worker to a service.

use crate::{
    json,
    protocol::{
        ids::TransactionKey,
        message::{Finish, Payload, Prepare, Query},
    },
    wire::message::{
        Item, Kind,
        read::{BodyReader, ParsedObject},
        sealed::Sealed,
        write::ObjectWriter,
    },
};

/// The cancel command.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Cancel(pub TransactionKey);

impl Item for Prepare {
    const KIND: Kind = Kind::Prepare;
}

impl Sealed for Prepare {
    fn write(&self, object: &mut ObjectWriter<'_>) {
        let Self { key, request_hash, data, deadline, repeated } = self;
        object.key(key);
        object.request_hash(request_hash);
        object.json("data", data.as_str());
        object.moment("deadline", *deadline);
        object.flag("repeated", *repeated);
    }

    fn read(reader: &mut BodyReader, object: &ParsedObject<'_, '_, '_>) -> Option<Self> {
        let known = ["id", "requested_at", "request_hash", "data", "deadline", "repeated"];
        let [id, requested_at, request_hash, data, deadline, repeated] =
            reader.fields(object, known)?;
        let key = reader.key(object, id, requested_at);
        let request_hash = reader.required(object, request_hash, BodyReader::request_hash);
        let data = reader.required(object, data, |reader, path, value| {
            if let json::ValueKind::Object(_) = value.kind {
                return Some(Payload::new(value.text));
            }
            reader.check.complain(path, value, "must be an object");
            None
        });
        let deadline = reader.required(object, deadline, BodyReader::moment);
        let repeated = reader.required(object, repeated, BodyReader::flag);
        Some(Self {
            key: key?,
            request_hash: request_hash?,
            data: data?,
            deadline: deadline?,
            repeated: repeated?,
        })
    }
}

impl Item for Query {
    const KIND: Kind = Kind::Query;
}

impl Sealed for Query {
    fn write(&self, object: &mut ObjectWriter<'_>) {
        let Self { key, request_hash } = self;
        object.key(key);
        object.request_hash(request_hash);
    }

    fn read(reader: &mut BodyReader, object: &ParsedObject<'_, '_, '_>) -> Option<Self> {
        let [id, requested_at, request_hash] =
            reader.fields(object, ["id", "requested_at", "request_hash"])?;
        let key = reader.key(object, id, requested_at);
        let request_hash = reader.required(object, request_hash, BodyReader::request_hash);
        Some(Self { key: key?, request_hash: request_hash? })
    }
}

impl Item for Cancel {
    const KIND: Kind = Kind::Cancel;
}

impl Sealed for Cancel {
    fn write(&self, object: &mut ObjectWriter<'_>) {
        object.key(&self.0);
    }

    fn read(reader: &mut BodyReader, object: &ParsedObject<'_, '_, '_>) -> Option<Self> {
        let [id, requested_at] = reader.fields(object, ["id", "requested_at"])?;
        reader.key(object, id, requested_at).map(Self)
    }
}

impl Item for Finish {
    const KIND: Kind = Kind::Finish;
}

impl Sealed for Finish {
    fn write(&self, object: &mut ObjectWriter<'_>) {
        let Self { key, outcome, branch, parked } = self;
        object.key(key);
        object.outcome("outcome", *outcome);
        if let Some(branch) = branch {
            object.branch("branch", branch);
        }
        if *parked {
            object.flag("parked", true);
        }
    }

    fn read(reader: &mut BodyReader, object: &ParsedObject<'_, '_, '_>) -> Option<Self> {
        let [id, requested_at, outcome, branch, parked] =
            reader.fields(object, ["id", "requested_at", "outcome", "branch", "parked"])?;
        let key = reader.key(object, id, requested_at);
        let outcome = reader.required(object, outcome, BodyReader::outcome);
        let branch = reader.optional(object, branch, BodyReader::branch);
        let parked = reader.optional(object, parked, BodyReader::flag);
        Some(Self {
            key: key?,
            outcome: outcome?,
            branch: branch?,
            parked: parked?.unwrap_or_default(),
        })
    }
}
