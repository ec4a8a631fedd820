//! A worker in a program of one's own. Any number of them share the load; none keeps anything.
//!
//! It requires RabbitMQ, and the topology, which is declared once:
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

use std::{env, error::Error, time::Duration};

use dtc::{Readiness, Worker};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = env::var("DTC__BROKER__URL").unwrap_or_else(|_| "amqp://localhost".to_owned());
    let namespace = env::var("DTC__BROKER__NAMESPACE").unwrap_or_else(|_| "dtc".to_owned());

    let readiness = Readiness::new();
    let worker = Worker::builder(url)
        .namespace(namespace)
        // How much it takes on at once, and how patient it is.
        .max_in_flight(64)
        .prepare_timeout(Duration::from_secs(10))
        .readiness(&readiness);
    tokio::spawn(async move {
        readiness.ready().await;
        println!("ready");
    });
    let stats = worker.run_until(dtc::shutdown_signal()).await?;
    println!("{} committed, {} aborted", stats.committed, stats.aborted);
    Ok(())
}
