//! Once all is well again every transaction ends, nothing stays prepared, every slot is free, and
//! nobody holds anything in mind.

use super::Checked;

/// `left`: everything that is still there, in words.
pub(crate) fn ended(left: &[String]) -> Checked {
    if left.is_empty() { Ok(()) } else { Err(left.join("; ")) }
}
