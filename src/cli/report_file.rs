//! A file with what a command has done, written when it ends.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use serde_json::Value;

use crate::cli::{Exit, Failure};

/// The file, if one is wanted.
#[derive(Debug)]
pub(super) struct ReportFile(Option<(File, PathBuf)>);

impl ReportFile {
    /// Creates the file at `path` before the command begins its work, so that the work isn't done
    /// in vain if the report can't be written.
    pub(super) fn create(path: Option<&Path>) -> Result<Self, Failure> {
        let Some(path) = path else { return Ok(Self(None)) };
        let created = File::create(path);
        let file = created
            .with_context(|| format!("failed to create `{}`", path.display()))
            .map_err(|error| Failure::new(Exit::Usage, error))?;
        Ok(Self(Some((file, path.to_owned()))))
    }

    /// Writes the report.
    pub(super) fn write(self, report: &Value) -> Result<(), Failure> {
        let Some((file, path)) = self.0 else { return Ok(()) };
        let mut file = BufWriter::new(file);
        let written = writeln!(file, "{report:#}").and_then(|()| file.flush());
        written
            .with_context(|| format!("failed to write the report to `{}`", path.display()))
            .map_err(|error| Failure::new(Exit::Incomplete, error))
    }
}
