//! Times as people read and write them: `2026-08-24T12:31:05.123Z`.

use std::num::NonZero;

use time::{
    Date, OffsetDateTime,
    format_description::well_known::{
        Iso8601,
        iso8601::{Config, EncodedConfig, TimePrecision},
    },
};

use crate::protocol::time::Time;

const TO_THE_MILLISECOND: EncodedConfig = Config::DEFAULT
    .set_time_precision(TimePrecision::Second { decimal_digits: NonZero::new(3) })
    .encode();

/// `moment` in UTC, to the millisecond; as a number of milliseconds if it is after the year 9999.
pub(super) fn shown(moment: Time) -> String {
    let nanos = i128::from(moment.as_millis()) * 1_000_000;
    let date = OffsetDateTime::from_unix_timestamp_nanos(nanos).ok();
    let text = date.and_then(|date| date.format(&Iso8601::<TO_THE_MILLISECOND>).ok());
    text.unwrap_or_else(|| moment.to_string())
}

/// Parses a date, or a date and a time with its offset from UTC, in a form of ISO 8601:
/// `2026-08-24`, `2026-08-24T12:31Z`, `2026-08-24T12:31:05.123Z`.
pub(super) fn parse(text: &str) -> Option<Time> {
    let date = match text.contains('T') {
        true => OffsetDateTime::parse(text, &Iso8601::PARSING).ok()?,
        false => Date::parse(text, &Iso8601::PARSING).ok()?.midnight().assume_utc(),
    };
    let millis = u64::try_from(date.unix_timestamp_nanos() / 1_000_000).ok()?;
    Some(Time::from_millis(millis))
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
    fn a_time_may_have_an_offset_from_utc() {
        let moment = parse("2026-08-24T12:31:05.1Z");
        for text in ["2026-08-24T14:31:05.1+02:00", "2026-08-24T12:31:05,100Z"] {
            assert_eq!(parse(text), moment, "{text}");
        }
        assert_eq!(moment.map(shown).as_deref(), Some("2026-08-24T12:31:05.100Z"));
    }

    #[test]
    fn a_time_after_the_year_9999_is_shown_as_a_number() {
        for millis in [253_402_300_800_000, u64::MAX] {
            assert_eq!(shown(Time::from_millis(millis)), millis.to_string());
        }
    }

    #[test]
    fn text_that_is_not_a_time_is_none() {
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
            "2026-08-24 12:31Z",
            "+026-08-24",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
