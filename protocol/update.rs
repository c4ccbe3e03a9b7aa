// SPDX-License-Identifier: GPL-2.0

//! An update of CIDs: which connections go on after a migration, and by which CIDs (Documentation/checkpoint.md).
//!
//! The device sends an update in parts. [`Collector`] takes them in order and says when the update is due; [`prepare`]
//! makes the list that [`find`] searches. Whoever stores the list brings the memory.

use super::{
    cid::Cid,
    event::tuples,
    header::{Header, SocketType},
};

/// Length of a tuple on the wire, in bytes.
pub const TUPLE_LEN: usize = 32;

/// How many tuples an update has at most.
pub const MAX_TUPLES: u32 = 65536;

/// A connection that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

    /// The connection before the update.
    fn old_key(&self) -> Key {
        (self.host_old_cid, self.host_port, self.guest_port)
    }

    /// The connection from now on.
    fn new_key(&self) -> Key {
        (self.host_new_cid, self.host_port, self.guest_port)
    }

    /// The RST that tells the device that there is no such connection at the guest with `guest_cid`.
    pub fn reset(&self, guest_cid: Cid) -> Header {
        Header::rst(
            (guest_cid.get().into(), self.guest_port),
            (self.host_new_cid.get().into(), self.host_port),
            self.socket_type,
        )
    }
}

/// One event's part of an update. What it says need not be possible; [`Collector`] refuses it then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpdatePart<'a> {
    generation: u32,
    /// Index of the part's first tuple in the whole update.
    first: u32,
    /// `None` where it cannot be.
    content: Option<Content>,
    tuples: &'a [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Content {
    update: Update,
    /// Tuples in the whole update.
    total: u32,
    /// Tuples in the part.
    count: u32,
}

/// What an update says besides its tuples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Update {
    /// The same in all parts of an update, and another one in the next.
    pub generation: u32,
    /// The guest's CID before.
    pub old_guest_cid: Cid,
    /// The guest's CID from now on.
    pub new_guest_cid: Cid,
    /// The place in the receive queue behind the packets of before the update, as
    /// [`UsedPlace::to_wire`](super::ring::UsedPlace::to_wire) gives it.
    pub rx_used: u16,
}

impl<'a> UpdatePart<'a> {
    /// `is_well_formed` says that the part is as long as it says, and that what is reserved is 0.
    pub(super) fn new(
        generation: u32,
        (old_guest_cid, new_guest_cid): (u64, u64),
        (total, first, count): (u32, u32, u32),
        rx_used: u16,
        tuples: &'a [u8],
        is_well_formed: bool,
    ) -> Self {
        let content = || {
            let end = first.checked_add(count)?;
            // Only an update without tuples has a part without any.
            if !is_well_formed || total > MAX_TUPLES || end > total || (count == 0) != (total == 0)
            {
                return None;
            }
            let update = Update {
                generation,
                old_guest_cid: Cid::guest_from_config(old_guest_cid).ok()?,
                new_guest_cid: Cid::guest_from_config(new_guest_cid).ok()?,
                rx_used,
            };
            Some(Content {
                update,
                total,
                count,
            })
        };
        Self {
            generation,
            first,
            content: content(),
            tuples,
        }
    }

    /// How many tuples it has.
    pub fn count(&self) -> usize {
        self.tuples.len() / TUPLE_LEN
    }

    /// Its tuples, `None` for those that cannot be.
    pub fn tuples(&self) -> impl Iterator<Item = Option<Tuple>> + 'a {
        tuples(self.tuples)
    }

    /// What it says, where that and all its tuples can be.
    fn content(&self) -> Option<Content> {
        self.content
            .filter(|_| self.tuples().all(|tuple| tuple.is_some()))
    }
}

/// Takes the parts of an update in order, and keeps the update until it can be applied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Collector {
    state: State,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
enum State {
    #[default]
    Idle,
    /// So many tuples of an update have come.
    Collecting {
        update: Update,
        total: u32,
        came: u32,
    },
    /// All parts have come.
    Due(Update),
    /// The update of this generation is not applied; the rest of it comes yet.
    Refused { generation: u32 },
}

/// What a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collected {
    /// The next part of an update that may be applied.
    Taken,
    /// It belongs to an update that was refused.
    OfRefused,
    /// It cannot be, or not where it is: the update is refused, and what was collected to be thrown away.
    Refused,
}

/// Whether there is an update to apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// None of which all parts have come.
    Nothing,
    /// Packets of before the update go first.
    AfterPackets,
    /// This one.
    Now(Update),
}

impl Collector {
    /// Takes the next part. An update that [is due](Self::is_due) goes first.
    pub fn add(&mut self, part: &UpdatePart<'_>) -> Collected {
        match self.next(part) {
            Some(state) => {
                self.state = state;
                Collected::Taken
            }
            // A device that never changes the generation can still send an update after one that was refused.
            None if self.state == part.refused() && part.first != 0 => Collected::OfRefused,
            None => {
                self.refuse(part);
                Collected::Refused
            }
        }
    }

    /// The state behind a part, `None` where the part cannot be or cannot be here.
    fn next(&self, part: &UpdatePart<'_>) -> Option<State> {
        let Content {
            update,
            total,
            count,
        } = part.content()?;
        let came = match self.state {
            State::Collecting {
                update: of,
                total: of_total,
                came,
            } if (of, of_total) == (update, total) => came,
            State::Idle | State::Refused { .. } => 0,
            State::Collecting { .. } | State::Due(_) => return None,
        };
        if part.first != came {
            return None;
        }
        // Not more than `total`, as `UpdatePart::new()` saw to.
        let came = came + count;
        Some(if came == total {
            State::Due(update)
        } else {
            State::Collecting {
                update,
                total,
                came,
            }
        })
    }

    /// Refuses the update that a part is of; more parts of it may come.
    pub fn refuse(&mut self, part: &UpdatePart<'_>) {
        self.state = part.refused();
    }

    /// Forgets what was collected, and an update that is due.
    pub fn discard(&mut self) {
        self.state = State::Idle;
    }

    /// Whether all parts of an update have come, and it was not taken yet.
    pub fn is_due(&self) -> bool {
        matches!(self.state, State::Due(_))
    }

    /// Takes the update that is due, where all packets of before it were handled: those up to a place in the receive queue, as
    /// [`UsedPlace::to_wire`](super::ring::UsedPlace::to_wire) gives it.
    pub fn take_due(&mut self, rx_handled: u16) -> Due {
        match self.state {
            State::Due(update) if update.rx_used == rx_handled => {
                self.state = State::Idle;
                Due::Now(update)
            }
            State::Due(_) => Due::AfterPackets,
            _ => Due::Nothing,
        }
    }
}

impl UpdatePart<'_> {
    fn refused(&self) -> State {
        State::Refused {
            generation: self.generation,
        }
    }
}

/// Sorts the tuples of an update for [`find`]; returns whether the update can be applied to the guest with `guest_cid`:
/// whether that is the CID that it changes, and each connection, and each address that connections have afterwards, is
/// there once, and none is the guest's own. `sort` sorts by what a function makes of a tuple.
pub fn prepare(
    update: &Update,
    guest_cid: Option<Cid>,
    tuples: &mut [Tuple],
    sort: impl Fn(&mut [Tuple], fn(&Tuple) -> Key),
) -> bool {
    let is_own = |tuple: &Tuple| {
        tuple.host_old_cid == update.old_guest_cid || tuple.host_new_cid == update.new_guest_cid
    };
    if guest_cid != Some(update.old_guest_cid) || tuples.iter().any(is_own) {
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

/// Finds the tuple of a connection in a [prepared](prepare) list: by the peer's CID before the update, the peer's and
/// the guest's port, and the kind of the sockets.
pub fn find(tuples: &mut [Tuple], connection: Key, socket_type: SocketType) -> Option<&mut Tuple> {
    let at = tuples
        .binary_search_by_key(&connection, Tuple::old_key)
        .ok()?;
    tuples
        .get_mut(at)
        .filter(|tuple| tuple.socket_type == socket_type)
}
