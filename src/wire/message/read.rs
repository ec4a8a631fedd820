//! Reading items from JSON: the fields of messages, each checked, with a complaint for each error.

use std::{mem, ops::RangeInclusive, sync::Arc};

use crate::{
    complaint::{Complaints, Position},
    json::{
        Value, ValueKind,
        check::{Checker, JsonPath, TWICE, number},
        parse_wrapped,
    },
    protocol::{
        ids::{
            Branch, InstanceId, InvalidName, RequestHash, ServiceName, StoreId, TransactionId,
            TransactionKey, WorkerId,
        },
        message::{Outcome, Reason, ReasonCode},
        time::Time,
    },
    wire::message::{TIME_MAX_SECONDS, cut},
};

const CODES: [ReasonCode; 9] = [
    ReasonCode::Refused,
    ReasonCode::Failed,
    ReasonCode::NoSlot,
    ReasonCode::UnknownService,
    ReasonCode::Deadline,
    ReasonCode::Unavailable,
    ReasonCode::Cancelled,
    ReasonCode::Invalid,
    ReasonCode::IdReused,
];

/// The reader of one body.
#[derive(Debug)]
pub struct BodyReader {
    pub(super) check: Checker,
    /// Scratch space.
    pub(super) buffer: String,
    /// The names that were read last: the items of one body mostly share them.
    service: Option<ServiceName>,
    instance: Option<InstanceId>,
    store: Option<StoreId>,
    worker: Option<WorkerId>,
}

/// A field of an object: its name, and its value if it is there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field<'v, 'a> {
    pub(super) name: &'static str,
    pub(super) value: Option<&'v Value<'a>>,
}

/// An object: its path, and its value.
#[derive(Clone, Copy, Debug)]
pub struct ParsedObject<'p, 'v, 'a> {
    pub(super) path: JsonPath<'p>,
    pub(super) value: &'v Value<'a>,
}

type ReadField<T> = fn(&mut BodyReader, &JsonPath<'_>, &Value<'_>) -> Option<T>;

impl BodyReader {
    pub(super) fn new(kind: &str) -> Self {
        Self {
            check: Checker::of_message(&Arc::from(kind)),
            buffer: String::new(),
            service: None,
            instance: None,
            store: None,
            worker: None,
        }
    }

    /// The value that was read, if there were no complaints since the last call.
    pub(super) fn or_complaints<T>(&mut self, read: Option<T>) -> Result<T, Complaints> {
        mem::take(&mut self.check.complaints).or(read)
    }

    /// Parses `body` as a JSON value.
    pub(super) fn json<'a>(&mut self, body: &'a [u8]) -> Option<Value<'a>> {
        self.check.json_by(Position::START, body, parse_wrapped)
    }

    pub(super) fn fields<'v, 'a, const N: usize>(
        &mut self,
        object: &ParsedObject<'_, 'v, 'a>,
        known: [&'static str; N],
    ) -> Option<[Field<'v, 'a>; N]> {
        let mut values = self.check.fields(&object.path, object.value, &known)?.into_iter();
        Some(known.map(|name| Field { name, value: values.next().flatten() }))
    }

    /// A required field.
    pub(super) fn required<T>(
        &mut self,
        object: &ParsedObject<'_, '_, '_>,
        field: Field<'_, '_>,
        read: ReadField<T>,
    ) -> Option<T> {
        let Field { name, value } = field;
        let value = self.check.required(&object.path, object.value, name, value)?;
        read(self, &object.path.field(name), value)
    }

    /// An optional field, which may be missing or `null`.
    pub(super) fn optional<T>(
        &mut self,
        object: &ParsedObject<'_, '_, '_>,
        field: Field<'_, '_>,
        read: ReadField<T>,
    ) -> Option<Option<T>> {
        match field.value {
            None | Some(Value { kind: ValueKind::Null, .. }) => Some(None),
            Some(value) => read(self, &object.path.field(field.name), value).map(Some),
        }
    }

    pub(super) fn key(
        &mut self,
        object: &ParsedObject<'_, '_, '_>,
        id: Field<'_, '_>,
        requested_at: Field<'_, '_>,
    ) -> Option<TransactionKey> {
        let id = self.required(object, id, Self::id);
        let requested_at = self.required(object, requested_at, Self::requested_at);
        Some(TransactionKey { id: id?, requested_at: requested_at? })
    }

    pub(super) fn id(&mut self, path: &JsonPath<'_>, value: &Value<'_>) -> Option<TransactionId> {
        self.check.name(path, value, TransactionId::RULE, TransactionId::parse)
    }

    pub(super) fn service(
        &mut self,
        path: &JsonPath<'_>,
        value: &Value<'_>,
    ) -> Option<ServiceName> {
        let text = self.check.string(path, value)?;
        let read = known(&mut self.service, text, ServiceName::as_str, ServiceName::parse);
        self.matching(path, value, ServiceName::RULE, read)
    }

    pub(super) fn instance(
        &mut self,
        path: &JsonPath<'_>,
        value: &Value<'_>,
    ) -> Option<InstanceId> {
        let text = self.check.string(path, value)?;
        let read = known(&mut self.instance, text, InstanceId::as_str, InstanceId::parse);
        self.matching(path, value, InstanceId::RULE, read)
    }

    pub(super) fn store(&mut self, path: &JsonPath<'_>, value: &Value<'_>) -> Option<StoreId> {
        let text = self.check.string(path, value)?;
        let read = known(&mut self.store, text, StoreId::as_str, StoreId::parse);
        self.matching(path, value, StoreId::RULE, read)
    }

    pub(super) fn worker(&mut self, path: &JsonPath<'_>, value: &Value<'_>) -> Option<WorkerId> {
        let text = self.check.string(path, value)?;
        let read = known(&mut self.worker, text, WorkerId::as_str, WorkerId::parse);
        self.matching(path, value, WorkerId::RULE, read)
    }

    pub(super) fn branch(&mut self, path: &JsonPath<'_>, value: &Value<'_>) -> Option<Branch> {
        self.check.name(path, value, Branch::RULE, Branch::parse)
    }

    pub(super) fn branches(
        &mut self,
        path: &JsonPath<'_>,
        value: &Value<'_>,
    ) -> Option<Vec<(ServiceName, Branch)>> {
        let ValueKind::Object(fields) = &value.kind else {
            self.check.complain(path, value, "must be an object");
            return None;
        };
        let mut branches: Vec<(ServiceName, Branch)> = Vec::with_capacity(fields.len());
        let mut is_good = true;
        for (name, value) in fields {
            let path = path.field(name);
            let service = ServiceName::parse(name).ok();
            if service.is_none() {
                let rule = format!("must stand under a service's name: {}", ServiceName::RULE);
                self.check.complain(&path, value, rule);
            }
            if branches.last().is_some_and(|(last, _)| last.as_str() == name) {
                self.check.complain(&path, value, TWICE);
                is_good = false;
            }
            match (service, self.branch(&path, value)) {
                (Some(service), Some(branch)) => branches.push((service, branch)),
                (None, _) | (_, None) => is_good = false,
            }
        }
        is_good.then_some(branches)
    }

    pub(super) fn services(
        &mut self,
        path: &JsonPath<'_>,
        value: &Value<'_>,
    ) -> Option<Vec<ServiceName>> {
        let elements = self.check.elements(path, value, "an array of service names")?;
        let mut services = Vec::with_capacity(elements.len());
        for (index, element) in elements.iter().enumerate() {
            services.push(self.service(&path.element(index), element)?);
        }
        Some(services)
    }

    pub(super) fn request_hash(
        &mut self,
        path: &JsonPath<'_>,
        value: &Value<'_>,
    ) -> Option<RequestHash> {
        let hash = RequestHash::parse(self.check.string(path, value)?).ok();
        self.matching(path, value, RequestHash::RULE, hash)
    }

    pub(super) fn outcome(&mut self, path: &JsonPath<'_>, value: &Value<'_>) -> Option<Outcome> {
        let known = [Outcome::Committed, Outcome::Aborted];
        self.one_of(path, value, known, Outcome::as_str)
    }

    /// One of `words`.
    pub(super) fn one_of<T: Copy, const N: usize>(
        &mut self,
        path: &JsonPath<'_>,
        value: &Value<'_>,
        known: [T; N],
        as_str: impl Fn(T) -> &'static str,
    ) -> Option<T> {
        let text = self.check.string(path, value)?;
        let found = known.into_iter().find(|word| as_str(*word) == text);
        if found.is_none() {
            let words = known.map(|word| format!("`{}`", as_str(word)));
            self.check.complain(path, value, format!("must be one of {}", words.join(", ")));
        }
        found
    }

    pub(super) fn reason(&mut self, path: &JsonPath<'_>, value: &Value<'_>) -> Option<Reason> {
        let object = ParsedObject { path: *path, value };
        let [service, code, message] = self.fields(&object, ["service", "code", "message"])?;
        let service = self.optional(&object, service, Self::service);
        let code = self.required(&object, code, |reader, path, value| {
            reader.one_of(path, value, CODES, ReasonCode::as_str)
        });
        let message = self.optional(&object, message, Self::text);
        Some(Reason { code: code?, service: service?, message: message? })
    }

    /// A text of unknown origin.
    pub(super) fn text(&mut self, path: &JsonPath<'_>, value: &Value<'_>) -> Option<Arc<str>> {
        Some(cut(self.check.string(path, value)?).into())
    }

    /// The same, however long it is.
    pub(super) fn whole_text(
        &mut self,
        path: &JsonPath<'_>,
        value: &Value<'_>,
    ) -> Option<Arc<str>> {
        Some(self.check.string(path, value)?.into())
    }

    pub(super) fn flag(&mut self, path: &JsonPath<'_>, value: &Value<'_>) -> Option<bool> {
        self.check.boolean(path, value)
    }

    /// A time in whole seconds.
    pub(super) fn requested_at(&mut self, path: &JsonPath<'_>, value: &Value<'_>) -> Option<Time> {
        let seconds = self.whole_number(path, value, 0..=TIME_MAX_SECONDS)?;
        Some(Time::from_millis(seconds * 1000))
    }

    /// A time in milliseconds.
    pub(super) fn moment(&mut self, path: &JsonPath<'_>, value: &Value<'_>) -> Option<Time> {
        self.whole_number(path, value, 0..=TIME_MAX_SECONDS * 1000 + 999).map(Time::from_millis)
    }

    pub(super) fn count(&mut self, path: &JsonPath<'_>, value: &Value<'_>) -> Option<u32> {
        let count = self.whole_number(path, value, 0..=u32::MAX.into())?;
        u32::try_from(count).ok()
    }

    /// `value` as a whole number, in any notation: `1000` or `1e3`. `range` must lie within what a
    /// double represents exactly.
    pub(super) fn whole_number(
        &mut self,
        path: &JsonPath<'_>,
        value: &Value<'_>,
        range: RangeInclusive<u64>,
    ) -> Option<u64> {
        let plain = match value.kind {
            ValueKind::Number => value.text.parse().ok(),
            ValueKind::Null
            | ValueKind::Bool(_)
            | ValueKind::String(_)
            | ValueKind::Array(_)
            | ValueKind::Object(_) => None,
        };
        let otherwise = || {
            let found = number(value).filter(|number| number.fract() == 0.0)?;
            // The conversion of a float saturates at the bounds of the integer.
            (found >= 0.0).then_some(found as u64)
        };
        let found = plain.or_else(otherwise).filter(|number| range.contains(number));
        if found.is_none() {
            let (min, max) = range.into_inner();
            self.check.complain(path, value, format!("must be a whole number from {min} to {max}"));
        }
        found
    }

    /// Parses by `read`, with a complaint about `rule` if that fails.
    pub(super) fn matching<T>(
        &mut self,
        path: &JsonPath<'_>,
        value: &Value<'_>,
        rule: &str,
        read: Option<T>,
    ) -> Option<T> {
        if read.is_none() {
            self.check.complain(path, value, format!("must match {rule}"));
        }
        read
    }
}

/// The name in `text`: a clone of `last`, if it is the same.
fn known<T: Clone>(
    last: &mut Option<T>,
    text: &str,
    as_str: fn(&T) -> &str,
    parse: fn(&str) -> Result<T, InvalidName>,
) -> Option<T> {
    match last {
        Some(last) if as_str(last) == text => Some(last.clone()),
        Some(_) | None => {
            let name = parse(text).ok()?;
            *last = Some(name.clone());
            Some(name)
        }
    }
}
