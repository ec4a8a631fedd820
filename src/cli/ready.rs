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

use crate::cli::{Exit, Failure};

/// The file, if one is wanted, and the task that creates and removes it.
pub(super) struct ReadyFile(Option<(watch::Sender<bool>, JoinHandle<()>)>);

impl ReadyFile {
    /// Watches for the file at `path`, which does not exist until the process serves.
    pub(super) fn at(path: Option<&Path>, runtime: &Runtime) -> Result<Self, Failure> {
        let Some(path) = path else { return Ok(Self(None)) };
        prepare(path).map_err(|error| Failure::new(Exit::BadConfiguration, error))?;
        let serving = watch::Sender::new(false);
        let following = runtime.spawn(follow(path.to_owned(), serving.subscribe()));
        Ok(Self(Some((serving, following))))
    }

    /// The sender that reports whether the process serves.
    pub(super) fn serving(&self) -> Option<watch::Sender<bool>> {
        self.0.as_ref().map(|(serving, _)| serving.clone())
    }

    /// Removes the file, after all senders are dropped.
    pub(super) fn end(self, runtime: &Runtime) {
        let Some((serving, following)) = self.0 else { return };
        drop(serving);
        // An error means that the task has panicked; then it has ended too.
        drop(runtime.block_on(following));
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
