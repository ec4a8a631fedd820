//! A value that all instances of a service must agree on, kept by the broker while any of them is
//! connected.
//!
//! It is an argument of a queue that receives no messages. The broker refuses a declaration with
//! another value, and the refusal names the existing one. So an instance that differs hears that
//! from the broker before it serves, and two instances can't both be the first. The queue is
//! deleted with its last consumer.

use lapin::{
    Channel, Consumer,
    options::{BasicConsumeOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable, ShortString},
};

use crate::transport::amqp::{
    bounded::{ANSWER_MAX, AskError, answer, close_channel},
    connection::BrokerConnection,
    error::{is_not_found, is_precondition_failed, said},
    topology::finding::Difference,
};

/// The argument that holds the value: it may be any text, and the broker compares it.
const ARGUMENT: &str = "x-dead-letter-routing-key";

/// How often to try, if other instances come and go at the same time.
const ROUNDS_MAX: usize = 5;

/// An agreement, which holds as long as this value and its connection live.
#[derive(Debug)]
pub struct Agreed {
    _consumer: Consumer,
    _channel: Channel,
}

/// There is no agreement.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AgreedError {
    /// Other instances, which are connected, have another value.
    #[error("queue `{queue}` says `{other}`")]
    Differs {
        /// The queue that holds it.
        queue: ShortString,
        /// The value of the others.
        other: String,
    },
    /// The broker doesn't answer, or with an error.
    #[error("failed to use queue `{queue}`")]
    Unknown {
        /// The queue that holds it.
        queue: ShortString,
        /// Why.
        #[source]
        source: AskError,
    },
}

impl Agreed {
    /// Agrees on `word` with all that use `queue`.
    ///
    /// # Errors
    ///
    /// They have another value, or the broker doesn't answer.
    pub async fn on(
        connection: &BrokerConnection,
        queue: &ShortString,
        word: &str,
    ) -> Result<Self, AgreedError> {
        let unknown = |source| AgreedError::Unknown { queue: queue.clone(), source };
        let mut rounds = 0;
        loop {
            rounds += 1;
            let source = match agree(connection, queue, word).await {
                Ok(agreed) => return Ok(agreed),
                Err(source) => source,
            };
            let broker = source.broker().filter(|_| rounds < ROUNDS_MAX);
            if broker.is_some_and(is_not_found) {
                // It was deleted with its last consumer.
                continue;
            }
            let Some(other) = source.broker().and_then(other_word) else {
                return Err(unknown(source));
            };
            if rounds >= ROUNDS_MAX || !is_left_over(connection, queue).await.map_err(unknown)? {
                return Err(AgreedError::Differs { queue: queue.clone(), other });
            }
        }
    }
}

async fn agree(
    connection: &BrokerConnection,
    queue: &ShortString,
    word: &str,
) -> Result<Agreed, AskError> {
    let mut arguments = FieldTable::default();
    let text = |text: &str| AMQPValue::LongString(text.into());
    arguments.insert("x-queue-type".into(), text("classic"));
    arguments.insert("x-dead-letter-exchange".into(), text(""));
    arguments.insert(ARGUMENT.into(), text(word));
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
        Ok(consumer) => Ok(Agreed { _consumer: consumer, _channel: channel }),
        Err(error) => {
            if error.is_silent() {
                tokio::spawn(async move { close_channel(&channel).await });
            }
            Err(error)
        }
    }
}

/// The existing value, if that is why the broker refused the declaration.
fn other_word(error: &lapin::Error) -> Option<String> {
    let difference = Difference::parse(&said(error)).filter(|_| is_precondition_failed(error))?;
    difference.found.filter(|_| difference.argument == ARGUMENT)
}

/// Whether nobody used the queue, as after its node was down; then this has deleted it.
async fn is_left_over(
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
