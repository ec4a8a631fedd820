//! Ctrl-C and the polite kill.

/// Ends when this process is told to stop: by SIGTERM or SIGINT (Ctrl-C); where there are no such
/// signals, by Ctrl-C.
///
/// It listens from when it is first polled on, and from then on for good: a later signal doesn't end
/// the process either. Where it can't listen, it says so in the log and never ends. It wants a tokio
/// runtime with IO enabled.
///
/// ```no_run
/// # #[cfg(feature = "worker")]
/// # async fn example() -> Result<(), dtc::WorkerError> {
/// dtc::Worker::builder("amqp://localhost").run_until(dtc::shutdown_signal()).await?;
/// # Ok(())
/// # }
/// ```
pub async fn shutdown_signal() {
    if let Err(error) = signal().await {
        tracing::error!(%error, "failed to listen for signals: nothing but a kill ends this process");
        std::future::pending().await
    }
}

#[cfg(unix)]
async fn signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}

#[cfg(not(unix))]
async fn signal() -> std::io::Result<()> {
    tokio::signal::ctrl_c().await
}

#[cfg(all(test, unix))]
mod tests {
    use std::{pin::pin, time::Duration};

    use nix::sys::signal::{Signal, raise};
    use tokio::time::timeout;

    use super::shutdown_signal;

    #[tokio::test]
    async fn ctrl_c_and_the_polite_kill_end_it_and_nothing_else_does() {
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            let mut told = pin!(shutdown_signal());
            assert!(timeout(Duration::ZERO, &mut told).await.is_err(), "nobody has said so");
            raise(signal).unwrap();
            timeout(Duration::from_secs(10), told).await.expect("it is heard");
        }
    }
}
