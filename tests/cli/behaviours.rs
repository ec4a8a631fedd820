//! What services do, and what becomes of the transactions.

use crate::world::{World, output, transaction};
use serde_json::{Value, json};

/// TX1 over `tested`, which does as `behaviour` says, and over `other`, which does what it should.
fn with(behaviour: &Value) -> World {
    let mut tested = json!({"name": "tested", "max_concurrency": 1});
    let tested_fields = tested.as_object_mut().unwrap();
    tested_fields.extend(behaviour.as_object().unwrap().clone());
    let services = json!([tested, {"name": "other", "max_concurrency": 1}]);
    World::with(&services, &json!([transaction("TX1", &["tested", "other"])]))
}

#[test]
fn an_error_a_panic_or_a_hang_aborts_and_the_service_hears_the_abort() {
    for (behaviour, message) in [
        ("error_rate", "simulated error"),
        ("panic_rate", "panicked: simulated"),
        ("hang_rate", "timed out"),
    ] {
        let told = with(&json!({"prepare": {behaviour: 1}})).tell_all(&["--timeout-ms", "500"]);
        let result = &told.results[0];
        assert_eq!(result["status"], "ABORTED", "{behaviour}");
        assert_eq!(result["reason"]["code"], "failed", "{behaviour}");
        assert_eq!(result["reason"]["service"], "tested", "{behaviour}");
        assert_eq!(result["reason"]["message"], message, "{behaviour}");
        assert_eq!(told.calls("tested"), [1, 0, 1], "{behaviour}");
        assert_eq!(told.calls("other"), [1, 0, 1], "{behaviour}");
        assert!(!told.stderr.contains("panicked at"), "{}", told.stderr);
    }
}
