//! A file that exists as long as a process serves.
//!
//! Containers use it as a health check: `test -e FILE` needs no port and no other program. A file
//! that an earlier process left behind is removed at the start.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use tokio::{runtime::Runtime, sync::watch, task::JoinHandle};
use tracing::Instrument as _;

use crate::{
    cli::{Exit, Failure},
    readiness::Readiness,
};

/// The readiness of the process, and the task that creates and removes the file, if one is wanted.
pub(super) struct ReadyFile {
    readiness: Readiness,
    following: Option<JoinHandle<()>>,
}

impl ReadyFile {
    /// Watches for the file at `path`, which does not exist until the process serves.
    pub(super) fn at(path: Option<&Path>, runtime: &Runtime) -> Result<Self, Failure> {
        let readiness = Readiness::new();
        let Some(path) = path else { return Ok(Self { readiness, following: None }) };
        prepare(path).map_err(|error| Failure::new(Exit::BadConfiguration, error))?;
        let following = follow(path.to_owned(), readiness.subscribe());
        let following = runtime.spawn(following.in_current_span());
        Ok(Self { readiness, following: Some(following) })
    }

    /// The readiness that the file follows.
    pub(super) fn readiness(&self) -> Readiness {
        self.readiness.clone()
    }

    /// Removes the file, after all senders are dropped.
    pub(super) fn end(self, runtime: &Runtime) {
        drop(self.readiness);
        if let Some(following) = self.following {
            // An error means that the task has panicked; then it has ended too.
            drop(runtime.block_on(following));
        }
    }
}

/// Removes the file, and checks that it could be created.
fn prepare(path: &Path) -> anyhow::Result<()> {
    let name = path.display();
    // The parent of a bare file name is an empty path.
    let directory = match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        Some(_) => Path::new("."),
        None => return Err(anyhow!("--ready-file `{name}` can't be a file")),
    };
    if !directory.is_dir() {
        return Err(anyhow!("--ready-file `{name}`: `{}` is no directory", directory.display()));
    }
    remove(path).with_context(|| format!("failed to remove --ready-file `{name}`"))
}

/// Creates and removes the file as reported, until all senders are dropped.
async fn follow(path: PathBuf, mut serving: watch::Receiver<bool>) {
    while serving.changed().await.is_ok() {
        let serves = *serving.borrow_and_update();
        report(&path, if serves { fs::write(&path, "") } else { remove(&path) });
    }
    report(&path, remove(&path));
}

fn report(path: &Path, done: io::Result<()>) {
    if let Err(error) = done {
        tracing::error!(%error, path = %path.display(), "failed to make or remove the ready file");
    }
}

/// Removes the file if it exists.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
