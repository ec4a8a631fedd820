//! Suggestions for a name that doesn't exist.

use std::collections::BTreeSet;

use strsim::generic_levenshtein;

/// How many letters of a name may be wrong.
const WRONG_MAX: usize = 2;

/// The `keys` that `key` may stand for: all that are as close to it as the closest one.
///
/// ```text
/// broker.ulr, brokr.url, broker_url            broker.url
/// drain                                        service.drain, worker.drain
/// services.payments.max_wait_ms                services.payments.max_wait
/// ```
pub(super) fn suggestions(key: &str, keys: &[String]) -> Vec<String> {
    let services: Vec<String> = match *key.split('.').collect::<Vec<_>>() {
        [_, service, _] => ["max_wait", "cap"].map(|it| format!("services.{service}.{it}")).into(),
        _ => Vec::new(),
    };
    let rated = keys.iter().chain(&services).filter_map(|known| Some((rate(key, known)?, known)));
    let rated: BTreeSet<_> = rated.collect();
    let best = rated.first().map(|(rating, _)| *rating);
    let nearest = rated.iter().filter(|(rating, _)| Some(*rating) == best);
    nearest.map(|(_, known)| (*known).clone()).collect()
}

/// Whether a variable has our prefix, except for underscores and case.
pub(super) fn begins_alike(name: &str) -> bool {
    name.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("DTC_"))
}

/// Whether two names differ only in separators and in case.
pub(super) fn is_same(one: &str, other: &str) -> bool {
    letters(one) == letters(other)
}

/// The distance of `key` from an existing key, if that is a possible suggestion.
fn rate(key: &str, known: &str) -> Option<usize> {
    let (given, wanted) = (letters(key), letters(known));
    let last = known.rsplit('.').next().map(letters);
    if last.as_ref() == Some(&given) || is_prefix(&wanted, &given) || is_prefix(&given, &wanted) {
        return Some(WRONG_MAX);
    }
    Some(generic_levenshtein(&given, &wanted)).filter(|&distance| distance <= WRONG_MAX)
}

/// Whether `name` begins with `start`, and `start` is long enough to be telling.
fn is_prefix(start: &[char], name: &[char]) -> bool {
    const ENOUGH: usize = 8;
    start.len() >= ENOUGH && name.starts_with(start)
}

fn letters(name: &str) -> Vec<char> {
    let is_letter = |letter: &char| !matches!(letter, '.' | '_' | '-');
    name.chars().filter(is_letter).map(|letter| letter.to_ascii_lowercase()).collect()
}

#[cfg(test)]
mod tests {
    use super::suggestions;

    #[test]
    fn a_key_with_a_typo_finds_the_one_that_is_meant() {
        let keys = [
            "broker.url",
            "broker.tls.ca_file",
            "worker.max_in_flight",
            "worker.drain",
            "service.drain",
            "topology.commands",
        ]
        .map(str::to_owned);
        for (key, wanted) in [
            ("broker.ulr", "broker.url"),
            ("brokr.url", "broker.url"),
            ("broker_url", "broker.url"),
            ("broker.tls.ca", "broker.tls.ca_file"),
            ("worker.max-in-flight", "worker.max_in_flight"),
            ("worker.drian", "worker.drain"),
            ("drain", "service.drain worker.drain"),
            ("services.payments.max_wait_ms", "services.payments.max_wait"),
            ("service.payments.cap", "services.payments.cap"),
            ("services.payments.max_concurrency", ""),
            ("colour", ""),
        ] {
            assert_eq!(suggestions(key, &keys).join(" "), wanted, "{key}");
        }
    }
}
