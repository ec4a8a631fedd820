//! How much memory a process has, as Linux tells it.

use std::{fs, time::Duration};

/// What a process had at one moment, in KiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Sample {
    /// Since the load began.
    pub(crate) at: Duration,
    /// What is resident.
    pub(crate) resident: u64,
    /// What of it belongs to no file.
    pub(crate) anonymous: u64,
    /// The most that was ever resident.
    pub(crate) peak: u64,
}

/// What the process has now; `None` if it has ended.
pub(crate) fn sample(process: u32, at: Duration) -> Option<Sample> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_ascii_whitespace().next()?.parse().ok()
    };
    Some(Sample { at, resident: of("VmRSS")?, anonymous: of("RssAnon")?, peak: of("VmHWM")? })
}
