//! Moments. The core never reads a clock: every moment is a parameter.

use std::{fmt, ops, str::FromStr, time::Duration};

/// A moment, in milliseconds since the Unix epoch.
///
/// As text it is that number in decimal, without leading zeros: `1764497314000`. This form is stable: a
/// service may store it, as it must the deadline of what it prepares.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Time(u64);

impl Time {
    /// The Unix epoch: before everything.
    pub const EPOCH: Self = Self(0);

    /// The moment so many milliseconds after the Unix epoch.
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis)
    }

    /// Milliseconds since the Unix epoch.
    pub const fn as_millis(self) -> u64 {
        self.0
    }

    /// Reads a moment from its text.
    ///
    /// # Errors
    ///
    /// The text is not that of a moment.
    pub fn parse(text: &str) -> Result<Self, InvalidTime> {
        // One moment has one text.
        let is_canonical = text == "0" || !text.starts_with(['0', '+']);
        let millis = text.parse().ok().filter(|_| is_canonical);
        millis.map(Self).ok_or_else(|| InvalidTime { value: text.chars().take(64).collect() })
    }

    /// How long after `earlier` this is; zero if it is not later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl ops::Add<Duration> for Time {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }
}

impl ops::Sub<Duration> for Time {
    type Output = Self;
    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for Time {
    type Err = InvalidTime;

    fn from_str(text: &str) -> Result<Self, InvalidTime> {
        Self::parse(text)
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ms", self.0)
    }
}

/// A text that is not that of a [`Time`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidTime {
    /// The text as it came, cut after 64 characters.
    pub value: String,
}

impl fmt::Display for InvalidTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { value } = self;
        write!(
            f,
            "time {value:?} must be a number of milliseconds since the Unix epoch, from 0 to {}, in \
             decimal and without leading zeros",
            u64::MAX
        )
    }
}

impl std::error::Error for InvalidTime {}

#[cfg(test)]
mod tests {
    use super::Time;

    #[test]
    fn a_time_and_its_text_are_one() {
        for millis in [0, 1, 1_764_497_314_000, u64::MAX] {
            let time = Time::from_millis(millis);
            assert_eq!(Time::parse(&time.to_string()), Ok(time));
            assert_eq!(time.to_string().parse(), Ok(time));
        }
        assert_eq!(Time::from_millis(1_764_497_314_000).to_string(), "1764497314000");
    }

    #[test]
    fn what_is_no_time_is_refused_by_a_complaint_that_shows_it() {
        for bad in ["", " 1", "1 ", "01", "+1", "-1", "1.5", "1ms", "1e3", "18446744073709551616"] {
            assert!(Time::parse(bad).is_err(), "{bad:?}");
        }
        let complaint = Time::parse("1ms").unwrap_err().to_string();
        assert_eq!(
            complaint,
            "time \"1ms\" must be a number of milliseconds since the Unix epoch, from 0 to \
             18446744073709551615, in decimal and without leading zeros"
        );
    }
}
