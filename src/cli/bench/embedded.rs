//! Measures the embedded coordinator, in a closed loop.

use std::{sync::Arc, time::Duration};

use anyhow::anyhow;
use tokio::{sync::mpsc, time::Instant};

use crate::{
    cli::bench::{
        load::data_of,
        report::{Point, ms},
        system::{SERVICES, SLOTS},
    },
    embedded::{Concluded, Embedded, Latencies},
    participant::Service,
    protocol::message::Outcome,
    protocol::message::TransactionSpec,
    transaction::Transaction,
};

/// How long the load runs before it is measured.
const WARM_UP: Duration = Duration::from_millis(500);

/// Measures one load for one round.
pub(super) async fn measure(
    point: &mut Point,
    duration: Duration,
    data: usize,
) -> anyhow::Result<()> {
    let services = SERVICES.map(|name| Service::new(name, SLOTS));
    let embedded = Embedded::new(services)?.max_in_flight(point.in_flight);
    let (requests, intake) = mpsc::channel::<Vec<TransactionSpec>>(2);
    let (concluded, mut conclusions) = mpsc::channel::<Vec<Concluded>>(2);
    let serving = tokio::spawn(embedded.serve(intake, concluded, std::future::pending()));

    let Some(first) = Transaction::new("t", SERVICES, data_of(data)).check().ok().map(Arc::new)
    else {
        return Err(anyhow!("the data is too large"));
    };
    let mut number = 0_u64;
    let mut batch_of = |size: usize| -> anyhow::Result<Vec<TransactionSpec>> {
        let more = (0..size).map(|_| {
            number += 1;
            let id = format!("t{number}").parse()?;
            Ok(TransactionSpec { id, ..TransactionSpec::clone(&first) })
        });
        more.collect()
    };
    let begins_at = Instant::now() + WARM_UP;
    let ends_at = begins_at + duration;
    let (mut latencies, mut counted) = (Latencies::new(), 0_u64);
    requests.send(batch_of(point.in_flight)?).await?;
    while let Some(ended) = conclusions.recv().await {
        let now = Instant::now();
        if now >= ends_at {
            break;
        }
        for Concluded { answer, took, .. } in &ended {
            point.aborted += u64::from(answer.outcome == Outcome::Aborted);
            if now >= begins_at {
                counted += 1;
                latencies.record(*took);
            }
        }
        requests.send(batch_of(ended.len())?).await?;
    }
    drop(requests);
    // What is still in flight ends without being counted.
    while conclusions.recv().await.is_some() {}
    serving.await??;
    point.per_second.add(counted as f64 / duration.as_secs_f64());
    point.p50.add(ms(latencies.percentile(50.0)));
    point.p99.add(ms(latencies.percentile(99.0)));
    Ok(())
}
