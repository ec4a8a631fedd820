//! What the journal says of transactions, and what is parked of them.
//!
//! It reads the streams with consumers of its own, from some offset to their end, and writes
//! nothing: no worker notices.
//!
//! **Invariant:** a transaction is said not to be there only as of a moment from which on nothing
//! of the journal is missing: [`History::complete_since`].

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

/// For how long a look that failed is repeated, where the next one may succeed: a broker that has just
/// started doesn't know yet who serves a stream, and ends the connection of who reads it.
const AGAIN_FOR: Duration = Duration::from_secs(8);

/// How far back [`Since::Recent`] looks, one step after the other: to look for what was decided a
/// moment ago costs little, however long the journal is.
const STEPS: [Duration; 3] = [
    Duration::from_secs(15 * 60),
    Duration::from_secs(2 * 60 * 60),
    Duration::from_secs(24 * 60 * 60),
];

/// How far back to look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Since {
    /// As far as the journal goes.
    Always,
    /// Until a certain outcome is found for every id, and for a day at most. Others of the same id
    /// that are older than that are not found.
    Recent,
    /// So long ago.
    Ago(Duration),
    /// This moment.
    Moment(Time),
}

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct History {
    /// From when on was looked; `None`: from the journal's beginning.
    pub looked_since: Option<Time>,
    /// Whether the journal has nothing that is older.
    pub is_whole: bool,
    /// From when on nothing is missing in what was read; `None`: the journal has no records.
    pub complete_since: Option<Time>,
    /// What is known of each transaction that has one of the ids.
    pub transactions: BTreeMap<TransactionKey, Past>,
    /// How many records of the journal were read.
    pub n_records: u64,
    /// How many messages, or items in them, can't be understood. Everyone passes them over.
    pub n_unreadable: u64,
}

/// What is known of one transaction.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Past {
    /// The first record of it that was read: its outcome, if [`Past::is_certain`].
    pub decision: Option<Decision>,
    /// Whether no earlier record of it can be missing.
    pub is_certain: bool,
    /// How many more records of it there are. They are void.
    pub n_void: u64,
    /// What was handed to a person about it, in order.
    pub parked: Vec<Parked>,
    /// What was settled of that, in order.
    pub settled: Vec<Settled>,
}

/// The journal can't be read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HistoryError {
    /// No connection.
    #[error("no connection to read the journal on")]
    Connect(#[source] ConnectionError),
    /// A stream can't be read.
    #[error(transparent)]
    Scan(#[from] ScanError),
}

impl History {
    /// What was found for `id`, the earliest first.
    pub fn of_id<'a>(
        &'a self,
        id: &TransactionId,
    ) -> impl Iterator<Item = (&'a TransactionKey, &'a Past)> {
        let from = TransactionKey { id: id.clone(), requested_at: Time::EPOCH };
        let id = id.clone();
        self.transactions.range(from..).take_while(move |(key, _)| key.id == id)
    }

    /// Whether an outcome of `id` was found, and no earlier record can change that.
    fn is_certain_of(&self, id: &TransactionId) -> bool {
        let mut found = self.of_id(id).peekable();
        found.peek().is_some() && found.all(|(_, past)| past.decision.is_some() && past.is_certain)
    }
}

impl HistoryError {
    /// Whether it may be otherwise soon, without anybody's doing.
    fn may_pass(&self) -> bool {
        match self {
            // It is there, and says that it can't let us in yet.
            Self::Connect(ConnectionError::Unavailable { source, .. }) => {
                matches!(source.kind(), ErrorKind::ProtocolError(_))
            }
            Self::Connect(_) => false,
            Self::Scan(error) => error.may_pass(),
        }
    }
}

/// Looks up all transactions that have one of `ids`, where no two clocks of the system differ by more
/// than `clock_margin`. What fails and may pass is tried again for some seconds.
///
/// # Errors
///
/// The journal can't be read, or not to its end.
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

/// The same, for what was decided at `cutoff` or later.
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
        tracing::debug!(error = %ErrorChain(&error), "the journal can't be read yet: again");
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
    /// The offset that comes next in the journal, if it isn't the first.
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
        // What is parked was decided before: so the decision of whatever is found here is there, and
        // what was parked of a later decision lies behind the same moment.
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

    /// From when on nothing of the journal is missing, by its oldest records.
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

    /// Takes in a message of the journal.
    fn take(&mut self, offset: u64, delivery: &Delivery) {
        // Offsets are consecutive: what was between is gone, and may have been about anything.
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
        // Before the first record that is there others may have been, made later by another clock.
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

    /// The items of a message, without those that can't be understood.
    fn items<T: Item>(&mut self, delivery: &Delivery) -> Vec<T> {
        let mut unreadable = |error: Malformed| {
            self.history.n_unreadable += 1;
            tracing::debug!(%error, "passed over");
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
