//! What a service keeps in a file: a line for each thing that happened.
//!
//! ```text
//! prepared order-17@1764497314000 i4f0x9k2m1q7z3w8.1 0f1e2d3c4b5a69788796a5b4c3d2e1f0 1764497319000 100
//! committed i4f0x9k2m1q7z3w8.1
//! ```
//!
//! It is for one process at a time, and its file only grows. A real service has a database: what
//! matters is that the keys are stored with what is prepared, in one write.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    path::Path,
};

use dtc::{BoxError, Branch, InDoubt, Prepare};

/// What is in the account to begin with.
const BALANCE: u64 = 1000;

pub(crate) struct Store {
    file: File,
    length: u64,
    left: u64,
    prepared: BTreeMap<Branch, (InDoubt, u64)>,
}

impl Store {
    pub(crate) fn open(path: &Path) -> Result<Self, BoxError> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        file.try_lock()?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let mut store = Self { file, length: 0, left: BALANCE, prepared: BTreeMap::new() };
        // A line without its end was being written when the process was killed: nobody relies on it.
        for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            store.apply(line)?;
        }
        Ok(store)
    }

    /// What is left in the account, and reserved for nothing.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// Reserves `amount` for the branch of this call. `false`: there is not enough left.
    pub(crate) fn reserve(&mut self, call: &Prepare, amount: u64) -> Result<bool, BoxError> {
        if amount > self.left {
            return Ok(false);
        }
        let Prepare { key, branch, request_hash, deadline, .. } = call;
        self.note(&format!("prepared {key} {branch} {request_hash} {deadline} {amount}\n"))?;
        Ok(true)
    }

    /// Spends what is reserved for `branch`. It does nothing the second time.
    pub(crate) fn commit(&mut self, branch: &Branch) -> Result<(), BoxError> {
        if self.prepared.contains_key(branch) {
            self.note(&format!("committed {branch}\n"))?;
        }
        Ok(())
    }

    /// Gives back what is reserved for `branch`, if anything is.
    pub(crate) fn abort(&mut self, branch: &Branch) -> Result<(), BoxError> {
        if self.prepared.contains_key(branch) {
            self.note(&format!("aborted {branch}\n"))?;
        }
        Ok(())
    }

    /// All that is prepared and has heard no outcome.
    pub(crate) fn in_doubt(&self) -> impl Iterator<Item = &InDoubt> {
        self.prepared.values().map(|(held, _)| held)
    }

    /// Writes down that something happened. It is on the disk when this returns.
    fn note(&mut self, line: &str) -> Result<(), BoxError> {
        // Whatever an earlier write has left that failed.
        self.file.set_len(self.length)?;
        self.file.write_all(line.as_bytes())?;
        self.file.sync_data()?;
        self.apply(line)
    }

    fn apply(&mut self, line: &str) -> Result<(), BoxError> {
        match *line.split_whitespace().collect::<Vec<_>>() {
            ["prepared", key, branch, request_hash, deadline, amount] => {
                let held = InDoubt {
                    key: key.parse()?,
                    branch: branch.parse()?,
                    request_hash: request_hash.parse()?,
                    deadline: deadline.parse()?,
                };
                let amount = amount.parse()?;
                self.left -= amount;
                self.prepared.insert(held.branch.clone(), (held, amount));
            }
            ["committed", branch] => drop(self.prepared.remove(&branch.parse()?)),
            ["aborted", branch] => {
                let held = self.prepared.remove(&branch.parse()?);
                self.left += held.map_or(0, |(_, amount)| amount);
            }
            _ => return Err(format!("not a line of this store: {line:?}").into()),
        }
        self.length += line.len() as u64;
        Ok(())
    }
}
