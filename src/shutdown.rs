//! The signals that end a process: SIGTERM and SIGINT.

/// Completes when this process receives SIGTERM or SIGINT (Ctrl-C); on systems without these signals,
/// on Ctrl-C.
///
/// It listens from its first poll until the process ends: a second signal doesn't end the process
/// either. If it can't listen, it logs an error and never completes. It needs a tokio runtime with IO
/// enabled.
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
