// SPDX-License-Identifier: GPL-2.0

//! Moves a guest from one device to another, each of which may be a process of its own.
//!
//! QEMU has one vhost-user backend for a guest's life. A [`Relay`] is that, and is a frontend to the device that has the
//! guest at the moment. At a migration it does to both devices what QEMU does on the two hosts: it stops the virtqueues
//! of the one, takes its state, and gives state, memory and virtqueues, with their bases, to the other one. The guest is
//! free to run meanwhile.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use anyhow::{anyhow, ensure, Context, Result};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserInflight, VhostUserLog, VhostUserMemoryRegion,
    VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendListener, Error, Frontend, GpuBackend, Listener, Result as VhostUserResult,
    VhostUserBackendReqHandlerMut, VhostUserFrontend,
};
use vhost::{VhostBackend, VhostUserMemoryRegionBase, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use crate::device::lock;

/// Virtqueues of a socket device.
const QUEUES: usize = 3;

/// Stands between QEMU and the devices of one guest.
pub struct Relay {
    guest: Arc<Mutex<Guest>>,
    serving: JoinHandle<()>,
    socket: PathBuf,
}

impl Relay {
    /// Starts a relay to the device at `device`; QEMU can connect to `socket` when this returns.
    pub fn start(socket: &Path, device: &Path) -> Result<Self> {
        let guest = Arc::new(Mutex::new(Guest {
            device: connect(device)?,
            state: None,
            features: 0,
            memory: Vec::new(),
            rings: Default::default(),
        }));
        let mut listener = Listener::new(socket, true)
            .map_err(|error| anyhow!("listening on {}: {error}", socket.display()))?;
        let handler = guest.clone();
        let serving = std::thread::Builder::new()
            .name("vsock-relay".to_owned())
            .spawn(move || {
                let accepted = BackendListener::new(&mut listener, handler)
                    .and_then(|mut listener| listener.accept());
                let Ok(Some(mut requests)) = accepted else {
                    return;
                };
                // It removes its socket, whose name may be another relay's once QEMU has ended.
                drop(listener);
                // QEMU ends the connection when it ends; that is no error.
                while requests.handle_request().is_ok() {}
            })
            .context("starting the relay's thread")?;
        Ok(Self {
            guest,
            serving,
            socket: socket.to_owned(),
        })
    }

    /// Stops the device that has the guest, and takes its state.
    pub fn stop(&self) -> Result<()> {
        lock(&self.guest).stop()
    }

    /// Lets the guest go on with the device at `device`. The one that was [stopped](Relay::stop) is told no more.
    pub fn go_on(&self, device: &Path) -> Result<()> {
        lock(&self.guest).go_on(device)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if !self.serving.is_finished() {
            // Where QEMU never connected, this ends the wait for it.
            let _ = UnixStream::connect(&self.socket);
        }
    }
}

/// What QEMU has said of a guest, as each of its devices has to be told.
struct Guest {
    device: Frontend,
    /// The state of the device, where it is stopped.
    state: Option<Vec<u8>>,
    features: u64,
    memory: Vec<(VhostUserMemoryRegion, File)>,
    rings: [Ring; QUEUES],
}

#[derive(Default)]
struct Ring {
    size: u16,
    addresses: VringConfigData,
    base: u16,
    /// The ring is started where it has this.
    kick: Option<EventFd>,
    call: Option<EventFd>,
    enabled: bool,
}

/// Connects to a device.
fn connect(device: &Path) -> Result<Frontend> {
    let mut frontend = Frontend::connect(device, QUEUES as u64)
        .with_context(|| format!("connecting to {}", device.display()))?;
    frontend.set_owner()?;
    frontend.get_features()?;
    let wanted = VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::DEVICE_STATE;
    let has = frontend.get_protocol_features()?;
    ensure!(
        has.contains(wanted),
        "the device's protocol features are {has:?}"
    );
    frontend.set_protocol_features(wanted)?;
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    Ok(frontend)
}

impl Guest {
    fn stop(&mut self) -> Result<()> {
        ensure!(self.state.is_none(), "the device is stopped already");
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if ring.kick.is_some() {
                ring.base = self.device.get_vring_base(index)? as u16;
            }
        }
        let mut state = Vec::new();
        self.transfer(VhostTransferStateDirection::SAVE)?
            .read_to_end(&mut state)
            .context("reading the device's state")?;
        self.device.check_device_state()?;
        self.state = Some(state);
        Ok(())
    }

    fn go_on(&mut self, device: &Path) -> Result<()> {
        let state = self.state.take().context("the device is not stopped")?;
        self.device = connect(device)?;
        // The device has it all when this end is closed, which the statement does.
        self.transfer(VhostTransferStateDirection::LOAD)?
            .write_all(&state)
            .context("writing the device's state")?;
        self.device.check_device_state()?;
        if self.features != 0 {
            self.device.set_features(self.features)?;
        }
        self.send_memory()?;
        for (index, ring) in self.rings.iter().enumerate() {
            if ring.kick.is_some() {
                ring.start(index, &mut self.device)?;
            }
        }
        Ok(())
    }

    /// Begins to transfer the device's state; returns our end of the channel.
    fn transfer(&self, direction: VhostTransferStateDirection) -> Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let phase = VhostTransferStatePhase::STOPPED;
        let other = self
            .device
            .set_device_state_fd(direction, phase, OwnedFd::from(theirs))?;
        ensure!(other.is_none(), "the device wants a channel of its own");
        Ok(ours)
    }

    fn send_memory(&self) -> vhost::Result<()> {
        if self.memory.is_empty() {
            return Ok(());
        }
        let regions: Vec<_> = self
            .memory
            .iter()
            .map(|(region, file)| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.guest_phys_addr,
                memory_size: region.memory_size,
                userspace_addr: region.user_addr,
                mmap_offset: region.mmap_offset,
                mmap_handle: file.as_raw_fd(),
            })
            .collect();
        self.device.set_mem_table(&regions).map(drop)
    }

    fn ring(&mut self, index: u32) -> VhostUserResult<&mut Ring> {
        self.rings
            .get_mut(index as usize)
            .ok_or(Error::InvalidParam)
    }

    /// Tells the device what has changed, where it is not stopped.
    fn tell(
        &mut self,
        tell: impl FnOnce(&mut Frontend) -> vhost::Result<()>,
    ) -> VhostUserResult<()> {
        if self.state.is_some() {
            return Ok(());
        }
        tell(&mut self.device).map_err(device_failed)
    }
}

impl Ring {
    fn start(&self, index: usize, device: &mut Frontend) -> vhost::Result<()> {
        device.set_vring_num(index, self.size)?;
        device.set_vring_base(index, self.base)?;
        device.set_vring_addr(index, &self.addresses)?;
        if let Some(call) = &self.call {
            device.set_vring_call(index, call)?;
        }
        if let Some(kick) = &self.kick {
            device.set_vring_kick(index, kick)?;
        }
        device.set_vring_enable(index, self.enabled)
    }
}

fn device_failed(error: vhost::Error) -> Error {
    Error::ReqHandlerError(std::io::Error::other(error.to_string()))
}

fn not_offered<T>() -> VhostUserResult<T> {
    Err(Error::InvalidOperation("the relay does not offer this"))
}

fn event_fd(file: Option<File>) -> Option<EventFd> {
    // SAFETY: The file gives its descriptor up, which nobody else has.
    file.map(|file| unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}

impl VhostUserBackendReqHandlerMut for Guest {
    fn set_owner(&mut self) -> VhostUserResult<()> {
        // The relay is the owner of each device.
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostUserResult<()> {
        not_offered()
    }

    fn reset_device(&mut self) -> VhostUserResult<()> {
        not_offered()
    }

    fn get_features(&mut self) -> VhostUserResult<u64> {
        self.device.get_features().map_err(device_failed)
    }

    fn set_features(&mut self, features: u64) -> VhostUserResult<()> {
        self.features = features;
        self.tell(|device| device.set_features(features))
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> VhostUserResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.memory = regions.iter().copied().zip(files).collect();
        if self.state.is_none() {
            self.send_memory().map_err(device_failed)?;
        }
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> VhostUserResult<()> {
        let size = u16::try_from(size).map_err(|_| Error::InvalidParam)?;
        self.ring(index)?.size = size;
        self.tell(|device| device.set_vring_num(index as usize, size))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostUserResult<()> {
        let ring = self.ring(index)?;
        let addresses = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: flags.bits(),
            desc_table_addr: descriptor,
            used_ring_addr: used,
            avail_ring_addr: available,
            log_addr: None,
        };
        ring.addresses = addresses;
        self.tell(|device| device.set_vring_addr(index as usize, &addresses))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostUserResult<()> {
        // Of a packed ring there is another place in the upper half, which devices like ours do not need.
        let base = base as u16;
        self.ring(index)?.base = base;
        self.tell(|device| device.set_vring_base(index as usize, base))
    }

    fn get_vring_base(&mut self, index: u32) -> VhostUserResult<VhostUserVringState> {
        let running = self.state.is_none();
        let device = self.device.clone();
        let ring = self.ring(index)?;
        if running {
            let base = device.get_vring_base(index as usize);
            ring.base = base.map_err(device_failed)? as u16;
        }
        ring.kick = None;
        Ok(VhostUserVringState::new(index, ring.base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> VhostUserResult<()> {
        self.set_fd(
            index,
            file,
            |ring| &mut ring.kick,
            |device, index, fd| device.set_vring_kick(index, fd),
        )
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> VhostUserResult<()> {
        self.set_fd(
            index,
            file,
            |ring| &mut ring.call,
            |device, index, fd| device.set_vring_call(index, fd),
        )
    }

    fn set_vring_err(&mut self, _index: u8, _file: Option<File>) -> VhostUserResult<()> {
        // No device of ours uses it.
        Ok(())
    }

    fn get_protocol_features(&mut self) -> VhostUserResult<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn set_protocol_features(&mut self, _features: u64) -> VhostUserResult<()> {
        // Those with the device are the relay's own affair.
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostUserResult<u64> {
        Ok(QUEUES as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostUserResult<()> {
        self.ring(index)?.enabled = enable;
        self.tell(|device| device.set_vring_enable(index as usize, enable))
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        flags: VhostUserConfigFlags,
    ) -> VhostUserResult<Vec<u8>> {
        self.device
            .get_config(offset, size, flags, &vec![0; size as usize])
            .map(|(_, config)| config)
            .map_err(device_failed)
    }

    fn set_config(
        &mut self,
        _offset: u32,
        _config: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> VhostUserResult<()> {
        not_offered()
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> VhostUserResult<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostUserResult<File> {
        not_offered()
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> VhostUserResult<(VhostUserInflight, File)> {
        not_offered()
    }

    fn set_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
        _file: File,
    ) -> VhostUserResult<()> {
        not_offered()
    }

    fn get_max_mem_slots(&mut self) -> VhostUserResult<u64> {
        not_offered()
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _file: File,
        _postcopy_listening: Option<bool>,
    ) -> VhostUserResult<Option<VhostUserMemoryRegionBase>> {
        not_offered()
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> VhostUserResult<()> {
        not_offered()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> VhostUserResult<Option<File>> {
        not_offered()
    }

    fn check_device_state(&mut self) -> VhostUserResult<()> {
        not_offered()
    }

    fn get_shmem_config(&mut self) -> VhostUserResult<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> VhostUserResult<()> {
        not_offered()
    }
}

impl Guest {
    /// Notes a descriptor of a ring and passes it on.
    fn set_fd(
        &mut self,
        index: u8,
        file: Option<File>,
        field: impl FnOnce(&mut Ring) -> &mut Option<EventFd>,
        pass: impl FnOnce(&mut Frontend, usize, &EventFd) -> vhost::Result<()>,
    ) -> VhostUserResult<()> {
        let running = self.state.is_none();
        let mut device = self.device.clone();
        let fd = field(self.ring(index.into())?);
        *fd = event_fd(file);
        match fd {
            Some(fd) if running => pass(&mut device, index.into(), fd).map_err(device_failed),
            Some(_) => Ok(()),
            None => Err(Error::InvalidOperation("the devices do not poll")),
        }
    }
}
