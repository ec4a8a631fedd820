//! deploy/asyncapi.yaml says what is written and read, and what is declared, and nothing else.

use std::{collections::BTreeSet, sync::LazyLock, time::Duration};

use dtc::{
    transport::amqp::{
        names::{Names, Namespace},
        topology::{Argument, Arguments, Cap, ServiceTopology, Settings, Topology},
    },
    wire::message::{Kind, decode_request},
};
use jsonschema::Validator;
use serde_json::{Map, Value, json};

use super::*;

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/asyncapi.yaml");
    serde_yaml_ng::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
});

/// A kind in one word, as the document has it.
fn word(kind: Kind) -> &'static str {
    kind.as_type().strip_prefix("dtc.").unwrap().strip_suffix(".v1").unwrap()
}

/// What says whether something is as the document has it at `place`.
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

/// Items of a kind that together have every field, and whether one is read.
struct Sample {
    kind: Kind,
    items: Vec<Value>,
    is_read: fn(&Value) -> bool,
}

fn sample<T: Item + Debug>(items: &[T]) -> Sample {
    let items: Value = serde_json::from_slice(&body(items)).unwrap();
    let items = items.as_array().unwrap().clone();
    let is_read = |item: &Value| {
        let body = json!([item]).to_string();
        decode::<T>(body.as_bytes()).unwrap()[0].is_ok()
    };
    Sample { kind: T::KIND, items, is_read }
}

fn samples() -> Vec<Sample> {
    let finish =
        Finish { key: key(), outcome: Outcome::Committed, branch: Some(branch()), parked: true };
    let failed = Ballot::Failed { branch: branch(), reason: sold_out() };
    let votes = [
        vote(Ballot::Prepared { branch: branch() }),
        vote(Ballot::ReadOnly),
        vote(Ballot::Refused(sold_out())),
        vote(failed),
        vote(Ballot::Finished(Outcome::Aborted)),
    ];
    let aborted = Decision { reason: Some(sold_out()), ..committed() };
    let unresolved =
        Answer { reason: Some(sold_out()), unresolved: vec![service("a")], ..answer() };
    let full = Request {
        timeout: Some(Duration::from_millis(500)),
        reply: Some(ReplyToken::parse("r-1").unwrap()),
        ..request()
    };
    let undecidable = parked(Matter::Undecidable(full));
    let asked = sample(std::slice::from_ref(&undecidable)).items[0]["request"].clone();
    vec![
        Sample {
            kind: Kind::Request,
            items: vec![asked],
            is_read: |it| decode_request(it.to_string().as_bytes(), Some(1_700_000_000)).is_ok(),
        },
        sample(&[prepare(r#"{"amount":100}"#)]),
        sample(&[Query { key: key(), request_hash: hash() }]),
        sample(&[Cancel(key())]),
        sample(&[finish]),
        sample(&votes),
        sample(&[done(Err("no disk".into()), true)]),
        sample(&[inquiry()]),
        sample(&[aborted]),
        sample(&[unresolved]),
        sample(&[uncommitted(Some("no disk")), undecidable]),
        sample(&[settled()]),
        sample(&[JournalBegun { complete_since: moment() }]),
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
fn the_fields_that_are_written_are_the_ones_described() {
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

/// Whatever is left out of an item or stands in the place of a field: what is described is read, and
/// what is not described is not.
#[test]
fn what_is_described_is_what_is_read() {
    let mut counts = [0; 2];
    for Sample { kind, items, is_read } in samples() {
        let validator = validator(&format!("schemas/{}", word(kind)));
        let mut check = |item: &Value| {
            let described = validator.is_valid(item);
            assert_eq!(is_read(item), described, "{kind:?}: {item}");
            counts[usize::from(described)] += 1;
        };
        for item in &items {
            check(item);
            for name in item.as_object().unwrap().keys() {
                let mut without = item.clone();
                without.as_object_mut().unwrap().remove(name);
                check(&without);
                // A record with a request says it twice, and both must agree.
                if kind == Kind::Parked && item.get("request").is_some() {
                    continue;
                }
                for value in strange_values() {
                    let mut changed = item.clone();
                    changed[name] = value;
                    check(&changed);
                }
            }
        }
    }
    println!("{} items were read, as described, and {} were not", counts[1], counts[0]);
    assert!(counts.iter().all(|count| *count > 100), "{counts:?}");
}

fn strange_values() -> Vec<Value> {
    vec![
        json!(-1),
        json!(0),
        json!(1.5),
        json!(253_402_300_800_u64),
        json!(253_402_300_800_000_u64),
        json!(4_294_967_296_u64),
        json!(""),
        json!("a.b"),
        json!("ü"),
        json!("x".repeat(65)),
        json!("x".repeat(129)),
        json!("stock-1.123456789012345678901"),
        json!("committed"),
        json!("ABORTED"),
        json!("prepared"),
        json!("finished"),
        json!("0123456789ABCDEF0123456789ABCDEF"),
        json!(true),
        json!([]),
        json!(["a", "b"]),
        json!([1]),
        json!({}),
        json!({"code": "refused"}),
        json!({"code": "other"}),
        json!({"a": 1}),
    ]
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
fn what_is_declared_is_what_is_described() {
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
        (what.get("exclusive") != Some(&json!(true))).then(|| json!([what, arguments]).to_string())
    });
    let mut described: Vec<_> = described.collect();
    declared.sort();
    described.sort();
    assert_eq!(declared, described);
}
