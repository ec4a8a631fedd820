//! `dtc config`: what all commands would work with, and why.

use std::io::{self, Write as _};

use clap::Args;

use crate::{
    cli::{Exit, Failure, broker::BrokerArguments},
    config,
};

/// Show what is set, and where each value comes from.
///
/// It is TOML. Passwords are masked. Whatever is wrong is named, each with key, value, source and
/// rule, and ends it with 78.
#[derive(Debug, Args)]
#[command(about = "Show what is set, and where each value comes from")]
pub(super) struct ConfigArguments {
    /// Print the file of all keys with their defaults, commented, to begin one's own with
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
        // Whoever was reading has had enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Incomplete),
        Err(error) => Err(Failure::new(
            Exit::Incomplete,
            anyhow::Error::new(error).context("failed to print"),
        )),
    }
}
