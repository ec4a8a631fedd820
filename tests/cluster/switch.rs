//! An Ethernet switch in user space, over TAP devices, with loss and delay in each direction.
//!
//! Each port is a TAP device whose other end is in the network namespace of one host. A thread for
//! each port reads frames and writes them to the port of the destination address: the last byte of
//! an address is the number of its port, from 1. [`Switch::set`] sets what a link does to frames,
//! for one direction at a time.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock},
    thread,
    time::{Duration, Instant},
};

use tappers::{Interface, Tap};

/// The largest frame: an MTU of 1400 with its header, and room.
const FRAME_MAX: usize = 1600;
/// How many frames may be in transit at once on links with a delay.
const DELAYED_MAX: usize = 65_536;

/// What a link does to frames in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    /// Nothing comes through.
    pub(crate) cut: bool,
    /// How long a frame takes.
    pub(crate) delay: Duration,
    /// How many frames of a thousand are lost.
    pub(crate) lost_of_1000: u32,
}

/// The switch; its threads run until the process ends.
pub(crate) struct Switch {
    shared: Arc<Shared>,
}

struct Shared {
    taps: Vec<Tap>,
    /// By source and destination.
    links: RwLock<Vec<Vec<Link>>>,
    delayed: Mutex<BinaryHeap<Reverse<Delayed>>>,
    sooner: Condvar,
}

/// A frame in transit. The order is that of arrival, and of departure for those that arrive at
/// once.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Delayed {
    due: Instant,
    number: u64,
    to: usize,
    frame: Vec<u8>,
}

impl Switch {
    /// Creates a TAP device for each name, in the network namespace of the calling thread.
    pub(crate) fn start(names: &[String]) -> io::Result<Self> {
        let taps = names.iter().map(|name| Tap::new_named(Interface::new(name)?));
        let taps = taps.collect::<io::Result<Vec<_>>>()?;
        let links = RwLock::new(vec![vec![Link::default(); taps.len()]; taps.len()]);
        let delayed = Mutex::default();
        let shared = Arc::new(Shared { taps, links, delayed, sooner: Condvar::new() });
        for port in 0..names.len() {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name(format!("port {port}")).spawn(move || shared.read(port))?;
        }
        let delivering = Arc::clone(&shared);
        thread::Builder::new().name("delays".to_owned()).spawn(move || delivering.deliver())?;
        Ok(Self { shared })
    }

    /// Changes one direction between two ports, counted from 0.
    pub(crate) fn set(&self, from: usize, to: usize, link: Link) {
        let mut links = self.shared.links.write().unwrap_or_else(PoisonError::into_inner);
        links[from][to] = link;
    }

    /// Removes all faults from the links.
    pub(crate) fn heal(&self) {
        let mut links = self.shared.links.write().unwrap_or_else(PoisonError::into_inner);
        links.iter_mut().flatten().for_each(|link| *link = Link::default());
    }
}

impl Shared {
    fn read(&self, port: usize) {
        let mut frame = [0; FRAME_MAX];
        // Losses are random, but the same in every run: a linear congruential generator is enough.
        let mut chance = 1_u64 + port as u64;
        let mut number = 0;
        loop {
            let Ok(length) = self.taps[port].recv(&mut frame) else {
                // The device is not up yet.
                thread::sleep(Duration::from_millis(10));
                continue;
            };
            let frame = &frame[..length];
            if length < 14 {
                continue;
            }
            // A group's address has the lowest bit of the first byte set.
            let everybody = frame[0] & 1 == 1;
            let named = usize::from(frame[5]).wrapping_sub(1);
            for to in (0..self.taps.len()).filter(|to| *to != port && (everybody || *to == named)) {
                let link = self.link(port, to);
                chance = chance
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                if link.cut || (chance >> 33) % 1000 < u64::from(link.lost_of_1000) {
                    continue;
                }
                if link.delay.is_zero() {
                    self.send(to, frame);
                } else {
                    number += 1;
                    self.delay(Delayed {
                        due: now() + link.delay,
                        number,
                        to,
                        frame: frame.into(),
                    });
                }
            }
        }
    }

    fn link(&self, from: usize, to: usize) -> Link {
        self.links.read().unwrap_or_else(PoisonError::into_inner)[from][to]
    }

    /// A frame that the device doesn't take is lost, as on any network.
    fn send(&self, to: usize, frame: &[u8]) {
        drop(self.taps[to].send(frame));
    }

    fn delay(&self, frame: Delayed) {
        let mut delayed = self.delayed();
        if delayed.len() < DELAYED_MAX {
            delayed.push(Reverse(frame));
            self.sooner.notify_one();
        }
    }

    fn deliver(&self) {
        let mut delayed = self.delayed();
        loop {
            let now = now();
            let due = delayed.peek().map(|Reverse(frame)| frame.due);
            match due {
                Some(due) if due <= now => {
                    if let Some(Reverse(frame)) = delayed.pop() {
                        self.send(frame.to, &frame.frame);
                    }
                }
                Some(due) => {
                    let waited = self.sooner.wait_timeout(delayed, due - now);
                    delayed = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                None => {
                    let waited = self.sooner.wait(delayed);
                    delayed = waited.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn delayed(&self) -> MutexGuard<'_, BinaryHeap<Reverse<Delayed>>> {
        self.delayed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn now() -> Instant {
    Instant::now()
}
