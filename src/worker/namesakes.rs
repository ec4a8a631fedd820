//! Whether another worker writes to the journal under this one's name.
//!
//! The two do each other no harm, since nothing is decided by a name. But each takes the other's
//! records for its own when it compares clocks, and nobody can tell their logs apart.

use std::collections::VecDeque;

/// How many of its own links a worker remembers: of those before, nothing is read any more.
const LINKS_MAX: usize = 16;

/// So many foreign appends are no rest of what a worker of this name wrote before it was killed: it
/// had one on its way at most.
const FOREIGN_MAX: u32 = 2;

/// What this worker knows of its own appends and of others under its name.
#[derive(Debug, Default)]
pub(super) struct Namesakes {
    /// What the ids of its own appends begin with.
    own: VecDeque<String>,
    foreign: u32,
}

impl Namesakes {
    /// Its appends have ids from now on that begin like this.
    pub(super) fn begin(&mut self, link: &str) {
        if self.own.len() == LINKS_MAX {
            self.own.pop_front();
        }
        self.own.push_back(link.to_owned());
    }

    /// An append under its name was read, while it served; tells once that somebody else made it.
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
    fn a_second_foreign_append_is_told_and_no_third() {
        let mut namesakes = Namesakes::default();
        namesakes.begin("a1");
        let told = ["a1-1", "b7-1", "a1-2", "b7-2", "b7-3"].map(|id| namesakes.read(Some(id)));
        assert_eq!(told, [false, false, false, true, false]);
    }

    #[test]
    fn what_a_worker_wrote_over_an_earlier_link_is_its_own() {
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
