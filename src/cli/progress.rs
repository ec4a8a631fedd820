//! What is shown on a terminal while a run is under way, and the log beside it.

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing_subscriber::{EnvFilter, fmt::MakeWriter};

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

/// Logs to stderr, above `bar`.
pub(super) fn log_above(bar: &ProgressBar) {
    let filter = EnvFilter::builder()
        .with_env_var("DTC_LOG")
        .try_from_env()
        .unwrap_or_else(|_| "error".into());
    let writer = Above { bar: bar.clone() };
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
