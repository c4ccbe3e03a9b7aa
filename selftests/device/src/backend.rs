// SPDX-License-Identifier: GPL-2.0

//! The virtqueues, as QEMU's vhost-user frontend drives them.

use std::io::{Read, Result, Write};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringRwLock, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard,
    GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;

use crate::device::{lock, ForGuest, Queue, Shared, State};
use crate::packet::Packet;
use crate::update::set_rx_used;

type Memory = GuestMemoryAtomic<GuestMemoryMmap<()>>;
type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap<()>>>;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const QUEUES: usize = 3;

/// The device event that says that a test or another device wants something (the library keeps the next one).
pub(crate) const WAKE: u16 = QUEUES as u16 + 1;

/// The largest ring that the device takes.
const MAX_QUEUE_SIZE: usize = 1024;

/// The vhost-user backend of a device.
pub(crate) struct Backend {
    /// The device that has the virtqueues at the moment.
    device: Mutex<Arc<Shared>>,
    memory: Memory,
}

impl Backend {
    pub(crate) fn new(device: Arc<Shared>, memory: Memory) -> Self {
        Self {
            device: Mutex::new(device),
            memory,
        }
    }

    fn device(&self) -> Arc<Shared> {
        lock(&self.device).clone()
    }

    /// Gives the virtqueues to another device.
    pub(crate) fn set_device(&self, device: Arc<Shared>) {
        *lock(&self.device) = device;
    }

    fn pop(&self, vring: &VringRwLock<Memory>) -> Option<Chain> {
        vring
            .get_mut()
            .get_queue_mut()
            .pop_descriptor_chain(self.memory.memory())
    }

    fn unpop(&self, vring: &VringRwLock<Memory>) {
        vring.get_mut().get_queue_mut().go_to_previous_position();
    }

    /// Buffers in the available ring that were not taken.
    fn posted(&self, vring: &VringRwLock<Memory>) -> u16 {
        let state = vring.get_ref();
        let queue = state.get_queue();
        if !queue.ready() {
            return 0;
        }
        queue
            .avail_idx(&*self.memory.memory(), Ordering::Acquire)
            .map_or(0, |avail| avail.0.wrapping_sub(queue.next_avail()))
    }

    /// Writes a used ring's next entry as it was asked for: the crates would refuse what no driver has posted.
    fn forge_completion(&self, vring: &VringRwLock<Memory>, descriptor: u16, len: u32) {
        let mut state = vring.get_mut();
        let queue = state.get_queue_mut();
        let memory = self.memory.memory();
        let used_ring = GuestAddress(queue.used_ring());
        let next = queue.next_used();
        // After the ring's flags and index, 4 bytes, come entries of 8.
        let entry = used_ring.unchecked_add(4 + u64::from(next % queue.size()) * 8);
        let next = next.wrapping_add(1);
        memory
            .write_obj(
                (u64::from(descriptor) | (u64::from(len) << 32)).to_le(),
                entry,
            )
            .and_then(|()| {
                memory.store(next.to_le(), used_ring.unchecked_add(2), Ordering::Release)
            })
            .expect("the used ring is in the guest's memory");
        queue.set_next_used(next);
    }

    /// Takes packets from the guest.
    fn process_tx(&self, device: &Arc<Shared>, vring: &VringRwLock<Memory>) -> bool {
        let mut used = false;
        loop {
            if lock(&device.state).hold_tx || device.switch.is_congested_for(device) {
                return used;
            }
            let Some(chain) = self.pop(vring) else {
                return used;
            };
            let head = chain.head_index();
            let memory = self.memory.memory();
            let mut bytes = Vec::new();
            let read = chain
                .reader(&*memory)
                .map_err(std::io::Error::other)
                .and_then(|mut reader| reader.read_to_end(&mut bytes));
            let _ = vring.add_used(head, 0);
            used = true;
            if read.is_ok() {
                if let Some(packet) = Packet::from_bytes(&bytes) {
                    packet_from_guest(device, packet);
                }
            }
        }
    }

    /// Gives packets to the guest.
    fn process_rx(&self, vring: &VringRwLock<Memory>, state: &mut State) -> bool {
        let mut used = false;
        while !state.hold_rx && state.update_parts == 0 && !state.for_guest.is_empty() {
            if let Some(ForGuest::Update(parts)) = state.for_guest.front_mut() {
                let mut parts = std::mem::take(parts);
                let rx_used = vring.get_ref().get_queue().next_used();
                for part in &mut parts {
                    set_rx_used(part, rx_used);
                }
                state.for_guest.pop_front();
                state.update_parts = parts.len();
                state.events.extend(parts);
                continue;
            }
            let Some(chain) = self.pop(vring) else {
                break;
            };
            let head = chain.head_index();
            let memory = self.memory.memory();
            let Ok(mut writer) = chain.writer(&*memory) else {
                let _ = vring.add_used(head, 0);
                continue;
            };
            let (bytes, used_len) = match state.for_guest.pop_front() {
                // It is none of these, as was looked at above.
                None | Some(ForGuest::Update(_)) => {
                    self.unpop(vring);
                    break;
                }
                Some(ForGuest::Raw { bytes, used_len }) => (bytes, used_len),
                Some(ForGuest::Packet(packet)) => {
                    let Some((packet, rest)) = packet.split_to_fit(writer.available_bytes()) else {
                        // No packet fits, so the buffer goes back empty and the packet is lost.
                        let _ = vring.add_used(head, 0);
                        continue;
                    };
                    if let Some(rest) = rest {
                        state.for_guest.push_front(ForGuest::Packet(rest));
                    }
                    (packet.to_bytes(), None)
                }
            };
            let len = bytes.len().min(writer.available_bytes());
            let written = writer.write_all(&bytes[..len]).map_or(0, |()| len as u32);
            let _ = vring.add_used(head, used_len.unwrap_or(written));
            used = true;
        }
        used
    }

    /// Gives events to the guest; one without a buffer waits.
    fn process_events(
        &self,
        device: &Shared,
        vring: &VringRwLock<Memory>,
        state: &mut State,
    ) -> bool {
        let mut used = false;
        while !state.hold_events && !state.events.is_empty() {
            let Some(chain) = self.pop(vring) else {
                break;
            };
            let head = chain.head_index();
            let memory = self.memory.memory();
            let event = state.events.pop_front().unwrap_or_default();
            let written = chain.writer(&*memory).map_or(0, |mut writer| {
                let len = event.len().min(writer.available_bytes());
                writer.write_all(&event[..len]).map_or(0, |()| len as u32)
            });
            let _ = vring.add_used(head, written);
            if state.events.len() < state.update_parts {
                state.update_parts -= 1;
                if state.update_parts == 0 {
                    // The packets behind it may go.
                    device.wake();
                }
            }
            used = true;
        }
        used
    }

    fn process_all(&self, device: &Arc<Shared>, vrings: &[VringRwLock<Memory>]) -> Result<()> {
        if lock(&device.state).stopped {
            return Ok(());
        }
        let was_congested = device.is_congested();
        loop {
            for vring in vrings {
                let _ = vring.disable_notification();
            }
            let mut used = [false; QUEUES];
            let silent_events;
            used[TX] = self.process_tx(device, &vrings[TX]);
            {
                let mut state = lock(&device.state);
                used[RX] = self.process_rx(&vrings[RX], &mut state);
                used[EVENT] = self.process_events(device, &vrings[EVENT], &mut state);
                while let Some((queue, descriptor, len)) = state.forged_completions.pop_front() {
                    let queue = match queue {
                        Queue::Rx => RX,
                        Queue::Tx => TX,
                        Queue::Event => EVENT,
                    };
                    self.forge_completion(&vrings[queue], descriptor, len);
                    used[queue] = true;
                }
                silent_events = std::mem::take(&mut state.silent_events);
                state.posted = (self.posted(&vrings[RX]), self.posted(&vrings[EVENT]));
                state.started = true;
                // What the guest had sent by now was taken.
                state.stopped |= state.stopping;
                device.changed.notify_all();
            }
            for (queue, vring) in vrings.iter().enumerate() {
                let silent = queue == EVENT && silent_events;
                if used[queue] && !silent && vring.needs_notification().unwrap_or(true) {
                    vring.signal_used_queue()?;
                }
            }
            // Whatever the guest added before it knew that it has to notify is looked at now.
            let mut more = false;
            for vring in vrings {
                more |= vring.enable_notification().unwrap_or(false);
            }
            // Without progress, what is there waits for somebody else, who wakes this device.
            if !more || used == [false; QUEUES] || lock(&device.state).stopped {
                break;
            }
        }
        if was_congested && !device.is_congested() {
            device.switch.wake_all();
        }
        Ok(())
    }
}

fn packet_from_guest(device: &Arc<Shared>, packet: Packet) {
    let manual = {
        let mut state = lock(&device.state);
        state
            .observers
            .retain(|observer| observer.send(packet.clone()).is_ok());
        state.manual
    };
    if !manual {
        device.switch.route(device, packet);
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringRwLock<Memory>;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | self.device().features
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // QEMU wants the latter two for VIRTIO_F_ACCESS_PLATFORM.
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The library tells the queues.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.device().guest_cid().to_le_bytes();
        config
            .into_iter()
            .skip(offset as usize)
            .take(size as usize)
            .collect()
    }

    fn update_memory(&self, memory: Memory) -> Result<()> {
        // The library replaces what is in the `GuestMemoryAtomic` that both of us have.
        let _ = memory;
        Ok(())
    }

    fn handle_event(
        &self,
        device_event: u16,
        _events: EventSet,
        vrings: &[VringRwLock<Memory>],
        _thread: usize,
    ) -> Result<()> {
        let device = self.device();
        if device_event == WAKE {
            device.drain_wake();
        }
        if vrings
            .iter()
            .any(|vring| !vring.get_ref().get_queue().ready())
        {
            // The guest has not started the device yet, or has stopped it.
            return Ok(());
        }
        self.process_all(&device, vrings)
    }
}
