//! Looking for the services that the coordinator asks for, until they are found or known to be missing.

use std::{
    collections::BTreeMap,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::time::sleep;

use crate::{
    error::Chain,
    protocol::{coordinator::Event, ids::ServiceName},
    transport::amqp::{
        connection::Backoff,
        lookup::{Existence, Lookups},
        names::Names,
    },
};

/// The first pause before a service is looked for again that can't be reached, and the longest.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// The services that are looked for.
#[derive(Debug)]
pub(super) struct Searches {
    names: Names,
    lookups: Lookups,
    under_way: FuturesUnordered<BoxFuture<'static, (Search, Found)>>,
    /// Why those of them can't be reached that can't.
    unavailable: BTreeMap<ServiceName, String>,
}

#[derive(Debug)]
struct Search {
    service: ServiceName,
    backoff: Backoff,
}

enum Found {
    There,
    Missing,
    /// It can't be reached now: for this reason.
    Unavailable(String),
}

impl Searches {
    pub(super) fn new(names: Names, lookups: Lookups) -> Self {
        Self { names, lookups, under_way: FuturesUnordered::new(), unavailable: BTreeMap::new() }
    }

    /// Looks for `service`, after a pause.
    pub(super) fn begin(&mut self, service: ServiceName, after: Duration) {
        let backoff = Backoff::new(PAUSE_FIRST, PAUSE_MAX);
        self.look(Search { service, backoff }, after);
    }

    fn look(&self, search: Search, after: Duration) {
        let (lookups, queue) = (self.lookups.clone(), self.names.prepare_of(&search.service));
        let looking = async move {
            if !after.is_zero() {
                sleep(after).await;
            }
            let found = match lookups.find(&queue).await {
                Ok(Existence::Found) => Found::There,
                Ok(Existence::Missing) => Found::Missing,
                Ok(Existence::Unavailable(reason)) => Found::Unavailable(reason),
                Err(error) => Found::Unavailable(Chain(&error).to_string()),
            };
            (search, found)
        };
        self.under_way.push(looking.boxed());
    }

    /// What is to be told of a service that was looked for. One that can't be reached is looked for
    /// again.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let Poll::Ready(Some((mut search, found))) = self.under_way.poll_next_unpin(cx) else {
            return Poll::Pending;
        };
        let service = search.service.clone();
        self.unavailable.remove(&service);
        Poll::Ready(match found {
            Found::There => Event::ServiceFound(service),
            Found::Missing => Event::ServiceMissing(service),
            Found::Unavailable(reason) => {
                tracing::debug!(%service, reason, "a service can't be reached; looking again");
                self.unavailable.insert(service.clone(), reason);
                let pause = search.backoff.pause();
                self.look(search, pause);
                Event::ServiceUnavailable(service)
            }
        })
    }

    /// Why `service` can't be reached, if that was found out by looking for it.
    pub(super) fn why_unavailable(&self, service: &ServiceName) -> Option<&str> {
        self.unavailable.get(service).map(String::as_str)
    }

    /// Says goodbye.
    pub(super) async fn close(self) {
        self.lookups.close().await;
    }
}
