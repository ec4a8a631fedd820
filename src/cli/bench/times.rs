//! Measures how long a start, a drain and a takeover of a worker take.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    cli::bench::{load::Load, report::Times, system::BenchNamespace},
    protocol::request_messages::REQUESTS_MAX,
};

/// The load during the measurements.
pub(super) const IN_FLIGHT: usize = 256;

/// How long the load runs before something happens to a worker.
const STEADY: Duration = Duration::from_secs(2);

/// Runs two workers under load: stops one, starts a third in its namespace, and kills the second.
pub(super) async fn measure(namespace: &BenchNamespace, data: usize) -> anyhow::Result<Times> {
    let services = namespace.services().await?;
    let (first, second) = (namespace.worker(IN_FLIGHT).await?, namespace.worker(IN_FLIGHT).await?);
    let startup = first.started_in;
    let load = Load::start(namespace.broker(), &namespace.names, IN_FLIGHT, REQUESTS_MAX, data);
    tokio::time::sleep(STEADY).await;
    let signalled = Instant::now();
    first.stop().await?;
    let drain = signalled.elapsed();
    let third = namespace.worker(IN_FLIGHT).await?;
    tokio::time::sleep(STEADY).await;
    let killed = Instant::now();
    second.kill().await?;
    tokio::time::sleep(STEADY).await;
    let samples = load.stop().await?;
    // By now, every transaction that was in flight at the kill has ended.
    let ended = samples.iter().filter(|it| it.began <= killed && it.ended > killed);
    let takeover = ended.map(|it| it.ended - killed).max().unwrap_or_default();
    third.stop().await?;
    for service in services {
        service.stop().await?;
    }
    Ok(Times { startup, drain, takeover })
}
