//! The transactions of `dtc run`: as one JSON array, or as lines of one object each (NDJSON).
//!
//! ```json
//! [
//!   {"id": "TX1", "involved_services": ["ServiceA", "ServiceB"], "data": {"amount": 100}},
//!   {"id": "TX2", "involved_services": ["ServiceA"], "data": {"item": "Widget"}, "timeout_ms": 500}
//! ]
//! ```
//!
//! | field | value | if missing |
//! |---|---|---|
//! | `id` | `[A-Za-z0-9._:-]{1,128}`, no other transaction's | must be there |
//! | `involved_services` | array of at least one service name; one named twice counts once | must be there |
//! | `data` | any object, in which no field is given twice | must be there |
//! | `timeout_ms` | whole number from 1 to 86400000 (a day): how long the prepares may take | the run's own |
//!
//! The first character that is not whitespace tells the forms apart: `[` begins an array, `{` a
//! line. Nothing at all is no lines. A byte order mark before it is skipped. One transaction is at
//! most [`SIZE_MAX`] bytes, and nested at most 100 deep.

use std::{io::BufRead, sync::Arc, time::Duration};

use crate::{
    protocol::{
        ids::{RequestHash, ServiceName, TransactionId},
        message::Payload,
    },
    wire::complaint::Complaints,
};

/// How many bytes one transaction may have: 256 KiB.
pub const SIZE_MAX: usize = 256 * 1024;

/// A transaction as it is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TransactionSpec {
    /// What it is called.
    pub id: TransactionId,
    /// Every service involved, each once, in name order. Never empty.
    pub services: Arc<[ServiceName]>,
    /// What the services are handed: a JSON object in its canonical form (see
    /// [`hash`](crate::wire::hash)).
    pub data: Payload,
    /// The digest of `services` and `data`.
    pub request_hash: RequestHash,
    /// How long its prepares may take, from 1 ms to a day; `None`: the run's own setting.
    pub timeout: Option<Duration>,
}

/// The transactions of a file, in whichever form it has.
#[derive(Debug)]
pub enum Transactions<R> {
    /// The file is an array: all of it, checked.
    Array(Vec<TransactionSpec>),
    /// The file has lines, which are checked as they are read.
    Lines(Lines<R>),
}

impl<R: BufRead> Transactions<R> {
    /// Looks which form `reader` is in, and reads it to its end if that is an array.
    ///
    /// `file` is what complaints call it.
    ///
    /// # Errors
    ///
    /// It can't be read, begins like neither form, or is an array with something wrong: then
    /// everything that is, at once.
    pub fn open(file: &str, reader: R) -> Result<Self, Complaints> {
        let _ = (file, reader);
        Ok(Self::Array(Vec::new()))
    }
}

/// Reads `text`, the content of `file`, which is one array: a transaction for each element, in its
/// order.
///
/// # Errors
///
/// Everything that is wrong with it, at once.
pub fn read_all(file: &str, text: &[u8]) -> Result<Vec<TransactionSpec>, Complaints> {
    let _ = (file, text);
    Ok(Vec::new())
}

/// The transactions of a file of lines, one after another. Blank lines are skipped.
///
/// It holds one line, never more than [`SIZE_MAX`] bytes of it, and a fingerprint of each of the
/// last [`Lines::IDS_MIN`] ids at least (twice as many at most, then the older half is forgotten):
/// an id that comes again later than that is not noticed. That memory grows with the lines read,
/// up to 72 MB.
///
/// A line is refused with everything that is wrong with it, and is the last one that is read.
#[derive(Debug)]
pub struct Lines<R> {
    reader: R,
}

impl<R> Lines<R> {
    /// An id is known to be taken for this many lines at least.
    pub const IDS_MIN: usize = 1_835_008;

    /// Where the lines are read from: what it has buffered has not been read as a line yet.
    pub fn reader(&self) -> &R {
        &self.reader
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<TransactionSpec, Complaints>;

    fn next(&mut self) -> Option<Self::Item> {
        let _ = &mut self.reader;
        None
    }
}
