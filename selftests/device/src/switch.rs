// SPDX-License-Identifier: GPL-2.0

//! Which packet goes where.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use crate::device::{lock, Addresses, Shared};
use crate::packet::{Op, Packet};

/// The devices that reach each other, by their guests' CIDs.
#[derive(Default)]
pub struct Switch {
    devices: Mutex<HashMap<u64, Weak<Shared>>>,
}

impl Switch {
    /// A switch without devices.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Makes a device reachable at a CID, and at its old one no more.
    pub(crate) fn connect(&self, cid: u64, device: &Arc<Shared>) {
        let mut devices = lock(&self.devices);
        devices.retain(|_, other| !Weak::ptr_eq(other, &Arc::downgrade(device)));
        devices.insert(cid, Arc::downgrade(device));
    }

    fn all(&self) -> Vec<Arc<Shared>> {
        lock(&self.devices)
            .values()
            .filter_map(Weak::upgrade)
            .collect()
    }

    /// Whether some other guest takes packets so slowly that no more should be taken from this device's.
    ///
    /// A guest that is behind with its packets may send all the same: it may have stopped because its answers wait.
    pub(crate) fn is_congested_for(&self, device: &Arc<Shared>) -> bool {
        self.all()
            .iter()
            .any(|other| !Arc::ptr_eq(other, device) && other.is_congested())
    }

    /// Lets all devices look at their queues again, after congestion has ended.
    pub(crate) fn wake_all(&self) {
        for device in self.all() {
            device.wake();
        }
    }

    /// Sends on a packet that the guest of `from` has sent.
    ///
    /// A packet from a CID that is not the guest's is dropped; one to a CID that nobody has is answered with RST. Packets
    /// that were on their way at a migration have addresses of before: they still belong to their connections, and
    /// requests to the guest that it is now.
    pub(crate) fn route(&self, from: &Arc<Shared>, mut packet: Packet) {
        let (now, before) = from.addresses();
        let is_of_before = |cid| before.iter().any(|it| it.guest_cid == cid);
        if packet.op == Op::REQUEST && is_of_before(packet.src_cid) {
            packet.src_cid = now.guest_cid;
        }
        let addresses = Addresses {
            guest_cid: packet.src_cid,
            host_cid: packet.dst_cid,
        };
        if addresses == now {
            match from.bridge() {
                Some(bridge) => bridge.receive(packet),
                None => refuse(from, &packet),
            }
            return;
        }
        if before.contains(&addresses) && packet.op != Op::REQUEST {
            if let Some(bridge) = from.bridge() {
                bridge.receive_late(packet);
            }
            return;
        }
        if packet.src_cid != now.guest_cid {
            return;
        }
        let to = lock(&self.devices)
            .get(&packet.dst_cid)
            .and_then(Weak::upgrade);
        match to {
            Some(to) => to.send_to_guest(packet),
            None => refuse(from, &packet),
        }
    }
}

fn refuse(from: &Shared, packet: &Packet) {
    if packet.op != Op::RST {
        from.send_to_guest(packet.reply(Op::RST));
    }
}
