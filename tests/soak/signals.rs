//! Ctrl-C and similar signals, as messages.

use std::{process, sync::mpsc::Sender, thread};

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

use crate::{INTERRUPTED, soak::News};

/// Sends [`News::Signal`] for the first signal that asks this process to end. The second one ends
/// it at once, and the kernel ends what it has started.
pub(crate) fn listen(news: Sender<News>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
    let runtime = runtime.context("no runtime for signals")?;
    let (mut interrupts, mut terminations, mut hang_ups) = {
        let _guard = runtime.enter();
        let of = |kind| signal(kind).context("signals can't be listened for");
        (of(SignalKind::interrupt())?, of(SignalKind::terminate())?, of(SignalKind::hangup())?)
    };
    thread::spawn(move || {
        runtime.block_on(async {
            let mut is_first = true;
            loop {
                let name = tokio::select! {
                    _ = interrupts.recv() => "SIGINT",
                    _ = terminations.recv() => "SIGTERM",
                    _ = hang_ups.recv() => "SIGHUP",
                };
                if !is_first || news.send(News::Signal(name)).is_err() {
                    process::exit(INTERRUPTED.into());
                }
                is_first = false;
            }
        });
    });
    Ok(())
}
