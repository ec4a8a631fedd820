//! The nodes themselves: what every other test here stands on.

use crate::broker::Broker;

#[test]
fn a_node_starts_and_tells_its_version() {
    let broker = Broker::start();
    println!("RabbitMQ {}", broker.version());
    assert!(broker.version().split('.').count() >= 3, "{}", broker.version());
}
