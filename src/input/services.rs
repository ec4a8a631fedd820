//! `services.json`: the services of `dtc run`, and how each one behaves.
//!
//! ```json
//! [
//!   {"name": "payments", "max_concurrency": 2},
//!   {"name": "stock", "max_concurrency": 1, "max_wait_ms": 0,
//!    "prepare": {"latency_ms": [5, 20], "refuse_rate": 0.1, "fail_for": ["TX7"]},
//!    "commit": {"error_rate": 0.05, "fail_first": 1}}
//! ]
//! ```
//!
//! | field | value | if missing |
//! |---|---|---|
//! | `name` | `[A-Za-z0-9_-]{1,64}`, unique in the file | required |
//! | `max_concurrency` | whole number from 1 to 4294967295 | required |
//! | `max_wait_ms` | whole number from 0 to 86400000 (a day): how long a prepare waits for a slot | 1000 |
//! | `cap` | `"instance"`: each instance has that many slots; `"service"`: all its instances share them | `"instance"` |
//! | `prepare`, `commit`, `abort` | an object as below | succeeds at once |
//!
//! | field of those | value | if missing |
//! |---|---|---|
//! | `latency_ms` | number from 0 to 86400000, or `[min, max]` | 0 |
//! | `refuse_rate` (prepare only), `error_rate`, `panic_rate`, `hang_rate` | number from 0 to 1; together at most 1, since a call ends in one way | 0 |
//! | `fail_first` | whole number from 0 to 4294967295: how many first attempts of each transaction fail | 0 |
//! | `fail_for` | array of transaction ids that always fail | none |
//! | `read_only` (prepare only) | whether it votes that there is nothing to commit | false |

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    time::Duration,
};

use crate::{
    complaint::{Complaints, Position},
    json::{
        Value, ValueKind,
        check::{Checker, DAY_MS, JsonPath, without_byte_order_mark},
    },
    protocol::{
        ids::{ServiceName, TransactionId},
        message::{Cap, MAX_WAIT},
    },
};

/// A service of `dtc run`.
#[derive(Clone, PartialEq, Debug)]
pub struct ServiceSpec {
    /// The name by which transactions refer to it.
    pub name: ServiceName,
    /// How many slots it has: at least 1.
    pub max_concurrency: u32,
    /// How long a prepare may wait for a slot; zero: it is refused if none is free. One second by
    /// default.
    pub max_wait: Duration,
    /// Whether each instance has its own slots or all share them.
    pub cap: Cap,
    /// How its prepare behaves.
    pub prepare: Behaviour,
    /// How its commit behaves. Neither refuses nor is read-only.
    pub commit: Behaviour,
    /// How its abort behaves. Neither refuses nor is read-only.
    pub abort: Behaviour,
}

/// How a call of a service's code behaves. By default it succeeds at once.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Behaviour {
    /// How long it takes.
    pub latency: Latency,
    /// How often it refuses, from 0 to 1. Only a prepare does.
    ///
    /// This rate and the next three are shares of the same calls: together they are at most 1.
    pub refuse_rate: f64,
    /// How often it returns an error, from 0 to 1.
    pub error_rate: f64,
    /// How often it panics, from 0 to 1.
    pub panic_rate: f64,
    /// How often it never returns, from 0 to 1.
    pub hang_rate: f64,
    /// How many first attempts of each transaction return an error.
    pub fail_first: u32,
    /// The transactions for which it always returns an error.
    pub fail_for: BTreeSet<TransactionId>,
    /// Whether it votes that there is nothing to commit. Only a prepare does.
    pub read_only: bool,
}

/// How long a call takes: uniformly distributed from `min` to `max`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Latency {
    /// The shortest duration.
    pub min: Duration,
    /// The longest; not less than `min`.
    pub max: Duration,
}

/// Reads `text`, the content of `file`: one service for each element of the array, in order.
///
/// # Errors
///
/// All errors in it, at once.
pub fn read(file: &str, text: &[u8]) -> Result<Vec<ServiceSpec>, Complaints> {
    let mut check = Checker::of_file(&file.into());
    let services = read_services(&mut check, text);
    check.complaints.or(services)
}

fn read_services(check: &mut Checker, text: &[u8]) -> Option<Vec<ServiceSpec>> {
    let value = check.json(Position::START, without_byte_order_mark(text))?;
    let elements = check.elements(&JsonPath::TOP, &value, "an array of services")?;
    if elements.is_empty() {
        check.complain(&JsonPath::TOP, &value, "must have at least one service");
    }
    let mut taken = BTreeMap::new();
    let mut services = Vec::with_capacity(elements.len());
    for (index, element) in elements.iter().enumerate() {
        let taken = |name: &ServiceName| match taken.entry(name.clone()) {
            Entry::Vacant(entry) => {
                entry.insert(index);
                None
            }
            Entry::Occupied(entry) => Some(*entry.get()),
        };
        services.extend(read_service(check, &JsonPath::TOP.element(index), element, taken));
    }
    Some(services)
}

/// `taken` returns the index of the service that has a name already; otherwise it takes the name.
fn read_service(
    check: &mut Checker,
    path: &JsonPath<'_>,
    value: &Value<'_>,
    mut taken: impl FnMut(&ServiceName) -> Option<usize>,
) -> Option<ServiceSpec> {
    let known = ["name", "max_concurrency", "max_wait_ms", "cap", "prepare", "commit", "abort"];
    let [name, max_concurrency, max_wait, cap, prepare, commit, abort] =
        check.fields(path, value, &known)?;
    let name = check.required(path, value, "name", name).and_then(|value| {
        let path = path.field("name");
        let name = check.name(&path, value, ServiceName::RULE, ServiceName::parse)?;
        if let Some(index) = taken(&name) {
            check.complain(&path, value, format!("must differ from $[{index}].name"));
        }
        Some(name)
    });
    let max_concurrency = check
        .required(path, value, "max_concurrency", max_concurrency)
        .and_then(|value| check.whole_number(&path.field("max_concurrency"), value, 1..=u32::MAX));
    let max_wait = max_wait.map_or(Some(MAX_WAIT), |value| {
        let millis = check.whole_number(&path.field("max_wait_ms"), value, 0..=DAY_MS)?;
        Some(Duration::from_millis(millis.into()))
    });
    let cap = cap.map_or(Some(Cap::Instance), |value| read_cap(check, path, value));
    let mut behaviour = |name, value, is_prepare| {
        read_behaviour(check, &path.field(name), value, is_prepare).unwrap_or_default()
    };
    let prepare = behaviour("prepare", prepare, true);
    let commit = behaviour("commit", commit, false);
    let abort = behaviour("abort", abort, false);
    Some(ServiceSpec {
        name: name?,
        max_concurrency: max_concurrency?,
        max_wait: max_wait?,
        cap: cap?,
        prepare,
        commit,
        abort,
    })
}

fn read_cap(check: &mut Checker, path: &JsonPath<'_>, value: &Value<'_>) -> Option<Cap> {
    let path = path.field("cap");
    match check.string(&path, value)? {
        "instance" => Some(Cap::Instance),
        "service" => Some(Cap::Service),
        _ => {
            check.complain(&path, value, "must be \"instance\" or \"service\"");
            None
        }
    }
}

fn read_behaviour(
    check: &mut Checker,
    path: &JsonPath<'_>,
    value: Option<&Value<'_>>,
    is_prepare: bool,
) -> Option<Behaviour> {
    let known = [
        "latency_ms",
        "refuse_rate",
        "error_rate",
        "panic_rate",
        "hang_rate",
        "fail_first",
        "fail_for",
        "read_only",
    ];
    let value = value?;
    let [latency, refuse_rate, error_rate, panic_rate, hang_rate, fail_first, fail_for, read_only] =
        check.fields(path, value, &known)?;
    for (name, field) in [("refuse_rate", refuse_rate), ("read_only", read_only)] {
        if let Some(value) = field
            && !is_prepare
        {
            check.complain(&path.field(name), value, "only `prepare` has this field");
        }
    }
    let mut rate = |name, field: Option<&Value<'_>>| {
        let rule = "must be a number from 0 to 1";
        let rate = field.and_then(|value| check.number(&path.field(name), value, 1.0, rule));
        rate.unwrap_or_default()
    };
    let refuse_rate = rate("refuse_rate", refuse_rate);
    let error_rate = rate("error_rate", error_rate);
    let panic_rate = rate("panic_rate", panic_rate);
    let hang_rate = rate("hang_rate", hang_rate);
    // Sums such as 0.7 + 0.2 + 0.1 are only nearly 1.
    if refuse_rate + error_rate + panic_rate + hang_rate > 1.0 + 1e-9 {
        check.complain(path, value, "the rates together must be at most 1");
    }
    let fail_first = fail_first
        .and_then(|value| check.whole_number(&path.field("fail_first"), value, 0..=u32::MAX));
    Some(Behaviour {
        latency: latency.and_then(|value| read_latency(check, path, value)).unwrap_or_default(),
        refuse_rate,
        error_rate,
        panic_rate,
        hang_rate,
        fail_first: fail_first.unwrap_or_default(),
        fail_for: fail_for.and_then(|value| read_ids(check, path, value)).unwrap_or_default(),
        read_only: read_only
            .and_then(|value| check.boolean(&path.field("read_only"), value))
            .unwrap_or_default(),
    })
}

fn read_latency(check: &mut Checker, path: &JsonPath<'_>, value: &Value<'_>) -> Option<Latency> {
    let rule = format!("must be a number from 0 to {DAY_MS}, or [min, max] of two such");
    let path = path.field("latency_ms");
    let mut duration = |path: &JsonPath<'_>, value: &Value<'_>| {
        let millis = check.number(path, value, DAY_MS.into(), &rule)?;
        Some(Duration::from_secs_f64(millis / 1000.0))
    };
    let ValueKind::Array(elements) = &value.kind else {
        let latency = duration(&path, value)?;
        return Some(Latency { min: latency, max: latency });
    };
    let [min, max] = elements.as_slice() else {
        check.complain(&path, value, rule);
        return None;
    };
    let (min, max) = (duration(&path.element(0), min), duration(&path.element(1), max));
    let latency = Latency { min: min?, max: max? };
    if latency.min > latency.max {
        check.complain(&path, value, "must be [min, max] with a min of at most max");
    }
    Some(latency)
}

fn read_ids(
    check: &mut Checker,
    path: &JsonPath<'_>,
    value: &Value<'_>,
) -> Option<BTreeSet<TransactionId>> {
    let path = path.field("fail_for");
    let elements = check.elements(&path, value, "an array of transaction ids")?;
    let ids = elements.iter().enumerate().filter_map(|(index, element)| {
        let path = path.element(index);
        check.name(&path, element, TransactionId::RULE, TransactionId::parse)
    });
    Some(ids.collect())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Behaviour, Latency, ServiceSpec, read};
    use crate::protocol::ids::{ServiceName, TransactionId};
    use crate::protocol::message::Cap;

    #[test]
    fn a_service_with_only_what_it_must_have_succeeds_at_once() {
        let services = read("f", br#"[{"name": "a", "max_concurrency": 2}]"#).unwrap();
        let service = ServiceSpec {
            name: ServiceName::parse("a").unwrap(),
            max_concurrency: 2,
            max_wait: Duration::from_secs(1),
            cap: Cap::Instance,
            prepare: Behaviour::default(),
            commit: Behaviour::default(),
            abort: Behaviour::default(),
        };
        assert_eq!(services, [service]);
    }

    #[test]
    fn every_field_is_read() {
        let text =
            br#"[{"name": "a", "max_concurrency": 4294967295, "max_wait_ms": 0, "cap": "service",
            "prepare": {"latency_ms": [0.5, 20], "refuse_rate": 0.1, "error_rate": 0.2,
                        "panic_rate": 0.3, "hang_rate": 0.4, "fail_first": 1,
                        "fail_for": ["TX7", "TX1", "TX7"], "read_only": true},
            "commit": {"latency_ms": 3}, "abort": {"error_rate": 1}}]"#;
        let service = read("f", text).unwrap().remove(0);
        assert_eq!((service.max_concurrency, service.max_wait), (u32::MAX, Duration::ZERO));
        assert_eq!(service.cap, Cap::Service);
        let prepare = Behaviour {
            latency: Latency { min: Duration::from_micros(500), max: Duration::from_millis(20) },
            refuse_rate: 0.1,
            error_rate: 0.2,
            panic_rate: 0.3,
            hang_rate: 0.4,
            fail_first: 1,
            fail_for: ["TX1", "TX7"].map(|id| TransactionId::parse(id).unwrap()).into(),
            read_only: true,
        };
        assert_eq!(service.prepare, prepare);
        let three = Duration::from_millis(3);
        let commit =
            Behaviour { latency: Latency { min: three, max: three }, ..Behaviour::default() };
        assert_eq!(service.commit, commit);
        assert_eq!(service.abort, Behaviour { error_rate: 1.0, ..Behaviour::default() });
    }

    #[test]
    fn a_byte_order_mark_is_skipped() {
        let text = "\u{feff}[{\"name\": \"a\", \"max_concurrency\": 1}]";
        assert_eq!(read("f", text.as_bytes()).unwrap().len(), 1);
    }

    /// Asserts the complaints about a text, without the file's name.
    fn complains<const N: usize>(text: &str, complaints: [&str; N]) {
        let found = read("s.json", text.as_bytes()).unwrap_err().to_string();
        let found: Vec<_> = found.lines().map(|it| it.strip_prefix("s.json").unwrap()).collect();
        assert_eq!(found, complaints);
    }

    /// The same for `fields` of a service that also has a name and a cap.
    fn complains_of<const N: usize>(fields: &str, complaints: [&str; N]) {
        complains(&format!(r#"[{{"name": "a", "max_concurrency": 1, {fields}}}]"#), complaints);
    }

    #[test]
    fn all_complaints_of_a_file_come_at_once() {
        let text = r#"[
            {"name": "a b", "max_concurrency": 0, "max_wait_ms": -1, "caps": 3},
            7,
            {"max_concurrency": 1, "prepare": {"error_rate": 2, "fail_for": ["x", "y z"]}},
            {"name": "c", "max_concurrency": 1},
            {"name": "c"}
        ]"#;
        complains(
            text,
            [
                ": $[0].caps is 3: unknown field; there are `name`, `max_concurrency`, \
                 `max_wait_ms`, `cap`, `prepare`, `commit`, `abort`",
                ": $[0].name is \"a b\": must match [A-Za-z0-9_-]{1,64}",
                ": $[0].max_concurrency is 0: must be a whole number from 1 to 4294967295",
                ": $[0].max_wait_ms is -1: must be a whole number from 0 to 86400000",
                ": $[1] is 7: must be an object",
                ": $[2] is {\"max_concurrency\": 1, \"prepare\": {\"error_rate\": 2, \"fail_for\":…: \
                 must have a field `name`",
                ": $[2].prepare.error_rate is 2: must be a number from 0 to 1",
                ": $[2].prepare.fail_for[1] is \"y z\": must match [A-Za-z0-9._:-]{1,128}",
                ": $[4].name is \"c\": must differ from $[3].name",
                ": $[4] is {\"name\": \"c\"}: must have a field `max_concurrency`",
            ],
        );
    }

    #[test]
    fn what_is_not_an_array_of_services_is_refused() {
        complains("{}", [": $ is {}: must be an array of services"]);
        complains("[]", [": $ is []: must have at least one service"]);
    }

    #[test]
    fn a_cap_is_an_instances_or_the_services() {
        complains_of(
            r#""cap": "worker""#,
            [": $[0].cap is \"worker\": must be \"instance\" or \"service\""],
        );
        complains_of(r#""cap": null"#, [": $[0].cap is null: must be a string"]);
    }

    #[test]
    fn a_number_of_slots_is_a_whole_number_of_32_bits() {
        let rule = "must be a whole number from 1 to 4294967295";
        for cap in ["0", "-1", "1.5", "4294967296", "1e10", "\"2\"", "null", "true", "[1]"] {
            let text = format!(r#"[{{"name": "a", "max_concurrency": {cap}}}]"#);
            complains(&text, [&format!(": $[0].max_concurrency is {cap}: {rule}")]);
        }
        for (cap, number) in [("1", 1), ("2.0", 2), ("3e2", 300)] {
            let text = format!(r#"[{{"name": "a", "max_concurrency": {cap}}}]"#);
            assert_eq!(read("f", text.as_bytes()).unwrap()[0].max_concurrency, number);
        }
    }

    #[test]
    fn a_wait_is_at_most_a_day() {
        complains_of(
            r#""max_wait_ms": 86400001"#,
            [": $[0].max_wait_ms is 86400001: must be a whole number from 0 to 86400000"],
        );
    }

    #[test]
    fn a_rate_is_a_share_of_all_calls() {
        for rate in ["-0.1", "1.01", "\"1\"", "null"] {
            let complaint =
                format!(": $[0].abort.hang_rate is {rate}: must be a number from 0 to 1");
            complains_of(&format!(r#""abort": {{"hang_rate": {rate}}}"#), [&complaint]);
        }
        complains_of(
            r#""prepare": {"refuse_rate": 0.5, "error_rate": 0.6}"#,
            [
                ": $[0].prepare is {\"refuse_rate\": 0.5, \"error_rate\": 0.6}: the rates together must be \
              at most 1",
            ],
        );
        let text = br#"[{"name": "a", "max_concurrency": 1,
            "prepare": {"refuse_rate": 0.1, "error_rate": 0.7, "panic_rate": 0.2}}]"#;
        assert!(read("f", text).is_ok());
    }

    #[test]
    fn only_a_prepare_refuses_or_has_nothing_to_commit() {
        complains_of(
            r#""commit": {"refuse_rate": 0.1}, "abort": {"read_only": true}"#,
            [
                ": $[0].commit.refuse_rate is 0.1: only `prepare` has this field",
                ": $[0].abort.read_only is true: only `prepare` has this field",
            ],
        );
    }

    #[test]
    fn a_latency_is_a_duration_or_two_in_order() {
        let rule = "must be a number from 0 to 86400000, or [min, max] of two such";
        for latency in ["-1", "\"5\"", "[]", "[1]", "[1, 2, 3]", "86400000.5"] {
            let complaint = format!(": $[0].prepare.latency_ms is {latency}: {rule}");
            complains_of(&format!(r#""prepare": {{"latency_ms": {latency}}}"#), [&complaint]);
        }
        let complaint = format!(": $[0].prepare.latency_ms[1] is null: {rule}");
        complains_of(r#""prepare": {"latency_ms": [1, null]}"#, [&complaint]);
        complains_of(
            r#""prepare": {"latency_ms": [2, 1]}"#,
            [": $[0].prepare.latency_ms is [2, 1]: must be [min, max] with a min of at most max"],
        );
    }

    #[test]
    fn every_other_field_of_a_behaviour_has_its_type() {
        complains_of(
            r#""prepare": {"fail_first": -1, "fail_for": "TX1", "read_only": 1, "fail_rate": 0},
               "commit": [], "abort": {"fail_for": [1]}"#,
            [
                ": $[0].prepare.fail_rate is 0: unknown field; there are `latency_ms`, `refuse_rate`, \
                 `error_rate`, `panic_rate`, `hang_rate`, `fail_first`, `fail_for`, `read_only`",
                ": $[0].prepare.fail_first is -1: must be a whole number from 0 to 4294967295",
                ": $[0].prepare.fail_for is \"TX1\": must be an array of transaction ids",
                ": $[0].prepare.read_only is 1: must be true or false",
                ": $[0].commit is []: must be an object",
                ": $[0].abort.fail_for[0] is 1: must be a string",
            ],
        );
    }

    #[test]
    fn a_field_given_twice_is_refused() {
        complains_of(r#""name": "b""#, [": $[0].name is \"b\": must be given once in its object"]);
    }

    #[test]
    fn truncated_json_is_refused_with_line_and_column() {
        complains(
            "[\n  {\"name\": \"a\",\n   \"max_concurrency\": ",
            [":3:23: not JSON: the file ends where a value should be"],
        );
        complains("", [":1:1: not JSON: the file ends where a value should be"]);
    }
}
