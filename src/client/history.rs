//! Looks up transactions in the journal, and in the stream of parked ones.
//!
//! It reads both streams to their ends with its own consumers, and writes nothing, so no worker is
//! affected.
//!
//! **Invariant:** that a transaction has no decision is reported only for transactions requested
//! after [`History::complete_since`], from which on no part of the journal is missing.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use lapin::{Connection, ErrorKind, message::Delivery, types::ShortString};
use tokio::time::Instant;

use crate::{
    clock::Clock,
    error::ErrorChain,
    protocol::{
        ids::{TransactionId, TransactionKey},
        message::{Decision, Parked},
        time::Time,
    },
    transport::amqp::{
        connection::{Backoff, Broker, ConnectionError, close},
        names::Names,
        stream::{Scan, ScanError, StreamStart},
    },
    wire::message::{Item, JournalBegun, Kind, Malformed, Settled, decode},
};

/// For how long to retry a lookup that failed for a reason that may pass: a broker that has just started
/// may not know the leader of a stream yet, and closes the connection of a reader.
const AGAIN_FOR: Duration = Duration::from_secs(8);

/// How far back each step of [`Since::Recent`] looks, so that looking up a recent decision is cheap
/// however long the journal is.
const STEPS: [Duration; 3] = [
    Duration::from_secs(15 * 60),
    Duration::from_secs(2 * 60 * 60),
    Duration::from_secs(24 * 60 * 60),
];

/// From when on to read the journal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Since {
    /// From its beginning.
    Always,
    /// As far back as needed to find a certain outcome for every id, but a day at most. Older
    /// transactions with the same ids are not found.
    Recent,
    /// From this long ago.
    Ago(Duration),
    /// From this time.
    Moment(Time),
}

/// The result of a lookup.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct History {
    /// The time from which on the journal was read; `None`: from its beginning.
    pub looked_since: Option<Time>,
    /// Whether the journal has no older records.
    pub is_whole: bool,
    /// The time from which on no record is missing in what was read; `None`: the journal has no
    /// records.
    pub complete_since: Option<Time>,
    /// Each transaction that has one of the ids.
    pub transactions: BTreeMap<TransactionKey, Past>,
    /// How many records of the journal were read.
    pub n_records: u64,
    /// How many messages, or items of messages, could not be decoded. All readers skip them.
    pub n_unreadable: u64,
}

/// The records of one transaction.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Past {
    /// The first decision that was read: the outcome, if [`Past::is_certain`].
    pub decision: Option<Decision>,
    /// Whether no earlier decision can be missing.
    pub is_certain: bool,
    /// The number of later decisions, which are void.
    pub n_void: u64,
    /// Its `parked` records, in order.
    pub parked: Vec<Parked>,
    /// Its `settled` records, in order.
    pub settled: Vec<Settled>,
}

/// A lookup failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HistoryError {
    /// No connection.
    #[error("no connection for reading the journal")]
    Connect(#[source] ConnectionError),
    /// A stream can't be read.
    #[error(transparent)]
    Scan(#[from] ScanError),
}

impl History {
    /// The transactions whose id is `id`, the earliest first.
    pub fn of_id<'a>(
        &'a self,
        id: &TransactionId,
    ) -> impl Iterator<Item = (&'a TransactionKey, &'a Past)> {
        let from = TransactionKey { id: id.clone(), requested_at: Time::EPOCH };
        let id = id.clone();
        self.transactions.range(from..).take_while(move |(key, _)| key.id == id)
    }

    /// Whether outcomes were found for `id`, and no earlier record can contradict them.
    fn is_certain_of(&self, id: &TransactionId) -> bool {
        let mut found = self.of_id(id).peekable();
        found.peek().is_some() && found.all(|(_, past)| past.decision.is_some() && past.is_certain)
    }
}

impl HistoryError {
    /// Whether a retry may succeed without anybody changing anything.
    fn may_pass(&self) -> bool {
        match self {
            // A broker that answers, but can't accept connections yet.
            Self::Connect(ConnectionError::Unavailable { source, .. }) => {
                matches!(source.kind(), ErrorKind::ProtocolError(_))
            }
            Self::Connect(_) => false,
            Self::Scan(error) => error.may_pass(),
        }
    }
}

/// Looks up all transactions that have one of `ids`. No two clocks of the system may differ by more than
/// `clock_margin`. A failure that may pass is retried for some seconds.
///
/// # Errors
///
/// The journal can't be read to its end.
pub async fn look_up(
    broker: &Broker,
    names: &Names,
    ids: &BTreeSet<TransactionId>,
    since: Since,
    clock_margin: Duration,
) -> Result<History, HistoryError> {
    let now = Clock::start().now();
    let cutoff = match since {
        Since::Always => None,
        Since::Ago(duration) => Some(now - duration),
        Since::Moment(moment) => Some(moment),
        Since::Recent => {
            let [steps @ .., last] = STEPS;
            for step in steps {
                let history =
                    look_since(broker, names, ids, Some(now - step), clock_margin).await?;
                if history.is_whole || ids.iter().all(|id| history.is_certain_of(id)) {
                    return Ok(history);
                }
            }
            Some(now - last)
        }
    };
    look_since(broker, names, ids, cutoff, clock_margin).await
}

/// Looks up transactions that were decided at `cutoff` or later.
async fn look_since(
    broker: &Broker,
    names: &Names,
    ids: &BTreeSet<TransactionId>,
    cutoff: Option<Time>,
    clock_margin: Duration,
) -> Result<History, HistoryError> {
    let until = Instant::now() + AGAIN_FOR;
    let mut backoff = Backoff::default();
    loop {
        let error = match look_up_once(broker, names, ids, cutoff, clock_margin).await {
            Ok(history) => return Ok(history),
            Err(error) => error,
        };
        let next = Instant::now() + backoff.pause();
        if !error.may_pass() || next > until {
            return Err(error);
        }
        tracing::debug!(error = %ErrorChain(&error), "the journal can't be read yet; trying again");
        tokio::time::sleep_until(next).await;
    }
}

async fn look_up_once(
    broker: &Broker,
    names: &Names,
    ids: &BTreeSet<TransactionId>,
    cutoff: Option<Time>,
    clock_margin: Duration,
) -> Result<History, HistoryError> {
    let connection = broker.connect("status").await.map_err(HistoryError::Connect)?;
    let history = History { looked_since: cutoff, ..History::default() };
    let mut reader = HistoryReader { ids, clock_margin, history, next: None };
    let read = reader.read(&connection, names, cutoff).await;
    close(&connection).await;
    read?;
    Ok(reader.history)
}

struct HistoryReader<'a> {
    ids: &'a BTreeSet<TransactionId>,
    clock_margin: Duration,
    history: History,
    /// The next offset of the journal; `None` before the first message.
    next: Option<u64>,
}

impl HistoryReader<'_> {
    async fn read(
        &mut self,
        connection: &Connection,
        names: &Names,
        cutoff: Option<Time>,
    ) -> Result<(), ScanError> {
        let from = match cutoff {
            None => {
                self.history.is_whole = true;
                StreamStart::First
            }
            Some(cutoff) => {
                let head = self.head(connection, names.journal()).await?;
                self.history.is_whole = head.is_none_or(|head| head > cutoff);
                self.history.complete_since = head.map(|head| head.max(cutoff));
                StreamStart::Timestamp((cutoff - self.clock_margin).as_millis() / 1000)
            }
        };
        // A transaction is parked after it is decided. So this order finds the decision of every
        // parked record that is read, and every parked record of a decision after `cutoff`.
        let mut unresolved = Scan::open(connection, names.unresolved(), from).await?;
        while let Some((_, delivery)) = unresolved.next().await? {
            self.take_unresolved(&delivery);
        }
        unresolved.close().await;
        let mut journal = Scan::open(connection, names.journal(), from).await?;
        while let Some((offset, delivery)) = journal.next().await? {
            self.take(offset, &delivery);
        }
        journal.close().await;
        Ok(())
    }

    /// The time from which on the journal is complete, by its oldest records.
    async fn head(
        &self,
        connection: &Connection,
        journal: ShortString,
    ) -> Result<Option<Time>, ScanError> {
        let nothing = BTreeSet::new();
        let clock_margin = self.clock_margin;
        let history = History::default();
        let mut reader = HistoryReader { ids: &nothing, clock_margin, history, next: None };
        let mut scan = Scan::open(connection, journal, StreamStart::First).await?;
        while reader.history.complete_since.is_none()
            && let Some((offset, delivery)) = scan.next().await?
        {
            reader.take(offset, &delivery);
        }
        scan.close().await;
        Ok(reader.history.complete_since)
    }

    /// Handles a message of the journal.
    fn take(&mut self, offset: u64, delivery: &Delivery) {
        // Offsets are consecutive: after a gap, any transaction may lack a record.
        if self.next.is_some_and(|next| next != offset) {
            self.history.complete_since = None;
        }
        self.next = Some(offset + 1);
        match kind(delivery) {
            Some(Kind::Decision) => {
                for decision in self.items(delivery) {
                    self.take_decision(decision);
                }
            }
            Some(Kind::JournalBegun) => {
                for JournalBegun { complete_since } in self.items(delivery) {
                    self.history.complete_since.get_or_insert(complete_since);
                }
            }
            Some(_) | None => self.history.n_unreadable += 1,
        }
    }

    fn take_decision(&mut self, decision: Decision) {
        let History { complete_since, transactions, n_records, .. } = &mut self.history;
        *n_records += 1;
        // Records before the first one are gone; by another clock, they may have been made later.
        let complete_since = *complete_since.get_or_insert(decision.decided_at + self.clock_margin);
        if !self.ids.contains(&decision.key.id) {
            return;
        }
        let past = transactions.entry(decision.key.clone()).or_default();
        if past.decision.is_some() {
            past.n_void += 1;
        } else {
            past.is_certain = complete_since <= decision.key.requested_at - self.clock_margin;
            past.decision = Some(decision);
        }
    }

    fn take_unresolved(&mut self, delivery: &Delivery) {
        match kind(delivery) {
            Some(Kind::Parked) => {
                for parked in self.items::<Parked>(delivery) {
                    if self.ids.contains(&parked.key.id) {
                        self.past_of(&parked.key).parked.push(parked);
                    }
                }
            }
            Some(Kind::Settled) => {
                for settled in self.items::<Settled>(delivery) {
                    if self.ids.contains(&settled.key.id) {
                        self.past_of(&settled.key).settled.push(settled);
                    }
                }
            }
            Some(_) | None => self.history.n_unreadable += 1,
        }
    }

    fn past_of(&mut self, key: &TransactionKey) -> &mut Past {
        self.history.transactions.entry(key.clone()).or_default()
    }

    /// The items of a message that can be decoded.
    fn items<T: Item>(&mut self, delivery: &Delivery) -> Vec<T> {
        let mut unreadable = |error: Malformed| {
            self.history.n_unreadable += 1;
            tracing::debug!(%error, "skipping what can't be decoded");
        };
        let items = decode(&delivery.data).unwrap_or_else(|error| {
            unreadable(error);
            Vec::new()
        });
        items.into_iter().filter_map(|item| item.map_err(&mut unreadable).ok()).collect()
    }
}

fn kind(delivery: &Delivery) -> Option<Kind> {
    delivery.properties.kind().as_ref().and_then(|text| Kind::parse_type(text.as_str()))
}
