//! Draws throughput and latency over load.
//!
//! It writes lines, circles and texts of SVG, which plotters would too: the layout and the scales would
//! be to write all the same, for three more crates in every build of `dtc`.

use std::fmt::Write as _;

use crate::cli::bench::report::{BenchReport, Measured, Point};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 640.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 24.0;
/// The colours of lines.
const COLOURS: [&str; 4] = ["#1f6feb", "#1a7f37", "#8250df", "#bf8700"];

/// One line: its colour, its name, and its value at each load.
type Line<'a> = (&'a str, &'a str, Vec<(f64, f64)>);

/// Top and bottom of a panel.
type Panel = (f64, f64);

const THROUGHPUT: Panel = (64.0, 300.0);
const LATENCY: Panel = (360.0, 580.0);

/// The report as an SVG of two panels over a common logarithmic axis of load.
pub(super) fn svg(report: &BenchReport) -> String {
    let series = series(report);
    let values = |points: &[&Point], value: fn(&Point) -> &Measured| {
        let points = points.iter();
        points.filter_map(|it| Some((it.in_flight as f64, value(it).median()?))).collect()
    };
    let name = |batch: &usize| match batch {
        0 => "transactions/s".to_owned(),
        1 => "one in a message".to_owned(),
        batch => format!("up to {batch} in a message"),
    };
    let names: Vec<_> = series.iter().map(|(batch, _)| name(batch)).collect();
    let throughput: Vec<Line<'_>> = series
        .iter()
        .zip(names.iter().zip(COLOURS.iter().cycle()))
        .map(|((_, points), (name, colour))| {
            (*colour, name.as_str(), values(points, |it| &it.per_second))
        })
        .collect();
    // Of the producers that put most in a message, as clients do.
    let last = series.last().map_or(&[][..], |(_, points)| points);
    let latency: [Line<'_>; 2] = [
        ("#1f6feb", "p50", values(last, |it| &it.p50)),
        ("#d1242f", "p99", values(last, |it| &it.p99)),
    ];
    let mut loads: Vec<f64> = report.load.iter().map(|it| it.in_flight as f64).collect();
    loads.dedup();

    let mut svg = String::new();
    let _ = write!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n"
    );
    text(&mut svg, (LEFT, 22.0), "start", 16, &title(report));
    text(&mut svg, (LEFT, 38.0), "start", 12, &subtitle(report));
    panel(&mut svg, THROUGHPUT, "transactions/s", false, &loads, &throughput);
    panel(&mut svg, LATENCY, "latency, ms", true, &loads, &latency);
    let middle = (LEFT + WIDTH - RIGHT) / 2.0;
    text(&mut svg, (middle, HEIGHT - 18.0), "middle", 13, "transactions in flight");
    svg.push_str("</svg>\n");
    svg
}

/// The points by how many transactions producers may put in a message.
fn series(report: &BenchReport) -> Vec<(usize, Vec<&Point>)> {
    let mut batches: Vec<_> = report.load.iter().map(|it| it.batch_max).collect();
    batches.sort_unstable();
    batches.dedup();
    let points = |batch| report.load.iter().filter(|it| it.batch_max == batch).collect();
    batches.into_iter().map(|batch| (batch, points(batch))).collect()
}

fn title(report: &BenchReport) -> String {
    let setting = &report.setting;
    match (&setting.broker, &setting.version) {
        (None, _) => "dtc in one process, two services".to_owned(),
        (Some(_), Some(version)) => format!("dtc on RabbitMQ {version}, two services"),
        (Some(_), None) => "dtc on RabbitMQ, two services".to_owned(),
    }
}

fn subtitle(report: &BenchReport) -> String {
    let setting = &report.setting;
    let echo = report.yardstick.as_ref().and_then(|it| it.echo.median());
    let echo = echo.map_or(String::new(), |it| format!("; {it:.0} echo RPCs/s on the same broker"));
    let processor = setting.processor.as_deref().unwrap_or("unknown processor");
    format!("{} cores ({}){echo}", setting.cores, escaped(processor))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, size: u8, label: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\">{label}</text>"
    );
}

/// Draws one panel; `by_factors`: with a logarithmic scale.
fn panel(
    svg: &mut String,
    (top, bottom): Panel,
    name: &str,
    by_factors: bool,
    loads: &[f64],
    lines: &[Line<'_>],
) {
    let values = || lines.iter().flat_map(|(_, _, points)| points.iter().map(|(_, value)| *value));
    let max = values().fold(0.0, f64::max);
    let min = values().fold(f64::INFINITY, f64::min).min(max);
    let (low, high) = match by_factors {
        true => (10_f64.powf(min.max(0.001).log10().floor()), ceiling_by_factors(max)),
        false => (0.0, ceiling(max)),
    };
    let scaled = |value: f64| match by_factors {
        true => (value.max(low) / low).log10() / (high / low).log10(),
        false => value / high,
    };
    let y = |value: f64| bottom - scaled(value).clamp(0.0, 1.0) * (bottom - top);
    let (first, last) = (loads.first().copied().unwrap_or(1.0), loads.last().copied());
    let span = (last.unwrap_or(first) / first).log2();
    let x = |load: f64| {
        let share = if span > 0.0 { (load / first).log2() / span } else { 0.5 };
        LEFT + share * (WIDTH - RIGHT - LEFT)
    };

    text(svg, (LEFT, top - 8.0), "start", 13, name);
    for tick in ticks(low, high, by_factors) {
        let (at, right) = (y(tick), WIDTH - RIGHT);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{right}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>"
        );
        text(svg, (LEFT - 8.0, at + 4.0), "end", 12, &in_figures(tick));
    }
    for &load in loads {
        text(svg, (x(load), bottom + 18.0), "middle", 12, &in_figures(load));
    }
    for (number, (colour, name, points)) in lines.iter().enumerate() {
        let path: Vec<_> = points
            .iter()
            .map(|(load, value)| format!("{:.1},{:.1}", x(*load), y(*value)))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join(" ")
        );
        for point in &path {
            let (x, y) = point.split_once(',').unwrap_or_default();
            let _ = writeln!(svg, "<circle cx=\"{x}\" cy=\"{y}\" r=\"3.5\" fill=\"{colour}\"/>");
        }
        if lines.len() > 1 {
            let longest = lines.iter().map(|(_, name, _)| name.len()).max().unwrap_or_default();
            let room = (longest * 7 + 24) as f64;
            let after = (lines.len() - number - 1) as f64;
            let at = (WIDTH - RIGHT - room * after, top - 8.0);
            let coloured = format!("<tspan fill=\"{colour}\">{name}</tspan>");
            text(svg, at, "end", 13, &coloured);
        }
    }
}

/// The next round number that is not smaller.
fn ceiling(value: f64) -> f64 {
    let power = 10_f64.powf(value.max(1.0).log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0];
    steps.into_iter().map(|step| step * power).find(|it| *it >= value).unwrap_or(10.0 * power)
}

fn ceiling_by_factors(value: f64) -> f64 {
    10_f64.powf(value.max(0.01).log10().ceil().max(-1.0))
}

fn ticks(low: f64, high: f64, by_factors: bool) -> Vec<f64> {
    if !by_factors {
        return (0..=5).map(|fifth| high * f64::from(fifth) / 5.0).collect();
    }
    let mut ticks = vec![low];
    while let Some(last) = ticks.last().filter(|last| **last < high * 0.99) {
        ticks.push(last * 10.0);
    }
    ticks
}

fn in_figures(value: f64) -> String {
    if value >= 1.0 || value == 0.0 { format!("{value:.0}") } else { format!("{value}") }
}

#[cfg(test)]
mod tests {
    use super::{ceiling, svg, ticks};
    use crate::cli::bench::report::{BenchReport, Point};

    #[test]
    fn scales_end_at_round_numbers() {
        assert_eq!([0.0, 7.0, 1999.0, 2001.0, 5600.0].map(ceiling), [1.0, 10.0, 2e3, 2.5e3, 1e4]);
        assert_eq!(ticks(1.0, 100.0, true), [1.0, 10.0, 100.0]);
    }

    #[test]
    fn a_point_is_drawn_for_each_load_and_line() {
        let mut report = BenchReport::default();
        for in_flight in [1, 16, 256] {
            let mut point = Point { in_flight, ..Point::default() };
            point.per_second.add(in_flight as f64 * 30.0);
            point.p50.add(2.0);
            point.p99.add(0.0);
            report.load.push(point);
        }
        let svg = svg(&report);
        assert_eq!(svg.matches("<circle").count(), 9);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        // One load, and none at all, can be drawn too.
        report.load.truncate(1);
        assert!(!super::svg(&report).contains("NaN"));
        assert!(super::svg(&BenchReport::default()).ends_with("</svg>\n"));
    }
}
