//! The watchers of streams that an operator runs beside the nodes: `deploy/watch-streams.sh`.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use crate::{
    network::{NODES, Network},
    nodes::Nodes,
};

/// The message of a watcher that restarts a stream.
const RESTARTED: &str = "it is restarted";

/// One watcher beside each node.
pub(crate) struct Watchers {
    watchers: Vec<Watcher>,
}

struct Watcher {
    child: Child,
    log: PathBuf,
}

impl Watchers {
    /// Watches a stream; each watcher logs into its own file in `directory`.
    pub(crate) fn start(
        network: &Network,
        nodes: &Nodes,
        stream: &str,
        directory: &Path,
    ) -> Result<Self> {
        let mut watchers = Self { watchers: Vec::new() };
        for node in NODES {
            let log = directory.join(format!("watcher-{node}.log"));
            let output = File::create(&log)?;
            let mut command = nodes.watcher(network, node, stream);
            command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
            let child = command.spawn().context("a watcher can't be started")?;
            watchers.watchers.push(Watcher { child, log });
        }
        Ok(watchers)
    }

    /// When and why they restarted the stream.
    pub(crate) fn restarts(&self) -> Vec<String> {
        let logs = self.watchers.iter().map(|it| fs::read_to_string(&it.log).unwrap_or_default());
        let mut lines: Vec<_> = logs
            .flat_map(|log| log.lines().map(str::to_owned).collect::<Vec<_>>())
            .filter(|line| line.ends_with(RESTARTED))
            .collect();
        lines.sort_unstable();
        lines
    }
}

impl Drop for Watchers {
    fn drop(&mut self) {
        for Watcher { child, .. } in &mut self.watchers {
            if let Ok(group) = i32::try_from(child.id()) {
                // A tool that it has started may be running, and ends with it.
                let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
            }
            let _ = child.wait();
        }
    }
}
