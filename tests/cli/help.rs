//! What the command says about itself, and about being called wrongly.

use crate::world::{World, assert_golden, dtc, output, transaction};
use serde_json::json;

#[test]
fn a_log_level_that_is_none_is_refused_rather_than_ignored() {
    let services = json!([{"name": "a", "max_concurrency": 1}]);
    let world = World::with(&services, &json!([transaction("TX1", &["a"])]));
    output(world.run().env("DTC_LOG", "verbose"))
        .exited(2)
        .silent()
        .saying("DTC_LOG is `verbose`: must be one of error, warn, info, debug, trace, off\n");
    let ended = output(world.run().env("DTC_LOG", "debug")).exited(0);
    assert_eq!(ended.statuses(), ["TX1 COMMITTED"]);
    output(world.run().env("DTC_LOG", "")).exited(0);
}
