//! The bytes of a journal file: a header, followed by frames.
//!
//! ```text
//! header   16 bytes   "dtc journal v1", two line feeds
//! frame    0..3       1E 'd' 't'
//!          3          the entry's tag
//!          4..8       how long its text is
//!          8..16      how much of the file was known to be on the disk when this was written
//!          16..20     CRC-32 of the text
//!          20..24     CRC-32 of the frame's place in the file, and of the 20 bytes before this
//!          24..       the text
//! ```
//!
//! Numbers are little-endian. The bytes that begin a frame occur in no text (JSON escapes them),
//! and a frame is valid only at its own offset.
//!
//! **Torn or corrupt?** Bytes that can't be read may be what a crash has left of the last writes:
//! those had not been synced, so nobody has acted on them. Or they were safe, and were damaged
//! later: then the lost entries may have been acted upon. A later frame shows which: it records how
//! much of the file was on the disk when it was written.
//!
//! Nothing here opens a file: it reads from any source of bytes, and no bytes make it panic.

use std::io::{self, Read, Seek, SeekFrom};

/// The first bytes of a journal file.
pub const HEADER: &[u8; 16] = b"dtc journal v1\n\n";

/// The part of the header before the version.
const NAME: &[u8] = b"dtc journal v";

const MARK: [u8; 3] = [0x1e, b'd', b't'];

/// The length of a frame's part before its text.
pub const HEAD: usize = 24;

/// How much is read at a time when looking for a good frame after a bad one.
const CHUNK: usize = 1 << 16;

/// What the beginning of a file shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileBeginning {
    /// A journal that this release can read.
    Journal,
    /// An empty file, or part of a header: the process that created it was killed.
    Unwritten,
    /// A journal of a later release.
    Newer(u64),
    /// Something else.
    Other,
}

/// What a file is, by `head`: its first 16 bytes, or all if there are fewer.
pub fn beginning(head: &[u8]) -> FileBeginning {
    if head.starts_with(HEADER) {
        return FileBeginning::Journal;
    }
    if HEADER.starts_with(head) {
        return FileBeginning::Unwritten;
    }
    let version = head.strip_prefix(NAME).map(|rest| {
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit());
        digits.fold(0_u64, |number, digit| {
            number.saturating_mul(10).saturating_add(u64::from(*digit - b'0'))
        })
    });
    match version {
        Some(version) if version > 1 => FileBeginning::Newer(version),
        Some(_) | None => FileBeginning::Other,
    }
}

/// Appends a frame to `out`. `at`: its offset in the file; `durable`: how much of the file is known
/// to be on the disk.
///
/// # Errors
///
/// The text is longer than 4 GiB.
pub fn write(out: &mut Vec<u8>, at: u64, durable: u64, tag: u8, text: &[u8]) -> io::Result<()> {
    let len = u32::try_from(text.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "an entry is too long"))?;
    let mut head = [0; HEAD - 4];
    let fields: [&[u8]; 5] = [
        &MARK,
        &[tag],
        &len.to_le_bytes(),
        &durable.to_le_bytes(),
        &crc32fast::hash(text).to_le_bytes(),
    ];
    let bytes = fields.into_iter().flatten();
    head.iter_mut().zip(bytes).for_each(|(place, byte)| *place = *byte);
    out.extend_from_slice(&head);
    out.extend_from_slice(&head_sum(at, &head).to_le_bytes());
    out.extend_from_slice(text);
    Ok(())
}

fn head_sum(at: u64, head: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&at.to_le_bytes());
    sum.update(head);
    sum.finalize()
}

/// The part of a frame before its text.
#[derive(Clone, Copy)]
struct FrameHead {
    tag: u8,
    len: u32,
    durable: u64,
    sum: u32,
}

impl FrameHead {
    /// Parses `bytes`, at offset `at`, as a head.
    fn of(at: u64, bytes: &[u8; HEAD]) -> Option<Self> {
        let (head, sum) = bytes.split_at(HEAD - 4);
        let tag = *head.get(3)?;
        let is_good = head.starts_with(&MARK) && number(sum)? == u64::from(head_sum(at, head));
        let head = Self {
            tag,
            len: u32::try_from(number(head.get(4..8)?)?).ok()?,
            durable: number(head.get(8..16)?)?,
            sum: u32::try_from(number(head.get(16..20)?)?).ok()?,
        };
        (is_good && head.durable <= at).then_some(head)
    }
}

fn number(bytes: &[u8]) -> Option<u64> {
    let mut whole = [0; 8];
    whole.get_mut(..bytes.len())?.copy_from_slice(bytes);
    Some(u64::from_le_bytes(whole))
}

/// A frame that was read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// Its offset.
    pub at: u64,
    /// The entry's tag.
    pub tag: u8,
    /// How much of the file was known to be on the disk when it was written.
    pub durable: u64,
    /// The entry's text.
    pub text: Vec<u8>,
}

impl Frame {
    /// The offset of the next one.
    pub fn end(&self) -> u64 {
        self.at + (HEAD + self.text.len()) as u64
    }
}

/// What follows in a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NextFrame {
    /// A frame.
    Frame(Frame),
    /// The end of the file.
    End,
    /// The rest can't be read, and was not safe when writing ended.
    Torn,
    /// The bytes here can't be read, and were safe: the frame at `witness` shows it.
    Corrupt {
        /// The offset of that frame.
        witness: u64,
    },
}

/// Reads frames from `reader`, which is at offset `at`.
#[derive(Debug)]
pub struct FrameReader<R> {
    reader: R,
    at: u64,
}

impl<R: Read + Seek> FrameReader<R> {
    /// Starts at the first frame.
    ///
    /// # Errors
    ///
    /// `reader` can't seek to it.
    pub fn after_header(reader: R) -> io::Result<Self> {
        Self::starting_at(reader, HEADER.len() as u64)
    }

    /// Starts at `at`.
    ///
    /// # Errors
    ///
    /// `reader` can't seek to it.
    pub fn starting_at(mut reader: R, at: u64) -> io::Result<Self> {
        reader.seek(SeekFrom::Start(at))?;
        Ok(Self { reader, at })
    }

    /// Reads what follows.
    ///
    /// # Errors
    ///
    /// `reader` can't be read.
    pub fn read(&mut self) -> io::Result<NextFrame> {
        let at = self.at;
        let mut head = [0; HEAD];
        let n_read = fill(&mut self.reader, &mut head)?;
        if n_read == 0 {
            return Ok(NextFrame::End);
        }
        if n_read == HEAD
            && let Some(head) = FrameHead::of(at, &head)
            && let Some(text) = read_text(&mut self.reader, &head)?
        {
            let frame = Frame { at, tag: head.tag, durable: head.durable, text };
            self.at = frame.end();
            return Ok(NextFrame::Frame(frame));
        }
        let witness = self.find_witness(at)?;
        Ok(witness.map_or(NextFrame::Torn, |witness| NextFrame::Corrupt { witness }))
    }

    /// Looks for a frame after `bad` that shows that the bytes there were on the disk.
    fn find_witness(&mut self, bad: u64) -> io::Result<Option<u64>> {
        let mut from = bad + 1;
        let mut chunk = Vec::with_capacity(CHUNK);
        loop {
            chunk.clear();
            self.reader.seek(SeekFrom::Start(from))?;
            (&mut self.reader).take(CHUNK as u64).read_to_end(&mut chunk)?;
            let is_last = chunk.len() < CHUNK;
            let mut places = chunk.windows(HEAD).enumerate();
            let found = places.find_map(|(place, bytes)| {
                let at = from + place as u64;
                let head = FrameHead::of(at, bytes.try_into().ok()?)?;
                Some((at, head))
            });
            match found {
                Some((at, head)) => {
                    self.reader.seek(SeekFrom::Start(at + HEAD as u64))?;
                    let is_whole = read_text(&mut self.reader, &head)?.is_some();
                    if is_whole && head.durable > bad {
                        return Ok(Some(at));
                    }
                    let end = at + HEAD as u64 + u64::from(head.len);
                    from = if is_whole { end } else { at + 1 };
                }
                None if is_last => return Ok(None),
                // A head may begin near the end of a chunk.
                None => from += (CHUNK - HEAD + 1) as u64,
            }
        }
    }
}

/// The text after `head`, if it is complete and intact.
fn read_text(reader: &mut impl Read, head: &FrameHead) -> io::Result<Option<Vec<u8>>> {
    let mut text = Vec::new();
    // It allocates only as much as there is to read, whatever the length says.
    reader.take(head.len.into()).read_to_end(&mut text)?;
    let is_good = text.len() == head.len as usize && crc32fast::hash(&text) == head.sum;
    Ok(is_good.then_some(text))
}

/// Reads until `buffer` is full or the input ends; returns how many bytes were read.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut n_read = 0;
    while let Some(rest) = buffer.get_mut(n_read..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) => break,
            Ok(n) => n_read += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(n_read)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::{any, prop, proptest};

    use super::{FileBeginning, FrameReader, HEADER, NextFrame, beginning, write};

    /// A file of texts written in groups: before each group, all earlier ones were on the disk.
    fn file(groups: &[&[&str]]) -> Vec<u8> {
        let mut bytes = HEADER.to_vec();
        for group in groups {
            let durable = bytes.len() as u64;
            for text in *group {
                let at = bytes.len() as u64;
                write(&mut bytes, at, durable, b't', text.as_bytes()).unwrap();
            }
        }
        bytes
    }

    /// The texts that can be read, and what follows them.
    fn read(bytes: &[u8]) -> (Vec<String>, NextFrame) {
        let mut frames = FrameReader::after_header(Cursor::new(bytes)).unwrap();
        let mut texts = Vec::new();
        loop {
            match frames.read().unwrap() {
                NextFrame::Frame(frame) => texts.push(String::from_utf8(frame.text).unwrap()),
                end @ (NextFrame::End | NextFrame::Torn | NextFrame::Corrupt { .. }) => {
                    return (texts, end);
                }
            }
        }
    }

    #[test]
    fn frames_are_read_in_the_order_written() {
        let bytes = file(&[&["a", ""], &["long".repeat(50_000).as_str()], &["b"]]);
        let (texts, end) = read(&bytes);
        assert_eq!((texts.len(), end), (4, NextFrame::End));
        assert_eq!((texts[0].as_str(), texts[1].as_str(), texts[3].as_str()), ("a", "", "b"));
        assert_eq!(read(HEADER), (vec![], NextFrame::End));
    }

    #[test]
    fn wherever_a_file_ends_early_the_rest_is_torn() {
        let bytes = file(&[&["one"], &["two", "three"]]);
        let ends: Vec<_> = [&[][..], &["one"], &["one", "two"], &["one", "two", "three"]]
            .iter()
            .map(|texts| file(&[texts]).len())
            .collect();
        for len in HEADER.len()..bytes.len() {
            let (texts, end) = read(&bytes[..len]);
            assert_eq!(texts.len(), ends.iter().filter(|end| **end <= len).count() - 1, "{len}");
            assert_eq!(
                end,
                if ends.contains(&len) { NextFrame::End } else { NextFrame::Torn },
                "{len}"
            );
        }
    }

    #[test]
    fn damage_to_what_was_safe_is_corrupt_and_to_the_last_writes_torn() {
        let bytes = file(&[&["one"], &["two", "three"], &["four"]]);
        let witness = file(&[&["one"], &["two", "three"]]).len() as u64;
        for at in HEADER.len()..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x20;
            let (texts, end) = read(&bytes);
            if (at as u64) < witness {
                assert!(matches!(end, NextFrame::Corrupt { .. }), "{at}: {texts:?}, {end:?}");
            } else {
                assert_eq!((texts.len(), end), (3, NextFrame::Torn), "{at}");
            }
        }
    }

    #[test]
    fn a_last_write_without_its_beginning_is_torn() {
        let safe = file(&[&["one"]]).len();
        let mut bytes = file(&[&["one"], &["two", "three"]]);
        bytes[safe..safe + 27].fill(0);
        assert_eq!(read(&bytes), (vec!["one".to_owned()], NextFrame::Torn));
        bytes.extend([0; 5000]);
        assert_eq!(read(&bytes), (vec!["one".to_owned()], NextFrame::Torn));
    }

    #[test]
    fn damage_is_detected_however_far_away_the_next_good_frame_is() {
        for len in [1_usize << 16, (1 << 16) - 30, 70_000, 200_001] {
            let mut bytes = file(&[&[&"x".repeat(len)], &["witness"]]);
            bytes[50] ^= 1;
            let witness = file(&[&[&"x".repeat(len)]]).len() as u64;
            assert_eq!(read(&bytes), (vec![], NextFrame::Corrupt { witness }), "{len}");
        }
    }

    #[test]
    fn a_frame_at_another_offset_is_invalid() {
        let bytes = file(&[&["one"], &["two"]]);
        let moved = [HEADER, &bytes[HEADER.len() + 27..]].concat();
        assert_eq!(read(&moved), (vec![], NextFrame::Torn));
    }

    #[test]
    fn the_beginning_of_a_file_shows_what_it_is() {
        assert_eq!(beginning(HEADER), FileBeginning::Journal);
        for len in 0..HEADER.len() {
            assert_eq!(beginning(&HEADER[..len]), FileBeginning::Unwritten);
        }
        assert_eq!(beginning(b"dtc journal v2\n\n"), FileBeginning::Newer(2));
        assert_eq!(beginning(b"dtc journal v107"), FileBeginning::Newer(107));
        for other in [&b"[\n  {\"id\":\"TX1\""[..], b"dtc", b"x", b"dtc journal v0\n\n", &[0; 16]] {
            let is_other = beginning(other) == FileBeginning::Other;
            assert!(is_other || HEADER.starts_with(other), "{other:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            read(&[HEADER, bytes.as_slice()].concat());
            beginning(&bytes);
        }
    }
}
