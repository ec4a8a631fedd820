//! A value that all instances of a service must agree on. The broker keeps it while any of them is
//! connected.
//!
//! It is an argument of a queue that receives no messages. The broker refuses to declare the queue
//! with another value, and names the existing one. So an instance with another value learns of that
//! before it serves, and of two instances that start together only one sets the value. The queue is
//! deleted with its last consumer.

use lapin::{
    Channel, Consumer,
    options::{BasicConsumeOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable, ShortString},
};

use crate::transport::amqp::{
    bounded::{ANSWER_MAX, AskError, answer, close_channel},
    connection::BrokerConnection,
    error::{broker_text, is_not_found, is_precondition_failed},
    topology::finding::Difference,
};

/// The argument that holds the value: it may be any text, and the broker compares it.
const ARGUMENT: &str = "x-dead-letter-routing-key";

/// How often to try, if other instances come and go at the same time.
const ATTEMPTS_MAX: usize = 5;

/// A value that was agreed on. It is kept as long as this and its connection live.
#[derive(Debug)]
pub struct AgreedValue {
    _consumer: Consumer,
    _channel: Channel,
}

/// No value was agreed on.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AgreedValueError {
    /// Other instances, which are connected, have another value.
    #[error("queue `{queue}` says `{other}`")]
    Differs {
        /// The queue that holds it.
        queue: ShortString,
        /// The value of the others.
        other: String,
    },
    /// The broker doesn't answer, or answers with an error.
    #[error("failed to use queue `{queue}`")]
    Unknown {
        /// The queue that holds it.
        queue: ShortString,
        /// Why.
        #[source]
        source: AskError,
    },
}

impl AgreedValue {
    /// Agrees on `value` with all that use `queue`.
    ///
    /// # Errors
    ///
    /// They have another value, or the broker doesn't answer.
    pub async fn on(
        connection: &BrokerConnection,
        queue: &ShortString,
        value: &str,
    ) -> Result<Self, AgreedValueError> {
        let unknown = |source| AgreedValueError::Unknown { queue: queue.clone(), source };
        let mut attempts = 0;
        loop {
            attempts += 1;
            let source = match agree(connection, queue, value).await {
                Ok(agreed) => return Ok(agreed),
                Err(source) => source,
            };
            let broker = source.broker().filter(|_| attempts < ATTEMPTS_MAX);
            if broker.is_some_and(is_not_found) {
                // It was deleted with its last consumer.
                continue;
            }
            let Some(other) = source.broker().and_then(other_value) else {
                return Err(unknown(source));
            };
            if attempts >= ATTEMPTS_MAX
                || !delete_if_unused(connection, queue).await.map_err(unknown)?
            {
                return Err(AgreedValueError::Differs { queue: queue.clone(), other });
            }
        }
    }
}

async fn agree(
    connection: &BrokerConnection,
    queue: &ShortString,
    value: &str,
) -> Result<AgreedValue, AskError> {
    let mut arguments = FieldTable::default();
    let text = |text: &str| AMQPValue::LongString(text.into());
    arguments.insert("x-queue-type".into(), text("classic"));
    arguments.insert("x-dead-letter-exchange".into(), text(""));
    arguments.insert(ARGUMENT.into(), text(value));
    let options = QueueDeclareOptions {
        // Queues that are neither durable nor exclusive are deprecated.
        durable: true,
        auto_delete: true,
        ..QueueDeclareOptions::default()
    };
    let channel = answer(ANSWER_MAX, connection.create_channel()).await?;
    let consumer = async {
        answer(ANSWER_MAX, channel.queue_declare(queue.clone(), options, arguments)).await?;
        let consuming = channel.basic_consume(
            queue.clone(),
            "".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        answer(ANSWER_MAX, consuming).await
    };
    match consumer.await {
        Ok(consumer) => Ok(AgreedValue { _consumer: consumer, _channel: channel }),
        Err(error) => {
            if error.is_silent() {
                tokio::spawn(async move { close_channel(&channel).await });
            }
            Err(error)
        }
    }
}

/// The existing value, if that is why the broker refused the declaration.
fn other_value(error: &lapin::Error) -> Option<String> {
    let difference =
        Difference::parse(&broker_text(error)).filter(|_| is_precondition_failed(error))?;
    difference.found.filter(|_| difference.argument == ARGUMENT)
}

/// Deletes the queue if nobody uses it, as after its node was down; returns whether it did.
async fn delete_if_unused(
    connection: &BrokerConnection,
    queue: &ShortString,
) -> Result<bool, AskError> {
    let channel = answer(ANSWER_MAX, connection.create_channel()).await?;
    let options = QueueDeleteOptions { if_unused: true, ..QueueDeleteOptions::default() };
    match answer(ANSWER_MAX, channel.queue_delete(queue.clone(), options)).await {
        Ok(_) => {
            close_channel(&channel).await;
            Ok(true)
        }
        Err(error) if error.broker().is_some_and(is_precondition_failed) => Ok(false),
        Err(error) => Err(error),
    }
}
