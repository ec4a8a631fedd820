//! Logs a warning when this process did not run for a while.
//!
//! After a process was stopped, or its machine suspended, it looks as if the broker had fallen
//! silent. Without this warning, the log would blame the broker and the network.

use std::time::Duration;

use tokio::runtime::Runtime;
use tracing::Instrument as _;

use crate::clock::{Clock, Reading, Step, Steps};

/// How often to check.
const EVERY: Duration = Duration::from_secs(1);

/// Shorter gaps are not logged: they cause no time-out.
const WORTH_A_WORD: Duration = Duration::from_secs(4);

/// Starts to watch this process.
pub(super) fn watch(runtime: &Runtime) {
    let clock = Clock::start();
    let mut steps = Steps::of(&clock);
    let mut last = clock.read();
    let watching = async move {
        loop {
            tokio::time::sleep(EVERY).await;
            let (before, step) = (last, steps.look(&clock));
            last = clock.read();
            if let Some((gap, why)) = gap(before, last, step) {
                tracing::warn!(seconds = gap.as_secs(), "{why}");
            }
        }
    };
    runtime.spawn(watching.in_current_span());
}

/// How long this process did not run between two checks, and the likely cause, if it is long enough
/// to log.
///
/// The monotonic clock continues while the process is stopped, but stands still while the machine
/// is suspended; then the wall clock jumps forward.
fn gap(before: Reading, now: Reading, step: Option<Step>) -> Option<(Duration, &'static str)> {
    let late = now.elapsed.saturating_sub(before.elapsed).saturating_sub(EVERY);
    match step {
        _ if late >= WORTH_A_WORD => Some((
            late,
            "this process did not run for a while: it was stopped, or the machine had no time for \
             it; that the broker fell silent, or a deadline passed, may come of that",
        )),
        Some(Step::Forward(by)) if by >= WORTH_A_WORD => Some((
            by,
            "the machine was suspended, or its clock was set forward; that the broker fell silent, \
             or a deadline passed, may come of that",
        )),
        Some(Step::Forward(_) | Step::Back(_)) | None => None,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::gap;
    use crate::{
        clock::{Reading, Step},
        protocol::time::Time,
    };

    fn at(seconds: u64) -> Reading {
        Reading { time: Time::from_millis(seconds * 1000), elapsed: Duration::from_secs(seconds) }
    }

    /// A service that was stopped for 70 s logged only that no heartbeat had come from the server.
    #[test]
    fn a_stopped_or_suspended_process_is_reported_and_a_late_one_is_not() {
        let missed = |before, now, step| gap(before, now, step).map(|(gap, _)| gap.as_secs());
        assert_eq!(missed(at(10), at(11), None), None);
        assert_eq!(missed(at(10), at(14), None), None, "a busy machine");
        assert_eq!(missed(at(10), at(81), None), Some(70), "stopped");
        let suspended = Some(Step::Forward(Duration::from_secs(600)));
        assert_eq!(missed(at(10), at(11), suspended), Some(600));
        let set_back = Some(Step::Back(Duration::from_secs(600)));
        assert_eq!(missed(at(10), at(11), set_back), None, "nothing was missed");
    }
}
