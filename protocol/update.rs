// SPDX-License-Identifier: GPL-2.0

//! An update of CIDs: which connections go on after a migration, and by which CIDs (Documentation/checkpoint.md).
//!
//! The device sends an update in parts. [`Collector`] takes them in order; [`prepare`] makes the list that
//! [`find`] searches. Whoever stores the list brings the memory.

use super::{
    cid::Cid,
    event::tuples,
    header::{Header, Op, SocketType},
};

/// Length of a tuple on the wire, in bytes.
pub const TUPLE_LEN: usize = 32;

/// How many tuples an update has at most.
pub const MAX_TUPLES: u32 = 65536;

/// A connection that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// The peer's CID before the update.
    pub host_old_cid: Cid,
    /// The peer's CID from now on.
    pub host_new_cid: Cid,
    /// The peer's port.
    pub host_port: u32,
    /// The guest's port.
    pub guest_port: u32,
    /// The kind of the sockets.
    pub socket_type: SocketType,
    /// Whether a connection was found for it. Not on the wire.
    pub is_kept: bool,
}

/// What tells a connection of the guest from all others: the peer's CID and both ports.
pub type Key = (Cid, u32, u32);

impl Tuple {
    /// `None` where a CID is reserved or the kind of socket unknown.
    pub(super) fn new(
        host_old_cid: u64,
        host_new_cid: u64,
        host_port: u32,
        guest_port: u32,
        socket_type: u16,
    ) -> Option<Self> {
        let socket_type = SocketType::from(socket_type);
        if matches!(socket_type, SocketType::Unknown(_)) {
            return None;
        }
        Some(Self {
            host_old_cid: Cid::from_wire(host_old_cid).ok()?,
            host_new_cid: Cid::from_wire(host_new_cid).ok()?,
            host_port,
            guest_port,
            socket_type,
            is_kept: false,
        })
    }

    fn old_key(&self) -> Key {
        (self.host_old_cid, self.host_port, self.guest_port)
    }

    fn new_key(&self) -> Key {
        (self.host_new_cid, self.host_port, self.guest_port)
    }

    /// The RST that tells the device that there is no such connection at the guest with `guest_cid`.
    pub fn reset(&self, guest_cid: Cid) -> Header {
        Header {
            src_cid: guest_cid.get().into(),
            dst_cid: self.host_new_cid.get().into(),
            src_port: self.guest_port,
            dst_port: self.host_port,
            len: 0,
            socket_type: self.socket_type,
            op: Op::Rst,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

/// One event's part of an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpdatePart<'a> {
    update: Update,
    /// Tuples in the whole update.
    total: u32,
    /// Index of the part's first tuple in the whole update.
    first: u32,
    count: u32,
    tuples: &'a [u8],
}

/// What an update says besides its tuples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Update {
    /// The same in all parts of an update, and another one in the next.
    pub generation: u32,
    /// The guest's CID before.
    pub old_guest_cid: Cid,
    /// The guest's CID from now on.
    pub new_guest_cid: Cid,
    /// How many buffers of the receive queue the device had used before the update, modulo 2^16: packets in these
    /// are of before it.
    pub rx_used: u16,
}

impl<'a> UpdatePart<'a> {
    /// `None` where a CID of the guest is reserved, or the numbers do not fit each other.
    pub(super) fn new(
        generation: u32,
        (old_guest_cid, new_guest_cid): (u64, u64),
        (total, first, count): (u32, u32, u32),
        rx_used: u16,
        tuples: &'a [u8],
    ) -> Option<Self> {
        let end = first.checked_add(count)?;
        // Only an update without tuples has a part without any.
        if total > MAX_TUPLES || end > total || (count == 0) != (total == 0) {
            return None;
        }
        Some(Self {
            update: Update {
                generation,
                old_guest_cid: Cid::guest_from_config(old_guest_cid).ok()?,
                new_guest_cid: Cid::guest_from_config(new_guest_cid).ok()?,
                rx_used,
            },
            total,
            first,
            count,
            tuples,
        })
    }

    /// What all parts say.
    pub fn update(&self) -> &Update {
        &self.update
    }

    /// How many tuples the part has.
    pub fn count(&self) -> usize {
        self.count as usize
    }

    /// Its tuples, `None` for those that cannot be.
    pub fn tuples(&self) -> impl Iterator<Item = Option<Tuple>> + 'a {
        tuples(self.tuples)
    }
}

/// Takes the parts of an update in order.
#[derive(Debug, Default)]
pub struct Collector {
    state: State,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Idle,
    /// So many tuples of an update have come.
    Collecting {
        update: Update,
        total: u32,
        came: u32,
    },
    /// The update of this generation is not applied; the rest of it comes yet.
    Refused { generation: u32 },
}

/// What a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collected {
    /// There are more to come.
    More,
    /// It was the last one.
    Complete(Update),
    /// It belongs to an update that was refused.
    OfRefused,
    /// It cannot be where it is: the update is refused, and what was collected to be thrown away.
    OutOfOrder,
}

impl Collector {
    /// Takes the next part.
    pub fn add(&mut self, part: &UpdatePart<'_>) -> Collected {
        let (update, total, came) = match self.state {
            State::Collecting {
                update,
                total,
                came,
            } => (update, total, came),
            State::Refused { generation }
                if generation == part.update.generation && part.first != 0 =>
            {
                return Collected::OfRefused;
            }
            State::Idle | State::Refused { .. } => (part.update, part.total, 0),
        };
        if part.update != update || part.total != total || part.first != came {
            self.refuse(part.update.generation);
            return Collected::OutOfOrder;
        }
        // Not more than `total`, as `UpdatePart::new()` saw to.
        let came = came + part.count;
        if came == total {
            self.state = State::Idle;
            return Collected::Complete(update);
        }
        self.state = State::Collecting {
            update,
            total,
            came,
        };
        Collected::More
    }

    /// Refuses the update of a generation, of which more parts may come.
    pub fn refuse(&mut self, generation: u32) {
        self.state = State::Refused { generation };
    }

    /// Forgets what was collected; returns whether there was something.
    pub fn discard(&mut self) -> bool {
        let collecting = matches!(self.state, State::Collecting { .. });
        self.state = State::Idle;
        collecting
    }
}

/// Sorts the tuples of an update for [`find`]; returns whether each connection, and each address that connections have
/// afterwards, is there once, and none is the guest's own. `sort` sorts by what a function makes of a tuple.
pub fn prepare(
    update: &Update,
    tuples: &mut [Tuple],
    sort: impl Fn(&mut [Tuple], fn(&Tuple) -> Key),
) -> bool {
    let is_own = |tuple: &Tuple| {
        tuple.host_old_cid == update.old_guest_cid || tuple.host_new_cid == update.new_guest_cid
    };
    if tuples.iter().any(is_own) {
        return false;
    }
    sort(tuples, Tuple::new_key);
    let new_twice = has_neighbours(tuples, Tuple::new_key);
    sort(tuples, Tuple::old_key);
    !new_twice && !has_neighbours(tuples, Tuple::old_key)
}

fn has_neighbours(tuples: &[Tuple], key: impl Fn(&Tuple) -> Key) -> bool {
    let mut before = None;
    tuples.iter().any(|tuple| {
        let key = Some(key(tuple));
        core::mem::replace(&mut before, key) == key
    })
}

/// Finds the tuple of a connection in a [prepared](prepare) list, by the peer's CID before the update.
pub fn find(
    tuples: &mut [Tuple],
    host_old_cid: Cid,
    host_port: u32,
    guest_port: u32,
) -> Option<&mut Tuple> {
    let key = (host_old_cid, host_port, guest_port);
    let at = tuples.binary_search_by_key(&key, Tuple::old_key).ok()?;
    tuples.get_mut(at)
}
