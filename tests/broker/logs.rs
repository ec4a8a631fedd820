//! Which worker, transaction and service a line of a worker's log is about.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::{
    collections::BTreeMap,
    fmt::Debug,
    sync::{Arc, Mutex},
};

use dtc::Outcome;
use lapin::BasicProperties;
use serde_json::json;
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id},
};
use tracing_subscriber::{
    layer::{Context, Layer, SubscriberExt as _},
    registry::LookupSpan,
};

use crate::{
    broker::place,
    processes::{LIMIT, Process},
    stand::{ProxiedPlace, READY},
    system::{Served, Setup},
    watched::{Ending, Function, RecordedService},
};

/// The fields that say what a line is about.
const ABOUT: [&str; 4] = ["worker", "transaction", "service", "instance"];

/// The values of a field in a line of text.
fn values<'a>(line: &'a str, name: &str) -> Vec<&'a str> {
    let value = |word: &'a str| word.strip_prefix(name)?.strip_prefix('=');
    line.split(' ').filter_map(value).collect()
}

/// At the default level.
#[test]
fn every_line_of_a_worker_says_once_which_worker_it_is_and_what_it_is_about() {
    let service = json!([
        // The first time, and three more. Then the parked command is applied.
        {"name": "stock", "max_concurrency": 2, "commit": {"fail_first": 4}},
        {"name": "nobody", "max_concurrency": 2, "max_wait_ms": 100},
    ]);
    let site = ProxiedPlace::of(place(), service);
    let stock = site.service("stock");
    let mut command = site.world.dtc(&["worker", "--name", "w1"]);
    let mut worker = Process::start("w1", command.env_remove("DTC_LOG"));
    worker.wait_for_line(READY, LIMIT);
    let producer = site.producer();
    let parked = producer.submit(&["stock"]);
    let unserved = producer.submit(&["nobody"]);
    let properties = BasicProperties::default().with_timestamp(1_700_000_000);
    let requests = site.name("requests");
    site.direct.publish(&requests, "request", properties.clone(), r#"{"id":"odd","data":{}}"#);
    let replies = site.name("replies");
    site.direct.publish(&replies, "w1.stock", properties.with_type("dtc.vote.v1".into()), "[5]");
    producer.answered(&parked, LIMIT);
    producer.answered(&unserved, LIMIT);

    let parked = format!("{parked}@");
    for (level, what, about) in [
        ("WARN", "failed to apply an outcome", [&*parked, "stock"]),
        ("ERROR", "commit parked", [&*parked, "stock"]),
        ("INFO", "a parked commit is settled", [&*parked, "stock"]),
        ("WARN", "no instance serves a service", ["", "nobody"]),
        ("WARN", "must have a field `involved_services`", ["odd@1700000000000", ""]),
        ("WARN", "must be an object", ["", "stock"]),
    ] {
        let line = worker.wait_for_line(what, LIMIT);
        println!("{line}");
        assert!(line.contains(&format!(" {level} ")), "{line}");
        let names_instance = values(&line, "instance").len() == 1;
        assert_eq!(names_instance, what == "failed to apply an outcome", "{line}");
        for (name, value) in ["transaction", "service"].into_iter().zip(about) {
            let values = values(&line, name);
            assert_eq!(values.len(), usize::from(!value.is_empty()), "{line}");
            assert!(values.iter().all(|it| it.starts_with(value)), "{line}");
        }
    }
    worker.terminate();
    worker.exited(0, LIMIT);
    let lines = worker.stderr.all();
    for what in ["starting", READY, "draining", "drained", "stopped"] {
        assert!(lines.iter().any(|line| line.contains(what)), "no line says `{what}`");
    }
    for line in lines {
        assert_eq!(values(&line, "worker"), ["w1"], "{line}");
        assert!(ABOUT.iter().all(|name| values(&line, name).len() <= 1), "{line}");
    }
    drop((producer, stock));
}

/// At the default level. An operator has replaced the journal by an empty stream, which doesn't say since
/// when it is complete.
#[test]
fn a_worker_with_an_incomplete_journal_logs_an_error() {
    let site = ProxiedPlace::of(place(), json!([{"name": "stock", "max_concurrency": 2}]));
    let journal = site.name("journal");
    site.direct.delete_queue(&journal);
    site.direct.declare_stream(&journal);
    let mut command = site.world.dtc(&["worker", "--name", "w1"]);
    let worker = Process::start("w1", command.env_remove("DTC_LOG"));
    let line = worker.wait_for_line("the journal is incomplete", LIMIT);
    assert!(line.contains(" ERROR ") && line.contains("will be parked"), "{line}");
    worker.wait_for_line(READY, LIMIT);
}

/// The fields of an event and of its spans, as a program's own subscriber gets them.
#[derive(Clone, Default, Debug)]
struct Fields(BTreeMap<String, String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let before = self.0.insert(field.name().to_owned(), format!("{value:?}"));
        assert_eq!(before, None, "two values of {field}");
    }
}

/// Keeps what only workers log.
#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<Fields>>>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Logged {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        context.span(id).unwrap().extensions_mut().insert(fields);
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let target = event.metadata().target();
        if !["dtc::worker", "dtc::anomalies"].iter().any(|it| target.starts_with(it)) {
            return;
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        for span in context.event_scope(event).into_iter().flatten() {
            let Fields(of_span) = span.extensions().get::<Fields>().unwrap().clone();
            for (name, value) in of_span {
                let before = fields.0.insert(name, value);
                assert_eq!(before, None, "{fields:?}");
            }
        }
        self.0.lock().unwrap().push(fields);
    }
}

/// One thread does it all, and its subscriber sees it.
#[tokio::test]
async fn a_program_with_its_own_log_gets_the_worker_of_each_event_as_a_field() {
    let logged = Logged::default();
    let subscriber = tracing_subscriber::registry().with(logged.clone());
    let _guard = tracing::subscriber::set_default(subscriber);
    let fails_once = RecordedService::new(|call| {
        let fails = call.what == Function::Commit && call.attempt == 1;
        std::future::ready(if fails { Ending::Error } else { Ending::Done })
    });
    let system = Setup::new([Served::new("stock", 1, &fails_once)]).workers(2).start().await;
    let answer = system.run("t1", &["stock"], json!({})).await;
    assert_eq!(answer.outcome, Outcome::Committed, "{answer:?}");
    system.stop().await;

    let logged = logged.0.lock().unwrap();
    let mut workers: Vec<_> = logged.iter().map(|fields| fields.0.get("worker")).collect();
    workers.sort();
    workers.dedup();
    assert_eq!(workers, [Some(&"w1".to_owned()), Some(&"w2".to_owned())], "{logged:#?}");
    let failed = logged.iter().find(|fields| fields.0["message"].contains("failed to apply"));
    let failed = &failed.expect("the commit that failed is logged").0;
    assert_eq!(failed["service"], "stock");
    assert!(failed["transaction"].starts_with("t1@"), "{failed:?}");
}
