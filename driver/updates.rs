// SPDX-License-Identifier: GPL-2.0

//! Connections that go on after a migration (Documentation/checkpoint.md).
//!
//! The device lists them in an update of CIDs, in parts. When all parts are there, and all packets of before the update
//! were handled, it is applied: what is listed gets its new addresses and an answer, all else is reset. Nobody receives
//! meanwhile, and nobody holds a spinlock for all of it.

use super::{
    connection::{Connection, ResetState},
    queue_work, work, VsockDriver,
};
use crate::{
    af_vsock_glue::{
        socket::{Address, LockedSocket, Socket, SocketState},
        sort::sort_by_key,
        virtio::{Cause, LiveDevice},
        workqueue::{cond_resched, may_log},
    },
    protocol::{
        cid::Cid,
        update::{find, prepare, Collected, Collector, Due, Tuple, Update, UpdatePart},
    },
};
use kernel::{
    alloc::KVVec,
    prelude::*,
    sync::{aref::ARef, atomic::Relaxed, Arc, ArcBorrow},
};

/// The update that the device is sending, or that has come and waits for packets of before it to be handled.
pub(super) struct Updates {
    collector: Collector,
    /// Its tuples, as far as they have come.
    tuples: KVVec<Tuple>,
}

impl Updates {
    pub(super) fn new() -> Self {
        Self {
            collector: Collector::default(),
            tuples: KVVec::new(),
        }
    }

    /// Whether an update has come and was not applied yet.
    pub(super) fn is_due(&self) -> bool {
        self.collector.is_due()
    }

    /// Appends the tuples of a part; fails where there is no memory.
    fn append(&mut self, part: &UpdatePart<'_>) -> Result {
        self.tuples.reserve(part.count(), GFP_KERNEL)?;
        for tuple in part.tuples().flatten() {
            self.tuples.push(tuple, GFP_KERNEL)?;
        }
        Ok(())
    }

    fn take_tuples(&mut self) -> KVVec<Tuple> {
        core::mem::replace(&mut self.tuples, KVVec::new())
    }

    /// Forgets what has come of an update.
    pub(super) fn discard(&mut self) {
        self.collector.discard();
        self.tuples = KVVec::new();
    }
}

/// Why an update is refused that the device is not to blame for.
const NO_MEMORY: &str = "there is no memory for it";

/// What an update makes of a connection.
enum Fate {
    Kept,
    Reset,
}

impl VsockDriver {
    /// Takes a part of an update. Needs the rx and the events mutex; sleeps, and takes sockets' locks.
    pub(super) fn take_update_part(
        &self,
        updates: &mut Updates,
        part: &UpdatePart<'_>,
        device: &LiveDevice,
    ) {
        match updates.collector.add(part) {
            Collected::OfRefused => {
                // Packets of before the update may have made connections since it was refused.
                self.reset_all_connections(&self.statistics.resets_by_transport);
            }
            Collected::Refused => {
                self.refuse_update(updates, device, "a part is missing, or cannot be");
            }
            Collected::Taken if updates.append(part).is_ok() => return,
            Collected::Taken => {
                updates.collector.refuse(part);
                self.refuse_update(updates, device, NO_MEMORY);
            }
        }
        self.reset_listed(part.tuples().flatten());
    }

    /// Applies the update that is due, where all packets of before it were handled. Returns whether none waits any
    /// more. Needs the rx and the events mutex; sleeps, and takes sockets' locks.
    pub(super) fn apply_due_update(
        self: &Arc<Self>,
        updates: &mut Updates,
        device: &LiveDevice,
    ) -> bool {
        let rx_handled = self.rx_handled.load(Relaxed) as u16;
        let update = match updates.collector.take_due(rx_handled) {
            Due::Nothing => return true,
            Due::AfterPackets => {
                if !self.update_waits.load(Relaxed) {
                    self.update_waits.store(true, Relaxed);
                    queue_work::<{ work::RX }>(self.clone());
                }
                return false;
            }
            Due::Now(update) => update,
        };
        self.update_waits.store(false, Relaxed);
        if !prepare(&update, self.guest_cid(), &mut updates.tuples, sort_by_key) {
            let why = "it has a connection twice, or is not for the guest's CID";
            self.refuse_update(updates, device, why);
        } else if self.apply(&update, &mut updates.tuples, device).is_err() {
            self.refuse_update(updates, device, NO_MEMORY);
        }
        updates.tuples = KVVec::new();
        true
    }

    /// Refuses the update that waits for packets, of which there are no more. Needs the rx mutex.
    pub(super) fn refuse_waiting_update(self: &Arc<Self>) {
        self.update_waits.store(false, Relaxed);
        let mut guard = self.events.lock();
        if let Some(events) = (*guard).as_mut() {
            let (updates, device) = events.updates_and_device();
            if updates.is_due() {
                updates.collector.discard();
                self.refuse_update(updates, device, "packets of before it are missing");
            }
        }
        // Events wait behind it.
        queue_work::<{ work::EVENTS }>(self.clone());
    }

    /// Treats an update that cannot be applied as a transport reset; the device is told of each connection that it has
    /// listed so far.
    fn refuse_update(&self, updates: &mut Updates, device: &LiveDevice, why: &str) {
        self.statistics.refused_updates.increment();
        if may_log() {
            pr_warn!("the device's update of CIDs is refused: {why}\n");
        }
        let tuples = updates.take_tuples();
        self.transport_reset(device);
        self.reset_listed(tuples.iter().copied());
    }

    /// Lets listed connections go on, resets all others. An error where nothing was changed.
    fn apply(&self, update: &Update, tuples: &mut [Tuple], device: &LiveDevice) -> Result {
        let sockets = Socket::all_connected::<Self>()?;
        // What begins from now on has the new CID.
        self.set_guest_cid(Some(update.new_guest_cid));
        let before = Some(update.old_guest_cid);
        let mut migration = self.begin_migration(device, Cause::CidUpdate, before);
        let (mut kept, mut reset) = (0, 0);
        for socket in &sockets {
            match self.keep_or_reset(&socket.lock(), update, tuples) {
                Some(Fate::Kept) => kept += 1,
                Some(Fate::Reset) => reset += 1,
                None => {}
            }
            cond_resched();
        }
        put_sockets(sockets);
        self.cancel_waiting_of_reset_connections();
        self.readdress_waiting_requests(update.new_guest_cid);
        self.let_bound_sockets_follow(update.new_guest_cid);
        self.reset_listed(tuples.iter().filter(|tuple| !tuple.is_kept).copied());
        self.statistics.cid_updates.increment();
        self.statistics.kept_connections.add(kept);
        if may_log() {
            pr_info!(
                "CID {} is now {}, {kept} connections go on, {reset} were reset\n",
                update.old_guest_cid.get(),
                update.new_guest_cid.get()
            );
        }
        migration.reset = u32::try_from(reset).unwrap_or(u32::MAX);
        migration.kept = u32::try_from(kept).unwrap_or(u32::MAX);
        device.announce(&migration);
        Ok(())
    }

    /// Lets a connection go on that is listed, resets any other. `None` where there was no connection any more.
    fn keep_or_reset(
        &self,
        socket: &LockedSocket<'_>,
        update: &Update,
        tuples: &mut [Tuple],
    ) -> Option<Fate> {
        // It may have been given to another transport meanwhile.
        let connection = socket.connection::<Self>()?;
        if let Some(tuple) = tuple_of(socket, &connection, tuples) {
            tuple.is_kept = true;
            self.keep(socket, connection, update, tuple.host_new_cid);
            return Some(Fate::Kept);
        }
        self.reset_connection(socket, &connection, &self.statistics.resets_by_transport)
            .then_some(Fate::Reset)
    }

    /// Gives a connection its new addresses and tells the device.
    fn keep(
        &self,
        socket: &LockedSocket<'_>,
        connection: ArcBorrow<'_, Connection>,
        update: &Update,
        host_cid: Cid,
    ) {
        let own = match socket.local().cid {
            Address::CID_ANY => Address::CID_ANY,
            _ => update.new_guest_cid.get(),
        };
        socket.change_cids(own, host_cid.get());
        connection.set_guest_cid(update.new_guest_cid);
        self.acknowledge_update(socket, connection, update.new_guest_cid, host_cid);
    }

    /// Tells the device that there are no connections for tuples. Sleeps.
    fn reset_listed(&self, tuples: impl Iterator<Item = Tuple>) {
        let Some(guest_cid) = self.guest_cid() else {
            return;
        };
        for tuple in tuples {
            self.send_nofail(&tuple.reset(guest_cid));
            self.statistics.rst_no_connection.increment();
            cond_resched();
        }
    }
}

/// Gives up many references to sockets. Sleeps.
fn put_sockets(sockets: KVVec<ARef<Socket>>) {
    for socket in sockets {
        drop(socket);
        cond_resched();
    }
}

/// The tuple of a connection that can go on.
fn tuple_of<'a>(
    socket: &LockedSocket<'_>,
    connection: &Connection,
    tuples: &'a mut [Tuple],
) -> Option<&'a mut Tuple> {
    if socket.state() != SocketState::Established
        || socket.is_done()
        || connection.reset_state() != ResetState::No
    {
        return None;
    }
    let remote = socket.remote();
    let host_old_cid = Cid::from_wire(remote.cid.into()).ok()?;
    let key = (host_old_cid, remote.port, socket.local().port);
    find(tuples, key, connection.socket_type())
}
