//! The settings of an instance.

use std::time::Duration;

use crate::{
    protocol::message::Cap,
    protocol::{
        ids::{InstanceId, ServiceName},
        participant,
    },
    readiness::Readiness,
    transport::amqp::{connection::Broker, names::Names, unique},
};

/// The default number of prepares in one message: more gain little.
const PREPARES_MAX: u16 = 16;

/// With fewer slots, each message contains one prepare, and the broker gives out the slots.
const MANY_SLOTS: u32 = 64;

/// The minimum number of slots for each prepare of a message.
const SLOTS_FOR_EACH: u32 = 8;

/// The settings of an instance.
#[derive(Debug, Clone)]
pub struct ServeSettings {
    /// The broker.
    pub broker: Broker,
    /// The names of its exchanges and queues.
    pub names: Names,
    /// The service.
    pub service: ServiceName,
    /// The id of this instance. **Each process needs a new one**, also after a restart: branches are
    /// named after it.
    pub instance: InstanceId,
    /// How many transactions this instance works on at once; the broker delivers no more. From 1 to
    /// 65535; a larger value has the same effect as 65535.
    pub max_concurrency: u32,
    /// Whether the cap is that of each instance or of all together. It must match the declaration of
    /// the service's queue.
    pub cap: Cap,
    /// Whether this instance enforces the cap itself too, as it should. Without that, the cap is
    /// exceeded after a lost connection, since redelivered prepares take slots again.
    pub own_limit: bool,
    /// How many prepares one message may contain, if there are 64 slots or more and the instance
    /// enforces the cap itself. A message is acknowledged when the last of its transactions is finished.
    /// So after a crash, some finished transactions are delivered again, prepared once more, and undone.
    pub prepares_max: u16,
    /// How long to wait for an outcome before the instance inquires.
    pub inquire_after: Duration,
    /// The time limit of a commit or an abort.
    pub finish_timeout: Duration,
    /// How long a stopping instance waits for the outcomes of prepared transactions.
    pub drain: Duration,
    /// Whether no other instance may serve beside this one: its store is in this process, and another
    /// instance could not finish what it holds.
    pub only_instance: bool,
    /// For development: declare the service's queues, with this `max_wait`. Otherwise `dtc topology
    /// apply` must have declared them.
    pub declare: Option<Duration>,
    /// Receives whether the instance is ready.
    pub readiness: Readiness,
}

impl ServeSettings {
    /// The defaults, for an instance with a new id.
    pub fn new(broker: Broker, names: Names, service: ServiceName, max_concurrency: u32) -> Self {
        Self {
            broker,
            names,
            service,
            instance: new_instance(None),
            max_concurrency,
            cap: Cap::default(),
            own_limit: true,
            prepares_max: PREPARES_MAX,
            inquire_after: Duration::from_secs(10),
            finish_timeout: Duration::from_secs(5),
            drain: Duration::from_secs(25),
            only_instance: false,
            declare: None,
            readiness: Readiness::new(),
        }
    }

    /// How many prepares workers may put into one message. Without `own_limit`, only the broker
    /// enforces the cap, and it counts messages.
    pub(super) fn prepares_announced(&self) -> u16 {
        if self.max_concurrency < MANY_SLOTS || !self.own_limit {
            return 1;
        }
        let share = self.max_concurrency / SLOTS_FOR_EACH;
        self.prepares_max.min(u16::try_from(share).unwrap_or(u16::MAX)).max(1)
    }

    pub(super) fn of_core(&self) -> participant::Settings {
        let max_concurrency = match self.own_limit {
            // The broker delivers no more, so more slots would never be used.
            true => self.max_concurrency.min(u16::MAX.into()),
            false => u32::MAX,
        };
        participant::Settings {
            has_store: true,
            // Each answer of `has_committed` tells whether it really does.
            remembers_commits: true,
            inquire_after: self.inquire_after,
            seed: unique::number(),
            ..participant::Settings::new(
                self.service.clone(),
                self.instance.clone(),
                max_concurrency,
            )
        }
    }
}

/// An instance id that no other process has. It begins with `label`, shortened if necessary.
pub fn new_instance(label: Option<&InstanceId>) -> InstanceId {
    let unique = unique::name('i');
    let named = label.map(|label| {
        let room = 64_usize.saturating_sub(unique.len() + 1);
        let label: String = label.as_str().chars().take(room).collect();
        format!("{label}-{unique}")
    });
    let parsed = InstanceId::parse(named.as_deref().unwrap_or(&unique));
    // Unique names contain only characters that ids may contain.
    parsed.unwrap_or_else(|_| unreachable!("a unique name is an instance id"))
}

#[cfg(test)]
mod tests {
    use super::{ServeSettings, participant::Settings};
    use crate::{
        protocol::ids::ServiceName,
        transport::amqp::{
            connection::Broker,
            names::{Names, Namespace},
        },
    };

    fn settings(max_concurrency: u32) -> ServeSettings {
        let broker = Broker::new("amqp://localhost".parse().unwrap(), "test");
        let names = Names::new(Namespace::parse("dtc").unwrap());
        let service = ServiceName::parse("payments").unwrap();
        ServeSettings::new(broker, names, service, max_concurrency)
    }

    #[test]
    fn an_instance_that_leaves_the_cap_to_the_broker_accepts_one_prepare_in_a_message() {
        assert_eq!(settings(63).prepares_announced(), 1);
        assert_eq!(settings(64).prepares_announced(), 8);
        assert_eq!(settings(1000).prepares_announced(), 16);
        let by_broker = ServeSettings { own_limit: false, ..settings(1000) };
        assert_eq!(by_broker.prepares_announced(), 1);
        let Settings { max_concurrency, .. } = by_broker.of_core();
        assert_eq!(max_concurrency, u32::MAX, "only the broker counts");
    }
}
