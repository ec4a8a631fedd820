//! The digest of a request's services and data: what tells a retry from another request under the
//! same id.
//!
//! It is taken over one canonical text, a JSON array of two elements: the services' names in name
//! order, each once; and the data with the fields of every object in the order of their names (by
//! code point), without whitespace, and with no more escapes than needed. So it doesn't matter how
//! a producer lays out or orders what it sends. Numbers count as they are written: `1` and `1.0`
//! are different data, since nobody but the services can say whether they are the same.

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::protocol::{
    ids::{RequestHash, ServiceName},
    message::Payload,
};

/// The canonical text of `data`, as [`request_hash`] wants it.
///
/// What [`transactions`](crate::wire::transactions) reads is in that form already.
pub fn canonical(data: Map<String, Value>) -> Payload {
    // This map keeps its keys sorted, and is written without whitespace: a test holds it to that.
    Payload::new(Value::Object(data).to_string())
}

/// The digest of a request for `services` with `data`: the first 16 bytes of the SHA-256 of their
/// canonical text.
///
/// The services may come in any order and more than once; `data` must be in its canonical form.
pub fn request_hash(services: &[ServiceName], data: &Payload) -> RequestHash {
    if !services.is_sorted_by(|a, b| a < b) {
        let mut sorted = services.to_vec();
        sorted.sort();
        sorted.dedup();
        return request_hash(&sorted, data);
    }
    let mut digest = Sha256::new();
    digest.update("[[");
    for (index, service) in services.iter().enumerate() {
        digest.update(if index == 0 { "\"" } else { ",\"" });
        // No character of a service's name needs an escape.
        digest.update(service.as_str());
        digest.update("\"");
    }
    digest.update("],");
    digest.update(data.as_str());
    digest.update("]");
    let mut hash = [0; 16];
    hash.iter_mut().zip(digest.finalize()).for_each(|(hash, byte)| *hash = byte);
    RequestHash(hash)
}
