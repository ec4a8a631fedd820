//! Texts that repeat themselves up to the largest size and beyond: the reason for limits, and where
//! time or the stack would run out. libFuzzer's own inputs are short.

use arbitrary::{Result, Unstructured};
use dtc::{
    protocol::message::{Decision, Parked, Prepare, Vote},
    wire::message::BODY_MAX,
};

use crate::{bodies, files, settings};

/// `<target> <times> <beginning> <part> <end>`.
pub fn grown(input: &[u8]) {
    let _ = grow(&mut Unstructured::new(input));
}

fn grow(source: &mut Unstructured<'_>) -> Result<()> {
    let target = source.int_in_range(0..=7)?;
    let times: u32 = source.int_in_range(0..=300_000)?;
    let lengths = [source.int_in_range(0..=200)?, source.int_in_range(1..=60)?];
    let beginning = source.bytes(lengths[0])?;
    let part = source.bytes(lengths[1])?;
    let end = source.bytes(source.len())?;
    let room = (BODY_MAX + 64).saturating_sub(beginning.len() + end.len());
    let times = (times as usize).min(room / part.len());
    let text = [beginning, &part.repeat(times), end].concat();
    match target {
        0 => bodies::request(&text),
        1 => bodies::items::<Vote>(&text),
        2 => bodies::items::<Decision>(&text),
        3 => bodies::items::<Parked>(&text),
        4 => bodies::items::<Prepare>(&text),
        5 => files::services(&text),
        6 => files::transactions(&text),
        _ => settings::config(&text),
    }
    Ok(())
}
