//! The digest of a request's services and data, which distinguishes a retry from another request
//! with the same id.
//!
//! It is computed over one canonical text, a JSON array of two elements: the services' names in
//! name order, each once; and the data with the fields of every object in the order of their names
//! (by code point), without whitespace, and with no more escapes than needed. So the layout and
//! order in which a producer sends them don't matter. Numbers count as they are written: `1` and
//! `1.0` are different data, since only the services can say whether they mean the same.

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::protocol::{
    ids::{RequestHash, ServiceName},
    message::Payload,
};

/// The canonical text of `data`, for [`request_hash`].
///
/// Data that [`transactions`](crate::input::transactions) reads is in that form already.
pub fn canonical(data: Map<String, Value>) -> Payload {
    // This map keeps its keys sorted, and is written without whitespace: a test checks both.
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

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, proptest};
    use serde_json::{Map, Value, json};
    use sha2::{Digest, Sha256};

    use super::{canonical, request_hash};
    use crate::protocol::{
        ids::{RequestHash, ServiceName},
        message::Payload,
    };

    fn services<const N: usize>(names: [&str; N]) -> [ServiceName; N] {
        names.map(|name| ServiceName::parse(name).unwrap())
    }

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn the_digest_is_that_of_the_canonical_text() {
        let digest = Sha256::digest(r#"[["ServiceA","ServiceB"],{"amount":100}]"#);
        let hash =
            request_hash(&services(["ServiceA", "ServiceB"]), &Payload::new(r#"{"amount":100}"#));
        assert_eq!(hash, RequestHash(digest[..16].try_into().unwrap()));
        assert_eq!(hash.to_string(), "dbb06fbcefd2d743c350ab52c2445ba9");
    }

    #[test]
    fn the_order_of_services_does_not_matter_nor_how_often_one_is_named() {
        let data = Payload::new("{}");
        let hash = request_hash(&services(["a", "b"]), &data);
        assert_eq!(request_hash(&services(["b", "a"]), &data), hash);
        assert_eq!(request_hash(&services(["a", "b", "b", "a"]), &data), hash);
    }

    #[test]
    fn what_differs_has_another_digest() {
        let one = Payload::new(r#"{"a":1}"#);
        let hash = request_hash(&services(["a", "b"]), &one);
        assert_ne!(request_hash(&services(["ab"]), &one), hash);
        assert_ne!(request_hash(&services(["a"]), &one), hash);
        assert_ne!(request_hash(&services(["a", "b"]), &Payload::new(r#"{"a":1.0}"#)), hash);
    }

    #[test]
    fn a_map_is_written_with_its_keys_sorted_at_every_level() {
        let data = map(json!({"b": 1, "a": [{"d": 2, "B": {}, "c": "x y"}], "é": null, "z": 0}));
        assert_eq!(
            canonical(data).as_str(),
            r#"{"a":[{"B":{},"c":"x y","d":2}],"b":1,"z":0,"é":null}"#
        );
    }

    proptest! {
        #[test]
        fn the_order_in_which_a_map_is_filled_does_not_matter(
            fields in prop::collection::btree_map(any::<String>(), any::<i64>(), 0..10),
        ) {
            let forth: Map<_, _> = fields.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
            let back: Map<_, _> = fields.iter().rev().map(|(k, v)| (k.clone(), json!(v))).collect();
            assert_eq!(canonical(forth), canonical(back));
        }
    }
}
