//! How long a worker takes to start, to drain, and to be taken over from.

use std::time::Duration;

use tokio::time::Instant;

use crate::cli::bench::{load::Load, report::Times, system::Place};

/// The load meanwhile.
pub(super) const IN_FLIGHT: usize = 256;

/// How long there is load before something happens to a worker.
const STEADY: Duration = Duration::from_secs(2);

/// With two workers: one is told to stop, another takes its place, and then one is killed.
pub(super) async fn measure(place: &Place, data: usize) -> anyhow::Result<Times> {
    let services = place.services().await?;
    let (first, second) = (place.worker(IN_FLIGHT).await?, place.worker(IN_FLIGHT).await?);
    let startup = first.started_in;
    let load = Load::start(place.broker(), &place.names, IN_FLIGHT, data);
    tokio::time::sleep(STEADY).await;
    let told = Instant::now();
    first.stop().await?;
    let drain = told.elapsed();
    let third = place.worker(IN_FLIGHT).await?;
    tokio::time::sleep(STEADY).await;
    let killed = Instant::now();
    second.kill().await?;
    tokio::time::sleep(STEADY).await;
    let samples = load.stop().await?;
    // Those that were in flight when it happened have all ended by now.
    let ended = samples.iter().filter(|it| it.began <= killed && it.ended > killed);
    let takeover = ended.map(|it| it.ended - killed).max().unwrap_or_default();
    third.stop().await?;
    for service in services {
        service.stop().await?;
    }
    Ok(Times { startup, drain, takeover })
}
