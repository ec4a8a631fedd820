//! The table of a campaign, in Markdown.

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use crate::play::Verdict;

/// All runs so far, by scenario.
#[derive(Default)]
pub(crate) struct Table {
    runs: Vec<(&'static str, Verdict)>,
}

impl Table {
    pub(crate) fn add(&mut self, name: &'static str, verdict: Verdict) {
        self.runs.push((name, verdict));
    }

    /// One row for each scenario, the totals, and what went wrong.
    pub(crate) fn text(&self, version: &str) -> String {
        let mut names = Vec::new();
        for (name, _) in &self.runs {
            if !names.contains(name) {
                names.push(name);
            }
        }
        let mut text = format!(
            "{} runs on three nodes of RabbitMQ {version}. Times in seconds, median / longest.\n\n\
             | scenario | runs | hangs | violations | stood still | late | broker | new commit after the fault \
             | after healing | longest gap | quiet after healing | committed | aborted |\n\
             | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n",
            self.runs.len()
        );
        for name in names {
            let of_name = self.runs.iter().filter(|(other, _)| *other == name);
            text += &row(name, &of_name.map(|(_, verdict)| verdict).collect::<Vec<_>>());
        }
        let all: Vec<_> = self.runs.iter().map(|(_, verdict)| verdict).collect();
        text += &row("**all**", &all);
        text.push('\n');
        for (number, (name, verdict)) in (1..).zip(&self.runs) {
            for problem in verdict.problems() {
                // Writing to a String can't fail.
                let _ = writeln!(text, "* run {number}, {name}: {}", problem.replace('\n', " "));
            }
            for note in &verdict.broker {
                let _ = writeln!(text, "* run {number}, {name}, the broker: {note}");
            }
        }
        text
    }
}

fn row(name: &str, verdicts: &[&Verdict]) -> String {
    let count = |is_so: fn(&Verdict) -> bool| verdicts.iter().filter(|it| is_so(it)).count();
    let mut aborted = BTreeMap::new();
    for (reason, count) in verdicts.iter().flat_map(|verdict| &verdict.times.aborted) {
        *aborted.entry(reason.clone()).or_default() += count;
    }
    let spread = |of: fn(&Verdict) -> Option<Duration>| {
        let mut times: Vec<_> = verdicts.iter().filter_map(|verdict| of(verdict)).collect();
        times.sort_unstable();
        let missing = verdicts.len() - times.len();
        let Some(longest) = times.last() else { return "never".to_owned() };
        let median = times[times.len() / 2];
        let never = if missing > 0 { format!(", {missing} × never") } else { String::new() };
        format!("{:.1} / {:.1}{never}", median.as_secs_f64(), longest.as_secs_f64())
    };
    format!(
        "| {name} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |\n",
        verdicts.len(),
        count(|it| it.hang.is_some()),
        count(|it| !it.violations.is_empty() || it.broken.is_some()),
        count(|it| it.stood_still.is_some()),
        count(|it| it.late.is_some()),
        count(|it| !it.broker.is_empty()),
        spread(|it| it.times.first_after_fault),
        spread(|it| it.times.first_after_healing),
        spread(|it| Some(it.times.longest_gap)),
        spread(|it| it.quiet_after),
        verdicts.iter().map(|it| it.times.committed).sum::<usize>(),
        reasons(&aborted),
    )
}

/// `deadline 3, no_slot 1`, or `none`.
pub(crate) fn reasons(aborted: &BTreeMap<String, usize>) -> String {
    if aborted.is_empty() {
        return "none".to_owned();
    }
    let all: Vec<_> = aborted.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
    all.join(", ")
}
