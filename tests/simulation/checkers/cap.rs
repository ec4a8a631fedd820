//! No instance works on more transactions at once than its cap.

use super::Checked;

/// `working`: transactions whose prepare was called and that are not finished; `slots`: its own
/// count.
pub(crate) fn kept(working: usize, slots: u32, cap: u32) -> Checked {
    if working > cap as usize || slots > cap {
        return Err(format!("{working} in work and {slots} slots taken of {cap}"));
    }
    Ok(())
}
