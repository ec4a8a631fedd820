//! Transactions over two services in one process, with nothing to install.
//!
//! ```text
//! $ cargo run --example embedded
//! order-1: COMMITTED
//! order-2: ABORTED, refused by payments
//! 70 left in the account
//! ```
//!
//! A program of one's own needs the feature `embedded` alone.

#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::{
    collections::BTreeMap,
    error::Error,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dtc::{Service, Transaction, run};
use serde_json::json;

/// An account, of which a part is reserved for orders that are prepared.
struct Account(Mutex<Balance>);

struct Balance {
    left: u64,
    reserved: BTreeMap<String, u64>,
}

impl Account {
    fn with(left: u64) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Balance { left, reserved: BTreeMap::new() })))
    }

    fn lock(&self) -> MutexGuard<'_, Balance> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there was enough left.
    fn reserve(&self, order: &str, amount: u64) -> bool {
        let mut balance = self.lock();
        let Some(left) = balance.left.checked_sub(amount) else { return false };
        balance.left = left;
        balance.reserved.insert(order.to_owned(), amount);
        true
    }

    fn spend(&self, order: &str) {
        self.lock().reserved.remove(order);
    }

    fn release(&self, order: &str) {
        let mut balance = self.lock();
        balance.left += balance.reserved.remove(order).unwrap_or(0);
    }
}

/// A service that takes the amount of an order from `account`.
fn payments(account: &Arc<Account>) -> Service {
    let [prepared, committed, aborted] = [(); 3].map(|()| Arc::clone(account));
    Service::new("payments", 8)
        .prepare(move |order, data| {
            let amount = data["amount"].as_u64().ok_or("the amount is not a number")?;
            Ok(prepared.reserve(order, amount))
        })
        .commit(move |order| {
            committed.spend(order);
            Ok(())
        })
        .abort(move |order| {
            aborted.release(order);
            Ok(())
        })
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let account = Account::with(100);
    // `stock` says yes to everything: what isn't given succeeds.
    let services = [payments(&account), Service::new("stock", 1)];
    let orders = [
        Transaction::new("order-1", ["payments", "stock"], json!({"amount": 30})),
        Transaction::new("order-2", ["payments", "stock"], json!({"amount": 1000})),
    ];

    for result in run(services, orders).await? {
        print!("{}: {}", result.id, result.outcome);
        if let Some(reason) = result.reason {
            let service = reason.service.as_ref().map_or("the coordinator", |it| it.as_str());
            print!(", {} by {service}", reason.code);
        }
        println!();
    }
    println!("{} left in the account", account.lock().left);
    Ok(())
}
