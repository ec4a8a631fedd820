//! Looking for the services that the coordinator asks for, until they are found or known to be
//! missing; and whether anybody serves them.
//!
//! A prepare that comes back tells that no slot was free in time: of an instance that is busy, or of
//! none. The queue knows which: so it is looked at before the coordinator is told, but no more often
//! than every [`SERVED_FOR`]; and also when something isn't answered. A service that nobody serves is
//! looked at until somebody does.

use std::{
    collections::{BTreeMap, VecDeque},
    mem,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    error::ErrorChain,
    protocol::{coordinator::Event, ids::ServiceName},
    transport::amqp::{
        connection::Backoff,
        names::Names,
        queue_lookup::{QueueExistence, QueueLookup},
    },
};

/// The first pause before a service is looked for again that can't be reached, and the longest.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// The same for a service that nobody serves. An instance that comes is heard of sooner, if anybody
/// waits for it.
const UNSERVED_PAUSE_FIRST: Duration = Duration::from_secs(1);
const UNSERVED_PAUSE_MAX: Duration = Duration::from_secs(5);

/// How long it holds that a service is served.
const SERVED_FOR: Duration = Duration::from_secs(2);

/// How long a prepare that came back is kept until it is known whether its service is served, and
/// how many of a service are.
const KEPT_FOR: Duration = Duration::from_millis(500);
const KEPT_MAX: usize = 4096;

/// How long after a look a service that nobody served is looked at again because it says something:
/// an instance that is stopping says much, and takes nothing.
const HEARD_AFTER: Duration = Duration::from_millis(250);

/// Of how many services it is remembered that they are served.
const REMEMBERED_MAX: usize = 4096;

/// The services that are looked for, and what is known of those that were.
#[derive(Debug)]
pub(super) struct Searches {
    names: Names,
    lookups: QueueLookup,
    under_way: FuturesUnordered<BoxFuture<'static, (Look, ServicePresence)>>,
    services: BTreeMap<ServiceName, Sight>,
    /// How many looks were begun.
    looks: u64,
    /// What is to be told.
    ready: VecDeque<Event>,
}

/// What is known of a service.
#[derive(Debug)]
struct Sight {
    state: State,
    /// The number of the look whose answer counts.
    look: u64,
}

#[derive(Debug)]
enum State {
    /// The coordinator waits until it is found; `unavailable`: why that takes so long.
    Sought { unavailable: Option<String> },
    /// Its prepares came back, and are kept until it is known whether anybody serves it.
    Checked { kept: Vec<Event> },
    /// Somebody served it `at` that time, as far as is known. It isn't looked for.
    Served { at: Instant },
    /// Nobody did `at` that time.
    Unserved { at: Instant },
}

#[derive(Debug)]
struct Look {
    number: u64,
    service: ServiceName,
    backoff: Backoff,
}

enum ServicePresence {
    Served,
    /// It is there, and nobody takes what is sent to it.
    Unserved,
    Missing,
    /// It can't be reached now: for this reason.
    Unavailable(String),
}

impl Searches {
    pub(super) fn new(names: Names, lookups: QueueLookup) -> Self {
        Self {
            names,
            lookups,
            under_way: FuturesUnordered::new(),
            services: BTreeMap::new(),
            looks: 0,
            ready: VecDeque::new(),
        }
    }

    /// Looks for `service`, after a pause.
    pub(super) fn begin(&mut self, service: ServiceName, after: Duration) {
        let kept = self.put(&service, State::Sought { unavailable: None });
        self.ready.extend(kept);
        self.look(service, after, Backoff::new(PAUSE_FIRST, PAUSE_MAX));
    }

    /// `event` has happened. It is to be handled at once, unless a prepare came back and it is to be
    /// known first whether anybody serves its service: then it comes later.
    pub(super) fn sift(&mut self, event: Event) -> Option<Event> {
        let Event::PrepareReturned { service, .. } = &event else { return Some(event) };
        match self.services.get_mut(service).map(|sight| &mut sight.state) {
            Some(State::Sought { .. } | State::Unserved { .. }) => Some(event),
            Some(State::Served { at }) if at.elapsed() < SERVED_FOR => Some(event),
            Some(State::Checked { kept }) if kept.len() >= KEPT_MAX => Some(event),
            Some(State::Checked { kept }) => {
                kept.push(event);
                None
            }
            Some(State::Served { .. }) | None => {
                let service = service.clone();
                self.look_whether_served(service, vec![event]);
                None
            }
        }
    }

    /// Something that was sent to `service` is not answered: whether anybody serves it is to be
    /// known.
    pub(super) fn check(&mut self, service: &ServiceName) {
        match self.services.get(service).map(|sight| &sight.state) {
            Some(State::Sought { .. } | State::Checked { .. } | State::Unserved { .. }) => {}
            Some(State::Served { at }) if at.elapsed() < SERVED_FOR => {}
            Some(State::Served { .. }) | None => {
                self.look_whether_served(service.clone(), Vec::new());
            }
        }
    }

    fn look_whether_served(&mut self, service: ServiceName, kept: Vec<Event>) {
        self.put(&service, State::Checked { kept });
        let backoff = Backoff::new(UNSERVED_PAUSE_FIRST, UNSERVED_PAUSE_MAX);
        self.look(service, Duration::ZERO, backoff);
    }

    /// An instance of `service` has said something: if nobody served it, somebody may do so now.
    pub(super) fn heard(&mut self, service: &ServiceName) {
        if let Some(Sight { state: State::Unserved { at }, .. }) = self.services.get_mut(service)
            && at.elapsed() >= HEARD_AFTER
        {
            *at = Instant::now();
            let backoff = Backoff::new(UNSERVED_PAUSE_FIRST, UNSERVED_PAUSE_MAX);
            self.look(service.clone(), Duration::ZERO, backoff);
        }
    }

    /// What is to be told of a service that was looked for. One that can't be reached is looked for
    /// again, and so is one that nobody serves.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(event);
            }
            let Poll::Ready(Some((look, found))) = self.under_way.poll_next_unpin(cx) else {
                return Poll::Pending;
            };
            self.looked(look, found);
        }
    }

    /// Why `service` can't be reached, if that was found out by looking for it.
    pub(super) fn why_unavailable(&self, service: &ServiceName) -> Option<&str> {
        match &self.services.get(service)?.state {
            State::Sought { unavailable } => unavailable.as_deref(),
            State::Checked { .. } | State::Served { .. } | State::Unserved { .. } => None,
        }
    }

    /// Says goodbye.
    pub(super) async fn close(self) {
        self.lookups.close().await;
    }

    /// This is known of `service` now. What was kept until then may go on.
    fn put(&mut self, service: &ServiceName, state: State) -> Vec<Event> {
        if let Some(sight) = self.services.get_mut(service) {
            return match mem::replace(&mut sight.state, state) {
                State::Checked { kept } => kept,
                State::Sought { .. } | State::Served { .. } | State::Unserved { .. } => Vec::new(),
            };
        }
        if self.services.len() >= REMEMBERED_MAX {
            self.services.retain(|_, sight| !matches!(sight.state, State::Served { .. }));
        }
        self.services.insert(service.clone(), Sight { state, look: 0 });
        Vec::new()
    }

    /// Looks for `service` after a pause. The answers of earlier looks are void.
    fn look(&mut self, service: ServiceName, after: Duration, backoff: Backoff) {
        let Some(sight) = self.services.get_mut(&service) else { return };
        self.looks += 1;
        sight.look = self.looks;
        let limit = match sight.state {
            State::Checked { .. } => KEPT_FOR,
            State::Sought { .. } | State::Served { .. } | State::Unserved { .. } => Duration::MAX,
        };
        let look = Look { number: self.looks, service, backoff };
        let (lookups, queue) = (self.lookups.clone(), self.names.prepare_of(&look.service));
        let looking = async move {
            if !after.is_zero() {
                sleep(after).await;
            }
            let found = match timeout(limit, lookups.find(&queue)).await {
                Ok(Ok(QueueExistence::Found { consumers: 0 })) => ServicePresence::Unserved,
                Ok(Ok(QueueExistence::Found { .. })) => ServicePresence::Served,
                Ok(Ok(QueueExistence::Missing)) => ServicePresence::Missing,
                Ok(Ok(QueueExistence::Unavailable(reason))) => ServicePresence::Unavailable(reason),
                Ok(Err(error)) => ServicePresence::Unavailable(ErrorChain(&error).to_string()),
                Err(_) => {
                    ServicePresence::Unavailable("the broker did not answer in time".to_owned())
                }
            };
            (look, found)
        };
        self.under_way.push(looking.boxed());
    }

    fn looked(&mut self, look: Look, found: ServicePresence) {
        let Look { number, service, mut backoff } = look;
        let Some(sight) = self.services.get_mut(&service).filter(|it| it.look == number) else {
            return;
        };
        let at = Instant::now();
        let before = mem::replace(&mut sight.state, State::Served { at });
        match (before, found) {
            (State::Sought { .. } | State::Unserved { .. }, ServicePresence::Served) => {
                self.ready.push_back(Event::ServiceFound(service));
            }
            (State::Sought { .. } | State::Unserved { .. }, ServicePresence::Missing) => {
                self.services.remove(&service);
                self.ready.push_back(Event::ServiceMissing(service));
            }
            (State::Sought { .. }, ServicePresence::Unavailable(reason)) => {
                tracing::debug!(%service, reason, "a service can't be reached; looking again");
                sight.state = State::Sought { unavailable: Some(reason) };
                self.ready.push_back(Event::ServiceUnavailable(service.clone()));
                self.look(service, backoff.pause(), backoff);
            }
            (State::Sought { .. }, ServicePresence::Unserved) => {
                sight.state = State::Unserved { at };
                self.ready.push_back(Event::ServiceUnserved(service.clone()));
                let mut backoff = Backoff::new(UNSERVED_PAUSE_FIRST, UNSERVED_PAUSE_MAX);
                self.look(service, backoff.pause(), backoff);
            }
            (State::Checked { kept }, ServicePresence::Unserved) => {
                sight.state = State::Unserved { at };
                self.ready.push_back(Event::ServiceUnserved(service.clone()));
                self.ready.extend(kept);
                self.look(service, backoff.pause(), backoff);
            }
            // What is wrong with it otherwise, the next prepare tells.
            (
                State::Checked { kept },
                ServicePresence::Served
                | ServicePresence::Missing
                | ServicePresence::Unavailable(_),
            ) => {
                self.ready.extend(kept);
            }
            (
                State::Unserved { .. },
                ServicePresence::Unserved | ServicePresence::Unavailable(_),
            ) => {
                sight.state = State::Unserved { at };
                self.look(service, backoff.pause(), backoff);
            }
            (State::Served { at }, _) => sight.state = State::Served { at },
        }
    }
}
