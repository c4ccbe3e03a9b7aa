// SPDX-License-Identifier: GPL-2.0

//! The handle of a device: what tests do with it.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::backend::{Backend, WAKE};
use crate::bridge::Bridge;
use crate::packet::Packet;
use crate::switch::Switch;

/// How many packets may wait for a guest before the switch takes no more from the others.
const CONGESTED: usize = 512;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const EVENT_TRANSPORT_RESET: u32 = 0;

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
    /// Device feature bits to offer besides those of virtio itself: `VIRTIO_VSOCK_F_*`.
    pub features: u64,
}

impl DeviceConfig {
    /// A device with stream and seqpacket sockets.
    pub fn new(socket: impl Into<PathBuf>, guest_cid: u64) -> Self {
        Self {
            socket: socket.into(),
            guest_cid,
            uds_path: None,
            features: 0b11,
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

/// Bytes for the guest's receive queue.
pub(crate) enum ForGuest {
    /// A packet, split where a buffer is smaller.
    Packet(Packet),
    /// Bytes as a test wants them, with the used length that it wants.
    Raw {
        bytes: Vec<u8>,
        used_len: Option<u32>,
    },
}

/// What device and test share.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) guest_cid: u64,
    pub(crate) for_guest: VecDeque<ForGuest>,
    pub(crate) events: VecDeque<Vec<u8>>,
    /// Used entries that nobody asked for: queue, descriptor, length.
    pub(crate) forged_completions: VecDeque<(Queue, u16, u32)>,
    pub(crate) hold_rx: bool,
    pub(crate) hold_tx: bool,
    pub(crate) hold_events: bool,
    /// Whether packets of the guest go to the observers only.
    pub(crate) manual: bool,
    pub(crate) observers: Vec<Sender<Packet>>,
    /// Buffers that the driver has posted and the device not used: receive queue, event queue.
    pub(crate) posted: (u16, u16),
    pub(crate) started: bool,
}

/// The part of a device that other threads may use.
pub(crate) struct Shared {
    pub(crate) state: Mutex<State>,
    pub(crate) changed: Condvar,
    pub(crate) switch: Arc<Switch>,
    pub(crate) features: u64,
    wake: EventFd,
    bridge: OnceLock<Arc<Bridge>>,
}

impl Shared {
    pub(crate) fn wake(&self) {
        // It fails only where the counter is about to overflow, and then the device is awake.
        let _ = self.wake.write(1);
    }

    pub(crate) fn drain_wake(&self) {
        let _ = self.wake.read();
    }

    pub(crate) fn guest_cid(&self) -> u64 {
        lock(&self.state).guest_cid
    }

    pub(crate) fn bridge(&self) -> Option<Arc<Bridge>> {
        self.bridge.get().cloned()
    }

    pub(crate) fn is_congested(&self) -> bool {
        lock(&self.state).for_guest.len() >= CONGESTED
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
    shared: Arc<Shared>,
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
            wake: EventFd::new(libc_nonblock()).context("making an eventfd")?,
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
            use std::os::fd::AsRawFd;
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
            state.started && state.posted.0 > 0 && state.posted.1 > 0
        })
    }

    /// Waits until everything that was injected is with the guest.
    pub fn wait_delivered(&self, limit: Duration) -> Result<()> {
        self.wait_until("the guest to take its packets and events", limit, |state| {
            state.for_guest.is_empty()
                && state.events.is_empty()
                && state.forged_completions.is_empty()
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

    /// Puts an entry into a used ring for a descriptor that the device was not given.
    pub fn forge_completion(&self, queue: Queue, descriptor: u16, len: u32) {
        self.change(|state| state.forged_completions.push_back((queue, descriptor, len)));
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

    /// Whether the device gives the guest no packets.
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

    /// Ends all connections and gives the guest another CID, or the same: the configuration space first, then the event.
    pub fn transport_reset(&self, cid: u64) {
        self.set_guest_cid(cid);
        if let Some(bridge) = self.shared.bridge() {
            bridge.forget_all();
        }
        self.send_event(EVENT_TRANSPORT_RESET.to_le_bytes().to_vec());
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

fn libc_nonblock() -> i32 {
    vmm_sys_util::eventfd::EFD_NONBLOCK
}
