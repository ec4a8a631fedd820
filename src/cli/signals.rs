//! Ctrl-C, and the polite kill: the first one ends the intake, the second one ends the process.
//!
//! As long as nothing is under way that could be finished, the first one ends the process too.

use std::io;

use tokio::{runtime::Runtime, sync::watch};

use crate::cli::Exit;

/// Watches for signals. Whoever has something to finish subscribes, and learns of the first one.
pub(super) fn watch(runtime: &Runtime) -> io::Result<watch::Sender<bool>> {
    let _entered = runtime.enter();
    let mut signals = Signals::listen()?;
    let interrupt = watch::Sender::new(false);
    let heard = interrupt.clone();
    runtime.spawn(async move {
        loop {
            signals.next().await;
            if heard.receiver_count() == 0 || heard.send_replace(true) {
                std::process::exit(Exit::Interrupted.code().into());
            }
        }
    });
    Ok(interrupt)
}

/// Is over when the first signal is heard; until then it is something to finish.
pub(super) fn heard(interrupt: &watch::Sender<bool>) -> impl Future<Output = ()> + use<> {
    let mut heard = interrupt.subscribe();
    async move {
        // The sender lives as long as the process.
        let _ = heard.wait_for(|heard| *heard).await;
    }
}

#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn listen() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let interrupt = signal(SignalKind::interrupt())?;
        let terminate = signal(SignalKind::terminate())?;
        Ok(Self { interrupt, terminate })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    #[expect(clippy::unnecessary_wraps, reason = "on other systems it can fail")]
    fn listen() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
