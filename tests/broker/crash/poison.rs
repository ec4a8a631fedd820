//! A request that no worker survives.

use std::time::Duration;

use dtc::protocol::message::{Outcome, ReasonCode};
use serde_json::json;

use super::{
    System,
    ledger::assert_none_called_again,
    load::{Load, Plan},
    stream::{Watch, waiting_in},
    until,
};
use crate::broker::place;

/// So many workers die of it.
const CRASHES: usize = 25;
/// So many times a request may be delivered before it is given up.
const DELIVERIES_MAX: usize = 20;

#[test]
fn a_request_that_25_workers_die_of_ends_aborted() {
    let hangs = json!({"name": "payments", "max_concurrency": 3, "prepare": {"hang_rate": 1}});
    let system = System::new(place(), json!([hangs]));
    let instance = system.instance("payments", "payments", &[]);
    let journal = Watch::journal(&system);
    let commands = Watch::commands(&system);
    let timeout = Some(Duration::from_secs(3600));
    let plan = Plan { services: &["payments"], total: 1, per_second: 100, timeout };
    let load = Load::start(&system, "t", plan);

    // Whoever has taken it asks the service, or gives it up for good.
    let mut asked = 0;
    for number in 0..CRASHES {
        let name = format!("w{number}");
        let mut worker = system.worker(&name, &[]);
        let decided = || !journal.decisions("t-0").is_empty();
        until("it takes the request", || commands.has_asked(&name) || decided());
        asked += usize::from(commands.has_asked(&name));
        worker.kill9();
    }
    let worker = system.worker("survivor", &[]);
    let results = load.results();
    until("the request is gone", || waiting_in(&system, system.names.requests()) == 0);

    let answer = &results.0[0].answer;
    let reason = answer.reason.clone().unwrap();
    println!(
        "{CRASHES} workers crashed; {asked} deliveries in vain, and the next one ended it: {} \
        ({}: {})",
        answer.outcome,
        reason.code,
        reason.message.as_deref().unwrap_or_default()
    );
    assert_eq!((answer.outcome, reason.code), (Outcome::Aborted, ReasonCode::Failed));
    assert_eq!(asked, DELIVERIES_MAX);
    let decisions = journal.decisions("t-0");
    assert!(decisions.iter().all(|it| it.outcome == Outcome::Aborted), "{decisions:?}");
    let ledgers = system.ledgers();
    assert_eq!(ledgers[0].started("prepare"), 1, "whatever dies, the service is called once");
    assert_none_called_again(&ledgers);
    drop((instance, worker));
}
