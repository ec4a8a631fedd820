//! What flags may say, and what is said to one that doesn't.

use std::{fmt::Display, str::FromStr, time::Duration};

use crate::{
    protocol::ids::WorkerId,
    transport::amqp::names::{ALL, ANY},
};

/// No duration here is longer than this.
const YEAR: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// A whole number from 1 on.
pub(super) fn at_least_one<T: FromStr + PartialOrd + From<u8> + Bounded>(
    text: &str,
) -> Result<T, String> {
    let number = text.parse().ok().filter(|number| *number >= T::from(1));
    number.ok_or_else(|| format!("must be a whole number from 1 to {}", T::MAX))
}

/// A type of numbers that has a largest one.
pub(super) trait Bounded {
    /// The largest.
    const MAX: &'static dyn Display;
}

impl Bounded for u16 {
    const MAX: &'static dyn Display = &Self::MAX;
}

/// A length of time: a whole number and its unit.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let rule = || "must be a whole number and ms, s, m, h or d, such as 500ms or 2m".to_owned();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| rule())?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        "d" => 24 * 60 * 60 * 1000,
        _ => return Err(rule()),
    };
    let duration = Duration::from_millis(number.saturating_mul(millis));
    if duration > YEAR {
        return Err("must be at most 366d".to_owned());
    }
    Ok(duration)
}

/// The name of a worker: none of those that mean many.
pub(super) fn workers_name(text: &str) -> Result<WorkerId, String> {
    let name = WorkerId::parse(text).map_err(|error| error.to_string())?;
    if [ALL, ANY].contains(&text) {
        return Err(format!("must not be `{ALL}` or `{ANY}`, which mean many"));
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{duration, workers_name};

    #[test]
    fn durations_have_a_unit_and_an_end() {
        for (text, millis) in [("0ms", 0), ("5s", 5000), ("2m", 120_000), ("1h", 3_600_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)));
        }
        for bad in ["", "5", "s", "-1s", "1.5s", "5 s", "400d", "99999999999999999999s", "5S"] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn no_worker_is_called_like_many() {
        assert!(workers_name("w1").is_ok());
        assert!(workers_name("any").is_err());
        assert!(workers_name("all").is_err());
    }
}
