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
//! | `id` | `[A-Za-z0-9._:-]{1,128}`, unique in the file | required |
//! | `involved_services` | array of at least one service name; one named twice counts once | required |
//! | `data` | any object, in which no field is given twice | required |
//! | `timeout_ms` | whole number from 1 to 86400000 (a day): how long the prepares may take | the default of the run |
//! | `answer` | `applied` or `decided`: when the result of a commit goes out; in one process always when it is applied | `applied` |
//!
//! The first character that is not whitespace decides the form: `[` begins an array, `{` a line. An
//! empty file is a file of no lines. A byte order mark before it is skipped. One transaction has at
//! most [`SIZE_MAX`] bytes, and is nested at most 100 deep.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    hash::{BuildHasher, RandomState},
    io::{self, BufRead, Read},
    mem,
    sync::Arc,
    time::Duration,
};

use crate::{
    complaint::{Complaint, Complaints, Location, Position, TextLocation},
    json::{
        Value,
        check::{BYTE_ORDER_MARK, Checker, DAY_MS, JsonPath, without_byte_order_mark},
    },
    protocol::{ids::TransactionId, message::TransactionSpec},
    wire::{
        hash::request_hash,
        transaction::{read_answer_at, read_data, read_services},
    },
};

/// How many bytes one transaction may have: 256 KiB.
pub const SIZE_MAX: usize = 256 * 1024;

/// The transactions of a file, in either form.
#[derive(Debug)]
pub enum Transactions<R> {
    /// The file is an array, which is read and checked as a whole.
    Array(Vec<TransactionSpec>),
    /// The file has lines, which are checked as they are read.
    Lines(TransactionLines<R>),
}

impl<R: BufRead> Transactions<R> {
    /// Detects the form of `reader`, and reads it to its end if it is an array.
    ///
    /// `file` is its name in complaints.
    ///
    /// # Errors
    ///
    /// It can't be read, begins like neither form, or is an array with errors: then all of them at
    /// once.
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
            Some(b'{') | None => Ok(Self::Lines(TransactionLines::new(file, start, reader))),
            Some(byte) => {
                let found = byte.escape_ascii();
                let rule = format!("not JSON: found `{found}` where `[` or `{{` should be");
                Err(complaint(&file, start, rule))
            }
        }
    }
}

/// The first byte that is neither whitespace nor part of a byte order mark. It stays in `reader`;
/// everything before it is consumed, and `start` advances past that.
fn first_byte(reader: &mut impl BufRead, start: &mut Position) -> io::Result<Option<u8>> {
    // A pipe may deliver the mark in pieces.
    for (index, part) in BYTE_ORDER_MARK.iter().enumerate() {
        if peek(reader)? != Some(*part) {
            match BYTE_ORDER_MARK.first() {
                Some(begun) if index > 0 => return Ok(Some(*begun)),
                Some(_) | None => break,
            }
        }
        reader.consume(1);
    }
    loop {
        match peek(reader)? {
            Some(b'\n') => *start = Position { line: start.line + 1, column: 1 },
            Some(b' ' | b'\r' | b'\t') => start.column += 1,
            byte => return Ok(byte),
        }
        reader.consume(1);
    }
}

/// The next byte, which stays in `reader`.
fn peek(reader: &mut impl BufRead) -> io::Result<Option<u8>> {
    loop {
        match reader.fill_buf() {
            Ok(bytes) => return Ok(bytes.first().copied()),
            // A signal interrupted the read.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn complaint(file: &Arc<str>, position: Position, rule: String) -> Complaints {
    let location = Location::Text { name: Arc::clone(file), at: TextLocation::Position(position) };
    Complaint { location, value: None, rule }.into()
}

fn unreadable(error: &io::Error) -> String {
    format!("can't be read: {error}")
}

/// Reads `text`, the content of `file`, as one array: a transaction for each element, in order.
///
/// # Errors
///
/// All errors in it, at once.
pub fn read_all(file: &str, text: &[u8]) -> Result<Vec<TransactionSpec>, Complaints> {
    read_array(&file.into(), Position::START, without_byte_order_mark(text))
}

fn read_array(
    file: &Arc<str>,
    start: Position,
    text: &[u8],
) -> Result<Vec<TransactionSpec>, Complaints> {
    let mut check = Checker::of_file(file);
    let transactions = read_elements(&mut check, start, text);
    check.complaints.or(transactions)
}

fn read_elements(
    check: &mut Checker,
    start: Position,
    text: &[u8],
) -> Option<Vec<TransactionSpec>> {
    let value = check.json(start, text)?;
    let elements = check.elements(&JsonPath::TOP, &value, "an array of transactions")?;
    let mut taken = HashMap::with_capacity(elements.len());
    let mut transactions = Vec::with_capacity(elements.len());
    let mut buffer = String::new();
    for (index, element) in elements.iter().enumerate() {
        let taken = |id: &TransactionId| match taken.entry(id.clone()) {
            Entry::Vacant(entry) => {
                entry.insert(index);
                None
            }
            Entry::Occupied(entry) => Some(format!("must differ from $[{}].id", entry.get())),
        };
        let path = JsonPath::TOP.element(index);
        transactions.extend(read_transaction(check, &path, element, taken, &mut buffer));
    }
    Some(transactions)
}

/// `taken` takes an id, or returns which transaction has it already. `buffer` is scratch space.
fn read_transaction(
    check: &mut Checker,
    path: &JsonPath<'_>,
    value: &Value<'_>,
    taken: impl FnOnce(&TransactionId) -> Option<String>,
    buffer: &mut String,
) -> Option<TransactionSpec> {
    if value.text.len() > SIZE_MAX {
        check.complain(path, value, too_long());
        return None;
    }
    let known = ["id", "involved_services", "data", "timeout_ms", "answer"];
    let [id, services, data, timeout, answer] = check.fields(path, value, &known)?;
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
    let answer_at = answer.and_then(|value| read_answer_at(check, &path.field("answer"), value));
    let answer_at = answer_at.unwrap_or_default();
    let (services, data) = (services?, data?);
    let request_hash = request_hash(&services, &data);
    Some(TransactionSpec { id: id?, services, data, request_hash, timeout, answer_at })
}

fn too_long() -> String {
    format!("must have at most {SIZE_MAX} bytes")
}

/// The transactions of a file of lines, one after another. Blank lines are skipped.
///
/// It keeps one line, never more than [`SIZE_MAX`] bytes of it, and a fingerprint of at least the
/// last [`TransactionLines::IDS_MIN`] ids (at twice as many, it forgets the older half): it does
/// not notice an id that is repeated later than that. This memory grows with the lines read, up to
/// some 110 MB.
///
/// A line is refused with all its errors, and is then the last one that is read.
#[derive(Debug)]
pub struct TransactionLines<R> {
    file: Arc<str>,
    reader: R,
    /// Where the next line begins.
    next: Position,
    /// The current line, without its end.
    line: Vec<u8>,
    /// Scratch space for its data.
    buffer: String,
    taken: TakenIds,
    /// Whether nothing more is read: at the end, or after a complaint.
    ended: bool,
}

impl<R> TransactionLines<R> {
    /// For how many lines, at least, a repeated id is noticed.
    pub const IDS_MIN: usize = TakenIds::GENERATION;

    /// The reader of the lines: what it has buffered has not been read as a line yet.
    pub fn reader(&self) -> &R {
        &self.reader
    }

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

impl<R: BufRead> TransactionLines<R> {
    /// Reads up to the next line that isn't blank; `None`: there is none.
    fn next_line(&mut self) -> Result<Option<Position>, Complaints> {
        // With room for the line's end.
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
        let mut check = Checker::of_line(&self.file, start.line);
        let transaction = check.json(start, &self.line).and_then(|value| {
            let taken = |id: &TransactionId| {
                (!self.taken.take(id))
                    .then(|| "must differ from the id of every earlier line".to_owned())
            };
            read_transaction(&mut check, &JsonPath::TOP, &value, taken, &mut self.buffer)
        });
        check.complaints.or(transaction)
    }
}

impl<R: BufRead> Iterator for TransactionLines<R> {
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

/// The ids that are taken: a fingerprint of each, in two generations.
///
/// A fingerprint has 128 bits under random keys that are new in each run, so that two ids collide
/// neither by chance nor by intent.
#[derive(Debug)]
struct TakenIds {
    keys: [RandomState; 2],
    /// How many ids fill `recent`.
    generation: usize,
    recent: HashSet<u128>,
    /// A full generation, which is forgotten when `recent` is full.
    older: HashSet<u128>,
}

impl Default for TakenIds {
    fn default() -> Self {
        Self {
            keys: Default::default(),
            generation: Self::GENERATION,
            recent: HashSet::new(),
            older: HashSet::new(),
        }
    }
}

impl TakenIds {
    /// As many as a hash set holds in 2^21 buckets (36 MB): one more would double the table.
    const GENERATION: usize = (1 << 21) / 8 * 7;

    /// Takes `id`; returns whether it was free.
    fn take(&mut self, id: &TransactionId) -> bool {
        let [high, low] = &self.keys;
        let fingerprint = u128::from(high.hash_one(id)) << 64 | u128::from(low.hash_one(id));
        if self.older.contains(&fingerprint) || !self.recent.insert(fingerprint) {
            return false;
        }
        if self.recent.len() == self.generation {
            mem::swap(&mut self.recent, &mut self.older);
            self.recent.clear();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{self, BufReader, Read},
        time::Duration,
    };

    use super::{SIZE_MAX, TakenIds, TransactionLines, Transactions, read_all};
    use crate::protocol::ids::TransactionId;
    use crate::protocol::message::TransactionSpec;

    const EXAMPLE: &str = r#"[
        {"id": "TX1", "involved_services": ["ServiceB", "ServiceA"], "data": {"amount": 100}},
        {"id": "TX2", "involved_services": ["ServiceA"], "data": {"item": "Widget"},
         "timeout_ms": 500}
    ]"#;

    #[test]
    fn an_array_is_read_in_its_order() {
        let [first, second] = read_all("f", EXAMPLE.as_bytes()).unwrap().try_into().unwrap();
        assert_eq!(first.id.as_str(), "TX1");
        assert_eq!(names(&first), ["ServiceA", "ServiceB"]);
        assert_eq!(first.data.as_str(), r#"{"amount":100}"#);
        assert_eq!(first.timeout, None);
        assert_eq!((second.id.as_str(), names(&second)), ("TX2", vec!["ServiceA"]));
        assert_eq!(second.timeout, Some(Duration::from_millis(500)));
        assert_ne!(first.request_hash, second.request_hash);
    }

    #[test]
    fn an_empty_array_is_no_transactions() {
        assert_eq!(read_all("f", b" [ ] "), Ok(vec![]));
    }

    #[test]
    fn a_service_named_twice_counts_once() {
        let text = br#"[{"id": "1", "involved_services": ["b", "a", "b"], "data": {}}]"#;
        assert_eq!(names(&read_all("f", text).unwrap()[0]), ["a", "b"]);
    }

    #[test]
    fn data_keeps_its_numbers_as_they_are_written() {
        let text = br#"[{"id": "1", "involved_services": ["a"],
            "data": {"b": [12345678901234567890123, 1.10, 1E+2, -0], "\u0061": "\u00e9\n/\/"}}]"#;
        let transactions = read_all("f", text).unwrap();
        let data = "{\"a\":\"é\\n//\",\"b\":[12345678901234567890123,1.10,1E+2,-0]}";
        assert_eq!(transactions[0].data.as_str(), data);
    }

    #[test]
    fn the_first_character_tells_array_and_lines_apart() {
        for text in
            [EXAMPLE.to_owned(), format!("\n \t\r\n{EXAMPLE}"), format!("\u{feff}{EXAMPLE}")]
        {
            let Ok(Transactions::Array(transactions)) = Transactions::open("f", text.as_bytes())
            else {
                panic!("{text:?} is an array");
            };
            assert_eq!(transactions.len(), 2);
        }
        for (text, n_lines) in [("", 0), (" \n\n", 0), ("\u{feff}", 0), (LINE, 1)] {
            assert_eq!(lines_of(text).count(), n_lines, "{text:?}");
        }
        let opened = Transactions::open("t.json", &b"\n  null"[..]);
        let complaint = "t.json:2:3: not JSON: found `n` where `[` or `{` should be";
        assert_eq!(opened.unwrap_err().to_string(), complaint);
        let opened = Transactions::open("t.json", "é".as_bytes());
        let complaint = r"t.json:1:1: not JSON: found `\xc3` where `[` or `{` should be";
        assert_eq!(opened.unwrap_err().to_string(), complaint);
    }

    #[test]
    fn a_file_may_arrive_in_pieces_of_any_size() {
        /// Returns one byte at a time, after an interrupt each time.
        struct Pieces<'a>(&'a [u8], bool);
        impl Read for Pieces<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                self.1 = !self.1;
                if self.1 {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                let n_bytes = buffer.len().min(1);
                self.0.read(&mut buffer[..n_bytes])
            }
        }
        for (text, n_read) in [
            (format!("\u{feff}\n[{LINE}]"), Ok(1)),
            (format!("\u{feff} \n{LINE}\n"), Ok(1)),
            (LINE.to_owned(), Ok(1)),
            (String::new(), Ok(0)),
            ("\u{feff}".to_owned(), Ok(0)),
            (
                "\u{f000}[]".to_owned(),
                Err("t:1:1: not JSON: found `\\xef` where `[` or `{` should be"),
            ),
        ] {
            let reader = BufReader::with_capacity(1, Pieces(text.as_bytes(), false));
            let read = Transactions::open("t", reader).map(|transactions| match transactions {
                Transactions::Array(all) => all.len(),
                Transactions::Lines(lines) => lines.map(Result::unwrap).count(),
            });
            assert_eq!(
                read.map_err(|it| it.to_string()),
                n_read.map_err(str::to_owned),
                "{text:?}"
            );
        }
    }

    #[test]
    fn positions_count_what_stands_before_the_array() {
        let opened = Transactions::open("t.json", &b"\xEF\xBB\xBF\n  [}"[..]);
        let complaint = "t.json:2:4: not JSON: found `}` where a value should be";
        assert_eq!(opened.unwrap_err().to_string(), complaint);
    }

    /// Asserts the complaints about an array, without the file's name.
    fn complains<const N: usize>(text: &str, complaints: [&str; N]) {
        let found = read_all("t.json", text.as_bytes()).unwrap_err().to_string();
        let found: Vec<_> = found.lines().map(|it| it.strip_prefix("t.json").unwrap()).collect();
        assert_eq!(found, complaints);
    }

    #[test]
    fn all_complaints_of_an_array_come_at_once() {
        let text = r#"[
            {"id": "a b", "involved_services": [], "data": [], "timeout_ms": 0, "retries": 1},
            {"id": "x", "involved_services": ["s", 5, "a/b"], "data": {"a": {"b": 1, "b": 2}}},
            {"id": "x", "involved_services": "s"},
            {"id": 5, "data": {}, "timeout_ms": 86400001},
            "y"
        ]"#;
        complains(
            text,
            [
                ": $[0].retries is 1: unknown field; there are `id`, `involved_services`, `data`, \
                 `timeout_ms`, `answer`",
                ": $[0].id is \"a b\": must match [A-Za-z0-9._:-]{1,128}",
                ": $[0].involved_services is []: must name at least one service",
                ": $[0].data is []: must be an object",
                ": $[0].timeout_ms is 0: must be a whole number from 1 to 86400000",
                ": $[1].involved_services[1] is 5: must be a string",
                ": $[1].involved_services[2] is \"a/b\": must match [A-Za-z0-9_-]{1,64}",
                ": $[1].data.a.b is 2: must be given once in its object",
                ": $[2].id is \"x\": must differ from $[1].id",
                ": $[2].involved_services is \"s\": must be an array of service names",
                ": $[2] is {\"id\": \"x\", \"involved_services\": \"s\"}: must have a field `data`",
                ": $[3].id is 5: must be a string",
                ": $[3] is {\"id\": 5, \"data\": {}, \"timeout_ms\": 86400001}: must have a field \
                 `involved_services`",
                ": $[3].timeout_ms is 86400001: must be a whole number from 1 to 86400000",
                ": $[4] is \"y\": must be an object",
            ],
        );
    }

    #[test]
    fn a_missing_id_is_complained_about() {
        let element = r#"{"involved_services": ["s"], "data": {}}"#;
        complains(
            &format!("[{element}]"),
            [&format!(": $[0] is {element}: must have a field `id`")],
        );
    }

    #[test]
    fn a_field_given_twice_is_refused() {
        complains(
            r#"[{"id": "1", "involved_services": ["s"], "data": {}, "id": "2"}]"#,
            [": $[0].id is \"2\": must be given once in its object"],
        );
    }

    #[test]
    fn a_field_with_a_strange_name_is_quoted_in_the_path() {
        complains(
            r#"[{"id": "1", "involved_services": ["s"], "data": {"a b": 1, "a b": 1, "": [{"\n": 1, "\n": 1}]}}]"#,
            [
                ": $[0].data[\"\"][0][\"\\n\"] is 1: must be given once in its object",
                ": $[0].data[\"a b\"] is 1: must be given once in its object",
            ],
        );
    }

    #[test]
    fn what_is_not_an_array_is_refused() {
        complains("{}", [": $ is {}: must be an array of transactions"]);
    }

    #[test]
    fn truncated_json_is_refused_with_line_and_column() {
        complains("[\n{\"id\":", [":2:7: not JSON: the file ends where a value should be"]);
        complains("[{}", [":1:4: not JSON: the file ends where `,` or `]` should be"]);
    }

    #[test]
    fn what_is_not_utf8_is_refused_with_line_and_column() {
        let complaints = read_all("t.json", b"[\n \"\xc3\xa9\xff").unwrap_err();
        assert_eq!(complaints.to_string(), "t.json:2:4: not UTF-8");
    }

    #[test]
    fn data_nested_too_deep_is_refused_with_line_and_column() {
        let data = |depth| format!("{}0{}", "{\"a\":".repeat(depth), "}".repeat(depth));
        let text =
            |depth| format!(r#"[{{"id":"1","involved_services":["s"],"data":{}}}]"#, data(depth));
        assert!(read_all("f", text(98).as_bytes()).is_ok());
        complains(&text(99), [":1:535: not JSON: nested more than 100 deep"]);
    }

    #[test]
    fn a_transaction_has_at_most_256_kib() {
        for (excess, is_ok) in [(0, true), (1, false)] {
            let line = line_of(SIZE_MAX + excess);
            assert_eq!(read_all("t.json", format!("[{line}]").as_bytes()).is_ok(), is_ok);
            assert_eq!(lines_of(&line).all(|it| it.is_ok()), is_ok);
            assert_eq!(lines_of(&format!("{line}\r\n")).all(|it| it.is_ok()), is_ok);
        }
        complains(
            &format!("[{}]", line_of(SIZE_MAX + 1)),
            [
                ": $[0] is {\"id\":\"1\",\"involved_services\":[\"s\"],\"data\":{\"a\":\"xxxxxxxxxxxxxx…: must \
              have at most 262144 bytes",
            ],
        );
    }

    const LINE: &str = r#"{"id": "1", "involved_services": ["s"], "data": {}}"#;

    /// A line of so many bytes.
    fn line_of(size: usize) -> String {
        let line =
            |fill| format!(r#"{{"id":"1","involved_services":["s"],"data":{{"a":"{fill}"}}}}"#);
        line("x".repeat(size - line(String::new()).len()))
    }

    fn lines_of(text: &str) -> TransactionLines<&[u8]> {
        match Transactions::open("t.ndjson", text.as_bytes()).unwrap() {
            Transactions::Lines(lines) => lines,
            Transactions::Array(_) => panic!("{text:?} is an array"),
        }
    }

    fn names(transaction: &TransactionSpec) -> Vec<&str> {
        transaction.services.iter().map(|name| name.as_str()).collect()
    }

    #[test]
    fn blank_lines_are_skipped_and_counted() {
        let mut lines = lines_of(
            "\n{\"id\":\"1\",\"involved_services\":[\"s\"],\"data\":{}}\r\n \t\r\n\r\n{}\n",
        );
        assert!(lines.next().unwrap().is_ok());
        let complaints = lines.next().unwrap().unwrap_err();
        assert_eq!(
            complaints.to_string(),
            "t.ndjson:5: $ is {}: must have a field `id`\n\
             t.ndjson:5: $ is {}: must have a field `involved_services`\n\
             t.ndjson:5: $ is {}: must have a field `data`"
        );
    }

    #[test]
    fn a_bad_line_is_the_last_one_that_is_read() {
        for bad in ["{", "{}", "7", "\"\u{7}\"", &line_of(SIZE_MAX + 1), LINE] {
            let text = format!("{LINE}\n{bad}\n{LINE}\n");
            let mut lines = lines_of(&text);
            assert!(lines.next().unwrap().is_ok());
            assert!(lines.next().unwrap().is_err(), "{bad:?}");
            assert!(lines.next().is_none());
        }
    }

    #[test]
    fn complaints_about_a_line_name_it() {
        let complaint = |bad: &str| {
            let text = format!("{}\n{bad}", LINE.replace("\"1\"", "\"0\""));
            lines_of(&text).last().unwrap().unwrap_err().to_string()
        };
        assert_eq!(
            complaint(&format!("{LINE}{LINE}")),
            "t.ndjson:2:52: not JSON: found `{` where nothing more should be"
        );
        assert_eq!(
            complaint("  {\"id\":"),
            "t.ndjson:2:9: not JSON: the line ends where a value should be"
        );
        assert_eq!(complaint("[]"), "t.ndjson:2: $ is []: must be an object");
        assert_eq!(
            complaint(&line_of(SIZE_MAX + 1)),
            "t.ndjson:2:1: must have at most 262144 bytes"
        );
        assert_eq!(
            complaint(&LINE.replace('1', "0")),
            "t.ndjson:2: $.id is \"0\": must differ from the id of every earlier line"
        );
    }

    #[test]
    fn an_endless_line_is_refused_without_being_read() {
        let head = io::Cursor::new("{\"id\": \"");
        let reader = BufReader::new(head.chain(io::repeat(b'x')));
        let Ok(Transactions::Lines(mut lines)) = Transactions::open("t.ndjson", reader) else {
            panic!("it begins with a brace");
        };
        let complaints = lines.next().unwrap().unwrap_err();
        assert_eq!(complaints.to_string(), "t.ndjson:1:1: must have at most 262144 bytes");
        assert!(lines.line.capacity() <= 2 * SIZE_MAX);
    }

    #[test]
    fn a_file_that_cannot_be_read_to_its_end_is_complained_about() {
        #[derive(Debug)]
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("the disk is gone"))
            }
        }
        let opened = Transactions::open("t.json", BufReader::new(Broken));
        let complaint = "t.json:1:1: can't be read: the disk is gone";
        assert_eq!(opened.unwrap_err().to_string(), complaint);
        let opened = Transactions::open("t.json", BufReader::new(b" [".chain(Broken)));
        let complaint = "t.json:1:2: can't be read: the disk is gone";
        assert_eq!(opened.unwrap_err().to_string(), complaint);
        let text = format!("{LINE}\n{{");
        let reader = BufReader::with_capacity(16, text.as_bytes().chain(Broken));
        let Ok(Transactions::Lines(mut lines)) = Transactions::open("t.ndjson", reader) else {
            panic!("it begins with a brace");
        };
        assert!(lines.next().unwrap().is_ok());
        let complaints = lines.next().unwrap().unwrap_err();
        assert_eq!(complaints.to_string(), "t.ndjson:2:1: can't be read: the disk is gone");
    }

    #[test]
    fn a_repeated_id_is_noticed_for_at_least_a_generation() {
        let id = |number: usize| TransactionId::parse(&number.to_string()).unwrap();
        let mut taken = TakenIds { generation: 100, ..TakenIds::default() };
        for number in 0..1000 {
            assert!(taken.take(&id(number)));
            let known_from = usize::saturating_sub(number, 99);
            assert!((known_from..=number).all(|known| !taken.take(&id(known))));
            assert!(taken.recent.len() + taken.older.len() <= 200);
        }
        assert!(taken.take(&id(0)));
    }
}
