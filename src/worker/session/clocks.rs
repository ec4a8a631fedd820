//! Checks this worker's clock after each batch of inputs: whether it was set, and whether other clocks are
//! against it. Then the worker compares it with the broker's clock.

use futures_util::FutureExt as _;

use crate::{
    clock::ClockStep,
    worker::{
        Settings,
        clocks::ClockComparison,
        follower::FollowError,
        journal::Journal,
        session::{Session, SessionError, error::describe},
        state::WorkerState,
    },
};

/// Whether this worker's clock, which was off, fits the broker's clock again.
pub(super) async fn fits_again(
    journal: &Journal,
    settings: &Settings,
    state: &mut WorkerState,
) -> Result<bool, SessionError> {
    let margin = settings.coordinator.clock_margin;
    let standing = journal.compare(state.clock, margin).await;
    let standing = standing.map_err(FollowError::Read)?;
    state.clocks.broker(state.clock.read(), Some(standing));
    if state.clocks.is_off() {
        return Ok(false);
    }
    tracing::info!("this worker's clock fits that of the broker again");
    Ok(true)
}

impl Session<'_> {
    pub(super) fn is_clock_in_doubt(&self) -> bool {
        self.comparing.is_some() || self.state.clocks.is_in_doubt(self.state.clock.read())
    }

    /// Whether the clock was set; asks the broker if another clock is against it.
    pub(super) fn look_at_clock(&mut self) -> Result<(), SessionError> {
        let margin = self.settings.coordinator.clock_margin;
        let now = self.state.clock.read();
        match self.steps.check(&self.state.clock) {
            // All deadlines would be that much later.
            Some(step @ ClockStep::Back(_)) => return Err(SessionError::ClockSet(step)),
            // The worker may have chosen the beginning of its window by the wrong clock.
            Some(step @ ClockStep::Forward(by)) if by > margin => {
                return Err(SessionError::ClockSet(step));
            }
            Some(step @ ClockStep::Forward(_)) => {
                tracing::warn!(
                    "{}; deadlines that have passed meanwhile are due now",
                    describe(step)
                );
            }
            None => {}
        }
        // To compare clocks, the worker publishes a message.
        let may_ask = self.comparing.is_none() && !self.watch.is_blocked();
        if may_ask && self.state.clocks.is_in_doubt(now) {
            self.comparing = Some(self.follower.compare(self.state.clock, margin).boxed());
        }
        Ok(())
    }

    pub(super) fn clocks_compared(
        &mut self,
        standing: Option<ClockComparison>,
    ) -> Result<(), SessionError> {
        self.comparing = None;
        let now = self.state.clock.read();
        self.state.clocks.broker(now, standing);
        if let Some(off) = self.state.clocks.verdict(now) {
            // The broker gives this worker's requests to workers whose clocks fit.
            return Err(SessionError::ClockOff(off));
        }
        for (number, message) in std::mem::take(&mut self.doubtful) {
            self.requests_received(number, message);
        }
        Ok(())
    }
}
