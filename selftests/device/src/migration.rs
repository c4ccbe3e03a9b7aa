// SPDX-License-Identifier: GPL-2.0

//! What a device does when its guest comes from another device, or leaves for one, and when a peer of its guest does.

use std::sync::Arc;

use anyhow::{ensure, Result};
use serde_bytes::ByteBuf;

use crate::bridge::Key;
use crate::device::{lock, ForGuest, Shared, State, EVENT_TRANSPORT_RESET};
use crate::packet::{Op, Packet};
use crate::state::DeviceState;
use crate::update::{Tuple, Update};

/// For how many migrations a packet of the guest can be on its way, because no device has got to it.
const ADDRESSES_BEFORE: usize = 32;

impl State {
    /// Holds packets of other guests back until the guest has answered tuples.
    fn hold(&mut self, tuples: &[Tuple]) {
        self.held.extend(tuples.iter().map(|tuple| {
            let connection = (tuple.host_new_cid, tuple.host_port, tuple.guest_port);
            (connection, Vec::new())
        }));
    }
}

impl Shared {
    /// Waits until the device has stopped.
    pub(crate) fn wait_stopped(&self) {
        let mut state = lock(&self.state);
        while !state.stopped {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Stops for good, and says what another device needs to go on.
    pub(crate) fn save(self: &Arc<Self>) -> DeviceState {
        // It may have been started and stopped before it got to anything.
        self.begin();
        let (now, before) = self.addresses();
        let mut addresses = before;
        addresses.retain(|it| *it != now);
        addresses.drain(..addresses.len().saturating_sub(ADDRESSES_BEFORE));
        addresses.push(now);
        let mut saved = DeviceState {
            addresses,
            ..DeviceState::default()
        };
        let mut responses = Vec::new();
        self.switch.guest_leaves(now.guest_cid);
        let wakes_others = {
            let mut state = lock(&self.state);
            state.stopped = true;
            saved.generation = state.generation;
            saved.events = state.events.drain(..).map(ByteBuf::from).collect();
            let waiting = std::mem::take(&mut state.for_guest);
            for item in waiting {
                match item {
                    ForGuest::Events(parts) => saved
                        .updates
                        .push(parts.into_iter().map(ByteBuf::from).collect()),
                    ForGuest::Packet(packet)
                        if packet.op == Op::RST || packet.src_cid != self.host_cid =>
                    {
                        saved.for_guest.push(ByteBuf::from(packet.to_bytes()));
                    }
                    ForGuest::Packet(packet) if packet.op == Op::RESPONSE => responses.push(packet),
                    // Payload goes with the state of its connection.
                    other => state.for_guest.push_back(other),
                }
            }
            let held = std::mem::take(&mut state.held);
            let held = held.into_values().flatten();
            saved
                .for_guest
                .extend(held.map(|packet| ByteBuf::from(packet.to_bytes())));
            self.changed.notify_all();
            std::mem::take(&mut state.others_wait)
        };
        if wakes_others {
            // What they send from now on is kept for the device that the guest moves to.
            self.switch.wake_all();
        }
        // To the guest, these connections are not there yet: it gets its answer where it goes on.
        saved.requests = responses
            .into_iter()
            .filter_map(|response| self.bridge()?.unaccept(&response))
            .map(|request| ByteBuf::from(request.to_bytes()))
            .collect();
        saved
    }

    /// Takes what the guest's last device has left.
    pub(crate) fn load(&self, saved: DeviceState) -> Result<()> {
        let mut state = lock(&self.state);
        ensure!(!state.begun, "the device has begun already");
        state.inherited = Some(saved);
        Ok(())
    }

    /// Begins to work on the virtqueues, where that was not done. A guest that comes from another device is told first
    /// which connections were restored, and goes on with these.
    pub(crate) fn begin(self: &Arc<Self>) {
        let (inherited, now) = {
            let mut state = lock(&self.state);
            if std::mem::replace(&mut state.begun, true) {
                return;
            }
            (state.inherited.take(), state.guest_cid)
        };
        let restored = self.bridge().map_or_else(Vec::new, |bridge| bridge.begin());
        let Some((before, inherited)) =
            inherited.and_then(|it| Some((it.addresses.last().copied()?, it)))
        else {
            // A guest that comes from nowhere has no connections.
            if let Some(bridge) = self.bridge() {
                bridge.forget_all();
            }
            return;
        };
        if !self.driver_knows_updates() {
            return self.begin_with_reset(before.guest_cid, inherited);
        }
        let (between_guests, parked) = self.switch.guest_moved(before.guest_cid, self);
        let generation = inherited.generation.wrapping_add(1);
        let mut update = Update {
            generation,
            old_guest_cid: before.guest_cid,
            new_guest_cid: now,
            tuples: self.tuples_of_host(restored, before.host_cid),
        };
        update.tuples.extend(&between_guests);
        let to_guest = |bytes: &ByteBuf| {
            Some(Packet {
                dst_cid: now,
                ..Packet::from_bytes(bytes)?
            })
        };
        let mut packets: Vec<_> = inherited.for_guest.iter().filter_map(to_guest).collect();
        packets.extend(parked.into_iter().map(|packet| Packet {
            dst_cid: now,
            ..packet
        }));
        let mut updates: Vec<Vec<_>> = inherited
            .updates
            .into_iter()
            .map(|parts| parts.into_iter().map(ByteBuf::into_vec).collect())
            .collect();
        updates.push(update.to_events());
        {
            let mut state = lock(&self.state);
            state.generation = generation;
            state.before = inherited.addresses;
            state.events = inherited
                .events
                .into_iter()
                .map(ByteBuf::into_vec)
                .collect();
            state.awaited_events = state.events.len();
            let updates = updates.into_iter().map(ForGuest::Events);
            let since = std::mem::take(&mut state.for_guest);
            state.for_guest = updates.collect();
            state.hold(&between_guests);
            for packet in packets {
                state.push_packet(packet);
            }
            for item in since {
                match item {
                    ForGuest::Packet(packet) => state.push_packet(packet),
                    other => state.for_guest.push_back(other),
                }
            }
        }
        self.repeat_requests(&inherited.requests);
    }

    /// Begins with a guest whose driver does not know updates of CIDs: its connections end, those that were restored too.
    fn begin_with_reset(self: &Arc<Self>, old_cid: u64, inherited: DeviceState) {
        if let Some(bridge) = self.bridge() {
            bridge.forget_all();
        }
        self.switch.guest_lost_connections(old_cid, self);
        {
            let mut state = lock(&self.state);
            state.before.clone_from(&inherited.addresses);
            let events = inherited.events.iter().map(|event| event.to_vec());
            state.events = events.collect();
            state
                .events
                .push_back(EVENT_TRANSPORT_RESET.to_le_bytes().to_vec());
            // Packets of connections that others make from now on wait for it.
            state.awaited_events = state.events.len();
        }
        self.repeat_requests(&inherited.requests);
    }

    /// Takes the guest's requests that its last device has not answered.
    fn repeat_requests(self: &Arc<Self>, requests: &[ByteBuf]) {
        for request in requests {
            if let Some(request) = Packet::from_bytes(request) {
                self.switch.route(self, request);
            }
        }
    }

    /// Tuples of connections of the host's programs.
    fn tuples_of_host(&self, connections: Vec<(Key, u16)>, host_old_cid: u64) -> Vec<Tuple> {
        connections
            .into_iter()
            .map(|((guest_port, host_port), socket_type)| Tuple {
                host_old_cid,
                host_new_cid: self.host_cid,
                host_port,
                guest_port,
                socket_type,
            })
            .collect()
    }

    /// Another guest has moved that this one has connections to: `tuples` are those to guests. All others go on as they
    /// are.
    pub(crate) fn peer_moved(&self, old_cid: u64, new_cid: u64, tuples: Vec<Tuple>) {
        let of_host = self.bridge().map_or_else(Vec::new, |bridge| bridge.known());
        let mut state = lock(&self.state);
        state.generation = state.generation.wrapping_add(1);
        let mut update = Update {
            generation: state.generation,
            old_guest_cid: state.guest_cid,
            new_guest_cid: state.guest_cid,
            tuples: self.tuples_of_host(of_host, self.host_cid),
        };
        update.tuples.extend(&tuples);
        state
            .for_guest
            .push_back(ForGuest::Events(update.to_events()));
        // What was held since an update before this one is from the peer's earlier CID.
        let held = std::mem::take(&mut state.held);
        state.hold(&tuples);
        for mut packet in held.into_values().flatten() {
            if packet.src_cid == old_cid {
                packet.src_cid = new_cid;
            }
            state.push_packet(packet);
        }
        drop(state);
        self.wake();
    }

    /// The guest has sent a packet, by which it may have answered that a connection to another guest goes on.
    pub(crate) fn release_held(&self, packet: &Packet) {
        let mut state = lock(&self.state);
        if packet.src_cid != state.guest_cid {
            return;
        }
        let connection = (packet.dst_cid, packet.dst_port, packet.src_port);
        if let Some(held) = state.held.remove(&connection) {
            state
                .for_guest
                .extend(held.into_iter().map(ForGuest::Packet));
            drop(state);
            self.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Addresses, Device, DeviceConfig};
    use crate::switch::Switch;
    use crate::update::FEATURE_CHECKPOINT;
    use std::sync::atomic::Ordering;

    #[test]
    fn a_guest_that_only_passes_through_is_told_of_both_migrations() {
        let folder = tempfile::tempdir().unwrap();
        let config = DeviceConfig::new(folder.path().join("socket"), 5);
        let device = Device::start(config, Switch::new()).unwrap();
        let before = Addresses {
            guest_cid: 4,
            host_cid: 2,
        };
        let inherited = DeviceState {
            addresses: vec![before],
            generation: 7,
            ..DeviceState::default()
        };
        let accepted = &device.shared.accepted_features;
        accepted.store(FEATURE_CHECKPOINT, Ordering::Relaxed);
        device.shared.load(inherited).unwrap();
        let left = device.shared.save();
        let now = Addresses {
            guest_cid: 5,
            host_cid: 2,
        };
        assert_eq!(left.addresses, [before, now]);
        assert_eq!((left.generation, left.updates.len()), (8, 1));
    }
}
