//! The memory of a process, as Linux reports it.

use std::{fs, time::Duration};

/// A process's memory at one moment, in KiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Sample {
    /// Since the load began.
    pub(crate) at: Duration,
    /// The resident memory.
    pub(crate) resident: u64,
    /// The part of it that belongs to no file.
    pub(crate) anonymous: u64,
    /// The largest resident memory so far.
    pub(crate) peak: u64,
}

/// The process's memory at present; `None` if it has ended.
pub(crate) fn sample(process: u32, at: Duration) -> Option<Sample> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_ascii_whitespace().next()?.parse().ok()
    };
    Some(Sample { at, resident: of("VmRSS")?, anonymous: of("RssAnon")?, peak: of("VmHWM")? })
}
