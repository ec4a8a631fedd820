//! The results that a client waits for, and the queue that receives them.
//!
//! Each connection has its own queue, bound by its own reply token. The broker may still have the queue
//! of the previous connection, and results must not go there. Results that arrived while there was no
//! queue are lost: when [`ListenState`] changes, the waiting calls publish their requests again, with the new
//! token.
//!
//! **If no result arrives for a while**, another connection is opened, to another host, with a queue of
//! its own, and the requests are published again with its token. Each further wait is twice as long.
//! Where services are slow, this costs a connection and a copy of each request now and then. The
//! previous queue is consumed for one more minute.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use lapin::{ExchangeKind, message::Delivery, options::ExchangeDeclareOptions, types::FieldTable};
use tokio::{
    sync::{oneshot, watch},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep_until, timeout},
};

use crate::{
    client::HasWorked,
    error::ErrorChain,
    protocol::{
        ids::{ReplyToken, RequestHash, TransactionId, TransactionKey},
        message::Answer,
        time::Time,
    },
    transport::amqp::{
        bounded::{ANSWER_MAX, AskError, answer},
        connection::{Broker, BrokerConnection, ConnectionError, close},
        error::{Disposition, is_not_found},
        exclusive_queue::{ExchangeBinding, ExclusiveQueue, ExclusiveQueueError},
        names::{Names, key},
        rejected::{undecodable, unreadable},
        supervisor::Supervisor,
        unique,
    },
    wire::message::decode,
};

/// How long to wait for any result before this connection is replaced; each further wait is twice as
/// long, until a result arrives. A node that is cut off from the others keeps its connections and queues,
/// and its clients notice nothing except that no results arrive.
const PATIENCE_MIN: Duration = Duration::from_secs(8);

/// For how long a queue is consumed after it was replaced.
const DOUBTED_MAX: Duration = Duration::from_secs(60);

/// The maximum number of unacknowledged results.
const PREFETCH: u16 = 1000;

/// For how many requests the hash is remembered.
const REMEMBERED_MAX: usize = 4096;

/// Whether this client receives results.
#[derive(Clone, Debug)]
pub(super) enum ListenState {
    /// Not at the moment.
    Connecting,
    /// Yes, under this token.
    Up(ReplyToken),
    /// No, until somebody changes something.
    Failed(ListenError),
}

/// The client can't receive results.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum ListenError {
    /// No connection.
    #[error("no connection for receiving results")]
    Connect(#[from] ConnectionError),
    /// The exchange for results doesn't exist: `dtc topology apply` has not been run.
    #[error("there is no exchange `{exchange}`: run `dtc topology apply`")]
    NoTopology {
        /// The exchange.
        exchange: String,
    },
    /// The queue for results can't be opened.
    #[error("failed to open a queue for results")]
    Queue(#[source] ExclusiveQueueError),
    /// The broker could not be asked whether the exchange exists.
    #[error("failed to look for the exchange `{exchange}`")]
    Exchange {
        /// The exchange.
        exchange: String,
        /// The cause.
        #[source]
        source: AskError,
    },
    /// The client is closed.
    #[error("the client is closed")]
    Closed,
}

impl ListenError {
    /// Whether to retry.
    pub(super) fn disposition(&self) -> Disposition {
        match self {
            Self::Connect(error) => error.disposition(),
            Self::Queue(error) => error.source_error().disposition(),
            Self::Exchange { source, .. } => source.disposition(),
            Self::NoTopology { .. } | Self::Closed => Disposition::GiveUp,
        }
    }
}

/// The results that are waited for, and the task that receives them.
#[derive(Debug)]
pub(super) struct Results {
    listener: Listener,
    state: watch::Sender<ListenState>,
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Clone, Debug)]
struct Listener {
    broker: Broker,
    has_worked: HasWorked,
    names: Names,
    expected: Arc<Mutex<Expected>>,
}

impl Results {
    pub(super) fn new(broker: Broker, names: Names, has_worked: HasWorked) -> Self {
        let listener = Listener { broker, has_worked, names, expected: Arc::default() };
        Self {
            listener,
            state: watch::Sender::new(ListenState::Connecting),
            task: Mutex::new(None),
        }
    }

    /// Registers a call that waits for the result of `key`.
    pub(super) fn expect(&self, key: &TransactionKey, hash: RequestHash) -> Awaited {
        let (sender, receiver) = oneshot::channel();
        let expected = Arc::clone(&self.listener.expected);
        let number = lock(&expected).add(key, hash, sender);
        Awaited { id: key.id.clone(), number, expected, receiver }
    }

    /// Starts the task that receives results unless it runs, and returns its state.
    pub(super) fn listen(&self) -> watch::Receiver<ListenState> {
        let mut task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        if task.as_ref().is_none_or(JoinHandle::is_finished) {
            self.state.send_replace(ListenState::Connecting);
            *task = Some(tokio::spawn(self.listener.clone().listen(self.state.clone())));
        }
        self.state.subscribe()
    }

    pub(super) async fn close(&self) {
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            self.state.send_replace(ListenState::Failed(ListenError::Closed));
            // The state ends the task.
            let _ = task.await;
        }
    }
}

impl Drop for Results {
    fn drop(&mut self) {
        let task = self.task.get_mut().unwrap_or_else(PoisonError::into_inner);
        task.iter().for_each(JoinHandle::abort);
    }
}

/// Why a queue is replaced.
enum ListenEnd {
    /// The queue or its connection is lost.
    Lost,
    /// No result has arrived for long.
    Doubted,
}

impl Listener {
    async fn listen(self, state: watch::Sender<ListenState>) {
        let mut closed = state.subscribe();
        let is_closed = |state: &ListenState| matches!(state, ListenState::Failed(_));
        tokio::select! {
            () = self.receive_always(&state) => {}
            _ = closed.wait_for(is_closed) => {}
        }
    }

    /// Receives results on one connection after the other; ends when retrying is pointless.
    async fn receive_always(&self, state: &watch::Sender<ListenState>) {
        let mut supervisor = Supervisor::default();
        let mut patience = PATIENCE_MIN;
        let mut doubted = JoinSet::new();
        loop {
            match self.subscribe().await {
                Ok((connection, (mut queue, reply))) => {
                    supervisor.opened();
                    self.has_worked.set();
                    state.send_replace(ListenState::Up(reply));
                    match self.receive(&mut queue, &mut patience).await {
                        ListenEnd::Lost => {
                            state.send_replace(ListenState::Connecting);
                            // Closing may take long on a broken connection.
                            tokio::spawn(async move { close(&connection).await });
                        }
                        // Its token stays in use until the next queue is open.
                        ListenEnd::Doubted => {
                            let listener = self.clone();
                            doubted.spawn(listener.receive_for_a_while(connection, queue));
                        }
                    }
                    while doubted.try_join_next().is_some() {}
                }
                Err(error) if self.is_final(&error) => {
                    state.send_replace(ListenState::Failed(error));
                    return;
                }
                Err(error) => {
                    tracing::warn!(error = %ErrorChain(&error), "can't receive results yet; trying again")
                }
            }
            tokio::time::sleep(supervisor.pause()).await;
        }
    }

    fn is_final(&self, error: &ListenError) -> bool {
        let disposition = match error {
            ListenError::Connect(error) => self.has_worked.disposition(error),
            ListenError::NoTopology { .. }
            | ListenError::Queue(_)
            | ListenError::Exchange { .. }
            | ListenError::Closed => error.disposition(),
        };
        disposition == Disposition::GiveUp
    }

    async fn subscribe(
        &self,
    ) -> Result<(Arc<BrokerConnection>, (ExclusiveQueue, ReplyToken)), ListenError> {
        let queue = |connection| async move {
            let queue = self.queue(&connection).await?;
            Ok((connection, queue))
        };
        self.broker.connect_with("results", queue, |error| self.is_final(error)).await
    }

    /// Opens an exclusive queue, which the broker deletes with the connection.
    async fn queue(
        &self,
        connection: &Arc<BrokerConnection>,
    ) -> Result<(ExclusiveQueue, ReplyToken), ListenError> {
        let exchange = self.names.results();
        self.find(connection).await.map_err(|source| match &source {
            AskError::Broker(error) if is_not_found(error) => {
                ListenError::NoTopology { exchange: exchange.to_string() }
            }
            AskError::Broker(_) | AskError::Silent { .. } | AskError::Blocked { .. } => {
                ListenError::Exchange { exchange: exchange.to_string(), source }
            }
        })?;
        let reply = reply_token();
        let results = ExchangeBinding { exchange, key: key(&reply, "*") };
        let stem = self.names.results_of(&reply);
        let queue = ExclusiveQueue::open(connection, stem, &[results], PREFETCH).await;
        let queue = queue.map_err(ListenError::Queue)?;
        let expected = Arc::clone(&self.expected);
        let is_needed = move || !lock(&expected).waiting.is_empty();
        let probed = queue.with_link_probe(connection, is_needed).await;
        let probed =
            probed.map_err(|error| ListenError::Queue(ExclusiveQueueError::Channel(error)))?;
        Ok((probed, reply))
    }

    async fn find(&self, connection: &BrokerConnection) -> Result<(), AskError> {
        let channel = answer(ANSWER_MAX, connection.create_channel()).await?;
        let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        let (exchange, nothing) = (self.names.results(), FieldTable::default());
        let declaring = channel.exchange_declare(exchange, ExchangeKind::Topic, passive, nothing);
        answer(ANSWER_MAX, declaring).await?;
        answer(ANSWER_MAX, channel.close(200, "done".into())).await
    }

    /// Hands out results until the queue is lost, or none has arrived for `patience` while some are
    /// waited for; then `patience` is doubled.
    async fn receive(&self, queue: &mut ExclusiveQueue, patience: &mut Duration) -> ListenEnd {
        let mut heard_at = Instant::now();
        let mut look_at = heard_at + *patience;
        loop {
            tokio::select! {
                biased;
                delivery = queue.next() => match delivery {
                    Ok(delivery) => {
                        (heard_at, *patience) = (Instant::now(), PATIENCE_MIN);
                        self.take(queue, &delivery);
                    }
                    Err(error) => {
                        tracing::warn!(error = %ErrorChain(&error), "results may be lost; asking for them again");
                        return ListenEnd::Lost;
                    }
                },
                () = sleep_until(look_at) => {
                    let now = Instant::now();
                    let expected = lock(&self.expected);
                    let silent_since = expected.oldest().map_or(now, |oldest| oldest.max(heard_at));
                    look_at = silent_since + *patience;
                    if look_at > now {
                        continue;
                    }
                    tracing::warn!(
                        seconds = patience.as_secs(),
                        expected = expected.waiting.len(),
                        "no result has arrived for a while; opening another connection, and asking \
                         for the results again"
                    );
                    *patience *= 2;
                    return ListenEnd::Doubted;
                }
            }
        }
    }

    /// Hands out the results that still arrive at a replaced queue. Perhaps no result was ready before,
    /// and one that is already on its way would be asked for again only after a while.
    async fn receive_for_a_while(
        self,
        connection: Arc<BrokerConnection>,
        mut queue: ExclusiveQueue,
    ) {
        let receiving = async {
            while let Ok(delivery) = queue.next().await {
                self.take(&mut queue, &delivery);
            }
        };
        // It doesn't matter how this ends: the next queue is in use.
        let _ = timeout(DOUBTED_MAX, receiving).await;
        close(&connection).await;
    }

    fn take(&self, queue: &mut ExclusiveQueue, delivery: &Delivery) {
        self.hand_out(delivery);
        queue.ack(delivery.delivery_tag);
        queue.flush();
    }

    fn hand_out(&self, delivery: &Delivery) {
        if let Some(reason) = unreadable(delivery) {
            tracing::warn!(reason, "skipping a message that is not a result");
            return;
        }
        let answers = match decode::<Answer>(&delivery.data) {
            Ok(answers) => answers,
            Err(error) => {
                let error = undecodable(delivery, &error);
                tracing::warn!(error, "skipping a message that is not a result");
                return;
            }
        };
        let mut expected = lock(&self.expected);
        for answer in answers {
            match answer {
                Ok(answer) => expected.hand_out(&answer),
                Err(error) => {
                    tracing::warn!(%error, "skipping an item of a message that is not a result");
                }
            }
        }
    }
}

/// A new token for the results of one connection.
pub(super) fn reply_token() -> ReplyToken {
    let name = unique::name('p');
    ReplyToken::parse(&name).unwrap_or_else(|_| unreachable!("{name} has letters and digits only"))
}

/// A result that a call waits for, until this is dropped.
#[derive(Debug)]
pub(super) struct Awaited {
    id: TransactionId,
    number: u64,
    expected: Arc<Mutex<Expected>>,
    receiver: oneshot::Receiver<Answer>,
}

impl Awaited {
    /// Waits for the result. It must not be called again after that.
    pub(super) async fn come(&mut self) -> Answer {
        match (&mut self.receiver).await {
            Ok(answer) => answer,
            // The sender is not dropped before this.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        lock(&self.expected).remove(&self.id, self.number);
    }
}

fn lock(expected: &Mutex<Expected>) -> MutexGuard<'_, Expected> {
    expected.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The calls that wait for results.
///
/// A result names the transaction that was decided. If the request was a retry under a new timestamp,
/// that is an earlier transaction with the same id. So a result whose key no call waits for goes to the
/// call that has waited longest for its id, unless the result's request is known to have had other
/// content: then it is a late copy of an earlier result.
#[derive(Debug, Default)]
struct Expected {
    waiting: BTreeMap<TransactionId, Vec<Waiting>>,
    last_number: u64,
    asked: BTreeMap<TransactionKey, RequestHash>,
    asked_in_order: VecDeque<TransactionKey>,
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    since: Instant,
    requested_at: Time,
    hash: RequestHash,
    answer: oneshot::Sender<Answer>,
}

impl Expected {
    fn add(
        &mut self,
        key: &TransactionKey,
        hash: RequestHash,
        answer: oneshot::Sender<Answer>,
    ) -> u64 {
        self.last_number += 1;
        let TransactionKey { id, requested_at } = key.clone();
        let (number, since) = (self.last_number, Instant::now());
        let waiting = Waiting { number, since, requested_at, hash, answer };
        self.waiting.entry(id).or_default().push(waiting);
        if self.asked.insert(key.clone(), hash).is_none() {
            self.asked_in_order.push_back(key.clone());
        }
        if self.asked_in_order.len() > REMEMBERED_MAX
            && let Some(oldest) = self.asked_in_order.pop_front()
        {
            self.asked.remove(&oldest);
        }
        self.last_number
    }

    /// Since when the longest call has waited.
    fn oldest(&self) -> Option<Instant> {
        self.waiting.values().flatten().map(|it| it.since).min()
    }

    fn remove(&mut self, id: &TransactionId, number: u64) {
        let Some(waiting) = self.waiting.get_mut(id) else { return };
        waiting.retain(|it| it.number != number);
        if waiting.is_empty() {
            self.waiting.remove(id);
        }
    }

    fn hand_out(&mut self, answer: &Answer) {
        let Some(mut waiting) = self.waiting.remove(&answer.id) else { return };
        let is_exact = |it: &mut Waiting| it.requested_at == answer.requested_at;
        let mut taken: Vec<_> = waiting.extract_if(.., is_exact).collect();
        if taken.is_empty() {
            let decided =
                TransactionKey { id: answer.id.clone(), requested_at: answer.requested_at };
            let decided = self.asked.get(&decided).copied();
            let fits = |it: &Waiting| decided.is_none_or(|hash| hash == it.hash);
            taken.extend(waiting.iter().position(fits).map(|place| waiting.remove(place)));
        }
        for call in taken {
            // An error means that the call has ended.
            let _ = call.answer.send(answer.clone());
        }
        if !waiting.is_empty() {
            self.waiting.insert(answer.id.clone(), waiting);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::{Expected, REMEMBERED_MAX};
    use crate::protocol::{
        ids::{RequestHash, TransactionId, TransactionKey},
        message::{Answer, Outcome},
        time::Time,
    };

    const ONE: RequestHash = RequestHash([1; 16]);
    const OTHER: RequestHash = RequestHash([2; 16]);

    fn key(id: &str, second: u64) -> TransactionKey {
        let requested_at = Time::from_millis(second * 1000);
        TransactionKey { id: TransactionId::parse(id).unwrap(), requested_at }
    }

    fn answer(id: &str, second: u64) -> Answer {
        let TransactionKey { id, requested_at } = key(id, second);
        let decided_at = requested_at;
        let (outcome, reason, unresolved) = (Outcome::Committed, None, vec![]);
        Answer { id, requested_at, outcome, reason, unresolved, decided_at }
    }

    fn add(
        expected: &mut Expected,
        id: &str,
        second: u64,
        hash: RequestHash,
    ) -> oneshot::Receiver<Answer> {
        let (sender, receiver) = oneshot::channel();
        expected.add(&key(id, second), hash, sender);
        receiver
    }

    #[test]
    fn a_result_goes_to_the_call_that_waits_for_its_key() {
        let mut expected = Expected::default();
        let mut first = add(&mut expected, "a", 1, ONE);
        let mut second = add(&mut expected, "a", 2, ONE);
        expected.hand_out(&answer("a", 2));
        assert!(first.try_recv().is_err());
        assert_eq!(second.try_recv().unwrap().requested_at, Time::from_millis(2000));
    }

    #[test]
    fn the_answer_to_a_retry_under_a_new_timestamp_names_the_earlier_transaction() {
        let mut expected = Expected::default();
        let mut retry = add(&mut expected, "a", 2, ONE);
        expected.hand_out(&answer("b", 1));
        assert!(retry.try_recv().is_err());
        expected.hand_out(&answer("a", 1));
        assert_eq!(retry.try_recv().unwrap().requested_at, Time::from_millis(1000));
    }

    #[test]
    fn a_late_copy_of_a_result_does_not_answer_a_request_for_something_else() {
        let mut expected = Expected::default();
        let _first = add(&mut expected, "a", 1, ONE);
        expected.hand_out(&answer("a", 1));
        let mut other = add(&mut expected, "a", 2, OTHER);
        expected.hand_out(&answer("a", 1));
        assert!(other.try_recv().is_err());
    }

    #[test]
    fn two_calls_that_wait_for_one_key_both_get_its_result() {
        let mut expected = Expected::default();
        let mut both = [add(&mut expected, "a", 1, ONE), add(&mut expected, "a", 1, ONE)];
        expected.hand_out(&answer("a", 1));
        assert!(both.iter_mut().all(|it| it.try_recv().is_ok()));
        assert!(expected.waiting.is_empty());
    }

    #[test]
    fn at_most_4096_hashes_are_remembered_and_calls_that_end_leave_nothing() {
        let mut expected = Expected::default();
        for second in 0..2 * REMEMBERED_MAX as u64 {
            drop(add(&mut expected, "a", second, ONE));
            let number = expected.last_number;
            expected.remove(&key("a", second).id, number);
        }
        assert_eq!(expected.asked.len(), REMEMBERED_MAX);
        assert_eq!(expected.asked_in_order.len(), REMEMBERED_MAX);
        assert!(expected.waiting.is_empty());
    }
}
