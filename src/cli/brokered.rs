//! `dtc run --broker`: the job of `dtc run` through a real broker.
//!
//! Worker, services and producer are tasks of this process, and everything between them goes through
//! the broker. What is made there for the run is deleted when it is over, also when it was
//! interrupted; not when it was killed.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use futures_util::FutureExt as _;
use lapin::Connection;
use tokio::{sync::watch, task::JoinHandle, time::timeout};

use crate::{
    cli::{
        Exit, Failure,
        broker::exit_of,
        input::Source,
        output::{Detail, Form},
        sender::{AttemptsOf, Sender, check_sizes},
        signals,
        stages::{Ended, Ran, Stages},
        tell,
    },
    client::{Client, Settings},
    clock::Clock,
    embedded::{Calls, Report, ServiceReport},
    input::{services::ServiceSpec, transactions::Transactions},
    participant::{
        BoxError, DurableParticipant, Finish, InDoubt, Participant, Prepare, Verdict,
        error::ServeError, serve::serve, settings::ServeSettings,
    },
    protocol::ids::{ServiceName, TransactionKey, WorkerId},
    readiness::Readiness,
    simulated::{
        service::{Simulated, Stored},
        store::SimulatedStore,
    },
    transport::amqp::{
        bounded::{ANSWER_MAX, answer},
        connection::{Broker, ConnectError, close, counts},
        error::Disposition,
        names::{Names, Namespace},
        topology::{
            self, Commands, ServiceTopology, Topology,
            apply::{Options, TopologyError, apply_until},
            delete::delete,
        },
        unique,
    },
    wire::result::Attempts,
    worker::{self, WorkerError},
};

/// How long worker and services may take until they serve.
const START: Duration = Duration::from_secs(30);

/// How long a transaction may take: as long as it takes.
const NO_HURRY: Duration = Duration::from_secs(24 * 60 * 60);

/// How long what has begun is waited for after the first signal.
const DRAIN: Duration = Duration::from_secs(25);

/// How long worker and services may take to end. Each waits for what it has begun, 25 s at most.
const STOP_MAX: Duration = Duration::from_secs(60);

/// How long it may take to delete what was made.
const LEAVE_MAX: Duration = Duration::from_secs(20);

/// What is to be run.
pub(super) struct Plan {
    pub(super) broker: Broker,
    /// What everything is called; `None`: names of our own, for this run only.
    pub(super) names: Option<Names>,
    pub(super) services: Vec<ServiceSpec>,
    /// Where they were read from.
    pub(super) services_file: PathBuf,
    pub(super) seed: u64,
    pub(super) max_in_flight: usize,
    pub(super) prepare_timeout: Duration,
    pub(super) counts_attempts: bool,
}

pub(super) fn run(
    plan: Plan,
    transactions: Transactions<Source>,
    printing: (Form, Detail),
    stages: &Stages<'_>,
) -> Result<Ran<Report>, Failure> {
    // From here on the first signal ends the run, not the process.
    let stop = signals::heard(stages.interrupt).shared();
    let made = stages.runtime.block_on(Place::make(&plan, stop.clone()));
    let place = made?.ok_or_else(interrupted)?;
    let heard = place.heard();
    let stages = Stages { heard: &heard, ..*stages };
    let ran = run_at(&plan, &place, transactions, printing, &stages, stop);
    if let Err(failure) = stages.runtime.block_on(place.leave()) {
        tell(&format!("{failure}\n"));
    }
    ran
}

fn interrupted() -> Failure {
    Failure::new(Exit::Interrupted, anyhow!("interrupted before anything was begun"))
}

fn run_at(
    plan: &Plan,
    place: &Place,
    transactions: Transactions<Source>,
    printing: (Form, Detail),
    stages: &Stages<'_>,
    stop: impl Future<Output = ()>,
) -> Result<Ran<Report>, Failure> {
    let in_flight_max = plan.max_in_flight;
    let client = {
        let _entered = stages.runtime.enter();
        let settings = Settings { in_flight_max, ..Settings::default() };
        Client::with(plan.broker.clone(), place.names.clone(), settings)
    };
    check_sizes(&client, &transactions)?;
    let started = stages.runtime.block_on(System::start(plan, place, stop));
    let mut system = started?.ok_or_else(interrupted)?;
    let sender = Sender {
        client: client.clone(),
        waits: true,
        in_flight_max,
        timeout: NO_HURRY,
        requested_at: None,
        clock: Clock::start(),
        bar: stages.bar.clone(),
        attempts: plan.counts_attempts.then(|| system.tally.attempts_of()),
        drain: Some(DRAIN),
    };
    let Ran { done: sent, ended } =
        stages.run(transactions, Some(printing), |requests, concluded, stop| {
            sender.serve(requests, concluded, stop)
        });
    stages.runtime.block_on(async {
        let _ = timeout(ANSWER_MAX, client.close()).await;
        // What was given up won't end in a little more time either.
        system.stop(if sent.is_given_up { ANSWER_MAX } else { STOP_MAX }).await;
    });
    tell(&(sent.before() + &sent.missing(true)));
    if let Some(failure) = sent.fatal {
        return Err(failure);
    }
    let mut report = sent.report;
    report.services = plan.services.iter().map(|spec| system.tally.report(spec)).collect();
    Ok(Ran { done: report, ended: Ended { is_incomplete: sent.n_failed > 0, ..ended } })
}

// ---- At the broker ---------------------------------------------------------------------------

/// The names that a run uses.
struct Place {
    broker: Broker,
    names: Names,
    /// What was made for this run only.
    made: Option<Topology>,
    /// What is to be said of that, if it stays.
    services: PathBuf,
}

impl Place {
    /// `None`: `stop` was over first, and nothing is left.
    async fn make(plan: &Plan, stop: impl Future<Output = ()>) -> Result<Option<Self>, Failure> {
        let (broker, services_file) = (plan.broker.clone(), plan.services_file.clone());
        if let Some(names) = plan.names.clone() {
            return Ok(Some(Self { broker, names, made: None, services: services_file }));
        }
        let namespace = Namespace::parse(&format!("dtc-run-{}", unique::name('r')))
            .map_err(|error| Failure::new(Exit::Incomplete, error))?;
        let names = Names::new(namespace);
        let services: Vec<_> = plan.services.iter().map(ServiceTopology::from).collect();
        let commands = Commands::at(&broker.address);
        let settings = topology::Settings { commands, ..topology::Settings::default() };
        let now = Clock::start().now();
        let options = Options { settings, now, clock_margin: Duration::from_secs(60) };
        let topology = Topology::of(&names, &services, &settings);
        let place = Self { broker, names, made: Some(topology), services: services_file };
        let applied = apply_until(stop, &place.broker, &place.names, &services, &options).await;
        let failure = match applied {
            Ok(Some(_)) => return Ok(Some(place)),
            Ok(None) => None,
            // Then nothing was made, as far as is known.
            Err(TopologyError::Connect(error)) => return Err(no_connection(error)),
            Err(error) => Some(not_applied(error)),
        };
        // As far as it came.
        if let Err(left) = place.leave().await {
            tell(&format!("{left}\n"));
        }
        failure.map_or(Ok(None), Err)
    }

    /// Deletes what was made, if the broker lets it within some time.
    async fn leave(self) -> Result<(), Failure> {
        let Some(topology) = &self.made else { return Ok(()) };
        let deleting = async {
            let connection = self.broker.connect("cleanup").await?;
            let deleted = delete(&connection, topology).await;
            close(&connection).await;
            anyhow::Ok(deleted?)
        };
        let deleted = timeout(LEAVE_MAX, deleting).await;
        deleted
            .unwrap_or_else(|_| Err(anyhow!("the broker did not delete all within {LEAVE_MAX:?}")))
            .with_context(|| self.left_behind())
            .map_err(|error| Failure::new(Exit::Incomplete, error))
    }

    /// What there is to be said of what was made, if it stays.
    fn left_behind(&self) -> String {
        let namespace = self.names.namespace();
        format!("namespace `{namespace}` is left behind: `{}` deletes it", self.deletion())
    }

    /// What is said when the first signal is heard.
    fn heard(&self) -> String {
        let heard =
            "interrupted: what has begun is finished within 25 s; once more to stop at once";
        match self.made {
            Some(_) => format!("{heard}, and leave what `{}` deletes\n", self.deletion()),
            None => format!("{heard}\n"),
        }
    }

    fn deletion(&self) -> String {
        let (namespace, services) = (self.names.namespace(), self.services.display());
        format!("dtc topology delete --namespace {namespace} --services {services} --yes")
    }
}

fn no_connection(error: ConnectError) -> Failure {
    Failure::new(exit_of(&error), error)
}

fn not_applied(error: TopologyError) -> Failure {
    let exit = match &error {
        TopologyError::Connect(error) => exit_of(error),
        TopologyError::Open(_)
        | TopologyError::Check(_)
        | TopologyError::Mismatch(_)
        | TopologyError::Unavailable(_)
        | TopologyError::Declare { .. }
        | TopologyError::Bind { .. }
        | TopologyError::Begin { .. }
        | TopologyError::NotTaken { .. } => match error.disposition() {
            Disposition::Retry => Exit::Unavailable,
            Disposition::GiveUp => Exit::Incomplete,
        },
    };
    Failure::new(exit, error)
}

// ---- Worker and services ---------------------------------------------------------------------

/// A worker and an instance of each service, at work.
struct System {
    stop: watch::Sender<bool>,
    worker: JoinHandle<Result<worker::Tally, WorkerError>>,
    services: Vec<JoinHandle<Result<(), ServeError>>>,
    stop_services: watch::Sender<bool>,
    tally: Arc<Tally>,
}

impl System {
    /// `None`: `stop` was over first.
    async fn start(
        plan: &Plan,
        place: &Place,
        stop_start: impl Future<Output = ()>,
    ) -> Result<Option<Self>, Failure> {
        let (stop, stop_services) = (watch::Sender::new(false), watch::Sender::new(false));
        let tally = Arc::new(Tally::new(plan.counts_attempts));
        let services = plan.services.iter().map(|spec| {
            let inner = Simulated::new(spec, plan.seed).with_store(SimulatedStore::in_memory());
            let counted = Counted { inner, service: spec.name.clone(), tally: Arc::clone(&tally) };
            let (broker, names) = (plan.broker.clone(), place.names.clone());
            let settings = ServeSettings {
                cap: spec.cap,
                ..ServeSettings::new(broker, names, spec.name.clone(), spec.max_concurrency)
            };
            tokio::spawn(serve(counted, settings, heard(&stop_services)))
        });
        let services = services.collect();
        let settings = worker_settings(plan, place)?;
        let readiness = settings.readiness.clone();
        let worker = tokio::spawn(worker::run(settings, heard(&stop)));
        let mut system = Self { stop, worker, services, stop_services, tally };
        let started = tokio::select! {
            biased;
            () = stop_start => Ok(None),
            started = timeout(START, system.serves(plan, place, &readiness)) => match started {
                Ok(served) => served.map(Some),
                Err(_) => {
                    let error = anyhow!("worker and services did not serve within {START:?}");
                    Err(Failure::new(Exit::Unavailable, error))
                }
            },
        };
        match started {
            Ok(Some(())) => Ok(Some(system)),
            Ok(None) => {
                system.abort();
                Ok(None)
            }
            Err(failure) => {
                system.stop(ANSWER_MAX).await;
                Err(failure)
            }
        }
    }

    /// Is over when all serve. A prepare that comes before its service may find no slot.
    async fn serves(
        &mut self,
        plan: &Plan,
        place: &Place,
        readiness: &Readiness,
    ) -> Result<(), Failure> {
        tokio::select! {
            () = readiness.ready() => {}
            ended = &mut self.worker => return Err(never_worked(ended)),
        }
        let connection = plan.broker.connect("start").await.map_err(no_connection)?;
        for spec in &plan.services {
            while !is_consumed(&connection, &place.names, &spec.name).await? {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        close(&connection).await;
        Ok(())
    }

    /// Ends all: what the worker has begun is finished first, if that takes no longer than `limit`.
    async fn stop(&mut self, limit: Duration) {
        if timeout(limit, self.drain()).await.is_err() {
            self.abort();
        }
    }

    fn abort(&self) {
        self.worker.abort();
        self.services.iter().for_each(JoinHandle::abort);
    }

    async fn drain(&mut self) {
        // What the worker finishes, services must be there for.
        self.stop.send_replace(true);
        if !self.worker.is_finished() {
            let _ = (&mut self.worker).await;
        }
        self.stop_services.send_replace(true);
        for service in &mut self.services {
            if let Ok(Err(error)) = service.await {
                tell(&format!("{:#}\n", anyhow::Error::new(error)));
            }
        }
    }
}

async fn is_consumed(
    connection: &Connection,
    names: &Names,
    service: &ServiceName,
) -> Result<bool, Failure> {
    let queue = names.prepare_of(service);
    match answer(ANSWER_MAX, counts(connection, queue.clone())).await {
        Ok(Some(found)) => Ok(found.consumers > 0),
        Ok(None) => {
            let error = anyhow!("there is no queue `{queue}`: is `dtc topology apply` done?");
            Err(Failure::new(Exit::BadConfiguration, error))
        }
        Err(error) => {
            let exit = match error.disposition() {
                Disposition::Retry => Exit::Unavailable,
                Disposition::GiveUp => Exit::Refused,
            };
            let error = anyhow::Error::new(error).context(format!("queue `{queue}` can't be used"));
            Err(Failure::new(exit, error))
        }
    }
}

/// Is over when `stop` says so.
fn heard(stop: &watch::Sender<bool>) -> impl Future<Output = ()> + Send + 'static {
    let mut stop = stop.subscribe();
    async move {
        // Who could say so is gone: then it is over too.
        let _ = stop.wait_for(|stop| *stop).await;
    }
}

fn worker_settings(plan: &Plan, place: &Place) -> Result<worker::Settings, Failure> {
    let name = WorkerId::parse(&unique::name('w'))
        .map_err(|error| Failure::new(Exit::Incomplete, error))?;
    let mut settings = worker::Settings::new(plan.broker.clone(), place.names.clone(), name);
    settings.coordinator.in_flight_max = plan.max_in_flight;
    settings.coordinator.prepare_timeout = plan.prepare_timeout;
    settings.coordinator.seed = unique::number();
    Ok(settings)
}

fn never_worked(
    ended: Result<Result<worker::Tally, WorkerError>, tokio::task::JoinError>,
) -> Failure {
    match ended {
        Ok(Err(error)) => Failure::new(Exit::Refused, error),
        Ok(Ok(_)) => Failure::new(Exit::Incomplete, anyhow!("the worker has stopped")),
        Err(error) => Failure::new(Exit::Incomplete, error),
    }
}

// ---- What is counted -------------------------------------------------------------------------

/// What was called, at which service and for which transaction.
struct Tally {
    counts_attempts: bool,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    services: BTreeMap<ServiceName, ServiceCounts>,
    attempts: BTreeMap<TransactionKey, BTreeMap<ServiceName, Attempts>>,
}

#[derive(Default)]
struct ServiceCounts {
    calls: Calls,
    /// What the service works on, or holds as prepared: what takes its slots.
    held: BTreeSet<TransactionKey>,
    max_in_use: usize,
}

impl Tally {
    fn new(counts_attempts: bool) -> Self {
        Self { counts_attempts, counts: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn began(&self, service: &ServiceName, key: &TransactionKey, call: Call) {
        let mut counts = self.lock();
        let of_service = counts.services.entry(service.clone()).or_default();
        of_service.calls.prepare += u64::from(call == Call::Prepare);
        of_service.calls.commit += u64::from(call == Call::Commit);
        of_service.calls.abort += u64::from(call == Call::Abort);
        of_service.held.insert(key.clone());
        of_service.max_in_use = of_service.max_in_use.max(of_service.held.len());
        if self.counts_attempts {
            let attempts = counts.attempts.entry(key.clone()).or_default();
            let attempts = attempts.entry(service.clone()).or_default();
            attempts.prepare += u32::from(call == Call::Prepare);
            attempts.commit += u32::from(call == Call::Commit);
            attempts.abort += u32::from(call == Call::Abort);
        }
    }

    fn released(&self, service: &ServiceName, key: &TransactionKey) {
        if let Some(of_service) = self.lock().services.get_mut(service) {
            of_service.held.remove(key);
        }
    }

    fn attempts_of(self: &Arc<Self>) -> Arc<AttemptsOf> {
        let tally = Arc::clone(self);
        Arc::new(move |key| tally.lock().attempts.remove(key).unwrap_or_default())
    }

    fn report(&self, spec: &ServiceSpec) -> ServiceReport {
        let counts = self.lock();
        let counted = counts.services.get(&spec.name);
        ServiceReport {
            name: spec.name.clone(),
            calls: counted.map(|it| it.calls).unwrap_or_default(),
            max_in_use: counted.map_or(0, |it| u32::try_from(it.max_in_use).unwrap_or(u32::MAX)),
            max_concurrency: spec.max_concurrency,
            // They wait at the broker.
            longest_wait: None,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    Prepare,
    Commit,
    Abort,
}

/// A simulated service whose calls are counted.
struct Counted {
    inner: Stored,
    service: ServiceName,
    tally: Arc<Tally>,
}

impl Participant for Counted {
    async fn prepare(&self, call: Prepare) -> Result<Verdict, BoxError> {
        let key = call.key.clone();
        self.tally.began(&self.service, &key, Call::Prepare);
        let verdict = self.inner.prepare(call).await;
        // Whatever else comes of it, the service is told to finish.
        if let Ok(Verdict::Refused(_) | Verdict::ReadOnly) = verdict {
            self.tally.released(&self.service, &key);
        }
        verdict
    }

    async fn commit(&self, call: Finish) -> Result<(), BoxError> {
        let key = call.key.clone();
        self.tally.began(&self.service, &key, Call::Commit);
        let done = self.inner.commit(call).await;
        if done.is_ok() {
            self.tally.released(&self.service, &key);
        }
        done
    }

    async fn abort(&self, call: Finish) -> Result<(), BoxError> {
        let key = call.key.clone();
        self.tally.began(&self.service, &key, Call::Abort);
        let done = self.inner.abort(call).await;
        if done.is_ok() {
            self.tally.released(&self.service, &key);
        }
        done
    }
}

impl DurableParticipant for Counted {
    async fn in_doubt(&self, of: Option<TransactionKey>) -> Result<Vec<InDoubt>, BoxError> {
        self.inner.in_doubt(of).await
    }
}
