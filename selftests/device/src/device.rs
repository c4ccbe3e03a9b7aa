// SPDX-License-Identifier: GPL-2.0

//! The handle of a device: what tests do with it.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use serde::{Deserialize, Serialize};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_RING_PACKED;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::backend::{Backend, WAKE};
use crate::blob::Part;
use crate::bridge::{Bridge, Key};
use crate::packet::{Op, Packet, SEQ_END_FLAGS};
use crate::state::DeviceState;
use crate::switch::Switch;
use crate::update::{Update, FEATURE_CHECKPOINT};
use crate::HOST_CID;

/// How many packets may wait for a guest before the switch takes no more from the others.
const CONGESTED: usize = 512;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
pub(crate) const EVENT_TRANSPORT_RESET: u32 = 0;

/// `VIRTIO_F_INDIRECT_DESC`.
pub const FEATURE_INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// `VIRTIO_F_EVENT_IDX`.
pub const FEATURE_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// What rings of a device can do that nothing else is said of.
pub const RING_FEATURES: u64 = FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC;

/// `VIRTIO_F_RING_PACKED`: rings of the packed layout.
pub const FEATURE_RING_PACKED: u64 = 1 << VIRTIO_F_RING_PACKED;

/// Locks a mutex. What it guards stays consistent when a thread panics, so poison does not matter.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What a device is like.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// The socket that QEMU connects to.
    pub socket: PathBuf,
    /// The guest's CID.
    pub guest_cid: u64,
    /// Path of the host's Unix sockets; see [`Bridge`].
    pub uds_path: Option<PathBuf>,
    /// The host's CID.
    pub host_cid: u64,
    /// Feature bits to offer besides `VIRTIO_F_VERSION_1`, those of the rings among them.
    pub features: u64,
}

impl DeviceConfig {
    /// A device with stream and seqpacket sockets.
    pub fn new(socket: impl Into<PathBuf>, guest_cid: u64) -> Self {
        Self {
            socket: socket.into(),
            guest_cid,
            uds_path: None,
            host_cid: HOST_CID,
            features: RING_FEATURES | 0b11,
        }
    }
}

/// Which virtqueue is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    Rx,
    Tx,
    Event,
}

/// What goes to the guest in the receive queue, or waits for it to go there.
pub(crate) enum ForGuest {
    /// A packet, split where a buffer is smaller.
    Packet(Packet),
    /// Bytes as a test wants them, with the used length that it wants.
    Raw {
        bytes: Vec<u8>,
        used_len: Option<u32>,
    },
    /// The events of an update or of a transport reset, which are made available before the packets behind them.
    Events(Vec<Vec<u8>>),
}

/// A connection to another guest: its CID and port, and the port of this one.
pub(crate) type BetweenGuests = (u64, u32, u32);

/// What device and test share.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) guest_cid: u64,
    pub(crate) for_guest: VecDeque<ForGuest>,
    pub(crate) events: VecDeque<Vec<u8>>,
    /// So many of `events`, and all before them, come before the next packet.
    pub(crate) awaited_events: usize,
    /// Used entries that nobody asked for: queue and descriptor.
    pub(crate) forged_completions: VecDeque<(Queue, u16)>,
    pub(crate) hold_rx: bool,
    pub(crate) hold_tx: bool,
    pub(crate) hold_events: bool,
    /// Events are made available, and the driver is not notified of them.
    pub(crate) silent_events: bool,
    /// Whether packets of the guest go to the observers only.
    pub(crate) manual: bool,
    pub(crate) observers: Vec<Sender<Packet>>,
    /// The device has begun to work on the virtqueues.
    pub(crate) begun: bool,
    /// The device's state was asked for: it works on no virtqueue any more.
    pub(crate) stopped: bool,
    /// What the guest's last device has left.
    pub(crate) inherited: Option<DeviceState>,
    /// Addresses of before the last migrations, by which packets of the guest may still come.
    pub(crate) before: Vec<Addresses>,
    /// The last update that the guest was sent.
    pub(crate) generation: u32,
    /// Packets of other guests on connections of which the guest was told and has not answered.
    pub(crate) held: HashMap<BetweenGuests, Vec<Packet>>,
    /// Buffers that the driver has posted and the device not used: receive queue, event queue.
    pub(crate) posted: (u16, u16),
    /// Whether another device has stopped taking packets because too many wait here.
    pub(crate) others_wait: bool,
}

impl State {
    /// Whether there are packets, or events before them, that the guest may get now.
    pub(crate) fn has_packets(&self) -> bool {
        !self.hold_rx && self.awaited_events == 0 && !self.for_guest.is_empty()
    }

    /// Whether there are events that the guest may get now.
    pub(crate) fn has_events(&self) -> bool {
        !self.hold_events && !self.events.is_empty()
    }

    /// Whether others have to be woken: they wait for this device, and need not any more. It is said once.
    pub(crate) fn lets_others_go_on(&mut self) -> bool {
        self.for_guest.len() < CONGESTED && std::mem::take(&mut self.others_wait)
    }

    fn push_transport_reset(&mut self) {
        let event = EVENT_TRANSPORT_RESET.to_le_bytes().to_vec();
        self.for_guest.push_back(ForGuest::Events(vec![event]));
    }

    /// Appends a packet, where it is not held back.
    pub(crate) fn push_packet(&mut self, packet: Packet) {
        let connection = (packet.src_cid, packet.src_port, packet.dst_port);
        match self.held.get_mut(&connection) {
            Some(held) => held.push(packet),
            None => self.for_guest.push_back(ForGuest::Packet(packet)),
        }
    }
}

/// The part of a device that other threads may use.
pub(crate) struct Shared {
    pub(crate) state: Mutex<State>,
    pub(crate) changed: Condvar,
    pub(crate) switch: Arc<Switch>,
    pub(crate) features: u64,
    /// Those that the driver has accepted.
    pub(crate) accepted_features: AtomicU64,
    pub(crate) host_cid: u64,
    /// Wakes the thread of the virtqueues.
    wake: EventFd,
    bridge: OnceLock<Arc<Bridge>>,
}

/// CIDs of the guest and of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    pub guest_cid: u64,
    pub host_cid: u64,
}

impl Shared {
    pub(crate) fn wake(&self) {
        // It fails only where the counter is about to overflow, and then the device is awake.
        let _ = self.wake.write(1);
    }

    pub(crate) fn drain_wake(&self) {
        let _ = self.wake.read();
    }

    pub(crate) fn driver_knows_updates(&self) -> bool {
        self.accepted_features.load(Ordering::Relaxed) & FEATURE_CHECKPOINT != 0
    }

    pub(crate) fn guest_cid(&self) -> u64 {
        lock(&self.state).guest_cid
    }

    /// The present addresses, and those of before by which packets may still come.
    pub(crate) fn addresses(&self) -> (Addresses, Vec<Addresses>) {
        let state = lock(&self.state);
        let now = Addresses {
            guest_cid: state.guest_cid,
            host_cid: self.host_cid,
        };
        (now, state.before.clone())
    }

    /// Sends the guest a packet of another guest; gives it back where the guest is about to move.
    pub(crate) fn send_between_guests(&self, packet: Packet) -> std::result::Result<(), Packet> {
        let mut state = lock(&self.state);
        if state.stopped {
            return Err(packet);
        }
        state.push_packet(packet);
        drop(state);
        self.wake();
        Ok(())
    }

    pub(crate) fn bridge(&self) -> Option<Arc<Bridge>> {
        self.bridge.get().cloned()
    }

    /// Whether packets are taken from the guest now. When that changes, the device is woken.
    pub(crate) fn takes_packets(self: &Arc<Self>) -> bool {
        let is_held = lock(&self.state).hold_tx;
        !is_held && !self.is_blocked_by_others()
    }

    /// Whether no packet is taken because too many wait at another device, which wakes this one when that has changed.
    pub(crate) fn is_blocked_by_others(self: &Arc<Self>) -> bool {
        self.switch.is_congested_for(self)
    }

    /// Whether so many packets wait that others should take no more for a while. Whoever is told so is woken when that
    /// has changed.
    pub(crate) fn is_congested(&self) -> bool {
        let mut state = lock(&self.state);
        let is_congested = state.for_guest.len() >= CONGESTED;
        state.others_wait |= is_congested;
        is_congested
    }

    /// Takes back the payload of a connection of the host, by the guest's and the host's port, that the guest has not
    /// got, and throws away its other packets.
    pub(crate) fn take_payload_for_guest(&self, (guest_port, host_port): Key) -> Vec<Part> {
        let mut parts = Vec::new();
        lock(&self.state)
            .for_guest
            .retain_mut(|waiting| match waiting {
                ForGuest::Packet(packet)
                    if packet.dst_port == guest_port
                        && packet.src_port == host_port
                        && packet.src_cid == self.host_cid =>
                {
                    if packet.op == Op::RW {
                        parts.push(Part {
                            flags: packet.flags & SEQ_END_FLAGS,
                            payload: std::mem::take(&mut packet.payload),
                        });
                    }
                    false
                }
                _ => true,
            });
        parts
    }

    pub(crate) fn send_to_guest(&self, packet: Packet) {
        lock(&self.state)
            .for_guest
            .push_back(ForGuest::Packet(packet));
        self.wake();
    }
}

/// A device that serves one guest. Dropping it ends it.
pub struct Device {
    pub(crate) shared: Arc<Shared>,
    serving: Option<JoinHandle<()>>,
    socket: PathBuf,
}

impl Device {
    /// Starts a device; QEMU can connect when this returns.
    pub fn start(config: DeviceConfig, switch: Arc<Switch>) -> Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                guest_cid: config.guest_cid,
                ..State::default()
            }),
            changed: Condvar::new(),
            switch,
            features: config.features,
            accepted_features: AtomicU64::new(0),
            host_cid: config.host_cid,
            wake: EventFd::new(EFD_NONBLOCK).context("making an eventfd")?,
            bridge: OnceLock::new(),
        });
        shared.switch.connect(config.guest_cid, &shared);
        if let Some(path) = &config.uds_path {
            let bridge = Bridge::start(path, &shared)?;
            // It is set once, here.
            let _ = shared.bridge.set(bridge);
        }

        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::<()>::new());
        let backend = Arc::new(Backend::new(shared.clone(), memory.clone()));
        let mut daemon = VhostUserDaemon::new("vsock-device".to_owned(), backend, memory)
            .map_err(|error| anyhow::anyhow!("starting the vhost-user backend: {error}"))?;
        for handler in daemon.get_epoll_handlers() {
            handler
                .register_listener(shared.wake.as_raw_fd(), EventSet::IN, WAKE.into())
                .context("watching the device's eventfd")?;
        }
        let mut listener = Listener::new(&config.socket, true).map_err(|error| {
            anyhow::anyhow!("listening on {}: {error}", config.socket.display())
        })?;
        let serving = std::thread::Builder::new()
            .name(format!("vsock-device-{}", config.guest_cid))
            .spawn(move || {
                if let Err(error) = daemon.start(&mut listener) {
                    eprintln!("vsock-device: {error}");
                    return;
                }
                // It removes its socket, whose name may be another device's once QEMU has ended.
                drop(listener);
                // QEMU ends the connection when it ends; that is no error.
                let _ = daemon.wait();
            })
            .context("starting the device's thread")?;
        Ok(Self {
            shared,
            serving: Some(serving),
            socket: config.socket,
        })
    }

    /// Waits until QEMU has gone.
    pub fn wait(mut self) {
        if let Some(serving) = self.serving.take() {
            let _ = serving.join();
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut lock(&self.shared.state));
        self.shared.wake();
    }

    /// Waits until `ready` holds, or says what it waited for.
    fn wait_until(
        &self,
        what: &str,
        limit: Duration,
        ready: impl Fn(&State) -> bool,
    ) -> Result<()> {
        let end = Instant::now() + limit;
        let mut state = lock(&self.shared.state);
        while !ready(&state) {
            let Some(left) = end.checked_duration_since(Instant::now()) else {
                bail!("waited {} s for {what}", limit.as_secs());
            };
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(state, _)| state);
        }
        Ok(())
    }

    /// Waits until the driver has posted receive and event buffers.
    pub fn wait_ready(&self, limit: Duration) -> Result<()> {
        self.wait_until("the driver to post its buffers", limit, |state| {
            state.posted.0 > 0 && state.posted.1 > 0
        })
    }

    /// Waits until everything that was injected is with the guest.
    pub fn wait_delivered(&self, limit: Duration) -> Result<()> {
        self.wait_until("the guest to take its packets and events", limit, |state| {
            state.for_guest.is_empty() && state.events.is_empty()
        })
    }

    /// Sends the guest a packet.
    pub fn inject(&self, packet: Packet) {
        self.shared.send_to_guest(packet);
    }

    /// Sends the guest bytes, with a used length that need not be theirs.
    pub fn inject_raw(&self, bytes: Vec<u8>, used_len: Option<u32>) {
        self.change(|state| state.for_guest.push_back(ForGuest::Raw { bytes, used_len }));
    }

    /// Puts entries into a used ring for descriptors that the device was not given. All of them go into the ring that is
    /// there now: the driver may take it away as soon as it has seen the first.
    pub fn forge_completions(&self, queue: Queue, descriptors: &[u16]) {
        self.change(|state| {
            let forged = descriptors.iter().map(|&descriptor| (queue, descriptor));
            state.forged_completions.extend(forged);
        });
    }

    /// All packets that the guest sends from now on.
    pub fn observe(&self) -> Receiver<Packet> {
        let (sender, receiver) = channel();
        lock(&self.shared.state).observers.push(sender);
        receiver
    }

    /// Whether packets of the guest go to observers only, so that a test answers them.
    pub fn set_manual(&self, manual: bool) {
        self.change(|state| state.manual = manual);
    }

    /// Whether the device gives the guest no packets, nor the events between them.
    pub fn hold_rx(&self, hold: bool) {
        self.change(|state| state.hold_rx = hold);
    }

    /// Whether the device takes no packets from the guest.
    pub fn hold_tx(&self, hold: bool) {
        self.change(|state| state.hold_tx = hold);
    }

    /// Whether the device gives the guest no events.
    pub fn hold_events(&self, hold: bool) {
        self.change(|state| state.hold_events = hold);
    }

    /// Sends the guest an event of any bytes.
    pub fn send_event(&self, event: Vec<u8>) {
        self.change(|state| state.events.push_back(event));
    }

    /// Changes `guest_cid` in the configuration space, and where the switch finds the guest.
    pub fn set_guest_cid(&self, cid: u64) {
        lock(&self.shared.state).guest_cid = cid;
        self.shared.switch.connect(cid, &self.shared);
    }

    /// Lets listed connections go on by other addresses: the configuration space first, then the update, then all packets
    /// that are sent from now on.
    pub fn update_cids(&self, update: &Update) {
        self.set_guest_cid(update.new_guest_cid);
        self.send_update_parts(update.to_events());
    }

    /// Like [`update_cids`](Device::update_cids), but the driver is not notified of the event: it finds it when it
    /// receives a packet.
    pub fn update_cids_silently(&self, update: &Update) {
        self.set_guest_cid(update.new_guest_cid);
        self.change(|state| {
            state
                .for_guest
                .push_back(ForGuest::Events(update.to_events()));
            state.silent_events = true;
        });
    }

    /// Sends parts of an update, as they are but for `rx_used`.
    pub fn send_update_parts(&self, parts: Vec<Vec<u8>>) {
        self.change(|state| state.for_guest.push_back(ForGuest::Events(parts)));
    }

    /// Ends all connections and gives the guest another CID, or the same: the configuration space first, then the event, then
    /// all packets that are sent from now on.
    pub fn transport_reset(&self, cid: u64) {
        self.set_guest_cid(cid);
        if let Some(bridge) = self.shared.bridge() {
            bridge.forget_all();
        }
        self.change(State::push_transport_reset);
    }

    /// Ends all connections like [`transport_reset`](Device::transport_reset), and sends a packet after that; the driver is
    /// notified of the packet only. Where queues share an interrupt the driver looks at both.
    pub fn transport_reset_silently(&self, cid: u64, packet: Packet) {
        self.set_guest_cid(cid);
        self.change(|state| {
            state.push_transport_reset();
            state.for_guest.push_back(ForGuest::Packet(packet));
            state.silent_events = true;
        });
    }

    /// Buffers that the driver has posted and the device has not used: receive queue, event queue.
    pub fn posted_buffers(&self) -> (u16, u16) {
        lock(&self.shared.state).posted
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Some(bridge) = self.shared.bridge() {
            bridge.stop();
        }
        // A device that QEMU never connected to waits for it; a connection ends the wait.
        if let Some(serving) = self.serving.take() {
            let _ = std::os::unix::net::UnixStream::connect(&self.socket);
            if serving.is_finished() {
                let _ = serving.join();
            }
        }
    }
}
