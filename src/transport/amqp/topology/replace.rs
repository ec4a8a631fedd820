//! Replacing a service's queues by new ones with other arguments.
//!
//! The service is never unknown meanwhile: while a queue is replaced, another one takes its
//! messages and passes them on.
//!
//! * **Prepares** in a classic queue may be replaced while instances run. The broker cancels their
//!   consumers, and they consume the new queue. (It does not cancel those of a quorum queue, on
//!   3.10 at least, so nobody may consume one.) Waiting prepares are moved, and their wait starts
//!   over. What an instance holds stays with it. If this process dies midway, a lost prepare does
//!   no harm: its worker's deadline passes.
//! * **Finishes** that any instance may apply must not be lost, even if this process dies. They
//!   wait in a durable queue, and each is confirmed by the next queue before it leaves the previous
//!   one. A finish that an instance is just applying can't be moved, so nobody may consume the
//!   queue. A repeated replacement picks up what was left.
//!
//! A queue that is as it should be is not replaced.

use lapin::{
    BasicProperties, Confirmation,
    message::BasicGetMessage,
    options::{
        BasicAckOptions, BasicGetOptions, BasicPublishOptions, QueueDeclareOptions,
        QueueDeleteOptions,
    },
    types::{FieldTable, ShortString},
};

use crate::{
    protocol::ids::ServiceName,
    transport::amqp::{
        bounded::{ANSWER_MAX, AlarmListener, AskError, answer},
        connection::{BrokerConnection, PublishChannel},
        error::Disposition,
        names::Names,
        topology::{
            Binding, Queue, QueueKind, ServiceTopology, Settings,
            apply::{Declarer, TopologyError},
            finding::{Fault, Finding},
            probe::{Presence, Prober},
        },
    },
};

/// The result of a replacement.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReplaceReport {
    /// The queues that were declared again.
    pub queues: Vec<String>,
    /// How many prepares were moved.
    pub prepares: u64,
    /// How many finishes were moved.
    pub finishes: u64,
}

/// A service's queues were not replaced, or only some. A repeated replacement does the rest.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReplaceError {
    /// The queue of finishes that any instance may apply has consumers.
    #[error("queue `{queue}` has {consumers} consumers: stop the instances of `{service}` first")]
    Consumed {
        /// The queue.
        queue: String,
        /// How many consumers it has.
        consumers: u32,
        /// The service.
        service: ServiceName,
    },
    /// The new queue was not declared or bound.
    #[error(transparent)]
    Declare(#[from] TopologyError),
    /// A step failed midway.
    #[error("failed to {step} queue `{queue}`")]
    Step {
        /// The step.
        step: &'static str,
        /// Its queue.
        queue: String,
        /// The cause.
        #[source]
        source: AskError,
    },
    /// No queue took a message. It is still where it was.
    #[error("a message of queue `{queue}` was not taken by its next queue")]
    NotTaken {
        /// The queue that it is in.
        queue: String,
    },
}

impl ReplaceError {
    /// Whether to try again.
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Consumed { .. } => Disposition::GiveUp,
            Self::Declare(error) => error.disposition(),
            Self::Step { source, .. } => source.disposition(),
            Self::NotTaken { .. } => Disposition::Retry,
        }
    }
}

/// Declares the queues of `service` as they should be, without losing messages.
///
/// # Errors
///
/// They are not, or not all of them. No message is lost, and a repeated replacement does the rest.
pub async fn replace(
    connection: &BrokerConnection,
    names: &Names,
    service: &ServiceTopology,
    settings: &Settings,
) -> Result<ReplaceReport, ReplaceError> {
    let (finish, prepare) = service.queues(names, settings);
    let key = format!("*.{}", service.name);
    let mut replacement = Replacement {
        connection,
        alarms: AlarmListener::of(connection),
        channel: confirming(connection, &prepare.name).await?,
        declarer: Declarer::on(connection).await?,
        replaced: ReplaceReport::default(),
    };
    let binding = Binding {
        exchange: names.finish_any(),
        queue: finish.name.clone(),
        key: key.as_str().into(),
    };
    replacement
        .replace_finish_queue(&finish, &binding, names.moving(&service.name), &service.name)
        .await?;
    let binding = Binding {
        exchange: names.prepare(),
        queue: prepare.name.clone(),
        key: key.as_str().into(),
    };
    replacement.replace_prepare_queue(&prepare, &binding, &service.name).await?;
    Ok(replacement.replaced)
}

async fn confirming(
    connection: &BrokerConnection,
    queue: &ShortString,
) -> Result<PublishChannel, ReplaceError> {
    let opened = PublishChannel::open(connection).await;
    opened.map_err(step("open a channel for", queue))
}

fn step(step: &'static str, queue: &ShortString) -> impl FnOnce(AskError) -> ReplaceError {
    let queue = queue.to_string();
    move |source| ReplaceError::Step { step, queue, source }
}

struct Replacement<'a> {
    connection: &'a BrokerConnection,
    alarms: AlarmListener,
    channel: PublishChannel,
    declarer: Declarer,
    replaced: ReplaceReport,
}

impl Replacement<'_> {
    /// The differences of `queue`.
    async fn found(&self, queue: &Queue) -> Result<Vec<Finding>, ReplaceError> {
        let found = Prober::on(self.connection).queue(queue).await;
        found.map_err(step("look at", &queue.name))
    }

    async fn replace_prepare_queue(
        &mut self,
        queue: &Queue,
        binding: &Binding,
        service: &ServiceName,
    ) -> Result<(), ReplaceError> {
        let found = self.found(queue).await?;
        if !found.iter().any(Finding::is_mismatch) {
            return Ok(());
        }
        if is_quorum(queue, &found) {
            self.refuse_consumers(&queue.name, service).await?;
        }
        // It ends with this connection, whatever happens.
        let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        let declaring = self.channel.queue_declare("".into(), options, FieldTable::default());
        let declared = answer(ANSWER_MAX, declaring).await;
        let meanwhile = declared.map_err(step("stand in for", &queue.name))?.name().clone();
        let meanwhile = Binding { queue: meanwhile, ..binding.clone() };
        self.bind(&meanwhile).await?;
        self.unbind(binding).await?;
        self.replaced.prepares += self.drain(&queue.name, &meanwhile).await?;
        self.delete(&queue.name).await?;
        self.declare(queue).await?;
        self.bind(binding).await?;
        self.unbind(&meanwhile).await?;
        self.drain(&meanwhile.queue, binding).await?;
        self.delete(&meanwhile.queue).await
    }

    async fn replace_finish_queue(
        &mut self,
        queue: &Queue,
        binding: &Binding,
        meanwhile: ShortString,
        service: &ServiceName,
    ) -> Result<(), ReplaceError> {
        let presence = Prober::on(self.connection).queue_presence(meanwhile.as_str()).await;
        let is_left_over = presence.map_err(step("look at", &meanwhile))? != Presence::Missing;
        let differs = self.found(queue).await?.iter().any(Finding::is_mismatch);
        if !differs && !is_left_over {
            return Ok(());
        }
        let meanwhile = Binding { queue: meanwhile, ..binding.clone() };
        if differs {
            self.refuse_consumers(&queue.name, service).await?;
            self.declarer.queue(&Queue::quorum(meanwhile.queue.clone())).await?;
            self.bind(&meanwhile).await?;
            self.unbind(binding).await?;
            self.replaced.finishes += self.drain(&queue.name, &meanwhile).await?;
            self.refuse_consumers(&queue.name, service).await?;
            self.delete(&queue.name).await?;
        }
        self.declare(queue).await?;
        self.bind(binding).await?;
        self.unbind(&meanwhile).await?;
        let moved = self.drain(&meanwhile.queue, binding).await?;
        if !differs {
            self.replaced.finishes += moved;
        }
        self.delete(&meanwhile.queue).await
    }

    async fn refuse_consumers(
        &self,
        queue: &ShortString,
        service: &ServiceName,
    ) -> Result<(), ReplaceError> {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let asked = self.channel.queue_declare(queue.clone(), options, FieldTable::default());
        let found = answer(ANSWER_MAX, asked).await;
        let consumers = found.map_err(step("count the consumers of", queue))?.consumer_count();
        if consumers == 0 {
            return Ok(());
        }
        let (queue, service) = (queue.to_string(), service.clone());
        Err(ReplaceError::Consumed { queue, consumers, service })
    }

    /// Moves all messages from the queue `from` to where `next` is bound, one after the other.
    async fn drain(&mut self, from: &ShortString, next: &Binding) -> Result<u64, ReplaceError> {
        let mut moved = 0;
        loop {
            let getting = self.channel.basic_get(from.clone(), BasicGetOptions::default());
            let got = answer(ANSWER_MAX, getting).await;
            let Some(message) = got.map_err(step("read from", from))? else { return Ok(moved) };
            self.pass_on(message, from, next).await?;
            moved += 1;
        }
    }

    /// Publishes `message` with its original properties, and then removes it from the first queue.
    async fn pass_on(
        &mut self,
        message: BasicGetMessage,
        from: &ShortString,
        next: &Binding,
    ) -> Result<(), ReplaceError> {
        let delivery = message.delivery;
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let (exchange, key) = (next.exchange.clone(), delivery.routing_key.clone());
        let properties = without_user(&delivery.properties);
        let channel = self.channel.clone();
        let publishing = async {
            let published =
                channel.basic_publish(exchange, key, options, &delivery.data, properties);
            published.await?.await
        };
        let confirmed = self.alarms.bound(ANSWER_MAX, publishing).await;
        let confirmed = confirmed.and_then(|confirmed| Ok(confirmed?));
        match confirmed.map_err(step("move a message of", from))? {
            Confirmation::Ack(None) => {}
            Confirmation::Ack(Some(_)) | Confirmation::Nack(_) | Confirmation::NotRequested => {
                return Err(ReplaceError::NotTaken { queue: from.to_string() });
            }
        }
        let acked = answer(ANSWER_MAX, delivery.ack(BasicAckOptions::default())).await;
        acked.map(drop).map_err(step("take a moved message from", from))
    }

    async fn declare(&mut self, queue: &Queue) -> Result<(), ReplaceError> {
        self.declarer.queue(queue).await?;
        self.replaced.queues.push(queue.name.to_string());
        Ok(())
    }

    async fn bind(&mut self, binding: &Binding) -> Result<(), ReplaceError> {
        Ok(self.declarer.binding(binding).await?)
    }

    async fn unbind(&self, binding: &Binding) -> Result<(), ReplaceError> {
        let Binding { exchange, queue, key } = binding.clone();
        let unbinding = self.channel.queue_unbind(queue, exchange, key, FieldTable::default());
        let unbound = answer(ANSWER_MAX, unbinding).await;
        unbound.map_err(step("unbind", &binding.queue))
    }

    async fn delete(&self, queue: &ShortString) -> Result<(), ReplaceError> {
        let deleting = self.channel.queue_delete(queue.clone(), QueueDeleteOptions::default());
        let deleted = answer(ANSWER_MAX, deleting).await;
        deleted.map(drop).map_err(step("delete", queue))
    }
}

/// Whether the broker has a quorum queue under the name of `queue`, judging by the differences.
fn is_quorum(queue: &Queue, found: &[Finding]) -> bool {
    let kind = found.iter().find_map(|finding| match &finding.fault {
        Fault::Differs(it) if it.argument == Queue::KIND => it.found.clone(),
        Fault::Differs(_)
        | Fault::Missing
        | Fault::Refused(_)
        | Fault::NotBegun(_)
        | Fault::LeftOver
        | Fault::Unavailable(_) => None,
    });
    kind.unwrap_or_else(|| queue.kind.to_string()) == QueueKind::Quorum.to_string()
}

/// The properties of a message without its user id: the broker accepts only the publishing user's
/// own.
fn without_user(properties: &BasicProperties) -> BasicProperties {
    let mut kept = BasicProperties::default();
    macro_rules! keep {
        ($($get:ident => $with:ident),* $(,)?) => {
            $(if let Some(value) = properties.$get().clone() { kept = kept.$with(value); })*
        };
    }
    keep!(
        content_type => with_content_type,
        content_encoding => with_content_encoding,
        headers => with_headers,
        delivery_mode => with_delivery_mode,
        priority => with_priority,
        correlation_id => with_correlation_id,
        reply_to => with_reply_to,
        expiration => with_expiration,
        message_id => with_message_id,
        timestamp => with_timestamp,
        kind => with_type,
        app_id => with_app_id,
    );
    kept
}
