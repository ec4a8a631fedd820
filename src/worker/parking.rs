//! Parks commits: first the command is made safe in the durable queue of its service, then the record is
//! written.
//!
//! The command stays in that queue until an instance has applied it and has told a worker, and the worker
//! acknowledges that message only when a `settled` record is safe. So every `parked` record gets its
//! `settled` record, whichever process crashes meanwhile. A worker that takes over the request need not
//! write one; it can't know whether the commit was parked.
//!
//! **Invariant:** no record says that a commit is parked before its command is safe. There is one
//! exception: if the service's queue has not taken the command for as long as the coordinator waits for
//! the record, the worker writes the record, since a service's queue must not hold up a result. It still
//! publishes the command until the queue takes it. If the worker crashes before that, the `settled` record
//! is lost, but nothing of the transaction: the instances inquire about the outcome.

use std::collections::BTreeMap;

use crate::protocol::ids::{ServiceName, TransactionKey};

/// How many commits may be in the process of being parked. Further ones are parked when there is room;
/// until then their transactions stay in flight.
const PARKING_MAX: usize = 4096;

/// The commits that are being parked.
#[derive(Debug, Default)]
pub(super) struct Parking {
    commits: BTreeMap<(TransactionKey, ServiceName), Stage>,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    /// The command is on its way. Nothing is recorded.
    Queueing,
    /// The command takes too long, so the record is written before it is safe.
    Overtaken { is_recorded: bool },
    /// The command is safe, and the record is on its way.
    Recording,
}

/// The next step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ParkingStep {
    /// Publish the command.
    Queue,
    /// Write the record.
    Record,
    /// Wait.
    Wait,
}

impl Parking {
    /// The coordinator asks to park a commit: for the first time, or because it has waited too long.
    pub(super) fn asked(&mut self, key: &TransactionKey, service: &ServiceName) -> ParkingStep {
        let of = (key.clone(), service.clone());
        let is_full = self.commits.len() >= PARKING_MAX;
        match self.commits.get_mut(&of) {
            Some(stage @ Stage::Queueing) => {
                tracing::warn!(
                    transaction = %key, %service,
                    "the queue of a service has not taken a parked commit in time; recording it now, and \
                     still publishing it"
                );
                *stage = Stage::Overtaken { is_recorded: false };
                ParkingStep::Record
            }
            Some(Stage::Overtaken { .. } | Stage::Recording) => ParkingStep::Record,
            None if is_full => {
                tracing::warn!(
                    transaction = %key, %service, waiting = PARKING_MAX,
                    "a commit can't be parked yet: too many others are being parked"
                );
                ParkingStep::Wait
            }
            None => {
                self.commits.insert(of, Stage::Queueing);
                ParkingStep::Queue
            }
        }
    }

    /// The command is safe.
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

    /// The record is safe.
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
    fn a_queue_that_takes_nothing_delays_the_record_until_the_coordinator_asks_again() {
        let mut parking = Parking::default();
        assert_eq!(parking.asked(&key(1), &stock()), ParkingStep::Queue);
        assert_eq!(parking.asked(&key(1), &stock()), ParkingStep::Record);
        parking.recorded(&key(1), &stock());
        assert_eq!(parking.queued(&key(1), &stock()), ParkingStep::Wait, "it is recorded once");
        assert!(parking.commits.is_empty());
    }

    #[test]
    fn a_command_that_becomes_safe_while_the_record_is_written_causes_no_second_record() {
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
