//! Workers that share a journal and get everything else from the trace.
//!
//! `w2: …` addresses a worker; the default is `w1`. What a worker appends is in the journal at
//! once, unless the trace says `journal loses appends`; it is read back when the trace says `read`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use dtc::protocol::{
    coordinator::{Anomaly, Coordinator, Effect, Event, Settings},
    ids::{ServiceName, StoreId, TransactionKey, WorkerId},
    message::{
        AnswerAt, Decision, Delivery, Done, Inquiry, ParkedCause, Payload, Reason, ReasonCode,
        Request, Vote, VoteKind,
    },
    time::Time,
};

use crate::words::{
    BEGINNING, Line, branch, duration, hash, instance, key, outcome, reason_code, service,
    show_command, show_decision, show_destination, show_key, show_prepare, show_reason, show_time,
    time,
};

/// How far back the journal is in view when a worker starts, unless the trace attaches it.
const HOUR: Duration = Duration::from_secs(3600);

struct Worker {
    coordinator: Coordinator,
    /// How much of the journal it has read.
    read: usize,
    /// Results that it has published, without a confirm yet.
    published: Vec<(TransactionKey, Delivery)>,
    due: Option<Time>,
}

pub(crate) struct Workers {
    now: Time,
    settings: Vec<(String, String)>,
    workers: BTreeMap<String, Worker>,
    journal: Vec<(u64, Decision)>,
    next_offset: u64,
    loses_appends: bool,
    deliveries: u64,
    contents: BTreeMap<TransactionKey, String>,
    output: Vec<String>,
}

impl Workers {
    pub(crate) fn new() -> Self {
        Self {
            now: BEGINNING,
            settings: Vec::new(),
            workers: BTreeMap::new(),
            journal: Vec::new(),
            next_offset: 0,
            loses_appends: false,
            deliveries: 0,
            contents: BTreeMap::new(),
            output: Vec::new(),
        }
    }

    /// Executes one line of a trace, and returns its effects.
    pub(crate) fn run(&mut self, line: &str) -> Vec<String> {
        let mut line = Line::parse(line);
        let mut verb = line.word();
        let mut prefix = String::new();
        let mut name = "w1".to_owned();
        if let Some(addressed) = verb.strip_suffix(':') {
            name = addressed.to_owned();
            prefix = format!("{name}: ");
            verb = line.word();
        }
        match verb.as_str() {
            "set" => self.settings.extend(line.take_options()),
            "warm" => self.warm(&name, &mut line),
            "read" => self.read_journal(&name),
            "record" => self.record(&mut line),
            "journal" => {
                self.loses_appends = line.flag("loses");
                assert!(self.loses_appends || line.flag("keeps"));
                assert!(line.flag("appends"));
            }
            "lose" => {
                self.next_offset += line.word().parse::<u64>().unwrap();
                assert!(line.flag("records"));
            }
            "wait" => self.wait(duration(&line.word())),
            "confirm" => self.results(&name, &mut line, true),
            "unconfirm" => self.results(&name, &mut line, false),
            verb => {
                let event = self.event(verb, &mut line);
                self.handle(&name, event);
            }
        }
        line.end();
        std::mem::take(&mut self.output).iter().map(|said| format!("{prefix}{said}")).collect()
    }

    fn worker(&mut self, name: &str) -> &mut Worker {
        let options = &self.settings;
        self.workers.entry(name.to_owned()).or_insert_with(|| {
            let mut settings = Settings::new(WorkerId::parse(name).unwrap());
            for (name, value) in options {
                set(&mut settings, name, value);
            }
            let mut coordinator = Coordinator::new(settings);
            let attached = Event::JournalAttached { next: 0, since: BEGINNING - HOUR };
            coordinator.handle(BEGINNING, attached, &mut Vec::new());
            Worker { coordinator, read: 0, published: Vec::new(), due: None }
        })
    }

    fn event(&mut self, verb: &str, line: &mut Line) -> Event {
        match verb {
            "attach" => {
                let next = line.option("next").unwrap().parse().unwrap();
                Event::JournalAttached { next, since: time(&line.option("since").unwrap()) }
            }
            "request" => self.request(line),
            "found" => Event::ServiceFound(service(&line.word())),
            "missing" => Event::ServiceMissing(service(&line.word())),
            "vote" => Event::VoteReceived(self.vote(line)),
            "returned" => {
                Event::PrepareReturned { key: key(&line.word()), service: service(&line.word()) }
            }
            "unroutable" => {
                Event::PrepareUnroutable { key: key(&line.word()), service: service(&line.word()) }
            }
            "unavailable" => Event::ServiceUnavailable(service(&line.word())),
            "unserved" => Event::ServiceUnserved(service(&line.word())),
            "nacked" => {
                Event::PrepareRefused { key: key(&line.word()), service: service(&line.word()) }
            }
            "done" => {
                let delivery = line.option("delivery").map(|it| Delivery(it.parse().unwrap()));
                Event::DoneReceived { done: done(line), delivery }
            }
            "inquiry" => self.inquiry(line),
            "parked" => Event::ParkConfirmed {
                key: key(&line.word()),
                service: line.optional_word().map(|name| service(&name)),
            },
            "history" => Event::HistoryRead(Arc::new(self.decision(line))),
            "history-ends" => {
                let reaches = line.option("reaches").map(|at| time(&at));
                assert!(reaches.is_some() || line.flag("nowhere"));
                Event::HistoryEnded { reaches }
            }
            "workers" => Event::WorkersCounted(line.word().parse().unwrap()),
            "drain" => Event::DrainRequested,
            "disconnect" => Event::Disconnected,
            other => panic!("{other} is no word of these traces"),
        }
    }

    fn request(&mut self, line: &mut Line) -> Event {
        let key = key(&line.word());
        let services = line.word();
        let content = line.option("data").unwrap_or_default();
        self.contents.insert(key.clone(), content.clone());
        self.deliveries += 1;
        Event::RequestReceived {
            request: Request {
                key,
                request_hash: hash(&content),
                services: services.split(',').map(service).collect(),
                data: Payload::new(content),
                timeout: line.option("timeout").map(|text| duration(&text)),
                answer_at: match line.flag("decided") {
                    true => AnswerAt::Decided,
                    false => AnswerAt::Applied,
                },
                reply: None,
            },
            delivery: Delivery(self.deliveries),
            deliveries: line.option("deliveries").map_or(1, |times| times.parse().unwrap()),
        }
    }

    fn content_of(&self, key: &TransactionKey, line: &mut Line) -> String {
        let known = || self.contents.get(key).cloned().unwrap_or_default();
        line.option("data").unwrap_or_else(known)
    }

    fn vote(&self, line: &mut Line) -> Vote {
        let key = key(&line.word());
        let service = service(&line.word());
        let verdict = line.word();
        let mut branch_named = || {
            let named = line.word();
            (named.split('.').next().unwrap().to_owned(), branch(&named))
        };
        let mut from = format!("{}1", &service.as_str()[..1]);
        let kind = match verdict.as_str() {
            "prepared" => {
                let (holder, branch) = branch_named();
                from = holder;
                VoteKind::Prepared { branch }
            }
            "failed" => {
                let (holder, branch) = branch_named();
                from = holder;
                let (code, message) = (ReasonCode::Failed, Some(line.word().into()));
                let reason = Reason::new(code, Some(service.clone()), message);
                VoteKind::Failed { branch, reason }
            }
            "refused" => {
                let code = line.option("code").map_or(ReasonCode::Refused, |it| reason_code(&it));
                let message = line.optional_word().map(Into::into);
                VoteKind::Refused(Reason::new(code, Some(service.clone()), message))
            }
            "read_only" => VoteKind::ReadOnly,
            "finished" => VoteKind::Finished(outcome(&line.word())),
            other => panic!("{other} is no vote"),
        };
        Vote {
            request_hash: hash(&self.content_of(&key, line)),
            key,
            service,
            instance: instance(&line.option("from").unwrap_or(from)),
            store: store(line),
            kind,
            free: free(line),
        }
    }

    fn inquiry(&self, line: &mut Line) -> Event {
        let key = key(&line.word());
        let service = service(&line.word());
        let named = line.word();
        Event::InquiryReceived(Inquiry {
            request_hash: hash(&self.content_of(&key, line)),
            key,
            service,
            instance: instance(named.split('.').next().unwrap()),
            branch: branch(&named),
            deadline: time(&line.option("deadline").unwrap_or_else(|| "5s".to_owned())),
        })
    }

    fn decision(&self, line: &mut Line) -> Decision {
        let key = key(&line.word());
        let outcome = outcome(&line.word());
        let content = self.content_of(&key, line);
        let decided_at = line.option("at").map_or(self.now, |at| time(&at));
        let branches = line.take_options();
        let named = |(name, text): &(String, String)| (service(name), branch(text));
        Decision {
            request_hash: hash(&content),
            key,
            outcome,
            branches: branches.iter().map(named).collect(),
            reason: None,
            decided_at,
            worker: WorkerId::parse("another").unwrap(),
        }
    }

    fn record(&mut self, line: &mut Line) {
        let decision = self.decision(line);
        self.journal.push((self.next_offset, decision));
        self.next_offset += 1;
    }

    fn read_journal(&mut self, name: &str) {
        while let Some((offset, decision)) = {
            let read = self.worker(name).read;
            self.journal.get(read).cloned()
        } {
            self.worker(name).read += 1;
            self.handle(name, Event::RecordsRead { offset, decisions: vec![Arc::new(decision)] });
        }
    }

    fn results(&mut self, name: &str, line: &mut Line, confirmed: bool) {
        let about = key(&line.word());
        // Only of this request.
        let only = line.optional_word();
        let is_named = |delivery: &Delivery| {
            only.as_ref().is_none_or(|word| *word == format!("d{}", delivery.0))
        };
        let published = std::mem::take(&mut self.worker(name).published);
        let (now, later) = published
            .into_iter()
            .partition::<Vec<_>, _>(|(key, delivery)| *key == about && is_named(delivery));
        assert!(!now.is_empty(), "no result of {} was published", show_key(&about));
        self.worker(name).published = later;
        for (key, delivery) in now {
            self.handle(
                name,
                match confirmed {
                    true => Event::ResultConfirmed { key, delivery },
                    false => Event::ResultFailed { key, delivery },
                },
            );
        }
    }

    /// Completes a transaction over `services` silently, so that they are known, with so many free
    /// slots each.
    fn warm(&mut self, name: &str, line: &mut Line) {
        let mut services = Vec::new();
        while let Some(word) = line.optional_word() {
            let (service, free) = word.split_once(':').unwrap();
            services.push((service.to_owned(), free.to_owned()));
        }
        let names: Vec<_> = services.iter().map(|(name, _)| name.clone()).collect();
        let told = |run: &mut Self, text: String| drop(run.run(&format!("{name}: {text}")));
        told(self, format!("request warm-up {}", names.join(",")));
        for service in &names {
            told(self, format!("found {service}"));
        }
        for (service, free) in &services {
            let holder = &service[..1];
            told(self, format!("vote warm-up {service} prepared {holder}1.0 free={free}"));
        }
        told(self, "read".to_owned());
        for (service, free) in &services {
            told(self, format!("done warm-up {service} free={free}"));
        }
        told(self, "confirm warm-up".to_owned());
        assert!(self.worker(name).coordinator.is_empty(), "the warm-up went through");
        self.deliveries = 0;
    }

    fn handle(&mut self, name: &str, event: Event) {
        let now = self.now;
        let about: Vec<_> = self.contents.keys().cloned().collect();
        let worker = self.worker(name);
        let phases = |worker: &Worker| -> Vec<_> {
            about.iter().map(|key| (key.clone(), worker.coordinator.phase_of(key))).collect()
        };
        let before = phases(worker);
        let mut effects = Vec::new();
        worker.coordinator.handle(now, event, &mut effects);
        let after = phases(worker);
        let due = worker.coordinator.next_deadline();
        let due_before = std::mem::replace(&mut worker.due, due);
        let mut reported = BTreeSet::new();
        for ((key, before), (_, after)) in before.into_iter().zip(after) {
            if before != after && reported.insert(key.clone()) {
                let show =
                    |phase: Option<_>| phase.map_or_else(|| "-".to_owned(), |it| format!("{it:?}"));
                let (key, before, after) = (show_key(&key), show(before), show(after));
                self.output.push(format!("phase   {key} {before} -> {after}"));
            }
        }
        for effect in effects {
            self.output.push(show_effect(&effect));
            self.perform(name, effect);
        }
        if due != due_before {
            let due = due.map_or_else(|| "never".to_owned(), show_time);
            self.output.push(format!("due     {due}"));
        }
    }

    fn perform(&mut self, name: &str, effect: Effect) {
        match effect {
            Effect::Append(decision) if !self.loses_appends => {
                self.journal.push((self.next_offset, decision));
                self.next_offset += 1;
            }
            Effect::Publish { key, delivery, .. } => {
                self.worker(name).published.push((key, delivery));
            }
            Effect::Append(_)
            | Effect::FindService { .. }
            | Effect::CheckService(_)
            | Effect::SendPrepare { .. }
            | Effect::Send { .. }
            | Effect::ReadHistory { .. }
            | Effect::Ack(_)
            | Effect::Release(_)
            | Effect::Reject { .. }
            | Effect::Park(_)
            | Effect::Settle { .. }
            | Effect::Report(_) => {}
        }
    }

    fn wait(&mut self, span: Duration) {
        let until = self.now + span;
        loop {
            let due = |(name, it): (&String, &Worker)| {
                it.coordinator.next_deadline().map(|at| (at, name.clone()))
            };
            let Some((at, name)) =
                self.workers.iter().filter_map(due).min().filter(|it| it.0 <= until)
            else {
                break;
            };
            self.now = self.now.max(at);
            let at_worker = if self.workers.len() > 1 { format!(" {name}") } else { String::new() };
            self.output.push(format!("at      {}{at_worker}", show_time(self.now)));
            assert!(self.output.len() < 200, "it goes round and round: {:#?}", self.output);
            self.handle(&name, Event::DeadlineReached);
        }
        self.now = until;
    }
}

fn set(settings: &mut Settings, name: &str, value: &str) {
    match name {
        "in_flight_max" => settings.in_flight_max = value.parse().unwrap(),
        "waiting_max" => settings.waiting_max = value.parse().unwrap(),
        "result_retries" => settings.result_retries = value.parse().unwrap(),
        "commit_retries" => settings.commit_retries = value.parse().unwrap(),
        "records_max" => settings.records_max = value.parse().unwrap(),
        "digests_max" => settings.digests_max = value.parse().unwrap(),
        other => panic!("{other} is no setting of these traces"),
    }
}

fn free(line: &mut Line) -> u32 {
    line.option("free").map_or(3, |free| free.parse().unwrap())
}

fn store(line: &mut Line) -> Option<StoreId> {
    line.option("store").map(|store| StoreId::parse(&store).unwrap())
}

fn done(line: &mut Line) -> Done {
    let key = key(&line.word());
    let service = service(&line.word());
    let from = line.option("from").unwrap_or_else(|| format!("{}1", &service.as_str()[..1]));
    Done {
        key,
        service,
        instance: instance(&from),
        store: store(line),
        applied: if line.flag("failed") { Err(line.word().into()) } else { Ok(()) },
        parked: line.flag("parked"),
        free: free(line),
    }
}

fn show_effect(effect: &Effect) -> String {
    match effect {
        Effect::FindService { service, after } => {
            let after = match after.as_millis() {
                0 => String::new(),
                millis => format!(" after {millis}ms"),
            };
            format!("find    {service}{after}")
        }
        Effect::SendPrepare { service, prepare, .. } => {
            format!("send    {:<12} {}", service.as_str(), show_prepare(prepare))
        }
        Effect::Send { service, to, command } => {
            format!("send    {:<12} {}", show_destination(service, to), show_command(command))
        }
        Effect::Append(decision) => format!("append  {}", show_decision(decision)),
        Effect::ReadHistory { from, until } => {
            format!("history from {} up to record {until}", show_time(*from))
        }
        Effect::Publish { key, delivery, answer } => {
            let reason = answer.reason.as_ref().map(|it| format!(" {}", show_reason(it)));
            let names: Vec<_> = answer.unresolved.iter().map(ServiceName::as_str).collect();
            let unresolved = match names.as_slice() {
                [] => String::new(),
                some => format!(" unresolved {}", some.join(",")),
            };
            let decided = TransactionKey { requested_at: answer.requested_at, ..key.clone() };
            let (key, outcome) = (show_key(&decided), answer.outcome);
            let reason = reason.unwrap_or_default();
            format!("publish d{} {key} {outcome}{reason}{unresolved}", delivery.0)
        }
        Effect::Ack(delivery) => format!("ack     d{}", delivery.0),
        Effect::Release(delivery) => format!("release d{}", delivery.0),
        Effect::Reject { request, delivery, reason } => {
            format!("reject  d{} {} {}", delivery.0, show_key(&request.key), show_reason(reason))
        }
        Effect::Park(parked) => {
            let cause = match &parked.cause {
                ParkedCause::Uncommitted { service, branch, error } => {
                    let error = error.as_ref().map_or("no answer", |error| error);
                    format!("{service} has not committed {branch} ({error})")
                }
                ParkedCause::Undecidable(_) => "its outcome can't be determined".to_owned(),
            };
            format!("park    {}: {cause}", show_key(&parked.key))
        }
        Effect::Settle { key, service, ack, was_parked } => {
            let ack = ack.map_or_else(String::new, |it| format!(", acks d{}", it.0));
            let perhaps = if *was_parked { "" } else { ", if it was parked" };
            format!("settle  {} {service}{ack}{perhaps}", show_key(key))
        }
        Effect::CheckService(service) => format!("check   {service}"),
        Effect::Report(anomaly) => format!("report  {}", show_anomaly(anomaly)),
    }
}

fn show_anomaly(anomaly: &Anomaly) -> String {
    match anomaly {
        Anomaly::DuplicateRequest(key) => format!("duplicate request {}", show_key(key)),
        Anomaly::LateVote(key, service) => format!("late vote {} {service}", show_key(key)),
        Anomaly::PreparedTwice(key, service) => {
            format!("prepared twice {} {service}", show_key(key))
        }
        Anomaly::CommitFailed { key, service, failures, error, .. } => {
            format!("failed to finish {} {service}, attempt {failures}: {error}", show_key(key))
        }
        Anomaly::Unanswered(key, service) => format!("unanswered {} {service}", show_key(key)),
        Anomaly::Stalled(key, service) => format!("stalled {} {service}", show_key(key)),
        Anomaly::InquiryDropped(key) => format!("inquiry dropped {}", show_key(key)),
        Anomaly::InquiryUndecidable(key, service) => {
            format!("undecidable {} {service}", show_key(key))
        }
        Anomaly::JournalGap(offset) => format!("journal gap before record {offset}"),
        Anomaly::ResultUnclaimed { key, attempts } => {
            format!("result unclaimed {}, attempt {attempts}", show_key(key))
        }
        Anomaly::StoresDiffer { service, before, now } => {
            format!("{service}: {} has store {}, {} has {}", now.0, now.1, before.0, before.1)
        }
        Anomaly::ServiceUnavailable(service) => format!("unavailable {service}"),
        Anomaly::ServiceAvailable(service) => format!("available {service}"),
        Anomaly::ServiceUnserved(service) => format!("unserved {service}"),
        Anomaly::ServiceServed(service) => format!("served {service}"),
    }
}
