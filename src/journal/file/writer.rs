//! Writing a journal file at once, and syncing it on a separate thread.
//!
//! A write goes to the system's memory and survives the process, so it precedes every action that
//! it describes. A sync waits for the disk, so only decisions, which count once they are safe, wait
//! for one. While one sync is in progress, more writes accumulate, and the next sync makes all of
//! them safe: no write is delayed to collect others, and none waits longer than for the sync in
//! progress and one more.
//!
//! **Invariant:** after a write or a sync has failed, nothing more is written, and nothing is
//! reported as safe: only reading the file again can show what is on the disk then.

use std::{
    fs::File,
    io::{self, Write as _},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use tokio::sync::watch;

use crate::{
    journal::{
        faults,
        file::{JournalError, frames},
    },
    protocol::time::Time,
    wire::message::Entry,
};

/// Entries that are written together.
#[derive(Debug, Default)]
pub struct EntryBatch {
    texts: Vec<u8>,
    /// The tag of each entry, and the length of its text.
    entries: Vec<(u8, usize)>,
    /// Whether somebody waits until they are safe.
    is_awaited: bool,
}

impl EntryBatch {
    /// Adds an entry, and returns its size in the file.
    pub fn push(&mut self, entry: &Entry) -> u64 {
        let before = self.texts.len();
        entry.write(&mut self.texts);
        let len = self.texts.len() - before;
        self.entries.push((entry.tag(), len));
        self.is_awaited |= matches!(entry, Entry::Decided(_));
        (frames::HEAD + len) as u64
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// A journal file that is open and locked, positioned at its end.
#[derive(Debug)]
pub struct JournalTail {
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// The offset of the next frame.
    pub(super) len: u64,
    /// How much of it is known to be on the disk.
    pub(super) durable: u64,
}

impl JournalTail {
    /// The offset of the next entry.
    pub fn end(&self) -> u64 {
        self.len
    }

    pub(super) fn write(&mut self, batch: &EntryBatch) -> Result<(), JournalError> {
        let mut bytes = Vec::with_capacity(batch.texts.len() + batch.entries.len() * frames::HEAD);
        let mut rest = batch.texts.as_slice();
        for (tag, len) in &batch.entries {
            let (text, after) = rest.split_at(*len);
            rest = after;
            let at = self.len + bytes.len() as u64;
            frames::write(&mut bytes, at, self.durable, *tag, text)
                .map_err(|source| JournalError::Write { path: self.path.clone(), source })?;
        }
        faults::point();
        if faults::is_fatal() {
            let _ = self.file.write_all(bytes.split_at(bytes.len() / 2).0);
            std::process::abort();
        }
        self.file
            .write_all(&bytes)
            .map_err(|source| JournalError::Write { path: self.path.clone(), source })?;
        self.len += bytes.len() as u64;
        faults::point();
        Ok(())
    }

    pub(super) fn sync(&mut self) -> Result<(), JournalError> {
        let synced = self.file.sync_data();
        synced.map_err(|source| JournalError::Sync { path: self.path.clone(), source })?;
        self.durable = self.len;
        faults::point();
        Ok(())
    }
}

/// A journal file that is being written, and the thread that syncs it.
#[derive(Debug)]
pub struct JournalFileWriter {
    tail: JournalTail,
    n_written: u64,
    /// Whether a write or a sync has failed.
    has_failed: bool,
    shared: Arc<SharedSyncRequest>,
    safe: watch::Receiver<SyncProgress>,
    thread: Option<thread::JoinHandle<()>>,
}

/// What is on the disk: how many of the entries, and how many bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct SyncProgress {
    n_entries: u64,
    len: u64,
}

#[derive(Debug, Default)]
struct SharedSyncRequest {
    request: Mutex<SyncRequest>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct SyncRequest {
    /// What should be on the disk.
    wanted: SyncProgress,
    /// Nothing more will follow.
    is_over: bool,
    failure: Option<io::Error>,
}

impl SharedSyncRequest {
    fn lock(&self) -> MutexGuard<'_, SyncRequest> {
        self.request.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl JournalFileWriter {
    /// Starts writing at `tail`.
    ///
    /// # Errors
    ///
    /// The thread can't be started.
    pub fn start(tail: JournalTail) -> Result<Self, JournalError> {
        let no_thread = |source| JournalError::Thread { path: tail.path.clone(), source };
        let file = tail.file.try_clone().map_err(no_thread)?;
        let shared = Arc::<SharedSyncRequest>::default();
        let (progress, safe) = watch::channel(SyncProgress::default());
        let thread_shared = Arc::clone(&shared);
        let sync = move || {
            if let Err(failure) = sync_all(&file, &thread_shared, &progress) {
                thread_shared.lock().failure = Some(failure);
            }
        };
        let thread = thread::Builder::new().name("dtc-journal".to_owned()).spawn(sync);
        let thread = Some(thread.map_err(no_thread)?);
        Ok(Self { tail, n_written: 0, has_failed: false, shared, safe, thread })
    }

    /// Writes entries, and requests a sync if somebody waits for them.
    ///
    /// # Errors
    ///
    /// The write fails, or a write or sync has failed before.
    pub fn write(&mut self, batch: &EntryBatch) -> Result<(), JournalError> {
        self.append(batch)?;
        self.n_written += batch.entries.len() as u64;
        if batch.is_awaited {
            self.shared.lock().wanted =
                SyncProgress { n_entries: self.n_written, len: self.tail.len };
            self.shared.wake.notify_one();
        }
        Ok(())
    }

    fn append(&mut self, batch: &EntryBatch) -> Result<(), JournalError> {
        self.failure()?;
        self.tail.durable = self.tail.durable.max(self.safe.borrow().len);
        self.tail.write(batch).inspect_err(|_| self.has_failed = true)
    }

    fn failure(&mut self) -> Result<(), JournalError> {
        let failure = self.shared.lock().failure.take();
        let earlier = || self.has_failed.then(|| io::Error::other("it has failed before"));
        let Some(source) = failure.or_else(earlier) else { return Ok(()) };
        self.has_failed = true;
        Err(JournalError::Sync { path: self.tail.path.clone(), source })
    }

    /// Waits until more is on the disk, and returns how many entries are there by then.
    ///
    /// # Errors
    ///
    /// A sync has failed.
    pub async fn progress(&mut self) -> Result<u64, JournalError> {
        if self.safe.changed().await.is_err() {
            self.failure()?;
            let source = io::Error::other("the thread that syncs it has ended");
            return Err(JournalError::Sync { path: self.tail.path.clone(), source });
        }
        Ok(self.safe.borrow_and_update().n_entries)
    }

    /// Writes that everything is finished, and syncs it.
    ///
    /// # Errors
    ///
    /// That fails, or a write or sync has failed before.
    pub fn close(mut self, now: Time) -> Result<(), JournalError> {
        self.end();
        let mut batch = EntryBatch::default();
        batch.push(&Entry::Closed { closed_at: now });
        self.append(&batch)?;
        self.tail.sync()
    }

    /// Waits for the sync in progress, so that the next process that opens the file finds it
    /// unlocked.
    fn end(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // If the thread has panicked, it has reported nothing as safe that isn't.
            let _ = thread.join();
        }
    }
}

impl Drop for JournalFileWriter {
    fn drop(&mut self) {
        self.end();
    }
}

/// Syncs what is requested, until nothing more will follow.
fn sync_all(
    file: &File,
    shared: &SharedSyncRequest,
    progress: &watch::Sender<SyncProgress>,
) -> io::Result<()> {
    let mut safe = SyncProgress::default();
    loop {
        let is_idle = |request: &mut SyncRequest| request.wanted == safe && !request.is_over;
        let request = shared.wake.wait_while(shared.lock(), is_idle);
        let wanted = request.unwrap_or_else(PoisonError::into_inner).wanted;
        if wanted == safe {
            return Ok(());
        }
        file.sync_data()?;
        faults::point();
        safe = wanted;
        progress.send_replace(safe);
    }
}
