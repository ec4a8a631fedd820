//! Ctrl-C, and the polite kill: the first one ends the intake, the second one ends the process.
//!
//! As long as nothing is under way that could be finished, the first one ends the process too. Whatever
//! other signal would end a process by itself does the same or nothing, so that none leaves things half
//! done: SIGQUIT is as good as SIGTERM, and so is SIGHUP when a terminal is closed.

use std::{io, task::Poll};

#[cfg(unix)]
use tokio::signal::unix::Signal;
use tokio::{runtime::Runtime, sync::watch};

use crate::cli::Exit;

/// What a process takes SIGHUP for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Hangup {
    /// The end: its terminal was closed.
    Ends,
    /// Nothing, unless it has a terminal: others are used to mean by it that a daemon is to read its
    /// configuration again, and there is none that could be changed while it runs.
    Ignored,
}

/// Watches for signals. Whoever has something to finish subscribes, and learns of the first one.
pub(super) fn watch(runtime: &Runtime, hangup: Hangup) -> io::Result<watch::Sender<bool>> {
    let _entered = runtime.enter();
    let mut signals = Signals::listen(hangup)?;
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
    ending: Vec<Signal>,
    ignored: Vec<(&'static str, Signal)>,
}

#[cfg(unix)]
impl Signals {
    fn listen(hangup: Hangup) -> io::Result<Self> {
        use std::io::IsTerminal as _;
        use tokio::signal::unix::{SignalKind, signal};
        let (mut ending, mut ignored) = (Vec::new(), Vec::new());
        for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::quit()] {
            ending.push(signal(kind)?);
        }
        for (name, kind) in [
            ("SIGUSR1", SignalKind::user_defined1()),
            ("SIGUSR2", SignalKind::user_defined2()),
            ("SIGALRM", SignalKind::alarm()),
        ] {
            ignored.push((name, signal(kind)?));
        }
        let hung_up = signal(SignalKind::hangup())?;
        if hangup == Hangup::Ends || io::stderr().is_terminal() {
            ending.push(hung_up);
        } else {
            ignored.push(("SIGHUP", hung_up));
        }
        Ok(Self { ending, ignored })
    }

    /// Waits for one that ends the process.
    async fn next(&mut self) {
        std::future::poll_fn(|cx| {
            for (name, signal) in &mut self.ignored {
                while let Poll::Ready(Some(())) = signal.poll_recv(cx) {
                    tracing::info!("{name} is ignored: nothing can be changed while this runs");
                }
            }
            let ends = |signal: &mut Signal| signal.poll_recv(cx) == Poll::Ready(Some(()));
            if self.ending.iter_mut().any(ends) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    #[expect(clippy::unnecessary_wraps, reason = "on other systems it can fail")]
    fn listen(_: Hangup) -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
