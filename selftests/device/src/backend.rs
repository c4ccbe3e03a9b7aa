// SPDX-License-Identifier: GPL-2.0

//! The virtqueues, as QEMU's vhost-user frontend drives them.

use std::fs::File;
use std::io::{Error, Read, Result, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::Context;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_bindings::bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    new_event_consumer_and_notifier, EventConsumer, EventFlag, EventNotifier,
};

use crate::device::{lock, ForGuest, Queue, Shared, State};
use crate::packet::Packet;
use crate::ring::{Memory, Ring, RingState, Vring};
use crate::state::{self, DeviceState};
use crate::update::set_rx_used;

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
    device: Arc<Shared>,
    memory: Memory,
    /// Whether the driver has accepted packed rings.
    has_packed_rings: AtomicBool,
    rings: [RingState; QUEUES],
    /// Held while the virtqueues are worked on.
    working: Mutex<()>,
    /// The transfer of the device's state that is under way, or the last one.
    transfer: Mutex<Option<JoinHandle<anyhow::Result<()>>>>,
}

impl Backend {
    pub(crate) fn new(device: Arc<Shared>, memory: Memory) -> Self {
        Self {
            device,
            memory,
            has_packed_rings: AtomicBool::new(false),
            rings: Default::default(),
            working: Mutex::default(),
            transfer: Mutex::default(),
        }
    }

    fn ring<'a>(&'a self, vrings: &'a [Vring], queue: usize) -> Ring<'a> {
        Ring::new(
            &vrings[queue],
            &self.rings[queue],
            self.memory.memory(),
            self.has_packed_rings.load(Ordering::Relaxed),
        )
    }

    /// Takes packets from the guest.
    fn process_tx(&self, device: &Arc<Shared>, ring: &Ring<'_>) -> bool {
        let mut used = false;
        while !device.is_blocked_by_others() {
            let buffer = {
                // Once a test holds packets back, none is taken any more.
                let state = lock(&device.state);
                if state.hold_tx {
                    None
                } else {
                    ring.pop()
                }
            };
            let Some(buffer) = buffer else {
                break;
            };
            let bytes = buffer.read(&self.memory.memory());
            ring.add_used(&buffer, 0);
            used = true;
            if let Ok(bytes) = bytes {
                if let Some(packet) = Packet::from_bytes(&bytes) {
                    packet_from_guest(device, packet);
                }
            }
        }
        used
    }

    /// Gives packets to the guest.
    fn process_rx(&self, ring: &Ring<'_>, state: &mut State) -> bool {
        let mut used = false;
        loop {
            queue_events(ring, state);
            if !state.has_packets() {
                break;
            }
            let Some(buffer) = ring.pop() else {
                break;
            };
            let (bytes, used_len) = match state.for_guest.pop_front() {
                // It is none of these, as was looked at above.
                None | Some(ForGuest::Events(_)) => {
                    ring.unpop(&buffer);
                    break;
                }
                Some(ForGuest::Raw { bytes, used_len }) => (bytes, used_len),
                Some(ForGuest::Packet(packet)) => {
                    let Some((packet, rest)) = packet.split_to_fit(buffer.room()) else {
                        // No packet fits, so the buffer goes back empty and the packet is lost.
                        ring.add_used(&buffer, 0);
                        used = true;
                        continue;
                    };
                    if let Some(rest) = rest {
                        state.for_guest.push_front(ForGuest::Packet(rest));
                    }
                    (packet.to_bytes(), None)
                }
            };
            let written = buffer.write(&self.memory.memory(), &bytes).unwrap_or(0);
            ring.add_used(&buffer, used_len.unwrap_or(written));
            used = true;
        }
        used
    }

    /// Gives events to the guest; one without a buffer waits.
    fn process_events(&self, device: &Shared, ring: &Ring<'_>, state: &mut State) -> bool {
        let mut used = false;
        while state.has_events() {
            let Some(buffer) = ring.pop() else {
                break;
            };
            let event = state.events.pop_front().unwrap_or_default();
            let written = buffer.write(&self.memory.memory(), &event).unwrap_or(0);
            ring.add_used(&buffer, written);
            if state.events.len() < state.awaited_events {
                state.awaited_events -= 1;
                if state.awaited_events == 0 {
                    // The packets behind it may go.
                    device.wake();
                }
            }
            used = true;
        }
        used
    }

    fn process_all(&self, device: &Arc<Shared>, vrings: &[Vring]) -> Result<()> {
        let rings: [Ring<'_>; QUEUES] = std::array::from_fn(|queue| self.ring(vrings, queue));
        loop {
            for ring in &rings {
                ring.disable_notification();
            }
            let mut used = [false; QUEUES];
            let silent_events;
            used[TX] = self.process_tx(device, &rings[TX]);
            {
                let mut state = lock(&device.state);
                used[RX] = self.process_rx(&rings[RX], &mut state);
                used[EVENT] = self.process_events(device, &rings[EVENT], &mut state);
                while let Some((queue, descriptor)) = state.forged_completions.pop_front() {
                    let queue = match queue {
                        Queue::Rx => RX,
                        Queue::Tx => TX,
                        Queue::Event => EVENT,
                    };
                    rings[queue].forge_used(descriptor, 1);
                    rings[queue].interrupt()?;
                    used[queue] = true;
                }
                silent_events = used[EVENT] && std::mem::take(&mut state.silent_events);
            }
            for (queue, ring) in rings.iter().enumerate() {
                let silent = queue == EVENT && silent_events;
                if used[queue] && !silent && ring.needs_notification() {
                    ring.interrupt()?;
                }
            }
            // Whatever the guest added before it knew that it has to notify is looked at now. That may be the buffer
            // for a packet which found none above.
            let available = std::array::from_fn(|queue| rings[queue].enable_notification());
            {
                // Buffers that the guest adds after this make it notify.
                let mut state = lock(&device.state);
                state.posted = (rings[RX].posted(), rings[EVENT].posted());
                device.changed.notify_all();
            }
            if !goes_on(device, available) {
                break;
            }
            if used == [false; QUEUES] {
                // Begun anew, so that the device can be stopped in between if the guest has broken a ring.
                device.wake();
                break;
            }
        }
        let wakes_others = lock(&device.state).lets_others_go_on();
        if wakes_others {
            device.switch.wake_all();
        }
        Ok(())
    }
}

/// Queues the events that are before the next packet; it waits for them.
fn queue_events(rx: &Ring<'_>, state: &mut State) {
    while let (false, Some(ForGuest::Events(events))) = (state.hold_rx, state.for_guest.front_mut())
    {
        let mut events = std::mem::take(events);
        for event in &mut events {
            set_rx_used(event, rx.used());
        }
        state.for_guest.pop_front();
        state.awaited_events += events.len();
        state.events.extend(events);
    }
}

/// Whether a device has something to do with the buffers that are available, queue by queue. The others wait for
/// somebody else, who wakes the device.
fn goes_on(device: &Arc<Shared>, available: [bool; QUEUES]) -> bool {
    if available[TX] && device.takes_packets() {
        return true;
    }
    let state = lock(&device.state);
    (available[RX] && state.has_packets()) || (available[EVENT] && state.has_events())
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
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | self.device.features
    }

    fn acked_features(&self, features: u64) {
        // QEMU sends them when the driver begins.
        let accepted = &self.device.accepted_features;
        accepted.store(features, Ordering::Relaxed);
        let is_packed = features & (1 << VIRTIO_F_RING_PACKED) != 0;
        self.has_packed_rings.store(is_packed, Ordering::Relaxed);
        self.rings.iter().for_each(RingState::reset);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // QEMU wants the latter two for VIRTIO_F_ACCESS_PLATFORM.
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::DEVICE_STATE
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The library tells the queues.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.device.guest_cid().to_le_bytes();
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
        vrings: &[Vring],
        _thread: usize,
    ) -> Result<()> {
        let device = &self.device;
        if device_event == WAKE {
            device.drain_wake();
        }
        let _working = lock(&self.working);
        if vrings
            .iter()
            .any(|vring| !vring.get_ref().get_queue().ready())
        {
            // The guest has not started the device yet, or has stopped it.
            return Ok(());
        }
        device.begin();
        self.process_all(device, vrings)
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without one, the library waits for its thread for ever.
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn stop_vring(&self, queue: u32) -> Result<()> {
        // The library has marked the queue: whoever works on it by now is the last one.
        let _working = lock(&self.working);
        let mut state = lock(&self.device.state);
        match queue as usize {
            RX => state.posted.0 = 0,
            EVENT => state.posted.1 = 0,
            _ => (),
        }
        Ok(())
    }

    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        mut file: File,
    ) -> Result<Option<File>> {
        let device = self.device.clone();
        let transfer = match direction {
            VhostTransferStateDirection::SAVE => {
                let state = device.save().to_bytes();
                std::thread::spawn(move || file.write_all(&state).context("writing the state"))
            }
            VhostTransferStateDirection::LOAD => std::thread::spawn(move || {
                let mut bytes = Vec::new();
                file.take(state::MAX_LEN as u64 + 1)
                    .read_to_end(&mut bytes)
                    .context("reading the state")?;
                device.load(DeviceState::parse(&bytes)?)
            }),
        };
        *lock(&self.transfer) = Some(transfer);
        Ok(None)
    }

    fn check_device_state(&self) -> Result<()> {
        let transfer = lock(&self.transfer).take();
        transfer
            .ok_or_else(|| Error::other("no state was transferred"))?
            .join()
            .map_err(|_| Error::other("a thread panicked"))?
            .map_err(|error| {
                // The frontend is told only that it failed.
                eprintln!("vsock-device: {error:#}");
                Error::other(error)
            })
    }
}
