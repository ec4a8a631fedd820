//! The form of a line of the log: `time LEVEL message field=value …`.
//!
//! The fields of spans follow those of the event, the innermost span first, and the spans' own names
//! are left out: a worker's span says `worker=w1`, and nothing else would be new. So a line of a
//! worker begins as any other does, and a search for `worker=w1` or `transaction=TX1@` finds what it
//! should.

use std::fmt;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields,
        format::Writer,
        time::{FormatTime as _, SystemTime},
    },
    registry::LookupSpan,
};

/// Formats an event and the fields of its spans.
pub(super) struct LogFormat;

impl<S, N> FormatEvent<S, N> for LogFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let (dim, colour, plain) = match writer.has_ansi_escapes() {
            true => ("\u{1b}[2m", colour(*event.metadata().level()), "\u{1b}[0m"),
            false => ("", "", ""),
        };
        write!(writer, "{dim}")?;
        SystemTime.format_time(&mut writer)?;
        write!(writer, "{plain} {colour}{:>5}{plain} ", event.metadata().level().as_str())?;
        context.format_fields(writer.by_ref(), event)?;
        for span in context.event_scope().into_iter().flatten() {
            let extensions = span.extensions();
            if let Some(fields) = extensions.get::<FormattedFields<N>>()
                && !fields.is_empty()
            {
                write!(writer, " {fields}")?;
            }
        }
        writeln!(writer)
    }
}

/// The escape sequence of a level's colour.
fn colour(level: Level) -> &'static str {
    match level {
        Level::ERROR => "\u{1b}[31m",
        Level::WARN => "\u{1b}[33m",
        Level::INFO => "\u{1b}[32m",
        Level::DEBUG => "\u{1b}[34m",
        Level::TRACE => "\u{1b}[35m",
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex, MutexGuard, PoisonError},
    };

    use tracing_subscriber::{fmt, layer::SubscriberExt as _};

    use super::LogFormat;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Written {
        fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    impl io::Write for Written {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            self.bytes().extend(text);
            Ok(text.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What `log` writes after the time.
    fn written(has_colours: bool, log: impl FnOnce()) -> String {
        let written = Written::default();
        let writer = written.clone();
        let lines = fmt::layer()
            .with_writer(move || writer.clone())
            .with_ansi(has_colours)
            .event_format(LogFormat);
        let subscriber = tracing_subscriber::registry().with(lines);
        tracing::subscriber::with_default(subscriber, log);
        let text = String::from_utf8(written.bytes().clone()).unwrap();
        let (time, line) = text.split_once('Z').unwrap();
        assert!(time.trim_start_matches("\u{1b}[2m").starts_with("20"), "{text}");
        line.to_owned()
    }

    #[test]
    fn the_fields_of_spans_follow_those_of_the_event_from_the_inside_out() {
        let line = written(false, || {
            let _outer =
                tracing::error_span!("service", service = "stock", instance = "p1").entered();
            let _nothing = tracing::error_span!("nothing").entered();
            let _inner = tracing::error_span!("call", transaction = %"t1@7").entered();
            tracing::warn!(failures = 2, error = %"no room", "a call failed");
        });
        assert_eq!(
            line,
            "  WARN a call failed failures=2 error=no room transaction=t1@7 service=\"stock\" \
             instance=\"p1\"\n"
        );
    }

    #[test]
    fn a_line_outside_of_all_spans_is_as_short_as_before() {
        assert_eq!(written(false, || tracing::error!("no")), " ERROR no\n");
        assert_eq!(written(false, || tracing::info!(n = 1, "yes")), "  INFO yes n=1\n");
    }

    #[test]
    fn on_a_terminal_time_and_level_have_their_colours() {
        let line = written(true, || tracing::error!("no"));
        assert_eq!(line, "\u{1b}[0m \u{1b}[31mERROR\u{1b}[0m no\n");
    }
}
