//! Why a value that a program sets can't be used.

use std::time::Duration;

use crate::protocol::ids::InvalidName;

/// No duration that is set is longer: a hundred years. What is added to a moment must not exceed what
/// a moment can be.
const DURATION_MAX: Duration = Duration::from_secs(36_500 * 24 * 60 * 60);

/// A value that was set on a builder can't be used. The text names the setting and the rule that its value
/// breaks; it never repeats what may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("setting `{setting}`: {problem}")]
pub struct InvalidSetting {
    setting: &'static str,
    problem: String,
}

impl InvalidSetting {
    pub(crate) fn new(setting: &'static str, problem: impl Into<String>) -> Self {
        Self { setting, problem: problem.into() }
    }

    /// The setting: the name of the builder's method, or of the argument, that set it.
    pub fn setting(&self) -> &'static str {
        self.setting
    }
}

/// The name that is set, if it is one.
pub(crate) fn name<T>(
    setting: &'static str,
    parsed: Result<T, InvalidName>,
) -> Result<T, InvalidSetting> {
    parsed.map_err(|InvalidName { value, rule, .. }| {
        InvalidSetting::new(setting, format!("{value:?} must match {rule}"))
    })
}

/// The duration that is set, if it is at least `min`.
pub(crate) fn duration(
    setting: &'static str,
    value: Duration,
    min: Duration,
) -> Result<Duration, InvalidSetting> {
    if value < min {
        return Err(InvalidSetting::new(
            setting,
            format!("must be at least {min:?}, not {value:?}"),
        ));
    }
    if value > DURATION_MAX {
        return Err(InvalidSetting::new(setting, "must be at most 36500 days"));
    }
    Ok(value)
}

/// The number that is set, if it is from 1 to `max`.
pub(crate) fn count(
    setting: &'static str,
    value: usize,
    max: usize,
) -> Result<usize, InvalidSetting> {
    if (1..=max).contains(&value) {
        return Ok(value);
    }
    Err(InvalidSetting::new(setting, format!("must be from 1 to {max}, not {value}")))
}
