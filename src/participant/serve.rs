//! Drives one instance of a service on RabbitMQ.
//!
//! The loop receives everything that is ready, lets the core handle it, calls the service's code, and
//! then publishes everything at once: under load, votes and dones travel together, and an idle instance
//! does nothing.
//!
//! **When the connection is lost**, calls continue, and prepared transactions stay prepared. Unconfirmed
//! messages are forgotten, since the workers that wait for them ask again. The core keeps every slot in
//! use, so that redelivered prepares don't exceed the cap.

use std::{collections::VecDeque, pin::Pin, sync::Arc, time::Duration};

use futures_util::{
    FutureExt,
    future::{BoxFuture, FusedFuture},
};
use tokio::time::{Instant, sleep_until};
use tracing::Instrument as _;

use crate::{
    clock::{Clock, ClockStep, ClockStepDetector},
    error::ErrorChain,
    participant::{
        Callee, Calls, Durable, DurableParticipant,
        calls::name_of_store,
        error::{OpenError, ServeError},
        health::{Change, Health},
        outbox::InstanceOutbox,
        parked::ParkedLog,
        session::{DeliveryIds, InstanceSession, InstanceSessionError, declare, open_own},
        settings::ServeSettings,
        spans,
    },
    protocol::{
        ids::StoreId,
        participant::{self, Effect, Event, Instance},
        time::Time,
    },
    transport::amqp::{error::Disposition, supervisor::Supervisor},
};

/// Serves `participant` until `stop` ends, and then until all prepared transactions have their outcomes
/// or the time for that is over. It retries for ever to reach the broker.
///
/// # Errors
///
/// Before the instance has ever served: the broker refuses it, its queues differ from those to be
/// declared, or other instances have another store.
pub async fn serve(
    participant: impl DurableParticipant,
    settings: ServeSettings,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let span = spans::serve(&settings.service, &settings.instance);
    serve_in_span(participant, settings, stop).instrument(span).await
}

/// Does the same where the caller has entered the span.
pub(crate) async fn serve_in_span(
    participant: impl DurableParticipant,
    settings: ServeSettings,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let participant = Callee { number: 0, service: None, code: Arc::new(Durable(participant)) };
    let _held = settings.readiness.while_held();
    let mut stop = std::pin::pin!(stop.fuse());
    let store = tokio::select! {
        biased;
        () = stop.as_mut() => return Ok(()),
        id = name_of_store(Arc::clone(&participant.code), settings.finish_timeout) => id,
    };
    Server::new(participant, settings, store).run(stop).await
}

/// One instance, whether connected or not.
struct Server {
    participant: Callee,
    settings: ServeSettings,
    store: Option<StoreId>,
    clock: Clock,
    steps: ClockStepDetector,
    instance: Instance,
    retry_parked_every: Duration,
    calls: Calls,
    outbox: InstanceOutbox,
    delivery_ids: DeliveryIds,
    /// What the core has yet to handle.
    events: VecDeque<Event>,
    effects: Vec<Effect>,
    parked: ParkedLog,
    health: Health,
    /// While stopping: until when to wait for outcomes.
    drains_until: Option<Instant>,
    /// Whether a broker has ever accepted a message.
    was_heard: bool,
}

/// Why a session has ended.
enum InstanceEnd {
    Stopped,
    Lost(Box<InstanceSession>, InstanceSessionError),
}

impl Server {
    fn new(participant: Callee, settings: ServeSettings, store: Option<StoreId>) -> Self {
        let clock = Clock::start();
        let core = participant::Settings { store: store.clone(), ..settings.of_core() };
        Self {
            participant,
            store,
            clock,
            steps: ClockStepDetector::of(&clock),
            retry_parked_every: core.retry_parked_every,
            instance: Instance::new(clock.now(), core),
            calls: Calls::new(clock, settings.finish_timeout),
            outbox: InstanceOutbox::new(
                &settings.names,
                settings.service.clone(),
                settings.prepares_announced(),
            ),
            delivery_ids: DeliveryIds::default(),
            events: VecDeque::new(),
            effects: Vec::new(),
            parked: ParkedLog::default(),
            health: Health::default(),
            drains_until: None,
            was_heard: false,
            settings,
        }
    }

    async fn run(
        mut self,
        stop: Pin<&mut (impl FusedFuture<Output = ()> + ?Sized)>,
    ) -> Result<(), ServeError> {
        self.run_until_stopped(stop).await?;
        self.log_what_is_left();
        Ok(())
    }

    async fn run_until_stopped(
        &mut self,
        mut stop: Pin<&mut (impl FusedFuture<Output = ()> + ?Sized)>,
    ) -> Result<(), ServeError> {
        let mut supervisor = Supervisor::default();
        loop {
            let session = self.connect(&mut supervisor, stop.as_mut()).await?;
            let Some(session) = session else { return Ok(()) };
            supervisor.opened();
            session.log_ready(self.settings.max_concurrency);
            let ended = self.work(session, stop.as_mut()).await;
            self.settings.readiness.set(false);
            match ended {
                InstanceEnd::Stopped => return Ok(()),
                InstanceEnd::Lost(session, lost) => {
                    self.was_heard |= session.was_heard();
                    let lost = self.unless_final(lost)?;
                    let slots_used = self.instance.slots_used();
                    tracing::warn!(error = %ErrorChain(&lost), slots_used, "the session is lost; connecting again");
                    // The broker gives its deliveries to other instances. Closing may take long on a
                    // broken connection, so nothing waits for it.
                    tokio::spawn(session.close());
                    self.events.push_back(Event::Disconnected);
                    self.settle(None);
                }
            }
        }
    }

    /// A refusal to publish is final if the broker has never accepted a message of this instance.
    fn unless_final(&self, lost: InstanceSessionError) -> Result<InstanceSessionError, ServeError> {
        if self.was_heard {
            return Ok(lost);
        }
        match lost.refusal() {
            Ok(source) => {
                let name = self.settings.names.replies().to_string();
                let source = OpenError::Exchange { name, source: source.into() };
                Err(ServeError::of(self.settings.service.clone(), source))
            }
            Err(lost) => Ok(lost),
        }
    }

    // ---- Unconnected -------------------------------------------------------------------------

    /// Opens a session, however long it takes, while calls continue. Returns `None` if the instance
    /// stops, and is done before that.
    async fn connect(
        &mut self,
        supervisor: &mut Supervisor,
        mut stop: Pin<&mut (impl FusedFuture<Output = ()> + ?Sized)>,
    ) -> Result<Option<InstanceSession>, ServeError> {
        let takes_prepares = self.drains_until.is_none();
        let (settings, store) = (self.settings.clone(), self.store.clone());
        // Boxed, since the compiler can't prove otherwise that the future is `Send`.
        let mut opening: BoxFuture<'_, Result<InstanceSession, OpenError>> = Box::pin(async move {
            if supervisor.has_worked() {
                tokio::time::sleep(supervisor.pause()).await;
            }
            open(&settings, store.as_ref(), takes_prepares, supervisor).await
        });
        loop {
            self.settle(None);
            if self.is_drained() {
                return Ok(None);
            }
            let wake_at = self.wake_at(None);
            tokio::select! {
                biased;
                () = stop.as_mut(), if self.drains_until.is_none() => self.begin_drain(),
                session = &mut opening => return self.opened(session).await,
                ended = self.calls.next() => self.events.push_back(ended.event),
                () = sleep_until_some(wake_at) => {}
            }
        }
    }

    async fn opened(
        &self,
        session: Result<InstanceSession, OpenError>,
    ) -> Result<Option<InstanceSession>, ServeError> {
        let service = self.settings.service.clone();
        let mut session = session.map_err(|error| ServeError::of(service, error))?;
        // A signal to stop may have come meanwhile.
        if self.drains_until.is_some() && session.stop_prepares(self.settings.cap).await.is_err() {
            tracing::debug!("the new session is lost already");
        }
        Ok(Some(session))
    }

    /// Whether the instance is stopping, and has nothing left to do or no time left. It doesn't wait for
    /// parked outcomes: they may take days, and the next instance continues with them.
    fn is_drained(&self) -> bool {
        let Some(until) = self.drains_until else { return false };
        let awaited = self.instance.slots_used() - self.instance.slots_parked();
        let is_idle = awaited == 0 && self.calls.is_idle();
        if !is_idle && until <= Instant::now() {
            let slots_used = self.instance.slots_used();
            tracing::warn!(
                slots_used,
                "stopping with prepared transactions that have no outcome yet; other instances with \
                 this store, or the next one, will finish them"
            );
            return true;
        }
        is_idle
    }

    fn begin_drain(&mut self) {
        let parked = self.instance.slots_parked();
        tracing::info!(slots_used = self.instance.slots_used(), parked, "stopping");
        self.drains_until = Some(Instant::now() + self.settings.drain);
        self.events.push_back(Event::DrainRequested);
    }

    fn log_what_is_left(&self) {
        if let Some(transactions) = self.parked.left(&self.instance) {
            tracing::warn!(
                transactions,
                "stopping though the outcomes of some transactions could not be applied; other \
                 instances with this store, or the next one, continue with them"
            );
        }
    }

    // ---- Connected ---------------------------------------------------------------------------

    async fn work(
        &mut self,
        mut session: InstanceSession,
        mut stop: Pin<&mut (impl FusedFuture<Output = ()> + ?Sized)>,
    ) -> InstanceEnd {
        loop {
            self.settle(Some(&mut session));
            self.settings.readiness.set(session.is_ready() && self.health.is_good());
            if let Some(until) = self.drains_until.filter(|_| self.is_drained())
                && (session.is_quiet() || self.is_out_of_time())
            {
                session.finish(until).await;
                return InstanceEnd::Stopped;
            }
            let wake_at = self.wake_at(session.wake_at());
            let (delivery_ids, events) = (&mut self.delivery_ids, &mut self.events);
            let taken = tokio::select! {
                biased;
                () = stop.as_mut(), if self.drains_until.is_none() => {
                    self.begin_drain();
                    session.stop_prepares(self.settings.cap).await
                }
                taken = session.take(delivery_ids, events) => taken,
                ended = self.calls.next() => {
                    events.push_back(ended.event);
                    Ok(())
                }
                () = sleep_until_some(wake_at) => Ok(()),
            };
            if let Err(lost) = taken {
                return InstanceEnd::Lost(Box::new(session), lost);
            }
            while let Some(ended) = self.calls.try_next() {
                self.events.push_back(ended.event);
            }
        }
    }

    fn is_out_of_time(&self) -> bool {
        self.drains_until.is_some_and(|until| until <= Instant::now())
    }

    // ---- The core ----------------------------------------------------------------------------

    /// Lets the core handle all events, and performs its effects.
    fn settle(&mut self, mut session: Option<&mut InstanceSession>) {
        self.look_at_clock();
        let now = self.clock.now();
        if self.instance.next_deadline().is_some_and(|at| at <= now) {
            self.events.push_back(Event::DeadlineReached);
        }
        while let Some(event) = self.events.pop_front() {
            let mut effects = std::mem::take(&mut self.effects);
            if let Some(change) = self.health.see(&event) {
                Self::log_health(&change);
            }
            let tried = self.parked.before(&event);
            self.instance.handle(self.clock.now(), event, &mut effects);
            if let Some(tried) = tried {
                self.parked.after(tried, &self.instance, self.retry_parked_every);
            }
            for effect in effects.drain(..) {
                self.perform(effect, session.as_deref_mut());
            }
            self.effects = effects;
        }
        let Some(session) = session else { return self.outbox.clear() };
        for outbound in self.outbox.take() {
            session.publish(outbound);
        }
        session.flush();
    }

    fn log_health(change: &Change) {
        match change {
            Change::Fails(error) => tracing::warn!(
                %error,
                "several prepares in a row failed: not ready until one succeeds; fix what the error says"
            ),
            Change::Works => tracing::info!("prepares succeed again"),
        }
    }

    /// Looks for steps of the clock. If it was set back, deadlines are moved with it.
    fn look_at_clock(&mut self) {
        match self.steps.check(&self.clock) {
            Some(ClockStep::Back(by)) => {
                let by_s = by.as_secs_f64();
                tracing::warn!(by_s, "the clock was set back");
                self.instance.clock_set_back(by);
            }
            Some(ClockStep::Forward(by)) => {
                let by_s = by.as_secs_f64();
                tracing::warn!(by_s, "the clock was set forward, or the machine was suspended");
            }
            None => {}
        }
    }

    fn perform(&mut self, effect: Effect, session: Option<&mut InstanceSession>) {
        match effect {
            Effect::CallPrepare { .. }
            | Effect::CallCommit { .. }
            | Effect::CallAbort { .. }
            | Effect::ReadStore(_)
            | Effect::LookUpCommit { .. }
            | Effect::ScanStore => {
                let ended = self.calls.start(&self.participant, effect);
                self.events.extend(ended.map(|ended| ended.event));
            }
            Effect::Vote { to, vote } => self.outbox.vote(to, &vote),
            Effect::Done { done, ack, .. } if done.parked => self.outbox.settle(&done, ack),
            Effect::Done { to, done, ack } => {
                // If the done is lost, the worker sends its finish again.
                self.outbox.done(to, &done);
                if let (Some(session), Some(delivery)) = (session, ack) {
                    session.ack(delivery);
                }
            }
            Effect::Inquire(inquiry) => self.outbox.inquire(&inquiry),
            Effect::Ack(delivery) => {
                if let Some(session) = session {
                    session.ack(delivery);
                }
            }
        }
    }

    /// When the next deadline is reached.
    fn wake_at(&self, retry: Option<Instant>) -> Option<Instant> {
        let deadline = self.instance.next_deadline().map(|at: Time| self.clock.instant_of(at));
        deadline.into_iter().chain(self.drains_until).chain(retry).min()
    }
}

/// Opens a session, with any number of attempts. It gives up only if this instance has never had one, and
/// only if retrying doesn't help.
async fn open(
    settings: &ServeSettings,
    store: Option<&StoreId>,
    takes_prepares: bool,
    supervisor: &mut Supervisor,
) -> Result<InstanceSession, OpenError> {
    loop {
        let error =
            match open_once(settings, (store, supervisor.has_worked()), takes_prepares).await {
                Ok(session) => return Ok(session),
                Err(error) => error,
            };
        if supervisor.gives_up(error.disposition()) {
            return Err(error);
        }
        let pause = supervisor.pause();
        let is_for_good = error.missing().is_some() && supervisor.is_missing_for_good();
        log_retry(&error, is_for_good, pause);
        tokio::time::sleep(pause).await;
    }
}

/// Logs why there is no session. `is_for_good`: what is missing has been so for longer than a broker
/// takes to start.
fn log_retry(error: &OpenError, is_for_good: bool, pause: Duration) {
    let chain = ErrorChain(error);
    if let Some(missing) = error.missing() {
        if is_for_good {
            tracing::error!(
                error = %chain,
                "{missing} does not exist: run `dtc topology apply` for this service, or correct the \
                 namespace or the virtual host of the URL; trying again in {pause:.1?}"
            );
        } else {
            tracing::warn!(
                error = %chain,
                "{missing} does not exist yet: the broker is starting, or `dtc topology apply` has yet \
                 to be run for this service; trying again in {pause:.1?}"
            );
        }
    } else if error.is_connected() {
        tracing::warn!(
            error = %chain, "connected, but unable to serve yet; trying again in {pause:.1?}"
        );
    } else {
        tracing::warn!(error = %chain, "not connected; trying again in {pause:.1?}");
    }
}

async fn open_once(
    settings: &ServeSettings,
    store: (Option<&StoreId>, bool),
    takes_prepares: bool,
) -> Result<InstanceSession, OpenError> {
    if let Some(max_wait) = settings.declare {
        declare(settings, max_wait).await?;
    }
    let own = |link| async move {
        let own = open_own(&link, settings).await?;
        Ok((link, own))
    };
    let is_final = |error: &OpenError| error.disposition() == Disposition::GiveUp;
    let (link, own) = settings.broker.connect_pair_with(own, is_final).await?;
    InstanceSession::open(link, own, settings, store, takes_prepares).await
}

async fn sleep_until_some(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
