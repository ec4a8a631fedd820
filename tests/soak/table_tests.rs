//! Tests that the verdict detects what it must, and that the table shows it.

use std::time::Duration;

use crate::{
    load::{Fate, ProducerOutput},
    memory::Sample,
    soak::{FILLED_AFTER, Plan},
    table::{Outcome, Report, Row},
};

/// Every check, and its name. They panic if they fail.
pub(crate) const ALL: &[(&str, fn())] = &[
    ("table::a_run_of_two_minutes_is_told", two_minutes),
    ("table::growth_of_eleven_per_cent_fails_and_of_ten_does_not", growth),
    ("table::it_is_the_median_of_a_quarter_that_counts", medians),
    ("table::what_grows_in_the_first_quarter_may", filling),
    ("table::the_producer_and_the_broker_may_grow", not_judged),
    ("table::who_was_not_seen_is_not_flat", unseen),
    ("table::a_run_that_is_too_short_is_not_judged", too_short),
    ("table::what_is_unanswered_uncommitted_late_or_dead_fails", the_rest),
];

/// The median of each quarter, in MiB.
fn row(plan: &Plan, name: &str, must_be_flat: bool, quarters: [u64; 4]) -> Row {
    let samples = (0..).zip(quarters).flat_map(|(quarter, resident)| {
        (0..3).map(move |number| Sample {
            at: plan.length * quarter / 4 + Duration::from_secs(number + 1),
            resident: (resident + number) * 1024 - 1024,
            anonymous: (resident - 8) * 1024,
            peak: (resident + 3) * 1024,
        })
    });
    Row { name: name.to_owned(), must_be_flat, samples: samples.collect() }
}

/// A run of so many minutes without problems.
fn report(plan: Plan, workers: [u64; 4]) -> Report {
    let fed = plan.transactions();
    let mut heard =
        ProducerOutput { fates: vec![Fate::Committed; fed], ..ProducerOutput::default() };
    heard.fates[7] = Fate::Aborted;
    heard.aborted.insert("refused".to_owned(), 1);
    for (quarter, took) in (1_u8..).zip(&mut heard.took) {
        *took = vec![f32::from(quarter); fed / 4];
        took[0] = 100.0;
    }
    Report {
        about: "A test.".to_owned(),
        rows: vec![
            row(&plan, "worker w1", true, workers),
            row(&plan, "producer", false, [20, 20, 30, 40]),
        ],
        outcome: Outcome { fed, heard, ..Outcome::default() },
        plan,
    }
}

/// One that is judged, and takes little memory here.
fn long() -> Plan {
    Plan::new(60, 200)
}

fn problems(report: &Report) -> Vec<String> {
    report.checks().into_iter().flat_map(|check| check.problems).collect()
}

fn two_minutes() {
    let mut report = report(Plan::new(2, 10), [40, 50, 53, 55]);
    let expected = "# A soak\n\
        \n\
        A test.\n\
        10 transactions a second for 2 min, over 2 or 3 of 3 services: 1200 submitted, 1199 \
        committed, 1 aborted (refused 1).\n\
        \n\
        Resident memory in MiB: the median of each quarter's samples, and the most there ever was; \
        growth from the second quarter to the last.\n\
        \n\
        | process | 1st quarter | 2nd | 3rd | 4th | growth | most | of it anonymous, 4th | |\n\
        | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n\
        | worker w1 | 40.0 | 50.0 | 53.0 | 55.0 | +10.0 % | 58.0 | 47.0 | too short |\n\
        | producer | 20.0 | 20.0 | 30.0 | 40.0 | +100.0 % | 43.0 | 32.0 | not judged |\n\
        \n\
        | quarter | answered | tx/s | p50 ms | p99 ms |\n\
        | --- | ---: | ---: | ---: | ---: |\n\
        | 1st | 300 | 10.0 | 1.0 | 1.0 |\n\
        | 2nd | 300 | 10.0 | 2.0 | 2.0 |\n\
        | 3rd | 300 | 10.0 | 3.0 | 3.0 |\n\
        | 4th | 300 | 10.0 | 4.0 | 4.0 |\n\
        \n\
        Whether memory is flat is not judged: what workers and instances remember is full after \
        180000 transactions, and there were fewer in the first quarter.\n\
        Verdict: passed.\n";
    assert_eq!(report.text(), expected);
    report.outcome.died.push("worker w1 ended with 1:\nit said so".to_owned());
    let failed = "* nobody_ended: worker w1 ended with 1: it said so\nVerdict: FAILED.\n";
    assert!(report.text().ends_with(failed), "{}", report.text());
}

fn growth() {
    assert_eq!(problems(&report(long(), [40, 100, 120, 110])), [""; 0]);
    let grown = report(long(), [40, 100, 100, 111]);
    let complaint = "worker w1 grew by +11.0 % from the second to the last quarter";
    assert_eq!(problems(&grown), [complaint]);
    let text = grown.text();
    assert!(text.contains("| +11.0 % | 114.0 | 103.0 | GROWN |"), "{text}");
    assert!(
        text.ends_with(&format!("* memory_is_flat: {complaint}\nVerdict: FAILED.\n")),
        "{text}"
    );
}

fn medians() {
    let mut report = report(long(), [100; 4]);
    // One of three.
    let last = report.rows[0].samples.last_mut();
    last.into_iter().for_each(|sample| sample.resident *= 3);
    assert_eq!(problems(&report), [""; 0]);
}

fn filling() {
    assert_eq!(problems(&report(long(), [10, 100, 100, 100])), [""; 0]);
}

fn not_judged() {
    let mut report = report(long(), [100; 4]);
    let plan = report.plan;
    report.rows.push(row(&plan, "broker", false, [100, 100, 200, 300]));
    assert_eq!(problems(&report), [""; 0]);
}

fn unseen() {
    let mut report = report(long(), [100; 4]);
    let plan = report.plan;
    report.rows[0].samples.retain(|sample| plan.quarter_of(sample.at) < 3);
    assert_eq!(problems(&report).len(), 1, "{:?}", problems(&report));
}

fn too_short() {
    let plan = Plan::new(59, 200);
    assert!(plan.transactions() / 4 < FILLED_AFTER);
    assert_eq!(problems(&report(plan, [100, 100, 100, 200])), [""; 0]);
    // At a higher rate, it is filled in time.
    assert_eq!(problems(&report(Plan::new(15, 800), [100, 100, 100, 200])).len(), 1);
}

fn the_rest() {
    let spoilt = |spoil: fn(&mut Outcome)| {
        let mut report = report(Plan::new(2, 10), [100; 4]);
        spoil(&mut report.outcome);
        problems(&report)
    };
    let unanswered = spoilt(|outcome| outcome.heard.fates[9] = Fate::Unanswered);
    assert_eq!(unanswered, ["1200 were submitted, 1199 answered"]);
    let late = spoilt(|outcome| {
        outcome.fed = 1000;
        outcome.heard.fates.truncate(1000);
    });
    assert_eq!(late, ["1000 of 1200 transactions were submitted in time"]);
    assert_eq!(spoilt(|outcome| outcome.unequal.push("1".to_owned())), ["1"]);
    assert_eq!(spoilt(|outcome| outcome.died.push("2".to_owned())), ["2"]);
    assert_eq!(spoilt(|outcome| outcome.heard.odd.push("3".to_owned())), ["3"]);
}
