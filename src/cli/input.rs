//! The files that commands read.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::Path,
};

use anyhow::{Context as _, anyhow};

use crate::{
    cli::{Exit, Failure},
    complaint::Complaints,
    input::services::ServiceSpec,
    transport::amqp::topology::ServiceTopology,
};

/// The reader for a file of transactions.
pub(super) type InputReader = BufReader<Box<dyn Read + Send>>;

/// The failure for an input file with errors.
pub(super) fn bad_data(complaints: Complaints) -> Failure {
    Failure::new(Exit::BadData, complaints)
}

pub(super) fn is_stdin(path: &Path) -> bool {
    path == Path::new("-")
}

/// The name of a file in complaints.
pub(super) fn name(path: &Path) -> String {
    if is_stdin(path) { "stdin".to_owned() } else { path.display().to_string() }
}

/// Opens a file, or stdin.
pub(super) fn open(path: &Path) -> Result<InputReader, Failure> {
    if is_stdin(path) {
        return Ok(BufReader::with_capacity(1 << 16, Box::new(io::stdin())));
    }
    let opened = File::open(path).with_context(|| format!("failed to open `{}`", path.display()));
    let file = opened.map_err(|error| Failure::new(Exit::BadData, error))?;
    if file.metadata().is_ok_and(|it| it.is_dir()) {
        let error = anyhow!("failed to open `{}`: it is a directory", path.display());
        return Err(Failure::new(Exit::BadData, error));
    }
    Ok(BufReader::with_capacity(1 << 16, Box::new(file)))
}

impl From<&ServiceSpec> for ServiceTopology {
    fn from(spec: &ServiceSpec) -> Self {
        Self { name: spec.name.clone(), max_wait: spec.max_wait, cap: spec.cap }
    }
}
