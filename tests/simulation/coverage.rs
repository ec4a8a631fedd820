//! Which events a transaction receives in which state: each pair is either reached, or listed here
//! with the reason why it can't be.

use std::fmt::Write as _;

use dtc::protocol::{coordinator::Phase, participant::TransactionStage};

/// A coordinator's events that are about one transaction.
pub(crate) const COORDINATOR_EVENTS: [&str; 12] = [
    "RecordsRead",
    "HistoryRead",
    "RequestReceived",
    "VoteReceived",
    "PrepareReturned",
    "PrepareUnroutable",
    "PrepareRefused",
    "DoneReceived",
    "InquiryReceived",
    "ResultConfirmed",
    "ResultFailed",
    "ParkConfirmed",
];

/// An instance's events that are about one transaction.
pub(crate) const PARTICIPANT_EVENTS: [&str; 7] = [
    "PrepareReceived",
    "QueryReceived",
    "CancelReceived",
    "FinishReceived",
    "PrepareEnded",
    "FinishEnded",
    "StoreRead",
];

const PHASES: usize = Phase::ALL.len() + 1;
const STAGES: usize = TransactionStage::ALL.len() + 1;

/// How often each pair was reached. The last state is "absent".
#[derive(Clone)]
pub(crate) struct Coverage {
    coordinator: [[u64; COORDINATOR_EVENTS.len()]; PHASES],
    participant: [[u64; PARTICIPANT_EVENTS.len()]; STAGES],
}

impl Coverage {
    pub(crate) fn new() -> Self {
        Self { coordinator: [[0; _]; PHASES], participant: [[0; _]; STAGES] }
    }

    pub(crate) fn worker(&mut self, phase: Option<Phase>, event: &str) {
        let row = phase.map_or(Phase::ALL.len(), |phase| phase as usize);
        if let Some(column) = COORDINATOR_EVENTS.iter().position(|name| *name == event) {
            self.coordinator[row][column] += 1;
        }
    }

    pub(crate) fn instance(&mut self, stage: Option<TransactionStage>, event: &str) {
        let row = stage.map_or(TransactionStage::ALL.len(), |stage| stage as usize);
        if let Some(column) = PARTICIPANT_EVENTS.iter().position(|name| *name == event) {
            self.participant[row][column] += 1;
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (own, others) in self.coordinator.iter_mut().zip(&other.coordinator) {
            own.iter_mut().zip(others).for_each(|(own, other)| *own += other);
        }
        for (own, others) in self.participant.iter_mut().zip(&other.participant) {
            own.iter_mut().zip(others).for_each(|(own, other)| *own += other);
        }
    }

    fn pairs(&self) -> impl Iterator<Item = (&'static str, String, &'static str, u64)> {
        let phases = Phase::ALL.iter().map(|phase| format!("{phase:?}"));
        let stages = TransactionStage::ALL.iter().map(|stage| format!("{stage:?}"));
        let coordinator =
            phases.chain(["absent".into()]).zip(&self.coordinator).flat_map(|(state, row)| {
                let cells = COORDINATOR_EVENTS.iter().zip(row);
                cells.map(move |(event, n)| ("coordinator", state.clone(), *event, *n))
            });
        let participant =
            stages.chain(["absent".into()]).zip(&self.participant).flat_map(|(state, row)| {
                let cells = PARTICIPANT_EVENTS.iter().zip(row);
                cells.map(move |(event, n)| ("participant", state.clone(), *event, *n))
            });
        coordinator.chain(participant)
    }

    /// How many pairs there are, were reached, and are listed as unreachable.
    pub(crate) fn totals(&self) -> (usize, usize, usize) {
        let hit = self.pairs().filter(|(_, _, _, n)| *n > 0).count();
        let listed = UNREACHABLE.iter().map(|it| it.states.len() * it.events.len()).sum();
        (self.pairs().count(), hit, listed)
    }

    /// The contradictions to the list.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        for (side, state, event, n) in self.pairs() {
            let listed = UNREACHABLE.iter().find(|it| it.contains(side, &state, event));
            let is_rare =
                RARE.iter().any(|(rare, missed)| (*rare, *missed) == (state.as_str(), event));
            match (listed, n) {
                (None, 0) if is_rare => {}
                (None, 0) => complaints.push(format!("{side}: {state} × {event} was never hit")),
                (Some(it), 1..) => complaints
                    .push(format!("{side}: {state} × {event} was hit {n} times: {}", it.why)),
                (None, 1..) | (Some(_), 0) => {}
            }
        }
        complaints
    }

    /// The counts as tables.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        let mut at = ("", String::new());
        for (side, state, event, n) in self.pairs() {
            if (side, &state) != (at.0, &at.1) {
                let _ = write!(text, "\n  {side:<11} {state:<10}");
                at = (side, state);
            }
            let _ = write!(text, " {event}={n}");
        }
        text
    }
}

/// Pairs of a coordinator that can be reached, but need so many coincidences within one connection
/// that 200,000 schedules may miss them: a transaction begins from scratch while an answer to its
/// earlier messages is still in transit. For that its prepare, or its result, must be answered
/// late; then a gap in the journal, or a namesake forgotten by the view, and a failed look further
/// back must make it be parked and forgotten; and its request must be published once more.
const RARE: [(&str, &str); 4] = [
    ("Waiting", "PrepareUnroutable"),
    ("Querying", "PrepareRefused"),
    ("Parking", "PrepareRefused"),
    ("Querying", "ResultFailed"),
];

/// Pairs that can't be reached, and why.
struct Unreachable {
    side: &'static str,
    states: &'static [&'static str],
    events: &'static [&'static str],
    why: &'static str,
}

const UNREACHABLE: &[Unreachable] = &[
    Unreachable {
        side: "coordinator",
        states: &["Waiting", "Querying", "Preparing", "Deciding"],
        events: &["HistoryRead"],
        why: "it is undecided as far back as it reaches, and a record that is new comes into view \
              before it goes out of it",
    },
    Unreachable {
        side: "participant",
        states: &["Recalling", "Prepared", "Failed", "Finishing", "BackingOff", "absent"],
        events: &["PrepareEnded"],
        why: "a call of the service's prepare ends once, and it stays Preparing until then",
    },
    Unreachable {
        side: "participant",
        states: &["Recalling", "Preparing", "Prepared", "Failed", "BackingOff", "absent"],
        events: &["FinishEnded"],
        why: "a call of the service's commit or abort ends once, and it stays Finishing until then",
    },
    Unreachable {
        side: "participant",
        states: &["Preparing", "Prepared", "Failed", "Finishing", "BackingOff", "absent"],
        events: &["StoreRead"],
        why: "the store answers once, and it stays Recalling until then",
    },
];

impl Unreachable {
    fn contains(&self, side: &str, state: &str, event: &str) -> bool {
        self.side == side && self.states.contains(&state) && self.events.contains(&event)
    }
}
