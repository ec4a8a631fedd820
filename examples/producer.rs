//! A producer: submits an order to the workers, and waits for its result.
//!
//! It requires RabbitMQ with the topology, a worker, and the services `payments` and `stock`: see
//! `worker.rs` and `service/main.rs`.
//!
//! ```text
//! $ cargo run --example producer
//! order-4711: COMMITTED
//! ```
//!
//! What was not answered may have been executed all the same. A producer asks again under the same
//! key, which this one prints: then it is the same transaction, executed once.
//!
//! ```text
//! $ cargo run --example producer -- order-4711@1764497314000
//! order-4711: COMMITTED
//! ```
//!
//! `DTC__BROKER__URL` and `DTC__BROKER__NAMESPACE` say where the broker is, as for the `dtc` command.
//! A program of one's own needs the feature `client` alone.

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::{env, error::Error, process, time::Duration};

use dtc::{Client, SubmitError, Transaction, TransactionKey, WaitError};
use serde_json::json;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = env::var("DTC__BROKER__URL").unwrap_or_else(|_| "amqp://localhost".to_owned());
    let namespace = env::var("DTC__BROKER__NAMESPACE").unwrap_or_else(|_| "dtc".to_owned());
    let client = Client::builder(url).namespace(namespace).connect().await?;

    let order = |id: &str| Transaction::new(id, ["payments", "stock"], json!({"amount": 100}));
    let order = match env::args().nth(1) {
        Some(key) => {
            let TransactionKey { id, requested_at } = key.parse()?;
            order(id.as_str()).requested_at(requested_at)
        }
        None => order(&format!("order-{}", process::id())),
    };

    // What it takes to ask again, where that may help.
    let key = match client.submit_and_wait(order, Duration::from_secs(30)).await {
        Ok(result) => {
            match result.reason {
                Some(reason) => println!("{}: {}: {reason:?}", result.id, result.outcome),
                None => println!("{}: {}", result.id, result.outcome),
            }
            client.close().await;
            return Ok(());
        }
        Err(
            WaitError::Unanswered { key, .. }
            | WaitError::Submit(SubmitError::Unconfirmed { key, .. }),
        ) => key,
        Err(error) => return Err(error.into()),
    };
    client.close().await;
    Err(format!("no answer yet; ask again with `{key}`").into())
}
