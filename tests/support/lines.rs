//! The output of a process, line by line.
//!
//! A separate thread reads, so that a full pipe never blocks the process, and wakes those that wait
//! for a line. The pipe ends when every process that could write to it has ended.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]
#![allow(dead_code, reason = "each target uses a part of it")]

use std::{
    io::{BufRead, BufReader, Read},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

/// The lines of one pipe so far.
#[derive(Clone, Default, Debug)]
pub(crate) struct Lines {
    shared: Arc<(Mutex<Seen>, Condvar)>,
}

#[derive(Default, Debug)]
struct Seen {
    lines: Vec<String>,
    ended: bool,
}

impl Lines {
    /// Reads `pipe` to its end.
    pub(crate) fn of(pipe: impl Read + Send + 'static) -> Self {
        let lines = Self::default();
        let writer = lines.clone();
        thread::spawn(move || writer.follow(BufReader::new(pipe)));
        lines
    }

    fn follow(&self, mut pipe: impl BufRead) {
        let mut line = Vec::new();
        while pipe.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned();
            self.seen().lines.push(text);
            self.shared.1.notify_all();
            line.clear();
        }
        self.seen().ended = true;
        self.shared.1.notify_all();
    }

    /// The first line that contains `pattern`, printed before or from now on.
    ///
    /// `None` if there is none after `limit`, or none when the pipe has ended.
    pub(crate) fn wait_for(&self, pattern: &str, limit: Duration) -> Option<String> {
        self.wait_for_from(0, pattern, limit).map(|(_, line)| line)
    }

    /// Like [`Self::wait_for`], among the lines from number `first` on; returns the line's number.
    pub(crate) fn wait_for_from(
        &self,
        first: usize,
        pattern: &str,
        limit: Duration,
    ) -> Option<(usize, String)> {
        let find = |seen: &Seen| {
            let matches = |(_, line): &(usize, &String)| line.contains(pattern);
            let found = seen.lines.iter().enumerate().skip(first).find(matches);
            found.map(|(number, line)| (number, line.clone()))
        };
        let waiting = |seen: &mut Seen| !seen.ended && find(seen).is_none();
        let (seen, _) = self.shared.1.wait_timeout_while(self.seen(), limit, waiting).unwrap();
        find(&seen)
    }

    /// Whether the pipe ended within `limit`.
    pub(crate) fn wait_for_end(&self, limit: Duration) -> bool {
        let waiting = |seen: &mut Seen| !seen.ended;
        let (seen, _) = self.shared.1.wait_timeout_while(self.seen(), limit, waiting).unwrap();
        seen.ended
    }

    /// How many lines there are.
    pub(crate) fn count(&self) -> usize {
        self.seen().lines.len()
    }

    /// All lines so far.
    pub(crate) fn all(&self) -> Vec<String> {
        self.seen().lines.clone()
    }

    /// All that was printed so far.
    pub(crate) fn text(&self) -> String {
        self.seen().lines.join("\n")
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
