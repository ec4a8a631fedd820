//! One instance of the service `stock`; the trace plays its store and code.

use std::collections::BTreeMap;
use std::time::Duration;

use dtc::protocol::{
    ids::{TransactionKey, WorkerId},
    message::{Delivery, Finish, Outcome, Payload, Prepare, Query},
    participant::{Effect, Event, InDoubt, Instance, Settings, Verdict},
    time::Time,
};

use crate::words::{
    BEGINNING, Line, branch, duration, hash, instance, key, service, show_done, show_key,
    show_time, show_vote, time,
};

pub(crate) struct Bench {
    now: Time,
    settings: Settings,
    instance: Option<Instance>,
    deliveries: u64,
    stages: BTreeMap<TransactionKey, String>,
    due: Option<Time>,
    parked: u32,
    output: Vec<String>,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self {
            now: BEGINNING,
            settings: Settings::new(service("stock"), instance("s1"), 2),
            instance: None,
            deliveries: 0,
            stages: BTreeMap::new(),
            due: None,
            parked: 0,
            output: Vec::new(),
        }
    }

    /// Executes one line of a trace, and returns its effects.
    pub(crate) fn run(&mut self, line: &str) -> Vec<String> {
        let mut line = Line::parse(line);
        match line.word().as_str() {
            "set" => {
                assert!(self.instance.is_none(), "settings come first");
                for (name, value) in line.take_options() {
                    self.set(&name, &value);
                }
            }
            "wait" => self.wait(duration(&line.word())),
            "clock-back" => {
                let by = duration(&line.word());
                self.now = self.now - by;
                self.instance().clock_set_back(by);
            }
            verb => {
                let event = self.event(verb, &mut line);
                self.handle(event);
            }
        }
        line.end();
        std::mem::take(&mut self.output)
    }

    fn set(&mut self, name: &str, value: &str) {
        match name {
            "max_concurrency" => self.settings.max_concurrency = value.parse().unwrap(),
            "has_store" => self.settings.has_store = value == "yes",
            "remembers_commits" => self.settings.remembers_commits = value == "yes",
            "visitors_max" => self.settings.visitors_max = value.parse().unwrap(),
            "remembered_max" => self.settings.remembered_max = value.parse().unwrap(),
            other => panic!("{other} is no setting of these traces"),
        }
    }

    fn instance(&mut self) -> &mut Instance {
        let settings = &self.settings;
        self.instance.get_or_insert_with(|| {
            let mut instance = Instance::new(BEGINNING, settings.clone());
            if settings.has_store {
                // The search of the store at the start found nothing.
                instance.handle(BEGINNING, Event::DeadlineReached, &mut Vec::new());
                instance.handle(BEGINNING, Event::StoreScanned(Vec::new()), &mut Vec::new());
            }
            instance
        })
    }

    fn event(&mut self, verb: &str, line: &mut Line) -> Event {
        let worker = WorkerId::parse(&line.option("by").unwrap_or_else(|| "w1".to_owned()));
        let worker = worker.unwrap();
        let data = line.option("data").unwrap_or_default();
        match verb {
            "prepare" => Event::PrepareReceived {
                worker,
                delivery: self.next_delivery(),
                prepare: Prepare {
                    key: key(&line.word()),
                    request_hash: hash(&data),
                    data: Payload::new(data),
                    deadline: time(&line.option("until").unwrap_or_else(|| "5s".to_owned())),
                    repeated: line.flag("repeated"),
                },
                redelivered: line.flag("redelivered"),
            },
            "query" => {
                let query = Query { key: key(&line.word()), request_hash: hash(&data) };
                Event::QueryReceived { worker, query }
            }
            "cancel" => Event::CancelReceived(key(&line.word())),
            "commit" | "abort" => {
                let outcome = if verb == "commit" { Outcome::Committed } else { Outcome::Aborted };
                let key = key(&line.word());
                let parked = line.flag("parked");
                let branch = line.optional_word().map(|named| branch(&named));
                let finish = Finish { key, outcome, branch, parked };
                let delivery = parked.then(|| self.next_delivery());
                Event::FinishReceived { worker, finish, delivery }
            }
            "prepared" => self.prepare_ended(line, |_| Verdict::Prepared),
            "read_only" => self.prepare_ended(line, |_| Verdict::ReadOnly),
            "refused" => self
                .prepare_ended(line, |line| Verdict::Refused(line.optional_word().map(Into::into))),
            "failed" => self.prepare_ended(line, |line| Verdict::Failed(line.word().into())),
            "applied" => self.finish_ended(line, |_| Ok(())),
            "not-applied" => self.finish_ended(line, |line| Err(line.word().into())),
            "store" => {
                let key = key(&line.word());
                let held = held(line, &data);
                assert!(held.iter().all(|it| it.key == key));
                Event::StoreRead { key, held }
            }
            "looked-up" => {
                let (key, branch) = (key(&line.word()), branch(&line.word()));
                let is_known = line.flag("known");
                assert!(is_known || line.flag("unknown"));
                Event::CommitLookedUp { key, branch, is_known }
            }
            "scanned" => Event::StoreScanned(held(line, &data)),
            "disconnect" => Event::Disconnected,
            "drain" => Event::DrainRequested,
            other => panic!("{other} is no word of these traces"),
        }
    }

    fn prepare_ended(&self, line: &mut Line, verdict: impl Fn(&mut Line) -> Verdict) -> Event {
        let (key, branch) = (key(&line.word()), branch(&line.word()));
        Event::PrepareEnded { key, branch, verdict: verdict(line) }
    }

    fn finish_ended(
        &self,
        line: &mut Line,
        applied: impl Fn(&mut Line) -> Result<(), std::sync::Arc<str>>,
    ) -> Event {
        let (key, branch) = (key(&line.word()), branch(&line.word()));
        Event::FinishEnded { key, branch, applied: applied(line) }
    }

    fn next_delivery(&mut self) -> Delivery {
        self.deliveries += 1;
        Delivery(self.deliveries)
    }

    fn handle(&mut self, event: Event) {
        let now = self.now;
        if let Some(key) = event.key() {
            self.stages.entry(key.clone()).or_insert_with(|| "-".to_owned());
        }
        let mut effects = Vec::new();
        let instance = self.instance();
        instance.handle(now, event, &mut effects);
        let (due, slots) = (instance.next_deadline(), instance.slots_used());
        let parked = instance.slots_parked();
        for (key, before) in &mut self.stages {
            let stage = self.instance.as_ref().and_then(|it| it.stage_of(key));
            let after = stage.map_or_else(|| "-".to_owned(), |stage| format!("{stage:?}"));
            if *before != after {
                self.output.push(format!("stage   {} {before} -> {after}", show_key(key)));
                *before = after;
            }
        }
        assert!(slots <= self.settings.max_concurrency, "the cap holds");
        if parked != self.parked {
            self.parked = parked;
            self.output.push(format!("parked  {parked} of {slots} slots"));
        }
        self.output.extend(effects.iter().map(show_effect));
        if due != self.due {
            self.due = due;
            self.output
                .push(format!("due     {}", due.map_or_else(|| "never".to_owned(), show_time)));
        }
    }

    fn wait(&mut self, span: Duration) {
        let until = self.now + span;
        while let Some(at) = self.instance().next_deadline().filter(|at| *at <= until) {
            self.now = self.now.max(at);
            self.output.push(format!("at      {}", show_time(self.now)));
            assert!(self.output.len() < 200, "it goes round and round: {:#?}", self.output);
            self.handle(Event::DeadlineReached);
        }
        self.now = until;
    }
}

/// `t1=s1.1 …`: the content of the store. `data` is what it was prepared for.
fn held(line: &mut Line, data: &str) -> Vec<InDoubt> {
    assert!(line.flag("holds"));
    let held = line.take_options().into_iter().map(|(named, held_as)| InDoubt {
        key: key(&named),
        request_hash: hash(data),
        branch: branch(&held_as),
        deadline: time("5s"),
    });
    let held: Vec<_> = held.collect();
    assert!(!held.is_empty() || line.flag("nothing"));
    held
}

fn show_effect(effect: &Effect) -> String {
    match effect {
        Effect::CallPrepare { key, branch, deadline, .. } => {
            format!("call    prepare {} {branch} until {}", show_key(key), show_time(*deadline))
        }
        Effect::CallCommit { key, branch } => format!("call    commit {} {branch}", show_key(key)),
        Effect::CallAbort { key, branch } => format!("call    abort {} {branch}", show_key(key)),
        Effect::ReadStore(key) => format!("look    {}", show_key(key)),
        Effect::LookUpCommit { key, branch } => {
            format!("look    {}: was {branch} committed?", show_key(key))
        }
        Effect::ScanStore => "look    through the store".to_owned(),
        Effect::Vote { to, vote } => format!("vote    to {to}: {}", show_vote(vote)),
        Effect::Done { to, done, ack } => {
            let ack = ack.map_or_else(String::new, |it| format!(", acks d{}", it.0));
            format!("done    to {to}: {}{ack}", show_done(done))
        }
        Effect::Inquire(inquiry) => {
            let (key, deadline) = (show_key(&inquiry.key), show_time(inquiry.deadline));
            format!("inquire {key} {} deadline {deadline}", inquiry.branch)
        }
        Effect::Ack(delivery) => format!("ack     d{}", delivery.0),
    }
}
