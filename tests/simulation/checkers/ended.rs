//! After healing every transaction ends, nothing stays prepared, every slot is free, and no process
//! keeps any transaction in memory.

use super::Checked;

/// `left`: everything that is left, in words.
pub(crate) fn ended(left: &[String]) -> Checked {
    if left.is_empty() { Ok(()) } else { Err(left.join("; ")) }
}
