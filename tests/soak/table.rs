//! The report of a soak: its table, in Markdown, and its verdict.

use std::fmt::Write;

use crate::{
    load::{Fate, ProducerOutput},
    memory::Sample,
    soak::{FILLED_AFTER, Plan},
};

/// By how many per cent memory may grow from the second quarter to the last.
const GROWTH_MAX: f64 = 10.0;
/// What share of the transactions must have been submitted in time.
const FED_MIN: f64 = 0.95;

/// All results of a soak.
pub(crate) struct Report {
    pub(crate) plan: Plan,
    /// When, what and where.
    pub(crate) about: String,
    pub(crate) rows: Vec<Row>,
    pub(crate) outcome: Outcome,
}

/// The memory of one process.
pub(crate) struct Row {
    pub(crate) name: String,
    /// Whether the verdict depends on it.
    pub(crate) must_be_flat: bool,
    pub(crate) samples: Vec<Sample>,
}

/// The results of the transactions.
#[derive(Default)]
pub(crate) struct Outcome {
    /// How many were submitted.
    pub(crate) fed: usize,
    pub(crate) heard: ProducerOutput,
    /// Where the services hold something else than the producer's results.
    pub(crate) unequal: Vec<String>,
    /// The processes that ended unasked, or with an error.
    pub(crate) died: Vec<String>,
}

/// A check, and why it fails.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Check {
    pub(crate) name: &'static str,
    pub(crate) problems: Vec<String>,
}

impl Report {
    /// All checks.
    pub(crate) fn checks(&self) -> Vec<Check> {
        let Outcome { heard, unequal, died, .. } = &self.outcome;
        let is_named = |name, problems| Check { name, problems };
        vec![
            is_named("memory_is_flat", self.grown()),
            is_named("the_rate_is_kept", self.behind().into_iter().collect()),
            is_named("every_transaction_is_answered_once", self.unanswered()),
            is_named("every_transaction_is_atomic", unequal.clone()),
            is_named("nobody_ended", died.clone()),
            is_named("nothing_is_odd", heard.odd.clone()),
        ]
    }

    /// The processes with more memory in the last quarter than allowed.
    fn grown(&self) -> Vec<String> {
        if !self.plan.fills_in_time() {
            return Vec::new();
        }
        let of_row = |row: &Row| {
            let growth = row.growth(&self.plan);
            // A process that was never seen in a quarter isn't known to be flat.
            if growth.is_some_and(|growth| growth <= GROWTH_MAX) {
                return None;
            }
            let growth = growth.map_or_else(|| "nobody knows how much".to_owned(), per_cent);
            Some(format!("{} grew by {growth} from the second to the last quarter", row.name))
        };
        self.rows.iter().filter(|row| row.must_be_flat).filter_map(of_row).collect()
    }

    fn behind(&self) -> Option<String> {
        let (fed, wanted) = (self.outcome.fed, self.plan.transactions());
        let is_kept = fed as f64 >= wanted as f64 * FED_MIN;
        (!is_kept).then(|| format!("{fed} of {wanted} transactions were submitted in time"))
    }

    fn unanswered(&self) -> Vec<String> {
        let fates = &self.outcome.heard.fates;
        let answered = fates.iter().filter(|fate| **fate != Fate::Unanswered).count();
        let fed = self.outcome.fed;
        if answered == fed {
            return Vec::new();
        }
        vec![format!("{fed} were submitted, {answered} answered")]
    }

    /// The report as text.
    pub(crate) fn text(&self) -> String {
        let Plan { rate, minutes, .. } = self.plan;
        let Outcome { fed, heard, .. } = &self.outcome;
        let count = |wanted| heard.fates.iter().filter(|fate| **fate == wanted).count();
        let aborted: Vec<_> =
            heard.aborted.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        let aborted = if aborted.is_empty() { "none".to_owned() } else { aborted.join(", ") };
        let mut text = format!(
            "# A soak\n\n{}\n\
             {rate} transactions a second for {minutes} min, over 2 or 3 of 3 services: {fed} \
             submitted, {} committed, {} aborted ({aborted}).\n\n\
             Resident memory in MiB: the median of each quarter's samples, and the most there ever \
             was; growth from the second quarter to the last.\n\n\
             | process | 1st quarter | 2nd | 3rd | 4th | growth | most | of it anonymous, 4th | |\n\
             | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n",
            self.about,
            count(Fate::Committed),
            count(Fate::Aborted),
        );
        for row in &self.rows {
            text += &self.line(row);
        }
        text += "\n| quarter | answered | tx/s | p50 ms | p99 ms |\n\
                 | --- | ---: | ---: | ---: | ---: |\n";
        for (name, took) in ["1st", "2nd", "3rd", "4th"].into_iter().zip(&heard.took) {
            let rate = took.len() as f64 * 4.0 / self.plan.length.as_secs_f64();
            // Writing to a String can't fail.
            let _ = writeln!(
                text,
                "| {name} | {} | {rate:.1} | {} | {} |",
                took.len(),
                milliseconds(percentile(took, 0.5)),
                milliseconds(percentile(took, 0.99)),
            );
        }
        text += "\n";
        if !self.plan.fills_in_time() {
            let _ = writeln!(
                text,
                "Whether memory is flat is not judged: what workers and instances remember is full \
                 after {FILLED_AFTER} transactions, and there were fewer in the first quarter."
            );
        }
        for check in self.checks() {
            for problem in check.problems {
                let _ = writeln!(text, "* {}: {}", check.name, problem.replace('\n', " "));
            }
        }
        let is_good = self.checks().iter().all(|check| check.problems.is_empty());
        let _ = writeln!(text, "Verdict: {}.", if is_good { "passed" } else { "FAILED" });
        text
    }

    fn line(&self, row: &Row) -> String {
        let quarter =
            |number, of: fn(&Sample) -> u64| mebibytes(row.median(&self.plan, number, of));
        let growth = row.growth(&self.plan);
        let word = match growth {
            _ if !row.must_be_flat => "not judged",
            _ if !self.plan.fills_in_time() => "too short",
            Some(growth) if growth <= GROWTH_MAX => "flat",
            Some(_) | None => "GROWN",
        };
        format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {word} |\n",
            row.name,
            quarter(0, |it| it.resident),
            quarter(1, |it| it.resident),
            quarter(2, |it| it.resident),
            quarter(3, |it| it.resident),
            growth.map_or_else(|| "-".to_owned(), per_cent),
            mebibytes(row.samples.iter().map(|sample| sample.peak).max()),
            quarter(3, |it| it.anonymous),
        )
    }
}

impl Row {
    /// The median of a quarter's samples, in KiB.
    fn median(&self, plan: &Plan, quarter: usize, of: fn(&Sample) -> u64) -> Option<u64> {
        let samples = self.samples.iter().filter(|it| plan.quarter_of(it.at) == quarter);
        let mut values: Vec<_> = samples.map(of).collect();
        values.sort_unstable();
        values.get(values.len() / 2).copied()
    }

    /// By how many per cent it grew from the second quarter to the last.
    fn growth(&self, plan: &Plan) -> Option<f64> {
        let second = self.median(plan, 1, |it| it.resident)?;
        let last = self.median(plan, 3, |it| it.resident)?;
        // In this order, a growth of a tenth is exactly 10.
        Some((last as f64 - second as f64) * 100.0 / second as f64)
    }
}

/// The smallest value that at least this share doesn't exceed.
fn percentile(values: &[f32], share: f64) -> Option<f32> {
    let mut values = values.to_vec();
    values.sort_unstable_by(f32::total_cmp);
    let rank = (values.len() as f64 * share).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied()
}

fn milliseconds(value: Option<f32>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"))
}

fn mebibytes(kibibytes: Option<u64>) -> String {
    kibibytes.map_or_else(|| "-".to_owned(), |it| format!("{:.1}", it as f64 / 1024.0))
}

fn per_cent(growth: f64) -> String {
    format!("{growth:+.1} %")
}
