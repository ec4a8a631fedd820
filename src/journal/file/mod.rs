//! The journal in a file: it lets a process be restarted without losing anything.
//!
//! Only one process at a time has the file open. It writes the requests that it has begun, its
//! decisions, and what is finished. A decision counts when it is on the disk, and nobody acts on it
//! before. When the file is opened again, it is read from its beginning: transactions in flight are
//! passed on to be finished, and finished ones are answered from the file.
//!
//! * [`frames`]: the bytes, and how a torn tail is distinguished from damage.
//! * [`replay()`]: the content of a file.
//! * [`JournalFileWriter`]: immediate writes, and a thread that syncs many of them at once.
//!
//! **Why not a library.** The journal needs an append, a sync that doesn't block appends and, at
//! the start, to know whether the tail is torn or safe entries are damaged, and where. An embedded
//! database does more than that and reports less: its log is internal, and it adds trees and caches
//! that nothing here would use. Only the checksums come from a library.
//!
//! **How the file stays small.** A finished transaction needs one of its three entries and, after
//! [`JournalOptions::retention`], none. If less than half of a file is still needed, opening it
//! writes that part to a new one, with `.rewritten` at the end of its name, which then replaces the
//! old one. If that fails, for lack of space or of permission, the old file is intact and stays in
//! use. While it is open, a file only grows.
//!
//! **What is held in memory**: the transactions in flight, and 16 bytes for each transaction that
//! was finished when the file was opened, and for each of the last million finished since.
//!
//! **Invariant:** a file that is not a journal, or that is damaged, is left as it is.

pub mod frames;
mod replay;
mod writer;

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use self::{
    frames::{FileBeginning, FrameReader, HEADER, NextFrame},
    replay::{FinishedOffset, digest},
};
pub use self::{
    replay::{Incarnation, Replay, ReplayError, UnfinishedTransaction, replay},
    writer::{EntryBatch, JournalFileWriter, JournalTail},
};
use crate::{
    error::ErrorChain,
    journal::faults,
    protocol::{
        ids::{InstanceId, TransactionId, TransactionKey, WorkerId},
        time::Time,
    },
    wire::message::{Begun, Entry, Finished},
};

/// A smaller file isn't worth compacting.
const COMPACT_MIN: u64 = 64 * 1024;

/// More bytes than a new file has before they are on the disk, and fewer than a file with a
/// transaction in it: if a file is no longer than this, nobody has acted on what it held.
const NEW_FILE_MAX: u64 = 160;

/// For how many of the transactions finished since the file was opened the offsets are kept: a
/// service that has stored something for one of them too late asks within a minute or so.
const RECENT_MAX: usize = 1 << 20;

/// How much is copied at a time.
const CHUNK: usize = 1 << 20;

/// How often to open a file again while another process is replacing it.
const OPEN_ATTEMPTS_MAX: usize = 100;

/// The journal can't be kept in this file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// It doesn't exist and can't be created, or it can't be opened for writing.
    #[error("failed to open the journal `{}`", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is a directory, or a device.
    #[error("the journal `{}` is not a regular file", path.display())]
    NoFile {
        /// The path.
        path: PathBuf,
    },
    /// Another process has it open.
    #[error("the journal `{}` is in use: another process has it open", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It was written by another program. It is left as it is.
    #[error("`{}` is not a dtc journal", path.display())]
    NoJournal {
        /// The file.
        path: PathBuf,
    },
    /// It was written by a later release. It is left as it is.
    #[error("the journal `{}` is of version {version}: this release reads version 1", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u64,
    },
    /// It is damaged. It is left as it is: the lost entries may have been acted upon, and nobody
    /// may guess what they were. Restore it from a copy that is as recent, or resolve by hand what
    /// the services hold in doubt.
    #[error("the journal `{}` is corrupt", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where, and how.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It can't be read.
    #[error("failed to read the journal `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It can't be written: the disk is full, for example. Nobody acted on anything that was not
    /// safe before; once there is space, a restart continues from there.
    #[error("failed to write the journal `{}`", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What was written may not be on the disk. The sync is not repeated, since a second one may
    /// succeed though the first has lost something: a restart reads what is there.
    #[error("failed to sync the journal `{}`", path.display())]
    Sync {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The thread that syncs it can't be started.
    #[error("failed to start a thread that syncs the journal `{}`", path.display())]
    Thread {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// How to open a journal.
#[derive(Clone, Copy, Debug)]
pub struct JournalOptions {
    /// The current time.
    pub now: Time,
    /// How long the outcome of a transaction is kept.
    pub retention: Duration,
}

/// An opened journal, and its content.
#[derive(Debug)]
pub struct OpenedJournal {
    /// The number of this opening.
    pub own: Incarnation,
    /// The name of this process as a worker.
    pub worker: WorkerId,
    /// Its name as an instance of each of its services.
    pub instance: InstanceId,
    /// The transactions that are not finished.
    pub unfinished: Vec<UnfinishedTransaction>,
    /// Those that are.
    pub endings: FinishedIndex,
    /// The latest time in it: the clock must not show an earlier one.
    pub latest: Time,
    /// How many bytes of a torn tail were truncated.
    pub n_torn: u64,
    /// Where writing continues.
    pub tail: JournalTail,
}

/// The outcomes of the transactions that were finished when the journal was opened, and of the last
/// ones finished since.
#[derive(Debug)]
pub struct FinishedIndex {
    path: PathBuf,
    file: File,
    offsets: Vec<FinishedOffset>,
    /// Those finished since, in the order of their offsets.
    recent: VecDeque<FinishedOffset>,
}

impl FinishedIndex {
    fn of(path: &Path, file: File, offsets: Vec<FinishedOffset>) -> Self {
        Self { path: path.to_owned(), file, offsets, recent: VecDeque::new() }
    }

    /// The outcome of the last transaction with the id `id`, if it is known.
    ///
    /// # Errors
    ///
    /// The file can't be read any more.
    pub fn find(&self, id: &TransactionId) -> Result<Option<Finished>, JournalError> {
        let digest = digest(id);
        let end = self.offsets.partition_point(|(of, _)| *of <= digest);
        let offsets = self.offsets.iter().take(end).rev().take_while(|(of, _)| *of == digest);
        for (_, at) in offsets {
            let finished = self.read(*at)?;
            if finished.decision.key.id == *id {
                return Ok(Some(finished));
            }
        }
        Ok(None)
    }

    /// Notes that the outcome of the transaction `id` will be written at `at`.
    pub fn note(&mut self, id: &TransactionId, at: u64) {
        if self.recent.len() >= RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back((digest(id), at));
    }

    /// The outcome of a transaction that was finished since the journal was opened, if it is known
    /// and its offset is below `end`.
    ///
    /// # Errors
    ///
    /// The file can't be read any more.
    pub fn find_recent(
        &self,
        key: &TransactionKey,
        end: u64,
    ) -> Result<Option<Finished>, JournalError> {
        let digest = digest(&key.id);
        let offsets = self.recent.iter().rev().filter(|(of, at)| *of == digest && *at < end);
        for (_, at) in offsets {
            let finished = self.read(*at)?;
            if finished.decision.key == *key {
                return Ok(Some(finished));
            }
        }
        Ok(None)
    }

    fn read(&self, at: u64) -> Result<Finished, JournalError> {
        let read = |source| JournalError::Read { path: self.path.clone(), source };
        let mut frames = FrameReader::starting_at(&self.file, at).map_err(read)?;
        let found = match frames.read().map_err(read)? {
            NextFrame::Frame(frame) => Entry::read(frame.tag, &frame.text)
                .map_err(|source| ReplayError::Malformed { at, source }),
            NextFrame::End | NextFrame::Torn => Err(ReplayError::Damaged { at, witness: at }),
            NextFrame::Corrupt { witness } => Err(ReplayError::Damaged { at, witness }),
        };
        match found {
            Ok(Entry::Finished(finished)) => Ok(finished),
            Ok(_) => Err(self.corrupt_error(ReplayError::Damaged { at, witness: at })),
            Err(source) => Err(self.corrupt_error(source)),
        }
    }

    fn corrupt_error(&self, source: ReplayError) -> JournalError {
        JournalError::Corrupt { path: self.path.clone(), source: source.into() }
    }
}

/// Opens the journal at `path`, or creates it. Its content is on the disk when this returns.
///
/// # Errors
///
/// It can't be opened, another process has it open, or it is damaged.
pub fn open(path: &Path, options: &JournalOptions) -> Result<OpenedJournal, JournalError> {
    let (path, file) = lock(path)?;
    let mut old = ExistingFile { path, file };
    if !old.has_header()? {
        return old.initialise(options);
    }
    let replay = old.replay(options)?;
    let size = old.size()?;
    let n_torn = size - replay.end;
    if n_torn > 0 {
        tracing::warn!(
            journal = %old.path.display(), at = replay.end, bytes = n_torn,
            "the journal has a torn tail, as a crash leaves it; it is truncated"
        );
        old.truncate(replay.end)?;
    }
    let own = replay.last.as_ref().map_or_else(Incarnation::first, Incarnation::next);
    let (worker, instance) = old.ids(&own)?;
    let should_compact = replay.end > COMPACT_MIN && replay.needed < replay.end / 2;
    let (tail, endings) = if should_compact {
        old.compact(&replay, &worker, options)?
    } else {
        old.keep(&replay, &worker, options)?
    };
    Ok(OpenedJournal {
        own,
        worker,
        instance,
        unfinished: replay.unfinished,
        endings,
        latest: replay.latest,
        n_torn,
        tail,
    })
}

/// Opens and locks the file at `path`, created if necessary; returns it with its canonical path.
fn lock(path: &Path) -> Result<(PathBuf, File), JournalError> {
    let opening = |source| JournalError::Open { path: path.to_owned(), source };
    for _ in 0..OPEN_ATTEMPTS_MAX {
        match fs::metadata(path) {
            Ok(found) if !found.is_file() => {
                return Err(JournalError::NoFile { path: path.to_owned() });
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(opening(error)),
        }
        let mut how = OpenOptions::new();
        let file = how.read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(opening)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(JournalError::InUse { path: path.to_owned() });
            }
            Err(TryLockError::Error(error)) => return Err(opening(error)),
        }
        // The process that had it open may have replaced the file.
        if is_at(&file, path) {
            let path = fs::canonicalize(path).map_err(opening)?;
            return Ok((path, file));
        }
    }
    Err(JournalError::InUse { path: path.to_owned() })
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    file.metadata().is_ok_and(|own| fs::metadata(path).is_ok_and(|there| same(&own, &there)))
}

/// On other systems an open file can't be replaced.
#[cfg(not(unix))]
fn is_at(_file: &File, _path: &Path) -> bool {
    true
}

/// Makes the names in the directory of `path` durable.
#[cfg(unix)]
fn sync_directory(path: &Path) -> Result<(), JournalError> {
    let directory = path.parent().filter(|it| !it.as_os_str().is_empty());
    let directory = directory.unwrap_or_else(|| Path::new("."));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|source| JournalError::Sync { path: directory.to_owned(), source })
}

/// On other systems a directory can't be synced.
#[cfg(not(unix))]
#[expect(clippy::unnecessary_wraps, reason = "on other systems it can fail")]
fn sync_directory(_path: &Path) -> Result<(), JournalError> {
    Ok(())
}

/// A file as it was found.
struct ExistingFile {
    path: PathBuf,
    file: File,
}

impl ExistingFile {
    fn read_error(&self, source: io::Error) -> JournalError {
        JournalError::Read { path: self.path.clone(), source }
    }

    fn write_error(&self, source: io::Error) -> JournalError {
        JournalError::Write { path: self.path.clone(), source }
    }

    fn sync_error(&self, source: io::Error) -> JournalError {
        JournalError::Sync { path: self.path.clone(), source }
    }

    fn ids(&self, own: &Incarnation) -> Result<(WorkerId, InstanceId), JournalError> {
        own.worker().zip(own.instance()).ok_or_else(|| {
            let source = ReplayError::Nameless { journal: own.journal.clone() };
            JournalError::Corrupt { path: self.path.clone(), source: source.into() }
        })
    }

    fn size(&self) -> Result<u64, JournalError> {
        self.file.metadata().map(|it| it.len()).map_err(|error| self.read_error(error))
    }

    /// Whether it has a complete header; if not, it becomes a new journal.
    fn has_header(&self) -> Result<bool, JournalError> {
        let mut head = Vec::new();
        let mut file = &self.file;
        file.rewind().map_err(|error| self.read_error(error))?;
        let read = file.take(HEADER.len() as u64).read_to_end(&mut head);
        read.map_err(|error| self.read_error(error))?;
        match frames::beginning(&head) {
            FileBeginning::Journal => Ok(true),
            FileBeginning::Unwritten => Ok(false),
            FileBeginning::Newer(version) => {
                Err(JournalError::Newer { path: self.path.clone(), version })
            }
            FileBeginning::Other if self.is_blank()? => Ok(false),
            FileBeginning::Other => Err(JournalError::NoJournal { path: self.path.clone() }),
        }
    }

    /// Whether it is a new file that has its size but none of its bytes: after a power cut, the one
    /// may be on the disk without the other.
    fn is_blank(&self) -> Result<bool, JournalError> {
        let mut bytes = Vec::new();
        let mut file = &self.file;
        file.rewind().map_err(|error| self.read_error(error))?;
        let read = file.take(NEW_FILE_MAX + 1).read_to_end(&mut bytes);
        let len = read.map_err(|error| self.read_error(error))?;
        Ok(len as u64 <= NEW_FILE_MAX && bytes.iter().all(|byte| *byte == 0))
    }

    fn replay(&self, options: &JournalOptions) -> Result<Replay, JournalError> {
        let forget_before = options.now - options.retention;
        replay(BufReader::with_capacity(CHUNK, &self.file), forget_before).map_err(|error| {
            match error {
                ReplayError::Read(source) => self.read_error(source),
                source @ (ReplayError::Damaged { .. }
                | ReplayError::Malformed { .. }
                | ReplayError::Foreign { .. }
                | ReplayError::Nameless { .. }) => {
                    JournalError::Corrupt { path: self.path.clone(), source: source.into() }
                }
            }
        })
    }

    /// Makes it an empty journal.
    fn initialise(mut self, options: &JournalOptions) -> Result<OpenedJournal, JournalError> {
        faults::point();
        self.truncate(0)?;
        if faults::is_fatal() {
            let _ = self.file.write_all(HEADER.split_at(7).0);
            std::process::abort();
        }
        self.file.write_all(HEADER).map_err(|error| self.write_error(error))?;
        faults::point();
        let own = Incarnation::first();
        let (worker, instance) = self.ids(&own)?;
        let endings = FinishedIndex::of(&self.path, self.reader()?, Vec::new());
        let path = self.path.clone();
        let tail = JournalTail { path, file: self.file, len: HEADER.len() as u64, durable: 0 };
        let tail = write_opened(tail, &worker, options)?;
        sync_directory(&tail.path)?;
        faults::point();
        Ok(OpenedJournal {
            own,
            worker,
            instance,
            unfinished: Vec::new(),
            endings,
            latest: Time::EPOCH,
            n_torn: 0,
            tail,
        })
    }

    /// Truncates the file at `end`.
    fn truncate(&mut self, end: u64) -> Result<(), JournalError> {
        self.file.set_len(end).map_err(|error| self.write_error(error))?;
        self.file.seek(SeekFrom::Start(end)).map_err(|error| self.write_error(error))?;
        faults::point();
        Ok(())
    }

    fn reader(&self) -> Result<File, JournalError> {
        File::open(&self.path).map_err(|error| self.read_error(error))
    }

    fn keep(
        mut self,
        replay: &Replay,
        worker: &WorkerId,
        options: &JournalOptions,
    ) -> Result<(JournalTail, FinishedIndex), JournalError> {
        self.write_tail_again(replay.durable, replay.end)?;
        let offsets = replay.endings.clone();
        let endings = FinishedIndex::of(&self.path, self.reader()?, offsets);
        let mut tail =
            JournalTail { path: self.path, file: self.file, len: replay.end, durable: replay.end };
        let seek = tail.file.seek(SeekFrom::Start(replay.end));
        seek.map_err(|source| JournalError::Write { path: tail.path.clone(), source })?;
        let tail = write_opened(tail, worker, options)?;
        // The process that created it may not have done this.
        sync_directory(&tail.path)?;
        Ok((tail, endings))
    }

    /// Writes the bytes from `from` to `end` again, and syncs them. They were read, but may not be
    /// on the disk, and after a failed sync the next one may succeed without writing anything.
    fn write_tail_again(&mut self, from: u64, end: u64) -> Result<(), JournalError> {
        let mut bytes = Vec::new();
        let mut at = from;
        while at < end {
            bytes.clear();
            self.file.seek(SeekFrom::Start(at)).map_err(|error| self.read_error(error))?;
            let part = (end - at).min(CHUNK as u64);
            let read = (&self.file).take(part).read_to_end(&mut bytes);
            read.map_err(|error| self.read_error(error))?;
            if bytes.is_empty() {
                return Err(self.read_error(io::ErrorKind::UnexpectedEof.into()));
            }
            self.file.seek(SeekFrom::Start(at)).map_err(|error| self.write_error(error))?;
            self.file.write_all(&bytes).map_err(|error| self.write_error(error))?;
            at += bytes.len() as u64;
        }
        faults::point();
        self.file.sync_all().map_err(|error| self.sync_error(error))?;
        faults::point();
        Ok(())
    }

    /// Replaces this file with a new one of what is still needed. Until then this one is intact: if
    /// it can't be replaced, it stays in use.
    fn compact(
        self,
        replay: &Replay,
        worker: &WorkerId,
        options: &JournalOptions,
    ) -> Result<(JournalTail, FinishedIndex), JournalError> {
        let mut new = self.path.clone().into_os_string();
        new.push(".rewritten");
        let new = PathBuf::from(new);
        let (mut tail, offsets) = match self.write_compacted(&new, replay, worker, options) {
            Ok(replaced) => replaced,
            Err(error) => {
                // It may use the very space that is missing.
                let _ = fs::remove_file(&new);
                let is_unreadable =
                    matches!(error, JournalError::Read { .. } | JournalError::Corrupt { .. });
                if is_unreadable || !is_at(&self.file, &self.path) {
                    return Err(error);
                }
                tracing::warn!(
                    journal = %self.path.display(), error = %ErrorChain(&error),
                    "journal compaction failed; continuing with the uncompacted file"
                );
                return self.keep(replay, worker, options);
            }
        };
        faults::point();
        tail.path.clone_from(&self.path);
        sync_directory(&tail.path)?;
        faults::point();
        tracing::info!(
            journal = %tail.path.display(), from = replay.end, to = tail.len, "journal compacted"
        );
        let endings = FinishedIndex::of(&self.path, self.reader()?, offsets);
        Ok((tail, endings))
    }

    /// Writes what is still needed to a file at `new`, and renames it to this one's path.
    fn write_compacted(
        &self,
        new: &Path,
        replay: &Replay,
        worker: &WorkerId,
        options: &JournalOptions,
    ) -> Result<(JournalTail, Vec<FinishedOffset>), JournalError> {
        let (path, file) = (new.to_owned(), self.new_file(new)?);
        faults::point();
        let mut tail = JournalTail { path, file, len: HEADER.len() as u64, durable: 0 };
        let written = tail.file.write_all(HEADER);
        written.map_err(|source| JournalError::Write { path: tail.path.clone(), source })?;
        let mut batch = EntryBatch::default();
        replay.unfinished.iter().for_each(|it| push_unfinished(it, &mut batch));
        tail.write(&batch)?;
        let offsets = self.copy_finished(&replay.endings, &mut tail)?;
        tail.sync()?;
        // After the sync: this entry states that everything before it is safe.
        let tail = write_opened(tail, worker, options)?;
        let renamed = fs::rename(&tail.path, &self.path);
        renamed.map_err(|source| JournalError::Write { path: tail.path.clone(), source })?;
        Ok((tail, offsets))
    }

    /// Creates the file that will replace this one. A file with that name was left by a process
    /// that did not finish.
    fn new_file(&self, path: &Path) -> Result<File, JournalError> {
        let failed = |source| JournalError::Open { path: path.to_owned(), source };
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            Ok(()) | Err(_) => {}
        }
        let mut how = OpenOptions::new();
        let file = how.read(true).write(true).create_new(true).open(path).map_err(failed)?;
        // No other process opens it by this name; after the renaming it is the journal.
        file.try_lock().map_err(|error| failed(error.into()))?;
        let rights = self.file.metadata().map_err(|error| self.read_error(error))?.permissions();
        file.set_permissions(rights).map_err(failed)?;
        Ok(file)
    }

    /// Copies the endings in the order of their offsets, and returns their new offsets.
    fn copy_finished(
        &self,
        of: &[FinishedOffset],
        tail: &mut JournalTail,
    ) -> Result<Vec<FinishedOffset>, JournalError> {
        let mut order = of.to_vec();
        order.sort_unstable_by_key(|(_, at)| *at);
        let old = FinishedIndex::of(&self.path, self.reader()?, Vec::new());
        let mut offsets = Vec::with_capacity(order.len());
        for part in order.chunks(4096) {
            let mut batch = EntryBatch::default();
            let mut at = tail.len;
            for (digest, from) in part {
                offsets.push((*digest, at));
                at += batch.push(&Entry::Finished(old.read(*from)?));
            }
            tail.write(&batch)?;
        }
        offsets.sort_unstable();
        Ok(offsets)
    }
}

/// Writes that this process has opened the file, and syncs it.
fn write_opened(
    mut tail: JournalTail,
    worker: &WorkerId,
    options: &JournalOptions,
) -> Result<JournalTail, JournalError> {
    let mut batch = EntryBatch::default();
    batch.push(&Entry::Opened { worker: worker.clone(), opened_at: options.now });
    tail.write(&batch)?;
    tail.sync()?;
    Ok(tail)
}

fn push_unfinished(it: &UnfinishedTransaction, batch: &mut EntryBatch) {
    let (request, worker) = (it.request.clone(), it.begun_by.clone());
    batch.push(&Entry::Begun(Begun { request, worker }));
    if let Some(decision) = &it.decision {
        batch.push(&Entry::Decided(Arc::clone(decision)));
        if !it.parked.is_empty() {
            let (decision, unresolved) = (Arc::clone(decision), it.parked.clone());
            batch.push(&Entry::Finished(Finished { decision, unresolved }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_file_is_no_longer_than_its_limit() {
        let mut batch = EntryBatch::default();
        let worker = Incarnation::first().worker().unwrap();
        let opened_at = Time::from_millis(u64::MAX);
        let len = HEADER.len() as u64 + batch.push(&Entry::Opened { worker, opened_at });
        assert!(len <= NEW_FILE_MAX, "{len}");
    }

    #[test]
    fn a_compacted_file_that_cannot_replace_the_old_one_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        // A file can't replace a directory.
        let path = directory.path().join("journal");
        fs::create_dir(&path).unwrap();
        let old = ExistingFile { path, file: tempfile::tempfile().unwrap() };
        let options = JournalOptions { now: Time::EPOCH, retention: Duration::ZERO };
        let worker = Incarnation::first().worker().unwrap();
        let compacted = old.compact(&Replay::default(), &worker, &options);
        assert!(matches!(compacted, Err(JournalError::Write { .. })), "{compacted:?}");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
