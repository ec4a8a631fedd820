//! AMQP 0-9-1 by hand, for bytes that no client library sends.
//!
//! [`Bare`] logs in, opens one channel with confirms, and publishes whatever properties and routing
//! key it is given.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail here")]
#![allow(dead_code, reason = "each target uses a part of it")]

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

/// How long the broker may take to answer.
const LIMIT: Duration = Duration::from_secs(60);

/// Properties of a message, unchecked.
#[derive(Clone, Default, Debug)]
pub(crate) struct Properties {
    pub(crate) content_type: Option<Vec<u8>>,
    /// The fields of the table, without its length.
    pub(crate) headers: Option<Vec<u8>>,
    pub(crate) reply_to: Option<Vec<u8>>,
    pub(crate) message_id: Option<Vec<u8>>,
    pub(crate) timestamp: Option<u64>,
    pub(crate) kind: Option<Vec<u8>>,
}

impl Properties {
    fn bytes(&self) -> Vec<u8> {
        let mut flags = 0_u16;
        let mut bytes = Vec::new();
        let mut short = |bit: u16, value: &Option<Vec<u8>>, bytes: &mut Vec<u8>| {
            if let Some(value) = value {
                flags |= 1 << bit;
                bytes.extend(short_string(value));
            }
        };
        short(15, &self.content_type, &mut bytes);
        let mut rest = Vec::new();
        short(9, &self.reply_to, &mut rest);
        short(7, &self.message_id, &mut rest);
        let mut kind = Vec::new();
        short(5, &self.kind, &mut kind);
        if let Some(headers) = &self.headers {
            flags |= 1 << 13;
            bytes.extend(u32::try_from(headers.len()).unwrap().to_be_bytes());
            bytes.extend(headers);
        }
        flags |= 1 << 12;
        bytes.push(2);
        bytes.extend(rest);
        if let Some(seconds) = self.timestamp {
            flags |= 1 << 6;
            bytes.extend(seconds.to_be_bytes());
        }
        bytes.extend(kind);
        [flags.to_be_bytes().to_vec(), bytes].concat()
    }
}

/// A table in a table in a table.
pub(crate) fn nested_tables(levels: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for below in (0..levels).rev() {
        bytes.extend(b"\x01aF");
        bytes.extend(u32::try_from(7 * below).unwrap().to_be_bytes());
    }
    bytes
}

/// A header that is an array in an array in an array.
pub(crate) fn nested_arrays(levels: usize) -> Vec<u8> {
    let mut bytes = b"\x01a".to_vec();
    for below in (0..levels).rev() {
        bytes.push(b'A');
        bytes.extend(u32::try_from(5 * below).unwrap().to_be_bytes());
    }
    bytes
}

/// A header of this name, with nothing in it.
pub(crate) fn header_called(name: &[u8]) -> Vec<u8> {
    [short_string(name), b"V".to_vec()].concat()
}

fn short_string(bytes: &[u8]) -> Vec<u8> {
    [&[u8::try_from(bytes.len()).unwrap()], bytes].concat()
}

fn long_string(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
}

/// A connection with one channel.
pub(crate) struct Bare {
    stream: TcpStream,
}

impl Bare {
    /// Logs in at `url`.
    pub(crate) fn connect(url: &str) -> Self {
        let (user, rest) = url.strip_prefix("amqp://").unwrap().rsplit_once('@').unwrap();
        let (host, vhost) = rest.split_once('/').unwrap();
        let mut stream = TcpStream::connect(host).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(b"AMQP\x00\x00\x09\x01").unwrap();
        let mut bare = Self { stream };
        bare.expect((10, 10));
        let (name, password) = user.split_once(':').unwrap();
        let response = format!("\0{name}\0{password}");
        let table = 0_u32.to_be_bytes().to_vec();
        let start = [table, short_string(b"PLAIN"), long_string(response.as_bytes())];
        bare.say(0, (10, 11), &[start.concat(), short_string(b"en_US")].concat());
        let tune = bare.expect((10, 30));
        // As many channels and as large frames as the broker offers, and no heartbeats.
        bare.say(0, (10, 31), &[&tune[..6], &[0, 0]].concat());
        let vhost = short_string(vhost.replace("%2f", "/").as_bytes());
        bare.say(0, (10, 40), &[vhost, vec![0, 0]].concat());
        bare.expect((10, 41));
        bare.say(1, (20, 10), &[0]);
        bare.expect((20, 11));
        bare.say(1, (85, 10), &[0]);
        bare.expect((85, 11));
        bare
    }

    /// Publishes, and waits until the broker has the message in a queue.
    pub(crate) fn publish(
        &mut self,
        exchange: &str,
        key: &[u8],
        properties: &Properties,
        body: &[u8],
    ) {
        let exchange = short_string(exchange.as_bytes());
        let mandatory = 1;
        let publish = [vec![0, 0], exchange, short_string(key), vec![mandatory]].concat();
        self.say(1, (60, 40), &publish);
        let size = (body.len() as u64).to_be_bytes().to_vec();
        let header = [vec![0, 60, 0, 0], size, properties.bytes()].concat();
        self.frame(2, 1, &header);
        self.frame(3, 1, body);
        self.expect((60, 80));
    }

    fn say(&mut self, channel: u16, (class, method): (u16, u16), arguments: &[u8]) {
        let ids = [class.to_be_bytes(), method.to_be_bytes()].concat();
        self.frame(1, channel, &[&ids, arguments].concat());
    }

    fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let mut frame = vec![kind];
        frame.extend(channel.to_be_bytes());
        frame.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
        frame.extend(payload);
        frame.push(0xCE);
        self.stream.write_all(&frame).unwrap();
    }

    /// The arguments of the next method, which must be this one.
    fn expect(&mut self, (class, method): (u16, u16)) -> Vec<u8> {
        let mut head = [0; 7];
        self.stream.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes([head[3], head[4], head[5], head[6]]);
        let mut payload = vec![0; length as usize + 1];
        self.stream.read_exact(&mut payload).unwrap();
        let ids = [class.to_be_bytes(), method.to_be_bytes()].concat();
        let said = String::from_utf8_lossy(&payload);
        assert!(head[0] == 1 && payload.starts_with(&ids), "waiting for {class}, {method}: {said}");
        payload.drain(..4);
        payload.pop();
        payload
    }
}
