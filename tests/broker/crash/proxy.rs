//! A proxy to the broker that can hold back a record for the journal.

use std::{
    io::{Read, Write, copy},
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use super::{System, port_of};
use crate::processes::LIMIT;

/// Bytes in the properties of a record.
const RECORD: &[u8] = b"dtc.decision.v1";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Open,
    /// The next record will be held back.
    Armed,
    /// One is, with everything that its connection sends after it.
    Holding,
}

/// A port that leads to the broker as long as the test runs.
pub(super) struct Proxy {
    pub(super) port: u16,
    gate: Arc<Gate>,
}

#[derive(Debug)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Proxy {
    pub(super) fn start(system: &System) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let gate = Arc::new(Gate { state: Mutex::new(State::Open), changed: Condvar::new() });
        let (broker, handed_on) = (port_of(&system.world.place.url), Arc::clone(&gate));
        thread::spawn(move || {
            for client in listener.incoming() {
                let (client, gate) = (client.unwrap(), Arc::clone(&handed_on));
                let broker = TcpStream::connect((Ipv4Addr::LOCALHOST, broker)).unwrap();
                let back = (broker.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || hand_on(client, broker, &gate));
                thread::spawn(move || {
                    let (mut broker, mut client) = back;
                    copy(&mut broker, &mut client)
                });
            }
        });
        Self { port, gate }
    }

    /// Holds back the next record.
    pub(super) fn hold_next_record(&self) {
        self.gate.set(State::Armed);
    }

    /// Waits until one is held back.
    pub(super) fn wait_for_record(&self) {
        assert!(self.gate.is_in_time(State::Holding), "no record comes by");
    }

    /// Releases what is held back.
    pub(super) fn let_go(&self) {
        self.gate.set(State::Open);
    }
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        *self.state() = state;
        self.changed.notify_all();
    }

    /// Whether it is within the limit of all tests.
    fn is_in_time(&self, wanted: State) -> bool {
        let is_other = |state: &mut State| *state != wanted;
        let (state, _) = self.changed.wait_timeout_while(self.state(), LIMIT, is_other).unwrap();
        *state == wanted
    }
}

/// Passes on what arrives, unless it must be held back.
fn hand_on(mut from: TcpStream, mut to: TcpStream, gate: &Gate) {
    let mut chunk = vec![0; 64 * 1024];
    // A match may begin at the end of one chunk and end in the next.
    let mut seen = Vec::new();
    while let Ok(length @ 1..) = from.read(&mut chunk) {
        seen.extend_from_slice(&chunk[..length]);
        let is_record = seen.windows(RECORD.len()).any(|it| it == RECORD);
        if is_record && *gate.state() == State::Armed {
            gate.set(State::Holding);
            gate.is_in_time(State::Open);
        }
        seen.drain(..seen.len().saturating_sub(RECORD.len() - 1));
        if to.write_all(&chunk[..length]).is_err() {
            break;
        }
    }
}
