//! The load: a producer that is fed at a steady rate, and its result for each transaction.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    process::{ChildStdin, ChildStdout},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::Sender},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::soak::{News, Plan};

/// The services.
pub(crate) const SERVICES: [&str; 3] = ["payments", "shipping", "stock"];
/// Which of them the transactions involve, in turn.
const INVOLVED: [&[&str]; 4] = [
    &["payments", "stock", "shipping"],
    &["payments", "stock"],
    &["stock", "shipping"],
    &["payments", "stock", "shipping"],
];
/// The prefix of an id; its number follows.
const PREFIX: &str = "soak-";

/// The result of a transaction.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Fate {
    #[default]
    Unanswered,
    Committed,
    Aborted,
}

/// The producer's output.
#[derive(Default, Debug)]
pub(crate) struct ProducerOutput {
    /// By number.
    pub(crate) fates: Vec<Fate>,
    /// How long the transactions took, in ms, by the quarter in which they were answered.
    pub(crate) took: [Vec<f32>; 4],
    /// How many were aborted, by reason.
    pub(crate) aborted: BTreeMap<String, usize>,
    /// Some of the lines that should not be.
    pub(crate) odd: Vec<String>,
}

/// How many oddities are kept.
const ODD_MAX: usize = 20;

/// The services of the transaction with this number.
pub(crate) fn involved(number: usize) -> &'static [&'static str] {
    INVOLVED[number % INVOLVED.len()]
}

/// The number in an id.
pub(crate) fn number_of(id: &str) -> Option<usize> {
    id.strip_prefix(PREFIX)?.parse().ok()
}

impl ProducerOutput {
    /// Records a line that the producer printed in this quarter.
    fn take(&mut self, line: &str, quarter: usize) {
        let answer: Value = serde_json::from_str(line).unwrap_or_default();
        let number = answer["id"].as_str().and_then(number_of);
        let fate = match answer["status"].as_str() {
            Some("COMMITTED") => Fate::Committed,
            Some("ABORTED") => Fate::Aborted,
            _ => Fate::Unanswered,
        };
        let Some(number) = number.filter(|_| fate != Fate::Unanswered) else {
            return self.note(format!("the producer says `{line}`"));
        };
        if number >= self.fates.len() {
            self.fates.resize(number + 1, Fate::Unanswered);
        }
        if self.fates[number] != Fate::Unanswered {
            self.note(format!("{PREFIX}{number} was answered twice"));
        }
        self.fates[number] = fate;
        if let Some(unresolved) = answer["unresolved"].as_array().filter(|it| !it.is_empty()) {
            self.note(format!("{PREFIX}{number} is unresolved at {unresolved:?}"));
        }
        if fate == Fate::Aborted {
            let code = answer["reason"]["code"].as_str().unwrap_or("no reason").to_owned();
            *self.aborted.entry(code).or_default() += 1;
        }
        let milliseconds = answer["duration_ms"].as_f64().unwrap_or_default();
        self.took[quarter].push(milliseconds as f32);
    }

    fn note(&mut self, what: String) {
        if self.odd.len() < ODD_MAX {
            self.odd.push(what);
        }
    }
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes transactions at the plan's rate until its end, and returns how many.
pub(crate) fn feed(plan: Plan, mut stdin: ChildStdin, news: Sender<News>) {
    thread::spawn(move || {
        let began = Instant::now();
        let mut fed = 0;
        while fed < plan.transactions() {
            let due = Duration::from_secs_f64(fed as f64 / f64::from(plan.rate));
            thread::sleep(due.saturating_sub(began.elapsed()));
            let services = involved(fed);
            let transaction = serde_json::json!({
                "id": format!("{PREFIX}{fed}"),
                "involved_services": services,
                "data": { "n": fed },
            });
            // `died` detects a producer that has ended.
            if began.elapsed() >= plan.length || writeln!(stdin, "{transaction}").is_err() {
                break;
            }
            fed += 1;
        }
        // Before the producer is told, since it ends then.
        let _ = news.send(News::Fed(fed));
        drop(stdin);
    });
}

/// Reads the producer's output to its end.
pub(crate) fn hear(
    plan: Plan,
    stdout: ChildStdout,
    heard: Arc<Mutex<ProducerOutput>>,
    news: Sender<News>,
) {
    let began = Instant::now();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let quarter = plan.quarter_of(began.elapsed());
            locked(&heard).take(&line, quarter);
        }
        let _ = news.send(News::Answered);
    });
}
