//! A whole system in this process, on a broker of the tests: workers, instances of services, and a
//! producer.
//!
//! A test that starts one must stop it: [`System::stop`] lets workers and instances finish, in this
//! order, and checks that none of them has panicked or given up, and that the services hold nothing
//! and were called no more often than needed.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]

use std::time::Duration;

use dtc::{
    Client, Transaction, TransactionResult,
    client::ClientBuilder,
    clock::Clock,
    participant::{error::ServeError, serve, settings::ServeSettings},
    protocol::{
        ids::{ServiceName, WorkerId},
        message::Cap,
    },
    transport::amqp::{
        connection::Broker,
        names::{Names, Namespace},
        topology::{
            self, ServiceTopology,
            apply::{self, apply},
        },
    },
    worker::{self, WorkerError, WorkerStats},
};
use futures_util::{StreamExt, future::join_all};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
        ConfirmSelectOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions,
        QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable, ShortString},
};
use serde_json::Value;
use tokio::{
    sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, watch},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    broker::{Place, place},
    watched::{LIMIT, RecordedService},
};

/// A service, and how it is served.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) name: &'static str,
    pub(crate) max_concurrency: u32,
    pub(crate) max_wait: Duration,
    pub(crate) cap: Cap,
    pub(crate) own_limit: bool,
    pub(crate) instances: usize,
    pub(crate) watched: RecordedService,
}

impl Served {
    /// A service with one instance. Its prepares wait for a slot as long as necessary, so that a
    /// busy machine causes no aborts.
    pub(crate) fn new(name: &'static str, max_concurrency: u32, watched: &RecordedService) -> Self {
        Self {
            name,
            max_concurrency,
            max_wait: LIMIT,
            cap: Cap::Instance,
            own_limit: true,
            instances: 1,
            watched: watched.clone(),
        }
    }

    pub(crate) fn name(&self) -> ServiceName {
        ServiceName::parse(self.name).unwrap()
    }
}

/// Systems share the machine, unless one of them needs it exclusively.
static MACHINE: RwLock<()> = RwLock::const_new(());

/// A system's right to the machine.
enum Share {
    Some { _guard: RwLockReadGuard<'static, ()> },
    All { _guard: RwLockWriteGuard<'static, ()> },
}

/// The properties of a system.
pub(crate) struct Setup {
    workers: usize,
    services: Vec<Served>,
    is_alone: bool,
    tune: Box<dyn Fn(&mut worker::Settings)>,
}

impl Setup {
    /// One worker, with long time-outs.
    pub(crate) fn new(services: impl IntoIterator<Item = Served>) -> Self {
        let services = services.into_iter().collect();
        Self { workers: 1, services, is_alone: false, tune: Box::new(|_| ()) }
    }

    /// Without another system beside it: its speed is measured.
    pub(crate) fn alone(mut self) -> Self {
        self.is_alone = true;
        self
    }

    pub(crate) fn workers(mut self, workers: usize) -> Self {
        self.workers = workers;
        self
    }

    pub(crate) fn tune(mut self, tune: impl Fn(&mut worker::Settings) + 'static) -> Self {
        self.tune = Box::new(tune);
        self
    }

    fn settings_of(&self, number: usize, broker: &Broker, names: &Names) -> worker::Settings {
        let id = WorkerId::parse(&format!("w{number}")).unwrap();
        let mut settings = worker::Settings::new(broker.clone(), names.clone(), id);
        settings.coordinator.prepare_timeout = LIMIT;
        settings.coordinator.finish_timeout = LIMIT;
        settings.coordinator.seed = number as u64;
        (self.tune)(&mut settings);
        settings
    }

    /// Declares its topology, starts everything, and returns when everything serves.
    pub(crate) async fn start(self) -> System {
        let share = match self.is_alone {
            true => Share::All { _guard: MACHINE.write().await },
            false => Share::Some { _guard: MACHINE.read().await },
        };
        let place = place();
        let address = place.url.parse().unwrap();
        let broker = Broker::new(address, "test");
        let names = Names::new(Namespace::parse(&place.namespace).unwrap());
        let clock_margin = self.settings_of(0, &broker, &names).coordinator.clock_margin;
        let options = apply::ApplyOptions {
            settings: topology::Settings::default(),
            now: Clock::start().now(),
            clock_margin,
        };
        let services: Vec<_> = self
            .services
            .iter()
            .map(|it| ServiceTopology { name: it.name(), max_wait: it.max_wait, cap: it.cap })
            .collect();
        let mut system = System {
            client: client_of(&place),
            raw: Raw::open(&place).await,
            stopping: watch::Sender::new(false),
            workers: Vec::new(),
            instances: Vec::new(),
            services: self.services.clone(),
            topology: (services, options),
            _share: share,
            broker,
            names,
            place,
        };
        system.apply_topology().await;
        for service in &self.services {
            for _ in 0..service.instances {
                system.start_instance(service);
            }
            system
                .raw
                .until_consumed(&system.names.prepare_of(&service.name()), service.instances)
                .await;
        }
        let mut starting = Vec::new();
        for number in 1..=self.workers {
            let settings = self.settings_of(number, &system.broker, &system.names);
            starting.push(settings.readiness.clone());
            system.start_worker(settings);
        }
        for readiness in starting {
            timeout(LIMIT, readiness.ready()).await.expect("a worker is ready");
        }
        system
    }
}

/// A producer without a limit of its own.
fn client_of(place: &Place) -> Client {
    let client = Client::builder(&place.url).namespace(&place.namespace);
    client.max_in_flight(100_000).connect_lazy().unwrap()
}

type Instance = JoinHandle<Result<(), ServeError>>;

/// A running system.
pub(crate) struct System {
    pub(crate) broker: Broker,
    pub(crate) names: Names,
    pub(crate) client: Client,
    pub(crate) raw: Raw,
    stopping: watch::Sender<bool>,
    workers: Vec<JoinHandle<Result<WorkerStats, WorkerError>>>,
    instances: Vec<(watch::Sender<bool>, Instance)>,
    services: Vec<Served>,
    topology: (Vec<ServiceTopology>, apply::ApplyOptions),
    place: Place,
    _share: Share,
}

impl System {
    /// Declares what is missing of the topology.
    pub(crate) async fn apply_topology(&self) {
        let (services, options) = &self.topology;
        apply(&self.broker, &self.names, services, options).await.unwrap();
    }

    fn start_worker(&mut self, settings: worker::Settings) {
        let running = worker::run(settings, stopped(&self.stopping));
        self.workers.push(tokio::spawn(running));
    }

    /// One more instance of `service`.
    pub(crate) fn start_instance(&mut self, service: &Served) {
        let settings = ServeSettings {
            cap: service.cap,
            own_limit: service.own_limit,
            finish_timeout: LIMIT,
            drain: LIMIT,
            ..ServeSettings::new(
                self.broker.clone(),
                self.names.clone(),
                service.name(),
                service.max_concurrency,
            )
        };
        let stopping = watch::Sender::new(false);
        let serving = serve::serve(service.watched.clone(), settings, stopped(&stopping));
        self.instances.push((stopping, tokio::spawn(serving)));
    }

    /// Stops all instances, and starts a new one of each service.
    pub(crate) async fn replace_instances(&mut self) {
        self.stop_instances().await;
        for service in self.services.clone() {
            self.start_instance(&service);
            self.raw.until_consumed(&self.names.prepare_of(&service.name()), 1).await;
        }
    }

    async fn stop_instances(&mut self) {
        for (stopping, _) in &self.instances {
            stopping.send_replace(true);
        }
        for (_, instance) in self.instances.drain(..) {
            let ended = timeout(LIMIT, instance).await.expect("an instance stops");
            ended.expect("an instance doesn't panic").expect("an instance doesn't give up");
        }
    }

    /// Another producer.
    pub(crate) fn another_client(&self) -> Client {
        client_of(&self.place)
    }

    /// A producer with other settings.
    pub(crate) fn client_that(&self, set: impl Fn(ClientBuilder) -> ClientBuilder) -> Client {
        let client = Client::builder(&self.place.url).namespace(&self.place.namespace);
        set(client).connect_lazy().unwrap()
    }

    /// The result of a transaction over `services`.
    pub(crate) async fn run(&self, id: &str, services: &[&str], data: Value) -> TransactionResult {
        run(&self.client, Transaction::new(id, services.iter().copied(), data)).await
    }

    /// The results of all transactions, submitted at once.
    pub(crate) async fn run_all(&self, transactions: Vec<Transaction>) -> Vec<TransactionResult> {
        join_all(transactions.into_iter().map(|transaction| run(&self.client, transaction))).await
    }

    /// Lets all processes finish; returns what each worker did.
    pub(crate) async fn stop(self) -> Vec<WorkerStats> {
        let services = self.services.clone();
        let stats = self.stop_whatever_happened().await;
        assert!(stats.iter().all(|it| it.lost == 0), "a link was lost: {stats:?}");
        for service in services {
            let book = service.watched.book();
            book.assert_nothing_is_held();
            book.assert_only_necessary_calls();
        }
        stats
    }

    /// The same for a test in which links are lost and services called again.
    pub(crate) async fn stop_whatever_happened(mut self) -> Vec<WorkerStats> {
        self.stopping.send_replace(true);
        let mut stats = Vec::new();
        for worker in self.workers.drain(..) {
            let ended = timeout(LIMIT, worker).await.expect("a worker stops");
            stats.push(ended.expect("a worker doesn't panic").expect("a worker doesn't give up"));
        }
        self.stop_instances().await;
        self.client.close().await;
        stats
    }
}

/// The result of `transaction`.
pub(crate) async fn run(client: &Client, transaction: Transaction) -> TransactionResult {
    client.submit_and_wait(transaction, LIMIT).await.unwrap()
}

fn stopped(stopping: &watch::Sender<bool>) -> impl Future<Output = ()> + Send + 'static {
    let mut stopping = stopping.subscribe();
    async move {
        // A test that fails drops the sender.
        let _ = stopping.wait_for(|stopping| *stopping).await;
    }
}

/// A connection for actions that no worker, service or producer of ours does.
pub(crate) struct Raw {
    connection: Connection,
    channel: Channel,
}

impl Raw {
    async fn open(place: &Place) -> Self {
        let properties = ConnectionProperties::default();
        let connection = Connection::connect(&place.url, properties).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self { connection, channel }
    }

    /// Publishes to a queue that must exist.
    pub(crate) async fn publish(
        &self,
        exchange: &str,
        key: &str,
        properties: BasicProperties,
        body: &[u8],
    ) {
        let options = BasicPublishOptions { mandatory: true, ..Default::default() };
        let sent =
            self.channel.basic_publish(exchange.into(), key.into(), options, body, properties);
        let confirmed = timeout(LIMIT, sent.await.unwrap()).await.unwrap().unwrap();
        assert!(matches!(confirmed, Confirmation::Ack(None)), "{exchange} {key}: {confirmed:?}");
    }

    /// Deletes an exchange.
    pub(crate) async fn delete_exchange(&self, exchange: &ShortString) {
        let options = ExchangeDeleteOptions::default();
        self.channel.exchange_delete(exchange.clone(), options).await.unwrap();
    }

    /// Deletes a queue with its messages.
    pub(crate) async fn delete_queue(&self, queue: &ShortString) {
        let options = QueueDeleteOptions::default();
        self.channel.queue_delete(queue.clone(), options).await.unwrap();
    }

    /// All messages in `queue`, from its beginning if it is a stream.
    pub(crate) async fn read(&self, queue: &ShortString) -> Reading {
        let channel = self.connection.create_channel().await.unwrap();
        channel.basic_qos(1000, BasicQosOptions::default()).await.unwrap();
        let mut arguments = FieldTable::default();
        arguments.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
        let is_stream = ["journal", "unresolved"].iter().any(|name| queue.as_str().ends_with(name));
        let arguments = if is_stream { arguments } else { FieldTable::default() };
        let options = BasicConsumeOptions::default();
        let consumer = channel.basic_consume(queue.clone(), "".into(), options, arguments);
        Reading { consumer: consumer.await.unwrap(), _channel: channel }
    }

    /// A copy of all messages to a topic exchange from now on.
    pub(crate) async fn copies(&self, exchange: &ShortString) -> Reading {
        let options = QueueDeclareOptions { exclusive: true, ..Default::default() };
        let queue = self.channel.queue_declare("".into(), options, FieldTable::default());
        let queue = queue.await.unwrap().name().clone();
        let (bind, nothing) = (QueueBindOptions::default(), FieldTable::default());
        let exchange = exchange.clone();
        self.channel.queue_bind(queue.clone(), exchange, "#".into(), bind, nothing).await.unwrap();
        self.read(&queue).await
    }

    /// How many messages are ready in `queue`, and how many consumers it has.
    pub(crate) async fn counts(&self, queue: &ShortString) -> (u32, u32) {
        let options = QueueDeclareOptions { passive: true, ..Default::default() };
        let declared = self.channel.queue_declare(queue.clone(), options, FieldTable::default());
        let declared = declared.await.unwrap();
        (declared.message_count(), declared.consumer_count())
    }

    /// The broker doesn't notify of consumers, so this polls.
    async fn until_consumed(&self, queue: &ShortString, consumers: usize) {
        self.until(queue, |(_, n)| n as usize == consumers).await;
    }

    /// The same for waiting messages.
    pub(crate) async fn until(&self, queue: &ShortString, is_so: impl Fn((u32, u32)) -> bool) {
        let asking = async {
            while !is_so(self.counts(queue).await) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        if timeout(LIMIT, asking).await.is_err() {
            panic!("waited in vain for {queue}: {:?}", self.counts(queue).await);
        }
    }
}

/// The messages read from a queue.
pub(crate) struct Reading {
    consumer: Consumer,
    _channel: Channel,
}

impl Reading {
    pub(crate) async fn next(&mut self) -> Delivery {
        let next = timeout(LIMIT, self.consumer.next()).await.expect("a message in time");
        let delivery = next.expect("the queue is there").unwrap();
        delivery.ack(BasicAckOptions::default()).await.unwrap();
        delivery
    }

    /// The items of the next message of this kind.
    pub(crate) async fn items(&mut self, kind: &str) -> Vec<Value> {
        loop {
            let delivery = self.next().await;
            if delivery.properties.kind().as_ref().is_some_and(|it| it.as_str() == kind) {
                let body: Value = serde_json::from_slice(&delivery.data).unwrap();
                return body.as_array().unwrap().clone();
            }
        }
    }
}

/// A header's text.
pub(crate) fn header(delivery: &Delivery, name: &str) -> String {
    let headers = delivery.properties.headers().as_ref().unwrap();
    match headers.inner().get(name) {
        Some(AMQPValue::LongString(text)) => String::from_utf8_lossy(text.as_bytes()).into_owned(),
        other => panic!("header {name}: {other:?}"),
    }
}

/// Figures of durations, in milliseconds with a digit behind the point.
pub(crate) fn figures(mut durations: Vec<Duration>) -> (f64, f64) {
    durations.sort();
    let at = |part: f64| {
        let index = (durations.len() as f64 * part) as usize;
        durations[index.min(durations.len() - 1)].as_secs_f64() * 1000.0
    };
    (at(0.5), at(0.99))
}
