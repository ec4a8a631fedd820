//! Whether a worker or an instance serves, for health checks.

use tokio::sync::watch;

/// Whether a worker, or an instance of a service, is ready: whether work that came now would be done.
///
/// A worker is ready while it takes requests. It is not while its connection is lost, its clock doesn't
/// fit those of the others, the journal can't be read for longer than a moment, or the broker takes no
/// messages. An instance is ready while it takes prepares, or stands by to take over from the one that
/// does ([`Cap::Service`](crate::Cap::Service)). It is not while its connection is lost, or after three
/// prepares in a row have failed. Neither is before it has begun, or after it has ended.
///
/// Give one to a builder, which reports every change to it. Clones share their state: keep one for the
/// health check.
///
/// ```no_run
/// # #[cfg(feature = "worker")]
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let readiness = dtc::Readiness::new();
/// let worker = dtc::Worker::builder("amqp://localhost").readiness(&readiness);
/// tokio::spawn(async move {
///     readiness.ready().await;
///     println!("ready");
/// });
/// worker.run_until(dtc::shutdown_signal()).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    state: watch::Sender<bool>,
}

impl Readiness {
    /// Not ready yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether it is ready now.
    pub fn is_ready(&self) -> bool {
        *self.state.borrow()
    }

    /// Waits until it is ready; returns at once if it is.
    pub async fn ready(&self) {
        // It is not closed while this one is there.
        let _ = self.subscribe().wait_for(|is_ready| *is_ready).await;
    }

    /// Every change from now on, beginning with the state as it is. It is closed when all clones are
    /// gone.
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.state.subscribe()
    }

    pub(crate) fn set(&self, is_ready: bool) {
        self.state.send_if_modified(|state| std::mem::replace(state, is_ready) != is_ready);
    }

    /// A guard that reports "not ready" when it is dropped, for whatever reason.
    pub(crate) fn while_held(&self) -> ReadyGuard {
        ReadyGuard(self.clone())
    }
}

/// Reports "not ready" when it is dropped.
#[derive(Debug)]
pub(crate) struct ReadyGuard(Readiness);

impl Drop for ReadyGuard {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::Readiness;

    #[tokio::test]
    async fn clones_share_one_state_which_ends_with_what_is_ready() {
        let (readiness, own) = (Readiness::new(), Readiness::new());
        let told = readiness.clone();
        let mut changes = told.subscribe();
        assert!(!told.is_ready());
        let held = readiness.while_held();
        readiness.set(true);
        told.ready().await;
        assert!(told.is_ready() && !own.is_ready());
        assert!(*changes.borrow_and_update());
        readiness.set(true);
        assert!(!changes.has_changed().unwrap(), "the same is no change");
        drop(held);
        assert!(!told.is_ready() && changes.has_changed().unwrap());
    }
}
