//! A file that is there as long as a process serves.
//!
//! It is how a container's health is asked for: `test -e FILE` needs no port, and nothing but what
//! every image has. A file that an earlier life left behind is removed at the start.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow};
use tokio::{runtime::Runtime, sync::watch, task::JoinHandle};

use crate::{
    cli::{Exit, Failure},
    readiness::Readiness,
};

/// What is to be told, and the task that makes and removes the file, if one is wanted.
pub(super) struct ReadyFile {
    readiness: Readiness,
    following: Option<JoinHandle<()>>,
}

impl ReadyFile {
    /// The file at `path`, which isn't there before something serves.
    pub(super) fn at(path: Option<&Path>, runtime: &Runtime) -> Result<Self, Failure> {
        let readiness = Readiness::new();
        let Some(path) = path else { return Ok(Self { readiness, following: None }) };
        prepare(path).map_err(|error| Failure::new(Exit::BadConfiguration, error))?;
        let following = runtime.spawn(follow(path.to_owned(), readiness.subscribe()));
        Ok(Self { readiness, following: Some(following) })
    }

    /// Who is to be told.
    pub(super) fn readiness(&self) -> Readiness {
        self.readiness.clone()
    }

    /// Removes the file, once all who could be told otherwise are gone.
    pub(super) fn end(self, runtime: &Runtime) {
        drop(self.readiness);
        if let Some(following) = self.following {
            // A task that has panicked is one that is over.
            drop(runtime.block_on(following));
        }
    }
}

/// Sees to it that the file isn't there, but could be.
fn prepare(path: &Path) -> anyhow::Result<()> {
    let name = path.display();
    // The directory of a mere name is told as an empty path.
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

/// Makes and removes the file as told, until nobody is left to tell.
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

/// Removes what may not be there.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
