//! What is shown on a terminal while a run is under way, and the log beside it.

use std::{
    env,
    io::{self, IsTerminal, Write},
    time::Duration,
};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing_subscriber::{EnvFilter, filter::LevelFilter, fmt::MakeWriter};

/// The environment variable that says what to log.
const DTC_LOG: &str = "DTC_LOG";

/// A progress bar on stderr; nothing at all if that is not a terminal.
///
/// `total`: how many transactions there are, if that is known.
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

/// What `DTC_LOG` asks to be logged; `default` if it doesn't say.
///
/// What it doesn't understand is an error: it would hide those of the run.
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

/// Logs to stderr, above `bar`.
pub(super) fn log_above(bar: &ProgressBar, level: LevelFilter) {
    let writer = Above { bar: bar.clone() };
    // The libraries below have their own opinion of what is an error, and lapin would show what it
    // sends, passwords included.
    let filter = EnvFilter::new(format!("off,dtc={level}"));
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        // It would say that stderr is gone on stderr, and panic.
        .log_internal_errors(false)
        .finish();
    // A second subscriber can't be set; the first one serves.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

struct Above {
    bar: ProgressBar,
}

impl MakeWriter<'_> for Above {
    type Writer = Self;
    fn make_writer(&self) -> Self {
        Self { bar: self.bar.clone() }
    }
}

impl Write for Above {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.bar.suspend(|| io::stderr().write(text))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
