//! What flags may say, and what is said to one that doesn't.

use std::{fmt::Display, str::FromStr};

use crate::{
    protocol::ids::WorkerId,
    transport::amqp::names::{ALL, ANY},
};

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
    use super::workers_name;

    #[test]
    fn no_worker_is_called_like_many() {
        assert!(workers_name("w1").is_ok());
        assert!(workers_name("any").is_err());
        assert!(workers_name("all").is_err());
    }
}
