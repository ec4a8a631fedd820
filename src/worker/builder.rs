//! The builder of a worker in a program.

use std::time::Duration;

use crate::{
    protocol::{coordinator, ids::WorkerId},
    readiness::Readiness,
    setting::{self, InvalidSetting},
    transport::amqp::{
        options::{BrokerOptions, broker_setters},
        unique,
    },
    worker::{self, Settings, WorkerError, WorkerStats},
};

/// The largest prefetch of AMQP.
const PREFETCH_MAX: usize = u16::MAX as usize;

/// The longest prepare timeout: a day.
const PREPARE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// A worker, as `dtc worker` runs it. Any number of workers share the transactions of one system, and none
/// keeps anything that a crash could lose.
///
/// ```no_run
/// # async fn example() -> Result<(), dtc::WorkerError> {
/// let stats = dtc::Worker::builder("amqp://localhost")
///     .namespace("shop")
///     .max_in_flight(500)
///     .run_until(dtc::shutdown_signal())
///     .await?;
/// println!("{} committed, {} aborted", stats.committed, stats.aborted);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Worker {
    settings: Settings,
}

/// Sets up a [`Worker`]: see [`Worker::builder`].
#[derive(Debug)]
#[must_use = "a builder does nothing until it runs"]
pub struct WorkerBuilder {
    broker: BrokerOptions,
    name: Option<String>,
    tuning: coordinator::Settings,
    drain: Duration,
    readiness: Readiness,
}

impl Worker {
    /// A worker at the broker `url`: `amqp://user:password@host:port/vhost`, or `amqps://` for TLS;
    /// the hosts of one cluster: such URLs, separated by commas.
    pub fn builder(url: impl Into<String>) -> WorkerBuilder {
        WorkerBuilder {
            broker: BrokerOptions::new(url.into()),
            name: None,
            tuning: coordinator::Settings::new(new_name()),
            drain: Settings::DRAIN,
            readiness: Readiness::new(),
        }
    }

    /// The name of the worker.
    pub fn name(&self) -> &str {
        self.settings.worker().as_str()
    }

    /// Runs until `stop` completes, and then finishes the transactions that it has begun, for up to
    /// [`drain`](WorkerBuilder::drain). While the broker can't be reached, or the topology that `dtc
    /// topology apply` creates is missing, the worker tries again and again. Other workers get the
    /// transactions that it doesn't finish, also if the future is dropped.
    ///
    /// # Errors
    ///
    /// The broker refuses the worker, which has not worked before.
    pub async fn run_until(
        self,
        stop: impl Future<Output = ()>,
    ) -> Result<WorkerStats, WorkerError> {
        worker::run(self.settings, stop).await
    }
}

impl WorkerBuilder {
    broker_setters!();

    /// Sets the name of the worker (`[A-Za-z0-9_-]{1,64}`). No other worker of the system may have it.
    /// Default: a new name.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Sets how many transactions the worker works on at once: from 1 to 65,535. Default: 256.
    pub fn max_in_flight(mut self, max: usize) -> Self {
        self.tuning.in_flight_max = max;
        self
    }

    /// Sets how many more transactions the worker may hold that wait for a slot of a service: from
    /// 1 to 65,535. Default: 4096.
    pub fn max_waiting(mut self, max: usize) -> Self {
        self.tuning.waiting_max = max;
        self
    }

    /// Sets how long the prepares of a transaction may take that has no
    /// [`timeout`](crate::Transaction::timeout) of its own: from 1 ms to a day. Default: 5 s.
    pub fn prepare_timeout(mut self, timeout: Duration) -> Self {
        self.tuning.prepare_timeout = timeout;
        self
    }

    /// Sets how long the worker waits for the answer to a commit before it sends it again: at least
    /// 1 ms. Default: 5 s.
    pub fn finish_timeout(mut self, timeout: Duration) -> Self {
        self.tuning.finish_timeout = timeout;
        self
    }

    /// Sets how long the worker remembers a decision, to recognise a request that comes again with another
    /// timestamp. It remembers at most the last 200,000 decisions. Default: 15 min.
    pub fn window(mut self, window: Duration) -> Self {
        self.tuning.window = window;
        self
    }

    /// Sets how far any two clocks of the system may differ. It must be the same at all workers and
    /// for `dtc topology apply` (`topology.clock_margin`). Default: 60 s.
    pub fn clock_margin(mut self, margin: Duration) -> Self {
        self.tuning.clock_margin = margin;
        self
    }

    /// Sets how long the worker may continue to finish transactions after it was asked to stop.
    /// Default: 25 s.
    pub fn drain(mut self, drain: Duration) -> Self {
        self.drain = drain;
        self
    }

    /// Shows in `readiness` whether the worker takes requests. Each worker needs its own.
    pub fn readiness(mut self, readiness: &Readiness) -> Self {
        self.readiness = readiness.clone();
        self
    }

    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// A setting is invalid.
    pub fn build(self) -> Result<Worker, InvalidSetting> {
        let Self { broker, name, mut tuning, drain, readiness } = self;
        let (least, none) = (Duration::from_millis(1), Duration::ZERO);
        if let Some(name) = name {
            tuning.worker = setting::name("name", WorkerId::parse(&name))?;
        }
        setting::count("max_in_flight", tuning.in_flight_max, PREFETCH_MAX)?;
        setting::count("max_waiting", tuning.waiting_max, PREFETCH_MAX)?;
        setting::duration("prepare_timeout", tuning.prepare_timeout, least)?;
        if tuning.prepare_timeout > PREPARE_MAX {
            return Err(InvalidSetting::new("prepare_timeout", "must be at most a day"));
        }
        setting::duration("finish_timeout", tuning.finish_timeout, least)?;
        setting::duration("window", tuning.window, none)?;
        setting::duration("clock_margin", tuning.clock_margin, none)?;
        setting::duration("drain", drain, none)?;
        tuning.seed = unique::number();
        let (broker, names) = broker.check(format!("dtc worker {}", tuning.worker))?;
        Ok(Worker { settings: Settings { broker, names, coordinator: tuning, drain, readiness } })
    }

    /// Checks the settings, and [runs](Worker::run_until) the worker until `stop` completes.
    ///
    /// # Errors
    ///
    /// A setting is invalid; or the broker refuses the worker, which has not worked before.
    pub async fn run_until(
        self,
        stop: impl Future<Output = ()>,
    ) -> Result<WorkerStats, WorkerError> {
        self.build()?.run_until(stop).await
    }
}

/// A name that no other worker has.
fn new_name() -> WorkerId {
    let name = unique::name('w');
    WorkerId::parse(&name).unwrap_or_else(|_| unreachable!("{name} has letters and digits only"))
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, time::Duration};

    use super::{Worker, WorkerBuilder};
    use crate::{protocol::coordinator, readiness::Readiness};

    #[test]
    fn defaults_are_those_of_the_documentation() {
        let build = || Worker::builder("amqp://localhost").build().unwrap();
        let (one, other) = (build(), build());
        assert_ne!(one.name(), other.name());
        let settings = one.settings;
        let expected = coordinator::Settings {
            seed: settings.coordinator.seed,
            ..coordinator::Settings::new(settings.worker().clone())
        };
        assert_eq!(settings.coordinator, expected);
        assert_eq!(settings.drain, Duration::from_secs(25));
        assert_eq!(settings.broker.name, format!("dtc worker {}", settings.worker()));
    }

    #[test]
    fn an_invalid_setting_is_named_with_its_rule() {
        let refused = |change: fn(WorkerBuilder) -> WorkerBuilder| {
            change(Worker::builder("amqp://localhost")).build().unwrap_err().to_string()
        };
        assert_eq!(
            refused(|it| it.name("a worker")),
            "setting `name`: \"a worker\" must match [A-Za-z0-9_-]{1,64}"
        );
        assert_eq!(
            refused(|it| it.max_in_flight(65_536)),
            "setting `max_in_flight`: must be from 1 to 65535, not 65536"
        );
        assert_eq!(
            refused(|it| it.prepare_timeout(Duration::from_secs(86_401))),
            "setting `prepare_timeout`: must be at most a day"
        );
        assert_eq!(
            refused(|it| it.drain(Duration::MAX)),
            "setting `drain`: must be at most 36500 days"
        );
    }

    #[tokio::test]
    async fn a_worker_that_waits_for_a_broker_stops_when_asked() {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let readiness = Readiness::new();
        let worker = Worker::builder(format!("amqp://{address}")).readiness(&readiness);
        let stats = worker.run_until(tokio::time::sleep(Duration::from_millis(50))).await.unwrap();
        assert_eq!((stats, readiness.is_ready()), (super::WorkerStats::default(), false));
    }
}
