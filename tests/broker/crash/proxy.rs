//! A way to the broker on which a record for the journal can be held up.

use std::{
    io::{Read, Write, copy},
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use super::{System, port_of};
use crate::processes::LIMIT;

/// What the properties of a record say of it.
const RECORD: &[u8] = b"dtc.decision.v1";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Open,
    /// The next record is to be held up.
    Armed,
    /// One is, with all that its connection sends after it.
    Holding,
}

/// A port that leads to the broker, for as long as the test runs.
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

    /// From now on a record gets no further than here.
    pub(super) fn hold_next_record(&self) {
        self.gate.set(State::Armed);
    }

    /// Waits until one is held up.
    pub(super) fn wait_for_record(&self) {
        assert!(self.gate.is_in_time(State::Holding), "no record comes by");
    }

    /// Lets go of what is held up.
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

    /// Whether it is within the limit that all tests have.
    fn is_in_time(&self, wanted: State) -> bool {
        let is_other = |state: &mut State| *state != wanted;
        let (state, _) = self.changed.wait_timeout_while(self.state(), LIMIT, is_other).unwrap();
        *state == wanted
    }
}

/// Hands on what comes, unless it is to be held.
fn hand_on(mut from: TcpStream, mut to: TcpStream, gate: &Gate) {
    let mut chunk = vec![0; 64 * 1024];
    // What begins at the end of one chunk may end in the next.
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
