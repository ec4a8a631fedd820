//! The first record of the journal: the time from which it is complete.
//!
//! Only this record distinguishes a new journal from one that was lost and declared again. A new
//! system's journal is complete since a little before now: nothing can have been decided earlier,
//! and requests from a clock that lags are served too. In an existing system, decisions may be
//! missing up to now, on any clock.

use std::time::Duration;

use futures_util::StreamExt;
use lapin::{
    Connection,
    message::Delivery,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};

use crate::{
    protocol::time::Time,
    transport::amqp::{
        bounded::{ANSWER_MAX, AlarmListener, AskError, answer, close_channel},
        connection::{BrokerConnection, PublishChannel},
        error::is_out_of_reach,
        names::Names,
        publisher::{OutgoingMessage, PublishOutcome, publish},
        stream::{offset_of, reading_from},
        topology::probe::{Presence, Prober},
    },
    wire::message::{Items, JournalBegun, Kind},
};

/// How long the broker may take to deliver the first record of a journal. It sends nothing if there
/// is none, and it doesn't count the messages of a stream.
const READ_MAX: Duration = Duration::from_secs(2);

/// The beginning of a journal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum JournalBeginning {
    /// It is empty.
    Empty,
    /// It begins with the record that it should begin with.
    Begun,
    /// It begins later: older records were removed after the retention time.
    CutOff,
    /// It begins with a message of this type.
    Other(String),
}

impl JournalBeginning {
    /// What is at the beginning instead of the first record, if that is wrong.
    pub(super) fn fault(&self) -> Option<String> {
        match self {
            Self::Empty => Some("none".to_owned()),
            Self::Other(other) => Some(other.clone()),
            Self::Begun | Self::CutOff => None,
        }
    }
}

/// How the journal, which must exist, begins.
pub(super) async fn beginning(
    connection: &Connection,
    names: &Names,
) -> Result<JournalBeginning, AskError> {
    let journal = names.journal();
    let channel = answer(ANSWER_MAX, connection.create_channel()).await?;
    answer(ANSWER_MAX, channel.basic_qos(1, BasicQosOptions::default())).await?;
    let from = reading_from(AMQPValue::LongString("first".into()));
    let options = BasicConsumeOptions::default();
    let consuming = channel.basic_consume(journal.clone(), "".into(), options, from);
    let mut consumer = answer(ANSWER_MAX, consuming).await?;
    let first = match tokio::time::timeout(READ_MAX, consumer.next()).await {
        Ok(Some(first)) => first?,
        Ok(None) | Err(_) => {
            // If the broker is healthy, a record that exists was delivered before the answer to
            // this.
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            let asked = channel.queue_declare(journal, passive, FieldTable::default());
            answer(ANSWER_MAX, asked).await?;
            // Before the consumer is dropped: see `Scan::cancel`.
            close_channel(&channel).await;
            return Ok(JournalBeginning::Empty);
        }
    };
    answer(ANSWER_MAX, first.ack(BasicAckOptions::default())).await?;
    close_channel(&channel).await;
    Ok(classify(&first))
}

fn classify(first: &Delivery) -> JournalBeginning {
    if offset_of(first) != Some(0) {
        return JournalBeginning::CutOff;
    }
    let kind = first.properties.kind().as_ref().map(|kind| kind.as_str()).unwrap_or_default();
    if Kind::parse_type(kind) == Some(Kind::JournalBegun) {
        return JournalBeginning::Begun;
    }
    JournalBeginning::Other(if kind.is_empty() {
        "a message without type".into()
    } else {
        kind.into()
    })
}

/// Whether this system existed before, judging by the queues that are declared only after the
/// journal has its first record.
pub(super) async fn has_existed(connection: &Connection, names: &Names) -> Result<bool, AskError> {
    let mut prober = Prober::on(connection);
    let queues = [names.requests(), names.rejected(), names.unresolved(), names.audit()];
    for queue in queues {
        match prober.queue_presence(queue.as_str()).await {
            Ok(Presence::Missing) => {}
            Ok(Presence::There | Presence::Exclusive) => return Ok(true),
            Err(AskError::Broker(error)) if is_out_of_reach(&error) => return Ok(true),
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// The time from which a journal is complete that is created at `now`.
pub(super) fn complete_since(now: Time, clock_margin: Duration, has_existed: bool) -> Time {
    if has_existed {
        return now + clock_margin;
    }
    now - clock_margin * 2 - Duration::from_secs(1)
}

/// Writes the first record.
pub(super) async fn begin(
    connection: &BrokerConnection,
    names: &Names,
    complete_since: Time,
) -> Result<PublishOutcome, AskError> {
    let mut items = Items::new();
    // One record is much smaller than the limit of a body.
    let _ = items.push(&JournalBegun { complete_since });
    let message = OutgoingMessage {
        key: names.journal(),
        message_type: Kind::JournalBegun.as_type(),
        body: items.into_body(),
        persistent: true,
        mandatory: true,
        ..OutgoingMessage::default()
    };
    let mut alarm = AlarmListener::of(connection);
    let channel = PublishChannel::open(connection).await?;
    let published = alarm.bound(ANSWER_MAX, publish(channel.clone(), message)).await?;
    close_channel(&channel).await;
    Ok(published)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::complete_since;
    use crate::protocol::time::Time;

    const MARGIN: Duration = Duration::from_secs(60);

    #[test]
    fn a_new_systems_journal_serves_requests_made_at_once_by_the_slowest_clock() {
        let now = Time::from_millis(1_000_000);
        let requested_at = now - MARGIN;
        assert!(complete_since(now, MARGIN, false) < requested_at - MARGIN);
    }

    #[test]
    fn a_lost_journal_is_complete_only_after_the_fastest_clock() {
        let now = Time::from_millis(1_000_000);
        assert!(complete_since(now, MARGIN, true) >= now + MARGIN);
    }
}
