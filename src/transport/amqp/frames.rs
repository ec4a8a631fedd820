//! Screens the broker's frames before lapin parses them.
//!
//! lapin parses nested tables and arrays by recursion, on a thread with a stack of 2 MiB: 3,000
//! levels, 21 KB of a header, crash the process. It closes the connection if a short string is not
//! UTF-8, if a value has an unknown type, or if a frame is larger than was negotiated; the broker
//! then delivers the same message again, to the next consumer. RabbitMQ checks none of this, except
//! that a value's type is one of its own. So a [`FrameFilter`] reads the frames first and rewrites
//! what lapin could not parse: it replaces a header table, or all properties, by a header called
//! [`UNREADABLE`] that gives the reason, and a byte that is not UTF-8 by `?`. A frame keeps its
//! size. Bodies pass unread.
//!
//! The filter also notes returned messages: see [`ReturnedMessages`].
//!
//! **Invariant:** every frame that a broker may send on behalf of a peer is passed on as one that
//! lapin can parse, within [`DEPTH_MAX`] levels of recursion.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The header of a message whose own headers could not be read. Its value is the reason.
pub const UNREADABLE: &str = "dtc-unreadable";

/// How many levels of tables and arrays a header table may have, itself included.
pub const DEPTH_MAX: usize = 64;

/// How many values a header table may have on all its levels. A parsed value takes some hundred
/// bytes; on the wire it may take one.
pub const VALUES_MAX: usize = 4096;

/// The frame size that we negotiate. lapin keeps two buffers of 32 frames for each connection, and all of
/// what passes goes through them: with RabbitMQ's default, 128 KiB, these are 16 MiB in a process.
pub const FRAME_MAX: u32 = 32_768;

/// The smallest frame size that lapin accepts.
const FRAME_MAX_MIN: u32 = lapin::protocol::constants::FRAME_MIN_SIZE;

/// Type, channel and size of a frame.
const HEAD: usize = 7;

/// The last byte of a frame.
const END: u8 = 0xCE;

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;

/// The first byte of a protocol header, which a broker sends if it speaks another version.
const PROTOCOL: u8 = b'A';
const PROTOCOL_SIZE: u64 = 8;

/// The name, the type and the size of the text of a header called [`UNREADABLE`].
const MARKER_MIN: usize = 1 + UNREADABLE.len() + 1 + 4;

/// Class, weight and body size of a content header.
const BEFORE_PROPERTIES: usize = 12;
const FLAGS: usize = 2;

const HEADERS_FLAG: u16 = 1 << 13;
const APP_ID_FLAG: u16 = 1 << 3;

/// The size of the content header that replaces one that is larger than a frame may be.
const COMPACT: usize = HEAD + BEFORE_PROPERTIES + FLAGS + 4 + MARKER_MIN + TOO_LARGE.len() + 1;

const TOO_LARGE: &str = "its properties are larger than a frame may be";
const TOO_NARROW: &str = "its `frame_max` is less than 8192 bytes: set it to 8192 or more";
const TOO_DEEP: &str = "its headers nest more than 64 levels deep";
const TOO_MANY: &str = "its headers have more than 4096 values";
const MALFORMED_HEADERS: &str = "its headers are not a table as AMQP has it";
const MALFORMED_PROPERTIES: &str = "its properties are not a list as AMQP has it";

/// What to do with the bytes given to [`FrameFilter::step`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FilterStep {
    /// Pass on so many of them, at least one.
    Pass(usize),
    /// Drop so many of them, at least one.
    Drop(usize),
    /// Wait for more bytes.
    Wait,
    /// No broker sends this, and lapin must not see it.
    Refuse(&'static str),
}

/// Screens the frames of one connection.
#[derive(Debug)]
pub struct FrameFilter {
    state: FilterState,
    /// How large a frame may be for lapin to parse it.
    frame_max: u32,
    returns: ReturnedMessages,
    /// The channels on which a message is being returned, and its content header has not arrived
    /// yet.
    returning: HashSet<u16>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum FilterState {
    /// At the beginning of a frame.
    AtFrame,
    /// So many more bytes are passed on.
    Passing(u64),
    /// So many more bytes are dropped.
    Dropping(u64),
    /// This is not AMQP. lapin closes the connection at the first byte that was passed on in this
    /// state, and so parses nothing after it.
    Lost,
}

impl FrameFilter {
    /// A filter for a connection with frames of at most `frame_max` bytes.
    pub fn new(frame_max: u32, returns: ReturnedMessages) -> Self {
        let frame_max = frame_max.max(FRAME_MAX_MIN);
        Self { state: FilterState::AtFrame, frame_max, returns, returning: HashSet::new() }
    }

    /// Examines bytes that were neither passed on nor dropped yet, and rewrites those that lapin
    /// could not parse.
    pub fn step(&mut self, bytes: &mut [u8]) -> FilterStep {
        let mut passed = 0;
        loop {
            let rest = bytes.get_mut(passed..).unwrap_or_default();
            if passed > 0 && matches!(self.state, FilterState::Dropping(_)) {
                return FilterStep::Pass(passed);
            }
            match self.step_in_one_frame(rest) {
                FilterStep::Pass(more) => passed += more,
                step @ (FilterStep::Drop(_) | FilterStep::Wait | FilterStep::Refuse(_)) => {
                    return if passed > 0 { FilterStep::Pass(passed) } else { step };
                }
            }
        }
    }

    fn step_in_one_frame(&mut self, bytes: &mut [u8]) -> FilterStep {
        let Some(first) = bytes.first().copied() else { return FilterStep::Wait };
        match self.state {
            FilterState::Lost => return FilterStep::Pass(bytes.len()),
            FilterState::Passing(rest) => return self.pass(rest, bytes.len()),
            FilterState::Dropping(rest) => return self.drop_some(rest, bytes),
            FilterState::AtFrame => {}
        }
        match first {
            METHOD | HEADER | BODY | HEARTBEAT => {}
            PROTOCOL => return self.pass(PROTOCOL_SIZE, bytes.len()),
            _ => return self.lose_sync(bytes.len()),
        }
        let (Some(channel), Some(size)) = (u16_at(bytes, 1), u32_at(bytes, 3)) else {
            return FilterStep::Wait;
        };
        let total = HEAD as u64 + u64::from(size) + 1;
        match first {
            METHOD | HEADER if total <= u64::from(self.frame_max) => {
                // The frame is no larger than the limit.
                let total = total as usize;
                let Some(frame) = bytes.get_mut(..total) else { return FilterStep::Wait };
                if frame.last() != Some(&END) {
                    return self.lose_sync(bytes.len());
                }
                let payload = frame.get_mut(HEAD..total - 1).unwrap_or_default();
                match first {
                    METHOD => {
                        if let Err(why) = self.method(channel, payload) {
                            return FilterStep::Refuse(why);
                        }
                    }
                    _ => self.content_header(channel, payload),
                }
                FilterStep::Pass(total)
            }
            METHOD => FilterStep::Refuse("a method frame is larger than a frame may be"),
            HEADER => self.compact(channel, total, bytes),
            _ => self.pass(total, bytes.len()),
        }
    }

    /// Passes on those of `rest` bytes that have arrived.
    fn pass(&mut self, rest: u64, n_arrived: usize) -> FilterStep {
        let some = n_arrived.min(usize::try_from(rest).unwrap_or(usize::MAX));
        self.state = match rest - some as u64 {
            0 => FilterState::AtFrame,
            rest => FilterState::Passing(rest),
        };
        FilterStep::Pass(some)
    }

    fn drop_some(&mut self, rest: u64, bytes: &[u8]) -> FilterStep {
        let some = bytes.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
        let rest = rest - some as u64;
        // lapin was given another end of this frame, so it would not notice.
        if rest == 0 && bytes.get(some - 1) != Some(&END) {
            return FilterStep::Refuse("a frame doesn't end where it should");
        }
        self.state = match rest {
            0 => FilterState::AtFrame,
            rest => FilterState::Dropping(rest),
        };
        FilterStep::Drop(some)
    }

    fn lose_sync(&mut self, n_arrived: usize) -> FilterStep {
        self.state = FilterState::Lost;
        FilterStep::Pass(n_arrived)
    }

    /// Replaces a content header that is larger than a frame may be by a small one: the broker
    /// doesn't split it, and adds its own headers to one that already had the largest size.
    fn compact(&mut self, channel: u16, total: u64, bytes: &mut [u8]) -> FilterStep {
        let Some(compact) = bytes.get_mut(..COMPACT) else { return FilterStep::Wait };
        let size = (COMPACT - HEAD - 1) as u32;
        put(compact, 3, &size.to_be_bytes());
        put(compact, COMPACT - 1, &[END]);
        let payload = compact.get_mut(HEAD..COMPACT - 1).unwrap_or_default();
        replace_properties(payload, TOO_LARGE);
        self.note_if_returned(channel, "");
        self.state = FilterState::Dropping(total - COMPACT as u64);
        FilterStep::Pass(COMPACT)
    }

    /// Checks that lapin can parse a method; refuses one that only a client sends and that may hold
    /// a table.
    fn method(&mut self, channel: u16, payload: &mut [u8]) -> Result<(), &'static str> {
        use FieldType::{Long, LongLong, LongString, Octet, Short, ShortString, Table};
        let (Some(class), Some(method)) = (u16_at(payload, 0), u16_at(payload, 2)) else {
            return Ok(());
        };
        let fields: &[FieldType] = match (class, method) {
            // connection: start, open-ok, close, blocked
            (10, 10) => &[Octet, Octet, Table, LongString, LongString],
            (10, 41 | 60) => &[ShortString],
            (10, 50) | (20, 40) => &[Short, ShortString, Short, Short],
            (10, 30) => {
                let theirs = u32_at(payload, 6).filter(|theirs| *theirs > 0).unwrap_or(u32::MAX);
                if theirs < FRAME_MAX_MIN {
                    return Err(TOO_NARROW);
                }
                self.frame_max = self.frame_max.min(theirs);
                &[Short, Long, Short]
            }
            // channel: open-ok
            (20, 11) => {
                self.returns.forget(channel);
                self.returning.remove(&channel);
                &[LongString]
            }
            // queue: declare-ok
            (50, 11) => &[ShortString, Long, Long],
            // basic: consume-ok, cancel, cancel-ok, return, deliver, get-ok, get-empty
            (60, 21 | 31 | 72) => &[ShortString],
            (60, 30) => &[ShortString, Octet],
            (60, 50) => {
                self.returning.insert(channel);
                &[Short, ShortString, ShortString, ShortString]
            }
            (60, 60) => &[ShortString, LongLong, Octet, ShortString, ShortString],
            (60, 71) => &[LongLong, Octet, ShortString, ShortString, Long],
            // connection: start-ok; exchange: declare, bind, unbind; queue: declare, bind, unbind;
            // basic: consume
            (10, 11) | (40, 10 | 30 | 40) | (50, 10 | 20 | 50) | (60, 20) => {
                return Err("a broker sent a method that is a client's");
            }
            _ => &[],
        };
        let mut at = 4;
        for field in fields {
            let Some(range) = field.range(payload, at) else { return Ok(()) };
            at = range.end;
            let content = payload.get_mut(range).unwrap_or_default();
            match field {
                ShortString => make_utf8(content),
                Table => screen_table(content)?,
                Octet | Short | Long | LongLong | LongString => {}
            }
        }
        Ok(())
    }

    /// Ensures that lapin can parse a content header.
    fn content_header(&mut self, channel: u16, payload: &mut [u8]) {
        match screen_properties(payload) {
            Ok(message_id) => {
                if self.returning.contains(&channel) {
                    let message_id = payload.get(message_id).unwrap_or_default();
                    self.note_if_returned(channel, str::from_utf8(message_id).unwrap_or_default());
                }
            }
            Err(why) => {
                replace_properties(payload, why);
                self.note_if_returned(channel, "");
            }
        }
    }

    /// Notes the message, if it is being returned.
    fn note_if_returned(&mut self, channel: u16, message_id: &str) {
        if self.returning.remove(&channel) {
            self.returns.note(channel, message_id);
        }
    }
}

/// A field of a method. Flags are an octet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum FieldType {
    Octet,
    Short,
    Long,
    LongLong,
    ShortString,
    LongString,
    Table,
}

/// The properties of a message in the order of their flags, from the highest bit.
const PROPERTIES: [FieldType; 14] = {
    use FieldType::{LongLong, Octet, ShortString, Table};
    [
        ShortString, // content_type
        ShortString, // content_encoding
        Table,
        Octet,       // delivery_mode
        Octet,       // priority
        ShortString, // correlation_id
        ShortString, // reply_to
        ShortString, // expiration
        ShortString, // message_id
        LongLong,    // timestamp
        ShortString, // type
        ShortString, // user_id
        ShortString, // app_id
        ShortString, // cluster_id
    ]
};

const MESSAGE_ID: usize = 8;

impl FieldType {
    /// The range of the content of the field that begins at `at`; the next field begins at its end.
    fn range(self, bytes: &[u8], at: usize) -> Option<Range<usize>> {
        let (begin, size) = match self {
            Self::Octet => (at, 1),
            Self::Short => (at, 2),
            Self::Long => (at, 4),
            Self::LongLong => (at, 8),
            Self::ShortString => (at + 1, usize::from(*bytes.get(at)?)),
            Self::LongString | Self::Table => (at + 4, long_at(bytes, at)?),
        };
        let end = begin.checked_add(size).filter(|end| *end <= bytes.len())?;
        Some(begin..end)
    }
}

/// Ensures that the properties in a content header can be parsed; returns the range of the message
/// id, which is empty if there is none.
fn screen_properties(payload: &mut [u8]) -> Result<Range<usize>, &'static str> {
    let flags = u16_at(payload, BEFORE_PROPERTIES).ok_or(MALFORMED_PROPERTIES)?;
    let mut at = BEFORE_PROPERTIES + FLAGS;
    let mut message_id = 0..0;
    // Only if the table ends where the rest of the properties begins can a marker take its place.
    let mut bad_table = None;
    for (index, property) in PROPERTIES.iter().enumerate() {
        if flags & (1 << 15 >> index) == 0 {
            continue;
        }
        let range = property.range(payload, at).ok_or(MALFORMED_PROPERTIES)?;
        at = range.end;
        if index == MESSAGE_ID {
            message_id = range.clone();
        }
        let content = payload.get_mut(range.clone()).unwrap_or_default();
        match property {
            FieldType::ShortString => make_utf8(content),
            FieldType::Table => {
                if let Err(why) = screen_table(content) {
                    bad_table = Some((range, why));
                }
            }
            FieldType::Octet
            | FieldType::Short
            | FieldType::Long
            | FieldType::LongLong
            | FieldType::LongString => {}
        }
    }
    if at != payload.len() {
        return Err(MALFORMED_PROPERTIES);
    }
    if let Some((range, why)) = bad_table {
        let table = payload.get_mut(range).unwrap_or_default();
        if table.len() < MARKER_MIN {
            return Err(why);
        }
        replace_table(table, why);
    }
    Ok(message_id)
}

/// Replaces all properties by a header with the reason. If there is no room for it, other
/// properties fill the space; RabbitMQ parses a table before it accepts a message, so this happens
/// only to deeply nested ones, which take more space.
fn replace_properties(payload: &mut [u8], why: &str) {
    let Some(room) = payload.len().checked_sub(BEFORE_PROPERTIES + FLAGS) else { return };
    let properties = payload.get_mut(BEFORE_PROPERTIES..).unwrap_or_default();
    if room >= 4 + MARKER_MIN {
        put(properties, 0, &HEADERS_FLAG.to_be_bytes());
        let size = (room - 4) as u32;
        put(properties, FLAGS, &size.to_be_bytes());
        put_marker(properties.get_mut(FLAGS + 4..).unwrap_or_default(), why);
    } else if let Some(length) = room.checked_sub(1) {
        put(properties, 0, &APP_ID_FLAG.to_be_bytes());
        put(properties, FLAGS, &[length as u8]);
        properties.get_mut(FLAGS + 1..).unwrap_or_default().fill(b'?');
    } else {
        put(properties, 0, &[0; FLAGS]);
    }
}

/// Replaces all headers by one with the reason, except for numbers that the broker has added, by
/// which the reader of a stream counts.
fn replace_table(table: &mut [u8], why: &str) {
    const KEPT_MAX: usize = 16;
    let (mut at, mut kept) = (0, 0);
    let mut n_kept = 0;
    while let Some(name) = FieldType::ShortString.range(table, at) {
        let value = name.end;
        let Some(end) = end_of_value(table, value) else { break };
        let is_kept = n_kept < KEPT_MAX
            && table.get(name.clone()).is_some_and(|name| name.starts_with(b"x-"))
            && table.get(value).is_some_and(|kind| b"bBsuIilL".contains(kind))
            && table.len() - (kept + end - at) >= MARKER_MIN;
        if is_kept {
            make_utf8(table.get_mut(name).unwrap_or_default());
            table.copy_within(at..end, kept);
            kept += end - at;
            n_kept += 1;
        }
        at = end;
    }
    put_marker(table.get_mut(kept..).unwrap_or_default(), why);
}

/// Fills `room`, at least [`MARKER_MIN`] bytes, with one header that gives the reason.
fn put_marker(room: &mut [u8], why: &str) {
    let Some(length) = room.len().checked_sub(MARKER_MIN) else { return };
    put(room, 0, &[UNREADABLE.len() as u8]);
    put(room, 1, UNREADABLE.as_bytes());
    put(room, 1 + UNREADABLE.len(), b"S");
    put(room, MARKER_MIN - 4, &(length as u32).to_be_bytes());
    let text = room.get_mut(MARKER_MIN..).unwrap_or_default();
    text.fill(b' ');
    let shown = length.min(why.len());
    put(text, 0, why.as_bytes().get(..shown).unwrap_or_default());
}

/// Ensures that a table can be parsed, and makes the names in it UTF-8; `table` is its content,
/// after its size.
fn screen_table(table: &mut [u8]) -> Result<(), &'static str> {
    /// An open level: where it ends, and whether its values have names.
    type Level = (usize, bool);
    let mut levels: [Level; DEPTH_MAX] = [(0, false); DEPTH_MAX];
    let mut depth = 1_usize;
    levels[0] = (table.len(), true);
    let (mut at, mut n_values) = (0, 0);
    while let Some((end, has_names)) = depth.checked_sub(1).and_then(|top| levels.get(top).copied())
    {
        if at == end {
            depth -= 1;
            continue;
        }
        n_values += 1;
        if n_values > VALUES_MAX {
            return Err(TOO_MANY);
        }
        if has_names {
            let name = FieldType::ShortString.range(table, at).filter(|name| name.end <= end);
            let name = name.ok_or(MALFORMED_HEADERS)?;
            at = name.end;
            make_utf8(table.get_mut(name).unwrap_or_default());
        }
        let kind = table.get(at).copied().unwrap_or_default();
        let end_of_value = end_of_value(table, at).ok_or(MALFORMED_HEADERS)?;
        if end_of_value > end {
            return Err(MALFORMED_HEADERS);
        }
        if let b'F' | b'A' = kind {
            *levels.get_mut(depth).ok_or(TOO_DEEP)? = (end_of_value, kind == b'F');
            depth += 1;
            at += 1 + 4;
        } else {
            at = end_of_value;
        }
    }
    Ok(())
}

/// The end of the value whose type is at `at`. The types are RabbitMQ's; lapin also knows `U`.
fn end_of_value(bytes: &[u8], at: usize) -> Option<usize> {
    let behind = at + 1;
    let size = match bytes.get(at)? {
        b'V' => 0,
        b't' | b'b' | b'B' => 1,
        b's' | b'u' | b'U' => 2,
        b'I' | b'i' | b'f' => 4,
        b'D' => 5,
        b'l' | b'L' | b'd' | b'T' => 8,
        b'S' | b'x' | b'A' | b'F' => long_at(bytes, behind)?.checked_add(4)?,
        _ => return None,
    };
    behind.checked_add(size).filter(|end| *end <= bytes.len())
}

/// Replaces every byte that belongs to no UTF-8 character.
fn make_utf8(text: &mut [u8]) {
    let mut at = 0;
    while let Some(rest) = text.get_mut(at..)
        && let Err(error) = str::from_utf8(rest)
    {
        let begin = error.valid_up_to();
        let size = error.error_len().unwrap_or(rest.len() - begin);
        rest.get_mut(begin..begin + size).unwrap_or_default().fill(b'?');
        at += begin + size;
    }
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + what.len()) {
        place.copy_from_slice(what);
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

fn long_at(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32_at(bytes, at)?).ok()
}

/// The messages that the broker has returned on one connection since no queue took them.
///
/// The broker returns a message before it confirms it, and the filter sees both before lapin does.
/// So when lapin reports a confirm, it is known here whether that message was returned. lapin
/// itself attaches to a confirm whichever message was returned first.
#[derive(Clone, Debug, Default)]
pub struct ReturnedMessages(Arc<Mutex<ReturnGenerations>>);

/// Recent returns, and older ones: when there are too many, the older half is dropped.
#[derive(Debug, Default)]
struct ReturnGenerations {
    young: ReturnCounts,
    old: ReturnCounts,
}

#[derive(Debug, Default)]
struct ReturnCounts {
    /// How often it was returned, by channel and message id.
    channels: HashMap<u16, HashMap<Box<str>, u32>>,
    /// The number of ids.
    size: usize,
}

impl ReturnedMessages {
    /// How many returns are kept, at least.
    pub const MAX: usize = 65_536;

    /// Whether the message with this id, published on `channel`, was returned. It reports each
    /// return once. A message without an id has an empty one.
    pub fn take(&self, channel: u16, message_id: &str) -> bool {
        let mut noted = self.lock();
        noted.young.take(channel, message_id) || noted.old.take(channel, message_id)
    }

    fn note(&self, channel: u16, message_id: &str) {
        let mut noted = self.lock();
        let noted = &mut *noted;
        if noted.young.size >= Self::MAX / 2 {
            noted.old = std::mem::take(&mut noted.young);
        }
        noted.young.add(channel, message_id);
    }

    /// A new channel starts without the returns of an earlier one with the same number.
    fn forget(&self, channel: u16) {
        let mut noted = self.lock();
        noted.young.forget(channel);
        noted.old.forget(channel);
    }

    fn lock(&self) -> MutexGuard<'_, ReturnGenerations> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReturnCounts {
    fn add(&mut self, channel: u16, message_id: &str) {
        let messages = self.channels.entry(channel).or_default();
        match messages.get_mut(message_id) {
            Some(times) => *times = times.saturating_add(1),
            None => {
                messages.insert(message_id.into(), 1);
                self.size += 1;
            }
        }
    }

    fn take(&mut self, channel: u16, message_id: &str) -> bool {
        let Some(messages) = self.channels.get_mut(&channel) else { return false };
        let Some(times) = messages.get_mut(message_id) else { return false };
        *times -= 1;
        if *times == 0 {
            messages.remove(message_id);
            self.size -= 1;
        }
        true
    }

    fn forget(&mut self, channel: u16) {
        if let Some(messages) = self.channels.remove(&channel) {
            self.size -= messages.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::frame::{AMQPFrame, gen_frame, parsing::parse_frame};
    use lapin::{
        BasicProperties,
        protocol::{AMQPClass, basic},
        types::{AMQPValue, FieldArray, FieldTable},
    };
    use proptest::{
        collection::vec,
        prelude::{Just, ProptestConfig, Strategy, any, prop_oneof, proptest},
    };

    use super::{
        BODY, DEPTH_MAX, END, FRAME_MAX, FilterStep, FrameFilter, HEADER, METHOD, ReturnedMessages,
        TOO_NARROW, UNREADABLE, VALUES_MAX,
    };

    /// The output for bytes that arrive in pieces of these sizes, cyclically.
    fn screened_in(filter: &mut FrameFilter, bytes: &[u8], sizes: &[usize]) -> Vec<u8> {
        let (mut passed, mut held) = (Vec::new(), Vec::new());
        let mut sizes = sizes.iter().cycle();
        let mut rest = bytes;
        while !rest.is_empty() {
            let (piece, others) = rest.split_at(rest.len().min(*sizes.next().unwrap()));
            (rest, held) = (others, [&held[..], piece].concat());
            loop {
                match filter.step(&mut held) {
                    FilterStep::Pass(size) => passed.extend(held.drain(..size)),
                    FilterStep::Drop(size) => drop(held.drain(..size)),
                    FilterStep::Wait => break,
                    FilterStep::Refuse(_) => return passed,
                }
            }
        }
        passed
    }

    fn screened(bytes: &[u8]) -> Vec<u8> {
        screened_in(&mut filter(), bytes, &[usize::MAX])
    }

    fn filter() -> FrameFilter {
        FrameFilter::new(FRAME_MAX, ReturnedMessages::default())
    }

    fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[kind], &channel.to_be_bytes()[..], &size, payload, &[END]].concat()
    }

    /// A content header of a message with `headers` and the id `m1`.
    fn message(headers: &[u8]) -> Vec<u8> {
        header_frame(&[&table(headers)[..], &[2, b'm', b'1']].concat(), 1 << 13 | 1 << 7)
    }

    fn header_frame(properties: &[u8], flags: u16) -> Vec<u8> {
        let before = [&60_u16.to_be_bytes()[..], &[0; 2], &5_u64.to_be_bytes()].concat();
        frame(HEADER, 1, &[&before[..], &flags.to_be_bytes(), properties].concat())
    }

    fn table(entries: &[u8]) -> Vec<u8> {
        [&u32::try_from(entries.len()).unwrap().to_be_bytes(), entries].concat()
    }

    /// A header with so many levels of tables (`F`) and arrays (`A`), in turn; the table that
    /// contains it counts.
    fn nested(levels: usize, kinds: &[u8]) -> Vec<u8> {
        let mut inner = Vec::new();
        for level in (0..levels - 1).rev() {
            let kind = kinds[level % kinds.len()];
            let is_named = level == 0 || kinds[(level - 1) % kinds.len()] == b'F';
            let name: &[u8] = if is_named { &[1, b'n'] } else { &[] };
            inner = [name, &[kind], &table(&inner)].concat();
        }
        inner
    }

    fn parsed(bytes: &[u8]) -> AMQPFrame {
        let (rest, frame) = parse_frame(bytes).unwrap();
        assert_eq!(rest, b"");
        frame
    }

    fn properties(bytes: &[u8]) -> BasicProperties {
        let AMQPFrame::Header(1, header) = parsed(bytes) else { panic!("it is no header") };
        assert_eq!((header.class_id, header.body_size), (60, 5));
        header.properties
    }

    /// Why the message is unreadable, if it is.
    fn why(properties: &BasicProperties) -> Option<String> {
        let marker = properties.headers().as_ref()?.inner().get(UNREADABLE)?;
        let text = marker.as_long_string()?.to_string();
        Some(text.trim_end().to_owned())
    }

    #[test]
    fn headers_of_64_levels_are_passed_on_as_they_are_and_deeper_ones_are_not() {
        for kinds in [&b"F"[..], b"A", b"FA", b"FFA"] {
            let bytes = message(&nested(DEPTH_MAX, kinds));
            assert_eq!(screened(&bytes), bytes);
            parsed(&bytes);
            for levels in [DEPTH_MAX + 1, 1000, 4500] {
                let bytes = message(&nested(levels, kinds));
                let passed = screened(&bytes);
                assert_eq!(passed.len(), bytes.len());
                let properties = properties(&passed);
                assert!(why(&properties).unwrap().contains("more than 64 levels"));
                assert_eq!(properties.message_id(), &Some("m1".into()));
            }
        }
    }

    #[test]
    fn a_table_of_any_size_is_replaced_by_one_of_the_same_size() {
        for size in 1..700 {
            // A value of an unknown type.
            let mut headers = vec![b'?'; size];
            headers[0] = 0;
            let passed = screened(&message(&headers));
            assert_eq!(passed.len(), message(&headers).len());
            let properties = properties(&passed);
            let says_why = why(&properties).is_some_and(|why| MALFORMED.starts_with(&why));
            assert_eq!(says_why, size + 3 >= super::MARKER_MIN, "{size}");
        }
    }

    const MALFORMED: &str = super::MALFORMED_HEADERS;

    #[test]
    fn malformed_properties_are_replaced_whatever_their_size() {
        for size in 0..700 {
            // The content type would be longer than the whole frame.
            let bytes = header_frame(&vec![0xFF; size.min(200)], 0xFFFF);
            let passed = screened(&bytes);
            assert_eq!(passed.len(), bytes.len());
            properties(&passed);
        }
        let bytes = header_frame(&[0xFF; 200], 0xFFFF);
        assert!(why(&properties(&screened(&bytes))).unwrap().contains("properties"));
    }

    #[test]
    fn numbers_that_the_broker_added_are_kept() {
        let broker = [&b"\x0fx-stream-offsetl"[..], &7_i64.to_be_bytes()].concat();
        let own = nested(100, b"F");
        for headers in [[&broker[..], &own].concat(), [&own[..], &broker].concat()] {
            let properties = properties(&screened(&message(&headers)));
            assert!(why(&properties).is_some());
            let headers = properties.headers().as_ref().unwrap();
            let offset = headers.inner().get("x-stream-offset");
            assert_eq!(offset, Some(&AMQPValue::LongLongInt(7)));
            assert_eq!(headers.inner().len(), 2);
        }
    }

    #[test]
    fn more_values_than_the_limit_are_not_passed_on() {
        let many = |count| [&[1, b'n', b'A'][..], &table(&vec![b'V'; count])].concat();
        let bytes = message(&many(VALUES_MAX - 1));
        assert_eq!(screened(&bytes), bytes);
        let properties = properties(&screened(&message(&many(VALUES_MAX))));
        assert!(why(&properties).unwrap().contains("more than 4096 values"));
    }

    #[test]
    fn bytes_that_are_not_utf8_become_question_marks() {
        let deliver = |key: &[u8]| {
            let key = [&[u8::try_from(key.len()).unwrap()], key].concat();
            let method = [0, 60, 0, 60, 1, b't', 0, 0, 0, 0, 0, 0, 0, 9, 0, 1, b'e'];
            frame(METHOD, 1, &[&method[..], &key].concat())
        };
        for (sent, read) in
            [(&b"a.\xFFb"[..], "a.?b"), (b"\xC3", "?"), (b"\xE2\x82x", "??x"), (b"\xC3\xA4", "ä")]
        {
            let AMQPFrame::Method(1, AMQPClass::Basic(basic::AMQPMethod::Deliver(deliver))) =
                parsed(&screened(&deliver(sent)))
            else {
                panic!("it is no delivery")
            };
            assert_eq!(deliver.routing_key.as_str(), read);
            assert_eq!(deliver.delivery_tag, 9);
        }
        let passed = screened(&header_frame(&[3, b'a', 0x80, b'b', 1, 0xFF], 1 << 15 | 1 << 5));
        let properties = properties(&passed);
        assert_eq!(properties.content_type(), &Some("a?b".into()));
        assert_eq!(properties.kind(), &Some("?".into()));
        let passed = screened(&message(&[2, b'n', 0xFF, b'V', 1, b'o', b't', 1]));
        let headers = self::properties(&passed).headers().clone().unwrap();
        assert_eq!(headers.inner().get("n?"), Some(&AMQPValue::Void));
        assert_eq!(headers.inner().get("o"), Some(&AMQPValue::Boolean(true)));
    }

    #[test]
    fn a_content_header_that_is_larger_than_a_frame_is_replaced_by_a_small_one() {
        let largest = usize::try_from(FRAME_MAX).unwrap();
        let text = |size: usize| [&b"\x01tS"[..], &table(&vec![b'x'; size])].concat();
        let room = largest - message(&text(0)).len();
        let bytes = message(&text(room));
        assert_eq!(screened(&bytes), bytes);
        let behind = frame(BODY, 1, b"hello");
        let bytes = [message(&text(room + 1)), behind.clone()].concat();
        for sizes in [&[usize::MAX][..], &[1000], &[1]] {
            let passed = screened_in(&mut filter(), &bytes, sizes);
            let passed = passed.strip_suffix(&behind[..]).unwrap();
            assert!(why(&properties(passed)).unwrap().contains("larger than a frame"));
        }
        // The broker negotiates less.
        let tune = [0, 10, 0, 30, 0, 0, 0, 0, 0x20, 0, 0, 10];
        let bytes = [frame(METHOD, 0, &tune), message(&text(9000))].concat();
        let passed = screened(&bytes);
        let passed = passed.get(tune.len() + 8..).unwrap();
        assert!(why(&properties(passed)).is_some());
    }

    /// lapin would request 8192 all the same, and the broker would close the connection without a
    /// reason.
    #[test]
    fn a_broker_with_too_small_frames_gives_an_error_with_the_remedy() {
        for (frame_max, is_refused) in [(0_u32, false), (4096, true), (8191, true), (8192, false)] {
            let tune = [&[0, 10, 0, 30, 0, 9][..], &frame_max.to_be_bytes(), &[0, 60]].concat();
            let mut tune = frame(1, 0, &tune);
            let step = filter().step(&mut tune);
            assert_eq!(matches!(step, FilterStep::Refuse(why) if why == TOO_NARROW), is_refused);
        }
    }

    #[test]
    fn a_body_passes_whatever_it_looks_like() {
        let poison = message(&nested(3000, b"F"));
        let bytes = frame(BODY, 1, &poison);
        assert_eq!(screened(&bytes), bytes);
        assert_eq!(screened_in(&mut filter(), &bytes, &[3]), bytes);
    }

    #[test]
    fn other_protocols_pass_and_frames_that_no_broker_sends_do_not() {
        for bytes in [&b"\x15\x03\x03\0\x02\x02F"[..], b"AMQP\0\0\x09\x01"] {
            assert_eq!(screened(bytes), bytes);
        }
        // queue.declare, and deeply nested server properties.
        for method in
            [&[0, 50, 0, 10][..], &[&[0, 10, 0, 10, 0, 9], &table(&nested(99, b"F"))[..]].concat()]
        {
            assert_eq!(screened(&frame(METHOD, 0, method)), b"");
        }
    }

    /// `basic.return`, the content header and the body of a returned message.
    fn returned(channel: u16, message_id: &str) -> Vec<u8> {
        let method = [&[0, 60, 0, 50, 1, 56][..], &[8], b"NO_ROUTE", &[0, 1, b'k']].concat();
        let id = [&[u8::try_from(message_id.len()).unwrap()], message_id.as_bytes()].concat();
        let mut header = header_frame(&id, 1 << 7);
        header[1..3].copy_from_slice(&channel.to_be_bytes());
        [frame(METHOD, channel, &method), header, frame(BODY, channel, b"hello")].concat()
    }

    #[test]
    fn a_returned_message_is_known_by_its_channel_and_id() {
        let returns = ReturnedMessages::default();
        let mut filter = FrameFilter::new(FRAME_MAX, returns.clone());
        let bytes = [returned(1, "a"), returned(2, "a"), returned(1, "b"), returned(1, "b")];
        // A delivered message was not returned.
        let bytes = [&bytes.concat()[..], &message(b"")].concat();
        screened_in(&mut filter, &bytes, &[5]);
        assert!(!returns.take(3, "a") && !returns.take(1, "m1"));
        assert!(returns.take(1, "a") && !returns.take(1, "a"));
        assert!(returns.take(2, "a") && !returns.take(2, "a"));
        assert!(returns.take(1, "b") && returns.take(1, "b") && !returns.take(1, "b"));
    }

    #[test]
    fn a_reopened_channel_has_no_earlier_returns() {
        let returns = ReturnedMessages::default();
        let mut filter = FrameFilter::new(FRAME_MAX, returns.clone());
        let open_ok = frame(METHOD, 1, &[0, 20, 0, 11, 0, 0, 0, 0]);
        let bytes = [returned(1, "a"), returned(2, "a"), open_ok].concat();
        screened_in(&mut filter, &bytes, &[usize::MAX]);
        assert!(!returns.take(1, "a") && returns.take(2, "a"));
    }

    #[test]
    fn unclaimed_returns_are_forgotten_oldest_first() {
        let returns = ReturnedMessages::default();
        for number in 0..=ReturnedMessages::MAX {
            returns.note(1, &number.to_string());
        }
        let size = {
            let noted = returns.lock();
            noted.young.size + noted.old.size
        };
        assert!(size <= ReturnedMessages::MAX, "{size}");
        assert!(!returns.take(1, "0"));
        assert!(returns.take(1, &ReturnedMessages::MAX.to_string()));
        assert!(returns.take(1, &(ReturnedMessages::MAX / 2).to_string()));
    }

    /// Any value with a few levels.
    fn value() -> impl Strategy<Value = AMQPValue> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(AMQPValue::Boolean),
            any::<i64>().prop_map(AMQPValue::LongLongInt),
            any::<u16>().prop_map(AMQPValue::ShortUInt),
            "[a-zäß]{0,20}".prop_map(|text| AMQPValue::LongString(text.into())),
            vec(any::<u8>(), 0..20).prop_map(|bytes| AMQPValue::ByteArray(bytes.into())),
            Just(AMQPValue::Void),
        ];
        leaf.prop_recursive(5, 30, 5, |inner| {
            prop_oneof![
                vec(inner.clone(), 0..5)
                    .prop_map(|values| AMQPValue::FieldArray(FieldArray::from(values))),
                named(inner).prop_map(AMQPValue::FieldTable),
            ]
        })
    }

    fn named(value: impl Strategy<Value = AMQPValue>) -> impl Strategy<Value = FieldTable> {
        vec(("[a-zäß]{0,9}", value), 0..5).prop_map(|entries| {
            let mut table = FieldTable::default();
            for (name, value) in entries {
                table.insert(name.into(), value);
            }
            table
        })
    }

    /// Content headers as lapin writes them.
    fn written() -> impl Strategy<Value = Vec<u8>> {
        (named(value()), "[a-zäß]{0,30}", any::<[bool; 4]>()).prop_map(|(headers, text, has)| {
            let mut properties = BasicProperties::default();
            if has[0] {
                properties = properties.with_headers(headers);
            }
            if has[1] {
                properties = properties.with_message_id(text.clone().into()).with_timestamp(7);
            }
            if has[2] {
                properties = properties.with_content_type(text.clone().into()).with_priority(3);
            }
            if has[3] {
                properties = properties.with_cluster_id(text.into());
            }
            let header =
                amq_protocol::frame::AMQPContentHeader { class_id: 60, body_size: 5, properties };
            let frame = AMQPFrame::Header(1, header);
            let written = gen_frame(&frame)(Vec::new().into()).unwrap();
            written.into_inner().0
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        #[test]
        fn what_lapin_can_parse_passes_as_it_is(bytes in written()) {
            parsed(&bytes);
            assert_eq!(screened(&bytes), bytes);
        }

        #[test]
        fn whatever_is_changed_in_a_content_header_it_can_be_parsed(
            mut bytes in written(),
            changes in vec((any::<usize>(), any::<u8>()), 1..6),
        ) {
            // Only the properties are under a peer's control.
            for (at, byte) in changes {
                let (first, last) = (7 + 12, bytes.len() - 1);
                bytes[first + at % (last - first)] = byte;
            }
            let passed = screened(&bytes);
            assert_eq!(passed.len(), bytes.len());
            properties(&passed);
        }

        #[test]
        fn any_properties_can_be_parsed(bytes in vec(any::<u8>(), 0..300), flags in any::<u16>()) {
            let bytes = header_frame(&bytes, flags);
            let passed = screened(&bytes);
            assert_eq!(passed.len(), bytes.len());
            properties(&passed);
        }

        #[test]
        fn how_the_bytes_are_cut_makes_no_difference(
            headers in vec(written(), 1..4),
            sizes in vec(1_usize..60, 1..9),
        ) {
            let poison = message(&nested(200, b"FA"));
            let bytes = [&headers.concat()[..], &frame(BODY, 1, &poison), &poison, &returned(1, "a")];
            let bytes = bytes.concat();
            assert_eq!(screened_in(&mut filter(), &bytes, &sizes), screened(&bytes));
        }
    }
}
