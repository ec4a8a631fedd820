//! Escapes foreign text before it is printed: line ends and terminal controls are shown as text.
//!
//! Services, brokers and files may contain any text. On a terminal, or in a table, it must not look
//! like the output of `dtc` itself (CWE-150).

use std::borrow::Cow;

/// Escapes text that must stay on its line.
pub(super) fn line(text: &str) -> Cow<'_, str> {
    escaped(text, is_harmful)
}

/// Escapes several lines of our own text that may include foreign text.
pub(super) fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |it| it != '\n' && is_harmful(it))
}

/// Escapes text that must stay on its line, but keeps colours, which are our own.
pub(super) fn coloured_line(text: &str) -> Cow<'_, str> {
    escaped(text, |it| it != '\u{1b}' && is_harmful(it))
}

fn escaped(text: &str, is_harmful: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_harmful) {
        return Cow::Borrowed(text);
    }
    let mut plain = String::with_capacity(text.len() + 16);
    for it in text.chars() {
        match it {
            '\n' | '\r' | '\t' if is_harmful(it) => plain.extend(it.escape_default()),
            _ if is_harmful(it) => plain.extend(it.escape_unicode()),
            _ => plain.push(it),
        }
    }
    Cow::Owned(plain)
}

/// Whether the character ends a line, controls a terminal, or changes the direction of the text
/// after it.
fn is_harmful(it: char) -> bool {
    const LINE_SEPARATORS: [char; 2] = ['\u{2028}', '\u{2029}'];
    it.is_control()
        || LINE_SEPARATORS.contains(&it)
        || ('\u{202a}'..='\u{202e}').contains(&it)
        || ('\u{2066}'..='\u{2069}').contains(&it)
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::{coloured_line, line, lines};

    #[test]
    fn terminal_controls_are_shown_as_text() {
        assert_eq!(line("no \u{1b}[31mmoney\r\n\u{9b}1m\u{202e}x"), {
            r"no \u{1b}[31mmoney\r\n\u{9b}1m\u{202e}x"
        });
        assert_eq!(lines("a\nb\u{7}\tc"), "a\nb\\u{7}\\tc");
        assert_eq!(coloured_line("\u{1b}[2mnow\u{1b}[0m\n"), "\u{1b}[2mnow\u{1b}[0m\\n");
    }

    #[test]
    fn other_text_stays_as_it_is() {
        for text in ["", "München 東京 🦀", r"C:\new \u{1b}"] {
            assert!(matches!(line(text), Cow::Borrowed(same) if same == text));
        }
    }
}
