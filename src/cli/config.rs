//! `dtc config`: the resulting configuration, and where each value comes from.

use std::io::{self, Write as _};

use clap::Args;

use crate::{
    cli::{Exit, Failure, broker::BrokerArguments},
    config,
};

/// Show the configuration, and where each value comes from.
///
/// The output is TOML, with passwords masked. If anything is wrong, the command names every error
/// with its key, value, source and rule, and exits with 78.
#[derive(Debug, Args)]
#[command(about = "Show the configuration, and where each value comes from")]
pub(super) struct ConfigArguments {
    /// Print all keys with their defaults and an explanation, as a start for your own file
    #[arg(long)]
    defaults: bool,
    #[command(flatten)]
    broker: BrokerArguments,
}

pub(super) fn run(arguments: &ConfigArguments) -> Result<Exit, Failure> {
    let text = if arguments.defaults {
        config::defaults().to_owned()
    } else {
        arguments.broker.load([])?.to_string()
    };
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => Ok(Exit::Done),
        // The reader closed the pipe: nothing to report.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Incomplete),
        Err(error) => Err(Failure::new(
            Exit::Incomplete,
            anyhow::Error::new(error).context("failed to print"),
        )),
    }
}
