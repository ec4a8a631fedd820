//! A worker in a program of one's own. Any number of them share the load; none keeps anything.
//!
//! It wants RabbitMQ, and the topology, which is declared once:
//!
//! ```text
//! $ cargo run -- topology apply
//! $ cargo run --example worker
//! ready
//! ```
//!
//! Ctrl-C lets it finish what it has begun.
//!
//! `DTC__BROKER__URL` and `DTC__BROKER__NAMESPACE` say where the broker is, as for the `dtc` command.
//! A program of one's own needs the feature `worker` alone.

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::{env, error::Error, process};

use dtc::{
    Broker, Names, Namespace,
    protocol::ids::WorkerId,
    worker::{self, Settings},
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = env::var("DTC__BROKER__URL").unwrap_or_else(|_| "amqp://localhost".to_owned());
    let namespace = env::var("DTC__BROKER__NAMESPACE").unwrap_or_else(|_| "dtc".to_owned());

    // No other worker may have its name.
    let name = format!("example-{}", process::id());
    let broker = Broker::new(url.parse()?, &name);
    let names = Names::new(Namespace::parse(&namespace)?);
    let mut settings = Settings::new(broker, names, WorkerId::parse(&name)?);
    // How patient it is, and how much it takes on at once.
    settings.coordinator.in_flight_max = 64;

    let readiness = settings.readiness.clone();
    tokio::spawn(async move {
        readiness.ready().await;
        println!("ready");
    });
    let tally = worker::run(settings, dtc::shutdown_signal()).await?;
    println!("{} committed, {} aborted", tally.committed, tally.aborted);
    Ok(())
}
