//! The looks through the whole store, for what it holds and this instance doesn't.

use std::collections::BTreeMap;

use crate::protocol::{
    participant::{Effect, InDoubt, Instance},
    time::Time,
};

impl Instance {
    pub(super) fn store_scanned(
        &mut self,
        now: Time,
        held: Vec<InDoubt>,
        effects: &mut Vec<Effect>,
    ) {
        let mut seen = BTreeMap::new();
        for it in held {
            if self.holdings.get(&it.key).is_some_and(|own| own.branch.as_ref() == Some(&it.branch))
            {
                continue;
            }
            let name = (it.key.clone(), it.branch.clone());
            let since = self.doubted.get(&name).copied().unwrap_or(now);
            if now.since(since) < self.settings.inquire_after {
                seen.insert(name, since);
            } else {
                seen.insert(name, now);
                effects.push(self.inquiry(it.key, it.request_hash, it.branch, it.deadline));
            }
        }
        // Who is in doubt is asked about when it is time, and not first at the next round.
        let soonest = seen.values().min().map(|since| *since + self.settings.inquire_after);
        let usual = now + self.settings.scan_every;
        self.scan_at = Some(soonest.map_or(usual, |at| at.min(usual)));
        self.doubted = seen;
    }
}
