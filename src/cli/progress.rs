//! The progress bar on a terminal, and the log beside it.

use std::{
    env,
    io::{self, IsTerminal, Write},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    fmt::{self, MakeWriter},
    layer::SubscriberExt as _,
};

use crate::cli::{escape, log_format::LogFormat};

/// How many lines of the log may wait to be written.
const WAITING_MAX: usize = 4096;

/// The environment variable that sets the log level.
const DTC_LOG: &str = "DTC_LOG";

/// A progress bar on stderr, which is hidden if stderr is not a terminal.
///
/// `total`: the number of transactions, if it is known.
pub(super) fn bar(total: Option<u64>) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), "{bar:40} {pos}/{len} {per_sec} {eta} left"),
        None => (ProgressBar::new_spinner(), "{spinner} {pos} {per_sec} {elapsed}"),
    };
    bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(5));
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// The log level that `DTC_LOG` sets; `default` if it is not set.
///
/// An unknown level is an error: to ignore it could hide errors of the run.
pub(super) fn log_level(default: LevelFilter) -> anyhow::Result<LevelFilter> {
    let text = env::var_os(DTC_LOG).unwrap_or_default();
    if text.is_empty() {
        return Ok(default);
    }
    let level = text.to_str().and_then(|text| text.parse().ok());
    level.with_context(|| {
        let text = text.to_string_lossy();
        format!("{DTC_LOG} is `{text}`: must be one of error, warn, info, debug, trace, off")
    })
}

/// The log is written as long as this exists. Dropping it writes the waiting lines, if somebody
/// reads them.
#[must_use]
pub(super) struct Logging(
    #[expect(dead_code, reason = "what counts is when it is dropped")] WorkerGuard,
);

/// Logs to stderr, above `bar`.
///
/// A separate thread writes: stderr may be a pipe that nobody reads, and work must continue. Lines
/// for which there is no room are dropped and counted.
pub(super) fn log_above(bar: &ProgressBar, level: LevelFilter) -> Logging {
    let above = StderrAboveBar { bar: bar.clone(), has_colours: io::stderr().is_terminal() };
    let (waiting, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(WAITING_MAX)
        .thread_name("log")
        .finish(above);
    let writer = LossyWriter { lost: waiting.error_counter(), waiting, told: Arc::default() };
    // Libraries are not logged: many of their errors are none for `dtc`, and lapin would log what
    // it sends, passwords included.
    let mut filter = Targets::new().with_target("dtc", level);
    // Nothing that a simulated service logs is an error, and `dtc run` calls services half a
    // million times a second.
    if level <= LevelFilter::ERROR {
        filter = filter.with_target(crate::participant::spans::CALL_TARGET, LevelFilter::OFF);
    }
    let lines = fmt::layer()
        .with_writer(writer)
        .with_ansi(io::stderr().is_terminal())
        .event_format(LogFormat)
        // Otherwise it would report a failed write to stderr on stderr, and panic.
        .log_internal_errors(false);
    let subscriber = tracing_subscriber::registry().with(filter).with(lines);
    // If a subscriber is already set, that one stays in use.
    let _ = tracing::subscriber::set_global_default(subscriber);
    Logging(guard)
}

/// Passes lines to the thread that writes them.
#[derive(Clone)]
struct LossyWriter {
    waiting: NonBlocking,
    lost: ErrorCounter,
    /// How many dropped lines have been reported.
    told: Arc<AtomicUsize>,
}

impl MakeWriter<'_> for LossyWriter {
    type Writer = Self;
    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl Write for LossyWriter {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let lost = self.lost.dropped_lines();
        let told = self.told.load(Ordering::Relaxed);
        if lost > told {
            let said = format!("{} lines of the log are lost: nobody read them\n", lost - told);
            self.waiting.write_all(said.as_bytes())?;
            if self.lost.dropped_lines() == lost {
                self.told.store(lost, Ordering::Relaxed);
            }
        }
        self.waiting.write(text)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes lines to stderr.
struct StderrAboveBar {
    bar: ProgressBar,
    has_colours: bool,
}

impl Write for StderrAboveBar {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let said = String::from_utf8_lossy(text);
        let said = said.trim_end_matches('\n');
        let plain = if self.has_colours { escape::coloured_line(said) } else { escape::line(said) };
        let plain = format!("{plain}\n");
        self.bar.suspend(|| io::stderr().write_all(plain.as_bytes()))?;
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
