//! Times as people read and write them: `2026-08-24T12:31:05.123Z`.

use crate::protocol::time::Time;

/// `moment` in UTC, to the millisecond.
pub(super) fn shown(moment: Time) -> String {
    let millis = moment.as_millis();
    let (days, in_day) = (millis / 86_400_000, millis % 86_400_000);
    let (year, month, day) = civil(days);
    let (hour, minute) = (in_day / 3_600_000, in_day / 60_000 % 60);
    let (second, milli) = (in_day / 1000 % 60, in_day % 1000);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z")
}

/// Parses a time in UTC: `2026-08-24`, `2026-08-24T12:31Z`, `2026-08-24T12:31:05Z` or
/// `2026-08-24T12:31:05.123Z`.
pub(super) fn parse(text: &str) -> Option<Time> {
    let (date, time) = match text.split_once('T') {
        Some((date, time)) => (date, time.strip_suffix('Z')?),
        None => (text, "00:00"),
    };
    let [year, month, day] = numbers(date, '-', [4, 2, 2])?;
    let (time, millis) = match time.split_once('.') {
        Some((time, millis)) => (time, numbers(millis, '.', [3])?[0]),
        None => (time, 0),
    };
    let [hour, minute, second] = match numbers(time, ':', [2, 2, 2]) {
        Some(all) => all,
        None => numbers(time, ':', [2, 2]).map(|[hour, minute]| [hour, minute, 0])?,
    };
    if hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    let days = days_of(year, month, day)?;
    let seconds = ((days * 24 + hour) * 60 + minute) * 60 + second;
    Some(Time::from_millis(seconds * 1000 + millis))
}

/// Parses `N` numbers with `separator` between them, each with exactly so many digits.
fn numbers<const N: usize>(text: &str, separator: char, digits: [usize; N]) -> Option<[u64; N]> {
    let mut parts = text.split(separator);
    let mut numbers = [0; N];
    for (number, digits) in numbers.iter_mut().zip(digits) {
        let part = parts.next()?;
        if part.len() != digits || !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        *number = part.parse().ok()?;
    }
    parts.next().is_none().then_some(numbers)
}

/// The number of days from 1 January 1970 to that date, if the date exists.
fn days_of(year: u64, month: u64, day: u64) -> Option<u64> {
    // No year has more than 366 days or fewer than 365, so the date lies among these.
    let years = year.checked_sub(1970)?;
    (years * 365..=years * 366 + 366).find(|&days| civil(days) == (year, month, day))
}

/// The date that many days after 1 January 1970: (year, month, day).
///
/// It counts in eras of 400 years, which all have the same number of days, from 1 March of the year
/// 0, so that a leap day is the last day of its year.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, in_era) = (days / 146_097, days % 146_097);
    let year = (in_era - in_era / 1460 + in_era / 36_524 - in_era / 146_096) / 365;
    let in_year = in_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * in_year + 2) / 153;
    let day = in_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::{parse, shown};
    use crate::protocol::time::Time;

    #[test]
    fn a_time_is_shown_as_date_and_time() {
        for (millis, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199_000, "2024-02-29T23:59:59.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(shown(Time::from_millis(millis)), text);
            assert_eq!(parse(text), Some(Time::from_millis(millis)));
        }
    }

    #[test]
    fn a_time_may_be_written_without_its_zero_parts() {
        let midnight = Time::from_millis(1_787_529_600_000);
        for text in ["2026-08-24", "2026-08-24T00:00Z", "2026-08-24T00:00:00Z"] {
            assert_eq!(parse(text), Some(midnight), "{text}");
        }
    }

    #[test]
    fn text_that_is_not_a_time_in_utc_is_none() {
        for text in [
            "",
            "24h",
            "2026",
            "2026-8-24",
            "2026-02-29",
            "2026-13-01",
            "1969-12-31",
            "0000-00-00",
            "2026-08-24T12:31",
            "2026-08-24T12:31:05",
            "2026-08-24T24:00Z",
            "2026-08-24T12:60Z",
            "2026-08-24T12:31:05+02:00",
            "2026-08-24T12:31:05.1Z",
            "2026-08-24 12:31Z",
            "+026-08-24",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
