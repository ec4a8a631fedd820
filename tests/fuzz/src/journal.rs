//! The journal file of `dtc run --journal`: any bytes after its header, and files that were written
//! correctly and then cut off or damaged.

use std::io::Cursor;

use dtc::{
    journal::file::{
        Replay, ReplayError,
        frames::{HEADER, write},
        replay,
    },
    protocol::time::Time,
};

/// The first two bytes say where it is cut off, the third whether a byte is damaged; a line of the
/// rest is an entry, and its first byte the entry's tag.
pub fn journal(bytes: &[u8]) {
    let _ = read(&[HEADER, bytes].concat());
    let [high, low, damage, lines @ ..] = bytes else { return };
    let file = written(lines);
    let Ok(whole) = read(&file) else { return };
    assert_eq!((whole.end, whole.is_torn), (file.len() as u64, false), "all of it is read");

    // A cut, as by a crash, is never taken for damage.
    let rest = file.len() - HEADER.len();
    let cut = HEADER.len() + usize::from(u16::from_be_bytes([*high, *low])) % (rest + 1);
    let torn = read(&file[..cut]).expect("a file that was cut off is read up to there");
    assert!(torn.end <= cut as u64 && torn.is_torn == (torn.end < cut as u64));
    assert!(torn.unfinished.len() <= lines.len());

    // Damage is reported, or taken for the end: damaged bytes are never read as something else.
    if *damage > 0 && cut < file.len() {
        let mut damaged = file;
        damaged[cut] ^= damage;
        match read(&damaged) {
            Ok(read) => assert!(read.end <= cut as u64, "{} of {cut}", read.end),
            Err(ReplayError::Damaged { at, .. }) => assert!(at <= cut as u64),
            Err(other) => panic!("{other:?}"),
        }
    }
}

fn written(lines: &[u8]) -> Vec<u8> {
    let mut file = HEADER.to_vec();
    for line in lines.split(|byte| *byte == b'\n') {
        let Some((tag, text)) = line.split_first() else { continue };
        let at = file.len() as u64;
        write(&mut file, at, at, *tag, text).expect("it is short");
    }
    file
}

fn read(file: &[u8]) -> Result<Replay, ReplayError> {
    let read = || replay(Cursor::new(file), Time::EPOCH);
    let (once, again) = (read(), read());
    assert_eq!(format!("{once:?}"), format!("{again:?}"), "read twice");
    once
}
