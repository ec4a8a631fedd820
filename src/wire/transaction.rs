//! The parts that a request and a transaction in a file share.

use std::sync::Arc;

use crate::{
    json::{
        Value, ValueKind,
        check::{Checker, JsonPath},
    },
    protocol::{
        ids::ServiceName,
        message::{AnswerAt, Payload},
    },
};

/// The services in `value`: each once, in name order.
pub(crate) fn read_services(
    check: &mut Checker,
    path: &JsonPath<'_>,
    value: &Value<'_>,
) -> Option<Arc<[ServiceName]>> {
    let elements = check.elements(path, value, "an array of service names")?;
    if elements.is_empty() {
        check.complain(path, value, "must name at least one service");
    }
    let mut services = Vec::with_capacity(elements.len());
    for (index, element) in elements.iter().enumerate() {
        let path = path.element(index);
        services.extend(check.name(&path, element, ServiceName::RULE, ServiceName::parse));
    }
    services.sort();
    services.dedup();
    Some(services.into())
}

/// When the result of a commit goes out.
pub(crate) fn read_answer_at(
    check: &mut Checker,
    path: &JsonPath<'_>,
    value: &Value<'_>,
) -> Option<AnswerAt> {
    let text = check.string(path, value)?;
    let read = AnswerAt::parse(text);
    if read.is_none() {
        check.complain(path, value, "must be `applied` or `decided`");
    }
    read
}

/// `value` in its canonical form; `buffer` is scratch space.
pub(crate) fn read_data(
    check: &mut Checker,
    path: &JsonPath<'_>,
    value: &Value<'_>,
    buffer: &mut String,
) -> Option<Payload> {
    let ValueKind::Object(_) = value.kind else {
        check.complain(path, value, "must be an object");
        return None;
    };
    check.refuse_doubles(path, value);
    buffer.clear();
    value.write(buffer);
    Some(Payload::new(buffer.as_str()))
}
