//! Detects another worker that writes to the journal under this one's name.
//!
//! Two such workers do no harm, since no decision depends on a name. But each mistakes the other's
//! records for its own when it compares clocks, and operators can't distinguish their logs.

use std::collections::VecDeque;

/// How many of its own links a worker remembers. Appends of older links won't be read any more.
const LINKS_MAX: usize = 16;

/// One foreign append may be left of an earlier worker of this name that was killed: it had at most one
/// on its way. So many can't be.
const FOREIGN_MAX: u32 = 2;

/// Distinguishes this worker's appends from others under its name.
#[derive(Debug, Default)]
pub(super) struct Namesakes {
    /// The prefixes of this worker's append ids, one for each link.
    own: VecDeque<String>,
    foreign: u32,
}

impl Namesakes {
    /// From now on, this worker's append ids begin with `link`.
    pub(super) fn begin(&mut self, link: &str) {
        if self.own.len() == LINKS_MAX {
            self.own.pop_front();
        }
        self.own.push_back(link.to_owned());
    }

    /// An append under this worker's name was read while the worker served. Returns `true` once, when it
    /// is certain that another worker writes such appends.
    pub(super) fn read(&mut self, append: Option<&str>) -> bool {
        let is_own = append.is_some_and(|id| self.own.iter().any(|link| id.starts_with(link)));
        if is_own || self.foreign >= FOREIGN_MAX {
            return false;
        }
        self.foreign += 1;
        self.foreign == FOREIGN_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::{LINKS_MAX, Namesakes};

    #[test]
    fn the_second_foreign_append_is_reported_and_no_third() {
        let mut namesakes = Namesakes::default();
        namesakes.begin("a1");
        let told = ["a1-1", "b7-1", "a1-2", "b7-2", "b7-3"].map(|id| namesakes.read(Some(id)));
        assert_eq!(told, [false, false, false, true, false]);
    }

    #[test]
    fn appends_over_an_earlier_link_are_the_workers_own() {
        let mut namesakes = Namesakes::default();
        (0..LINKS_MAX).for_each(|number| namesakes.begin(&format!("a{number}-")));
        assert!(!(0..LINKS_MAX).any(|number| namesakes.read(Some(&format!("a{number}-9")))));
        namesakes.begin("b-");
        assert_eq!(["a0-1", "a0-2"].map(|id| namesakes.read(Some(id))), [false, true]);
        assert_eq!(namesakes.own.len(), LINKS_MAX);
    }

    #[test]
    fn an_append_without_an_id_is_foreign() {
        let mut namesakes = Namesakes::default();
        assert_eq!([None, None].map(|id| namesakes.read(id)), [false, true]);
    }
}
