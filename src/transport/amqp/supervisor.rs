//! When to reconnect, and when to give up.
//!
//! Worker, service and client follow the same rules. A lost link is opened again, after a pause
//! that grows with each attempt, and that is short again once a link has been up for a while. A
//! process that has worked never gives up: certificates and passwords are changed while processes
//! run, and not all at the same time. A process that has never worked gives up where retrying
//! doesn't help.

use std::time::Duration;

use tokio::time::Instant;

use crate::transport::amqp::{connection::Backoff, error::Disposition};

/// A link that was up for that long was stable.
const STEADY: Duration = Duration::from_secs(10);

/// How long a broker that accepts connections may take until all its queues and streams are
/// available.
const STARTING_MAX: Duration = Duration::from_secs(10);

/// One process's attempts to have a link.
#[derive(Debug, Default)]
pub struct Supervisor {
    backoff: Backoff,
    has_worked: bool,
    opened_at: Option<Instant>,
    missing_since: Option<Instant>,
}

impl Supervisor {
    /// A link works.
    pub fn opened(&mut self) {
        self.has_worked = true;
        self.opened_at = Some(Instant::now());
        self.missing_since = None;
    }

    /// Part of the topology is missing: returns whether it has been missing for longer than a
    /// broker takes to start. A starting broker accepts connections before all its queues and
    /// streams are available.
    pub fn is_missing_for_good(&mut self) -> bool {
        let now = Instant::now();
        now - *self.missing_since.get_or_insert(now) >= STARTING_MAX
    }

    /// Whether a link has ever worked.
    pub fn has_worked(&self) -> bool {
        self.has_worked
    }

    /// Whether a failure with this disposition is final.
    pub fn gives_up(&self, disposition: Disposition) -> bool {
        disposition == Disposition::GiveUp && !self.has_worked
    }

    /// The pause before the next attempt, after a link was lost or could not be opened.
    pub fn pause(&mut self) -> Duration {
        if self.opened_at.take().is_some_and(|at| at.elapsed() >= STEADY) {
            self.backoff = Backoff::default();
        }
        self.backoff.pause()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{STARTING_MAX, STEADY, Supervisor};
    use crate::transport::amqp::error::Disposition;

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_until_a_link_has_stood_for_a_while() {
        let mut supervisor = Supervisor::default();
        for _ in 0..10 {
            supervisor.opened();
            supervisor.pause();
        }
        assert!(supervisor.pause() >= Duration::from_millis(2500));
        supervisor.opened();
        tokio::time::advance(STEADY).await;
        assert!(supervisor.pause() <= Duration::from_millis(100));
        assert!(supervisor.pause() <= Duration::from_millis(200), "and grow from there");
    }

    #[tokio::test(start_paused = true)]
    async fn a_topology_that_is_missing_for_a_moment_is_a_broker_that_starts() {
        let mut supervisor = Supervisor::default();
        assert!(!supervisor.is_missing_for_good());
        tokio::time::advance(STARTING_MAX / 2).await;
        assert!(!supervisor.is_missing_for_good());
        tokio::time::advance(STARTING_MAX / 2).await;
        assert!(supervisor.is_missing_for_good());
        supervisor.opened();
        assert!(!supervisor.is_missing_for_good());
    }

    #[test]
    fn a_process_that_has_worked_never_gives_up() {
        let mut supervisor = Supervisor::default();
        assert!(supervisor.gives_up(Disposition::GiveUp));
        assert!(!supervisor.gives_up(Disposition::Retry));
        supervisor.opened();
        assert!(!supervisor.gives_up(Disposition::GiveUp));
    }
}
