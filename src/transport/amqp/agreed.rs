//! A word that all who serve one thing must agree on; the broker keeps it while any of them is there.
//!
//! It is an argument of a queue to which nothing is routed. A declaration with another value is
//! refused, and the refusal says which value is there: so whoever comes later hears from the broker,
//! before it serves, that it differs, and no two can both have come first. The queue goes with its
//! last consumer.

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

/// The argument that holds the word: any text will do there, and the broker compares it.
const ARGUMENT: &str = "x-dead-letter-routing-key";

/// How often it is tried, where others come and go at the same moment.
const ROUNDS_MAX: usize = 5;

/// One who has agreed, for as long as this lives and its connection stands.
#[derive(Debug)]
pub struct Agreed {
    _consumer: Consumer,
    _channel: Channel,
}

/// There is no agreement.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AgreedError {
    /// Others, who are there, have another word.
    #[error("queue `{queue}` says `{other}`")]
    Differs {
        /// The queue that keeps it.
        queue: ShortString,
        /// Their word.
        other: String,
    },
    /// The broker doesn't tell.
    #[error("failed to use queue `{queue}`")]
    Unknown {
        /// The queue that keeps it.
        queue: ShortString,
        /// Why.
        #[source]
        source: AskError,
    },
}

impl Agreed {
    /// Agrees on `word` with all who use `queue`.
    ///
    /// # Errors
    ///
    /// They have another word, or the broker doesn't tell.
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
                // It went with its last consumer.
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
        // What is neither durable nor exclusive is being abolished.
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

/// The word that is there, if that is why the declaration was refused.
fn other_word(error: &lapin::Error) -> Option<String> {
    let difference = Difference::parse(&said(error)).filter(|_| is_precondition_failed(error))?;
    difference.found.filter(|_| difference.argument == ARGUMENT)
}

/// Whether nobody used the queue, as after its node was down; then it is gone now.
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
