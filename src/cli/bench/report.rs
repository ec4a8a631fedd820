//! The measurements, as JSON and as a table.
//!
//! The table's columns have fixed widths, so that two reports can be compared line by line; a crate for
//! tables would fit them to each report.

use std::{
    fmt::{self, Write as _},
    time::Duration,
};

use serde_json::{Value, json};

use crate::transport::amqp::topology::QueueKind;

/// The values of one measurement in several rounds.
#[derive(Clone, Debug, Default)]
pub(super) struct Measured(Vec<f64>);

impl Measured {
    pub(super) fn add(&mut self, value: f64) {
        self.0.push(value);
        self.0.sort_by(f64::total_cmp);
    }

    /// Adds a value, if it is known.
    pub(super) fn add_known(&mut self, value: Option<f64>) {
        value.into_iter().for_each(|value| self.add(value));
    }

    /// In how many rounds it was measured.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    pub(super) fn median(&self) -> Option<f64> {
        let middle = self.0.len() / 2;
        let upper = *self.0.get(middle)?;
        if self.0.len() % 2 == 1 {
            return Some(upper);
        }
        Some((self.0.get(middle - 1)? + upper) / 2.0)
    }

    /// The smallest and the largest value.
    fn spread(&self) -> String {
        match (self.0.first(), self.0.last()) {
            (Some(min), Some(max)) => format!("{min:.0}..{max:.0}"),
            (_, None) | (None, _) => String::new(),
        }
    }

    fn text(&self) -> String {
        known_or_not(self.median())
    }

    fn json(&self) -> Value {
        match self.median() {
            Some(median) => json!({
                "median": rounded(median),
                "min": self.0.first().copied().map(rounded),
                "max": self.0.last().copied().map(rounded),
            }),
            None => Value::Null,
        }
    }
}

/// Rounded to three decimals.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// The conditions of the measurements.
#[derive(Clone, Debug, Default)]
pub(super) struct Conditions {
    pub(super) cores: usize,
    pub(super) processor: Option<String>,
    /// The broker's URL, without a password; `None`: everything is in one process.
    pub(super) broker: Option<String>,
    pub(super) version: Option<String>,
    pub(super) prepare_queues: &'static str,
    pub(super) workers: u64,
    pub(super) seconds: u64,
    pub(super) rounds: u64,
    pub(super) data_bytes: usize,
}

/// The least that a client can achieve with the same broker.
#[derive(Clone, Debug)]
pub(super) struct Yardstick {
    pub(super) echo_in_flight: usize,
    /// Echo RPCs per second.
    pub(super) echo: Measured,
    /// CPU time of each, in microseconds; both caller and answerer count as producers.
    pub(super) cpu: ByGroup,
    /// Echo RPCs per second over a raw socket; empty if the broker takes none.
    pub(super) raw_echo: Measured,
    /// CPU time of each of these.
    pub(super) raw_cpu: ByGroup,
    /// The median time of an echo RPC that is alone, in milliseconds.
    pub(super) echo_alone: Measured,
    /// Plain messages per second.
    pub(super) raw: Measured,
    /// The median time of a message that is alone, through one queue of each kind, in milliseconds.
    pub(super) hops: [(QueueKind, Measured); 3],
}

impl Default for Yardstick {
    fn default() -> Self {
        let kinds = [QueueKind::Classic, QueueKind::Quorum, QueueKind::Stream];
        Self {
            echo_in_flight: 0,
            echo: Measured::default(),
            cpu: ByGroup::default(),
            raw_echo: Measured::default(),
            raw_cpu: ByGroup::default(),
            echo_alone: Measured::default(),
            raw: Measured::default(),
            hops: kinds.map(|kind| (kind, Measured::default())),
        }
    }
}

impl Yardstick {
    /// How long the messages take that a transaction sends one after the other: the request through
    /// a quorum queue, the decision through a stream, and prepare, vote, commit, done and result
    /// through classic queues. No coordinator on this broker could be faster.
    fn hops_of_a_transaction(&self) -> Option<f64> {
        let times = |kind| if kind == QueueKind::Classic { 5.0 } else { 1.0 };
        self.hops.iter().map(|(kind, hop)| Some(hop.median()? * times(*kind))).sum()
    }
}

/// The groups of processes whose CPU time, memory and messages are measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ProcessGroup {
    Broker,
    Workers,
    Services,
    Producers,
}

impl ProcessGroup {
    pub(super) const ALL: [Self; 4] =
        [Self::Broker, Self::Workers, Self::Services, Self::Producers];

    fn name(self) -> &'static str {
        match self {
            Self::Broker => "broker",
            Self::Workers => "workers",
            Self::Services => "services",
            Self::Producers => "producers",
        }
    }
}

/// A value for each group, if it is known.
#[derive(Clone, Debug, Default)]
pub(super) struct ByGroup([Measured; ProcessGroup::ALL.len()]);

impl ByGroup {
    pub(super) fn add(&mut self, who: ProcessGroup, value: Option<f64>) {
        let index = ProcessGroup::ALL.iter().position(|it| *it == who);
        if let Some(measured) = index.and_then(|index| self.0.get_mut(index)) {
            measured.add_known(value);
        }
    }

    fn iter(&self) -> impl Iterator<Item = (ProcessGroup, &Measured)> {
        ProcessGroup::ALL.into_iter().zip(&self.0)
    }

    fn json(&self) -> Value {
        self.iter().map(|(who, measured)| (who.name().to_owned(), measured.json())).collect()
    }

    /// Those that are known and not zero, by name.
    fn known(&self) -> String {
        let known = self.iter().filter(|(_, it)| it.median().is_some_and(|median| median > 0.0));
        let known = known.map(|(who, measured)| format!("{} {}", who.name(), measured.text()));
        known.collect::<Vec<_>>().join(", ")
    }

    fn text(&self) -> String {
        self.iter().map(|(_, measured)| format!("{:>7}", measured.text())).collect()
    }
}

/// The measurements of one load.
#[derive(Clone, Debug, Default)]
pub(super) struct Point {
    pub(super) in_flight: usize,
    /// How many transactions producers may put in a message; 0: there are no messages.
    pub(super) batch_max: usize,
    /// Transactions per second.
    pub(super) per_second: Measured,
    /// Transactions per echo RPC of the same round.
    pub(super) per_echo: Measured,
    /// Transactions per echo RPC over a raw socket.
    pub(super) per_raw_echo: Measured,
    /// In milliseconds, like `p99`.
    pub(super) p50: Measured,
    pub(super) p99: Measured,
    pub(super) aborted: u64,
    /// Messages per transaction, of all groups together.
    pub(super) messages: Measured,
    /// The same, by the group that published them.
    pub(super) published: ByGroup,
    /// CPU time per transaction, in microseconds.
    pub(super) cpu: ByGroup,
    /// Memory at the end, in MiB.
    pub(super) resident: ByGroup,
}

/// The measurements of a backlog.
#[derive(Clone, Debug, Default)]
pub(super) struct Backlog {
    pub(super) requests: u64,
    /// How many of them are in a message.
    pub(super) batch_max: usize,
    /// The transactions per second of each drain.
    pub(super) per_second: Measured,
    /// Transactions per echo RPC, of all rounds.
    pub(super) per_echo: Option<f64>,
    pub(super) aborted: u64,
    /// The worker's memory in the middle of a drain, in MiB.
    pub(super) resident_middle: Measured,
    /// Its largest memory, in MiB.
    pub(super) resident_max: Measured,
}

/// How long a start, a drain and a takeover of a worker take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// From the start of the process until it takes requests.
    pub(super) startup: Duration,
    /// From the signal to the end of the process, under load.
    pub(super) drain: Duration,
    /// From the kill until the last transaction that was in flight has ended.
    pub(super) takeover: Duration,
}

/// All measurements.
#[derive(Clone, Debug, Default)]
pub(super) struct BenchReport {
    pub(super) setting: Conditions,
    pub(super) yardstick: Option<Yardstick>,
    pub(super) load: Vec<Point>,
    pub(super) backlog: Vec<Backlog>,
    pub(super) times: Option<Times>,
}

impl BenchReport {
    /// Whether no transaction aborted: all should commit.
    pub(super) fn is_whole(&self) -> bool {
        let aborted = self.load.iter().map(|it| it.aborted);
        aborted.chain(self.backlog.iter().map(|it| it.aborted)).all(|aborted| aborted == 0)
    }

    pub(super) fn json(&self) -> String {
        let Conditions { cores, workers, seconds, rounds, data_bytes, .. } = self.setting;
        let broker = self.setting.broker.as_ref().map(|url| {
            json!({
                "url": url,
                "version": self.setting.version,
                "requests": "quorum queue, persistent messages",
                "prepares": format!("{} queues, transient messages", self.setting.prepare_queues),
                "journal": "stream",
                "results": "persistent messages in the producers' own queues",
            })
        });
        let yardstick = self.yardstick.as_ref().map(|it| {
            json!({
                "queue": "durable classic queue, persistent messages",
                "echo_in_flight": it.echo_in_flight,
                "echo_per_s": it.echo.json(),
                "cpu_us_per_echo": it.cpu.json(),
                "raw_echo_per_s": it.raw_echo.json(),
                "cpu_us_per_raw_echo": it.raw_cpu.json(),
                "echo_alone_p50_ms": it.echo_alone.json(),
                "raw_messages_per_s": it.raw.json(),
                "hop_alone_p50_ms": it.hops.iter().map(|(kind, hop)| {
                    (kind.to_string(), hop.json())
                }).collect::<serde_json::Map<_, _>>(),
                "hops_of_a_tx_ms": it.hops_of_a_transaction().map(rounded),
            })
        });
        let load = self.load.iter().map(|it| {
            json!({
                "in_flight": it.in_flight,
                "batch_max": it.batch_max,
                "tx_per_s": it.per_second.json(),
                "tx_per_echo": it.per_echo.json(),
                "tx_per_raw_echo": it.per_raw_echo.json(),
                "p50_ms": it.p50.json(),
                "p99_ms": it.p99.json(),
                "aborted": it.aborted,
                "messages_per_tx": it.messages.json(),
                "published_per_tx": it.published.json(),
                "cpu_us_per_tx": it.cpu.json(),
                "resident_mib": it.resident.json(),
            })
        });
        let backlog = self.backlog.iter().map(|it| {
            json!({
                "requests": it.requests,
                "batch_max": it.batch_max,
                "tx_per_echo": it.per_echo.map(rounded),
                "drained": it.per_second.count(),
                "tx_per_s": it.per_second.json(),
                "aborted": it.aborted,
                "worker_resident_mib": {
                    "middle": it.resident_middle.json(),
                    "max": it.resident_max.json(),
                },
            })
        });
        let times = self.times.map(|it| {
            json!({
                "startup_ms": it.startup.as_millis() as u64,
                "drain_ms": it.drain.as_millis() as u64,
                "takeover_ms": it.takeover.as_millis() as u64,
            })
        });
        let report = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "machine": {"cores": cores, "processor": self.setting.processor},
            "broker": broker,
            "workers": workers,
            "seconds": seconds,
            "rounds": rounds,
            "data_bytes": data_bytes,
            "yardstick": yardstick,
            "load": load.collect::<Vec<_>>(),
            "backlog": backlog.collect::<Vec<_>>(),
            "times": times,
        });
        format!("{report:#}\n")
    }

    fn load_table(&self) -> String {
        let mut text = String::new();
        let known = Measured::text;
        let line = |text: &mut String, cells: [&str; 9]| {
            let [in_flight, batch, rate, spread, echo, p50, p99, messages, rest] = cells;
            let _ = writeln!(
                text,
                "{in_flight:>9}{batch:>7}{rate:>9}{spread:>17}{echo:>9}{p50:>9}{p99:>9}{messages:>9}{rest}",
            );
        };
        let is_brokered = self.setting.broker.is_some();
        let cells = match is_brokered {
            true => [
                "batch",
                " per echo  per raw echo",
                "messages",
                "   CPU µs: broker, workers, services, producers",
            ],
            false => ["", "", "", ""],
        };
        let [batch, echo, messages, rest] = cells;
        line(
            &mut text,
            ["in flight", batch, "tx/s", "min..max", echo, "p50 ms", "p99 ms", messages, rest],
        );
        for point in &self.load {
            let spread = point.per_second.spread();
            let (batch, echo, messages, rest) = match is_brokered {
                true => (
                    point.batch_max.to_string(),
                    format!("{:>9}{:>14}", known(&point.per_echo), known(&point.per_raw_echo)),
                    known(&point.messages),
                    point.cpu.text(),
                ),
                false => Default::default(),
            };
            let (in_flight, rate) = (point.in_flight.to_string(), known(&point.per_second));
            let (p50, p99) = (known(&point.p50), known(&point.p99));
            let cells = [&in_flight, &batch, &rate, &spread, &echo, &p50, &p99, &messages, &rest];
            line(&mut text, cells.map(String::as_str));
        }
        text
    }
}

pub(super) fn ms(took: Duration) -> f64 {
    took.as_secs_f64() * 1000.0
}

pub(super) fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn known_or_not(value: Option<f64>) -> String {
    value.map_or_else(|| "?".to_owned(), in_short)
}

/// With as many decimals as are significant.
fn in_short(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

/// As text for people.
impl fmt::Display for BenchReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Conditions { cores, rounds, seconds, data_bytes, .. } = self.setting;
        write!(f, "{cores} cores")?;
        if let Some(processor) = &self.setting.processor {
            write!(f, " ({processor})")?;
        }
        writeln!(f, "; medians of {rounds} rounds of {seconds} s; {data_bytes} bytes of data")?;
        if let Some(broker) = &self.setting.broker {
            let version = self.setting.version.as_deref().unwrap_or("of unknown version");
            let prepares = self.setting.prepare_queues;
            let workers = self.setting.workers;
            writeln!(
                f,
                "RabbitMQ {version} at {broker}; {workers} worker{}, 2 services of one instance\n\
                 durable: requests (quorum queue), journal (stream), results; not: prepares ({prepares} \
                 queues), votes, commits, dones",
                if workers == 1 { "" } else { "s" }
            )?;
        }
        if let Some(yardstick) = &self.yardstick {
            let known = Measured::text;
            writeln!(
                f,
                "\nyardstick: {} echo RPCs/s through the client library, {} over a raw socket, with {} in \
                 flight; {} ms alone; {} plain messages/s",
                known(&yardstick.echo),
                known(&yardstick.raw_echo),
                yardstick.echo_in_flight,
                known(&yardstick.echo_alone),
                known(&yardstick.raw),
            )?;
            write!(f, "CPU µs of an echo RPC: {}", yardstick.cpu.known())?;
            if yardstick.raw_echo.count() > 0 {
                write!(f, "; over a raw socket: {}", yardstick.raw_cpu.known())?;
            }
            writeln!(f)?;
            let hops: Vec<_> = yardstick
                .hops
                .iter()
                .map(|(kind, hop)| format!("{} ms by a {kind} queue", known(hop)))
                .collect();
            writeln!(
                f,
                "a message alone: {}; the seven of a transaction: {} ms",
                hops.join(", "),
                known_or_not(yardstick.hops_of_a_transaction()),
            )?;
        }
        write!(f, "\n{}", self.load_table())?;
        let aborted: u64 = self.load.iter().map(|it| it.aborted).sum();
        if aborted > 0 {
            writeln!(f, "{aborted} were ABORTED")?;
        }
        for it in &self.backlog {
            let known = Measured::text;
            let times = match it.per_second.count() {
                0 | 1 => String::new(),
                count => format!(" ({}, drained {count} times)", it.per_second.spread()),
            };
            writeln!(
                f,
                "\nbacklog of {}, {} in a message: {} tx/s{times}, {} per echo; the worker's memory {} MiB \
                 amid it, at most {} MiB{}",
                it.requests,
                it.batch_max,
                known(&it.per_second),
                known_or_not(it.per_echo),
                known(&it.resident_middle),
                known(&it.resident_max),
                if it.aborted > 0 {
                    format!("; {} were ABORTED", it.aborted)
                } else {
                    String::new()
                },
            )?;
        }
        if let Some(Times { startup, drain, takeover }) = self.times {
            let ms = |it: Duration| it.as_millis();
            writeln!(
                f,
                "\na worker starts in {} ms, drains in {} ms, and is taken over from in {} ms",
                ms(startup),
                ms(drain),
                ms(takeover)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{BenchReport, Measured, Point};

    #[test]
    fn the_median_is_in_the_middle() {
        let mut measured = Measured::default();
        assert_eq!(measured.median(), None);
        for (value, median) in [(3.0, 3.0), (1.0, 2.0), (2.0, 2.0), (10.0, 2.5)] {
            measured.add(value);
            assert_eq!(measured.median(), Some(median));
        }
    }

    #[test]
    fn a_report_with_aborts_is_not_whole() {
        let mut report = BenchReport { load: vec![Point::default()], ..BenchReport::default() };
        assert!(report.is_whole());
        report.load[0].aborted = 1;
        assert!(!report.is_whole());
    }
}
