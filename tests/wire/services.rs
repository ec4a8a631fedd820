//! services.json, good and bad, compared with the values written into it.

use std::{collections::BTreeSet, time::Duration};

use dtc::{
    input::services::{Behaviour, read},
    protocol::message::Cap,
};
use proptest::prelude::{Just, Strategy, any, prop, prop_oneof, proptest};
use serde_json::{Map, Value, json};

use crate::{assert_readable, damage, only};

/// The behaviours of a call as they are in a file.
fn behaviour(is_prepare: bool) -> impl Strategy<Value = Map<String, Value>> {
    let latency = prop_oneof![
        (0..5000u64).prop_map(|it| json!(it)),
        (0.0..5000.0f64, 0.0..5000.0f64).prop_map(|(a, b)| json!([a.min(b), a.max(b)])),
    ];
    let rate = || (0..=25u32).prop_map(|percent| json!(f64::from(percent) / 100.0));
    let ids = prop::collection::vec("[A-Za-z0-9._:-]{1,20}", 0..4).prop_map(|it| json!(it));
    let optional = prop::option::of::<prop::strategy::BoxedStrategy<Value>>;
    let only_prepare = |it: prop::strategy::BoxedStrategy<Value>| {
        if is_prepare { optional(it).boxed() } else { Just(None).boxed() }
    };
    (
        optional(latency.boxed()),
        only_prepare(rate().boxed()),
        optional(rate().boxed()),
        optional(rate().boxed()),
        optional(rate().boxed()),
        optional(any::<u32>().prop_map(|it| json!(it)).boxed()),
        optional(ids.boxed()),
        only_prepare(any::<bool>().prop_map(|it| json!(it)).boxed()),
    )
        .prop_map(|(latency, refuse, error, panic, hang, first, ids, read_only)| {
            let fields = [
                ("latency_ms", latency),
                ("refuse_rate", refuse),
                ("error_rate", error),
                ("panic_rate", panic),
                ("hang_rate", hang),
                ("fail_first", first),
                ("fail_for", ids),
                ("read_only", read_only),
            ];
            fields.into_iter().filter_map(|(name, it)| Some((name.to_owned(), it?))).collect()
        })
}

fn services() -> impl Strategy<Value = Value> {
    let service = (
        any::<u32>().prop_map(|it| it.max(1)),
        prop::option::of(0..=86_400_000u32),
        prop::option::of(prop::sample::select(vec!["instance", "service"])),
        prop::option::of(behaviour(true)),
        prop::option::of(behaviour(false)),
        prop::option::of(behaviour(false)),
    );
    let named = prop::collection::btree_map("[A-Za-z0-9_-]{1,10}", service, 1..5);
    named.prop_map(|named| {
        let services =
            named.into_iter().map(|(name, (slots, wait, cap, prepare, commit, abort))| {
                let mut service = json!({"name": name, "max_concurrency": slots});
                let rest = [
                    ("max_wait_ms", wait.map(|it| json!(it))),
                    ("cap", cap.map(|it| json!(it))),
                    ("prepare", prepare.map(|it| json!(it))),
                    ("commit", commit.map(|it| json!(it))),
                    ("abort", abort.map(|it| json!(it))),
                ];
                for (name, value) in rest {
                    if let Some(value) = value {
                        service[name] = value;
                    }
                }
                service
            });
        services.collect()
    })
}

/// Asserts that `behaviour` has the values of the file.
fn assert_behaves(behaviour: &Behaviour, file: &Value) {
    let rate = |name: &str| file[name].as_f64().unwrap_or_default();
    assert_eq!(behaviour.refuse_rate, rate("refuse_rate"));
    assert_eq!(behaviour.error_rate, rate("error_rate"));
    assert_eq!(behaviour.panic_rate, rate("panic_rate"));
    assert_eq!(behaviour.hang_rate, rate("hang_rate"));
    assert_eq!(u64::from(behaviour.fail_first), file["fail_first"].as_u64().unwrap_or_default());
    assert_eq!(behaviour.read_only, file["read_only"].as_bool().unwrap_or_default());
    let ids = file["fail_for"].as_array().into_iter().flatten();
    let ids: BTreeSet<_> = ids.filter_map(Value::as_str).collect();
    assert_eq!(behaviour.fail_for.iter().map(|id| id.as_str()).collect::<BTreeSet<_>>(), ids);
    let millis =
        |value: &Value| Duration::from_secs_f64(value.as_f64().unwrap_or_default() / 1000.0);
    let latency = &file["latency_ms"];
    let [min, max] = if latency.is_array() { [&latency[0], &latency[1]] } else { [latency; 2] };
    let (min, max) = (millis(min), millis(max));
    assert_eq!((behaviour.latency.min, behaviour.latency.max), (min, max));
}

proptest! {
    #[test]
    fn any_bytes_are_services_or_complained_about(text in any::<Vec<u8>>()) {
        if let Err(complaints) = read("s.json", &text) {
            assert_readable(&complaints, "s.json:");
        }
    }

    #[test]
    fn a_damaged_file_is_services_or_complained_about(file in services(), damage in damage()) {
        if let Err(complaints) = read("s.json", &damage.to(&file.to_string())) {
            assert_readable(&complaints, "s.json:");
        }
    }

    #[test]
    fn a_good_file_is_read_completely(file in services()) {
        let services = read("s.json", file.to_string().as_bytes()).unwrap();
        assert_eq!(services.len(), file.as_array().unwrap().len());
        for (index, service) in services.iter().enumerate() {
            let file = &file[index];
            assert_eq!(service.name.as_str(), file["name"]);
            assert_eq!(service.max_concurrency, file["max_concurrency"]);
            let wait = file["max_wait_ms"].as_u64().unwrap_or(1000);
            assert_eq!(service.max_wait, Duration::from_millis(wait));
            let is_service = file["cap"] == "service";
            assert_eq!(service.cap, if is_service { Cap::Service } else { Cap::Instance });
            assert_behaves(&service.prepare, &file["prepare"]);
            assert_behaves(&service.commit, &file["commit"]);
            assert_behaves(&service.abort, &file["abort"]);
        }
    }

    #[test]
    fn one_broken_field_is_one_complaint_at_its_place(
        mut file in services(),
        at in any::<prop::sample::Index>(),
        (name, value) in prop::sample::select(vec![
            ("name", json!("a.b")),
            ("name", json!(null)),
            ("max_concurrency", json!(0)),
            ("max_wait_ms", json!(0.5)),
            ("cap", json!("Service")),
            ("prepare", json!(1)),
            ("commit", json!([])),
            ("abort", json!(null)),
            ("Name", json!("a")),
        ]),
    ) {
        let index = at.index(file.as_array().unwrap().len());
        file[index][name] = value.clone();
        let complaints = read("s.json", file.to_string().as_bytes()).unwrap_err();
        let (complaint, path) = only(&complaints);
        assert_eq!(path, format!("$[{index}].{name}"));
        assert_eq!(complaint.value, Some(value.to_string()));
    }
}
