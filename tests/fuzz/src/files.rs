//! The files of `dtc run` and `dtc submit`, from any bytes.

use std::{
    io::{self, BufRead, BufReader},
    time::Duration,
};

use dtc::{
    complaint::Complaints,
    input::{
        services::{self, Behaviour, ServiceSpec},
        transactions::{SIZE_MAX, Transactions, read_all},
    },
    protocol::message::TransactionSpec,
    wire::{
        hash::request_hash,
        message::{decode_request, encode_request},
    },
};

use crate::{bodies, complaints, json};

const FILE: &str = "f.json";
const DEPTH_MAX: usize = 100;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// `services.json`.
pub fn services(text: &[u8]) {
    let read = services::read(FILE, text);
    assert_eq!(read, services::read(FILE, text), "read twice");
    let value = json::value(json::without_mark(text));
    match read {
        Ok(services) => {
            assert_eq!(value.and_then(|it| it.as_array().map(Vec::len)), Some(services.len()));
            assert!(!services.is_empty());
            for (index, service) in services.iter().enumerate() {
                is_service(service);
                assert!(services[..index].iter().all(|other| other.name != service.name));
            }
            let spaced = json::spaced(str::from_utf8(text).expect("it is JSON"));
            assert_eq!(services::read(FILE, spaced.as_bytes()), Ok(services));
        }
        Err(found) => {
            complaints::are_good(&found, FILE);
            agrees_with_serde(&found, value.as_ref());
        }
    }
}

fn is_service(service: &ServiceSpec) {
    let ServiceSpec { name: _, max_concurrency, max_wait, cap: _, prepare, commit, abort } =
        service;
    assert!(*max_concurrency >= 1 && *max_wait <= DAY);
    for behaviour in [prepare, commit, abort] {
        let Behaviour { latency, refuse_rate, error_rate, panic_rate, hang_rate, .. } = behaviour;
        assert!(latency.min <= latency.max && latency.max <= DAY);
        let rates = [refuse_rate, error_rate, panic_rate, hang_rate];
        assert!(rates.iter().all(|rate| (0.0..=1.0).contains(*rate)));
        assert!(rates.into_iter().sum::<f64>() <= 1.000_001);
    }
    for behaviour in [commit, abort] {
        assert!(behaviour.refuse_rate == 0.0 && !behaviour.read_only);
    }
}

/// `transactions.json`, in either of its forms.
pub fn transactions(text: &[u8]) {
    let read = read(text);
    assert_eq!(read, self::read(Trickle::over(text)), "read bit by bit");
    let (good, bad) = match &read {
        Read::Array(Ok(transactions)) => (transactions.as_slice(), None),
        Read::Array(Err(complaints)) => (&[][..], Some(complaints)),
        Read::Lines(transactions, bad) => (transactions.as_slice(), bad.as_ref()),
    };
    good.iter().for_each(is_transaction);
    if let Some(complaints) = bad {
        complaints::are_good(complaints, FILE);
    }
    match &read {
        Read::Array(Ok(transactions)) => are_read_otherwise(text, transactions),
        Read::Array(Err(complaints)) => {
            agrees_with_serde(complaints, json::value(json::without_mark(text)).as_ref());
        }
        Read::Lines(transactions, None) => are_read_as_an_array(text, transactions),
        Read::Lines(_, Some(_)) => {}
    }
}

#[derive(Debug, PartialEq)]
enum Read {
    Array(Result<Vec<TransactionSpec>, Complaints>),
    /// The good lines, and the complaints that ended it.
    Lines(Vec<TransactionSpec>, Option<Complaints>),
}

fn read(reader: impl BufRead) -> Read {
    let mut lines = match Transactions::open(FILE, reader) {
        Ok(Transactions::Array(transactions)) => return Read::Array(Ok(transactions)),
        Ok(Transactions::Lines(lines)) => lines,
        Err(complaints) => return Read::Array(Err(complaints)),
    };
    let mut good = Vec::new();
    let bad = loop {
        match lines.next() {
            None => break None,
            Some(Ok(transaction)) => good.push(transaction),
            Some(Err(complaints)) => break Some(complaints),
        }
    };
    assert!(lines.next().is_none(), "a bad line is the last one that is read");
    Read::Lines(good, bad)
}

fn is_transaction(transaction: &TransactionSpec) {
    let TransactionSpec { id: _, services, data, request_hash: hash, timeout, answer_at: _ } =
        transaction;
    assert!(!services.is_empty() && services.is_sorted_by(|a, b| a < b));
    assert!(data.as_str().len() <= SIZE_MAX);
    assert_eq!(*hash, request_hash(services, data));
    assert!(timeout.is_none_or(|it| (Duration::from_millis(1)..=DAY).contains(&it)));
    // As it would be sent, unless it is too large for a message.
    if let Ok(body) = encode_request(transaction, None) {
        let request = decode_request(&body, Some(0)).expect("what can be sent can be read");
        assert_eq!((&request.services, &request.data), (services, data));
        bodies::follows(&request, body.len());
    }
}

/// An array is read the same whatever its layout, and by whichever function.
fn are_read_otherwise(text: &[u8], transactions: &[TransactionSpec]) {
    assert_eq!(read_all(FILE, text).as_deref(), Ok(transactions));
    let spaced = json::spaced(str::from_utf8(text).expect("it is JSON"));
    // White space counts towards a transaction's size.
    if spaced.len() <= SIZE_MAX {
        assert_eq!(read_all(FILE, spaced.as_bytes()).as_deref(), Ok(transactions));
    }
}

/// Good lines, with commas between them, are a good array.
fn are_read_as_an_array(text: &[u8], transactions: &[TransactionSpec]) {
    let text = str::from_utf8(json::without_mark(text)).expect("it is JSON");
    let is_blank = |line: &&str| line.chars().all(|it| matches!(it, ' ' | '\t' | '\r'));
    let lines: Vec<&str> = text.split('\n').filter(|line| !is_blank(line)).collect();
    assert_eq!(lines.len(), transactions.len());
    let array = format!("[{}]", lines.join(","));
    assert_eq!(read_all(FILE, array.as_bytes()).as_deref(), Ok(transactions));
}

/// `serde_json` and this reader agree on what is JSON.
fn agrees_with_serde(complaints: &Complaints, value: Option<&serde_json::Value>) {
    let text = complaints.to_string();
    let is_refused = text.contains(": not JSON: ") || text.ends_with(": not UTF-8");
    // A name in a path can say anything.
    let is_about_a_value = complaints.listed()[0].value.is_some();
    if is_refused && !is_about_a_value {
        let is_shallow = value.is_some_and(|it| it.is_array() && json::depth(it) <= DEPTH_MAX);
        assert!(!is_shallow, "{text}");
    } else {
        assert!(value.is_some(), "{text}");
    }
}

/// A reader that returns a few bytes at a time, cut at unexpected places.
struct Trickle<'a> {
    rest: &'a [u8],
    state: u64,
}

impl<'a> Trickle<'a> {
    /// How it is cut depends on the text, so that a finding can be repeated.
    fn over(text: &'a [u8]) -> BufReader<Self> {
        let hash = |state: u64, byte: &u8| (state ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        let state = text.iter().fold(0xcbf2_9ce4_8422_2325, hash);
        let capacity = 1 + (state >> 32) as usize % 24;
        BufReader::with_capacity(capacity, Self { rest: text, state })
    }
}

impl io::Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        if self.state >> 61 == 0 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let wanted = 1 + (self.state >> 40) as usize % 16;
        let n_bytes = wanted.min(buffer.len()).min(self.rest.len());
        let (given, rest) = self.rest.split_at(n_bytes);
        buffer[..n_bytes].copy_from_slice(given);
        self.rest = rest;
        Ok(n_bytes)
    }
}
