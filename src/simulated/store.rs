//! The state of a simulated service: in memory, or in a directory that its instances share.
//!
//! ```text
//! DIR/<service>/prepared/<id>@<requested_at>@<branch>   one file for each branch in doubt
//! DIR/<service>/writing/                                such files, until they are whole
//! DIR/<service>/committed.log                           <id> <requested_at> <branch> <ms> <instance>
//! DIR/<service>/aborted.log                             the same
//! DIR/<service>/store-id                                names this directory, and none other
//! DIR/<service>/calls.log                               <ns> start|end <call> <id> <requested_at> <branch> <instance> [<ending>]
//! ```
//!
//! A branch is in `committed.log` or `aborted.log` exactly once, however often its instances are
//! killed in between: an instance that finishes it locks its file, writes into it what it is about
//! to do, adds the line to the log, and removes the file. If it finds such a note, it first looks
//! whether the log has the line. In `calls.log` each call of the service's code has a line before
//! it starts and one after it has ended, unless it was killed. Each line is added by one write, so
//! lines are in the order of events across all processes. `<ending>` is `prepared`, `read_only`,
//! `refused`, `failed`, `done`, or `dropped` for a call that timed out or panicked.
//! `<requested_at>` is in seconds.
//!
//! The store also uses `committed.log` to tell what it has never committed: after somebody empties
//! it, repeated commits fail.
//!
//! **What this survives:** the end of its processes, `kill -9` included. Nothing is synced to the
//! disk, so it doesn't survive a power cut: it is for experiments.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use crate::{
    clock::Clock,
    participant::{Finish, InDoubt, Prepare},
    protocol::{
        ids::{
            Branch, InstanceId, RequestHash, ServiceName, StoreId, TransactionId, TransactionKey,
        },
        message::Outcome,
        time::Time,
    },
    unique,
};

/// The pause before trying again a branch that another instance has locked.
const LOCKED_PAUSE: Duration = Duration::from_millis(1);

/// How often to try to read a store's id that is not yet written completely.
const ID_LOOKS_MAX: usize = 1000;

/// How much of a log is searched at a time, in bytes.
const LOOK_BACK: u64 = 64 * 1024;

/// The state of a simulated service.
#[derive(Debug)]
pub struct SimulatedStore(Storage);

#[derive(Debug)]
enum Storage {
    Memory(Mutex<BTreeMap<TransactionKey, Vec<InDoubt>>>),
    Files(Box<Files>),
}

/// The directory of a store can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It, or a directory in it, can't be created.
    #[error("failed to create directory `{path}`")]
    Directory {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The store's id can't be read or created.
    #[error("failed to read or create the store's id in `{path}`")]
    Id {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A log in it can't be written.
    #[error("failed to open `{path}` for appending")]
    Log {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl SimulatedStore {
    /// A store that lives as long as the process.
    pub fn in_memory() -> Self {
        Self(Storage::Memory(Mutex::new(BTreeMap::new())))
    }

    /// The store of `service` in `directory`, for this instance.
    ///
    /// # Errors
    ///
    /// The directory doesn't exist and can't be created, or can't be written to.
    pub fn open(
        directory: &Path,
        service: &ServiceName,
        instance: &InstanceId,
    ) -> Result<Self, StoreError> {
        Files::open(&directory.join(service.as_str()), instance.clone())
            .map(|files| Self(Storage::Files(Box::new(files))))
    }

    /// Stores a prepared branch.
    pub(super) fn prepare(&self, call: &Prepare) -> io::Result<()> {
        let held = InDoubt {
            key: call.key.clone(),
            request_hash: call.request_hash,
            branch: call.branch.clone(),
            deadline: call.deadline,
        };
        match &self.0 {
            Storage::Memory(memory) => {
                lock(memory).entry(held.key.clone()).or_default().push(held);
                Ok(())
            }
            Storage::Files(files) => files.prepare(&held),
        }
    }

    /// The id of the store, if other instances can share it.
    pub(super) fn id(&self) -> Option<&StoreId> {
        match &self.0 {
            Storage::Memory(_) => None,
            Storage::Files(files) => Some(&files.id),
        }
    }

    /// Whether the branch is committed; `None` if it can't tell.
    pub(super) fn has_committed(&self, call: &Finish) -> io::Result<Option<bool>> {
        match &self.0 {
            Storage::Memory(_) => Ok(None),
            Storage::Files(files) => files.committed.has(&start_of_line(call)).map(Some),
        }
    }

    /// Commits or aborts a branch; one that isn't held has been finished already. A store in files
    /// knows: a commit of a branch that this directory has never held is an error.
    pub(super) async fn finish(&self, call: &Finish, outcome: Outcome) -> io::Result<()> {
        match &self.0 {
            Storage::Memory(memory) => {
                let mut memory = lock(memory);
                if let Some(held) = memory.get_mut(&call.key) {
                    held.retain(|it| it.branch != call.branch);
                    if held.is_empty() {
                        memory.remove(&call.key);
                    }
                }
                Ok(())
            }
            Storage::Files(files) => {
                while !files.finish(call, outcome)? {
                    tokio::time::sleep(LOCKED_PAUSE).await;
                }
                Ok(())
            }
        }
    }

    /// The branches that are held; with `of`, only those of one transaction.
    pub(super) fn in_doubt(&self, of: Option<&TransactionKey>) -> io::Result<Vec<InDoubt>> {
        match &self.0 {
            Storage::Memory(memory) => {
                let memory = lock(memory);
                Ok(match of {
                    Some(key) => memory.get(key).cloned().unwrap_or_default(),
                    None => memory.values().flatten().cloned().collect(),
                })
            }
            Storage::Files(files) => files.in_doubt(of),
        }
    }

    /// Logs that a call starts; dropping the returned value logs that it has ended.
    pub(super) fn called(
        &self,
        call: &'static str,
        key: &TransactionKey,
        branch: &Branch,
    ) -> io::Result<CallLog<'_>> {
        let files = match &self.0 {
            Storage::Memory(_) => None,
            Storage::Files(files) => Some(&**files),
        };
        let mut called = CallLog { files, what: String::new(), ending: "dropped" };
        if let Some(files) = files {
            called.what = format!("{call} {} {branch} {}", name_of(key, ' '), files.instance);
            files.note(&format!("start {}", called.what))?;
        }
        Ok(called)
    }
}

/// A call in progress.
#[derive(Debug)]
pub(super) struct CallLog<'a> {
    files: Option<&'a Files>,
    what: String,
    ending: &'static str,
}

impl CallLog<'_> {
    pub(super) fn ended(mut self, ending: &'static str) {
        self.ending = ending;
    }
}

impl Drop for CallLog<'_> {
    fn drop(&mut self) {
        let Some(files) = self.files else { return };
        if let Err(error) = files.note(&format!("end {} {}", self.what, self.ending)) {
            tracing::warn!(%error, "calls.log misses the end of a call");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `<id><between><requested_at>`. The separators in a file's name occur in no id.
fn name_of(key: &TransactionKey, between: char) -> String {
    format!("{}{between}{}", key.id, key.requested_at.as_millis() / 1000)
}

/// A file that is being written for longer belongs to an instance that was killed. If the instance
/// was only suspended, its prepare fails.
const WRITING_MAX: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Files {
    instance: InstanceId,
    id: StoreId,
    clock: Clock,
    prepared: PathBuf,
    writing: PathBuf,
    committed: Log,
    aborted: Log,
    calls: Log,
    stray_is_told: AtomicBool,
}

/// A file to which lines are appended.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: File,
}

/// Adds the path of the file to an error.
trait Named<T> {
    /// The failed operation was to `act` on `path`.
    fn named(self, act: &str, path: &Path) -> io::Result<T>;
}

impl<T> Named<T> for io::Result<T> {
    fn named(self, act: &str, path: &Path) -> Self {
        self.map_err(|error| {
            let error = with_advice(error);
            let text = format!("failed to {act} `{}`: {error}", path.display());
            io::Error::new(error.kind(), text)
        })
    }
}

/// The same error, which also says what to do about it.
fn with_advice(error: io::Error) -> io::Error {
    use io::ErrorKind as Kind;
    let kind = error.kind();
    let advice = if matches!(kind, Kind::StorageFull | Kind::QuotaExceeded) {
        "make room on this disk"
    } else if matches!(kind, Kind::PermissionDenied | Kind::ReadOnlyFilesystem) {
        "let this process write there"
    } else if matches!(kind, Kind::NotADirectory | Kind::IsADirectory) {
        "something else has this name, or that of a directory above: move it elsewhere"
    } else if kind == Kind::NotFound {
        "the directory of the state, or a part of it, was moved or removed: put it back"
    } else {
        return error;
    };
    io::Error::new(kind, format!("{error}; {advice}"))
}

impl Files {
    fn open(directory: &Path, instance: InstanceId) -> Result<Self, StoreError> {
        let clock = Clock::start();
        let made = |name| {
            let path = directory.join(name);
            match fs::create_dir_all(&path) {
                Ok(()) => Ok(path),
                Err(source) => Err(StoreError::Directory { path, source: with_advice(source) }),
            }
        };
        let (prepared, writing) = (made("prepared")?, made("writing")?);
        if let Err(error) = remove_unfinished(&writing, &clock) {
            tracing::warn!(%error, "files that a killed instance left are not removed; they do no harm");
        }
        let path = directory.join("store-id");
        Ok(Self {
            instance,
            id: store_id(&path).map_err(|error| {
                let source = with_advice(error);
                StoreError::Id { path, source }
            })?,
            clock,
            committed: Log::open(directory.join("committed.log"))?,
            aborted: Log::open(directory.join("aborted.log"))?,
            calls: Log::open(directory.join("calls.log"))?,
            prepared,
            writing,
            stray_is_told: AtomicBool::new(false),
        })
    }

    fn path_of(&self, key: &TransactionKey, branch: &Branch) -> PathBuf {
        self.prepared.join(format!("{}@{branch}", name_of(key, '@')))
    }

    fn prepare(&self, held: &InDoubt) -> io::Result<()> {
        let text = format!("{} {}\n", held.request_hash, held.deadline.as_millis());
        let path = self.path_of(&held.key, &held.branch);
        let unfinished = self.writing.join(path.file_name().unwrap_or_default());
        fs::write(&unfinished, text).named("write", &unfinished)?;
        fs::rename(&unfinished, &path).named("make", &path)
    }

    /// Returns whether it is done; if not, another instance is finishing it.
    fn finish(&self, call: &Finish, outcome: Outcome) -> io::Result<bool> {
        let path = self.path_of(&call.key, &call.branch);
        let mut file = match OpenOptions::new().read(true).append(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return match outcome {
                    Outcome::Committed if !self.committed.has(&start_of_line(call))? => {
                        let directory = self.prepared.display();
                        Err(io::Error::other(format!("`{directory}` has never held this branch")))
                    }
                    Outcome::Committed | Outcome::Aborted => Ok(true),
                };
            }
            Err(error) => return Err(error).named("open", &path),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(false),
            Err(TryLockError::Error(error)) => return Err(error).named("lock", &path),
        }
        if !path.try_exists().named("look for", &path)? {
            return Ok(true);
        }
        let log = match outcome {
            Outcome::Committed => &self.committed,
            Outcome::Aborted => &self.aborted,
        };
        let mut text = String::new();
        file.read_to_string(&mut text).named("read", &path)?;
        let line = start_of_line(call);
        // An instance was killed in the middle of this.
        let is_noted = text.lines().any(|note| note == outcome.as_str());
        if !is_noted {
            writeln_at_once(&file, outcome.as_str()).named("write to", &path)?;
        }
        if !is_noted || !log.has(&line)? {
            let millis = self.clock.now().as_millis();
            log.add(&format!("{line}{millis} {}", self.instance))?;
        }
        fs::remove_file(&path).named("remove", &path)?;
        Ok(true)
    }

    fn in_doubt(&self, of: Option<&TransactionKey>) -> io::Result<Vec<InDoubt>> {
        let prefix = of.map(|key| format!("{}@", name_of(key, '@'))).unwrap_or_default();
        let mut held = Vec::new();
        for entry in fs::read_dir(&self.prepared).named("read", &self.prepared)? {
            let entry = entry.named("read", &self.prepared)?;
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|name| name.starts_with(&prefix)) else {
                continue;
            };
            let path = entry.path();
            if entry.file_type().named("look at", &path)?.is_dir() {
                self.tell_stray(&path);
                continue;
            }
            match fs::read_to_string(&path) {
                Ok(text) => held.extend(parse(name, &text)),
                // It was finished meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).named("read", &path),
            }
        }
        Ok(held)
    }

    /// A foreign directory is ignored; it is logged once.
    fn tell_stray(&self, path: &Path) {
        if !self.stray_is_told.swap(true, Ordering::Relaxed) {
            let path = path.display();
            tracing::warn!(
                %path,
                "ignoring a directory among the files of prepared branches: it is none of this \
                 service's; move it elsewhere"
            );
        }
    }

    fn note(&self, what: &str) -> io::Result<()> {
        self.calls.add(&format!("{} {what}", self.clock.since_epoch().as_nanos()))
    }
}

/// The id at `path`; the first instance creates it.
fn store_id(path: &Path) -> io::Result<StoreId> {
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(file) => writeln_at_once(&file, &unique::name('s'))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error),
    }
    // The first instance may not have written it yet, and never will if it was killed.
    let mut text = fs::read_to_string(path)?;
    for _ in 0..ID_LOOKS_MAX {
        if text.ends_with('\n') {
            break;
        }
        std::thread::sleep(LOCKED_PAUSE);
        text = fs::read_to_string(path)?;
    }
    let bad = "it contains no id; remove it, unless another instance is starting at this moment";
    StoreId::parse(text.trim_end()).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, bad))
}

/// Removes files that nobody will finish writing.
fn remove_unfinished(writing: &Path, clock: &Clock) -> io::Result<()> {
    for entry in fs::read_dir(writing).named("read", writing)? {
        let entry = entry.named("read", writing)?;
        let removed = entry.metadata().and_then(|about| {
            let began = about.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            match clock.since_epoch().saturating_sub(began) > WRITING_MAX {
                true => fs::remove_file(entry.path()),
                false => Ok(()),
            }
        });
        match removed {
            // It was finished meanwhile, or another instance has removed it.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).named("remove", &entry.path());
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// A branch in doubt. A file that was not written completely belongs to a branch without a vote.
fn parse(name: &str, text: &str) -> Option<InDoubt> {
    let mut parts = name.split('@');
    let id = TransactionId::parse(parts.next()?).ok()?;
    let requested_at: u64 = parts.next()?.parse().ok()?;
    let branch = Branch::parse(parts.next()?).ok()?;
    let (request_hash, deadline) = text.split_once('\n')?.0.split_once(' ')?;
    Some(InDoubt {
        key: TransactionKey {
            id,
            requested_at: Time::from_millis(requested_at.checked_mul(1000)?),
        },
        request_hash: hash_of(request_hash)?,
        branch,
        deadline: Time::from_millis(deadline.parse().ok()?),
    })
}

fn hash_of(text: &str) -> Option<RequestHash> {
    let number = u128::from_str_radix(text, 16).ok().filter(|_| text.len() == 32)?;
    Some(RequestHash(number.to_be_bytes()))
}

impl Log {
    fn open(path: PathBuf) -> Result<Self, StoreError> {
        let opened = OpenOptions::new().create(true).read(true).append(true).open(&path);
        match opened.and_then(|file| end_line(&file).map(|()| file)) {
            Ok(file) => Ok(Self { path, file }),
            Err(source) => Err(StoreError::Log { path, source: with_advice(source) }),
        }
    }

    fn add(&self, line: &str) -> io::Result<()> {
        writeln_at_once(&self.file, line).named("write to", &self.path)
    }

    /// Whether a line begins with `start`. It searches from the end, since the line is nearly
    /// always among the last.
    fn has(&self, start: &str) -> io::Result<bool> {
        self.try_has(start).named("read", &self.path)
    }

    fn try_has(&self, start: &str) -> io::Result<bool> {
        let mut file = File::open(&self.path)?;
        let mut from = file.metadata()?.len();
        // The beginning of a line whose rest is in the chunk read before.
        let mut rest = Vec::new();
        while from > 0 {
            let length = from.min(LOOK_BACK);
            from -= length;
            file.seek(SeekFrom::Start(from))?;
            let mut read = Vec::new();
            (&mut file).take(length).read_to_end(&mut read)?;
            read.append(&mut rest);
            let mut lines = read.split(|byte| *byte == b'\n');
            let first = lines.next().unwrap_or_default();
            if lines.any(|line| line.starts_with(start.as_bytes())) {
                return Ok(true);
            }
            rest = first.to_vec();
        }
        Ok(rest.starts_with(start.as_bytes()))
    }
}

/// How the line of a finished branch begins, in the log of its outcome.
fn start_of_line(call: &Finish) -> String {
    format!("{} {} ", name_of(&call.key, ' '), call.branch)
}

/// Ends the last line if a kill has torn it, which can happen at the end of a page.
fn end_line(mut file: &File) -> io::Result<()> {
    let mut last = [b'\n'];
    if file.metadata()?.len() > 0 {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
    }
    if last == [b'\n'] { Ok(()) } else { file.write_all(b"\n") }
}

/// Appends a line by one write: other processes append theirs before or after it, never within it.
fn writeln_at_once(mut file: &File, line: &str) -> io::Result<()> {
    file.write_all(format!("{line}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeSet,
        fs::{self, File},
        io, thread,
        time::{Duration, UNIX_EPOCH},
    };

    use super::{SimulatedStore, StoreError, with_advice};
    use crate::{
        error::ErrorChain,
        participant::{Finish, Prepare},
        protocol::{
            ids::{Branch, InstanceId, RequestHash, ServiceName, TransactionId, TransactionKey},
            message::{Outcome, Payload},
            time::Time,
        },
    };

    fn store(directory: &std::path::Path, instance: &str) -> SimulatedStore {
        let service = ServiceName::parse("payments").unwrap();
        SimulatedStore::open(directory, &service, &InstanceId::parse(instance).unwrap()).unwrap()
    }

    fn prepare(id: &str, instance: &str) -> Prepare {
        let id = TransactionId::parse(id).unwrap();
        let key = TransactionKey { id, requested_at: Time::from_millis(7000) };
        let branch = Branch::of(&InstanceId::parse(instance).unwrap(), 3);
        let hash = RequestHash([0xab; 16]);
        Prepare::new(key, branch, hash, Time::from_millis(9999), Payload::new("{}"))
    }

    fn finish(call: &Prepare) -> Finish {
        Finish { key: call.key.clone(), branch: call.branch.clone() }
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_time().build().unwrap().block_on(future)
    }

    fn lines(directory: &std::path::Path, name: &str) -> usize {
        fs::read_to_string(directory.join("payments").join(name)).unwrap().lines().count()
    }

    #[test]
    fn what_one_instance_prepares_another_finds_and_finishes() {
        let directory = tempfile::tempdir().unwrap();
        let (one, other) = (store(directory.path(), "i1"), store(directory.path(), "i2"));
        let (call, beside) = (prepare("a:1", "i1"), prepare("a:12", "i1"));
        one.prepare(&call).unwrap();
        one.prepare(&beside).unwrap();
        let found = other.in_doubt(Some(&call.key)).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((&found[0].key, &found[0].branch), (&call.key, &call.branch));
        assert_eq!(found[0].request_hash, call.request_hash);
        assert_eq!(found[0].deadline, call.deadline);
        assert_eq!(other.in_doubt(None).unwrap().len(), 2);
        block_on(other.finish(&finish(&call), Outcome::Committed)).unwrap();
        block_on(one.finish(&finish(&call), Outcome::Committed)).unwrap();
        block_on(one.finish(&finish(&beside), Outcome::Aborted)).unwrap();
        assert!(one.in_doubt(None).unwrap().is_empty());
        assert_eq!(lines(directory.path(), "committed.log"), 1);
        assert_eq!(lines(directory.path(), "aborted.log"), 1);
    }

    #[test]
    fn a_directory_has_one_id_and_no_two_have_the_same() {
        let (here, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let ids: BTreeSet<_> = thread::scope(|scope| {
            let opening: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| store(here.path(), "i1").id().cloned().unwrap()))
                .collect();
            opening.into_iter().map(|id| id.join().unwrap()).collect()
        });
        assert_eq!(ids.len(), 1);
        assert!(!ids.contains(store(elsewhere.path(), "i1").id().unwrap()));
        assert!(SimulatedStore::in_memory().id().is_none());
        let file = here.path().join("payments/store-id");
        fs::write(&file, "").unwrap();
        let service = ServiceName::parse("payments").unwrap();
        let error = SimulatedStore::open(here.path(), &service, &InstanceId::parse("i2").unwrap());
        let StoreError::Id { path, source } = error.unwrap_err() else { panic!("it is the id") };
        assert_eq!(path, file);
        assert!(source.to_string().contains("remove it"), "{source}");
    }

    #[test]
    fn what_a_directory_never_held_is_not_committed_there() {
        let (here, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (one, other) = (store(here.path(), "i1"), store(elsewhere.path(), "i2"));
        let call = prepare("t1", "i1");
        one.prepare(&call).unwrap();
        let error = block_on(other.finish(&finish(&call), Outcome::Committed)).unwrap_err();
        assert!(error.to_string().contains("has never held this branch"), "{error}");
        assert_eq!(other.has_committed(&finish(&call)).unwrap(), Some(false));
        // An abort of a branch that was never prepared is done.
        block_on(other.finish(&finish(&call), Outcome::Aborted)).unwrap();
        for _ in 0..2 {
            block_on(one.finish(&finish(&call), Outcome::Committed)).unwrap();
            assert_eq!(one.has_committed(&finish(&call)).unwrap(), Some(true));
        }
        let undone = prepare("t2", "i1");
        one.prepare(&undone).unwrap();
        block_on(one.finish(&finish(&undone), Outcome::Aborted)).unwrap();
        assert_eq!(one.has_committed(&finish(&undone)).unwrap(), Some(false));
    }

    #[test]
    fn a_line_is_found_wherever_it_stands_in_a_long_log() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(directory.path(), "i1");
        let called = |n: u32| Finish {
            key: prepare(&format!("t{n}"), "i1").key,
            branch: Branch::of(&InstanceId::parse("i1").unwrap(), 3),
        };
        // Several times the size that is read at once, in lines of various lengths.
        let lines: String =
            (0..20_000_u64).map(|n| format!("t{n} 7 i1.3 {} i1\n", n.pow(3))).collect();
        assert!(lines.len() > 5 * 64 * 1024);
        fs::write(directory.path().join("payments/committed.log"), &lines).unwrap();
        for n in [0, 1, 2000, 2345, 6789, 19_998, 19_999] {
            assert_eq!(store.has_committed(&called(n)).unwrap(), Some(true), "{n}");
        }
        for n in (0..20_000).step_by(997) {
            assert_eq!(store.has_committed(&called(n)).unwrap(), Some(true), "{n}");
        }
        assert_eq!(store.has_committed(&called(20_000)).unwrap(), Some(false));
        fs::write(directory.path().join("payments/committed.log"), "").unwrap();
        assert_eq!(store.has_committed(&called(1)).unwrap(), Some(false));
    }

    #[test]
    fn instances_that_finish_one_branch_at_once_do_it_once() {
        let directory = tempfile::tempdir().unwrap();
        let calls: Vec<_> = (0..200).map(|n| prepare(&format!("t{n}"), "i1")).collect();
        let one = store(directory.path(), "i1");
        calls.iter().for_each(|call| one.prepare(call).unwrap());
        thread::scope(|scope| {
            for instance in ["i1", "i2", "i3", "i4"] {
                let store = store(directory.path(), instance);
                let calls = &calls;
                scope.spawn(move || {
                    for call in calls {
                        block_on(store.finish(&finish(call), Outcome::Committed)).unwrap();
                    }
                });
            }
        });
        assert_eq!(lines(directory.path(), "committed.log"), 200);
    }

    #[test]
    fn an_instance_killed_during_a_finish_leaves_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(directory.path(), "i1");
        let (noted, added) = (prepare("t1", "i1"), prepare("t2", "i1"));
        let log = directory.path().join("payments/committed.log");
        for (call, line) in [(&noted, None), (&added, Some("t2 7 i1.3 1 i1\n"))] {
            store.prepare(call).unwrap();
            let path = directory.path().join(format!("payments/prepared/{}@7@i1.3", call.id()));
            let text = fs::read_to_string(&path).unwrap();
            fs::write(&path, format!("{text}COMMITTED\n")).unwrap();
            if let Some(line) = line {
                let before = fs::read_to_string(&log).unwrap();
                fs::write(&log, format!("{before}{line}")).unwrap();
            }
            assert_eq!(store.in_doubt(Some(&call.key)).unwrap().len(), 1);
            block_on(store.finish(&finish(call), Outcome::Committed)).unwrap();
        }
        assert_eq!(lines(directory.path(), "committed.log"), 2);
        assert!(store.in_doubt(None).unwrap().is_empty());
    }

    #[test]
    fn a_line_that_a_kill_has_torn_does_not_take_the_next_one_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let (torn, next) = (prepare("t1", "i1"), prepare("t2", "i1"));
        let before = store(directory.path(), "i1");
        [&torn, &next].into_iter().for_each(|call| before.prepare(call).unwrap());
        // It was killed while it wrote the line of t1.
        let held = directory.path().join("payments/prepared/t1@7@i1.3");
        fs::write(&held, format!("{}COMMITTED\n", fs::read_to_string(&held).unwrap())).unwrap();
        let log = directory.path().join("payments/committed.log");
        fs::write(&log, "t1 7 i1.3 17").unwrap();
        let after = store(directory.path(), "i2");
        for call in [&next, &torn] {
            block_on(after.finish(&finish(call), Outcome::Committed)).unwrap();
        }
        let text = fs::read_to_string(&log).unwrap();
        let ids: Vec<_> = text.lines().filter_map(|line| line.split(' ').next()).collect();
        assert_eq!(ids, ["t1", "t2"]);
        drop(store(directory.path(), "i3"));
        assert_eq!(fs::read_to_string(&log).unwrap(), text, "what is whole is left as it is");
    }

    #[test]
    fn an_incomplete_file_is_not_a_held_branch() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(directory.path(), "i1");
        for text in ["", "abababababababababababababababab", "x 1\n"] {
            fs::write(directory.path().join("payments/prepared/t1@7@i1.3"), text).unwrap();
            assert!(store.in_doubt(None).unwrap().is_empty(), "{text:?}");
        }
    }

    /// No instance could list what it held: each attempt ended with `Is a directory`.
    #[test]
    fn a_directory_among_the_prepared_hides_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(directory.path(), "i1");
        let call = prepare("t1", "i1");
        store.prepare(&call).unwrap();
        for name in ["lost+found", "t1@7@i1.4"] {
            fs::create_dir(directory.path().join("payments/prepared").join(name)).unwrap();
        }
        assert_eq!(store.in_doubt(None).unwrap().len(), 1);
        assert_eq!(store.in_doubt(Some(&call.key)).unwrap().len(), 1);
    }

    /// For a store that had been removed, the only message was `No such file or directory`.
    #[test]
    fn an_error_of_a_store_names_the_file_and_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let store = store(directory.path(), "i1");
        let call = prepare("t1", "i1");
        fs::remove_dir_all(directory.path().join("payments/prepared")).unwrap();
        let failures = [
            (store.prepare(&call), "failed to make", "prepared/t1@7@i1.3"),
            (store.in_doubt(None).map(drop), "failed to read", "prepared"),
        ];
        for (failure, act, file) in failures {
            let text = failure.unwrap_err().to_string();
            let path = directory.path().join("payments").join(file);
            assert!(text.starts_with(&format!("{act} `{}`: ", path.display())), "{text}");
            assert!(text.ends_with("was moved or removed: put it back"), "{text}");
        }
        let service = ServiceName::parse("payments").unwrap();
        let file = directory.path().join("payments/store-id");
        let error = SimulatedStore::open(&file, &service, &InstanceId::parse("i2").unwrap());
        let text = ErrorChain(&error.unwrap_err()).to_string();
        let path = file.join("payments/prepared");
        assert!(text.starts_with(&format!("failed to create directory `{}`: ", path.display())));
        assert!(text.ends_with("move it elsewhere"), "{text}");
    }

    #[test]
    fn a_full_disk_and_a_read_only_one_have_different_remedies() {
        for (number, advice) in
            [(28, "make room"), (30, "let this process"), (13, "let this process")]
        {
            let error = with_advice(io::Error::from_raw_os_error(number)).to_string();
            assert!(error.contains(&format!("(os error {number}); {advice}")), "{error}");
        }
    }

    #[test]
    fn the_file_of_an_instance_killed_while_preparing_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let before = store(directory.path(), "i1");
        before.prepare(&prepare("t1", "i1")).unwrap();
        let list = |name: &str| {
            let entries = fs::read_dir(directory.path().join("payments").join(name)).unwrap();
            let names = entries.map(|it| it.unwrap().file_name().into_string().unwrap());
            names.collect::<BTreeSet<_>>()
        };
        assert_eq!(list("writing"), [].into());
        let long_ago = UNIX_EPOCH + Duration::from_secs(1);
        for (name, began) in [("t2@7@i1.4", Some(long_ago)), ("t3@7@i1.5", None)] {
            let file = File::create(directory.path().join("payments/writing").join(name)).unwrap();
            began.into_iter().for_each(|began| file.set_modified(began).unwrap());
        }
        let after = store(directory.path(), "i2");
        assert_eq!(list("prepared"), ["t1@7@i1.3".to_owned()].into());
        assert_eq!(after.in_doubt(None).unwrap().len(), 1);
        assert_eq!(list("writing"), ["t3@7@i1.5".to_owned()].into(), "it may yet be finished");
    }
}
