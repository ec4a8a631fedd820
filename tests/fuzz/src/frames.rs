//! A broker's bytes, screened before lapin parses them.
//!
//! The first byte decides into what pieces the stream is cut. Then come frames: a byte for the
//! kind, one for the channel, two for the size, and the payload; one kind stands for bytes that are
//! no frame.

use amq_protocol::frame::{AMQPFrame, parsing::parse_frame};
use dtc::transport::amqp::frames::{
    DEPTH_MAX, FRAME_MAX, FilterStep, FrameFilter, ReturnedMessages, UNREADABLE,
};
use lapin::types::{AMQPValue, FieldTable};

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const END: u8 = 0xCE;

/// A stream of frames.
pub fn frames(input: &[u8]) {
    let Some((piece, input)) = input.split_first() else { return };
    let stream = stream(input);
    let whole = screened(&stream, usize::MAX);
    assert_eq!(whole, screened(&stream, usize::from(*piece).max(1)), "in pieces of {piece}");
    is_parsed(&whole.passed);
    // What is passed on needs no further screening.
    assert_eq!(screened(&whole.passed, usize::MAX).passed, whole.passed);
}

/// The frames that `input` describes.
fn stream(mut input: &[u8]) -> Vec<u8> {
    let mut stream = Vec::new();
    while let [kind, channel, high, low, rest @ ..] = input {
        let size = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
        let (payload, others) = rest.split_at(size);
        input = others;
        let kind = match kind % 8 {
            0..=3 => HEADER,
            4..=5 => METHOD,
            6 => 3,
            _ => {
                stream.extend(payload);
                continue;
            }
        };
        stream.extend([kind, 0, *channel]);
        stream.extend(u32::try_from(size).expect("it fits into 16 bits").to_be_bytes());
        stream.extend(payload);
        stream.push(END);
    }
    stream
}

#[derive(PartialEq, Eq, Debug)]
struct Screened {
    passed: Vec<u8>,
    is_refused: bool,
    /// Whether a message without an id came back on channel 1.
    came_back: bool,
}

fn screened(stream: &[u8], piece: usize) -> Screened {
    let returns = ReturnedMessages::default();
    let mut filter = FrameFilter::new(FRAME_MAX, returns.clone());
    let (mut passed, mut held) = (Vec::new(), Vec::new());
    let mut is_refused = false;
    'stream: for piece in stream.chunks(piece) {
        held.extend(piece);
        loop {
            match filter.step(&mut held) {
                FilterStep::Pass(size) => {
                    assert!(size > 0);
                    passed.extend(held.drain(..size));
                }
                FilterStep::Drop(size) => {
                    assert!(size > 0);
                    drop(held.drain(..size));
                }
                FilterStep::Wait => break,
                FilterStep::Refuse(_) => {
                    is_refused = true;
                    break 'stream;
                }
            }
        }
        assert!(held.len() < usize::try_from(FRAME_MAX).expect("it fits"), "a frame is held");
    }
    Screened { passed, is_refused, came_back: returns.take(1, "") }
}

/// lapin can parse every frame that a broker may send on behalf of a peer. Others may end the
/// connection.
fn is_parsed(mut bytes: &[u8]) {
    while let [kind, _, _, sizes @ ..] = bytes {
        let Some((size, behind)) = sizes.split_first_chunk() else { return };
        let size = usize::try_from(u32::from_be_bytes(*size)).expect("it fits");
        if behind.get(size) != Some(&END) {
            return;
        }
        let payload = &behind[..size];
        match parse_frame(bytes) {
            Ok((rest, AMQPFrame::Header(_, header))) => {
                assert!(depth(header.properties.headers().as_ref()) <= DEPTH_MAX);
                bytes = rest;
            }
            Ok((rest, _)) => bytes = rest,
            Err(error) => {
                let is_header = *kind == HEADER && size >= 14;
                let is_delivery = *kind == METHOD && is_delivery(payload);
                assert!(!is_header && !is_delivery, "{error}: {payload:?}");
                return;
            }
        }
    }
}

/// Whether this is a `basic.deliver`, whatever its texts contain.
fn is_delivery(payload: &[u8]) -> bool {
    let short = |bytes: &mut &[u8]| {
        let (size, rest) = bytes.split_first()?;
        *bytes = rest.get(usize::from(*size)..)?;
        Some(())
    };
    let Some(mut rest) = payload.strip_prefix(&[0, 60, 0, 60]) else { return false };
    let mut read = || {
        short(&mut rest)?;
        rest = rest.get(9..)?;
        short(&mut rest)?;
        short(&mut rest)
    };
    read().is_some() && rest.is_empty()
}

/// How many levels a table has.
fn depth(headers: Option<&FieldTable>) -> usize {
    let mut deepest = 0;
    let mut open = Vec::new();
    if let Some(headers) = headers {
        deepest = 1;
        open.extend(headers.inner().values().map(|value| (value, 2)));
        assert!(
            !headers.inner().contains_key(UNREADABLE) || headers.inner().len() <= 17,
            "what is unreadable is gone"
        );
    }
    while let Some((value, level)) = open.pop() {
        match value {
            AMQPValue::FieldTable(table) => {
                deepest = deepest.max(level);
                open.extend(table.inner().values().map(|value| (value, level + 1)));
            }
            AMQPValue::FieldArray(array) => {
                deepest = deepest.max(level);
                open.extend(array.as_slice().iter().map(|value| (value, level + 1)));
            }
            _ => {}
        }
    }
    deepest
}
