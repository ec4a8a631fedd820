//! The notation of traces: names, times, messages; the same for parsing and printing.

use std::time::Duration;

use dtc::protocol::{
    ids::{Branch, InstanceId, RequestHash, ServiceName, TransactionId, TransactionKey},
    message::{
        Command, Decision, Destination, Done, Finish, Outcome, Prepare, Reason, ReasonCode, Vote,
        VoteKind,
    },
    time::Time,
};

/// The time that traces call `0s`.
pub(crate) const BEGINNING: Time = Time::from_millis(1_000_000_000);

/// One line of a trace: words, where `"…"` is one word and `name=value` an option.
pub(crate) struct Line {
    words: Vec<String>,
    options: Vec<(String, String)>,
}

impl Line {
    pub(crate) fn parse(text: &str) -> Self {
        let (mut words, mut options) = (Vec::new(), Vec::new());
        let mut rest = text.trim();
        while !rest.is_empty() {
            let (word, after) = match rest.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"').expect("a closing quote"),
                None => rest.split_once(' ').unwrap_or((rest, "")),
            };
            match word.split_once('=') {
                Some((name, value)) if !rest.starts_with('"') => {
                    options.push((name.to_owned(), value.to_owned()));
                }
                _ => words.push(word.to_owned()),
            }
            rest = after.trim_start();
        }
        words.reverse();
        Self { words, options }
    }

    /// The next word.
    pub(crate) fn word(&mut self) -> String {
        self.optional_word().expect("one more word")
    }

    pub(crate) fn optional_word(&mut self) -> Option<String> {
        self.words.pop()
    }

    /// Whether `flag` is the next word; taken if so.
    pub(crate) fn flag(&mut self, flag: &str) -> bool {
        let is_next = self.words.last().is_some_and(|word| word == flag);
        if is_next {
            self.words.pop();
        }
        is_next
    }

    pub(crate) fn option(&mut self, name: &str) -> Option<String> {
        let index = self.options.iter().position(|(found, _)| found == name)?;
        Some(self.options.remove(index).1)
    }

    pub(crate) fn take_options(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.options)
    }

    /// Asserts that everything in the line was understood.
    pub(crate) fn end(self) {
        assert!(self.words.is_empty() && self.options.is_empty(), "not understood: {self}");
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {:?}", self.words.iter().rev().collect::<Vec<_>>(), self.options)
    }
}

pub(crate) fn service(text: &str) -> ServiceName {
    ServiceName::parse(text).unwrap()
}

pub(crate) fn instance(text: &str) -> InstanceId {
    InstanceId::parse(text).unwrap()
}

pub(crate) fn branch(text: &str) -> Branch {
    Branch::parse(text).unwrap()
}

/// `5s`, `100ms`.
pub(crate) fn duration(text: &str) -> Duration {
    let number = |digits: &str| digits.parse().unwrap();
    match text.strip_suffix("ms") {
        Some(millis) => Duration::from_millis(number(millis)),
        None => Duration::from_secs(number(text.strip_suffix('s').expect("a unit"))),
    }
}

/// `5s` after the beginning, `-5s` before it.
pub(crate) fn time(text: &str) -> Time {
    match text.strip_prefix('-') {
        Some(before) => BEGINNING - duration(before),
        None => BEGINNING + duration(text),
    }
}

pub(crate) fn show_time(time: Time) -> String {
    let (sign, distance) =
        if time < BEGINNING { ("-", BEGINNING.since(time)) } else { ("", time.since(BEGINNING)) };
    match distance.as_millis() {
        millis if millis % 1000 == 0 => format!("{sign}{}s", millis / 1000),
        millis => format!("{sign}{millis}ms"),
    }
}

/// `t1`, requested at the beginning; `t1@-5s`, requested before it.
pub(crate) fn key(text: &str) -> TransactionKey {
    let (id, at) = text.split_once('@').unwrap_or((text, "0s"));
    TransactionKey { id: TransactionId::parse(id).unwrap(), requested_at: time(at) }
}

pub(crate) fn show_key(key: &TransactionKey) -> String {
    match show_time(key.requested_at).as_str() {
        "0s" => key.id.to_string(),
        at => format!("{}@{at}", key.id),
    }
}

/// A digest that distinguishes contents.
pub(crate) fn hash(content: &str) -> RequestHash {
    let mut digest = [0; 16];
    for (index, byte) in content.bytes().enumerate() {
        digest[index % 16] ^= byte.rotate_left(u32::try_from(index / 16).unwrap());
    }
    RequestHash(digest)
}

pub(crate) fn outcome(text: &str) -> Outcome {
    match text {
        "COMMITTED" => Outcome::Committed,
        "ABORTED" => Outcome::Aborted,
        other => panic!("{other} is no outcome"),
    }
}

pub(crate) fn reason_code(text: &str) -> ReasonCode {
    match text {
        "refused" => ReasonCode::Refused,
        "cancelled" => ReasonCode::Cancelled,
        "deadline" => ReasonCode::Deadline,
        "id_reused" => ReasonCode::IdReused,
        other => panic!("{other} is no reason that a service gives"),
    }
}

pub(crate) fn show_reason(reason: &Reason) -> String {
    let service = reason.service.as_ref().map(|service| format!("{service} "));
    let message = reason.message.as_ref().map(|message| format!(": {message}"));
    format!("({}{}{})", service.unwrap_or_default(), reason.code, message.unwrap_or_default())
}

pub(crate) fn show_decision(decision: &Decision) -> String {
    let branches = decision.branches.iter().map(|(service, branch)| format!(" {service}={branch}"));
    let branches: String = branches.collect();
    let reason = decision.reason.as_ref().map(|reason| format!(" {}", show_reason(reason)));
    let key = show_key(&decision.key);
    format!("{key} {}{branches}{}", decision.outcome, reason.unwrap_or_default())
}

pub(crate) fn show_destination(service: &ServiceName, to: &Destination) -> String {
    match to {
        Destination::Instance(instance) => format!("{service}/{instance}"),
        Destination::AllInstances => format!("{service}/all"),
        Destination::AnyInstance => format!("{service}/any"),
    }
}

pub(crate) fn show_prepare(prepare: &Prepare) -> String {
    let repeated = if prepare.repeated { " repeated" } else { "" };
    let (key, until) = (show_key(&prepare.key), show_time(prepare.deadline));
    format!("prepare {key} until {until}{repeated}")
}

pub(crate) fn show_command(command: &Command) -> String {
    match command {
        Command::Query(query) => format!("query {}", show_key(&query.key)),
        Command::Finish(finish) => show_finish(finish),
        Command::Cancel(key) => format!("cancel {}", show_key(key)),
    }
}

fn show_finish(finish: &Finish) -> String {
    let verb = match finish.outcome {
        Outcome::Committed => "commit",
        Outcome::Aborted => "abort",
    };
    let branch = finish.branch.as_ref().map_or_else(|| "no branch".to_owned(), ToString::to_string);
    let parked = if finish.parked { " parked" } else { "" };
    format!("{verb} {} {branch}{parked}", show_key(&finish.key))
}

pub(crate) fn show_vote(vote: &Vote) -> String {
    let kind = match &vote.kind {
        VoteKind::Prepared { branch } => format!("prepared {branch}"),
        VoteKind::ReadOnly => "read_only".to_owned(),
        VoteKind::Refused(reason) => format!("refused {}", show_reason(reason)),
        VoteKind::Failed { branch, reason } => format!("failed {branch} {}", show_reason(reason)),
        VoteKind::Finished(outcome) => format!("finished {outcome}"),
    };
    format!("{} {kind} free={}", show_key(&vote.key), vote.free)
}

pub(crate) fn show_done(done: &Done) -> String {
    let applied = match &done.applied {
        Ok(()) => String::new(),
        Err(error) => format!(" failed ({error})"),
    };
    let parked = if done.parked { " parked" } else { "" };
    format!("{}{applied}{parked} free={}", show_key(&done.key), done.free)
}
