//! The faults of a schedule, and what happens to each message in transit.

use dtc::protocol::time::Time;

use crate::{plan::Chaos, rng::Rng};

/// Kinds of faults, for counting.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Kind {
    WorkerCrash,
    WorkerFreeze,
    WorkerCutOff,
    WorkerDrain,
    InstanceDeath,
    InstanceCutOff,
    BrokerRestart,
    JournalGap,
    ServiceUnbound,
    LostMessage,
    DoubledMessage,
    LateMessage,
    LostConfirm,
    LostHistory,
    LostAppendConfirm,
    ReaderStuck,
    WorkerLinkStuck,
    InstanceLinkStuck,
    QueueStaysBound,
    ServiceUnreachable,
    FinishUnreachable,
    ResultsUnreachable,
    ResultsQueueLost,
}

impl Kind {
    pub(crate) const ALL: [Self; 23] = [
        Self::WorkerCrash,
        Self::WorkerFreeze,
        Self::WorkerCutOff,
        Self::WorkerDrain,
        Self::InstanceDeath,
        Self::InstanceCutOff,
        Self::BrokerRestart,
        Self::JournalGap,
        Self::ServiceUnbound,
        Self::LostMessage,
        Self::DoubledMessage,
        Self::LateMessage,
        Self::LostConfirm,
        Self::LostHistory,
        Self::LostAppendConfirm,
        Self::ReaderStuck,
        Self::WorkerLinkStuck,
        Self::InstanceLinkStuck,
        Self::QueueStaysBound,
        Self::ServiceUnreachable,
        Self::FinishUnreachable,
        Self::ResultsUnreachable,
        Self::ResultsQueueLost,
    ];
}

/// A fault. Lengths are in milliseconds.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// The process ends between two effects: after `after` more.
    WorkerCrash {
        worker: usize,
        after: u32,
        down: u64,
    },
    /// The process stands still; `notice`: when the broker gives its connection up.
    WorkerFreeze {
        worker: usize,
        length: u64,
        notice: Option<u64>,
    },
    /// The connection is lost, the process isn't.
    WorkerCutOff {
        worker: usize,
    },
    WorkerDrain {
        worker: usize,
    },
    /// The process ends between two effects: after `after` more.
    InstanceDeath {
        instance: usize,
        after: u32,
        down: u64,
    },
    InstanceCutOff {
        instance: usize,
    },
    BrokerRestart {
        down: u64,
    },
    /// The next so many records don't reach the worker's reader, though the journal holds them.
    JournalGap {
        worker: usize,
        records: u64,
    },
    /// The service's prepare queue is gone, and then declared again.
    ServiceUnbound {
        service: usize,
        down: u64,
    },
    /// Nothing more of the journal is delivered until the reader is opened again.
    ReaderStuck {
        worker: usize,
    },
    /// Nothing passes through its link, in either direction, until it is opened again.
    WorkerLinkStuck {
        worker: usize,
    },
    InstanceLinkStuck {
        instance: usize,
    },
    /// Its link is lost, and its own queue stays bound and locked for good.
    QueueStaysBound {
        instance: usize,
    },
    /// The service's prepare queue exists, and its node is down.
    ServiceUnreachable {
        service: usize,
        down: u64,
    },
    /// The same for the queue of its commands.
    FinishUnreachable {
        service: usize,
        down: u64,
    },
    /// No result is accepted.
    ResultsUnreachable {
        down: u64,
    },
    /// The producer's queue is on a node that is lost for good.
    ResultsQueueLost,
    /// The message after `after` more is lost, duplicated, delayed, or not confirmed.
    Mishap {
        kind: Kind,
        after: u32,
    },
}

/// How many milliseconds later each copy of a message arrives; at most two do.
pub(crate) type Arrivals = [Option<u64>; 2];

/// What happens to messages in transit.
#[derive(Default)]
pub(crate) struct Rules {
    chaos: Chaos,
    armed: Vec<(Kind, u32)>,
    /// How often each kind of fault has actually happened.
    pub(crate) counts: [u64; Kind::ALL.len()],
}

impl Rules {
    pub(crate) fn new(chaos: Chaos) -> Self {
        Self { chaos, ..Self::default() }
    }

    pub(crate) fn arm(&mut self, kind: Kind, after: u32) {
        self.armed.push((kind, after));
    }

    pub(crate) fn count(&mut self, kind: Kind) {
        self.counts[kind as usize] += 1;
    }

    /// How many faults have taken effect.
    pub(crate) fn n_faults(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Ends all faults.
    pub(crate) fn heal(&mut self) {
        self.chaos = Chaos::default();
        self.armed.clear();
    }

    fn is_up(&mut self, kind: Kind, per_mille: u64, rng: &mut Rng) -> bool {
        let mut is_up = false;
        if let Some(position) = self.armed.iter().position(|(armed, _)| *armed == kind) {
            match &mut self.armed[position].1 {
                0 => {
                    self.armed.swap_remove(position);
                    is_up = true;
                }
                after => *after -= 1,
            }
        }
        is_up = is_up || rng.chance(per_mille);
        if is_up {
            self.count(kind);
        }
        is_up
    }

    /// How many milliseconds the broker takes to deliver.
    pub(crate) fn deliver(&mut self, rng: &mut Rng) -> u64 {
        let usual = rng.below(3);
        let late = self.is_up(Kind::LateMessage, self.chaos.delay / 4, rng);
        if late { rng.pick(&[20, 200, 1_000, 6_000]) + usual } else { usual }
    }

    /// What happens to a message that may be lost.
    pub(crate) fn carry(&mut self, rng: &mut Rng) -> Arrivals {
        if self.is_up(Kind::LostMessage, self.chaos.lose, rng) {
            return [None, None];
        }
        self.carry_safely(rng)
    }

    /// What happens to a message that is sent again until it is confirmed.
    pub(crate) fn carry_safely(&mut self, rng: &mut Rng) -> Arrivals {
        let usual = rng.below(3);
        let late = self.is_up(Kind::LateMessage, self.chaos.delay, rng);
        let first = if late { rng.pick(&[20, 200, 1_000, 6_000]) + usual } else { usual };
        let double = self.is_up(Kind::DoubledMessage, self.chaos.double, rng);
        [Some(first), double.then(|| rng.pick(&[0, 1, 10, 500, 3_000]))]
    }

    /// Whether a look further back in the journal fails.
    pub(crate) fn loses_history(&mut self, rng: &mut Rng) -> bool {
        self.is_up(Kind::LostHistory, self.chaos.forget, rng)
    }

    /// Whether the confirm of an append never arrives, though the record is in the journal.
    pub(crate) fn loses_append_confirm(&mut self, rng: &mut Rng) -> bool {
        self.is_up(Kind::LostAppendConfirm, 0, rng)
    }

    /// Whether a confirm is missing.
    pub(crate) fn loses_confirm(&mut self, rng: &mut Rng) -> bool {
        self.is_up(Kind::LostConfirm, self.chaos.unconfirm, rng)
    }
}

/// A time so many milliseconds away from `at`.
pub(crate) fn shifted(at: Time, by: i64) -> Time {
    Time::from_millis(at.as_millis().saturating_add_signed(by))
}
