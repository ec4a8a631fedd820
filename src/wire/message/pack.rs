//! The items of a pack: copies of messages of the journal.

use std::sync::Arc;

use crate::{
    json::{Value, check::JsonPath},
    protocol::ids::TransactionKey,
    wire::message::{
        Item, Kind, TIME_MAX_SECONDS,
        read::{BodyReader, ParsedObject},
        sealed::Sealed,
        write::ObjectWriter,
    },
};

/// The highest offset: a double holds it exactly, as JSON needs.
const OFFSET_MAX: u64 = 1 << 53;

/// The characters of a message id, and how many.
const MESSAGE_ID_RULE: &str = "[ -~]{0,255}";

/// A message of the journal, copied into a pack.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct PackedMessage {
    /// Its offset in the journal.
    pub offset: u64,
    /// Its message id: at most 255 printable ASCII characters.
    pub message_id: Option<Arc<str>>,
    /// The try that its headers record: the transaction, which was requested at a whole second, and whether
    /// the try begins or is over.
    pub tried: Option<(TransactionKey, bool)>,
    /// Its body, unchanged.
    pub body: Arc<str>,
}

impl PackedMessage {
    /// Whether it can be written to a pack. Every message that a worker writes can be.
    pub fn is_encodable(&self) -> bool {
        let is_whole = |key: &TransactionKey| {
            let millis = key.requested_at.as_millis();
            millis.is_multiple_of(1000) && millis / 1000 <= TIME_MAX_SECONDS
        };
        self.offset <= OFFSET_MAX
            && self.message_id.as_deref().is_none_or(is_message_id)
            && self.tried.as_ref().is_none_or(|(key, _)| is_whole(key))
    }
}

fn is_message_id(text: &str) -> bool {
    text.len() <= 255 && text.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}

impl Item for PackedMessage {
    const KIND: Kind = Kind::Pack;
}

impl Sealed for PackedMessage {
    fn write(&self, object: &mut ObjectWriter<'_>) {
        let Self { offset, message_id, tried, body } = self;
        object.number("offset", *offset);
        if let Some(message_id) = message_id {
            debug_assert!(is_message_id(message_id), "{message_id} is not of the wire");
            object.whole_text("message_id", message_id);
        }
        if let Some((key, begins)) = tried {
            let mut inner = object.object("try");
            inner.key(key);
            inner.flag("begins", *begins);
            inner.end();
        }
        object.whole_text("body", body);
    }

    fn read(reader: &mut BodyReader, place: &ParsedObject<'_, '_, '_>) -> Option<Self> {
        let [offset, message_id, tried, body] =
            reader.fields(place, ["offset", "message_id", "try", "body"])?;
        let offset = reader.required(place, offset, |reader, path, value| {
            reader.whole_number(path, value, 0..=OFFSET_MAX)
        });
        let message_id = reader.optional(place, message_id, |reader, path, value| {
            let id = reader.whole_text(path, value)?;
            reader.matching(path, value, MESSAGE_ID_RULE, is_message_id(&id).then_some(id))
        });
        let tried = reader.optional(place, tried, read_try);
        let body = reader.required(place, body, BodyReader::whole_text);
        Some(Self { offset: offset?, message_id: message_id?, tried: tried?, body: body? })
    }
}

fn read_try(
    reader: &mut BodyReader,
    path: &JsonPath<'_>,
    value: &Value<'_>,
) -> Option<(TransactionKey, bool)> {
    let place = ParsedObject { path: *path, value };
    let [id, requested_at, begins] = reader.fields(&place, ["id", "requested_at", "begins"])?;
    let key = reader.key(&place, id, requested_at);
    let begins = reader.required(&place, begins, BodyReader::flag);
    key.zip(begins)
}
