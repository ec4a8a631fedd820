//! Who an instance is, and where and how it serves.

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

/// How many prepares may come in one message unless it is said otherwise: with more of them little
/// is gained.
const PREPARES_MAX: u16 = 16;

/// With fewer slots each prepare comes alone, and is the broker's to give out.
const MANY_SLOTS: u32 = 64;

/// How many slots there are at least for each prepare that comes in one message.
const SLOTS_FOR_EACH: u32 = 8;

/// Who an instance is, and where it serves.
#[derive(Debug, Clone)]
pub struct ServeSettings {
    /// The broker.
    pub broker: Broker,
    /// What everything is called there.
    pub names: Names,
    /// The service.
    pub service: ServiceName,
    /// This instance of it. **Each process takes a new one**, also when it is started again: what
    /// it prepares is named after it.
    pub instance: InstanceId,
    /// How many transactions this instance works on at once; the broker gives it no more. At least
    /// 1; no more than 65535 have an effect.
    pub max_concurrency: u32,
    /// Whether the cap counts for each instance or for all together, as the service's queue was
    /// declared.
    pub cap: Cap,
    /// Whether this instance holds the cap by itself too, as it should. Without it the cap is
    /// exceeded when a connection is lost, since what is delivered again takes slots anew.
    pub own_limit: bool,
    /// How many prepares may come in one message, where there are 64 slots or more and the instance
    /// holds the cap by itself. Such a message is acknowledged when the last of its transactions is
    /// finished, so after a crash some that were finished are delivered again: they are prepared
    /// once more, and that is undone. 1: never more than one.
    pub prepares_max: u16,
    /// How long to wait for an outcome before asking for it.
    pub inquire_after: Duration,
    /// How long a commit or an abort may take.
    pub finish_timeout: Duration,
    /// How long to wait, when told to stop, for the outcomes of what is prepared.
    pub drain: Duration,
    /// Whether no other instance may serve beside this one: what it holds is in its process alone,
    /// and none of them could finish it.
    pub only_instance: bool,
    /// For development: declare what the service needs, with this as its `max_wait`. Else whoever
    /// operates the broker has done so, by `dtc topology apply`.
    pub declare: Option<Duration>,
    /// Is told whether the instance serves.
    pub readiness: Readiness,
}

impl ServeSettings {
    /// The defaults, for an instance with a name of its own.
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

    /// How many prepares are to come in one message. What holds the cap alone is the broker, where
    /// `own_limit` is not set, and it counts messages.
    pub(super) fn prepares_announced(&self) -> u16 {
        if self.max_concurrency < MANY_SLOTS || !self.own_limit {
            return 1;
        }
        let share = self.max_concurrency / SLOTS_FOR_EACH;
        self.prepares_max.min(u16::try_from(share).unwrap_or(u16::MAX)).max(1)
    }

    pub(super) fn of_core(&self) -> participant::Settings {
        let max_concurrency = match self.own_limit {
            // The broker gives out no more, and what it doesn't give can't be counted as free.
            true => self.max_concurrency.min(u16::MAX.into()),
            false => u32::MAX,
        };
        participant::Settings {
            has_store: true,
            // Whether it does is for the store to say, when it is asked.
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

/// An instance id that no other process has; it begins with `label`, as far as there is room.
pub fn new_instance(label: Option<&InstanceId>) -> InstanceId {
    let unique = unique::name('i');
    let named = label.map(|label| {
        let room = 64_usize.saturating_sub(unique.len() + 1);
        let label: String = label.as_str().chars().take(room).collect();
        format!("{label}-{unique}")
    });
    let parsed = InstanceId::parse(named.as_deref().unwrap_or(&unique));
    // Names are made of what ids may have.
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
    fn who_leaves_the_cap_to_the_broker_asks_for_one_prepare_in_a_message() {
        assert_eq!(settings(63).prepares_announced(), 1);
        assert_eq!(settings(64).prepares_announced(), 8);
        assert_eq!(settings(1000).prepares_announced(), 16);
        let by_broker = ServeSettings { own_limit: false, ..settings(1000) };
        assert_eq!(by_broker.prepares_announced(), 1);
        let Settings { max_concurrency, .. } = by_broker.of_core();
        assert_eq!(max_concurrency, u32::MAX, "nobody else counts");
    }
}
