// SPDX-License-Identifier: GPL-2.0

//! What Documentation/checkpoint.md says of a sequence of events, and the comparison of the driver with it.
//!
//! The property test and the fuzz target share this: they make up operations as numbers, and [`Run::apply`] carries them
//! out and panics where driver and text differ in the guest's CID, its connections, or the answers to tuples.

use super::updates::{Effect, Updates};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use vsock_protocol::cid::Cid;
use vsock_protocol::event::Event;
use vsock_protocol::header::Header;
use vsock_protocol::update::find;

/// An operation: what to do, and two arguments.
pub type Operation = (u8, u32, u32);

/// The peer's CID and port, and the guest's port.
type Key = (u64, u32, u32);

/// Op of an answer, source, destination, type.
type Answer = (u16, (u64, u32), (u64, u32), u16);

const RST: u16 = 3;
const CREDIT_REQUEST: u16 = 7;

/// A guest, as far as its peers can tell.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Guest {
    cid: u64,
    /// The connections that there are, and their types.
    connections: BTreeMap<Key, u16>,
    answers: Vec<Answer>,
}

impl Guest {
    fn new() -> Self {
        Self {
            cid: 3,
            connections: BTreeMap::new(),
            answers: Vec::new(),
        }
    }

    fn reset_all(&mut self, configured_cid: u64) {
        self.cid = configured_cid;
        self.connections.clear();
    }

    fn answer(&mut self, op: u16, (host_cid, host_port, guest_port): Key, socket_type: u16) {
        let (guest, host) = ((self.cid, guest_port), (host_cid, host_port));
        self.answers.push((op, guest, host, socket_type));
    }
}

/// The driver: protocol/ and the connections that it would have.
#[derive(Debug)]
struct Driver {
    guest: Guest,
    updates: Updates,
}

impl Driver {
    fn cid(&self) -> Cid {
        Cid::guest_from_config(self.guest.cid).expect("a CID that a guest can have")
    }

    fn take(&mut self, bytes: &[u8], configured_cid: u64) {
        let Ok(event) = Event::parse(bytes) else {
            return;
        };
        let effects = self.updates.take(&event);
        self.carry_out(effects, configured_cid);
        // There are no packets.
        let due = self.updates.take_due(0, Some(self.cid()));
        let effects = due.unwrap_or_else(|| self.updates.refuse_waiting());
        self.carry_out(effects, configured_cid);
        assert!(!self.updates.is_due());
    }

    fn carry_out(&mut self, effects: Vec<Effect>, configured_cid: u64) {
        for effect in effects {
            match effect {
                Effect::TransportReset => self.guest.reset_all(configured_cid),
                Effect::ResetAgain => self.guest.connections.clear(),
                Effect::Answer(tuple) => self.send(&tuple.reset(self.cid())),
                Effect::Apply(update, mut tuples) => {
                    self.guest.cid = update.new_guest_cid.get().into();
                    for (key, socket_type) in std::mem::take(&mut self.guest.connections) {
                        let host = Cid::from_wire(key.0).expect("the CID of a peer");
                        let connection = (host, key.1, key.2);
                        let Some(tuple) = find(&mut tuples, connection, socket_type.into()) else {
                            continue;
                        };
                        assert!(!tuple.is_kept, "a tuple of two connections");
                        tuple.is_kept = true;
                        let key = (tuple.host_new_cid.get().into(), key.1, key.2);
                        self.guest.answer(CREDIT_REQUEST, key, socket_type);
                        let before = self.guest.connections.insert(key, socket_type);
                        assert_eq!(before, None, "two connections that became one");
                    }
                    for tuple in tuples.iter().filter(|tuple| !tuple.is_kept) {
                        self.send(&tuple.reset(self.cid()));
                    }
                }
            }
        }
    }

    fn send(&mut self, header: &Header) {
        self.guest.answers.push((
            header.op.into(),
            (header.src_cid, header.src_port),
            (header.dst_cid, header.dst_port),
            header.socket_type.into(),
        ));
    }
}

/// A tuple, byte by byte as the text has it.
#[derive(Clone, Debug)]
struct TextTuple {
    old: Key,
    new: Key,
    socket_type: u16,
}

/// A part, byte by byte as the text has it.
#[derive(Clone, Debug)]
struct TextPart {
    generation: u64,
    guest_cids: (u64, u64),
    total: u64,
    first: u64,
    count: u64,
    rx_used: u64,
    /// The tuples that can be read.
    tuples: Vec<TextTuple>,
    /// Whether it can be a part of an update.
    is_possible: bool,
}

/// A little-endian number; 0 where it is not all there.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let field = bytes.get(at..at + len).unwrap_or(&[]);
    field
        .iter()
        .rev()
        .fold(0, |number, byte| (number << 8) | u64::from(*byte))
}

fn is_reserved(cid: u64) -> bool {
    cid <= 1 || cid >= 0xffff_ffff
}

impl TextTuple {
    fn read(bytes: &[u8]) -> Option<Self> {
        let (old, new) = (number(bytes, 0, 8), number(bytes, 8, 8));
        let ports = (number(bytes, 16, 4) as u32, number(bytes, 20, 4) as u32);
        let socket_type = number(bytes, 24, 2) as u16;
        let is_readable = !is_reserved(old)
            && !is_reserved(new)
            && (socket_type == 1 || socket_type == 2)
            && number(bytes, 26, 6) == 0;
        is_readable.then_some(Self {
            old: (old, ports.0, ports.1),
            new: (new, ports.0, ports.1),
            socket_type,
        })
    }
}

impl TextPart {
    fn read(bytes: &[u8]) -> Self {
        let behind_head = bytes.get(40..).unwrap_or(&[]);
        let all: Vec<_> = behind_head.chunks_exact(32).map(TextTuple::read).collect();
        let (old, new) = (number(bytes, 8, 8), number(bytes, 16, 8));
        let (total, first, count) = (
            number(bytes, 24, 4),
            number(bytes, 28, 4),
            number(bytes, 32, 4),
        );
        let is_possible = bytes.len() as u64 == 40 + 32 * count
            && number(bytes, 38, 2) == 0
            && total <= 65536
            && first + count <= total
            && (count > 0 || total == 0)
            && ![old, new].iter().any(|cid| is_reserved(*cid) || *cid == 2)
            && all.iter().all(Option::is_some);
        Self {
            generation: number(bytes, 4, 4),
            guest_cids: (old, new),
            total,
            first,
            count,
            rx_used: number(bytes, 36, 2),
            tuples: all.into_iter().flatten().collect(),
            is_possible,
        }
    }

    fn follows(&self, before: Option<&TextPart>) -> bool {
        before.map_or(self.first == 0, |before| {
            self.first == before.first + before.count
                && (self.generation, self.guest_cids, self.total, self.rx_used)
                    == (
                        before.generation,
                        before.guest_cids,
                        before.total,
                        before.rx_used,
                    )
        })
    }
}

/// The text.
#[derive(Debug)]
struct Text {
    guest: Guest,
    /// The parts of the update under way.
    parts: Vec<TextPart>,
    /// The generation of an update that was refused.
    refused: Option<u64>,
}

impl Text {
    fn take(&mut self, bytes: &[u8], configured_cid: u64) {
        match number(bytes, 0, 4) {
            0 if bytes.len() == 4 => {
                self.parts.clear();
                self.refused = None;
                self.guest.reset_all(configured_cid);
            }
            1 if bytes.len() >= 4 => self.take_part(TextPart::read(bytes), configured_cid),
            _ => {}
        }
    }

    fn take_part(&mut self, part: TextPart, configured_cid: u64) {
        if !part.is_possible || !part.follows(self.parts.last()) {
            let is_of_refused = self.refused == Some(part.generation) && part.first != 0;
            let generation = part.generation;
            self.parts.push(part);
            self.refuse((!is_of_refused).then_some(configured_cid));
            self.refused = Some(generation);
            return;
        }
        self.refused = None;
        let is_last = part.first + part.count == part.total;
        let (guest_cids, rx_used) = (part.guest_cids, part.rx_used);
        self.parts.push(part);
        if !is_last {
            return;
        }
        let tuples = || self.parts.iter().flat_map(|part| &part.tuples);
        let count = tuples().count();
        let once =
            |key: fn(&TextTuple) -> Key| tuples().map(key).collect::<BTreeSet<_>>().len() == count;
        let can_be_applied = guest_cids.0 == self.guest.cid
            && rx_used == 0
            && once(|tuple| tuple.old)
            && once(|tuple| tuple.new)
            && tuples().all(|tuple| (tuple.old.0, tuple.new.0) != guest_cids)
            && tuples().all(|tuple| tuple.old.0 != guest_cids.0 && tuple.new.0 != guest_cids.1);
        if !can_be_applied {
            return self.refuse(Some(configured_cid));
        }
        self.guest.cid = guest_cids.1;
        let mut before = std::mem::take(&mut self.guest.connections);
        for tuple in self.parts.drain(..).flat_map(|part| part.tuples) {
            if before.get(&tuple.old) == Some(&tuple.socket_type) {
                before.remove(&tuple.old);
                self.guest.connections.insert(tuple.new, tuple.socket_type);
                self.guest
                    .answer(CREDIT_REQUEST, tuple.new, tuple.socket_type);
            } else {
                self.guest.answer(RST, tuple.new, tuple.socket_type);
            }
        }
    }

    /// Resets all connections and answers all that came by RST. The guest's CID is that in the configuration space where it
    /// is given.
    fn refuse(&mut self, configured_cid: Option<u64>) {
        self.guest
            .reset_all(configured_cid.unwrap_or(self.guest.cid));
        for tuple in self.parts.drain(..).flat_map(|part| part.tuples) {
            self.guest.answer(RST, tuple.new, tuple.socket_type);
        }
    }
}

/// A device that sends updates as they should be, or not.
#[derive(Debug)]
struct Device {
    guest_cid: u64,
    generation: u32,
    /// Events that are to be sent.
    events: VecDeque<Vec<u8>>,
}

/// CIDs of peers: few, so that some meet. One is a guest's.
const PEERS: [u64; 4] = [2, 10, 11, 5];

fn peer(number: u32) -> u64 {
    PEERS[number as usize % PEERS.len()]
}

impl Device {
    /// Begins an update of the connections that `chosen` has bits for, whose parts have so many tuples.
    fn begin(&mut self, connections: &BTreeMap<Key, u16>, chosen: u32, how: u32) {
        let listed = connections
            .iter()
            .enumerate()
            .filter_map(|(at, (key, kind))| {
                ((chosen >> (at % 24)) & 1 != 0).then_some((*key, *kind))
            });
        let mut tuples: Vec<_> = listed.collect();
        if (chosen >> 30) & 1 != 0 {
            // One that may be there or not.
            tuples.push(((peer(how >> 4), (how >> 6) & 3, (how >> 8) & 3), 1));
        }
        let new_cid = 3 + u64::from(how >> 10) % 3;
        let of_part = 1 + (how >> 12) as usize % 3;
        self.generation = self.generation.wrapping_add(1);
        let total = tuples.len();
        let mut first = 0;
        loop {
            let part = &tuples[first..total.min(first + of_part)];
            let mut event = Vec::new();
            event.extend(1_u32.to_le_bytes());
            event.extend(self.generation.to_le_bytes());
            event.extend(self.guest_cid.to_le_bytes());
            event.extend(new_cid.to_le_bytes());
            for number in [total, first, part.len(), 0] {
                event.extend((number as u32).to_le_bytes());
            }
            for ((host_cid, host_port, guest_port), socket_type) in part {
                // Most go to another CID each, so that they do not meet.
                let new_host_cid = match (how >> 14) & 3 {
                    0 => peer(how >> 16),
                    1 => *host_cid,
                    _ => host_cid + 100,
                };
                event.extend(host_cid.to_le_bytes());
                event.extend(new_host_cid.to_le_bytes());
                event.extend(host_port.to_le_bytes());
                event.extend(guest_port.to_le_bytes());
                event.extend(socket_type.to_le_bytes());
                event.extend([0; 6]);
            }
            self.events.push_back(event);
            first += part.len();
            if first == total {
                break;
            }
        }
        self.guest_cid = new_cid;
    }
}

/// A device, a driver, and the text that says what the driver does.
#[derive(Debug)]
pub struct Run {
    device: Device,
    driver: Driver,
    text: Text,
    /// How many updates were applied, and how many refused.
    pub applied: u32,
    pub refused: u32,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            device: Device {
                guest_cid: 3,
                generation: 0,
                events: VecDeque::new(),
            },
            driver: Driver {
                guest: Guest::new(),
                updates: Updates::default(),
            },
            text: Text {
                guest: Guest::new(),
                parts: Vec::new(),
                refused: None,
            },
            applied: 0,
            refused: 0,
        }
    }
}

impl Run {
    pub fn apply(&mut self, (what, first, second): Operation) {
        let events = &mut self.device.events;
        match what % 16 {
            0..=2 => {
                let (key, kind) = (
                    (peer(first), (first >> 2) & 3, second & 3),
                    1 + ((second >> 2) & 1),
                );
                for guest in [&mut self.driver.guest, &mut self.text.guest] {
                    guest.connections.entry(key).or_insert(kind as u16);
                }
            }
            3 | 4 => {
                self.device
                    .begin(&self.text.guest.connections, first, second);
            }
            5..=8 => {
                if let Some(event) = events.pop_front() {
                    self.send(&event);
                }
            }
            9 | 13 => {
                while let Some(event) = self.device.events.pop_front() {
                    self.send(&event);
                }
            }
            10 => {
                events.pop_front();
            }
            11 => {
                if let Some(event) = events.front().cloned() {
                    self.send(&event);
                }
            }
            12 => {
                let at = events.front_mut().and_then(|event| {
                    let at = first as usize % event.len().max(1);
                    event.get_mut(at)
                });
                if let Some(byte) = at {
                    *byte = second as u8;
                }
            }
            14 => {
                if let Some(event) = events.front_mut() {
                    event.resize(first as usize % (event.len() + 64), second as u8);
                }
            }
            _ => self.send(&[0; 4]),
        }
    }

    /// Sends any bytes as an event.
    pub fn send(&mut self, event: &[u8]) {
        self.driver.take(event, self.device.guest_cid);
        self.text.take(event, self.device.guest_cid);
        let (driver, text) = (&mut self.driver.guest, &mut self.text.guest);
        driver.answers.sort_unstable();
        text.answers.sort_unstable();
        assert_eq!(driver, text, "after {event:?}");
        let is_applied = driver
            .answers
            .iter()
            .any(|answer| answer.0 == CREDIT_REQUEST);
        self.applied += u32::from(is_applied);
        self.refused += u32::from(!is_applied && !driver.answers.is_empty());
        driver.answers.clear();
        text.answers.clear();
    }
}
