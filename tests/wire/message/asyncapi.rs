//! deploy/asyncapi.yaml describes exactly what is written, read, and declared.

use std::{collections::BTreeSet, sync::LazyLock, time::Duration};

use dtc::{
    protocol::message::Cap,
    transport::amqp::{
        names::{Names, Namespace},
        topology::{Argument, Arguments, ServiceTopology, Settings, Topology},
    },
    wire::message::{Kind, decode_request},
};
use jsonschema::Validator;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop, prop_oneof, proptest};
use serde_json::{Map, Value, json};

use super::*;

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/asyncapi.yaml");
    serde_yaml_ng::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
});

/// The keys of the document, of AsyncAPI, its AMQP bindings and JSON Schema, apart from names.
const KEYS: [&str; 53] = [
    "$ref",
    "ack",
    "action",
    "additionalProperties",
    "address",
    "allOf",
    "amqp",
    "anyOf",
    "asyncapi",
    "autoDelete",
    "bindings",
    "channel",
    "channels",
    "components",
    "const",
    "defaultContentType",
    "description",
    "durable",
    "enum",
    "exchange",
    "exclusive",
    "headers",
    "host",
    "if",
    "info",
    "is",
    "items",
    "license",
    "maximum",
    "maxItems",
    "messages",
    "messageType",
    "minimum",
    "minItems",
    "name",
    "oneOf",
    "operations",
    "parameters",
    "pattern",
    "payload",
    "properties",
    "propertyNames",
    "protocol",
    "protocolVersion",
    "queue",
    "required",
    "schemas",
    "servers",
    "then",
    "title",
    "type",
    "version",
    "x-arguments",
];

/// The keys whose values are maps from names.
const MAPS: [&str; 8] = [
    "channels",
    "messages",
    "operations",
    "parameters",
    "properties",
    "schemas",
    "servers",
    "x-arguments",
];

/// Values that are missing, and keys that nobody knows. In a mapping on one line, a comma in a text
/// without quotes ends the text, and what follows is a key without a value.
fn slips(value: &Value, path: &str, are_names: bool) -> Vec<String> {
    match value {
        Value::Null => vec![format!("{path}: no value")],
        Value::Array(items) => {
            let items = items.iter().enumerate();
            items.flat_map(|(index, it)| slips(it, &format!("{path}[{index}]"), false)).collect()
        }
        Value::Object(fields) => {
            let of_field = |(key, value): (&String, &Value)| {
                let path = format!("{path}.{key}");
                let is_known = are_names || KEYS.contains(&key.as_str());
                let unknown = (!is_known).then(|| format!("{path}: unknown key"));
                let are_names = !are_names && MAPS.contains(&key.as_str());
                unknown.into_iter().chain(slips(value, &path, are_names)).collect::<Vec<_>>()
            };
            fields.iter().flat_map(of_field).collect()
        }
        Value::Bool(_) | Value::Number(_) | Value::String(_) => Vec::new(),
    }
}

#[test]
fn a_text_with_a_comma_does_not_end_there() {
    assert_eq!(slips(&DOCUMENT, "$", false), [""; 0]);
    let line = "schemas: {a: {type: string, description: As in a vote, if it has one.}}";
    let found = slips(&serde_yaml_ng::from_str(line).unwrap(), "$", false);
    let key = "$.schemas.a.if it has one.";
    assert_eq!(found, [format!("{key}: unknown key"), format!("{key}: no value")]);
    let line = "schemas: {if: {type: string}, b: {if: }}";
    let found = slips(&serde_yaml_ng::from_str(line).unwrap(), "$", false);
    assert_eq!(found, ["$.schemas.b.if: no value"], "a name may be any word");
}

/// A kind in one word, as in the document.
fn word(kind: Kind) -> &'static str {
    kind.as_type().strip_prefix("dtc.").unwrap().strip_suffix(".v1").unwrap()
}

/// A validator for what the document has at `place`.
fn validator(place: &str) -> Validator {
    let components = &DOCUMENT["components"];
    let schema = json!({"$ref": format!("#/components/{place}"), "components": components});
    jsonschema::draft7::new(&schema).unwrap()
}

/// Asserts that the document allows this body.
pub(super) fn allows(kind: Kind, body: &str) {
    let body: Value = serde_json::from_str(body).unwrap();
    let validator = validator(&format!("messages/{}/payload", word(kind)));
    let errors: Vec<_> = validator.iter_errors(&body).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "{kind:?}: {body}: {errors:?}");
}

/// Items of a kind that together have every field, and the complaints about one.
struct Sample {
    kind: Kind,
    items: Vec<Value>,
    read: fn(&Value) -> Result<(), String>,
}

fn sample<T: Item + Debug>(items: &[T]) -> Sample {
    let items: Value = serde_json::from_slice(&body(items)).unwrap();
    let items = items.as_array().unwrap().clone();
    let read = |item: &Value| {
        let body = json!([item]).to_string();
        match &decode::<T>(body.as_bytes()).unwrap()[0] {
            Ok(_) => Ok(()),
            Err(malformed) => Err(malformed.to_string()),
        }
    };
    Sample { kind: T::KIND, items, read }
}

fn samples() -> Vec<Sample> {
    let finish =
        Finish { key: key(), outcome: Outcome::Committed, branch: Some(branch()), parked: true };
    let failed = VoteKind::Failed { branch: branch(), reason: sold_out() };
    let votes = [
        vote(VoteKind::Prepared { branch: branch() }),
        vote(VoteKind::ReadOnly),
        vote(VoteKind::Refused(sold_out())),
        vote(failed),
        Vote { store: StoreId::parse("s1").ok(), ..vote(VoteKind::Finished(Outcome::Aborted)) },
    ];
    let done = Done { store: StoreId::parse("s1").ok(), ..done(Err("no disk".into()), true) };
    let aborted = Decision { reason: Some(sold_out()), ..committed() };
    let unresolved =
        Answer { reason: Some(sold_out()), unresolved: vec![service("a")], ..answer() };
    let full = Request {
        timeout: Some(Duration::from_millis(500)),
        answer_at: AnswerAt::Decided,
        reply: Some(ReplyToken::parse("r-1").unwrap()),
        ..request()
    };
    let undecidable = parked(ParkedCause::Undecidable(full));
    let asked = sample(std::slice::from_ref(&undecidable)).items[0]["request"].clone();
    vec![
        Sample {
            kind: Kind::Request,
            items: vec![asked],
            read: |it| {
                let read = decode_request(it.to_string().as_bytes(), Some(1_700_000_000));
                read.map(drop).map_err(|malformed| malformed.to_string())
            },
        },
        sample(&[prepare(r#"{"amount":100}"#)]),
        sample(&[Query { key: key(), request_hash: hash() }]),
        sample(&[Cancel(key())]),
        sample(&[finish]),
        sample(&votes),
        sample(&[done]),
        sample(&[inquiry()]),
        sample(&[aborted]),
        sample(&[unresolved]),
        sample(&[uncommitted(Some("no disk")), undecidable]),
        sample(&[settled()]),
        sample(&[JournalBegun { complete_since: moment() }]),
        sample(&[copied()]),
    ]
}

fn names_of<'a>(objects: impl IntoIterator<Item = &'a Value>) -> BTreeSet<String> {
    objects.into_iter().flat_map(|it| it.as_object().unwrap().keys().cloned()).collect()
}

#[test]
fn every_kind_has_a_message_and_no_other_has() {
    let kinds: BTreeSet<_> = Kind::ALL.iter().map(|kind| word(*kind).to_owned()).collect();
    let messages = &DOCUMENT["components"]["messages"];
    assert_eq!(names_of([messages]), kinds);
    assert_eq!(samples().iter().map(|it| word(it.kind).to_owned()).collect::<BTreeSet<_>>(), kinds);
    for kind in Kind::ALL {
        let said = &messages[word(kind)]["bindings"]["amqp"]["messageType"];
        assert_eq!(said, kind.as_type());
    }
}

#[test]
fn the_written_fields_are_those_of_the_document() {
    let schemas = &DOCUMENT["components"]["schemas"];
    for Sample { kind, items, .. } in samples() {
        let described = names_of([&schemas[word(kind)]["properties"]]);
        assert_eq!(names_of(&items), described, "{kind:?}");
        let reasons = items.iter().filter_map(|item| item.get("reason")).collect::<Vec<_>>();
        if !reasons.is_empty() {
            assert_eq!(names_of(reasons), names_of([&schemas["reasonObject"]["properties"]]));
        }
    }
}

/// A kind's items, as the document describes them and as they are read.
struct Judge {
    sample: Sample,
    described: Validator,
}

static JUDGES: LazyLock<Vec<Judge>> = LazyLock::new(|| {
    let judge = |sample: Sample| {
        let described = validator(&format!("schemas/{}", word(sample.kind)));
        Judge { sample, described }
    };
    samples().into_iter().map(judge).collect()
});

static STRANGE: LazyLock<Vec<Value>> = LazyLock::new(strange_values);

impl Judge {
    /// Asserts that `item` is read exactly if it matches the document; returns which.
    fn judge(&self, item: &Value) -> bool {
        if has_branch_beyond(item) {
            return false;
        }
        let mut plain = item.clone();
        if self.sample.kind != Kind::Request {
            drop_nulls(&mut plain);
        }
        let is_described = self.described.is_valid(&plain);
        let read = (self.sample.read)(item).or_else(only_another_request);
        assert_eq!(read.is_ok(), is_described, "{:?}: {item}: {read:?}", self.sample.kind);
        is_described
    }

    fn names(&self) -> BTreeSet<String> {
        names_of([&DOCUMENT["components"]["schemas"][word(self.sample.kind)]["properties"]])
    }
}

/// The document says in words: an optional field may be `null`, except in a request.
fn drop_nulls(item: &mut Value) {
    let Some(item) = item.as_object_mut() else { return };
    item.retain(|_, value| !value.is_null());
    if let Some(reason) = item.get_mut("reason").and_then(Value::as_object_mut) {
        reason.retain(|_, value| !value.is_null());
    }
}

/// The document says in words: a branch's number is below 2^64.
fn has_branch_beyond(value: &Value) -> bool {
    match value {
        Value::String(text) => text.rsplit_once('.').is_some_and(|(_, number)| {
            number.len() == 20
                && number.bytes().all(|byte| byte.is_ascii_digit())
                && number.parse::<u64>().is_err()
        }),
        Value::Array(elements) => elements.iter().any(has_branch_beyond),
        Value::Object(fields) => fields.values().any(has_branch_beyond),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

/// A record with a request repeats some of it, and both must agree. No schema can express that.
fn only_another_request(complaints: String) -> Result<(), String> {
    let is_that = |line: &str| {
        line.contains(": must be of the transaction `")
            || line.ends_with(": must be what `request_hash` says")
    };
    if complaints.lines().all(is_that) { Ok(()) } else { Err(complaints) }
}

/// The path from the top of an item to a value in it.
type Way = Vec<String>;

/// A path as a JSON pointer.
fn pointer(way: &[String]) -> String {
    let escaped = |step: &String| format!("/{}", step.replace('~', "~0").replace('/', "~1"));
    way.iter().map(escaped).collect()
}

/// The paths to all values in `value`, except in fields that may have any content.
fn ways(value: &Value) -> Vec<Way> {
    let inside: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(name, it)| (name.clone(), it)).collect(),
        Value::Array(elements) => {
            elements.iter().enumerate().map(|(index, it)| (index.to_string(), it)).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => return Vec::new(),
    };
    let below = |(step, it): (String, &Value)| {
        let more = if step == "data" { Vec::new() } else { ways(it) };
        let onward = more.into_iter().map(|way| [vec![step.clone()], way].concat());
        [vec![vec![step.clone()]], onward.collect()].concat()
    };
    inside.into_iter().flat_map(below).collect()
}

/// A change of a value.
#[derive(Clone, Debug)]
enum Change {
    Remove,
    Become(Value),
    /// So many more of its first character, or its last.
    Grow(usize, bool),
    Append(char),
    /// An array with so many of its first element, or an object with one more field.
    Repeat(usize),
    Add(String, Value),
}

impl Change {
    /// Applies it at the end of `way`; changes nothing where it doesn't fit.
    fn apply(&self, item: &mut Value, way: &[String]) {
        let Some((last, before)) = way.split_last() else { return };
        let Some(place) = item.pointer_mut(&pointer(before)) else { return };
        if let Self::Remove = self {
            if let Value::Object(fields) = place {
                fields.remove(last);
            } else if let (Value::Array(elements), Ok(at)) = (place, last.parse::<usize>()) {
                elements.remove(at);
            }
            return;
        }
        let Some(value) = item.pointer_mut(&pointer(way)) else { return };
        match (self, value) {
            (Self::Become(new), value) => *value = new.clone(),
            (Self::Grow(count, true), Value::String(text)) => {
                if let Some(first) = text.chars().next() {
                    text.insert_str(0, &String::from(first).repeat(*count));
                }
            }
            (Self::Grow(count, false), Value::String(text)) => {
                if let Some(last) = text.chars().last() {
                    text.push_str(&String::from(last).repeat(*count));
                }
            }
            (Self::Append(more), Value::String(text)) => text.push(*more),
            (Self::Repeat(count), Value::Array(elements)) => {
                let first = elements.first().cloned().unwrap_or_else(|| json!("a"));
                *elements = vec![first; *count];
            }
            (Self::Add(name, new), Value::Object(fields)) => {
                drop(fields.insert(name.clone(), new.clone()))
            }
            _ => {}
        }
    }
}

/// Every limit, word and type of the document, and values just beyond.
fn strange_values() -> Vec<Value> {
    let mut values = vec![
        json!(null),
        json!(true),
        json!(false),
        json!(0),
        json!(1.0),
        json!(1.5),
        json!(-1),
        json!(1e300),
        json!(""),
        json!("a"),
        json!("ü"),
        json!("a.1"),
        json!("a.01"),
        json!("a.+1"),
        json!("a.b.0"),
        json!("a.18446744073709551615"),
        json!("0123456789ABCDEF0123456789ABCDEF"),
        json!([]),
        json!([1]),
        json!(["a", "b"]),
        json!(["a", "a"]),
        json!(["a", ""]),
        json!({}),
        json!({"a": "a.1"}),
        json!({"a b": "a.1"}),
        json!({"a": 1}),
        json!({"code": "refused"}),
        json!({"code": "refused", "service": "a.b"}),
        json!({"service": "a"}),
    ];
    collect_bounds(&DOCUMENT["components"]["schemas"], &mut values);
    for outcome in [Outcome::Committed, Outcome::Aborted] {
        values.push(json!(outcome.as_str().to_lowercase()));
    }
    values.extend(ReasonCode::all().map(|code| json!(code.as_str())));
    let mut seen = BTreeSet::new();
    values.retain(|value| seen.insert(value.to_string()));
    values
}

fn collect_bounds(schema: &Value, values: &mut Vec<Value>) {
    match schema {
        Value::Object(fields) => {
            for (name, it) in fields {
                match (name.as_str(), it.as_i64()) {
                    ("minimum" | "maximum", Some(bound)) => {
                        values.extend([bound - 1, bound, bound + 1].map(|it| json!(it)));
                    }
                    ("enum", _) => values.extend(it.as_array().unwrap().iter().cloned()),
                    ("const", _) => values.push(it.clone()),
                    _ => collect_bounds(it, values),
                }
            }
        }
        Value::Array(elements) => elements.iter().for_each(|it| collect_bounds(it, values)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// The longest text of any field, and some more.
const LONGEST: usize = 140;
/// The most services that a request may name.
const MANY: usize = 1000;

/// Changes one thing in an item: a value is removed, replaced at any depth, too long, or added. The
/// item is read exactly if it matches the document.
#[test]
fn messages_are_read_exactly_if_they_match_the_document() {
    let characters: Vec<_> = (0..128_u8).map(char::from).chain(['é', '\u{2028}']).collect();
    let mut counts = [0; 2];
    for judge in &*JUDGES {
        let names = judge.names();
        for item in &judge.sample.items {
            let mut count = |item: &Value| counts[usize::from(judge.judge(item))] += 1;
            count(item);
            let mut changed = |way: &[String], change: Change| {
                let mut changed = item.clone();
                change.apply(&mut changed, way);
                count(&changed);
            };
            for way in ways(item) {
                changed(&way, Change::Remove);
                for value in &*STRANGE {
                    changed(&way, Change::Become(value.clone()));
                }
                let value = item.pointer(&pointer(&way)).unwrap();
                if value.is_string() {
                    for count in 1..=LONGEST {
                        changed(&way, Change::Grow(count, true));
                        changed(&way, Change::Grow(count, false));
                    }
                    characters.iter().for_each(|it| changed(&way, Change::Append(*it)));
                }
                if value.is_array() {
                    for count in [0, 1, 2, MANY, MANY + 1] {
                        changed(&way, Change::Repeat(count));
                        let names = (0..count).map(|number| format!("s{number}"));
                        changed(&way, Change::Become(names.collect()));
                    }
                }
                if value.is_object() {
                    changed(&way, Change::Add("unheard_of".to_owned(), json!(1)));
                }
            }
            for name in names.iter().map(String::as_str).chain(["unheard_of"]) {
                for value in &*STRANGE {
                    let mut more = item.clone();
                    more[name] = value.clone();
                    count(&more);
                }
            }
        }
    }
    println!("{} items were read, as described, and {} were not", counts[1], counts[0]);
    assert!(counts.iter().all(|count| *count > 5000), "{counts:?}");
}

fn change() -> impl Strategy<Value = Change> {
    let value = prop_oneof![
        3 => prop::sample::select(&STRANGE[..]),
        1 => crate::object().prop_map(Value::Object),
    ];
    prop_oneof![
        2 => Just(Change::Remove),
        4 => value.clone().prop_map(Change::Become),
        1 => (1..=LONGEST, any::<bool>()).prop_map(|(count, front)| Change::Grow(count, front)),
        1 => any::<char>().prop_map(Change::Append),
        1 => (0..3_usize).prop_map(Change::Repeat),
        1 => ("[a-z_]{1,8}", value).prop_map(|(name, value)| Change::Add(name, value)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// The same for several changes at once, as where one field decides which others are required.
    #[test]
    fn messages_with_several_changes_are_read_exactly_if_they_match_the_document(
        changes in prop::collection::vec((any::<prop::sample::Index>(), change()), 1..5),
        more in prop::option::of((any::<prop::sample::Index>(), prop::sample::select(&STRANGE[..]))),
    ) {
        for judge in &*JUDGES {
            let names: Vec<_> = judge.names().into_iter().collect();
            for mut item in judge.sample.items.clone() {
                if let Some((name, value)) = &more {
                    item[name.get(&names)] = value.clone();
                }
                for (way, change) in &changes {
                    let ways = ways(&item);
                    if !ways.is_empty() {
                        change.apply(&mut item, way.get::<Way>(&ways));
                    }
                }
                judge.judge(&item);
            }
        }
    }
}

#[test]
fn a_branch_has_one_spelling_and_a_number_below_2_to_the_64() {
    for (number, is_good) in [
        ("0", true),
        ("18446744073709551615", true),
        ("18446744073709551616", false),
        ("00", false),
        ("042", false),
        ("", false),
    ] {
        let item = json!({"id": "a", "requested_at": 1, "outcome": "COMMITTED", "branch": format!("i.{number}")});
        let read = decode::<Finish>(json!([item]).to_string().as_bytes()).unwrap();
        assert_eq!(read[0].is_ok(), is_good, "{number}");
    }
}

fn table(arguments: &Arguments) -> Value {
    let value = |argument: &Argument| match argument {
        Argument::Number(number) => json!(number),
        Argument::Text(text) => json!(text),
        Argument::Flag(flag) => json!(flag),
    };
    arguments.iter().map(|(name, it)| (name.clone(), value(it))).collect::<Map<_, _>>().into()
}

#[test]
fn the_declared_topology_is_that_of_the_document() {
    let names = Names::new(Namespace::default());
    let max_wait = Duration::from_secs(1);
    let shop = ServiceTopology { name: service("shop"), max_wait, cap: Cap::Instance };
    let topology = Topology::of(&names, &[shop], &Settings::default());
    let declared = topology.exchanges.iter().map(|it| {
        let exchange =
            json!({"name": it.name.as_str(), "type": it.kind.to_string(), "durable": true});
        (exchange, table(&it.arguments()))
    });
    let declared = declared.chain(topology.queues.iter().map(|it| {
        let queue = json!({"name": it.name.as_str(), "durable": true, "exclusive": false,
            "autoDelete": false});
        (queue, table(&it.all_arguments()))
    }));
    let mut declared: Vec<_> = declared.map(|it| json!(it).to_string()).collect();

    let channels = DOCUMENT["channels"].as_object().unwrap().values();
    let described = channels.filter_map(|channel| {
        let amqp = &channel["bindings"]["amqp"];
        let what = amqp.get("exchange").or_else(|| amqp.get("queue")).unwrap();
        let name = what["name"].as_str().unwrap().replace("{service}", "shop");
        let mut what = what.clone();
        what["name"] = json!(name);
        let arguments = channel.get("x-arguments").cloned().unwrap_or_else(|| json!({}));
        // The exclusive queues of clients are not part of the topology.
        let goes = ["exclusive", "autoDelete"].iter().any(|it| what.get(it) == Some(&json!(true)));
        (!goes).then(|| json!([what, arguments]).to_string())
    });
    let mut described: Vec<_> = described.collect();
    declared.sort();
    described.sort();
    assert_eq!(declared, described);
}
