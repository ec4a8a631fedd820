//! `dtc run --broker`: what `dtc run` does, through RabbitMQ.
//!
//! The worker, the services and the producer are tasks of this process, and all their messages go
//! through the broker. The exchanges and queues that were declared for the run are deleted at its
//! end, also when it was interrupted, but not when it was killed.

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
        input::InputReader,
        output::{ResultDetail, ResultForm},
        pipeline::{Pipeline, RunEnd, RunOutput},
        sender::{AttemptsOf, Sender, check_sizes},
        signals, tell,
    },
    client::{Client, Settings},
    clock::Clock,
    embedded::{CallCounts, Report, ServiceReport},
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
        connection::{Broker, ConnectionError, close, counts},
        error::Disposition,
        names::{Names, Namespace},
        topology::{
            self, PrepareQueueKind, ServiceTopology, Topology,
            apply::{ApplyOptions, TopologyError, apply_until},
            delete::delete,
        },
        unique,
    },
    wire::result::Attempts,
    worker::{self, WorkerError},
};

/// How long the worker and the services may take to start.
const START: Duration = Duration::from_secs(30);

/// The time-out of a transaction: none in practice.
const NO_HURRY: Duration = Duration::from_secs(24 * 60 * 60);

/// How long to wait for begun transactions after the first signal.
const DRAIN: Duration = Duration::from_secs(25);

/// How long the worker and the services may take to stop. Each drains for 25 s at most.
const STOP_MAX: Duration = Duration::from_secs(60);

/// How long deleting the exchanges and queues may take.
const LEAVE_MAX: Duration = Duration::from_secs(20);

/// What to run.
pub(super) struct RunPlan {
    pub(super) broker: Broker,
    /// The names to use; `None`: names in a new namespace, for this run only.
    pub(super) names: Option<Names>,
    pub(super) services: Vec<ServiceSpec>,
    /// The path of their file, for messages.
    pub(super) services_file: PathBuf,
    pub(super) seed: u64,
    pub(super) max_in_flight: usize,
    pub(super) prepare_timeout: Duration,
    pub(super) counts_attempts: bool,
}

pub(super) fn run(
    plan: RunPlan,
    transactions: Transactions<InputReader>,
    printing: (ResultForm, ResultDetail),
    pipeline: &Pipeline<'_>,
) -> Result<RunOutput<Report>, Failure> {
    // From here on the first signal ends the run, not the process.
    let stop = signals::first_signal(pipeline.interrupt).shared();
    let made = pipeline.runtime.block_on(RunNamespace::make(&plan, stop.clone()));
    let namespace = made?.ok_or_else(interrupted)?;
    let interrupted = namespace.interrupted_message();
    let pipeline = Pipeline { interrupted: &interrupted, ..*pipeline };
    let ran = run_at(&plan, &namespace, transactions, printing, &pipeline, stop);
    if let Err(failure) = pipeline.runtime.block_on(namespace.leave()) {
        tell(&format!("{failure}\n"));
    }
    ran
}

fn interrupted() -> Failure {
    Failure::new(Exit::Interrupted, anyhow!("interrupted before anything was begun"))
}

fn run_at(
    plan: &RunPlan,
    namespace: &RunNamespace,
    transactions: Transactions<InputReader>,
    printing: (ResultForm, ResultDetail),
    pipeline: &Pipeline<'_>,
    stop: impl Future<Output = ()>,
) -> Result<RunOutput<Report>, Failure> {
    let in_flight_max = plan.max_in_flight;
    let client = {
        let _entered = pipeline.runtime.enter();
        let settings = Settings { in_flight_max, ..Settings::default() };
        Client::with(plan.broker.clone(), namespace.names.clone(), settings)
    };
    check_sizes(&client, &transactions)?;
    let started = pipeline.runtime.block_on(System::start(plan, namespace, stop));
    let mut system = started?.ok_or_else(interrupted)?;
    let sender = Sender {
        client: client.clone(),
        waits: true,
        in_flight_max,
        timeout: NO_HURRY,
        requested_at: None,
        clock: Clock::start(),
        bar: pipeline.bar.clone(),
        attempts: plan.counts_attempts.then(|| system.counter.attempts_of()),
        drain: Some(DRAIN),
    };
    let RunOutput { done: sent, ended } =
        pipeline.run(transactions, Some(printing), |requests, concluded, stop| {
            sender.serve(requests, concluded, stop)
        });
    pipeline.runtime.block_on(async {
        let _ = timeout(ANSWER_MAX, client.close()).await;
        // Waiting longer does not help for transactions that were given up.
        system.stop(if sent.is_given_up { ANSWER_MAX } else { STOP_MAX }).await;
    });
    tell(&(sent.before() + &sent.missing(true)));
    if let Some(failure) = sent.fatal {
        return Err(failure);
    }
    let mut report = sent.report;
    report.services = plan.services.iter().map(|spec| system.counter.report(spec)).collect();
    Ok(RunOutput { done: report, ended: RunEnd { is_incomplete: sent.n_failed > 0, ..ended } })
}

// ---- At the broker ---------------------------------------------------------------------------

/// The namespace that a run uses.
struct RunNamespace {
    broker: Broker,
    names: Names,
    /// The exchanges and queues that were declared for this run, if any.
    made: Option<Topology>,
    /// The path of services.json, for the message that names what is left behind.
    services: PathBuf,
}

impl RunNamespace {
    /// `None`: `stop` ended first, and nothing is left at the broker.
    async fn make(plan: &RunPlan, stop: impl Future<Output = ()>) -> Result<Option<Self>, Failure> {
        let (broker, services_file) = (plan.broker.clone(), plan.services_file.clone());
        if let Some(names) = plan.names.clone() {
            return Ok(Some(Self { broker, names, made: None, services: services_file }));
        }
        let namespace = Namespace::parse(&format!("dtc-run-{}", unique::name('r')))
            .map_err(|error| Failure::new(Exit::Incomplete, error))?;
        let names = Names::new(namespace);
        let services: Vec<_> = plan.services.iter().map(ServiceTopology::from).collect();
        let commands = PrepareQueueKind::at(&broker.address);
        let settings = topology::Settings { commands, ..topology::Settings::default() };
        let now = Clock::start().now();
        let options = ApplyOptions { settings, now, clock_margin: Duration::from_secs(60) };
        let topology = Topology::of(&names, &services, &settings);
        let namespace = Self { broker, names, made: Some(topology), services: services_file };
        let applied =
            apply_until(stop, &namespace.broker, &namespace.names, &services, &options).await;
        let failure = match applied {
            Ok(Some(_)) => return Ok(Some(namespace)),
            Ok(None) => None,
            // As far as is known, nothing was declared then.
            Err(TopologyError::Connect(error)) => return Err(no_connection(error)),
            Err(error) => Some(not_applied(error)),
        };
        // Deletes what was declared before the failure.
        if let Err(left) = namespace.leave().await {
            tell(&format!("{left}\n"));
        }
        failure.map_or(Ok(None), Err)
    }

    /// Deletes what was declared for this run, within [`LEAVE_MAX`].
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

    /// The message for exchanges and queues that could not be deleted.
    fn left_behind(&self) -> String {
        let namespace = self.names.namespace();
        format!("namespace `{namespace}` is left behind: `{}` deletes it", self.deletion())
    }

    /// The message at the first signal.
    fn interrupted_message(&self) -> String {
        let message =
            "interrupted: what has begun is finished within 25 s; once more to stop at once";
        match self.made {
            Some(_) => format!("{message}, and leave what `{}` deletes\n", self.deletion()),
            None => format!("{message}\n"),
        }
    }

    fn deletion(&self) -> String {
        let (namespace, services) = (self.names.namespace(), self.services.display());
        format!("dtc topology delete --namespace {namespace} --services {services} --yes")
    }
}

fn no_connection(error: ConnectionError) -> Failure {
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

/// A running worker and a running instance of each service.
struct System {
    stop: watch::Sender<bool>,
    worker: JoinHandle<Result<worker::WorkerStats, WorkerError>>,
    services: Vec<JoinHandle<Result<(), ServeError>>>,
    stop_services: watch::Sender<bool>,
    counter: Arc<CallCounter>,
}

impl System {
    /// `None`: `stop` ended first.
    async fn start(
        plan: &RunPlan,
        namespace: &RunNamespace,
        stop_start: impl Future<Output = ()>,
    ) -> Result<Option<Self>, Failure> {
        let (stop, stop_services) = (watch::Sender::new(false), watch::Sender::new(false));
        let counter = Arc::new(CallCounter::new(plan.counts_attempts));
        let services = plan.services.iter().map(|spec| {
            let inner = Simulated::new(spec, plan.seed).with_store(SimulatedStore::in_memory());
            let counted =
                CountedService { inner, service: spec.name.clone(), counter: Arc::clone(&counter) };
            let (broker, names) = (plan.broker.clone(), namespace.names.clone());
            let settings = ServeSettings {
                cap: spec.cap,
                ..ServeSettings::new(broker, names, spec.name.clone(), spec.max_concurrency)
            };
            tokio::spawn(serve(counted, settings, stopped(&stop_services)))
        });
        let services = services.collect();
        let settings = worker_settings(plan, namespace)?;
        let readiness = settings.readiness.clone();
        let worker = tokio::spawn(worker::run(settings, stopped(&stop)));
        let mut system = Self { stop, worker, services, stop_services, counter };
        let started = tokio::select! {
            biased;
            () = stop_start => Ok(None),
            started = timeout(START, system.serves(plan, namespace, &readiness)) => match started {
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

    /// Waits until the worker and all services serve. A prepare that came before its service would
    /// find no slot.
    async fn serves(
        &mut self,
        plan: &RunPlan,
        namespace: &RunNamespace,
        readiness: &Readiness,
    ) -> Result<(), Failure> {
        tokio::select! {
            () = readiness.ready() => {}
            ended = &mut self.worker => return Err(never_worked(ended)),
        }
        let connection = plan.broker.connect("start").await.map_err(no_connection)?;
        for spec in &plan.services {
            while !is_consumed(&connection, &namespace.names, &spec.name).await? {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        close(&connection).await;
        Ok(())
    }

    /// Stops everything: first the worker, which finishes what it has begun, within `limit`.
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
        // Stop the worker first: it needs the services to finish its transactions.
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

/// Ends when `stop` is set.
fn stopped(stop: &watch::Sender<bool>) -> impl Future<Output = ()> + Send + 'static {
    let mut stop = stop.subscribe();
    async move {
        // If the sender is gone, it ends too.
        let _ = stop.wait_for(|stop| *stop).await;
    }
}

fn worker_settings(plan: &RunPlan, namespace: &RunNamespace) -> Result<worker::Settings, Failure> {
    let name = WorkerId::parse(&unique::name('w'))
        .map_err(|error| Failure::new(Exit::Incomplete, error))?;
    let mut settings = worker::Settings::new(plan.broker.clone(), namespace.names.clone(), name);
    settings.coordinator.in_flight_max = plan.max_in_flight;
    settings.coordinator.prepare_timeout = plan.prepare_timeout;
    settings.coordinator.seed = unique::number();
    Ok(settings)
}

fn never_worked(
    ended: Result<Result<worker::WorkerStats, WorkerError>, tokio::task::JoinError>,
) -> Failure {
    match ended {
        Ok(Err(error)) => Failure::new(Exit::Refused, error),
        Ok(Ok(_)) => Failure::new(Exit::Incomplete, anyhow!("the worker has stopped")),
        Err(error) => Failure::new(Exit::Incomplete, error),
    }
}

// ---- What is counted -------------------------------------------------------------------------

/// Counts the calls of services, by service and by transaction.
struct CallCounter {
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
    calls: CallCounts,
    /// The transactions that the service works on or holds as prepared: they occupy its slots.
    held: BTreeSet<TransactionKey>,
    max_in_use: usize,
}

impl CallCounter {
    fn new(counts_attempts: bool) -> Self {
        Self { counts_attempts, counts: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn began(&self, service: &ServiceName, key: &TransactionKey, call: CallKind) {
        let mut counts = self.lock();
        let of_service = counts.services.entry(service.clone()).or_default();
        of_service.calls.prepare += u64::from(call == CallKind::Prepare);
        of_service.calls.commit += u64::from(call == CallKind::Commit);
        of_service.calls.abort += u64::from(call == CallKind::Abort);
        of_service.held.insert(key.clone());
        of_service.max_in_use = of_service.max_in_use.max(of_service.held.len());
        if self.counts_attempts {
            let attempts = counts.attempts.entry(key.clone()).or_default();
            let attempts = attempts.entry(service.clone()).or_default();
            attempts.prepare += u32::from(call == CallKind::Prepare);
            attempts.commit += u32::from(call == CallKind::Commit);
            attempts.abort += u32::from(call == CallKind::Abort);
        }
    }

    fn released(&self, service: &ServiceName, key: &TransactionKey) {
        if let Some(of_service) = self.lock().services.get_mut(service) {
            of_service.held.remove(key);
        }
    }

    fn attempts_of(self: &Arc<Self>) -> Arc<AttemptsOf> {
        let counter = Arc::clone(self);
        Arc::new(move |key| counter.lock().attempts.remove(key).unwrap_or_default())
    }

    fn report(&self, spec: &ServiceSpec) -> ServiceReport {
        let counts = self.lock();
        let counted = counts.services.get(&spec.name);
        ServiceReport {
            name: spec.name.clone(),
            calls: counted.map(|it| it.calls).unwrap_or_default(),
            max_in_use: counted.map_or(0, |it| u32::try_from(it.max_in_use).unwrap_or(u32::MAX)),
            max_concurrency: spec.max_concurrency,
            // Prepares wait at the broker, where nobody measures that.
            longest_wait: None,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum CallKind {
    Prepare,
    Commit,
    Abort,
}

/// A simulated service whose calls are counted.
struct CountedService {
    inner: Stored,
    service: ServiceName,
    counter: Arc<CallCounter>,
}

impl Participant for CountedService {
    async fn prepare(&self, call: Prepare) -> Result<Verdict, BoxError> {
        let key = call.key.clone();
        self.counter.began(&self.service, &key, CallKind::Prepare);
        let verdict = self.inner.prepare(call).await;
        // Whatever else the prepare ends with, the service gets a finish, which releases the slot.
        if let Ok(Verdict::Refused(_) | Verdict::ReadOnly) = verdict {
            self.counter.released(&self.service, &key);
        }
        verdict
    }

    async fn commit(&self, call: Finish) -> Result<(), BoxError> {
        let key = call.key.clone();
        self.counter.began(&self.service, &key, CallKind::Commit);
        let done = self.inner.commit(call).await;
        if done.is_ok() {
            self.counter.released(&self.service, &key);
        }
        done
    }

    async fn abort(&self, call: Finish) -> Result<(), BoxError> {
        let key = call.key.clone();
        self.counter.began(&self.service, &key, CallKind::Abort);
        let done = self.inner.abort(call).await;
        if done.is_ok() {
            self.counter.released(&self.service, &key);
        }
        done
    }
}

impl DurableParticipant for CountedService {
    async fn in_doubt(&self, of: Option<TransactionKey>) -> Result<Vec<InDoubt>, BoxError> {
        self.inner.in_doubt(of).await
    }
}
