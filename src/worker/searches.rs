//! Looks for the services that the coordinator asks for, until they are found or known to be missing; and
//! finds out whether a service has instances.
//!
//! A prepare comes back if no slot was free in time: because instances are busy, or because there is none.
//! The service's queue tells which, by its number of consumers. So the worker looks at the queue before it
//! reports the prepare to the coordinator, at most once every [`SERVED_FOR`]; and also when a command is
//! not answered. It looks again at a service without instances until there is one.

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

/// The pause before the worker looks again for a service that can't be reached: the first one, and the
/// longest.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// The same for a service without instances. If a transaction waits for it, the vote of a new instance
/// comes sooner.
const UNSERVED_PAUSE_FIRST: Duration = Duration::from_secs(1);
const UNSERVED_PAUSE_MAX: Duration = Duration::from_secs(5);

/// For how long a look that found instances counts.
const SERVED_FOR: Duration = Duration::from_secs(2);

/// How long to keep a prepare that came back, until it is known whether its service has instances; and
/// how many to keep for each service.
const KEPT_FOR: Duration = Duration::from_millis(500);
const KEPT_MAX: usize = 4096;

/// How soon after a look the worker looks again because a service without instances has sent something:
/// an instance that is stopping still sends messages, and takes none.
const HEARD_AFTER: Duration = Duration::from_millis(250);

/// For how many services it is remembered that they have instances.
const REMEMBERED_MAX: usize = 4096;

/// The services that the worker looks for, and what it has found.
#[derive(Debug)]
pub(super) struct Searches {
    names: Names,
    lookups: QueueLookup,
    under_way: FuturesUnordered<BoxFuture<'static, (Look, ServicePresence)>>,
    services: BTreeMap<ServiceName, KnownService>,
    /// How many looks were begun.
    looks: u64,
    /// Events for the coordinator.
    ready: VecDeque<Event>,
}

/// What is known of a service.
#[derive(Debug)]
struct KnownService {
    state: State,
    /// The number of the look whose answer counts.
    look: u64,
}

#[derive(Debug)]
enum State {
    /// The coordinator waits for it. `unavailable`: why it is not found yet.
    Sought { unavailable: Option<String> },
    /// Prepares came back, and are kept until it is known whether the service has instances.
    Checked { kept: Vec<Event> },
    /// It had an instance `at` that time, as far as is known. The worker doesn't look for it.
    Served { at: Instant },
    /// It had no instance `at` that time.
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
    /// It has a queue, and no instance consumes that.
    Unserved,
    Missing,
    /// It can't be reached, for this reason.
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

    /// Returns `event` if the coordinator may have it at once. If a prepare came back, and the worker has
    /// to find out first whether its service has instances, the event is kept and comes later.
    pub(super) fn sift(&mut self, event: Event) -> Option<Event> {
        let Event::PrepareReturned { service, .. } = &event else { return Some(event) };
        match self.services.get_mut(service).map(|known| &mut known.state) {
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

    /// A message to `service` was not answered: finds out whether the service has instances.
    pub(super) fn check(&mut self, service: &ServiceName) {
        match self.services.get(service).map(|known| &known.state) {
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

    /// An instance of `service` has sent a message: a service without instances may have one now.
    pub(super) fn heard(&mut self, service: &ServiceName) {
        if let Some(KnownService { state: State::Unserved { at }, .. }) =
            self.services.get_mut(service)
            && at.elapsed() >= HEARD_AFTER
        {
            *at = Instant::now();
            let backoff = Backoff::new(UNSERVED_PAUSE_FIRST, UNSERVED_PAUSE_MAX);
            self.look(service.clone(), Duration::ZERO, backoff);
        }
    }

    /// Ready with an event about a service, or with one that was kept.
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

    /// Why `service` can't be reached, if a look for it has shown that.
    pub(super) fn why_unavailable(&self, service: &ServiceName) -> Option<&str> {
        match &self.services.get(service)?.state {
            State::Sought { unavailable } => unavailable.as_deref(),
            State::Checked { .. } | State::Served { .. } | State::Unserved { .. } => None,
        }
    }

    pub(super) async fn close(self) {
        self.lookups.close().await;
    }

    /// Sets the state of `service`. Returns the events that were kept for it.
    fn put(&mut self, service: &ServiceName, state: State) -> Vec<Event> {
        if let Some(known) = self.services.get_mut(service) {
            return match mem::replace(&mut known.state, state) {
                State::Checked { kept } => kept,
                State::Sought { .. } | State::Served { .. } | State::Unserved { .. } => Vec::new(),
            };
        }
        if self.services.len() >= REMEMBERED_MAX {
            self.services.retain(|_, known| !matches!(known.state, State::Served { .. }));
        }
        self.services.insert(service.clone(), KnownService { state, look: 0 });
        Vec::new()
    }

    /// Looks for `service` after a pause. Answers of earlier looks don't count any more.
    fn look(&mut self, service: ServiceName, after: Duration, backoff: Backoff) {
        let Some(known) = self.services.get_mut(&service) else { return };
        self.looks += 1;
        known.look = self.looks;
        let limit = match known.state {
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
        let Some(known) = self.services.get_mut(&service).filter(|it| it.look == number) else {
            return;
        };
        let at = Instant::now();
        let before = mem::replace(&mut known.state, State::Served { at });
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
                known.state = State::Sought { unavailable: Some(reason) };
                self.ready.push_back(Event::ServiceUnavailable(service.clone()));
                self.look(service, backoff.pause(), backoff);
            }
            (State::Sought { .. }, ServicePresence::Unserved) => {
                known.state = State::Unserved { at };
                self.ready.push_back(Event::ServiceUnserved(service.clone()));
                let mut backoff = Backoff::new(UNSERVED_PAUSE_FIRST, UNSERVED_PAUSE_MAX);
                self.look(service, backoff.pause(), backoff);
            }
            (State::Checked { kept }, ServicePresence::Unserved) => {
                known.state = State::Unserved { at };
                self.ready.push_back(Event::ServiceUnserved(service.clone()));
                self.ready.extend(kept);
                self.look(service, backoff.pause(), backoff);
            }
            // If anything else is wrong with it, the next prepare will show that.
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
                known.state = State::Unserved { at };
                self.look(service, backoff.pause(), backoff);
            }
            (State::Served { at }, _) => known.state = State::Served { at },
        }
    }
}
