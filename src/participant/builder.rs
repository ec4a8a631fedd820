//! Setting up an instance of a service.

use std::{fmt, time::Duration};

use crate::{
    participant::{
        DurableParticipant,
        error::ServeError,
        serve::serve,
        settings::{ServeSettings, new_instance},
    },
    protocol::{
        ids::{InstanceId, ServiceName},
        message::Cap,
    },
    readiness::Readiness,
    setting::{self, InvalidSetting},
    transport::amqp::options::{BrokerOptions, broker_setters},
};

/// The broker counts unacknowledged deliveries in 16 bits.
const SLOTS_MAX: usize = u16::MAX as usize;

/// The default number of slots.
const SLOTS: u32 = 10;

/// Sets up an instance of the service `name` (`[A-Za-z0-9_-]{1,64}`), whose code is `participant`, at
/// the broker `url`: `amqp://user:password@host:port/vhost`, or `amqps://` for TLS. For a cluster, give
/// one such URL for each host, separated by commas.
///
/// A service may have any number of instances, each usually in a process of its own. All of them share
/// one store.
///
/// ```no_run
/// # use dtc::{BoxError, DurableParticipant, Finish, InDoubt, Participant, Prepare, TransactionKey};
/// # use dtc::Verdict;
/// # struct Payments;
/// # impl Participant for Payments {
/// #     async fn prepare(&self, _: Prepare) -> Result<Verdict, BoxError> { Ok(Verdict::Prepared) }
/// #     async fn commit(&self, _: Finish) -> Result<(), BoxError> { Ok(()) }
/// # }
/// # impl DurableParticipant for Payments {
/// #     async fn in_doubt(&self, _: Option<TransactionKey>) -> Result<Vec<InDoubt>, BoxError> {
/// #         Ok(Vec::new())
/// #     }
/// # }
/// # async fn example(payments: Payments) -> Result<(), dtc::ServeError> {
/// dtc::service("amqp://localhost", "payments", payments)
///     .namespace("shop")
///     .max_concurrency(50)
///     .serve_until(dtc::shutdown_signal())
///     .await?;
/// # Ok(())
/// # }
/// ```
pub fn service<P: DurableParticipant>(
    url: impl Into<String>,
    name: impl Into<String>,
    participant: P,
) -> ServiceBuilder<P> {
    ServiceBuilder {
        broker: BrokerOptions::new(url.into()),
        name: name.into(),
        participant,
        max_concurrency: SLOTS,
        instance: None,
        cap: Cap::default(),
        max_batch: None,
        inquire_after: None,
        finish_timeout: None,
        drain: None,
        declare: None,
        readiness: Readiness::new(),
    }
}

/// Sets up an instance of a service: see [`service`].
#[must_use = "a builder does nothing until `serve_until` is called"]
pub struct ServiceBuilder<P> {
    broker: BrokerOptions,
    name: String,
    participant: P,
    max_concurrency: u32,
    instance: Option<String>,
    cap: Cap,
    max_batch: Option<u16>,
    inquire_after: Option<Duration>,
    finish_timeout: Option<Duration>,
    drain: Option<Duration>,
    declare: Option<Duration>,
    readiness: Readiness,
}

impl<P: DurableParticipant> ServiceBuilder<P> {
    broker_setters!();

    /// Sets how many transactions this instance works on at once, each from its prepare to the end
    /// of its commit or abort: from 1 to 65,535. The broker delivers no more. Default: 10.
    pub fn max_concurrency(mut self, max: u32) -> Self {
        self.max_concurrency = max;
        self
    }

    /// Sets the first part of the instance's id (`[A-Za-z0-9_-]{1,64}`). The rest is unique, since the
    /// branches that the instance prepares are named after it. Default: no first part.
    pub fn instance(mut self, label: impl Into<String>) -> Self {
        self.instance = Some(label.into());
        self
    }

    /// Sets whether each instance has [`max_concurrency`](Self::max_concurrency) slots, or all
    /// instances of the service together. It must match the declaration of the service's queue.
    /// Default: each instance.
    pub fn cap(mut self, cap: Cap) -> Self {
        self.cap = cap;
        self
    }

    /// Sets how many prepares one message may contain, if the instance has 64 slots or more: at least 1.
    /// The instance acknowledges a message when the last of its transactions is finished. So after a
    /// crash, some finished transactions are prepared once more, and that is undone. Default: 16.
    pub fn max_batch(mut self, max: u16) -> Self {
        self.max_batch = Some(max);
        self
    }

    /// Sets how long the instance waits for an outcome before it asks the workers: at least 1 ms.
    /// Default: 10 s.
    pub fn inquire_after(mut self, after: Duration) -> Self {
        self.inquire_after = Some(after);
        self
    }

    /// Sets the time limit of a commit or abort, after which it has failed and is called again: at
    /// least 1 ms. Default: 5 s.
    pub fn finish_timeout(mut self, timeout: Duration) -> Self {
        self.finish_timeout = Some(timeout);
        self
    }

    /// Sets how long a stopping instance waits for the outcomes of prepared transactions. Default:
    /// 25 s.
    pub fn drain(mut self, drain: Duration) -> Self {
        self.drain = Some(drain);
        self
    }

    /// For development: declares the service's queues, where a prepare waits up to `max_wait` for a
    /// slot. Default: declares nothing; `dtc topology apply` does.
    pub fn declare(mut self, max_wait: Duration) -> Self {
        self.declare = Some(max_wait);
        self
    }

    /// Reports to `readiness` whether the instance is ready. Each instance needs its own.
    pub fn readiness(mut self, readiness: &Readiness) -> Self {
        self.readiness = readiness.clone();
        self
    }

    /// Serves until `stop` ends, and then until all prepared transactions have their outcomes, but no
    /// longer than [`drain`](Self::drain). It waits for a broker that can't be reached, and for the
    /// topology that `dtc topology apply` creates.
    ///
    /// Logs, through `tracing`, are in a span with the fields `service` and `instance`; the calls of
    /// `participant` are in an inner span that also has `transaction`.
    ///
    /// # Errors
    ///
    /// A setting is invalid. Or, before the instance has ever served: the broker refuses it, its queues
    /// differ from those to be declared, or other instances have another store.
    pub async fn serve_until(self, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
        let settings = self.settings()?;
        serve(self.participant, settings, stop).await
    }

    fn settings(&self) -> Result<ServeSettings, InvalidSetting> {
        let (least, none) = (Duration::from_millis(1), Duration::ZERO);
        let service = setting::name("name", ServiceName::parse(&self.name))?;
        let label = self.instance.as_deref().map(InstanceId::parse).transpose();
        let instance = new_instance(setting::name("instance", label)?.as_ref());
        setting::count("max_concurrency", self.max_concurrency as usize, SLOTS_MAX)?;
        if self.max_batch == Some(0) {
            return Err(InvalidSetting::new("max_batch", "must be at least 1, not 0"));
        }
        let name = format!("dtc service {service} {instance}");
        let (broker, names) = self.broker.check(name)?;
        let defaults = ServeSettings::new(broker, names, service, self.max_concurrency);
        let within = |setting, value: Option<Duration>, default, min| {
            setting::duration(setting, value.unwrap_or(default), min)
        };
        Ok(ServeSettings {
            instance,
            cap: self.cap,
            prepares_max: self.max_batch.unwrap_or(defaults.prepares_max),
            inquire_after: within(
                "inquire_after",
                self.inquire_after,
                defaults.inquire_after,
                least,
            )?,
            finish_timeout: within(
                "finish_timeout",
                self.finish_timeout,
                defaults.finish_timeout,
                least,
            )?,
            drain: within("drain", self.drain, defaults.drain, none)?,
            declare: self
                .declare
                .map(|max_wait| setting::duration("declare", max_wait, none))
                .transpose()?,
            readiness: self.readiness.clone(),
            ..defaults
        })
    }
}

impl<P> fmt::Debug for ServiceBuilder<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServiceBuilder")
            .field("name", &self.name)
            .field("max_concurrency", &self.max_concurrency)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{ServiceBuilder, service};
    use crate::{
        participant::{
            BoxError, DurableParticipant, Finish, InDoubt, Participant, Prepare, Verdict,
            error::ServeError,
        },
        protocol::ids::TransactionKey,
    };

    struct Idle;

    impl Participant for Idle {
        async fn prepare(&self, _: Prepare) -> Result<Verdict, BoxError> {
            Ok(Verdict::ReadOnly)
        }

        async fn commit(&self, _: Finish) -> Result<(), BoxError> {
            Ok(())
        }
    }

    impl DurableParticipant for Idle {
        async fn in_doubt(&self, _: Option<TransactionKey>) -> Result<Vec<InDoubt>, BoxError> {
            Ok(Vec::new())
        }
    }

    fn idle(name: &str) -> ServiceBuilder<Idle> {
        service("amqp://localhost", name, Idle)
    }

    #[test]
    fn the_defaults_are_those_of_the_documentation() {
        let (one, other) =
            (idle("payments").settings().unwrap(), idle("payments").settings().unwrap());
        assert_ne!(one.instance, other.instance);
        assert_eq!((one.max_concurrency, one.prepares_max), (10, 16));
        let times = [one.inquire_after, one.finish_timeout, one.drain];
        assert_eq!(times.map(|time| time.as_secs()), [10, 5, 25]);
        assert_eq!(one.declare, None);
        let labelled = idle("payments").instance("blue").settings().unwrap();
        assert!(labelled.instance.as_str().starts_with("blue-"), "{}", labelled.instance);
    }

    #[tokio::test]
    async fn an_invalid_setting_is_named_with_its_rule() {
        let refused = |builder: ServiceBuilder<Idle>| builder.settings().unwrap_err().to_string();
        assert_eq!(refused(idle("a.b")), "setting `name`: \"a.b\" must match [A-Za-z0-9_-]{1,64}");
        assert_eq!(
            refused(idle("a").max_concurrency(0)),
            "setting `max_concurrency`: must be from 1 to 65535, not 0"
        );
        assert_eq!(
            refused(idle("a").max_batch(0)),
            "setting `max_batch`: must be at least 1, not 0"
        );
        assert_eq!(
            refused(idle("a").inquire_after(Duration::ZERO)),
            "setting `inquire_after`: must be at least 1ms, not 0ns"
        );
        let error = idle("a").instance("b c").serve_until(std::future::pending()).await;
        assert!(matches!(&error, Err(ServeError::Invalid(it)) if it.setting() == "instance"));
    }
}
