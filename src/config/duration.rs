//! Durations as they are written in files and flags: `500ms`, `30s`, `15min`, `12h`, `7d`.
//!
//! The crates for this, humantime and jiff, also read `5m`, `1month` and `1h 30s`: more ways to write
//! a mistake, and more for every page that shows a duration to explain.

use std::time::Duration;

const UNITS: [(&str, u64); 5] =
    [("ms", 1), ("min", 60_000), ("s", 1000), ("h", 3_600_000), ("d", 86_400_000)];

/// Parses a duration of at most a hundred years.
pub fn parse(text: &str) -> Result<Duration, String> {
    let rule = "must be a whole number with a unit: ms, s, min, h or d";
    let of_unit = |(unit, millis): (&str, u64)| {
        let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
        number.checked_mul(millis).filter(|millis| *millis <= 36_500 * 86_400_000)
    };
    let millis = UNITS.into_iter().find_map(of_unit);
    millis.map(Duration::from_millis).ok_or_else(|| rule.to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::parse;

    #[test]
    fn a_duration_has_its_unit() {
        for (text, millis) in
            [("0s", 0), ("5ms", 5), ("2s", 2000), ("15min", 900_000), ("1h", 3_600_000)]
        {
            assert_eq!(parse(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        assert_eq!(parse("7d"), Ok(Duration::from_secs(7 * 24 * 60 * 60)));
    }

    #[test]
    fn text_that_is_not_a_duration_is_refused() {
        for text in ["", "5", "s", "-1s", "1.5s", "1 s", "5m", "99999999999999999999d", "36501d"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
