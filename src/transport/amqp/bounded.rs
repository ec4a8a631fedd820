//! Requests to the broker with a time limit.
//!
//! A node that is paused, partitioned, or waits for a queue's leader keeps the connection open and
//! sends nothing: neither an answer nor an error. [`answer`] bounds the wait for one answer;
//! [`AlarmListener::bound`] bounds the wait for a confirm, and distinguishes a broker that has an
//! alarm from one that is silent.
//!
//! **Invariant:** after [`AskError::Silent`] the channel is not used again: a late answer would be
//! taken for that of the next request.

use std::{
    pin::{Pin, pin},
    task::{Context, Waker},
    time::Duration,
};

use futures_util::{Stream, StreamExt};
use lapin::{Channel, Connection, Event};
use tokio::time::{Instant, sleep_until, timeout};

use crate::transport::amqp::error::{Disposition, is_refusal, may_pass};

/// How long the broker has for one answer. A healthy one takes milliseconds, a cluster that elects
/// a leader up to some seconds.
pub const ANSWER_MAX: Duration = Duration::from_secs(5);

/// How long the broker has to start a stream's consumer that it has not started within
/// [`ANSWER_MAX`]. RabbitMQ 4 asks its nodes twice, one after the other, and takes 7 s each time to
/// find that one of them can't be reached (Erlang's `net_setuptime`). A client that asks again
/// earlier makes it start over, as long as the node can't be reached.
pub const STREAM_MAX: Duration = Duration::from_secs(16);

/// How long the broker has to declare a queue. One on several nodes has to elect a leader first.
pub const DECLARE_MAX: Duration = Duration::from_secs(15);

/// If a timer fires later than this, the process did not run, for example because it was frozen:
/// then a missing answer means nothing.
pub(super) const STALL_MIN: Duration = Duration::from_secs(1);

/// How long closing an unused channel may take.
const CLOSE_MAX: Duration = Duration::from_secs(2);

/// A request to the broker has failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AskError {
    /// The broker's answer is an error, or the connection is lost.
    #[error(transparent)]
    Broker(#[from] lapin::Error),
    /// No answer came in time.
    #[error(
        "the broker did not answer within {} s (is a node of the cluster down?)",
        limit.as_secs_f64()
    )]
    Silent {
        /// The time limit.
        limit: Duration,
    },
    /// The broker reads no publishes on this connection: it has an alarm.
    #[error("the broker takes no messages: {reason}")]
    Blocked {
        /// The alarm, in the broker's words.
        reason: String,
    },
}

impl AskError {
    /// Whether to ask again.
    pub fn disposition(&self) -> Disposition {
        match self.broker() {
            Some(error) if is_refusal(error) => Disposition::GiveUp,
            Some(_) | None => Disposition::Retry,
        }
    }

    /// The broker's error, or the one that ended the connection, if there is one.
    pub fn broker(&self) -> Option<&lapin::Error> {
        match self {
            Self::Broker(error) => Some(error),
            Self::Silent { .. } | Self::Blocked { .. } => None,
        }
    }

    /// Whether it may succeed soon without any change.
    pub fn may_pass(&self) -> bool {
        self.broker().is_none_or(may_pass)
    }

    /// Whether the broker did not answer at all.
    pub fn is_silent(&self) -> bool {
        matches!(self, Self::Silent { .. })
    }
}

/// The answer to `request`, if it arrives within `limit`.
///
/// # Errors
///
/// There is none in time, or it is an error.
pub async fn answer<T>(
    limit: Duration,
    request: impl Future<Output = Result<T, lapin::Error>>,
) -> Result<T, AskError> {
    match timeout(limit, request).await {
        Ok(answered) => Ok(answered?),
        Err(_) => Err(AskError::Silent { limit }),
    }
}

/// Writes a frame without waiting for the result: if the channel is gone, its consumer is notified.
pub fn write_now(writing: impl Future<Output = Result<(), lapin::Error>>) {
    let _ = pin!(writing).poll(&mut Context::from_waker(Waker::noop()));
}

/// Closes a channel, waiting only briefly for the answer.
pub async fn close_channel(channel: &Channel) {
    let _ = timeout(CLOSE_MAX, channel.close(200, "done".into())).await;
}

/// Whether the broker reads publishes on a connection, and if not, why.
///
/// lapin delivers each event of a connection to one listener only, so there may be no other.
pub struct AlarmListener {
    events: Pin<Box<dyn Stream<Item = Event> + Send>>,
    reason: Option<String>,
}

impl AlarmListener {
    /// Starts to listen. The broker reports an alarm only after something was published.
    pub fn of(connection: &Connection) -> Self {
        Self::on(connection.events_listener())
    }

    fn on(events: impl Stream<Item = Event> + Send + 'static) -> Self {
        Self { events: Box::pin(events), reason: None }
    }

    /// The result of `published`, if it arrives within `limit`. An alarm may end before that, so an
    /// alarm alone doesn't end the wait.
    ///
    /// # Errors
    ///
    /// There is no result in time; if the broker has an alarm then, the error is that alarm.
    pub async fn bound<T>(
        &mut self,
        limit: Duration,
        published: impl Future<Output = T>,
    ) -> Result<T, AskError> {
        let mut published = pin!(published);
        let end = Instant::now() + limit;
        let mut is_listening = true;
        loop {
            tokio::select! {
                biased;
                ended = &mut published => return Ok(ended),
                event = self.events.next(), if is_listening => match event {
                    Some(event) => self.on_event(event),
                    None => is_listening = false,
                },
                () = sleep_until(end) => return Err(match self.reason.clone() {
                    Some(reason) => AskError::Blocked { reason },
                    None => AskError::Silent { limit },
                }),
            }
        }
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::ConnectionBlocked(reason) => self.reason = Some(reason),
            Event::ConnectionUnblocked => self.reason = None,
            Event::Connected | Event::SendFlow(_) | Event::Error(_) | _ => {}
        }
    }
}

impl std::fmt::Debug for AlarmListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AlarmListener").field("reason", &self.reason).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::{pending, ready},
        time::Duration,
    };

    use futures_util::stream;
    use lapin::Event;
    use tokio::time::Instant;

    use super::{AlarmListener, AskError, answer};

    const LIMIT: Duration = Duration::from_secs(5);

    fn blocked(reason: &str) -> Event {
        Event::ConnectionBlocked(reason.to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_without_an_answer_ends_at_its_limit() {
        let began = Instant::now();
        let error = answer::<()>(LIMIT, pending()).await.unwrap_err();
        assert_eq!(began.elapsed().as_secs(), LIMIT.as_secs());
        let text = "the broker did not answer within 5 s (is a node of the cluster down?)";
        assert_eq!(error.to_string(), text);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_in_time_is_the_answer() {
        assert_eq!(answer(LIMIT, ready(Ok(7))).await.unwrap(), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn a_confirm_that_an_alarm_holds_back_ends_with_its_reason() {
        let mut alarm = AlarmListener::on(stream::iter([blocked("low on memory")]));
        let error = alarm.bound(LIMIT, pending::<()>()).await.unwrap_err();
        assert_eq!(error.to_string(), "the broker takes no messages: low on memory");
    }

    #[tokio::test(start_paused = true)]
    async fn an_alarm_that_is_over_is_not_the_reason() {
        let events = [blocked("low on disk"), Event::ConnectionUnblocked];
        let mut alarm = AlarmListener::on(stream::iter(events));
        let error = alarm.bound(LIMIT, pending::<()>()).await.unwrap_err();
        assert!(matches!(error, AskError::Silent { limit } if limit == LIMIT), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_confirm_that_comes_after_an_alarm_is_a_confirm() {
        let mut alarm = AlarmListener::on(stream::iter([blocked("low on memory")]));
        let confirm = tokio::time::sleep(Duration::from_secs(2));
        assert!(alarm.bound(LIMIT, confirm).await.is_ok());
    }
}
