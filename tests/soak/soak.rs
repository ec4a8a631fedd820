//! The whole soak, from its start to its report.

use std::{
    fs, panic,
    process::Command,
    sync::{
        Arc, Mutex,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};

use crate::{
    broker::Broker,
    fleet::Fleet,
    ledger::Ledger,
    load::{self, ProducerOutput, locked},
    memory::{self, Sample},
    signals,
    table::{Outcome, Report, Row},
    tell,
};

/// How often to read memory.
const SAMPLED_EVERY: Duration = Duration::from_secs(10);
/// How long a worker remembers a decision, by default.
const WINDOW: Duration = Duration::from_secs(15 * 60);
/// After how many transactions every process has filled its memory of transactions: a worker has
/// read those of a window at the default rate, and each instance has had more than its last 65,536.
pub(crate) const FILLED_AFTER: usize = 180_000;
/// How often the broker closes all connections during a soak: equally often in each quarter. A process
/// keeps a few MiB more when it has connected again, and must not keep more each time.
const CLOSINGS: u32 = 16;
/// How long the last results may take: longer than the producer waits for them.
const ANSWERED_IN: Duration = Duration::from_secs(150);

/// What is to be done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Plan {
    pub(crate) minutes: u32,
    pub(crate) length: Duration,
    /// Transactions a second.
    pub(crate) rate: u32,
}

impl Plan {
    pub(crate) fn new(minutes: u32, rate: u32) -> Self {
        Self { minutes, length: Duration::from_secs(u64::from(minutes) * 60), rate }
    }

    /// How many transactions there are to be.
    pub(crate) fn transactions(&self) -> usize {
        self.minutes as usize * 60 * self.rate as usize
    }

    /// The quarter of this moment, from 0; a later moment is in the last one.
    pub(crate) fn quarter_of(&self, at: Duration) -> usize {
        (1..4).filter(|quarter| at >= self.length * *quarter / 4).count()
    }

    /// Whether every process has filled its memory of transactions by the end of the first quarter.
    /// Before that, memory grows as it should.
    pub(crate) fn fills_in_time(&self) -> bool {
        self.transactions() / 4 >= FILLED_AFTER
    }

    /// When the broker is to close all connections the next time, after it has done so `closings` times.
    fn closes_at(&self, closings: u32) -> Duration {
        (self.length * (2 * closings + 1)) / (2 * CLOSINGS)
    }

    /// How long workers remember decisions: not beyond the first quarter.
    fn window(&self) -> Duration {
        WINDOW.min(self.length / 4)
    }
}

/// What happens during a soak.
pub(crate) enum News {
    /// Somebody wants this to end.
    Signal(&'static str),
    /// All transactions were given to the producer: their number.
    Fed(usize),
    /// The producer has ended its output.
    Answered,
}

/// How a soak ends.
pub(crate) enum Ended {
    Over(Box<Report>),
    /// By this signal.
    Interrupted(&'static str),
}

/// The result of a wait.
enum Waited {
    Over,
    Interrupted(&'static str),
    /// These processes have ended.
    Died(Vec<String>),
}

pub(crate) fn soak(plan: &Plan) -> Result<Ended> {
    let (sender, news) = mpsc::channel();
    signals::listen(sender.clone())?;
    // The output of a node that doesn't start has been printed.
    let broker = panic::catch_unwind(Broker::start)
        .map_err(|_| anyhow!("a soak wants a RabbitMQ node, and none can be started"))?;
    let mut fleet = Fleet::at(broker.place())?;
    for name in ["w1", "w2"] {
        fleet.worker(name, plan.window())?;
    }
    for (service, number) in [("payments", 1), ("shipping", 1), ("stock", 1), ("stock", 2)] {
        fleet.instance(service, number)?;
    }
    let (stdin, stdout) = fleet.producer()?;
    let heard = Arc::new(Mutex::new(ProducerOutput::default()));
    load::hear(*plan, stdout, Arc::clone(&heard), sender.clone());
    load::feed(*plan, stdin, sender);
    tell(format_args!(
        "RabbitMQ {}, 2 workers, 4 instances of 3 services: {} transactions/s for {} min",
        broker.version(),
        plan.rate,
        plan.minutes
    ));

    let mut rows: Vec<_> = fleet
        .processes()
        .iter()
        .map(|it| Row { name: it.name.clone(), must_be_flat: it.must_be_flat, samples: Vec::new() })
        .collect();
    rows.push(Row { name: "broker".to_owned(), must_be_flat: false, samples: Vec::new() });
    let (mut fed, mut closings) = (0, 0);
    let waited = watch(plan, &news, &mut fleet, &broker, &mut rows, &mut fed, &mut closings);
    let mut died = match waited {
        Waited::Interrupted(signal) => return Ok(Ended::Interrupted(signal)),
        Waited::Died(died) => died,
        Waited::Over => {
            if let Some(signal) = until_answered(&news) {
                return Ok(Ended::Interrupted(signal));
            }
            Vec::new()
        }
    };
    died.append(&mut fleet.end());
    let ledger = Ledger::read(&fleet.state())?;
    let heard = std::mem::take(&mut *locked(&heard));
    let unequal = ledger.problems(&heard.fates);
    let outcome = Outcome { fed, heard, unequal, died };
    let about = about(plan, &broker, closings);
    Ok(Ended::Over(Box::new(Report { plan: *plan, about, rows, outcome })))
}

/// Reads the memory of every process from time to time, until all transactions are given to the
/// producer.
fn watch(
    plan: &Plan,
    news: &Receiver<News>,
    fleet: &mut Fleet,
    broker: &Broker,
    rows: &mut [Row],
    fed: &mut usize,
    closings: &mut u32,
) -> Waited {
    let began = Instant::now();
    let mut told = 0;
    for number in 1_u32.. {
        let due = SAMPLED_EVERY * number;
        match news.recv_timeout(due.saturating_sub(began.elapsed())) {
            Ok(News::Signal(name)) => return Waited::Interrupted(name),
            Ok(News::Fed(count)) => {
                *fed = count;
                return Waited::Over;
            }
            // Its end is detected below.
            Ok(News::Answered)
            | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        let died = fleet.died();
        if !died.is_empty() {
            return Waited::Died(died);
        }
        if began.elapsed() >= plan.closes_at(*closings) && *closings < CLOSINGS {
            broker.control(&["close_all_connections", "soak"]);
            *closings += 1;
        }
        let at = began.elapsed();
        let of_processes = fleet.processes().iter().map(|process| process.memory(at));
        for (row, sample) in rows.iter_mut().zip(of_processes.chain([node_memory(broker, at)])) {
            row.samples.extend(sample);
        }
        if plan.quarter_of(at) > told {
            told = plan.quarter_of(at);
            let memory = |row: &Row| {
                let resident = row.samples.last().map_or(0, |sample| sample.resident);
                format!("{} {:.1} MiB", row.name, resident as f64 / 1024.0)
            };
            let memories: Vec<_> = rows.iter().map(memory).collect();
            tell(format_args!("after {:.0?}: {}", at, memories.join(", ")));
        }
    }
    Waited::Over
}

/// Waits for the last results; returns the signal if one ends this instead.
fn until_answered(news: &Receiver<News>) -> Option<&'static str> {
    let began = Instant::now();
    loop {
        match news.recv_timeout(ANSWERED_IN.saturating_sub(began.elapsed())) {
            Ok(News::Signal(name)) => return Some(name),
            Ok(News::Fed(_)) => {}
            // Missing results are among the unanswered.
            Ok(News::Answered) | Err(_) => return None,
        }
    }
}

/// The node's memory.
fn node_memory(broker: &Broker, at: Duration) -> Option<Sample> {
    let id = fs::read_to_string(broker.directory().join("pid")).ok()?;
    memory::sample(id.trim().parse().ok()?, at)
}

/// When, what and where.
fn about(plan: &Plan, broker: &Broker, closings: u32) -> String {
    let said = |program: &str, words: &[&str]| {
        let mut command = Command::new(program);
        command.args(words).current_dir(env!("CARGO_MANIFEST_DIR"));
        let output = command.output().ok().filter(|output| output.status.success());
        let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        text.filter(|text| !text.is_empty()).unwrap_or_else(|| "unknown".to_owned())
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let command = match plan.rate {
        crate::RATE => format!("tests/run --soak {}", plan.minutes),
        rate => format!("cargo test --test soak -- --minutes {} --rate {rate}", plan.minutes),
    };
    format!(
        "`{command}` on {}, at commit {}, on one machine with {cores} cores, RabbitMQ {}. \
         The broker closed all connections {closings} times.",
        said("date", &["-u", "+%Y-%m-%d"]),
        said("git", &["describe", "--always", "--dirty"]),
        broker.version(),
    )
}
