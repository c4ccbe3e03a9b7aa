// SPDX-License-Identifier: GPL-2.0

//! Which packet goes where.
//!
//! Connections between guests have no end at a host that could carry them over when one of the guests moves. The switch
//! knows them: the guest that has moved is told of its connections, and so is each guest at their other ends, whose own
//! CID stays as it is.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, Weak};

use crate::device::{lock, Addresses, Shared};
use crate::packet::{Op, Packet};
use crate::update::Tuple;

/// The devices that reach each other.
#[derive(Default)]
pub struct Switch {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By their guests' CIDs.
    devices: HashMap<u64, Weak<Shared>>,
    /// Connections between guests, each with both ends.
    links: Vec<Link>,
    /// Which CID guests that have moved have instead of an earlier one.
    moved: HashMap<u64, u64>,
    /// CIDs of guests that have left one device and have not begun at another.
    between_devices: HashSet<u64>,
    /// Packets to these.
    parked: Vec<Packet>,
}

/// One end of a connection: CID and port.
type End = (u64, u32);

/// A connection between guests.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Link {
    ends: [End; 2],
    socket_type: u16,
}

impl Link {
    fn of(packet: &Packet) -> Self {
        let mut ends = [
            (packet.src_cid, packet.src_port),
            (packet.dst_cid, packet.dst_port),
        ];
        ends.sort_unstable();
        Self {
            ends,
            socket_type: packet.socket_type,
        }
    }

    /// The ends as a guest sees them, its own first, where it has one.
    fn seen_by(&self, cid: u64) -> Option<(End, End)> {
        match self.ends {
            [own, other] if own.0 == cid => Some((own, other)),
            [other, own] if own.0 == cid => Some((own, other)),
            _ => None,
        }
    }
}

impl State {
    fn device(&self, cid: u64) -> Option<Arc<Shared>> {
        self.devices.get(&cid).and_then(Weak::upgrade)
    }

    /// The CID that a guest has now which had `cid`.
    fn present_cid(&self, mut cid: u64) -> u64 {
        while let Some(next) = self.moved.get(&cid) {
            cid = *next;
        }
        cid
    }

    /// Gives a packet to the device of its guest, or keeps it for the one that the guest moves to; gives it back where
    /// there is no such guest.
    fn deliver(&mut self, packet: Packet) -> Result<(), Packet> {
        let kept = match self.device(packet.dst_cid) {
            Some(device) => device.send_between_guests(packet).err(),
            // The device that the guest has left may be gone before the guest is there again.
            None if self.between_devices.contains(&packet.dst_cid) => Some(packet),
            None => return Err(packet),
        };
        self.parked.extend(kept);
        Ok(())
    }

    /// Tuples of the connections of the guest with `cid`, by its present CID and by those that the others have, except
    /// that a guest that has `new_cid` had `old_cid`.
    fn tuples(&self, cid: u64, (old_cid, new_cid): (u64, u64)) -> Vec<Tuple> {
        self.links
            .iter()
            .filter_map(|link| Some((link, link.seen_by(cid)?)))
            .map(|(link, (own, other))| Tuple {
                host_old_cid: if other.0 == new_cid { old_cid } else { other.0 },
                host_new_cid: other.0,
                host_port: other.1,
                guest_port: own.1,
                socket_type: link.socket_type,
            })
            .collect()
    }
}

impl Switch {
    /// A switch without devices.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Makes a device reachable at a CID, and at its old one no more.
    pub(crate) fn connect(&self, cid: u64, device: &Arc<Shared>) {
        let mut state = lock(&self.state);
        state
            .devices
            .retain(|_, other| !Weak::ptr_eq(other, &Arc::downgrade(device)));
        state.moved.remove(&cid);
        state.devices.insert(cid, Arc::downgrade(device));
    }

    fn all(&self) -> Vec<Arc<Shared>> {
        lock(&self.state)
            .devices
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

    /// A guest has left its device, and will begin at another.
    pub(crate) fn guest_leaves(&self, cid: u64) {
        lock(&self.state).between_devices.insert(cid);
    }

    /// A guest has moved to `device`, and has another CID perhaps. Its peers among the guests are told of it. Returns the
    /// tuples of its connections to them, and the packets that wait for it.
    pub(crate) fn guest_moved(&self, old_cid: u64, device: &Shared) -> (Vec<Tuple>, Vec<Packet>) {
        let cid = device.guest_cid();
        let mut state = lock(&self.state);
        state.between_devices.remove(&old_cid);
        if cid != old_cid {
            state.devices.remove(&old_cid);
            state.moved.insert(old_cid, cid);
        }
        let mut peers = Vec::new();
        for link in &mut state.links {
            if let Some((_, other)) = link.seen_by(old_cid) {
                peers.push(other.0);
                for end in &mut link.ends {
                    if end.0 == old_cid {
                        end.0 = cid;
                    }
                }
                link.ends.sort_unstable();
            }
        }
        peers.sort_unstable();
        peers.dedup();
        for peer in peers.into_iter().filter_map(|cid| state.device(cid)) {
            let tuples = state.tuples(peer.guest_cid(), (old_cid, cid));
            peer.peer_moved(old_cid, cid, tuples);
        }
        let tuples = state.tuples(cid, (cid, cid));
        let (parked, others) = std::mem::take(&mut state.parked)
            .into_iter()
            .partition(|packet| state.present_cid(packet.dst_cid) == cid);
        state.parked = others;
        (tuples, parked)
    }

    /// A guest has moved to `device` without its connections, and has another CID perhaps. Those to other guests end.
    pub(crate) fn guest_lost_connections(&self, old_cid: u64, device: &Shared) {
        let mut state = lock(&self.state);
        state.between_devices.remove(&old_cid);
        if device.guest_cid() != old_cid {
            state.devices.remove(&old_cid);
        }
        let (parked, others): (Vec<_>, _) = std::mem::take(&mut state.parked)
            .into_iter()
            .partition(|packet| packet.dst_cid == old_cid);
        state.parked = others;
        for packet in parked {
            // Whoever has a connection is told of its end; who asks for one has none.
            if packet.op == Op::REQUEST {
                let _ = state.deliver(packet.reply(Op::RST));
            }
        }
        let is_lost = |link: &Link| link.seen_by(old_cid).is_some();
        let (lost, others): (Vec<_>, _) = state.links.iter().copied().partition(is_lost);
        state.links = others;
        for link in lost {
            if let Some((own, other)) = link.seen_by(old_cid) {
                // A peer that is between devices itself gets the RST there.
                let _ = state.deliver(Packet::rst(own, other, link.socket_type));
            }
        }
    }

    /// Sends on a packet that the guest of `from` has sent.
    ///
    /// A packet from a CID that is not the guest's is dropped; one to a CID that nobody has is answered with RST. Packets
    /// that were on their way at a migration have addresses of before: they still belong to their connections, and
    /// requests to the guest that it is now.
    pub(crate) fn route(&self, from: &Arc<Shared>, mut packet: Packet) {
        let (now, before) = from.addresses();
        let is_of_before = before.iter().any(|it| it.guest_cid == packet.src_cid);
        let addresses = Addresses {
            guest_cid: packet.src_cid,
            host_cid: packet.dst_cid,
        };
        if packet.op != Op::REQUEST && addresses != now && before.contains(&addresses) {
            if let Some(bridge) = from.bridge() {
                bridge.receive_late(packet);
            }
            return;
        }
        if packet.op == Op::REQUEST && is_of_before {
            packet.src_cid = now.guest_cid;
        }
        if (packet.src_cid, packet.dst_cid) == (now.guest_cid, now.host_cid) {
            match from.bridge() {
                Some(bridge) => bridge.receive(packet),
                None => refuse(from, &packet),
            }
            return;
        }
        self.route_between_guests(from, packet, now.guest_cid, is_of_before);
    }

    fn route_between_guests(
        &self,
        from: &Arc<Shared>,
        mut packet: Packet,
        guest_cid: u64,
        is_of_before: bool,
    ) {
        let mut state = lock(&self.state);
        from.release_held(&packet);
        if packet.op != Op::REQUEST {
            // With addresses of before the last migration of either guest.
            let mut present = packet.clone();
            present.dst_cid = state.present_cid(packet.dst_cid);
            if is_of_before {
                present.src_cid = guest_cid;
            }
            if state.links.contains(&Link::of(&present)) {
                packet = present;
            }
        }
        if packet.src_cid != guest_cid {
            return;
        }
        let link = Link::of(&packet);
        match packet.op {
            Op::RESPONSE if !state.links.contains(&link) => state.links.push(link),
            Op::RST => state.links.retain(|other| *other != link),
            _ => {}
        }
        if let Err(packet) = state.deliver(packet) {
            refuse(from, &packet);
        }
    }
}

fn refuse(from: &Shared, packet: &Packet) {
    if packet.op != Op::RST {
        from.send_to_guest(packet.reply(Op::RST));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Device, DeviceConfig, ForGuest};
    use crate::packet::TYPE_STREAM;
    use crate::update::FEATURE_CHECKPOINT;
    use std::sync::atomic::Ordering;

    fn packet_between_guests() -> Packet {
        Packet {
            op: Op::RW,
            payload: vec![1],
            ..Packet::rst((9, 1), (4, 2), TYPE_STREAM)
        }
    }

    /// The operations and the receivers of the packets that wait for a guest.
    fn waiting(device: &Device) -> Vec<(Op, u64)> {
        lock(&device.shared.state)
            .for_guest
            .iter()
            .filter_map(|waiting| match waiting {
                ForGuest::Packet(packet) => Some((packet.op, packet.dst_cid)),
                _ => None,
            })
            .collect()
    }

    /// A guest that has another one for a peer leaves its device and begins at another, with a driver that accepts
    /// `features`; the peer sends `packet` to it meanwhile. Gives what waits for the peer, and for the guest, then.
    fn send_between_devices(packet: Packet, features: u64) -> [Vec<(Op, u64)>; 2] {
        let folder = tempfile::tempdir().unwrap();
        let switch = Switch::new();
        let start = |cid: u64| {
            let socket = folder.path().join(cid.to_string());
            Device::start(DeviceConfig::new(socket, cid), switch.clone()).unwrap()
        };
        let (peer, source) = (start(9), start(4));
        let state = source.shared.save();
        // Its threads may hold on to it for a while.
        lock(&switch.state).devices.remove(&4);
        switch.route(&peer.shared, packet);
        assert_eq!(waiting(&peer), []);

        let destination = start(5);
        let accepted = &destination.shared.accepted_features;
        accepted.store(features, Ordering::Relaxed);
        destination.shared.load(state).unwrap();
        destination.shared.begin();
        [waiting(&peer), waiting(&destination)]
    }

    #[test]
    fn a_packet_to_a_guest_between_devices_waits_for_it() {
        let [_, for_guest] = send_between_devices(packet_between_guests(), FEATURE_CHECKPOINT);
        assert_eq!(for_guest, [(Op::RW, 5)]);
    }

    #[test]
    fn a_request_to_a_guest_that_begins_without_its_connections_is_refused() {
        let request = Packet {
            op: Op::REQUEST,
            ..packet_between_guests()
        };
        let [for_peer, for_guest] = send_between_devices(request, 0);
        assert_eq!(for_peer, [(Op::RST, 9)]);
        assert_eq!(for_guest, []);
    }

    #[test]
    fn a_packet_to_nobody_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let config = DeviceConfig::new(folder.path().join("9"), 9);
        let peer = Device::start(config, Switch::new()).unwrap();
        peer.shared
            .switch
            .route(&peer.shared, packet_between_guests());
        assert_eq!(waiting(&peer), [(Op::RST, 9)]);
    }
}
