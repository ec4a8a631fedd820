//! Votes, dones and inquiries of services, and results for producers.

use crate::{
    protocol::message::{Answer, Done, Inquiry, Reason, ReasonCode, Vote, VoteKind},
    wire::message::{
        Item, Kind,
        read::{BodyReader, ParsedObject},
        sealed::Sealed,
        write::ObjectWriter,
    },
};

/// The field `vote`.
#[derive(Clone, Copy)]
enum VoteWord {
    Prepared,
    ReadOnly,
    Refused,
    Failed,
    Finished,
}

impl VoteWord {
    const ALL: [Self; 5] =
        [Self::Prepared, Self::ReadOnly, Self::Refused, Self::Failed, Self::Finished];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Prepared => "prepared",
            Self::ReadOnly => "read_only",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Finished => "finished",
        }
    }

    const fn of(kind: &VoteKind) -> Self {
        match kind {
            VoteKind::Prepared { .. } => Self::Prepared,
            VoteKind::ReadOnly => Self::ReadOnly,
            VoteKind::Refused(_) => Self::Refused,
            VoteKind::Failed { .. } => Self::Failed,
            VoteKind::Finished(_) => Self::Finished,
        }
    }
}

impl Item for Vote {
    const KIND: Kind = Kind::Vote;
}

impl Sealed for Vote {
    fn write(&self, object: &mut ObjectWriter<'_>) {
        let Self { key, request_hash, service, instance, store, kind, free } = self;
        object.key(key);
        object.request_hash(request_hash);
        object.word("service", service.as_str());
        object.word("instance", instance.as_str());
        if let Some(store) = store {
            object.word("store", store.as_str());
        }
        object.word("vote", VoteWord::of(kind).as_str());
        match kind {
            VoteKind::Prepared { branch } => object.branch("branch", branch),
            VoteKind::ReadOnly => {}
            VoteKind::Refused(reason) => object.reason(reason),
            VoteKind::Failed { branch, reason } => {
                object.branch("branch", branch);
                object.reason(reason);
            }
            VoteKind::Finished(outcome) => object.outcome("outcome", *outcome),
        }
        object.number("free", (*free).into());
    }

    fn read(reader: &mut BodyReader, object: &ParsedObject<'_, '_, '_>) -> Option<Self> {
        let [
            id,
            requested_at,
            request_hash,
            service,
            instance,
            store,
            vote,
            branch,
            outcome,
            reason,
            free,
        ] = reader.fields(
            object,
            [
                "id",
                "requested_at",
                "request_hash",
                "service",
                "instance",
                "store",
                "vote",
                "branch",
                "outcome",
                "reason",
                "free",
            ],
        )?;
        let key = reader.key(object, id, requested_at);
        let request_hash = reader.required(object, request_hash, BodyReader::request_hash);
        let service = reader.required(object, service, BodyReader::service);
        let instance = reader.required(object, instance, BodyReader::instance);
        let store = reader.optional(object, store, BodyReader::store);
        let word = reader.required(object, vote, |reader, path, value| {
            reader.one_of(path, value, VoteWord::ALL, VoteWord::as_str)
        });
        let free = reader.required(object, free, BodyReader::count);
        let reason = reader.optional(object, reason, BodyReader::reason);
        let reason_or = |code| reason?.or_else(|| Some(Reason::at(service.as_ref()?, code)));
        // Fields that this vote doesn't need may be there, if their values are valid.
        let (needs_branch, needs_outcome) = match word {
            Some(VoteWord::Prepared | VoteWord::Failed) => (true, false),
            Some(VoteWord::Finished) => (false, true),
            Some(VoteWord::ReadOnly | VoteWord::Refused) | None => (false, false),
        };
        let branch = match needs_branch {
            true => reader.required(object, branch, BodyReader::branch).map(Some),
            false => reader.optional(object, branch, BodyReader::branch),
        };
        let outcome = match needs_outcome {
            true => reader.required(object, outcome, BodyReader::outcome).map(Some),
            false => reader.optional(object, outcome, BodyReader::outcome),
        };
        let kind = match word? {
            VoteWord::Prepared => branch?.map(|branch| VoteKind::Prepared { branch }),
            VoteWord::ReadOnly => Some(VoteKind::ReadOnly),
            VoteWord::Refused => reason_or(ReasonCode::Refused).map(VoteKind::Refused),
            VoteWord::Failed => branch?
                .zip(reason_or(ReasonCode::Failed))
                .map(|(branch, reason)| VoteKind::Failed { branch, reason }),
            VoteWord::Finished => outcome?.map(VoteKind::Finished),
        };
        Some(Self {
            key: key?,
            request_hash: request_hash?,
            service: service?,
            instance: instance?,
            store: store?,
            kind: kind?,
            free: free?,
        })
    }
}

impl Item for Done {
    const KIND: Kind = Kind::Done;
}

impl Sealed for Done {
    fn write(&self, object: &mut ObjectWriter<'_>) {
        let Self { key, service, instance, store, applied, parked, free } = self;
        object.key(key);
        object.word("service", service.as_str());
        object.word("instance", instance.as_str());
        if let Some(store) = store {
            object.word("store", store.as_str());
        }
        object.flag("done", applied.is_ok());
        if let Err(error) = applied {
            object.text("error", error);
        }
        if *parked {
            object.flag("parked", true);
        }
        object.number("free", (*free).into());
    }

    fn read(reader: &mut BodyReader, object: &ParsedObject<'_, '_, '_>) -> Option<Self> {
        let known = [
            "id",
            "requested_at",
            "service",
            "instance",
            "store",
            "done",
            "error",
            "parked",
            "free",
        ];
        let [id, requested_at, service, instance, store, done, error, parked, free] =
            reader.fields(object, known)?;
        let key = reader.key(object, id, requested_at);
        let service = reader.required(object, service, BodyReader::service);
        let instance = reader.required(object, instance, BodyReader::instance);
        let store = reader.optional(object, store, BodyReader::store);
        let done = reader.required(object, done, BodyReader::flag);
        let error = reader.optional(object, error, BodyReader::text);
        let parked = reader.optional(object, parked, BodyReader::flag);
        let free = reader.required(object, free, BodyReader::count);
        let error = error?.unwrap_or_else(|| "".into());
        Some(Self {
            key: key?,
            service: service?,
            instance: instance?,
            store: store?,
            applied: if done? { Ok(()) } else { Err(error) },
            parked: parked?.unwrap_or_default(),
            free: free?,
        })
    }
}

impl Item for Inquiry {
    const KIND: Kind = Kind::Inquiry;
}

impl Sealed for Inquiry {
    fn write(&self, object: &mut ObjectWriter<'_>) {
        let Self { key, request_hash, service, instance, branch, deadline } = self;
        object.key(key);
        object.request_hash(request_hash);
        object.word("service", service.as_str());
        object.word("instance", instance.as_str());
        object.branch("branch", branch);
        object.moment("deadline", *deadline);
    }

    fn read(reader: &mut BodyReader, object: &ParsedObject<'_, '_, '_>) -> Option<Self> {
        let known =
            ["id", "requested_at", "request_hash", "service", "instance", "branch", "deadline"];
        let [id, requested_at, request_hash, service, instance, branch, deadline] =
            reader.fields(object, known)?;
        let key = reader.key(object, id, requested_at);
        let request_hash = reader.required(object, request_hash, BodyReader::request_hash);
        let service = reader.required(object, service, BodyReader::service);
        let instance = reader.required(object, instance, BodyReader::instance);
        let branch = reader.required(object, branch, BodyReader::branch);
        let deadline = reader.required(object, deadline, BodyReader::moment);
        Some(Self {
            key: key?,
            request_hash: request_hash?,
            service: service?,
            instance: instance?,
            branch: branch?,
            deadline: deadline?,
        })
    }
}

impl Item for Answer {
    const KIND: Kind = Kind::Result;
}

impl Sealed for Answer {
    fn write(&self, object: &mut ObjectWriter<'_>) {
        let Self { id, requested_at, outcome, reason, unresolved, decided_at } = self;
        object.word("id", id.as_str());
        object.outcome("status", *outcome);
        if let Some(reason) = reason {
            object.reason(reason);
        }
        if !unresolved.is_empty() {
            object.services("unresolved", unresolved);
        }
        object.requested_at(*requested_at);
        object.moment("decided_at", *decided_at);
    }

    fn read(reader: &mut BodyReader, object: &ParsedObject<'_, '_, '_>) -> Option<Self> {
        let known = ["id", "status", "reason", "unresolved", "requested_at", "decided_at"];
        let [id, status, reason, unresolved, requested_at, decided_at] =
            reader.fields(object, known)?;
        let id = reader.required(object, id, BodyReader::id);
        let outcome = reader.required(object, status, BodyReader::outcome);
        let reason = reader.optional(object, reason, BodyReader::reason);
        let unresolved = reader.optional(object, unresolved, BodyReader::services);
        let requested_at = reader.required(object, requested_at, BodyReader::requested_at);
        let decided_at = reader.required(object, decided_at, BodyReader::moment);
        Some(Self {
            id: id?,
            requested_at: requested_at?,
            outcome: outcome?,
            reason: reason?,
            unresolved: unresolved?.unwrap_or_default(),
            decided_at: decided_at?,
        })
    }
}
