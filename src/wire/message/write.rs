//! Writing items as JSON, directly into the body.
//!
//! Names, numbers and hashes are written unescaped, since none of their characters needs an escape;
//! texts are escaped, and cut at [`TEXT_MAX`](super::TEXT_MAX).

use std::fmt::Write as _;

use crate::{
    protocol::{
        ids::{Branch, RequestHash, ServiceName, TransactionKey},
        message::{Outcome, Reason},
        time::Time,
    },
    wire::message::cut,
};

/// An object that is being written.
#[derive(Debug)]
pub struct ObjectWriter<'b> {
    out: &'b mut Vec<u8>,
    is_empty: bool,
}

impl<'b> ObjectWriter<'b> {
    pub(super) fn new(out: &'b mut Vec<u8>) -> Self {
        out.push(b'{');
        Self { out, is_empty: true }
    }

    pub(super) fn end(self) {
        self.out.push(b'}');
    }

    #[inline]
    fn field(&mut self, name: &str) {
        self.out.extend_from_slice(if self.is_empty { b"\"" } else { b",\"" });
        self.is_empty = false;
        self.out.extend_from_slice(name.as_bytes());
        self.out.extend_from_slice(b"\":");
    }

    /// A text that needs no escapes: a name, or one of our keywords.
    #[inline]
    pub(super) fn word(&mut self, name: &str, word: &str) {
        self.field(name);
        quoted(self.out, word);
    }

    /// A text of unknown origin.
    pub(super) fn text(&mut self, name: &str, text: &str) {
        self.field(name);
        escaped(self.out, cut(text));
    }

    /// A text that is passed on whole.
    pub(super) fn whole_text(&mut self, name: &str, text: &str) {
        self.field(name);
        escaped(self.out, text);
    }

    /// A value that is JSON already.
    pub(super) fn json(&mut self, name: &str, json: &str) {
        self.field(name);
        self.out.extend_from_slice(json.as_bytes());
    }

    #[inline]
    pub(super) fn number(&mut self, name: &str, number: u64) {
        self.field(name);
        digits(self.out, number);
    }

    #[inline]
    pub(super) fn flag(&mut self, name: &str, flag: bool) {
        self.field(name);
        self.out.extend_from_slice(if flag { b"true" } else { b"false" });
    }

    /// A time in milliseconds.
    pub(super) fn moment(&mut self, name: &str, moment: Time) {
        self.number(name, moment.as_millis());
    }

    /// A time in whole seconds.
    pub(super) fn requested_at(&mut self, requested_at: Time) {
        self.number("requested_at", requested_at.as_millis() / 1000);
    }

    #[inline]
    pub(super) fn key(&mut self, key: &TransactionKey) {
        self.word("id", key.id.as_str());
        debug_assert_eq!(key.requested_at.as_millis() % 1000, 0, "{key} is not of the wire");
        self.requested_at(key.requested_at);
    }

    pub(super) fn request_hash(&mut self, hash: &RequestHash) {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |nibble: u8| DIGITS.get(usize::from(nibble)).copied().unwrap_or_default();
        self.field("request_hash");
        let mut text = [b'"'; 34];
        let places = text.iter_mut().skip(1);
        let nibbles = hash.0.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        places.zip(nibbles).for_each(|(object, nibble)| *object = digit(nibble));
        self.out.extend_from_slice(&text);
    }

    pub(super) fn outcome(&mut self, name: &str, outcome: Outcome) {
        self.word(name, outcome.as_str());
    }

    pub(super) fn branch(&mut self, name: &str, branch: &Branch) {
        self.field(name);
        self.out.push(b'"');
        self.out.extend_from_slice(branch.instance().as_str().as_bytes());
        self.out.push(b'.');
        digits(self.out, branch.number());
        self.out.push(b'"');
    }

    pub(super) fn branches(&mut self, branches: &[(ServiceName, Branch)]) {
        let mut object = self.object("branches");
        branches.iter().for_each(|(service, branch)| object.branch(service.as_str(), branch));
        object.end();
    }

    pub(super) fn services(&mut self, name: &str, services: &[ServiceName]) {
        self.field(name);
        self.out.push(b'[');
        for (index, service) in services.iter().enumerate() {
            if index > 0 {
                self.out.push(b',');
            }
            quoted(self.out, service.as_str());
        }
        self.out.push(b']');
    }

    pub(super) fn reason(&mut self, reason: &Reason) {
        let mut object = self.object("reason");
        if let Some(service) = &reason.service {
            object.word("service", service.as_str());
        }
        object.word("code", reason.code.as_str());
        if let Some(message) = &reason.message {
            object.text("message", message);
        }
        object.end();
    }

    /// An object within this one.
    pub(super) fn object(&mut self, name: &str) -> ObjectWriter<'_> {
        self.field(name);
        ObjectWriter::new(self.out)
    }
}

#[inline]
fn quoted(out: &mut Vec<u8>, word: &str) {
    out.push(b'"');
    out.extend_from_slice(word.as_bytes());
    out.push(b'"');
}

fn digits(out: &mut Vec<u8>, mut number: u64) {
    let mut text = [0; 20];
    let mut n_digits = 0;
    for object in text.iter_mut().rev() {
        *object = b'0' + (number % 10) as u8;
        n_digits += 1;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(text.get(text.len() - n_digits..).unwrap_or_default());
}

fn escaped(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let mut rest = text;
    while let Some(at) = rest.bytes().position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20)) {
        let (plain, after) = rest.split_at(at);
        out.extend_from_slice(plain.as_bytes());
        let mut characters = after.chars();
        let mut escape = String::new();
        match characters.next() {
            Some('\n') => escape.push_str("\\n"),
            Some('\r') => escape.push_str("\\r"),
            Some('\t') => escape.push_str("\\t"),
            Some(character @ ('"' | '\\')) => escape.extend(['\\', character]),
            // Writing to a string can't fail.
            Some(control) => drop(write!(escape, "\\u{:04x}", u32::from(control))),
            None => {}
        }
        out.extend_from_slice(escape.as_bytes());
        rest = characters.as_str();
    }
    out.extend_from_slice(rest.as_bytes());
    out.push(b'"');
}
