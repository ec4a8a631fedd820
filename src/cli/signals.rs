//! Signals: the first one stops the intake, the second one ends the process.
//!
//! While there is nothing to finish, the first one ends the process too. Other signals that would
//! end a process have the same effect or none, so that no signal leaves things half done: SIGQUIT
//! acts as SIGTERM does, and so does SIGHUP when a terminal is closed.

use std::{io, task::Poll};

#[cfg(unix)]
use tokio::signal::unix::Signal;
use tokio::{runtime::Runtime, sync::watch};
use tracing::Instrument as _;

use crate::cli::Exit;

/// How a process handles SIGHUP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Hangup {
    /// As a request to end: its terminal was closed.
    Ends,
    /// It ignores it, unless stderr is a terminal: for many daemons SIGHUP means to reload the
    /// configuration, which `dtc` can't do while it runs.
    Ignored,
}

/// Watches for signals. A task that has work to finish subscribes, and sees the first signal.
pub(super) fn watch(runtime: &Runtime, hangup: Hangup) -> io::Result<watch::Sender<bool>> {
    let _entered = runtime.enter();
    let mut signals = Signals::listen(hangup)?;
    let interrupt = watch::Sender::new(false);
    let heard = interrupt.clone();
    let listening = async move {
        loop {
            signals.next().await;
            if heard.receiver_count() == 0 || heard.send_replace(true) {
                std::process::exit(Exit::Interrupted.code().into());
            }
        }
    };
    runtime.spawn(listening.in_current_span());
    Ok(interrupt)
}

/// Ends at the first signal; until then it counts as work to finish.
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

    /// Waits for a signal that ends the process.
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
