//! The results on stdout, and the summary on stderr.
//!
//! A table is printed row by row, as the results arrive: a crate for tables, such as comfy-table, would
//! hold a million of them to know how wide a column is.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{self, Write},
    time::Duration,
};

use clap::ValueEnum;
use serde_json::{Value, json};

use crate::{
    cli::escape,
    embedded::{Concluded, Report, ServiceReport},
    input::transactions::Transactions,
    wire::result::{BriefResult, DetailedResult, ProducerResult},
};

/// The form in which results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ResultForm {
    /// One array, in the order of the transactions.
    Json,
    /// One object a line, in the order in which the transactions end.
    Ndjson,
    /// A table for people, in the order of the transactions.
    Table,
}

impl ResultForm {
    /// Whether results are printed in the order of the transactions.
    pub(super) fn is_ordered(self) -> bool {
        match self {
            Self::Json | Self::Table => true,
            Self::Ndjson => false,
        }
    }

    /// The output form that matches the input form of `transactions`.
    pub(super) fn like<R>(transactions: &Transactions<R>) -> Self {
        match transactions {
            Transactions::Array(_) => Self::Json,
            Transactions::Lines(_) => Self::Ndjson,
        }
    }
}

/// Which fields of a result are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ResultDetail {
    /// Its id and status.
    Brief,
    /// Also the reason, and the calls of services.
    Calls,
    /// Also the reason, and the times: for a producer, which doesn't see the calls.
    Times,
}

/// Prints results as they arrive.
pub(super) struct ResultPrinter<W> {
    out: W,
    form: ResultForm,
    detail: ResultDetail,
    printed: u64,
}

impl<W: Write> ResultPrinter<W> {
    pub(super) fn new(out: W, form: ResultForm, detail: ResultDetail) -> Self {
        Self { out, form, detail, printed: 0 }
    }

    pub(super) fn print(&mut self, concluded: &Concluded) -> io::Result<()> {
        match self.form {
            ResultForm::Json => {
                let before: &[u8] = if self.printed == 0 { b"[\n  " } else { b",\n  " };
                self.out.write_all(before)?;
                self.object(concluded)?;
            }
            ResultForm::Ndjson => {
                self.object(concluded)?;
                self.out.write_all(b"\n")?;
            }
            ResultForm::Table => self.row(concluded)?,
        }
        self.printed += 1;
        Ok(())
    }

    fn object(&mut self, Concluded { answer, attempts, took }: &Concluded) -> io::Result<()> {
        let out = &mut self.out;
        let written = match self.detail {
            ResultDetail::Brief => serde_json::to_writer(out, &BriefResult::of(answer)),
            ResultDetail::Calls => {
                serde_json::to_writer(out, &DetailedResult::of(answer, attempts, *took))
            }
            ResultDetail::Times => serde_json::to_writer(out, &ProducerResult::of(answer, *took)),
        };
        written.map_err(io::Error::from)
    }

    fn row(&mut self, Concluded { answer, attempts, took }: &Concluded) -> io::Result<()> {
        if self.printed == 0 {
            let header = match self.detail {
                ResultDetail::Brief => format!("{:<24} STATUS", "ID"),
                ResultDetail::Calls => {
                    format!("{:<24} {:<9} {:>10}  {:<24} NOTE", "ID", "STATUS", "MS", "CALLS")
                }
                ResultDetail::Times => format!("{:<24} {:<9} {:>10}  NOTE", "ID", "STATUS", "MS"),
            };
            writeln!(self.out, "{header}")?;
        }
        let mut row = format!("{:<24} {:<9}", answer.id, answer.outcome);
        if self.detail != ResultDetail::Brief {
            let _ = write!(row, " {:>10.3}  ", millis(*took));
            if self.detail == ResultDetail::Calls {
                let calls: Vec<_> = attempts
                    .iter()
                    .map(|(name, it)| format!("{name} {}/{}/{}", it.prepare, it.commit, it.abort))
                    .collect();
                let _ = write!(row, "{:<24} ", calls.join(", "));
            }
            if let Some(reason) = &answer.reason {
                let service = reason.service.as_ref().map_or("", |name| name.as_str());
                let message = reason.message.as_deref().unwrap_or_default();
                let _ = write!(row, "{} {service} {message}", reason.code);
            }
            for service in &answer.unresolved {
                let _ = write!(row, "unresolved: {service} ");
            }
        }
        writeln!(self.out, "{}", escape::line(row.trim_end()))
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// Ends the output.
    pub(super) fn finish(mut self) -> io::Result<()> {
        if self.form == ResultForm::Json {
            let end: &[u8] = if self.printed == 0 { b"[]\n" } else { b"\n]\n" };
            self.out.write_all(end)?;
        }
        self.out.flush()
    }
}

/// The content of the report file.
pub(super) fn report_json(report: &Report) -> Value {
    let services: BTreeMap<_, _> = report
        .services
        .iter()
        .map(|service| {
            let values = json!({
                "prepare_calls": service.calls.prepare,
                "commit_calls": service.calls.commit,
                "abort_calls": service.calls.abort,
                "max_in_use": service.max_in_use,
                "max_concurrency": service.max_concurrency,
                "longest_wait_ms": service.longest_wait.map(millis),
            });
            (service.name.to_string(), values)
        })
        .collect();
    json!({
        "committed": report.committed,
        "aborted": report.aborted,
        "unresolved": report.unresolved,
        "tx_per_s": (report.rate() * 10.0).round() / 10.0,
        "p50_ms": millis(report.percentile(50.0)),
        "p99_ms": millis(report.percentile(99.0)),
        "services": services,
    })
}

/// How many causes of aborts the summary names.
const CAUSES_NAMED: usize = 5;

/// The totals of a report, as text.
pub(super) fn totals(report: &Report) -> String {
    let mut text = format!(
        "{} committed, {} aborted, {} unresolved; {:.0} tx/s, p50 {:.1} ms, p99 {:.1} ms\n",
        report.committed,
        report.aborted,
        report.unresolved,
        report.rate(),
        millis(report.percentile(50.0)),
        millis(report.percentile(99.0)),
    );
    let causes = report.causes();
    if !causes.is_empty() {
        let named = causes.iter().take(CAUSES_NAMED).map(|(word, service, count)| {
            let service = service.map_or_else(String::new, |name| format!(" {name}"));
            format!("{count} {word}{service}")
        });
        let named: Vec<_> = named.collect();
        let more = if causes.len() > CAUSES_NAMED { ", …" } else { "" };
        let _ = writeln!(text, "why aborted: {}{more}", named.join(", "));
    }
    text
}

/// The summary of a report, as text.
pub(super) fn summary(report: &Report) -> String {
    let mut text = totals(report);
    let in_use =
        |service: &ServiceReport| format!("{} of {}", service.max_in_use, service.max_concurrency);
    let services = &report.services;
    let name_width = widest("service", services.iter().map(|it| it.name.as_str().len()));
    let use_width = widest("max in use", services.iter().map(|it| in_use(it).len()));
    let _ = writeln!(
        text,
        "{:<name_width$}  {:>9} {:>9} {:>9}  {:>use_width$}  {:>15}",
        "service", "prepares", "commits", "aborts", "max in use", "longest wait ms"
    );
    for service in services {
        let _ = writeln!(
            text,
            "{:<name_width$}  {:>9} {:>9} {:>9}  {:>use_width$}  {:>15}",
            service.name,
            service.calls.prepare,
            service.calls.commit,
            service.calls.abort,
            in_use(service),
            service.longest_wait.map_or_else(|| "-".to_owned(), |it| format!("{:.0}", millis(it))),
        );
    }
    text
}

/// The width of a column.
fn widest(title: &str, widths: impl Iterator<Item = usize>) -> usize {
    widths.fold(title.len(), usize::max)
}

fn millis(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::{ResultDetail, ResultForm, ResultPrinter, totals};
    use crate::{
        embedded::{Concluded, Report},
        protocol::{
            ids::{ServiceName, TransactionId},
            message::{Answer, Outcome, Reason, ReasonCode},
            time::Time,
        },
    };

    /// A service's message could add a row to the table, and colours.
    #[test]
    fn a_services_message_stays_in_its_row() {
        let message = "no \u{1b}[31mmoney\ntx-2                     COMMITTED";
        let answer = Answer {
            id: TransactionId::parse("tx-1").unwrap(),
            requested_at: Time::EPOCH,
            outcome: Outcome::Aborted,
            reason: Some(Reason::because(ReasonCode::Refused, message)),
            unresolved: Vec::new(),
            decided_at: Time::EPOCH,
        };
        let concluded = Concluded { answer, attempts: BTreeMap::new(), took: Duration::ZERO };
        let mut out = Vec::new();
        ResultPrinter::new(&mut out, ResultForm::Table, ResultDetail::Times)
            .print(&concluded)
            .unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.lines().count(), 2, "a title and a row: {text}");
        assert!(text.contains(r"no \u{1b}[31mmoney\ntx-2"), "{text}");
    }

    fn aborted(code: ReasonCode, service: &str) -> Concluded {
        let answer = Answer {
            id: TransactionId::parse("tx-1").unwrap(),
            requested_at: Time::EPOCH,
            outcome: Outcome::Aborted,
            reason: Some(Reason::at(&ServiceName::parse(service).unwrap(), code)),
            unresolved: Vec::new(),
            decided_at: Time::EPOCH,
        };
        Concluded { answer, attempts: BTreeMap::new(), took: Duration::ZERO }
    }

    /// With a service's name misspelled, every transaction aborted, and the summary gave no reason.
    #[test]
    fn a_summary_says_why_transactions_aborted() {
        let mut report = Report::new();
        assert_eq!(totals(&report).lines().count(), 1);
        report.count(&aborted(ReasonCode::NoSlot, "ServiceB"));
        for _ in 0..2 {
            report.count(&aborted(ReasonCode::UnknownService, "serviceA"));
        }
        let text = totals(&report);
        let why = "why aborted: 2 unknown_service serviceA, 1 no_slot ServiceB";
        assert_eq!(text.lines().nth(1), Some(why), "{text}");
    }

    #[test]
    fn a_stream_that_names_ever_new_services_fills_no_memory() {
        let mut report = Report::new();
        for n in 0..1000 {
            report.count(&aborted(ReasonCode::UnknownService, &format!("s{n}")));
        }
        assert_eq!(report.causes().len(), 257);
        assert_eq!(report.causes()[0], ("unknown_service", None, 744));
        assert!(totals(&report).ends_with(", …\n"));
    }
}
