//! The transactions of `dtc run`: as one JSON array, or as lines of one object each (NDJSON).
//!
//! ```json
//! [
//!   {"id": "TX1", "involved_services": ["ServiceA", "ServiceB"], "data": {"amount": 100}},
//!   {"id": "TX2", "involved_services": ["ServiceA"], "data": {"item": "Widget"}, "timeout_ms": 500}
//! ]
//! ```
//!
//! | field | value | if missing |
//! |---|---|---|
//! | `id` | `[A-Za-z0-9._:-]{1,128}`, no other transaction's | must be there |
//! | `involved_services` | array of at least one service name; one named twice counts once | must be there |
//! | `data` | any object, in which no field is given twice | must be there |
//! | `timeout_ms` | whole number from 1 to 86400000 (a day): how long the prepares may take | the run's own |
//!
//! The first character that is not whitespace tells the forms apart: `[` begins an array, `{` a
//! line. Nothing at all is no lines. A byte order mark before it is skipped. One transaction is at
//! most [`SIZE_MAX`] bytes, and nested at most 100 deep.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    hash::{BuildHasher, RandomState},
    io::{self, BufRead, Read},
    mem,
    sync::Arc,
    time::Duration,
};

use crate::{
    protocol::{
        ids::{RequestHash, ServiceName, TransactionId},
        message::Payload,
    },
    wire::{
        check::{BYTE_ORDER_MARK, Check, DAY_MS, Path, without_byte_order_mark},
        complaint::{Complaint, Complaints, Place, Position},
        hash::request_hash,
        json::{Kind, Value},
    },
};

/// How many bytes one transaction may have: 256 KiB.
pub const SIZE_MAX: usize = 256 * 1024;

/// A transaction as it is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TransactionSpec {
    /// What it is called.
    pub id: TransactionId,
    /// Every service involved, each once, in name order. Never empty.
    pub services: Arc<[ServiceName]>,
    /// What the services are handed: a JSON object in its canonical form (see
    /// [`hash`](crate::wire::hash)).
    pub data: Payload,
    /// The digest of `services` and `data`.
    pub request_hash: RequestHash,
    /// How long its prepares may take, from 1 ms to a day; `None`: the run's own setting.
    pub timeout: Option<Duration>,
}

/// The transactions of a file, in whichever form it has.
#[derive(Debug)]
pub enum Transactions<R> {
    /// The file is an array: all of it, checked.
    Array(Vec<TransactionSpec>),
    /// The file has lines, which are checked as they are read.
    Lines(Lines<R>),
}

impl<R: BufRead> Transactions<R> {
    /// Looks which form `reader` is in, and reads it to its end if that is an array.
    ///
    /// `file` is what complaints call it.
    ///
    /// # Errors
    ///
    /// It can't be read, begins like neither form, or is an array with something wrong: then
    /// everything that is, at once.
    pub fn open(file: &str, mut reader: R) -> Result<Self, Complaints> {
        let file = Arc::from(file);
        let mut start = Position::START;
        let first = first_byte(&mut reader, &mut start)
            .map_err(|error| complaint(&file, start, unreadable(&error)))?;
        match first {
            Some(b'[') => {
                let mut text = Vec::new();
                reader
                    .read_to_end(&mut text)
                    .map_err(|error| complaint(&file, start, unreadable(&error)))?;
                read_array(&file, start, &text).map(Self::Array)
            }
            Some(b'{') | None => Ok(Self::Lines(Lines::new(file, start, reader))),
            Some(byte) => {
                let found = byte.escape_ascii();
                let rule = format!("not JSON: found `{found}` where `[` or `{{` should be");
                Err(complaint(&file, start, rule))
            }
        }
    }
}

/// The first byte that is neither whitespace nor part of a byte order mark. It stays in `reader`;
/// what stands before it is read, and `start` moves past that.
fn first_byte(reader: &mut impl BufRead, start: &mut Position) -> io::Result<Option<u8>> {
    if reader.fill_buf()?.starts_with(BYTE_ORDER_MARK) {
        reader.consume(BYTE_ORDER_MARK.len());
    }
    loop {
        match reader.fill_buf()?.first() {
            Some(b'\n') => *start = Position { line: start.line + 1, column: 1 },
            Some(b' ' | b'\r' | b'\t') => start.column += 1,
            byte => return Ok(byte.copied()),
        }
        reader.consume(1);
    }
}

fn complaint(file: &Arc<str>, position: Position, rule: String) -> Complaints {
    let (file, place) = (Arc::clone(file), Place::Position(position));
    Complaint { file, place, value: None, rule }.into()
}

fn unreadable(error: &io::Error) -> String {
    format!("can't be read: {error}")
}

/// Reads `text`, the content of `file`, which is one array: a transaction for each element, in its
/// order.
///
/// # Errors
///
/// Everything that is wrong with it, at once.
pub fn read_all(file: &str, text: &[u8]) -> Result<Vec<TransactionSpec>, Complaints> {
    read_array(&file.into(), Position::START, without_byte_order_mark(text))
}

fn read_array(
    file: &Arc<str>,
    start: Position,
    text: &[u8],
) -> Result<Vec<TransactionSpec>, Complaints> {
    let mut check = Check::of_file(file);
    let transactions = read_elements(&mut check, start, text);
    check.complaints.or(transactions)
}

fn read_elements(check: &mut Check, start: Position, text: &[u8]) -> Option<Vec<TransactionSpec>> {
    let value = check.json(start, text)?;
    let elements = check.elements(&Path::TOP, &value, "an array of transactions")?;
    let mut taken = HashMap::with_capacity(elements.len());
    let mut transactions = Vec::with_capacity(elements.len());
    let mut buffer = String::new();
    for (index, element) in elements.iter().enumerate() {
        let taken = |id: &TransactionId| match taken.entry(id.clone()) {
            Entry::Vacant(entry) => {
                entry.insert(index);
                None
            }
            Entry::Occupied(entry) => Some(format!("is the id of $[{}] too", entry.get())),
        };
        let path = Path::TOP.element(index);
        transactions.extend(read_transaction(check, &path, element, taken, &mut buffer));
    }
    Some(transactions)
}

/// `taken` takes an id, or says by whom it is taken already. `buffer` is space to work in.
fn read_transaction(
    check: &mut Check,
    path: &Path<'_>,
    value: &Value<'_>,
    taken: impl FnOnce(&TransactionId) -> Option<String>,
    buffer: &mut String,
) -> Option<TransactionSpec> {
    if value.text.len() > SIZE_MAX {
        check.complain(path, value, too_long());
        return None;
    }
    let known = ["id", "involved_services", "data", "timeout_ms"];
    let [id, services, data, timeout] = check.fields(path, value, &known)?;
    let id = check.required(path, value, "id", id).and_then(|value| {
        let path = path.field("id");
        let id = check.name(&path, value, TransactionId::RULE, TransactionId::parse)?;
        if let Some(rule) = taken(&id) {
            check.complain(&path, value, rule);
        }
        Some(id)
    });
    let services = check
        .required(path, value, "involved_services", services)
        .and_then(|value| read_services(check, &path.field("involved_services"), value));
    let data = check
        .required(path, value, "data", data)
        .and_then(|value| read_data(check, &path.field("data"), value, buffer));
    let timeout = timeout
        .and_then(|value| check.whole_number(&path.field("timeout_ms"), value, 1..=DAY_MS))
        .map(|millis| Duration::from_millis(millis.into()));
    let (services, data) = (services?, data?);
    let request_hash = request_hash(&services, &data);
    Some(TransactionSpec { id: id?, services, data, request_hash, timeout })
}

fn read_services(
    check: &mut Check,
    path: &Path<'_>,
    value: &Value<'_>,
) -> Option<Arc<[ServiceName]>> {
    let elements = check.elements(path, value, "an array of service names")?;
    if elements.is_empty() {
        check.complain(path, value, "must name at least one service");
    }
    let mut services = Vec::with_capacity(elements.len());
    for (index, element) in elements.iter().enumerate() {
        let path = path.element(index);
        services.extend(check.name(&path, element, ServiceName::RULE, ServiceName::parse));
    }
    services.sort();
    services.dedup();
    Some(services.into())
}

fn read_data(
    check: &mut Check,
    path: &Path<'_>,
    value: &Value<'_>,
    buffer: &mut String,
) -> Option<Payload> {
    let Kind::Object(_) = value.kind else {
        check.complain(path, value, "must be an object");
        return None;
    };
    check.refuse_doubles(path, value);
    buffer.clear();
    value.write(buffer);
    Some(Payload::new(buffer.as_str()))
}

fn too_long() -> String {
    format!("must have at most {SIZE_MAX} bytes")
}

/// The transactions of a file of lines, one after another. Blank lines are skipped.
///
/// It holds one line, never more than [`SIZE_MAX`] bytes of it, and a fingerprint of the last
/// [`Lines::IDS_MIN`] ids at least (twice as many at most, then the older half is forgotten): an id
/// that comes again later than that is not noticed. That memory grows with the lines read, up to
/// 72 MB.
///
/// A line is refused with everything that is wrong with it, and is the last one that is read.
#[derive(Debug)]
pub struct Lines<R> {
    file: Arc<str>,
    reader: R,
    /// Where the next line begins.
    next: Position,
    line: Vec<u8>,
    buffer: String,
    taken: TakenIds,
    ended: bool,
}

impl<R> Lines<R> {
    /// An id is known to be taken for this many lines at least.
    pub const IDS_MIN: usize = TakenIds::GENERATION;

    fn new(file: Arc<str>, start: Position, reader: R) -> Self {
        Self {
            file,
            reader,
            next: start,
            line: Vec::new(),
            buffer: String::new(),
            taken: TakenIds::default(),
            ended: false,
        }
    }
}

impl<R: BufRead> Lines<R> {
    /// Reads lines up to the first that isn't blank; `None`: there is none.
    fn next_line(&mut self) -> Result<Option<Position>, Complaints> {
        // Room for what ends a line.
        const READ_MAX: u64 = SIZE_MAX as u64 + 2;
        loop {
            self.line.clear();
            let start = self.next;
            let read = self.reader.by_ref().take(READ_MAX).read_until(b'\n', &mut self.line);
            if let Err(error) = read {
                return Err(complaint(&self.file, start, unreadable(&error)));
            }
            self.next = Position { line: start.line + 1, column: 1 };
            if self.line.is_empty() {
                return Ok(None);
            }
            for end in [b'\n', b'\r'] {
                self.line.pop_if(|byte| *byte == end);
            }
            if self.line.len() > SIZE_MAX {
                return Err(complaint(&self.file, start, too_long()));
            }
            if !self.line.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r')) {
                return Ok(Some(start));
            }
        }
    }

    fn read_line(&mut self, start: Position) -> Result<TransactionSpec, Complaints> {
        let mut check = Check::of_line(&self.file, start.line);
        let transaction = check.json(start, &self.line).and_then(|value| {
            let taken = |id: &TransactionId| {
                (!self.taken.take(id)).then(|| "is the id of an earlier line too".to_owned())
            };
            read_transaction(&mut check, &Path::TOP, &value, taken, &mut self.buffer)
        });
        check.complaints.or(transaction)
    }
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<TransactionSpec, Complaints>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let item = match self.next_line() {
            Ok(Some(start)) => Some(self.read_line(start)),
            Ok(None) => None,
            Err(complaints) => Some(Err(complaints)),
        };
        self.ended = !matches!(item, Some(Ok(_)));
        item
    }
}

/// The ids that are taken, as far as memory goes: a fingerprint of each, in two generations.
///
/// A fingerprint has 128 bits under keys drawn anew for each run, so that neither chance nor intent
/// makes two ids share one.
#[derive(Debug, Default)]
struct TakenIds {
    keys: [RandomState; 2],
    recent: HashSet<u128>,
    /// Full, and forgotten when `recent` is.
    older: HashSet<u128>,
}

impl TakenIds {
    /// As many as the table of a set has room for in 2^21 places (36 MB): one more would double
    /// it.
    const GENERATION: usize = (1 << 21) / 8 * 7;

    /// Takes `id`: whether it was free.
    fn take(&mut self, id: &TransactionId) -> bool {
        let [high, low] = &self.keys;
        let fingerprint = u128::from(high.hash_one(id)) << 64 | u128::from(low.hash_one(id));
        if self.older.contains(&fingerprint) || !self.recent.insert(fingerprint) {
            return false;
        }
        if self.recent.len() == Self::GENERATION {
            self.older = mem::take(&mut self.recent);
        }
        true
    }
}
