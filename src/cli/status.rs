//! `dtc status`: the outcomes of transactions, as recorded in the journal.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    io::{self, Write as _},
};

use anyhow::anyhow;
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};
use tracing_subscriber::filter::LevelFilter;

use crate::{
    cli::{
        Exit, Failure,
        broker::{self, BrokerArguments, exit_of},
        escape,
        moment::{self, shown},
        pipeline, progress,
    },
    client::history::{self, History, HistoryError, Past, Since},
    config::duration,
    protocol::{
        ids::{TransactionId, TransactionKey},
        message::{Parked, ParkedCause},
        time::Time,
    },
    transport::amqp::{
        error::{is_not_found, is_refusal},
        stream::ScanError,
    },
    wire::result::AbortReason,
};

/// Show the outcomes of transactions, as recorded in the journal.
///
/// It only reads, and takes no message from any other consumer. It shows every transaction that has
/// one of the ids, and says how far back it looked; exit code 1 if it found none for one of the
/// ids. Without --since and --all it looks back 15 minutes; if that does not show a certain outcome
/// for every id, 2 hours, and then 24 hours. Reading a million transactions takes 30 to 60 s, and
/// as much of the broker's CPU.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
#[command(about = "Show the outcomes of transactions, as recorded in the journal")]
pub(super) struct StatusArguments {
    /// The ids of the transactions
    #[arg(value_name = "ID", required = true, value_parser = id)]
    ids: Vec<TransactionId>,
    /// How far back to look: a duration such as 36h or 7d, a time in UTC such as 2026-08-24 or
    /// 2026-08-24T12:31:05Z, or all, as with --all [default: until found, 24h at most]
    #[arg(long, value_name = "DURATION|TIME|all", value_parser = since)]
    since: Option<Since>,
    /// Look through the whole journal, which keeps the decisions of 7 days by default
    #[arg(long, conflicts_with = "since")]
    all: bool,
    /// How to print the outcomes
    #[arg(long, value_name = "FORM", value_enum, default_value_t = StatusForm::Text)]
    output: StatusForm,
    #[command(flatten)]
    broker: BrokerArguments,
}

/// The form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StatusForm {
    /// Text for people.
    Text,
    /// One array, an object for each transaction.
    Json,
}

fn id(text: &str) -> Result<TransactionId, String> {
    TransactionId::parse(text).map_err(|error| format!("must match {}", error.rule))
}

fn since(text: &str) -> Result<Since, String> {
    if text == "all" {
        return Ok(Since::Always);
    }
    if let Some(moment) = moment::parse(text) {
        return Ok(Since::Moment(moment));
    }
    duration::parse(text).map(Since::Ago).map_err(|rule| {
        format!("{rule}; or a moment in UTC, such as 2026-08-24 or 2026-08-24T12:31:05Z; or `all`")
    })
}

pub(super) fn run(arguments: &StatusArguments) -> Result<Exit, Failure> {
    let log_level = progress::log_level(LevelFilter::ERROR)
        .map_err(|error| Failure::new(Exit::Usage, error))?;
    let config = arguments.broker.load([])?;
    let (broker, names) = (broker::broker(&config, "dtc status"), broker::names(&config));
    let (runtime, _interrupt) = pipeline::runtime()?;
    let _logging = progress::log_above(&indicatif::ProgressBar::hidden(), log_level);
    let ids: BTreeSet<_> = arguments.ids.iter().cloned().collect();
    let margin = config.topology.clock_margin;
    let since = if arguments.all { Some(Since::Always) } else { arguments.since };
    let since = since.unwrap_or(Since::Recent);
    let looking_up = history::look_up(&broker, &names, &ids, since, margin);
    let looked_up = runtime.block_on(looking_up);
    let history = looked_up.map_err(failure)?;
    if history.n_unreadable > 0 {
        super::tell(&format!("{} records can't be understood\n", history.n_unreadable));
    }
    let missing = ids.iter().filter(|id| history.of_id(id).next().is_none()).count();
    let text = match arguments.output {
        StatusForm::Text => text(&history, &ids),
        StatusForm::Json => format!("{:#}\n", json_of(&history, &ids)),
    };
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) if missing == 0 => Ok(Exit::Done),
        Ok(()) => Ok(Exit::Incomplete),
        // The reader closed the pipe: nothing to report.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Incomplete),
        Err(error) => Err(Failure::new(
            Exit::Incomplete,
            anyhow::Error::new(error).context("failed to print"),
        )),
    }
}

fn failure(error: HistoryError) -> Failure {
    let exit = exit_for(&error);
    if let HistoryError::Scan(ScanError::Broker { stream, .. }) = &error
        && exit == Exit::BadConfiguration
    {
        let error = anyhow!(
            "there is no stream `{stream}`: run `dtc topology apply`, or give the broker and the \
             namespace that were given there"
        );
        return Failure::new(exit, error);
    }
    Failure::new(exit, error)
}

fn exit_for(error: &HistoryError) -> Exit {
    match error {
        HistoryError::Connect(error) => exit_of(error),
        HistoryError::Scan(ScanError::Broker { source, .. }) => match source.broker() {
            Some(error) if is_not_found(error) => Exit::BadConfiguration,
            Some(error) if is_refusal(error) => Exit::Refused,
            Some(_) | None => Exit::Unavailable,
        },
        HistoryError::Scan(ScanError::Cancelled { .. } | ScanError::Silent { .. }) => {
            Exit::Unavailable
        }
    }
}

// ---- For people ------------------------------------------------------------------------------

fn text(history: &History, ids: &BTreeSet<TransactionId>) -> String {
    let mut text = String::new();
    for id in ids {
        let before = text.len();
        history.of_id(id).for_each(|(key, past)| one(&mut text, key, past));
        if text.len() == before {
            let _ = match history.complete_since {
                Some(since) => writeln!(text, "{id}  not found since {}", shown(since)),
                None => writeln!(text, "{id}  not found: the journal is empty"),
            };
        }
    }
    if let Some(since) = history.looked_since.filter(|_| !history.is_whole) {
        let since = shown(since);
        let _ = writeln!(text, "looked back to {since}; --since or --all looks further");
    }
    text
}

/// One transaction, as text. Writing to a string can't fail.
fn one(text: &mut String, key: &TransactionKey, past: &Past) {
    let _ = write!(text, "{}  requested at {}: ", key.id, shown(key.requested_at));
    match &past.decision {
        Some(decision) => {
            let (at, worker) = (shown(decision.decided_at), &decision.worker);
            let _ = writeln!(text, "{}, decided at {at} by {worker}", decision.outcome);
            if let Some(reason) = &decision.reason {
                let service = reason.service.as_ref().map_or("", |name| name.as_str());
                let message = reason.message.as_deref().unwrap_or_default();
                let reason = format!("{} {service} {message}", reason.code);
                let _ = writeln!(text, "  reason: {}", escape::line(reason.trim_end()));
            }
            for (service, branch) in &decision.branches {
                let _ = writeln!(text, "  {service}: branch {branch}");
            }
            if !past.is_certain {
                let _ = writeln!(
                    text,
                    "  not certain: what was read doesn't reach back to where it began"
                );
            }
        }
        None => {
            let _ = writeln!(text, "no decision found");
        }
    }
    for parked in &past.parked {
        let at = shown(parked.parked_at);
        let _ = match &parked.cause {
            ParkedCause::Uncommitted { service, error, .. } => {
                let error = escape::line(error.as_deref().unwrap_or("no answer"));
                let end = match settled_at(past, parked) {
                    Some(moment) => format!("settled at {}", shown(moment)),
                    None => "not settled: the service's instances keep retrying it".to_owned(),
                };
                writeln!(text, "  {service}: commit parked at {at} ({error}), {end}")
            }
            ParkedCause::Undecidable(_) => {
                writeln!(text, "  parked at {at}: the journal doesn't tell its outcome")
            }
        };
    }
}

/// When the service applied the parked commit.
fn settled_at(past: &Past, parked: &Parked) -> Option<Time> {
    let ParkedCause::Uncommitted { service: parked_service, .. } = &parked.cause else {
        return None;
    };
    let settled = past.settled.iter().find(|settled| settled.service == *parked_service);
    settled.map(|settled| settled.settled_at)
}

// ---- For programs ----------------------------------------------------------------------------

fn json_of(history: &History, ids: &BTreeSet<TransactionId>) -> Value {
    let mut elements = Vec::new();
    for id in ids {
        let before = elements.len();
        elements.extend(history.of_id(id).map(|(key, past)| found(history, key, past)));
        if elements.len() == before {
            elements.push(json!({
                "id": id.as_str(),
                "found": false,
                "not_found_since": history.complete_since.map(Time::as_millis),
                "looked_since": looked_since(history),
            }));
        }
    }
    Value::Array(elements)
}

/// `null`: since the journal's beginning.
fn looked_since(history: &History) -> Option<u64> {
    history.looked_since.filter(|_| !history.is_whole).map(Time::as_millis)
}

fn found(history: &History, key: &TransactionKey, past: &Past) -> Value {
    let decision = past.decision.as_ref();
    let branches: Map<_, _> = decision
        .iter()
        .flat_map(|decision| &decision.branches)
        .map(|(service, branch)| (service.to_string(), json!(branch.to_string())))
        .collect();
    json!({
        "id": key.id.as_str(),
        "found": true,
        "looked_since": looked_since(history),
        "requested_at": key.requested_at.as_millis() / 1000,
        "outcome": decision.map(|it| it.outcome.as_str()),
        "certain": past.is_certain,
        "reason": decision.and_then(|it| it.reason.as_ref()).map(AbortReason::of),
        "decided_at": decision.map(|it| it.decided_at.as_millis()),
        "worker": decision.map(|it| it.worker.as_str()),
        "branches": branches,
        "void_records": past.n_void,
        "parked": past.parked.iter().map(|parked| parked_json(past, parked)).collect::<Vec<_>>(),
    })
}

fn parked_json(past: &Past, parked: &Parked) -> Value {
    let (service, branch, error) = match &parked.cause {
        ParkedCause::Uncommitted { service, branch, error } => {
            (Some(service.as_str()), Some(branch.to_string()), error.as_deref())
        }
        ParkedCause::Undecidable(_) => (None, None, None),
    };
    json!({
        "service": service,
        "branch": branch,
        "error": error,
        "parked_at": parked.parked_at.as_millis(),
        "settled_at": settled_at(past, parked).map(Time::as_millis),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::since;
    use crate::{client::history::Since, protocol::time::Time};

    #[test]
    fn since_takes_a_duration_a_time_or_all() {
        assert_eq!(since("36h"), Ok(Since::Ago(Duration::from_secs(36 * 60 * 60))));
        let moment = Time::from_millis(1_787_529_600_000);
        assert_eq!(since("2026-08-24"), Ok(Since::Moment(moment)));
        assert_eq!(since("all"), Ok(Since::Always));
        for other in ["All", "ever", "2026-08-24T12:31"] {
            assert!(since(other).unwrap_err().ends_with("or `all`"), "{other}");
        }
    }
}
