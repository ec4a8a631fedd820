//! Commits that are being parked: first the command is made safe, in the durable queue of its
//! service; then the record of it is written.
//!
//! A command in that queue is there until an instance has applied it and said so to a worker, which
//! acknowledges that only when a `settled` record is safe. So whatever is recorded as parked will be
//! recorded as settled, whoever dies meanwhile, and nobody else has to write that: not a worker that
//! takes over the request, and can't know whether anything was parked for it.
//!
//! **Invariant:** no record says that a commit is parked before its command is safe; but for a queue
//! that has not taken it for as long as the coordinator waits for the record. Then the record is
//! written all the same, since a service's queue may not hold up a result, and the command is still
//! published until the queue takes it. What is lost if this worker dies before that is the `settled`
//! record, and nothing of the transaction: its instances ask for the outcome.

use std::collections::BTreeMap;

use crate::protocol::ids::{ServiceName, TransactionKey};

/// How many commits may have a command that is not safe yet, or a record that isn't. Further ones
/// are parked when there is room: until then their transactions are in flight.
const PARKING_MAX: usize = 4096;

/// How far each commit has come.
#[derive(Debug, Default)]
pub(super) struct Parking {
    commits: BTreeMap<(TransactionKey, ServiceName), Stage>,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    /// Its command is on its way, and nothing is recorded.
    Queueing,
    /// Its command is on its way, which takes too long; so it is recorded.
    Overtaken { is_recorded: bool },
    /// Its command is safe, and its record on its way.
    Recording,
}

/// What is to be done next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ParkingStep {
    /// Publish its command.
    Queue,
    /// Write the record.
    Record,
    /// Nothing, for now.
    Wait,
}

impl Parking {
    /// The coordinator asks for it: for the first time, or since it has waited for too long.
    pub(super) fn asked(&mut self, key: &TransactionKey, service: &ServiceName) -> ParkingStep {
        let of = (key.clone(), service.clone());
        let is_full = self.commits.len() >= PARKING_MAX;
        match self.commits.get_mut(&of) {
            Some(stage @ Stage::Queueing) => {
                tracing::warn!(
                    transaction = %key, %service,
                    "the queue of a service has not taken a parked commit for as long as its record \
                     waits for that; it is recorded now, and still published"
                );
                *stage = Stage::Overtaken { is_recorded: false };
                ParkingStep::Record
            }
            Some(Stage::Overtaken { .. } | Stage::Recording) => ParkingStep::Record,
            None if is_full => {
                tracing::warn!(
                    transaction = %key, %service, waiting = PARKING_MAX,
                    "a commit can't be parked yet: too many others are not safe"
                );
                ParkingStep::Wait
            }
            None => {
                self.commits.insert(of, Stage::Queueing);
                ParkingStep::Queue
            }
        }
    }

    /// Its command is safe.
    pub(super) fn queued(&mut self, key: &TransactionKey, service: &ServiceName) -> ParkingStep {
        let of = (key.clone(), service.clone());
        let Some(stage) = self.commits.get_mut(&of) else { return ParkingStep::Wait };
        match *stage {
            Stage::Queueing => {
                *stage = Stage::Recording;
                ParkingStep::Record
            }
            Stage::Overtaken { is_recorded: false } | Stage::Recording => {
                *stage = Stage::Recording;
                ParkingStep::Wait
            }
            Stage::Overtaken { is_recorded: true } => {
                self.commits.remove(&of);
                ParkingStep::Wait
            }
        }
    }

    /// Its record is safe.
    pub(super) fn recorded(&mut self, key: &TransactionKey, service: &ServiceName) {
        let of = (key.clone(), service.clone());
        match self.commits.get_mut(&of) {
            Some(Stage::Overtaken { is_recorded }) => *is_recorded = true,
            Some(Stage::Queueing | Stage::Recording) => {
                self.commits.remove(&of);
            }
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{PARKING_MAX, Parking, ParkingStep};
    use crate::protocol::{
        ids::{ServiceName, TransactionId, TransactionKey},
        time::Time,
    };

    fn key(number: usize) -> TransactionKey {
        let id = TransactionId::parse(&format!("t{number}")).unwrap();
        TransactionKey { id, requested_at: Time::from_millis(1000) }
    }

    fn stock() -> ServiceName {
        ServiceName::parse("stock").unwrap()
    }

    #[test]
    fn nothing_is_recorded_as_parked_before_its_command_is_safe() {
        let mut parking = Parking::default();
        assert_eq!(parking.asked(&key(1), &stock()), ParkingStep::Queue);
        assert_eq!(parking.queued(&key(1), &stock()), ParkingStep::Record);
        assert_eq!(
            parking.asked(&key(1), &stock()),
            ParkingStep::Record,
            "the record was not confirmed"
        );
        parking.recorded(&key(1), &stock());
        assert!(parking.commits.is_empty());
    }

    #[test]
    fn a_queue_that_takes_nothing_holds_up_a_record_until_it_is_asked_for_again() {
        let mut parking = Parking::default();
        assert_eq!(parking.asked(&key(1), &stock()), ParkingStep::Queue);
        assert_eq!(parking.asked(&key(1), &stock()), ParkingStep::Record);
        parking.recorded(&key(1), &stock());
        assert_eq!(parking.queued(&key(1), &stock()), ParkingStep::Wait, "it is recorded once");
        assert!(parking.commits.is_empty());
    }

    #[test]
    fn a_command_that_becomes_safe_while_the_record_is_written_writes_no_second_one() {
        let mut parking = Parking::default();
        parking.asked(&key(1), &stock());
        assert_eq!(parking.asked(&key(1), &stock()), ParkingStep::Record);
        assert_eq!(parking.queued(&key(1), &stock()), ParkingStep::Wait);
        parking.recorded(&key(1), &stock());
        assert!(parking.commits.is_empty());
    }

    #[test]
    fn a_flood_of_commits_that_no_queue_takes_waits_in_flight() {
        let mut parking = Parking::default();
        for number in 0..PARKING_MAX {
            assert_eq!(parking.asked(&key(number), &stock()), ParkingStep::Queue);
        }
        assert_eq!(parking.asked(&key(PARKING_MAX), &stock()), ParkingStep::Wait);
        assert_eq!(parking.queued(&key(0), &stock()), ParkingStep::Record);
        parking.recorded(&key(0), &stock());
        assert_eq!(parking.asked(&key(PARKING_MAX), &stock()), ParkingStep::Queue);
    }
}
